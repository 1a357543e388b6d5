"""Programs: one clear line for bad input, Ctrl-C between two steps, the arguments that all have."""

import argparse
import signal
import sys
import warnings
from contextlib import contextmanager


def run(main):
    """Call a program's main(). Bad input: one line and exit code 2. Ctrl-C: 130. Warnings: one line."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: clusters stop jobs by it
    try:
        main()
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "stopped by Ctrl-C or SIGTERM", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; mps and cpu raise it plain
        if "memory" not in str(error):
            raise
        reason = str(error).split(". ")[0]
        advice = "make or train fewer at once (--n, --batch), train with --checkpointing"
        print(f"error: {reason}: {advice}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


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


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of every option that has one and does not say it in words."""

    def _get_help_string(self, action):
        is_nothing = action.default is None or action.default is False or action.default == ""
        if is_nothing or "(default" in action.help:
            return action.help
        return super()._get_help_string(action)


def make_parser(description):
    """An argument parser with the first line of a docstring as its description."""
    first_line = description.split("\n")[0]
    return argparse.ArgumentParser(description=first_line, formatter_class=HelpFormatter)


def add_device_arguments(parser, precision="number format of the forward pass"):
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument(
        "--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help=precision
    )


def require_at_least(least, args, *names):
    """ValueError for the first of the options `names` that was given and is smaller than `least`."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {value}: at least {least}")
