"""The people that base.py trains on, and what each stage takes from their photos.

Two kinds, toy people (`Faces`) and the photos of a folder (`PhotoFaces`), with one interface:
`pixels`, `pick(i, generator)` and `write_caption(k, rng)`.

Who is who in a folder (`choose_people`):
  training     two thirds of the people with two or more photos (data.split), and everybody with one
  validation   held-out people with two to nine photos, a hundred at most: losses, early stopping
  exam         held-out people with ten or more (plan.choose_subjects): no stage ever sees them
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import LFW, ToyFaces, split
from experiments.plan import REFERENCES, VALIDATION
from support.devices import autocast_dtype, device_of
from support.face_net import FaceEncoder
from support.files import digest, load_or_compute
from support.pictures import open_photos, to_tensor
from toyfaces.captions import write_caption

VERSION = 2  # of what is in the cache: raised by hand when this code gives other ones


def make_numpy_generator(generator):
    """A NumPy generator for captions, seeded by a torch.Generator."""
    seed = torch.randint(2**31, (1,), generator=generator).item()
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- toy people


class Faces(NamedTuple):
    """Toy people, and all their photos in one row."""

    people: list
    pixels: torch.Tensor  # (n, 3, 64, 64), uint8
    labels: list  # n dictionaries {attribute: class number}

    def pick(self, i, generator):
        """The photos i (B,): uint8 (B, 3, 64, 64). Left is left of a scene: they are not mirrored."""
        return self.pixels[i]

    def write_caption(self, k, rng):
        """A new caption of photo k."""
        return write_caption(self.labels[k], rng)


def make_faces(count, seed):
    """`count` people of ToyFaces with ten photos each."""
    people = ToyFaces(count, seed=seed).people
    photos = [photo for person in people for photo in person.photos]
    labels = [photo.labels for photo in photos]
    return Faces(people, make_pixels(photos), labels)


def make_pixels(photos):
    """The pixels of n drawn photos, drawn once and kept on disk: (n, 3, S, S), uint8."""

    def draw():
        pixels = [pixels for pixels, _ in open_photos(photos)]
        return {"x": torch.from_numpy(np.stack(pixels))}

    data = [photo.key for photo in photos]
    return load_or_compute(draw, "pixels", VERSION, data)["x"]


def write_corpus(labels):
    """What the tokenizer is made from: captions, and words of prompts that no caption has."""
    rng = np.random.default_rng(0)
    captions = [write_caption(one, rng) for one in labels[:5000]]
    words = "man woman sks serious sad contemptuous disgusted frightened"
    return captions + [words] * 100


# ---------------------------------------------------------------- photos of a folder


class PhotoFaces(NamedTuple):
    """People of a folder, and all their photos in one row, person after person."""

    people: list
    pixels: torch.Tensor  # (n, 3, 64, 64), uint8
    prompts: list  # n sentences
    who: torch.Tensor  # (n,), the number of the person

    def pick(self, i, generator):
        """The photos i (B,), each second one mirrored: uint8 (B, 3, 64, 64)."""
        pixels = self.pixels[i]
        is_mirrored = torch.rand(len(i), generator=generator) < 0.5
        return torch.where(is_mirrored[:, None, None, None], pixels.flip(3), pixels)

    def write_caption(self, k, rng):
        """The caption of photo k is its prompt."""
        return self.prompts[k]

    def draw_partners(self, i, generator):
        """For each photo i (B,) another one of the person, of somebody with one photo the same: (B,).

        Every other photo is equally likely.
        """
        counts = torch.bincount(self.who)  # (P,)
        starts = counts.cumsum(0) - counts
        size = counts[self.who[i]]  # (B,)
        start = starts[self.who[i]]
        u = torch.rand(len(i), generator=generator, dtype=torch.float64)
        step = 1 + (u * (size - 1)).long()  # 1 … size − 1
        step = torch.where(size > 1, step, 0)
        return start + (i - start + step) % size


def choose_people(root, size, crop=None):
    """-> people to train on, people to validate on; nobody whom a table asks for is in either.

    The rule is at the top of this file. Whoever has more than nine photos may be asked for. ValueError
    if nobody is left for validation.
    """
    everybody = LFW(root, size, min_photos=1, crop=crop).people
    several = [person for person in everybody if len(person.photos) > 1]
    alone = [person for person in everybody if len(person.photos) == 1]
    learned, held_out = split(several)
    few = [person for person in held_out if len(person.photos) <= REFERENCES]
    if not few:
        needs = f"held out are {len(held_out)} people, and none of them has two to nine photos"
        raise ValueError(f"{root}: nobody to validate on: {needs}")
    return learned + alone, few[:VALIDATION]


def read_faces(people):
    """The PhotoFaces of people from `choose_people`; photos that cannot be read are left out."""
    photos = [photo for person in people for photo in person.photos]
    found = load_or_compute(lambda: open_all(photos), "photos", VERSION, [p.key for p in photos])
    readable = found["readable"].tolist()
    bad = [photo.name for photo, ok in zip(photos, readable) if not ok]
    if bad:
        names = ", ".join(bad[:5])
        warnings.warn(f"{len(bad)} of {len(photos)} photos are unreadable and left out: {names}")
    is_good = iter(readable)
    kept = []
    for person in people:
        shots = [photo for photo in person.photos if next(is_good)]
        if shots:
            kept.append(person._replace(photos=shots))
    prompts = [photo.prompt for person in kept for photo in person.photos]
    counts = torch.tensor([len(person.photos) for person in kept])
    who = torch.repeat_interleave(torch.arange(len(kept)), counts)
    return PhotoFaces(kept, found["x"], prompts, who)


def open_all(photos):
    """{"x": the pixels of all photos that can be read, "readable": which (n,)}. ValueError: none."""
    opened = [found and found[0] for found in open_photos(photos)]
    pixels = [one for one in opened if one is not None]
    if not pixels:
        raise ValueError(f"none of the {len(photos)} photos can be read")
    readable = torch.tensor([one is not None for one in opened])
    return {"x": torch.from_numpy(np.stack(pixels)), "readable": readable}


def list_prompts(prompts):
    """What the tokenizer of photos is made from: every prompt, and words that a user may write."""
    words = "man woman person sks boy girl face portrait with and wearing in the"
    return sorted(set(prompts)) * 100 + [words] * 100


# ---------------------------------------------------------------- what frozen encoders say of them


@torch.inference_mode()
def encode_both_sides(sd, pixels):
    """Latents of photos and of their mirror images, kept on disk: (2, n, C, h, w), on the CPU.

    Each is a sample of the VAE's posterior that is drawn once and for all.
    """

    def encode():
        generator = torch.Generator().manual_seed(0)
        parts = []
        for part in tqdm(torch.cat([pixels, pixels.flip(3)]).split(64), "latents", leave=False):
            parts.append(sd.encode_latents(to_tensor(part), generator).float().cpu())
        return {"x": torch.cat(parts).unflatten(0, (2, -1))}

    scale = sd.vae.config["scaling_factor"]
    key = digest(sd.vae.encoder, sd.vae.quant_conv, scale=scale)
    keys = ("latents", VERSION, key, digest_pixels(pixels), autocast_dtype(device_of(sd.vae)))
    return load_or_compute(encode, *keys)["x"]


@torch.inference_mode()
def embed_both_sides(sd, pixels):
    """Image embeddings of photos and of their mirror images, kept on disk: (2, n, E), on the CPU."""

    # A face recogniser looks at both sides of a photo itself: its answer is the sum.
    is_same = isinstance(sd.image_encoder, FaceEncoder)
    shown = pixels if is_same else torch.cat([pixels, pixels.flip(3)])

    def embed():
        parts = []
        for part in tqdm(shown.split(16), "embeddings", leave=False):  # by 64: 2.5 times as slow
            parts.append(sd.embed_images(to_tensor(part)).float().cpu())
        return {"x": torch.cat(parts)}

    key = digest(sd.image_encoder, preprocessor=sd.preprocessor)
    keys = ("embeddings", VERSION, key, digest_pixels(pixels), autocast_dtype(device_of(sd.vae)))
    found = load_or_compute(embed, *keys)["x"]
    return torch.stack([found, found]) if is_same else found.unflatten(0, (2, -1))


def digest_pixels(pixels):
    """Sixteen hex digits of a tensor."""
    holder = torch.nn.Module()
    holder.register_buffer("x", pixels)
    return digest(holder)


def pick_side(sides, i, generator):
    """Of (2, n, …) the rows i (B,), each of the photo or of its mirror image: (B, …)."""
    side = torch.randint(2, (len(i),), generator=generator)
    return sides[side, i]
