"""DreamBooth (section 3.2) on people never seen in training: what it learns and what it forgets.

    python -m experiments.benchmark_dreambooth --people 20

For each person, always from the weights of weights/tiny: nothing, DreamBooth with prior
preservation, without it, LoRA.
  identity   share of the person's attributes that FeatureNet reads off 8 pictures of "a sks
             person"; what the sunglasses, hats and scarves hide that it finds does not count
  prompt     share of the scene it reads off a picture of each of 8 other prompts
  class      different pairs of hair style and colour, of 36, among the first --class-pictures of
             "a person" in which it finds no hat
  of base    the same as a share of the base model's; effective: pairs weighted by how often each
             occurs (exp of the entropy)
Results are kept one line a person and method; what is there already is not measured again.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from data import ToyFaces
from dreambooth import DreamBooth, make_class_images
from experiments.makers import make_pictures, teach_person
from experiments.plan import REFERENCES, VERSION, Settings
from experiments.scores import format_cell
from metrics import bootstrap_ci
from support.checkpoints import TINY
from support.devices import autocast, pick_device, pick_precision
from support.files import CACHE, digest
from support.pictures import to_tensor
from support.program import make_parser, run
from toyfaces import drawing
from toyfaces.drawing import SCENE
from toyfaces.judge import FeatureNet, grade
from train import DEFAULTS
from unet import StableDiffusion

COLUMNS = ("identity", "prompt", "class", "of base", "effective", "minutes")
METHODS = {
    "base model": None,
    "with prior preservation": DreamBooth(),
    "without (λ = 0)": DreamBooth(prior_weight=0.0),
    "LoRA of rank 4, with prior": DreamBooth(lora=4),
}
HAT = SCENE["accessory"].index("hat")


def find_accessories(judge, pictures, device):
    """What the people in uint8 pictures wear, as class numbers: (n,)."""
    found = []
    for part in pictures.split(64):
        answers = judge(to_tensor(part).to(device))
        found.append(answers["accessory"].argmax(1).cpu())
    return torch.cat(found)


@torch.inference_mode()
def measure_fidelity(sd, judge, person, settings):
    """-> identity and prompt of one person's pictures."""
    scenes = person.photos[REFERENCES:]
    prompts = ["a sks person"] * 8
    prompts += [photo.prompt.replace("person", "sks person") for photo in scenes]
    pictures = make_pictures(sd, prompts, settings, settings.seed)
    labels = []
    for accessory in find_accessories(judge, pictures[:8], settings.device).tolist():
        labels.append({**person.photos[0].labels, "accessory": accessory})
    labels += [photo.labels for photo in scenes]
    grades = grade(judge, pictures, labels, settings.device)
    identity = grades["identity"][:8].mean().item()
    return {"identity": identity, "prompt": grades["prompt"][8:].mean().item()}


@torch.inference_mode()
def measure_diversity(sd, judge, labels, settings, count):
    """-> class and effective, of the first `count` pictures without a hat.

    They come from the same noise for every model. Nobody can tell the hair under a hat.
    """
    fast = replace(settings, steps=10, batch=100)
    prompts = ["a person"] * (count * 6 // 5)
    pictures = make_pictures(sd, prompts, fast, settings.seed + 10_000)
    bare = find_accessories(judge, pictures, settings.device) != HAT
    pictures = pictures[bare][:count]
    probs = grade(judge, pictures, [labels] * len(pictures), settings.device)["probs"]
    pair = probs.argmax(1)
    shares = pair.bincount() / len(pictures)
    effective = torch.special.entr(shares).sum().exp().item()
    return {"pictures": len(pictures), "class": len(pair.unique()), "effective": effective}


def measure(sd, judge, person, method, settings, steps, lr, count, base):
    """The row of one person and method. base: the diversity of the base model."""
    labels = person.photos[0].labels
    model, minutes, hair = sd, None, base
    if method is not None:
        photos = np.stack([np.asarray(photo.image) for photo in person.photos[:REFERENCES]])
        photos = torch.from_numpy(photos).permute(0, 3, 1, 2)  # (9, 3, H, W)
        began = time.perf_counter()
        model = teach_person(sd, photos, "person", settings, method, steps, lr)
        minutes = (time.perf_counter() - began) / 60
        hair = measure_diversity(model, judge, labels, settings, count)
    fidelity = measure_fidelity(model, judge, person, settings)
    share = hair["class"] / base["class"]
    return {**fidelity, **hair, "of base": share, "minutes": minutes}


def read_results(path, settings):
    """{(person, method): row} of the lines that were measured with the same settings."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["settings"] == settings]
    return {(row["person"], row["method"]): row for row in rows}


def print_table(people, settings, rows):
    print(f"\n{people} people, {settings}, judge: {FeatureNet.name}")
    print("in brackets: 95 % intervals over people\n")
    print(f"| method | {' | '.join(COLUMNS)} |\n{'|---' * (1 + len(COLUMNS))}|")
    for method in METHODS:
        cells = []
        for column in COLUMNS:
            values = [rows[p, method][column] for p in range(people)]
            estimate = None
            if values[0] is not None:
                estimate = (float(np.mean(values)), *bootstrap_ci(values, np.mean))
            cells.append(format_cell(estimate))
        print(f"| {method} | {' | '.join(cells)} |")


def parse_arguments():
    default_steps, _, default_lr = DEFAULTS["dreambooth", False]
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--people", type=int, default=20, help="people, with nine photos each to learn from")
    add("--steps", type=int, default=default_steps, help="optimiser steps a person")
    add("--lr", type=float, default=default_lr, help="peak learning rate of the whole UNet")
    add("--lora-lr", type=float, default=1e-3, help="peak learning rate of LoRA")
    add("--class-pictures", type=int, default=200, help="pictures to count hair in, at most")
    add("--seed", type=int, default=0, help="decides every random number")
    add("--out", type=Path, default=Path("runs/benchmark_dreambooth.jsonl"), help="results")
    return parser.parse_args()


def main():
    args = parse_arguments()
    device = pick_device("auto")
    settings = Settings(device, pick_precision("auto", device), seed=args.seed)
    sd = StableDiffusion.load(TINY, device)
    judge = FeatureNet.load(TINY / "feature_net").to(device)
    said = {
        "weights": digest(sd.unet, sd.vae, sd.text_encoder, judge), "steps": args.steps,
        "lr": args.lr, "lora_lr": args.lora_lr, "class_pictures": args.class_pictures,
        "seed": args.seed, "precision": settings.precision, "methods": str(METHODS),
        "versions": [VERSION, drawing.VERSION],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    rows = read_results(args.out, said)
    people = ToyFaces(100 + args.people, 17, sd.image_size, seed=2).people[100:]
    labels = people[0].photos[0].labels
    base = measure_diversity(sd, judge, labels, settings, args.class_pictures)  # for everybody

    began = time.perf_counter()
    with torch.inference_mode(), autocast(device, settings.precision):
        make_class_images(sd, "a person", CACHE, DreamBooth().class_images, args.seed)
    minutes = (time.perf_counter() - began) / 60
    print(f"class pictures: {minutes:.2f} minutes, 0 if they were there", flush=True)

    for p, person in enumerate(people):
        for name, method in METHODS.items():
            if (p, name) in rows:
                continue
            lr = args.lora_lr if method and method.lora else args.lr
            row = measure(sd, judge, person, method, settings, args.steps, lr,
                          args.class_pictures, base)
            rows[p, name] = {"person": p, "method": name, **row, "settings": said}
            with args.out.open("a") as file:
                file.write(json.dumps(rows[p, name]) + "\n")
            numbers = ", ".join(f"{column} {format_cell(row[column])}" for column in COLUMNS)
            print(f"{person.name}, {name}: {numbers}", flush=True)
    print_table(len(people), said, rows)
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    run(main)
