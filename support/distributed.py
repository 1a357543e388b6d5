"""One program in several processes, as torchrun starts them: who am I; wait, sum, agree.

    torchrun --nproc-per-node 4 train.py --accumulate 8

torchrun starts the program several times, and tells each process its number and how many there are.
torch.distributed connects them: by nccl between GPUs, by gloo between CPUs. Only the first process
prints and writes. A program without torchrun is one process, the first: it waits for nobody, and
its sums are its own numbers. All machines must share the working folder.
"""

import os
import sys
import time
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from datetime import timedelta

import torch
from torch import distributed

PATIENCE = timedelta(days=1)  # the others wait while the first encodes a large data set
TORCHRUN = ("LOCAL_RANK", "RANK", "WORLD_SIZE")  # the environment variables by which we know it
works_alone = False  # see `alone`


class ProcessLost(OSError):
    """Another process ended while this one waited for it."""


# ---------------------------------------------------------------- joining


@contextmanager
def processes():
    """Inside, the processes that torchrun started know each other, and only the first one prints.

    "cuda" then is the GPU of this process. Without torchrun nothing happens. Write @processes()
    above main(): errors go on to `support.program.run`, which prints them, each once.
    """
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    local = int(os.environ["LOCAL_RANK"])
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)
    # Flags and losses are summed on the CPU, gradients where they are.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        with nullcontext() if is_first() else silence():
            yield
    except (KeyboardInterrupt, ProcessLost):
        speaks = is_first()
        distributed.destroy_process_group()
        if speaks:
            raise
        sys.exit(1)
    except Exception:
        if not is_first():
            time.sleep(20)  # if the first process says the same, torchrun ends us meanwhile
        raise
    distributed.destroy_process_group()


@contextmanager
def silence():
    """Inside, nothing is printed: no lines, bars or warnings."""
    nowhere = open(os.devnull, "w", encoding="utf-8")  # left open: bars outlive us
    with redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def check_device(device):
    """ValueError unless each of several processes has a device of its own."""
    if world_size() == 1 or device.type == "cpu":
        return
    if device.type != "cuda":
        raise ValueError(f"torchrun works with --device cuda or cpu, not {device.type}")
    local = int(os.environ["LOCAL_RANK"])
    if device.index != local:
        count = torch.cuda.device_count()
        advice = f"at most one process a GPU (here {count}), and --device cuda without a number"
        raise ValueError(f"process {local} of this machine cannot use {device}: {advice}")


def refuse_torchrun(program):
    """ValueError if torchrun started several of this program, which cannot share its work out."""
    if world_size() > 1:
        raise ValueError(f"{program} runs in one process: start it without torchrun")


def environment_alone():
    """The environment for a program that this one starts, and that shall not join the processes."""
    return {name: value for name, value in os.environ.items() if name not in TORCHRUN}


# ---------------------------------------------------------------- who am I


def world_size():
    """How many processes there are."""
    if works_alone or not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


def rank():
    """The number of this process: 0 … world_size() − 1."""
    return 0 if world_size() == 1 else distributed.get_rank()


def is_first():
    return rank() == 0


def my_share(batches):
    """Every N-th number below `batches`, the rest are the others'. ValueError if one got none."""
    if batches < world_size():
        raise ValueError(f"--accumulate {batches}: at least {world_size()}, one for each process")
    return range(rank(), batches, world_size())


@contextmanager
def alone():
    """Inside, this process works for itself, as if it were the only one; the others may be elsewhere."""
    global works_alone
    before = works_alone
    works_alone = True
    try:
        yield
    finally:
        works_alone = before


# ---------------------------------------------------------------- waiting, summing, agreeing


def sum_over_processes(tensor):
    """Replace a tensor by its sum over all processes, the same numbers in each.

    All processes must call it, in the same order. OSError if another one has ended.
    """
    if world_size() == 1:
        return
    try:
        distributed.all_reduce(tensor)
    except RuntimeError as error:
        reason = "its error is above, or in torchrun's report below"
        raise ProcessLost(f"another process ended: {reason}") from error


def sum_gradients(parameters):
    """Replace the gradients by their sums over all processes. What no loss depends on has none."""
    for weight in parameters:
        if weight.grad is not None:
            sum_over_processes(weight.grad)


def agree(flag):
    """Whether the flag of any process is true: the same answer in all."""
    count = torch.tensor(int(flag))
    sum_over_processes(count)
    return count.item() > 0


def barrier():
    """Wait until all processes are here."""
    agree(False)


@contextmanager
def first_alone():
    """The first process does what is inside, alone; then the others do it, and find its files."""
    goes_first = is_first()
    if not goes_first:
        barrier()
    with alone():
        yield
    if goes_first:
        barrier()


def begin_alike(parameters, step):
    """Give all processes the first one's weights; ValueError if they begin at different steps."""
    if world_size() == 1:
        return
    steps = torch.zeros(world_size(), dtype=torch.int64)
    steps[rank()] = step
    sum_over_processes(steps)
    if steps.min() != steps.max():
        raise ValueError("the processes see different checkpoints: --out must be a shared folder")
    for weight in parameters:
        distributed.broadcast(weight.data, src=0)
