"""What FeatureNet reads off photos, VAE round trips and pictures of weights/tiny: the end of `train.py --method base` again.

    python tests/benchmark_base.py        about five minutes on two CPU cores
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import FeatureNet, ToyFaces, pixels  # noqa: E402
from train import TINY, autocast, pick_device, pick_precision, report, run  # noqa: E402
from unet import StableDiffusion  # noqa: E402


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
