"""Devices: which one, in which precision, how much memory, what time."""

import math
import statistics
import sys
import time
from contextlib import nullcontext

import torch

from support.distributed import check_device

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of --precision


def best_device():
    """The name of the fastest kind of device here: what --device auto means."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_device(name):
    """The torch.device of --device; auto: cuda, else mps, else cpu. ValueError if it is not here."""
    if name == "auto":
        name = best_device()
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        known = "--device auto | cpu | cuda | mps"
        raise ValueError(f"no device {name!r} on this machine; {known}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # cuda:1: also the one to wait for and whose memory counts
    check_device(device)
    return device


def pick_precision(name, device):
    """fp32, bf16 or fp16; auto: bf16 where the hardware has it, else fp16 on cuda, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    has_bf16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if has_bf16 else "fp32"


def autocast(device, precision):
    """A context: fp32 leaves numbers as they are; bf16 and fp16 run the fast operations in that."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, DTYPE[precision])


def autocast_dtype(device):
    """The dtype of the autocast around us, or False. It belongs in cache keys: it rounds."""
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)


def is_large(unet):
    """Whether this is Stable Diffusion's UNet (0.86·10⁹ numbers), not the tiny world's (0.004·10⁹).

    Learning rates, steps and the ways of computing that suit the one do not suit the other.
    """
    return sum(weight.numel() for weight in unet.parameters()) > 1e8


def device_of(module):
    return next(module.parameters()).device


def frozen_dtype(unet, precision):
    """What to keep frozen weights in while something else trains; None: as they are.

    Half precision halves a large model, and autocast need not cast it at every step. The tiny
    world's weights are small enough to stay in float32.
    """
    return DTYPE[precision] if is_large(unet) else None


def move(network, device, dtype=None, keep=()):
    """Bring a network to `device`, its weights into `dtype` (None: as they are). Returns it.

    keep: layers of it whose weights are not rounded.
    """
    kept = {id(weight) for layer in keep for weight in layer.parameters()}
    for weight in network.parameters():
        if id(weight) not in kept:
            weight.data = weight.data.to(dtype=dtype)
    return network.to(device)


def peak_memory(device):
    """The most memory held so far, in GB of 10⁹ bytes.

    On cuda the device's, on mps what is held now, on the CPU the process's (nan on Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 1e9
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def clock(device):
    """Seconds, read when `device` has finished what it was given."""
    getattr(torch, device.type).synchronize()
    return time.perf_counter()


class Stopwatch:
    """Seconds since it was made, and with count_steps the time at which every call of `unet` ends."""

    def __init__(self, unet, device, count_steps):
        self.device = device
        self.ends = []
        if count_steps:
            unet.register_forward_hook(lambda *_: self.ends.append(clock(device)))
        self.began = clock(device)

    def seconds(self):
        return clock(self.device) - self.began

    def step_seconds(self):
        return [end - start for start, end in zip(self.ends, self.ends[1:])]

    def report(self, precision):
        warm_up = self.ends[0] - self.began
        step = statistics.median(self.step_seconds())
        memory = peak_memory(self.device)
        return (
            f"warm-up (to the end of the first step) {warm_up:.3f} s, then {step:.4f} s a step "
            f"(median), peak memory {memory:.2f} GB, on {self.device} in {precision}"
        )


def match(x, module):
    """x on the device and in the dtype of a network."""
    weight = next(module.parameters())
    return x.to(weight.device, weight.dtype)
