"""The adapters that tables compare: all trained by one recipe, the missing ones are trained now."""

import subprocess
import sys
from pathlib import Path

from support.checkpoints import TINY, read_adapter
from support.files import digest

OPTIONS = ("data", "people", "steps", "batch", "lr", "seed", "precision", "init")  # of train.py
RECIPE = (*OPTIONS, "base")  # what it writes into its files: these, and digests of the weights


def find_adapters(runs, device, unet, *names):
    """{aggregator: its file in the folder `runs`}, trained if it is missing.

    ValueError unless all were trained on `unet`, by the recipe of the first one.
    """
    files = {name: runs / name / "ip-adapter.safetensors" for name in names}
    recipe = {}
    for name, file in files.items():
        if not file.is_file():
            train_adapter(file, name, device, recipe)
        _, metadata = read_adapter(file)
        if not recipe:
            recipe = {key: metadata.get(key, "known") for key in RECIPE}
        check_recipe(file, metadata, recipe, unet, names[0])
    return files


def train_adapter(file, agg, device, recipe):
    """Run train.py with the options of `recipe`; Ctrl-C leaves its checkpoint."""
    program = Path(__file__).parent.parent / "train.py"
    words = [sys.executable, program, "--agg", agg, "--model", TINY, "--out", file.parent]
    words += ["--device", device, "--resume"]
    for option in OPTIONS:
        if recipe:
            words += [f"--{option}", recipe[option]]
    with subprocess.Popen([str(word) for word in words]) as training:
        try:
            failed = training.wait()
        except KeyboardInterrupt:
            training.wait()  # it ends its step and writes a checkpoint
            raise
    if failed:
        hint = f"if {file.parent} holds a checkpoint of other options, move it away"
        raise ValueError(f"{file} is missing, and training it failed; {hint}")


def check_recipe(file, metadata, recipe, unet, first):
    wrong = []
    for key, value in recipe.items():
        found = metadata.get(key, "unknown")
        if found != value:
            wrong.append(f"{key} {found}, not {value}")
    if not wrong and not metadata["base"].startswith(digest(unet)):
        wrong.append("another UNet")
    if wrong:
        problem = f"was not trained with the options of {first} on the UNet that is there now"
        hint = f"move {file.parent} away, and this command trains it anew"
        raise ValueError(f"{file} {problem} ({'; '.join(wrong)}): {hint}")
