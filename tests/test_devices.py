"""Every path of computation on a device that is not the CPU, checked without one (pretend.py).

Each test computes the same thing on the CPU and on the pretended device, with generators on the
CPU, and compares the numbers. Autocast does not know that device: precision is test_gpu.py's.
"""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

import dreambooth
import sample
import train
from aggregators import AGGREGATORS
from data import ToyFaces, compute_features
from ip_adapter import IPAdapter, generate
from pretend import DEVICE, PretendDevice
from test_ip_adapter import SMALL
from test_unet import PLAIN_VAE, model, randomise  # noqa: F401, model is a fixture
from unet import AutoencoderKL, UNet
from support import devices, lora
from support.lora import load_lora, save_lora
from support.weights import read_safetensors

pytestmark = pytest.mark.filterwarnings("ignore:.*no-op")  # of load_state_dict: here it is none

CPU = torch.device("cpu")
SMALL_VAE = dict(PLAIN_VAE, mid_block_add_attention=True)
PARTS = ("unet", "vae", "text_encoder", "image_encoder")
WORDS = ["a man", "a hat", ""]


@pytest.fixture(autouse=True)
def outside_of_the_pretended_device(monkeypatch):
    """Reading files and asking for autocast: neither works on a device that PyTorch does not know."""

    def read(path):
        with _disable_current_modes():
            return read_safetensors(path)

    monkeypatch.setattr(lora, "read_safetensors", read)
    monkeypatch.setattr(dreambooth, "autocast_dtype", lambda device: False)
    monkeypatch.setattr(dreambooth, "generate", partial(without_inference_mode, generate))
    as_tensor = torch.as_tensor  # makes tensors without telling the pretended device
    monkeypatch.setattr(torch, "as_tensor", lambda x, device=CPU, **how: as_tensor(x, **how).to(device))


def copy_to(device, sd):
    """A copy of a model on a device."""
    copied = copy.copy(sd)
    for part in PARTS:
        setattr(copied, part, copy.deepcopy(getattr(sd, part)).to(device))
    return copied


@pytest.fixture(scope="module")
def models(model):
    """A small checkpoint on both devices."""
    model = copy.copy(model)
    model.unet = randomise(UNet(**SMALL), torch.float32)
    model.vae = randomise(AutoencoderKL(**SMALL_VAE), torch.float32)
    with PretendDevice():
        return {device: copy_to(device, model) for device in (CPU, DEVICE)}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def without_inference_mode(function, *args, **settings):
    """What `function` answers; inference mode does not know views of tensors like ours."""
    with torch.no_grad():
        return function.__wrapped__(*args, **settings)


def compare(models, compute):
    """compute(model, device) gives the same on both devices: a tensor, or several.

    On the second one it must have been computed there, or brought to the CPU on purpose.
    """
    expected = compute(models[CPU], CPU)
    with PretendDevice():
        found = compute(models[DEVICE], DEVICE)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)


def make_adapter(sd, agg):
    """One whose weights are the same on every device."""
    torch.manual_seed(0)
    adapter = IPAdapter(sd.unet, 6, agg)
    for weight in adapter.aggregator.parameters():
        weight.data += 0.1
    return adapter


def gradients(loss, module):
    """The loss and its gradients, the largest of every weight."""
    loss.backward()
    found = [w.grad.abs().max() for w in module.parameters() if w.grad is not None]
    module.zero_grad()
    return loss.detach(), torch.stack(found)


def make_features(people=3, photos=4):
    """Random features, on the CPU like data.Features'."""
    n = people * photos
    groups = list(torch.arange(n).split(photos))
    return SimpleNamespace(z_0=randn(n, 4, 8, 8), embeds=randn(n, 6), c_t=randn(2, 9, 12),
                           null_c_t=randn(1, 9, 12), prompt=torch.arange(n) % 2, groups=groups)


# ---------------------------------------------------------------- the losses


@pytest.mark.parametrize("agg", AGGREGATORS)
def test_adapter_loss_and_validation_on_a_device(models, agg):
    def compute(sd, device):
        adapter = make_adapter(sd, agg)
        task = train.adapter_task("adapter", sd, adapter, features, features, device)
        loss = task.loss(3, torch.Generator().manual_seed(0))
        return *gradients(loss, adapter), torch.tensor(task.validate()["validation"])

    features = make_features()
    compare(models, compute)


@pytest.mark.parametrize("text, prior", [(False, True), (True, True), (False, False)])
def test_dreambooth_loss_on_a_device(models, text, prior):
    def compute(sd, device):
        sd = copy_to(device, sd)
        module = torch.nn.ModuleDict({"unet": sd.unet})
        if text:
            module["text_encoder"] = sd.text_encoder
        module.requires_grad_(True)
        method = dreambooth.DreamBooth(train_text_encoder=text)
        z_0 = randn(3, 4, 8, 8).to(device)
        z_pr = randn(3, 4, 8, 8, seed=1).to(device) if prior else z_0[:0]
        task = train.dreambooth_task(sd, module, WORDS[:2], z_0, z_pr, method)
        loss = task.loss(2, torch.Generator().manual_seed(0))
        return *gradients(loss, module), torch.tensor(task.validate()["validation"])

    compare(models, compute)


def test_lora_trains_merges_and_is_saved_on_a_device(models, tmp_path):
    def compute(sd, device):
        sd = copy_to(device, sd)
        updates = dreambooth.add_lora(sd.unet, 2, generator=torch.Generator().manual_seed(0))
        for update in updates:
            update.B.data += 0.1
        c_t = randn(2, 9, 12).to(device)
        answer = sd.unet(randn(2, 4, 8, 8).to(device), 5, c_t)
        loss, grads = gradients(answer.square().mean(), updates)
        path = tmp_path / f"{device}.safetensors"
        save_lora(sd.unet, path)
        merged = copy_to(device, models[device])
        load_lora(path, merged)
        with torch.no_grad():
            again = merged.unet(randn(2, 4, 8, 8).to(device), 5, c_t)
        return loss, grads, answer.detach(), again

    compare(models, compute)


# ---------------------------------------------------------------- what goes in, what comes out


@pytest.mark.parametrize("w", [1, 4])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_pictures_are_the_same_from_a_device(models, sampler, w):
    def compute(sd, device):
        adapter = make_adapter(sd, "selfattn")
        pictures = [photo.image for photo in ToyFaces(1, photos=2, size=16).people[0].photos]
        images = without_inference_mode(sample.embed_references, sd, adapter, pictures)
        c_t = sd.encode_prompts(WORDS)
        conditions = (c_t[:2], c_t[2:], images[0].expand(2, -1, -1), images[1])
        return [without_inference_mode(generate, sd, *conditions, w, steps=3, sampler=sampler)]

    compare(models, compute)


def test_features_mean_the_same_on_every_device(models):
    def compute(sd, device):
        found = without_inference_mode(compute_features, sd, photos, WORDS)
        assert all(tensor.device == CPU for tensor in found.values())
        return found.values()

    photos = ToyFaces(1, photos=2, size=16).people[0].photos
    compare(models, compute)


def test_class_pictures_and_their_latents_on_a_device(models, tmp_path, monkeypatch):
    def compute(sd, device):
        out = tmp_path / str(device)
        files = dreambooth.make_class_images(sd, "a man", out, 2, steps=1)
        generator = torch.Generator().manual_seed(0)
        return [dreambooth.encode_files(sd, files, generator)]

    compare(models, compute)


# ---------------------------------------------------------------- the pretended device itself


REFUSED = {
    "two devices": lambda x: x + torch.zeros(3, 4),
    "a batch of two": lambda x: torch.cat([x, torch.zeros(3, 4)]),
    "a mask of the CPU": lambda x: x.masked_fill(torch.ones(3, 4, dtype=torch.bool), 0),
    "tokens of the CPU": lambda x: torch.nn.functional.embedding(torch.tensor([0]), x),
    "an index of the device": lambda x: torch.zeros(3)[x[:, 0].long()],
    "a generator of the CPU": lambda x: x.normal_(generator=torch.Generator()),
    "float64": lambda x: x.double(),
    "float64 sent": lambda x: torch.zeros(3, dtype=torch.float64).to(x.device),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_pretended_device_refuses_what_a_gpu_refuses(name):
    with PretendDevice(), pytest.raises(RuntimeError, match=" on |float64"):
        REFUSED[name](torch.zeros(3, 4).to(DEVICE))


def test_the_pretended_device_takes_what_a_gpu_takes():
    with PretendDevice():
        x = torch.arange(12.0).view(3, 4).to(DEVICE)
        taken = [2 * x, x * torch.tensor(2.0), x[torch.tensor([2, 0])], x.new_zeros(2), x.float()]
        assert all(y.device == DEVICE for y in taken)
        assert x.sum().item() == 66 and torch.equal(x.cpu(), torch.arange(12.0).view(3, 4))


# ---------------------------------------------------------------- --device auto


@pytest.mark.parametrize("cuda, mps, name", [
    (True, True, "cuda"), (True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_no_test_depends_on_the_devices_of_the_machine(cuda, mps, name, monkeypatch, auto_is_cpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert auto_is_cpu() == name  # what auto means outside of tests
    assert devices.pick_device("auto") == CPU
