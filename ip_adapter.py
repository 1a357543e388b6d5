"""IP-Adapter for several photos of one person (paper, sections 2 and 3.3–3.5).

    c_i = LayerNorm(Linear(G(Γ_i(x_1), …, Γ_i(x_N))))                    IPAdapter.tokens
    Z_new = Attention(Q, K, V) + λ·Attention(Q, K', V'),
            K' = c_i·W'_k,  V' = c_i·W'_v                             (3) attention.CrossAttention
    L = E ‖ε − ε_θ(c_τ, c_i, t, z_t)‖²                                (1) adapter_loss
    ε̂ = w·ε_θ(x_t, c, t) + (1−w)·ε_θ(x_t, t)                          (11) make_guided_eps

Γ_i is the CLIP image encoder, G an aggregator (aggregators.py). The adapter owns everything that
trains: G, Linear, LayerNorm, W'_k and W'_v; at the size of Stable Diffusion 1.5, 22,319,616 numbers
without G's. The UNet is frozen and only borrows W'_k and W'_v.

Files have the layout of the published `ip-adapter_sd15`: `image_proj.proj`, `image_proj.norm`,
`ip_adapter.N.to_k_ip` and `to_v_ip` with N = 1, 3, 5, … (text cross-attentions counted down, up,
mid; even numbers are self-attentions). Ours add `aggregator.*`, if it has weights, and metadata.
"""

import copy

import torch
from torch import nn

from aggregators import make_aggregator
from ddpm import guide, q_sample, rescale_guidance, sample
from support.checkpoints import adapter_sizes, check_adapter, read_adapter
from support.configs import naming
from support.devices import is_large
from support.files import save_tensors
from support.finite import check_finite


class ImageProjection(nn.Module):
    """Each embedding becomes `per_image` tokens of the text's width: Linear, split, LayerNorm (3.3)."""

    def __init__(self, image_dim, cross_dim, per_image=4):
        super().__init__()
        self.cross_dim = cross_dim
        self.proj = nn.Linear(image_dim, per_image * cross_dim)
        self.norm = nn.LayerNorm(cross_dim)

    def forward(self, embeds):
        """(B, M, E) -> (B, 4M, D) with four per image, the tokens of one embedding side by side."""
        x = self.proj(embeds)  # (B, M, 4D)
        x = x.reshape(len(embeds), -1, self.cross_dim)  # (B, 4M, D)
        return self.norm(x)


def text_attentions(unet):
    """The text cross-attentions of `unet` by their published number: {"1": …, "3": …}."""
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    return {str(2 * i + 1): layer for i, layer in enumerate(layers)}


class IPAdapter(nn.Module):
    """The trainable part: aggregator, projection, and W'_k, W'_v for every text cross-attention.

    unet: the UNet to attach to (replacing the adapter it has, freezing its weights); W'_k and W'_v
    start as copies of its W_k and W_v and have its dtype and device. image_dim: E. agg: a name in
    AGGREGATORS. per_image: tokens per embedding. attach=False: leaves the UNet alone.
    """

    def __init__(self, unet, image_dim, agg="none", per_image=4, attach=True):
        super().__init__()
        self.agg = agg
        self.image_proj = ImageProjection(image_dim, unet.config["cross_attention_dim"], per_image)
        self.aggregator = make_aggregator(agg, image_dim)
        self.ip_adapter = nn.ModuleDict()
        for number, attn in text_attentions(unet).items():
            to_k_ip = copy.deepcopy(attn.to_k)
            to_v_ip = copy.deepcopy(attn.to_v)
            self.ip_adapter[number] = nn.ModuleDict({"to_k_ip": to_k_ip, "to_v_ip": to_v_ip})
        weight = next(unet.parameters())
        self.to(weight.device, weight.dtype).requires_grad_(True)
        if attach:
            self.attach(unet)

    def attach(self, unet):
        """Make `unet` read image tokens through this adapter's weights, and freeze its own.

        The layers are lent as a tuple, which nn.Module does not register: `unet.state_dict()` and
        `unet.parameters()` never contain them (attention.CrossAttention says why).
        """
        unet.requires_grad_(False)
        self.lend(unet)

    def lend(self, unet):
        """`attach` that leaves the UNet's weights as they are, trainable or not."""
        for number, attn in text_attentions(unet).items():
            layers = self.ip_adapter[number]
            attn.image_kv = (layers["to_k_ip"], layers["to_v_ip"])

    def tokens(self, embeds):
        """c_i = LayerNorm(Linear(G(embeds))).   embeds (B, N, E) -> c_i (B, 4M, D).

        ValueError if E is another image encoder's.
        """
        wanted = self.image_proj.proj.in_features
        found = embeds.shape[-1]
        if found != wanted:
            hint = "name its own with --image-encoder"
            raise ValueError(f"the adapter reads image embeddings of width {wanted}, not {found}: {hint}")
        return self.image_proj(self.aggregator(embeds))

    def trainable_parameters(self):
        """Everything that trains: aggregator, Linear, LayerNorm, W'_k and W'_v (section 3.5)."""
        return list(self.parameters())

    def save(self, path, metadata=None):
        """Write a .safetensors file in the published layout, whole or not at all.

        metadata: more strings to keep in its header, beside the aggregator's name ("agg").
        """
        metadata = {"format": "pt", **(metadata or {}), "agg": self.agg}
        save_tensors(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path, unet, agg=None):
        """Read an adapter file, published (.safetensors, or .bin) or ours, and attach it to `unet`.

        agg: another aggregator than the file's, freshly initialised. ValueError, in one line and
        before `unet` is touched: unreadable, no IP-Adapter, unsupported kind, other width, a tensor
        missing or misshapen.
        """
        tensors, metadata = read_adapter(path, next(unet.parameters()).dtype)
        image_dim, per_image, width = adapter_sizes(path, tensors)
        unet_width = unet.config["cross_attention_dim"]
        if width != unet_width:
            text = f"for text of width {width}, this UNet reads width {unet_width}"
            raise ValueError(f"{path} is an adapter {text}")
        file_agg = metadata.get("agg", "none")
        with naming(path):
            adapter = cls(unet, image_dim, agg or file_agg, per_image, attach=False)
        expected = adapter.state_dict()
        if adapter.agg != file_agg:  # the file knows nothing of this aggregator: keep the fresh one
            tensors = {name: x for name, x in tensors.items() if not name.startswith("aggregator.")}
            fresh = {name: x for name, x in expected.items() if name.startswith("aggregator.")}
            tensors.update(fresh)
        check_adapter(path, tensors, expected)
        adapter.load_state_dict({name: tensors[name] for name in expected})
        adapter.attach(unet)
        return adapter


# ---------------------------------------------------------------- the loss

def noise_error(unet, z_0, t, eps, c_t, c_i, schedule):
    """(ε − ε_θ(c_τ, c_i, t, z_t))²,   z_t = √ᾱ_t·z_0 + √(1−ᾱ_t)·ε      number by number

    Shapes: see adapter_loss. Returns (B, C, H, W).
    """
    z_t = q_sample(z_0, t, eps, schedule)
    eps_hat = unet(z_t, t, c_t, c_i)
    return (eps - eps_hat).square()


def adapter_loss(unet, z_0, t, eps, c_t, c_i, schedule):
    """L = ‖ε − ε_θ(c_τ, c_i, t, z_t)‖²,   z_t = √ᾱ_t·z_0 + √(1−ᾱ_t)·ε   (eq. 1)

    The paper writes eq. 1 as
        L = E_{ε, c_τ, c_i, t, c_t^j} ‖ε − ε_θ(c_τ, c_i, t, c_t^j)‖²,   c_t^j = α_t·c^j + σ_t·ε,
    and calls c^j = Γ_i(x_j) "the features of the removed image": it noises an embedding. But ε_θ is
    Stable Diffusion's UNet, which reads and answers latents, so here the noised thing is z_0, the
    removed photo's VAE latent, and the paper's c_t^j is our z_t (its α_t is √ᾱ_t, its σ_t is
    √(1−ᾱ_t)). The latent is a sample of the VAE's posterior, drawn once a photo and kept in
    data.Features.

    The expectation is the mean over the batch and, as usual, over the numbers of a latent as well.
    z_0, eps (B, C, H, W): the removed photo's latent, and noise; t (B,); c_t (B, L, D) its prompt;
    c_i (B, 4M, D) the other photos' tokens. Returns a scalar.
    """
    return noise_error(unet, z_0, t, eps, c_t, c_i, schedule).mean()


def drop_embeds(embeds, mask):
    """Zero the embeddings of the rows where mask (B,) is True: a dropped image condition (3.3).

    G keeps zeros zero, so their tokens are LayerNorm(the bias of Linear).
    """
    return embeds.masked_fill(mask[:, None, None], 0)


def drop_conditions(c_t, embeds, null_c_t, p=0.05, generator=None):
    """For each row: the text alone, the image alone, or both are dropped, with probability p each.

    c_t (B, L, D); embeds (B, N, E); null_c_t (1, L, D), the empty prompt. Returns c_t and embeds.
    """
    device = generator.device if generator else c_t.device
    u = torch.rand(len(c_t), generator=generator, device=device).to(c_t.device)
    # [0, p): both, [p, 2p): the image, [2p, 3p): the text, the rest: nothing
    drop_image = u < 2 * p
    drop_text = (u < p) | ((u >= 2 * p) & (u < 3 * p))
    c_t = torch.where(drop_text[:, None, None], null_c_t, c_t)
    return c_t, drop_embeds(embeds, drop_image)


def draw_t_and_eps(sd, z_0, generator):
    """t ~ U{0…T−1} (B,) and ε ~ N(0, I) (B, C, H, W), on the device of z_0."""
    t = torch.randint(len(sd.schedule.beta), (len(z_0),), generator=generator)
    eps = torch.randn(z_0.shape, generator=generator)
    return t.to(z_0.device), eps.to(z_0)


def validate_eq1(sd, batches):
    """Eq. 1 with the same t and ε at every call: {"validation": mean, "t 0-249": of a band, …}.

    batches: of (z_0, c_t, c_i). The mean hides where learning happens, so it is given for each
    quarter of the time steps as well.
    """
    generator = torch.Generator().manual_seed(1)
    times, errors = [], []
    for z_0, c_t, c_i in batches:
        t, eps = draw_t_and_eps(sd, z_0, generator)
        error = noise_error(sd.unet, z_0, t, eps, c_t, c_i, sd.schedule)
        times.append(t)
        errors.append(error.mean(dim=(1, 2, 3)))  # (B,)
    times, errors = torch.cat(times), torch.cat(errors)
    values = {"validation": errors.mean().item()}
    T = len(sd.schedule.beta)
    for k in range(4):
        inside = times * 4 // T == k
        values[f"t {k * T // 4}-{(k + 1) * T // 4 - 1}"] = errors[inside].mean().item()
    return values


# ---------------------------------------------------------------- pictures

def make_guided_eps(unet, c_t, c_i, null_c_t, null_c_i, w=4.0, lam=1.0, phi=0.0):
    """ε̂ = w·ε_θ(x_t, c, t) + (1−w)·ε_θ(x_t, t)   (eq. 11), as eps_fn(x_t, t) for ddpm.sample.

    c_t (B, L, D), c_i (B, 4M, D) or None; null_c_t: the empty or negative prompt, null_c_i:
    `tokens` of zeroed embeddings, both for 1 or B rows. w = 1 needs and computes only the first
    term. The UNet runs in half precision if its weights are; guidance is in float32, the precision
    of x_t: it subtracts nearly equal numbers, which half precision would round once more.
    phi: see ddpm.rescale_guidance; 0 is eq. 11 alone.
    """

    def conditional_eps(x_t, t):
        return unet(x_t.to(c_t.dtype), t, c_t, c_i, lam).to(x_t.dtype)

    if w == 1:
        return conditional_eps

    # Both terms are one batch of 2B: the condition, then none.
    text = torch.cat([c_t, null_c_t.expand_as(c_t)])
    image = None
    if c_i is not None:
        image = torch.cat([c_i, null_c_i.expand_as(c_i)])

    def guided_eps(x_t, t):
        twice = torch.cat([x_t, x_t]).to(text.dtype)
        eps = unet(twice, t, text, image, lam).to(x_t.dtype)
        eps_cond, eps_uncond = eps.chunk(2)
        eps_hat = guide(eps_cond, eps_uncond, w)
        return rescale_guidance(eps_hat, eps_cond, phi) if phi else eps_hat

    return guided_eps


def draw_noise(unet, seeds):
    """x_T ~ N(0, I), one row a seed: (B, C, H, W) float32 on the CPU."""
    side = unet.config["sample_size"]
    shape = (1, unet.config["in_channels"], side, side)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(rows)


@torch.inference_mode()
def generate(sd, c_t, null_c_t, c_i=None, null_c_i=None, w=4.0, lam=1.0, steps=30, sampler="dpm",
             seed=0, progress=False, phi=0.0):
    """Pictures from noise: prompts c_t (B, L, D), image tokens c_i (B, 4M, D) -> (B, 3, H, W).

    Pixels are in [−1, 1]. null_c_t, null_c_i, w, lam, phi: as in `make_guided_eps`; steps, sampler: as
    in `ddpm.sample`. Picture k starts from the noise of seed + k, so it does not depend on how many
    are made at once (but for sampler="ddpm", which draws noise at every step). ValueError names the
    network whose answer is not finite.
    """
    check_finite(text_encoder=c_t, adapter=c_i)
    x_T = draw_noise(sd.unet, range(seed, seed + len(c_t))).to(c_t.device)
    eps_fn = make_guided_eps(sd.unet, c_t, c_i, null_c_t, null_c_i, w, lam, phi)
    generator = torch.Generator().manual_seed(seed + 2**31)  # no seed of draw_noise
    z_0 = sample(eps_fn, x_T, sd.schedule, steps, sampler, generator, progress)
    check_finite(UNet=z_0)
    images = sd.decode_latents(z_0)
    check_finite(VAE=images)
    return images


def generate_in_parts(sd, batch, c_t, null_c_t, c_i=None, null_c_i=None, seed=0):
    """`generate`, of a large model at most `batch` pictures at once; null_c_t, null_c_i: one row."""
    at_once = batch if is_large(sd.unet) else len(c_t)
    pictures = []
    for start in range(0, len(c_t), at_once):
        rows = slice(start, start + at_once)
        image = None if c_i is None else c_i[rows]
        pictures.append(generate(sd, c_t[rows], null_c_t, image, null_c_i, seed=seed + start))
    return torch.cat(pictures)
