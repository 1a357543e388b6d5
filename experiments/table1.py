"""The paper's Table 1 and Figure 6, with controls, of people that nobody was trained on.

    python -m experiments.table1                           toy people, weights/tiny
    python -m experiments.table1 --model weights/photos --data path/to/lfw-deepfunneled \
        --image-encoder mobilefacenet.pt --faces runs/base_judge/judge.safetensors \
        --inception none                                   photographs of 64 × 64
    python -m experiments.table1 --model $SD --adapter $ADAPTER \
        --selfattn runs/sd15/ip-adapter.safetensors --data path/to/lfw-deepfunneled \
        --inception FILE --faces mobilefacenet.pt          the paper's

Rows of the paper: one photo, DreamBooth, max, average, self-attention. Controls: text alone, the
average of normalised embeddings, the same leave-one-out training for other aggregators, training on
the same photo, a perfect method (the scenes asked for, drawn anew), real photos. For toy people
there are two tables: `table`, every method at its own w (chosen.py), and `table-common`, all at one.
Rows of trained adapters are means over --trainings seeds.

First a plan is written (plan.py), then pictures are made (makers.py), then folders are scored
(scores.py). What was made before is not made again. torchrun shares the work out.
"""

from dataclasses import replace
from pathlib import Path

from dreambooth import DreamBooth
from experiments import chosen
from experiments.adapters import BEST, find_adapters, find_world, list_given
from experiments.judging import Judges
from experiments.makers import Maker
from experiments.photos import load_for_pictures, read_pictures
from experiments.plan import Method, Settings, make_plan
from experiments.scores import Table
from support.checkpoints import TINY, find_beside, find_shipped
from support.claim import claim
from support.devices import pick_device, pick_precision
from support.distributed import (alone, barrier, first_alone, is_first, processes, rank,
                                 world_size)
from support.face_net import FaceEncoder
from support.judges import load_face_judge, load_judge, name_face_box
from support.pictures import save_grid, to_tensor
from support.plots import plot_plane
from support.program import device_name, file_path, make_parser, run

PAPER = ("one-photo", "dreambooth", "max", "avg", BEST)  # the names of the paper's rows
TITLES = {  # of the adapters that were trained on; the paper's row is self-attention
    "selfattn": "IP-Adapter + Self-Attention",
    "max": "Max, fine-tuned",
    "avg": "Avg, fine-tuned",
    "concat": "Concat, fine-tuned",
    "none": "One photo, fine-tuned",
    "same-photo": "Same photo, fine-tuned",
}


def list_methods(single, trained, with_dreambooth, training=None):
    """{name: a Method for each training} of the paper's rows and then of the controls.

    single: the adapter of one photo; trained: {aggregator or "same-photo": files}; training: what
    DreamBooth is taught by (chosen.DREAMBOOTH), None: the defaults of train.py.
    """
    training = dict(training or {})
    methods = {"one-photo": [Method("IP-Adapter", single, "none")]}
    if with_dreambooth:
        dreambooth = DreamBooth(class_guidance=training.pop("class_guidance", 1.0))
        methods["dreambooth"] = [Method("DreamBooth", dreambooth=dreambooth, **training)]
    methods["max"] = [Method("IP-Adapter + Max Pooling", single, "max")]
    methods["avg"] = [Method("IP-Adapter + Avg Pooling", single, "avg")]
    if BEST in trained:
        methods[BEST] = list_trainings(BEST, trained[BEST])
    # The controls.
    methods["text-only"] = [Method("text only")]
    title = "IP-Adapter + Avg Pooling, normalised"
    methods["avg-normalised"] = [Method(title, single, "avg", normalise=True)]
    for name, files in trained.items():
        if name != BEST:
            methods[f"{name}-trained"] = list_trainings(name, files)
    return methods


def list_trainings(name, files):
    """The Methods of one adapter that was trained with several seeds, one a file."""
    agg = "none" if name == "same-photo" else name
    return [Method(TITLES[name], file, agg) for file in files]


def guide_methods(methods, guidance):
    """{name: {folder: Method}} of the methods, each at its w. guidance: {name: w}."""
    rows = {}
    for name, trainings in methods.items():
        w = guidance[name]
        rows[name] = {}
        for k, method in enumerate(trainings):
            folder = f"{name}-{k}" if k else name
            rows[name][f"{folder}-w-{w:g}"] = replace(method, guidance=w)
    return rows


# ---------------------------------------------------------------- rows and pictures


def add_rows(table, rows):
    """All rows: the methods, then what a perfect method, the VAE and real photos score."""
    for name, folders in rows.items():
        if name == "text-only":
            table.print_heading("controls")
        table.add_method(*folders)
    if table.plan.knows_truth:
        table.add_folder("the scenes asked for, drawn anew", "drawn-anew")
    table.add_round_trips("VAE round trip of real photos")
    table.add("other real photos of the same people", table.others)
    if not table.plan.knows_truth:
        table.add("real photos of strangers", table.read_photos("real", shift=1))


def list_paper_folders(rows):
    """{folder: title} of the methods of the paper, of each its first training."""
    firsts = [next(iter(rows[name].items())) for name in PAPER if name in rows]
    return {folder: method.title.removeprefix("IP-Adapter + ") for folder, method in firsts}


def save_figure_6(plan, rows, path, people=8):
    """A row a person: the first reference, then one picture of every method of the paper."""
    folders = {"references": "reference", **list_paper_folders(rows)}
    pictures, captions = [], []
    for p in range(min(people, len(plan.subjects))):
        files = [plan.files(folder, p)[0] for folder in folders]
        pictures.append(list(to_tensor(read_pictures(files))))
        captions.append(plan.shots(p)[0].prompt)
    save_grid(path, pictures, list(folders.values()), captions, side=96)


def save_generated(plan, rows, path, people=12):
    """Figure 6 without photos, which may be nobody's to show: a row a method, a column a person."""
    shown = range(min(people, len(plan.subjects)))
    folders = list_paper_folders(rows)
    names = [plan.subjects[p].name.split("_")[-1] for p in shown]
    pictures = []
    for folder in folders:
        files = [plan.files(folder, p)[0] for p in shown]
        pictures.append(list(to_tensor(read_pictures(files))))
    save_grid(path, pictures, names, list(folders.values()), side=96)


def save_plane(table, path):
    points = {}
    for title, numbers in table.numbers.items():
        # Photos have no w; text only is so far away that it would push the others together.
        if numbers["w"] is not None and title != "text only":
            points[title] = (numbers[table.distance_column], numbers[table.identity_column])
    title = "Table 1: further up and left is better"
    plot_plane(path, points, table.distance_column, table.identity_column, title)


# ---------------------------------------------------------------- command line


def add_exam_arguments(parser):
    """What the table and the sweeps ask for."""
    parser.ranges["steps"] = (1, 1000)
    parser.ranges["trainings"] = (1, 100)
    add = parser.add_argument
    add("--people", type=int, default=60, help="people, with nine references each")
    add("--photos", type=int, default=3, help="prompts a person")
    add("--seeds", type=int, default=3, help="pictures a prompt")
    add("--guidance", type=float, help="classifier-free guidance w (default: 4; of the toy world "
        "what chosen.py says)")
    add("--steps", type=int, default=20, help="UNet evaluations a picture, 1 to 1000")
    add("--batch", type=int, default=32, help="pictures at once")
    add("--seed", type=int, default=2020, help="of the noise")
    add("--device", type=device_name, default="auto", help="auto, cpu, cuda or mps")
    add("--trainings", type=int, default=3, help="adapters of a kind, if none are named: so many, with "
        "other seeds")
    add("--runs", type=Path, default=Path("runs"), help="adapters of weights/tiny and weights/photos; "
        "missing ones are trained")
    add("--out", type=Path, default=Path("runs/table"), help="folder for plan, pictures and tables")
    add = parser.add_argument_group("another model, other people, other judges").add_argument
    add("--model", default=str(TINY), help="checkpoint folder, single file or hub id (default: "
        "weights/tiny)")
    add("--image-encoder", help="folder or hub id of the CLIP image encoder, if not in --model; or the "
        "file of a face recogniser, mobilefacenet.pt")
    add("--adapter", type=file_path, help="adapter of one photo (default: the one in --model)")
    add("--selfattn", type=file_path, nargs="+", default=[], help="adapter that train.py trained "
        "from it, the paper's method; several: trained with other seeds")
    add("--trained", type=file_path, nargs="+", default=[], help="more of them, with other aggregators")
    add("--data", default="toy", help="toy, or a folder with one folder of photos a person")
    add("--inception", metavar="FILE", help="pt_inception-2015-12-05-6726825d.pth; toy: FeatureNet; "
        "none: with --faces, no FID, KID and IS (default: toy for toy people, else from torch.hub)")
    add("--faces", metavar="FILE", help="mobilefacenet.pt of foamliu/MobileFaceNet, or the judge of "
        "experiments.base_judge, for adapters that read MobileFaceNet")
    add("--face-box", help="with --faces: deep-funneled, whole, or left,top,right,bottom in "
        "fractions of the photo's centre square (default: deep-funneled, as --model cuts photos)")


def make_settings(args, validation=False):
    """The Settings of the arguments of add_exam_arguments. ValueError if they make no exam."""
    if args.people < 2 or args.photos * args.seeds < 2:
        needs = "at least two people (--people), and two pictures of each (--photos times --seeds)"
        raise ValueError(needs)
    if args.face_box and not args.faces:
        raise ValueError("--face-box needs --faces, the file of a face recogniser")
    device = pick_device(args.device)
    guidance = args.guidance
    if guidance is None:
        guidance = choose_common(args)
    return Settings(device, pick_precision("auto", device), args.people, args.photos,
                    args.seeds, guidance, args.steps, args.seed, args.batch, validation)


def choose_common(args):
    """The w of all methods alike, if none is named."""
    return chosen.COMMON if is_toy_world(args) else 4.0


def is_toy_world(args):
    """Whether weights/tiny and drawn people are meant."""
    world = choose_world(args)
    return world is not None and world.is_toys


def choose_world(args):
    """The adapters.World that is meant; None: another model, or adapters that the user names."""
    if args.adapter or args.selfattn or args.trained:
        return None
    return find_world(args.model, args.data, args.image_encoder)


def load_judges(args, device):
    """The judge of quality and that of faces, or None. ValueError if both are."""
    quality = args.inception
    if quality is None and args.data == "toy":
        quality = "toy"
    faces = None
    if args.faces:
        faces = load_face_judge(args.faces, args.face_box or name_face_box(args.model), device)
    if quality == "none":
        if not faces:
            raise ValueError("--inception none leaves nobody to judge the pictures: name --faces")
        return None, faces
    return load_judge(quality, device=device), faces


def find_single(args):
    """The adapter of one photo."""
    single = args.adapter or find_shipped(args.model, args.image_encoder)
    if not single.is_file():
        hint = "name one with --adapter (ip-adapter_sd15.safetensors)"
        raise ValueError(f"{single}: no such adapter; {hint}")
    return single


def find_files(args, device, names):
    """{name: its files} of the trained adapters, of the wanted `names`.

    Those of models that ship with this code are found in --runs, or trained, with --trainings seeds;
    for other models and people they are given.
    """
    world = choose_world(args)
    if world:
        return find_trained(args.runs, device, world, names, args.trainings)
    if not args.selfattn:
        print("note: no row of self-attention; name its adapter with --selfattn")
    return list_given(BEST, args.selfattn, args.trained)


def find_trained(runs, device, world, names, trainings):
    """{name: its files, one a seed}. Missing ones are trained, each by one process of torchrun."""
    with first_alone():  # its recipe is that of all others
        find_adapters(runs, device, BEST, world=world)
    jobs = [(name, seed) for seed in range(trainings) for name in names]
    mine = jobs[rank() :: world_size()]
    with alone():
        for name, seed in mine:
            find_adapters(runs, device, name, world=world, seed=seed)
    barrier()
    files = {name: [] for name in names}
    for seed in range(trainings):
        found = find_adapters(runs, device, *names, world=world, seed=seed)
        for name, file in found.items():
            files[name].append(file)
    return files


def prepare(args, out, names, validation=False):
    """-> judges of quality and faces, the model, a plan without methods, and the adapters' files.

    Everything that can be refused is refused before adapters are trained.
    """
    settings = make_settings(args, validation)
    judges = load_judges(args, settings.device)
    single = find_single(args)
    sd = load_for_pictures(args.model, settings, args.image_encoder or find_beside(single))
    refuse_own_judge(sd.image_encoder, judges[1])
    plan = make_plan(out, settings, sd, args.data)
    plan.check()
    trained = find_files(args, settings.device, names)
    return judges, sd, plan, single, trained


def refuse_own_judge(image_encoder, judge):
    """ValueError if the embeddings are those of the judge of faces: it would judge itself."""
    if isinstance(image_encoder, FaceEncoder) and isinstance(judge, type(image_encoder.net)):
        problem = "--faces is the network that --image-encoder names, and would judge itself"
        raise ValueError(f"{problem}; experiments.base_judge trains another one")


def make_tables(args):
    """table: every method at its own w; table-common: all at one. Without chosen ones only `table`."""
    names = (BEST, "max", "avg", "concat", "same-photo")
    judges, sd, plan, single, trained = prepare(args, args.out, names)
    world = choose_world(args)
    has_chosen = is_toy_world(args) and args.guidance is None
    training = chosen.DREAMBOOTH if world else None
    methods = list_methods(single, trained, not args.no_dreambooth, training)
    common = dict.fromkeys(methods, plan.settings.guidance)
    tables = {"table": guide_methods(methods, common)}
    if has_chosen:
        own = guide_methods(methods, chosen.GUIDANCE)
        tables = {"table": own, "table-common": tables["table"]}
    for rows in tables.values():
        for folders in rows.values():
            plan.methods |= folders
    Maker(plan, sd).make()
    judges = Judges(plan, sd, *judges)
    if world_size() > 1:
        Table(plan, judges).share_distances(list(plan.methods))
    if not is_first():
        return
    scored = {}  # what both tables have is scored once
    for stem, rows in tables.items():
        table = Table(plan, judges, scored)
        add_rows(table, rows)
        if BEST in rows:
            table.add_differences(TITLES[BEST])
        table.add_trainings()
        table.write(stem)
        suffix = stem.removeprefix("table")
        save_figure_6(plan, rows, plan.out / f"figure6{suffix}.png")
        if not plan.knows_truth:
            save_generated(plan, rows, plan.out / f"generated{suffix}.png")
        save_plane(table, plan.out / f"plane{suffix}.png")
        written = [f"figure6{suffix}.png", f"plane{suffix}.png"]
        if not plan.knows_truth:
            written.append(f"generated{suffix}.png")
        print(f"wrote {plan.out}/{', '.join(written)}")


@processes()
def main():
    parser = make_parser(__doc__)
    add_exam_arguments(parser)
    parser.add_argument("--no-dreambooth", action="store_true", help="leave out its row, which "
                        "takes most of the time")
    args = parser.parse_args()
    try:
        with claim(args.out):
            make_tables(args)
    except KeyboardInterrupt:
        hint = "the same command goes on after the last finished pictures"
        raise KeyboardInterrupt(f"stopped; {hint}") from None


if __name__ == "__main__":
    run(main, "make fewer pictures at once (--batch)")
