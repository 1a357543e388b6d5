"""What several test files share: a random tiny checkpoint on disk, laid out like a published one."""

import numpy as np
import pytest
import torch

import train
from data import ToyFaces
from experiments.base_networks import make_tiny_world
from ip_adapter import IPAdapter
from support import devices
from support.checkpoints import ADAPTER
from toyfaces.captions import write_caption
from toyfaces.judge import FeatureNet
from unet import StableDiffusion


def randn(*shape, seed=0):
    """float64 noise, the same for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Faster for networks as small as ours, most of all if other programs run too. Gives the old number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield threads
    torch.set_num_threads(threads)


@pytest.fixture(scope="session", autouse=True)
def auto_is_cpu():
    """--device auto means the CPU, so that no test depends on what the machine has. Tests that are
    about a GPU name it (test_gpu.py). Gives the function that chooses otherwise."""
    best_device = devices.best_device
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "best_device", lambda: "cpu")
        yield best_device


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder like weights/tiny, from random weights: model, single-image adapter and FeatureNet."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    photos = [photo for person in ToyFaces(20).people for photo in person.photos]
    captions = [write_caption(photo.labels, rng) for photo in photos]
    sd = make_tiny_world(captions, torch.device("cpu"))
    sd.save(folder)
    (folder / ADAPTER).parent.mkdir()
    IPAdapter(sd.unet, sd.image_encoder.config.projection_dim).save(folder / ADAPTER)
    FeatureNet().save(folder / "feature_net")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder):
    """The same, loaded; for tests that change nothing in it, or put it back."""
    return StableDiffusion.load(tiny_folder)


@pytest.fixture(scope="session", autouse=True)
def short_validation():
    """Validation on 16 photos, not on 192 (DreamBooth: 64): it is most of a training of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.fixed_validation, "__defaults__", (16, 10))
        patch.setattr(train.dreambooth_task, "__defaults__", (16,))
        yield


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """Programs write runs/ and .cache/ below the working folder: here an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """Toy portraits in the layout of LFW: 6 people with 1 to 4 JPEG files, one of which is truncated."""
    root = tmp_path_factory.mktemp("photos")
    for p, person in enumerate(ToyFaces(6, photos=4, seed=5).people):
        folder = root / person.name
        folder.mkdir()
        for q, photo in enumerate(person.photos[: p % 4 + 1]):
            photo.image.resize((80, 100)).save(folder / f"{person.name}_{q + 1:04d}.jpg")
    victim = sorted(root.glob("*3/*.jpg"))[0]
    victim.write_bytes(victim.read_bytes()[:500])
    return root
