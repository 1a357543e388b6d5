"""Grade an exercise: import a student's module in place of ours, and run the tests that claim something.

The tests are the repository's; so are all other modules, and the functions of the other exercises.
The module under test is the student's whole file, with his helpers, imports and constants.
"""

import ast
import os
import sys
import traceback
import types
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from course.listing import find_exercise
from course.stubs import ROOT, is_untouched, use_ours_elsewhere

TESTS = ROOT / "tests"


@dataclass
class Verdict:
    """What `check` says of an exercise."""

    status: str  # "not begun", "wrong" or "right"
    claim: str = ""  # if wrong: the first claim that does not hold, in words
    seen: str = ""  # what came out, or the line that failed
    hint: str = ""
    stopped: bool = False  # the process that graded it hung or ended


def grade(exercise, source, file):
    """The verdict on an exercise. source: of the student's module; file: its path, for messages."""
    try:
        tree = ast.parse(source)
        use_ours_elsewhere(exercise, tree)
    except SyntaxError as error:
        return Verdict("wrong", f"{exercise.file}, line {error.lineno}: {error.msg}")
    except ValueError as error:
        return Verdict("wrong", str(error))
    if is_untouched(exercise, tree):
        return Verdict("not begun")
    return run_claims(exercise, tree, file)


def run_claims(exercise, tree, file):
    """The verdict of the exercise's tests on a syntax tree."""
    with fresh_modules():
        try:
            load_module(exercise.module, tree, file)
        except Exception as error:
            return Verdict("wrong", "the file cannot be imported", describe(error, file))
        tests = import_module(f"test_{exercise.module}")
        for name in exercise.tests:
            test = getattr(tests, name)
            for case in list_cases(test):
                error = find_error(test, case)
                if error is not None:
                    claim = write_claim(name, case)
                    return Verdict("wrong", claim, describe(error, file), exercise.hints.get(name, ""))
    return Verdict("right")


# ---------------------------------------------------------------- the module under test

@contextmanager
def fresh_modules():
    """Inside, our ten modules and their tests are imported anew; afterwards all is as it was."""
    import_module("conftest")  # its helpers serve all tests: it is imported once, with our modules
    modules = {path.stem for path in [*ROOT.glob("*.py"), *TESTS.glob("test_*.py")]}
    before = {name: module for name, module in sys.modules.items() if name in modules}
    for name in before:
        del sys.modules[name]
    try:
        yield
    finally:
        for name in modules:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def load_module(name, tree, file):
    """Import a syntax tree as the module `name`: everything that imports it gets this one."""
    module = types.ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module
    exec(compile(tree, str(file), "exec"), vars(module))


# ---------------------------------------------------------------- the claims

def list_cases(test):
    """The arguments of every case of a test, by its @pytest.mark.parametrize: a list of dicts."""
    cases = [{}]
    for mark in getattr(test, "pytestmark", []):
        if mark.name == "parametrize":
            names = [name.strip() for name in mark.args[0].split(",")]
            rows = [row if len(names) > 1 else [row] for row in mark.args[1]]
            arguments = [dict(zip(names, row, strict=True)) for row in rows]
            cases = [{**case, **more} for case in cases for more in arguments]
    return cases


def find_error(test, case):
    """What a test raises; None if it passes. Ctrl-C is nobody's mistake."""
    try:
        test(**case)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # pytest's own are no Exceptions, SystemExit is none
        return error
    return None


def write_claim(name, case):
    """test_eq10_noise_has_variance_beta, {"t": 3} -> "eq. 10: noise has variance beta (t = 3)"."""
    words = name.removeprefix("test_").split("_")
    first = words[0]
    if first.startswith("eq") and first[2:].isdigit():
        words[0] = f"eq. {first[2:]}:"
    if first.startswith("alg") and first[3:].isdigit():
        words[0] = f"Algorithm {first[3:]}:"
    text = " ".join(words)
    if case:
        values = ", ".join(f"{key} = {value}" for key, value in case.items())
        text = f"{text} ({values})"
    return text


def describe(error, file):
    """Where an error arose, in the student's file or else in the test, and what it says; one line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(file)]
    tests = [frame for frame in frames if Path(frame.filename).parent == TESTS]
    reason = f"{type(error).__name__}: {find_gist(error)}"
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {reason}"
    if own:
        return f"{Path(file).name}, line {own[-1].lineno}: {reason}"
    tests = [frame for frame in tests if frame.name.startswith("test_")]
    if not tests:
        return reason
    place = f"{Path(tests[-1].filename).name}, line {tests[-1].lineno}: {tests[-1].line}"
    if isinstance(error, AssertionError):
        reason = find_gist(error)
    return f"{place}: {reason}".rstrip(": ")


def find_gist(error):
    """The one line of a message that says most."""
    lines = str(error).splitlines() or [""]
    for line in lines:
        if "absolute difference" in line.lower():  # of torch.testing
            return line.split(" at index")[0].split(" (up to")[0].strip()
    return lines[0]


# ---------------------------------------------------------------- a process of its own

def work(folder, numbers, connection):
    """Grade the exercises of these numbers in order and send a verdict for each.

    Runs in a process of its own (see exercises.py): what it runs may hang, crash, print or exit.
    """
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.path[:0] = [str(ROOT), str(TESTS)]
    for number in numbers:
        connection.send(grade_file(folder, find_exercise(number)))


def grade_file(folder, exercise):
    file = Path(folder, exercise.file)
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return Verdict("wrong", f"{exercise.file} cannot be read: {error}")
    return grade(exercise, source, file)
