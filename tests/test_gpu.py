"""What only a GPU can show; without one, skipped: python -m pytest -n 0 -m gpu

Written without one at hand: the first run on a GPU may have to correct a tolerance.
"""

import sys
from contextlib import contextmanager

import pytest
import torch

import sample
import train
from data import ToyFaces
from ip_adapter import IPAdapter, adapter_loss, generate
from support.checkpoints import ADAPTER
from support.devices import autocast, frozen_dtype, move
from unet import AutoencoderKL, StableDiffusion, UNet

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a GPU"),
]


def program(monkeypatch, module, *words):
    monkeypatch.setattr(sys, "argv", ["program", *map(str, words), "--device", DEVICE.type])
    module.run(module.main)


@pytest.fixture
def refs(workdir):
    files = []
    for k, photo in enumerate(ToyFaces(1, photos=3).people[0].photos):
        files.append(workdir / f"{k}.png")
        photo.image.save(files[-1])
    return files


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-3), ("bf16", 3e-2), ("fp16", 1e-2)])
def test_loss_is_that_of_the_cpu(tiny_folder, precision, tolerance):
    def compute(device, precision):
        sd = StableDiffusion.load(tiny_folder, device)
        adapter = IPAdapter.load(tiny_folder / ADAPTER, sd.unet, "selfattn")
        generator = torch.Generator().manual_seed(0)
        z_0 = torch.randn(4, 4, 16, 16, generator=generator).to(device)
        embeds = torch.randn(4, 9, 128, generator=generator).to(device)
        t, eps = train.draw_t_and_eps(sd, z_0, generator)
        with autocast(device, precision):
            c_t = sd.encode_prompts(["a hat"] * 4).float()
            loss = adapter_loss(sd.unet, z_0, t, eps, c_t, adapter.tokens(embeds), sd.schedule)
        loss.backward()
        return loss.item()

    expected = compute(torch.device("cpu"), "fp32")
    assert compute(DEVICE, precision) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_pictures_are_those_of_the_cpu(tiny_folder, sampler):
    pictures = []
    for device in (torch.device("cpu"), DEVICE):
        sd = StableDiffusion.load(tiny_folder, device)
        c_t = sd.encode_prompts(["a hat", "a scarf", ""])
        pictures.append(generate(sd, c_t[:2], c_t[2:], steps=4, sampler=sampler).cpu())
    torch.testing.assert_close(*pictures, rtol=1e-2, atol=2e-2)


@contextmanager
def interrupted():
    """In place of train.interruptible: Ctrl-C is pressed in every step."""
    yield lambda: True


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_goes_on_where_it_stopped(precision, tiny_folder, workdir, monkeypatch):
    words = ["--model", tiny_folder, "--people", 4, "--batch", 4, "--every", 1, "--steps", 3,
             "--lr", 0.1, "--precision", precision]
    program(monkeypatch, train, *words, "--out", "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(train, "interruptible", interrupted)
        program(patch, train, *words, "--out", "run")
    assert read_state("run")["step"] == 1
    program(monkeypatch, train, *words, "--out", "run", "--resume")
    whole = read_state("whole")
    again = read_state("run")
    assert again["step"] == whole["step"] == 3
    # GPUs add up in any order, and AdamW makes much of it where a gradient is nearly zero.
    losses = [row["train"] for row in whole["rows"]]
    assert [row["train"] for row in again["rows"]] == pytest.approx(losses, rel=1e-3)
    for name, weight in whole["module"].items():
        assert weight.isfinite().all()
        assert (again["module"][name] - weight).abs().mean() < 1e-4  # a step moves it by 1e-3


def read_state(out):
    return torch.load(f"{out}/adapter.pt", map_location="cpu", weights_only=True)


def test_dreambooth_trains_and_its_model_samples(tiny_folder, refs, workdir, monkeypatch):
    words = ["--method", "dreambooth", "--model", tiny_folder, "--images", workdir, "--noun", "man"]
    words += ["--class-images", 2, "--steps", 2, "--batch", 2]
    for lora in ([], ["--lora", 2]):
        program(monkeypatch, train, *words, *lora, "--out", "run")
    program(monkeypatch, sample, "--model", "run", "--lora", "run/pytorch_lora_weights.safetensors",
            "--prompt", "a sks man", "--n", 1, "--steps", 2, "--out", "a.png")
    assert (workdir / "a.png").is_file()


@pytest.mark.parametrize("compiled", [[], ["--compile"]])
def test_references_become_pictures(compiled, tiny_folder, refs, workdir, monkeypatch):
    words = ["--model", tiny_folder, "--refs", *refs, "--prompt", "a hat", "--n", 2, "--steps", 3]
    program(monkeypatch, sample, *words, *compiled, "--benchmark", "--out", "a.png")
    assert (workdir / "a.png").is_file()


# ---------------------------------------------------------------- memory at the size of SD 1.5


def make_large(network, dtype=torch.float16):
    """Stable Diffusion's network from random weights, on the device."""
    with torch.device("meta"):
        network = network()
    network = network.to_empty(device=DEVICE).to(dtype)
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    return network.requires_grad_(False)


@pytest.fixture
def large_model():
    """UNet and VAE of Stable Diffusion 1.5 in half precision; the memory counts from here."""
    sd = StableDiffusion(make_large(UNet), make_large(AutoencoderKL), None, None)
    torch.cuda.reset_peak_memory_stats()
    return sd


def peak():
    return torch.cuda.max_memory_allocated() / 1e9


def test_memory_of_sampling(large_model):
    adapter = IPAdapter(large_model.unet, 1024, "avg")
    embeds = torch.zeros(6, 9, 1024, dtype=torch.float16, device=DEVICE)
    c_t = torch.zeros(7, 77, 768, dtype=torch.float16, device=DEVICE)
    c_i = adapter.tokens(embeds)
    images = generate(large_model, c_t[:6], c_t[6:], c_i, c_i[:1], steps=2)
    assert images.shape == (6, 3, 512, 512)
    assert peak() < 6


def test_memory_of_training_an_adapter(large_model):
    large_model.vae = None
    unet = large_model.unet.float()
    adapter = IPAdapter(unet, 1024, "selfattn")
    move(unet, DEVICE, frozen_dtype(unet, "fp16"))
    unet.gradient_checkpointing = True
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW(adapter.parameters())
    scaler = torch.amp.GradScaler("cuda")
    z_0 = torch.zeros(8, 4, 64, 64, device=DEVICE)
    c_t = torch.zeros(8, 77, 768, device=DEVICE)
    embeds = torch.zeros(8, 9, 1024, device=DEVICE)
    for _ in range(2):
        t, eps = train.draw_t_and_eps(large_model, z_0, torch.Generator().manual_seed(0))
        with autocast(DEVICE, "fp16"):
            c_i = adapter.tokens(embeds)
            loss = adapter_loss(unet, z_0, t, eps, c_t, c_i, large_model.schedule)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert peak() < 10
