"""weights/tiny from scratch: a checkpoint of the tiny world, its adapter and its judge.

    python -m experiments.base --people 4000       two hours on two CPU cores

Seven trainings (STAGES), one after another, each with the loop of train.py. When one runs, all that
the others trained is frozen:

    vae            pictures 64 × 64 <-> latents 4 × 16 × 16
    vae_sharp      the same with smaller batches: more steps in the same time
    vae_decoder    its decoder alone: the latents stay as they are
    clip           the CLIP pair: photos and captions
    feature_net    FeatureNet, the judge (toyfaces/judge.py)
    unet           text to image: eq. 1 without image tokens
    ip_adapter     eq. 1, every photo its own and only reference, as the original IP-Adapter

Logs and checkpoints go to runs/base. --out is written at the end, all at once: until then a
checkpoint that is there stays whole.
"""

from dataclasses import replace
from pathlib import Path

import torch

from data import Features
from experiments.base_data import make_faces, write_corpus
from experiments.base_networks import make_tiny_world
from experiments.base_tasks import (clip_task, feature_net_task, measure_scaling_factor, unet_task,
                                    vae_task)
from ip_adapter import IPAdapter
from support.checkpoints import ADAPTER, TINY
from support.claim import claim
from support.devices import autocast, pick_device, pick_precision
from support.distributed import processes, refuse_torchrun
from support.files import check_writable
from support.program import add_device_arguments, make_parser, run
from toyfaces import drawing
from toyfaces.judge import FeatureNet
from train import Options, adapter_task, fit

RUNS = Path("runs/base")  # logs and checkpoints of the stages
FINISHED = RUNS / "finished"  # is there when the results of these checkpoints are written

STAGES = {  # name: steps, batch, peak learning rate
    "vae": (1500, 32, 2e-3),
    "vae_sharp": (3000, 16, 1e-3),
    "vae_decoder": (800, 16, 5e-4),
    "clip": (1000, 192, 1e-3),
    "feature_net": (1600, 64, 1e-3),
    "unet": (3400, 64, 1e-3),
    "ip_adapter": (900, 64, 1e-3),
}


# ---------------------------------------------------------------- all stages


def train_stage(task, sd, options, people):
    """Train what the task says, with all networks of `sd` but that frozen."""
    for network in (sd.vae, sd.text_encoder, sd.image_encoder, sd.unet):
        network.requires_grad_(False)
    task.module.requires_grad_(True)
    steps, batch, lr = STAGES[task.name]
    options = replace(options, steps=options.steps or steps, batch=batch, lr=lr)
    rows = fit(task, RUNS, options, {"people": people, "drawing": drawing.VERSION})
    start = rows[0]["validation"]
    end = rows[-1]["validation"]
    print(f"{task.name}: validation {start:.4f} -> {end:.4f} in {rows[-1]['seconds']:.0f} s")


def forget_older_run():
    """Remove the checkpoints of a finished run: the later ones would be taken for this run's.

    ValueError if there are some of a run that is not finished.
    """
    checkpoints = [RUNS / f"{name}.pt" for name in STAGES]
    found = [path for path in checkpoints if path.exists()]
    if found and not FINISHED.exists():
        ways = "go on with --resume, or move that folder away to start anew"
        raise ValueError(f"{RUNS} holds the checkpoints of a run that is not finished: {ways}")
    for path in found:
        path.unlink()


def train_base(out, options, people):
    """All stages on so many people; writes the folder `out` at the end.

    options: train.Options, of which steps is None (each stage its own) or for all stages, and batch
    and lr do not count.
    """
    device = options.device
    if not options.resume:
        forget_older_run()
    FINISHED.unlink(missing_ok=True)
    faces = make_faces(people, seed=0)
    held = make_faces(min(people, 100), seed=2)  # validation people, as in data.load_people
    sd = make_tiny_world(write_corpus(faces.labels), device)

    # The VAE, and the unit in which its latents are measured.
    for name in ("vae", "vae_sharp", "vae_decoder"):
        train_stage(vae_task(name, sd, faces, held, device), sd, options, people)
    with autocast(device, options.precision):
        sd.vae.config["scaling_factor"] = measure_scaling_factor(sd, faces.pixels, device)

    # What looks at pictures: the CLIP pair, and the judge of all tables.
    train_stage(clip_task(sd, faces, held, device), sd, options, people)
    judge = FeatureNet().to(device)
    train_stage(feature_net_task(judge, sd, faces, held, device), sd, options, people)

    # What makes pictures, from the features of the frozen encoders.
    with autocast(device, options.precision):
        features = Features(sd, faces.people)
        held_features = Features(sd, held.people)
    task = unet_task(sd, features, faces.labels, held_features, device)
    train_stage(task, sd, options, people)
    adapter = IPAdapter(sd.unet, features.embeds.shape[-1])
    task = adapter_task("ip_adapter", sd, adapter, features, held_features, device, alone=True)
    train_stage(task, sd, options, people)
    save_world(out, sd, judge, adapter)
    FINISHED.touch()


def save_world(out, sd, judge, adapter):
    """Write the checkpoint, the judge and the adapter, all in float16."""
    with claim(out):
        sd.save(out)
        judge.save(out / "feature_net")
        path = out / ADAPTER
        path.parent.mkdir(exist_ok=True)
        adapter.half().save(path)
    print(f"wrote {out}")


# ---------------------------------------------------------------- command line


def parse_arguments():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--people", type=int, default=4000, help="toy people to draw and train on")
    add("--steps", type=int, help="optimiser steps of every stage (default: each stage's own)")
    add("--accumulate", type=int, default=1, help="batches added up before each optimiser step")
    add("--every", type=int, default=100, help="steps between checkpoints and validations")
    add("--seed", type=int, default=0, help="decides every random number, but not the people")
    add_device_arguments(parser)
    add("--out", type=Path, default=TINY, help="folder for the checkpoint")
    add("--resume", action="store_true", help=f"go on from the last checkpoints in {RUNS}")
    return parser.parse_args()


@processes()
def main():
    args = parse_arguments()
    refuse_torchrun("experiments.base")
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    options = Options(
        device,
        precision,
        steps=args.steps,
        accumulate=args.accumulate,
        every=args.every,
        seed=args.seed,
        resume=args.resume,
    )
    torch.manual_seed(args.seed)
    check_writable(args.out)
    with claim(RUNS):
        train_base(args.out, options, args.people)


if __name__ == "__main__":
    run(main)
