"""Weight files: .safetensors, and pickles of which only the tensors are taken. Nothing in them is run."""

import sys
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open

from support.finite import find_largest
from support.text import first_line

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
TRAINERS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.")


def require_file(path):
    """ValueError unless `path` is a file: a folder is none, and a pipe would be waited for."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")


# ---------------------------------------------------------------- the two kinds of files


def read_safetensors(path):
    """A .safetensors file -> {name: tensor}, {name: string} of its header. ValueError: unreadable."""
    require_file(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return tensors, file.metadata() or {}
    except Exception as error:  # of many kinds: a damaged header, a dtype that PyTorch has not
        raise ValueError(f"{path} is not a readable weight file: {first_line(error)}") from error


class StandIn:
    """In place of an object that comes with the weights but is none: keeps nothing, does nothing."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def read_pickle(path):
    """The content of a file of torch.save, without running anything in it.

    PyTorch's weights_only refuses all that is not a tensor, a number or a plain container. Older
    checkpoints of Stable Diffusion (v1-5-pruned.ckpt) hold objects of the program that trained them
    (TRAINERS) beside the weights; each of these is replaced by a StandIn. ValueError: anything else.
    """
    require_file(path)
    is_zip = zipfile.is_zipfile(path)
    try:
        found = torch.serialization.get_unsafe_globals_in_checkpoint(path) if is_zip else []
        stand_ins = [(StandIn, name) for name in found if name.startswith(TRAINERS)]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:
        reason = "it is damaged, or no file of torch.save"
        if any(word in str(error) for word in ("GLOBAL", "allowlisted", "torchscript")):
            reason = "it holds more than tensors and is not opened; take its .safetensors form"
        raise ValueError(f"{path} is not a readable weight file: {reason}") from error


def read_tensors(path, prefix=""):
    """Yield (name, tensor) of the names under `prefix`, memory-mapped: nothing is read before use.

    ValueError unless it is .safetensors or a pickle of tensors.
    """
    if path.suffix == ".safetensors":
        yield from read_mapped(path, prefix)
        return
    content = read_pickle(path)
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{path} is not a readable weight file: it holds a {kind}, no named tensors")
    for name, tensor in content.items():
        if isinstance(name, str) and name.startswith(prefix):
            yield name.removeprefix(prefix), tensor


def read_mapped(path, prefix):
    """`read_tensors` of a .safetensors file."""
    require_file(path)
    try:
        file = safe_open(path, framework="pt")
        names, get = file.keys(), file.get_tensor
        if sys.platform == "linux" and path.stat().st_size > 1e9:

            def get(name):  # a mapping each: else one tensor that is kept keeps the whole file
                return safe_open(path, framework="pt").get_tensor(name)

        for name in names:
            if name.startswith(prefix):
                yield name.removeprefix(prefix), get(name)
    except Exception as error:
        raise ValueError(f"{path} is not a readable weight file: {first_line(error)}") from error


# ---------------------------------------------------------------- what is no weight


def check_tensor(path, name, tensor, dtype=torch.float32):
    """ValueError unless a tensor of a file holds finite numbers, as weights do; also in `dtype`."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{path}: {name} is no tensor but of {type(tensor).__name__}")
    if tensor.dtype not in FLOATS or tensor.layout != torch.strided:
        kinds = "float16, bfloat16, float32 or float64"
        raise ValueError(f"{path}: tensor {name} is of {tensor.dtype}; weights are of {kinds}")
    if tensor.numel() == 0:
        raise ValueError(f"{path}: tensor {name} is empty, of shape {list(tensor.shape)}")
    if not find_largest(tensor) <= torch.finfo(dtype).max:  # NaN is not
        problem = f"NaN, infinity or a number too large for {dtype}"
        raise ValueError(f"{path}: tensor {name} holds {problem}")


def check_dtypes(path, dtypes):
    """ValueError if a file mixes float16 and bfloat16: one of them is written over the other."""
    if {torch.float16, torch.bfloat16} <= set(dtypes):
        mixed = "some tensors are of float16 and some of bfloat16"
        raise ValueError(f"{path}: {mixed}: no program writes that, the file is damaged")
