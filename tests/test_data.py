"""data.py: toy people are seeded and hide what they say, folders are read as they are, batches leave one out."""

import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from data import (HIDES, IDENTITY, LFW, SCENE, Features, FeatureNet, ToyFaces, caption_of, draw_face, leave_one_out,
                  load_image, pixels, prompt_of, split, to_images, to_tensor, visible)
from unet import StableDiffusion

PLAIN = {k: 0 for k in IDENTITY}
SCENE_0 = {k: 0 for k in SCENE}


def drawn(identity, scene):
    return np.asarray(draw_face(identity, scene, np.random.default_rng(0)), float)


def test_a_toy_person_does_not_depend_on_how_many_others_there_are():
    few, many = ToyFaces(2, photos=3, seed=7), ToyFaces(5, photos=9, seed=7)
    for a, b in zip(few.people, many.people):
        assert [p.labels for p in a.photos] == [p.labels for p in b.photos[:3]]
        assert a.photos[2].image.tobytes() == b.photos[2].image.tobytes()
    assert ToyFaces(2, seed=8).people[0].photos[0].image.tobytes() != few.people[0].photos[0].image.tobytes()


def test_photos_of_one_person_share_the_identity_and_differ_in_scene():
    photos = ToyFaces(1, photos=10).people[0].photos
    assert len({tuple(p.labels[k] for k in IDENTITY) for p in photos}) == 1
    assert len({tuple(p.labels[k] for k in SCENE) for p in photos}) > 3


@pytest.mark.parametrize("name", list(IDENTITY) + list(SCENE))
def test_every_attribute_shows(name):
    values = {**IDENTITY, **SCENE}[name]
    seen = [drawn({**PLAIN, name: k} if name in IDENTITY else PLAIN, {**SCENE_0, name: k} if name in SCENE else SCENE_0)
            for k in range(len(values))]
    for i in range(len(seen)):
        for j in range(i):
            assert np.abs(seen[i] - seen[j]).max() > 25, (values[i], values[j])


@pytest.mark.parametrize("accessory, name", [(a, n) for a, hidden in HIDES.items() for n in hidden])
def test_accessories_hide_what_they_say(accessory, name):
    def change(worn):
        scene = {**SCENE_0, "accessory": SCENE["accessory"].index(worn)}
        other = drawn({**PLAIN, name: 1}, scene) if name in IDENTITY else drawn(PLAIN, {**scene, name: 1})
        return np.abs(drawn(PLAIN, scene) - other).sum()
    assert change(accessory) < 0.25 * change("none")


def test_prompt_tells_what_can_be_seen_of_the_scene():
    scene = {"background": 1, "expression": 3, "accessory": 2}
    assert prompt_of(scene) == "a photo of an angry person wearing a hat, green background"
    assert prompt_of({**scene, "accessory": 0}) == "a photo of an angry person, green background"
    assert prompt_of({**scene, "accessory": 3}) == "a photo of a person wearing a scarf, green background"


def test_captions_never_name_what_is_hidden():
    labels = {**PLAIN, **SCENE_0, "accessory": SCENE["accessory"].index("hat")}
    captions = [caption_of(labels, np.random.default_rng(k)) for k in range(200)]
    assert not any("hair" in c for c in captions) and any("brown eyes" in c for c in captions)
    assert "hair" not in visible(labels) and "eyes" in visible(labels)


def test_split_is_two_to_one_and_disjoint():
    people = ToyFaces(30, photos=1).people
    train, test = split(people, seed=3)
    names = [{p.name for p in part} for part in (train, test)]
    assert (len(train), len(test)) == (20, 10) and not names[0] & names[1] and len(names[0] | names[1]) == 30
    assert [p.name for p in split(people, seed=3)[0]] == [p.name for p in train]
    assert [p.name for p in split(people, seed=4)[0]] != [p.name for p in train]


def test_eq1_target_is_never_among_its_references():
    groups = list(torch.arange(60).split([10, 2, 1, 15, 3, 12, 17]))
    owner = torch.repeat_interleave(torch.arange(7), torch.tensor([10, 2, 1, 15, 3, 12, 17]))
    target, references = leave_one_out(groups, 500, torch.Generator().manual_seed(0))
    assert references.shape == (500, 9)
    assert (owner[target][:, None] == owner[references]).all()
    assert not (target[:, None] == references).any()
    assert 12 not in target                     # the person with one photo has nothing to leave out
    assert set(owner.tolist()) - {2} == set(owner[target].tolist())


def test_eq1_removed_photo_is_uniform_and_references_are_bootstrapped():
    target, references = leave_one_out([torch.arange(4)], 4000, torch.Generator().manual_seed(0))
    counts = torch.bincount(target, minlength=4)
    assert (counts - 1000).abs().max() < 120    # 4 standard deviations of a binomial
    assert all(len(set(r.tolist())) == 3 for r in references)   # all three others are there before any repeats


def test_leave_one_out_needs_two_photos():
    with pytest.raises(ValueError, match="two photos"):
        leave_one_out([torch.arange(1)], 4, torch.Generator())


def test_images_survive_the_tensor_round_trip():
    image = ToyFaces(1).people[0].photos[0].image
    assert to_images(to_tensor([image]))[0].tobytes() == image.tobytes()


def test_pictures_of_any_mode_become_upright_rgb(tmp_path):
    half = Image.new("RGBA", (40, 20), (255, 0, 0, 0))
    half.save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").getpixel((3, 3)) == (255, 255, 255)
    Image.new("L", (40, 20), 77).save(tmp_path / "grey.png")
    assert load_image(tmp_path / "grey.png", 16).getpixel((3, 3)) == (77, 77, 77)
    Image.fromarray(np.full((20, 40), 77 * 256, np.uint16)).save(tmp_path / "deep.png")   # 16 bits
    assert load_image(tmp_path / "deep.png").getpixel((3, 3)) == (77, 77, 77)
    Image.new("CMYK", (40, 20)).save(tmp_path / "print.jpg")
    assert load_image(tmp_path / "print.jpg").mode == "RGB"
    exif = Image.Exif()
    exif[0x0112] = 6                            # taken with the camera on its side
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    assert load_image(tmp_path / "turned.jpg").size == (20, 40)


def test_unreadable_picture_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no")
    with pytest.raises(ValueError, match="broken.jpg"):
        load_image(tmp_path / "broken.jpg")
    Image.new("RGB", (40, 20)).save(tmp_path / "odd.jpg")
    monkeypatch.setattr("data.ImageOps.exif_transpose", lambda img: struct.pack("B", -1))   # some versions, some cameras
    with pytest.raises(ValueError, match="odd.jpg"):
        load_image(tmp_path / "odd.jpg")


def test_folder_of_people_is_read_with_prompts(photo_folder, tmp_path):
    faces = LFW(photo_folder, 64)
    assert [len(p.photos) for p in faces.people] == [2, 3, 4, 2]       # those with one photo are left out
    assert faces.people[0].photos[0].prompt == "a photo of a person"
    assert faces.people[0].photos[0].image.size == (64, 64)
    name = faces.people[0].photos[0].name
    (photo_folder / "prompts.tsv").write_text(f"image\tprompt\n{name}\ta photo of a smiling woman\n")
    told = LFW(photo_folder, 64)
    assert told.people[0].photos[0].prompt == "a photo of a smiling woman" and told.people[0].noun == "woman"
    assert told.key != faces.key
    (photo_folder / "prompts.tsv").unlink()


@pytest.mark.parametrize("make, words", [(lambda p: p / "nowhere", "no such folder"), (lambda p: p, "two|2 photos")])
def test_folder_without_people_is_refused(tmp_path, make, words):
    with pytest.raises(ValueError, match=words):
        LFW(make(tmp_path), 64)


@pytest.mark.skipif("LFW_ROOT" not in os.environ, reason="LFW_ROOT names no folder of photos")
def test_real_lfw_has_its_published_counts():
    faces = LFW(os.environ["LFW_ROOT"], 64)
    assert len(faces.people) == 1680 and sum(len(p.photos) for p in faces.people) == 9164
    assert {p.noun for p in faces.people} <= {"man", "woman", "person"}
    assert faces.people[0].photos[0].image.size == (64, 64)


def test_features_are_cached_and_follow_model_and_data(tiny_folder, workdir, photo_folder, monkeypatch):
    sd = StableDiffusion.load(tiny_folder)
    faces = LFW(photo_folder, 64)
    with pytest.warns(UserWarning, match="1 of 11 photos"):
        features = Features(sd, faces.people, faces.key)
    assert features.z_0.shape == (10, 4, 16, 16) and features.embeds.shape == (10, 128)
    assert sum(map(len, features.groups)) == 10 and len(features.prompt) == 10
    files = sorted((workdir / ".cache").iterdir())
    with pytest.warns(UserWarning), monkeypatch.context() as patch:
        patch.setattr(Features, "compute", None)   # it is read, not computed again
        again = Features(sd, faces.people, faces.key)
    assert torch.equal(again.z_0, features.z_0) and sorted((workdir / ".cache").iterdir()) == files
    with pytest.warns(UserWarning):
        Features(sd, faces.people, faces.key + "changed")
    with torch.no_grad():
        next(sd.vae.parameters()).mul_(1.5)
    with pytest.warns(UserWarning):
        other = Features(sd, faces.people, faces.key)
    assert not torch.equal(other.z_0, features.z_0) and len(list((workdir / ".cache").iterdir())) == len(files) + 2


def test_features_hold_each_photo_in_its_row(tiny_folder, workdir):
    sd, faces = StableDiffusion.load(tiny_folder), ToyFaces(3, photos=30)
    features = Features(sd, faces.people, faces.key)
    photo = faces.people[2].photos[11]
    i = features.groups[2][11]
    torch.testing.assert_close(features.embeds[i], sd.embed_images(to_tensor([photo.image]))[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.c_t[features.prompt[i]], sd.encode_prompts([photo.prompt])[0], rtol=1e-4, atol=1e-5)


def test_pixels_are_the_photos_in_order(workdir):
    faces = ToyFaces(2, photos=3)
    x = pixels(faces)
    assert x.shape == (6, 3, 64, 64) and to_images(to_tensor(x[4:5]))[0].tobytes() == faces.people[1].photos[1].image.tobytes()


def test_feature_net_survives_saving(tmp_path):
    net = FeatureNet().eval()
    net.save(tmp_path)
    x = torch.randn(2, 3, 64, 64)
    a, b = net(x), FeatureNet.load(tmp_path)(x)
    assert list(a) == list(IDENTITY) + list(SCENE) and all(torch.allclose(a[k], b[k], atol=1e-2) for k in a)
    with pytest.raises(ValueError, match="method base"):
        FeatureNet.load(tmp_path / "nowhere")
