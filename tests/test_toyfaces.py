"""toyfaces/: drawings show and hide what they say, captions and judge name what can be seen."""

import hashlib
from itertools import combinations

import numpy as np
import PIL
import pytest
import torch
import torch.nn.functional as F

from toyfaces.captions import write_caption, write_prompt
from toyfaces.drawing import (ATTRIBUTES, HIDES, IDENTITY, SCENE, VERSION, draw_face,
                              visible_attributes)
from toyfaces.judge import FeatureNet, augment, grade, label_tensors, masked_cross_entropy

PLAIN = {name: 0 for name in IDENTITY}
SCENE_0 = {name: 0 for name in SCENE}
HAT = SCENE["accessory"].index("hat")


def draw_pixels(identity, scene):
    return np.asarray(draw_face(identity, scene, np.random.default_rng(0)), float)


# ---------------------------------------------------------------- drawing

@pytest.mark.parametrize("name", list(IDENTITY) + list(SCENE))
def test_every_attribute_shows(name):
    words = {**IDENTITY, **SCENE}[name]
    seen = []
    for number in range(len(words)):
        seen.append(draw_pixels(PLAIN, {**SCENE_0, name: number}))
    for i in range(len(seen)):
        for j in range(i):
            assert np.abs(seen[i] - seen[j]).max() > 25, (words[i], words[j])


SHOWS = 2500  # grey levels of all pixels together; a mole changes a bare face by about 3,600


@pytest.fixture(scope="module")
def faces():
    """Eight random faces {attribute: class number}: every beard and every expression twice."""
    rng = np.random.default_rng(1)
    drawn = []
    for k in range(8):
        face = {name: int(rng.integers(len(words))) for name, words in ATTRIBUTES.items()}
        drawn.append({**face, "beard": k % 4, "expression": (k + k // 4) % 4})
    return drawn


def is_exception(name, face, pair):
    """What drawing.py says of `HIDES`: whether a part of this attribute still shows."""
    if name == "hair_colour":
        return face["beard"] != IDENTITY["beard"].index("no")
    if name == "expression":
        return pair != {"smiling", "serious"}
    if name in ("brows", "spacing"):
        return face["expression"] == SCENE["expression"].index("surprised")
    return False


def measure_changes(face, accessory, name):
    """Yields {a, b} and the change of the picture for every pair of words of an attribute."""
    worn = {**face, "accessory": SCENE["accessory"].index(accessory)}
    words = ATTRIBUTES[name]
    drawn = [draw_pixels({**worn, name: number}, {}) for number in range(len(words))]
    for i, j in combinations(range(len(words)), 2):
        yield {words[i], words[j]}, np.abs(drawn[i] - drawn[j]).sum()


@pytest.mark.parametrize("accessory, name", [(a, n) for a, hidden in HIDES.items() for n in hidden])
def test_accessories_hide_what_they_say_but_for_the_exceptions(faces, accessory, name):
    hidden = []
    shown = []
    for face in faces:
        for pair, change in measure_changes(face, accessory, name):
            (shown if is_exception(name, face, pair) else hidden).append(change)
    assert hidden and max(hidden) < SHOWS
    assert not shown or np.median(shown) > SHOWS  # an exception that is none has no place there


# VERSION -> {words of the picture: first 16 hex digits of the SHA-256 of its bytes}.
# Where the words say nothing the class is number 0: pale skin, short black hair, … The seed is 7.
DIGESTS = {
    1: {
        "hair=short expression=smiling":
            "37497da6c94c4abd",
        "hair=short skin=tan hair_colour=red eyes=green beard=full brows=thick":
            "af64c6feb49d2cee",
        "hair=long skin=brown spacing=wide-set nose=wide expression=surprised":
            "3dd6e92ef14feee2",
        "hair=curly skin=dark face=narrow nose=long beard=goatee expression=serious":
            "f87b4c427a1277ae",
        "hair=bun hair_colour=blond face=square mole=left expression=angry":
            "5cf86415d131e8ec",
        "hair=spiky hair_colour=blue eyes=violet beard=moustache face=narrow":
            "f9976fef8ce04790",
        "hair=bob hair_colour=grey eyes=blue mole=right face=square background=grey":
            "28999f7d358b6de4",
        "hair=long beard=full accessory=sunglasses background=purple":
            "c342a6540fe5df67",
        "hair=curly skin=tan accessory=hat expression=angry background=pink":
            "fc13768b845990cd",
        "hair=bob beard=goatee accessory=scarf background=blue":
            "7f8cc37e666e564a",
    },
}
PILLOW = tuple(int(number) for number in PIL.__version__.split(".")[:2])


def draw_words(words):
    """Words like "hair=curly beard=full" -> the bytes of that portrait."""
    labels = {**PLAIN, **SCENE_0}
    for word in words.split():
        name, value = word.split("=")
        labels[name] = {**IDENTITY, **SCENE}[name].index(value)
    return draw_face(labels, {}, 7).tobytes()


@pytest.mark.skipif(PILLOW < (11, 3), reason="older Pillow draws moustaches differently")
def test_pictures_of_a_version_are_the_same_to_the_last_byte():
    assert VERSION in DIGESTS, "a new VERSION: write the digests of its pictures into this file"
    found = {}
    for words in DIGESTS[VERSION]:
        found[words] = hashlib.sha256(draw_words(words)).hexdigest()[:16]
    assert found == DIGESTS[VERSION], "pictures changed: raise VERSION in toyfaces/drawing.py"


# ---------------------------------------------------------------- captions

def test_prompt_tells_what_can_be_seen_of_the_scene():
    scene = {"background": 1, "expression": 3, "accessory": HAT}
    assert write_prompt(scene) == "a photo of an angry person wearing a hat, green background"
    scene["accessory"] = SCENE["accessory"].index("none")
    assert write_prompt(scene) == "a photo of an angry person, green background"
    scene["accessory"] = SCENE["accessory"].index("scarf")
    assert write_prompt(scene) == "a photo of a person wearing a scarf, green background"


def test_captions_never_name_what_is_hidden():
    labels = {**PLAIN, **SCENE_0, "accessory": HAT}
    captions = [write_caption(labels, np.random.default_rng(seed)) for seed in range(200)]
    assert not any("hair" in caption for caption in captions)
    assert any("brown eyes" in caption for caption in captions)
    assert "hair" not in visible_attributes(labels)
    assert "eyes" in visible_attributes(labels)


# ---------------------------------------------------------------- judge

def test_feature_net_survives_saving(tmp_path):
    net = FeatureNet().eval()
    net.save(tmp_path)
    x = torch.randn(2, 3, 64, 64)
    before = net(x)
    after = FeatureNet.load(tmp_path)(x)
    assert list(before) == list(IDENTITY) + list(SCENE)
    for name in before:
        assert torch.allclose(before[name], after[name], atol=1e-2)
    with pytest.raises(ValueError, match="experiments.base"):
        FeatureNet.load(tmp_path / "nowhere")


def test_toy_judge_gives_a_distribution_over_hair_style_times_colour():
    torch.manual_seed(0)
    judge = FeatureNet().eval()
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features, probs = judge.read(images)
    logits = judge(images)
    assert features.shape == (3, 256) and probs.shape == (3, 36)
    joint = probs.view(3, 6, 6)
    torch.testing.assert_close(joint.sum(2).float(), logits["hair"].softmax(1))
    torch.testing.assert_close(joint.sum(1).float(), logits["hair_colour"].softmax(1))


def test_judge_is_only_asked_for_what_can_be_seen():
    heads = FeatureNet().heads
    labels = {name: 0 for name in heads} | {"accessory": HAT}
    classes, seen = label_tensors([labels])
    assert [name for name, is_seen in zip(heads, seen[0]) if not is_seen] == ["hair", "hair_colour"]

    logits = {name: torch.zeros(1, count) for name, count in heads.items()}
    base = masked_cross_entropy(logits, classes, seen)
    logits["hair"] = torch.tensor([[-50.0] + [50.0] * 5])
    assert masked_cross_entropy(logits, classes, seen) == base
    logits["eyes"] = torch.tensor([[-50.0, 50, 50, 50]])
    assert masked_cross_entropy(logits, classes, seen) > base


def test_worn_pictures_are_shifted_whole():
    images = torch.zeros(8, 3, 64, 64)
    images[:, :, 30:33, 40:43] = 1
    moved = augment(images, torch.Generator().manual_seed(0))
    found = [divmod(int(one.mean(0).flatten().argmax()), 64) for one in moved]
    assert len(set(found)) > 3
    assert all(abs(row - 31) <= 4 and abs(column - 41) <= 4 for row, column in found)


def test_identity_counts_right_attributes_among_those_that_can_be_seen():
    class Oracle:
        """Says class 0 everywhere."""
        def read(self, images):
            return torch.zeros(len(images), 4), torch.ones(len(images), 1)

        def answers(self, features):
            zeros = torch.zeros(len(features), dtype=torch.long)
            return {name: F.one_hot(zeros, count) for name, count in FeatureNet().heads.items()}

    labels = {**PLAIN, **SCENE_0}
    wrong_eyes = labels | {"eyes": 1}
    wrong_hair = labels | {"hair": 1}
    hidden_hair = wrong_hair | {"accessory": HAT}
    pictures = torch.zeros(4, 3, 64, 64, dtype=torch.uint8)
    found = grade(Oracle(), pictures, [labels, wrong_eyes, wrong_hair, hidden_hair], "cpu")
    assert torch.allclose(found["identity"], torch.tensor([1, 9 / 10, 9 / 10, 1]))
    assert torch.allclose(found["prompt"], torch.tensor([1, 1, 1, 2 / 3]))
