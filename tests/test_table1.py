"""experiments/: one plan for every method, folders of pictures made once, rows that say what was asked."""

import errno
import io
import json
import shutil
import sys
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torchvision.models.inception import Inception3

import train
from conftest import randn
from data import ToyFaces
from experiments import adapters, chosen, distances, judging, makers, photos, plan, scores, sweeps, table1
from ip_adapter import IPAdapter, generate
from metrics import bootstrap_ci, fid, kernel_distance
from support import judges
from support.checkpoints import ADAPTER, digest_encoders, read_adapter
from support.devices import autocast, pick_precision
from support.face_judge import FaceJudge
from support.face_net import FaceEncoder, MobileFaceNet
from support.files import digest, digest_file
from support.inception import InceptionV3
from support.pictures import load_image, to_images, to_tensor
from support.program import run
from test_faces import state as face_weights  # noqa: F401 (a fixture)
from toyfaces import drawing
from toyfaces.judge import FeatureNet
from train import Options, train_adapter
from unet import StableDiffusion

SIZE = "--people 2 --photos 2 --seeds 2 --steps 1 --device cpu --guidance 1 --batch 3 --trainings 1".split()
PICTURES = 8  # a row
BEST = "IP-Adapter + Self-Attention"
PAPER = ["IP-Adapter", "DreamBooth", "IP-Adapter + Max Pooling", "IP-Adapter + Avg Pooling", BEST]
CONTROLS = ["text only", "IP-Adapter + Avg Pooling, normalised", "Max, fine-tuned", "Avg, fine-tuned",
            "Concat, fine-tuned", "Same photo, fine-tuned"]
REAL = ["VAE round trip of real photos", "other real photos of the same people"]
DRAWN = "the scenes asked for, drawn anew"


def command(module, *words):
    """python -m experiments.MODULE … -> exit code, what it printed, last line of its errors."""
    name = module.__name__.split(".")[-1]
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    code = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [f"experiments/{name}.py", *map(str, words)])
        try:
            run(module.main)
        except SystemExit as stopped:
            code = stopped.code
    out, err = (stream.buffer.getvalue().decode() for stream in (out, err))
    return code, out, (err.strip().splitlines() or [""])[-1]


def recipe(unet, **other):
    """What an adapter's file says of a training on `unet`."""
    return {**dict.fromkeys(adapters.RECIPE, "1"), "seed": "0", "base": digest(unet), **other}


@pytest.fixture(scope="module")
def template(tiny_folder, tmp_path_factory):
    """A folder with runs/: adapters of one recipe."""
    folder = tmp_path_factory.mktemp("template")
    sd = StableDiffusion.load(tiny_folder)
    for name in ("selfattn", "max", "avg", "concat", "same-photo"):
        (folder / "runs" / name).mkdir(parents=True)
        torch.manual_seed(len(name))
        agg, more = (name, {}) if name != "same-photo" else ("none", {"references": name})
        file = folder / f"runs/{name}/ip-adapter.safetensors"
        IPAdapter(sd.unet, 128, agg).save(file, recipe(sd.unet, **more))
    return folder


def make_small(patch, tiny_folder):
    """The tiny model; a DreamBooth of one step from two class pictures; few draws."""
    for module in (table1, adapters, judges):
        patch.setattr(module, "TINY", tiny_folder)
    patch.setattr(photos, "is_shipped", lambda model: Path(model).samefile(tiny_folder))
    make_class_images, fine_tune = makers.make_class_images, makers.fine_tune

    def make_few(sd, prompt, out, count, seed, w):
        return make_class_images(sd, prompt, out, 2, seed, steps=1, w=w)

    def one_step(sd, prompts, z_0, z_pr, out, options, method):
        return fine_tune(sd, prompts, z_0, z_pr, out, replace(options, steps=1), method)

    def few_draws(values, statistic, _, runs):
        return bootstrap_ci(values, statistic, 20, runs=runs)

    patch.setattr(scores, "bootstrap_ci", few_draws)
    patch.setattr(scores, "DRAWS", 20)
    patch.setattr(scores, "FEW_DRAWS", 20)
    patch.setattr(makers, "make_class_images", make_few)
    patch.setattr(makers, "fine_tune", one_step)


@pytest.fixture
def exam_folder(template, tiny_folder, workdir, monkeypatch):
    """Where a command of this small world finds its adapters."""
    shutil.copytree(template / "runs", workdir / "runs", ignore=shutil.ignore_patterns("table"))
    make_small(monkeypatch, tiny_folder)
    return workdir


@pytest.fixture(scope="module")
def finished(template, tiny_folder):
    """What the command of Table 1 printed in `template`, where its results stay."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(template)
        make_small(patch, tiny_folder)
        return command(table1, *SIZE)


def read_table(folder, stem="table"):
    text = (folder / f"runs/table/{stem}.md").read_text()
    rows = json.loads((folder / f"runs/table/{stem}.json").read_text())
    return text, rows


def split_cells(part):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()]


def test_table_has_the_papers_rows_then_controls(finished, template):
    code, out, line = finished
    assert code == 0, line
    text, said = read_table(template)
    cells, differences = map(split_cells, text.split("\n\n")[:2])
    assert text.splitlines()[0] in out and "not comparable" in text
    titles = [row[0] for row in cells[2:]]
    assert titles == [*PAPER, "*controls*", *CONTROLS, DRAWN, *REAL]
    others = [title for title in titles if title not in (BEST, "*controls*")]
    assert [row[0] for row in differences] == [f"minus {BEST}", "---"] + others
    for name, *both in differences[2:]:
        for column, cell in zip(("FID ↓", "identity ↑"), both):
            a, b = (said["rows"][n][column][0] for n in (name, BEST))
            assert float(cell.split()[0]) == pytest.approx(a - b, abs=0.06 if column == "FID ↓" else 1e-3)
    assert said["command"] == "python -m experiments.table1 " + " ".join(SIZE)
    assert said["features"] == FeatureNet.name and FeatureNet.name in said["judges"][0]
    for name, *row in cells[2:]:
        if name != "*controls*":
            numbers = said["rows"][name]
            assert list(numbers) == cells[0][1:] and row[-1] == str(PICTURES)
            assert all(len(numbers[k]) == 3 for k in cells[0][1:-4])
            assert float(row[4].split()[0]) == pytest.approx(numbers["identity ↑"][0], abs=1e-3)
            of_method = not ("real photos" in name or "drawn" in name)
            assert row[-4:-1] == (["1", "1", row[-2]] if of_method else ["–", "1", "–"])
            assert of_method == (row[-2] != "–")
    assert said["rows"][REAL[1]]["copy"][0] == pytest.approx(0)  # of all others, the difference to it
    assert Image.open(template / "runs/table/figure6.png").size == (96 * 6, 16 + (96 + 16) * 2)
    assert Image.open(template / "runs/table/plane.png").width > 500


def test_every_method_is_given_the_same_references_prompts_and_noise_of_people_nobody_trained_on(
        exam_folder, tiny_folder, monkeypatch):
    asked, taught, scored = [], [], []
    grade = judging.grade_features

    def make_pictures(sd, prompts, settings, seed, adapter=None, embeds=None, lam=1.0, phi=0.0):
        bias = sd.unet.conv_out.bias.mean().item()
        asked.append((adapter and adapter.agg, prompts, seed, embeds, bias))
        return torch.zeros(len(prompts), 3, 64, 64, dtype=torch.uint8)

    def fine_tune(sd, prompts, z_0, z_pr, out, options, method):
        options = options.complete("dreambooth", sd.unet)
        taught.append((prompts, z_0, len(z_pr), sd.unet.conv_out.bias.mean().item(), options.lr))
        sd.unet.conv_out.bias.data += 1
        if len(taught) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(makers, "make_pictures", make_pictures)
    monkeypatch.setattr(makers, "fine_tune", fine_tune)
    monkeypatch.setattr(judging, "grade_features", lambda *args: scored.append(args[1:]) or grade(*args))
    words = [*SIZE, "--batch", "8"]  # the later one counts: one unit a method
    assert command(table1, *words)[0] == 130 and command(table1, *words)[0] == 0  # stopped, resumed
    sd = StableDiffusion.load(tiny_folder)
    people = ToyFaces(102, 17, seed=2).people[100:]
    shots = [[photo for photo in person.photos[9:11] for _ in range(2)] for person in people]
    prompts = [photo.prompt for photos in shots for photo in photos]
    references = [to_tensor([photo.image for photo in person.photos[:9]]) for person in people]
    embeds = torch.stack([sd.embed_images(x) for x in references]).repeat_interleave(4, 0)
    order = ["none", "sks", "sks", "max", "avg", "selfattn", None, "avg", "max", "avg", "concat", "none"]
    assert [agg or ("sks" if "sks" in said[0] else None) for agg, said, *_ in asked] == order
    bias = sd.unet.conv_out.bias.mean().item()
    for k, (agg, said, seed, e, b) in enumerate(asked):
        if "sks" in said[0]:
            p = (seed - 2020) // 4
            own = [prompt.replace("person", "sks person") for prompt in prompts[4 * p:4 * p + 4]]
            assert said == own and seed in (2020, 2024)
            assert b == pytest.approx(bias + 1, abs=1e-4)
        else:
            assert said == prompts and seed == 2020 and b == pytest.approx(bias, abs=1e-4)
        if agg:
            given = embeds
            if k == 7:  # the average of normalised embeddings
                length = embeds.norm(dim=2, keepdim=True)
                given = embeds / length * length.mean(1, keepdim=True)
                assert e.norm(dim=2).std(1).max() < 1e-4 < length.std(1).min()
            torch.testing.assert_close(e, given, rtol=0.05, atol=0.05)  # bfloat16, perhaps
    assert len(taught) == 3
    assert all(t[0] == ["a sks person", "a person"] and t[2:] == (2, bias, chosen.DREAMBOOTH["lr"]) for t in taught)
    for (_, z_0, *_), p in zip(taught, (0, 1, 1)):
        expected = sd.encode_latents(references[p], torch.Generator().manual_seed(2020))
        torch.testing.assert_close(z_0, expected, rtol=0.05, atol=0.05)  # bfloat16, perhaps
    real, again = ([person.photos[i:i + 4] for person in people] for i in (9, 13))
    rows = [again, *[shots] * 12, real]  # the row of real photos is read first
    expected = [photos for row in rows for photos in row]
    assert [labels for _, labels in scored] == [[photo.labels for photo in photos] for photos in expected]
    judge = FeatureNet.load(tiny_folder / "feature_net")
    expected = judge.features(to_tensor([photo.image for photo in again[0]])).detach()
    torch.testing.assert_close(scored[0][0], expected)
    features = [judge.features(to_tensor([photo.image for photos in row for photo in photos])).detach()
                for row in (real, again)]
    numbers = read_table(exam_folder)[1]["rows"][REAL[1]]
    assert numbers["FID ↓"][0] == pytest.approx(fid(*features), rel=1e-3)


def test_pictures_are_the_same_in_any_batch_and_lam_zero_is_text_only(tiny_folder):
    sd, embeds = StableDiffusion.load(tiny_folder), 9 * randn(3, 2, 128).float()
    adapter = IPAdapter(sd.unet, 128, "avg")
    prompts = ["a photo of a person", "a smiling person", "a hat"]

    def make(*adapted, batch=2, first=0):
        settings = plan.Settings(torch.device("cpu"), "fp32", guidance=2.0, steps=2, batch=batch)
        return makers.make_pictures(sd, prompts[first:], settings, 7 + first, *adapted).int()

    def same(x, y):
        return (x - y).abs().max() <= 1  # rounded to bytes

    alone, person = make(), make(adapter, embeds)
    assert same(alone, make(batch=3)) and same(alone[1:], make(first=1))
    assert not same(alone[:2], make(first=1))
    assert same(person, make(adapter, embeds, batch=3)) and not same(person, alone)
    assert same(alone, make(adapter, embeds, 0.0)) and not same(person, make(adapter, embeds.flip(0)))


# --------------------------------------------------------------------------- plan and makers


@pytest.fixture
def world(finished, template, exam_folder, tiny_folder):
    """What `make_folders` needs, and the finished table's folder `whole`, to be changed at will."""
    shutil.copytree(template / "runs/table", exam_folder / "whole")
    sd = StableDiffusion.load(tiny_folder)
    trained = {name: [exam_folder / f"runs/{name}/ip-adapter.safetensors"] for name in ("selfattn", "max")}
    return SimpleNamespace(sd=sd, single=tiny_folder / ADAPTER, trained=trained, whole=exam_folder / "whole")


def make_folders(world, folder, names=None, **changes):
    """Make what is missing of the finished table's plan, changed here and there; returns the plan.

    names: of the methods; default: all.
    """
    device = torch.device("cpu")
    precision = changes.pop("precision", pick_precision("auto", device))
    settings = plan.Settings(device, precision, 2, 2, 2, guidance=1.0, steps=1, batch=3)
    made = plan.make_plan(folder, replace(settings, **changes), world.sd, "toy")
    methods = table1.list_methods(world.single, world.trained, True, chosen.DREAMBOOTH)
    rows = table1.guide_methods(methods, dict.fromkeys(methods, 1.0))
    for name in names or methods:
        made.methods |= rows[name]
    makers.Maker(made, world.sd).make()
    return made


def read_bytes(folder):
    """{name: content} of all pictures and the plan."""
    files = [*folder.rglob("*.png"), folder / "plan.json"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_run_that_was_killed_twice_or_shared_out_makes_the_same_files(world, workdir, monkeypatch):
    whole = read_bytes(world.whole)
    names = ("one-photo", "dreambooth", "avg-normalised")
    make_unit, done = makers.Maker.make_unit, []

    def die(self, unit):
        done.append(unit)
        if len(done) in (2, 6):
            raise KeyboardInterrupt
        make_unit(self, unit)

    with monkeypatch.context() as patch:
        patch.setattr(makers.Maker, "make_unit", die)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                make_folders(world, workdir / "killed", names)
        lost = next((workdir / "killed/one-photo-w-1").rglob("001.png"))
        lost.unlink()  # one picture of a unit: it is made with its old neighbours
        make_folders(world, workdir / "killed", names)
    found = read_bytes(workdir / "killed")
    found.pop("plan.json")
    assert len(found) == 18 + 16 + 8 + 8 + 3 * PICTURES  # photos, and three methods
    assert all(whole[name] == content for name, content in found.items())
    assert len(done) == 3 + 2 + 3 + 2 + 1  # two were begun twice, one lost its picture

    monkeypatch.setattr(makers, "world_size", lambda: 2)
    for number in (1, 0):
        monkeypatch.setattr(makers, "rank", lambda: number)
        shared = make_folders(world, workdir / "shared", names)
        count = len(list((workdir / "shared").rglob("seconds-*.json")))
        assert count == (4 if number else 8)
    for name, content in read_bytes(workdir / "shared").items():
        assert name == "plan.json" or whole[name] == content
    assert makers.read_seconds(shared, "dreambooth-w-1") > makers.read_seconds(shared, "one-photo-w-1") > 0


def test_a_second_run_makes_no_picture_and_a_full_disk_leaves_the_old_table(
        finished, template, tiny_folder, monkeypatch):
    before = read_table(template)
    monkeypatch.chdir(template)
    make_small(monkeypatch, tiny_folder)
    monkeypatch.setattr(makers, "generate", None)
    monkeypatch.setattr(makers, "fine_tune", None)
    assert command(table1, *SIZE)[0] == 0 and read_table(template) == before

    def write_text(path, text, write=Path.write_text, **kind):
        if "table.json" in path.name:  # the second of the two files
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, text, **kind)

    monkeypatch.setattr(Path, "write_text", write_text)
    monkeypatch.setattr(scores.Table, "write_note", lambda *_: "another note")
    code, _, line = command(table1, *SIZE)
    assert code == 2 and "No space" in line and read_table(template) == before


def test_a_picture_made_by_hand_is_the_one_in_the_folder(world):
    sd, cpu = world.sd, torch.device("cpu")
    people = ToyFaces(102, 17, seed=2).people[100:]
    photos = [photo.image for person in people for photo in person.photos[:9]]
    adapter = IPAdapter.load(world.single, sd.unet, "max")
    with torch.inference_mode(), autocast(cpu, pick_precision("auto", cpu)):
        # The last unit: the second person's pictures 2 and 3, of the second prompt.
        embeds = sd.embed_images(to_tensor(photos)).float()[None, 9:].expand(2, -1, -1)
        c_i, null_c_i = adapter.tokens(embeds), adapter.tokens(torch.zeros_like(embeds[:1]))
        c_t = sd.encode_prompts([people[1].photos[10].prompt] * 2 + [""]).float()
        images = generate(sd, c_t[:2], c_t[2:], c_i, null_c_i, 1.0, steps=1, seed=2020 + 4 + 2)
    for k, image in enumerate(to_images(images)):
        found = load_image(world.whole / f"max-w-1/{people[1].name}/{k + 2:03d}.png")
        assert list(found.get_flattened_data()) == list(image.get_flattened_data())


@pytest.mark.parametrize("changes, says", [
    ({"guidance": 2.0}, "guidance 1.0, not 2.0"),
    ({"steps": 2}, "steps 1, not 2"),
    ({"seed": 1}, "seed 2020, not 1"),
    ({"batch": 4}, "batch 3, not 4"),
    ({"precision": "fp16"}, ", not fp16"),
    ({"people": 3}, "people 2, not 3; other people, photos or prompts"),
    ({"photos": 1}, "photos 2, not 1; other people, photos or prompts"),
    ("adapter", "another one-photo-w-1; another max-w-1; another avg-w-1"),
    ("model", "another model"),
    ("prompt", "other people, photos or prompts"),
    ("version", "version 3, not 4"),
    ("damaged", "not one of this program"),
])
def test_another_plan_is_refused_and_nothing_is_made(changes, says, world, workdir, monkeypatch):
    before = read_bytes(world.whole)
    if changes == "adapter":
        world.single = workdir / "other.safetensors"
        IPAdapter(world.sd.unet, 128).save(world.single)
    elif changes == "model":
        world.sd.unet.conv_out.bias.data += 1
    elif changes == "prompt":
        monkeypatch.setattr("data.write_prompt", lambda scene: "a person")
    elif changes == "version":
        monkeypatch.setattr(plan, "VERSION", 4)
    elif changes == "damaged":
        (world.whole / "plan.json").write_text("[]")
        before["plan.json"] = b"[]"
    with pytest.raises(ValueError, match="is another plan") as refusal:
        make_folders(world, world.whole, **(changes if isinstance(changes, dict) else {}))
    assert says in str(refusal.value) and "give another --out" in str(refusal.value)
    assert read_bytes(world.whole) == before


def test_methods_may_be_added_to_a_plan_or_left_out(world):
    facts = json.loads((world.whole / "plan.json").read_text())
    make_folders(world, world.whole)
    assert json.loads((world.whole / "plan.json").read_text()) == facts
    world.trained["none"] = [world.single]
    make_folders(world, world.whole)
    more = json.loads((world.whole / "plan.json").read_text())["methods"]
    assert list(more) == [*facts["methods"], "none-trained-w-1"]


# --------------------------------------------------------------------------- photos of a folder


@pytest.fixture(scope="module")
def people_folder(tmp_path_factory):
    """A folder like LFW: nine people, of whom those held out have 10, 13 and 9 photos."""
    root = tmp_path_factory.mktemp("people")
    lines = ["image\tprompt"]
    for p, person in enumerate(ToyFaces(9, photos=13, seed=6).people):
        (root / person.name).mkdir()
        count = {0: 10, 1: 13, 7: 9}.get(p, 2)
        for q, photo in enumerate(person.photos[:count]):
            name = f"{person.name}/{person.name}_{q + 1:04d}.jpg"
            photo.image.resize((80, 100)).save(root / name)
            lines.append(f"{name}\ta photo of a {'woman' if p == 0 else 'man'} {q}")
    (root / "prompts.tsv").write_text("\n".join(lines))
    return root


@pytest.fixture
def photo_words(people_folder, tiny_folder, exam_folder):
    """The command line of a table of the people in people_folder."""
    selfattn = exam_folder / "runs/selfattn/ip-adapter.safetensors"
    return [*SIZE, "--data", people_folder, "--adapter", tiny_folder / ADAPTER, "--selfattn", selfattn,
            "--inception", "toy"]


def test_table_of_photos_has_all_rows_and_with_a_face_file_its_columns(
        photo_words, face_weights, exam_folder):
    torch.save(face_weights, "faces.pt")
    faces = ["--faces", "faces.pt", "--face-box", "0,0,1,1"]
    code, out, line = command(table1, *photo_words, "--people", "5", *faces)
    assert code == 0, line
    assert "has 2 held-out people with at least 10 photos, not 5" in out
    assert "fewer than two people have pictures for the row: other real photos" in out
    text, said = read_table(exam_folder)
    rows, stranger = said["rows"], "real photos of strangers"
    assert list(rows) == [*PAPER, *CONTROLS[:2], REAL[0], stranger]
    columns = ["FID ↓", "KID ↓", "IS uniform ↑", "IS empirical ↑"]
    of_faces = ["face identity ↑", "rank-1 ↑", "face copy", "face distance ↓"]
    rest = ["copy", "CLIP-I ↑", "CLIP-T ↑", "w", "trainings", "s/picture ↓", "N"]
    assert all(list(row) == columns + of_faces + rest for row in rows.values())
    of_folders = [*columns, "face distance ↓"]
    assert [rows[stranger][column] for column in of_folders] == [None] * 5  # they are the real photos
    assert rows[REAL[0]]["face distance ↓"][0] > 0
    assert [rows[title]["N"] for title in (BEST, REAL[0], stranger)] == [8, 3, 3]
    assert "MobileFaceNet" in said["judges"][-1] and f"minus {BEST} | FID | face identity" in text
    figures = [Image.open(exam_folder / f"runs/table/{name}.png") for name in ("figure6", "generated")]
    assert [figure.size[0] for figure in figures] == [96 * 6, 96 * 2]  # with the reference; a column a person
    assert rows[REAL[0]]["rank-1 ↑"][0] > rows[stranger]["rank-1 ↑"][0]

    # The same pictures without that judge.
    code, _, line = command(table1, *photo_words, "--no-dreambooth")
    assert code == 0, line
    fewer = read_table(exam_folder)[1]["rows"]
    assert list(fewer) == [title for title in rows if title != "DreamBooth"]
    assert list(fewer[BEST]) == columns + rest and fewer[BEST]["FID ↓"] == rows[BEST]["FID ↓"]

    # Without Inception: that judge alone, whose distance takes FID's place.
    photo_words[photo_words.index("toy")] = "none"
    code, _, line = command(table1, *photo_words, *faces)
    assert code == 0, line
    text, said = read_table(exam_folder)
    assert all(list(row) == of_faces + rest for row in said["rows"].values()) and said["features"] is None
    same = [title for title in rows if title != "DreamBooth"]
    assert all(said["rows"][title][column] == rows[title][column] for title in same for column in of_faces)
    assert f"minus {BEST} | face distance | face identity" in text
    assert set(said["differences"][PAPER[0]]) == {"face distance ↓", "face identity ↑"}
    code, _, line = command(table1, *photo_words)
    assert code == 2 and "--inception none leaves nobody to judge" in line and "--faces" in line


def test_people_of_a_folder_are_held_out_and_asked_for_their_own_scenes(people_folder):
    settings = plan.Settings(torch.device("cpu"), "fp32", 2, 2, 2)
    first, second = plan.choose_subjects(people_folder, 64, settings)
    names = [[photo.name[-8:-4] for photo in part] for part in (second.references, second.held, second.more)]
    assert names == [[f"{k:04d}" for k in range(1, 10)], ["0010", "0011"], ["0012", "0013"]]
    assert len(first.held) == 1 and not first.more
    made = plan.Plan(None, settings, [first, second], "")
    assert made.prompts == ["a photo of a woman 9"] * 4 + ["a photo of a man 9"] * 2 + ["a photo of a man 10"] * 2
    assert plan.name_person(made.prompts[0], "woman") == "a photo of a sks woman 9"
    assert plan.name_person("in a garden", "man") == "in a garden, a sks man"
    few = replace(settings, photos=1, seeds=3)
    assert [len(part) for part in vars(plan.choose_subjects(people_folder, 64, few)[1]).values()][2:] == [2, 2]


def test_people_that_validation_does_not_see_come_first(monkeypatch):
    crowd = [plan.Person(str(k), "man", [None] * 10) for k in range(309)]
    monkeypatch.setattr(plan, "LFW", lambda source, size, crop: SimpleNamespace(people=crowd))
    chosen = plan.choose_subjects("folder", 64, plan.Settings(torch.device("cpu"), "fp32", people=5))
    _, held_out = plan.split(crowd)
    assert len(held_out) == 103
    assert [subject.person for subject in chosen] == held_out[100:] + held_out[:2]


@pytest.mark.parametrize("words, says", [
    ("--data empty", "empty: no person with at least 2 photos"),
    ("--data few", "two people with at least 10 photos each are needed, among the held-out third there are 1"),
    ("--faces plan.txt", "plan.txt: no weights of MobileFaceNet"),
    ("--inception plan.txt", "no Inception weights"),
    ("--face-box 0,0,1,1", "--face-box needs --faces"),
    ("--adapter narrow.safetensors", "narrow.safetensors is of another image encoder: it reads image embeddings "
                                     "of width 64, the model's have 128"),
    ("--adapter none.safetensors", "--adapter: none.safetensors: no such file"),
    ("--selfattn runs/avg/ip-adapter.safetensors", "is of the aggregator avg: name it in --trained"),
    ("--trained runs/avg/ip-adapter.safetensors runs/avg/ip-adapter.safetensors", "both of the aggregator avg"),
    ("--steps 1001", "--steps 1001: from 1 to 1000"),
    ("--out plan.txt", "plan.txt"),
])
def test_bad_input_is_one_line_and_leaves_nothing(words, says, photo_words, people_folder, exam_folder,
                                                  tiny_folder):
    (exam_folder / "empty").mkdir()
    (exam_folder / "plan.txt").write_text("hello")
    shutil.copytree(people_folder, exam_folder / "few")
    person = next((exam_folder / "few").glob("*_00000"))
    next(person.iterdir()).unlink()
    IPAdapter(StableDiffusion.load(tiny_folder).unet, 64).save("narrow.safetensors")
    code, _, line = command(table1, *photo_words, *words.split())
    assert code == 2 and says in line and line.startswith("error: ")
    assert not list(exam_folder.rglob("*.png")) and not list(exam_folder.rglob("plan.json"))


def test_steps_and_people_are_refused_before_adapters_are_trained(exam_folder, monkeypatch):
    shutil.rmtree(exam_folder / "runs")
    monkeypatch.setattr(adapters.subprocess, "Popen", None)
    for words in (["--steps", "1001"], ["--people", "1"], ["--faces", "none.pt"]):
        code, _, line = command(table1, *SIZE, *words)
        assert code == 2 and words[0][2:] in line.replace("two people", "people").replace("none.pt", "faces")
    # In a folder where there is another plan, too.
    (exam_folder / "runs/table").mkdir(parents=True)
    (exam_folder / "runs/table/plan.json").write_text('{"methods": {}, "seed": 1}')
    code, _, line = command(table1, *SIZE)
    assert code == 2 and "is another plan" in line


def test_a_recogniser_does_not_judge_its_own_embeddings():
    net = MobileFaceNet.__new__(MobileFaceNet)
    encoder = FaceEncoder.__new__(FaceEncoder)
    torch.nn.Module.__init__(net)
    torch.nn.Module.__init__(encoder)
    encoder.net = net
    with pytest.raises(ValueError, match="would judge itself"):
        table1.refuse_own_judge(encoder, net)
    table1.refuse_own_judge(encoder, FaceJudge())
    table1.refuse_own_judge(FaceJudge(), net)
    table1.refuse_own_judge(encoder, None)


# --------------------------------------------------------------------------- what rows say


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file with random weights of the official Inception's layout."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(Inception3(num_classes=1008, aux_logits=False, init_weights=False).state_dict(), path)
    return path


@pytest.fixture
def noise(tiny_model, workdir):
    """Folders of a plan, its method "max" filled with noise."""
    settings = plan.Settings(torch.device("cpu"), "fp32", 2, 1, 2)
    made = plan.make_plan(workdir / "noise", settings, tiny_model, "toy")
    made.methods = {"max": plan.Method("max")}
    photos.write_photos(made)
    for p in range(2):
        pictures = torch.randint(256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(p))
        photos.save_bytes(made.files("max", p), pictures.byte())
    return made


def score_noise(plan, sd, judge):
    return scores.Table(plan, judging.Judges(plan, sd, judge)).add_method("max")


def test_folders_scored_by_torch_fidelity_give_the_tables_fid_and_is(noise, tiny_model, inception, monkeypatch):
    peer = pytest.importorskip("torch_fidelity")
    theirs = peer.calculate_metrics(
        input1=str(noise.out / "max"), input2=str(noise.out / "real"), samples_find_deep=True, cuda=False,
        batch_size=4, save_cpu_ram=True, verbose=False, cache=False, fid=True, isc=True, isc_splits=1,
        feature_extractor_weights_path=str(inception))
    monkeypatch.setattr(scores, "bootstrap_ci", lambda *_, **options: (0, 0))
    monkeypatch.setattr(scores, "DRAWS", 0)
    monkeypatch.setattr(scores, "FEW_DRAWS", 0)
    ours = score_noise(noise, tiny_model, InceptionV3(inception, "torch-fidelity"))
    assert ours["FID ↓"][0] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["IS empirical ↑"][0] == pytest.approx(theirs["inception_score_mean"], rel=1e-4)


def test_folders_read_by_pytorch_fid_give_the_tables_fid(noise, tiny_model, inception, monkeypatch):
    peer = pytest.importorskip("pytorch_fid.inception")
    fid_score = pytest.importorskip("pytorch_fid.fid_score")
    monkeypatch.setattr(peer, "load_state_dict_from_url", lambda *_, **__: torch.load(inception, weights_only=True))
    monkeypatch.setattr(scores, "bootstrap_ci", lambda *_, **options: (0, 0))
    monkeypatch.setattr(scores, "DRAWS", 0)
    monkeypatch.setattr(scores, "FEW_DRAWS", 0)
    net = peer.InceptionV3()
    features = []
    for folder in ("real", "max"):  # its own command wants one flat folder
        files = sorted((noise.out / folder).rglob("*.png"))
        features.append(fid_score.get_activations(files, net, batch_size=4, num_workers=0))
    ours = score_noise(noise, tiny_model, InceptionV3(inception))
    assert ours["FID ↓"][0] == pytest.approx(fid(*map(torch.tensor, features)), rel=1e-4)


def test_kid_of_strangers_compares_all_pairs_but_those_of_one_person():
    x = [randn(n, 5, seed=n) for n in (2, 3, 1)]
    y = [randn(n, 5, seed=9 + n) + 0.3 for n in (1, 0, 2)]

    def k(a, b, people):
        values = [(s @ t / 5 + 1) ** 3 for p in people for q in people if p != q for s in a[p] for t in b[q]]
        return sum(values) / len(values)

    for people in ([0, 1, 2], [0, 2]):
        expected = k(x, x, people) + k(y, y, people) - 2 * k(x, y, people)
        assert distances.StrangersKID(x, y)(people) == pytest.approx(float(expected), rel=1e-10)
    twice = distances.StrangersKID([x[0], *x], [y[0], *y])([0, 1, 2, 3])
    assert distances.StrangersKID(x, y)([0, 0, 1, 2]) != pytest.approx(twice)  # a person is no stranger of itself


@pytest.mark.parametrize("width", [3, 30])  # more pictures than features, and fewer
def test_fid_from_sums_a_person_is_fid_of_the_pictures(width):
    x = [randn(n, width, seed=n) + n for n in (3, 1, 4, 2)]
    y = [2 * randn(n, width, seed=10 + n) for n in (2, 5, 0, 3)]
    grouped = distances.GroupedFID(distances.GroupedGaussian(x), distances.GroupedGaussian(y))
    for people in ([0, 1, 2, 3], [3, 0, 0, 1], [1, 1, 3]):
        real, made = [torch.cat([some[p] for p in people]) for some in (x, y)]
        assert grouped(people) == pytest.approx(fid(real, made), rel=1e-9)


def test_kid_of_strangers_is_unbiased_where_people_are_shared_and_plain_kid_is_not():
    draws = []
    for seed in range(200):
        people = 2 * randn(6, 1, 4, seed=seed)
        x, y = (people + randn(6, 3, 4, seed=1000 * k + seed) for k in (1, 2))
        draws.append([distances.StrangersKID(list(x), list(y))(list(range(6))),
                      kernel_distance(x.flatten(0, 1), y.flatten(0, 1))])
    draws = torch.tensor(draws)
    mean, error = draws.mean(0), draws.std(0) / 200**0.5
    assert abs(mean[0]) < 3 * error[0] and mean[1] < -5 * error[1]


# --------------------------------------------------------------------------- adapters, sweeps


def test_adapters_of_another_recipe_are_refused_and_missing_ones_trained_by_it(
        exam_folder, tiny_folder, monkeypatch):
    file, calls = exam_folder / "runs/avg/ip-adapter.safetensors", []
    unet = StableDiffusion.load(tiny_folder).unet
    adapter = IPAdapter(unet, 128, "avg")
    adapter.save(file, recipe(unet, lr="2"))
    code, _, line = command(table1, *SIZE)
    assert code == 2
    assert "avg/ip-adapter.safetensors was not trained with the options of selfattn" in line
    assert "(lr 2, not 1)" in line
    file.unlink()

    def train_it(words, env):
        calls.append(words)
        adapter.save(file, recipe(unet))
        return nullcontext(SimpleNamespace(wait=lambda: len(calls) - 1))

    monkeypatch.setattr(adapters.subprocess, "Popen", train_it)
    found = adapters.find_adapters(exam_folder / "runs", "cpu", "selfattn", "avg")
    assert found["avg"] == file
    assert " ".join(calls[0][2:]) == (
        f"--agg avg --model {tiny_folder} --out {file.parent} --device cpu --resume "
        "--data 1 --people 1 --steps 1 --batch 1 --lr 1 --seed 0 --precision 1 --init 1 --strangers 0.0")
    file.unlink()
    other = exam_folder / "runs/seed-1-strangers-0.5/avg/ip-adapter.safetensors"
    changed = recipe(unet, seed="1", strangers="0.5")
    other.parent.mkdir(parents=True)
    adapter.save(other, changed)
    changes = dict(seed=1, strangers=0.5)
    assert adapters.find_adapters(exam_folder / "runs", "cpu", "avg", **changes) == {"avg": other}
    adapter.save(other, recipe(unet, seed="1"))
    with pytest.raises(ValueError, match="strangers 0.0, not 0.5"):
        adapters.find_adapters(exam_folder / "runs", "cpu", "avg", **changes)
    code, _, line = command(table1, *SIZE)
    assert code == 2 and "training it failed" in line
    first = exam_folder / "runs/selfattn/ip-adapter.safetensors"
    adapter.save(first)  # says nothing of how it was trained
    line = command(table1, *SIZE)[2]
    assert "selfattn/ip-adapter.safetensors was not trained" in line and "data is not said" in line
    adapter.save(first, recipe(unet, base="of older weights"))
    assert "another UNet" in command(table1, *SIZE)[2]


def test_adapters_of_the_models_that_ship_are_kept_apart_and_trained_on_their_people(
        tiny_folder, workdir, monkeypatch):
    """Toy people, photos of a folder, and the same with a face recogniser's embeddings."""
    monkeypatch.setattr(adapters, "TINY", tiny_folder)
    shipped = workdir / "photos"
    shutil.copytree(tiny_folder, shipped)
    monkeypatch.setattr(adapters, "PHOTOS", shipped)
    assert adapters.find_world(tiny_folder, "toy").is_toys
    assert adapters.find_world(shipped, "toy") is adapters.find_world(tiny_folder, "folder") is None
    asked = []
    unet = StableDiffusion.load(tiny_folder).unet

    def train_it(words, env):
        at = words.index("--resume")
        said = {**dict(zip(words[2:at:2], words[3:at:2])), **dict(zip(words[at + 1::2], words[at + 2::2]))}
        asked.append(said)
        Path(said["--out"]).mkdir(parents=True)
        made = {**recipe(unet), "data": said["--data"], "seed": said.get("--seed", "0")}
        IPAdapter(unet, 128, said["--agg"]).save(f"{said['--out']}/ip-adapter.safetensors", made)
        return nullcontext(SimpleNamespace(wait=lambda: 0))

    monkeypatch.setattr(adapters.subprocess, "Popen", train_it)
    world = adapters.find_world("photos", "folder")  # as a user may spell it
    found = adapters.find_adapters(Path("runs"), "cpu", "selfattn", "avg", world=world, seed=1)
    assert found == {name: Path(f"runs/photos/seed-1/{name}/ip-adapter.safetensors") for name in found}
    assert [said["--out"] for said in asked] == [
        "runs/photos/selfattn", "runs/photos/seed-1/selfattn", "runs/photos/seed-1/avg"]
    assert all(said["--model"] == str(shipped) and said["--data"] == "folder" for said in asked)
    with pytest.raises(ValueError, match="trained on --data folder, not another"):
        adapters.find_adapters(Path("runs"), "cpu", "avg", world=adapters.find_world("photos", "another"))
    assert all("--image-encoder" not in said for said in asked) and asked[2]["--seed"] == "1"
    world = adapters.find_world(shipped, "folder", "faces.pt")
    found = adapters.find_adapters(Path("runs"), "cpu", "avg", world=world)
    assert found == {"avg": Path("runs/photos-faces/avg/ip-adapter.safetensors")}
    assert [said["--image-encoder"] for said in asked[3:]] == ["faces.pt"] * 2


@pytest.mark.parametrize("number, first", [(0, ["selfattn 0", "avg 0", "max 1"]),
                                           (1, ["selfattn 0", "max 0", "selfattn 1", "avg 1"])])
def test_missing_adapters_are_shared_out_among_the_processes(number, first, tmp_path, monkeypatch):
    """selfattn 0, max 0, avg 0, selfattn 1, max 1, avg 1: each second one; the recipe comes first."""
    trained = []

    def find_adapters(runs, device, *names, world, seed=0):
        for name in names:
            if not (runs / f"{name} {seed}").exists():
                (runs / f"{name} {seed}").touch()
                trained.append(f"{name} {seed}")
        return {name: runs / f"{name} {seed}" for name in names}

    monkeypatch.setattr(table1, "find_adapters", find_adapters)
    monkeypatch.setattr(table1, "rank", lambda: number)
    monkeypatch.setattr(table1, "world_size", lambda: 2)
    names = ("selfattn", "max", "avg")
    files = table1.find_trained(tmp_path, "cpu", None, names, 2)
    assert files == {name: [tmp_path / f"{name} 0", tmp_path / f"{name} 1"] for name in names}
    assert trained[: len(first)] == first and len(trained) == 6  # the other process is not there


@pytest.mark.parametrize("words, w", [
    ([], 3.0), (["--model", "SHIPPED", "--data", "folder"], 4.0), (["--data", "folder"], 4.0),
    (["--guidance", "5"], 5.0),
])
def test_w_of_all_methods_is_that_of_the_model(words, w, tiny_folder, workdir, monkeypatch):
    monkeypatch.setattr(adapters, "PHOTOS", workdir)
    words = [str(workdir) if word == "SHIPPED" else word for word in words]
    parser = table1.make_parser(table1.__doc__)
    table1.add_exam_arguments(parser)
    assert table1.make_settings(parser.parse_args(words)).guidance == w


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


def test_same_photo_is_trained_by_the_recipe_on_nothing_but_the_photo_itself(
        exam_folder, tiny_folder, monkeypatch):
    few, alone = ToyFaces(3, photos=2).people, []
    adapter_task = train.adapter_task

    def watch(*args):
        alone.append(args[6:])
        return adapter_task(*args)

    monkeypatch.setattr(train, "load_people", lambda *_: (few, few))
    monkeypatch.setattr(train, "adapter_task", watch)
    init = tiny_folder / ADAPTER
    made = dict(data="toy", people="3", steps="1", batch="2", lr="0.001", seed="0", precision="fp32", init=str(init))
    sd = StableDiffusion.load(tiny_folder)
    made["base"] = f"{digest(sd.unet)} {digest_encoders(sd)} {digest_file(init)}"
    for name in ("selfattn", "avg"):
        IPAdapter(sd.unet, 128, name).save(f"runs/{name}/ip-adapter.safetensors", made)
    (exam_folder / "runs/same-photo/ip-adapter.safetensors").unlink()
    files = adapters.find_adapters(exam_folder / "runs", "cpu", "selfattn", "avg", "same-photo")
    assert alone == [(True, 0.0)] and adapters.name_adapter(files["same-photo"]) == "same-photo"
    tensors, found = read_adapter(files["same-photo"])
    assert {key: found[key] for key in made} == made and found["agg"] == "none"
    assert any(not torch.equal(tensors[name], old) for name, old in read_adapter(init)[0].items())
    adapters.find_adapters(exam_folder / "runs", "cpu", "selfattn", "same-photo")  # and is taken now
    assert len(alone) == 1


@pytest.fixture
def asked(monkeypatch):
    """What a sweep asks for, in place of pictures: (agg, embeds, lam, prompts, seed, guidance)."""
    calls = []

    def make_pictures(sd, prompts, settings, seed, adapter, embeds, lam, phi):
        calls.append((adapter.agg, embeds, lam, prompts, seed, settings.guidance))
        return torch.randint(256, (len(prompts), 3, 64, 64), dtype=torch.uint8)

    monkeypatch.setattr(makers, "make_pictures", make_pictures)
    monkeypatch.setattr(scores, "bootstrap_ci", lambda *_, **options: (0.0, 1.0))
    monkeypatch.setattr(scores, "DRAWS", 0)
    return calls


@pytest.mark.parametrize("which, rows, first", [
    ("refs", 36, "IP-Adapter + Max Pooling; references: 1"),
    ("lam", 14, "IP-Adapter; λ = 0.0"),
    ("phi", 16, "φ = 0.0; w = 2"),
])
def test_sweep_varies_only_the_references_or_lam_or_phi(which, rows, first, exam_folder, asked):
    code, out, line = command(sweeps, which, *SIZE, "--batch", "8")
    assert code == 0, line
    said = read_table(exam_folder, f"sweep-{which}/sweep_{which}")[1]["rows"]
    assert len(said) == len(asked) == rows and list(said)[0] == first
    assert Image.open(exam_folder / f"runs/table/sweep-{which}/sweep_{which}.png").width > 500
    whole = asked[8][1] if which == "refs" else asked[0][1]
    for k, (agg, embeds, lam, prompts, seed, guidance) in enumerate(asked):
        n = 1 + k % 9 if which == "refs" else 9
        assert (seed, prompts) == (2020, asked[0][3])
        assert lam == (k % 7 / 4 if which == "lam" else 1.0)
        assert guidance == (sweeps.FEW_GUIDANCES["phi"][k % 4] if which == "phi" else 1.0)
        assert embeds.shape[1] == (9 if agg == "selfattn" else n)
        assert torch.equal(embeds[:, :n], whole[:, :n])
        assert all(any(torch.equal(e, given) for given in whole[0, :n]) for e in embeds[0])  # bootstrapped


def test_sweep_of_w_on_photos_shows_the_people_of_the_table_and_chooses_nothing(
        photo_words, exam_folder, monkeypatch):
    def make_pictures(sd, prompts, settings, *rest):
        return torch.full((len(prompts), 3, 64, 64), int(20 * settings.guidance), dtype=torch.uint8)

    monkeypatch.setattr(makers, "make_pictures", make_pictures)
    monkeypatch.setattr(sweeps, "list_methods", lambda single, trained, *rest: table1.list_methods(
        single, trained, False))
    monkeypatch.setattr(scores, "DRAWS", 20)
    code, _, line = command(sweeps, "w", *photo_words)
    assert code == 0, line
    text, said = read_table(exam_folder, "sweep-w/sweep_w")
    assert "chosen" not in text and len(said["rows"]) == 5 * len(sweeps.GUIDANCES)
    asked = json.loads((exam_folder / "runs/table/sweep-w/plan.json").read_text())
    _, held_out = plan.split(plan.LFW(photo_words[photo_words.index("--data") + 1], 64).people)
    assert set(asked["persons"]) <= {person.name for person in held_out} and not asked["validation"]


def test_sweep_of_kinds_changes_only_what_the_references_hide_or_whose_they_are(
        exam_folder, tiny_folder, asked):
    for agg in ("selfattn", "avg"):
        met = exam_folder / "runs/strangers-0.5" / agg / "ip-adapter.safetensors"
        met.parent.mkdir(parents=True)
        unet = StableDiffusion.load(tiny_folder).unet
        IPAdapter(unet, 128, agg).save(met, recipe(unet, strangers="0.5"))
    code, _, line = command(sweeps, "kinds", *SIZE, "--batch", "8")
    assert code == 0, line
    said = read_table(exam_folder, "sweep-kinds/sweep_kinds")[1]["rows"]
    assert len(said) == len(asked) == 5 * len(sweeps.KINDS)
    assert list(said)[4] == "Avg, fine-tuned, with strangers; as drawn"
    given = [embeds[::4] for _, embeds, *_ in asked]  # (2, 9, E): one a person
    assert all(torch.equal(x, given[5 * (k // 5)]) for k, x in enumerate(given))  # the same for every method
    drawn, bare, *_, hats, one, strangers = given[::5]
    torch.testing.assert_close(one[:, :8], drawn[:, :8])
    torch.testing.assert_close(one[:, 8:], drawn[:, 8:].flip(0))
    torch.testing.assert_close(strangers[:, :6], drawn[:, :6])
    torch.testing.assert_close(strangers[:, 6:], drawn[:, 6:].flip(0))  # of two people
    torch.testing.assert_close(hats[:, 8], bare[:, 8])
    assert (hats[:, :8] - bare[:, :8]).abs().amax(2).min() > 1e-4

    person = ToyFaces(101, 9, seed=2).people[100]  # the first hundred are validation
    sd = StableDiffusion.load(tiny_folder)
    hat = drawing.draw_face(person.photos[3].labels | {"accessory": sweeps.HAT}, {}, [0, 3])
    torch.testing.assert_close(hats[0, 3], sd.embed_images(to_tensor([hat]))[0], rtol=0.05, atol=0.05)


def test_table_of_several_trainings_has_every_method_at_its_own_w_and_at_the_common_one(
        exam_folder, tiny_folder, monkeypatch):
    asked = []

    def make_pictures(sd, prompts, settings, seed, adapter, embeds, lam, phi):
        weight = adapter.image_proj.proj.weight.mean().item() if adapter else None
        asked.append((settings.guidance, weight))
        return torch.randint(256, (len(prompts), 3, 64, 64), dtype=torch.uint8)

    unet = StableDiffusion.load(tiny_folder).unet
    weights = {}
    for file in (exam_folder / "runs").glob("*/*.safetensors"):
        name = file.parent.name
        adapter = IPAdapter.load(file, unet)
        weights[name, 0] = adapter.image_proj.proj.weight.mean().item()
        adapter.image_proj.proj.weight.data += 1
        weights[name, 1] = adapter.image_proj.proj.weight.mean().item()
        more = {"references": name} if name == "same-photo" else {}
        other = exam_folder / "runs/seed-1" / name / file.name
        other.parent.mkdir(parents=True)
        adapter.save(other, recipe(unet, seed="1", **more))
    monkeypatch.setattr(makers, "make_pictures", make_pictures)
    guidance = {name: 1.5 + k for k, name in enumerate(chosen.GUIDANCE)}
    monkeypatch.setattr(chosen, "GUIDANCE", guidance)
    monkeypatch.setattr(chosen, "COMMON", guidance["concat-trained"])
    words = SIZE[:SIZE.index("--guidance")]
    code, _, line = command(table1, *words, "--batch", "8", "--trainings", "2", "--no-dreambooth")
    assert code == 0, line
    of_concat = [weights["concat", 0], weights["concat", 1]]
    made = [weight for w, weight in asked if w == guidance["concat-trained"]]
    assert len(made) == 15 and len(asked) == 15 + 15 - 2  # the two of concat-trained are shared
    assert [weight for weight in made if weight in of_concat] == of_concat
    for stem, ws in (("table", guidance), ("table-common", dict.fromkeys(guidance, guidance["concat-trained"]))):
        rows = read_table(exam_folder, stem)[1]["rows"]
        assert rows["Concat, fine-tuned"]["w"] == f"{ws['concat-trained']:g}"
        assert rows[BEST]["w"] == f"{ws['selfattn']:g}" and rows["text only"]["w"] == f"{ws['text-only']:g}"
        assert rows[BEST]["trainings"] == 2 and rows[BEST]["N"] == 2 * PICTURES
        assert rows["IP-Adapter"]["trainings"] == 1 and rows["IP-Adapter"]["N"] == PICTURES
        *_, each, _ = read_table(exam_folder, stem)[0].split("\n\n")
        by_training = {name: cells for name, *cells in split_cells(each)[2:]}
        assert list(by_training) == [BEST, *CONTROLS[2:]]
        first, second = map(float, by_training[BEST][1].split(", "))
        assert (first + second) / 2 == pytest.approx(rows[BEST]["identity ↑"][0], abs=1e-3)


def test_a_row_is_the_mean_over_trainings_and_differences_pair_people_and_trainings(
        noise, tiny_model, monkeypatch):
    judge = judges.load_judge("toy")
    monkeypatch.setattr(scores, "DRAWS", 50)
    table = scores.Table(noise, judging.Judges(noise, tiny_model, judge))
    once = table.read_folder("max")
    noise.methods["other"] = plan.Method("other")
    for p in range(2):
        photos.save_bytes(noise.files("other", p), torch.full((2, 3, 64, 64), 90 * p, dtype=torch.uint8))
    again = table.read_folder("other")
    row = scores.Row(once, again)
    people = [0, 1, 1]
    for measure, name in ((row.fid(), "measure_fid"), (row.kid(), "kid")):
        values = [getattr(pictures, name)(people) for pictures in (once, again)]
        assert measure(people, [0, 1]) == pytest.approx(sum(values) / 2)
        assert measure(people, [1, 1]) == pytest.approx(values[1])
    table.add("both", row)
    assert table.numbers["both"]["FID ↓"][0] == pytest.approx(row.fid()([0, 1], [0, 1]))
    table.add("once", scores.Row(once))
    table.add("twin", scores.Row(once, again))
    table.add_differences("both")
    assert table.differences["twin"]["FID ↓"] == (0, 0, 0)  # the same draws on both sides
    low, high = table.differences["once"]["FID ↓"][1:]
    assert low < table.differences["once"]["FID ↓"][0] < high


def test_dreambooth_teaches_a_person_once_for_all_w(world, workdir, monkeypatch):
    taught = []
    fine_tune = makers.fine_tune

    def count(*args):
        taught.append(args)
        return fine_tune(*args)

    monkeypatch.setattr(makers, "fine_tune", count)
    made = make_folders(world, workdir / "curve", ["one-photo"])
    for w in (1.0, 3.0):
        made.methods[f"dreambooth-w-{w:g}"] = replace(
            table1.list_methods(None, {}, True, chosen.DREAMBOOTH)["dreambooth"][0], guidance=w)
    makers.Maker(made, world.sd).make()
    assert len(taught) == 2  # people
    whole, found = read_bytes(world.whole), read_bytes(workdir / "curve")
    same = [name for name in found if name.startswith("dreambooth-w-1/")]
    assert len(same) == PICTURES and all(whole[name] == found[name] for name in same)
    seconds = [makers.read_seconds(made, f"dreambooth-w-{w}") for w in (1, 3)]
    assert seconds[1] > 0.5 * seconds[0]  # both hold the time of teaching


def test_what_is_chosen_is_chosen_on_validation_people():
    settings = plan.Settings(torch.device("cpu"), "fp32", people=3, validation=True)
    names = [subject.name for subject in plan.choose_subjects("toy", 64, settings)]
    assert names == ["toy_00000", "toy_00001", "toy_00002"]  # of seed 2, whose first hundred validate
    assert plan.choose_subjects("toy", 64, replace(settings, validation=False))[0].name == "toy_00100"
    with pytest.raises(ValueError, match="--people 101: there are 100"):
        plan.choose_subjects("toy", 64, replace(settings, people=101))
    assert set(sweeps.CHOICES) == {"dreambooth", "w", "phi"}
    assert set(chosen.GUIDANCE) == set(table1.list_methods(
        None, {name: [None] for name in ("selfattn", "max", "avg", "concat", "same-photo")}, True))


def test_the_rule_takes_the_lowest_fid_of_a_curve_and_the_lowest_mean_of_all():
    fids = {("a", 1.0): 5.0, ("a", 2.0): 3.0, ("a", 4.0): 4.0, ("b", 1.0): 9.0, ("b", 2.0): 8.0, ("b", 4.0): 6.0}
    points = {}
    table = SimpleNamespace(numbers={}, lines=[], said=[], distance_column="FID ↓")
    table.print_line = lambda *cells: table.said.append(cells)
    for (name, x), value in fids.items():
        points[f"{name}{x}"] = sweeps.Point(name, str(x), x, plan.Method(f"{name}; {x}"))
        table.numbers[f"{name}; {x}"] = {"FID ↓": (value, 0, 99)}
    sweeps.choose(table, points, ["a", "b"])
    assert [cells[:2] for cells in table.said[2:]] == [("a", "2"), ("b", "4"), ("all of the paper", "4")]


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
def test_table_of_too_few_pictures_is_one_clear_line(words, says, exam_folder):
    code, _, line = command(table1, *SIZE, *words.split())
    assert code == 2 and says in line
