"""The networks of Stable Diffusion 1.x: UNet, VAE, and loading their published weights.

The UNet is ε_θ of the paper's equations 1, 8, 10 and 11: it reads the noised latent x_t, the step t, the
prompt's tokens c_τ and, with an adapter attached, the image tokens c_i, and answers with the noise.

    down: ResNet blocks (+ transformers, attention.py), halving the size; every output is kept as a skip
    mid:  ResNet, transformer, ResNet
    up:   ResNet blocks over [x, skip] (+ transformers), doubling the size

The VAE maps pixels in [−1, 1] to latents and back: z_0 = 0.18215·sample of N(μ, σ²), (μ, log σ²) = encode(x).
Its encoder is such a way down, its decoder such a way up, both without skips.

Attribute names are those of the published files in diffusers' layout, so loading is `load_state_dict(strict)`.
`up_blocks` is registered before `mid_block` because published adapters number the layers down, up, mid.
"""

import json
import math
import os
import pickle
import re
import sys
import tempfile
import warnings
import zipfile
from collections import OrderedDict
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import SpatialAttention, Transformer2D
from ddpm import Schedule


def chain(**layers):
    """The layers one after another, under their names in the checkpoint."""
    return nn.Sequential(OrderedDict(layers))


class ResnetBlock(nn.Module):
    """Two 3×3 convolutions with a residual; the time embedding is added between them if `temb_dim` is given."""

    def __init__(self, in_channels, out_channels, groups, eps, temb_dim=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_dim, out_channels) if temb_dim else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x, temb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(temb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


def downsample(channels, padding):
    """Halves the size: 3×3 convolution of stride 2. UNet: padding 1 all around; VAE: 0, and one right and bottom."""
    pad = nn.Identity() if padding else nn.ZeroPad2d((0, 1, 0, 1))
    return chain(pad=pad, conv=nn.Conv2d(channels, channels, 3, stride=2, padding=padding))


class Upsample(nn.Module):
    """Doubles the size (or goes to `size`) by repeating pixels, then a 3×3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size=None):
        return self.conv(F.interpolate(x, size=size, scale_factor=None if size else 2.0, mode="nearest"))


class Block(nn.Module):
    """ResNet blocks, each followed by an attention as long as there are any, then a change of size.

    in_widths: the input channels of each ResNet block. The other arguments make the layers: resnet(input, channels),
    and each item of `attentions`, `downsamplers` and `upsamplers` by item(channels).
    """

    def __init__(self, in_widths, channels, resnet, attentions=(), downsamplers=(), upsamplers=()):
        super().__init__()
        self.resnets = nn.ModuleList(resnet(width, channels) for width in in_widths)
        self.attentions = nn.ModuleList(make(channels) for make in attentions)
        self.downsamplers = nn.ModuleList(make(channels) for make in downsamplers)
        self.upsamplers = nn.ModuleList(make(channels) for make in upsamplers)

    def outputs(self, x, temb=None, context=(), skips=(), size=None):
        """Yield the output of each step. `skips`: each ResNet block reads [x, skip], the last skip first."""
        for i, (resnet, attention) in enumerate(zip_longest(self.resnets, self.attentions)):
            x = resnet(torch.cat([x, skips[-1 - i]], dim=1) if skips else x, temb)
            x = x if attention is None else attention(x, *context)
            yield x
        for down in self.downsamplers:
            yield down(x)
        for up in self.upsamplers:
            yield up(x, size)

    def forward(self, *inputs):
        for x in self.outputs(*inputs):
            pass  # keeping the last one only
        return x


class DownBlock(Block):
    """A Block that returns all its outputs: the skips of the UNet."""

    def forward(self, *inputs):
        return list(self.outputs(*inputs))


def sinusoids(t, dim):
    """[cos(t·ω), sin(t·ω)], ω_k = 10000^(−k/half), k = 0 … half − 1, half = dim/2; t (B,) -> float32 (B, dim)."""
    k = torch.arange(dim // 2, dtype=torch.float32, device=t.device)
    angle = t[:, None].float() * torch.exp(-math.log(10000) * k / (dim // 2))
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def checked(config, module, name):
    """`config`, lists for tuples, with the defaults filled in; ValueError for what `module` does not implement."""
    cfg = {key: list(x) if isinstance(x, tuple) else x for key, x in {**module.DEFAULTS, **config}.items()}
    for key in cfg.keys() - module.DEFAULTS.keys():
        implemented = [module.ONLY[key]] if key in module.ONLY else [None, False]
        if not key.startswith("_") and cfg[key] not in implemented:
            raise ValueError(f"{name}: {key} = {cfg[key]!r} is not implemented")
    levels = [cfg[key] for key in ("block_out_channels", "down_block_types", "up_block_types")]
    if not len(levels[0]) == len(levels[1]) == len(levels[2]):
        raise ValueError(f"{name}: block_out_channels, down_block_types and up_block_types differ in length: {levels}")
    if unknown := set(levels[1] + levels[2]) - set(module.BLOCKS):
        raise ValueError(f"{name}: block {min(unknown)} is not implemented, only {', '.join(module.BLOCKS)}")
    return {**cfg, "_class_name": name}


class UNet(nn.Module):
    """ε_θ(x_t, t, c_τ, c_i), built from the keys of a published `unet/config.json` (UNet2DConditionModel).

    Raises ValueError for a setting of Stable Diffusion's relatives that is not implemented here.
    `gradient_checkpointing = True` trades time for memory in training: blocks are recomputed in the backward pass.
    """

    DEFAULTS = dict(  # Stable Diffusion 1.5's
        sample_size=64, in_channels=4, out_channels=4, block_out_channels=[320, 640, 1280, 1280], layers_per_block=2,
        down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], norm_num_groups=32, norm_eps=1e-5,
        up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, cross_attention_dim=768, attention_head_dim=8,
        use_linear_projection=False, upcast_attention=False, addition_embed_type_num_heads=64)  # two without effect
    ONLY = dict(  # other settings: the implemented value, where that is not None or False
        act_fn="silu", flip_sin_to_cos=True, downsample_padding=1, mid_block_type="UNetMidBlock2DCrossAttn",
        mid_block_scale_factor=1, transformer_layers_per_block=1, resnet_out_scale_factor=1, conv_in_kernel=3,
        conv_out_kernel=3, resnet_time_scale_shift="default", attention_type="default",
        time_embedding_type="positional")
    BLOCKS = ["DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"]

    def __init__(self, **config):
        super().__init__()
        self.config = cfg = checked(config, self, "UNet2DConditionModel")
        widths, layers, groups = cfg["block_out_channels"], cfg["layers_per_block"], cfg["norm_num_groups"]
        temb_dim, top, heads = 4 * widths[0], len(widths) - 1, cfg["attention_head_dim"]  # sic: the number of heads
        resnet = partial(ResnetBlock, groups=groups, eps=cfg["norm_eps"], temb_dim=temb_dim)

        def transformers(n, level, kind):
            make = partial(Transformer2D, heads=heads if isinstance(heads, int) else heads[level], groups=groups,
                           context_dim=cfg["cross_attention_dim"], linear=cfg["use_linear_projection"])
            return [make] * n if kind.startswith("CrossAttn") else []

        self.conv_in = nn.Conv2d(cfg["in_channels"], widths[0], 3, padding=1)
        self.time_embedding = chain(linear_1=nn.Linear(widths[0], temb_dim), act=nn.SiLU(),
                                    linear_2=nn.Linear(temb_dim, temb_dim))
        skips, self.down_blocks, self.up_blocks = [widths[0]], nn.ModuleList(), nn.ModuleList()
        for i, kind in enumerate(cfg["down_block_types"]):
            inputs, halve = [skips[-1]] + [widths[i]] * (layers - 1), [partial(downsample, padding=1)] * (i < top)
            self.down_blocks.append(DownBlock(inputs, widths[i], resnet, transformers(layers, i, kind), halve))
            skips += [widths[i]] * (layers + len(halve))
        for i, kind in zip(reversed(range(top + 1)), cfg["up_block_types"]):
            inputs = [width + skips.pop() for width in [widths[min(i + 1, top)]] + [widths[i]] * layers]
            up = [Upsample] * (i > 0)
            self.up_blocks.append(Block(inputs, widths[i], resnet, transformers(layers + 1, i, kind), upsamplers=up))
        self.mid_block = Block([widths[top]] * 2, widths[top], resnet, transformers(1, top, "CrossAttn"))
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=cfg["norm_eps"])
        self.conv_out = nn.Conv2d(widths[0], cfg["out_channels"], 3, padding=1)
        self.gradient_checkpointing = False

    def forward(self, x_t, t, c_t, c_i=None, lam=1.0):
        """eps_hat = ε_θ(x_t, t, c_τ, c_i): the noise in x_t.

        x_t (B, C, H, W) latents of any size; t: int or (B,) steps 0 … T−1; c_t (B, L, D) text tokens; c_i (B, M, D)
        image tokens or None; lam: λ of eq. 3. Returns (B, C, H, W).
        """
        t = torch.as_tensor(t, device=x_t.device).expand(x_t.shape[0])
        temb = F.silu(self.time_embedding(sinusoids(t, self.conv_in.out_channels).to(x_t.dtype)))
        inputs = temb, (c_t, c_i, lam)
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        run = partial(checkpoint, use_reentrant=False) if recompute else lambda block, *args: block(*args)
        skips = [self.conv_in(x_t)]
        for block in self.down_blocks:
            skips += run(block, skips[-1], *inputs)
        x = run(self.mid_block, skips[-1], *inputs)
        for block in self.up_blocks:
            n = len(block.resnets)
            used, skips = skips[-n:], skips[:-n]
            x = run(block, x, *inputs, used, skips[-1].shape[2:] if skips else None)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Gaussian(NamedTuple):
    """N(mean, exp(logvar)), diagonal; both (B, C, h, w)."""

    mean: torch.Tensor
    logvar: torch.Tensor

    def sample(self, generator=None):
        """μ + σ·ε, ε ~ N(0, I) drawn from `generator` (on its own device; None: PyTorch's global one)."""
        device = generator.device if generator else self.mean.device
        eps = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=device)
        return self.mean + torch.exp(0.5 * self.logvar) * eps.to(self.mean.device)


class AutoencoderKL(nn.Module):
    """The VAE, built from the keys of a published `vae/config.json` (AutoencoderKL). ValueError as in UNet."""

    DEFAULTS = dict(  # Stable Diffusion 1.5's
        sample_size=512, in_channels=3, out_channels=3, block_out_channels=[128, 256, 512, 512], layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4,
        norm_num_groups=32, scaling_factor=0.18215, mid_block_add_attention=True, force_upcast=True)
    ONLY = dict(act_fn="silu", use_quant_conv=True, use_post_quant_conv=True)
    BLOCKS = ["DownEncoderBlock2D", "UpDecoderBlock2D"]

    def __init__(self, **config):
        super().__init__()
        self.config = cfg = checked(config, self, "AutoencoderKL")
        widths, layers, groups = cfg["block_out_channels"], cfg["layers_per_block"], cfg["norm_num_groups"]
        resnet = partial(ResnetBlock, groups=groups, eps=1e-6)

        def levels(widths, layers, name, resize):
            blocks = [Block([widths[max(i - 1, 0)]] + [width] * (layers - 1), width, resnet,
                            **{name: [resize] * (i < len(widths) - 1)}) for i, width in enumerate(widths)]
            return nn.Sequential(*blocks)

        def middle(width):
            attentions = [partial(SpatialAttention, groups=groups)] if cfg["mid_block_add_attention"] else []
            return Block([width] * 2, width, resnet, attentions)

        self.encoder = chain(
            conv_in=nn.Conv2d(cfg["in_channels"], widths[0], 3, padding=1),
            down_blocks=levels(widths, layers, "downsamplers", partial(downsample, padding=0)),
            mid_block=middle(widths[-1]), conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=1e-6), act=nn.SiLU(),
            conv_out=nn.Conv2d(widths[-1], 2 * cfg["latent_channels"], 3, padding=1))
        self.decoder = chain(
            conv_in=nn.Conv2d(cfg["latent_channels"], widths[-1], 3, padding=1), mid_block=middle(widths[-1]),
            up_blocks=levels(widths[::-1], layers + 1, "upsamplers", Upsample),
            conv_norm_out=nn.GroupNorm(groups, widths[0], eps=1e-6), act=nn.SiLU(),
            conv_out=nn.Conv2d(widths[0], cfg["out_channels"], 3, padding=1))
        self.quant_conv = nn.Conv2d(2 * cfg["latent_channels"], 2 * cfg["latent_channels"], 1)
        self.post_quant_conv = nn.Conv2d(cfg["latent_channels"], cfg["latent_channels"], 1)

    def encode(self, x):
        """x (B, 3, H, W) in [−1, 1] -> Gaussian(μ, log σ²), the posterior; log σ² clamped to [−30, 20]."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return Gaussian(mean, logvar.clamp(-30, 20))

    def decode(self, z):
        """z (B, C, h, w), unscaled -> pixels (B, 3, H, W), about [−1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z))


# Published weights. Single-file checkpoints carry no config; theirs is Stable Diffusion 1.5's.

SD15 = dict(
    unet={}, vae={},  # the DEFAULTS above
    text_encoder=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
    scheduler=dict(_class_name="DDIMScheduler", num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012,
                   beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False, clip_sample=False))
CLIP = dict(image_mean=[0.48145466, 0.4578275, 0.40821073], image_std=[0.26862954, 0.26130258, 0.27577711])  # OpenAI's
STEMS = dict(unet="diffusion_pytorch_model", vae="diffusion_pytorch_model", text_encoder="model", image_encoder="model")
PREFIXES = dict(unet="model.diffusion_model.", vae="first_stage_model.", text_encoder="cond_stage_model.transformer.")


def our_name(key, config):
    """Our (diffusers') name of a tensor of a published file: folder, single-file checkpoint or older VAE file."""
    if not isinstance(config, dict):  # CLIP: published text encoders carry a prefix that transformers 5 does not
        return key.removeprefix("text_model.")
    layers, levels = config["layers_per_block"] + 1, len(config["block_out_channels"])

    def block(match):  # the original UNet counts its blocks through all levels, input_blocks from 1
        side, i = ("down", int(match[2]) - 1) if match[1] == "in" else ("up", int(match[2]))
        return f"{side}_blocks.{i // layers}.{['resnets', 'attentions', 'upsamplers'][int(match[3])]}.{i % layers}"

    for pattern, new in (
        (r"^time_embed\.0", "time_embedding.linear_1"), (r"^time_embed\.2", "time_embedding.linear_2"),
        (r"^input_blocks\.0\.0", "conv_in"), (r"^out\.0", "conv_norm_out"), (r"^out\.2", "conv_out"),
        (r"^(in|out)put_blocks\.(\d+)\.([012])", block), (r"resnets\.\d+\.op", "downsamplers.0.conv"),
        (r"(attentions|upsamplers)\.\d+\.conv", "upsamplers.0.conv"), (r"^middle_block\.0", "mid_block.resnets.0"),
        (r"^middle_block\.1", "mid_block.attentions.0"), (r"^middle_block\.2", "mid_block.resnets.1"),
        (r"\.in_layers\.0", ".norm1"), (r"\.in_layers\.2", ".conv1"), (r"\.emb_layers\.1", ".time_emb_proj"),
        (r"\.out_layers\.0", ".norm2"), (r"\.out_layers\.3", ".conv2"), (r"\.skip_connection", ".conv_shortcut"),
        # the VAE: its decoder counts levels from the top
        (r"^encoder\.down\.", "encoder.down_blocks."), (r"\.block\.(\d)", r".resnets.\1"),
        (r"^decoder\.up\.(\d)", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}"),
        (r"\.(down|up)sample\.conv", r".\1samplers.0.conv"), (r"\.nin_shortcut", ".conv_shortcut"),
        (r"\.mid\.block_1", ".mid_block.resnets.0"), (r"\.mid\.block_2", ".mid_block.resnets.1"),
        (r"coder\.norm_out", "coder.conv_norm_out"),
        (r"\.mid\.attn_1\.norm", ".mid_block.attentions.0.group_norm"), (r"\.mid\.attn_1", ".mid_block.attentions.0"),
        (r"\.0\.(q|k|v)(uery|ey|alue)?\.", r".0.to_\1."), (r"(coder.*attentions\.0)\.proj_(attn|out)", r"\1.to_out.0"),
    ):
        key = re.sub(pattern, new, key)
    return key


def read_json(path):
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a checkpoint has unet, vae, text_encoder, tokenizer and scheduler")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def read_tensors(path, prefix):
    """Yield (name, tensor) of the names under `prefix`, memory-mapped: nothing is read before it is used.
    ValueError if it is neither `.safetensors` nor a pickle of plain tensors (`weights_only`)."""
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            names, get = file.keys(), file.get_tensor
            if sys.platform == "linux" and path.stat().st_size > 1e9:  # a mapping each: else one kept tensor keeps the file
                get = lambda name: safe_open(path, framework="pt").get_tensor(name)  # noqa: E731
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            tensors = tensors.get("state_dict", tensors)
            names, get = tensors.keys(), tensors.get
        yield from ((name.removeprefix(prefix), get(name)) for name in names if name.startswith(prefix))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{path} is not a readable weight file: {reason}") from error


def build(kind, config, where, prefix="", device="cpu", dtype=torch.float32):
    """A `kind` of network whose parameters *are* the tensors of a file: built on meta, so there is no second copy.
    where: the file, or its folder. ValueError names the first tensor that is missing, misshapen or unexpected."""
    path = where if where.is_file() else weight_file(where, dtype)
    with torch.device("meta"):
        model = kind(**config) if kind in (UNet, AutoencoderKL) else kind(kind.config_class.from_dict(config))
    expected = {name: list(p.shape) for name, p in model.state_dict().items()}
    own, found, wrong = {our_name(name, model.config): name for name in expected}, {}, []
    for name, tensor in read_tensors(path, prefix):
        mine = own.get(our_name(name, model.config))
        if mine and len(expected[mine]) == 2 and tensor.shape[2:] == (1, 1):
            tensor = tensor.flatten(1)  # a 1×1 convolution that newer files hold as a matrix
        if mine and list(tensor.shape) == expected[mine]:
            found[mine] = tensor.to(device, dtype)
        elif mine:
            wrong.append(f"tensor {name} has shape {list(tensor.shape)}, but the config asks for {expected[mine]}")
        elif not name.endswith("position_ids"):  # a constant that older transformers wrote
            wrong.append(f"tensor {name} is unexpected: the config has no place for it")
    if wrong := wrong or [f"tensor {name} is missing" for name in expected if name not in found]:
        raise ValueError(f"{path}: {wrong[0]} ({len(wrong)} such in all): not the weights of this config, or not all")
    model.load_state_dict(found, assign=True)
    for module in model.modules():
        if hasattr(module, "position_ids"):  # CLIP's one buffer, which files do not hold
            module.position_ids = torch.arange(module.position_ids.shape[-1], device=device)[None]
    return model.eval()


def weight_patterns(dtype):
    """File names to look for, best first: safetensors before pickles, the fp16 variant first for half precision."""
    variants = ["", ".fp16"] if dtype in (torch.float32, torch.float64) else [".fp16", ""]
    return [f"*model{variant}.{ext}" for ext in ("safetensors", "bin") for variant in variants]


def weight_file(folder, dtype):
    for pattern in weight_patterns(dtype):
        for path in folder.glob(pattern):
            return path
    stem = folder / STEMS.get(folder.name, "model")
    raise FileNotFoundError(f"{stem}.safetensors is missing, and so are its .fp16 and .bin forms")


def locate(path, parts, dtype):
    """`path` if it exists, else the snapshot of that hub id with the weights of `parts` (HF_HUB_OFFLINE works)."""
    if Path(path).exists():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise FileNotFoundError(f"{path}: no such file or folder")
    for pattern in weight_patterns(dtype):
        wanted = ["*.json", "*.txt"] + [f"{part}/{pattern}" for part in [*parts, *["image_encoder"] * bool(parts)]]
        try:
            folder = Path(snapshot_download(str(path), allow_patterns=wanted))
        except Exception as error:  # of many kinds; offline, one says where a snapshot is that lacks a wanted file
            if not (folder := getattr(error, "snapshot_path", None)):
                reason = (str(error) or repr(error)).splitlines()[0]
                raise FileNotFoundError(f"{path}: no such folder, and the hub did not give such a model: {reason}") from error
            folder = Path(folder)
        if all(any(folder.glob(f"{part}/{pattern}")) for part in parts):
            break
    return folder


def find_image_encoder(path, given, dtype):
    """The folder of Γ_i: `given` (folder or hub id) or inside it; if None, in or beside the checkpoint, else None."""
    places, names = [path, path.parent, path.parent / "IP-Adapter"], ["image_encoder", "models/image_encoder"]
    if given:
        places, names = [locate(given, ["models/image_encoder"], dtype)], [*names, "."]
    folders = [place / name for place in places for name in names if (place / name / "config.json").is_file()]
    if given and not folders:
        raise FileNotFoundError(f"{given} holds no image encoder: image_encoder/config.json is missing")
    return folders[0] if folders else None


def make_schedule(config):
    """The Schedule of a published scheduler_config.json; ValueError for a kind that Stable Diffusion 1.x is not."""
    for key, implemented in dict(prediction_type=["epsilon", None], trained_betas=[None],
                                 beta_schedule=["linear", "scaled_linear"]).items():
        if config.get(key) not in implemented:
            raise ValueError(f"scheduler: {key} = {config.get(key)!r} is not implemented")
    power = 2 if config["beta_schedule"] == "scaled_linear" else 1
    ends = config["beta_start"] ** (1 / power), config["beta_end"] ** (1 / power)
    return Schedule(torch.linspace(*ends, config["num_train_timesteps"], dtype=torch.float64) ** power)


def write_whole(path, write):
    """write(temporary path), then rename: the file is there whole or not at all. OSError if it cannot be written."""
    part = Path(f"{path}.{os.getpid()}.part")
    try:
        write(part)
        os.replace(part, path)
    except (RuntimeError, SafetensorError) as error:  # how torch and safetensors say that the disk is full
        raise OSError(f"{path} cannot be written: {str(error).splitlines()[0]}") from error
    finally:
        part.unlink(missing_ok=True)


def like(x, module):
    weight = next(module.parameters())
    return x.to(weight.device, weight.dtype)


def clip_view(photo, size):
    """What CLIP sees of a PIL image: shortest edge to `size`, bicubic, and the centre of that. size × size, RGB."""
    sides = [size * side // min(photo.size) for side in photo.size]
    left, top = ((side - size) // 2 for side in sides)
    return photo.convert("RGB").resize(sides, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))


class StableDiffusion:
    """A checkpoint: unet, vae, text_encoder (Γ_τ), tokenizer, image_encoder (Γ_i, may be None), schedule.
    `scheduler` and `preprocessor` are the contents of the published JSON files."""

    def __init__(self, unet, vae, text_encoder, tokenizer, image_encoder=None, scheduler=SD15["scheduler"],
                 preprocessor=CLIP):
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.image_encoder, self.preprocessor = image_encoder, preprocessor
        self.scheduler, self.schedule = scheduler, make_schedule(scheduler)

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32, image_encoder=None, config=None):
        """Read a checkpoint: a folder in diffusers' layout, a hub id, or a single .safetensors or .ckpt file.

        image_encoder: folder or hub id (h94/IP-Adapter) of Γ_i; default: the one in or beside the checkpoint, if any.
        config: for a single file, folder or hub id of its tokenizer and, if it is not SD 1.5, of its config.json files;
        default: its own folder if `tokenizer` is there, else CLIP's tokenizer from the hub.
        FileNotFoundError names a missing part, ValueError a tensor or setting that does not fit.
        """
        from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection  # here: it takes seconds

        path = locate(path, PREFIXES, dtype)
        single = path.is_file()
        root = path
        if single:  # it holds no tokenizer
            beside = path.parent if (path.parent / "tokenizer").is_dir() else "openai/clip-vit-large-patch14"
            root = locate(config or beside, [], dtype)

        def settings(name, file="config.json"):
            return SD15[name] if single and not (root / name / file).is_file() else read_json(root / name / file)

        def network(name, kind):
            where, prefix = (path, PREFIXES[name]) if single else (path / name, "")
            return build(kind, settings(name), where, prefix, device, dtype)

        networks = network("unet", UNet), network("vae", AutoencoderKL), network("text_encoder", CLIPTextModel)
        words = root if single and not (root / "tokenizer").is_dir() else root / "tokenizer"
        if not any((words / name).is_file() for name in ("tokenizer.json", "vocab.json")):  # an empty one is made up
            raise FileNotFoundError(f"{words} holds no tokenizer: vocab.json and merges.txt are missing")
        vision, preprocessor = None, CLIP
        if folder := find_image_encoder(path, image_encoder, dtype):
            vision = build(CLIPVisionModelWithProjection, read_json(folder / "config.json"), folder, "", device, dtype)
            for file in (folder / "preprocessor_config.json", root / "feature_extractor/preprocessor_config.json"):
                preprocessor = read_json(file) if file.is_file() else preprocessor
        scheduler = settings("scheduler", "scheduler_config.json")
        return cls(*networks, CLIPTokenizer.from_pretrained(words), vision, scheduler, preprocessor)

    def save(self, folder, dtype=torch.float16):
        """Write `folder` in the published layout, which diffusers opens; whatever else is in it stays.
        Everything is written under a temporary name first; then each part takes the old one's place."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            new, old = Path(temporary, "new"), Path(temporary, "old")
            old.mkdir()
            self.write(new, dtype)
            for part in new.iterdir():
                if (folder / part.name).exists():
                    (folder / part.name).rename(old / part.name)
                part.rename(folder / part.name)

    def write(self, folder, dtype):
        index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", self.scheduler["_class_name"]],
                 "tokenizer": ["transformers", "CLIPTokenizer"], "feature_extractor": [None, None],
                 "image_encoder": [None, None], "safety_checker": [None, None], "requires_safety_checker": False}
        for name, stem in STEMS.items():
            if (net := getattr(self, name)) is None:
                continue
            ours, prefix = isinstance(net.config, dict), "text_model." if name == "text_encoder" else ""
            index[name] = ["diffusers", net.config["_class_name"]] if ours else ["transformers", type(net).__name__]
            write_json(folder / name / "config.json", net.config if ours else net.config.to_diff_dict())
            tensors = {prefix + key.removeprefix(prefix): x.to("cpu", dtype).contiguous()
                       for key, x in net.state_dict().items()}
            write_whole(folder / name / f"{stem}.safetensors", lambda part: save_file(tensors, part, {"format": "pt"}))
        self.tokenizer.save_pretrained(folder / "tokenizer")
        if backend := getattr(self.tokenizer, "backend_tokenizer", None):
            backend.model.save(str(folder / "tokenizer"))  # vocab.json and merges.txt, which transformers 5 leaves out
        write_json(folder / "scheduler/scheduler_config.json", self.scheduler)
        if self.image_encoder is not None:
            index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
            size = self.image_encoder.config.image_size
            write_json(folder / "feature_extractor/preprocessor_config.json", {
                **self.preprocessor, "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size},
                "crop_size": {"height": size, "width": size}})
        write_json(folder / "model_index.json", index)

    @property
    def image_size(self):
        """Side of the pictures in pixels: the UNet's latents times the VAE's reduction."""
        return self.unet.config["sample_size"] * 2 ** (len(self.vae.config["block_out_channels"]) - 1)

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """c_τ = Γ_τ(τ): last hidden states after the final LayerNorm, padded to the window (77 tokens), no mask.
        prompts: list of B strings; one that is too long is cut, with a warning. Returns (B, L, D)."""
        window = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        for prompt, ids in zip(prompts, self.tokenizer(prompts, verbose=False).input_ids):
            if len(ids) > window:
                text = f"prompt of {len(ids)} tokens cut to the text encoder's {window}: {prompt!r}"
                warnings.warn(text, stacklevel=3)
        fit = dict(padding="max_length", max_length=window, truncation=True, return_tensors="pt")
        ids = self.tokenizer(prompts, **fit).input_ids.to(self.text_encoder.device)  # (B, L)
        return self.text_encoder(ids).last_hidden_state

    @torch.no_grad()
    def encode_latents(self, images, generator=None):
        """z_0 = s·(μ + σ·ε), N(μ, σ²) = VAE(x), s = `scaling_factor`, 0.18215 in Stable Diffusion.
        images (B, 3, H, W) in [−1, 1] -> (B, C, h, w). ε ~ N(0, I) comes from `generator`; None: ε = 0, the mode."""
        posterior = self.vae.encode(like(images, self.vae))
        return self.vae.config["scaling_factor"] * (posterior.sample(generator) if generator else posterior.mean)

    @torch.no_grad()
    def decode_latents(self, z):
        """x = VAE⁻¹(z/s), clamped.   z (B, C, h, w) -> images (B, 3, H, W) in [−1, 1]."""
        return self.vae.decode(like(z, self.vae) / self.vae.config["scaling_factor"]).clamp(-1, 1)

    @torch.no_grad()
    def embed_images(self, images):
        """Γ_i(x): the CLIP embeddings of photos, (B, 3, H, W) in [−1, 1] or a list of B PIL images -> (B, E).
        ValueError if there is no image encoder."""
        return self.image_encoder(like(self.clip_pixels(images), self.image_encoder)).image_embeds

    def clip_pixels(self, images):
        """CLIP's preprocessing: shortest edge to the encoder's size S (bicubic), centre crop, normalise: (B, 3, S, S).
        images, errors: as embed_images. PIL images come out exactly as from the published CLIPImageProcessor."""
        if self.image_encoder is None:
            raise ValueError("the checkpoint has no image encoder: name the folder or hub id of one (h94/IP-Adapter)")
        from torchvision.transforms.functional import InterpolationMode, resize, to_tensor  # here: it takes a second

        size = self.image_encoder.config.image_size
        if isinstance(images, torch.Tensor):
            x = resize(images.float(), size, InterpolationMode.BICUBIC, antialias=True).clamp(-1, 1) / 2 + 0.5
            views = [x[..., (x.shape[2] - size) // 2 :, (x.shape[3] - size) // 2 :][..., :size, :size]]
        else:
            views = [to_tensor(clip_view(photo, size))[None] for photo in images]
        mean, std = (views[0].new_tensor(self.preprocessor[key])[:, None, None] for key in ("image_mean", "image_std"))
        return (torch.cat(views) - mean) / std
