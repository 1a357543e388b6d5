"""A model of photographs: crop, people of a folder, encoders and judges of faces, all stages of base.py."""

import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

import sample
from conftest import close, randn
from data import LFW, ToyFaces, load_people
from ddpm import Schedule
from experiments import (base, base_average, base_data, base_identity, base_judge, base_tasks,
                         base_together, memorised, plan, scores, table1)
from experiments import base_networks
from experiments.base_networks import PHOTO_SIZES, Sizes, make_world
from ip_adapter import IPAdapter
from metrics import fid
from support import checkpoints, hints
from support.checkpoints import ADAPTER, FACE_ADAPTER, find_shipped
from support.crops import Crop, find_crop, parse_crop, read_crop
from support.face_net import (DEEP_FUNNELED, WHOLE, MobileFaceNet, find_face_box,
                              map_box)
from support.judges import load_face_judge, name_face_box
from support.pictures import load_image, save_image, to_tensor
from test_faces import state as face_weights  # noqa: F401 (a fixture)
from train import Options, Task, fit
from unet import StableDiffusion

SMALL = Sizes([16, 16, 16], 48, 3, 64, 1, 2, [16, 32], 2)  # instead of PHOTO_SIZES: a test is to be fast
CROP = Crop((58, 48, 198, 188), (250, 250))
WORDS = ["--crop", "58,48,198,188", "--device", "cpu", "--precision", "fp32"]


def program(module, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    module.run(module.main)


@pytest.fixture(scope="module")
def portraits(tmp_path_factory):
    """Toy faces in the crop of 250 × 250 photos, in the layout of LFW; prompts.tsv beside them."""
    root = tmp_path_factory.mktemp("portraits") / "people"
    lines = ["image\tprompt"]
    counts = [1, 11, 2, 2, 3, 1, 2, 2, 2, 11, 11]
    for person, count in zip(ToyFaces(len(counts), photos=11, seed=7).people, counts):
        folder = root / person.name
        folder.mkdir(parents=True)
        for q, photo in enumerate(person.photos[:count]):
            picture = Image.new("RGB", (250, 250), "red")
            picture.paste(photo.image.resize((140, 140)), (58, 48))
            name = f"{person.name}/{person.name}_{q + 1:04d}.jpg"
            picture.save(root / name, quality=95)
            lines.append(f"{name}\ta photo of a {'smiling ' if q % 2 else ''}man")
    (root.parent / "prompts.tsv").write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def face_file(face_weights, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("faces") / "mobilefacenet.pt"
    torch.save(face_weights, path)
    return path


# ---------------------------------------------------------------- the crop


def test_the_crop_cuts_photos_of_its_frame_and_no_others(portraits):
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None]
    whole = LFW(portraits, 64).people[0].photos[0]
    cut = LFW(portraits, 64, crop=CROP).people[0].photos[0]
    corner = to_tensor([whole.image])[0][:, :4, :4]
    assert (corner - red).abs().max() < 0.2
    assert (to_tensor([cut.image])[0][:, :4, :4] - red).abs().max() > 0.5
    assert whole.key != cut.key and cut.key[:-1] == whole.key
    other = Image.new("RGB", (250, 240), "blue")
    assert CROP.cut(other) is other


def test_a_crop_in_fractions_is_the_one_in_pixels():
    assert parse_crop("58,48,198,188", (250, 250)) == CROP
    assert parse_crop("0.232,0.192,0.792,0.752", (250, 250)) == CROP
    assert CROP.fractions == pytest.approx((0.232, 0.192, 0.792, 0.752), abs=1e-12)


@pytest.mark.parametrize("text", ["face", "1,2,3", "58,48,198,180", "0,0,0,0", "9,9,300,300", "0,0,nan,1",
                                  "198,48,58,188", "-10,0,10,20", "0,0,1e99,1"])
def test_a_crop_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="crop") as error:
        parse_crop(text, (250, 250))
    assert "\n" not in str(error.value)


def test_the_face_box_is_mapped_through_a_crop_of_the_frame():
    expected = (2.8 / 140, 3.08 / 140, 137.2 / 140, 137.48 / 140)
    assert find_face_box(CROP) == pytest.approx(expected, abs=1e-12)
    assert find_face_box(None) == DEEP_FUNNELED
    assert find_face_box(Crop((0, 0, 90, 90), (90, 120))) == WHOLE
    assert map_box(DEEP_FUNNELED, WHOLE) == pytest.approx(DEEP_FUNNELED, abs=1e-12)
    with pytest.raises(ValueError, match="cut off a part of the face"):
        find_face_box(Crop((100, 0, 250, 150), (250, 250)))


@pytest.fixture(scope="module")
def cut_model(tmp_path_factory):
    """A folder with a model of photos: random weights, and the crop."""
    folder = tmp_path_factory.mktemp("cut")
    torch.manual_seed(0)
    sd = make_world(SMALL, ["a photo of a smiling man"] * 9, torch.device("cpu"))
    sd.preprocessor = {**sd.preprocessor, **CROP.describe()}
    sd.save(folder)
    return folder


def test_a_model_remembers_its_crop_whatever_its_image_encoder_is(cut_model, tiny_folder, face_file):
    assert read_crop(cut_model) == CROP and read_crop(tiny_folder) is None
    for encoder in (None, False, face_file, tiny_folder):
        sd = StableDiffusion.load(cut_model, image_encoder=encoder)
        assert find_crop(sd.preprocessor) == CROP
    box = [float(word) for word in name_face_box(cut_model).split(",")]
    assert box == pytest.approx(find_face_box(CROP)) and name_face_box(tiny_folder).startswith("0.24")


def test_a_crop_that_is_none_is_refused_with_the_model(tiny_folder, tmp_path):
    for part in tiny_folder.iterdir():
        (tmp_path / part.name).symlink_to(part)
    file = tmp_path / "feature_extractor/preprocessor_config.json"
    settings = json.loads(file.read_text())
    (tmp_path / "feature_extractor").unlink()
    file.parent.mkdir()
    file.write_text(json.dumps({**settings, "face_crop": {"box": [0, 0, 9], "frame": [9, 9]}}))
    with pytest.raises(ValueError, match="the crop 0,0,9 of a photo of 9 × 9"):
        StableDiffusion.load(tmp_path)


def test_tables_and_train_py_cut_photos_as_the_model_does(cut_model, portraits):
    sd = StableDiffusion.load(cut_model)
    train, _ = load_people(portraits, 64, crop=find_crop(sd.preprocessor))
    assert train[0].photos[0].key[-1] == CROP
    settings = plan.Settings(torch.device("cpu"), "fp32", 2, 1, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "split", lambda people: ([], people))
        subjects = plan.make_plan(None, settings, sd, portraits).subjects
    assert {photo.key[-1] for subject in subjects for photo in subject.references} == {CROP}


@pytest.mark.parametrize("made, agg, count, says", [
    ("none", "none", 3, "none reads the first of the 3 references; --agg avg reads all"),
    ("none", "none", 1, ""),
    ("none", "avg", 30, ""),
    ("none", "selfattn", 9, "a.safetensors was trained without selfattn"),
    ("selfattn", "selfattn", 9, ""),
    ("selfattn", "selfattn", 12, "selfattn reads the first 9 of the 12 references"),
])
def test_sample_says_where_references_count_less_than_was_meant(tiny_model, tmp_path, made, agg, count, says,
                                                                capsys):
    file = tmp_path / "a.safetensors"
    IPAdapter(tiny_model.unet, 16, made, attach=False).save(file)
    hints.note_references(IPAdapter(tiny_model.unet, 16, agg, attach=False), file, count)
    said = capsys.readouterr().out
    assert says in said and bool(says) == bool(said)


def test_sample_says_that_the_encoder_of_photographs_is_weak(tiny_model, capsys):
    adapter = IPAdapter(tiny_model.unet, 16, "avg", attach=False)
    hints.note_references(adapter, checkpoints.PHOTOS / FACE_ADAPTER, 3)
    assert not capsys.readouterr().out
    hints.note_references(adapter, checkpoints.PHOTOS / ADAPTER, 3)
    assert "hardly sees who it is" in capsys.readouterr().out


def test_sample_says_which_model_has_an_adapter_of_faces(tiny_folder, portraits, face_file, workdir, capsys,
                                                               monkeypatch):
    file = next(portraits.glob("*/*.jpg"))
    words = ["--refs", file, "--prompt", "x", "--n", 1, "--steps", 1, "--device", "cpu"]
    with pytest.raises(SystemExit):
        program(sample, monkeypatch, "--model", tiny_folder, *words, "--image-encoder", face_file)
    assert "mobilefacenet.pt: --model weights/photos has one, or name" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        program(sample, monkeypatch, "--model", tiny_folder, *words, "--image-encoder", "mobilefacenet.pt")
    assert "support/README.md, Faces, says where to get it" in capsys.readouterr().err


def test_sample_cuts_references_and_says_when_that_is_a_guess(tmp_path, portraits, capsys):
    file = sorted(portraits.glob("*/*.jpg"))[0]
    (cut,) = sample.open_references([file], CROP)
    assert cut.size == (140, 140)
    said = capsys.readouterr().out
    assert "250 × 250 pixels" in said and "cut by the box 58,48,198,188" in said and "centre" not in said
    save_image(tmp_path / "me.png", Image.new("RGB", (90, 60)))
    _, mine = sample.open_references([file, tmp_path / "me.png"], CROP)
    assert mine.size == (90, 60) and "me.png the centre square" in capsys.readouterr().out
    sample.open_references([tmp_path / "me.png"], None)
    assert not capsys.readouterr().out


# ---------------------------------------------------------------- MobileFaceNet as image encoder


def test_the_face_encoder_is_mobilefacenets_own_reading_of_the_same_crop(cut_model, portraits, face_file):
    files = sorted(portraits.glob("*/*.jpg"))[:3]
    photos = [load_image(file, 64, CROP) for file in files]
    net = MobileFaceNet(face_file, find_face_box(CROP))
    with torch.inference_mode():
        expected = net.read(net.resize(to_tensor(photos)))[0]
    sd = StableDiffusion.load(cut_model, image_encoder=face_file)
    assert sd.image_encoder.config.image_size == 64 and sd.image_encoder.config.projection_dim == 128
    torch.testing.assert_close(sd.embed_images(photos), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sd.embed_images(to_tensor(photos)), expected, rtol=1e-4, atol=1e-4)
    assert F.cosine_similarity(expected, sd.embed_images([photo.rotate(90) for photo in photos])).max() < 0.999


def test_the_adapter_that_a_folder_ships_is_that_of_the_image_encoder(tmp_path, face_file):
    assert find_shipped("a") == find_shipped("a", tmp_path) == Path("a") / ADAPTER
    assert find_shipped("a", face_file) == Path("a") / FACE_ADAPTER


# ---------------------------------------------------------------- who is who


def count_photos(root, counts):
    for p, count in enumerate(counts):
        (root / f"p{p:03d}").mkdir()
        for q in range(count):
            (root / f"p{p:03d}/{q:04d}.jpg").touch()
    return root


def test_nobody_of_training_or_validation_is_asked_for_in_a_table(tmp_path):
    root = count_photos(tmp_path, [1, 2, 10, 9, 3, 12] * 25)
    learned, held = ({person.name for person in some} for some in base_data.choose_people(root, 64))
    assert held and not learned & held
    for validation in (False, True):
        settings = plan.Settings(torch.device("cpu"), "fp32", validation=validation)
        exam = {subject.name for subject in plan.choose_subjects(root, 64, settings)}
        assert exam and not exam & (learned | held)
    everybody = LFW(root, 64, min_photos=1).people
    assert {person.name for person in everybody if len(person.photos) == 1} <= learned
    assert all(2 <= len(list((root / name).iterdir())) <= 9 for name in held)


def test_without_people_to_validate_on_nothing_begins(tmp_path):
    with pytest.raises(ValueError, match="nobody to validate on"):
        base_data.choose_people(count_photos(tmp_path, [1, 12, 12]), 64)


@pytest.fixture
def faces(portraits, workdir):
    return base_data.read_faces(base_data.choose_people(portraits, 64, CROP)[0])


def test_a_partner_is_any_other_photo_of_the_person_and_of_one_photo_itself(faces):
    i = torch.arange(len(faces.who)).repeat(200)
    partner = faces.draw_partners(i, torch.Generator().manual_seed(0))
    assert (faces.who[partner] == faces.who[i]).all()
    counts = torch.bincount(faces.who)[faces.who[i]]
    assert ((partner == i) == (counts == 1)).all()
    seen = {(a, b) for a, b in zip(i.tolist(), partner.tolist())}
    sizes = torch.bincount(faces.who).tolist()
    assert len(seen) == sum(max(1, size * (size - 1)) for size in sizes)


def test_both_sides_are_what_the_encoder_says_of_photo_and_mirror_image(faces, cut_model, face_file):
    for encoder in (None, face_file):
        sd = StableDiffusion.load(cut_model, image_encoder=encoder)
        sides = base_data.embed_both_sides(sd, faces.pixels)
        for side, pixels in zip(sides, (faces.pixels, faces.pixels.flip(3))):
            torch.testing.assert_close(side, sd.embed_images(to_tensor(pixels)).clone(), rtol=1e-4, atol=1e-4)


def test_every_pair_of_a_batch_is_of_one_person(faces):
    i = base_identity.draw_pairs(faces, 64, torch.Generator().manual_seed(0))
    who = faces.who[i].unflatten(0, (-1, 2))
    assert len(i) == 64 and (who[:, 0] == who[:, 1]).all() and len(set(who[:, 0].tolist())) > 3


def test_photos_are_mirrored_half_of_the_time_and_unreadable_ones_left_out(tmp_path, workdir):
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste("black", (0, 0, 32, 64))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture.save(tmp_path / name / "1.png")
    (tmp_path / "b/1.png").rename(tmp_path / "b/2.png")
    (tmp_path / "b/1.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="1 of 3 photos are unreadable and left out: b/1.png"):
        faces = base_data.read_faces(LFW(tmp_path, 64, min_photos=1).people)
    assert faces.who.tolist() == [0, 1] and len(faces.prompts) == 2
    drawn = faces.pick(torch.zeros(400, dtype=torch.int64), torch.Generator().manual_seed(0))
    dark_left = (drawn[:, 0, 0, 0] == 0).float().mean().item()
    assert 0.4 < dark_left < 0.6 and (drawn[:, 0, 0, 0] != drawn[:, 0, 0, 63]).all()


# ---------------------------------------------------------------- losses


def test_margin_softmax_without_margin_is_cross_entropy_of_cosines():
    embeds, names = randn(5, 8).float(), randn(4, 8, seed=1).float()
    who = torch.tensor([0, 1, 2, 3, 0])
    cosines = F.cosine_similarity(embeds[:, None], names[None], dim=2)
    plain = base_identity.margin_softmax(embeds, names, who, margin=0, scale=7)
    close(plain, F.cross_entropy(7 * cosines, who), 1e-5)
    handicap = cosines.clone()
    handicap[torch.arange(5), who] -= 0.3
    with_margin = base_identity.margin_softmax(embeds, names, who, margin=0.3, scale=7)
    close(with_margin, F.cross_entropy(7 * handicap, who), 1e-5)
    assert with_margin > plain


def test_attraction_is_least_where_photos_of_a_person_are_one():
    who = torch.tensor([0, 0, 1, 1])
    unit = torch.eye(4)[who]
    others = torch.tensor([1 / 0.1, 0, 0])  # its partner, and two of somebody else
    close(base_identity.attraction(unit, who), -others.log_softmax(0)[0], 1e-5)
    assert base_identity.attraction(unit[[0, 2, 1, 3]], who) > 5


def test_equal_prompts_are_no_negatives_of_each_other():
    which = torch.tensor([0, 0, 1, 0])
    logits = 100.0 * F.one_hot(which, 2)
    assert base_identity.prompt_loss(logits, which) < 1e-6
    # As different prompts they would be: three photos fit each of the three.
    apart = torch.tensor([0, 1, 2, 3])
    assert base_identity.prompt_loss(logits[:, [0, 0, 1, 0]], apart) > 0.5


def test_auc_counts_pairs_in_the_right_order():
    unit = torch.tensor([[1.0, 0], [0.9, 0.1], [0.8, 0.6], [0.0, 1]])
    who = torch.tensor([0, 0, 1, 1])
    cosines = F.normalize(unit, dim=1) @ F.normalize(unit, dim=1).T
    same = [cosines[0, 1], cosines[2, 3]]
    other = [cosines[0, 2], cosines[0, 3], cosines[1, 2], cosines[1, 3]]
    right = sum(float(a > b) for a in same for b in other) / 8
    assert base_identity.measure_auc(unit, who) == pytest.approx(right, abs=1e-12) and 0.5 < right < 1


def test_min_snr_weights_are_one_where_noise_is_strong_and_fall_as_one_over_snr():
    schedule = Schedule.stable_diffusion()
    t = torch.tensor([0, 100, 999])
    ratio = schedule.alpha_bar[t] / (1 - schedule.alpha_bar[t])
    expected = torch.tensor([5 / ratio[0], 5 / ratio[1], 1])
    close(base_tasks.min_snr_weights(t, schedule, 5.0), expected.float(), 1e-6)
    assert ratio[1] > 5 > ratio[2]


# ---------------------------------------------------------------- the mean of the weights


def test_the_average_follows_the_weights_and_the_best_one_is_kept():
    layer = torch.nn.Linear(1, 1, bias=False)
    average = base_average.Average(layer, decay=0.5)
    layer.weight.data.fill_(0)
    average.mean_0.zero_()
    average.updates.fill_(1000)  # the warm-up is over
    for value, mean in ((8.0, 4.0), (8.0, 6.0), (0.0, 3.0)):
        layer.weight.data.fill_(value)
        average.update()
        assert average.mean_0.item() == mean
        average.keep(mean)
    with average.applied():
        assert layer.weight.item() == 3
    assert layer.weight.item() == 0
    average.settle()
    assert layer.weight.item() == 6
    start = base_average.Average(torch.nn.Linear(1, 1, bias=False))
    start.network.weight.data.fill_(100)
    start.update()  # a random start weighs a tenth at once
    assert start.mean_0.item() > 89


def test_a_stage_with_a_mean_goes_on_bit_for_bit(workdir):
    def train(out, resume=False, stop=None):
        torch.manual_seed(0)
        layer = torch.nn.Linear(2, 1)
        average = base_average.Average(layer)
        calls = []

        def loss(batch, generator):
            calls.append(batch)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return layer(torch.randn(batch, 2, generator=generator)).square().mean()

        task = Task("stage", layer, loss, lambda: {"validation": float(layer.weight.square().sum())})
        options = Options(torch.device("cpu"), "fp32", 4, 3, 0.1, every=2, resume=resume)
        fit(base_average.average_task(task, average), Path(out), options)
        average.settle()
        return average.state_dict()

    whole = train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("parts", stop=4)
    again = train("parts", resume=True)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert whole["updates"] == 4


# ---------------------------------------------------------------- all stages


def test_weights_of_photos_fit_into_24_megabytes():
    with torch.device("meta"):
        unet = base_networks.make_unet(PHOTO_SIZES)
        networks = [unet, base_networks.make_vae(PHOTO_SIZES), IPAdapter(unet, PHOTO_SIZES.text), IPAdapter(unet, 128)]
    tokenizer = base_networks.make_tokenizer(["a photo of a smiling man"] * 9, 48)
    networks.append(base_networks.make_text_encoder(PHOTO_SIZES, tokenizer, 48))
    networks.append(base_networks.make_image_encoder(PHOTO_SIZES))
    numbers = sum(weight.numel() for network in networks for weight in network.parameters())
    assert 20e6 < 2 * numbers < 23e6  # float16; and a little for tokenizer and settings


@pytest.fixture
def quick(monkeypatch):
    """Small networks, one step a stage, two portraits of one step."""
    monkeypatch.setattr(base, "PHOTO_SIZES", SMALL)
    monkeypatch.setattr(base, "PHOTO_STAGES", {name: (1, 4, 1e-3) for name in base.PHOTO_STAGES})
    monkeypatch.setattr(base_together.choose_portraits, "__defaults__", (2,))
    monkeypatch.setattr(base_together.make_portraits, "__defaults__", (2.0, 1))


def test_base_of_a_folder_of_photos_is_a_model_for_everything(portraits, face_file, quick, workdir, monkeypatch,
                                                              capsys):
    words = ["--data", portraits, *WORDS, "--image-encoder", face_file, "--out", "photos"]
    program(base, monkeypatch, *words, "--until", "clip")
    assert not (workdir / "photos/unet").exists() and "stopped after clip" in capsys.readouterr().out
    events = []  # the second adapter begins with the W_k and W_v that the UNet has learned
    make, train_average = base.make_adapter, base.Run.train_average
    with monkeypatch.context() as patch:
        patch.setattr(base, "make_adapter", lambda *args: events.append("make") or make(*args))
        patch.setattr(base.Run, "train_average", lambda self, task, *args, **more: events.append(
            task.name) or train_average(self, task, *args, **more))
        program(base, monkeypatch, *words, "--resume")
    assert events == ["make", "together", "make", "ip_adapter"]
    settings = torch.load(base.PHOTO_RUNS / "together.pt", weights_only=True)["settings"]
    assert settings["min-snr"] == "5.0"  # the default
    out = capsys.readouterr().out
    assert "vae: validation" in out and "together: validation" in out
    log = (base.PHOTO_RUNS / "together.csv").read_text().splitlines()
    assert len(log) == 3 and "text alone" in log[0] and "identity" not in log[0]  # no --judge
    log = (base.PHOTO_RUNS / "ip_adapter.csv").read_text().splitlines()
    assert len(log) == 3 and {"identity", "rank-1", "text alone"} <= set(log[0].split(","))
    assert {file.name for file in base.PHOTO_RUNS.glob("*.png")} == {
        "vae.png", "text.png", "together.png", "ip_adapter.png"}

    # Used: sample.py with both adapters, each with its own encoder.
    files = sorted(portraits.glob("*9/*.jpg"))[:2]
    for more in ([], ["--image-encoder", face_file]):
        program(sample, monkeypatch, "--model", "photos", "--refs", *files, "--prompt", "a photo of a man",
                "--steps", 1, "--n", 1, "--device", "cpu", *more)
        expected = FACE_ADAPTER if more else ADAPTER
        assert f"photos/{expected}" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # an adapter of the other encoder
        program(sample, monkeypatch, "--model", "photos", "--refs", *files, "--prompt", "a photo of a man",
                "--adapter", f"photos/{FACE_ADAPTER}", "--n", 1, "--device", "cpu")
    assert "width 128, not 48" in capsys.readouterr().err

    with pytest.raises(SystemExit):
        program(table1, monkeypatch, "--model", "photos", "--data", portraits, "--image-encoder", face_file,
                "--faces", face_file, "--inception", "none", "--device", "cpu")
    assert "would judge itself" in capsys.readouterr().err

    # Trained on from there: UNet and adapters alone, on the same crop.
    more = [word for word in words if word not in (*WORDS, "--out", "photos")]
    with pytest.raises(SystemExit):  # its second adapter would be left with the old UNet
        program(base, monkeypatch, "--data", portraits, "--init", "photos")
    assert "name that recogniser with --image-encoder" in capsys.readouterr().err
    keep, scores_so_far = base_average.Average.keep, iter(range(9))
    with monkeypatch.context() as patch:
        patch.setattr(base_average.Average, "keep", lambda self, _: keep(self, next(scores_so_far)))  # the last
        program(base, monkeypatch, *more, "--init", "photos", "--min-snr", 5, "--steps", 3, "--out", "further")
    said = capsys.readouterr().out
    assert "together: validation" in said and "vae: validation" not in said
    assert read_crop("further") == CROP
    before, after = (tensors_of(workdir / name) for name in ("photos", "further"))
    assert before.keys() == after.keys()
    moved = {name.split("/")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"unet", "ip_adapter"}
    # Three steps of the warm-up move a weight by less than 1e-3: they began where that ended.
    assert all((after[name] - before[name]).abs().max() < 0.01 for name in before)

    # With --resume another crop is another training.
    program(base, monkeypatch, *words)
    capsys.readouterr()
    words[words.index("58,48,198,188")] = "50,40,200,190"
    with pytest.raises(SystemExit):
        program(base, monkeypatch, *words, "--resume")
    said = capsys.readouterr().err
    assert "--resume" in said and "--crop" in said
    assert (base.PHOTO_RUNS / "finished").exists()  # what was refused has changed nothing
    words[words.index("50,40,200,190")] = "58,48,198,188"
    with pytest.raises(SystemExit):  # it decides which means may be kept
        program(base, monkeypatch, *words, "--resume", "--every", 1)
    assert "--every 100, not 1" in capsys.readouterr().err


def test_a_model_is_written_with_its_adapters_or_not_at_all(cut_model, workdir):
    sd = StableDiffusion.load(cut_model)
    base.save_world(workdir / "out", sd, {ADAPTER: IPAdapter(sd.unet, 48), FACE_ADAPTER: IPAdapter(sd.unet, 128)})
    before = tensors_of(workdir / "out")
    assert {FACE_ADAPTER, ADAPTER} <= {name.split(" ")[0] for name in before}

    class Broken(IPAdapter):
        def save(self, path):
            raise OSError("the disk is full")

    with torch.no_grad():
        sd.unet.conv_in.weight.add_(1)
    with pytest.raises(OSError):
        base.save_world(workdir / "out", sd, {ADAPTER: Broken(sd.unet, 48)})
    after = tensors_of(workdir / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    # A new UNet leaves no adapter of the old one behind.
    base.save_world(workdir / "out", sd, {ADAPTER: IPAdapter(sd.unet, 48)})
    assert not (workdir / "out" / FACE_ADAPTER).exists()


def tensors_of(folder):
    """{path in the folder and name: tensor} of all weights."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            found[f"{path.relative_to(folder)} {name}"] = tensor
    return found


def test_unet_and_adapter_learn_together_then_an_adapter_alone(cut_model, portraits, workdir, monkeypatch):
    sd = StableDiffusion.load(cut_model)
    learned, held_out = base_data.choose_people(portraits, 64, CROP)
    faces, held = base_data.read_faces(learned), base_data.read_faces(held_out)
    latents = base_data.encode_both_sides(sd, faces.pixels)
    assert latents.shape == (2, len(faces.pixels), 4, 16, 16)
    mirrored = sd.encode_latents(to_tensor(faces.pixels[:1].flip(3)))
    assert F.mse_loss(latents[1, :1], mirrored) < F.mse_loss(latents[0, :1], mirrored)
    # What is in the cache knows its precision.
    for read in (base_data.encode_both_sides, base_data.embed_both_sides):
        exact = read(sd, faces.pixels)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = read(sd, faces.pixels)
        assert not torch.equal(exact, rounded) and F.cosine_similarity(exact, rounded, dim=-1).mean() > 0.9
    embeds = randn(2, len(faces.pixels), 48).float()
    branch = base_together.Branch(ADAPTER, embeds, None, adapter=IPAdapter(sd.unet, 48))

    def make_task(frozen, branch=branch, latents=latents):
        device = torch.device("cpu")
        return base_together.together_task(sd, branch, latents, faces, held, device, workdir, 3.0, frozen)

    for frozen in (False, True):
        sd.unet.requires_grad_(False)
        sd.unet.zero_grad()
        branch.adapter.zero_grad()
        task = make_task(frozen)
        task.module.requires_grad_(True)
        task.loss(4, torch.Generator().manual_seed(0)).backward()
        assert branch.adapter.image_proj.proj.weight.grad.any()
        assert branch.adapter.ip_adapter["1"]["to_v_ip"].weight.grad.any()
        assert (sd.unet.conv_in.weight.grad is None) == frozen
        assert task.name == ("ip_adapter" if frozen else "together")

    # What a photo is asked to be like is another one of the person: photo k is the number k + 1.
    numbers = torch.arange(1.0, len(faces.pixels) + 1)[None, :, None].expand(2, -1, 48)
    of_numbers = base_together.Branch(ADAPTER, numbers, None, adapter=branch.adapter)
    targets = numbers[..., :1, None, None].expand(2, -1, 4, 16, 16)
    pairs = []
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(branch.adapter, "tokens", lambda embeds: embeds[:, 0, 0])
        patch.setattr(base_together, "diffusion_loss", lambda sd, z_0, t, eps, c_t, c_i, gamma: pairs.extend(
            [] if c_i is None else zip(z_0[:, 0, 0, 0].int().tolist(), c_i.int().tolist())) or torch.ones(()))
        make_task(False, of_numbers, targets).loss(400, torch.Generator().manual_seed(0))
    shown = [(target - 1, reference - 1) for target, reference in pairs if reference]  # 0: dropped
    assert 250 < len(shown) < len(pairs) == 300
    counts = torch.bincount(faces.who)
    assert all(faces.who[a] == faces.who[b] and (a == b) == (counts[faces.who[a]] == 1) for a, b in shown)

    # While the UNet learns, a quarter of the batch has the prompt alone.
    for frozen, expected in ((False, {(16, True), (48, False)}), (True, {(64, False)})):
        seen = []
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(base_together, "diffusion_loss", lambda sd, z_0, t, eps, c_t, c_i, gamma: seen.append(
                (len(z_0), c_i is None)) or torch.tensor(gamma if c_i is None else gamma / 3))
            mean = make_task(frozen).loss(64, torch.Generator().manual_seed(0))
        assert set(seen) == expected and len(seen) == len(expected)
        assert mean == (1 if frozen else (16 * 3 + 48) / 64)  # over the rows


def test_identity_is_of_the_persons_other_photos(faces):
    class Judge(torch.nn.Linear):  # knows every photo: its features say whose it is
        def resize(self, images):
            return images

        def read(self, images):
            known = to_tensor(faces.pixels).flatten(1)
            number = torch.cdist(images.flatten(1), known).argmin(dim=1)
            return F.one_hot(faces.who[number], len(faces.people)).float(), None

    judge = Judge(1, 1)
    chosen = base_together.choose_portraits(faces)
    assert (faces.who[chosen[:, 0]] == faces.who[chosen[:, 1]]).all() and (chosen[:, 0] != chosen[:, 1]).all()
    second = to_tensor(faces.pixels[chosen[:, 1]])
    right = base_together.measure_identity(judge, second, chosen, faces)
    assert right == pytest.approx({"identity": 1, "rank-1": 1})
    wrong = base_together.measure_identity(judge, second.roll(1, 0), chosen, faces)
    assert wrong == pytest.approx({"identity": -1 / (len(chosen) - 1), "rank-1": 0})
    # Somebody whom all look like: no identity.
    same = base_together.measure_identity(judge, second[:1].expand_as(second), chosen, faces)
    assert same == pytest.approx({"identity": 0, "rank-1": 1 / len(chosen)}, abs=1e-6)


def test_min_snr_weighs_eq1(cut_model):
    sd = StableDiffusion.load(cut_model)
    z_0, eps, c_t = randn(4, 4, 16, 16).float(), randn(4, 4, 16, 16).float(), randn(4, 48, 48).float()
    t = torch.tensor([0, 100, 500, 999])
    alone = [base_tasks.diffusion_loss(sd, z_0[k:k + 1], t[k:k + 1], eps[k:k + 1], c_t[k:k + 1], None) for k in range(4)]
    weights = base_tasks.min_snr_weights(t, sd.schedule, 5.0)
    assert weights[0] < 0.1 and weights[2] == weights[3] == 1
    weighted = base_tasks.diffusion_loss(sd, z_0, t, eps, c_t, None, 5.0)
    close(weighted, (weights * torch.stack(alone)).mean(), 1e-5)
    close(base_tasks.diffusion_loss(sd, z_0, t, eps, c_t, None), torch.stack(alone).mean(), 1e-5)


def test_base_judge_writes_a_judge_that_tables_take(portraits, workdir, monkeypatch, capsys):
    program(base_judge, monkeypatch, "--data", portraits, *WORDS, "--steps", 2, "--batch", 4)
    assert "AUC of photos that it has not seen" in capsys.readouterr().out
    judge = load_face_judge("runs/base_judge/judge.safetensors", "deep-funneled")
    images = to_tensor(torch.zeros(2, 3, 128, 128, dtype=torch.uint8))
    assert judge.read(judge.resize(images))[0].shape == (2, 128)
    Path("broken.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="broken.safetensors"):
        load_face_judge("broken.safetensors")


def list_names(photos):
    return [photo.name for photo in photos]


def test_the_judge_learns_everybody_but_of_the_exam_only_the_references(tmp_path):
    root = count_photos(tmp_path, [1, 12, 30, 2, 3, 2, 12, 3, 10, 15])
    people = LFW(root, 64, min_photos=1).people
    learned, held = base_judge.share_photos(people)
    settings = plan.Settings(torch.device("cpu"), "fp32")
    exam = {subject.name: subject for subject in plan.choose_subjects(root, 64, settings)}
    assert len(exam) >= 2 and {person.name for person in held} == set(exam)
    for whole, known in zip(people, learned):
        subject = exam.get(whole.name)
        assert list_names(known.photos) == list_names(subject.references if subject else whole.photos)
    everybody = {person.name: person for person in people}
    for person in held:
        assert list_names(person.photos) == list_names(everybody[person.name].photos)[9:18]


def test_the_judge_needs_two_people_of_the_exam(tmp_path):
    people = LFW(count_photos(tmp_path, [1, *[10] * 9]), 64, min_photos=1).people
    with pytest.raises(ValueError, match="3 have ten or more photos .* two need 11 or more"):
        base_judge.share_photos(people)


def test_copies_of_training_photos_are_found_and_other_pictures_are_not(cut_model, portraits, face_file, workdir,
                                                                        monkeypatch, capsys):
    learned, held = base_data.choose_people(portraits, 64, CROP)
    for name, people in (("copies", learned), ("others", held)):
        for k, person in enumerate(people):
            (workdir / name).mkdir(exist_ok=True)
            save_image(workdir / name / f"{k:03d}.png", person.photos[0].image)
    shares = []
    for name in ("copies", "others"):
        program(memorised, monkeypatch, "--model", cut_model, "--data", portraits, "--faces", face_file,
                "--pictures", name, "--device", "cpu")
        found = json.loads(Path("runs/memorised/memorised.json").read_text())
        shares.append(found["above the 99 % of held-out photos"])
    assert shares == [1.0, 0.0] and Path("runs/memorised/memorised.png").exists()


def test_face_distance_of_a_row_is_that_of_the_judge_of_faces_and_to_held_out_photos():
    def see(seed):
        faces = list(randn(2, 5, 4, seed=seed + 1))
        return {"features": list(randn(2, 5, 3, seed=seed)), "faces": faces, "embeds": faces}

    seen, real = see(0), see(5)
    row = scores.Row(scores.Pictures(seen, real))
    expected = fid(torch.cat(real["faces"]), torch.cat(seen["faces"]))
    assert row.face_distance()([0, 1]) == pytest.approx(expected, rel=1e-9)
    assert expected != pytest.approx(row.fid()([0, 1]), rel=1e-3)


@pytest.mark.parametrize("words, says", [
    (["--crop", "58,48,198,188"], "are for --data FOLDER"),
    (["--data", "nowhere"], "--data nowhere: no such folder"),
    (["--data", "PORTRAITS", "--crop", "1,2,3"], "--crop 1,2,3: it must be left,top,right,bottom"),
    (["--data", "PORTRAITS", "--judge", "FILE"], "name both"),
    (["--init", "nowhere"], "are for --data FOLDER"),
    (["--data", "PORTRAITS", "--init", "nowhere"], "--init nowhere: not a model of this program"),
    (["--data", "PORTRAITS", "--init", "nowhere", "--crop", "1,2,3,4"], "--init knows its crop"),
    (["--data", "PORTRAITS", "--image-encoder", "FILE"], "no weights of MobileFaceNet"),
    (["--data", "PORTRAITS", "--min-snr", "-1"], "--min-snr -1.0: from 0 to 1000"),
])
def test_bad_input_is_one_line_and_exit_2(words, says, portraits, tmp_path_factory, workdir, monkeypatch, capsys):
    file = tmp_path_factory.mktemp("bad") / "file.pt"
    file.write_bytes(b"nothing")
    names = {"PORTRAITS": portraits, "FILE": file}
    with pytest.raises(SystemExit) as stop:
        program(base, monkeypatch, *[names.get(word, word) for word in words], "--out", "photos")
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and says in last
    assert not (workdir / "photos/unet").exists() and not list(workdir.rglob("*.pt"))
