"""Files: written whole or not at all, named by what is in them, computed once and kept on disk."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

CACHE = Path(".cache")  # below the working folder


def write_whole(path, write):
    """Call write(temporary path), then rename: the file is there whole or not at all.

    Raises OSError if it cannot be written, also where torch and safetensors say so in other words.
    """
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"{path} cannot be written: {reason}") from error
    finally:
        part.unlink(missing_ok=True)


def write_text(path, text):
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def save_tensors(path, tensors, metadata=None):
    """Write {name: tensor} as .safetensors, from the CPU. metadata: strings for the file's header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda part: save_file(tensors, part, metadata))


def read_json(path):
    """The content of a JSON file. FileNotFoundError or ValueError names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")


def digest(*networks, **settings):
    """Sixteen hex digits that change when any number in the networks does, or any of the settings."""
    sha = hashlib.sha256(repr(settings).encode())
    for network in networks:
        for name, tensor in network.state_dict().items():
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().flatten()
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


def load_or_compute(compute, *key):
    """The tensors that compute() returns; from disk if they were computed under this key before.

    key: everything that the tensors depend on: data, settings, digests of networks, and a version
    number of the code, which is raised by hand when the code gives other numbers.
    """
    name = hashlib.sha256("\n".join(map(str, key)).encode()).hexdigest()[:24]
    path = CACHE / f"{name}.safetensors"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        save_tensors(path, compute())
    return load_file(path)
