"""train.py: the loop resumes bit for bit, stops at NaN, trains the adapter alone; the base model is built whole."""

import argparse
import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data
import ip_adapter
import train
from ip_adapter import IPAdapter
from unet import StableDiffusion

ROOT = Path(train.__file__).parent


def program(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    train.run(train.main)


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Two steps a picture and few photos a validation: here it counts only that there are some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fixed_validation", partial(train.fixed_validation, photos=16))
        patch.setattr(train, "generate", lambda *args, **settings: ip_adapter.generate(*args, **{**settings, "steps": 2}))
        yield


def options(**changes):
    return argparse.Namespace(**{**dict(resume=False, seed=0, precision="fp32", device=torch.device("cpu"), accumulate=1,
                                        every=2), **changes})


def linear_task(trap=lambda step: None):
    """Fit y = 2x: a loss whose randomness comes from the generator alone; `trap` sees the count of calls."""
    torch.manual_seed(0)
    module, calls = torch.nn.Linear(3, 3), [0]

    def loss(batch, generator):
        calls[0] += 1
        x = torch.randn(batch, 3, generator=generator)
        value = trap(calls[0])
        return (module(x) - 2 * x).square().mean() * (1 if value is None else value)

    return train.Task("linear", module, loss, lambda: 0.5)


def weights(task):
    return torch.cat([p.detach().flatten() for p in task.module.parameters()])


def test_fit_learns_and_logs(tmp_path):
    task = linear_task()
    rows = train.fit(task, tmp_path, 300, 16, 1e-1, options(every=100))
    assert rows[-1][1] < 0.2 * rows[1][1]
    log = list(csv.DictReader(open(tmp_path / "linear.csv")))
    assert [int(row["step"]) for row in log] == [0, 100, 200, 300] and float(log[1]["train"]) == pytest.approx(rows[1][1], rel=1e-5)


def test_nan_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="nan at step 5.*lr"):
        train.fit(linear_task(lambda call: float("nan") if call == 6 else None), tmp_path, 20, 4, 1e-2, options())
    state = torch.load(tmp_path / "linear.pt", weights_only=True)
    assert state["step"] == 4 and all(v.isfinite().all() for v in state["module"].values())


def test_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path):
    task = linear_task()
    task.module.weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(ValueError, match="gradient is"):
        train.fit(task, tmp_path, 4, 4, 1e-2, options(every=1))
    assert weights(task).isfinite().all() and not (tmp_path / "linear.pt").exists()


def test_half_precision_scales_the_loss_and_skips_a_step_that_overflows(tmp_path):
    task, scales, weights_at = linear_task(), [], []
    task.module.weight.register_hook(lambda grad: scales.append(grad.abs().max().item()) or (
        grad * torch.inf if len(scales) == 5 else grad))
    task.validate = lambda: weights_at.append(weights(task).clone()) or 0.5
    rows = train.fit(task, tmp_path, 200, 16, 1e-1, options(precision="fp16", every=1))
    assert min(scales[:4]) > 1000                             # of gradients around 1
    assert torch.equal(weights_at[4], weights_at[5]) and not torch.equal(weights_at[5], weights_at[6])
    assert rows[-1][1] < 0.3 * rows[1][1]


def test_a_new_run_forgets_the_checkpoint_of_an_older_one(tmp_path):
    train.fit(linear_task(), tmp_path, 4, 4, 1e-2, options())
    with pytest.raises(ValueError, match="nan"):
        train.fit(linear_task(lambda call: float("nan")), tmp_path, 4, 4, 1e-2, options())
    assert not (tmp_path / "linear.pt").exists()


def test_ctrl_c_finishes_the_step_and_resume_is_exact(tmp_path):
    whole, cut = linear_task(), linear_task(lambda call: os.kill(os.getpid(), signal.SIGINT) if call == 5 else None)
    train.fit(whole, tmp_path / "whole", 12, 4, 1e-2, options())
    with pytest.raises(KeyboardInterrupt, match="step 5.*--resume"):
        train.fit(cut, tmp_path / "cut", 12, 4, 1e-2, options())
    rest = linear_task()
    train.fit(rest, tmp_path / "cut", 12, 4, 1e-2, options(resume=True))
    assert torch.equal(weights(whole), weights(rest))
    logs = [[line.rsplit(",", 1)[0] for line in open(tmp_path / name / "linear.csv")] for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_resume_refuses_other_options(tmp_path):
    train.fit(linear_task(), tmp_path, 4, 4, 1e-2, options())
    with pytest.raises(ValueError, match="--batch 4, not 8"):
        train.fit(linear_task(), tmp_path, 6, 8, 1e-2, options(resume=True))


def test_accumulated_batches_are_averaged(tmp_path):
    grads = []
    for accumulate in (1, 4):
        task = linear_task()
        task.module.weight.register_hook(lambda g: grads.append(g.clone()))
        train.fit(task, tmp_path / str(accumulate), 1, 4, 1e-2, options(accumulate=accumulate))
    torch.testing.assert_close(grads[0] / 4, grads[1])   # the same first batch, a quarter of the weight
    assert len(grads) == 5


def test_learning_rate_warms_up_and_decays(tmp_path, monkeypatch):
    rates = []
    real = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (rates.append(self.param_groups[0]["lr"]), real(self, *a))[1])
    train.fit(linear_task(), tmp_path, 400, 4, 1e-2, options(every=400))
    assert rates[0] == pytest.approx(1e-4) and max(rates) < 1e-2 and rates[-1] == pytest.approx(1e-4, rel=0.05)


WORDS = ["--people", 6, "--batch", 4, "--every", 2, "--precision", "fp32"]


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """An uninterrupted run of six steps of the paper's method."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        program(patch, "--model", tiny_folder, "--steps", 6, "--out", "run", *WORDS)
    return folder


def test_adapter_run_leaves_adapter_log_and_picture(trained):
    assert sorted(p.name for p in (trained / "run").iterdir()) == [
        "adapter.csv", "adapter.pt", "ip-adapter.safetensors", "samples.png"]


def test_only_the_adapter_trains_and_all_of_it(trained, tiny_folder):
    sd = StableDiffusion.load(tiny_folder)
    before = IPAdapter.load(tiny_folder / train.ADAPTER, sd.unet, "selfattn").state_dict()
    after = load_file(trained / "run" / "ip-adapter.safetensors")
    same = [name for name in after if torch.equal(after[name].float(), before[name].float())]
    assert set(after) == set(before) and same == []
    state = torch.load(trained / "run" / "adapter.pt", weights_only=True)
    assert set(state["module"]) == set(after)           # the UNet is nowhere in it


def test_kill_9_then_resume_is_bit_identical(trained, tiny_folder, workdir, monkeypatch):
    words = ["--model", tiny_folder, "--out", "run", *WORDS]
    (workdir / ".cache").symlink_to(trained / ".cache")
    victim = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, words), "--steps", "6"], cwd=workdir,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint, deadline = workdir / "run" / "adapter.pt", time.time() + 100
    while not checkpoint.exists() and time.time() < deadline:
        time.sleep(0.01)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert checkpoint.exists() and not (workdir / "run" / "ip-adapter.safetensors").exists()
    program(monkeypatch, *words, "--steps", 6, "--resume")
    a, b = (load_file(folder / "run" / "ip-adapter.safetensors") for folder in (trained, workdir))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resume_refuses_a_checkpoint_of_another_base_model(trained, tiny_folder, workdir, monkeypatch, capsys):
    shutil.copytree(trained, workdir, dirs_exist_ok=True)
    unet = train.StableDiffusion.load(tiny_folder).unet
    unet.conv_out.bias.data += 1   # new weights in the old place
    monkeypatch.setattr(train, "digest", lambda *_: data.digest(unet))
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, "--model", tiny_folder, "--out", "run", *WORDS, "--steps", 6, "--resume")
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "--base" in line and "--model" not in line


def test_resume_refuses_other_photos(tiny_folder, photo_folder, workdir, monkeypatch, capsys):
    words = ["--model", tiny_folder, "--data", shutil.copytree(photo_folder, "mine"), "--out", "run", *WORDS, "--steps", 2]
    program(monkeypatch, *words)
    shutil.copytree(max(Path("mine").iterdir()), "mine/Another")
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, *words, "--resume")
    assert stop.value.code == 2 and "--photos" in capsys.readouterr().err.splitlines()[-1]


def test_clip_sees_photos_as_they_are_in_training_as_in_sampling(tiny_folder, workdir):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        Path("photos", name).mkdir(parents=True)
        for k in range(2):
            noise = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((150, 210)).save(f"photos/{name}/{k}.png")
    people, sd = data.LFW("photos", 64).people, StableDiffusion.load(tiny_folder)
    features = data.Features(sd, people, "photos")
    originals = [data.load_image(f) for f in sorted(Path("photos").glob("*/*"))]
    torch.testing.assert_close(features.embeds, sd.embed_images(originals), rtol=1e-4, atol=1e-5)
    cut = sd.embed_images([photo.image for person in people for photo in person.photos])
    assert (features.embeds - cut).abs().max() > 1e-3


def test_the_loop_holds_no_encoder_and_checkpointing_reaches_the_unet(trained, tiny_folder, workdir, monkeypatch):
    task, seen = train.adapter_task, []

    def stop(*_):
        sd, = seen
        seen.append((sd.vae, sd.text_encoder, sd.image_encoder, sd.unet.gradient_checkpointing))
        raise KeyboardInterrupt

    (workdir / ".cache").symlink_to(trained / ".cache")
    monkeypatch.setattr(train, "adapter_task", lambda name, sd, *rest: seen.append(sd) or task(name, sd, *rest))
    monkeypatch.setattr(train, "fit", stop)
    with pytest.raises(SystemExit):
        program(monkeypatch, "--model", tiny_folder, *WORDS, "--checkpointing")
    assert seen[1] == (None, None, None, True)


@pytest.mark.parametrize("large, rate", [(False, 1e-3), (True, 1e-4)])
def test_adapter_of_stable_diffusion_has_a_learning_rate_of_its_own(large, rate, trained, tiny_folder, workdir, monkeypatch):
    def stop(task, out, steps, batch, lr, args):
        assert (steps, batch, lr) == (400, 4, rate)
        raise KeyboardInterrupt

    (workdir / ".cache").symlink_to(trained / ".cache")
    monkeypatch.setattr(train, "is_large", lambda unet: large)
    monkeypatch.setattr(train, "fit", stop)
    with pytest.raises(SystemExit) as stopped:
        program(monkeypatch, "--model", tiny_folder, *WORDS)
    assert stopped.value.code == 130


@pytest.mark.parametrize("error, says", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has …"), "CUDA out of memory"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB). Tried …"), "MPS backend out of memory (MPS allocated: 9 GB)")])
def test_full_gpu_is_one_line_that_says_what_to_do(error, says, monkeypatch, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        train.run(main)
    line, = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and line.startswith(f"error: {says}: ") and "--batch" in line


def test_other_failures_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        train.run(lambda: exec("raise RuntimeError('a bug')"))


def test_selfattn_starts_from_the_loss_of_average_pooling(trained, tiny_folder, monkeypatch):
    monkeypatch.chdir(trained)
    program(monkeypatch, "--model", tiny_folder, "--steps", 1, "--agg", "avg", "--out", "avg", *WORDS)
    first = [next(csv.DictReader(open(trained / name / "adapter.csv")))["validation"] for name in ("run", "avg")]
    assert float(first[0]) == pytest.approx(float(first[1]), rel=1e-5)


def test_folder_of_photos_trains_with_few_photos_a_person(tiny_folder, photo_folder, workdir, monkeypatch, capsys):
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


@pytest.mark.parametrize("words, says", [
    (["--steps", "0"], "--steps"),
    (["--model", "nowhere"], "nowhere"),
    (["--init", "nowhere.safetensors"], "nowhere.safetensors"),
    (["--out", "FILE/run"], "FILE"),
    (["--batch", "0"], "--batch"),
    (["--device", "tpu"], "tpu"),
    (["--method", "base", "--batch", "4"], "--batch"),
    (["--images", "photos", "--noun", "man", "--lora", "8"], "--method dreambooth"),
])
def test_bad_input_is_one_line_and_exit_2(monkeypatch, capsys, tiny_folder, workdir, words, says):
    (workdir / "FILE").write_text("a file")
    words = ["--model", str(tiny_folder)] * ("--model" not in words) + words
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, *words, "--people", 6)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ") and says in message
    assert sorted(p.name for p in workdir.iterdir() if p.name != ".cache") == ["FILE"]


def test_one_person_is_refused_before_any_photo_is_read(tiny_folder, photo_folder, workdir, monkeypatch, capsys):
    (workdir / "one").mkdir()
    (workdir / "one" / "somebody").symlink_to(next(f for f in photo_folder.iterdir() if len(list(f.iterdir())) > 2))
    with pytest.raises(SystemExit):
        program(monkeypatch, "--model", tiny_folder, "--data", "one")
    assert "only one person" in capsys.readouterr().err and not (workdir / ".cache").exists()


def test_model_without_an_image_encoder_is_refused_before_any_photo_is_read(tiny_folder, workdir, monkeypatch, capsys):
    shutil.copytree(tiny_folder, "model", ignore=shutil.ignore_patterns("image_encoder"))
    monkeypatch.setattr(train, "dataset", None)
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, "--model", "model", *WORDS)
    assert stop.value.code == 2 and "--image-encoder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program(monkeypatch, "--model", tiny_folder, "--init", "nowhere.safetensors", *WORDS)
    assert "nowhere.safetensors: no such adapter" in capsys.readouterr().err


def test_unknown_aggregator_is_exit_2(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, "--agg", "median")
    assert stop.value.code == 2 and "median" in capsys.readouterr().err


def test_base_builds_a_folder_that_everything_opens(workdir, monkeypatch):
    monkeypatch.setattr(train, "BASE", {name: (1, 8, 1e-4) for name in train.BASE})
    program(monkeypatch, "--method", "base", "--people", 3, "--out", "tiny")
    sd = StableDiffusion.load(workdir / "tiny")
    IPAdapter.load(workdir / "tiny" / train.ADAPTER, sd.unet)
    assert data.FeatureNet.load(workdir / "tiny" / "feature_net")
    assert sum(f.stat().st_size for f in (workdir / "tiny").rglob("*")) < 20e6
    z = sd.encode_latents(data.to_tensor(data.pixels(data.ToyFaces(3, seed=0))))
    assert z.std().item() == pytest.approx(1, abs=0.05)
    ids = sd.tokenizer("a photo of a sks person").input_ids
    assert sd.tokenizer.convert_ids_to_tokens(ids)[5] == "sks</w>" and len(ids) == 8
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(workdir / "tiny", torch_dtype=torch.float32)
    theirs = pipe.text_encoder(pipe.tokenizer(["hat, é"], padding="max_length", max_length=48, return_tensors="pt").input_ids)[0]
    torch.testing.assert_close(sd.encode_prompts(["hat, é"]), theirs)


def test_base_forgets_the_stages_of_an_older_run_unless_it_resumes(workdir, monkeypatch):
    class Stop(Exception):
        pass

    def drawn(*_):
        raise Stop

    monkeypatch.setattr(train, "pixels", drawn)
    files = [workdir / f"runs/base/{name}.pt" for name in train.BASE]
    files[0].parent.mkdir(parents=True)
    for resume, left in ((["--resume"], len(files)), ([], 0)):
        for file in files:
            file.touch()
        with pytest.raises(Stop):
            program(monkeypatch, "--method", "base", "--people", 2, *resume)
        assert sum(file.exists() for file in files) == left


def test_nobody_is_in_training_and_held_out_at_once(photo_folder):
    for data_, number in (("toy", 30), (photo_folder, None)):
        ours, others = train.dataset(argparse.Namespace(data=data_, people=number), 64)
        drawn = [{(p.name, tuple(sorted(p.photos[0].labels.items()))) for p in people} for people, _ in (ours, others)]
        assert drawn[0] and drawn[1] and not drawn[0] & drawn[1]


def test_judge_is_only_asked_for_what_can_be_seen():
    names = list(data.FeatureNet().heads)
    labels = {name: 0 for name in names} | {"accessory": data.SCENE["accessory"].index("hat")}
    classes, seen = train.label_tensors([labels])
    assert [n for n, s in zip(names, seen[0]) if not s] == ["hair", "hair_colour"]
    logits = {name: torch.zeros(1, k) for name, k in data.FeatureNet().heads.items()}
    base = train.masked_cross_entropy(logits, classes, seen)
    logits["hair"] = torch.tensor([[-50.0] + [50.0] * 5])
    assert train.masked_cross_entropy(logits, classes, seen) == base
    logits["eyes"] = torch.tensor([[-50.0, 50, 50, 50]])
    assert train.masked_cross_entropy(logits, classes, seen) > base


def test_worn_pictures_are_shifted_whole():
    images = torch.zeros(8, 3, 64, 64)
    images[:, :, 30:33, 40:43] = 1
    moved = train.worn(images, torch.Generator().manual_seed(0))
    found = [divmod(int(m.mean(0).flatten().argmax()), 64) for m in moved]
    assert len(set(found)) > 3 and all(abs(r - 31) <= 4 and abs(c - 41) <= 4 for r, c in found)
