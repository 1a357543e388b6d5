"""Makers: a plan becomes folders of pictures. What is there already is not made again.

Units of work are fixed by the plan: of an adapter a batch of successive pictures of the whole list,
of DreamBooth a person, who is taught once for all its rows. So a run that was interrupted, or shared
out by torchrun, makes the same pictures bit for bit.
"""

import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from tqdm import tqdm

from dreambooth import encode_files, make_class_images, write_prompts
from experiments.photos import (embed_pictures, photos_at_once, precision_of, read_pictures,
                                save_bytes, write_photos, write_round_trips)
from experiments.plan import REFERENCES, name_person
from ip_adapter import IPAdapter, generate
from support.devices import is_large
from support.distributed import alone, barrier, first_alone, is_first, rank, world_size
from support.files import CACHE, read_json, write_json
from support.pictures import to_bytes, to_tensor
from toyfaces import drawing
from train import DEFAULTS, Options, fine_tune


@torch.inference_mode()
def make_pictures(sd, prompts, settings, seed, adapter=None, embeds=None, lam=1.0, phi=0.0):
    """Pictures of n prompts from the noise of seed, seed + 1, …: uint8 (n, 3, H, W).

    embeds (n, N, E): the references of each picture, for `adapter`. phi: ddpm.rescale_guidance.
    """
    made = []
    c_i = null_c_i = None
    dtype = next(sd.unet.parameters()).dtype
    for start in range(0, len(prompts), settings.batch):
        batch = slice(start, start + settings.batch)
        with precision_of(sd, settings):
            c_t = sd.encode_prompts([*prompts[batch], ""]).to(dtype)
            if adapter:
                references = embeds[batch].to(c_t)
                c_i = adapter.tokens(references)
                null_c_i = adapter.tokens(torch.zeros_like(references[:1]))
            images = generate(sd, c_t[:-1], c_t[-1:], c_i, null_c_i, settings.guidance, lam,
                              settings.steps, seed=seed + start, phi=phi)
        made.append(to_bytes(images))
    return torch.cat(made)


def teach_person(sd, photos, noun, settings, method, steps=None, lr=None):
    """A copy of `sd` that DreamBooth taught the uint8 `photos` (N, 3, H, W) as "sks noun".

    steps, lr: default as in train.py. The class pictures are made once and then kept.
    """
    person = copy.copy(sd)
    prompts = write_prompts("sks", noun)
    generator = torch.Generator().manual_seed(settings.seed)
    with precision_of(sd, settings):
        images = to_tensor(photos).to(settings.device)
        latents = [sd.encode_latents(part, generator) for part in images.split(photos_at_once(sd))]
        z_0 = torch.cat(latents).float()
        z_pr = z_0[:0]
        if method.prior_weight:
            files = make_class_images(sd, prompts[1], CACHE, method.class_images, settings.seed,
                                      w=method.class_guidance)
            z_pr = encode_files(sd, files, generator)
    dtype = next(sd.unet.parameters()).dtype
    person.unet = copy.deepcopy(sd.unet).float()  # what trains is float32
    options = Options(settings.device, settings.precision, steps=steps, lr=lr, every=10**9,
                      seed=settings.seed)
    with TemporaryDirectory() as out:
        fine_tune(person, prompts, z_0, z_pr, Path(out), options, method)
    person.unet.to(dtype)
    return person


@dataclass
class Unit:
    """A piece of work that is done as a whole: pictures first … first + count − 1 of a method."""

    name: str  # of the method
    number: int
    files: list
    first: int
    cost: int  # evaluations of the UNet for one picture, about

    @property
    def is_done(self):
        return all(file.exists() for file in self.files)


class Maker:
    """Makes what is missing of a plan. sd: the model, to which the adapters are attached in turn."""

    def __init__(self, plan, sd):
        self.plan = plan
        self.sd = sd
        self.settings = plan.settings
        self.references = None  # (P, 9, E)
        self.ready = None  # the last method's name, adapter and (P, N, E) references
        self.taught = None  # the last person and teaching of DreamBooth, and the model

    def make(self):
        """Photos and pictures of all methods; several processes share the units out."""
        self.check_adapters()
        with first_alone():
            self.plan.settle()
            write_photos(self.plan)
            write_round_trips(self.plan, self.sd)
        jobs = self.list_jobs()[rank() :: world_size()]
        units = [unit for job in jobs for unit in job]
        total = sum(unit.cost * len(unit.files) for unit in units)
        missing = [unit for unit in units if not unit.is_done]
        done = total - sum(unit.cost * len(unit.files) for unit in missing)
        # Pictures cost differently: the bar counts evaluations of the UNet.
        with tqdm(total=total, initial=done, desc="pictures", unit="eval", unit_scale=True,
                  smoothing=0.05, disable=not (missing and is_first())) as bar:
            for unit in missing:
                bar.set_postfix_str(f"{unit.name}, from picture {unit.first}")
                self.make_unit(unit)
                bar.update(unit.cost * len(unit.files))
        barrier()

    def check_adapters(self):
        """ValueError if an adapter is none, or of another width; nothing is made before."""
        width = self.sd.image_encoder.config.projection_dim
        for method in self.plan.methods.values():
            if method.file:
                adapter = IPAdapter.load(method.file, self.sd.unet, method.agg)
                found = adapter.image_proj.proj.in_features
                if found != width:
                    what = f"reads image embeddings of width {found}, the model's have {width}"
                    raise ValueError(f"{method.file} is of another image encoder: it {what}")

    def list_jobs(self):
        """All units of the plan, done or not, always in the same order, in lists.

        A list is for one process: the rows of a person whom DreamBooth teaches once, or one unit.
        """
        jobs = []
        taught = {}  # teaching -> the list of each person
        people = range(len(self.plan.subjects))
        for name, method in self.plan.methods.items():
            if method.dreambooth and method.teaching_key not in taught:
                taught[method.teaching_key] = [[] for _ in people]
                jobs += taught[method.teaching_key]
            for unit in self.list_units(name, method):
                if method.dreambooth:
                    taught[method.teaching_key][unit.number].append(unit)
                else:
                    jobs.append([unit])
        return jobs

    def list_units(self, name, method):
        """The units of a method: of DreamBooth a person each."""
        people = range(len(self.plan.subjects))
        files = [file for p in people for file in self.plan.files(name, p)]
        size = self.plan.n if method.dreambooth else self.settings.batch
        cost = self.count_evaluations(method)
        units = []
        for number, first in enumerate(range(0, len(files), size)):
            units.append(Unit(name, number, files[first : first + size], first, cost))
        return units

    def count_evaluations(self, method):
        """Of the UNet for one picture; a training step costs three, of photos and class pictures."""
        w = self.settings.guidance if method.guidance is None else method.guidance
        count = self.settings.steps * (1 if w == 1 else 2)
        if method.dreambooth:
            steps, batch, _ = DEFAULTS["dreambooth", is_large(self.sd.unet)]
            steps = method.steps or steps
            count += 3 * steps * 2 * batch // self.plan.n
        return count

    def make_unit(self, unit):
        """Make the pictures of a unit and write the missing ones, after the seconds they took.

        The seconds hold those of teaching the person, for every row that uses it.
        """
        method = self.plan.methods[unit.name]
        began = time.perf_counter()
        if method.dreambooth:
            began -= self.teach(unit.number, method)
        prompts = self.plan.prompts[unit.first : unit.first + len(unit.files)]
        settings = self.settings
        if method.guidance is not None:
            settings = replace(settings, guidance=method.guidance)
        seed = settings.seed + unit.first
        if method.dreambooth:
            pictures = self.make_person(unit.number, prompts, settings, method)
        else:
            adapter, embeds = self.prepare(unit.name)
            people = torch.arange(unit.first, unit.first + len(unit.files)) // self.plan.n
            embeds = embeds[people] if adapter else None
            pictures = make_pictures(self.sd, prompts, settings, seed, adapter, embeds, method.lam,
                                     method.phi)
        seconds = time.perf_counter() - began
        note = self.plan.out / unit.name / f"seconds-{unit.number:04d}.json"
        write_json(note, {"pictures": len(unit.files), "seconds": round(seconds, 3)})
        save_bytes(unit.files, pictures)

    def make_person(self, p, prompts, settings, method):
        """Pictures of "sks person" by the model that learned person p (`teach`)."""
        noun = self.plan.subjects[p].person.noun
        prompts = [name_person(prompt, noun) for prompt in prompts]
        seed = settings.seed + p * self.plan.n
        _, model, _ = self.taught
        return make_pictures(model, prompts, settings, seed, phi=method.phi)

    def teach(self, p, method):
        """Let self.taught be the model that learned person p, always from the same weights.

        Returns the seconds that took if it was there already, from the last row; else 0, as the
        clock runs.
        """
        key = (p, method.teaching_key)
        if self.taught and self.taught[0] == key:
            return self.taught[2]
        began = time.perf_counter()
        noun = self.plan.subjects[p].person.noun
        photos = read_pictures(self.plan.files("references", p, REFERENCES))
        with alone():  # other processes learn other people
            model = teach_person(self.sd, photos, noun, self.settings, method.dreambooth,
                                 method.steps, method.lr)
        self.taught = (key, model, time.perf_counter() - began)
        return 0.0

    def prepare(self, name):
        """-> the adapter of a method, attached to the UNet, or None; its references (P, N, E)."""
        method = self.plan.methods[name]
        if not method.file:
            return None, None
        if self.ready is None or self.ready[0] != name:
            adapter = IPAdapter.load(method.file, self.sd.unet, method.agg)
            self.ready = (name, adapter, self.choose_references(method, adapter))
        return self.ready[1:]

    def choose_references(self, method, adapter):
        """(P, N, E): what a method is given of each person."""
        if self.references is None:
            self.references = self.embed_folder()
        embeds = self.references[:, : method.references]
        if method.kinds:
            embeds = self.embed_kinds(method.kinds)
        if method.normalise:  # all as long as they are on average: each counts alike
            length = embeds.norm(dim=2, keepdim=True).mean(1, keepdim=True)
            embeds = length * F.normalize(embeds, dim=2)
        return adapter.aggregator.fit_references(embeds, torch.Generator().manual_seed(0))

    def embed_folder(self):
        """(P, 9, E): the embeddings of all references, from their folders."""
        people = range(len(self.plan.subjects))
        files = [file for p in people for file in self.plan.files("references", p, REFERENCES)]
        batch = photos_at_once(self.sd)
        embeds = []
        for start in range(0, len(files), batch):
            pictures = read_pictures(files[start : start + batch])
            embeds.append(embed_pictures(self.sd, pictures, self.settings))
        return torch.cat(embeds).unflatten(0, (len(people), REFERENCES))

    def embed_kinds(self, kinds):
        """(P, 9, E): the nine references, each of its kind.

        None: as it was drawn; a number: the same person drawn anew with this accessory; "stranger":
        the photo of somebody else.
        """
        embeds = self.references.clone()
        strangers = self.references.roll(1, 0)
        for k, kind in enumerate(kinds):
            if kind == "stranger":
                embeds[:, k] = strangers[:, k]
            elif kind is not None:
                faces = []
                for p, subject in enumerate(self.plan.subjects):
                    labels = {**subject.references[k].labels, "accessory": kind}
                    faces.append(drawing.draw_face(labels, {}, [p, k], self.sd.image_size))
                pictures = to_bytes(to_tensor(faces))
                embeds[:, k] = embed_pictures(self.sd, pictures, self.settings)
        return embeds


def read_seconds(plan, name):
    """Seconds a picture of a method, over all units whose time is known; None if none is."""
    pictures, seconds = 0, 0.0
    for file in sorted((plan.out / name).glob("seconds-*.json")):
        facts = read_json(file)
        pictures += facts["pictures"]
        seconds += facts["seconds"]
    return seconds / pictures if pictures else None
