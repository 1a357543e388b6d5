"""Exercises: write the paper's functions yourself; the repository's tests grade them.

    python -m course.exercises start         copies the code to runs/course, with 15 exercises
    python -m course.exercises check         one line an exercise: not begun, wrong or right
    python -m course.exercises check 3       that one, with what came out and a hint
    python -m course.exercises solution 3    ours
"""

import argparse
import ast
import multiprocessing
import sys
from pathlib import Path

from course.grading import Verdict, work
from course.listing import EXERCISES, find_exercise
from course.stubs import ROOT, find_changes, find_functions, make_handout, read_ours
from support.files import write_text
from support.program import run

FOLDER = Path("runs/course")
MARK = ".exercises"  # a file in a folder of ours
LIMIT = 30  # seconds for the tests of one exercise; ours take less than one


# ---------------------------------------------------------------- start

def list_files():
    """What a student gets: the ten modules and what they stand on, as paths below the root."""
    patterns = ["*.py", "support/*.py", "toyfaces/*.py"]
    paths = [path for pattern in patterns for path in ROOT.glob(pattern)]
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def start(folder):
    """Write the files that are not there yet; those that are there stay as they are."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a new folder")
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise ValueError(f"{folder} holds other things: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / MARK, "made by python -m course.exercises start\n")
    written = 0
    changed = []
    for file in list_files():
        path = folder / file
        handout = make_handout(file)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_text(path, handout)
            written += 1
        elif path.read_bytes() != handout.encode():
            changed.append(file)
    weights = folder / "weights"
    if not weights.exists() and not weights.is_symlink():
        weights.symlink_to(ROOT / "weights")  # the programs read them, they are not copied
    print(f"{folder}: {written} files written, {len(EXERCISES)} exercises in them: search for "
          '"exercise 1", then run: python -m course.exercises check 1')
    if changed:
        print(f"left alone, because they are not as handed out: {', '.join(changed)}")


# ---------------------------------------------------------------- check

def grade_all(folder, exercises, limit=LIMIT, work=work):
    """Yield (exercise, verdict) in order. Each may take `limit` seconds.

    A process of its own does the work. If it hangs or ends, the exercise that it was at is wrong,
    and a new one goes on with the next.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(exercises)
    while waiting:
        receiver, sender = context.Pipe(duplex=False)
        numbers = [exercise.number for exercise in waiting]
        process = context.Process(target=work, args=(folder, numbers, sender), daemon=True)
        process.start()
        sender.close()  # ours; so the end of the process is the end of the pipe
        try:
            wait_until_ready(receiver)
            while waiting:
                verdict = receive(receiver, limit)
                yield waiting.pop(0), verdict
                if verdict.stopped:
                    break
        finally:
            process.kill()
            process.join()


def wait_until_ready(receiver):
    """Imports take seconds, and they are ours: no limit. OSError if they fail."""
    try:
        receiver.recv()
    except EOFError:
        text = "the tests cannot be imported: does `python -m pytest tests/test_ddpm.py` run?"
        raise OSError(text) from None


def receive(receiver, limit):
    """The next verdict of a process; one that says `stopped` if it hangs or has ended."""
    if not receiver.poll(limit):
        reason = f"Its tests take more than {limit} seconds: is there an endless loop?"
        return Verdict("wrong", reason, stopped=True)
    try:
        return receiver.recv()
    except EOFError:
        return Verdict("wrong", "It ends the whole program", stopped=True)


def check(folder, numbers):
    """Print a line an exercise; with `numbers` only these, in detail.

    Returns how many are not right. ValueError if the folder is none of ours.
    """
    if not (folder / MARK).exists():
        advice = "begin with: python -m course.exercises start"
        raise ValueError(f"{folder} is no folder of exercises; {advice}")
    exercises = [find_exercise(number) for number in numbers] or EXERCISES
    right = 0
    for exercise, verdict in grade_all(folder, exercises):
        print_verdict(exercise, verdict, in_detail=bool(numbers))
        right += verdict.status == "right"
    print(f"{right} of {len(exercises)} right")
    for note in list_notes(folder):
        print(f"note: {note}")
    return len(exercises) - right


def print_verdict(exercise, verdict, in_detail):
    line = f"{exercise.number:2}  {verdict.status:9}  {exercise.file}: {exercise.title}, "
    line += ", ".join(exercise.functions)
    if verdict.reason:
        line += f". {verdict.reason}"
    print(line, flush=True)
    if in_detail and verdict.seen:
        print(f"    {verdict.seen}")
    if in_detail and verdict.hint:
        print(f"    hint: {verdict.hint}")


def list_notes(folder):
    """What is not as handed out besides the exercises: one line a file."""
    notes = []
    graded = {exercise.file for exercise in EXERCISES}
    for file in list_files():
        use = "is used for its exercises" if file in graded else "is not used for grading"
        try:
            changed = find_changes(file, (folder / file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            notes.append(f"{file} is missing: `start` brings it back")
        except SyntaxError as error:
            notes.append(f"{file}, line {error.lineno}: {error.msg} (the file {use})")
        except ValueError as error:
            notes.append(f"{file} is no text: {error}")
        else:
            if changed:
                notes.append(f"{file}: {', '.join(changed)} differs from ours (the file {use})")
    return notes


# ---------------------------------------------------------------- solution

def print_solution(number):
    """Our functions of an exercise, as they stand in the repository."""
    exercise = find_exercise(number)
    lines = read_ours(exercise.file).split("\n")
    functions = find_functions(ast.parse("\n".join(lines)))
    for name in exercise.functions:
        node = functions[name]
        print(f"# {exercise.file}, line {node.lineno}: {name}")
        print("\n".join(lines[node.lineno - 1 : node.end_lineno]) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("start", help="copy the code, with empty functions in it")
    where = "default: runs/course"
    command.add_argument("folder", nargs="?", type=Path, default=FOLDER, help=where)
    command = commands.add_parser("check", help="grade what is done")
    command.add_argument("numbers", nargs="*", type=int, metavar="N", help="default: all exercises")
    command.add_argument("--folder", type=Path, default=FOLDER, help=where)
    command = commands.add_parser("solution", help="show ours")
    command.add_argument("number", type=int, metavar="N")
    args = parser.parse_args()

    if args.command == "start":
        start(args.folder)
    elif args.command == "solution":
        print_solution(args.number)
    elif check(args.folder, args.numbers) > 0:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
