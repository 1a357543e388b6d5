"""IP-Adapter for several photos of one person (paper, sections 2 and 3.3–3.5).

    c_i = LayerNorm(Linear(G(Γ_i(x_1), …, Γ_i(x_N))))                    IPAdapter.tokens
    Z_new = Attention(Q, K, V) + λ·Attention(Q, K', V'),
            K' = c_i·W'_k,  V' = c_i·W'_v                             (3) attention.CrossAttention
    L = E ‖ε − ε_θ(c_τ, c_i, t, z_t)‖²                                (1) adapter_loss
    ε̂ = w·ε_θ(x_t, c, t) + (1−w)·ε_θ(x_t, t)                          (11) guided_eps

Γ_i is the CLIP image encoder, G an aggregator (aggregators.py). The adapter owns everything that
trains: G, Linear, LayerNorm, W'_k and W'_v. The UNet is frozen and only borrows W'_k and W'_v, so
`unet.state_dict()` and `unet.parameters()` never contain them.

How we read the paper: what eq. 1 noises is the removed photo's VAE latent. A dropped image
condition is a zeroed embedding; G keeps it zero, so its tokens are LayerNorm(the bias of Linear).

Files have the layout of the published `ip-adapter_sd15`: `image_proj.proj`, `image_proj.norm`,
`ip_adapter.N.to_k_ip` and `to_v_ip` with N = 1, 3, 5, … (text cross-attentions counted down, up,
mid; even numbers are self-attentions). Ours add `aggregator.*`, if it has weights, and metadata.
"""

import copy

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from aggregators import make_aggregator
from ddpm import guide, q_sample, sample
from unet import write_whole


class ImageProjection(nn.Module):
    """Each embedding becomes `tokens` tokens of the text's width: Linear, split, LayerNorm (section 3.3)."""

    def __init__(self, image_dim, cross_dim, tokens=4):
        super().__init__()
        self.proj = nn.Linear(image_dim, tokens * cross_dim)
        self.norm = nn.LayerNorm(cross_dim)

    def forward(self, embeds):
        """(B, M, E) -> (B, M·tokens, D), the tokens of one embedding side by side."""
        return self.norm(self.proj(embeds).reshape(embeds.shape[0], -1, *self.norm.normalized_shape))


def text_attentions(unet):
    """The text cross-attentions of `unet` by their published number: {"1": …, "3": …}, down, up, mid."""
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    return {str(2 * i + 1): layer for i, layer in enumerate(layers)}


class IPAdapter(nn.Module):
    """The trainable part: aggregator, projection, and W'_k, W'_v for every text cross-attention.

    unet: the UNet to attach to (replacing the adapter it has, freezing its weights); W'_k and W'_v
    start as its text projections and have its dtype and device. image_dim: E. agg: see AGGREGATORS.
    tokens: tokens per embedding. attach=False builds the adapter and leaves the UNet alone.
    """

    def __init__(self, unet, image_dim, agg="none", tokens=4, attach=True):
        super().__init__()
        self.agg = agg
        self.image_proj = ImageProjection(image_dim, unet.config["cross_attention_dim"], tokens)
        self.aggregator = make_aggregator(agg, image_dim)
        self.ip_adapter = nn.ModuleDict(
            {
                number: nn.ModuleDict({"to_k_ip": copy.deepcopy(attn.to_k), "to_v_ip": copy.deepcopy(attn.to_v)})
                for number, attn in text_attentions(unet).items()
            }
        )
        weight = next(unet.parameters())
        self.to(weight.device, weight.dtype).requires_grad_(True)
        if attach:
            self.attach(unet)

    def attach(self, unet):
        """Make `unet` read image tokens through this adapter's weights, and freeze its own."""
        unet.requires_grad_(False)
        for number, attn in text_attentions(unet).items():
            # Past nn.Module's registration: the UNet borrows these layers, the adapter owns them.
            vars(attn).update(self.ip_adapter[number].items())

    def tokens(self, embeds):
        """c_i = LayerNorm(Linear(G(embeds))).   embeds (B, N, E) -> c_i (B, M·tokens, D).

        ValueError if E is another image encoder's.
        """
        if embeds.shape[-1] != self.image_proj.proj.in_features:
            wanted, found = self.image_proj.proj.in_features, embeds.shape[-1]
            raise ValueError(f"the adapter reads image embeddings of width {wanted}, not {found}")
        return self.image_proj(self.aggregator(embeds))

    def trainable_parameters(self):
        """Everything that trains: aggregator, Linear, LayerNorm, W'_k and W'_v (section 3.5)."""
        return list(self.parameters())

    def save(self, path, metadata=None):
        """Write a .safetensors file in the published layout, whole or not at all.

        metadata: more strings to keep in the file's header, beside the aggregator's name ("agg").
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        metadata = {"format": "pt", **(metadata or {}), "agg": self.agg}
        write_whole(path, lambda part: save_file(tensors, part, metadata))

    @classmethod
    def load(cls, path, unet, agg=None):
        """Read a published adapter (.safetensors, or .bin with nested keys) or ours, and attach it to `unet`.

        agg: another aggregator than the file's, freshly initialised. ValueError, in one line and before
        `unet` is touched: unreadable, no IP-Adapter, unsupported kind, other width, a tensor missing or misshapen.
        """
        tensors, metadata = read_adapter(path)
        rows, image_dim = tensors["image_proj.proj.weight"].shape
        width, unet_width = len(tensors["image_proj.norm.weight"]), unet.config["cross_attention_dim"]
        if width != unet_width:
            raise ValueError(f"{path} is an adapter for text of width {width}, this UNet reads width {unet_width}")
        file_agg = metadata.get("agg", "none")
        adapter = cls(unet, image_dim, agg or file_agg, rows // width, attach=False)
        expected = adapter.state_dict()
        if adapter.agg != file_agg:
            tensors |= {name: tensor for name, tensor in expected.items() if name.startswith("aggregator.")}
        check_tensors(path, tensors, expected)
        adapter.load_state_dict({name: tensors[name] for name in expected})
        adapter.attach(unet)
        return adapter


UNSUPPORTED = {  # one tensor that only this kind of published file has
    "image_proj.latents": "IP-Adapter Plus",
    "image_proj.perceiver_resampler.proj_in.weight": "IP-Adapter FaceID Plus",
    "image_proj.proj.3.weight": "IP-Adapter Full Face",
    "image_proj.proj.0.weight": "IP-Adapter FaceID",
}


def read_adapter(path):
    """The tensors, by flat published name, and the metadata of an adapter file. ValueError: see IPAdapter.load."""
    try:
        if str(path).endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        else:
            nested, metadata = torch.load(path, map_location="cpu", weights_only=True), {}
            tensors = {f"{part}.{name}": x for part, inner in nested.items() for name, x in inner.items()}
    except Exception as error:  # each reader fails in its own ways; to the user they are one
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot read the adapter {path}: {reason}") from error
    for name, kind in UNSUPPORTED.items():
        if name in tensors:
            raise ValueError(f"{path} is an {kind} file: only the plain IP-Adapter is supported")
    if not any(name.startswith(("image_proj.", "ip_adapter.")) for name in tensors):
        raise ValueError(f"{path} is no IP-Adapter: it has neither image_proj nor ip_adapter tensors")
    for name in ("image_proj.proj.weight", "image_proj.norm.weight"):
        if name not in tensors:
            raise ValueError(f"{path} lacks the tensor {name}")
    return tensors, metadata


def check_tensors(path, tensors, expected):
    """ValueError, naming the tensor, unless `tensors` fits the adapter whose state_dict is `expected`."""
    for name, tensor in expected.items():
        if name not in tensors:
            raise ValueError(f"{path} lacks the tensor {name}")
        if tensors[name].shape != tensor.shape:
            found, wanted = tuple(tensors[name].shape), tuple(tensor.shape)
            raise ValueError(f"{path}: tensor {name} has shape {found}, this UNet needs {wanted}")
    for name in tensors:
        if name.startswith(("image_proj.", "ip_adapter.")) and name not in expected:
            raise ValueError(f"{path}: tensor {name} has no place in this UNet")


def adapter_loss(unet, z_0, t, eps, c_t, c_i, schedule):
    """L = ‖ε − ε_θ(c_τ, c_i, t, z_t)‖²,   z_t = √ᾱ_t·z_0 + √(1−ᾱ_t)·ε   (eq. 1)

    The expectation is the mean over the batch and, as usual, over the numbers of a latent as well.
    z_0, eps (B, C, H, W): the removed photo's latent, and noise; t (B,); c_t (B, L, D) its prompt;
    c_i (B, M, D) the other photos' tokens. Returns a scalar.
    """
    eps_hat = unet(q_sample(z_0, t, eps, schedule), t, c_t, c_i)
    return (eps - eps_hat).square().mean()


def drop(embeds, mask):
    """Zero the embeddings of the rows where mask (B,) is True: how an image condition is dropped (section 3.3)."""
    return embeds.masked_fill(mask[:, None, None], 0)


def drop_conditions(c_t, embeds, null_c_t, p=0.05, generator=None):
    """For each row: the text, the image, or both at once dropped, each with probability p (published scheme).

    c_t (B, L, D); embeds (B, N, E); null_c_t (1, L, D), the empty prompt. Returns c_t and embeds.
    """
    device = generator.device if generator else c_t.device
    u = torch.rand(len(c_t), generator=generator, device=device).to(c_t.device)
    both = u < p
    text, image = both | (u >= 2 * p) & (u < 3 * p), both | (u >= p) & (u < 2 * p)
    return torch.where(text[:, None, None], null_c_t, c_t), drop(embeds, image)


def guided_eps(unet, c_t, c_i, null_c_t, null_c_i, w=7.5, lam=1.0):
    """ε̂ = w·ε_θ(x_t, c, t) + (1−w)·ε_θ(x_t, t)   (eq. 11), as eps_fn(x_t, t) for ddpm.sample.

    Both terms are one batch of 2B; w = 1 needs and computes only the first. c_t (B, L, D), c_i (B, M, D)
    or None; null_c_t: the empty or negative prompt, null_c_i: `tokens` of zeroed embeddings, both for 1 or B rows.
    The UNet works in the precision of c_t, everything after it in that of x_t: w multiplies rounding errors too.
    """
    if w == 1:
        return lambda x_t, t: unet(x_t.to(c_t.dtype), t, c_t, c_i, lam).to(x_t.dtype)
    text = torch.cat([c_t, null_c_t.expand_as(c_t)])
    image = None if c_i is None else torch.cat([c_i, null_c_i.expand_as(c_i)])

    def eps_fn(x_t, t):
        eps_cond, eps_uncond = unet(torch.cat([x_t, x_t]).to(text.dtype), t, text, image, lam).to(x_t.dtype).chunk(2)
        return guide(eps_cond, eps_uncond, w)

    return eps_fn


@torch.inference_mode()
def generate(sd, c_t, null_c_t, c_i=None, null_c_i=None, w=4.0, lam=1.0, steps=30, sampler="dpm", seed=0, progress=False):
    """Pictures from noise: B prompts c_t (B, L, D) and image tokens c_i (B, M, D) -> (B, 3, H, W) in [−1, 1].

    null_c_t, null_c_i, w, lam: as in `guided_eps`; steps, sampler: as in `ddpm.sample`. Picture k starts from
    the noise of seed + k, so it does not depend on how many are made at once (but for sampler="ddpm", which
    draws noise at every step).
    """
    unet, side = sd.unet, sd.unet.config["sample_size"]
    x_T = torch.cat([torch.randn(1, unet.config["in_channels"], side, side, generator=torch.Generator().manual_seed(seed + k))
                     for k in range(len(c_t))])
    eps_fn = guided_eps(unet, c_t, c_i, null_c_t, null_c_i, w, lam)
    generator = torch.Generator(c_t.device).manual_seed(seed + 2**31)   # no x_T's: ε is independent
    return sd.decode_latents(sample(eps_fn, x_T.to(c_t.device), sd.schedule, steps, sampler, generator, progress))
