"""One program to a folder: a claim that ends with its process."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from support.distributed import is_first
from support.files import check_writable, remove_leftovers

try:
    import fcntl
except ImportError:  # Windows: two programs in one folder are not noticed there
    fcntl = None


@contextmanager
def claim(folder):
    """Inside, the folder is this program's alone. ValueError if another one has claimed it.

    It is made and tried as by `check_writable`, what killed programs left half-written is removed,
    and at the end it is removed again if nothing was put there. The claim is a lock of the system
    on folder/.lock: it ends with its process, so the file of a killed program blocks nobody.
    Of the processes that torchrun starts only the first one claims, for all of them.
    """
    if fcntl is None or not is_first():
        yield
        return
    new = [path for path in (folder, *folder.parents) if not path.exists()]  # innermost first
    try:
        check_writable(folder)
        with lock(folder / ".lock"):
            rescue_parts(folder)
            remove_leftovers(folder)
            yield
    finally:
        remove_empty(new)


@contextmanager
def lock(path):
    """Inside, no other process can lock `path`. ValueError if one has."""
    with open_locked(path) as file:
        file.truncate(0)
        file.write(str(os.getpid()))  # for the message of the others
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is still ours


def open_locked(path):
    while True:
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            number = file.read().strip() or "unknown"
            file.close()
            busy = f"{path.parent}: another program (process {number}) works in this folder"
            raise ValueError(f"{busy}; wait for it, or choose another --out") from None
        except OSError:
            return file  # a file system without locks
        if is_at(path, file):
            return file
        file.close()  # the one who held the lock has just removed the file


def is_at(path, file):
    """Whether the open file is the one that is now found under this path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def remove_empty(folders):
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return  # something is in it


def rescue_parts(folder):
    """Clean up after a killed `replace_parts`: what it had moved out of the way comes back.

    Also where a new part has its place already: parts of two checkpoints are none.
    """
    for saving in folder.glob(".saving-*"):
        for number, old in enumerate(sorted(saving.glob("old/*"))):
            place = folder / old.name
            if place.exists():
                place.rename(saving / f"unfinished-{number}")
            old.rename(place)
        shutil.rmtree(saving, ignore_errors=True)
