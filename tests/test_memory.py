"""What a device holds at a time: half-precision frozen weights, nothing unused, no batch without a flag.

The tiny model stands for Stable Diffusion where `large` says so.
"""

import shutil
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import data
import dreambooth
import ip_adapter
import sample
import train
from data import ToyFaces
from support import checkpoints, devices
from support.checkpoints import ADAPTER
from support.files import digest
from unet import StableDiffusion


@pytest.fixture
def large(monkeypatch):
    for module in (devices, ip_adapter, train):
        monkeypatch.setattr(module, "is_large", lambda unet: True)


@pytest.fixture
def made(monkeypatch):
    """How many pictures were made at once, and from which seed, one pair a call. They are black."""
    calls = []

    def generate(sd, c_t, *_, seed, **__):
        calls.append((len(c_t), seed))
        return -torch.ones(len(c_t), 3, 64, 64)

    for module in (ip_adapter, dreambooth):
        monkeypatch.setattr(module, "generate", generate)
    return calls


@pytest.fixture
def fitted(monkeypatch):
    """The dtypes of what trained and of the model's parts, by name, for each call of train.fit."""
    models = []
    runs = []
    init = StableDiffusion.__init__
    real = train.fit

    def init_and_keep(sd, *parts):
        models.append(sd)
        init(sd, *parts)

    def fit(task, *rest):
        trains = find_dtypes(task.module)
        runs.append(SimpleNamespace(trains=trains, **find_dtypes_of_parts(models[-1])))
        return real(task, *rest)

    monkeypatch.setattr(StableDiffusion, "__init__", init_and_keep)
    monkeypatch.setattr(train, "fit", fit)
    return runs


def find_dtypes(module):
    return {name: weight.dtype for name, weight in module.named_parameters()}


def find_dtypes_of_parts(sd):
    parts = ("unet", "vae", "text_encoder", "image_encoder")
    networks = {part: getattr(sd, part) for part in parts}
    return {part: network and find_dtypes(network) for part, network in networks.items()}


def program(monkeypatch, module, *words):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, words)])
    module.run(module.main)


@pytest.fixture
def photos(workdir):
    folder = workdir / "person"
    folder.mkdir()
    for k, photo in enumerate(ToyFaces(1, photos=2).people[0].photos):
        photo.image.save(folder / f"{k}.png")
    return folder


# ---------------------------------------------------------------- half precision


def test_frozen_weights_of_a_large_model_are_in_half_precision_while_an_adapter_trains(
        large, made, fitted, tiny_folder, workdir, monkeypatch):
    counted = []

    def count(*networks, **settings):
        counted.append(networks)
        return digest(*networks, **settings)

    monkeypatch.setattr(checkpoints, "digest", count)
    words = ["--steps", 2, "--batch", 4, "--people", 4, "--precision", "bf16", "--out", "run"]
    program(monkeypatch, train, "--model", tiny_folder, *words)
    (run,) = fitted
    assert set(run.unet.values()) == {torch.bfloat16}
    assert set(run.trains.values()) == {torch.float32}
    assert run.vae is run.text_encoder is run.image_encoder is None
    assert {x.dtype for x in load_file("run/ip-adapter.safetensors").values()} == {torch.float32}
    assert len(counted) == 1  # the encoders' fingerprint, for training and validation people
    assert made == [(4, 0)]  # samples.png: four people, --batch 4

    # The fingerprint is that of the file's weights, whatever the precision.
    _, metadata = checkpoints.read_adapter("run/ip-adapter.safetensors")
    assert metadata["base"].startswith(digest(StableDiffusion.load(tiny_folder).unet))


def test_lora_keeps_the_layers_that_it_changes_in_float32(
        large, made, fitted, tiny_folder, photos, workdir, monkeypatch):
    words = ["--method", "dreambooth", "--images", photos, "--noun", "person", "--lora", 2,
             "--class-images", 5, "--steps", 1, "--batch", 2, "--precision", "bf16", "--out", "run"]
    program(monkeypatch, train, "--model", tiny_folder, *words)
    (run,) = fitted
    changed = {dtype for name, dtype in run.unet.items() if "parametrizations" in name}
    others = {dtype for name, dtype in run.unet.items() if "attn" not in name}
    assert changed == {torch.float32} and others == {torch.bfloat16}
    assert set(run.vae.values()) == {torch.bfloat16} and run.image_encoder is None
    class_pictures = [(2, 0), (2, 2), (1, 4)]
    assert made == class_pictures + [(2, 0), (2, 2)] * 4  # four columns of samples.png, four rows


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_that_are_small_or_asked_for_in_float32_stay(precision, tiny_model, monkeypatch):
    assert devices.frozen_dtype(tiny_model.unet, precision) is None
    monkeypatch.setattr(devices, "is_large", lambda unet: True)
    assert devices.frozen_dtype(tiny_model.unet, precision) == devices.DTYPE[precision]


def test_loss_and_gradients_through_half_precision_weights(tiny_folder, large):
    def compute(dtype):
        sd = StableDiffusion.load(tiny_folder)
        adapter = ip_adapter.IPAdapter.load(tiny_folder / ADAPTER, sd.unet, "avg")
        devices.move(sd.unet, torch.device("cpu"), dtype)
        generator = torch.Generator().manual_seed(0)
        z_0 = torch.randn(2, 4, 16, 16, generator=generator)
        embeds = torch.randn(2, 3, 128, generator=generator)
        c_t = torch.randn(2, 77, 128, generator=generator)
        t, eps = train.draw_t_and_eps(sd, z_0, generator)
        with torch.autocast("cpu", torch.bfloat16):
            c_i = adapter.tokens(embeds)
            loss = ip_adapter.adapter_loss(sd.unet, z_0, t, eps, c_t, c_i, sd.schedule)
        loss.backward()
        return loss, adapter.image_proj.proj.weight.grad

    (loss, grad), (expected, expected_grad) = compute(torch.bfloat16), compute(None)
    assert loss.dtype == grad.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    assert torch.cosine_similarity(grad.flatten(), expected_grad.flatten(), dim=0) > 0.98


# ---------------------------------------------------------------- nothing unused


def test_text_alone_loads_no_image_encoder_and_encoders_leave_before_pictures(
        tiny_folder, photos, monkeypatch):
    loaded = []
    load = StableDiffusion.load

    def load_and_keep(*args):
        sd = load(*args)
        loaded.append(sd.image_encoder is not None)
        return sd

    def generate(sd, c_t, *_, **__):
        assert sd.text_encoder is None and sd.image_encoder is None
        return torch.zeros(1, 3, 64, 64)

    monkeypatch.setattr(StableDiffusion, "load", load_and_keep)
    monkeypatch.setattr(sample, "generate", generate)
    words = ["--model", tiny_folder, "--prompt", "a hat", "--n", 1]
    program(monkeypatch, sample, *words)
    program(monkeypatch, sample, *words, "--refs", *photos.glob("*.png"))
    assert loaded == [False, True]


@pytest.mark.parametrize("place", ["inside", "beside"])
def test_dreambooth_hands_on_only_an_image_encoder_of_its_own_model(
        place, made, tiny_folder, photos, workdir, monkeypatch):
    shutil.copytree(tiny_folder, "model")
    if place == "beside":
        shutil.move("model/image_encoder", "image_encoder")
    row = dict(step=0, validation=1.0, train=1.0, seconds=1.0)
    monkeypatch.setattr(train, "fine_tune", lambda *_: [row, row])
    words = ["--images", photos, "--noun", "person", "--prior-weight", 0, "--out", "run"]
    program(monkeypatch, train, "--method", "dreambooth", "--model", "model", *words)
    assert (workdir / "run/unet").is_dir()
    assert (workdir / "run/image_encoder").is_dir() == (place == "inside")


def test_lora_is_merged_on_the_cpu(tiny_folder, monkeypatch):
    places = []

    def look(path, sd):
        places.append(devices.device_of(sd.unet).type)

    monkeypatch.setattr(sample, "load_lora", look)
    sd = sample.load_model(tiny_folder, torch.device("meta"), "bf16", False, "lora.safetensors")
    assert places == ["cpu"]
    weight = sd.unet.conv_in.weight
    assert (weight.device.type, weight.dtype) == ("meta", torch.bfloat16)


# ---------------------------------------------------------------- no batch without a flag


@pytest.mark.parametrize("size, decoded, encoded", [
    (64, [3], [3]), (256, [1, 1, 1], [3]), (512, [1, 1, 1], [1, 1, 1])])
def test_large_pictures_are_decoded_and_encoded_one_by_one(
        size, decoded, encoded, tiny_model, photos, monkeypatch):
    sizes = []

    def decode(z):
        sizes.append(len(z))
        return z

    def encode(images, generator):
        sizes.append(len(images))
        return images

    monkeypatch.setattr(tiny_model.vae, "decode", decode)
    monkeypatch.setitem(tiny_model.unet.config, "sample_size", size // 4)
    z = torch.rand(3, 4, 16, 16)
    expected_pixels = (z / tiny_model.vae.config["scaling_factor"]).clamp(-1, 1)
    assert torch.equal(tiny_model.decode_latents(z), expected_pixels) and sizes == decoded

    sizes.clear()
    sd = SimpleNamespace(image_size=size, encode_latents=encode, preprocessor={})
    files = [photos / "0.png"] * 3
    assert dreambooth.encode_files(sd, files, None).shape == (3, 3, size, size)
    assert sizes == encoded


def test_pictures_in_parts_are_those_made_at_once(large, tiny_model, monkeypatch):
    c_t = tiny_model.encode_prompts(["a hat", "a scarf", "a person"])
    whole = ip_adapter.generate(tiny_model, c_t, c_t[:1], steps=2, seed=5)
    monkeypatch.setattr(ip_adapter, "generate", partial(ip_adapter.generate, steps=2))
    parts = ip_adapter.generate_in_parts(tiny_model, 2, c_t, c_t[:1], seed=5)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
