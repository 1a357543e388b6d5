"""What is said of the pictures of an exam: rows of numbers with intervals over people, as a table."""

import json
import sys
from functools import partial

import torch
import torch.nn.functional as F

from experiments.exam import REFERENCES, embed_pictures
from metrics import bootstrap_ci, compare_embeddings, fid, inception_score, kernel_distance
from support.checkpoints import TINY
from support.files import write_text
from support.pictures import to_tensor
from toyfaces.judge import FeatureNet, grade
from train import DEFAULTS

COLUMNS = ("FID ↓", "KID ↓", "IS uniform ↑", "IS empirical ↑", "identity ↑", "prompt ↑", "copy",
           "CLIP-I ↑", "CLIP-T ↑", "s/picture ↓", "N")  # fmt: skip


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


class Table:
    """Scores pictures, prints every row at once, and keeps all for table.md and table.json."""

    def __init__(self, exam):
        self.exam = exam
        self.rows = {}  # name -> {column: number, or (number, low, high)}
        self.grades = {}  # name -> what FeatureNet says of every picture
        self.distances = {}  # (name, pictures) -> FID: intervals of rows and of differences share it
        self.lines = []
        device = exam.settings.device
        self.judge = FeatureNet.load(TINY / "feature_net").to(device)
        held = exam.pictures[:, REFERENCES : REFERENCES + exam.n]  # (P, n, 3, H, W)
        features = [self.judge.features(to_tensor(x).to(device)).detach().cpu() for x in held]
        self.real = torch.cat(features)
        pictures = torch.arange(len(self.real))
        self.groups = pictures.view(len(exam.people), -1)  # (P, n): the pictures of each person
        self.print_line("method", *COLUMNS)
        self.print_line(*["---"] * (1 + len(COLUMNS)))

    def print_line(self, *cells):
        self.lines.append(f"| {' | '.join(cells)} |")
        print(self.lines[-1], flush=True)

    def print_heading(self, text):
        self.print_line(f"*{text}*", *[""] * len(COLUMNS))

    @torch.inference_mode()
    def add(self, name, pictures, seconds=None, scenes=None):
        """Score n pictures of every person, uint8 (P·n, 3, H, W), and print the row.

        scenes (n,): the held-out photo whose scene each picture shows; None: the photos whose
        prompts every method is given.
        """
        exam = self.exam
        scenes = exam.target if scenes is None else scenes
        shots = exam.photos_of(scenes)
        device = exam.settings.device
        grades = grade(self.judge, pictures, [shot.labels for shot in shots], device)
        embeds = embed_pictures(exam.sd, pictures)

        # Cosines to the held-out photos, but for the one that has the scene of the picture.
        references, held, _ = exam.embeds.split([REFERENCES, exam.n, exam.n], dim=1)
        target = scenes if scenes[0] < exam.n else None
        clip_i, copied = compare_embeddings(embeds[self.groups], references, held, target)
        clip_t = self.compare_to_prompts(embeds, [shot.prompt for shot in shots])
        self.grades[name] = grades

        distance = partial(self.measure_fid, name)
        features, probs = grades["features"], grades["probs"]
        scores = {  # column -> statistic of some pictures, and how often the bootstrap draws
            "FID ↓": (distance, 200),
            "KID ↓": (lambda i: kernel_distance(self.real[i], features[i]), 200),
            "IS uniform ↑": (lambda i: inception_score(probs[i], "uniform"), 1000),
            "IS empirical ↑": (lambda i: inception_score(probs[i], "empirical"), 1000),
            "identity ↑": (lambda i: float(grades["identity"][i].mean()), 1000),
            "prompt ↑": (lambda i: float(grades["prompt"][i].mean()), 1000),
            "copy": (lambda i: float(copied[i].mean()), 1000),
        }
        row = {column: self.estimate(*score) for column, score in scores.items()}
        row["CLIP-I ↑"] = float(clip_i.mean())
        row["CLIP-T ↑"] = float(clip_t.mean())
        row["s/picture ↓"] = None if seconds is None else float(seconds) / len(pictures)
        row["N"] = len(pictures)
        self.rows[name] = row
        self.print_line(name, *map(format_cell, row.values()))
        return row

    def compare_to_prompts(self, embeds, prompts):
        """Cosine of each picture to its prompt, by the tiny CLIP."""
        sd = self.exam.sd
        ids = sd.tokenizer(prompts, padding=True, return_tensors="pt").input_ids
        text = sd.text_encoder(ids.to(self.exam.settings.device)).pooler_output.cpu()
        return F.cosine_similarity(embeds, text)

    def measure_fid(self, name, i):
        """FID of the pictures i of a row to the real photos of the same people.

        The bootstrap draws the same i for every row.
        """
        key = (name, i.numpy().tobytes())
        if key not in self.distances:
            self.distances[key] = fid(self.real[i], self.grades[name]["features"][i])
        return self.distances[key]

    def estimate(self, statistic, draws=1000):
        """(statistic(i) of all pictures i, low, high): the 95 % interval over people."""

        def of_people(groups):
            return statistic(torch.cat(groups))

        return statistic(self.groups.flatten()), *bootstrap_ci(self.groups, of_people, draws)

    def add_differences(self, best):
        """Other rows minus the row `best`, with intervals over the same people for both.

        They are narrower than those of each alone: all methods have the same people and noise.
        """
        self.lines += ["", f"| minus {best} | FID | identity |", "|---|---|---|"]
        for name in self.rows:
            if name == best:
                continue
            identity = self.grades[name]["identity"] - self.grades[best]["identity"]

            def subtract_fids(i):
                return self.measure_fid(name, i) - self.measure_fid(best, i)

            by_fid = self.estimate(subtract_fids, 200)
            by_identity = self.estimate(lambda i: float(identity[i].mean()))
            self.print_line(name, format_cell(by_fid), format_cell(by_identity))

    def write(self, out, stem, w=None):
        """out/<stem>.md and .json. w: what the note says of the guidance, if it is not one number."""
        settings = self.exam.settings
        program = sys.argv[0].replace("\\", "/").removesuffix(".py").split("/")[-2:]
        command = " ".join(["python -m", ".".join(program), *sys.argv[1:]])
        note = f"""
`{command}`: {settings.people} people never seen in training,
{settings.photos} prompts each, {settings.seeds} pictures a prompt,
{w or f"w = {settings.guidance}"}, {settings.steps} steps, seed {settings.seed}. FID, KID and IS: {self.judge.name}.
In brackets: 95 % intervals over people. Identity, prompt: right attributes among those that the
prompt leaves visible. CLIP-I: cosine to the person's other held-out photos; copy: cosine to the
nearest reference, minus CLIP-I. DreamBooth's seconds include fine-tuning, and a share of the class
pictures if these were not there yet. IS counts a guess for the hair under a hat, too.
"""
        content = {
            "command": command,
            "features": self.judge.name,
            "dreambooth": dict(zip(("steps", "batch", "lr"), DEFAULTS["dreambooth", False])),
            "settings": {name: str(value) for name, value in vars(settings).items()},
            "rows": self.rows,
        }
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / f"{stem}.md", "\n".join([*self.lines, note]))
        write_text(out / f"{stem}.json", json.dumps(content, indent=1))
        print(f"{note}wrote {out}/{stem}.md, {stem}.json")
