"""What several test files share: a random tiny checkpoint on disk, laid out like a published one."""

import numpy as np
import pytest
import torch

import data
import train
from ip_adapter import IPAdapter


def randn(*shape, seed=0):
    """float64 noise, the same for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A folder like weights/tiny, from random weights: model, single-image adapter and FeatureNet."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    labels = [photo.labels for person in data.ToyFaces(20).people for photo in person.photos]
    rng = np.random.default_rng(0)
    sd = train.tiny_world([data.caption_of(one, rng) for one in labels], torch.device("cpu"))
    sd.save(folder)
    (folder / "ip_adapter").mkdir()
    IPAdapter(sd.unet, sd.image_encoder.config.projection_dim).save(folder / train.ADAPTER)
    data.FeatureNet().save(folder / "feature_net")
    return folder


@pytest.fixture(scope="session", autouse=True)
def short_validation():
    """Validation on 16 photos instead of 192, or 64 of one person: most of the time of a training of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.fixed_validation, "__defaults__", (16,))
        patch.setattr(train.dreambooth_task, "__defaults__", (16,))
        yield


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """Programs write runs/ and .cache/ below the working folder: here an empty one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """Toy portraits as JPEG files in the layout of LFW: 6 people with 1 to 4 photos, of which one is truncated."""
    root = tmp_path_factory.mktemp("photos")
    for p, person in enumerate(data.ToyFaces(6, photos=4, seed=5).people):
        (root / person.name).mkdir()
        for q, photo in enumerate(person.photos[: p % 4 + 1]):
            photo.image.resize((80, 100)).save(root / person.name / f"{person.name}_{q + 1:04d}.jpg")
    victim = sorted(root.glob("*3/*.jpg"))[0]
    victim.write_bytes(victim.read_bytes()[:500])
    return root
