"""The paper's Table 1 and Figure 6, with controls, on toy people that nobody was trained on.

    python -m experiments.table1

Rows of the paper: one photo, DreamBooth, max, average, self-attention. Controls: text alone, the
same leave-one-out training for other aggregators, a perfect method (the scenes asked for, drawn
anew), real photos. What was made before is not made again.
"""

from pathlib import Path

import torch

from experiments.adapters import find_adapters
from experiments.base import encode_and_decode
from experiments.exam import REFERENCES, Exam, Method, Settings
from experiments.scores import Table
from support.checkpoints import ADAPTER, TINY
from support.devices import pick_device, pick_precision
from support.pictures import save_grid, to_bytes, to_tensor
from support.plots import plot_plane
from support.program import make_parser, require_at_least, run
from toyfaces.drawing import draw_face
from unet import StableDiffusion

BEST = "IP-Adapter + Self-Attention"  # the paper's method: the others are compared with it


def run_methods(exam, table, files, with_dreambooth):
    """The rows of the paper and the controls that make pictures -> {name: pictures}."""
    shipped = TINY / ADAPTER
    paper = {
        "IP-Adapter": Method(shipped, "none"),
        "DreamBooth": None,
        "IP-Adapter + Max Pooling": Method(shipped, "max"),
        "IP-Adapter + Avg Pooling": Method(shipped, "avg"),
        BEST: Method(files["selfattn"], "selfattn"),
    }
    controls = {"text only": Method()}
    for agg in ("max", "avg", "concat"):
        controls[f"{agg.title()}, fine-tuned"] = Method(files[agg], agg)

    pictures = {}
    for name, method in {**paper, **controls}.items():
        if name == "text only":
            table.print_heading("controls")
        if name == "DreamBooth" and not with_dreambooth:
            continue
        made = exam.make(method) if method else exam.make_with_dreambooth()
        table.add(name, made["x"], made["seconds"])
        pictures[name] = made["x"]
    return pictures


def add_real_rows(exam, table):
    """What a perfect method, the VAE, and real photos of the same people score."""
    drawn = []
    for p, person in enumerate(exam.people):
        for k, q in enumerate(exam.target):
            labels = person.photos[REFERENCES + q].labels
            drawn.append(draw_face(labels, {}, [p, k], exam.sd.image_size))
    table.add("the scenes asked for, drawn anew", to_bytes(to_tensor(drawn)))

    _, held, others = exam.pictures.split([REFERENCES, exam.n, exam.n], dim=1)
    round_trips = torch.cat([encode_and_decode(exam.sd, photos) for photos in held])
    first, second = torch.arange(2 * exam.n).split(exam.n)
    table.add("VAE round trip of real photos", round_trips, scenes=first)
    table.add("other real photos of the same people", others.flatten(0, 1), scenes=second)


def save_figure_6(exam, pictures, path, people=8):
    """A row a person: the first reference, then one picture of every method."""
    columns = {"reference": exam.pictures[:, 0]}
    for name, made in pictures.items():
        columns[name.removeprefix("IP-Adapter + ")] = made[:: exam.n]  # the first of each person
    rows = torch.stack(list(columns.values()), dim=1)[:people]  # (8, methods, 3, H, W)
    rows = [list(to_tensor(row)) for row in rows]
    captions = exam.prompts[:: exam.n][:people]
    save_grid(path, rows, list(columns), captions, side=96)


def check_size(settings):
    if settings.people < 2 or min(settings.photos, settings.seeds) < 1 or (
        settings.photos * settings.seeds < 2
    ):
        needs = "at least two people (--people), and two pictures of each (--photos times --seeds)"
        raise ValueError(needs)


def add_exam_arguments(parser):
    parser.ranges["steps"] = (1, 1000)
    add = parser.add_argument
    add("--people", type=int, default=60, help="people, with nine references each")
    add("--photos", type=int, default=3, help="prompts a person")
    add("--seeds", type=int, default=3, help="pictures a prompt")
    add("--guidance", type=float, default=4.0, help="classifier-free guidance w")
    add("--steps", type=int, default=20, help="UNet evaluations a picture")
    add("--batch", type=int, default=32, help="pictures at once")
    add("--seed", type=int, default=2020, help="of the noise")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    add("--runs", type=Path, default=Path("runs"), help="adapters; missing ones are trained")
    add("--out", type=Path, default=Path("runs/table"), help="folder for tables and pictures")


def make_settings(args):
    """The Settings of the arguments of add_exam_arguments. ValueError if they make no exam."""
    require_at_least(1, args, "batch", "steps")
    device = pick_device(args.device)
    settings = Settings(device, pick_precision("auto", device), args.people, args.photos,
                        args.seeds, args.guidance, args.steps, args.seed, args.batch)
    check_size(settings)
    return settings


def make_table(settings, runs, out, with_dreambooth):
    unet = StableDiffusion.load(TINY).unet
    files = find_adapters(runs, settings.device, unet, "selfattn", "max", "avg", "concat")
    exam = Exam(settings)
    table = Table(exam)
    pictures = run_methods(exam, table, files, with_dreambooth)
    add_real_rows(exam, table)
    table.add_differences(BEST)
    table.write(out, "table")
    save_figure_6(exam, pictures, out / "figure6.png")
    points = {}
    for name in pictures:
        if name != "text only":  # so far away that it would push the others together
            row = table.rows[name]
            points[name] = (row["FID ↓"], row["identity ↑"])
    title = "Table 1: further up and left is better"
    plot_plane(out / "plane.png", points, "FID ↓", "identity ↑", title)
    print(f"wrote {out}/figure6.png, {out}/plane.png")


def main():
    parser = make_parser(__doc__)
    add_exam_arguments(parser)
    parser.add_argument("--no-dreambooth", action="store_true", help="leave out its row, which "
                        "takes most of the time")
    args = parser.parse_args()
    settings = make_settings(args)
    try:
        make_table(settings, args.runs, args.out, not args.no_dreambooth)
    except KeyboardInterrupt:
        hint = "the same command goes on after the last finished row or person"
        raise KeyboardInterrupt(f"stopped; {hint}") from None


if __name__ == "__main__":
    run(main)
