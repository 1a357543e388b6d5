"""Data: people with several photos each, and what the trainer makes of them (sections 2 and 4).

    𝔇 = {(x_i, τ_i) : i = 1…n},   x_i a photo,   τ_i its prompt

Two sources with one interface, `.people` -> list of Person(name, noun, photos=[Photo, …]):

  ToyFaces   portraits drawn on the fly, seeded, nothing to download (toyfaces/). A person has an
             identity; a photo has a scene, often with sunglasses, a hat or a scarf that hides a
             part of the identity. One photo cannot show the whole identity, several can.
  LFW        the Deep Funneled photos of a folder (`<Name>/<Name>_0001.jpg`), with prompts.

How test people are kept out of training, all in one place:
  ToyFaces   every seed is a population of its own: seed 0 trains the base model, seed 1 the
             adapters (`load_people`). Of seed 2 the first hundred people are for validation, the
             others for the tables (experiments/plan.py). Other seeds are free.
  LFW        `split` splits by person: two thirds train. Of the held-out third a hundred people validate
             (`load_people`); those with ten photos or more, for the tables, only if others are few.
  a person   within a person, `leave_one_out` never puts the target among its own references.

Then: the frozen features of every photo (`Features`), and leave-one-out batches (`leave_one_out`).
"""

from functools import partial
from itertools import islice
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

from aggregators import choose_references
from support.checkpoints import digest_encoders
from support.devices import autocast_dtype, device_of
from support.files import describe_file, load_or_compute
from support.finite import check_finite
from support.pictures import (PICTURES, crop_square, load_image, open_photos, to_tensor,
                              warn_of_unreadable)
from support.text import find_noun, read_prompts
from toyfaces import drawing
from toyfaces.captions import write_prompt


class Photo(NamedTuple):
    """One picture x_i with its prompt τ_i."""

    open: Callable  # reads or draws it: () -> RGB image
    prompt: str
    name: str
    size: int  # of `image`, in pixels
    key: tuple  # what the pixels depend on, for caches
    labels: dict = {}  # toy photos know the truth: attribute -> class

    @property
    def image(self):
        """The picture, its centre square scaled to size × size."""
        return crop_square(self.open(), self.size)


class Person(NamedTuple):
    name: str
    noun: str  # man, woman or person
    photos: list


class ToyFaces:
    """`people` drawn persons with `photos` photos each, all of it decided by `seed`.

    Person p and photo q are the same whatever the number of people and photos around them.
    """

    def __init__(self, people, photos=10, size=64, seed=0):
        self.people = []
        for p in range(people):
            identity = self.draw_classes(drawing.IDENTITY, seed, p)
            shots = []
            for q in range(photos):
                # q + 1, because NumPy pads seeds with zeros: [seed, p, 0] would be [seed, p]
                scene = self.draw_classes(drawing.SCENE, seed, p, q + 1)
                draw = partial(drawing.draw_face, identity, scene, [seed, p, q, 1], size)
                name = f"toy_{p:05d}_{q:04d}"
                labels = {**identity, **scene}
                key = ("toy", drawing.VERSION, seed, p, q, size)
                shots.append(Photo(draw, write_prompt(scene), name, size, key, labels))
            self.people.append(Person(f"toy_{p:05d}", "person", shots))

    @staticmethod
    def draw_classes(attributes, *seed):
        """A class for every attribute, uniformly: {attribute: class number}."""
        rng = np.random.default_rng(seed)
        return {name: int(rng.integers(len(words))) for name, words in attributes.items()}


class LFW:
    """Labeled Faces in the Wild, Deep Funneled: a folder with one folder of photos a person.

    root: the folder; size: of the pictures, in pixels; min_photos: people with fewer are left out;
    crop: the part of a photo that counts (support/crops.py), None: all of it.
    Prompts come from `prompts.tsv` (image <TAB> prompt) in root or beside it, else they are "a photo
    of a person". ValueError if there is nothing to use.
    """

    def __init__(self, root, size, min_photos=2, crop=None):
        root = Path(root)
        if not root.is_dir():
            raise ValueError(f"{root}: no such folder; give one with a folder of photos a person")
        prompts = read_prompts(root)
        self.people = []
        for folder in sorted(path for path in root.iterdir() if path.is_dir()):
            files = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
            if len(files) < min_photos:
                continue
            shots = []
            for file in files:
                name = f"{folder.name}/{file.name}"
                prompt = prompts.get(name, "a photo of a person")
                key = describe_file(file, size)
                if crop:
                    key = (*key, crop)
                shots.append(Photo(partial(load_image, file, crop=crop), prompt, name, size, key))
            self.people.append(Person(folder.name, find_noun([shot.prompt for shot in shots]), shots))
        if not self.people:
            few = f"no person with at least {min_photos} photos"
            raise ValueError(f"{root}: {few}; expected <Name>/<Name>_0001.jpg …")


def split(people, ratio=2 / 3, seed=0):
    """People -> (training people, test people), nobody in both; `ratio` of them train."""
    order = np.random.default_rng(seed).permutation(len(people))
    cut = round(len(people) * ratio)
    train = [people[i] for i in sorted(order[:cut])]
    test = [people[i] for i in sorted(order[cut:])]
    return train, test


def load_people(source, size, count=800, crop=None):
    """The people to train adapters on and the people to validate them on, nobody in both.

    source: "toy" (then `count` of them train), or a folder like LFW. size: of pictures, in pixels.
    crop: of a folder's photos. ValueError if nobody is left for validation.
    """
    if source == "toy":
        train = ToyFaces(count, size=size, seed=1).people
        return train, ToyFaces(min(count, 100), size=size, seed=2).people
    train, test = split(LFW(source, size, crop=crop).people)
    if not test:
        alone = "only one person with two photos; at least one more must be held out for validation"
        raise ValueError(f"{source}: {alone}")
    test.sort(key=lambda person: len(person.photos) > 9)  # tables ask for these: they come last
    return train, test[:100]


# ---------------------------------------------------------------- frozen features

class Features:
    """The frozen encoders' output for every photo, computed once and kept on disk.

    z_0 (n, C, h, w): latents, each a sample of the VAE's posterior that is drawn once and for all;
    embeds (n, E): image embeddings;
    c_t (u, L, D): text features of the u different prompts; that of photo i is c_t[prompt[i]];
    null_c_t (1, L, D): those of the empty prompt;
    groups: for each person a LongTensor with the numbers of his photos.

    Photos that cannot be read are counted, the first five named, and left out; ValueError if none
    can be read.
    """

    VERSION = 2  # of the numbers: raised when this code gives other ones

    def __init__(self, sd, people, encoders=None):
        """encoders: their digest (`digest_encoders`), if it is known already."""
        photos = [photo for person in people for photo in person.photos]
        prompts = sorted({photo.prompt for photo in photos})
        # The key holds the data and the encoders' weights: features of another model never load.
        data = [(photo.key, photo.prompt) for photo in photos]
        encoders = encoders or digest_encoders(sd)
        key = ("features", self.VERSION, data, encoders, autocast_dtype(device_of(sd.vae)))
        found = load_or_compute(lambda: compute_features(sd, photos, ["", *prompts]), *key)
        check_finite(VAE=found["z_0"], image_encoder=found["embeds"], text_encoder=found["c_t"])
        self.z_0 = found["z_0"]
        self.embeds = found["embeds"]
        self.null_c_t = found["c_t"][:1]
        self.c_t = found["c_t"][1:]
        readable = found["readable"].tolist()
        warn_of_unreadable(photos, readable)

        row = {prompt: i for i, prompt in enumerate(prompts)}
        kept = [photo for photo, ok in zip(photos, readable) if ok]
        self.prompt = torch.tensor([row[photo.prompt] for photo in kept])
        counts = [sum(part) for part in split_like(readable, people)]  # readable photos a person
        self.groups = list(torch.arange(len(kept)).split(counts))


def split_like(values, people):
    """A flat list with one value a photo -> one list a person."""
    values = iter(values)
    return [list(islice(values, len(person.photos))) for person in people]


@torch.inference_mode()
def compute_features(sd, photos, prompts):
    """The tensors of `Features` on the CPU; `readable` (n,): which photos there are rows for."""
    generator = torch.Generator().manual_seed(0)  # on the CPU: the same noise on every device
    batch = max(1, 64 * 64**2 // sd.image_size**2)  # 64 pictures of the tiny world, one of SD
    opened = open_photos(photos, sd.image_encoder.config.image_size, chunk=64 * batch)
    z_0 = []
    embeds = []
    readable = []
    for _ in range(0, len(photos), batch):
        some = list(islice(opened, batch))
        readable += [photo is not None for photo in some]
        some = [photo for photo in some if photo is not None]
        if some:
            pixels, views = zip(*some)
            images = to_tensor(torch.from_numpy(np.stack(pixels)))
            z_0.append(sd.encode_latents(images, generator).float().cpu())
            embeds.append(sd.embed_images(views).float().cpu())
    if not z_0:
        raise ValueError(f"none of the {len(photos)} photos can be read")
    c_t = []
    for start in range(0, len(prompts), 64):
        c_t.append(sd.encode_prompts(prompts[start : start + 64]).float().cpu())
    return {"z_0": torch.cat(z_0), "embeds": torch.cat(embeds), "c_t": torch.cat(c_t),
            "readable": torch.tensor(readable)}


# ---------------------------------------------------------------- batches

def leave_one_out(groups, batch, generator, n=10, strangers=0.0):
    """j ~ U{1…N}: photo j is the target, the others are its references   (eq. 1).

    groups: per person a tensor of photo numbers; people with one photo are never drawn. Of more
    than `n` photos a random `n` take part; fewer than n−1 references are bootstrapped to n−1.
    strangers: the probability of `mix_in_stranger`, 0 in the paper.
    Returns target (B,) and references (B, n−1).
    """
    groups = [group for group in groups if len(group) > 1]
    if not groups:
        raise ValueError("leave-one-out needs at least one person with two photos")
    targets = []
    references = []
    for k in torch.randint(len(groups), (batch,), generator=generator).tolist():
        # A random order makes the target uniform and the n photos a random subset.
        order = torch.randperm(len(groups[k]), generator=generator)
        shots = groups[k][order[:n]]
        others = shots[1:]
        chosen = choose_references(len(others), n - 1, generator=generator)
        chosen = others[chosen]  # (n − 1,)
        if strangers and torch.rand(1, generator=generator) < strangers:
            chosen = mix_in_stranger(chosen, groups, k, generator)
        targets.append(shots[0])
        references.append(chosen)
    return torch.stack(targets), torch.stack(references)


def mix_in_stranger(references, groups, k, generator, most=3):
    """One to three references of person k (N,) become photos of one other person. Not in the paper.

    Where and how many is uniform; at least one reference stays. ValueError if there is no other person,
    or only one reference.
    """
    if len(groups) < 2 or len(references) < 2:
        raise ValueError("strangers need at least two people with two photos, and two references")
    other = int(torch.randint(len(groups) - 1, (1,), generator=generator))
    photos = groups[other + (other >= k)]  # numbers from k on stand for the next person: never k
    most = min(most, len(references) - 1)
    count = 1 + int(torch.randint(most, (1,), generator=generator))
    places = torch.randperm(len(references), generator=generator)[:count]
    drawn = torch.randint(len(photos), (count,), generator=generator)
    mixed = references.clone()
    mixed[places] = photos[drawn]
    return mixed
