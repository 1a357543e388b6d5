"""train.py: the loop resumes bit for bit and stops at NaN, and an adapter trains alone."""

import csv
import math
import multiprocessing
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import aggregators
import ip_adapter
import train
from data import LFW, Features
from ddpm import Schedule
from ip_adapter import IPAdapter
from support.checkpoints import ADAPTER
from support.files import digest
from support.pictures import load_image


def program(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    train.run(train.main)


@pytest.fixture(autouse=True, scope="module")
def quick():
    """One sampling step, pictures of two people: here it counts only that there are some."""
    real = ip_adapter.generate

    def generate(*args, **settings):
        return real(*args, **{**settings, "steps": 1})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ip_adapter, "generate", generate)
        patch.setattr(train.save_samples.__wrapped__, "__defaults__", (2,))
        yield


def read_log(path):
    with open(path) as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- the loop


def options(steps, **changes):
    usual = dict(batch=4, lr=1e-2, every=2)
    return train.Options(torch.device("cpu"), steps=steps, **{**usual, **changes})


def linear_task(trap=lambda call: None):
    """Fit y = 2x, with all randomness from the generator. `trap` may give the loss of a call a factor."""
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 3)
    calls = []

    def loss(batch, generator):
        calls.append(batch)
        x = torch.randn(batch, 3, generator=generator)
        factor = trap(len(calls))
        value = (module(x) - 2 * x).square().mean()
        return value if factor is None else factor * value

    return train.Task("linear", module, loss, lambda: {"validation": 0.5})


def nan_at(number):
    return lambda call: math.nan if call == number else None


def weights(task):
    return torch.cat([weight.detach().flatten() for weight in task.module.parameters()])


def test_fit_learns_and_logs(tmp_path):
    rows = train.fit(linear_task(), tmp_path, options(300, batch=16, lr=1e-1, every=100))
    assert rows[-1]["train"] < 0.2 * rows[1]["train"]
    log = read_log(tmp_path / "linear.csv")
    assert list(log[0]) == ["step", "train", "validation", "seconds"]
    assert [int(row["step"]) for row in log] == [0, 100, 200, 300]
    assert float(log[1]["train"]) == pytest.approx(rows[1]["train"], rel=1e-5)


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="nan at step 5.*lr"):
        train.fit(linear_task(nan_at(6)), tmp_path, options(20))
    state = torch.load(tmp_path / "linear.pt", weights_only=True)
    assert state["step"] == 4
    assert all(tensor.isfinite().all() for tensor in state["module"].values())


def test_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    task = linear_task()
    task.module.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(ValueError, match="gradient is"):
        train.fit(task, tmp_path, options(4, every=1))
    assert weights(task).isfinite().all()
    assert not (tmp_path / "linear.pt").exists()


def test_half_precision_scales_the_loss_and_skips_a_step_that_overflows(tmp_path):
    task = linear_task()
    scales = []
    weights_at = []

    def overflow_once(grad):
        scales.append(grad.abs().max().item())
        return grad * math.inf if len(scales) == 5 else grad

    def validate():
        weights_at.append(weights(task).clone())
        return {"validation": 0.5}

    task.module.weight.register_hook(overflow_once)
    task.validate = validate
    rows = train.fit(task, tmp_path, options(200, batch=16, lr=1e-1, precision="fp16", every=1))
    assert min(scales[:4]) > 1000  # of gradients around 1
    assert torch.equal(weights_at[4], weights_at[5])
    assert not torch.equal(weights_at[5], weights_at[6])
    assert rows[-1]["train"] < 0.3 * rows[1]["train"]


def test_a_new_run_forgets_the_checkpoint_of_an_older_one(tmp_path):
    train.fit(linear_task(), tmp_path, options(4))
    with pytest.raises(ValueError, match="nan"):
        train.fit(linear_task(nan_at(1)), tmp_path, options(4))
    assert not (tmp_path / "linear.pt").exists()


def test_ctrl_c_finishes_the_step_and_resume_is_exact(tmp_path):
    def press_ctrl_c(call):
        if call == 5:
            os.kill(os.getpid(), signal.SIGINT)

    whole = linear_task()
    train.fit(whole, tmp_path / "whole", options(12))
    with pytest.raises(KeyboardInterrupt, match="step 5.*--resume"):
        train.fit(linear_task(press_ctrl_c), tmp_path / "cut", options(12))
    rest = linear_task()
    train.fit(rest, tmp_path / "cut", options(12, resume=True))
    assert torch.equal(weights(whole), weights(rest))
    logs = [read_log(tmp_path / name / "linear.csv") for name in ("whole", "cut")]
    for row in logs[0] + logs[1]:
        del row["seconds"]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("name, given, found", [
    ("steps", 6, "4"), ("batch", 8, "4"), ("lr", 1e-3, "0.01"), ("accumulate", 2, "1"), ("seed", 1, "0"),
    ("precision", "bf16", "fp32")])
def test_resume_refuses_other_options(tmp_path, name, given, found):
    train.fit(linear_task(), tmp_path, options(4))
    others = {"steps": 4, name: given, "resume": True}
    with pytest.raises(ValueError, match=f"--{name} {found}, not {given}"):
        train.fit(linear_task(), tmp_path, options(**others))


def test_resume_refuses_other_settings(tmp_path):
    train.fit(linear_task(), tmp_path, options(4), dict(train_text_encoder=False))
    with pytest.raises(ValueError, match="--train-text-encoder False, not True"):
        train.fit(linear_task(), tmp_path, options(4, resume=True), dict(train_text_encoder=True))


def test_accumulated_batches_are_averaged(tmp_path):
    grads = []
    for accumulate in (1, 4):
        task = linear_task()
        task.module.weight.register_hook(lambda grad: grads.append(grad.clone()))
        train.fit(task, tmp_path / str(accumulate), options(1, accumulate=accumulate))
    torch.testing.assert_close(grads[0] / 4, grads[1])  # the same first batch, a quarter of the weight
    assert len(grads) == 5


def test_learning_rate_warms_up_and_decays(tmp_path, monkeypatch):
    rates = []
    real = torch.optim.AdamW.step

    def step(self, *args):
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train.fit(linear_task(), tmp_path, options(150, every=150))
    assert rates == [train.learning_rate(k, 150, 1e-2) for k in range(150)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) < 1e-2
    assert rates[-1] == pytest.approx(1e-4, rel=0.05)


def test_learning_rate_rises_in_a_straight_line_from_one_percent():
    rates = [train.learning_rate(k, 10**6, 1.0) for k in range(150)]  # so long that nothing decays yet
    assert rates[:100] == pytest.approx([0.01 * (k + 1) for k in range(100)], rel=1e-6)
    assert rates[100:] == pytest.approx([1.0] * 50, rel=1e-6)


def test_learning_rate_falls_by_half_a_cosine_to_one_percent():
    rates = [train.learning_rate(k, 400, 2.0, warm_up=1) for k in (0, 100, 200, 300, 400)]
    middle = 0.5 * 1.01
    slope = 0.5 * 0.99 / math.sqrt(2)
    assert rates == pytest.approx([2.0, 2 * (middle + slope), 2 * middle, 2 * (middle - slope), 0.02])


def test_learning_rate_rises_and_falls_at_once():
    for k in (0, 49, 99, 150):
        fall = train.learning_rate(k, 200, 1e-3, warm_up=1)
        assert train.learning_rate(k, 200, 1e-3) == pytest.approx(min(1, (k + 1) / 100) * fall)


def test_defaults_fill_only_what_is_not_given(monkeypatch):
    monkeypatch.setattr(train, "is_large", lambda unet: False)
    given = train.Options(torch.device("cpu"), batch=3, accumulate=2, seed=7)
    assert given.complete("dreambooth", None) == train.Options(
        torch.device("cpu"), steps=200, batch=3, lr=1e-3, accumulate=2, seed=7)


# ---------------------------------------------------------------- validation


def test_bands_of_t_average_to_the_validation(monkeypatch):
    """The mean of the bands, weighted by their numbers of photos, is the validation."""
    draws = []
    draw = ip_adapter.draw_t_and_eps

    def remember(*args):
        draws.append(draw(*args))
        return draws[-1]

    def unet(z_t, t, c_t, c_i):  # wrong by the number of the band
        eps = draws[-1][1]
        return eps + (t // 250)[:, None, None, None]

    monkeypatch.setattr(ip_adapter, "draw_t_and_eps", remember)
    sd = SimpleNamespace(unet=unet, schedule=Schedule.stable_diffusion())
    batches = [(torch.zeros(n, 4, 2, 2), None, None) for n in (64, 64, 7)]
    values = ip_adapter.validate_eq1(sd, batches)
    bands = [values[name] for name in ("t 0-249", "t 250-499", "t 500-749", "t 750-999")]
    assert bands == pytest.approx([0, 1, 4, 9], abs=1e-5)
    counts = torch.cat([t for t, _ in draws]).div(250, rounding_mode="floor").bincount(minlength=4)
    assert counts.min() > 0 and counts.sum() == 135
    mean = sum(n * value for n, value in zip(counts.tolist(), bands)) / 135
    assert values["validation"] == pytest.approx(mean, rel=1e-6)
    assert ip_adapter.validate_eq1(sd, batches) == values  # the same t and ε every time


# ---------------------------------------------------------------- the adapters


WORDS = ["--people", 6, "--batch", 4, "--every", 2, "--precision", "fp32"]


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """An uninterrupted run of six steps of the paper's method."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        program(patch, "--model", tiny_folder, "--steps", 6, "--out", "run", *WORDS)
    return folder


@pytest.fixture
def trained_again(trained, workdir):
    """A copy of it to go on from, in the working folder."""
    shutil.copytree(trained, workdir, dirs_exist_ok=True)


def test_adapter_run_leaves_adapter_log_and_picture(trained):
    assert sorted(path.name for path in (trained / "run").iterdir()) == [
        "adapter.csv", "adapter.pt", "curve.png", "ip-adapter.safetensors", "samples.png"]
    columns = ["step", "train", "validation", "t 0-249", "t 250-499", "t 500-749", "t 750-999", "seconds"]
    log = read_log(trained / "run" / "adapter.csv")
    assert list(log[0]) == columns
    assert [row["step"] for row in log] == ["0", "2", "4", "6"]
    for name in ("curve.png", "samples.png"):
        assert Image.open(trained / "run" / name).width > 500


def test_only_the_adapter_trains_and_all_of_it(trained, tiny_folder, tiny_model):
    before = IPAdapter.load(tiny_folder / ADAPTER, tiny_model.unet, "selfattn").state_dict()
    after = load_file(trained / "run" / "ip-adapter.safetensors")
    assert set(after) == set(before)
    for name in after:
        assert not torch.equal(after[name].float(), before[name].float()), name
    state = torch.load(trained / "run" / "adapter.pt", weights_only=True)
    assert set(state["module"]) == set(after)  # the UNet is nowhere in it


def train_and_die(words):
    """Train, and be killed in the fourth step. One thread: a fork has none of its parent's."""
    torch.set_num_threads(1)
    real = train.learning_rate

    def learning_rate(step, *rest):
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "learning_rate", learning_rate)
        program(patch, *words)


def test_kill_9_then_resume_is_bit_identical(trained, tiny_folder, workdir, monkeypatch):
    words = ["--model", tiny_folder, "--out", "run", "--steps", 6, "--device", "cpu", *WORDS]
    (workdir / ".cache").symlink_to(trained / ".cache")
    can_fork = sys.platform == "linux" and not torch.cuda.is_available()  # spawn imports all for seconds
    context = multiprocessing.get_context("fork" if can_fork else "spawn")
    victim = context.Process(target=train_and_die, args=(words,))
    victim.start()
    victim.join(100)
    assert victim.exitcode == -signal.SIGKILL
    assert torch.load("run/adapter.pt", weights_only=True)["step"] == 2
    assert not Path("run/ip-adapter.safetensors").exists()
    program(monkeypatch, *words, "--resume")
    whole = load_file(trained / "run" / "ip-adapter.safetensors")
    again = load_file("run/ip-adapter.safetensors")
    assert set(again) == set(whole)
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_resume_refuses_a_checkpoint_of_another_base_model(
        trained_again, tiny_folder, tiny_model, monkeypatch, capsys):
    bias = tiny_model.unet.conv_out.bias
    monkeypatch.setattr(bias, "data", bias.data + 1)
    other = digest(tiny_model.unet)
    monkeypatch.setattr(train, "digest", lambda unet: other)  # new weights in the old place
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, "--model", tiny_folder, "--out", "run", *WORDS, "--steps", 6, "--resume")
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "--base" in line and "--model" not in line


def test_resume_takes_another_spelling_of_the_same_folder(trained_again, tiny_folder, trained, monkeypatch):
    Path("run/ip-adapter.safetensors").unlink()
    Path("model").symlink_to(tiny_folder)
    program(monkeypatch, "--model", "./model", "--out", "run", *WORDS, "--steps", 6, "--resume")
    assert Path("run/ip-adapter.safetensors").is_file()
    rows = [read_log(folder / "run" / "adapter.csv") for folder in (Path(), trained)]
    assert rows[0] == rows[1]


def test_resume_refuses_other_photos(tiny_folder, photo_folder, workdir, monkeypatch, capsys):
    shutil.copytree(photo_folder, "mine")
    words = ["--model", tiny_folder, "--data", "mine", "--out", "run", *WORDS, "--steps", 1]
    program(monkeypatch, *words)
    shutil.copytree(max(Path("mine").iterdir()), "mine/Another")
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, *words, "--resume")
    assert stop.value.code == 2 and "--photos" in capsys.readouterr().err.splitlines()[-1]


def test_clip_sees_photos_as_they_are_in_training_as_in_sampling(tiny_model, workdir):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Path("photos", name).mkdir(parents=True)
        for k in range(2):
            noise = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((150, 210)).save(f"photos/{name}/{k}.png")
    people = LFW("photos", 64).people
    features = Features(tiny_model, people)
    originals = [load_image(file) for file in sorted(Path("photos").glob("*/*"))]
    embeds = tiny_model.embed_images(originals)
    torch.testing.assert_close(features.embeds, embeds, rtol=1e-4, atol=1e-5)
    squares = [photo.image for person in people for photo in person.photos]
    assert (features.embeds - tiny_model.embed_images(squares)).abs().max() > 1e-3


def test_the_loop_holds_no_encoder_and_checkpointing_reaches_the_unet(
        trained, tiny_folder, workdir, monkeypatch):
    models = []
    make_task = train.adapter_task

    def spy(name, sd, *rest, **options):
        models.append(sd)
        return make_task(name, sd, *rest, **options)

    def stop(*_):
        (sd,) = models
        assert (sd.vae, sd.text_encoder, sd.image_encoder) == (None, None, None)
        assert sd.unet.gradient_checkpointing is True
        raise KeyboardInterrupt

    (workdir / ".cache").symlink_to(trained / ".cache")
    monkeypatch.setattr(train, "adapter_task", spy)
    monkeypatch.setattr(train, "fit", stop)
    with pytest.raises(SystemExit) as stopped:
        program(monkeypatch, "--model", tiny_folder, *WORDS, "--checkpointing")
    assert stopped.value.code == 130


@pytest.mark.parametrize("large, rate", [(False, 1e-3), (True, 1e-4)])
def test_adapter_of_stable_diffusion_has_a_learning_rate_of_its_own(
        large, rate, trained, tiny_folder, workdir, monkeypatch):
    def stop(task, out, options, settings):
        assert (options.steps, options.batch, options.lr) == (400, 4, rate)
        raise KeyboardInterrupt

    (workdir / ".cache").symlink_to(trained / ".cache")
    monkeypatch.setattr(train, "is_large", lambda unet: large)
    monkeypatch.setattr(train, "fit", stop)
    with pytest.raises(SystemExit) as stopped:
        program(monkeypatch, "--model", tiny_folder, *WORDS)
    assert stopped.value.code == 130


def test_selfattn_starts_from_the_loss_of_average_pooling(trained, tiny_folder, monkeypatch):
    monkeypatch.chdir(trained)
    program(monkeypatch, "--model", tiny_folder, "--steps", 1, "--agg", "avg", "--out", "avg", *WORDS)
    start, average = [read_log(trained / name / "adapter.csv")[0] for name in ("run", "avg")]
    assert float(start["validation"]) == pytest.approx(float(average["validation"]), rel=1e-5)


def test_folder_of_photos_trains_with_few_photos_a_person(
        tiny_folder, photo_folder, workdir, monkeypatch, capsys):
    program(monkeypatch, "--model", tiny_folder, "--data", photo_folder, "--steps", 2, "--out", "run", *WORDS)
    assert (workdir / "run" / "samples.png").exists()
    assert "unreadable" in capsys.readouterr().err


@pytest.mark.skipif("LFW_ROOT" not in os.environ, reason="LFW_ROOT names no folder of photos")
def test_real_photos_train(tiny_folder, workdir, monkeypatch):
    some = workdir / "some"
    some.mkdir()
    for name in ("Aaron_Peirsol", "Adam_Sandler", "Abdullah", "Ai_Sugiyama", "Alec_Baldwin", "Al_Pacino"):
        (some / name).symlink_to(Path(os.environ["LFW_ROOT"]) / name)
    program(monkeypatch, "--model", tiny_folder, "--data", some, "--steps", 2, "--out", "run", *WORDS)
    assert (workdir / "run" / "samples.png").exists()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("error, says", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"),
     "out of memory (2.00 GiB more were asked for)"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB). Tried …"), "out of memory"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
                  "memory: you tried to allocate 400 bytes."), "out of memory (400 bytes more were asked for)"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling …"), "out of memory"),
])
def test_full_gpu_is_one_line_that_says_what_to_do(error, says, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        train.run(main, "less with --batch")
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith(f"error: {says}: ") and "--batch" in line


@pytest.mark.parametrize("text", ["a bug", "CUDA error: an illegal memory access was encountered"])
def test_other_failures_keep_their_traceback(text):
    def main():
        raise RuntimeError(text)

    with pytest.raises(RuntimeError, match=text):
        train.run(main)


def test_debug_shows_the_traceback_behind_a_line(monkeypatch):
    def main():
        raise ValueError("bad input")

    monkeypatch.setenv("DEBUG", "1")
    with pytest.raises(ValueError, match="bad input"):
        train.run(main)


@pytest.mark.parametrize("words, says", [
    (["--steps", "0"], "--steps"),
    (["--model", "nowhere"], "nowhere"),
    (["--init", "nowhere.safetensors"], "nowhere.safetensors: no such adapter"),
    (["--out", "FILE/run"], "FILE"),
    (["--batch", "0"], "--batch"),
    (["--device", "tpu"], "tpu"),
    (["--images", "photos", "--noun", "man", "--lora", "8"], "--method dreambooth"),
])
def test_bad_input_is_one_line_and_exit_2(monkeypatch, capsys, tiny_folder, workdir, words, says):
    (workdir / "FILE").write_text("a file")
    if "--model" not in words:
        words = ["--model", tiny_folder, *words]
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, *words, "--people", 6)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ") and says in message
    assert sorted(path.name for path in workdir.iterdir() if path.name != ".cache") == ["FILE"]


def test_one_person_is_refused_before_any_photo_is_read(
        tiny_folder, photo_folder, workdir, monkeypatch, capsys):
    somebody = next(folder for folder in photo_folder.iterdir() if len(list(folder.iterdir())) > 2)
    (workdir / "one").mkdir()
    (workdir / "one" / "somebody").symlink_to(somebody)
    with pytest.raises(SystemExit):
        program(monkeypatch, "--model", tiny_folder, "--data", "one")
    assert "only one person" in capsys.readouterr().err and not (workdir / ".cache").exists()


def test_model_without_an_image_encoder_is_refused_before_any_photo_is_read(
        tiny_folder, workdir, monkeypatch, capsys):
    shutil.copytree(tiny_folder, "model", ignore=shutil.ignore_patterns("image_encoder"))
    monkeypatch.setattr(train, "load_people", None)
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, "--model", "model", *WORDS)
    assert stop.value.code == 2 and "--image-encoder" in capsys.readouterr().err


def test_unknown_aggregator_is_exit_2(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, "--agg", "median")
    assert stop.value.code == 2 and "median" in capsys.readouterr().err


def test_an_adapter_is_trained_on_as_many_references_as_its_aggregator_wants(tiny_model, monkeypatch):
    class Three(aggregators.AveragePooling):
        references = 3

    monkeypatch.setitem(aggregators.AGGREGATORS, "three", Three)
    features = SimpleNamespace(
        groups=[torch.arange(10)], z_0=torch.zeros(10, 4, 16, 16), embeds=torch.randn(10, 128),
        c_t=torch.zeros(1, 48, 128), prompt=torch.zeros(10, dtype=torch.long), null_c_t=torch.zeros(1, 48, 128))
    for agg, wanted in (("three", 3), ("avg", 9), ("selfattn", 9)):
        adapter, shapes = IPAdapter(tiny_model.unet, 128, agg), []
        tokens = adapter.tokens
        monkeypatch.setattr(adapter, "tokens", lambda embeds: shapes.append(embeds.shape[1]) or tokens(embeds))
        task = train.adapter_task("adapter", tiny_model, adapter, features, features, torch.device("cpu"))
        task.loss(2, torch.Generator().manual_seed(0))
        with torch.inference_mode():
            task.validate()
        assert set(shapes) == {wanted}


@pytest.mark.parametrize("lr", [0, -1, "nan"])
def test_a_learning_rate_that_learns_nothing_is_refused(lr, tiny_folder, workdir, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, "--model", tiny_folder, "--lr", lr)
    assert stop.value.code == 2 and "--lr" in capsys.readouterr().err
