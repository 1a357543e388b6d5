"""What a file or the command line says wrongly is one line that names it, before any work is lost.

Tables of cases: what is broken, and words that the line must hold. A class of mistakes is refused in
one place (support/program.py, configs.py, weights.py, lora.py), so a case with other values is cheap.
"""

import json
import os
import pickle
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import dreambooth
import metrics
import sample
import train
from data import LFW, Features
from ip_adapter import IPAdapter, generate
from support import checkpoints, program
from support.checkpoints import ADAPTER, Checkpoint
from support.finite import check_finite
from support.lora import find_scale, load_lora, read_lora, save_lora
from support.text import first_line
from support.weights import read_pickle
from unet import AutoencoderKL, StableDiffusion

NAN, INF = float("nan"), float("inf")
NESTED = "[" * 200_000


def refuse(module, words, monkeypatch, capsys):
    """The one line that a program says of bad arguments."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    with pytest.raises(SystemExit) as stopped:
        program.run(module.main, "advice")
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert len(lines[0]) < 500
    return lines[0]


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("module, words, says", [
    (sample, ["--lam", "nan"], "--lam nan: from -10 to 10"),
    (sample, ["--lam", "1e300"], "--lam"),
    (sample, ["--guidance", "inf"], "--guidance inf: from -100 to 100"),
    (sample, ["--guidance=-1e9"], "--guidance"),
    (sample, ["--seed", 2**70], "--seed"),
    (sample, ["--seed", -1], "--seed -1: from 0 to 4294967295"),
    (sample, ["--seed", "9" * 5000], "--seed"),
    (sample, ["--n", 100_000], "--n 100000: from 1 to 1000"),
    (sample, ["--steps", 1001], "--steps 1001: from 1 to 1000"),
    (sample, ["--prompt", "caf\udce9"], "caf\\udce9"),
    (sample, ["--out", "\ud800.png"], "\\ud800"),
    (sample, ["--model", ""], "an empty name after --model"),
    (sample, ["--model="], "an empty name after --model"),
    (train, ["--out= "], "an empty name after --out"),
    (sample, ["--refs", "/dev/zero"], "/dev/zero: no such file"),
    (sample, ["--lora", "."], "a folder, not a file"),
    (sample, ["--device", "meta"], "no device 'meta'"),
    (sample, ["--unknown"], "--unknown"),
    (sample, ["--model", "runs/dreambooth", "--prompt", "x"], "runs/dreambooth: no such file or folder"),
    (train, ["--lr", 0], "--lr 0.0: from 1e-09 to 1"),
    (train, ["--lr", "inf"], "--lr"),
    (train, ["--batch", 10**9], "--batch"),
    (train, ["--people", 10**9], "--people"),
    (train, ["--data", "nowhere"], "nowhere: no such folder"),
    (train, ["--method", "dreambooth", "--images", ".", "--noun", "man " * 99], "200 characters"),
    (metrics, ["a", "b", "--batch", 0], "--batch"),
    (metrics, ["a", "b", "--seed", 2**32], "--seed"),
    (metrics, ["a", "b", "--clip", ""], "an empty name after --clip"),
    (metrics, ["a", "b", "--prompt", ""], "--prompt needs --clip"),
])
def test_arguments_are_refused_before_any_work(module, words, says, workdir, monkeypatch, capsys):
    monkeypatch.setattr(checkpoints, "snapshot_download", None)  # nobody is asked
    assert says in refuse(module, words, monkeypatch, capsys)
    assert list(workdir.iterdir()) == []


def test_every_number_has_a_range_and_zero_is_not_missing():
    parser = program.make_parser("a program")
    parser.add_argument("--other", type=float)
    assert parser.parse_args(["--other", "0"]).other == 0
    for value in ("nan", "inf", "-1", "1e7"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--other", value])


def test_a_prompt_of_ten_thousand_words_is_not_echoed(tiny_folder, workdir, monkeypatch, capsys):
    words = ["--model", tiny_folder, "--prompt", "word\n" * 10_000, "--n", 1, "--steps", 1]
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
    program.run(sample.main)
    said = capsys.readouterr()
    assert len(said.out) < 1000 and "cut to the text encoder's" in said.err
    assert max(len(line) for line in said.err.splitlines() if "warning" in line) < 500


# ---------------------------------------------------------------- settings


def copy_with(tiny_folder, tmp_path, file, content):
    """A copy of the checkpoint (by links) with another content of one file; None: without it."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model", copy_function=os.symlink)
    path = folder / file
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


UNET, VAE, TEXT, IMAGE, SCHEDULER, COLOURS = (
    "unet/config.json", "vae/config.json", "text_encoder/config.json", "image_encoder/config.json",
    "scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json")  # fmt: skip
SETTINGS = {
    UNET: {
        "sample_size": ["16", 0, 1e9, -4, None, [16, 16], 2**70, True],
        "layers_per_block": [10_000_000, 0, -1, "two", [1, 1]],
        "norm_num_groups": [0, 7, "x"],
        "attention_head_dim": [0, 3, [4, 4, 4], "4"],
        "cross_attention_dim": [0, "big", [128, 128]],
        "block_out_channels": [[], 64, [64, 10**9], ["a", "b"], [64, 64, 64]],
        "down_block_types": ["DownBlock2D", None],
        "in_channels": ["4"],
        "norm_eps": ["x", NAN],
        "use_linear_projection": ["no"],
    },
    VAE: {"scaling_factor": [0, NAN, "x", -1, 1e300, None], "norm_num_groups": [0, 5],
          "mid_block_add_attention": ["x"]},
    TEXT: {"hidden_size": ["big", 0, 10**9], "num_attention_heads": [0, 3, "x"],
           "hidden_act": ["swish", None, 3], "num_hidden_layers": [10**7, 0, 2.5],
           "vocab_size": ["x", 10**12], "layer_norm_eps": ["x", INF], "eos_token_id": ["x"]},
    IMAGE: {"image_size": [0, "x", 10**9], "patch_size": [0, 7, "x"], "hidden_act": ["x"],
            "num_attention_heads": [7]},
    SCHEDULER: {"beta_start": [-1, "small", None, NAN, 0.5], "beta_end": [1, "x"],
                "num_train_timesteps": [0, "x", 10**10], "beta_schedule": ["squared", None],
                "rescale_betas_zero_snr": [True], "thresholding": [True], "clip_sample": [True]},
    COLOURS: {"image_mean": [None, [0.5], "x", [0.5, "x", 0.5]], "image_std": [[0, 0, 0], [NAN] * 3]},
}  # fmt: skip


@pytest.mark.parametrize("file", SETTINGS)
def test_settings_out_of_range_are_refused_with_file_and_key(file, tiny_folder, tmp_path):
    config = json.loads((tiny_folder / file).read_text())
    folder = copy_with(tiny_folder, tmp_path, file, None)
    for key, values in SETTINGS[file].items():
        for value in values:
            (folder / file).write_text(json.dumps({**config, key: value}))
            with pytest.raises(ValueError) as error:
                load_settings(folder)
            text = str(error.value)
            assert file in text and key in text and "\n" not in text and len(text) < 500


def load_settings(folder):
    """As much of StableDiffusion.load as reads no weights of the large networks."""
    files = Checkpoint(folder, torch.float32)
    files.load_image_encoder(None, "cpu")


@pytest.mark.parametrize("file, key", [
    (UNET, "sample_size"), (UNET, "attention_head_dim"), (VAE, "scaling_factor"), (TEXT, "hidden_act"),
    (TEXT, "num_attention_heads"), (IMAGE, "patch_size"), (SCHEDULER, "beta_end"), (COLOURS, "image_mean"),
])  # fmt: skip
def test_settings_that_no_tensor_shows_must_be_there(file, key, tiny_folder, tmp_path):
    config = json.loads((tiny_folder / file).read_text())
    del config[key]
    folder = copy_with(tiny_folder, tmp_path, file, json.dumps(config))
    with pytest.raises(ValueError, match=f"{file}: {key} is missing"):
        load_settings(folder)


@pytest.mark.parametrize("text, says", [
    ("[1]", "a list"), ("null", "NoneType"), ("", "JSON"), ('{"a": ', "JSON"), (NESTED, "recursion"),
    (b'{"a": "\xe9\xff"}', "utf-8"), ('{"sample_size": ' + "9" * 5000 + "}", "JSON"),
], ids=range(7))  # fmt: skip
def test_what_is_no_table_of_settings_is_refused_by_its_name(text, says, tiny_folder, tmp_path):
    folder = copy_with(tiny_folder, tmp_path, UNET, text)
    with pytest.raises(ValueError, match=f"{UNET}.*{says}"):
        load_settings(folder)


@pytest.mark.parametrize("change, says", [
    (dict(in_channels=9), "reads 9 channels .* no inpainting"),
    (dict(in_channels=8), "reads 8 channels"),
    (dict(cross_attention_dim=64), "reads text of width 64, the text encoder's is 128"),
])
def test_parts_of_another_model_are_refused(change, says, tiny_folder, tmp_path):
    with pytest.raises(ValueError, match=says):
        load_settings(copy_with(tiny_folder, tmp_path, UNET, change))


@pytest.mark.parametrize("file, content", [
    ("tokenizer.json", "[]"), ("tokenizer.json", "{}"), ("tokenizer.json", b"\xff"), ("vocab.json", '{"a": "b"}'),
    ("vocab.json", '{"a": 100000}'), ("merges.txt", "#version: 0.2\n"), ("merges.txt", None),
    ("tokenizer_config.json", '{"model_max_length": "x"}'), ("tokenizer_config.json", "[]"),
])
def test_a_tokenizer_that_is_none_is_refused(file, content, tiny_folder, tmp_path):
    folder = copy_with(tiny_folder, tmp_path, f"tokenizer/{file}", content)
    if file in ("vocab.json", "merges.txt"):
        (folder / "tokenizer/tokenizer.json").unlink()  # which holds the same once more
    with pytest.raises(ValueError, match="model/tokenizer: ") as error:
        Checkpoint(folder, torch.float32).load_tokenizer()
    assert "\n" not in str(error.value)


def test_an_encoders_own_preprocessor_wins(tiny_folder, tmp_path):
    own = json.dumps(dict(image_mean=[0.1] * 3, image_std=[0.2] * 3))
    folder = copy_with(tiny_folder, tmp_path, ADAPTER, None)
    (folder / "image_encoder/preprocessor_config.json").write_text(own)
    _, colours = Checkpoint(folder, torch.float32).load_image_encoder(None, "cpu")
    assert colours["image_mean"] == [0.1] * 3


def test_an_encoder_at_the_root_of_a_hub_id_is_found(tiny_folder, tmp_path, monkeypatch):
    def download(repo, allow_patterns):
        for file in (tiny_folder / "image_encoder").iterdir():
            if file.name in allow_patterns or file.suffix == ".json":
                shutil.copy(file, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr(checkpoints, "snapshot_download", download)
    network, _ = Checkpoint(tiny_folder, torch.float32).load_image_encoder("someone/encoder", "cpu")
    assert network.config.projection_dim == 128


# ---------------------------------------------------------------- weights


def spoil(tensor, kind):
    if kind in (NAN, INF):
        tensor.view(-1)[1] = kind
        return tensor
    return {"int8": lambda: tensor.to(torch.int8), "0-d": lambda: torch.tensor(1.0), "empty": lambda: tensor[:0],
            "bfloat16": lambda: tensor.to(torch.bfloat16), "large": lambda: tensor.double() + 1e60}[kind]()  # fmt: skip


SPOILED = [(NAN, "NaN"), (INF, "NaN, infinity"), ("int8", "int8"), ("0-d", "shape"), ("empty", "empty"),
           ("bfloat16", "some of bfloat16"), ("large", "too large")]  # fmt: skip


@pytest.mark.parametrize("kind, says", SPOILED)
def test_tensors_that_are_no_weights_are_refused(kind, says, tiny_folder, tiny_model, tmp_path):
    name = "decoder.conv_in.weight"
    file = "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(tiny_folder / file)
    folder = copy_with(tiny_folder, tmp_path, file, None)
    save_file({**tensors, name: spoil(tensors[name], kind)}, folder / file)
    with pytest.raises(ValueError, match=f"{file}.*{says}"):
        Checkpoint(folder, torch.float32).load("vae", lambda config: AutoencoderKL(**config), "cpu")
    # and the same of an adapter
    for name in ("image_proj.proj.weight", "ip_adapter.3.to_v_ip.weight"):
        tensors = {key: x.half() for key, x in load_file(tiny_folder / ADAPTER).items()}
        save_file({**tensors, name: spoil(tensors[name], kind)}, tmp_path / "a.safetensors")
        with pytest.raises(ValueError, match=f"a.safetensors.*{says}"):
            IPAdapter.load(tmp_path / "a.safetensors", tiny_model.unet)


@pytest.mark.parametrize("extra, agg, says", [
    ({"foreign": torch.zeros(2)}, None, "tensor foreign has no place"),
    ({"aggregator.x": torch.zeros(2)}, None, "tensor aggregator.x has no place"),
    ({}, "median", "a.safetensors: unknown aggregator 'median'"),
])
def test_foreign_tensors_and_aggregators_in_an_adapter_are_refused(
        extra, agg, says, tiny_folder, tiny_model, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({**load_file(tiny_folder / ADAPTER), **extra}, path, {"agg": agg} if agg else None)
    with pytest.raises(ValueError, match=says):
        IPAdapter.load(path, tiny_model.unet)


def test_another_aggregator_leaves_the_files_own_tensors_out(tiny_model, tmp_path):
    path = tmp_path / "a.safetensors"
    IPAdapter(tiny_model.unet, 128, "selfattn", attach=False).save(path)
    assert IPAdapter.load(path, tiny_model.unet, "avg").agg == "avg"


@pytest.mark.parametrize("content", [[1], None, {"image_proj": 3}, {"image_proj": {"proj.weight": "x"}},
                                     torch.nn.Linear(1, 1), b"", b"hello", b"PK\x03\x04aaaa"])
def test_pickles_of_something_else_are_no_adapter(content, tiny_model, tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match="a.bin") as error:
        IPAdapter.load(path, tiny_model.unet)
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


def save_lightning(path, content, monkeypatch):
    """torch.save with an object of a class of pytorch_lightning beside it, which is not installed here."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    with monkeypatch.context() as patch:
        for i in (1, 2, 3):
            patch.setitem(sys.modules, ".".join(name.split(".")[:i]), module)
        torch.save({**content, "callbacks": {module.ModelCheckpoint: module.ModelCheckpoint()}}, path)


def test_ckpt_files_of_lightning_are_read_and_nothing_in_them_is_run(tmp_path, monkeypatch):
    path = tmp_path / "v1.ckpt"
    save_lightning(path, {"state_dict": {"x": torch.ones(2)}}, monkeypatch)
    assert torch.equal(read_pickle(path)["state_dict"]["x"], torch.ones(2))

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    save_lightning(path, {"state_dict": {"x": Evil()}}, monkeypatch)
    with pytest.raises(ValueError, match="v1.ckpt .* more than tensors .* take its .safetensors form"):
        read_pickle(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="v1.ckpt"):
        read_pickle(path)
    assert not (tmp_path / "owned").exists()


def test_pytorchs_advice_is_not_passed_on():
    advice = RuntimeError("Weights only load failed. Set `weights_only` to `False`\nif you trust it")
    assert first_line(advice) == "it holds more than tensors and is not opened"


# ---------------------------------------------------------------- LoRA


@pytest.fixture(scope="module")
def lora(tiny_folder, tmp_path_factory):
    sd = StableDiffusion.load(tiny_folder)
    dreambooth.add_lora(sd.unet, 4)
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    save_lora(sd.unet, path)
    return load_file(path)


@pytest.mark.parametrize("header, says", [
    ("{", "header"), ("[]", "no table"), (NESTED, "recursion"), ('{"unet.r": 2}', "lora_alpha = None"),
    ('{"unet.lora_alpha": "x"}', "lora_alpha"), ('{"unet.lora_alpha": NaN}', "lora_alpha"),
    ('{"unet.lora_alpha": 0}', "lora_alpha"), ('{"unet.lora_alpha": 2, "unet.use_dora": true}', "use_dora"),
    ('{"unet.lora_alpha": 2, "unet.alpha_pattern": {"(a+)+$": 3}}', "only names of layers"),
    ('{"unet.lora_alpha": 2, "unet.alpha_pattern": [1]}', "no table"),
], ids=range(10))  # fmt: skip
def test_odd_headers_of_a_lora_are_refused(header, says, lora, tmp_path):
    path = tmp_path / "l.safetensors"
    save_file(lora, path, {"lora_adapter_metadata": header})
    with pytest.raises(ValueError, match=f"l.safetensors: .*{says}"):
        read_lora(path)


@pytest.mark.parametrize("kind, says", [*SPOILED[:3], ("0-d", "another shape"), ("empty", "empty")])
def test_loras_of_no_rank_or_no_numbers_are_refused(kind, says, lora, tiny_model, tmp_path):
    path = tmp_path / "l.safetensors"
    name = min(lora)
    save_file({**lora, name: spoil(lora[name].clone(), kind)}, path)
    with pytest.raises(ValueError, match=f"l.safetensors.*{says}"):
        load_lora(path, tiny_model)


def test_scale_of_a_lora_is_alpha_over_r_or_over_its_root():
    settings = {"lora_alpha": 8, "alpha_pattern": {"mid.to_q": 2, "to_k": 4}}
    assert find_scale({}, "mid.to_q", 4) == 1
    assert find_scale(settings, "up.to_q", 4) == 2  # r is the tensor's own: rank_pattern needs no rule
    assert find_scale(settings, "mid.to_q", 4) == 0.5
    assert find_scale(settings, "up.to_k", 4) == 1
    assert find_scale({**settings, "use_rslora": True}, "up.to_q", 4) == 4


# ---------------------------------------------------------------- numbers that are none


@pytest.mark.parametrize("spoiled, says", [
    ("unet", "the UNet answers"), ("vae", "the VAE answers"), ("c_t", "the text encoder answers"),
    ("c_i", "the adapter answers"),
])
def test_a_picture_that_is_not_finite_says_where_that_began(spoiled, says, tiny_model, monkeypatch):
    c = {"c_t": tiny_model.encode_prompts(["x"]), "c_i": torch.zeros(1, 4, 128)}
    if spoiled in c:
        c[spoiled][0, 0, 0] = NAN
    else:
        network = {"unet": tiny_model.unet.conv_out, "vae": tiny_model.vae.post_quant_conv}[spoiled]
        monkeypatch.setattr(network.bias, "data", network.bias.data + NAN)
    with pytest.raises(ValueError, match=says):
        generate(tiny_model, c["c_t"], None, c["c_i"], w=1, steps=1)


def test_features_that_are_not_finite_are_refused(tiny_model, workdir, photo_folder, monkeypatch):
    monkeypatch.setattr("data.warn_of_unreadable", lambda *_: None)
    embed = tiny_model.image_encoder.visual_projection.weight
    monkeypatch.setattr(embed, "data", embed.data * INF)
    with pytest.raises(ValueError, match="the image encoder answers with NaN"):
        Features(tiny_model, LFW(photo_folder, 64).people)


def test_numbers_at_the_edge_are_finite():
    check_finite(UNet=torch.tensor([-65504.0, 65504.0]).half(), VAE=None)
    for value in (INF, -INF, NAN):
        with pytest.raises(ValueError):
            check_finite(UNet=torch.tensor([0.0, value]).half())


# ---------------------------------------------------------------- photos


@pytest.fixture
def links(photo_folder, tmp_path):
    """The photo folder, and in it links that lead nowhere, in a circle, a pipe, a folder named .jpg."""
    root = shutil.copytree(photo_folder, tmp_path / "people")
    person = sorted(root.glob("*2"))[0]
    os.symlink("/nowhere/x.jpg", person / "a.jpg")
    os.symlink(person / "b.jpg", person / "b.jpg")
    os.mkfifo(person / "c.jpg")
    (person / "d.jpg").mkdir()
    return root, person


@pytest.mark.skipif(sys.platform == "win32", reason="no links, no pipes")
def test_links_that_lead_nowhere_are_unreadable_photos(links, tiny_model, workdir, monkeypatch, capsys):
    root, person = links
    with pytest.warns(UserWarning, match="5 of .* photos are unreadable and left out: .*/a.jpg"):
        Features(tiny_model, LFW(root, 64).people)
    capsys.readouterr()
    for name in "abcd":
        line = refuse(sample, ["--refs", person / f"{name}.jpg", "--prompt", "x"], monkeypatch, capsys)
        assert f"{name}.jpg" in line
    words = [person, person, "--inception", "toy", "--device", "cpu"]
    assert "a.jpg: not a readable picture" in refuse(metrics, words, monkeypatch, capsys)


@pytest.mark.parametrize("text, says", [
    (b"image\tprompt\nx\tcaf\xe9\n", "not UTF-8"), (b"image prompt\nx y\n", "holds no line"), (b"", "holds no line")])
def test_prompts_that_are_none_are_named(text, says, photo_folder, tmp_path):
    root = shutil.copytree(photo_folder, tmp_path / "people")
    (root / "prompts.tsv").write_bytes(text)
    with pytest.raises(ValueError, match=f"prompts.tsv.*{says}"):
        LFW(root, 64)


@pytest.mark.parametrize("name, is_id", [
    ("h94/IP-Adapter", True), ("runs/dreambooth", False), ("weights/tiny", False), ("../model", False),
    ("someone/file.safetensors", False), ("a/b/c", False), ("/x/y", False)])
def test_what_means_a_folder_is_not_asked_of_the_hub(name, is_id):
    assert checkpoints.is_hub_id(name) == is_id
