"""experiments/base.py: weights from scratch are a checkpoint that everything opens."""

import sys
from types import SimpleNamespace

import pytest
import torch

from data import ToyFaces, load_people
from experiments import base, base_data
from ip_adapter import IPAdapter
from support.checkpoints import ADAPTER
from support.pictures import to_images, to_tensor
from toyfaces.judge import FeatureNet
from train import Options, Task
from unet import StableDiffusion


def program(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["base.py", *map(str, words)])
    base.run(base.main)


def test_base_builds_a_folder_that_everything_opens(workdir, monkeypatch):
    monkeypatch.setattr(base, "STAGES", {name: (1, 4, 1e-4) for name in base.STAGES})
    program(monkeypatch, "--people", 2, "--out", "tiny")
    assert base.FINISHED.exists()
    folder = workdir / "tiny"
    sd = StableDiffusion.load(folder)
    IPAdapter.load(folder / ADAPTER, sd.unet)
    assert FeatureNet.load(folder / "feature_net")
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 20e6

    photos = [photo for person in ToyFaces(2, seed=0).people for photo in person.photos]
    z = sd.encode_latents(to_tensor(base_data.make_pixels(photos)))
    assert z.std().item() == pytest.approx(1, abs=0.05)
    ids = sd.tokenizer("a photo of a sks person").input_ids
    assert sd.tokenizer.convert_ids_to_tokens(ids)[5] == "sks</w>" and len(ids) == 8

    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    fit = dict(padding="max_length", max_length=48, return_tensors="pt")
    theirs = pipe.text_encoder(pipe.tokenizer(["hat, é"], **fit).input_ids)[0]
    torch.testing.assert_close(sd.encode_prompts(["hat, é"]), theirs)


class Stop(Exception):
    pass


@pytest.mark.parametrize("words, finished, left, stays", [
    (["--resume"], False, True, False),
    (["--resume"], True, True, True),  # options that are refused later change nothing
    ([], True, False, False),
])
def test_base_forgets_the_stages_of_a_finished_run_unless_it_resumes(
        words, finished, left, stays, workdir, monkeypatch):
    def stop(*_):
        raise Stop

    monkeypatch.setattr(base_data, "make_pixels", stop)
    files = touch_checkpoints(finished)
    with pytest.raises(Stop):
        program(monkeypatch, "--people", 2, *words)
    assert {file.exists() for file in files} == {left}
    assert base.FINISHED.exists() == stays


def test_a_run_is_not_finished_while_a_stage_of_it_is_made_anew(workdir):
    layer = torch.nn.Linear(2, 2)
    sd = SimpleNamespace(vae=layer, text_encoder=layer, image_encoder=layer, unet=layer)
    task = Task("vae", layer, lambda batch, generator: layer(torch.ones(batch, 2)).square().mean(),
                lambda: {"validation": 0.0})
    options = Options(torch.device("cpu"), resume=True)
    stages = base.Run(workdir / "runs", {"vae": (1, 2, 1e-3)}, options, {})
    for stays in (False, True):  # the second time there is nothing to make
        stages.folder.mkdir(exist_ok=True)
        stages.finished.touch()
        stages.train(task, sd)
        assert stages.finished.exists() == stays


def test_base_does_not_forget_a_run_that_is_not_finished(workdir, monkeypatch, capsys):
    files = touch_checkpoints(finished=False)
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, "--people", 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "--resume" in line and "move" in line
    assert all(file.exists() for file in files)


def touch_checkpoints(finished):
    files = [base.RUNS / f"{name}.pt" for name in base.STAGES]
    files[0].parent.mkdir(parents=True)
    for file in files:
        file.touch()
    if finished:
        base.FINISHED.touch()
    return files


def test_base_trains_on_nobody_of_the_adapters_and_validates_on_people_held_out(workdir, monkeypatch):
    populations = []

    def find_sources(people):
        return {photo.key[2:4] for person in people for photo in person.photos}  # seed, number of the person

    def make_pixels(photos):
        populations.append({photo.key[2:4] for photo in photos})
        if len(populations) == 2:
            raise Stop

    monkeypatch.setattr(base_data, "make_pixels", make_pixels)
    with pytest.raises(Stop):
        program(monkeypatch, "--people", 5)
    train, held = load_people("toy", 64, 5)
    assert populations == [{(0, p) for p in range(5)}, find_sources(held)]
    assert not find_sources(train) & (populations[0] | populations[1])


def test_pixels_are_the_photos_in_order(workdir):
    people = ToyFaces(2, photos=3).people
    photos = [photo for person in people for photo in person.photos]
    x = base_data.make_pixels(photos)
    assert x.shape == (6, 3, 64, 64)
    for k in range(6):
        assert to_images(to_tensor(x[k : k + 1]))[0].tobytes() == photos[k].image.tobytes()


@pytest.mark.parametrize("words, says", [
    (["--batch", "4"], "--batch"),  # every stage has its own
    (["--lr", "1e-3"], "--lr"),
    (["--people", "0"], "--people 0: from 1 to 100000"),
    (["--steps", "0"], "--steps 0: from 1 to 10000000"),
    (["--device", "tpu"], "tpu"),
])
def test_bad_input_is_exit_2(words, says, workdir, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, *words)
    assert stop.value.code == 2 and says in capsys.readouterr().err.splitlines()[-1]
    assert list(workdir.iterdir()) == []
