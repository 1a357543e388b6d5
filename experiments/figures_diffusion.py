"""Figures of lectures 1 and 2: noising and denoising, samplers, guidance, the VAE."""

import torch

from ddpm import predict_x0, q_sample, sample
from experiments.figures_common import name_row, new_sheet, save_small, show
from ip_adapter import draw_noise, generate, make_guided_eps
from support.pictures import to_tensor

TIMES = (999, 800, 600, 400, 200, 100, 0)  # columns of noising.png
FEW_STEPS = (5, 10, 20, 50)  # columns of samplers.png
GUIDANCES = (0, 1, 2, 4, 8)  # columns of guidance.png


def noise_photo(world, photo, conditions):
    """Down: a photo's latent with more and more of the same noise. Returns [(t, z_t, ẑ_0), …]."""
    sd = world.sd
    z_0 = sd.encode_latents(to_tensor([photo.image]))
    eps = draw_noise(sd.unet, [world.seed])
    eps_fn = make_guided_eps(sd.unet, **conditions._asdict(), w=1)
    seen = []
    for t in TIMES:
        z_t = q_sample(z_0, t, eps, sd.schedule)
        seen.append((t, z_t, predict_x0(z_t, t, eps_fn(z_t, t), sd.schedule)))
    return seen


def denoise(world, conditions):
    """Up: what DDIM sees in 50 steps at the times that are nearest to TIMES: [(t, z_t, ẑ_0), …]."""
    sd = world.sd
    eps_fn = make_guided_eps(sd.unet, **conditions._asdict(), w=4)
    seen = []

    def watch(z_t, t):
        eps_hat = eps_fn(z_t, t)
        seen.append((t, z_t, predict_x0(z_t, t, eps_hat, sd.schedule)))
        return eps_hat

    x_T = draw_noise(sd.unet, [world.seed + 1])
    sample(watch, x_T, sd.schedule, 50, "ddim", progress=False)
    return [min(seen, key=lambda step: abs(step[0] - wanted)) for wanted in TIMES]


def draw_noising(world, path):
    """x_t and x̂₀ of a photo on the way down (eq. 8), and of a sample on the way up (DDIM)."""
    photo = world.faces[0].photos[0]
    conditions = world.condition([photo.prompt])
    ways = [noise_photo(world, photo, conditions), denoise(world, conditions)]
    names = [("a photo,\n$x_t$ of eq. 8", "its $\\hat{x}_0$,\nguessed at once"),
             ("from noise,\n$x_t$ by DDIM", "its $\\hat{x}_0$\nat that step")]
    figure, axes = new_sheet(4, len(TIMES))
    for way, (seen, words) in enumerate(zip(ways, names)):
        times, noisy, guessed = zip(*seen)
        for k, latents in enumerate((noisy, guessed)):
            row = axes[2 * way + k]
            name_row(row[0], words[k])
            for axis, t, picture in zip(row, times, world.sd.decode_latents(torch.cat(latents))):
                show(axis, picture, f"t = {t}" if k == 0 else None)
    save_small(path, figure)


def draw_guidance(world, path):
    """The same noise at w = 0, 1, 2, 4, 8: text alone, and text with nine references."""
    person = world.faces[0]
    embeds = world.embed([photo.image for photo in person.photos[:9]])[None]
    alone = world.condition(["a photo of a smiling person wearing a hat, green background"])
    adapter = world.selfattn()
    with_photos = world.condition([person.photos[9].prompt], adapter, embeds)
    rows = [("text only:\nsmiling, hat,\ngreen", alone, 0), ("the same,\nother noise", alone, 1),
            ("nine photos of\none person", with_photos, 0), ("the same,\nother noise", with_photos, 1)]
    figure, axes = new_sheet(len(rows), len(GUIDANCES), side=1.15)
    for r, (words, conditions, k) in enumerate(rows):
        name_row(axes[r][0], words)
        for c, w in enumerate(GUIDANCES):
            made = generate(world.sd, **conditions._asdict(), w=w, steps=world.steps,
                            seed=world.seed + k)
            show(axes[r][c], made[0], f"w = {w}" if r == 0 else None)
    save_small(path, figure)


def draw_samplers(world, path):
    """Two pictures by each sampler, in 5 to 50 steps and in as many as there are.

    Numbers: the root mean square of the difference to DDIM's latents after all steps.
    """
    sd = world.sd
    prompts = ["a photo of a smiling person, blue background",
               "a photo of a surprised person wearing a scarf, grey background"]
    eps_fn = make_guided_eps(sd.unet, **world.condition(prompts)._asdict(), w=4)
    x_T = draw_noise(sd.unet, [world.seed, world.seed + 1])

    def run_sampler(name, steps):
        generator = torch.Generator().manual_seed(world.seed)
        return sample(eps_fn, x_T, sd.schedule, steps, name, generator, progress=False)

    best = run_sampler("ddim", world.long_steps)
    names = {"ddpm": "DDPM, eq. 10", "ddim": "DDIM", "dpm": "DPM-Solver++"}
    counts = (*FEW_STEPS, world.long_steps)
    figure, axes = new_sheet(len(names), 2 * len(counts), side=0.95)
    for r, (name, words) in enumerate(names.items()):
        name_row(axes[r][0], words)
        for c, steps in enumerate(counts):
            if steps == world.long_steps and name == "dpm":
                continue  # nobody takes so many
            z_0 = best if (name, steps) == ("ddim", world.long_steps) else run_sampler(name, steps)
            difference = (z_0 - best).square().mean().sqrt().item()
            below = f"{difference:.2f}" if name != "ddpm" and z_0 is not best else None
            for k, picture in enumerate(sd.decode_latents(z_0)):
                first = k == 0
                show(axes[r][2 * c + k], picture, f"{steps} steps" if r == 0 and first else None,
                     below if first else None)
    save_small(path, figure)


def draw_vae(world, path):
    """Photos, what the VAE gives back, and the four channels of the latent between."""
    photos = [world.faces[p].photos[q] for p, q in ((0, 0), (1, 1), (2, 4))]
    images = to_tensor([photo.image for photo in photos])
    z_0 = world.sd.encode_latents(images)
    again = world.sd.decode_latents(z_0)
    titles = ["photo\n3 × 64 × 64", "round trip", "difference\nthree times", "z[0]\n16 × 16",
              "z[1]", "z[2]", "z[3]"]
    figure, axes = new_sheet(len(photos), len(titles), side=1.15)
    for r in range(len(photos)):
        mean_square = (again[r] - images[r]).square().mean() / 4  # of pixels from 0 to 1
        decibels = -10 * mean_square.log10().item()
        show(axes[r][0], images[r])
        show(axes[r][1], again[r], below=f"{decibels:.1f} dB")
        show(axes[r][2], 3 * (again[r] - images[r]))
        for c in range(4):
            axes[r][3 + c].imshow(z_0[r, c], cmap="gray", vmin=-2.5, vmax=2.5)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=8)
    save_small(path, figure)
