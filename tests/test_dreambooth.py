"""dreambooth.py: the loss of section 3.2 in both forms, class pictures, LoRA, and training from the command line."""

import argparse
import re
import shutil
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file

import data
import dreambooth
import train
from conftest import randn
from ddpm import Schedule, predict_x0, q_sample
from ip_adapter import adapter_loss
from unet import StableDiffusion, UNet

SCHEDULE = Schedule.stable_diffusion()
CONFIG = dict(sample_size=8, block_out_channels=[8, 16], layers_per_block=1, cross_attention_dim=12, attention_head_dim=2,
              norm_num_groups=4, down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
              up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"])


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet(**CONFIG).double()


@pytest.fixture
def batch():
    """Three photos, two class pictures, their t and ε, and both prompts."""
    t = torch.tensor([0, 400, 999, 7, 650])
    z_0, z_pr, eps = randn(3, 4, 8, 8), randn(2, 4, 8, 8, seed=1), randn(5, 4, 8, 8, seed=2)
    return z_0, z_pr, t, eps, randn(1, 6, 12, seed=3), randn(1, 6, 12, seed=4)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("person")
    for k, photo in enumerate(data.ToyFaces(1, photos=3, seed=9).people[0].photos):
        photo.image.resize((80, 100)).save(folder / f"{k}.jpg")
    return folder


def gradients(unet, loss):
    unet.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in unet.parameters()])


def program(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", "--method", "dreambooth", *map(str, words)])
    train.run(train.main)


# The loss

def test_x_form_is_the_papers_formula():
    x, eps, eps_hat = (randn(3, 2, 4, 4, seed=k) for k in range(3))
    t, w_t = torch.tensor([0, 500, 999]), randn(1000, seed=3).square()
    x_hat = predict_x0(q_sample(x, t, eps, SCHEDULE), t, eps_hat, SCHEDULE)
    paper = (w_t[t] * (x_hat - x).square().mean(dim=(1, 2, 3))).mean()
    torch.testing.assert_close(dreambooth.x0_loss(eps_hat, eps, t, SCHEDULE, w_t), paper, rtol=1e-11, atol=0)


def test_x_form_with_w_t_equals_eps_form_in_values_and_gradients():
    eps, t, results = randn(3, 2, 4, 4), torch.tensor([0, 500, 999]), []
    for form in (lambda e: dreambooth.x0_loss(e, eps, t, SCHEDULE, dreambooth.snr(SCHEDULE)),
                 lambda e: (eps - e).square().mean()):
        eps_hat = randn(3, 2, 4, 4, seed=1).requires_grad_()
        loss = form(eps_hat)
        results.append((loss.detach(), *torch.autograd.grad(loss, eps_hat)))
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


def test_prior_preservation_is_two_eps_losses_in_one_batch(unet, batch):
    z_0, z_pr, t, eps, c, c_pr = batch
    calls = []
    unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    ours = dreambooth.prior_preservation_loss(unet, *batch, SCHEDULE, lam=0.3)
    assert calls == [5]
    theirs = adapter_loss(unet, z_0, t[:3], eps[:3], c.expand(3, -1, -1), None, SCHEDULE)
    theirs = theirs + 0.3 * adapter_loss(unet, z_pr, t[3:], eps[3:], c_pr.expand(2, -1, -1), None, SCHEDULE)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=0)
    torch.testing.assert_close(gradients(unet, ours), gradients(unet, theirs), rtol=1e-8, atol=1e-12)


def test_lambda_zero_is_plain_fine_tuning(unet, batch):
    z_0, z_pr, t, eps, c, c_pr = batch
    plain = adapter_loss(unet, z_0, t[:3], eps[:3], c.expand(3, -1, -1), None, SCHEDULE)
    weightless = dreambooth.prior_preservation_loss(unet, *batch, SCHEDULE, lam=0)
    without = dreambooth.prior_preservation_loss(unet, z_0, z_pr[:0], t[:3], eps[:3], c, c_pr, SCHEDULE)
    wanted = gradients(unet, plain)
    for loss in (weightless, without):
        torch.testing.assert_close(loss, plain, rtol=1e-11, atol=0)
        torch.testing.assert_close(gradients(unet, loss), wanted, rtol=1e-8, atol=1e-12)


# Prompts and pictures

def test_prompts_are_the_papers():
    assert dreambooth.prompts("[V]", "man") == ["a [V] man", "a man"]


def test_identifier_of_several_tokens_is_warned_of_by_name(tiny_folder):
    tokenizer = StableDiffusion.load(tiny_folder).tokenizer
    tokens = [token.removesuffix("</w>") for token in tokenizer.tokenize("photohat")]
    assert len(tokens) > 1 and "".join(tokens) == "photohat"
    with pytest.warns(UserWarning, match=re.escape(f"'photohat' into {len(tokens)} tokens, {' + '.join(tokens)},")):
        dreambooth.check_identifier(tokenizer, "photohat")
    with warnings.catch_warnings(action="error"):
        dreambooth.check_identifier(tokenizer, "photo")
    with pytest.raises(ValueError, match="identifier is empty"):
        dreambooth.check_identifier(tokenizer, " ")


def test_photo_folders_that_are_no_use_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        data.picture_files(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="no pictures"):
        data.picture_files(tmp_path)
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="bad.jpg: not a readable picture"):
        dreambooth.latents(StableDiffusion(UNet(**CONFIG), *[type("", (), {"config": {"block_out_channels": [1]}})] * 3),
                           data.picture_files(tmp_path), None)


def test_latents_are_those_of_the_photos_one_by_one(tiny_folder, photos):
    sd, files = StableDiffusion.load(tiny_folder), data.picture_files(photos)
    z_0 = dreambooth.latents(sd, files, None, batch=2)
    alone = [sd.encode_latents(data.to_tensor([data.load_image(file, 64)])) for file in files]
    torch.testing.assert_close(z_0, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_only_missing_class_pictures_are_made_each_from_its_own_seed(tiny_folder, tmp_path, monkeypatch):
    sd, made = StableDiffusion.load(tiny_folder), []

    def generate(sd, c_t, null_c_t, w, steps, seed):
        made.append((seed, len(c_t)))
        torch.testing.assert_close(c_t, sd.encode_prompts(["a person"]).expand(len(c_t), -1, -1))
        assert w == 1 and null_c_t is None   # the model's own distribution: no guidance
        return torch.stack([torch.full((3, 4, 4), (seed + k) / 127.5 - 1) for k in range(len(c_t))])

    monkeypatch.setattr(dreambooth, "generate", generate)
    files = dreambooth.class_images(sd, "a person", tmp_path, 6, seed=100, batch=4)
    assert made == [(100, 4), (104, 2)]
    assert [data.load_image(file).getpixel((0, 0))[0] for file in files] == [100, 101, 102, 103, 104, 105]
    for k in (1, 2, 5):
        files[k].unlink()
    made.clear()
    assert dreambooth.class_images(sd, "a person", tmp_path, 7, seed=100, batch=4)[:6] == files
    assert made == [(101, 2), (105, 2)]
    assert [data.load_image(file).getpixel((0, 0))[0] for file in files] == [100, 101, 102, 103, 104, 105]
    made.clear()
    assert dreambooth.class_images(sd, "a person", tmp_path, 6, seed=100) == files and made == []
    with torch.autocast("cpu", torch.bfloat16):   # other numbers
        assert dreambooth.class_images(sd, "a person", tmp_path, 1, seed=100) != files[:1]
    made.clear()
    sd.unet.conv_out.weight.data += 0.1       # another model: nothing of the old one's is taken
    assert dreambooth.class_images(sd, "a person", tmp_path, 1, seed=100) != files[:1] and made == [(100, 1)]


# LoRA

def run_unet(unet, batch):
    return unet(batch[0], batch[2][:3], batch[4].expand(3, -1, -1))


def test_lora_starts_exactly_at_the_base_model_and_trains_alone(unet, batch):
    with torch.no_grad():
        before = run_unet(unet.requires_grad_(False), batch)   # PyTorch rounds otherwise if W wants a gradient
        updates = dreambooth.add_lora(unet, 2)
        assert torch.equal(run_unet(unet, batch), before)
    trained = {id(p) for p in unet.parameters() if p.requires_grad}
    assert trained == {id(p) for p in updates.parameters()} and len(trained) == 2 * 8 * 4   # A, B; 8 layers a block; 4 blocks
    run_unet(unet, batch).square().sum().backward()
    assert all(low.B.grad.abs().sum() > 0 for low in updates)


def test_lora_is_w_plus_alpha_over_r_times_b_a():
    W = randn(5, 7)
    low = dreambooth.LowRank(W, rank=3, alpha=6)
    assert low.A.shape == (3, 7) and low.B.abs().sum() == 0 and 0.2 < low.A.abs().max() * 7**0.5 <= 1
    low.B.data = randn(5, 3, seed=1)
    x = randn(2, 7, seed=2)
    torch.testing.assert_close(x @ low(W).T, x @ W.T + 6 / 3 * (x @ low.A.T) @ low.B.T, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="rank"):
        dreambooth.add_lora(UNet(**CONFIG), 0)


@pytest.fixture(scope="module")
def lora(tiny_folder, tmp_path_factory):
    """The tiny model with random updates of rank 3, α = 6, and their file."""
    sd, path = StableDiffusion.load(tiny_folder), tmp_path_factory.mktemp("lora") / "pytorch_lora_weights.safetensors"
    for k, low in enumerate(dreambooth.add_lora(sd.unet, 3, alpha=6)):
        low.B.data = 0.3 * randn(*low.B.shape, seed=k).float()
    dreambooth.save_lora(sd.unet, path)
    return sd.unet, path


INPUT = randn(2, 4, 16, 16).float(), torch.tensor([3, 800]), randn(2, 5, 128, seed=1).float()


@torch.no_grad()
def test_lora_merges_exactly(lora, tiny_folder):
    sd = StableDiffusion.load(tiny_folder)
    before = sd.unet.requires_grad_(False)(*INPUT)
    dreambooth.load_lora(lora[1], sd)
    assert torch.equal(sd.unet(*INPUT), lora[0](*INPUT)) and not torch.allclose(sd.unet(*INPUT), before, atol=1e-2)


@torch.no_grad()
def test_diffusers_opens_our_lora(lora, tiny_folder):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    pipe.load_lora_weights(lora[1].parent)
    torch.testing.assert_close(pipe.unet(*INPUT).sample, lora[0](*INPUT), rtol=1e-4, atol=1e-4)
    assert len(pipe.get_list_adapters()["unet"]) == 1


@torch.no_grad()
def test_we_open_diffusers_lora_with_its_alpha(tiny_folder, tmp_path):
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    metadata = pipe.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, peft.get_peft_model_state_dict(pipe.unet), unet_lora_adapter_metadata=metadata)
    sd = StableDiffusion.load(tiny_folder)
    dreambooth.load_lora(tmp_path / "pytorch_lora_weights.safetensors", sd)
    torch.testing.assert_close(sd.unet(*INPUT), pipe.unet(*INPUT).sample, rtol=1e-4, atol=1e-4)


def test_lora_that_does_not_fit_changes_nothing(lora, tmp_path):
    sd = type("", (), {"unet": UNet(**CONFIG)})
    before = {name: x.clone() for name, x in sd.unet.state_dict().items()}
    good = load_file(lora[1])
    name = min(good)
    for tensors, says in ((good, name), ({}, "no tensors"), ({name: good[name]}, name), ({"te.x": good[name]}, "te.x")):
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(ValueError, match=says):
            dreambooth.load_lora(tmp_path / "bad.safetensors", sd)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable LoRA"):
        dreambooth.load_lora(tmp_path / "bad.safetensors", sd)
    assert all(torch.equal(x, before[name]) for name, x in sd.unet.state_dict().items())


# The program

@pytest.fixture
def few_steps(monkeypatch):
    """Two steps for every picture instead of thirty."""
    real = dreambooth.generate
    for module in (dreambooth, train):
        monkeypatch.setattr(module, "generate", lambda *args, **kw: real(*args, **{**kw, "steps": 2}))


def changed(folder, before, part):
    a, b = (StableDiffusion.load(x) for x in (folder, before))
    a, b = getattr(a, part).state_dict(), getattr(b, part).state_dict()
    return [name for name in a if not torch.equal(a[name], b[name])]


WORDS = ["--noun", "person", "--batch", 2, "--every", 2, "--precision", "fp32", "--class-images", 2, "--lr", 1e-2, "--out", "run"]


def interrupt_once(monkeypatch):
    """Ctrl-C in the first step of the next training."""
    interrupted = iter([True, True])   # it is asked twice a step
    monkeypatch.setattr(train, "interruptible", lambda: nullcontext(lambda: next(interrupted, False)))


@pytest.mark.parametrize("text", [False, True])
def test_full_fine_tune_trains_what_it_says_resumes_exactly_and_leaves_a_checkpoint(
        text, tiny_folder, photos, workdir, monkeypatch, few_steps):
    words = ["--model", tiny_folder, "--images", photos, *WORDS] + ["--train-text-encoder"] * text
    program(monkeypatch, *words, "--steps", 2)
    whole = {part: StableDiffusion.load("run").__dict__[part].state_dict() for part in ("unet", "text_encoder")}
    assert sorted(p.name for p in (workdir / "run").iterdir() if not p.name.startswith("class-")) == sorted(
        ["dreambooth.csv", "dreambooth.pt", "samples.png", "model_index.json", "unet", "vae", "text_encoder", "tokenizer",
         "image_encoder", "feature_extractor", "scheduler"])
    assert len(list((workdir / "run").glob("class-*/*.png"))) == 2
    assert changed("run", tiny_folder, "vae") == [] and bool(changed("run", tiny_folder, "text_encoder")) == text
    assert len(changed("run", tiny_folder, "unet")) > 100
    state = torch.load("run/dreambooth.pt", weights_only=True)
    assert {name.split(".")[0] for name in state["module"]} == {"unet"} | ({"text_encoder"} if text else set())

    interrupt_once(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        program(monkeypatch, *words, "--steps", 2)
    assert stopped.value.code == 130 and torch.load("run/dreambooth.pt", weights_only=True)["step"] == 1
    program(monkeypatch, *words, "--steps", 2, "--resume")
    for part, tensors in whole.items():
        again = StableDiffusion.load("run").__dict__[part].state_dict()
        assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_diffusers_opens_a_fine_tune(tiny_folder, photos, workdir, monkeypatch, few_steps):
    diffusers = pytest.importorskip("diffusers")
    program(monkeypatch, "--model", tiny_folder, "--images", photos, *WORDS, "--steps", 1)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained("run", safety_checker=None)
    sd, (x_t, t, c_t) = StableDiffusion.load("run"), INPUT
    torch.testing.assert_close(pipe.unet.float()(x_t, t, c_t).sample, sd.unet(x_t, t, c_t), rtol=1e-4, atol=1e-4)
    assert pipe.tokenizer("a photo of a sks person").input_ids == sd.tokenizer("a photo of a sks person").input_ids


def test_validation_pictures_are_the_person_the_class_and_scenes(tiny_folder, photos, workdir, monkeypatch, few_steps):
    prompts, grids, encode = [], [], StableDiffusion.encode_prompts
    monkeypatch.setattr(StableDiffusion, "encode_prompts", lambda sd, texts: prompts.append(texts) or encode(sd, texts))
    monkeypatch.setattr(train, "save_grid", lambda path, rows, columns: grids.append((len(rows), columns)))
    program(monkeypatch, "--model", tiny_folder, "--images", photos, "--identifier", "zwx", *WORDS, "--steps", 1)
    assert grids == [(4, ["identity", "class", "hat", "sunglasses"])]
    person, others, hat, sunglasses, empty = prompts[-1]
    assert (person, others, empty) == ("a photo of a zwx person", "a photo of a person", "")
    assert "zwx person wearing a hat" in hat and "zwx person wearing sunglasses" in sunglasses


def test_lora_run_leaves_a_file_that_merges_and_resumes_exactly_but_not_with_other_photos(
        tiny_folder, photos, workdir, monkeypatch, capsys, few_steps):
    words = ["--model", tiny_folder, "--images", shutil.copytree(photos, "mine"), "--lora", 2, *WORDS, "--steps", 2]
    program(monkeypatch, *words)
    whole, sd = load_file("run/pytorch_lora_weights.safetensors"), StableDiffusion.load(tiny_folder)
    before = sd.unet(*INPUT)
    dreambooth.load_lora("run/pytorch_lora_weights.safetensors", sd)
    assert not torch.allclose(sd.unet(*INPUT), before) and not (workdir / "run" / "unet").exists()
    interrupt_once(monkeypatch)
    with pytest.raises(SystemExit):
        program(monkeypatch, *words)
    program(monkeypatch, *words, "--resume")
    again = load_file("run/pytorch_lora_weights.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    (workdir / "mine" / "0.jpg").unlink()
    with pytest.raises(SystemExit) as stopped:
        program(monkeypatch, *words, "--resume")
    assert stopped.value.code == 2 and "--photos" in capsys.readouterr().err


@pytest.mark.parametrize("lora, expected", [(None, (800, 1, 5e-6)), (4, (800, 1, 1e-4))])
def test_stable_diffusion_has_defaults_of_its_own(tiny_folder, lora, expected, monkeypatch):
    said = []
    monkeypatch.setattr(train, "is_large", lambda unet: True)
    monkeypatch.setattr(train, "fit", lambda task, out, steps, batch, lr, args: said.append((steps, batch, lr)))
    args = argparse.Namespace(steps=None, batch=None, lr=None, lora=lora, train_text_encoder=False, checkpointing=False,
                              seed=0, device=torch.device("cpu"))
    train.fine_tune(StableDiffusion.load(tiny_folder), ["a sks man", "a man"], torch.zeros(1, 4, 16, 16), [], None, args)
    assert said == [expected]


def test_one_photo_without_prior_makes_no_class_pictures(tiny_folder, photos, workdir, monkeypatch, few_steps):
    (workdir / "one").mkdir()
    (workdir / "one" / "0.jpg").symlink_to(photos / "0.jpg")
    program(monkeypatch, "--model", tiny_folder, "--images", "one", "--prior-weight", 0, "--lora", 1, "--steps", 1, *WORDS)
    assert list((workdir / "run").glob("class-*")) == [] and (workdir / "run" / "samples.png").exists()


@pytest.mark.parametrize("words, says", [
    (["--noun", "man"], "--images"),
    (["--images", "PHOTOS"], "--noun"),
    (["--images", "nowhere", "--noun", "man"], "nowhere"),
    (["--images", "PHOTOS", "--noun", "man", "--lora", "0"], "rank of at least 1"),
    (["--images", "PHOTOS", "--noun", "man", "--lora", "2", "--train-text-encoder"], "--lora"),
    (["--images", "PHOTOS", "--noun", "man", "--prior-weight", "-1"], "--prior-weight"),
    (["--images", "PHOTOS", "--noun", "man", "--class-images", "0"], "--class-images"),
])
def test_bad_input_is_one_line_and_exit_2(words, says, tiny_folder, photos, workdir, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, "--model", tiny_folder, *[photos if word == "PHOTOS" else word for word in words])
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ") and says in message
