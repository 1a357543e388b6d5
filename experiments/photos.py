"""The model of a plan and its photos: to folders, cut as its pictures are, and into its encoders."""

from contextlib import nullcontext

import torch
from tqdm import tqdm

from support.checkpoints import is_shipped
from support.devices import DTYPE, autocast
from support.pictures import load_image, open_photos, save_image, to_bytes, to_images, to_tensor
from toyfaces.drawing import draw_face
from unet import StableDiffusion

BATCH = 64  # photos to encode at once, of the tiny world; of Stable Diffusion one


def load_for_pictures(model, settings, image_encoder=None):
    """The checkpoint as its pictures are made: the small ones in float32, under autocast.

    Others have weights of `settings.precision`, as in sample.py: half the memory.
    """
    dtype = torch.float32 if is_shipped(model) else DTYPE[settings.precision]
    return StableDiffusion.load(model, settings.device, dtype, image_encoder)


def precision_of(sd, settings):
    """The autocast of everything that a table makes: none, if the weights are in half precision."""
    if next(sd.unet.parameters()).dtype != torch.float32:
        return nullcontext()
    return autocast(settings.device, settings.precision)


@torch.inference_mode()
def embed_pictures(sd, pictures, settings):
    """uint8 (n, 3, H, W) -> image embeddings (n, E) on the CPU, in the precision of the methods."""
    batch = photos_at_once(sd)
    parts = []
    with precision_of(sd, settings):
        for part in pictures.split(batch):
            images = to_tensor(part).to(settings.device)
            parts.append(sd.embed_images(images).float().cpu())
    return torch.cat(parts)


def photos_at_once(sd):
    return max(1, BATCH * 64**2 // sd.image_size**2)


def write_photos(plan):
    """The folders of photos: references, real, other-photos; of toy people also drawn-anew."""
    files, photos = [], []
    for p in range(len(plan.subjects)):
        for names, shots in plan.photo_files(p).values():
            files += names
            photos += shots
    missing = [k for k, file in enumerate(files) if not file.exists()]
    opened = open_photos([photos[k] for k in missing]) if missing else ()
    for k, pixels in zip(missing, opened):
        if pixels is None:
            raise ValueError(f"{photos[k].name} cannot be read: mend the photo, or remove it")
        save_bytes([files[k]], torch.from_numpy(pixels[0])[None])
    if plan.knows_truth:
        draw_scenes(plan)


def draw_scenes(plan):
    """drawn-anew: what a perfect method would make, the scenes asked for drawn once more."""
    for p in range(len(plan.subjects)):
        for k, file in enumerate(plan.files("drawn-anew", p)):
            if not file.exists():
                shot = plan.shots(p)[k]
                file.parent.mkdir(parents=True, exist_ok=True)
                save_image(file, draw_face(shot.labels, {}, [p, k], shot.size))


@torch.inference_mode()
def write_round_trips(plan, sd):
    """round-trip: the real photos through the VAE and back, in the precision of the methods."""
    for p, subject in enumerate(tqdm(plan.subjects, "VAE round trips", leave=False)):
        files = plan.files("round-trip", p, len(subject.held))
        if all(file.exists() for file in files):
            continue
        photos = read_pictures(plan.files("real", p, len(files)))
        made = []
        with precision_of(sd, plan.settings):
            for part in photos.split(photos_at_once(sd)):
                z = sd.encode_latents(to_tensor(part).to(plan.settings.device))
                made.append(to_bytes(sd.decode_latents(z)))
        save_bytes(files, torch.cat(made))


def read_pictures(files):
    """Picture files of one size -> uint8 (n, 3, H, W). ValueError names one that cannot be read."""
    return to_bytes(to_tensor([load_image(file) for file in files]))


def save_bytes(files, pictures):
    """Write uint8 (n, 3, H, W) as PNG files; those that are there stay."""
    for file, image in zip(files, to_images(to_tensor(pictures))):
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            save_image(file, image)
