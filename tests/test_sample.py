"""sample.py: references and a prompt become a picture; what is wrong is said in one line."""

import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ip_adapter
import sample
from data import ToyFaces, digest, save_grid
from dreambooth import add_lora, load_lora, save_lora
from ip_adapter import IPAdapter
from train import ADAPTER, peak_memory, run
from unet import StableDiffusion, UNet


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


def test_every_picture_is_kept_by_itself_and_none_of_an_older_run(monkeypatch, tiny_folder, workdir, refs):
    words = ["--model", tiny_folder, "--adapter", tiny_folder / ADAPTER, "--refs", *refs, "--prompt", "a hat", "--steps", 1]
    for n in (3, 2):
        program(monkeypatch, *words, "--n", n, "--out", workdir / "a.png")
    assert sorted(f.name for f in (workdir / "a_pictures").iterdir()) == ["000.png", "001.png"]
    assert all(Image.open(f).size == (64, 64) for f in (workdir / "a_pictures").iterdir())


def test_same_seed_same_picture(monkeypatch, tiny_folder, workdir, refs):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        program(monkeypatch, "--model", tiny_folder, "--refs", *refs, "--prompt", "hat", "--n", 1, "--steps", 2,
                "--seed", seed, "--out", f"{name}.png")
    a, b, c = ((workdir / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_picture_is_of_the_kind_that_its_name_says(tmp_path):
    for name, kind in (("a.JPG", "JPEG"), ("a.png", "PNG")):
        save_grid(tmp_path / name, [[torch.zeros(3, 8, 8)]])
        assert Image.open(tmp_path / name).format == kind


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


def test_encoders_run_once_and_the_unet_once_a_step_on_both_branches(monkeypatch, tiny_folder, workdir, refs):
    calls, load = [], StableDiffusion.load

    def counting(*args):
        sd = load(*args)
        for name in ("text_encoder", "image_encoder", "unet"):
            getattr(sd, name).register_forward_hook(
                lambda _, args, out, name=name: calls.append(name if name != "unet" else len(args[0])))
        return sd

    monkeypatch.setattr(StableDiffusion, "load", counting)
    program(monkeypatch, "--model", tiny_folder, "--adapter", tiny_folder / ADAPTER, "--refs", *refs, "--prompt", "a hat",
            "--n", 2, "--steps", 3)
    assert calls.count("text_encoder") == 2 and calls.count("image_encoder") == 1   # the prompt, and the empty one
    assert [n for n in calls if isinstance(n, int)] == [4, 4, 4]


def test_lora_is_merged_before_sampling(monkeypatch, tiny_folder, workdir):
    sd = StableDiffusion.load(tiny_folder)
    for low in add_lora(sd.unet, 2, generator=torch.Generator().manual_seed(0)):
        torch.nn.init.normal_(low.B, std=0.1, generator=torch.Generator().manual_seed(1))
    save_lora(sd.unet, "lora.safetensors")
    merged = StableDiffusion.load(tiny_folder)
    load_lora("lora.safetensors", merged)
    merged.save("merged", torch.float32)
    words = ["--prompt", "a hat", "--n", 1, "--steps", 2, "--precision", "fp32", "--out"]
    program(monkeypatch, "--model", tiny_folder, "--lora", "lora.safetensors", *words, "lora.png")
    program(monkeypatch, "--model", "merged", *words, "merged.png")
    program(monkeypatch, "--model", tiny_folder, *words, "plain.png")
    lora, whole, plain = (np.asarray(Image.open(f"{name}.png")).astype(int) for name in ("lora", "merged", "plain"))
    assert abs(lora - whole).max() <= 1 < abs(lora - plain).max()

    used = []   # and merged in float32: in bfloat16, updates of less than half a step of W would be lost
    monkeypatch.setattr(sample, "generate", lambda sd, *_, **__: used.append(sd.unet) or torch.zeros(1, 3, 64, 64))
    words[words.index("fp32")] = "bf16"
    program(monkeypatch, "--model", tiny_folder, "--lora", "lora.safetensors", *words, "half.png")
    assert all(torch.equal(w, merged.unet.state_dict()[name].bfloat16()) for name, w in used[0].state_dict().items())


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
    (["--benchmark", "--steps", "1", "--prompt", "x"], "warms up"),
    (["--device", "tpu", "--prompt", "x"], "tpu"),
    (["--prompt", "x", "--out", "REF/picture.png"], "REF"),
    (["--prompt", "x", "--out", "."], "folder"),
    ([], "--prompt"),
    (["--adapter", "any.safetensors", "--prompt", "x"], "--refs"),
    (["--agg", "avg", "--prompt", "x"], "--refs"),
])
def test_bad_input_is_one_line_and_exit_2(monkeypatch, capsys, tiny_folder, workdir, refs, words, says):
    words = ["--model", str(tiny_folder)] * ("--model" not in words) + [w.replace("REF", str(refs[0])) for w in words]
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, *words)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ") and says.replace("REF", str(refs[0])) in message
    assert not list(workdir.glob("**/*.part")) and not (workdir / "runs").exists()


def test_compiling_without_a_compiler_is_one_line(monkeypatch, capsys, tiny_folder, workdir):
    def no_compiler(*_, **__):
        raise torch._dynamo.exc.TorchDynamoException("No working C++ compiler found\nand a page of more")

    monkeypatch.setattr(sample, "generate", no_compiler)
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, "--model", tiny_folder, "--prompt", "x", "--compile", "--device", "cpu")
    assert stop.value.code == 2 and capsys.readouterr().err.endswith("error: --compile: No working C++ compiler found\n")


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


def adapted(folder, dtype):
    """A UNet with an adapter, and inputs for it: x_t, t, c_t, c_i, lam."""
    sd, g = StableDiffusion.load(folder, dtype=dtype), torch.Generator().manual_seed(0)
    adapter = IPAdapter.load(folder / ADAPTER, sd.unet)
    shapes = (2, 4, 16, 16), (2, 9, 128), (2, 4, 128)
    x_t, c_t, c_i = (torch.randn(shape, generator=g).to(dtype) for shape in shapes)
    return sd.unet, adapter, (x_t, 500, c_t, c_i, 0.7)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_weights_predict_the_same_noise(tiny_folder, dtype, tolerance):
    able = torch.backends.mkldnn.is_available()
    if not able or dtype == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this CPU has no such kernels")
    unet, _, inputs = adapted(tiny_folder, dtype)
    with torch.inference_mode():
        expected, text_only = unet(*inputs), unet(*inputs[:3])
        sample.pack(unet)
        assert unet.conv_in.weight is None
        assert unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.weight is None
        assert (unet(*inputs) - expected).norm() <= tolerance * expected.norm() < (text_only - expected).norm()


def test_large_unets_are_packed_by_the_program(tiny_folder, workdir, monkeypatch):
    packed, pack = [], sample.pack
    monkeypatch.setattr(sample, "pack", lambda unet: packed.append(unet) or pack(unet))
    words = ["--model", tiny_folder, "--prompt", "a hat", "--n", 1, "--steps", 2, "--precision", "fp32", "--out"]
    for large in (False, True):
        monkeypatch.setattr(sample, "is_large", lambda unet: large)
        program(monkeypatch, *words, f"{large}.png")
        assert len(packed) == large
    plain, fast = (np.asarray(Image.open(f"{large}.png")).astype(int) for large in (False, True))
    assert abs(plain - fast).max() <= 2


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [lambda unet: None, sample.pack])
def test_compiled_unet_predicts_the_same_noise_at_every_step(prepare, tiny_folder):
    from torch._dynamo.utils import counters

    unet, _, (x_t, _, *context) = adapted(tiny_folder, torch.float32)
    counters.clear()
    torch.compiler.reset()
    with torch.inference_mode():
        expected = [unet(x_t, t, *context) for t in (500, 400, 300)]
        prepare(unet)
        sample.compile_blocks(unet)
        for t, eps_hat in zip((500, 400, 300), expected):
            torch.testing.assert_close(unet(x_t, t, *context), eps_hat, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == len(unet.down_blocks) + 1 + len(unet.up_blocks)
    assert not counters["graph_break"]


def test_benchmark_keeps_the_warm_up_apart(monkeypatch, capsys, tiny_folder, workdir):
    real, calls = UNet.forward, []

    def slow_at_first(*args):
        time.sleep(0 if calls else 1)
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(UNet, "forward", slow_at_first)
    program(monkeypatch, "--model", tiny_folder, "--prompt", "hat", "--n", 1, "--steps", 4, "--benchmark",
            "--out", "a.png")
    says = r"warm-up .* ([\d.]+) s, then ([\d.]+) s a step .* memory ([\d.]+) GB, on cpu"
    warm_up, step, peak = map(float, re.search(says, capsys.readouterr().out).groups())
    assert warm_up > 1 > step > 0 and peak > 0.1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="compares with what Linux reports")
def test_peak_memory_is_in_gigabytes():
    kernel = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    assert 0.99 * kernel <= peak_memory(torch.device("cpu")) <= 9 * kernel   # at least: a parent's may be inherited


def test_only_a_run_on_these_very_weights_is_taken_by_default(workdir, tiny_folder, monkeypatch):
    monkeypatch.setattr(sample, "TINY", tiny_folder)
    unet = StableDiffusion.load(tiny_folder).unet
    tensors = {f"image_proj.{layer}.weight": torch.zeros(1) for layer in ("proj", "norm")}
    for name, base in (("own", f"{digest(unet)} and the rest"), ("stale", "of older weights"), ("foreign", "")):   # newest
        (workdir / "runs" / name).mkdir(parents=True)
        save_file(tensors, workdir / "runs" / name / "ip-adapter.safetensors", {"base": base})
    assert sample.find_adapter(tiny_folder, None).parent.name == "own"


def test_ddpm_noise_is_not_the_noise_that_a_picture_starts_from(tiny_folder, monkeypatch):
    sd, seen = StableDiffusion.load(tiny_folder), []

    def walk(eps_fn, x_T, schedule, steps, sampler, generator, progress):
        seen.append((x_T, torch.randn(x_T.shape, generator=generator)))
        return x_T

    monkeypatch.setattr(ip_adapter, "sample", walk)
    c_t = sd.encode_prompts(["a hat", "a hat"])
    ip_adapter.generate(sd, c_t, c_t[:1], sampler="ddpm", seed=3)
    (x_T, eps), = seen
    assert x_T.flatten().dot(eps.flatten()).abs() < 0.1 * len(x_T.flatten())


def test_image_encoder_beside_the_adapter_is_found(tiny_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_folder, tmp_path / "model")
    models = tmp_path / "far/models"   # as in h94/IP-Adapter, and not beside the checkpoint
    models.mkdir(parents=True)
    (tmp_path / "model/image_encoder").rename(models / "image_encoder")
    adapter = (tmp_path / "model" / sample.ADAPTER).rename(models / "ip-adapter.safetensors")
    picture = tmp_path / "face.png"
    ToyFaces(1).people[0].photos[0].image.save(picture)
    words = ["--adapter", adapter, "--refs", picture, "--prompt", "a hat", "--n", 1, "--steps", 1]
    program(monkeypatch, "--model", tmp_path / "model", *words, "--out", tmp_path / "out.png")
    assert (tmp_path / "out.png").is_file()
