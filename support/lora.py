"""LoRA files in diffusers' layout: their tensors, and by what their products are to be scaled."""

import json
import math
import re

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
