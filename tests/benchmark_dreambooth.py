"""DreamBooth (section 3.2) on people never seen in training: what it learns of them, and what it forgets of others.

    python tests/benchmark_dreambooth.py --people 20

For each person, always from the weights of weights/tiny: nothing, DreamBooth with prior preservation, without it, LoRA.
  identity   share of the person's attributes that FeatureNet reads off 8 pictures of "a sks person"; what the sunglasses,
             hat or scarf in a picture hides does not count
  prompt     share of right scene attributes in pictures of 8 prompts, "a photo of a smiling sks person, red background"
  class      different pairs of hair style and colour, of 36, among --class-pictures of "a person" without a hat, ten steps
             each, from other noise than the class pictures of the prior
  of base    the same as a share of the base model's
  effective  exp(entropy) of how often each pair occurs: a number of pairs too, but rare ones count less
  minutes    of training; those of the class pictures, made once for all, are printed apart
One line of JSON a person and method goes to --out; the same command goes on where it was stopped.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import SCENE, ToyFaces, digest, to_tensor  # noqa: E402
from dreambooth import class_images  # noqa: E402
from metrics import ToyJudge, bootstrap_ci, judged, make_pictures, shown, taught  # noqa: E402
from train import DREAMBOOTH, TINY, autocast, pick_device, pick_precision, run  # noqa: E402
from unet import StableDiffusion  # noqa: E402

COLUMNS = ("identity", "prompt", "class", "of base", "effective", "minutes")


def accessories(judge, x, device):
    """What the people in uint8 pictures wear, as numbers: (n,). Nobody can tell the hair under a hat."""
    return torch.cat([judge(to_tensor(part).to(device))["accessory"].argmax(1).cpu() for part in x.split(64)])


@torch.inference_mode()
def fidelity(sd, judge, person, options):
    """-> identity and prompt of one person's pictures."""
    scenes = person.photos[9:]
    texts = ["a sks person"] * 8 + [photo.prompt.replace("person", "sks person") for photo in scenes]
    x = make_pictures(sd, texts, options, options.seed)["x"]
    worn = [person.photos[0].labels | {"accessory": k} for k in accessories(judge, x[:8], options.device).tolist()]
    said = judged(judge, x, worn + [photo.labels for photo in scenes], options.device)
    return {"identity": said["identity"][:8].mean().item(), "prompt": said["prompt"][8:].mean().item()}


@torch.inference_mode()
def diversity(sd, judge, labels, options, count):
    """-> class and effective, of the first `count` pictures without a hat, from the same noise for every model."""
    fast = argparse.Namespace(**{**vars(options), "steps": 10, "batch": 100})
    x = make_pictures(sd, ["a person"] * (count * 6 // 5), fast, options.seed + 10_000)["x"]
    x = x[accessories(judge, x, options.device) != SCENE["accessory"].index("hat")][:count]
    pair = judged(judge, x, [labels] * len(x), options.device)["probs"].argmax(1)
    return {"pictures": len(x), "class": len(pair.unique()),
            "effective": torch.special.entr(pair.bincount() / len(x)).sum().exp().item()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--people", type=int, default=20, help="people, with nine photos each to learn from")
    parser.add_argument("--steps", type=int, default=DREAMBOOTH["steps"], help="optimiser steps a person")
    parser.add_argument("--lr", type=float, default=DREAMBOOTH["lr"], help="peak learning rate of the whole UNet")
    parser.add_argument("--lora-lr", type=float, default=1e-3, help="peak learning rate of LoRA")
    parser.add_argument("--class-pictures", type=int, default=200, help="pictures of the class to count hair in, at most")
    parser.add_argument("--seed", type=int, default=0, help="decides every random number")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_dreambooth.jsonl"), help="file of the results")
    args = parser.parse_args()
    device = pick_device("auto")
    options = argparse.Namespace(batch=32, guidance=4.0, steps=20, seed=args.seed, device=device,
                                 precision=pick_precision("auto", device))
    methods = {"base model": None, "with prior preservation": {"lr": args.lr},
               "without (λ = 0)": {"lr": args.lr, "prior_weight": 0.0}, "LoRA of rank 4, with prior": {"lr": args.lora_lr, "lora": 4}}
    sd, judge = StableDiffusion.load(TINY, device), ToyJudge.load(TINY / "feature_net").to(device)
    settings = {"weights": digest(sd.unet, sd.vae, sd.text_encoder, judge), **DREAMBOOTH, "steps": args.steps, "lr": args.lr,
                "lora_lr": args.lora_lr, "class_pictures": args.class_pictures, "seed": args.seed,
                "precision": options.precision}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    done = {(row["person"], row["method"]): row for row in done if row["settings"] == settings}
    people = ToyFaces(100 + args.people, 17, sd.image_size, seed=2).people[100:]   # the first hundred are validation
    base = diversity(sd, judge, people[0].photos[0].labels, options, args.class_pictures)   # the same for everybody

    began = time.perf_counter()
    with torch.inference_mode(), autocast(options):
        class_images(sd, "a person", Path(".cache"), DREAMBOOTH["class_images"], args.seed)
    print(f"class pictures: {(time.perf_counter() - began) / 60:.2f} minutes, 0 if they were there", flush=True)

    for p, person in enumerate(people):
        x = torch.from_numpy(np.stack([np.asarray(photo.image).transpose(2, 0, 1) for photo in person.photos[:9]]))
        for method, change in methods.items():
            if (p, method) in done:
                continue
            began = time.perf_counter()
            model = taught(sd, x, options, steps=args.steps, **change) if change else sd
            minutes = (time.perf_counter() - began) / 60 if change else None
            hair = diversity(model, judge, person.photos[0].labels, options, args.class_pictures) if change else base
            row = {"person": p, "method": method, **fidelity(model, judge, person, options),
                   **hair, "of base": hair["class"] / base["class"], "minutes": minutes, "settings": settings}
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
