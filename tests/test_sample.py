"""sample.py: references and a prompt become a picture; what is wrong is said in one line."""

import sys

import pytest
import torch
from PIL import Image

import ip_adapter
import sample
from data import ToyFaces
from ip_adapter import IPAdapter
from train import ADAPTER, run
from unet import StableDiffusion


def program(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
    run(sample.main)


@pytest.fixture
def refs(tmp_path):
    for k, photo in enumerate(ToyFaces(1).people[0].photos[:3]):
        photo.image.save(tmp_path / f"ref{k}.png")
    return sorted(tmp_path.glob("ref*.png"))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_references_and_prompt_become_a_grid(monkeypatch, tiny_folder, workdir, refs, sampler):
    program(monkeypatch, "--model", tiny_folder, "--refs", *refs, "--prompt", "a photo of a person", "--n", 2, "--steps", 2,
            "--sampler", sampler, "--out", "grid.png")
    assert Image.open(workdir / "grid.png").width == 3 * 128


def test_same_seed_same_picture(monkeypatch, tiny_folder, workdir, refs):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        program(monkeypatch, "--model", tiny_folder, "--refs", *refs, "--prompt", "hat", "--n", 1, "--steps", 2,
                "--seed", seed, "--out", f"{name}.png")
    a, b, c = ((workdir / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_lam_zero_is_text_only_to_the_last_pixel(monkeypatch, tiny_folder, workdir, refs):
    program(monkeypatch, "--model", tiny_folder, "--refs", refs[0], "--lam", 0, "--prompt", "hat", "--n", 1, "--steps", 2, "--out", "a.png")
    program(monkeypatch, "--model", tiny_folder, "--prompt", "hat", "--n", 1, "--steps", 2, "--out", "b.png")
    with_refs, text_only = Image.open("a.png"), Image.open("b.png")
    assert with_refs.crop((0, with_refs.height - 128, 128, with_refs.height)).tobytes() == \
        text_only.crop((0, text_only.height - 128, 128, text_only.height)).tobytes()


def test_picture_k_does_not_depend_on_how_many_are_made(tiny_folder):
    sd = StableDiffusion.load(tiny_folder)
    c_t = sd.encode_prompts(["hat"])
    many = sample.generate(sd, c_t.expand(3, -1, -1), c_t, steps=2, seed=5)
    one = sample.generate(sd, c_t, c_t, steps=2, seed=7)
    torch.testing.assert_close(many[2:], one, rtol=1e-4, atol=1e-4)


def test_selfattn_reads_nine_references_whatever_is_given(tiny_folder):
    sd = StableDiffusion.load(tiny_folder)
    images = [photo.image for photo in ToyFaces(1, photos=12).people[0].photos]
    adapter = IPAdapter.load(tiny_folder / ADAPTER, sd.unet, "selfattn")
    adapter.aggregator.to_k.weight.data.normal_()
    few, nine, many = (sample.image_tokens(sd, adapter, images[:n])[0] for n in (2, 9, 12))
    assert few.shape == nine.shape == many.shape == (1, 36, 128)
    torch.testing.assert_close(nine, many)
    assert not torch.allclose(few, nine)


@pytest.mark.parametrize("words, says", [
    (["--model", "nowhere"], "nowhere"),
    (["--refs", "missing.jpg", "--prompt", "x"], "missing.jpg"),
    (["--adapter", "missing.safetensors", "--refs", "REF", "--prompt", "x"], "missing.safetensors"),
    (["--steps", "0", "--prompt", "x"], "steps"),
    (["--n", "0", "--prompt", "x"], "at least one"),
    (["--device", "tpu", "--prompt", "x"], "tpu"),
    (["--prompt", "x", "--out", "REF/picture.png"], "REF"),
    ([], "--prompt"),
])
def test_bad_input_is_one_line_and_exit_2(monkeypatch, capsys, tiny_folder, workdir, refs, words, says):
    words = ["--model", str(tiny_folder)] * ("--model" not in words) + [w.replace("REF", str(refs[0])) for w in words]
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, *words)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ") and says.replace("REF", str(refs[0])) in message
    assert not list(workdir.glob("**/*.part")) and not (workdir / "runs").exists()


def test_long_prompt_is_cut_with_a_warning(monkeypatch, capsys, tiny_folder, workdir):
    program(monkeypatch, "--model", tiny_folder, "--prompt", "a very " * 60 + "long prompt", "--n", 1, "--steps", 1, "--out", "a.png")
    assert "warning: prompt of" in capsys.readouterr().err and (workdir / "a.png").exists()


def test_sampler_stays_in_float32_under_half_precision_weights(tiny_folder, monkeypatch):
    sd, seen, real = StableDiffusion.load(tiny_folder, dtype=torch.bfloat16), [], ip_adapter.sample

    def spy(eps_fn, x_T, *rest):
        seen.extend([x_T.dtype, eps_fn(x_T, 5).dtype])
        return real(eps_fn, x_T, *rest)

    monkeypatch.setattr(ip_adapter, "sample", spy)
    c_t = sd.encode_prompts(["hat"])
    sample.generate(sd, c_t, c_t, steps=1)
    assert c_t.dtype == torch.bfloat16 and seen == [torch.float32, torch.float32]
