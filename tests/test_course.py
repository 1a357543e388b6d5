"""Lectures do not go stale: what they run runs and prints what they say, what they name exists."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import ddpm
from course.listing import EXERCISES
from support.program import run

ROOT = Path(__file__).parent.parent
COURSE = ROOT / "course"
LECTURES = sorted(COURSE.glob("[1-6]-*.md"))
TEXTS = [*LECTURES, COURSE / "answers.md", COURSE / "README.md"]

# Every command of the lectures -> the words that shorten it. They come last, so they count.
# ELSEWHERE: other tests run that program with these options, and it would be long even shortened.
ELSEWHERE = None
SHORT_DREAMBOOTH = "--steps 1 --batch 2 --class-images 2"
COMMANDS = {
    # 1: noise
    "python sample.py --sampler ddpm --steps 1000 --seed 7 --out runs/ddpm.png": "--steps 2 --n 1",
    "python sample.py --sampler dpm --steps 10 --seed 7 --out runs/dpm.png": "--steps 2 --n 1",
    # 4: several references
    "python train.py --agg selfattn": "--people 4 --steps 1 --batch 4",
    "python train.py --agg avg": ELSEWHERE,
    "python train.py --agg concat": ELSEWHERE,
    "python -m experiments.sweeps kinds --people 12 --seeds 1 --steps 10 --guidance 4": ELSEWHERE,
    # 5: DreamBooth
    "python train.py --method dreambooth --images runs/photos --noun person --prior-weight 0"
    " --out runs/without-prior": SHORT_DREAMBOOTH,
    "python train.py --method dreambooth --images runs/photos --noun person --out runs/with-prior":
        SHORT_DREAMBOOTH,
    'python sample.py --lam 0 --guidance 1 --prompt "a photo of a person" --n 64 --out runs/base.png':
        "--n 2 --steps 1",
    'python sample.py --model runs/without-prior --guidance 1 --prompt "a photo of a person" --n 64'
    " --out runs/without.png": "--n 2 --steps 1",
    'python sample.py --model runs/with-prior --guidance 1 --prompt "a photo of a person" --n 64'
    " --out runs/with.png": "--n 2 --steps 1",
    "python metrics.py runs/base_pictures runs/without_pictures --inception toy": "",
    "python metrics.py runs/base_pictures runs/with_pictures --inception toy": "",
    "python train.py --method dreambooth --images runs/photos --noun person --lora 4 --out runs/lora":
        SHORT_DREAMBOOTH,
    "python sample.py --lora runs/lora/pytorch_lora_weights.safetensors --guidance 1"
    ' --prompt "a photo of a person" --n 64 --out runs/lora.png': "--n 2 --steps 1",
    "python metrics.py runs/base_pictures runs/lora_pictures --inception toy": "",
    # 6: metrics; tests/test_train.py resumes, tests/test_table1.py makes the table
    "python train.py --agg selfattn --resume": ELSEWHERE,
    "python -m experiments.table1 --no-dreambooth --selfattn runs/selfattn/ip-adapter.safetensors"
    " --people 12 --seeds 2 --steps 10 --out runs/small-table": ELSEWHERE,
    "python metrics.py runs/small-table/real runs/small-table/other-photos --inception toy": ELSEWHERE,
}
# What is smaller when the Python of a lecture is tested; what it prints is then not compared.
SHORTER = {"PICTURES = 60": "PICTURES = 1", "steps=20": "steps=2", "PEOPLE = 30": "PEOPLE = 2"}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")
NAME = re.compile(r"`([a-z]\w*(?:\.\w+)+)(?:\([^`]*\))?`")  # `ddpm.q_sample`, `ddpm.guide(…)`
FILE = re.compile(r"`([\w./*-]+)`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
TEST = re.compile(r"`(test_\w+)`")

of_each_lecture = pytest.mark.parametrize("path", LECTURES, ids=lambda path: path.stem)
of_each_text = pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)


def read(path):
    return path.read_text(encoding="utf-8")


def find_blocks(text):
    """The fenced blocks: (language, content, the block of output right below it or None)."""
    fences = list(FENCE.finditer(text))
    blocks = []
    for fence, below in zip(fences, [*fences[1:], None]):
        is_output = below and below[1] == "" and not text[fence.end() : below.start()].strip()
        blocks.append((fence[1], fence[2], below[2] if is_output else None))
    return blocks


def find_commands(block):
    """The commands of a bash block, without comments, each on one line with single spaces."""
    lines = block.replace("\\\n", " ").splitlines()
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in lines]
    return [" ".join(line.split()) for line in lines if line.strip()]


def sample_dpm_in_two_steps(eps_fn, x, schedule, steps, generator=None):
    """The sampler of the sheets that train.py draws at its end; there, no option shortens it."""
    return ddpm.sample_dpm(eps_fn, x, schedule, min(steps, 2), generator)


def run_shortened(monkeypatch, command):
    """Call the main() of `python sample.py …` or `python -m experiments.sweeps …`."""
    assert command in COMMANDS, f"say in COMMANDS how to shorten: {command}"
    if COMMANDS[command] is ELSEWHERE:
        return
    words = shlex.split(f"{command} {COMMANDS[command]}")[1:]
    words = words[1:] if words[0] == "-m" else words
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", words)
        patch.setitem(ddpm.SAMPLERS, "dpm", sample_dpm_in_two_steps)
        run(importlib.import_module(words[0].removesuffix(".py")).main)


def run_python(code, promised, capsys):
    """Run a block, shortened; if nothing was to be shortened, compare what it prints."""
    shorter = code
    for old, new in SHORTER.items():
        shorter = shorter.replace(old, new)
    capsys.readouterr()
    exec(compile(shorter, "the lecture", "exec"), {"__name__": "lecture"})
    printed = capsys.readouterr().out
    if promised is not None and shorter == code:
        assert is_same(printed, promised), f"promised\n{promised}\nprinted\n{printed}"


def is_same(printed, promised):
    """Whether two outputs agree: the words exactly, numbers to 2 % or one in the last digit."""
    if NUMBER.sub("0", printed).split() != NUMBER.sub("0", promised).split():
        return False
    for left, right in zip(NUMBER.findall(printed), NUMBER.findall(promised)):
        decimals = len(right.partition(".")[2])
        last_digit = 1.01 * 10**-decimals if decimals else 0
        if float(left) != pytest.approx(float(right), rel=0.02, abs=last_digit):
            return False
    return True


def is_importable(name):
    """Whether a dotted name leads to a module of ours, or to something in one."""
    parts = name.split(".")
    thing = None
    for k, part in enumerate(parts):
        if hasattr(thing, part):
            thing = getattr(thing, part)
            continue
        try:
            thing = importlib.import_module(".".join(parts[: k + 1]))
        except ImportError:
            return False
    return True


def is_ours(first):
    return (ROOT / first).exists() or (ROOT / f"{first}.py").exists()


# ---------------------------------------------------------------- what runs


@of_each_lecture
def test_what_a_lecture_runs_runs_and_prints_what_it_says(monkeypatch, workdir, capsys, path):
    (workdir / "weights").symlink_to(ROOT / "weights")
    for language, block, promised in find_blocks(read(path)):
        if language == "python":
            run_python(block, promised, capsys)
        if language == "bash":
            for command in find_commands(block):
                run_shortened(monkeypatch, command)


def test_outputs_are_compared_to_the_last_digit_that_stands_there():
    assert is_same("w = 4:  1.413 kinds", "w = 4: 1.412 kinds")
    for other in ("w = 4: 1.5 kinds", "w = 5: 1.412 kinds", "w = 4: 1.412 kind", "w = 4: 1.412"):
        assert not is_same(other, "w = 4: 1.412 kinds")


# ---------------------------------------------------------------- what is named


@of_each_text
def test_every_function_file_and_test_that_a_lecture_names_exists(path):
    text = read(path)
    names = [name for name in NAME.findall(text) if is_ours(name.split(".")[0])]
    files = [file for file in FILE.findall(text) if file.endswith((".py", "/", ".md"))]
    tests = "\n".join(read(file) for file in (ROOT / "tests").glob("test_*.py"))
    missing = [name for name in names if not name.endswith(".py") and not is_importable(name)]
    for file in files:
        found = [*ROOT.glob(file), *COURSE.glob(file)]
        if not found and not file.startswith("runs/"):
            missing.append(file)
    missing += [test for test in TEST.findall(text) if f"def {test}(" not in tests]
    assert not missing


@of_each_text
def test_every_link_and_figure_of_a_lecture_leads_to_a_file(path):
    missing = [link for link in LINK.findall(read(path)) if not (path.parent / link).exists()]
    assert not missing


@of_each_lecture
def test_a_lecture_has_the_exercises_of_its_number_and_no_others(path):
    section = read(path).partition("\n## Exercises\n")[2]
    numbers = {int(number) for number in re.findall(r"\*\*(\d+)\*\* `", section)}
    assert numbers == {one.number for one in EXERCISES if one.lecture == int(path.name[0])}


@of_each_lecture
def test_a_lecture_fits_into_90_minutes_asks_for_predictions_and_has_answers(path):
    lines = read(path).splitlines()
    assert len(lines) <= 200 and max(map(len, lines)) <= 120
    assert "**Predict first:**" in read(path)
    assert f"\n## Lecture {path.name[0]}\n" in read(COURSE / "answers.md")
