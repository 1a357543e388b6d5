"""Quality against one thing at a time, on toy people that nobody was trained on.

    python -m experiments.sweeps refs     1 to 9 reference photos
    python -m experiments.sweeps lam      the weight λ of the references, 0 to 1.5
    python -m experiments.sweeps w        the guidance w, 1.5 to 6
    python -m experiments.sweeps kinds    references that hide the person, or show somebody else
"""

from dataclasses import replace

from experiments.judging import Judges
from experiments.makers import Maker
from experiments.plan import Method
from experiments.scores import Table
from experiments.table1 import add_exam_arguments, prepare
from support.claim import claim
from support.distributed import is_first, processes
from support.plots import plot_curves
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
    "three of somebody else": (None,) * 6 + ("stranger",) * 3,
}
GUIDANCES = (1.5, 2.5, 4.0, 6.0)
TRAINED = {"refs": ["avg"], "lam": [], "w": [], "kinds": ["avg", "concat"]}  # beside selfattn


def list_methods(which, single, trained):
    """The rows of a sweep: {folder: (name of the method, what is varied, its value, Method)}.

    Rows of trained adapters that were not given are left out.
    """
    methods = {"one-photo": ("IP-Adapter", Method("", single, "none"))}
    methods["max"] = ("IP-Adapter + Max Pooling", Method("", single, "max"))
    methods["avg"] = ("IP-Adapter + Avg Pooling", Method("", single, "avg"))
    names = {"selfattn": "IP-Adapter + Self-Attention", "avg": "Avg, fine-tuned",
             "concat": "Concat, fine-tuned"}
    for agg, name in names.items():
        if agg in trained:
            methods[f"{agg}-trained"] = (name, Method("", trained[agg], agg))
    wanted = {
        "refs": ("max", "avg", "selfattn-trained", "avg-trained"),
        "lam": ("one-photo", "selfattn-trained"),
        "w": ("one-photo", "avg", "selfattn-trained"),
        "kinds": ("selfattn-trained", "avg-trained", "concat-trained"),
    }
    rows = {}
    for folder in wanted[which]:
        if folder in methods:
            name, method = methods[folder]
            for key, label, value, varied in vary(which, method):
                varied = replace(varied, title=f"{name}; {label}")
                rows[f"{folder}-{key}"] = (name, label, value, varied)
    if which == "kinds":  # the methods side by side for each kind
        order = list(KINDS)
        rows = dict(sorted(rows.items(), key=lambda item: order.index(item[1][1])))
    return rows


def vary(which, method):
    """Yield (part of the folder's name, label, value, Method) for every value of a sweep."""
    if which == "refs":
        for n in range(1, 10):
            yield n, f"references: {n}", n, replace(method, references=n)
    elif which == "lam":
        for lam in (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5):
            yield lam, f"λ = {lam}", lam, replace(method, lam=lam)
    elif which == "w":
        for w in GUIDANCES:
            yield w, f"w = {w}", w, replace(method, guidance=w)
    else:
        for kind, kinds in KINDS.items():
            slug = kind.replace(",", "").replace(" ", "-")
            yield slug, kind, None, replace(method, kinds=kinds)


def make_sweep(which, args, out):
    names = ("selfattn", *TRAINED[which])
    judges, sd, plan, single, trained = prepare(args, out, names)
    if which == "kinds" and not plan.knows_truth:
        raise ValueError("kinds draws toy people anew: it is not for photos, leave out --data")
    rows = list_methods(which, single, trained)
    plan.methods = {folder: method for folder, (*_, method) in rows.items()}
    Maker(plan, sd).make()
    if not is_first():
        return
    table = Table(plan, Judges(plan, sd, *judges))
    curves = {}
    for folder, (name, _, value, _) in rows.items():
        numbers = table.add_method(folder)
        curves.setdefault(name, []).append((value, *numbers[table.identity_column]))
    table.write(f"sweep_{which}", w="w as in the rows" if which == "w" else None)
    if which == "kinds":
        return  # not a curve
    x_label = {"refs": "number of references", "lam": "λ", "w": "guidance w"}[which]
    path = plan.out / f"sweep_{which}.png"
    y_label = table.identity_column.removesuffix(" ↑")
    plot_curves(path, curves, x_label, y_label, "with 95 % intervals over people")
    print(f"wrote {path}")


@processes()
def main():
    parser = make_parser(__doc__)
    parser.add_argument("which", choices=["refs", "lam", "w", "kinds"], help="what is varied")
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
