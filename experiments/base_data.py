"""The people that base.py trains on, and what each stage takes from their photos."""

from typing import NamedTuple

import numpy as np
import torch

from data import ToyFaces
from support.files import load_or_compute
from support.pictures import open_photos
from toyfaces.captions import write_caption

VERSION = 1  # of the pixels in the cache: raised by hand when this code gives other ones


class Faces(NamedTuple):
    """Toy people, and all their photos in one row."""

    people: list
    pixels: torch.Tensor  # (n, 3, 64, 64), uint8
    labels: list  # n dictionaries {attribute: class number}


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


def make_numpy_generator(generator):
    """A NumPy generator for captions, seeded by a torch.Generator."""
    seed = torch.randint(2**31, (1,), generator=generator).item()
    return np.random.default_rng(seed)


def write_corpus(labels):
    """What the tokenizer is made from: captions, and words of prompts that no caption has."""
    rng = np.random.default_rng(0)
    captions = [write_caption(one, rng) for one in labels[:5000]]
    words = "man woman sks serious sad contemptuous disgusted frightened"
    return captions + [words] * 100
