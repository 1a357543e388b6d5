"""torchrun: N processes compute what one computes, stop together, and only the first one speaks."""

import math
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed

import train
from experiments import base
from support import distributed as ours
from support.program import run

ROOT = Path(__file__).parent.parent


def join(rank, count, port, target, args, said):
    """A process as torchrun starts it: it is told who it is, and the store is its parent's."""
    for number in (1, 2):
        os.dup2(os.open(said[number], os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    torch.set_num_threads(1)
    known = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.update({name: str(value) for name, value in known.items()})
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    run(lambda: target(*args))


def launch(target, *args, count=2):
    """Run target(*args) in `count` processes; returns their exit codes. What they print is printed.

    torchrun itself imports everything anew in each process. Here one process that has no threads yet
    imports it, and they are forked from that one: a fork of a process with threads may hang.
    """
    context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    context.set_forkserver_preload(["torch", "train"])
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        said = {number: f"{folder}/{number}" for number in (1, 2)}
        children = []
        for rank in range(count):
            child = context.Process(target=join, args=(rank, count, store.port, target, args, said))
            child.start()
            children.append(child)
        children[0].join(60)
        for child in children:
            if children[0].exitcode != 0:
                child.terminate()  # as torchrun does
            child.join(60)
        sys.stdout.write(Path(said[1]).read_text(encoding="utf-8"))
        sys.stderr.write(Path(said[2]).read_text(encoding="utf-8"))
    return [child.exitcode for child in children]


# ---------------------------------------------------------------- the loop


def make_options(**changes):
    usual = dict(steps=10, batch=4, lr=1e-2, accumulate=3, every=4)
    return train.Options(torch.device("cpu"), **{**usual, **changes})


def make_task(trap=None):
    """A small network learns y = sin x. trap: (number of the call, loss) -> loss; it may break things."""
    torch.manual_seed(ours.rank())  # each process has weights of its own: the first one's must count
    module = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    calls = []

    def loss(batch, generator):
        calls.append(batch)
        x = torch.randn(batch, 3, generator=generator)
        value = (module(x) - x.sin()).square().mean()
        return trap(len(calls), value) if trap else value

    return train.Task("net", module, loss, lambda: {"validation": 0.5})


@ours.processes()
def fit_together(out, trap=None, changes={}):
    """fit in this process. Process 1 alone meets the trap; of three batches it has the second."""
    task = make_task(trap if ours.rank() == 1 else None)
    train.fit(task, out, make_options(**changes))


def read_state(out):
    return torch.load(out / "net.pt", weights_only=True)


def assert_same_training(one, other):
    for name, weight in one["module"].items():
        assert (other["module"][name] - weight).abs().max() <= 1e-6
    losses = [row["train"] for row in one["rows"]]
    assert [row["train"] for row in other["rows"]] == pytest.approx(losses, rel=1e-6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The checkpoint of one process that was never stopped: ten steps of three batches."""
    out = tmp_path_factory.mktemp("whole")
    train.fit(make_task(), out, make_options())
    return read_state(out)


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_train_and_log_like_one(count, whole, tmp_path):
    assert launch(fit_together, tmp_path, count=count) == [0] * count
    assert_same_training(whole, read_state(tmp_path))


def press_ctrl_c(call, loss):
    if call == 6:
        os.kill(os.getpid(), signal.SIGINT)
    return loss


def die(call, loss):
    if call == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss


@pytest.mark.parametrize("trap, code, step, says", [
    (press_ctrl_c, 130, 6, "stopped at step 6"), (die, 2, 4, "error: another process ended")])
def test_what_stops_one_process_stops_all_and_others_go_on(trap, code, step, says, whole, tmp_path, capfd):
    assert launch(fit_together, tmp_path, trap)[0] == code
    assert capfd.readouterr().err.count(says) == 1
    assert read_state(tmp_path)["step"] == step
    train.fit(make_task(), tmp_path, make_options(resume=True))
    assert_same_training(whole, read_state(tmp_path))


def test_processes_go_on_from_the_checkpoint_of_one(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train.fit(make_task(lambda call, loss: press_ctrl_c(call // 3, loss)), tmp_path, make_options())
    assert 0 < read_state(tmp_path)["step"] < 10
    assert launch(fit_together, tmp_path, None, dict(resume=True)) == [0, 0]
    assert_same_training(whole, read_state(tmp_path))


def turn_to_nan(call, loss):
    return loss * math.nan if call == 6 else loss


def test_a_loss_that_is_not_finite_stops_all_with_one_line(tmp_path, capfd):
    assert launch(fit_together, tmp_path, turn_to_nan)[0] == 2
    errors = capfd.readouterr().err
    assert errors.count("error: net: the loss is nan at step 5") == errors.count("error:") == 1
    assert read_state(tmp_path)["step"] == 4


def overflow(call, loss):
    if call == 6:
        loss.register_hook(lambda grad: grad * math.inf)
    return loss


def test_half_precision_skips_a_step_in_all_processes_if_it_overflows_in_one(tmp_path):
    half = dict(precision="fp16")
    assert launch(fit_together, tmp_path / "two", overflow, half) == [0, 0]
    # The second of three batches in the sixth step.
    alone = make_task(lambda call, loss: overflow(6 if call == 5 * 3 + 2 else 0, loss))
    train.fit(alone, tmp_path / "one", make_options(**half))
    state = read_state(tmp_path / "two")
    assert state["scaler"] == read_state(tmp_path / "one")["scaler"]
    assert state["scaler"]["scale"] == 2**15  # half of what it begins with
    for name, weight in read_state(tmp_path / "one")["module"].items():
        torch.testing.assert_close(state["module"][name], weight, rtol=0, atol=1e-5)


def test_batch_0_keeps_its_seed_and_no_two_batches_share_theirs():
    """Of the 32 bits that PyTorch uses: all else of a seed is lost on it."""
    seeds = set()
    for step in range(500):
        assert train.seeded(7, step, 0).initial_seed() == 7 * 1_000_003 + step
        seeds.update(train.seeded(7, step, m).initial_seed() % 2**32 for m in range(64))
    assert len(seeds) == 500 * 64
    small = torch.Generator().manual_seed(5)
    assert torch.equal(torch.rand(2, generator=small), torch.rand(2, generator=small.manual_seed(5 + 2**32)))


# ---------------------------------------------------------------- the programs


def call_train(words):
    train.save_samples = lambda *args: None  # slow, and the first one's alone
    sys.argv = ["train.py", *map(str, words)]
    train.main()


def test_the_program_in_two_processes_writes_the_adapter_of_one(tiny_folder, workdir, monkeypatch, capfd):
    monkeypatch.setattr(train, "save_samples", lambda *args: None)
    words = ["--model", tiny_folder, "--people", 2, "--batch", 2, "--accumulate", 2, "--steps", 2]
    words += ["--every", 2, "--precision", "fp32"]
    assert launch(call_train, [*words, "--out", "two"]) == [0, 0]
    assert capfd.readouterr().out.count("wrote two/ip-adapter.safetensors") == 1
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words), "--out", "one"])
    train.main()
    one = load_file("one/ip-adapter.safetensors")
    two = load_file("two/ip-adapter.safetensors")
    assert max((two[name] - one[name]).abs().max() for name in one) <= 1e-6
    names = [sorted(path.name for path in Path(folder).iterdir()) for folder in ("one", "two")]
    assert names[0] == names[1]


def test_torchrun_says_once_that_there_are_fewer_batches_than_processes(workdir):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    program = subprocess.run([*launcher, ROOT / "train.py"], capture_output=True, text=True, timeout=100)
    assert program.returncode != 0
    lines = [line for line in program.stderr.splitlines() if line.startswith("error:")]
    assert lines == ["error: --accumulate 1: at least 2, one for each process"]


def test_making_weights_refuses_torchrun(monkeypatch):
    monkeypatch.setattr(ours, "world_size", lambda: 2)
    monkeypatch.setattr(sys, "argv", ["base.py"])
    with pytest.raises(ValueError, match="experiments.base .* without torchrun"):
        base.main()


# ---------------------------------------------------------------- waiting, and who is who


@ours.processes()
def make_once(folder):
    """The slow first process makes a file; the others find it."""
    number = ours.rank()
    print("hello")
    print("an error", file=sys.stderr)
    with ours.first_alone():
        assert ours.world_size() == 1
        if not (folder / "made").exists():
            time.sleep(0.2)
            (folder / "made").touch()
            (folder / f"made by {number}").touch()
    with ours.alone():
        for _ in range(number):  # nobody waits
            ours.barrier()
    assert ours.agree(number == 1)
    assert not ours.agree(False)


def test_the_first_process_goes_first_and_only_it_prints(tmp_path, capfd):
    assert launch(make_once, tmp_path, count=3) == [0, 0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "made by 0"]
    captured = capfd.readouterr()
    assert captured.out == "hello\n" and captured.err == "an error\n"


@ours.processes()
def begin_at_different_steps():
    ours.begin_alike([], step=ours.rank())


def test_processes_that_see_different_checkpoints_are_refused(capfd):
    assert launch(begin_at_different_steps)[0] == 2
    assert "--out must be a shared folder" in capfd.readouterr().err


@pytest.mark.parametrize("device, says", [
    ("cpu", None), ("cuda:1", None), ("cuda:0", "process 1 .* cuda:0"), ("mps", "not mps")])
def test_each_process_needs_a_device_of_its_own(device, says, monkeypatch):
    ours.check_device(torch.device(device))  # one process: any
    monkeypatch.setattr(ours, "world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    if says is None:
        ours.check_device(torch.device(device))
    else:
        with pytest.raises(ValueError, match=says):
            ours.check_device(torch.device(device))


def test_a_program_that_we_start_does_not_join(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OTHER"):
        monkeypatch.setenv(name, "1")
    assert "OTHER" in ours.environment_alone()
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(ours.environment_alone())
