"""DreamBooth: a few photos of one person become a rare word, and the class stays what it was (3.2).

    E w_t‖x̂_θ(α_t·x + σ_t·ε, c) − x‖²                                          x0_loss
    E [w_t‖x̂_θ(α_t·x + σ_t·ε, c) − x‖²
       + λ·w_t'‖x̂_θ(α_t'·x_pr + σ_t'·ε', c_pr) − x_pr‖²]                       prior_preservation_loss
    c = Γ("a [identifier] [noun]"),   c_pr = Γ("a [noun]")                     write_prompts
    x_pr = x̂(z, c_pr),   z ~ N(0, I)                                           make_class_images
    W + (α/r)·B·A                                                              LowRank (LoRA)

The paper's α_t and σ_t are √ᾱ_t and √(1−ᾱ_t). We choose w_t = ᾱ_t/(1−ᾱ_t), the signal-to-noise
ratio: then the loss above is ‖ε − ε_θ‖², eq. 1 without image tokens (tested, values and gradients).

Where the paper is silent: x and x_pr are VAE latents, as in eq. 1. A batch holds as many class
pictures as photos, each with its own t and ε. Class pictures are made by the model as it was,
without guidance, as the formula says (`DreamBooth.class_guidance` changes that).

LoRA trains low-rank updates of the attention projections; support/lora.py writes its files.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from ddpm import lookup, q_sample
from ip_adapter import generate, generate_in_parts
from support.crops import find_crop
from support.devices import autocast_dtype, device_of
from support.distributed import first_alone
from support.files import digest, digest_bytes, successive_runs
from support.lora import attention_projections
from support.pictures import load_image, save_grid, save_image, to_images, to_tensor


@dataclass
class DreamBooth:
    """What trains, and against what (train.py)."""

    prior_weight: float = 1.0  # the paper's λ; 0: no class pictures
    class_images: int = 200
    train_text_encoder: bool = False
    lora: int = None  # train only updates of this rank of the attention
    class_guidance: float = 1.0  # w of eq. 11 for the class pictures; 1: none


def write_prompts(identifier, noun):
    """"a [identifier] [noun]" and "a [noun]": the prompts of the person and of the class."""
    return [f"a {identifier} {noun}", f"a {noun}"]


def encode_files(sd, files, generator, batch=8):
    """z_0 of n picture files, cut square: (n, C, h, w) float32. ValueError names an unreadable one.

    batch: how many small pictures are encoded at once; of 512 × 512 pixels it is one.
    """
    if sd.image_size >= 512:
        batch = 1
    crop = find_crop(sd.preprocessor)
    parts = []
    for start in range(0, len(files), batch):
        some = files[start : start + batch]
        images = [load_image(file, sd.image_size, crop) for file in some]
        parts.append(sd.encode_latents(to_tensor(images), generator).float())
    return torch.cat(parts)


# ---------------------------------------------------------------- the loss

def snr(schedule):
    """w_t = ᾱ_t/(1−ᾱ_t), the weight that turns the x-loss into the ε-loss: (T,), indexed [t]."""
    return schedule.alpha_bar / (1 - schedule.alpha_bar)


def x0_loss(eps_hat, eps, t, schedule, w_t):
    """E w_t‖x̂_θ − x‖²,   x̂_θ − x = √(1−ᾱ_t)/√ᾱ_t·(ε − ε̂)   (section 3.2)

    The second formula is eq. 8 solved for x, once with ε̂ and once with ε: x_t cancels. The mean is
    over the batch and the numbers of a latent. eps_hat, eps (B, …); t (B,); w_t (T,) a table,
    indexed [t]. Returns a scalar.
    """
    error = lookup(snr(schedule).rsqrt(), t, eps) * (eps - eps_hat)
    weight = lookup(w_t, t, eps)
    return (weight * error.square()).mean()


def prior_preservation_loss(unet, z_0, z_pr, t, eps, c, c_pr, schedule, prior_weight=1.0):
    """E [w_t‖x̂_θ(z_t, c) − z_0‖² + λ·w_t'‖x̂_θ(z_pr,t', c_pr) − z_pr‖²],   w_t = ᾱ_t/(1−ᾱ_t)   (3.2)

    z_0 (B, C, H, W) latents of photos, z_pr (B', C, H, W) of class pictures; B' = 0 is plain
    fine-tuning. t (B + B',), eps (B + B', C, H, W): t, ε of the photos, then t', ε'. c, c_pr (1 or
    B, L, D). prior_weight: λ, not that of eq. 3. Returns a scalar.
    """
    n = len(z_0)
    # Photos and class pictures are one batch for the UNet.
    z = torch.cat([z_0, z_pr])
    c_person = c.expand(n, -1, -1)
    c_class = c_pr.expand(len(z_pr), -1, -1)
    c_t = torch.cat([c_person, c_class])
    eps_hat = unet(q_sample(z, t, eps, schedule), t, c_t)
    # The loss treats them apart.
    w_t = snr(schedule)
    loss = x0_loss(eps_hat[:n], eps[:n], t[:n], schedule, w_t)
    if len(z_pr) == 0:
        return loss
    prior = x0_loss(eps_hat[n:], eps[n:], t[n:], schedule, w_t)
    return loss + prior_weight * prior


# ---------------------------------------------------------------- class pictures

@first_alone()
def make_class_images(sd, prompt, out, count, seed=0, steps=30, batch=8, model=None, w=1.0):
    """x_pr = x̂(z, c_pr),   z ~ N(0, I)   (section 3.2)

    `count` PNG files in out/class-<digest of model and settings>, made by `sd` as it is; existing
    files are reused. Picture k starts from the noise of seed + k. Returns the files.
    batch: how many are made at once; model: a digest of UNet, text encoder and VAE, if it is known;
    w: of eq. 11, 1 is no guidance.
    """
    precision = autocast_dtype(device_of(sd.unet))
    settings = dict(prompt=prompt, seed=seed, steps=steps, precision=precision)
    settings |= dict(scheduler=sd.scheduler, version=1)  # raised when this code makes other ones
    if w != 1:
        settings["w"] = w
    model = model or digest(sd.unet, sd.text_encoder, sd.vae)
    key = digest_bytes(model, settings)
    folder = Path(out, f"class-{key[:8]}")
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{k:04d}.png" for k in range(count)]
    missing = [k for k in range(count) if not files[k].exists()]
    c_pr = sd.encode_prompts([prompt]).float()
    null_c_t = sd.encode_prompts([""]).float() if w != 1 else None
    with tqdm(total=len(missing), desc=f'pictures of "{prompt}"', disable=not missing) as bar:
        for run in successive_runs(missing, batch):  # `generate` counts the seeds up
            c_t = c_pr.expand(len(run), -1, -1)
            images = generate(sd, c_t, null_c_t, w=w, steps=steps, seed=seed + run[0])
            for k, image in zip(run, to_images(images)):
                save_image(files[k], image)
            bar.update(len(run))
    return files


def save_variations(sd, person, noun, path, seed, batch, count=4):
    """A column each: the person, the class (what the prior preserved), the person in two scenes."""
    prompts = {
        "identity": f"a photo of a {person}",
        "class": f"a photo of a {noun}",
        "hat": f"a photo of a smiling {person} wearing a hat, green background",
        "sunglasses": f"a photo of a surprised {person} wearing sunglasses, blue background",
    }
    *c_t, null_c_t = sd.encode_prompts([*prompts.values(), ""]).float().split(1)
    made = []
    for c in c_t:
        column = c.expand(count, -1, -1)
        made.append(generate_in_parts(sd, batch, column, null_c_t, seed=seed))
    rows = [[column[k] for column in made] for k in range(count)]
    save_grid(path, rows, list(prompts))
    print(f"wrote {path}")


# ---------------------------------------------------------------- LoRA

class LowRank(nn.Module):
    """W ↦ W + (α/r)·B·A   (LoRA, Hu et al. 2021, eq. 3)

    W (n, m) stays. A (r, m) starts random, uniform in ±1/√m, and B (n, r) zero: training starts
    exactly at W.
    """

    def __init__(self, W, rank, alpha, generator=None):
        super().__init__()
        self.scale = alpha / rank
        uniform = 2 * torch.rand(rank, W.shape[1], generator=generator) - 1  # in ±1
        self.A = nn.Parameter((uniform / W.shape[1] ** 0.5).to(W))
        self.B = nn.Parameter(W.new_zeros(len(W), rank))

    def forward(self, W):
        return W + (self.scale * self.B) @ self.A


def add_lora(unet, rank, alpha=None, generator=None):
    """Freeze `unet` and put a LowRank on each of its attention projections; alpha: default rank.

    Returns the LowRanks, an nn.ModuleList. ValueError unless rank is at least 1.
    """
    if rank < 1:
        raise ValueError(f"the rank of LoRA must be at least 1, not {rank}")
    alpha = rank if alpha is None else alpha
    unet.requires_grad_(False)
    updates = nn.ModuleList()
    for layer in attention_projections(unet).values():
        update = LowRank(layer.weight, rank, alpha, generator)
        updates.append(update)
        parametrize.register_parametrization(layer, "weight", update)  # layer.weight: update(W)
    return updates
