"""Grade an exercise: import a student's module in place of ours, and run its tests.

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

import pytest

from course.listing import find_exercise
from course.stubs import ROOT, is_untouched, use_ours_elsewhere

TESTS = ROOT / "tests"


@dataclass
class Verdict:
    """What `check` says of an exercise."""

    status: str  # "not begun", "wrong" or "right"
    reason: str = ""  # if wrong: the first claim that does not hold, or what went wrong before
    seen: str = ""  # the line that failed, and what came out
    hint: str = ""
    stopped: bool = False  # the process that graded it hung or ended


def grade(exercise, source, file):
    """The verdict on an exercise. source: of the student's module; file: its path, for messages."""
    try:
        tree = ast.parse(source)
        use_ours_elsewhere(exercise, tree)
    except SyntaxError as error:
        return Verdict("wrong", f"Line {error.lineno}: {error.msg}")
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
            place = find_line(error, file)
            return Verdict("wrong", f"The file cannot be imported. {place}{write_gist(error)}")
        tests = import_module(f"test_{exercise.module}")
        for name in exercise.tests:
            test = getattr(tests, name)
            for case in list_cases(test):
                error = find_error(test, case)
                if error is not None:
                    claim = write_claim(name, case)
                    return explain(error, claim, exercise.hints.get(name, ""), file)
    return Verdict("right")


def explain(error, claim, hint, file):
    """The verdict if a test of a claim raises an error."""
    place = find_line(error, file)
    is_a_claim = isinstance(error, (AssertionError, pytest.fail.Exception))
    if place and not is_a_claim:  # the student's own line does not run
        return Verdict("wrong", f"{place}{write_gist(error)}", f"while testing this: {claim}")
    test_file = TESTS / f"test_{Path(file).stem}.py"
    what = write_gist(error) or show_value(error, test_file)
    seen = f"{test_file.name}, {find_line(error, test_file, with_code=True)}{what}"
    return Verdict("wrong", f"Not true yet: {claim}", seen.removesuffix(": "), hint)


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
        values = [f"{key} = {getattr(value, '__name__', value)}" for key, value in case.items()]
        text = f"{text} ({', '.join(values)})"
    return text


def find_line(error, file, with_code=False):
    """The last line of `file` that an error went through, as "Line 7: "; "" if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in frames if frame.filename == str(file)]
    if not frames:
        return ""
    line = f"Line {frames[-1].lineno}: "
    return f"{line}{frames[-1].line}: " if with_code else line


def show_value(error, file):
    """The value on the left of the line `assert a == b` in `file` that failed, if that is short."""
    frames = list(traceback.walk_tb(error.__traceback__))
    frames = [(frame, line) for frame, line in frames if frame.f_code.co_filename == str(file)]
    if not frames:
        return ""
    frame, line = frames[-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        is_it = isinstance(node, ast.Assert) and node.lineno <= line <= node.end_lineno
        if is_it and isinstance(node.test, ast.Compare):
            left = ast.unparse(node.test.left)
            try:
                value = repr(eval(left, frame.f_globals, frame.f_locals))  # once more, for its value
            except Exception:  # what can be computed only once has no value to show
                return ""
            return f"the left side is {value}" if len(value) <= 60 else ""
    return ""


def write_gist(error):
    """The one line of an error's message that says most, and its kind if that is needed."""
    lines = str(error).splitlines() or [""]
    for line in lines:
        if "absolute difference" in line.lower():  # of torch.testing
            return line.split(" at index")[0].split(" (up to")[0].strip()
    if isinstance(error, AssertionError):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}"


# ---------------------------------------------------------------- a process of its own

def work(folder, numbers, connection):
    """Say "ready", then grade the exercises of these numbers in order and send a verdict for each.

    Runs in a process of its own (see exercises.py): what it runs may hang, crash, print or exit.
    """
    sys.stdout = sys.stderr = open(os.devnull, "w")
    sys.path[:0] = [str(ROOT), str(TESTS)]
    torch = import_module("torch")  # here: the process that waits needs none of this
    torch.set_num_threads(1)
    import_module("conftest")
    connection.send("ready")
    for number in numbers:
        connection.send(grade_file(folder, find_exercise(number)))


def grade_file(folder, exercise):
    file = Path(folder, exercise.file)
    try:
        source = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return Verdict("wrong", f"{exercise.file} cannot be read: {error}")
    return grade(exercise, source, file)
