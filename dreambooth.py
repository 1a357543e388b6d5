"""DreamBooth: a few photos of one person become a rare word, and the class stays what it was (paper, section 3.2).

    E w_t‖x̂_θ(α_t·x + σ_t·ε, c) − x‖²                                          x0_loss
    E [w_t‖x̂_θ(α_t·x + σ_t·ε, c) − x‖²
       + λ·w_t'‖x̂_θ(α_t'·x_pr + σ_t'·ε', c_pr) − x_pr‖²]                       prior_preservation_loss
    c = Γ("a [identifier] [noun]"),   c_pr = Γ("a [noun]")                     prompts
    x_pr = x̂(z, c_pr),   z ~ N(0, I)                                           class_images
    W + (α/r)·B·A                                                              LowRank (LoRA)

The paper's α_t and σ_t are √ᾱ_t and √(1−ᾱ_t). We choose w_t = ᾱ_t/(1−ᾱ_t), the signal-to-noise ratio:
then the loss above is ‖ε − ε_θ‖², eq. 1 without image tokens (tested, values and gradients).

Where the paper is silent: x and x_pr are VAE latents, as in eq. 1; a batch holds as many class pictures as
photos, each with its own t and ε; class pictures are made by the model as it was, without guidance, as the formula says:
they should be what the model itself thinks of the class, for guidance makes pictures alike, and sampling guides once more.

LoRA trains low-rank updates of the attention projections and nothing else. Its files have diffusers' layout,
`unet.<layer>.lora_A.weight` and `lora_B.weight`, with α/r multiplied into B, so that they read the same everywhere.
"""

import json
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from data import digest, load_image, running_precision, to_images, to_tensor
from ddpm import at, q_sample
from ip_adapter import generate
from unet import write_whole


def prompts(identifier, noun):
    """"a [identifier] [noun]" and "a [noun]": the prompts of the person and of the class."""
    return [f"a {identifier} {noun}", f"a {noun}"]


def check_identifier(tokenizer, identifier):
    """Warn, naming them, if `identifier` is several tokens: each already means something. ValueError if none."""
    tokens = [token.removesuffix("</w>") for token in tokenizer.tokenize(identifier)]
    if not tokens:
        raise ValueError("the identifier is empty: give one rare word, such as sks")
    if len(tokens) > 1:
        warnings.warn(f"the tokenizer splits the identifier {identifier!r} into {len(tokens)} tokens, "
                      f"{' + '.join(tokens)}, which may mean something already; better is a rare word of one token")


def latents(sd, files, generator, batch=8):
    """z_0 of n picture files, cut square: (n, C, h, w) float32. ValueError names a file that cannot be read."""
    parts = [files[i : i + batch] for i in range(0, len(files), batch)]
    images = (to_tensor([load_image(file, sd.image_size) for file in part]) for part in parts)
    return torch.cat([sd.encode_latents(x, generator).float() for x in images])


def snr(schedule):
    """w_t = ᾱ_t/(1−ᾱ_t), the weight that turns the x-loss into the ε-loss: (T,), indexed [t]."""
    return schedule.alpha_bar / (1 - schedule.alpha_bar)


def x0_loss(eps_hat, eps, t, schedule, w_t):
    """E w_t‖x̂_θ − x‖²,   x̂_θ − x = √(1−ᾱ_t)/√ᾱ_t·(ε − ε̂)   (section 3.2)

    The second formula is eq. 8 solved for x, twice: x_t cancels. The mean is over the batch and the numbers of a
    latent. eps_hat, eps (B, …); t (B,); w_t (T,) table, indexed [t]. Returns a scalar.
    """
    error = at(snr(schedule).rsqrt(), t, eps) * (eps - eps_hat)
    return (at(w_t, t, eps) * error.square()).mean()


def prior_preservation_loss(unet, z_0, z_pr, t, eps, c, c_pr, schedule, lam=1.0):
    """E [w_t‖x̂_θ(z_t, c) − z_0‖² + λ·w_t'‖x̂_θ(z_pr,t', c_pr) − z_pr‖²],   w_t = ᾱ_t/(1−ᾱ_t)   (section 3.2)

    z_0 (B, C, H, W) latents of photos, z_pr (B', C, H, W) of class pictures, B' = 0: plain fine-tuning; one batch for
    the UNet. t (B + B',), eps (B + B', C, H, W): t, ε of the photos, then t', ε'. c, c_pr (1 or B, L, D). -> scalar.
    """
    z, n = torch.cat([z_0, z_pr]), len(z_0)
    c_t = torch.cat([c.expand(n, -1, -1), c_pr.expand(len(z_pr), -1, -1)])
    eps_hat, w_t = unet(q_sample(z, t, eps, schedule), t, c_t), snr(schedule)
    loss = x0_loss(eps_hat[:n], eps[:n], t[:n], schedule, w_t)
    return loss + lam * x0_loss(eps_hat[n:], eps[n:], t[n:], schedule, w_t) if len(z_pr) else loss


def class_images(sd, prompt, out, count, seed=0, steps=30, batch=8):
    """x_pr = x̂(z, c_pr),   z ~ N(0, I)   (section 3.2)

    `count` PNG files in out/class-<digest of model and settings>, made by `sd` as it is; those that are there are
    kept. Picture k starts from the noise of seed + k. Returns the files.
    """
    key = digest(sd.unet, sd.text_encoder, sd.vae, prompt=prompt, seed=seed, steps=steps,
                 precision=running_precision(next(sd.unet.parameters()).device))
    files = [Path(out, f"class-{key[:8]}", f"{k:04d}.png") for k in range(count)]
    files[0].parent.mkdir(parents=True, exist_ok=True)
    missing = [k for k in range(count) if not files[k].exists()]
    c_pr = sd.encode_prompts([prompt]).float()
    with tqdm(total=len(missing), desc=f'pictures of "{prompt}"', disable=not missing) as bar:
        while missing:
            run = [k for i, k in enumerate(missing[:batch]) if k == missing[0] + i]   # successive: so are their seeds
            images = generate(sd, c_pr.expand(len(run), -1, -1), None, w=1, steps=steps, seed=seed + run[0])
            for k, image in zip(run, to_images(images)):
                write_whole(files[k], lambda part: image.save(part, "PNG"))
            bar.update(len(run))
            missing = missing[len(run):]
    return files


class LowRank(nn.Module):
    """W ↦ W + (α/r)·B·A   (LoRA, Hu et al. 2021, eq. 3)

    W (n, m) stays, A (r, m) starts random, uniform in ±1/√m, and B (n, r) zero: training starts exactly at W.
    """

    def __init__(self, W, rank, alpha, generator=None):
        super().__init__()
        self.scale = alpha / rank
        A = (2 * torch.rand(rank, W.shape[1], generator=generator) - 1) / W.shape[1] ** 0.5
        self.A, self.B = nn.Parameter(A.to(W)), nn.Parameter(W.new_zeros(len(W), rank))

    def forward(self, W):
        return W + (self.scale * self.B) @ self.A


def projections(unet):
    """The layers that LoRA changes, by name: W_q, W_k, W_v and W_out of every attention, to itself and to the text."""
    return {name: x for name, x in unet.named_modules() if re.search(r"attn[12]\.(to_[qkv]|to_out\.0)$", name)}


def add_lora(unet, rank, alpha=None, generator=None):
    """Freeze `unet` and put a LowRank on each of its `projections`; returns them, a ModuleList. alpha: default rank.

    ValueError unless rank is at least 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of LoRA must be at least 1, not {rank}")
    unet.requires_grad_(False)
    updates = nn.ModuleList()
    for layer in projections(unet).values():
        updates.append(LowRank(layer.weight, rank, rank if alpha is None else alpha, generator))
        parametrize.register_parametrization(layer, "weight", updates[-1])   # layer.weight is now updates[-1](W)
    return updates


def save_lora(unet, path):
    """Write the LowRank updates of `unet`, whole or not at all, as diffusers' `load_lora_weights` reads them."""
    tensors = {}
    for name, layer in projections(unet).items():
        low = layer.parametrizations.weight[0]
        tensors[f"unet.{name}.lora_A.weight"] = low.A.detach().cpu().contiguous()
        tensors[f"unet.{name}.lora_B.weight"] = (low.scale * low.B.detach()).cpu().contiguous()
    write_whole(path, lambda part: save_file(tensors, part, metadata={"format": "pt"}))


def load_lora(path, sd):
    """W ← W + (α/r)·B·A in `sd.unet` for every pair of a LoRA file in diffusers' layout; ours have α/r in B.

    ValueError, before anything is changed: unreadable, or a tensor that has no place in this UNet or no partner.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable LoRA file: {str(error).splitlines()[0]}") from error
    alpha = json.loads(metadata.get("lora_adapter_metadata", "{}")).get("unet.lora_alpha")   # newer diffusers
    merged, used = [], set()
    for name, layer in projections(sd.unet).items():
        names, (n, m) = [f"unet.{name}.lora_{side}.weight" for side in "AB"], layer.weight.shape
        A, B = map(tensors.get, names)
        if A is not None and B is not None and (*B.shape, *A.shape) == (n, len(A), len(A), m):
            used.update(names)
            merged.append((layer, (B if alpha is None else alpha / len(A) * B) @ A))
    if not tensors or (wrong := sorted(tensors.keys() - used)):
        name = f"tensor {wrong[0]} has no place in it, no partner or another shape" if tensors else "it holds no tensors"
        raise ValueError(f"{path} is not a LoRA of this UNet's attention: {name}")
    for layer, update in merged:
        layer.weight.data += update.to(layer.weight)
