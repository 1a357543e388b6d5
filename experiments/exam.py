"""An exam on toy people that nobody was trained on: what every method is given, and what it makes.

Every method gets the same references, prompts, noise, steps and guidance. Pictures are kept in
.cache/, so the same command goes on where it was stopped.
"""

import copy
import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tqdm import tqdm

from data import ToyFaces, digest_encoders
from dreambooth import DreamBooth, encode_files, make_class_images, write_prompts
from experiments.base import make_pixels
from ip_adapter import IPAdapter, generate
from support.checkpoints import TINY
from support.devices import autocast
from support.files import CACHE, digest, load_or_compute
from support.pictures import to_bytes, to_tensor
from toyfaces import drawing
from train import DEFAULTS, Options, fine_tune
from unet import StableDiffusion

VERSION = 1  # of the pictures: raised by hand when this or any other code makes other ones
REFERENCES = 9
DREAMBOOTH = DreamBooth()  # how its row is trained: as train.py does by default


@dataclass
class Settings:
    """What all methods share. Their number of pictures is people · photos · seeds."""

    device: torch.device
    precision: str
    people: int = 60
    photos: int = 3  # prompts a person, each that of a held-out photo
    seeds: int = 3  # pictures a prompt
    guidance: float = 4.0  # w of eq. 11
    steps: int = 20
    seed: int = 2020  # of the noise
    batch: int = 32


@dataclass
class Method:
    """An adapter, and what it is given; with file None the text alone."""

    file: Path = None
    agg: str = None
    references: int = REFERENCES  # the first so many photos
    kinds: tuple = None  # instead: nine photos, each of a kind (Exam.embed_kinds)
    lam: float = 1.0
    guidance: float = None  # w, if it is not that of the settings


class Exam:
    """People, their references and the prompts.

    ToyFaces' seed 0 is the base model's, seed 1 the adapters', and the first hundred people of seed
    2 are validation. A person has nine references and, held out, as many photos as pictures will be
    made (`n`): the real photos of FID and KID. The prompts of the first `photos` of these are asked
    for, `seeds` times each, every picture from noise of its own. n more photos are used only for
    the row of real photos.

    pictures (P, 9 + 2n, 3, H, W) uint8; embeds (P, 9 + 2n, E); prompts: a list of P·n; target (n,):
    the held-out photo that each picture of a person should be like.
    """

    def __init__(self, settings):
        self.settings = settings
        self.n = settings.photos * settings.seeds
        self.sd = StableDiffusion.load(TINY, settings.device)
        faces = ToyFaces(100 + settings.people, REFERENCES + 2 * self.n, self.sd.image_size, seed=2)
        self.people = faces.people[100:]
        photos = [photo for person in self.people for photo in person.photos]
        pixels = make_pixels(photos)
        shape = (len(self.people), -1)
        self.pictures = pixels.unflatten(0, shape)
        self.embeds = embed_pictures(self.sd, pixels).unflatten(0, shape)
        self.target = torch.arange(settings.photos).repeat_interleave(settings.seeds)
        self.prompts = [photo.prompt for photo in self.photos_of(self.target)]

    def photos_of(self, scenes):
        """The held-out photos with the numbers `scenes` of every person, one after another."""
        return [person.photos[REFERENCES + q] for person in self.people for q in scenes]

    def cache_key(self):
        """What the pictures of every method depend on."""
        common = replace(self.settings, people=0)  # a picture does not depend on other people
        model = digest(self.sd.unet, self.sd.vae)
        return ("exam", VERSION, drawing.VERSION, common, model, digest_encoders(self.sd))

    def make(self, method):
        """-> {"x": uint8 (P·n, 3, H, W), "seconds": of all of them}, by an adapter or text alone."""
        weights = method.file and hashlib.sha256(method.file.read_bytes()).hexdigest()
        key = (*self.cache_key(), self.prompts, weights, replace(method, file=None))

        settings = self.settings
        if method.guidance is not None:
            settings = replace(settings, guidance=method.guidance)

        def compute():
            adapter = None
            if method.file:
                adapter = IPAdapter.load(method.file, self.sd.unet, method.agg)
            embeds = self.embed_references(method, adapter).repeat_interleave(self.n, 0)
            return make_pictures(
                self.sd, self.prompts, settings, settings.seed, adapter, embeds, method.lam)

        return load_or_compute(compute, *key)

    def embed_references(self, method, adapter):
        """(P, N, E): what a method is given of each person."""
        if method.kinds:
            embeds = self.embed_kinds(method.kinds)
        else:
            embeds = self.embeds[:, : method.references]
        if adapter is None:
            return embeds
        return adapter.aggregator.fit_references(embeds, torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def embed_kinds(self, kinds):
        """(P, 9, E): the nine references, each of its kind.

        None: as it was drawn; a number: the same person drawn anew with this accessory; "stranger":
        the photo of somebody else.
        """
        embeds = self.embeds[:, :REFERENCES].clone()
        strangers = self.embeds.roll(1, 0)
        size = self.sd.image_size
        for k, kind in enumerate(kinds):
            if kind == "stranger":
                embeds[:, k] = strangers[:, k]
            elif kind is not None:
                faces = []
                for p, person in enumerate(self.people):
                    labels = {**person.photos[k].labels, "accessory": kind}
                    faces.append(drawing.draw_face(labels, {}, [p, k], size))
                images = to_tensor(faces).to(self.settings.device)
                embeds[:, k] = self.sd.embed_images(images).cpu()
        return embeds

    def make_with_dreambooth(self):
        """Pictures of "sks person", each person learned from the same weights.

        Kept person by person; the seconds include the learning.
        """
        made = []
        for p in tqdm(range(len(self.people)), "DreamBooth, people"):
            prompts = self.prompts[p * self.n : (p + 1) * self.n]
            how = (DREAMBOOTH, DEFAULTS["dreambooth", False])
            key = (*self.cache_key(), prompts, "DreamBooth", p, *how)
            made.append(load_or_compute(lambda: self.make_person(p, prompts), *key))
        pictures = torch.cat([one["x"] for one in made])
        return {"x": pictures, "seconds": sum(one["seconds"] for one in made)}

    def make_person(self, p, prompts):
        began = time.perf_counter()
        prompts = [prompt.replace("person", "sks person") for prompt in prompts]
        taught = teach_person(self.sd, self.pictures[p, :REFERENCES], self.settings, DREAMBOOTH)
        seed = self.settings.seed + p * self.n
        made = make_pictures(taught, prompts, self.settings, seed)
        return {"x": made["x"], "seconds": torch.tensor(time.perf_counter() - began)}


@torch.inference_mode()
def embed_pictures(sd, pictures):
    """uint8 (n, 3, H, W) -> image embeddings (n, E) on the CPU."""
    parts = [sd.embed_images(to_tensor(part)).cpu() for part in pictures.split(64)]
    return torch.cat(parts)


@torch.inference_mode()
def make_pictures(sd, prompts, settings, seed, adapter=None, embeds=None, lam=1.0):
    """{"x": pictures of n prompts from the noise of seed, seed + 1, …, uint8, "seconds": of all}.

    embeds (n, N, E): the references of each picture, for `adapter`.
    """
    began = time.perf_counter()
    made = []
    c_i = null_c_i = None
    for start in tqdm(range(0, len(prompts), settings.batch), "pictures", leave=False):
        batch = slice(start, start + settings.batch)
        with autocast(settings.device, settings.precision):
            c_t = sd.encode_prompts([*prompts[batch], ""]).float()
            if adapter:
                references = embeds[batch].to(c_t)
                c_i = adapter.tokens(references)
                null_c_i = adapter.tokens(torch.zeros_like(references[:1]))
            images = generate(sd, c_t[:-1], c_t[-1:], c_i, null_c_i, settings.guidance, lam,
                              settings.steps, seed=seed + start)
        made.append(to_bytes(images))
    return {"x": torch.cat(made), "seconds": torch.tensor(time.perf_counter() - began)}


def teach_person(sd, photos, settings, method, steps=None, lr=None):
    """A copy of `sd` that DreamBooth taught the uint8 `photos` as "sks person".

    steps, lr: default as in train.py. The class pictures are made once and then kept.
    """
    person = copy.copy(sd)
    prompts = write_prompts("sks", "person")
    generator = torch.Generator().manual_seed(settings.seed)
    with autocast(settings.device, settings.precision):
        images = to_tensor(photos).to(settings.device)
        z_0 = sd.encode_latents(images, generator).float()
        z_pr = z_0[:0]
        if method.prior_weight:
            files = make_class_images(sd, prompts[1], CACHE, method.class_images, settings.seed)
            z_pr = encode_files(sd, files, generator)
    person.unet = copy.deepcopy(sd.unet)
    options = Options(settings.device, settings.precision, steps=steps, lr=lr, every=10**9,
                      seed=settings.seed)
    with TemporaryDirectory() as out:
        fine_tune(person, prompts, z_0, z_pr, Path(out), options, method)
    return person
