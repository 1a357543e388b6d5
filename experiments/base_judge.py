"""A judge of faces of our own, for adapters that read MobileFaceNet.

    python -m experiments.base_judge --data path/to/lfw-deepfunneled --crop 58,48,198,188

It learns the names of all people of the folder, the exam's too: a judge may know everybody, a method
may not. Of the exam's people (base_data.py) it sees the nine references and no other photo, so what
a table says of their real photos is said of photos that are new to it, as pictures are.
The result, judge.safetensors in --out, is for --faces of experiments.table1 and metrics.py, and for
--judge of experiments.base.
"""

from pathlib import Path

import torch

from data import LFW, split
from experiments.base_data import read_faces
from experiments.base_identity import judge_task
from experiments.plan import REFERENCES
from support.claim import claim
from support.crops import parse_crop
from support.devices import pick_device, pick_precision
from support.distributed import processes, refuse_torchrun
from support.face_judge import SIDE, FaceJudge
from support.files import digest_bytes
from support.pictures import find_frame
from support.program import add_device_arguments, make_parser, run
from train import Options, fit


def share_photos(people):
    """-> all people with the photos to learn; the exam's once more with those of validation.

    Of the exam's people the first nine photos by name are learned, which are the references, the next
    nine are for validation, and the rest for nobody. ValueError if there are no two people with two
    photos of validation each.
    """
    _, held_out = split([person for person in people if len(person.photos) > 1])
    exam = {person.name for person in held_out if len(person.photos) > REFERENCES}
    learned = []
    held = []
    for person in people:
        photos = person.photos
        if person.name in exam:
            held.append(person._replace(photos=photos[REFERENCES : 2 * REFERENCES]))
            photos = photos[:REFERENCES]
        learned.append(person._replace(photos=photos))
    if sum(len(person.photos) > 1 for person in held) < 2:
        problem = f"too few people to validate on, {len(exam)} have ten or more photos"
        raise ValueError(f"{problem} among the held-out third: two need {REFERENCES + 2} or more")
    return learned, held


def train_judge(out, options, root, crop):
    """Writes judge.safetensors, and the log beside it."""
    learned, held = share_photos(LFW(root, SIDE, min_photos=1, crop=crop).people)
    faces = read_faces(learned)
    judge = FaceJudge().to(options.device)
    task = judge_task(judge, faces, read_faces(held), options.device)
    photos = [photo.key for person in faces.people for photo in person.photos]
    rows = fit(task, out, options, {"data": digest_bytes(photos), "crop": crop})
    path = out / "judge.safetensors"
    judge.save(path, {"data": str(root), "people": str(len(faces.people)), "crop": str(crop)})
    error = rows[-1]["validation"]
    print(f"AUC of photos that it has not seen {1 - error:.4f}\nwrote {path}")


@processes()
def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="a folder with one folder of photos a person")
    add("--crop", help="the part of a photo that the model shows, as for experiments.base")
    add("--steps", type=int, default=8000, help="optimiser steps")
    add("--batch", type=int, default=64, help="photos a step, two of each person")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--every", type=int, default=200, help="steps between checkpoints and validations")
    add("--seed", type=int, default=0, help="decides every random number")
    add_device_arguments(parser)
    add("--out", type=Path, default=Path("runs/base_judge"), help="folder for judge, log, checkpoint")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    args = parser.parse_args()
    refuse_torchrun("experiments.base_judge")
    if args.batch % 2:
        raise ValueError(f"--batch {args.batch}: an even number, two photos of each person")
    crop = args.crop and parse_crop(args.crop, find_frame(args.data))
    device = pick_device(args.device)
    options = Options(device, pick_precision(args.precision, device), args.steps, args.batch,
                      args.lr, every=args.every, seed=args.seed, resume=args.resume)
    torch.manual_seed(args.seed)
    with claim(args.out):
        train_judge(args.out, options, args.data, crop)


if __name__ == "__main__":
    run(main, "take fewer photos at once (--batch)")
