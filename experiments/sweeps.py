"""Quality against one thing at a time, on toy people that nobody was trained on.

    python -m experiments.sweeps refs     1 to 9 reference photos
    python -m experiments.sweeps lam      the weight λ of the references, 0 to 1.5
    python -m experiments.sweeps w        the guidance w, 1.5 to 6
    python -m experiments.sweeps kinds    references that hide the person, or show somebody else
"""

from dataclasses import replace

from experiments.adapters import find_adapters
from experiments.exam import Exam, Method
from experiments.scores import Table
from experiments.table1 import add_exam_arguments, make_settings
from support.checkpoints import ADAPTER, TINY
from support.plots import plot_curves
from support.program import make_parser, run
from unet import StableDiffusion

SUNGLASSES, HAT, SCARF = 1, 2, 3  # classes of toyfaces.drawing.SCENE["accessory"]
KINDS = {  # of the nine references: see Exam.embed_kinds; None: all as they were drawn
    "as drawn": None,
    "bare faces": (0,) * 9,
    "nine in sunglasses": (SUNGLASSES,) * 9,
    "nine in hats": (HAT,) * 9,
    "nine in scarves": (SCARF,) * 9,
    "eight in sunglasses, one bare": (SUNGLASSES,) * 8 + (0,),
    "eight in hats, one bare": (HAT,) * 8 + (0,),
    "three of somebody else": (None,) * 6 + ("stranger",) * 3,
}
GUIDANCES = (1.5, 2.5, 4.0, 6.0)


def list_methods(which, files):
    """The rows of a sweep: (name of the method, what is varied, its value, Method)."""
    shipped = TINY / ADAPTER
    single = ("IP-Adapter", Method(shipped, "none"))
    maximum = ("IP-Adapter + Max Pooling", Method(shipped, "max"))
    average = ("IP-Adapter + Avg Pooling", Method(shipped, "avg"))
    selfattn = ("IP-Adapter + Self-Attention", Method(files["selfattn"], "selfattn"))
    rows = []
    if which == "refs":
        tuned = ("Avg, fine-tuned", Method(files["avg"], "avg"))
        for name, method in (maximum, average, selfattn, tuned):
            for n in range(1, 10):
                rows.append((name, f"references: {n}", n, replace(method, references=n)))
    elif which == "lam":
        for name, method in (single, selfattn):
            for lam in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5):
                rows.append((name, f"λ = {lam}", lam, replace(method, lam=lam)))
    elif which == "w":
        for name, method in (single, average, selfattn):
            for w in GUIDANCES:
                rows.append((name, f"w = {w}", w, replace(method, guidance=w)))
    else:
        tuned = ("Avg, fine-tuned", Method(files["avg"], "avg"))
        concat = ("Concat, fine-tuned", Method(files["concat"], "concat"))
        for kind, kinds in KINDS.items():
            for name, method in (selfattn, tuned, concat):
                rows.append((name, kind, None, replace(method, kinds=kinds)))
    return rows


def make_sweep(which, settings, runs, out):
    unet = StableDiffusion.load(TINY).unet
    tuned = {"refs": ["avg"], "lam": [], "w": [], "kinds": ["avg", "concat"]}[which]
    files = find_adapters(runs, settings.device, unet, "selfattn", *tuned)
    exam = Exam(settings)
    table = Table(exam)
    curves = {}
    for name, label, value, method in list_methods(which, files):
        made = exam.make(method)
        row = table.add(f"{name}; {label}", made["x"], made["seconds"])
        curves.setdefault(name, []).append((value, *row["identity ↑"]))
    table.write(out, f"sweep_{which}", w="w as in the rows" if which == "w" else None)
    if which == "kinds":
        return  # not a curve
    x_label = {"refs": "number of references", "lam": "λ", "w": "guidance w"}[which]
    path = out / f"sweep_{which}.png"
    plot_curves(path, curves, x_label, "identity", "with 95 % intervals over people")
    print(f"wrote {path}")


def main():
    parser = make_parser(__doc__)
    parser.add_argument("which", choices=["refs", "lam", "w", "kinds"], help="what is varied")
    add_exam_arguments(parser)
    args = parser.parse_args()
    settings = make_settings(args)
    try:
        make_sweep(args.which, settings, args.runs, args.out)
    except KeyboardInterrupt:
        hint = "the same command goes on after the last finished row"
        raise KeyboardInterrupt(f"stopped; {hint}") from None


if __name__ == "__main__":
    run(main)
