"""How good weights/tiny is: what FeatureNet reads off photos, their VAE round trips, and pictures made from captions.

    python tests/benchmark_base.py        about five minutes on two CPU cores
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import (IDENTITY, SCENE, FeatureNet, ToyFaces, pixels, prompt_of, to_tensor, traits_of,  # noqa: E402
                  visible)
from ip_adapter import generate  # noqa: E402
from train import (TINY, autocast, label_tensors, pick_device, pick_precision, round_trip, run,  # noqa: E402
                   share_right)
from unet import StableDiffusion  # noqa: E402


def report(sd, judge, x, labels, most=512):
    """What the judge reads off unseen photos, off their VAE round trips, and off `most` pictures made from captions, of the
    scene alone and of the scene and five traits: for every attribute the share that is right, of those that can be seen
    and, in captions, are named."""
    rng, null_c_t, (classes, seen) = np.random.default_rng(0), sd.encode_prompts([""]), label_tensors(labels)
    traits = [rng.permutation([k for k in visible(one) if k in IDENTITY])[:5] for one in labels[:most]]

    def of_pictures(parts, asked):
        said = [judge(part.float().to(null_c_t.device)) for part in parts]
        said = {k: torch.cat([one[k] for one in said]) for k in judge.heads}
        return share_right(said, classes[:len(asked)], asked).tolist()

    def of_captions(chosen):
        captions = [prompt_of({k: one[k] for k in SCENE}, traits_of({k: one[k] for k in some}))
                    for one, some in zip(labels, chosen)]
        named = torch.tensor([[k in some or k in SCENE for k in judge.heads] for some in chosen])
        made = (generate(sd, sd.encode_prompts(captions[i:i + 64]), null_c_t, steps=20, seed=i)
                for i in range(0, len(captions), 64))
        return of_pictures(made, seen[:most] & named)

    rows = zip(judge.heads, of_pictures(map(to_tensor, x.split(64)), seen),
               of_pictures((to_tensor(round_trip(sd, part)) for part in x.split(64)), seen),
               of_captions([()] * len(traits)), of_captions(traits))
    print(f"{len(x)} photos, their VAE round trips, {len(traits)} pictures of a scene in words, as many of it and five traits "
          f"(w = 4, 20 steps)\n{'attribute':12} photo  trip   scene  traits")
    for name, *row in rows:
        print(f"{name:12} " + "  ".join("-   " if math.isnan(v) else f"{v:.3f}"[:5].ljust(5) for v in row))


@torch.inference_mode()
def main():
    device = pick_device("auto")
    options, faces = argparse.Namespace(device=device, precision=pick_precision("auto", device)), ToyFaces(100, seed=2)
    labels = [photo.labels for person in faces.people for photo in person.photos]
    sd, judge = StableDiffusion.load(TINY, device), FeatureNet.load(TINY / "feature_net").to(device)
    with autocast(options):
        report(sd, judge, pixels(faces), labels)


if __name__ == "__main__":
    run(main)
