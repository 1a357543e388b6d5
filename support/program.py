"""Programs: one clear line for bad input, Ctrl-C between two steps, the arguments that all have."""

import argparse
import os
import re
import signal
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from support.text import one_line

RANGES = {  # of the numbers on the command lines; a program may narrow them: Parser.ranges
    "lam": (-10, 10),
    "guidance": (-100, 100),
    "lr": (1e-9, 1),
    "lora_lr": (1e-9, 1),
    "prior_weight": (0, 1000),
    "strangers": (0, 1),
    "seed": (0, 2**32 - 1),  # NumPy takes no larger one
    "steps": (1, 10**7),
    "every": (1, 10**7),
    "n": (1, 1000),
    "batch": (1, 1024),
    "accumulate": (1, 1024),
    "people": (1, 10**5),
    "photos": (1, 1000),
    "seeds": (1, 1000),
    "pictures": (1, 10**5),
    "class_images": (1, 10**5),
    "class_pictures": (1, 10**5),
    "lora": (1, 1024),
    "splits": (1, 1000),
    "repeats": (1, 1000),
    "size": (64, 2048),
}
OTHER_NUMBERS = (0, 10**6)
MAY_BE_EMPTY = ("--prompt", "--negative")

# ---------------------------------------------------------------- errors


def run(main, when_full="use less at once"):
    """Call a program's main(). Bad input: one line and exit code 2. Ctrl-C: 130. Warnings: one line.

    when_full: what the program's user can do when memory runs out. With DEBUG=1 in the environment
    the traceback is shown instead of the line. Other exceptions are bugs and keep theirs.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: clusters stop jobs by it
    warnings.showwarning = lambda message, *_: print(f"warning: {one_line(message)}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):  # no terminal's alphabet stops a program
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "stopped by Ctrl-C or SIGTERM", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        line = explain(error, when_full)
        if line is None or os.environ.get("DEBUG"):
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


def explain(error, when_full):
    """What to tell the user of an exception in one line, or None if it is a bug."""
    if is_out_of_memory(error):
        asked = re.search(r"allocate ([\d.]+ ?\w+)", str(error))
        amount = f" ({asked[1]} more were asked for)" if asked else ""
        return f"out of memory{amount}: {when_full}"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return one_line(f"{error.filename}: {error.strerror}")
    if isinstance(error, (ValueError, OSError)):
        return one_line(error)
    if isinstance(error, RuntimeError) and "Symlink loop" in str(error):  # of Python before 3.13
        return one_line(error)
    return None


def is_out_of_memory(error):
    """Whether memory ran out. torch.OutOfMemoryError says so; mps and the CPU raise RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc",
             "_ALLOC_FAILED", "Invalid buffer size")  # fmt: skip
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@contextmanager
def interruptible():
    """Inside, Ctrl-C and SIGTERM only set a flag that the loop asks for: no step is cut in half."""
    flag = []
    old = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        old[number] = signal.signal(number, lambda *_: flag.append(True))
    try:
        yield lambda: bool(flag)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- arguments


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of every option that has one and does not say it in words."""

    def _get_help_string(self, action):
        is_nothing = action.default is None or action.default is False or action.default == ""
        if is_nothing or "(default" in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Refuses what no program can use, in one line as `run` does.

    That is: a number out of its range (`ranges`, also NaN and infinity), a word that is not text,
    an empty name, which would be taken for an option not given.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ranges = dict(RANGES)

    def parse_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        self.check_words([str(word) for word in words])
        values = super().parse_args(args, namespace)
        for name, value in vars(values).items():
            self.check_number(name, value)
        return values

    def check_words(self, words):
        before = ""
        for word in words:
            if not is_text(word):
                shown = one_line(word.encode("utf-8", "backslashreplace").decode())
                self.error(f"'{shown}' is not UTF-8 text: write it otherwise, or rename the file")
            option = before
            value = word
            if word.startswith("--") and "=" in word:  # --model=NAME
                option, value = word.split("=", 1)
            if not value.strip() and option not in MAY_BE_EMPTY:
                self.error(f"an empty name after {option or 'the program'}")
            before = word

    def check_number(self, name, value):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return
        least, most = self.ranges.get(name, OTHER_NUMBERS)
        if not least <= value <= most:  # NaN is in no range
            option = name.replace("_", "-")
            self.error(f"--{option} {one_line(value, 40)}: from {least} to {most}")

    def error(self, message):
        print(f"error: {one_line(message.removeprefix('argument '))}", file=sys.stderr)
        sys.exit(2)


def make_parser(description):
    """An argument parser with the first line of a docstring as its description."""
    first_line = description.split("\n")[0]
    return Parser(description=first_line, formatter_class=HelpFormatter)


def is_text(word):
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return "\0" not in word


def file_path(word):
    """The type of an option that names a file to read: it must be there before any work begins."""
    path = Path(word)
    if not path.is_file():
        problem = "a folder, not a file" if path.is_dir() else "no such file"
        raise argparse.ArgumentTypeError(f"{path}: {problem}")
    return path


def device_name(word):
    """The type of --device. Whether there is such a device: support.devices.pick_device."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", word):
        known = "auto, cpu, cuda, cuda:N or mps"
        raise argparse.ArgumentTypeError(f"no device {one_line(word, 40)!r}; {known}")
    return word


def add_device_arguments(parser, precision="number format of the forward pass"):
    parser.add_argument("--device", type=device_name, default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument(
        "--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help=precision
    )
