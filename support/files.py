"""Files: written whole or not at all, named by what is in them, computed once and kept on disk."""

import hashlib
import json
import os
import re
import sys
import time
import warnings
import zlib
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

CACHE = Path(".cache")  # below the working folder

# ---------------------------------------------------------------- written whole or not at all


def write_whole(path, write):
    """Call write(temporary path), then rename: the file is there whole or not at all.

    It is on the disk, not only in memory, before it gets its name. OSError names the file and says
    why it cannot be written, also where torch and safetensors hide that.
    """
    write_together({path: write})


def write_together(writers):
    """As write_whole, for {path: write}: all files are written, then all are renamed, or none."""
    parts = {path: Path(f"{path}.{os.getpid()}.part") for path in writers}
    try:
        for path, write in writers.items():
            write_part(path, parts[path], write)
        for path, part in parts.items():
            os.replace(part, path)
            sync_folder(part.parent)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def write_part(path, part, write):
    try:
        write(part)
        sync(part)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = find_reason(part, error)
        raise OSError(f"{path} cannot be written: {reason}") from error


def find_reason(part, error):
    """Why the file `part` cannot be written, in the system's words: "No space left on device".

    torch and safetensors have words of their own for it, so we write on and see what happens.
    """
    if not getattr(error, "strerror", None):
        try:
            with open(part, "ab") as file:
                file.write(bytes(2**20))
            sync(part)
        except OSError as found:
            error = found
    return getattr(error, "strerror", None) or (str(error) or repr(error)).splitlines()[0]


def sync(path):
    """Wait until the file or folder is on the disk."""
    is_file = not os.path.isdir(path)
    handle = os.open(path, os.O_RDWR if is_file else os.O_RDONLY)  # Windows syncs what it may write
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder):
    try:
        sync(folder)
    except OSError:
        pass  # some systems sync files only


def write_text(path, text):
    write_all({path: text})


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_all(texts):
    """Write {path: text}: all of these files, or none."""

    def write(text, part):
        part.write_text(text, encoding="utf-8")

    write_together({path: partial(write, text) for path, text in texts.items()})


def save_tensors(path, tensors, metadata=None):
    """Write {name: tensor} as .safetensors, from the CPU. metadata: strings for the file's header.

    The same tensors and strings give the same bytes.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(part):
        save_file(tensors, part, metadata)
        sort_metadata(part)

    write_whole(path, write)


def sort_metadata(path):
    """Sort the strings in the header of a .safetensors file: the library writes them in any order.

    The file begins with the header's length (8 bytes), then comes the header as compact JSON, filled
    up with spaces, then the tensors. Sorting leaves the length as it is.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        content = text.encode().ljust(size)
        if len(content) == size:  # else the library writes JSON in another way: let it be
            file.seek(8)
            file.write(content)


# ---------------------------------------------------------------- before the work


def check_writable(folder, room=2**20):
    """Make the folder, and write and remove a file of `room` bytes: to be done before the work.

    OSError names the folder and says why that is not possible.
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".probe.txt.{os.getpid()}.part"
    try:
        write_part(folder, part, lambda part: part.write_bytes(bytes(room)))
    finally:
        part.unlink(missing_ok=True)
    remove_leftovers(folder, idle=3600)


# The names of write_whole's temporary files, as in adapter.pt.1234.part: only such are removed.
PART = re.compile(r".+\.(?:pt|safetensors|csv|json|md|txt|png|jpe?g)\.([1-9]\d*)\.part")


def remove_leftovers(folder, idle=0):
    """Remove the temporary files in and up to two levels below `folder` that killed programs left.

    idle: only those that nothing was written to for so many seconds. Zero is for folders in which no
    other machine or container can be writing now: we do not see the processes there.
    """
    for pattern in ("*.part", "*/*.part", "*/*/*.part"):
        for part in folder.glob(pattern):
            match = PART.fullmatch(part.name)
            if match and not is_running(int(match[1])) and is_idle(part, idle):
                part.unlink(missing_ok=True)


def is_running(number):
    """Whether another process has this number."""
    if number == os.getpid():
        return False  # in a container a program often has the number of the one before it
    if sys.platform == "win32":
        return True  # os.kill does more than ask there
    try:
        os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it runs, and is somebody else's
    return True


def is_idle(path, seconds):
    try:
        return time.time() - path.stat().st_mtime >= seconds
    except FileNotFoundError:  # another process has just removed it
        return False


# ---------------------------------------------------------------- read, and named by content


def read_json(path):
    """The content of a JSON file. FileNotFoundError or ValueError names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def digest(*networks, **settings):
    """Sixteen hex digits that change when any number in the networks does, or any of the settings."""
    sha = hashlib.sha256(repr(settings).encode())
    for network in networks:
        for name, tensor in network.state_dict().items():
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
            sha.update(flat.view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def digest_tensors(*tensors):
    """Sixteen hex digits of the numbers of tensors, their types and their shapes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        sha.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(flat.view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def digest_file(path):
    """Sixteen hex digits of a file's content."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def digest_bytes(*parts):
    """Sixteen hex digits for byte strings, files and anything that has a repr."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            part = part.read_bytes()
        elif not isinstance(part, bytes):
            part = repr(part).encode()
        sha.update(hashlib.sha256(part).digest())  # each by itself: "ab", "c" is not "a", "bc"
    return sha.hexdigest()[:16]


# ---------------------------------------------------------------- computed once


def load_or_compute(compute, *key):
    """The tensors that compute() returns; from disk if they were computed under this key before.

    key: everything that the tensors depend on: data, settings, digests of networks, and a version
    number of the code, which is raised by hand when the code gives other numbers.
    A file that is damaged, or is not what its name says, is made anew. A disk that is full costs the
    file, not the result.
    """
    name = hashlib.sha256("\n".join(map(str, key)).encode()).hexdigest()[:24]
    path = CACHE / f"{name}.safetensors"
    found = read_cached(path, name)
    if found is not None:
        return found
    tensors = compute()
    try:
        CACHE.mkdir(exist_ok=True)
        remove_leftovers(CACHE, idle=3600)
        save_tensors(path, tensors, {"key": name, "checksum": checksum(tensors)})
        return load_file(path)
    except OSError as error:
        warnings.warn(f"{error}: it will be computed again the next time")
        return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def read_cached(path, name):
    """The tensors of a cache file, None unless it is whole and was written under this name."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
        tensors = load_file(path)
        if header.get("key") == name and header.get("checksum") == checksum(tensors):
            return tensors
    except Exception:  # a damaged file fails in many ways
        pass
    warnings.warn(f"{path} is damaged or of another version of this code: it is made anew")
    return None


def checksum(tensors):
    """Eight hex digits that change when the tensors {name: tensor} are damaged (CRC-32: 3 GB/s)."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        flat = tensor.detach().cpu().contiguous().flatten()
        value = zlib.crc32(flat.view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def successive_runs(numbers, most):
    """Runs of successive numbers, none longer than `most`: [0, 1, 2, 5, 6], 2 -> [[0, 1], [2], [5, 6]]."""
    runs = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1 and len(runs[-1]) < most:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def describe_file(file, size):
    """A photo's key: what its pixels depend on. A link that leads nowhere has no size and no date."""
    try:
        facts = file.stat()
    except OSError:
        return (str(file.absolute()), size)
    return (str(file.resolve()), size, facts.st_size, facts.st_mtime_ns)
