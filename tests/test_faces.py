"""The judge of faces, and what metrics.py says of people by it: boxes, layout, cosines, folders."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import close, randn
from data import LFW, split
from metrics import (compare_people, compare_real_people, face_copying, face_identity,
                     mean_over_people, nearest_reference, rank_one)
from support.face_net import DEEP_FUNNELED, WHOLE, MobileFaceNet, parse_box
from support.pictures import to_tensor
from test_metrics import command, toy_judge  # fixtures

# The fifteen inverted residuals: expansion, input and output channels, stride.
RESIDUALS = (
    [(2, 64, 64, 2)] + [(2, 64, 64, 1)] * 4 + [(4, 64, 128, 2)] + [(2, 128, 128, 1)] * 6
    + [(4, 128, 128, 2)] + [(2, 128, 128, 1)] * 2
)  # fmt: skip


def published_shapes():
    """{name: shape} of mobilefacenet.pt."""
    convolutions = {"conv1.0": (64, 3, 3, 3), "dw_conv.depthwise": (64, 1, 3, 3)}
    convolutions |= {"dw_conv.pointwise": (64, 64, 1, 1), "conv2.0": (512, 128, 1, 1)}
    convolutions |= {"gdconv.depthwise": (512, 1, 7, 7), "conv3": (128, 512, 1, 1)}
    norms = {"conv1.1": 64, "dw_conv.bn1": 64, "dw_conv.bn2": 64}
    norms |= {"conv2.1": 512, "gdconv.bn": 512, "bn": 128}
    for n, (expansion, before, after, _) in enumerate(RESIDUALS):
        inner = expansion * before
        convolutions[f"features.{n}.conv.0.0"] = (inner, before, 1, 1)
        convolutions[f"features.{n}.conv.1.0"] = (inner, 1, 3, 3)
        convolutions[f"features.{n}.conv.2"] = (after, inner, 1, 1)
        norms |= {f"features.{n}.conv.0.1": inner, f"features.{n}.conv.1.1": inner}
        norms[f"features.{n}.conv.3"] = after
    shapes = {f"{name}.weight": shape for name, shape in convolutions.items()}
    shapes["conv3.bias"] = (128,)
    for name, channels in norms.items():
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{part}"] = (channels,)
        shapes[f"{name}.num_batches_tracked"] = ()
    return shapes


@pytest.fixture(scope="module")
def state():
    """Random weights of the published layout."""
    tensors = {}
    for seed, (name, shape) in enumerate(published_shapes().items()):
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(1)
        elif name.endswith(("running_var", "norm.weight")):
            tensors[name] = 1 + randn(*shape, seed=seed).abs().float()
        else:
            fan_in = max(1, int(np.prod(shape[1:])))
            tensors[name] = (randn(*shape, seed=seed) * (2 / fan_in) ** 0.5).float()
    return tensors


# ---------------------------------------------------------------- where the face lies


NO_BOXES = ("", "face", "1,2,3", "0,0,1,nan", "0,0,250,250", "0.5,0,0.5,1", "0,1,1,0", "-0.1,0,1,1")


@pytest.mark.parametrize("text", NO_BOXES)
def test_a_face_box_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="face box.*left") as error:
        parse_box(text)
    assert "\n" not in str(error.value)


def test_known_face_boxes_have_names():
    assert parse_box("deep-funneled") == DEEP_FUNNELED and parse_box("whole") == WHOLE
    assert parse_box("0.1,0.2, 0.8,0.9") == (0.1, 0.2, 0.8, 0.9)


@pytest.mark.parametrize("size", [(250, 250), (140, 200), (64, 64)])
@pytest.mark.parametrize("box", [DEEP_FUNNELED, WHOLE, (0.02, 0.022, 0.98, 0.982)])
def test_faces_are_cut_and_scaled_as_pillow_does(state, size, box):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    photo = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    width, height = size
    edges = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
    expected = to_tensor([photo.resize((112, 112), Image.Resampling.BICUBIC, box=edges)])
    found = MobileFaceNet(state, box).resize(to_tensor([photo]))
    difference = (found - expected).abs() * 127.5  # of 256 levels; Pillow rounds twice
    assert difference.max() < 3 and difference.mean() < 0.4


# ---------------------------------------------------------------- the network


def evaluate_by_name(state, x):
    """MobileFaceNet written again, in float64, by the names in the file."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def convolve(x, conv, norm, activation=F.relu6, stride=1, padding=0, groups=1):
        weight, bias = state[f"{conv}.weight"], state.get(f"{conv}.bias")
        x = F.conv2d(x, weight, bias, stride, padding, groups=groups)
        parts = ("running_mean", "running_var", "weight", "bias")
        x = F.batch_norm(x, *[state[f"{norm}.{part}"] for part in parts])
        return activation(x) if activation else x

    x = convolve(x, "conv1.0", "conv1.1", stride=2, padding=1)
    x = convolve(x, "dw_conv.depthwise", "dw_conv.bn1", F.relu, padding=1, groups=64)
    x = convolve(x, "dw_conv.pointwise", "dw_conv.bn2", F.relu)
    for n, (expansion, before, after, stride) in enumerate(RESIDUALS):
        block = f"features.{n}.conv"
        inner = expansion * before
        y = convolve(x, f"{block}.0.0", f"{block}.0.1")
        y = convolve(y, f"{block}.1.0", f"{block}.1.1", stride=stride, padding=1, groups=inner)
        y = convolve(y, f"{block}.2", f"{block}.3", None)
        x = x + y if stride == 1 and before == after else y
    x = convolve(x, "conv2.0", "conv2.1")
    x = convolve(x, "gdconv.depthwise", "gdconv.bn", None, groups=512)
    return convolve(x, "conv3", "bn", None).flatten(1)


def test_face_net_is_the_published_network_and_sees_each_face_twice(state):
    assert len(state) == 307
    judge = MobileFaceNet(state).double()
    faces = randn(2, 3, 112, 112).clamp(-1, 1)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    pixels = (faces * 127.5 + 127.5) / 255
    x = (pixels - mean) / std
    features, probs = judge.read(faces)
    assert features.shape == (2, 128) and probs is None
    close(features, evaluate_by_name(state, x) + evaluate_by_name(state, x.flip(3)), 1e-9)


class Trap:
    """Unpickled as code and not as weights, it makes a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_files_that_are_no_face_net_are_refused_in_one_line(state, tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({**state, "bn.bias": torch.zeros(64)}, tmp_path / "width.pt")
    torch.save({name: state[name] for name in list(state)[1:]}, tmp_path / "part.pt")
    torch.save({**state, "bn.bias": Trap(tmp_path / "trapped")}, tmp_path / "pickle.pt")
    files = ("text.pt", "list.pt", "width.pt", "part.pt", "pickle.pt", "nowhere.pt", ".")
    for name in files:
        with pytest.raises(ValueError, match="no weights of MobileFaceNet") as error:
            MobileFaceNet(tmp_path / name)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert not (tmp_path / "trapped").exists()


LFW_ROOT, FACES = os.getenv("LFW_ROOT"), os.getenv("FACES")


@pytest.mark.skipif(not (LFW_ROOT and FACES), reason="LFW_ROOT or FACES names no file")
def test_face_net_tells_people_of_lfw_apart():
    judge = MobileFaceNet(FACES, DEEP_FUNNELED)
    people = split(LFW(LFW_ROOT, 250).people)[1]
    people = [person for person in people if len(person.photos) >= 4][:30]
    features = []
    with torch.inference_mode():
        for person in people:
            images = to_tensor([photo.image for photo in person.photos[:4]])
            features.append(judge.read(judge.resize(images))[0])
    unit = F.normalize(torch.cat(features), dim=1)
    cosines = unit @ unit.T
    who = torch.arange(len(people)).repeat_interleave(4)
    pair = torch.ones_like(cosines).triu(1).bool()  # each pair once
    is_same = who[:, None] == who
    same = cosines[pair & is_same]
    different = cosines[pair & ~is_same]
    area = (same[:, None] > different).float().mean()  # under the ROC curve
    assert len(same) == 180 and area >= 0.99
    assert mean_over_people(rank_one(compare_real_people(features))) > 0.97


# ---------------------------------------------------------------- people


A, B, C = torch.eye(3)


def test_identity_is_the_mean_cosine_to_the_held_out_photos():
    made = [torch.stack([3 * A, A + B]), C[None]]
    held = [torch.stack([A, 2 * B]), torch.stack([C, C, A])]
    half = 0.5**0.5
    identity = face_identity(compare_people(made, held))
    close(identity[0], torch.tensor([0.5, half]), 1e-6)
    close(identity[1], torch.tensor([2 / 3]), 1e-6)
    assert mean_over_people(identity) == pytest.approx(((0.5 + half) / 2 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="2 people.*1"):
        compare_people(made, held[:1])


def test_rank_one_asks_who_of_all_people_is_the_nearest():
    made = [torch.stack([A, B]), torch.stack([B, C, A]), C[None]]
    held = [A[None], torch.stack([B, B, C]), C[None]]
    hits = [row.tolist() for row in rank_one(compare_people(made, held))]
    assert hits == [[1, 0], [1, 0, 0], [1]]


def test_real_photos_are_compared_with_the_others_of_the_person():
    held = [torch.stack([A, A + B, B]), C[None], torch.stack([C, 2 * A])]
    cosines = compare_real_people(held)
    half = 0.5**0.5
    identity = face_identity(cosines)
    close(identity[0], torch.tensor([half / 2, half, half / 2]), 1e-6)
    assert identity[1].shape == (0,)  # an only photo
    close(identity[2], torch.zeros(2), 1e-6)
    close(cosines[0][:, 1:], torch.tensor([[0, 0.5], [0, half / 2], [0, 0]]), 1e-6)
    assert mean_over_people(identity) == pytest.approx((2 * half / 3 + 0) / 2)


def test_copying_is_the_nearest_reference_minus_identity():
    made = [torch.stack([A, B]), C[None]]
    references = [torch.stack([A, A + B]), torch.stack([A, B, 5 * C])]
    nearest = nearest_reference(made, references)
    close(nearest[0], torch.tensor([1, 0.5**0.5]), 1e-6)
    close(nearest[1], torch.ones(1), 1e-6)
    copying = face_copying(nearest, [torch.tensor([0.25, 0.5]), torch.zeros(0)])
    close(copying[0], torch.tensor([0.75, 0.5**0.5 - 0.5]), 1e-6)
    assert copying[1].shape == (0,)


# ---------------------------------------------------------------- folders


@pytest.fixture
def face_folders(state, tmp_path):
    """Weights, and three folders with two people each of two, three and one pictures."""
    torch.save(state, tmp_path / "faces.pt")
    rng = np.random.default_rng(0)
    folders = []
    for name, count in (("real", 2), ("made", 3), ("given", 1)):
        for person in ("Ann", "Bob"):
            (tmp_path / name / person).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / name / person / f"{k}.png")
        folders.append(tmp_path / name)
    return tmp_path / "faces.pt", *folders


def read_by_hand(judge, folder):
    features = []
    for person in ("Ann", "Bob"):
        images = [Image.open(file) for file in sorted((folder / person).iterdir())]
        features.append(judge.read(judge.resize(to_tensor(images)))[0])
    return features


def test_command_line_scores_the_faces_of_people(toy_judge, face_folders, command):
    file, real, made, given = face_folders
    code, out, _ = command(real, made, "--faces", file, "--references", given,
                           "--face-box", "0.1,0.1,0.9,0.9", "--device", "cpu")  # fmt: skip
    assert code == 0
    assert "MobileFaceNet" in out and "0.1,0.1,0.9,0.9" in out and "2 people" in out
    assert "FeatureNet" in out
    table = dict(line.split("|")[1:3] for line in out.splitlines() if line.startswith("| "))
    table = {name.strip(): value for name, value in table.items()}

    judge = MobileFaceNet(file, (0.1, 0.1, 0.9, 0.9))
    held, pictures, references = [read_by_hand(judge, folder) for folder in (real, made, given)]
    others = held[::-1]
    for kind, shots, cosines in (
        ("", pictures, compare_people(pictures, held)),
        (", real photos", held, compare_real_people(held)),
        (", strangers", others, compare_people(others, held)),
    ):
        identity = face_identity(cosines)
        expected = {"identity": identity, "rank-1": rank_one(cosines)}
        expected["copying"] = face_copying(nearest_reference(shots, references), identity)
        for name, values in expected.items():
            assert float(table[name + kind]) == pytest.approx(mean_over_people(values), abs=1e-4)
    assert float(table["rank-1, strangers"]) == 0
    assert float(table["face distance (Fréchet)"]) > 0


def test_folders_that_hold_other_people_are_one_clear_line(toy_judge, face_folders, command):
    file, real, made, given = face_folders
    ann = real / "Ann"
    for args, words in (
        ((ann, made / "Ann", "--faces", file), "no folders with pictures, one a person"),
        ((real, made, "--faces", file, "--references", ann), "no folders with pictures"),
        ((real, made, "--faces", ann / "0.png"), "0.png: no weights of MobileFaceNet"),
        ((real, made, "--faces", file, "--face-box", "60,51,195,185"), "face box"),
        ((real, made, "--face-box", "deep-funneled"), "--face-box needs --faces"),
        ((real, made, "--references", given), "--references needs --clip or --faces"),
    ):
        code, _, line = command(*args)
        assert code == 2 and words in line, line
    (made / "Bob").rename(made / "Eve")
    code, _, line = command(real, made, "--faces", file)
    assert code == 2 and "real: no pictures of 1 of the people: Eve" in line
    (real / "Eve").mkdir()  # a folder without pictures is not a person
    assert command(real, made, "--faces", file)[2] == line
