"""unet.py: parity of the UNet and the VAE with diffusers; checkpoints of every published kind."""

import fnmatch
import json
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import unet as module
from conftest import randn
from ddpm import Schedule
from support import configs
from support.files import write_whole
from unet import AutoencoderKL, Posterior, StableDiffusion, UNet

B, L, D = 2, 5, 12
UNET = dict(  # four levels, as in Stable Diffusion
    sample_size=8, block_out_channels=[8, 16, 16, 24], layers_per_block=2, norm_num_groups=4,
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, cross_attention_dim=D, attention_head_dim=4)
OTHER = dict(  # two levels, heads given level by level, linear projections, attention at the bottom only
    sample_size=8, in_channels=3, out_channels=5, block_out_channels=[8, 16], layers_per_block=1,
    down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], norm_num_groups=4, norm_eps=1e-6,
    up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"], cross_attention_dim=D, attention_head_dim=[2, 4],
    use_linear_projection=True)
VAE = dict(block_out_channels=[8, 16, 16, 24], layers_per_block=2, norm_num_groups=4, sample_size=16,
           down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
PLAIN_VAE = dict(VAE, block_out_channels=[8, 16], layers_per_block=1, mid_block_add_attention=False,
                 down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2)
PARTS = ["unet", "vae", "text_encoder", "image_encoder"]


def randomise(net, dtype=torch.float64):
    """Random weights everywhere (norms and biases too), so that no tensor can be mistaken for another."""
    for i, p in enumerate(net.parameters()):
        p.data = (randn(*p.shape, seed=i) / max(p[0].numel(), 4) ** 0.5).to(dtype)
    return net.eval().requires_grad_(False)


def pair(ours, theirs, config):
    """Our network and diffusers', with the same weights under the same names."""
    theirs = randomise(getattr(pytest.importorskip("diffusers"), theirs)(**config))
    ours = ours(**config).double().requires_grad_(False)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# The networks


@pytest.mark.parametrize("config, size, t", [
    (UNET, (8, 8), 981), (UNET, (11, 9), torch.tensor([3, 500])), (OTHER, (6, 5), 1)])  # fmt: skip
def test_unet_equals_diffusers(config, size, t):
    ours, theirs = pair(UNet, "UNet2DConditionModel", config)
    x_t, c_t = randn(B, ours.config["in_channels"], *size), randn(B, L, D, seed=1)
    assert relative(ours(x_t, t, c_t), theirs(x_t, t, c_t).sample) <= 1e-12


def test_unet_with_image_tokens_equals_diffusers_ip_adapter():
    ours, theirs = pair(UNet, "UNet2DConditionModel", UNET)
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

    processors = {}
    for name in theirs.attn_processors:
        attn = ours.get_submodule(name.removesuffix(".processor"))
        processors[name] = AttnProcessor2_0()
        if name.endswith("attn2.processor"):
            width = attn.to_q.out_features
            processors[name] = randomise(IPAdapterAttnProcessor2_0(width, D, num_tokens=(4,), scale=0.6))
            attn.image_kv = (processors[name].to_k_ip[0], processors[name].to_v_ip[0])
    theirs.set_attn_processor(processors)
    x_t, c_t, c_i = randn(B, 4, 8, 8), randn(B, L, D, seed=1), randn(B, 4, D, seed=2)
    expected = theirs(x_t, 17, (c_t, [c_i])).sample
    assert relative(ours(x_t, 17, c_t), expected) > 1e-3
    assert relative(ours(x_t, 17, c_t, c_i, lam=0.6), expected) <= 1e-12


def test_lam_zero_is_exactly_text_only():
    unet = randomise(UNet(**UNET))
    for name, attn in unet.named_modules():
        if name.endswith("attn2"):
            width = attn.to_q.out_features
            attn.image_kv = tuple(torch.nn.Linear(D, width, bias=False).double() for _ in "kv")
    x_t, c_t, c_i = randn(B, 4, 8, 8), randn(B, L, D, seed=1), randn(B, 4, D, seed=2)
    assert torch.equal(unet(x_t, 17, c_t, c_i, lam=0.0), unet(x_t, 17, c_t))
    assert not torch.equal(unet(x_t, 17, c_t, c_i, lam=0.1), unet(x_t, 17, c_t))


@pytest.mark.parametrize("config", [VAE, PLAIN_VAE])
def test_vae_equals_diffusers(config):
    ours, theirs = pair(AutoencoderKL, "AutoencoderKL", config)
    x = randn(B, 3, 27, 16)
    posterior, expected = ours.encode(x), theirs.encode(x).latent_dist
    assert relative(posterior.mean, expected.mode()) <= 1e-12
    assert relative(posterior.logvar, expected.logvar) <= 1e-12
    seed = torch.Generator().manual_seed
    assert relative(posterior.sample(seed(5)), expected.sample(seed(5))) <= 1e-12
    assert relative(ours.decode(posterior.mean), theirs.decode(expected.mean).sample) <= 1e-12


@pytest.mark.parametrize("right, wrong", [(1e-5, 1e-6), (1e-6, 1e-5)])
def test_parity_sees_every_wrong_group_norm_eps(right, wrong):
    unet, vae = randomise(UNet(**UNET)), randomise(AutoencoderKL(**VAE))
    x_t, c_t, x, z = randn(1, 4, 8, 8), randn(1, L, D, seed=1), randn(1, 3, 16, 16), randn(1, 4, 2, 2, seed=3)
    runs = [
        (unet, lambda: unet(x_t, 3, c_t)),
        (vae.encoder, lambda: vae.encode(x).mean),
        (vae.decoder, lambda: vae.decode(z)),
    ]
    count = 0
    for network, run in runs:
        expected = run()
        for norm in network.modules():
            if isinstance(norm, torch.nn.GroupNorm) and norm.eps == right:
                norm.eps = wrong
                assert relative(run(), expected) > 1e-12
                norm.eps = right
                count += 1
    assert count == {1e-5: 45, 1e-6: 68}[right]


def test_log_variance_is_clamped():
    vae = randomise(AutoencoderKL(**PLAIN_VAE))
    vae.quant_conv.bias.data[4:] = torch.tensor([1e3, -1e3, 0, 0]).double()
    logvar = vae.encode(randn(B, 3, 16, 16)).logvar
    assert (logvar[:, 0] == 20).all() and (logvar[:, 1] == -30).all() and logvar[:, 2:].abs().max() < 20


def test_posterior_samples_have_its_mean_and_variance():
    posterior = Posterior(torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), 2.0).log())
    z = posterior.sample(torch.Generator().manual_seed(0))
    assert abs(z.mean() - 3) < 0.03 and abs(z.var() - 2) < 0.05


def test_gradient_checkpointing_runs_blocks_twice_and_changes_no_gradient():
    unet, gradients, calls = randomise(UNet(**OTHER)).requires_grad_(True), [], []
    unet.mid_block.register_forward_pre_hook(lambda *_: calls.append(unet.gradient_checkpointing))
    x_t, c_t = randn(B, 3, 6, 5), randn(B, L, D, seed=1)
    for unet.gradient_checkpointing in (False, True):
        unet.zero_grad()
        unet(x_t, 7, c_t).square().sum().backward()
        gradients.append([p.grad.clone() for p in unet.parameters()])
    assert calls == [False, True, True]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_unet_runs_under_autocast_and_channels_last():
    unet = randomise(UNet(**UNET), torch.float32)
    x_t, c_t = randn(B, 4, 8, 8).float(), randn(B, L, D, seed=1).float()
    expected = unet(x_t, 7, c_t)
    unet.to(memory_format=torch.channels_last)
    assert relative(unet(x_t.to(memory_format=torch.channels_last), 7, c_t), expected) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(unet(x_t, 7, c_t).float(), expected) < 0.1


def test_full_size_names_and_shapes_are_the_published_ones():
    def shapes(net):
        return {name: tensor.shape for name, tensor in net.state_dict().items()}

    with torch.device("meta"):
        unet, vae = UNet(), AutoencoderKL()
        assert sum(p.numel() for p in unet.parameters()) == 859_520_964
        diffusers = pytest.importorskip("diffusers")
        assert shapes(unet) == shapes(diffusers.UNet2DConditionModel(**unet.config))
        assert shapes(vae) == shapes(diffusers.AutoencoderKL(**vae.config))


def test_channels_and_skips_are_those_of_the_docstrings_u():
    with torch.device("meta"):
        unet = UNet()

    def channels(blocks):
        return [[resnet.conv1.in_channels for resnet in block.resnets] for block in blocks]

    down, up = channels(unet.down_blocks), channels(unet.up_blocks)
    assert down == [[320, 320], [320, 640], [640, 1280], [1280, 1280]]
    assert channels([unet.mid_block]) == [[1280, 1280]]
    assert up == [
        [1280 + 1280, 1280 + 1280, 1280 + 1280],
        [1280 + 1280, 1280 + 1280, 1280 + 640],
        [1280 + 640, 640 + 640, 640 + 320],
        [640 + 320, 320 + 320, 320 + 320],
    ]
    assert sum(map(len, up)) == 12  # one skip each
    assert [len(block.attentions) for block in unet.down_blocks] == [2, 2, 2, 0]
    assert [len(block.attentions) for block in unet.up_blocks] == [0, 3, 3, 3]


def test_text_attentions_are_numbered_as_in_ip_adapter_sd15():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        names = [name for name, _ in UNet().named_modules() if name.endswith(("attn1", "attn2"))]
        theirs = list(diffusers.UNet2DConditionModel(**configs.UNET_DEFAULTS).attn_processors)
    assert [name + ".processor" for name in names] == theirs
    assert [i for i, name in enumerate(names) if name.endswith("attn2")] == list(range(1, 32, 2))
    assert names[31].startswith("mid_block")


@pytest.mark.parametrize("network, setting", [
    (UNet, dict(act_fn="gelu")), (UNet, dict(flip_sin_to_cos=False)),
    (UNet, dict(class_embed_type="timestep")),
    (UNet, dict(addition_time_embed_dim=256)), (UNet, dict(time_cond_proj_dim=256)),
    (UNet, dict(up_block_types=["AttnUpBlock2D"] * 4)), (UNet, dict(block_out_channels=[8, 16])),
    (AutoencoderKL, dict(use_quant_conv=False)), (AutoencoderKL, dict(shift_factor=0.1)),
])  # fmt: skip
def test_settings_that_are_not_implemented_are_refused_by_name(network, setting):
    with pytest.raises(ValueError, match=next(iter(setting)) + "|AttnUpBlock2D"), torch.device("meta"):
        network(**setting)


def test_harmless_settings_are_accepted():
    harmless = dict(dropout=0.0, freq_shift=0, dual_cross_attention=False, num_class_embeds=None)
    with torch.device("meta"):
        UNet(_diffusers_version="0.6.0", **harmless)
        AutoencoderKL(force_upcast=False, latents_mean=None)


# Checkpoints


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny checkpoint with random float32 weights, never saved or loaded."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    width = dict(hidden_size=D, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    special = dict(bos_token_id=56, eos_token_id=57, pad_token_id=57)
    text = CLIPTextConfig(vocab_size=60, max_position_embeddings=9, **special, **width)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=6, **width)
    unet, vae = UNet(**UNET), AutoencoderKL(**VAE)
    text_encoder, image_encoder = CLIPTextModel(text), CLIPVisionModelWithProjection(vision)
    for network in (unet, vae, text_encoder, image_encoder):
        randomise(network, torch.float32)
    words = tokenizer(tmp_path_factory.mktemp("tokenizer"))
    return StableDiffusion(unet, vae, text_encoder, words, image_encoder)


def tokenizer(folder):
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz,."
    words = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = dict(bos_token=words[-2], eos_token=words[-1], unk_token=words[-1], pad_token=words[-1])
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(special, model_max_length=9)))
    return CLIPTokenizer.from_pretrained(str(folder))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save(folder, torch.float32)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def weights(folder, part):
    return next((folder / part).glob("*.safetensors"))


def assert_same(a, b, parts=PARTS):
    for part in parts:
        ours, theirs = getattr(a, part).state_dict(), getattr(b, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours), part


def test_save_then_load_is_exact(model, saved):
    loaded = StableDiffusion.load(saved)
    assert_same(loaded, model)
    assert loaded.unet.config == model.unet.config and loaded.vae.config == model.vae.config
    networks = [getattr(loaded, part) for part in PARTS]
    assert not any(x.is_meta for net in networks for x in [*net.parameters(), *net.buffers()])
    assert torch.equal(loaded.schedule.alpha_bar, Schedule.stable_diffusion().alpha_bar)
    prompts, images = ["a cat", "dog"], randn(2, 3, 16, 16).float().clamp(-1, 1)
    assert torch.equal(loaded.encode_prompts(prompts), model.encode_prompts(prompts))
    assert torch.equal(loaded.embed_images(images), model.embed_images(images))


def test_saved_folder_has_the_published_files_and_names(saved):
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    published = """model_index.json unet/config.json unet/diffusion_pytorch_model.safetensors vae/config.json
        vae/diffusion_pytorch_model.safetensors text_encoder/config.json text_encoder/model.safetensors
        image_encoder/config.json image_encoder/model.safetensors scheduler/scheduler_config.json
        tokenizer/vocab.json tokenizer/merges.txt tokenizer/tokenizer_config.json
        feature_extractor/preprocessor_config.json"""
    optional = {"tokenizer/tokenizer.json", "tokenizer/special_tokens_map.json"}
    assert files - optional == set(published.split())
    assert all(name.startswith("text_model.") for name in load_file(weights(saved, "text_encoder")))


def test_save_is_half_precision_unless_told(model, tmp_path):
    model.save(tmp_path)
    for part in PARTS:
        assert {x.dtype for x in load_file(weights(tmp_path, part)).values()} == {torch.float16}
    assert StableDiffusion.load(tmp_path).unet.conv_in.weight.dtype == torch.float32
    loaded = StableDiffusion.load(tmp_path, dtype=torch.bfloat16)
    assert loaded.vae.quant_conv.weight.dtype == torch.bfloat16


def test_save_replaces_its_parts_and_leaves_the_rest(model, folder):
    (folder / "ip_adapter").mkdir()
    (folder / "ip_adapter/ip_adapter.safetensors").write_text("mine")
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").write_text("stale")
    model.save(folder)
    assert (folder / "ip_adapter/ip_adapter.safetensors").read_text() == "mine"
    left = [path.name for path in (folder / "unet").glob("*.safetensors")]
    assert left == ["diffusion_pytorch_model.safetensors"]
    assert not list(folder.glob(".saving*"))


def test_failed_save_leaves_the_old_checkpoint_whole(model, folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def fail(tensors, path, metadata):
        if "unet" not in str(path):
            raise OSError("disk full")
        save_file(tensors, path)

    monkeypatch.setattr("support.files.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows limits no file's size")
@pytest.mark.parametrize("write", [torch.save, save_file], ids=["torch", "safetensors"])
def test_full_disk_is_an_os_error_and_leaves_the_old_file(write, tmp_path):
    import resource

    (path := tmp_path / "weights").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="weights"):
            write_whole(path, lambda part: write({"x": torch.zeros(100_000)}, part))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_diffusers_opens_a_saved_folder_and_predicts_the_same_noise(model, saved):
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(saved)
    prompts, x_t = ["a cat", "dog"], randn(2, 4, 8, 8).float()
    c_t = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
    assert relative(model.encode_prompts(prompts), c_t) <= 1e-6
    assert relative(model.unet(x_t, 9, c_t), pipeline.unet(x_t, 9, c_t).sample) <= 1e-5
    assert relative(model.schedule.alpha_bar, pipeline.scheduler.alphas_cumprod) <= 1e-5
    images = pipeline.vae.decode(x_t / pipeline.vae.config.scaling_factor).sample
    assert relative(model.decode_latents(x_t), images.clamp(-1, 1)) <= 1e-5


def test_fp16_variant_is_read_and_preferred_only_for_half_precision(model, folder):
    for part in PARTS:
        path = weights(folder, part)
        halves = {name: x.half() + 1 for name, x in load_file(path).items()}
        save_file(halves, path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    assert_same(StableDiffusion.load(folder), model)
    half = StableDiffusion.load(folder, dtype=torch.float16).unet.conv_in.weight
    assert torch.equal(half, model.unet.conv_in.weight.half() + 1)
    weights(folder, "unet").with_name("diffusion_pytorch_model.safetensors").unlink()
    assert torch.equal(StableDiffusion.load(folder).unet.conv_in.weight, half.float())


def test_bin_files_are_read_only_when_there_are_no_safetensors(model, folder):
    for part in PARTS:
        path = weights(folder, part)
        name = "diffusion_pytorch_model.bin" if part in ("unet", "vae") else "pytorch_model.bin"
        torch.save({key: x + 1 for key, x in load_file(path).items()}, path.with_name(name))
    assert_same(StableDiffusion.load(folder), model)
    for part in PARTS:
        path = weights(folder, part)
        name = "diffusion_pytorch_model.bin" if part in ("unet", "vae") else "pytorch_model.bin"
        torch.save(load_file(path), path.with_name(name), _use_new_zipfile_serialization=part != "vae")
        path.unlink()
    assert_same(StableDiffusion.load(folder), model)


def test_pickles_that_hold_more_than_tensors_are_not_run(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    weights(folder, "vae").unlink()
    (folder / "vae/diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil()}, protocol=2))
    with pytest.raises(ValueError, match="diffusion_pytorch_model.bin is not a readable weight file"):
        StableDiffusion.load(folder)
    assert not (tmp_path / "owned").exists()


def test_older_vae_attention_names_are_read(model, folder):
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, x in load_file(weights(folder, "vae")).items():
        for ours, older in new.items():
            name = name.replace(f"attentions.0.{ours}.", f"attentions.0.{older}.")
        tensors[name] = x
    assert "decoder.mid_block.attentions.0.proj_attn.weight" in tensors
    save_file(tensors, weights(folder, "vae"))
    assert_same(StableDiffusion.load(folder), model)


def test_position_ids_of_older_text_encoders_are_ignored(model, folder):
    path = weights(folder, "text_encoder")
    tensors = load_file(path)
    tensors["text_model.embeddings.position_ids"] = torch.arange(9)[None]
    save_file(tensors, path)
    assert_same(StableDiffusion.load(folder), model)


def original_unet_name(name):
    """A UNet tensor's name in CompVis' layout, as diffusers' script for the way back writes it."""
    table = {"time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.",
             "conv_in.": "input_blocks.0.0.", "conv_norm_out.": "out.0.", "conv_out.": "out.2.",
             "mid_block.attentions.0.": "middle_block.1."}
    for i in range(4):
        for j in range(2):
            table[f"down_blocks.{i}.resnets.{j}."] = f"input_blocks.{3 * i + j + 1}.0."
            table[f"down_blocks.{i}.attentions.{j}."] = f"input_blocks.{3 * i + j + 1}.1."
            table[f"mid_block.resnets.{j}."] = f"middle_block.{2 * j}."
        for j in range(3):
            table[f"up_blocks.{i}.resnets.{j}."] = f"output_blocks.{3 * i + j}.0."
            table[f"up_blocks.{i}.attentions.{j}."] = f"output_blocks.{3 * i + j}.1."
        table[f"down_blocks.{i}.downsamplers.0.conv."] = f"input_blocks.{3 * (i + 1)}.0.op."
        table[f"up_blocks.{i}.upsamplers.0."] = f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}."
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
             "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    prefix = next(prefix for prefix in table if name.startswith(prefix))
    rest = name.removeprefix(prefix)
    for ours, theirs in inner.items() if ".resnets." in prefix else ():
        rest = rest.replace(ours, theirs)
    return table[prefix] + rest


def original_vae_name(name):
    table = {}
    for i in range(4):
        table[f"encoder.down_blocks.{i}."] = f"encoder.down.{i}."
        table[f"decoder.up_blocks.{i}."] = f"decoder.up.{3 - i}."
    for j in range(2):
        table[f"mid_block.resnets.{j}."] = f"mid.block_{j + 1}."
    table |= {"resnets.": "block.", "downsamplers.0.": "downsample.", "upsamplers.0.": "upsample.",
              "mid_block.attentions.0.group_norm": "mid.attn_1.norm", "conv_norm_out": "norm_out",
              "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out", "conv_shortcut": "nin_shortcut",
              "mid_block.attentions.0.to_": "mid.attn_1."}
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


def single_file(model):
    """The same weights under the names of `v1-5-pruned-emaonly.safetensors`."""
    tensors = {"model_ema.decay": torch.ones(1), "betas": torch.ones(1000)}
    for name, x in model.unet.state_dict().items():
        tensors["model.diffusion_model." + original_unet_name(name)] = x
    for name, x in model.vae.state_dict().items():
        x = x[..., None, None] if ".attentions." in name and x.ndim == 2 else x
        tensors["first_stage_model." + original_vae_name(name)] = x
    for name, x in model.text_encoder.state_dict().items():
        tensors["cond_stage_model.transformer.text_model." + name.removeprefix("text_model.")] = x
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(9)[None]
    return tensors


@pytest.mark.parametrize("suffix", ["safetensors", "ckpt"])
def test_single_file_checkpoint_is_the_folder_exactly(model, saved, tmp_path, suffix):
    path, tensors = tmp_path / f"v1-5-pruned-emaonly.{suffix}", single_file(model)
    if suffix == "safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "global_step": 1}, path)
    loaded = StableDiffusion.load(path, config=saved, image_encoder=saved)
    assert_same(loaded, model)
    assert torch.equal(loaded.encode_prompts(["a cat"]), model.encode_prompts(["a cat"]))
    assert StableDiffusion.load(path, config=saved).image_encoder is None


def test_single_file_names_are_those_that_diffusers_converts(model):
    utils, tensors = pytest.importorskip("diffusers.loaders.single_file_utils"), single_file(model)
    config = dict(UNET, class_embed_type=None, addition_embed_type=None)
    assert set(utils.convert_ldm_unet_checkpoint(dict(tensors), config)) == set(model.unet.state_dict())
    assert set(utils.convert_ldm_vae_checkpoint(dict(tensors), VAE)) == set(model.vae.state_dict())


def test_single_file_without_config_is_stable_diffusion_15(model, saved, tmp_path):
    save_file(single_file(model), tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match=r"small.safetensors: tensor .* but the config asks for"):
        StableDiffusion.load(tmp_path / "small.safetensors", config=saved / "tokenizer")
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)   # a tokenizer beside the file
    assert_same(StableDiffusion.load(tmp_path / "small.safetensors"), model)


@pytest.mark.parametrize("part, name", [
    ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight"),
    ("vae", "decoder.conv_in.bias"),
    ("text_encoder", "text_model.final_layer_norm.bias"),
    ("image_encoder", "visual_projection.weight"),
])  # fmt: skip
def test_missing_misshapen_and_unexpected_tensors_are_named(folder, part, name):
    path = weights(folder, part)
    tensors = load_file(path)
    shape = list(tensors[name].shape)
    save_file({k: x for k, x in tensors.items() if k != name}, path)
    with pytest.raises(ValueError, match=f"{part}/.*{name.removeprefix('text_model.')} is missing"):
        StableDiffusion.load(folder)
    save_file(tensors | {name: torch.zeros(3, 3)}, path)
    with pytest.raises(ValueError) as error:
        StableDiffusion.load(folder)
    for words in (name, "[3, 3]", str(shape)):
        assert words in str(error.value)
    assert "\n" not in str(error.value)
    save_file(tensors | {"stranger.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="stranger.weight is unexpected"):
        StableDiffusion.load(folder)


@pytest.mark.parametrize("gone", [
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae", "text_encoder/model.safetensors",
    "tokenizer", "scheduler"])  # fmt: skip
def test_missing_parts_are_named(folder, gone):
    path = folder / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=gone):
        StableDiffusion.load(folder)


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="unet/config.json is missing"):
        StableDiffusion.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such file or folder"):
        StableDiffusion.load(tmp_path / "nowhere")
    path = weights(folder, "unet")
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"unet/{path.name} is not a readable weight file"):
        StableDiffusion.load(folder)
    (folder / "vae/config.json").write_text("{")
    with pytest.raises(ValueError, match="vae/config.json is not valid JSON"):  # before any weights
        StableDiffusion.load(folder)


def test_hub_ids_come_from_the_cache_when_offline(model, saved, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="someone/model: no such folder, and the hub"):
        StableDiffusion.load("someone/model")
    commit = "0" * 40
    for repo in ("models--someone--model", "models--h94--IP-Adapter"):
        (tmp_path / repo / "refs").mkdir(parents=True)
        (tmp_path / repo / "refs/main").write_text(commit)
    cached = shutil.copytree(saved, tmp_path / "models--someone--model/snapshots" / commit)
    (tmp_path / "models--h94--IP-Adapter/snapshots" / commit / "models").mkdir(parents=True)
    encoder = tmp_path / "models--h94--IP-Adapter/snapshots" / commit / "models/image_encoder"
    (cached / "image_encoder").rename(encoder)
    assert StableDiffusion.load("someone/model").image_encoder is None
    assert_same(StableDiffusion.load("someone/model", image_encoder="h94/IP-Adapter"), model)


def test_other_precision_in_the_cache_is_used_when_offline(model, saved, monkeypatch):
    def offline(repo, allow_patterns):   # as huggingface_hub 2 does when a listed file is not there
        if any("fp16" in pattern for pattern in allow_patterns):
            error = FileNotFoundError("the snapshot is incomplete")
            error.snapshot_path = str(saved)
            raise error
        return str(saved)

    monkeypatch.setattr("support.checkpoints.snapshot_download", offline)
    loaded = StableDiffusion.load("someone/model", dtype=torch.bfloat16)
    assert loaded.unet.conv_in.weight.dtype == torch.bfloat16


def test_hub_downloads_whole_parts_and_the_image_encoder_if_there_is_one(model, saved, tmp_path, monkeypatch):
    def download(repo, allow_patterns):
        for file in (path for path in saved.rglob("*") if path.is_file()):
            name = str(file.relative_to(saved))
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, tmp_path / name)
        return str(tmp_path)

    monkeypatch.setattr("support.checkpoints.snapshot_download", download)
    assert_same(StableDiffusion.load("someone/model"), model)


@pytest.mark.parametrize("place", ["../image_encoder", "../IP-Adapter/models/image_encoder"])
def test_image_encoder_is_found_in_or_beside_the_checkpoint(model, folder, place):
    (folder / "image_encoder").rename(folder / "moved")
    assert StableDiffusion.load(folder).image_encoder is None
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / "moved").rename(folder / place)
    assert_same(StableDiffusion.load(folder), model)


def test_image_encoder_can_be_named(model, folder, tmp_path):
    (folder / "image_encoder").rename(tmp_path / "elsewhere")
    assert_same(StableDiffusion.load(folder, image_encoder=tmp_path / "elsewhere"), model)
    with pytest.raises(FileNotFoundError, match="holds no image encoder"):
        StableDiffusion.load(folder, image_encoder=folder)
    weights(tmp_path, "elsewhere").unlink()
    with pytest.raises(FileNotFoundError, match="elsewhere/model.safetensors is missing"):
        StableDiffusion.load(folder, image_encoder=tmp_path / "elsewhere")


def test_missing_image_encoder_matters_only_when_used(model):
    without = StableDiffusion(model.unet, model.vae, model.text_encoder, model.tokenizer)
    assert without.encode_prompts(["a"]).shape == (1, 9, D)
    with pytest.raises(ValueError, match="no image encoder"):
        without.embed_images(torch.zeros(1, 3, 16, 16))


def test_schedules_are_read_from_their_published_settings():
    linear = dict(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", num_train_timesteps=1000)
    schedule = Schedule(configs.make_betas(linear))
    torch.testing.assert_close(schedule.beta, Schedule.ddpm().beta, rtol=1e-12, atol=0)
    others = dict(prediction_type="v_prediction", beta_schedule="squared", trained_betas=[0.1])
    for key, value in others.items():
        with pytest.raises(ValueError, match=key):
            configs.make_betas(linear | {key: value})


# What goes in and out


def test_text_is_the_last_hidden_state_after_the_final_norm_padded_without_mask(model, saved):
    from transformers import CLIPTextModel

    theirs = CLIPTextModel.from_pretrained(saved / "text_encoder").eval()
    ids = torch.tensor([[56, 28, 2, 0, 47, 57, 57, 57, 57],  # a</w>, c, a, t</w>
                        [56, 57, 57, 57, 57, 57, 57, 57, 57]])  # nothing
    with torch.no_grad():
        expected = theirs(input_ids=ids).last_hidden_state
    assert relative(model.encode_prompts(["a cat", ""]), expected) <= 1e-6


def test_prompt_too_long_is_cut_with_a_warning(model):
    with pytest.warns(UserWarning, match="prompt of 12 tokens cut to the text encoder's 9"):
        cut = model.encode_prompts(["a b c d e f g h i j"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cut, model.encode_prompts(["a b c d e f g"]))


def test_latents_are_scaled_posterior_samples_and_decode_undoes_the_scale(model):
    x, seed = randn(2, 3, 16, 16).float(), torch.Generator().manual_seed
    with torch.no_grad():
        posterior = model.vae.encode(x)
    assert torch.equal(model.encode_latents(x), 0.18215 * posterior.mean)
    assert torch.equal(model.encode_latents(x, seed(1)), 0.18215 * posterior.sample(seed(1)))
    images = model.decode_latents(0.18215 * posterior.mean)
    torch.testing.assert_close(images, model.vae.decode(posterior.mean).clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert model.decode_latents(1e3 * posterior.mean).abs().max() <= 1


def published_processor(size):
    import transformers.models.clip as clip

    kind = getattr(clip, "CLIPImageProcessorPil", None) or clip.CLIPImageProcessor  # transformers 5, 4
    return kind(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (250, 250), (37, 64), (101, 33), (5, 9)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_clip_pixels_equal_the_published_image_processor(model, size, mode):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    photo = Image.fromarray(noise).convert(mode)
    expected = published_processor(16)([photo], return_tensors="pt").pixel_values
    torch.testing.assert_close(model.clip_pixels([photo]), expected, rtol=1e-6, atol=1e-6)
    x = torch.from_numpy(np.array(photo.convert("RGB"))).permute(2, 0, 1)[None] / 127.5 - 1
    grey_level = 1 / 255 / 0.26
    if min(size) >= 16:  # enlarged noise overshoots, which 8 bits cut off after each of Pillow's two passes
        assert (model.clip_pixels(x) - expected).abs().max() < 1.5 * grey_level


def test_enlarged_tensors_stay_within_black_and_white(model):
    x = torch.tensor([-1.0, 1.0]).repeat(4).expand(1, 3, 8, 8)
    mean, std = (torch.tensor(values)[:, None, None] for values in model.preprocessor.values())
    pixels = model.clip_pixels(x) * std + mean
    assert -1e-6 < pixels.min() < 0.1 and 0.9 < pixels.max() < 1 + 1e-6


def test_embeddings_of_photos_and_of_tensors_agree_with_transformers(model, saved):
    from transformers import CLIPVisionModelWithProjection

    theirs = CLIPVisionModelWithProjection.from_pretrained(saved / "image_encoder").eval()
    noise = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    photos = [Image.fromarray(array) for array in noise]
    with torch.no_grad():
        expected = theirs(published_processor(16)(photos, return_tensors="pt").pixel_values).image_embeds
    assert relative(model.embed_images(photos), expected) <= 1e-5
    x = torch.from_numpy(noise).permute(0, 3, 1, 2) / 127.5 - 1
    assert relative(model.embed_images(x), expected) <= 1e-5


def test_preprocessor_settings_of_the_folder_are_used(folder):
    halves = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    (folder / "feature_extractor/preprocessor_config.json").write_text(json.dumps(halves))
    x = randn(1, 3, 16, 16).float().clamp(-1, 1)
    torch.testing.assert_close(StableDiffusion.load(folder).clip_pixels(x), x)


# Full size


@pytest.mark.slow
def test_full_size_networks_equal_diffusers(one_thread):
    """Random weights, about 5 GB: both implementations share the UNet's 859,520,964 parameters."""
    torch.set_num_threads(one_thread)  # all of them again
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        unet, vae = UNet(), AutoencoderKL()
    theirs_unet = diffusers.UNet2DConditionModel(**unet.config).eval().requires_grad_(False)
    unet.load_state_dict(theirs_unet.state_dict(), strict=True, assign=True)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    x_t, c_t = randn(1, 4, 32, 32).float(), randn(1, 77, 768, seed=1).float()
    with torch.inference_mode():
        assert relative(unet(x_t, 981, c_t), theirs_unet(x_t, 981, c_t).sample) <= 1e-4
    theirs_vae = diffusers.AutoencoderKL(**vae.config).eval().requires_grad_(False)
    vae.load_state_dict(theirs_vae.state_dict(), strict=True, assign=True)
    x = randn(1, 3, 128, 128).float().clamp(-1, 1)
    with torch.inference_mode():
        z = theirs_vae.encode(x).latent_dist.mean
        assert relative(vae.encode(x).mean, z) <= 1e-4
        assert relative(vae.decode(z), theirs_vae.decode(z).sample) <= 1e-4


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory as Linux reports it")
def test_full_size_unet_is_loaded_without_a_second_copy(tmp_path):
    """3.4 GB on disk, and in memory once: only what the mapped file itself takes."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in UNet().state_dict().items()}
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: torch.full(shape, 0.1) for name, shape in shapes.items()}, path)
    code = f"""if True:
        import pathlib
        from support.checkpoints import load_network
        from unet import UNet
        def peak():
            return int(pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
        before = peak()
        net = load_network(lambda config: UNet(**config), {{}}, pathlib.Path({str(path)!r}))
        total = sum(p.double().sum().item() for p in net.parameters())
        print(peak() - before)"""
    root = Path(module.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True)
    grown = int(done.stdout)
    size = path.stat().st_size
    path.unlink()  # pytest keeps its temporary folders
    assert 0.9 < grown / size < 1.1
