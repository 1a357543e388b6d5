"""support/: names of published tensors, files written whole, the cache, digests, plots.

The rest of it is tested where it is used: checkpoints in test_unet.py and test_ip_adapter.py,
pictures in test_data.py, the history of a training in test_train.py, fast_cpu in test_sample.py,
judges in test_metrics.py.
"""

import re

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

from support import files, plots, tensor_names
from support.files import digest, digest_bytes, load_or_compute, save_tensors
from unet import AutoencoderKL, UNet

# ---------------------------------------------------------------- names of tensors

UNET_EXAMPLES = re.findall(r"(\S+) +-> (\S+)", tensor_names.unet_name.__doc__)
VAE_EXAMPLES = re.findall(r"(\S+) +-> (\S+)", tensor_names.vae_name.__doc__)


def test_docstrings_of_tensor_names_have_examples():
    assert len(UNET_EXAMPLES) >= 6 and len(VAE_EXAMPLES) >= 3


@pytest.mark.parametrize("published, ours", UNET_EXAMPLES)
def test_examples_of_unet_name_are_true(published, ours):
    assert tensor_names.unet_name(published, layers=2) == ours
    assert tensor_names.unet_name(ours, layers=2) == ours  # and our own names stay


@pytest.mark.parametrize("published, ours", VAE_EXAMPLES)
def test_examples_of_vae_name_are_true(published, ours):
    assert tensor_names.vae_name(published, levels=4) == ours
    assert tensor_names.vae_name(ours, levels=4) == ours


def test_our_own_names_come_back_unchanged():
    with torch.device("meta"):
        networks = UNet(), AutoencoderKL()
    for network in networks:
        for name in network.state_dict():
            assert tensor_names.our_name(name, network.config) == name


def test_names_of_text_encoders_lose_their_prefix():
    name = "text_model.final_layer_norm.weight"
    assert tensor_names.our_name(name, config=object()) == "final_layer_norm.weight"
    assert tensor_names.our_name("final_layer_norm.weight", object()) == "final_layer_norm.weight"


# ---------------------------------------------------------------- files

def test_save_tensors_writes_values_and_header_and_nothing_else(tmp_path):
    weight = nn.Parameter(torch.arange(6.0).reshape(2, 3))
    save_tensors(tmp_path / "x.safetensors", {"weight": weight, "turned": weight.T}, {"agg": "avg"})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"agg": "avg"}
        assert set(file.keys()) == {"weight", "turned"}
        assert torch.equal(file.get_tensor("weight"), weight)
        assert torch.equal(file.get_tensor("turned"), weight.T)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_a_result_is_computed_once_and_anew_under_another_key(cache):
    calls = []

    def compute():
        calls.append(1)
        return {"x": torch.full((2,), float(len(calls)))}

    first = load_or_compute(compute, "people", 64, 1)
    assert first["x"].tolist() == [1, 1] and len(calls) == 1
    assert load_or_compute(compute, "people", 64, 1)["x"].tolist() == [1, 1] and len(calls) == 1
    for key in (("people", 64, 2), ("people", 32, 1), ("others", 64, 1), ("people", 64), ("people64", 1)):
        load_or_compute(compute, *key)
    assert len(calls) == 6
    assert load_or_compute(compute, "people", 64, 1)["x"].tolist() == [1, 1] and len(calls) == 6
    assert len(list(cache.iterdir())) == 6


def test_an_interrupted_computation_leaves_nothing_in_the_cache(cache):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_or_compute(fail, "key")
    assert load_or_compute(lambda: {"x": torch.ones(1)}, "key")["x"] == 1


# ---------------------------------------------------------------- digests

def make_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_digest_is_sixteen_hex_digits_of_the_numbers():
    assert re.fullmatch("[0-9a-f]{16}", digest(make_net()))
    assert digest(make_net()) == digest(make_net())
    assert digest(make_net(), size=64) == digest(make_net(), size=64)


def test_digest_changes_with_a_number_a_name_a_dtype_a_setting_and_the_order():
    changed = make_net()
    changed[0].weight.data[3, 2] += 1e-6
    swapped = make_net()
    swapped[0].weight.data = swapped[0].weight.data.flip(0)
    buffer = make_net()
    buffer[1].running_mean[0] += 1e-6
    renamed = nn.Sequential()
    for name, layer in zip("ab", make_net()):
        renamed.add_module(name, layer)
    reshaped = make_net()
    reshaped[0].weight.data = reshaped[0].weight.data.reshape(3, 4)
    digests = [
        digest(make_net()),
        digest(make_net(seed=1)),
        digest(changed),
        digest(swapped),
        digest(buffer),
        digest(renamed),
        digest(reshaped),
        digest(make_net().double()),
        digest(make_net().bfloat16()),
        digest(make_net(), size=64),
        digest(make_net(), size=32),
        digest(make_net(), side=64),
        digest(make_net(), changed),
        digest(changed, make_net()),
        digest(),
    ]
    assert len(set(digests)) == len(digests)


def test_digest_bytes_is_of_bytes_files_and_values(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"light")
    one = digest_bytes(b"a", path, ("size", 64))
    assert re.fullmatch("[0-9a-f]{16}", one)
    assert one == digest_bytes(b"a", b"light", ("size", 64))  # what is in the file, not its name
    path.write_bytes(b"shade")
    others = [
        digest_bytes(b"a", path, ("size", 64)),
        digest_bytes(b"b", b"light", ("size", 64)),
        digest_bytes(b"a", b"light", ("size", 65)),
        digest_bytes(b"a", b"light"),
    ]
    assert len({one, *others}) == 5
    assert digest_bytes("photo") != digest_bytes(b"photo")


# ---------------------------------------------------------------- plots

def check_picture(path):
    """Its width and height in pixels, if it is a PNG file with something in it."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert len(image.convert("RGB").getcolors(2**24)) > 10  # lines and letters, not an empty page
        return image.size


ROWS = [
    {"step": 0, "train": 0.0, "validation": 0.5, "t 0-249": 0.8, "t 250-499": 0.4, "seconds": 1},
    {"step": 10, "train": 0.4, "validation": 0.4, "t 0-249": 0.7, "t 250-499": 0.3, "seconds": 2},
    {"step": 20, "train": 0.3, "validation": 0.3, "t 0-249": 0.6, "t 250-499": 0.2, "seconds": 3},
]


def test_plot_of_a_training_has_a_second_axis_only_for_bands(tmp_path):
    plain = [{name: row[name] for name in ("step", "train", "validation")} for row in ROWS]
    plots.plot_training(tmp_path / "bands.png", ROWS, "with bands")
    plots.plot_training(tmp_path / "plain.png", plain, "without")
    wide, height = check_picture(tmp_path / "bands.png")
    assert check_picture(tmp_path / "plain.png") == (wide // 2, height)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bands.png", "plain.png"]


def test_plot_of_an_untrained_model_works(tmp_path):
    plots.plot_training(tmp_path / "start.png", ROWS[:1], "stopped before the first step")
    check_picture(tmp_path / "start.png")


def test_plots_of_curves_and_of_a_plane_are_png_files(tmp_path):
    curve = [(1, 0.5, 0.4, 0.6), (3, 0.6, 0.5, 0.7), (9, 0.7, 0.6, 0.8)]
    curves = {"avg": curve, "selfattn": curve[:1]}
    plots.plot_curves(tmp_path / "curves.png", curves, "N", "identity", "title")
    check_picture(tmp_path / "curves.png")
    points = {"avg": ((0.5, 0.4, 0.6), (20, 15, 30)), "max": ((0.4, 0.3, 0.5), (25, 20, 35))}
    plots.plot_plane(tmp_path / "plane.png", points, "identity", "FID", "title")
    check_picture(tmp_path / "plane.png")


def test_plots_ask_for_no_window():
    figure, axes = plots.new_figure(columns=2)
    assert figure.canvas.manager is None and len(axes) == 2
