"""experiments/: every method gets the same, nothing is made twice, rows say what they were asked."""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from conftest import randn
from data import ToyFaces
from experiments import adapters, exam, scores, sweeps, table1
from ip_adapter import IPAdapter
from metrics import bootstrap_ci, fid
from support.checkpoints import ADAPTER, read_adapter
from support.files import digest
from support.pictures import to_tensor
from support.program import run
from toyfaces import drawing
from toyfaces.judge import FeatureNet
from train import Options, train_adapter
from unet import StableDiffusion

SIZE = "--people 2 --photos 2 --seeds 2 --steps 1 --device cpu --guidance 1 --batch 8".split()
PICTURES = 8  # a row


@pytest.fixture
def command(monkeypatch, capsys):
    """python -m experiments.MODULE … -> exit code, what it printed, last line of its errors."""

    def call(module, *words):
        name = module.__name__.split(".")[-1]
        monkeypatch.setattr(sys, "argv", [f"experiments/{name}.py", *map(str, words)])
        code = 0
        try:
            run(module.main)
        except SystemExit as stopped:
            code = stopped.code
        out, err = capsys.readouterr()
        return code, out, (err.strip().splitlines() or [""])[-1]

    return call


def recipe(unet, **other):
    """What an adapter's file says of a training on `unet`."""
    return {**dict.fromkeys(adapters.RECIPE, "1"), "base": digest(unet), **other}


@pytest.fixture
def exam_folder(tiny_folder, workdir, monkeypatch):
    """The tiny model, four adapters of one recipe, a DreamBooth of one step from two class pictures."""
    for module in (exam, scores, sweeps, table1, adapters):
        if hasattr(module, "TINY"):
            monkeypatch.setattr(module, "TINY", tiny_folder)
    sd = StableDiffusion.load(tiny_folder)
    for agg in ("selfattn", "max", "avg", "concat"):
        (workdir / "runs" / agg).mkdir(parents=True)
        torch.manual_seed(len(agg))
        file = workdir / f"runs/{agg}/ip-adapter.safetensors"
        IPAdapter(sd.unet, 128, agg).save(file, recipe(sd.unet))

    make_class_images, fine_tune = exam.make_class_images, exam.fine_tune

    def make_few(sd, prompt, out, count, seed):
        return make_class_images(sd, prompt, out, 2, seed, steps=1)

    def one_step(sd, prompts, z_0, z_pr, out, options, method):
        return fine_tune(sd, prompts, z_0, z_pr, out, replace(options, steps=1), method)

    def few_draws(values, statistic, *_):
        return bootstrap_ci(values, statistic, 20)

    monkeypatch.setattr(scores, "bootstrap_ci", few_draws)
    monkeypatch.setattr(exam, "make_class_images", make_few)
    monkeypatch.setattr(exam, "fine_tune", one_step)
    return workdir


def read_table(folder, stem="table"):
    text = (folder / f"runs/table/{stem}.md").read_text()
    rows = json.loads((folder / f"runs/table/{stem}.json").read_text())
    return text, rows


def split_cells(part):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()]


def test_table_has_the_papers_rows_then_controls_and_makes_none_twice(exam_folder, command, monkeypatch):
    code, out, _ = command(table1, *SIZE)
    text, said = read_table(exam_folder)
    cells, differences = map(split_cells, text.split("\n\n")[:2])
    assert code == 0 and text.splitlines()[0] in out and "not comparable" in text
    assert [row[0] for row in cells[2:]] == [
        "IP-Adapter", "DreamBooth", "IP-Adapter + Max Pooling", "IP-Adapter + Avg Pooling",
        "IP-Adapter + Self-Attention", "*controls*", "text only",
        "Max, fine-tuned", "Avg, fine-tuned", "Concat, fine-tuned",
        "the scenes asked for, drawn anew", "VAE round trip of real photos",
        "other real photos of the same people"]
    best = "IP-Adapter + Self-Attention"
    others = [row[0] for row in cells[2:] if row[0] not in (best, "*controls*")]
    assert [row[0] for row in differences] == [f"minus {best}", "---"] + others
    for name, *both in differences[2:]:
        for column, cell in zip(("FID ↓", "identity ↑"), both):
            a, b = (said["rows"][n][column][0] for n in (name, best))
            assert float(cell.split()[0]) == pytest.approx(a - b, abs=0.06 if column == "FID ↓" else 1e-3)
    assert said["command"] == "python -m experiments.table1 " + " ".join(SIZE)
    assert said["features"] == FeatureNet.name
    for name, *row in cells[2:]:
        if name != "*controls*":
            numbers = said["rows"][name]
            assert list(numbers) == cells[0][1:] and row[-1] == str(PICTURES)
            assert all(len(numbers[k]) == 3 for k in cells[0][1:8])
            assert float(row[4].split()[0]) == pytest.approx(numbers["identity ↑"][0], abs=1e-3)
            assert (row[9] == "–") == ("real photos" in name or "drawn" in name)
    assert Image.open(exam_folder / "runs/table/figure6.png").size == (96 * 10, 16 + (96 + 16) * 2)
    assert Image.open(exam_folder / "runs/table/plane.png").width > 500
    monkeypatch.setattr(exam, "generate", None)  # a second run makes no picture and trains nobody
    monkeypatch.setattr(exam, "fine_tune", None)
    assert command(table1, *SIZE)[0] == 0 and read_table(exam_folder)[0] == text
    monkeypatch.setattr(exam, "VERSION", 2)  # other code: its pictures are not these
    with pytest.raises(TypeError):
        command(table1, *SIZE)


def test_every_method_is_given_the_same_references_prompts_and_noise_of_people_nobody_trained_on(
        exam_folder, tiny_folder, command, monkeypatch):
    asked, taught, scored = [], [], []
    grade = scores.grade

    def make_pictures(sd, prompts, settings, seed, adapter=None, embeds=None, lam=1.0):
        bias = sd.unet.conv_out.bias.mean().item()
        asked.append((adapter and adapter.agg, prompts, seed, embeds, bias))
        return {"x": torch.zeros(len(prompts), 3, 64, 64, dtype=torch.uint8), "seconds": torch.tensor(1.0)}

    def fine_tune(sd, prompts, z_0, z_pr, out, options, method):
        options = options.complete("dreambooth", sd.unet)
        taught.append((prompts, z_0, len(z_pr), sd.unet.conv_out.bias.mean().item(), options.lr))
        sd.unet.conv_out.bias.data += 1
        if len(taught) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(exam, "make_pictures", make_pictures)
    monkeypatch.setattr(exam, "fine_tune", fine_tune)
    monkeypatch.setattr(scores, "grade", lambda *args: scored.append(args[1:3]) or grade(*args))
    # stopped at the second person, then resumed
    assert command(table1, *SIZE)[0] == 130 and command(table1, *SIZE)[0] == 0
    sd = StableDiffusion.load(tiny_folder)
    people = ToyFaces(102, 17, seed=2).people[100:]
    shots = [photo for person in people for photo in person.photos[9:11] for _ in range(2)]
    prompts = [photo.prompt for photo in shots]
    references = [to_tensor([photo.image for photo in person.photos[:9]]) for person in people]
    embeds = torch.stack([sd.embed_images(x) for x in references]).repeat_interleave(4, 0)
    order = ["none", "sks", "sks", "max", "avg", "selfattn", None, "max", "avg", "concat"]
    assert [agg or ("sks" if "sks" in said[0] else None) for agg, said, *_ in asked] == order
    bias = sd.unet.conv_out.bias.mean().item()
    for agg, said, seed, e, b in asked:
        if "sks" in said[0]:
            p = (seed - 2020) // 4
            own = [prompt.replace("person", "sks person") for prompt in prompts[4 * p:4 * p + 4]]
            assert said == own and seed in (2020, 2024)
            assert b == pytest.approx(bias + 1, abs=1e-4)
        else:
            assert said == prompts and seed == 2020 and b == pytest.approx(bias, abs=1e-4)
            torch.testing.assert_close(e, embeds, rtol=1e-4, atol=1e-4)
    assert len(taught) == 3
    assert all(t[0] == ["a sks person", "a person"] and t[2:] == (2, bias, 1e-3) for t in taught)
    for (_, z_0, *_), p in zip(taught, (0, 1, 1)):
        expected = sd.encode_latents(references[p], torch.Generator().manual_seed(2020))
        torch.testing.assert_close(z_0, expected, rtol=0.05, atol=0.05)  # bfloat16, perhaps
    real, again = ([photo for person in people for photo in person.photos[i:i + 4]] for i in (9, 13))
    for (x, labels), row in zip(scored[::-1], (again, real, *[shots] * 10)):
        assert labels == [photo.labels for photo in row]
    assert torch.equal(to_tensor(scored[-1][0]), to_tensor([photo.image for photo in again]))
    judge = FeatureNet.load(tiny_folder / "feature_net")
    features = [judge.features(to_tensor([photo.image for photo in row])).detach() for row in (real, again)]
    rows = read_table(exam_folder)[1]["rows"]
    assert rows["other real photos of the same people"]["FID ↓"][0] == pytest.approx(fid(*features), rel=1e-3)


def test_pictures_are_the_same_in_any_batch_and_lam_zero_is_text_only(tiny_folder):
    sd, embeds = StableDiffusion.load(tiny_folder), 9 * randn(3, 2, 128).float()
    adapter = IPAdapter(sd.unet, 128, "avg")
    prompts = ["a photo of a person", "a smiling person", "a hat"]

    def make(*adapted, batch=2, first=0):
        settings = exam.Settings(torch.device("cpu"), "fp32", guidance=2.0, steps=2, batch=batch)
        return exam.make_pictures(sd, prompts[first:], settings, 7 + first, *adapted)["x"].int()

    def same(x, y):
        return (x - y).abs().max() <= 1  # rounded to bytes

    alone, person = make(), make(adapter, embeds)
    assert same(alone, make(batch=3)) and same(alone[1:], make(first=1))
    assert not same(alone[:2], make(first=1))
    assert same(person, make(adapter, embeds, batch=3)) and not same(person, alone)
    assert same(alone, make(adapter, embeds, 0.0)) and not same(person, make(adapter, embeds.flip(0)))


def test_adapters_of_another_recipe_are_refused_and_missing_ones_trained_by_it(
        exam_folder, tiny_folder, command, monkeypatch):
    file, calls = exam_folder / "runs/avg/ip-adapter.safetensors", []
    unet = StableDiffusion.load(tiny_folder).unet
    adapter = IPAdapter(unet, 128, "avg")
    adapter.save(file, recipe(unet, lr="2"))
    code, _, line = command(table1, *SIZE)
    assert code == 2
    assert "avg/ip-adapter.safetensors was not trained with the options of selfattn" in line
    assert "(lr 2, not 1)" in line
    file.unlink()

    def train_it(words):
        calls.append(words)
        adapter.save(file, recipe(unet))
        return nullcontext(SimpleNamespace(wait=lambda: len(calls) - 1))

    monkeypatch.setattr(adapters.subprocess, "Popen", train_it)
    found = adapters.find_adapters(exam_folder / "runs", "cpu", unet, "selfattn", "avg")
    assert found["avg"] == file
    assert " ".join(calls[0][2:]) == (
        f"--agg avg --model {tiny_folder} --out {file.parent} --device cpu --resume "
        "--data 1 --people 1 --steps 1 --batch 1 --lr 1 --seed 1 --precision 1 --init 1")
    file.unlink()
    code, _, line = command(table1, *SIZE)
    assert code == 2 and "training it failed" in line
    first = exam_folder / "runs/selfattn/ip-adapter.safetensors"
    adapter.save(first)  # says nothing of how it was trained
    line = command(table1, *SIZE)[2]
    assert "selfattn/ip-adapter.safetensors was not trained" in line and "data unknown, not known" in line
    adapter.save(first, recipe(unet, base="of older weights"))
    assert "another UNet" in command(table1, *SIZE)[2]


def test_train_writes_the_recipe_that_the_table_compares(tiny_folder, workdir, monkeypatch):
    few = ToyFaces(3, photos=2).people
    monkeypatch.setattr("train.save_samples", lambda *_: None)
    monkeypatch.setattr("train.load_people", lambda *_: (few, few))
    options = Options(torch.device("cpu"), steps=1, batch=2)
    train_adapter(workdir / "run", options, str(tiny_folder), "avg", "toy", 3)
    found = read_adapter("run/ip-adapter.safetensors")[1]
    init = tiny_folder / ADAPTER
    assert [found[key] for key in adapters.OPTIONS] == ["toy", "3", "1", "2", "0.001", "0", "fp32", str(init)]

    sd, other = StableDiffusion.load(tiny_folder), workdir / "init.safetensors"
    assert found["base"].startswith(digest(sd.unet))
    IPAdapter.load(init, sd.unet, "max").save(other)  # other bytes
    train_adapter(workdir / "run", options, str(tiny_folder), "avg", "toy", 3, init=other)
    again = read_adapter("run/ip-adapter.safetensors")[1]
    assert again["base"].split()[0] == found["base"].split()[0] and again["base"] != found["base"]


@pytest.fixture
def asked(monkeypatch):
    """What a sweep asks for, in place of pictures: (agg, embeds, lam, prompts, seed, guidance)."""
    calls = []

    def make_pictures(sd, prompts, settings, seed, adapter, embeds, lam):
        calls.append((adapter.agg, embeds, lam, prompts, seed, settings.guidance))
        pictures = torch.randint(256, (len(prompts), 3, 64, 64), dtype=torch.uint8)
        return {"x": pictures, "seconds": torch.tensor(1.0)}

    monkeypatch.setattr(exam, "make_pictures", make_pictures)
    monkeypatch.setattr(scores, "bootstrap_ci", lambda *_: (0.0, 1.0))
    return calls


@pytest.mark.parametrize("which, rows, first", [
    ("refs", 36, "IP-Adapter + Max Pooling; references: 1"),
    ("lam", 14, "IP-Adapter; λ = 0.0"),
    ("w", 12, "IP-Adapter; w = 1.5"),
])
def test_sweep_varies_only_the_references_or_lam_or_w(which, rows, first, exam_folder, command, asked):
    code, out, line = command(sweeps, which, *SIZE)
    assert code == 0, line
    said = read_table(exam_folder, f"sweep_{which}")[1]["rows"]
    assert len(said) == len(asked) == rows and list(said)[0] == first
    assert Image.open(exam_folder / f"runs/table/sweep_{which}.png").width > 500
    whole = asked[8][1] if which == "refs" else asked[0][1]
    for k, (agg, embeds, lam, prompts, seed, guidance) in enumerate(asked):
        n = 1 + k % 9 if which == "refs" else 9
        assert (seed, prompts) == (2020, asked[0][3])
        assert lam == (k % 7 / 4 if which == "lam" else 1.0)
        assert guidance == (sweeps.GUIDANCES[k % 4] if which == "w" else 1.0)
        assert embeds.shape[1] == (9 if agg == "selfattn" else n)
        assert torch.equal(embeds[:, :n], whole[:, :n])
        assert all(any(torch.equal(e, given) for given in whole[0, :n]) for e in embeds[0])  # bootstrapped


def test_sweep_of_kinds_changes_only_what_the_references_hide_or_whose_they_are(
        exam_folder, tiny_folder, command, asked):
    code, _, line = command(sweeps, "kinds", *SIZE)
    assert code == 0, line
    said = read_table(exam_folder, "sweep_kinds")[1]["rows"]
    assert len(said) == len(asked) == 3 * len(sweeps.KINDS)
    assert list(said)[2] == "Concat, fine-tuned; as drawn"
    given = [embeds[::4] for _, embeds, *_ in asked]  # (2, 9, E): one a person
    assert all(torch.equal(x, given[3 * (k // 3)]) for k, x in enumerate(given))  # the same for every method
    drawn, bare, *_, hats, strangers = given[::3]
    torch.testing.assert_close(strangers[:, :6], drawn[:, :6])
    torch.testing.assert_close(strangers[:, 6:], drawn[:, 6:].flip(0))  # of two people
    torch.testing.assert_close(hats[:, 8], bare[:, 8])
    assert (hats[:, :8] - bare[:, :8]).abs().amax(2).min() > 1e-4

    person = ToyFaces(101, 9, seed=2).people[100]  # the first hundred are validation
    sd = StableDiffusion.load(tiny_folder)
    hat = drawing.draw_face(person.photos[3].labels | {"accessory": sweeps.HAT}, {}, [0, 3])
    torch.testing.assert_close(hats[0, 3], sd.embed_images(to_tensor([hat]))[0])


def test_accessories_of_the_sweep_are_those_of_the_drawing():
    words = drawing.SCENE["accessory"]
    classes = sweeps.SUNGLASSES, sweeps.HAT, sweeps.SCARF
    assert [words[k] for k in classes] == ["sunglasses", "hat", "scarf"] and words[0] == "none"


@pytest.mark.parametrize("words, says", [
    ("--people 1", "at least two people"),
    ("--photos 1 --seeds 1", "at least two people"),
    ("--seeds 0", "--seeds 0: from 1 to 1000"),
    ("--steps 0", "--steps 0: from 1 to 1000"),
    ("--steps 1001", "--steps 1001: from 1 to 1000"),
])
def test_table_of_too_few_pictures_is_one_clear_line(words, says, exam_folder, command):
    code, _, line = command(table1, *SIZE, *words.split())
    assert code == 2 and says in line
