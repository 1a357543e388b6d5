"""data.py: toy people are seeded, folders are read as they are, features follow, batches leave one out."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import LFW, Features, ToyFaces, leave_one_out, load_people, split
from experiments.plan import Settings, choose_subjects
from support.pictures import load_image, to_images, to_tensor
from toyfaces import drawing
from toyfaces.drawing import IDENTITY, SCENE


# ---------------------------------------------------------------- the two sources


def test_a_toy_person_does_not_depend_on_how_many_others_there_are():
    few = ToyFaces(2, photos=3, seed=7).people
    many = ToyFaces(5, photos=9, seed=7).people
    for a, b in zip(few, many):
        assert [photo.labels for photo in a.photos] == [photo.labels for photo in b.photos[:3]]
        assert [photo.key for photo in a.photos] == [photo.key for photo in b.photos[:3]]
        assert a.photos[2].image.tobytes() == b.photos[2].image.tobytes()
    other = ToyFaces(2, seed=8).people[0].photos[0]
    assert other.image.tobytes() != few[0].photos[0].image.tobytes()
    assert other.key != few[0].photos[0].key


def test_photos_of_one_person_share_the_identity_and_differ_in_scene():
    photos = ToyFaces(1, photos=10).people[0].photos
    assert len({tuple(photo.labels[name] for name in IDENTITY) for photo in photos}) == 1
    assert len({tuple(photo.labels[name] for name in SCENE) for photo in photos}) > 3


def test_folder_of_people_is_read_with_prompts(photo_folder):
    people = LFW(photo_folder, 64).people
    assert [len(person.photos) for person in people] == [2, 3, 4, 2]  # those with one photo are left out
    first = people[0].photos[0]
    assert first.prompt == "a photo of a person"
    assert people[0].noun == "person"
    assert first.image.size == (64, 64)

    table = photo_folder / "prompts.tsv"
    table.write_text(f"image\tprompt\n{first.name}\ta photo of a smiling woman\n")
    person = LFW(photo_folder, 64).people[0]
    table.unlink()
    assert person.photos[0].prompt == "a photo of a smiling woman"
    assert person.noun == "woman"


@pytest.mark.parametrize("folder, says", [("nowhere", "no such folder"), (".", "at least 2 photos")])
def test_folder_without_people_is_refused(workdir, folder, says):
    with pytest.raises(ValueError, match=says):
        LFW(folder, 64)


@pytest.mark.skipif("LFW_ROOT" not in os.environ, reason="LFW_ROOT names no folder of photos")
def test_real_lfw_has_its_published_counts():
    people = LFW(os.environ["LFW_ROOT"], 64).people
    assert len(people) == 1680
    assert sum(len(person.photos) for person in people) == 9164
    assert {person.noun for person in people} <= {"man", "woman", "person"}
    assert people[0].photos[0].image.size == (64, 64)


# ---------------------------------------------------------------- who is in which part


def test_split_is_two_to_one_and_disjoint():
    people = ToyFaces(30, photos=1).people

    def names(seed):
        return [[person.name for person in part] for part in split(people, seed=seed)]

    train, test = names(seed=3)
    assert (len(train), len(test)) == (20, 10)
    assert not set(train) & set(test)
    assert len(set(train + test)) == 30
    assert names(seed=3) == [train, test]
    assert names(seed=4)[0] != train


def test_no_drawn_person_or_picture_is_in_two_parts():
    """What the base model, the adapters, their validation and the tables see: all of it differs."""
    learned, held = load_people("toy", 64, count=4)
    parts = [ToyFaces(4, seed=0).people, learned, held, ToyFaces(104, seed=2).people[100:]]
    looks = set()
    pictures = set()
    for person in sum(parts, []):
        labels = person.photos[0].labels
        looks.add(tuple(labels[name] for name in IDENTITY))
        pictures |= {photo.image.tobytes() for photo in person.photos[:3]}
    assert len(looks) == 16
    assert len(pictures) == 16 * 3


def test_no_photo_of_a_folder_is_in_training_and_held_out_at_once(photo_folder):
    def read_files(people):
        return [Path(photo.key[0]).read_bytes() for person in people for photo in person.photos]

    learned, held = [read_files(people) for people in load_people(photo_folder, 64)]
    assert learned and held
    assert not set(learned) & set(held)
    files = [file.read_bytes() for file in photo_folder.glob("*/*.jpg")]
    alone = 2  # people with a single photo
    assert len(learned) + len(held) == len(files) - alone


@pytest.mark.parametrize("counts", [[2, 10, 9, 30] * 6, [10, 12] * 6, [2, 10] * 320, [2, 10, 10] * 150])
def test_whom_tables_may_ask_for_is_validated_on_only_if_others_are_few(tmp_path, counts):
    for p, count in enumerate(counts):
        (tmp_path / f"p{p:03d}").mkdir()
        for q in range(count):
            (tmp_path / f"p{p:03d}/{q:04d}.jpg").touch()
    _, held = load_people(tmp_path, 64)
    _, test = split(LFW(tmp_path, 64).people)
    few = [person.name for person in test if len(person.photos) < 10]
    many = [person.name for person in test if len(person.photos) >= 10]
    assert [person.name for person in held] == (few + many)[:100]
    # In a table the first hundred held out come last, and of the others train.py validates on nobody.
    settings = Settings("cpu", "fp32", people=10**6)
    exam = [subject.name for subject in choose_subjects(tmp_path, 64, settings)]
    first = [person.name for person in test[:100]]
    assert sorted(exam) == sorted(many)
    assert [name in first for name in exam] == sorted(name in first for name in exam)
    assert not {person.name for person in held} & set(exam) - set(first)


# ---------------------------------------------------------------- features


@pytest.fixture
def computed(monkeypatch):
    """How many photos were computed anew, one number a time. The features are zeros."""
    calls = []

    def compute(sd, photos, prompts):
        calls.append(len(photos))
        n = len(photos)
        readable = torch.ones(n, dtype=torch.bool)
        return dict(z_0=torch.zeros(n, 1), embeds=torch.zeros(n, 1), readable=readable,
                    c_t=torch.zeros(len(prompts), 1, 1))

    monkeypatch.setattr(data, "compute_features", compute)
    return calls


def test_features_are_cached_and_follow_model_and_data(tiny_model, workdir, photo_folder, monkeypatch):
    people = LFW(photo_folder, 64).people
    with pytest.warns(UserWarning, match="1 of 11 photos"):
        features = Features(tiny_model, people)
    assert features.z_0.shape == (10, 4, 16, 16)
    assert features.embeds.shape == (10, 128)
    assert len(features.prompt) == 10
    assert [len(group) for group in features.groups] == [2, 3, 3, 2]  # one of four is unreadable
    with pytest.warns(UserWarning), monkeypatch.context() as patch:
        patch.setattr(data, "compute_features", None)  # it is read, not computed again
        again = Features(tiny_model, people)
    assert torch.equal(again.z_0, features.z_0)
    assert len(list((workdir / ".cache").iterdir())) == 1

    weight = next(tiny_model.vae.parameters())
    monkeypatch.setattr(weight, "data", 1.5 * weight.data)
    with pytest.warns(UserWarning):
        other = Features(tiny_model, people)
    assert not torch.equal(other.z_0, features.z_0)
    assert len(list((workdir / ".cache").iterdir())) == 2


def rewrite_photo(file, sd, monkeypatch):
    file.write_bytes(file.read_bytes() + b"more")


def touch_photo(file, sd, monkeypatch):
    os.utime(file, (1, 1))


def rename_photo(file, sd, monkeypatch):
    file.rename(file.with_stem("another"))


def tell_prompt(file, sd, monkeypatch):
    table = file.parent.parent / "prompts.tsv"
    table.write_text(f"image\tprompt\n{file.parent.name}/{file.name}\ta photo of a woman\n")


def change_weight(network, monkeypatch):
    weight = next(network.parameters())
    monkeypatch.setattr(weight, "data", weight.data + 1)


def change_text_encoder(file, sd, monkeypatch):
    change_weight(sd.text_encoder, monkeypatch)


def change_image_encoder(file, sd, monkeypatch):
    change_weight(sd.image_encoder, monkeypatch)


def change_vae_encoder(file, sd, monkeypatch):
    change_weight(sd.vae.encoder, monkeypatch)


def change_preprocessor(file, sd, monkeypatch):
    monkeypatch.setitem(sd.preprocessor, "image_mean", [0.5, 0.5, 0.5])


def change_scaling_factor(file, sd, monkeypatch):
    monkeypatch.setitem(sd.vae.config, "scaling_factor", 0.2)


def raise_version(file, sd, monkeypatch):
    monkeypatch.setattr(Features, "VERSION", Features.VERSION + 1)


CHANGES = [rewrite_photo, touch_photo, rename_photo, tell_prompt, change_text_encoder, change_image_encoder,
           change_vae_encoder, change_preprocessor, change_scaling_factor, raise_version]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_photo_prompt_or_model_is_never_read_from_an_old_file(
        change, tiny_model, workdir, monkeypatch, computed):
    file = workdir / "photos" / "somebody" / "0.png"
    file.parent.mkdir(parents=True)
    for name in ("0.png", "1.png"):
        Image.new("RGB", (8, 8)).save(file.with_name(name))
    for _ in range(2):
        Features(tiny_model, LFW("photos", 64).people)
    assert computed == [2]
    change(file, tiny_model, monkeypatch)
    for _ in range(2):
        Features(tiny_model, LFW("photos", 64).people)
    assert computed == [2, 2]


def test_new_version_of_the_drawing_is_computed_anew(tiny_model, workdir, monkeypatch, computed):
    for _ in range(2):
        Features(tiny_model, ToyFaces(2, photos=3).people)
    assert computed == [6]
    Features(tiny_model, ToyFaces(2, photos=3, seed=1).people)
    monkeypatch.setattr(drawing, "VERSION", drawing.VERSION + 1)
    Features(tiny_model, ToyFaces(2, photos=3).people)
    assert computed == [6, 6, 6]


def test_what_encodes_nothing_leaves_old_features_valid(tiny_model, workdir, monkeypatch, computed):
    people = ToyFaces(2, photos=3).people
    Features(tiny_model, people)
    for network in (tiny_model.unet, tiny_model.vae.decoder):
        change_weight(network, monkeypatch)
    Features(tiny_model, people)
    assert computed == [6]


def test_features_of_another_precision_are_other_features(tiny_model, workdir, computed):
    people = ToyFaces(2, photos=3).people
    Features(tiny_model, people)
    with torch.autocast("cpu", torch.bfloat16):
        Features(tiny_model, people)
    assert computed == [6, 6]


def test_features_hold_each_photo_in_its_row(tiny_model, workdir):
    people = ToyFaces(3, photos=22).people  # the last two photos are in a second batch
    features = Features(tiny_model, people)
    photo = people[2].photos[21]
    i = features.groups[2][21]
    embeds = tiny_model.embed_images([photo.image])[0]
    c_t = tiny_model.encode_prompts([photo.prompt])[0]
    torch.testing.assert_close(features.embeds[i], embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.c_t[features.prompt[i]], c_t, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- batches


def test_eq1_target_is_never_among_its_references():
    counts = [10, 2, 1, 15, 3, 12, 17]
    groups = list(torch.arange(60).split(counts))
    owner = torch.repeat_interleave(torch.arange(7), torch.tensor(counts))
    target, references = leave_one_out(groups, 500, torch.Generator().manual_seed(0))
    assert references.shape == (500, 9)
    assert (owner[target][:, None] == owner[references]).all()
    assert not (target[:, None] == references).any()
    assert 12 not in target  # the person with one photo has nothing to leave out
    assert set(owner.tolist()) - {2} == set(owner[target].tolist())


def test_eq1_removed_photo_is_uniform_and_references_are_bootstrapped():
    target, references = leave_one_out([torch.arange(4)], 4000, torch.Generator().manual_seed(0))
    counts = torch.bincount(target, minlength=4)
    assert (counts - 1000).abs().max() < 120  # 4 standard deviations of a binomial
    # All three others are there before any repeats.
    assert all(len(set(row.tolist())) == 3 for row in references)


def test_eq1_of_more_than_n_photos_a_random_n_take_part():
    target, references = leave_one_out([torch.arange(15)], 300, torch.Generator().manual_seed(0), n=4)
    assert references.shape == (300, 3)
    assert set(target.tolist()) == set(references.flatten().tolist()) == set(range(15))
    rows = torch.cat([target[:, None], references], dim=1).tolist()
    assert all(len(set(row)) == 4 for row in rows)


def test_leave_one_out_needs_two_photos():
    with pytest.raises(ValueError, match="two photos"):
        leave_one_out([torch.arange(1)], 4, torch.Generator())


# ---------------------------------------------------------------- pictures


def test_images_survive_the_tensor_round_trip():
    image = ToyFaces(1).people[0].photos[0].image
    assert to_images(to_tensor([image]))[0].tobytes() == image.tobytes()


def test_pictures_of_any_mode_become_upright_rgb(tmp_path):
    Image.new("RGBA", (40, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").getpixel((3, 3)) == (255, 255, 255)
    Image.new("L", (40, 20), 77).save(tmp_path / "grey.png")
    assert load_image(tmp_path / "grey.png", 16).getpixel((3, 3)) == (77, 77, 77)
    Image.fromarray(np.full((20, 40), 77 * 256, np.uint16)).save(tmp_path / "deep.png")  # 16 bits
    assert load_image(tmp_path / "deep.png").getpixel((3, 3)) == (77, 77, 77)
    Image.new("CMYK", (40, 20)).save(tmp_path / "print.jpg")
    assert load_image(tmp_path / "print.jpg").mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera on its side
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (20, 40)


def test_unreadable_picture_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no")
    with pytest.raises(ValueError, match="broken.jpg"):
        load_image(tmp_path / "broken.jpg")
    Image.new("RGB", (40, 20)).save(tmp_path / "odd.jpg")

    def fail(image):  # as in some versions, with pictures of some cameras
        return struct.pack("B", -1)

    monkeypatch.setattr("support.pictures.ImageOps.exif_transpose", fail)
    with pytest.raises(ValueError, match="odd.jpg"):
        load_image(tmp_path / "odd.jpg")


def test_strangers_are_one_to_three_references_of_one_other_person():
    groups = [torch.arange(10), torch.arange(10, 20), torch.arange(20, 22)]
    target, references = leave_one_out(groups, 600, torch.Generator().manual_seed(0), strangers=0.5)
    owner = torch.tensor([0] * 10 + [1] * 10 + [2] * 2)
    counts = []
    for person, owners in zip(owner[target], owner[references]):
        strange = owners[owners != person]
        assert len(strange.unique()) <= 1
        counts.append(len(strange))
    shares = torch.bincount(torch.tensor(counts)) / 600  # 0, 1, 2 or 3 of nine
    assert len(shares) == 4
    assert abs(shares[0] - 0.5) < 0.06 and (shares[1:] - 1 / 6).abs().max() < 0.05
    others = torch.cat([owner[row][owner[row] != owner[i]] for i, row in zip(target, references)])
    assert set(others.tolist()) == {0, 1, 2}


def test_without_strangers_batches_are_what_they_were():
    groups = [torch.arange(10), torch.arange(10, 20)]
    usual = leave_one_out(groups, 50, torch.Generator().manual_seed(0))
    same = leave_one_out(groups, 50, torch.Generator().manual_seed(0), strangers=0.0)
    assert all(torch.equal(a, b) for a, b in zip(usual, same))
    with pytest.raises(ValueError, match="at least two people"):
        leave_one_out(groups[:1], 4, torch.Generator(), strangers=1.0)
