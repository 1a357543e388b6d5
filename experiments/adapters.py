"""The adapters that tables compare: all trained by one recipe, the missing ones are trained now.

The toy world's are made by train.py, into runs/<aggregator>, and those that differ in an option into
folders that say so: runs/seed-1/avg, runs/people-50/selfattn; those of photographs (weights/photos)
into the same folders in runs/photos or, if they read MobileFaceNet, in runs/photos-faces. One more
control is made here: same-photo, the single-image adapter trained on as IP-Adapter is, for the same
budget. Every photo is its own and only reference, so the difference to the others is leave-one-out.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from support.checkpoints import PHOTOS, TINY, read_adapter
from support.distributed import environment_alone
from support.files import digest
from train import Options
from train import train_adapter as train_here
from unet import StableDiffusion

OPTIONS = ("data", "people", "steps", "batch", "lr", "seed", "precision", "init")  # of train.py
RECIPE = (*OPTIONS, "base")  # what it writes into its files: these, and digests of the weights
BEST = "selfattn"  # the paper's method: runs/selfattn is the recipe of all others
SAME_PHOTO = "same-photo"
STRANGERS = 0.5  # the probability with which adapters met strangers in training, where they did
ADAPTER_FILE = "ip-adapter.safetensors"


@dataclass(frozen=True)
class World:
    """A model that ships with this code, and the people whom its adapters are trained on.

    data: "toy" or a folder; image_encoder: the file of a face recogniser, None: the model's own.
    """

    model: Path
    data: str
    image_encoder: str = None

    @property
    def is_toys(self):
        return self.data == "toy"

    def find_folder(self, runs):
        """Where its adapters lie: of the toy world in `runs` itself."""
        if self.is_toys:
            return runs
        return runs / ("photos-faces" if self.image_encoder else "photos")


def find_world(model, data, image_encoder=None):
    """The World of a model's folder, and of people as --data says; None: it is no shipped one."""
    if Path(model).resolve() == TINY.resolve() and data == "toy":
        return World(TINY, data)
    if Path(model).resolve() == PHOTOS.resolve() and data != "toy":
        return World(PHOTOS, data, image_encoder)
    return None


def find_adapters(runs, device, *names, world=None, **changes):
    """{name: its file in the folder `runs`}, trained if it is missing.

    names: of aggregators, or same-photo. world: None: the toy world. changes: options of train.py
    that are not those of runs/selfattn, such as seed=1. ValueError unless all were trained on the
    weights of the world's model, by the recipe of runs/selfattn but for the changes.
    """
    world = world or World(TINY, "toy")
    runs = world.find_folder(runs)
    unet = StableDiffusion.load(world.model).unet
    best = runs / BEST / ADAPTER_FILE
    if not best.is_file():
        train_adapter(best, BEST, device, world, {"data": world.data})
    recipe = read_recipe(best)
    check_recipe(best, recipe, unet)
    check_data(best, recipe, world)
    usual = dict(recipe)
    recipe |= {option: str(value) for option, value in changes.items()}
    other = {option: value for option, value in changes.items() if str(value) != usual[option]}
    folder = runs / "-".join(f"{option}-{value}" for option, value in other.items())
    files = {name: folder / name / ADAPTER_FILE for name in names}
    for name, file in files.items():
        if not file.is_file() and name == SAME_PHOTO:
            train_on_itself(file, device, world, recipe)
        elif not file.is_file():
            train_adapter(file, name, device, world, recipe)
        check_recipe(file, recipe, unet)
    return files


def read_recipe(file):
    """{option: its value in words} of the training that made an adapter; "unknown" if it says none."""
    _, metadata = read_adapter(file)
    recipe = {key: metadata.get(key, "unknown") for key in RECIPE}
    recipe["strangers"] = metadata.get("strangers", "0.0")  # it is said only where there were some
    return recipe


def name_adapter(file):
    """What a trained adapter is, by its own words: an aggregator, or same-photo."""
    _, metadata = read_adapter(file)
    return metadata.get("references", metadata.get("agg", "none"))


def list_given(wanted, best, others):
    """{name: its files} of the adapters that the user names: several of a kind are its trainings.

    best: files of the paper's method, whose aggregator is `wanted`; none: there is no such row.
    ValueError: one that is none, two of one kind and seed, or `best` is of another aggregator.
    """
    found = {}
    seeds = {}
    for file in [*best, *others]:
        name = name_adapter(file)
        if file in best and name != wanted:
            raise ValueError(f"--{wanted} {file} is of the aggregator {name}: name it in --trained")
        _, metadata = read_adapter(file)
        training = (name, metadata.get("seed"))
        if training in seeds:
            both = f"{seeds[training]} and {file} are both of the aggregator {name}"
            raise ValueError(f"{both}, and of one seed: give one of them")
        seeds[training] = file
        found.setdefault(name, []).append(file)
    counts = {name: len(files) for name, files in found.items() if len(files) > 1}
    if len(set(counts.values())) > 1:
        raise ValueError(f"as many trainings of each aggregator are needed, or one, not {counts}")
    return found


def train_adapter(file, agg, device, world, recipe):
    """Run train.py with the options of `recipe`; Ctrl-C leaves its checkpoint."""
    program = Path(__file__).parent.parent / "train.py"
    words = [sys.executable, program, "--agg", agg, "--model", world.model, "--out", file.parent]
    words += ["--device", device, "--resume"]
    if world.image_encoder:
        words += ["--image-encoder", world.image_encoder]
    for option, value in recipe.items():
        if option != "base":
            words += [f"--{option}", value]
    words = [str(word) for word in words]
    with subprocess.Popen(words, env=environment_alone()) as training:
        try:
            failed = training.wait()
        except KeyboardInterrupt:
            training.terminate()  # it ends its step and writes a checkpoint
            training.wait()
            raise
    if failed:
        hint = f"if {file.parent} holds a checkpoint of other options, move it away"
        raise ValueError(f"{file} is missing, and training it failed; {hint}")


def train_on_itself(file, device, world, recipe):
    """same-photo, with the options of `recipe`; Ctrl-C leaves a checkpoint that is gone on from."""
    steps, batch, people = int(recipe["steps"]), int(recipe["batch"]), int(recipe["people"])
    options = Options(torch.device(device), recipe["precision"], steps, batch,
                      float(recipe["lr"]), seed=int(recipe["seed"]), resume=True)
    train_here(file.parent, options, str(world.model), "none", recipe["data"], people,
               Path(recipe["init"]), world.image_encoder, alone=True)


def check_data(file, recipe, world):
    """ValueError if `file` was trained on other people than those of the world.

    Who is held out depends on the folder: others may be among them.
    """
    if world.is_toys or Path(recipe["data"]).resolve() == Path(world.data).resolve():
        return
    hint = f"name that folder, or move {file.parent.parent} away, and adapters are trained anew"
    raise ValueError(f"{file} was trained on --data {recipe['data']}, not {world.data}: {hint}")


def check_recipe(file, recipe, unet):
    """ValueError unless `file` was trained by `recipe`, on this UNet."""
    found = read_recipe(file)
    wrong = []
    for key, value in recipe.items():
        if key == "init":
            continue  # a path; what lay there is in "base"
        if found[key] == "unknown":
            wrong.append(f"{key} is not said")
        elif found[key] != value:
            wrong.append(f"{key} {found[key]}, not {value}")
    if not wrong and not found["base"].startswith(digest(unet)):
        wrong.append("another UNet")
    if wrong:
        problem = f"was not trained with the options of {BEST} on the UNet that is there now"
        hint = f"move {file.parent} away, and this command trains it anew"
        raise ValueError(f"{file} {problem} ({'; '.join(wrong)}): {hint}")
