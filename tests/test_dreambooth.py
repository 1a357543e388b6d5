"""dreambooth.py: both forms of the loss of section 3.2, class pictures, LoRA, and training as a program."""

import re
import shutil
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import dreambooth
import ip_adapter
import train
from conftest import randn
from data import ToyFaces
from ddpm import Schedule, predict_x0, q_sample
from ip_adapter import adapter_loss
from support.lora import load_lora, save_lora
from support.pictures import load_image, picture_files, to_tensor
from support.text import check_identifier
from unet import StableDiffusion, UNet

SCHEDULE = Schedule.stable_diffusion()
CONFIG = dict(
    sample_size=8, block_out_channels=[8, 16], layers_per_block=1, cross_attention_dim=12,
    attention_head_dim=2, norm_num_groups=4, down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"])


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet(**CONFIG).double()


@pytest.fixture
def batch():
    """Three photos, two class pictures, their t and ε, and both prompts."""
    z_0 = randn(3, 4, 8, 8)
    z_pr = randn(2, 4, 8, 8, seed=1)
    t = torch.tensor([0, 400, 999, 7, 650])
    eps = randn(5, 4, 8, 8, seed=2)
    c = randn(1, 6, 12, seed=3)
    c_pr = randn(1, 6, 12, seed=4)
    return z_0, z_pr, t, eps, c, c_pr


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("person")
    for k, photo in enumerate(ToyFaces(1, photos=3, seed=9).people[0].photos):
        photo.image.resize((80, 100)).save(folder / f"{k}.jpg")
    return folder


def gradients(unet, loss):
    unet.zero_grad()
    loss.backward()
    return torch.cat([weight.grad.flatten() for weight in unet.parameters()])


def program(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", "--method", "dreambooth", *map(str, words)])
    train.run(train.main)


# ---------------------------------------------------------------- the loss


def test_x_form_is_the_papers_formula():
    x, eps, eps_hat = (randn(3, 2, 4, 4, seed=k) for k in range(3))
    t = torch.tensor([0, 500, 999])
    w_t = randn(1000, seed=3).square()
    x_hat = predict_x0(q_sample(x, t, eps, SCHEDULE), t, eps_hat, SCHEDULE)
    paper = (w_t[t] * (x_hat - x).square().mean(dim=(1, 2, 3))).mean()
    ours = dreambooth.x0_loss(eps_hat, eps, t, SCHEDULE, w_t)
    torch.testing.assert_close(ours, paper, rtol=1e-11, atol=0)


def test_x_form_with_w_t_equals_eps_form_in_values_and_gradients():
    eps = randn(3, 2, 4, 4)
    t = torch.tensor([0, 500, 999])

    def x_form(eps_hat):
        return dreambooth.x0_loss(eps_hat, eps, t, SCHEDULE, dreambooth.snr(SCHEDULE))

    def eps_form(eps_hat):
        return (eps - eps_hat).square().mean()

    results = []
    for form in (x_form, eps_form):
        eps_hat = randn(3, 2, 4, 4, seed=1).requires_grad_()
        loss = form(eps_hat)
        (gradient,) = torch.autograd.grad(loss, eps_hat)
        results.append((loss.detach(), gradient))
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


def prior_loss(n, n_pr, prior_weight):
    """The loss of n photos and n_pr class pictures for a model ε̂ = (mean of the prompt)·z_t, and both
    squared errors, number by number."""
    z_0, z_pr = randn(n, 2, 4, 4), randn(n_pr, 2, 4, 4, seed=1)
    c, c_pr = randn(1, 5, 6, seed=3), randn(1, 5, 6, seed=4)
    eps, t = randn(n + n_pr, 2, 4, 4, seed=2), torch.arange(n + n_pr) * 190

    def unet(z_t, t, c_t):
        return c_t.mean(dim=(1, 2))[:, None, None, None] * z_t

    z_t = q_sample(torch.cat([z_0, z_pr]), t, eps, SCHEDULE)
    person = (eps[:n] - c.mean() * z_t[:n]).square()
    prior = (eps[n:] - c_pr.mean() * z_t[n:]).square()
    loss = dreambooth.prior_preservation_loss(
        unet, z_0, z_pr, t, eps, c, c_pr, SCHEDULE, prior_weight)
    return loss, person, prior


def test_prior_preservation_is_a_mean_over_photos_and_lambda_times_one_over_class_pictures():
    loss, person, prior = prior_loss(3, 2, 0.3)
    torch.testing.assert_close(loss, person.mean() + 0.3 * prior.mean(), rtol=1e-11, atol=0)


def test_prior_preservation_without_class_pictures_is_the_loss_of_the_photos():
    loss, person, _ = prior_loss(3, 0, 0.3)
    torch.testing.assert_close(loss, person.mean(), rtol=1e-11, atol=0)


def test_prior_preservation_is_two_eps_losses_in_one_batch(unet, batch):
    z_0, z_pr, t, eps, c, c_pr = batch
    calls = []
    unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    ours = dreambooth.prior_preservation_loss(unet, *batch, SCHEDULE, prior_weight=0.3)
    assert calls == [5]
    person = adapter_loss(unet, z_0, t[:3], eps[:3], c.expand(3, -1, -1), None, SCHEDULE)
    prior = adapter_loss(unet, z_pr, t[3:], eps[3:], c_pr.expand(2, -1, -1), None, SCHEDULE)
    theirs = person + 0.3 * prior
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=0)
    torch.testing.assert_close(gradients(unet, ours), gradients(unet, theirs), rtol=1e-8, atol=1e-12)


def test_lambda_zero_is_plain_fine_tuning(unet, batch):
    z_0, z_pr, t, eps, c, c_pr = batch
    plain = adapter_loss(unet, z_0, t[:3], eps[:3], c.expand(3, -1, -1), None, SCHEDULE)
    weightless = dreambooth.prior_preservation_loss(unet, *batch, SCHEDULE, prior_weight=0)
    none = z_pr[:0]
    without = dreambooth.prior_preservation_loss(unet, z_0, none, t[:3], eps[:3], c, c_pr, SCHEDULE)
    wanted = gradients(unet, plain)
    for loss in (weightless, without):
        torch.testing.assert_close(loss, plain, rtol=1e-11, atol=0)
        torch.testing.assert_close(gradients(unet, loss), wanted, rtol=1e-8, atol=1e-12)


# ---------------------------------------------------------------- prompts and pictures


def test_prompts_are_the_papers():
    assert dreambooth.write_prompts("[V]", "man") == ["a [V] man", "a man"]


def test_identifier_of_several_tokens_is_warned_of_by_name(tiny_model):
    tokenizer = tiny_model.tokenizer
    tokens = [token.removesuffix("</w>") for token in tokenizer.tokenize("photohat")]
    assert len(tokens) > 1 and "".join(tokens) == "photohat"
    says = re.escape(f"'photohat' into {len(tokens)} tokens, {' + '.join(tokens)},")
    with pytest.warns(UserWarning, match=says):
        check_identifier(tokenizer, "photohat")
    with warnings.catch_warnings(action="error"):
        check_identifier(tokenizer, "photo")
    with pytest.raises(ValueError, match="identifier is empty"):
        check_identifier(tokenizer, " ")


def test_photo_folders_that_are_no_use_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        picture_files(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="no pictures"):
        picture_files(tmp_path)
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="bad.jpg: not a readable picture"):
        dreambooth.encode_files(SimpleNamespace(image_size=8, preprocessor={}), picture_files(tmp_path), None)


def test_latents_are_those_of_the_photos_one_by_one(tiny_model, photos):
    files = picture_files(photos)
    z_0 = dreambooth.encode_files(tiny_model, files, None, batch=2)
    alone = [tiny_model.encode_latents(to_tensor([load_image(file, 64)])) for file in files]
    torch.testing.assert_close(z_0, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_only_missing_class_pictures_are_made_each_from_its_own_seed(tiny_model, tmp_path, monkeypatch):
    made = []

    def generate(sd, c_t, null_c_t, w, steps, seed):
        n = len(c_t)
        made.append((seed, n))
        torch.testing.assert_close(c_t, sd.encode_prompts(["a person"]).expand(n, -1, -1))
        assert w == 1 and null_c_t is None  # the model's own distribution: no guidance
        return torch.stack([torch.full((3, 4, 4), (seed + k) / 127.5 - 1) for k in range(n)])

    def make(count, batch=4):
        made.clear()
        return dreambooth.make_class_images(tiny_model, "a person", tmp_path, count, seed=100, batch=batch)

    def colours(files):
        return [load_image(file).getpixel((0, 0))[0] for file in files]

    monkeypatch.setattr(dreambooth, "generate", generate)
    files = make(6)
    assert made == [(100, 4), (104, 2)]
    assert colours(files) == [100, 101, 102, 103, 104, 105]
    for k in (1, 2, 5):
        files[k].unlink()
    assert make(7)[:6] == files
    assert made == [(101, 2), (105, 2)]
    assert colours(files) == [100, 101, 102, 103, 104, 105]
    assert make(6) == files and made == []
    with torch.autocast("cpu", torch.bfloat16):  # other numbers
        assert make(1) != files[:1]
    weight = tiny_model.unet.conv_out.weight
    monkeypatch.setattr(weight, "data", weight.data + 0.1)  # nothing of another model is taken
    assert make(1) != files[:1] and made == [(100, 1)]


def test_class_pictures_with_guidance_are_other_pictures(tiny_model, tmp_path, monkeypatch):
    asked = []

    def generate(sd, c_t, null_c_t, w, steps, seed):
        asked.append((w, null_c_t))
        return torch.zeros(len(c_t), 3, 4, 4)

    monkeypatch.setattr(dreambooth, "generate", generate)
    usual = dreambooth.make_class_images(tiny_model, "a person", tmp_path, 1)
    guided = dreambooth.make_class_images(tiny_model, "a person", tmp_path, 1, w=4.0)
    assert usual != guided and [w for w, _ in asked] == [1.0, 4.0]
    torch.testing.assert_close(asked[1][1], tiny_model.encode_prompts([""]))


# ---------------------------------------------------------------- LoRA


def run_unet(unet, batch):
    z_0, z_pr, t, eps, c, c_pr = batch
    return unet(z_0, t[:3], c.expand(3, -1, -1))


def test_lora_starts_exactly_at_the_base_model_and_trains_alone(unet, batch):
    unet.requires_grad_(False)  # PyTorch rounds otherwise if W wants a gradient
    with torch.no_grad():
        before = run_unet(unet, batch)
        updates = dreambooth.add_lora(unet, 2)
        assert torch.equal(run_unet(unet, batch), before)
    trained = {id(weight) for weight in unet.parameters() if weight.requires_grad}
    assert trained == {id(weight) for weight in updates.parameters()}
    assert len(trained) == 2 * 8 * 4  # A and B; 8 layers a block; 4 blocks
    run_unet(unet, batch).square().sum().backward()
    assert all(update.B.grad.abs().sum() > 0 for update in updates)


def test_lora_is_w_plus_alpha_over_r_times_b_a():
    W = randn(5, 7)
    update = dreambooth.LowRank(W, rank=3, alpha=6)
    assert update.A.shape == (3, 7) and update.B.abs().sum() == 0
    assert 0.2 < update.A.abs().max() * 7**0.5 <= 1
    update.B.data = randn(5, 3, seed=1)
    x = randn(2, 7, seed=2)
    expected = x @ W.T + 6 / 3 * (x @ update.A.T) @ update.B.T
    torch.testing.assert_close(x @ update(W).T, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="rank"):
        dreambooth.add_lora(UNet(**CONFIG), 0)


@pytest.fixture(scope="module")
def lora(tiny_folder, tmp_path_factory):
    """The tiny model's UNet with random updates of rank 3, α = 6, and their file."""
    unet = StableDiffusion.load(tiny_folder).unet
    path = tmp_path_factory.mktemp("lora") / "pytorch_lora_weights.safetensors"
    for k, update in enumerate(dreambooth.add_lora(unet, 3, alpha=6)):
        update.B.data = 0.3 * randn(*update.B.shape, seed=k).float()
    save_lora(unet, path)
    return unet, path


INPUT = randn(2, 4, 16, 16).float(), torch.tensor([3, 800]), randn(2, 5, 128, seed=1).float()


@torch.no_grad()
def test_lora_merges_exactly(lora, tiny_folder):
    unet, path = lora
    sd = StableDiffusion.load(tiny_folder)
    before = sd.unet.requires_grad_(False)(*INPUT)
    load_lora(path, sd)
    assert torch.equal(sd.unet(*INPUT), unet(*INPUT))
    assert not torch.allclose(sd.unet(*INPUT), before, atol=1e-2)


@torch.no_grad()
def test_diffusers_opens_our_lora(lora, tiny_folder):
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    unet, path = lora
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    pipe.load_lora_weights(path.parent)
    torch.testing.assert_close(pipe.unet(*INPUT).sample, unet(*INPUT), rtol=1e-4, atol=1e-4)
    assert len(pipe.get_list_adapters()["unet"]) == 1


@torch.no_grad()
def test_we_open_diffusers_lora_with_its_alpha(tiny_folder, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_folder, torch_dtype=torch.float32)
    config = peft.LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, target_modules=["to_q", "to_v"])
    pipe.unet.add_adapter(config)
    tensors = peft.get_peft_model_state_dict(pipe.unet)
    metadata = pipe.unet.peft_config["default"].to_dict()
    pipe.save_lora_weights(tmp_path, tensors, unet_lora_adapter_metadata=metadata)
    sd = StableDiffusion.load(tiny_folder)
    load_lora(tmp_path / "pytorch_lora_weights.safetensors", sd)
    torch.testing.assert_close(sd.unet(*INPUT), pipe.unet(*INPUT).sample, rtol=1e-4, atol=1e-4)


def test_lora_that_does_not_fit_changes_nothing(lora, tmp_path):
    sd = SimpleNamespace(unet=UNet(**CONFIG))
    before = {name: tensor.clone() for name, tensor in sd.unet.state_dict().items()}
    bad = tmp_path / "bad.safetensors"
    good = load_file(lora[1])
    name = min(good)
    cases = ((good, name), ({}, "no tensors"), ({name: good[name]}, name), ({"te.x": good[name]}, "te.x"))
    for tensors, says in cases:
        save_file(tensors, bad)
        with pytest.raises(ValueError, match=says):
            load_lora(bad, sd)
    bad.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a readable LoRA"):
        load_lora(bad, sd)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sd.unet.state_dict().items())


# ---------------------------------------------------------------- the program


@pytest.fixture
def few_steps(monkeypatch):
    """One step for every picture, not thirty."""
    real = ip_adapter.generate

    def generate(*args, **settings):
        return real(*args, **{**settings, "steps": 1})

    for module in (dreambooth, ip_adapter):
        monkeypatch.setattr(module, "generate", generate)


def find_changed(part, folder, before):
    """The names of the tensors that differ between two checkpoints."""
    a = load_file(Path(folder, part, FILES[part]))
    b = load_file(Path(before, part, FILES[part]))
    return [name for name in b if not torch.equal(a[name], b[name])]


FILES = dict(unet="diffusion_pytorch_model.safetensors", vae="diffusion_pytorch_model.safetensors",
             text_encoder="model.safetensors")
WORDS = ["--noun", "person", "--batch", 2, "--every", 2, "--precision", "fp32", "--class-images", 2,
         "--lr", 1e-2, "--out", "run"]


def interrupt_once(monkeypatch):
    """Ctrl-C in the first step of the next training."""
    presses = iter([True])
    monkeypatch.setattr(train, "interruptible", lambda: nullcontext(lambda: next(presses, False)))


@pytest.mark.parametrize("text", [False, True])
def test_full_fine_tune_trains_what_it_says_resumes_exactly_and_leaves_a_checkpoint(
        text, tiny_folder, photos, workdir, monkeypatch, few_steps):
    words = ["--model", tiny_folder, "--images", photos, "--steps", 2, *WORDS]
    words += ["--train-text-encoder"] * text
    program(monkeypatch, *words)
    names = [path.name for path in Path("run").iterdir() if not path.name.startswith("class-")]
    assert sorted(names) == sorted([
        "dreambooth.csv", "dreambooth.pt", "curve.png", "samples.png", "model_index.json", "unet", "vae",
        "text_encoder", "tokenizer", "image_encoder", "feature_extractor", "scheduler"])
    assert len(list(Path("run").glob("class-*/*.png"))) == 2
    for name in ("curve.png", "samples.png"):
        assert Image.open(f"run/{name}").width > 500
    assert find_changed("vae", "run", tiny_folder) == []
    assert bool(find_changed("text_encoder", "run", tiny_folder)) == text
    assert len(find_changed("unet", "run", tiny_folder)) > 100
    state = torch.load("run/dreambooth.pt", weights_only=True)
    networks = {"unet", "text_encoder"} if text else {"unet"}
    assert {name.split(".")[0] for name in state["module"]} == networks

    interrupt_once(monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        program(monkeypatch, *words)
    assert stopped.value.code == 130
    assert torch.load("run/dreambooth.pt", weights_only=True)["step"] == 1
    program(monkeypatch, *words, "--resume")
    again = torch.load("run/dreambooth.pt", weights_only=True)
    for name, tensor in state["module"].items():
        assert torch.equal(again["module"][name], tensor), name


def test_diffusers_opens_a_fine_tune(tiny_folder, photos, workdir, monkeypatch, few_steps):
    diffusers = pytest.importorskip("diffusers")
    program(monkeypatch, "--model", tiny_folder, "--images", photos, *WORDS, "--steps", 1)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained("run", safety_checker=None)
    sd = StableDiffusion.load("run")
    theirs = pipe.unet.float()(*INPUT).sample
    torch.testing.assert_close(theirs, sd.unet(*INPUT), rtol=1e-4, atol=1e-4)
    prompt = "a photo of a sks person"
    assert pipe.tokenizer(prompt).input_ids == sd.tokenizer(prompt).input_ids


def test_validation_pictures_are_the_person_the_class_and_scenes(
        tiny_folder, photos, workdir, monkeypatch):
    prompts = []
    grids = []
    encode = StableDiffusion.encode_prompts

    def generate(sd, c_t, *_, **__):
        return torch.zeros(len(c_t), 3, 64, 64)

    def encode_prompts(sd, texts):
        prompts.append(texts)
        return encode(sd, texts)

    def save_grid(path, rows, columns):
        grids.append((len(rows), columns))

    monkeypatch.setattr(StableDiffusion, "encode_prompts", encode_prompts)
    monkeypatch.setattr(ip_adapter, "generate", generate)
    monkeypatch.setattr(dreambooth, "save_grid", save_grid)
    words = [*WORDS, "--identifier", "zwx", "--lora", 1, "--steps", 1, "--prior-weight", 0]
    program(monkeypatch, "--model", tiny_folder, "--images", photos, *words)
    assert grids == [(4, ["identity", "class", "hat", "sunglasses"])]
    person, others, hat, sunglasses, empty = prompts[-1]
    assert (person, others, empty) == ("a photo of a zwx person", "a photo of a person", "")
    assert "zwx person wearing a hat" in hat and "zwx person wearing sunglasses" in sunglasses


def test_lora_run_leaves_a_file_that_merges_and_resumes_exactly_but_not_with_other_photos(
        tiny_folder, photos, workdir, monkeypatch, capsys, few_steps):
    shutil.copytree(photos, "mine")
    words = ["--model", tiny_folder, "--images", "mine", "--lora", 2, *WORDS, "--steps", 2]
    program(monkeypatch, *words)
    assert Path("run/curve.png").is_file() and not Path("run/unet").exists()
    whole = load_file("run/pytorch_lora_weights.safetensors")
    sd = StableDiffusion.load(tiny_folder)
    before = sd.unet(*INPUT)
    load_lora("run/pytorch_lora_weights.safetensors", sd)
    assert not torch.allclose(sd.unet(*INPUT), before)

    interrupt_once(monkeypatch)
    with pytest.raises(SystemExit):
        program(monkeypatch, *words)
    program(monkeypatch, *words, "--resume")
    again = load_file("run/pytorch_lora_weights.safetensors")
    assert all(torch.equal(again[name], whole[name]) for name in whole)

    Path("mine/0.jpg").unlink()
    with pytest.raises(SystemExit) as stopped:
        program(monkeypatch, *words, "--resume")
    assert stopped.value.code == 2 and "--photos" in capsys.readouterr().err


@pytest.mark.parametrize("lora, expected", [(None, (800, 1, 5e-6)), (4, (800, 1, 1e-4))])
def test_stable_diffusion_has_defaults_of_its_own(tiny_folder, lora, expected, monkeypatch):
    given = []

    def fit(task, out, options, settings):
        given.append((options.steps, options.batch, options.lr))

    monkeypatch.setattr(train, "is_large", lambda unet: True)
    monkeypatch.setattr(train, "fit", fit)
    sd = StableDiffusion.load(tiny_folder)
    options = train.Options(torch.device("cpu"))
    method = train.DreamBooth(lora=lora)
    train.fine_tune(sd, ["a sks man", "a man"], torch.zeros(1, 4, 16, 16), [], None, options, method)
    assert given == [expected]


def test_one_photo_without_prior_makes_no_class_pictures(
        tiny_folder, photos, workdir, monkeypatch, few_steps):
    (workdir / "one").mkdir()
    (workdir / "one" / "0.jpg").symlink_to(photos / "0.jpg")
    words = ["--prior-weight", 0, "--lora", 1, "--steps", 1, *WORDS]
    program(monkeypatch, "--model", tiny_folder, "--images", "one", *words)
    assert list(Path("run").glob("class-*")) == [] and Path("run/samples.png").exists()


OF_A_MAN = ["--images", "PHOTOS", "--noun", "man"]


@pytest.mark.parametrize("words, says", [
    (["--noun", "man"], "--images"),
    (["--images", "PHOTOS"], "--noun"),
    (["--images", "nowhere", "--noun", "man"], "nowhere"),
    ([*OF_A_MAN, "--lora", "0"], "--lora 0: from 1 to 1024"),
    ([*OF_A_MAN, "--lora", "2", "--train-text-encoder"], "--lora"),
    ([*OF_A_MAN, "--prior-weight", "-1"], "--prior-weight"),
    ([*OF_A_MAN, "--class-images", "0"], "--class-images"),
])
def test_bad_input_is_one_line_and_exit_2(words, says, tiny_folder, photos, workdir, monkeypatch, capsys):
    words = [photos if word == "PHOTOS" else word for word in words]
    with pytest.raises(SystemExit) as stop:
        program(monkeypatch, "--model", tiny_folder, *words)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and message.startswith("error: ") and says in message
