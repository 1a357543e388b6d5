"""Scores: folders of a plan become rows of numbers with intervals, and a table.

A row is one method: its folders, one for each seed that its adapter was trained with, are read by the
judges (judging.py), and every number is the mean over the trainings. FID compares with the held-out
photos of the same people, which have the scenes of the prompts; KID leaves out all pairs of one
person.

Intervals are over people and, if there are several trainings, over these as well (metrics.bootstrap_ci,
"two-way"): in each draw people are drawn anew, and so are trainings, and all rows get the same draws.
So a difference to another row is of the same people, and training k of one row is set against
training k of the other. Rows have as many trainings as each other, or one.
"""

import json
import sys
from functools import partial

import torch

from experiments.distances import GroupedFID, GroupedGaussian, StrangersKID
from experiments.makers import read_seconds
from metrics import bootstrap_ci, draw_people, fid, inception_score
from support.distributed import barrier, rank, world_size
from support.files import digest_tensors, load_or_compute, write_all

VERSION = 1  # of the distances: raised by hand when this code gives other ones
DRAWS = 1000  # of the bootstrap
FEW_DRAWS = 200  # of FIDs of more than MANY features: each takes a second
MANY = 512
COPIES = ("copy", "face copy")  # shown minus what real photos score
LAST = ["w", "trainings", "s/picture ↓", "N"]  # the columns that no judge fills


def format_cell(value):
    """A number, (number, low, high), text, or None, as the text of a cell."""
    if isinstance(value, tuple):
        number, low, high = map(format_cell, value)
        return f"{number} ({low} … {high})"
    if value is None:
        return "–"
    if isinstance(value, (int, str)):
        return str(value)
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3f}"


def subtract(statistic, other):
    """The difference of two statistics of the same people and runs."""
    return lambda *drawn: statistic(*drawn) - other(*drawn)


class Pictures:
    """What is known of a folder of pictures. seen: for each person a tensor, see Judges.judge.

    people: the numbers of those who have pictures in it. is_shuffled: they show somebody else.
    """

    def __init__(self, seen, real, is_shuffled=False):
        self.seen = seen
        self.is_shuffled = is_shuffled
        self.people = [p for p, embeds in enumerate(seen["embeds"]) if len(embeds)]
        self.real_faces = real.get("faces")
        if "features" in real:
            self.prepare_distances(real["features"], seen["features"])

    def prepare_distances(self, real, made):
        """What FID and KID need, of the features of real photos and of these pictures."""
        self.real = real
        self.kid = StrangersKID(real, made)
        self.grouped_fid = None
        # A covariance a person costs more than it saves where these are large, or pictures are few.
        width = self.real[0].shape[1]
        if width <= MANY and min(len(self), sum(map(len, self.real))) > 2 * width:
            gaussians = GroupedGaussian(self.real), GroupedGaussian(made)
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

    def measure_draws(self):
        """{people: FID} of everybody and of all that the bootstrap draws; kept on disk."""
        samples = [self.people]
        draws = DRAWS if self.real[0].shape[1] <= MANY else FEW_DRAWS
        for drawn in draw_people(len(self.people), draws):
            samples.append([self.people[i] for i in drawn])

        def compute():
            distances = [self.measure_fid(people) for people in samples]
            return {"fid": torch.tensor(distances, dtype=torch.float64)}

        key = digest_tensors(*self.real, *self.seen["features"])
        found = load_or_compute(compute, "distances of draws", VERSION, draws, key)
        return {tuple(people): float(d) for people, d in zip(samples, found["fid"])}

    def measure_face_distance(self, people):
        """The Fréchet distance of what the judge of faces sees, to the same photos."""
        real = torch.cat([self.real_faces[p] for p in people])
        return fid(real, self.pick("faces", people))

    def mean(self, name):
        """statistic(people) of numbers: their mean over all pictures."""
        sums = torch.stack([values.double().sum() for values in self.seen[name]])
        counts = torch.tensor([len(values) for values in self.seen[name]])
        return lambda people: float(sums[people].sum() / counts[people].sum())

    def __len__(self):
        return sum(len(embeds) for embeds in self.seen["embeds"])


class Row:
    """A method: its Pictures, of one training or of several.

    Functions of (people, runs) are means over the trainings `runs`, numbers of `trainings`; a run
    beyond the last begins at the first again.
    """

    def __init__(self, *trainings):
        self.trainings = trainings
        self.people = trainings[0].people
        self.is_shuffled = trainings[0].is_shuffled
        self.runs = range(len(trainings)) if len(trainings) > 1 else ()

    def __len__(self):
        return sum(map(len, self.trainings))

    def average(self, measures):
        """statistic(people, runs) from a statistic(people) for each training."""

        def statistic(people, runs=(0,)):
            values = [measures[run % len(measures)](people) for run in runs]
            return sum(values) / len(values)

        return statistic

    def mean(self, name):
        """statistic(people, runs) of numbers that are known of each picture."""
        return self.average([pictures.mean(name) for pictures in self.trainings])

    def kid(self):
        return self.average([pictures.kid for pictures in self.trainings])

    def face_distance(self):
        return self.average([pictures.measure_face_distance for pictures in self.trainings])

    def score(self, marginal):
        """The inception score."""

        def measure(pictures):
            return lambda people: inception_score(pictures.pick("probs", people), marginal)

        return self.average([measure(pictures) for pictures in self.trainings])

    def fid(self):
        """The bootstrap draws the same people for every row, so each FID is measured once."""

        def measure(pictures):
            known = pictures.measure_draws()

            def distance(people):
                people = tuple(people)
                return known[people] if people in known else pictures.measure_fid(people)

            return distance

        return self.average([measure(pictures) for pictures in self.trainings])


MEANINGS = {  # of the columns, for the text under the table
    "FID ↓": """FID is to held-out photos of the same people, which have the scenes of the prompts.
KID leaves out pairs of one person.""",
    "prompt ↑": """Identity, prompt: right attributes among those that the prompt leaves visible.
FeatureNet's FID does not see blur and noise, its IS counts a guess for the hair under a hat, too.""",
    "CLIP-I ↑": "CLIP-I: cosine to the person's other held-out photos.",
    "rank-1 ↑": """Face identity: the same by the judge of faces. Rank-1: the share of pictures that
are nearer to their own person's photos than to anybody else's of the {people}; by chance
{chance:.3f}. Face distance: Fréchet, of that judge's features, to the held-out photos; no FID of
papers.""",
    "copy": """Copy: cosine to the nearest reference minus CLIP-I, or minus face identity, shown minus
what other real photos score ({copies}).""",
}
OF_DREAMBOOTH = """DreamBooth's seconds include fine-tuning, and a share of the class pictures if
these were not there yet."""
OF_SETS = {  # columns that say something of all pictures together; of the others each is a mean
    "FID ↓": Row.fid,
    "KID ↓": Row.kid,
    "IS uniform ↑": partial(Row.score, marginal="uniform"),
    "IS empirical ↑": partial(Row.score, marginal="empirical"),
    "face distance ↓": Row.face_distance,
}


class Table:
    """Scores folders, prints every row at once, and keeps all for table.md and table.json.

    scored: {folders: (Row, numbers)} of another table of the same plan; it is added to.
    """

    def __init__(self, plan, judges, scored=None):
        self.plan = plan
        self.judges = judges
        self.scored = {} if scored is None else scored
        self.numbers = {}  # title -> {column: number, or (number, low, high)}
        self.rows = {}  # title -> Row
        self.differences = {}  # title -> {column: (number, low, high)}, see add_differences
        self.lines = []
        self.others = self.read_photos("other-photos")
        self.columns = judges.columns + LAST
        # The mean copying of real photos: what a method copies is shown as the difference to it.
        self.natural = {}
        for column in COPIES:
            if column in self.columns and self.others:
                self.natural[column] = self.others.mean(column)(self.others.people)

    def print_head(self):
        if not self.lines:
            self.print_line("method", *self.columns)
            self.print_line(*["---"] * (1 + len(self.columns)))

    def print_line(self, *cells):
        self.lines.append(f"| {' | '.join(cells)} |")
        print(self.lines[-1], flush=True)

    def print_heading(self, text):
        self.print_head()
        self.print_line(f"*{text}*", *[""] * len(self.columns))

    def read(self, files, shots, targets, is_shuffled=False):
        return Pictures(self.judges.judge(files, shots, targets), self.judges.held, is_shuffled)

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
        return Row(self.read(files, shots, [None] * len(people), is_shuffled=shift != 0))

    def share_distances(self, folders):
        """Measure the FIDs of the folders of methods, shared out among the processes of torchrun."""
        if not self.judges.quality:
            return
        for folder in folders[rank() :: world_size()]:
            self.read_folder(folder).measure_draws()
        barrier()

    def read_folder(self, folder):
        """The Pictures that a method made."""
        people = range(len(self.plan.subjects))
        files = [self.plan.files(folder, p) for p in people]
        shots = [self.plan.shots(p) for p in people]
        targets = [self.plan.scenes(p) for p in people]
        return self.read(files, shots, targets)

    def add_folder(self, title, folder):
        """Score pictures that belong to no method, and print the row."""
        return self.add(title, Row(self.read_folder(folder)))

    def add_method(self, *names):
        """Score the pictures of a method, of all its trainings, and print the row."""
        title = self.plan.methods[names[0]].title
        if names in self.scored:
            row, numbers = self.scored[names]
            return self.keep(title, row, numbers)
        w = self.plan.methods[names[0]].guidance
        w = self.plan.settings.guidance if w is None else w
        seconds = [read_seconds(self.plan, name) for name in names]
        seconds = [value for value in seconds if value is not None]
        mean_seconds = sum(seconds) / len(seconds) if seconds else None
        row = Row(*map(self.read_folder, names))
        numbers = self.add(title, row, w, mean_seconds)
        self.scored[names] = (row, numbers)
        return numbers

    def add_round_trips(self, title):
        """The same for the real photos that went through the VAE: each has the scene of itself."""
        photos = [subject.held for subject in self.plan.subjects]
        files = [self.plan.files("round-trip", p, len(held)) for p, held in enumerate(photos)]
        targets = [torch.arange(len(held)) for held in photos]
        return self.add(title, Row(self.read(files, photos, targets)))

    def add(self, title, row, w=None, seconds=None):
        """Print a Row, if at least two people are in it. w: of eq. 11; seconds: of a picture."""
        if row is None or len(row.people) < 2:
            print(f"note: fewer than two people have pictures for the row: {title}")
            return None
        numbers = {}
        for column in self.judges.columns:
            if row.is_shuffled and column in OF_SETS:
                numbers[column] = None  # the real photos themselves, in another order
                continue
            statistic = self.measure(row, column)
            draws = self.count_draws(column)
            numbers[column] = self.estimate(row.people, row.runs, statistic, draws)
        numbers["w"] = w if w is None else f"{w:g}"
        numbers["trainings"] = len(row.trainings)
        numbers["s/picture ↓"] = seconds
        numbers["N"] = len(row)
        return self.keep(title, row, numbers)

    def keep(self, title, row, numbers):
        self.rows[title] = row
        self.numbers[title] = numbers
        self.print_head()
        self.print_line(title, *map(format_cell, numbers.values()))
        return numbers

    def measure(self, row, column):
        """statistic(people, runs) of a column."""
        if column in OF_SETS:
            return OF_SETS[column](row)
        mean = row.mean(column)
        usual = self.natural.get(column, 0)
        return lambda *drawn: mean(*drawn) - usual

    def count_draws(self, column):
        """Draws of the bootstrap for a column."""
        if column != "FID ↓" or not self.judges.quality:
            return DRAWS
        width = self.judges.held["features"][0].shape[1]
        return DRAWS if width <= MANY else FEW_DRAWS

    @staticmethod
    def estimate(people, runs, statistic, draws=None):
        """(statistic, low, high): with the 95 % interval over people, and over runs if there are any."""
        value = statistic(people, runs) if runs else statistic(people)
        return value, *bootstrap_ci(people, statistic, draws or DRAWS, runs=runs)

    def add_differences(self, best):
        """Other rows minus the row `best`, with intervals over the same people and runs for both.

        They are narrower than those of each alone: all methods have the same people and noise.
        """
        columns = (self.distance_column, self.identity_column)
        names = [column.removesuffix(" ↓").removesuffix(" ↑") for column in columns]
        self.lines += ["", f"| minus {best} | {' | '.join(names)} |", "|---|---|---|"]
        of_best = self.rows[best]
        for title, row in self.rows.items():
            if title == best or row.is_shuffled:
                continue
            runs = max(row.runs, of_best.runs, key=len)
            cells = []
            for column in columns:
                difference = subtract(self.measure(row, column), self.measure(of_best, column))
                draws = self.count_draws(column)
                cells.append(self.estimate(row.people, runs, difference, draws))
            self.differences[title] = dict(zip(columns, cells))
            self.print_line(title, *map(format_cell, cells))

    def add_trainings(self):
        """FID and identity of each training of the rows that have several: how much is luck."""
        if not any(row.runs for row in self.rows.values()):
            return
        columns = (self.distance_column, self.identity_column)
        self.lines += ["", f"| each training | {' | '.join(columns)} |", "|---|---|---|"]
        for title, row in self.rows.items():
            if not row.runs:
                continue
            cells = []
            for column in columns:
                statistic = self.measure(row, column)
                values = [statistic(row.people, [run]) for run in row.runs]
                cells.append(", ".join(map(format_cell, values)))
            self.print_line(title, *cells)

    @property
    def distance_column(self):
        """FID, or without its judge the Fréchet distance of faces."""
        for column in ("FID ↓", "face distance ↓"):
            if column in self.columns:
                return column

    @property
    def identity_column(self):
        """The best measure of identity that there is."""
        for column in ("identity ↑", "face identity ↑", "CLIP-I ↑"):
            if column in self.columns:
                return column

    def write_note(self, command):
        """The text under the table: how it was made, and what its columns are."""
        settings = self.plan.settings
        judges = "\n".join(f"- {text}." for text in self.judges.names)
        people = len(self.plan.subjects)
        copies = ", ".join(f"{column}: {value:.3f}" for column, value in self.natural.items())
        known = dict(people=people, chance=1 / people, copies=copies or "there are none")
        shown = [text for column, text in MEANINGS.items() if column in self.columns]
        if any(method.dreambooth for method in self.plan.methods.values()):
            shown.append(OF_DREAMBOOTH)
        meanings = "\n".join(shown).format(**known)
        return f"""
`{command}`: {people} people never seen in training,
{settings.photos} prompts each, {settings.seeds} pictures a prompt,
{settings.steps} steps, seed {settings.seed}; w is that of eq. 11.
{judges}
In brackets: 95 % intervals over people and, of rows of several trainings, over these too: both are
drawn anew, with replacement, in each of {DRAWS} draws (of {self.distance_column[:-2]} \
{self.count_draws(self.distance_column)}). Numbers of such rows are means over the trainings.
{meanings}
"""

    def write(self, stem):
        """<stem>.md and .json in the plan's folder."""
        out = self.plan.out
        program = sys.argv[0].replace("\\", "/").removesuffix(".py").split("/")[-2:]
        command = " ".join(["python -m", ".".join(program), *sys.argv[1:]])
        note = self.write_note(command)
        content = {
            "command": command,
            "features": self.judges.quality and self.judges.quality.name,
            "judges": self.judges.names,
            "copy of real photos": self.natural,
            "methods": {name: method.describe() for name, method in self.plan.methods.items()},
            "settings": {name: str(value) for name, value in vars(self.plan.settings).items()},
            "rows": self.numbers,
            "differences": self.differences,
        }
        text = "\n".join([*self.lines, note])
        write_all({out / f"{stem}.md": text, out / f"{stem}.json": json.dumps(content, indent=1)})
        print(f"{note}wrote {out}/{stem}.md, {stem}.json")
