"""DreamBooth (section 3.2) on people never seen in training: what it learns of them, and what it forgets of others.

    python tests/benchmark_dreambooth.py --people 20

For each person, always from the weights of weights/tiny: nothing, DreamBooth with prior preservation, without it, LoRA.
  identity   share of the person's ten attributes that FeatureNet reads off 8 pictures of "a sks person"
  prompt     share of right scene attributes in pictures of 8 prompts, "a photo of a smiling sks person, red background"
  class      different pairs of hair style and colour, of 36, among --class-pictures of "a person"
  of base    the same as a share of the base model's
  minutes    of training; the first one's are also those of the class pictures of the prior
One line of JSON a person and method goes to --out; the same command goes on where it was stopped.
"""

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import ToyFaces  # noqa: E402
from metrics import ToyJudge, bootstrap_ci, judged, make_pictures, shown, taught  # noqa: E402
from train import DREAMBOOTH, TINY, pick_device, pick_precision, run  # noqa: E402
from unet import StableDiffusion  # noqa: E402

COLUMNS = ("identity", "prompt", "class", "of base", "minutes")


def fidelity(sd, judge, person, options):
    """-> identity and prompt of one person's pictures."""
    scenes = person.photos[9:]
    texts = ["a sks person"] * 8 + [photo.prompt.replace("person", "sks person") for photo in scenes]
    nothing_hidden = person.photos[0].labels | {"accessory": 0}
    x = make_pictures(sd, texts, options, options.seed)["x"]
    said = judged(judge, x, [nothing_hidden] * 8 + [photo.labels for photo in scenes], options.device)
    return {"identity": said["identity"][:8].mean().item(), "prompt": said["prompt"][8:].mean().item()}


def diversity(sd, judge, labels, options, count):
    """Different pairs of hair style and colour among `count` pictures of the class; the same noise for every model."""
    x = make_pictures(sd, ["a person"] * count, options, options.seed)["x"]
    return len(judged(judge, x, [labels] * count, options.device)["probs"].argmax(1).unique())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--people", type=int, default=20, help="people, with nine photos each to learn from")
    parser.add_argument("--steps", type=int, default=DREAMBOOTH["steps"], help="optimiser steps a person")
    parser.add_argument("--lr", type=float, default=DREAMBOOTH["lr"], help="peak learning rate of the whole UNet")
    parser.add_argument("--lora-lr", type=float, default=1e-3, help="peak learning rate of LoRA")
    parser.add_argument("--class-pictures", type=int, default=200, help="pictures of the class to count hair in")
    parser.add_argument("--seed", type=int, default=0, help="decides every random number")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_dreambooth.jsonl"), help="file of the results")
    args = parser.parse_args()
    device = pick_device("auto")
    options = argparse.Namespace(batch=32, guidance=4.0, steps=20, seed=args.seed, device=device,
                                 precision=pick_precision("auto", device))
    methods = {"base model": None, "with prior preservation": {"lr": args.lr},
               "without (λ = 0)": {"lr": args.lr, "prior_weight": 0.0}, "LoRA, rank 4": {"lr": args.lora_lr, "lora": 4}}
    weights = hashlib.sha256((TINY / "unet/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()[:16]
    settings = {"weights": weights, "steps": args.steps, "lr": args.lr, "lora_lr": args.lora_lr,
                "class_pictures": args.class_pictures, "seed": args.seed}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(row["person"], row["method"]): row for row in done if row["settings"] == settings}
    sd, judge = StableDiffusion.load(TINY, device), ToyJudge.load(TINY / "feature_net").to(device)
    people = ToyFaces(100 + args.people, 17, sd.image_size, seed=2).people[100:]   # the first hundred are validation
    of_base = diversity(sd, judge, people[0].photos[0].labels, options, args.class_pictures)   # the same for everybody

    for p, person in enumerate(people):
        x = torch.from_numpy(np.stack([np.asarray(photo.image).transpose(2, 0, 1) for photo in person.photos[:9]]))
        for method, change in methods.items():
            if (p, method) in done:
                continue
            began = time.perf_counter()
            model = taught(sd, x, options, steps=args.steps, **change) if change else sd
            minutes = (time.perf_counter() - began) / 60 if change else None
            pairs = diversity(model, judge, person.photos[0].labels, options, args.class_pictures) if change else of_base
            row = {"person": p, "method": method, **fidelity(model, judge, person, options),
                   "class": pairs, "of base": pairs / of_base, "minutes": minutes, "settings": settings}
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            done[p, method] = row
            print(f"{person.name}, {method}: " + ", ".join(f"{k} {shown(row[k])}" for k in COLUMNS), flush=True)

    print(f"\n{len(people)} people, {settings}, judge: {ToyJudge.name}; in brackets: 95 % intervals over people\n\n"
          f"| method | {' | '.join(COLUMNS)} |\n{'|---' * (1 + len(COLUMNS))}|")
    for method in methods:
        columns = [[done[p, method][k] for p in range(len(people))] for k in COLUMNS]
        cells = [shown(None if v[0] is None else (float(np.mean(v)), *bootstrap_ci(v, np.mean))) for v in columns]
        print(f"| {method} | {' | '.join(cells)} |")
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    run(main)
