"""Weights from scratch: a checkpoint, its adapter, and for toy people their judge.

    python -m experiments.base --people 4000       weights/tiny: two hours on two CPU cores
    python -m experiments.base --data path/to/lfw-deepfunneled --crop 58,48,198,188 \
        --image-encoder mobilefacenet.pt           weights/photos: three hours
    python -m experiments.base --data path/to/lfw-deepfunneled --init weights/photos \
        --image-encoder mobilefacenet.pt           UNet and adapters once more, from there

Trainings (STAGES, PHOTO_STAGES), one after another, each with the loop of train.py. When one
runs, all that the others trained is frozen:

    vae            pictures 64 × 64 <-> latents 4 × 16 × 16
    vae_sharp      the same with smaller batches: more steps in the same time
    vae_decoder    its decoder alone: the latents stay as they are
    clip           the CLIP pair: photos and captions; of photographs also who it is
    feature_net    toys: FeatureNet, the judge (toyfaces/judge.py)
    unet           toys: text to image, eq. 1 without image tokens
    together       photographs: eq. 1 for UNet and adapter, another photo of the person as reference
    ip_adapter     the adapter on the frozen UNet. Toys: every photo its own and only reference, as
                   in the original IP-Adapter; photographs: if MobileFaceNet is given, the UNet
                   learned with its adapter, and this is that of the CLIP image encoder

Logs, checkpoints and pictures go to runs/base, of photographs to runs/base_photos. --out is written
at the end, all or nothing of it: until then a checkpoint that is there stays whole.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data import Features
from experiments.base_average import Average, average_task
from experiments.base_data import (choose_people, embed_both_sides, encode_both_sides, list_prompts,
                                   make_faces, read_faces, write_corpus)
from experiments.base_identity import identity_task
from experiments.base_networks import PHOTO_SIZES, make_tiny_world, make_world
from experiments.base_pictures import save_round_trips, save_text_pictures
from experiments.base_tasks import (clip_task, feature_net_task, measure_scaling_factor, unet_task,
                                    vae_task)
from experiments.base_together import Branch, together_task
from ip_adapter import IPAdapter
from support.checkpoints import ADAPTER, FACE_ADAPTER, PHOTOS, TINY, replace_parts
from support.claim import claim
from support.crops import parse_crop, read_crop
from support.devices import autocast, pick_device, pick_precision
from support.distributed import processes, refuse_torchrun
from support.face_judge import FaceJudge
from support.face_net import FaceEncoder, MobileFaceNet, find_face_box
from support.files import check_writable, digest_bytes, digest_file
from support.pictures import find_frame
from support.program import add_device_arguments, file_path, make_parser, run
from toyfaces import drawing
from toyfaces.judge import FeatureNet
from train import Options, adapter_task, fit
from unet import StableDiffusion

RUNS = Path("runs/base")  # logs and checkpoints of the stages
FINISHED = RUNS / "finished"  # is there when the results of these checkpoints are written
PHOTO_RUNS = Path("runs/base_photos")
SIZE = 64  # pixels

STAGES = {  # of toy people; name: steps, batch, peak learning rate
    "vae": (1500, 32, 2e-3),
    "vae_sharp": (3000, 16, 1e-3),
    "vae_decoder": (800, 16, 5e-4),
    "clip": (1000, 192, 1e-3),
    "feature_net": (1600, 64, 1e-3),
    "unet": (3400, 64, 1e-3),
    "ip_adapter": (900, 64, 1e-3),
}
PHOTO_STAGES = {
    "vae": (900, 32, 2e-3),
    "vae_sharp": (1200, 16, 1e-3),
    "vae_decoder": (300, 16, 5e-4),
    "clip": (1500, 128, 1e-3),
    "together": (6500, 64, 1e-3),
    "ip_adapter": (1000, 64, 1e-3),
}


@dataclass
class Run:
    """Where stages keep logs and checkpoints, and what all of them depend on.

    options: train.Options, of which steps is None (each stage its own) or for all stages, and batch
    and lr do not count. settings: what --resume compares. until: the last stage, None: all.
    """

    folder: Path
    stages: dict
    options: Options
    settings: dict
    until: str = None

    @property
    def finished(self):
        return self.folder / "finished"

    def begin(self):
        """Remove the checkpoints of a finished run: the later ones would be taken for this run's.

        ValueError if there are some of a run that is not finished. With --resume all stay.
        """
        checkpoints = [self.folder / f"{name}.pt" for name in self.stages]
        found = [path for path in checkpoints if path.exists()]
        if not self.options.resume:
            if found and not self.finished.exists():
                ways = "go on with --resume, or move that folder away to start anew"
                problem = "holds the checkpoints of a run that is not finished"
                raise ValueError(f"{self.folder} {problem}: {ways}")
            for path in found:
                path.unlink()
            self.finished.unlink(missing_ok=True)

    def train(self, task, sd, **settings):
        """Train what the task says, with all networks of `sd` but that frozen.

        settings: more of them that --resume compares.
        """
        for network in (sd.vae, sd.text_encoder, sd.image_encoder, sd.unet):
            network.requires_grad_(False)
        task.module.requires_grad_(True)
        steps, batch, lr = self.stages[task.name]
        options = replace(self.options, steps=self.options.steps or steps, batch=batch, lr=lr)
        if not (self.folder / f"{task.name}.pt").exists():
            self.finished.unlink(missing_ok=True)  # what is made now is not
        rows = fit(task, self.folder, options, self.settings | settings)
        start = rows[0]["validation"]
        end = rows[-1]["validation"]
        seconds = rows[-1]["seconds"]
        print(f"{task.name}: validation {start:.4f} -> {end:.4f} in {seconds:.0f} s", flush=True)

    def train_average(self, task, sd, **settings):
        """The same for the mean of the weights; the network ends with the best mean."""
        average = Average(task.module)
        self.train(average_task(task, average), sd, every=self.options.every, **settings)
        average.settle()

    def stop_after(self, name):
        """Whether this stage was the last to train; says how to go on."""
        if name == self.until:
            print(f"stopped after {name}; the same command with --resume and without --until goes on")
        return name == self.until


# ---------------------------------------------------------------- toy people


def train_base(out, run, people):
    """All stages on so many toy people; writes the folder `out` at the end."""
    device = run.options.device
    precision = run.options.precision
    run.begin()
    faces = make_faces(people, seed=0)
    held = make_faces(min(people, 100), seed=2)  # validation people, as in data.load_people
    sd = make_tiny_world(write_corpus(faces.labels), device)
    train_vae(run, sd, faces, held)

    # What looks at pictures: the CLIP pair, and the judge of all tables.
    run.train(clip_task(sd, faces, held, device), sd)
    judge = FeatureNet().to(device)
    run.train(feature_net_task(judge, sd, faces, held, device), sd)

    # What makes pictures, from the features of the frozen encoders.
    with autocast(device, precision):
        features = Features(sd, faces.people)
        held_features = Features(sd, held.people)

    run.train(unet_task(sd, features.z_0, faces, held_features, device), sd)
    adapter = IPAdapter(sd.unet, features.embeds.shape[-1])
    task = adapter_task("ip_adapter", sd, adapter, features, held_features, device, alone=True)
    run.train(task, sd)
    save_world(out, sd, {ADAPTER: adapter}, judge)
    run.finished.touch()


def train_vae(run, sd, faces, held):
    """The VAE, and the unit in which its latents are measured."""
    device = run.options.device
    for name in ("vae", "vae_sharp", "vae_decoder"):
        run.train(vae_task(name, sd, faces, held, device), sd)
    with autocast(device, run.options.precision):
        sd.vae.config["scaling_factor"] = measure_scaling_factor(sd, faces.pixels, device)


def save_world(out, sd, adapters, judge=None):
    """Write the checkpoint, {file in it: adapter} and the judge, all in float16, all or nothing."""

    def write(folder):
        sd.save(folder)
        for name, adapter in adapters.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            adapter.half().save(path)
        if judge:
            judge.save(folder / "feature_net")

    with claim(out):
        replace_parts(out, write)
    print(f"wrote {out}")


# ---------------------------------------------------------------- photographs


@dataclass
class Sources:
    """What photographs are trained from. root: of a folder like LFW; crop: crops.Crop or None.

    face_net: the file of MobileFaceNet: the UNet learns with an adapter that reads it, and of the
    other adapter it is the judge. judge: the file of base_judge.py, the judge of that one. gamma: of
    the min-SNR weights.
    init: a folder whose networks have been through all stages; UNet and adapters train on.
    """

    root: Path
    crop: object = None
    face_net: Path = None
    judge: Path = None
    gamma: float = 5.0
    init: Path = None

    def check(self):
        """ValueError for files that are none: now, not after hours."""
        if self.init and not (self.init / ADAPTER).is_file():
            raise ValueError(f"--init {self.init}: not a model of this program, it has no {ADAPTER}")
        if self.init and (self.init / FACE_ADAPTER).is_file() and not self.face_net:
            problem = f"its UNet has an adapter of MobileFaceNet, too ({FACE_ADAPTER})"
            hint = "name that recogniser with --image-encoder"
            raise ValueError(f"--init {self.init}: {problem}: {hint}")
        if self.face_net:
            MobileFaceNet(self.face_net, find_face_box(self.crop))
        if self.judge:
            FaceJudge.load(self.judge)

    def describe(self, faces):
        """What the results depend on, for --resume."""
        photos = [(photo.key, photo.prompt) for person in faces.people for photo in person.photos]
        return {
            "data": digest_bytes(photos),
            "crop": self.crop,
            "image-encoder": self.face_net and digest_file(self.face_net),
            "min-snr": self.gamma,
            "init": self.init and digest_bytes(*sorted(self.init.rglob("*.safetensors"))),
        }


def train_photos(out, run, sources):
    """All stages on the photos of a folder; writes the folder `out` at the end."""
    device = run.options.device
    sources.check()
    learned, held_out = choose_people(sources.root, SIZE, sources.crop)
    run.begin()
    faces = read_faces(learned)
    held = read_faces(held_out)
    run.settings |= sources.describe(faces)
    for word, some in (("train", faces), ("validate", held)):
        print(f"{len(some.people)} people with {len(some.pixels)} photos {word}", flush=True)
    if sources.init:
        sd = StableDiffusion.load(sources.init, device)
    else:
        sd = train_encoders(run, faces, held, sources.crop)
        if sd is None:
            return
    with autocast(device, run.options.precision):
        latents = encode_both_sides(sd, faces.pixels)
        held_features = Features(sd, held.people)

    branches = make_branches(sd, faces, held, held_features, sources, run.options)
    for branch in branches:
        branch.adapter = make_adapter(sd, branch, sources.init)
        task = together_task(sd, branch, latents, faces, held, device, run.folder, sources.gamma,
                             frozen=branch is not branches[0])
        run.train_average(task, sd, judge=sources.judge and digest_file(sources.judge))
    save_text_pictures(run.folder / "text.png", sd, held.prompts)
    save_world(out, sd, {branch.file: branch.adapter for branch in branches})
    run.finished.touch()


def train_encoders(run, faces, held, crop):
    """The stages before the UNet's. Returns the StableDiffusion, None if `run` stops before the end.

    Every stage leaves pictures or numbers to look at in the run's folder.
    """
    device = run.options.device
    sd = make_photo_world(faces, crop, device)
    train_vae(run, sd, faces, held)
    save_round_trips(run.folder / "vae.png", sd, held)
    if run.stop_after("vae_decoder"):
        return None
    run.train(identity_task(sd, faces, held, device), sd)
    return None if run.stop_after("clip") else sd


def make_photo_world(faces, crop, device):
    """A StableDiffusion of the size of weights/photos with random weights, which knows its crop."""
    sd = make_world(PHOTO_SIZES, list_prompts(faces.prompts), device)
    cut = crop.describe() if crop else {}
    sd.preprocessor = {**sd.preprocessor, **cut}
    return sd


def make_branches(sd, faces, held, held_features, sources, options):
    """The Branch of MobileFaceNet, if its file is given, and that of our own image encoder.

    The UNet learns with the first. They have no adapters yet.
    """
    device = options.device
    with autocast(device, options.precision):
        ours = Branch(ADAPTER, embed_both_sides(sd, faces.pixels), held_features)
    if sources.face_net is None:
        return [ours]
    net = MobileFaceNet(sources.face_net, find_face_box(sources.crop)).to(device)
    ours.judge = net
    # The same model with the other encoder, in float32. (In bfloat16 the cosine to it is 0.999.)
    other = copy.copy(sd)
    other.image_encoder = FaceEncoder(net, sd.image_size)
    other.preprocessor = {**sd.preprocessor, **FaceEncoder.COLOURS}
    embeds = embed_both_sides(other, faces.pixels)
    judge = sources.judge and FaceJudge.load(sources.judge).to(device)
    return [Branch(FACE_ADAPTER, embeds, Features(other, held.people), judge), ours]


def make_adapter(sd, branch, init):
    """The adapter of one photo of the folder `init`, or a new one: its W'k and W'v are W_k and W_v."""
    if init and (init / branch.file).is_file():
        return IPAdapter.load(init / branch.file, sd.unet)
    return IPAdapter(sd.unet, branch.embeds.shape[-1])


# ---------------------------------------------------------------- command line


def parse_arguments():
    parser = make_parser(__doc__)
    parser.ranges["min_snr"] = (0, 1000)
    add = parser.add_argument
    add("--data", default="toy", help="toy, or a folder with one folder of photos a person")
    add("--people", type=int, default=4000, help="toy people to draw and train on")
    add("--steps", type=int, help="optimiser steps of every stage (default: each stage's own)")
    add("--accumulate", type=int, default=1, help="batches added up before each optimiser step")
    add("--every", type=int, default=100, help="steps between checkpoints and validations")
    add("--seed", type=int, default=0, help="decides every random number, but not the people")
    add_device_arguments(parser)
    add("--out", type=Path, help="folder for the checkpoint (default: weights/tiny; of photos "
        "weights/photos)")
    add("--resume", action="store_true", help=f"go on from the last checkpoints in {RUNS} or "
        f"{PHOTO_RUNS}")
    add = parser.add_argument_group("--data FOLDER").add_argument
    add("--crop", help="the part of a photo to learn, left,top,right,bottom in pixels or fractions "
        "(default: the centre square)")
    add("--image-encoder", type=file_path, help="mobilefacenet.pt: the UNet learns with an "
        "adapter that reads it; of the adapter of our own encoder it judges the faces in validation")
    add("--judge", type=file_path, help="of experiments.base_judge: it judges the faces of the "
        "adapter that reads MobileFaceNet")
    add("--init", type=Path, help="a folder that this program wrote: train only its UNet and adapters, "
        "from there; it knows its --crop")
    add("--min-snr", type=float, help="γ of the min-SNR weights (default: 5); 0: all time steps count "
        "alike")
    add("--until", choices=["vae_decoder", "clip"], help="stop after this stage")
    return parser.parse_args()


def check_arguments(args):
    of_photos = (args.crop, args.image_encoder, args.judge, args.init, args.min_snr, args.until)
    if args.data == "toy" and any(value is not None for value in of_photos):
        flags = "--crop, --image-encoder, --judge, --init, --min-snr and --until"
        raise ValueError(f"{flags} are for --data FOLDER")
    if args.data != "toy" and not Path(args.data).is_dir():
        raise ValueError(f"--data {args.data}: no such folder; give one with a folder a person")
    if args.judge and not args.image_encoder:
        raise ValueError("--judge judges the adapter of --image-encoder: name both")
    if args.init and (args.crop or args.until):
        hint = "leave --crop and --until out"
        raise ValueError(f"--init knows its crop and has its encoders: {hint}")


@processes()
def main():
    args = parse_arguments()
    refuse_torchrun("experiments.base")
    check_arguments(args)
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
    is_toy = args.data == "toy"
    out = args.out or (TINY if is_toy else PHOTOS)
    if is_toy:
        check_writable(out)
        with claim(RUNS):
            settings = {"people": args.people, "drawing": drawing.VERSION}
            train_base(out, Run(RUNS, STAGES, options, settings), args.people)
        return
    crop = args.crop and parse_crop(args.crop, find_frame(args.data))
    if args.init:
        crop = read_crop(args.init)
    gamma = 5.0 if args.min_snr is None else args.min_snr
    sources = Sources(Path(args.data), crop, args.image_encoder, args.judge, gamma, args.init)
    check_writable(out)
    with claim(PHOTO_RUNS):
        train_photos(out, Run(PHOTO_RUNS, PHOTO_STAGES, options, {}, args.until), sources)


if __name__ == "__main__":
    run(main)
