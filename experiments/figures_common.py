"""What the figures of the course share: the model, people, conditions, and small PNG files."""

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from data import ToyFaces
from experiments.adapters import STRANGERS, find_adapters
from ip_adapter import IPAdapter
from support.checkpoints import ADAPTER, TINY
from support.devices import pick_device, pick_precision
from support.files import write_whole
from support.pictures import to_images, to_tensor
from train import Options, train_adapter
from unet import StableDiffusion

NEW_PEOPLE = 100  # of seed 2; those before them validate the adapters (data.load_people)


class Conditions(NamedTuple):
    """What a picture is made from, and the same without a condition (ip_adapter.generate)."""

    c_t: torch.Tensor  # (B, L, D)
    null_c_t: torch.Tensor  # (1, L, D)
    c_i: torch.Tensor = None  # (B, 4M, D)
    null_c_i: torch.Tensor = None  # (1, 4M, D)


@dataclass
class World:
    """The model of the figures, its adapters, people that nothing was trained on, and settings."""

    model: Path = TINY
    runs: Path = Path("runs")
    people: int = 60
    steps: int = 20
    long_steps: int = 1000  # where a figure needs as many as there are
    seed: int = 0

    @cached_property
    def sd(self):
        return StableDiffusion.load(self.model)

    @cached_property
    def faces(self):
        """The first people of the tables, ten photos each."""
        count = NEW_PEOPLE + self.people
        return ToyFaces(count, size=self.sd.image_size, seed=2).people[NEW_PEOPLE:]

    def selfattn(self):
        """The adapter of runs/selfattn, trained now if there is none, attached to the UNet."""
        file = self.runs / "selfattn" / "ip-adapter.safetensors"
        if not file.is_file():
            device = pick_device("cpu")
            options = Options(device, pick_precision("auto", device), resume=True)
            torch.manual_seed(options.seed)
            train_adapter(file.parent, options, str(self.model), "selfattn", "toy", 800)
        return IPAdapter.load(file, self.sd.unet)

    def selfattn_with_strangers(self):
        """The one of `experiments.sweeps kinds` that met strangers in training, trained if missing."""
        files = find_adapters(self.runs, pick_device("cpu"), "selfattn", strangers=STRANGERS)
        return IPAdapter.load(files["selfattn"], self.sd.unet)

    def shipped(self, agg):
        """The single-image adapter that comes with the model, with another aggregator."""
        return IPAdapter.load(self.model / ADAPTER, self.sd.unet, agg)

    def embed(self, images):
        """Pictures -> their embeddings (n, E)."""
        return self.sd.embed_images(to_tensor(images))

    def embed_sets(self, pictures):
        """Sets of n pictures (P, n, 3, H, W) -> (P, n, E)."""
        embeds = [self.sd.embed_images(some) for some in pictures]
        return torch.stack(embeds)

    def condition(self, prompts, adapter=None, embeds=None):
        """B prompts, and for an adapter their references (B, N, E), as Conditions."""
        c_t = self.sd.encode_prompts(prompts)
        null_c_t = self.sd.encode_prompts([""])
        if adapter is None:
            return Conditions(c_t, null_c_t)
        c_i = adapter.tokens(embeds)
        null_c_i = adapter.tokens(torch.zeros_like(embeds[:1]))
        return Conditions(c_t, null_c_t, c_i, null_c_i)


# ---------------------------------------------------------------- drawing


def new_sheet(rows, columns, side=1.0, width_ratios=None, layout="constrained"):
    """A figure of rows × columns of axes without ticks, `side` inches each; axes[row][column]."""
    from matplotlib.figure import Figure  # here: it takes half a second

    total = sum(width_ratios) if width_ratios else columns
    figure = Figure(figsize=(side * total + 0.6, side * rows + 0.5), layout=layout)
    grid = {"width_ratios": width_ratios} if width_ratios else None
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=grid)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure, axes


def show(axis, x, title=None, below=None):
    """A picture (3, H, W) in [−1, 1], with words over and under it."""
    axis.imshow(to_images(x[None])[0], interpolation="lanczos")
    if title is not None:
        axis.set_title(title, fontsize=8)
    if below is not None:
        axis.set_xlabel(below, fontsize=7, labelpad=2)


def name_row(axis, text):
    """Words to the left of a row."""
    axis.set_ylabel(text, fontsize=8)


def save_small(path, figure, dpi=100, colours=128):
    """Write a figure as a PNG with a palette: a third of the size, and no difference to be seen."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    image = Image.open(drawn).convert("RGB")
    small = image.quantize(colours, dither=Image.Dither.NONE)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: small.save(part, "PNG", optimize=True))
