"""sample.py: references and a prompt become a picture; what is wrong is said in one line."""

import os
import re
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import ip_adapter
import sample
from data import ToyFaces
from dreambooth import add_lora
from ip_adapter import IPAdapter, generate
from support import command_lines, fast_cpu
from support.lora import load_lora, save_lora
from support.checkpoints import ADAPTER
from support.devices import peak_memory
from support.files import digest
from support.pictures import save_grid
from unet import StableDiffusion, UNet


def program(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
    sample.run(sample.main)


@pytest.fixture
def refs(tmp_path):
    for k, photo in enumerate(ToyFaces(1).people[0].photos[:3]):
        photo.image.save(tmp_path / f"ref{k}.png")
    return sorted(tmp_path.glob("ref*.png"))


def read_pixels(path):
    return np.asarray(Image.open(path)).astype(int)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_references_and_prompt_become_a_grid(monkeypatch, tiny_folder, workdir, refs, sampler):
    words = ["--prompt", "a photo of a person", "--n", 2, "--steps", 2, "--sampler", sampler]
    program(monkeypatch, "--model", tiny_folder, "--refs", *refs, *words, "--out", "grid.png")
    assert Image.open("grid.png").width == 3 * 128


def test_every_picture_is_kept_by_itself_and_none_of_an_older_run(monkeypatch, tiny_folder, workdir, refs):
    words = ["--adapter", tiny_folder / ADAPTER, "--refs", *refs, "--prompt", "a hat", "--steps", 1]
    for n in (3, 2):
        program(monkeypatch, "--model", tiny_folder, *words, "--n", n, "--out", workdir / "a.png")
    files = sorted((workdir / "a_pictures").iterdir())
    assert [file.name for file in files] == ["000.png", "001.png"]
    assert all(Image.open(file).size == (64, 64) for file in files)


def test_same_seed_same_picture(monkeypatch, tiny_folder, workdir, refs):
    words = ["--refs", *refs, "--prompt", "hat", "--n", 1, "--steps", 2]
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        program(monkeypatch, "--model", tiny_folder, *words, "--seed", seed, "--out", f"{name}.png")
    a, b, c = [Path(f"{name}.png").read_bytes() for name in "abc"]
    assert a == b != c


def test_picture_is_of_the_kind_that_its_name_says(tmp_path):
    for name, kind in (("a.JPG", "JPEG"), ("a.png", "PNG")):
        save_grid(tmp_path / name, [[torch.zeros(3, 8, 8)]])
        assert Image.open(tmp_path / name).format == kind


def test_lam_zero_is_text_only_to_the_last_pixel(monkeypatch, tiny_folder, workdir, refs):
    words = ["--model", tiny_folder, "--prompt", "hat", "--n", 1, "--steps", 2]
    program(monkeypatch, *words, "--refs", refs[0], "--lam", 0, "--out", "with_refs.png")
    program(monkeypatch, *words, "--out", "text_only.png")
    program(monkeypatch, *words, "--refs", refs[0], "--out", "other.png")

    def read(name):
        return Path(f"{name}_pictures/000.png").read_bytes()

    assert read("with_refs") == read("text_only") != read("other")


def test_picture_k_does_not_depend_on_how_many_are_made(tiny_model):
    c_t = tiny_model.encode_prompts(["hat"])
    many = generate(tiny_model, c_t.expand(3, -1, -1), c_t, steps=2, seed=5)
    one = generate(tiny_model, c_t, c_t, steps=2, seed=7)
    torch.testing.assert_close(many[2:], one, rtol=1e-4, atol=1e-4)


def test_encoders_run_once_and_the_unet_once_a_step_on_both_branches(
        monkeypatch, tiny_folder, workdir, refs):
    calls = []
    load = StableDiffusion.load

    def load_and_count(*args):
        sd = load(*args)
        sd.text_encoder.register_forward_hook(lambda *_: calls.append("text"))
        sd.image_encoder.register_forward_hook(lambda *_: calls.append("image"))
        sd.unet.register_forward_hook(lambda unet, inputs, output: calls.append(len(inputs[0])))
        return sd

    monkeypatch.setattr(StableDiffusion, "load", load_and_count)
    words = ["--refs", *refs, "--prompt", "a hat", "--n", 2, "--steps", 3]
    program(monkeypatch, "--model", tiny_folder, "--adapter", tiny_folder / ADAPTER, *words)
    assert calls.count("image") == 1
    assert calls.count("text") == 2  # the prompt, and the empty one
    assert [call for call in calls if call not in ("image", "text")] == [4, 4, 4]


def test_guidance_is_3_for_the_toy_world_and_4_for_other_models(
        monkeypatch, tiny_folder, workdir, refs):
    asked = []

    def generate(sd, c_t, null_c_t, c_i, null_c_i, w, *_, **__):
        asked.append(w)
        return torch.zeros(len(c_t), 3, 64, 64)

    monkeypatch.setattr(sample, "generate", generate)
    words = ["--model", tiny_folder, "--adapter", tiny_folder / ADAPTER, "--refs", *refs, "--prompt", "a hat"]
    program(monkeypatch, *words)
    program(monkeypatch, *words, "--guidance", 0)
    monkeypatch.setattr(command_lines, "TINY", tiny_folder)
    program(monkeypatch, *words)
    assert asked == [4.0, 0.0, 3.0]


def test_lora_is_merged_before_sampling(monkeypatch, tiny_folder, workdir):
    sd = StableDiffusion.load(tiny_folder)
    for update in add_lora(sd.unet, 2, generator=torch.Generator().manual_seed(0)):
        torch.nn.init.normal_(update.B, std=0.1, generator=torch.Generator().manual_seed(1))
    save_lora(sd.unet, "lora.safetensors")
    merged = StableDiffusion.load(tiny_folder)
    load_lora("lora.safetensors", merged)
    merged.save("merged", torch.float32)

    def draw(name, precision, *words):
        words += "--prompt", "a hat", "--n", 1, "--steps", 2, "--precision", precision
        program(monkeypatch, *words, "--out", f"{name}.png")

    draw("lora", "fp32", "--model", tiny_folder, "--lora", "lora.safetensors")
    draw("merged", "fp32", "--model", "merged")
    draw("plain", "fp32", "--model", tiny_folder)
    lora, whole, plain = [read_pixels(f"{name}.png") for name in ("lora", "merged", "plain")]
    assert abs(lora - whole).max() <= 1 < abs(lora - plain).max()

    # Merged in float32: in bfloat16, updates of less than half a step of W would be lost.
    used = []

    def generate(sd, *_, **__):
        used.append(sd.unet.state_dict())
        return torch.zeros(1, 3, 64, 64)

    monkeypatch.setattr(sample, "generate", generate)
    draw("half", "bf16", "--model", tiny_folder, "--lora", "lora.safetensors")
    expected = merged.unet.state_dict()
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in used[0].items())


def test_selfattn_reads_nine_references_whatever_is_given(tiny_folder):
    sd = StableDiffusion.load(tiny_folder)
    images = [photo.image for photo in ToyFaces(1, photos=12).people[0].photos]
    adapter = IPAdapter.load(tiny_folder / ADAPTER, sd.unet, "selfattn")
    adapter.aggregator.to_k.weight.data.normal_()
    few, nine, many = [sample.embed_references(sd, adapter, images[:n])[0] for n in (2, 9, 12)]
    assert few.shape == nine.shape == many.shape == (1, 36, 128)
    torch.testing.assert_close(nine, many)
    assert not torch.allclose(few, nine)


def test_long_prompt_is_cut_with_a_warning(monkeypatch, capsys, tiny_folder, workdir):
    prompt = "a very " * 60 + "long prompt"
    words = ["--prompt", prompt, "--n", 1, "--steps", 1, "--out", "a.png"]
    program(monkeypatch, "--model", tiny_folder, *words)
    assert "warning: prompt of" in capsys.readouterr().err and (workdir / "a.png").exists()


def test_sampler_stays_in_float32_under_half_precision_weights(tiny_folder, monkeypatch):
    sd = StableDiffusion.load(tiny_folder, dtype=torch.bfloat16)
    seen = []
    real = ip_adapter.sample

    def spy(eps_fn, x_T, *rest):
        seen.extend([x_T.dtype, eps_fn(x_T, 5).dtype])
        return real(eps_fn, x_T, *rest)

    monkeypatch.setattr(ip_adapter, "sample", spy)
    c_t = sd.encode_prompts(["hat"])
    generate(sd, c_t, c_t, steps=1)
    assert c_t.dtype == torch.bfloat16 and seen == [torch.float32, torch.float32]


def test_ddpm_noise_is_not_the_noise_that_a_picture_starts_from(tiny_model, monkeypatch):
    seen = []

    def walk(eps_fn, x_T, schedule, steps, sampler, generator, progress):
        seen.append((x_T, torch.randn(x_T.shape, generator=generator)))
        return x_T

    monkeypatch.setattr(ip_adapter, "sample", walk)
    c_t = tiny_model.encode_prompts(["a hat", "a hat"])
    generate(tiny_model, c_t, c_t[:1], sampler="ddpm", seed=3)
    ((x_T, eps),) = seen
    assert x_T.flatten().dot(eps.flatten()).abs() < 0.1 * x_T.numel()


# ---------------------------------------------------------------- what is refused, what is found


@pytest.mark.parametrize("words, says", [
    (["--model", "nowhere"], "nowhere"),
    (["--refs", "missing.jpg", "--prompt", "x"], "missing.jpg"),
    (["--adapter", "missing.safetensors", "--refs", "REF", "--prompt", "x"], "missing.safetensors"),
    (["--steps", "0", "--prompt", "x"], "steps"),
    (["--n", "0", "--prompt", "x"], "--n 0: from 1 to 1000"),
    (["--benchmark", "--steps", "1", "--prompt", "x"], "warms up"),
    (["--device", "tpu", "--prompt", "x"], "tpu"),
    (["--prompt", "x", "--out", "REF/picture.png"], "REF"),
    (["--prompt", "x", "--out", "."], "folder"),
    ([], "--prompt"),
    (["--adapter", "REF", "--prompt", "x"], "--refs"),
    (["--agg", "avg", "--prompt", "x"], "--refs"),
])
def test_bad_input_is_one_line_and_exit_2(monkeypatch, capsys, tiny_folder, workdir, refs, words, says):
    words = [word.replace("REF", str(refs[0])) for word in words]
    says = says.replace("REF", str(refs[0]))
    if "--model" not in words:
        words = ["--model", tiny_folder, *words]
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, *words)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ") and says in message
    assert not list(workdir.glob("**/*.part")) and not (workdir / "runs").exists()


def test_a_failure_of_the_compiler_is_one_line(monkeypatch, capsys, tiny_folder, workdir):
    def fail(*_, **__):
        raise torch._dynamo.exc.TorchDynamoException("Cannot find a working triton installation\nand a page of more")

    monkeypatch.setattr(sample, "generate", fail)
    words = ["--prompt", "x", "--compile", "--device", "cpu"]
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, "--model", tiny_folder, *words)
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("error: --compile: Cannot find a working triton installation\n")


def test_only_a_run_on_these_very_weights_is_taken_by_default(workdir, tiny_folder, tiny_model, monkeypatch):
    monkeypatch.setattr(sample, "TINY", tiny_folder)
    own = f"{digest(tiny_model.unet)} and the rest"
    bases = dict(older=own, newer=own, stale="of older weights", foreign="")
    tensors = {f"image_proj.{layer}.weight": torch.zeros(1) for layer in ("proj", "norm")}
    for date, (name, base) in enumerate(bases.items()):
        file = workdir / "runs" / name / "ip-adapter.safetensors"
        file.parent.mkdir(parents=True)
        save_file(tensors, file, {"base": base})
        os.utime(file, (date, date))
    assert sample.find_adapter(tiny_folder, None).parent.name == "newer"


def test_image_encoder_beside_the_adapter_is_found(tiny_folder, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    models = tmp_path / "far" / "models"  # as in h94/IP-Adapter, and not beside the checkpoint
    models.mkdir(parents=True)
    (model / "image_encoder").rename(models / "image_encoder")
    adapter = (model / ADAPTER).rename(models / "ip-adapter.safetensors")
    picture = tmp_path / "face.png"
    ToyFaces(1).people[0].photos[0].image.save(picture)
    words = ["--adapter", adapter, "--refs", picture, "--prompt", "a hat", "--n", 1, "--steps", 1]
    program(monkeypatch, "--model", model, *words, "--out", tmp_path / "out.png")
    assert (tmp_path / "out.png").is_file()


# ---------------------------------------------------------------- time and memory


def load_adapted_unet(folder, dtype):
    """A UNet with an adapter, and inputs for it: x_t, t, c_t, c_i, lam."""
    unet = StableDiffusion.load(folder, dtype=dtype).unet
    adapter = IPAdapter.load(folder / ADAPTER, unet)
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 16, 16), (2, 9, 128), (2, 4, 128)
    x_t, c_t, c_i = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return unet, adapter, (x_t, 500, c_t, c_i, 0.7)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_weights_predict_the_same_noise(tiny_folder, dtype, tolerance):
    has_kernels = torch.backends.mkldnn.is_available()
    if dtype == torch.bfloat16:
        has_kernels = has_kernels and torch.cpu._is_avx512_bf16_supported()
    if not has_kernels:
        pytest.skip("this CPU has no such kernels")
    unet, _, inputs = load_adapted_unet(tiny_folder, dtype)
    with torch.inference_mode():
        expected = unet(*inputs)
        text_only = unet(*inputs[:3])
        fast_cpu.pack(unet)
        packed = unet(*inputs)
    assert unet.conv_in.weight is None
    assert unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_q.weight is None
    assert (packed - expected).norm() <= tolerance * expected.norm() < (text_only - expected).norm()


def test_large_unets_are_packed_by_the_program(tiny_folder, workdir, monkeypatch):
    packed = []
    pack = fast_cpu.pack

    def spy(unet):
        packed.append(unet)
        pack(unet)

    monkeypatch.setattr(fast_cpu, "pack", spy)
    words = ["--prompt", "a hat", "--n", 1, "--steps", 2, "--precision", "fp32", "--device", "cpu"]
    for large in (False, True):
        monkeypatch.setattr(fast_cpu, "is_large", lambda unet: large)
        program(monkeypatch, "--model", tiny_folder, *words, "--out", f"{large}.png")
        assert len(packed) == large
    assert abs(read_pixels("False.png") - read_pixels("True.png")).max() <= 2


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_unet_predicts_the_same_noise_at_every_step(backend, tiny_folder, monkeypatch):
    from torch._dynamo.utils import counters

    unet, _, (x_t, _, *context) = load_adapted_unet(tiny_folder, torch.float32)
    counters.clear()
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with torch.inference_mode():
        expected = [unet(x_t, t, *context) for t in (500, 400, 300)]
        fast_cpu.prepare_unet(unet, torch.device("cuda"), "fp32", compiled=True)
        for t, eps_hat in zip((500, 400, 300), expected):
            torch.testing.assert_close(unet(x_t, t, *context), eps_hat, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1  # the whole UNet, compiled once for all steps
    assert not counters["graph_break"]


def test_on_a_cpu_compile_is_left_out_and_says_so(tiny_model, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", None)
    fast_cpu.prepare_unet(tiny_model.unet, torch.device("cpu"), "fp32", compiled=True)
    assert "forward" not in vars(tiny_model.unet)  # as it was
    assert capsys.readouterr().out.startswith("--compile is for GPUs")
    fast_cpu.prepare_unet(tiny_model.unet, torch.device("cpu"), "fp32")
    assert not capsys.readouterr().out


def test_benchmark_keeps_the_warm_up_apart(monkeypatch, capsys, tiny_folder, workdir):
    real = UNet.forward
    calls = []

    def slow_at_first(*args):
        time.sleep(0 if calls else 1)
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(UNet, "forward", slow_at_first)
    words = ["--prompt", "hat", "--n", 1, "--steps", 4, "--device", "cpu", "--out", "a.png"]
    program(monkeypatch, "--model", tiny_folder, *words, "--benchmark")
    says = r"warm-up .* ([\d.]+) s, then ([\d.]+) s a step .* memory ([\d.]+) GB, on cpu"
    warm_up, step, peak = map(float, re.search(says, capsys.readouterr().out).groups())
    assert warm_up > 1 > step > 0 and peak > 0.1


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="compares with what Linux reports")
def test_peak_memory_is_in_gigabytes():
    kernel = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    # At least as much: a parent's may be inherited.
    assert 0.99 * kernel <= peak_memory(torch.device("cpu")) <= 9 * kernel
