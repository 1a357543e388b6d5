"""The lectures do not go stale: what they run runs, what they print is printed, what they name exists."""

import builtins
import importlib
import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from course.listing import EXERCISES
from support.program import run

ROOT = Path(__file__).parent.parent
COURSE = ROOT / "course"
LECTURES = sorted(COURSE.glob("[1-6]-*.md"))
TEXTS = [path for path in [*LECTURES, COURSE / "answers.md", COURSE / "README.md"] if path.exists()]
SUITE = None  # run by another test of this suite

# Every command of the lectures -> the words that shorten it, added at its end: the last one counts.
# Commands run in the order of their lecture, in one folder, so the second may read what the first wrote.
COMMANDS = {
    # 1 to 3
    "python -m course.exercises start": SUITE,  # tests/test_exercises.py
    "python -m course.exercises check 1 2 3": SUITE,
    "python -m course.exercises check 4": SUITE,
    "python -m course.exercises check 5 6": SUITE,
    "python sample.py --sampler ddpm --steps 1000 --seed 7 --out runs/ddpm.png": "--steps 3 --n 1",
    "python sample.py --sampler dpm --steps 10 --seed 7 --out runs/dpm.png": "--steps 3 --n 1",
    "python sample.py --guidance 1 --seed 7 --out runs/w1.png": "--steps 2 --n 1",
    "python sample.py --guidance 8 --seed 7 --out runs/w8.png": "--steps 2 --n 1",
}
# What is smaller in the lectures' Python when it is tested; the output is then not compared.
SHORTER = {"STEPS = 1000": "STEPS = 20", "PICTURES = 60": "PICTURES = 2", "PEOPLE = 30": "PEOPLE = 2"}

NAME = re.compile(r"`((?:[a-z]\w*\.)+[A-Za-z_]\w*)(?:\([^`]*\))?`")  # `ddpm.q_sample`, `ddpm.guide(…)`
FILE = re.compile(r"`([\w./*-]+(?:\.\w+|/))`")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
TEST = re.compile(r"`(test_\w+)`")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

of_each_lecture = pytest.mark.parametrize("path", LECTURES, ids=lambda path: path.stem)
of_each_text = pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)


def read(path):
    return path.read_text(encoding="utf-8")


def find_blocks(text, language):
    """The fenced blocks of a language, each with the block that follows it after nothing but space."""
    fences = list(FENCE.finditer(text))
    blocks = []
    for fence, next_fence in zip(fences, [*fences[1:], None]):
        if fence[1] != language:
            continue
        output = None
        if next_fence and next_fence[1] == "" and not text[fence.end() : next_fence.start()].strip():
            output = next_fence[2]
        blocks.append((fence[2], output))
    return blocks


def find_commands(text):
    """The commands of the bash blocks, one line each, without comments."""
    commands = []
    for block, _ in find_blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                commands.append(" ".join(words))
    return commands


def run_command(monkeypatch, words):
    """Call the main() of `python sample.py …` or `python -m experiments.sweeps …`."""
    name = words[2] if words[1] == "-m" else words[1].removesuffix(".py")
    arguments = words[3:] if words[1] == "-m" else words[2:]
    monkeypatch.setattr("sys.argv", [name, *arguments])
    run(importlib.import_module(name).main)


def is_same(printed, promised):
    """Whether two outputs agree word by word, numbers up to 2 % or one of the last digit's size."""
    left, right = printed.split(), promised.split()
    if len(left) != len(right):
        return False
    for a, b in zip(left, right):
        try:
            if float(a) != pytest.approx(float(b), rel=0.02, abs=0.011):
                return False
        except ValueError:
            if a != b:
                return False
    return True


def exists(name):
    """Whether a dotted name that begins with a module or folder of ours leads to something."""
    parts = name.split(".")
    for k in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:k]))
        except ImportError:
            continue
        for part in parts[k:]:
            if not hasattr(thing, part):
                return False
            thing = getattr(thing, part)
        return True
    return False


def begins_with_ours(word, cut):
    first = word.split(cut)[0]
    return (ROOT / first).exists() or (ROOT / f"{first}.py").exists()


# ---------------------------------------------------------------- what runs

@of_each_lecture
def test_every_command_of_a_lecture_runs_in_a_shortened_form(monkeypatch, workdir, path):
    for command in find_commands(read(path)):
        assert command in COMMANDS, f"{path.name}: shorten this command in COMMANDS: {command}"
        if COMMANDS[command] is not SUITE:
            run_command(monkeypatch, shlex.split(f"{command} {COMMANDS[command]}"))


@of_each_lecture
def test_the_python_of_a_lecture_runs_and_prints_what_stands_below_it(monkeypatch, path):
    monkeypatch.chdir(ROOT)
    for code, promised in find_blocks(read(path), "python"):
        shorter = code
        for old, new in SHORTER.items():
            shorter = shorter.replace(old, new)
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(compile(shorter, path.name, "exec"), {"__builtins__": builtins, "__name__": "lecture"})
        if promised is not None and shorter == code:
            assert is_same(printed.getvalue(), promised), f"{path.name} prints\n{printed.getvalue()}"


# ---------------------------------------------------------------- what is named

@of_each_text
def test_everything_that_a_lecture_names_exists(path):
    text = read(path)
    names = [name for name in NAME.findall(text) if begins_with_ours(name, ".")]
    names = [name for name in names if not name.endswith(".py")]
    missing = [name for name in names if not exists(name)]
    files = [file for file in FILE.findall(text) if "/" in file or file.endswith(".py")]
    files = [file for file in files if begins_with_ours(file, "/") and not file.startswith("runs/")]
    missing += [file for file in files if not list(ROOT.glob(file))]
    tests = "\n".join(read(file) for file in (ROOT / "tests").glob("test_*.py"))
    missing += [test for test in TEST.findall(text) if f"def {test}(" not in tests]
    assert not missing


@of_each_text
def test_every_link_and_figure_of_a_lecture_leads_to_a_file(path):
    missing = [link for link in LINK.findall(read(path)) if not (path.parent / link).exists()]
    assert not missing


@of_each_lecture
def test_a_lecture_has_the_exercises_of_its_number_in_the_list_and_no_others(path):
    text = read(path)
    section = re.search(r"^## Exercises$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"{path.name} has no heading '## Exercises'"
    mentioned = {int(number) for number in re.findall(r"^\*\*(\d+)\*\*", section[1], re.MULTILINE)}
    lecture = int(path.name[0])
    assert mentioned == {one.number for one in EXERCISES if one.lecture == lecture}


@of_each_lecture
def test_a_lecture_is_short_enough_to_teach_and_has_answers(path):
    lines = read(path).splitlines()
    assert len(lines) <= 200
    assert max(map(len, lines)) <= 120
    assert "predict first" in read(path).lower()
    assert f"## Lecture {path.name[0]}" in read(COURSE / "answers.md")
