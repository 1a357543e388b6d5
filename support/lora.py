"""LoRA: which layers it changes, and its files in diffusers' layout."""

import json
import math
import re

import torch

from support.devices import frozen_dtype, move
from support.files import save_tensors
from support.text import first_line, one_line
from support.weights import check_dtypes, check_tensor, read_safetensors

HEADER = "lora_adapter_metadata"  # where newer diffusers keep peft's settings


def read_lora(path):
    """A LoRA file -> {name: tensor}, the settings of its UNet ({} if it says nothing of them).

    ValueError: unreadable, no numbers, or settings that are not implemented.
    """
    try:
        tensors, metadata = read_safetensors(path)
    except ValueError as error:
        raise ValueError(f"not a readable LoRA: {error}") from error
    for name, tensor in tensors.items():
        check_tensor(path, name, tensor)
    check_dtypes(path, [tensor.dtype for tensor in tensors.values()])
    try:
        settings = read_header(metadata.get(HEADER, "{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {HEADER} in its header: {first_line(error)}") from error
    return tensors, settings


def read_header(text):
    """The entries "unet.…" of the header's JSON, without that prefix. ValueError: see read_lora."""
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("no table of settings")
    settings = {}
    for name, value in content.items():
        if name.startswith("unet."):
            settings[name.removeprefix("unet.")] = value
    for name in ("use_dora", "lora_bias"):
        if settings.get(name):
            raise ValueError(f"{name} is not implemented")
    alphas = settings.get("alpha_pattern") or {}
    if not isinstance(alphas, dict):
        raise ValueError(f"alpha_pattern = {one_line(repr(alphas), 60)} is no table")
    if settings:
        check_alpha("lora_alpha", settings.get("lora_alpha"))
    for layer, alpha in alphas.items():
        if not re.fullmatch(r"[\w.]+", layer):
            raise ValueError(f"alpha_pattern {one_line(layer, 60)!r}: only names of layers are read")
        check_alpha(f"alpha_pattern of {layer}", alpha)
    return {**settings, "alpha_pattern": alphas} if settings else {}


def check_alpha(name, alpha):
    is_number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not is_number or not 0 < alpha <= 1e6:
        raise ValueError(f"{name} = {one_line(repr(alpha), 60)}: it must be a number above 0")


def find_scale(settings, layer, rank):
    """α/r of LoRA for a layer; α/√r if it was trained with rsLoRA (Kalajdzievski 2023).

    settings: of read_lora; without any, as in our files, the scale is in the tensors already: 1.
    """
    if not settings:
        return 1
    alpha = settings["lora_alpha"]
    for name, own in settings["alpha_pattern"].items():
        if layer == name or layer.endswith(f".{name}"):
            alpha = own
            break
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def attention_projections(unet):
    """The layers that LoRA changes, by name: W_q, W_k, W_v and W_out of every attention."""
    is_projection = re.compile(r"attn[12]\.(to_[qkv]|to_out\.0)$").search
    return {name: layer for name, layer in unet.named_modules() if is_projection(name)}


def move_to_learn(sd, device, precision, method):
    """Bring a model to the device. For LoRA, what stays frozen is in half precision (frozen_dtype).

    Not so the layers that LoRA changes: W + ΔW would round back to W while ΔW is small.
    """
    dtype = None
    kept = []
    if method.lora is not None:
        dtype = frozen_dtype(sd.unet, precision)
        kept = attention_projections(sd.unet).values()
    move(sd.unet, device, dtype, kept)
    move(sd.vae, device, dtype)
    move(sd.text_encoder, device, dtype)


def save_lora(unet, path):
    """Write the LowRanks of `unet`, whole or not at all, as diffusers' `load_lora_weights` reads them."""
    tensors = {}
    for name, layer in attention_projections(unet).items():
        update = layer.parametrizations.weight[0]
        tensors[f"unet.{name}.lora_A.weight"] = update.A
        tensors[f"unet.{name}.lora_B.weight"] = update.scale * update.B.detach()
    save_tensors(path, tensors, {"format": "pt"})


def load_lora(path, sd):
    """W ← W + (α/r)·B·A in `sd.unet` for every pair of a LoRA file in diffusers' layout.

    Our files have α/r in B; newer diffusers says α in the header (support/lora.py). ValueError,
    before anything is changed: unreadable, or a tensor that has no place in this UNet or no partner.
    """
    tensors, settings = read_lora(path)
    if not tensors:
        raise ValueError(f"{path} is not a LoRA of this UNet's attention: it holds no tensors")
    updates = []
    used = set()
    for name, layer in attention_projections(sd.unet).items():
        name_A = f"unet.{name}.lora_A.weight"
        name_B = f"unet.{name}.lora_B.weight"
        A, B = tensors.get(name_A), tensors.get(name_B)
        if A is None or B is None:
            continue
        n, m = layer.weight.shape
        if A.ndim == B.ndim == 2 and A.shape == (len(A), m) and B.shape == (n, len(A)):
            dtype = torch.promote_types(A.dtype, B.dtype)
            scale = find_scale(settings, name, rank=len(A))
            update = (scale * B.to(dtype)) @ A.to(dtype)
            check_tensor(path, f"B·A of {name}", update)
            updates.append((layer, update))
            used.update([name_A, name_B])
    wrong = sorted(tensors.keys() - used)
    if wrong:
        problem = f"tensor {wrong[0]} has no place in it, no partner or another shape"
        raise ValueError(f"{path} is not a LoRA of this UNet's attention: {problem}")
    for layer, update in updates:
        layer.weight.data += update.to(layer.weight)
