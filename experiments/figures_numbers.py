"""Figures of lectures 4 to 6: identity by references, prior preservation, the bias of FID."""

import copy
import json
from tempfile import TemporaryDirectory
from pathlib import Path

import torch

from data import ToyFaces
from dreambooth import DreamBooth, encode_files, make_class_images, write_prompts
from experiments.base_data import make_pixels
from experiments.figures_common import name_row, new_sheet, save_small, show
from ip_adapter import generate
from metrics import bootstrap_ci, fid, kernel_distance
from support.devices import autocast, pick_device, pick_precision
from support.files import CACHE
from support.pictures import to_bytes, to_tensor
from support.plots import new_figure
from toyfaces.judge import FeatureNet, grade
from train import Options, fine_tune

FEW_REFERENCES = (1, 2, 3, 5, 9)
SIZES = (25, 50, 100, 200, 400)  # pictures on each side, in fid_bias.png
SPLITS = 4


# ---------------------------------------------------------------- references.png


def draw_references(world, path):
    """Identity against the number of references: of the newest sweep in runs/, or of a small run."""
    files = sorted(world.runs.rglob("sweep_refs.json"), key=lambda file: file.stat().st_mtime)
    if files:
        curves = read_sweep(files[-1])
        source = f"from {files[-1]}"
    else:
        people = world.faces[:30]
        curves = measure_references(world, people)
        source = f"{len(people)} people, a picture each"
    print(f"  {source}")
    figure, (axis,) = new_figure(width=5.5, height=3.5)
    for name, points in curves.items():
        x, y, low, high = zip(*points)
        (line,) = axis.plot(x, y, "o-", label=name, markersize=3)
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set(xlabel="number of references", ylabel="identity", xticks=range(1, 10))
    axis.set_title("bands: 95 % intervals over people", fontsize=9)
    axis.legend(fontsize=8)
    save_small(path, figure)


def read_sweep(file):
    """{method: list of (references, identity, low, high)} of what experiments.sweeps wrote."""
    curves = {}
    for title, row in json.loads(file.read_text())["rows"].items():
        name, count = title.split("; references: ")
        curves.setdefault(name, []).append((int(count), *row["identity ↑"]))
    return curves


def measure_references(world, people):
    device = pick_device("cpu")
    judge = FeatureNet.load(world.model / "feature_net")
    prompts = [person.photos[9].prompt for person in people]
    labels = [person.photos[9].labels for person in people]
    embeds = torch.stack([world.embed([photo.image for photo in person.photos[:9]])
                          for person in people])
    adapters = {"max": lambda: world.shipped("max"), "average": lambda: world.shipped("avg"),
                "self-attention": world.selfattn}
    curves = {}
    for name, load in adapters.items():
        adapter = load()
        curves[name] = []
        for n in FEW_REFERENCES:
            generator = torch.Generator().manual_seed(world.seed)
            references = adapter.aggregator.fit_references(embeds[:, :n], generator)
            with autocast(device, pick_precision("auto", device)):
                conditions = world.condition(prompts, adapter, references)
                made = generate(world.sd, **conditions._asdict(), steps=world.steps,
                                seed=world.seed)
            right = grade(judge, to_bytes(made), labels, device)["identity"].tolist()
            low, high = bootstrap_ci(right, mean)
            curves[name].append((n, mean(right), low, high))
    return curves


def mean(values):
    return sum(values) / len(values)


# ---------------------------------------------------------------- prior.png


def draw_prior(world, path, count=8):
    """ "a person" and "a sks person" by the base model, and after DreamBooth with and without prior."""
    person = world.faces[0]
    texts = write_prompts("sks", "person")
    models = {
        "base model": world.sd,
        "DreamBooth with\nprior preservation": teach(world, person, DreamBooth()),
        "DreamBooth\nwithout (λ = 0)": teach(world, person, DreamBooth(prior_weight=0.0)),
    }
    figure, axes = new_sheet(1 + len(models), count + 2)
    name_row(axes[0][0], "photos of the\nperson to learn")
    for k, photo in enumerate(person.photos[:9]):
        show(axes[0][k], to_tensor([photo.image])[0])
    for r, (words, sd) in enumerate(models.items(), start=1):
        name_row(axes[r][0], words)
        prompts = [texts[1]] * count + [texts[0]] * 2
        c_t = sd.encode_prompts(prompts)
        made = generate(sd, c_t, sd.encode_prompts([""]), steps=world.steps, seed=world.seed)
        for c, picture in enumerate(made):
            is_first = r == 1 and c in (0, count)
            show(axes[r][c], picture, f"“{prompts[c]}”" if is_first else None)
    save_small(path, figure)


def teach(world, person, method):
    """A copy of the model that learned the person's first nine photos as "sks person"."""
    sd = copy.copy(world.sd)
    sd.unet = copy.deepcopy(world.sd.unet)
    texts = write_prompts("sks", "person")
    device = pick_device("cpu")
    precision = pick_precision("auto", device)
    generator = torch.Generator().manual_seed(world.seed)
    images = to_tensor([photo.image for photo in person.photos[:9]])
    with autocast(device, precision):
        z_0 = sd.encode_latents(images, generator).float()
        z_pr = z_0[:0]
        if method.prior_weight:
            files = make_class_images(sd, texts[1], CACHE, method.class_images, world.seed)
            z_pr = encode_files(sd, files, generator)
    steps = min(200, 10 * world.steps)  # 200, as train.py does
    options = Options(device, precision, steps=steps, every=10**6, seed=world.seed)
    with TemporaryDirectory() as out, torch.enable_grad():
        fine_tune(sd, texts, z_0, z_pr, Path(out), options, method)
    return sd


# ---------------------------------------------------------------- fid_bias.png


def draw_fid_bias(world, path):
    """FID and KID between two sets of real photos of the same world: both should be 0."""
    features = read_features(world)
    figure, axes = new_figure(columns=2, width=4.2, height=3.4)
    distances = {"FID (eq. 4)": fid, "KID": kernel_distance}
    sizes = [n for n in SIZES if 2 * n * SPLITS <= len(features)]
    for axis, (name, distance) in zip(axes, distances.items()):
        means, lows, highs = [], [], []
        for n in sizes:
            found = []
            for k in range(SPLITS):
                first, second = features[2 * n * k : 2 * n * (k + 1)].split(n)
                found.append(distance(first, second))
            means.append(mean(found))
            lows.append(min(found))
            highs.append(max(found))
        print(f"  {name}: " + ", ".join(f"{m:.3f} of {n}" for n, m in zip(sizes, means)))
        axis.plot(sizes, means, "o-", markersize=3, label=f"mean of {SPLITS} pairs of sets")
        axis.fill_between(sizes, lows, highs, alpha=0.2, linewidth=0, label="least to largest")
        axis.axhline(0, color="grey", linewidth=0.8, label="the truth")
        axis.set(xscale="log", xlabel="pictures in each set", title=name)
        axis.set_xticks(sizes, [str(n) for n in sizes])
        axis.minorticks_off()
        axis.legend(fontsize=8)
    save_small(path, figure)


def read_features(world):
    """FeatureNet's features of photos of different people, one a person: (n, 256)."""
    count = 2 * SPLITS * SIZES[-1] if world.people >= 60 else 2 * SPLITS * world.people
    people = ToyFaces(count, photos=1, size=world.sd.image_size, seed=3).people
    pixels = make_pixels([person.photos[0] for person in people])
    judge = FeatureNet.load(world.model / "feature_net")
    return torch.cat([judge.features(to_tensor(part)) for part in pixels.split(64)])
