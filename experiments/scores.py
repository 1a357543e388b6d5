"""Scores: folders of a plan become rows of numbers with intervals over people, and a table.

A row is read from its folder by the judges (judging.py). FID compares with the held-out photos of
the same people, which have the scenes of the prompts; KID leaves out all pairs of one person.
"""

import json
import sys

import torch

from experiments.distances import GroupedFID, GroupedGaussian, StrangersKID
from experiments.makers import read_seconds
from metrics import bootstrap_ci, fid, inception_score
from support.files import write_all
from train import DEFAULTS

DRAWS = 1000  # of the bootstrap
FEW_DRAWS = 200  # of FIDs of more than MANY features: each takes a second
MANY = 512
COPIES = ("copy", "face copy")  # shown minus what real photos score


def format_cell(value):
    """A number, (number, low, high), or None, as the text of a cell."""
    if isinstance(value, tuple):
        number, low, high = map(format_cell, value)
        return f"{number} ({low} … {high})"
    if value is None:
        return "–"
    if isinstance(value, int):
        return str(value)
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


class Row:
    """What is known of a row of the table. seen: for each person a tensor, see Judges.judge.

    people: the numbers of those who have pictures in it. is_shuffled: they show somebody else.
    """

    def __init__(self, seen, real, is_shuffled=False):
        self.seen = seen
        self.is_shuffled = is_shuffled
        counts = [len(features) for features in seen["features"]]
        self.people = [p for p, count in enumerate(counts) if count]
        self.real = real["features"]
        self.kid = StrangersKID(self.real, seen["features"])
        self.grouped_fid = None
        # A covariance a person costs more than it saves where these are large, or pictures are few.
        width = self.real[0].shape[1]
        if width <= MANY and min(len(self), sum(map(len, self.real))) > 2 * width:
            gaussians = GroupedGaussian(self.real), GroupedGaussian(seen["features"])
            self.grouped_fid = GroupedFID(*gaussians)

    def pick(self, name, people):
        """(n, …): what is known of the pictures of these people, one after another."""
        return torch.cat([self.seen[name][p] for p in people])

    def measure_fid(self, people):
        """FID of the pictures of these people to their real photos."""
        if self.grouped_fid:
            return self.grouped_fid(people)
        real = torch.cat([self.real[p] for p in people])
        return fid(real, self.pick("features", people))

    def mean(self, name):
        """statistic(people) of numbers: their mean over all pictures."""
        sums = torch.stack([values.double().sum() for values in self.seen[name]])
        counts = torch.tensor([len(values) for values in self.seen[name]])
        return lambda people: float(sums[people].sum() / counts[people].sum())

    def __len__(self):
        return sum(len(features) for features in self.seen["features"])


class Table:
    """Scores folders, prints every row at once, and keeps all for table.md and table.json."""

    def __init__(self, plan, judges):
        self.plan = plan
        self.judges = judges
        self.numbers = {}  # title -> {column: number, or (number, low, high)}
        self.rows = {}  # title -> Row
        self.distances = {}  # (title, people) -> FID: intervals of rows and of differences share it
        self.lines = []
        self.others = self.read_photos("other-photos")
        self.columns = judges.columns + ["s/picture ↓", "N"]
        # The mean copying of real photos: what a method copies is shown as the difference to it.
        self.natural = {}
        for column in COPIES:
            if column in self.columns and self.others:
                self.natural[column] = self.others.mean(column)(self.others.people)
        self.print_line("method", *self.columns)
        self.print_line(*["---"] * (1 + len(self.columns)))

    def print_line(self, *cells):
        self.lines.append(f"| {' | '.join(cells)} |")
        print(self.lines[-1], flush=True)

    def print_heading(self, text):
        self.print_line(f"*{text}*", *[""] * len(self.columns))

    def read(self, files, shots, targets, is_shuffled=False):
        return Row(self.judges.judge(files, shots, targets), self.judges.held, is_shuffled)

    def read_photos(self, folder, shift=0):
        """The Row of a folder of real photos, None if there are none.

        shift: each person has the photos of the one so many places on: a stranger's.
        """
        people = range(len(self.plan.subjects))
        photos = [self.plan.photo_files((p + shift) % len(people))[folder] for p in people]
        files = [some for some, _ in photos]
        shots = [some for _, some in photos]
        if not any(files):
            return None
        return self.read(files, shots, [None] * len(people), is_shuffled=shift != 0)

    def add_folder(self, title, folder, seconds=None):
        """Score the pictures of a method and print the row."""
        people = range(len(self.plan.subjects))
        files = [self.plan.files(folder, p) for p in people]
        shots = [self.plan.shots(p) for p in people]
        targets = [self.plan.scenes(p) for p in people]
        return self.add(title, self.read(files, shots, targets), seconds)

    def add_method(self, name):
        title = self.plan.methods[name].title
        return self.add_folder(title, name, read_seconds(self.plan, name))

    def add_round_trips(self, title):
        """The same for the real photos that went through the VAE: each has the scene of itself."""
        photos = [subject.held for subject in self.plan.subjects]
        files = [self.plan.files("round-trip", p, len(held)) for p, held in enumerate(photos)]
        targets = [torch.arange(len(held)) for held in photos]
        return self.add(title, self.read(files, photos, targets))

    def add(self, title, row, seconds=None):
        """Print a Row, if at least two people are in it."""
        if row is None or len(row.people) < 2:
            print(f"note: fewer than two people have pictures for the row: {title}")
            return None
        self.rows[title] = row
        scores = {
            "FID ↓": lambda people: self.measure_fid(title, people),
            "KID ↓": row.kid,
            "IS uniform ↑": lambda people: inception_score(row.pick("probs", people), "uniform"),
            "IS empirical ↑": lambda people: inception_score(row.pick("probs", people)),
        }
        numbers = {}
        for column in self.columns[:-2]:
            if row.is_shuffled and column in scores:
                numbers[column] = None  # the real photos themselves, in another order
                continue
            statistic = scores.get(column) or self.measure_mean(row, column)
            draws = self.fid_draws if column == "FID ↓" else DRAWS
            numbers[column] = self.estimate(row.people, statistic, draws)
        numbers["s/picture ↓"] = seconds
        numbers["N"] = len(row)
        self.numbers[title] = numbers
        self.print_line(title, *map(format_cell, numbers.values()))
        return numbers

    def measure_mean(self, row, column):
        mean = row.mean(column)
        usual = self.natural.get(column, 0)
        return lambda people: mean(people) - usual

    def measure_fid(self, title, people):
        """Row.measure_fid. The bootstrap draws the same people for every row."""
        key = (title, tuple(people))
        if key not in self.distances:
            self.distances[key] = self.rows[title].measure_fid(people)
        return self.distances[key]

    @property
    def fid_draws(self):
        width = self.judges.held["features"][0].shape[1]
        return DRAWS if width <= MANY else FEW_DRAWS

    @staticmethod
    def estimate(people, statistic, draws=DRAWS):
        """(statistic(people), low, high): with the 95 % interval over people."""
        return statistic(people), *bootstrap_ci(people, statistic, draws)

    def add_differences(self, best):
        """Other rows minus the row `best`, with intervals over the same people for both.

        They are narrower than those of each alone: all methods have the same people and noise.
        """
        column = self.identity_column
        name = column.removesuffix(" ↑")
        self.lines += ["", f"| minus {best} | FID | {name} |", "|---|---|---|"]
        mean_of_best = self.rows[best].mean(column)
        for title, row in self.rows.items():
            if title == best or row.is_shuffled:
                continue
            mean = row.mean(column)

            def subtract_fids(people):
                return self.measure_fid(title, people) - self.measure_fid(best, people)

            def subtract_means(people):
                return mean(people) - mean_of_best(people)

            by_fid = self.estimate(row.people, subtract_fids, self.fid_draws)
            by_identity = self.estimate(row.people, subtract_means)
            self.print_line(title, format_cell(by_fid), format_cell(by_identity))

    @property
    def identity_column(self):
        """The best measure of identity that there is."""
        for column in ("identity ↑", "face identity ↑", "CLIP-I ↑"):
            if column in self.columns:
                return column

    def write_note(self, command, w):
        """The text under the table: how it was made, and what its columns are."""
        settings = self.plan.settings
        judges = "\n".join(f"- {text}." for text in self.judges.names)
        copies = ", ".join(f"{column}: {value:.3f}" for column, value in self.natural.items())
        return f"""
`{command}`: {len(self.plan.subjects)} people never seen in training,
{settings.photos} prompts each, {settings.seeds} pictures a prompt,
{w or f"w = {settings.guidance}"}, {settings.steps} steps, seed {settings.seed}.
{judges}
In brackets: 95 % intervals over people ({DRAWS} draws, of FID {self.fid_draws}).
FID is to held-out photos of the same people, which have the scenes of the prompts; FeatureNet's
does not see blur and noise. KID leaves out pairs of one person. Identity, prompt: right attributes
among those that the prompt leaves visible. CLIP-I, face identity: cosine to the person's other
held-out photos. Copy: cosine to the nearest reference minus that, shown minus what other real
photos score ({copies or "there are none"}). DreamBooth's seconds include
fine-tuning, and a share of the class pictures if these were not there yet. IS counts a guess for
the hair under a hat, too.
"""

    def write(self, stem, w=None):
        """<stem>.md and .json in the plan's folder. w: what is said of the guidance, if it varies."""
        out = self.plan.out
        program = sys.argv[0].replace("\\", "/").removesuffix(".py").split("/")[-2:]
        command = " ".join(["python -m", ".".join(program), *sys.argv[1:]])
        note = self.write_note(command, w)
        content = {
            "command": command,
            "features": self.judges.quality.name,
            "judges": self.judges.names,
            "copy of real photos": self.natural,
            "dreambooth": dict(zip(("steps", "batch", "lr"), DEFAULTS["dreambooth", False])),
            "settings": {name: str(value) for name, value in vars(self.plan.settings).items()},
            "rows": self.numbers,
        }
        text = "\n".join([*self.lines, note])
        write_all({out / f"{stem}.md": text, out / f"{stem}.json": json.dumps(content, indent=1)})
        print(f"{note}wrote {out}/{stem}.md, {stem}.json")
