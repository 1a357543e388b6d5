"""Kills, full disks, doubled runs, damaged files: nothing is lost, and one line says what was wrong."""

import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
import train
from support import files, history
from support.checkpoints import write_tokenizer
from support.claim import claim
from support.files import check_writable, load_or_compute, save_tensors, write_all, write_json, write_whole
from support.pictures import open_photos, save_image, save_pictures
from support.plots import plot_training
from support.program import interruptible, run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="it has no such signals, limits and locks")


def in_a_fork(work):
    """The exit code of a child process that calls work()."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    return child.exitcode


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def find_dead_process():
    """The number of a process that has ended."""
    child = multiprocessing.get_context("fork").Process(target=int)
    child.start()
    child.join()
    return child.pid


@pytest.fixture
def full_disk():
    """No file can grow beyond 10,000 bytes."""
    import resource

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


# ---------------------------------------------------------------- full disks


BIG = {"x": torch.zeros(100_000)}
NOISE = Image.frombytes("RGB", (200, 200), os.urandom(120_000))
ROWS = [{"step": step, "train": 0.5, "validation": 0.5} for step in range(3)]
WRITERS = {
    "text": lambda path: write_all({path: "x" * 20_000}),
    "json": lambda path: write_json(path, ["x" * 20_000]),
    "png": lambda path: save_image(path, NOISE),
    "plot": lambda path: plot_training(path, ROWS, "title"),
    "tensors": lambda path: save_tensors(path, BIG),
    "checkpoint": lambda path: write_whole(path, partial(torch.save, BIG)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_is_one_line_with_the_name_and_the_reason_and_the_old_file_stays(name, full_disk, tmp_path):
    path = tmp_path / "file.png"
    path.write_text("old")
    with pytest.raises(OSError) as error:
        WRITERS[name](path)
    assert str(error.value) == f"{path} cannot be written: File too large"
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_full_disk_is_the_reason_also_where_the_tokenizer_is_saved(full_disk, tiny_model, tmp_path):
    with pytest.raises(OSError, match="tokenizer cannot be written: File too large"):
        write_tokenizer(tmp_path / "tokenizer", tiny_model.tokenizer)


def test_table_is_written_with_all_its_files_or_not_at_all(full_disk, tmp_path):
    small, large = tmp_path / "table.md", tmp_path / "table.json"
    with pytest.raises(OSError, match="table.json cannot be written"):
        write_all({small: "new", large: "x" * 20_000})
    assert list(tmp_path.iterdir()) == []
    write_all({small: "new", large: "too"})
    assert (small.read_text(), large.read_text()) == ("new", "too")


def test_full_disk_costs_the_cache_but_not_the_result(full_disk, workdir):
    with pytest.warns(UserWarning, match=r"\.cache/.* cannot be written: File too large"):
        found = load_or_compute(lambda: BIG, "key")
    assert torch.equal(found["x"], BIG["x"]) and list((workdir / ".cache").iterdir()) == []


def test_full_disk_is_noticed_before_the_work(full_disk, tiny_folder, workdir, monkeypatch, capsys):
    monkeypatch.setattr(sample, "generate", None)
    monkeypatch.setattr(train, "train_adapter", None)
    words = [["sample.py", "--prompt", "x", "--out", "new/x.png"], ["train.py", "--out", "new"]]
    for program, argv in zip((sample, train), words):
        monkeypatch.setattr(sys, "argv", [*argv, "--model", str(tiny_folder)])
        with pytest.raises(SystemExit) as stop:
            run(program.main)
        assert stop.value.code == 2
        assert capsys.readouterr().err == "error: new cannot be written: File too large\n"
    assert not any(path.is_file() for path in workdir.rglob("*"))


def test_files_are_on_the_disk_before_they_get_their_names(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: [calls.append(name), real(*args)])
    write_all({tmp_path / "a": "1", tmp_path / "b": "2"})
    assert calls == ["fsync", "fsync", "replace", "fsync", "replace", "fsync"]


# ---------------------------------------------------------------- two programs, killed programs


def test_second_program_in_a_folder_is_refused_while_the_first_one_runs(tmp_path):
    out = tmp_path / "runs" / "a"
    with claim(out):
        with pytest.raises(ValueError, match=f"process {os.getpid()}.*--out"), claim(out):
            pass
        with claim(tmp_path / "runs" / "b"):
            pass
    assert list(tmp_path.iterdir()) == []  # nothing was put there
    with claim(out):
        (out / "result").touch()
    assert [path.name for path in out.iterdir()] == ["result"]


def test_killed_program_blocks_nobody(tmp_path):
    def claim_and_die():
        with claim(tmp_path):
            die()

    assert in_a_fork(claim_and_die) == -signal.SIGKILL
    assert (tmp_path / ".lock").exists()
    with claim(tmp_path):
        pass


def test_only_the_first_process_of_torchrun_claims(tmp_path, monkeypatch):
    with claim(tmp_path):
        with pytest.raises(ValueError, match="another program"), claim(tmp_path):
            pass
        monkeypatch.setattr("support.claim.is_first", lambda: False)
        with claim(tmp_path):
            pass


def test_trainings_claim_their_folder_and_leave_it_clean_if_they_fail(tiny_folder, workdir, monkeypatch, capsys):
    argv = ["train.py", "--model", str(tiny_folder), "--init", "nowhere", "--out", "run"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        run(train.main)
    assert "nowhere" in capsys.readouterr().err and not Path("run").exists()
    with claim(workdir / "run"), pytest.raises(SystemExit):
        run(train.main)
    assert "another program" in capsys.readouterr().err


def test_only_our_temporary_files_of_killed_programs_are_removed(tmp_path):
    dead = find_dead_process()
    ours = [f"adapter.pt.{dead}.part", f"class-1/0001.png.{dead}.part", f"a/b/x.json.{dead}.part"]
    others = [f"adapter.pt.{os.getppid()}.part", "film.mkv.part", f"film.mkv.{dead}.part", "adapter.pt",
              f"x.json.0{dead}.part"]
    for name in ours + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    check_writable(tmp_path)  # an hour old they would have to be: other machines may write here
    assert all((tmp_path / name).exists() for name in ours + others)
    with claim(tmp_path):
        pass
    assert {name for name in ours + others if (tmp_path / name).exists()} == set(others)


def test_checkpoint_that_was_being_replaced_is_put_together_again(tmp_path):
    for name in ("vae/new", ".saving-1/old/unet/old", ".saving-1/old/vae/old", ".saving-1/new/unet/new",
                 "text_encoder/old", ".saving-2/done/text_encoder/older"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    with claim(tmp_path):
        names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert names == {"vae/old", "unet/old", "text_encoder/old", ".lock"}


# ---------------------------------------------------------------- damaged caches, equal bytes, pictures


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def put_another_key_there(path):
    load_or_compute(lambda: {"x": torch.zeros(3)}, "another key")
    (other,) = [file for file in path.parent.iterdir() if file != path]
    other.replace(path)


@pytest.mark.parametrize("damage", [
    lambda path: flip(path, -1),
    lambda path: flip(path, 1),
    lambda path: flip(path, path.read_bytes().index(b"checksum")),
    cut,
    lambda path: path.write_bytes(b""),
    lambda path: path.write_text("text"),
    lambda path: path.write_bytes(pickle.dumps({"x": 1})),
    lambda path: save_file({"x": torch.ones(3)}, path),
    lambda path: save_file({"y": torch.ones(1)}, path),
    put_another_key_there,
])
def test_damaged_cache_is_made_anew(damage, workdir):
    x = torch.tensor([1.0, 2, 3])
    load_or_compute(lambda: {"x": x}, "key")
    (path,) = (workdir / ".cache").iterdir()
    damage(path)
    with pytest.warns(UserWarning, match="damaged"):
        assert torch.equal(load_or_compute(lambda: {"x": x}, "key")["x"], x)
    assert torch.equal(load_or_compute(None, "key")["x"], x)


def test_same_tensors_and_strings_are_the_same_bytes(tmp_path):
    metadata = {f"key {k}": f'ä "{k}"\n\\' for k in range(20)}
    tensors = {"b": torch.ones(3, 2), "a": torch.zeros(1).half()}
    path = tmp_path / "x.safetensors"
    contents = set()
    for _ in range(5):
        save_tensors(path, tensors, metadata)
        contents.add(path.read_bytes())
    (content,) = contents
    assert int.from_bytes(content[:8], "little") % 8 == 0  # tensors stay aligned
    with safe_open(path, "pt") as file:
        assert file.metadata() == metadata
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(path).items())


def test_only_our_pictures_are_replaced(tmp_path):
    save_pictures(tmp_path, torch.zeros(3, 3, 8, 8))
    mine = ["20240612_mum.png", "005.png", "001.png"]
    for name in mine:
        NOISE.save(tmp_path / name)
    with pytest.warns(UserWarning, match="001.png.bak"):
        save_pictures(tmp_path, torch.zeros(2, 3, 8, 8))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["000.png", "001.png", "001.png.bak", "005.png", "20240612_mum.png"]
    for name in ("20240612_mum.png", "005.png", "001.png.bak"):
        assert Image.open(tmp_path / name).tobytes() == NOISE.tobytes()


# ---------------------------------------------------------------- signals and processes


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM]])
def test_ctrl_c_and_sigterm_before_the_work_are_one_line(signals, capsys):
    old = signal.getsignal(signal.SIGTERM)
    # Shells start what runs in the background with SIGINT ignored.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as stop:
        run(lambda: [os.kill(os.getpid(), number) for number in signals])
    signal.signal(signal.SIGTERM, old)
    signal.signal(signal.SIGINT, ignored)
    assert stop.value.code == 130 and capsys.readouterr().err.strip().startswith("stopped")


def test_sigterm_waits_for_the_end_of_a_step_as_ctrl_c_does():
    for number in (signal.SIGINT, signal.SIGTERM):
        with interruptible() as interrupted:
            assert not interrupted()
            os.kill(os.getpid(), number)
            assert interrupted()


def test_killed_worker_does_not_hang():
    photos = [SimpleNamespace(open=die, size=8)] * 3
    with pytest.raises(OSError, match="memory"):
        list(open_photos(photos))


def test_worker_that_is_killed_while_it_waits_does_not_hang():
    """It holds the lock of the queue then, so that the other workers wait for it forever."""

    def open_them():
        photos = [SimpleNamespace(open=partial(Image.new, "RGB", (8, 8)), size=8)] * 16
        opened = open_photos(photos, chunk=8)
        next(opened)
        time.sleep(0.2)  # all wait for the next chunk
        worker = multiprocessing.active_children()[0]
        worker.kill()
        worker.join()
        with pytest.raises(OSError, match="memory"):
            list(opened)

    child = multiprocessing.get_context("fork").Process(target=open_them)
    child.start()
    child.join(20)
    child.kill()
    child.join()
    assert child.exitcode == 0


def open_slowly(log):
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(60)


def test_workers_end_with_a_killed_main_process_and_say_nothing(tmp_path):
    log, err = tmp_path / "log", tmp_path / "err"

    def open_and_wait():
        os.dup2(os.open(err, os.O_CREAT | os.O_WRONLY), 2)
        list(open_photos([SimpleNamespace(open=partial(open_slowly, log), size=8)] * 600))

    main = multiprocessing.get_context("fork").Process(target=open_and_wait)
    main.start()
    wait_until(lambda: log.exists() and log.read_text())
    main.kill()
    main.join()
    wait_until(lambda: not any(is_there(number) for number in log.read_text().split()))
    assert "Error" not in err.read_text()


def is_there(number):
    try:
        return Path(f"/proc/{number}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---------------------------------------------------------------- checkpoints


def make_task(factor=lambda step: 1.0, width=3):
    torch.manual_seed(0)
    module = torch.nn.Linear(width, width)
    steps = iter(range(10**6))

    def loss(batch, generator):
        x = torch.randn(batch, width, generator=generator)
        return module(x).square().mean() * factor(next(steps))

    return train.Task("adapter", module, loss, lambda: {"validation": 0.5})


def fit(out, task=None, **changes):
    usual = dict(steps=4, batch=2, lr=1e-2, every=2)
    options = train.Options(torch.device("cpu"), **{**usual, **changes})
    return train.fit(task or make_task(), out, options)


def press_ctrl_c(step):
    if step == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return 1.0


@pytest.fixture
def unfinished(tmp_path):
    """The checkpoint of a run that was stopped after three of four steps."""
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, make_task(press_ctrl_c))
    return tmp_path / "adapter.pt"


def test_forgetting_resume_loses_nothing(unfinished):
    before = unfinished.read_bytes()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"step 3 of 4: .*--resume.*move.*--out"):
            fit(unfinished.parent)
        assert unfinished.read_bytes() == before
    fit(unfinished.parent, resume=True)
    fit(unfinished.parent)  # it is finished: the next run needs no ceremony


def test_run_whose_result_was_not_written_is_not_finished(tmp_path):
    result, checkpoint = tmp_path / "ip-adapter.safetensors", tmp_path / "adapter.pt"
    fit(tmp_path)
    with pytest.raises(ValueError, match="--resume"), history.own_run(tmp_path, "adapter", False):
        pass
    with history.own_run(tmp_path, "adapter", True):
        result.touch()
    with history.own_run(tmp_path, "adapter", False):
        pass
    os.utime(result, (0, 0))  # of an older run
    with pytest.raises(ValueError, match="not written"), history.own_run(tmp_path, "adapter", False):
        pass
    assert checkpoint.exists()


def test_program_refuses_before_the_work_and_a_finished_run_can_be_repeated(
        unfinished, tiny_folder, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(train, "train_adapter", lambda *_: calls.append(1))
    words = ["train.py", "--model", str(tiny_folder), "--out", str(unfinished.parent)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        run(train.main)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "--resume" in line and not calls
    monkeypatch.setattr(sys, "argv", [*words, "--resume"])
    run(train.main)
    assert calls == [1]


def test_resuming_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys):
    fit(tmp_path)
    before = (tmp_path / "adapter.pt").read_bytes()
    rows = fit(tmp_path, resume=True)
    assert "all 4 steps are done" in capsys.readouterr().out
    assert len(rows) == 3 and (tmp_path / "adapter.pt").read_bytes() == before


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def change_checkpoint(path, **changes):
    state = torch.load(path, weights_only=True)
    torch.save({**state, **changes}, path)


def save_of_other_width(path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)


def flip_a_weight(path):
    weight = torch.load(path, weights_only=True)["module"]["weight"]
    flip(path, path.read_bytes().index(weight.numpy().tobytes()))


def enlarge_moments(path):
    optimizer = torch.load(path, weights_only=True)["optimizer"]
    optimizer["state"][0]["exp_avg"] = torch.zeros(7)
    change_checkpoint(path, optimizer=optimizer)


@pytest.mark.parametrize("damage, says", [
    (lambda path: path.write_bytes(b""), "move it away"),
    (lambda path: path.write_text("text"), "move it away"),
    (cut, "move it away"),
    (flip_a_weight, "move it away"),
    (lambda path: path.write_bytes(pickle.dumps(Evil())), "move it away"),
    (lambda path: torch.save(Evil(), path), "move it away"),
    (lambda path: torch.save([1, 2], path), "move it away"),
    (lambda path: torch.save({"losses": []}, path), "move it away"),
    (save_of_other_width, "move it away"),
    (lambda path: change_checkpoint(path, step=5), "move it away"),
    (lambda path: change_checkpoint(path, step="3"), "move it away"),
    (lambda path: change_checkpoint(path, rows=[]), "move it away"),
    (lambda path: change_checkpoint(path, module=torch.nn.Linear(2, 2).state_dict()), "size mismatch"),
    (lambda path: change_checkpoint(path, module={}), "Missing key"),
    (lambda path: change_checkpoint(path, optimizer={}), "does not fit"),
    (enlarge_moments, "does not fit"),
])
def test_resume_with_a_damaged_or_foreign_checkpoint_is_one_line(damage, says, unfinished, monkeypatch):
    monkeypatch.chdir(unfinished.parent)
    damage(unfinished)
    with pytest.raises(ValueError) as error:
        fit(unfinished.parent, resume=True)
    message = str(error.value)
    assert str(unfinished) in message and says in message
    assert "\n" not in message and "weights_only" not in message and not Path("executed").exists()


def test_resume_on_another_machine_warns(unfinished, monkeypatch):
    kept = unfinished.with_name("kept")
    shutil.copy(unfinished, kept)
    with warnings.catch_warnings(action="error"):
        fit(unfinished.parent, resume=True)
    shutil.copy(kept, unfinished)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with pytest.warns(UserWarning, match="threads 1, now 7.*bit for bit"):
        fit(unfinished.parent, resume=True)


def overflow(task):
    task.module.weight.register_hook(lambda grad: grad * math.inf)
    return task


def test_fp16_that_only_overflows_stops(tmp_path):
    with pytest.raises(ValueError, match="20 steps in a row.*step 20; no checkpoint was written yet"):
        fit(tmp_path, overflow(make_task()), steps=50, every=30, precision="fp16")
    assert not (tmp_path / "adapter.pt").exists()
    with pytest.raises(ValueError, match="holds the last good state, of step 15"):
        fit(tmp_path, overflow(make_task()), steps=50, every=15, precision="fp16")
    state = torch.load(tmp_path / "adapter.pt", weights_only=True)
    assert state["step"] == 15 and all(weight.isfinite().all() for weight in state["module"].values())


def test_weights_that_are_not_finite_never_replace_a_checkpoint(tmp_path):
    task = make_task()

    def spoil(step):
        if step == 3:  # the forward pass of this step does not see the bias
            task.module.bias.data[0] = math.nan
        return 1.0

    task.loss = lambda batch, generator: task.module.weight.square().mean() * spoil(generator.initial_seed())
    with pytest.raises(ValueError, match="bias is not finite.*holds the last good state, of step 2"):
        fit(tmp_path, task)
    assert torch.load(tmp_path / "adapter.pt", weights_only=True)["step"] == 2


# ---------------------------------------------------------------- what sample.py finds


def test_unreadable_newest_adapter_is_left_out_with_a_warning(workdir, tiny_folder, tiny_model, monkeypatch):
    monkeypatch.setattr(sample, "TINY", tiny_folder)
    tensors = {f"image_proj.{layer}.weight": torch.zeros(1) for layer in ("proj", "norm")}
    for name in ("whole", "cut"):
        (workdir / "runs" / name).mkdir(parents=True)
    whole, broken = [workdir / "runs" / name / "ip-adapter.safetensors" for name in ("whole", "cut")]
    (workdir / "runs" / "folder" / "ip-adapter.safetensors").mkdir(parents=True)
    save_file(tensors, whole, {"base": files.digest(tiny_model.unet)})
    broken.write_bytes(whole.read_bytes()[:-1])
    os.utime(whole, (0, 0))
    with pytest.warns(UserWarning) as given:
        assert sample.find_adapter(tiny_folder, None).parent.name == "whole"
    (warning,) = given
    assert "cut" in str(warning.message) and "left out" in str(warning.message)
