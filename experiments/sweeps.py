"""Quality against one thing at a time, on people that nobody was trained on.

On the people of the tables:

    python -m experiments.sweeps refs         1 to 9 reference photos
    python -m experiments.sweeps lam          the weight λ of the references, 0 to 1.5
    python -m experiments.sweeps kinds        references that hide the person, or show somebody else
    python -m experiments.sweeps people       how many people the adapter was trained on, 50 to 1,600
    python -m experiments.sweeps steps        how many steps it was trained for, 0 to 800

By these, things are chosen (chosen.py has the rules), so they take people of validation. (Those of a
folder of photos are too few for that: there they show the people of the table, and choose nothing.)

    python -m experiments.sweeps dreambooth   recipes of DreamBooth
    python -m experiments.sweeps w            the guidance w of every method of the table, 1 to 6
    python -m experiments.sweeps phi          rescaled guidance (ddpm.rescale_guidance)
"""

import csv
from dataclasses import dataclass, replace

from dreambooth import DreamBooth
from experiments import chosen
from experiments.adapters import BEST, STRANGERS, find_adapters, read_recipe
from experiments.judging import Judges
from experiments.makers import Maker
from experiments.photos import read_pictures
from experiments.plan import Method
from experiments.scores import Table, format_cell
from experiments.table1 import (PAPER, add_exam_arguments, choose_world, is_toy_world, list_methods,
                                list_trainings, prepare)
from support.claim import claim
from support.distributed import first_alone, is_first, processes, world_size
from support.plots import plot_curves, plot_paths
from support.program import make_parser, run

SUNGLASSES, HAT, SCARF = 1, 2, 3  # classes of toyfaces.drawing.SCENE["accessory"]
KINDS = {  # of the nine references: see Maker.embed_kinds; None: all as they were drawn
    "as drawn": None,
    "bare faces": (0,) * 9,
    "nine in sunglasses": (SUNGLASSES,) * 9,
    "nine in hats": (HAT,) * 9,
    "nine in scarves": (SCARF,) * 9,
    "eight in sunglasses, one bare": (SUNGLASSES,) * 8 + (0,),
    "eight in hats, one bare": (HAT,) * 8 + (0,),
    "one of somebody else": (None,) * 8 + ("stranger",),
    "three of somebody else": (None,) * 6 + ("stranger",) * 3,
}
GUIDANCES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0)
FEW_GUIDANCES = {"dreambooth": (1.5, 2.5, 4.0), "phi": (2.0, 3.0, 4.0, 6.0)}
PHIS = (0.0, 0.35, 0.7, 1.0)
RECIPES = (  # of DreamBooth: steps, peak learning rate, guidance of the class pictures
    (100, 1e-3, 1.0),
    (200, 5e-4, 1.0),
    (200, 1e-3, 1.0),
    (200, 2e-3, 1.0),
    (400, 1e-3, 1.0),
    (200, 1e-3, 4.0),
)
PEOPLE = (50, 100, 200, 400, 800, 1600)
STEPS = (100, 200, 400, 800)
CHOICES = ("dreambooth", "w", "phi")
LABELS = {"refs": "number of references", "lam": "λ", "w": "guidance w", "phi": "guidance w",
          "people": "people in training", "steps": "steps of training", "dreambooth": "guidance w"}
TRAINED = {  # the adapters that a sweep needs beside self-attention
    "refs": ["avg"], "kinds": ["avg", "concat"], "w": ["max", "avg", "concat", "same-photo"]}


@dataclass
class Point:
    """A row of a sweep: a point of the curve `name`, at x, whose method has a folder."""

    name: str
    label: str
    x: float
    method: Method


def vary(name, method, changes):
    """{part of the folder's name: Point} of a method. changes: [(label, x, {field: value})]."""
    points = {}
    for label, x, change in changes:
        title = f"{name}; {label}"
        slug = label.replace(" = ", "-").replace(": ", "-").replace(",", "").replace(" ", "-")
        points[slug] = Point(name, label, x, replace(method, title=title, **change))
    return points


def list_changes(which):
    """What is varied, as `vary` takes it; people and steps vary the adapter's file instead."""
    if which == "refs":
        return [(f"references: {n}", n, {"references": n}) for n in range(1, 10)]
    if which == "lam":
        return [(f"λ = {lam}", lam, {"lam": lam}) for lam in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)]
    if which == "kinds":
        return [(kind, None, {"kinds": kinds}) for kind, kinds in KINDS.items()]
    guidances = FEW_GUIDANCES.get(which, GUIDANCES)
    return [(f"w = {w:g}", w, {"guidance": w}) for w in guidances]


def list_points(which, single, trained, training):
    """The rows of a sweep: {folder: Point}. Rows of trained adapters that were not given are left out.

    trained: {name: files}, of each the first is taken; training: see table1.list_methods.
    """
    usual = {name: files[:1] for name, files in trained.items() if "strangers" not in name}
    methods = list_methods(single, usual, which in CHOICES, training)
    methods = {name: trainings[0] for name, trainings in methods.items()}
    wanted = {
        "refs": ("max", "avg", BEST, "avg-trained"),
        "lam": ("one-photo", BEST),
        "kinds": (BEST, "avg-trained", "concat-trained", "selfattn-strangers", "avg-strangers"),
        "w": tuple(name for name in methods if name != "avg-normalised"),
        "phi": (BEST,),
    }
    for name in ("selfattn-strangers", "avg-strangers"):
        if name in trained:
            agg = name.removesuffix("-strangers")
            (method,) = list_trainings(agg, trained[name])
            methods[name] = replace(method, title=f"{method.title}, with strangers")
    methods = {name: methods[name] for name in wanted[which] if name in methods}
    if which == "phi":
        methods = {f"phi-{phi}": replace(methods[BEST], phi=phi, title=f"φ = {phi}") for phi in PHIS}
    points = {}
    for name, method in methods.items():
        for slug, point in vary(method.title, method, list_changes(which)).items():
            points[f"{name}-{slug}"] = point
    if which == "kinds":  # the methods side by side for each kind
        order = list(KINDS)
        points = dict(sorted(points.items(), key=lambda item: order.index(item[1].label)))
    return points


def list_recipes():
    """The rows of the sweep of DreamBooth's recipes: {folder: Point}, w on the curves."""
    points = {}
    for steps, lr, class_guidance in RECIPES:
        name = f"{steps} steps, rate {lr:g}, class pictures at w = {class_guidance:g}"
        taught = DreamBooth(class_guidance=class_guidance)
        method = Method(name, dreambooth=taught, steps=steps, lr=lr)
        for slug, point in vary(name, method, list_changes("dreambooth")).items():
            points[f"steps-{steps}-lr-{lr:g}-class-{class_guidance:g}-{slug}"] = point
    return points


def list_sizes(which, args, device, single):
    """The rows of self-attention trained on more or fewer people, or for more or fewer steps.

    No steps: the start, which is the average. -> {folder: Point}, and {label: adapter file}.
    """
    points, files = {}, {}
    if which == "steps":
        method = Method("0 steps (average)", single, "avg")
        points["steps-0"] = Point("self-attention", method.title, 0, method)
    with first_alone():
        usual = find_adapters(args.runs, device, BEST)[BEST]
        for size in PEOPLE if which == "people" else STEPS:
            file = usual
            if read_recipe(usual)[which] != str(size):
                file = find_adapters(args.runs, device, BEST, **{which: size})[BEST]
            label = f"{size} {which}"
            points[f"{which}-{size}"] = Point("self-attention", label, size, Method(label, file, BEST))
            files[label] = file
    return points, files


# ---------------------------------------------------------------- what a sweep writes


def print_bands(table, files):
    """Where in t eq. 1 falls on held-out people: the change of each band over the training, percent.

    files: {label: adapter file}, beside which lies the log.
    """
    rows = {}
    for label, file in files.items():
        with open(file.parent / "adapter.csv", newline="") as log:
            lines = list(csv.DictReader(log))
        bands = [name for name in lines[0] if name == "validation" or name.startswith("t ")]
        rows[label] = []
        for name in bands:
            start, end = (float(line[name]) for line in (lines[0], lines[-1]))
            rows[label].append(f"{start:.4f}, {100 * (end / start - 1):+.2f} %")
    table.lines.append("")
    table.print_line("validation loss: start, change", *bands)
    table.print_line(*["---"] * (1 + len(bands)))
    for label, cells in rows.items():
        table.print_line(label, *cells)


def print_matrix(table, points, column):
    """One number of all rows: a line a curve, a column an x."""
    labels = list(dict.fromkeys(point.label for point in points.values()))
    table.lines.append("")
    table.print_line(column, *labels)
    table.print_line(*["---"] * (1 + len(labels)))
    for name in dict.fromkeys(point.name for point in points.values()):
        cells = [format_cell(table.numbers[f"{name}; {label}"][column][0]) for label in labels]
        table.print_line(name, *cells)


def choose(table, points, names):
    """The x of the lowest FID of every curve, and the one of the lowest mean over the curves `names`.

    They are printed and kept in the table. names: curves that share a choice, all with the same x.
    """
    column = table.distance_column
    curves = {}
    for point in points.values():
        value = table.numbers[point.method.title][column][0]
        curves.setdefault(point.name, {})[point.x] = value
    table.lines.append("")
    table.print_line("chosen for", "w", column)
    table.print_line(*["---"] * 3)
    for name, curve in curves.items():
        best = min(curve, key=curve.get)
        table.print_line(name, f"{best:g}", f"{curve[best]:.2f}")
    shared = [curves[name] for name in names if name in curves]
    if shared:
        means = {x: sum(curve[x] for curve in shared) / len(shared) for x in shared[0]}
        best = min(means, key=means.get)
        table.print_line("all of the paper", f"{best:g}", f"mean {means[best]:.2f}")


def print_bright(table, plan, points):
    """The share of pixels that are nearly white (all channels from 250 on), of pictures and photos."""

    def measure(files):
        pixels = read_pictures(files)
        return (pixels >= 250).all(1).float().mean().item()

    people = range(len(plan.subjects))
    table.lines.append("")
    real = [file for p in people for file in plan.photo_files(p)["real"][0]]
    table.print_line("pictures", "nearly white pixels, %")
    table.print_line(*["---"] * 2)
    table.print_line("real photos", f"{100 * measure(real):.2f}")
    for folder, point in points.items():
        made = [file for p in people for file in plan.files(folder, p)]
        table.print_line(point.method.title, f"{100 * measure(made):.2f}")


def draw_curves(which, table, points, path):
    """Identity against x, or for a choice of w the two planes: FID and prompt against identity."""
    column = table.identity_column
    y_label = column.removesuffix(" ↑")
    if which in CHOICES:
        paths = {}
        for point in points.values():
            if point.name == "text only":
                continue  # so far away that it would push the others together
            numbers = table.numbers[point.method.title]
            quality = numbers[table.distance_column]
            spot = (f"{point.x:g}", quality, numbers.get("prompt ↑"), numbers[column])
            paths.setdefault(point.name, []).append(spot)
        columns = (table.distance_column, "prompt ↑")
        plot_paths(path, paths, columns, column, "numbers: w; thin lines: 95 % intervals")
    else:
        curves = {}
        for point in points.values():
            numbers = table.numbers[point.method.title]
            curves.setdefault(point.name, []).append((point.x, *numbers[column]))
        plot_curves(path, curves, LABELS[which], y_label, "with 95 % intervals over people")
    print(f"wrote {path}")


def make_points(which, args, device, single, trained):
    """-> {folder: Point} of a sweep, and the logs that belong to it: {label: adapter file}."""
    if which in ("people", "steps"):
        return list_sizes(which, args, device, single)
    if which == "dreambooth":
        return list_recipes(), {}
    if which == "kinds" and is_toy_world(args):
        with first_alone():
            found = find_adapters(args.runs, device, BEST, "avg", strangers=STRANGERS)
        trained |= {f"{name}-strangers": [file] for name, file in found.items()}
    training = chosen.DREAMBOOTH if choose_world(args) else None
    return list_points(which, single, trained, training), {}


def make_sweep(which, args, out):
    if which in ("people", "steps", "dreambooth") and not is_toy_world(args):
        raise ValueError(f"{which} trains in the toy world: leave out other models, people and adapters")
    if which == "phi" and not (choose_world(args) or args.selfattn):
        raise ValueError("phi varies self-attention: name its adapter with --selfattn")
    if which == "kinds" and args.data != "toy":
        raise ValueError("kinds draws toy people anew: it is not for photos, leave out --data")
    args.trainings = 1
    names = (BEST, *TRAINED.get(which, ()))
    chooses = which in CHOICES and args.data == "toy"
    judges, sd, plan, single, trained = prepare(args, out, names, validation=chooses)
    points, logs = make_points(which, args, plan.settings.device, single, trained)
    plan.methods = {folder: point.method for folder, point in points.items()}
    Maker(plan, sd).make()
    table = Table(plan, Judges(plan, sd, *judges))
    if world_size() > 1:
        table.share_distances(list(points))
    if not is_first():
        return
    for folder in points:
        table.add_method(folder)
    if logs:
        print_bands(table, logs)
    if which in CHOICES:
        for column in (table.distance_column, table.identity_column, "prompt ↑"):
            if column in table.columns:
                print_matrix(table, points, column)
    if chooses:
        paper = [point.name for folder, point in points.items() if folder.split("-w-")[0] in PAPER]
        choose(table, points, list(dict.fromkeys(paper)) if which == "w" else [])
    if which == "phi":
        print_bright(table, plan, points)
    table.write(f"sweep_{which}")
    if which != "kinds":  # it is no curve
        draw_curves(which, table, points, plan.out / f"sweep_{which}.png")


@processes()
def main():
    parser = make_parser(__doc__)
    choices = ["refs", "lam", "kinds", "people", "steps", *CHOICES]
    parser.add_argument("which", choices=choices, help="what is varied")
    add_exam_arguments(parser)
    args = parser.parse_args()
    out = args.out / f"sweep-{args.which}"
    try:
        with claim(out):
            make_sweep(args.which, args, out)
    except KeyboardInterrupt:
        hint = "the same command goes on after the last finished pictures"
        raise KeyboardInterrupt(f"stopped; {hint}") from None


if __name__ == "__main__":
    run(main, "make fewer pictures at once (--batch)")
