"""Settings of published checkpoints: config.json and its like, checked before anything is built.

Here stands what is implemented, what may be left out, and from where to where a number may go.
"""

from contextlib import contextmanager

import torch

from support.crops import find_crop
from support.files import read_json
from support.text import first_line, one_line

# ---------------------------------------------------------------- what is implemented
# DEFAULTS are Stable Diffusion 1.5's. ONLY are settings of its relatives, with the one value that
# is implemented here; settings in neither list must be None or False.

UNET_DEFAULTS = dict(
    sample_size=64,
    in_channels=4,
    out_channels=4,
    block_out_channels=[320, 640, 1280, 1280],
    layers_per_block=2,
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    norm_num_groups=32,
    norm_eps=1e-5,
    cross_attention_dim=768,
    attention_head_dim=8,
    use_linear_projection=False,
    upcast_attention=False,  # without effect here, like the next one
    addition_embed_type_num_heads=64,
)
UNET_ONLY = dict(
    act_fn="silu",
    flip_sin_to_cos=True,
    downsample_padding=1,
    mid_block_type="UNetMidBlock2DCrossAttn",
    mid_block_scale_factor=1,
    transformer_layers_per_block=1,
    resnet_out_scale_factor=1,
    conv_in_kernel=3,
    conv_out_kernel=3,
    resnet_time_scale_shift="default",
    attention_type="default",
    time_embedding_type="positional",
)
VAE_DEFAULTS = dict(
    sample_size=512,
    in_channels=3,
    out_channels=3,
    block_out_channels=[128, 256, 512, 512],
    layers_per_block=2,
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    latent_channels=4,
    norm_num_groups=32,
    scaling_factor=0.18215,
    mid_block_add_attention=True,
    force_upcast=True,
)
VAE_ONLY = dict(act_fn="silu", use_quant_conv=True, use_post_quant_conv=True)
SETTINGS = {  # by the class name in config.json: defaults, ONLY, the blocks that are implemented
    "UNet2DConditionModel": (
        UNET_DEFAULTS,
        UNET_ONLY,
        ["DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"],
    ),
    "AutoencoderKL": (VAE_DEFAULTS, VAE_ONLY, ["DownEncoderBlock2D", "UpDecoderBlock2D"]),
}
SCHEDULER = dict(
    _class_name="DDIMScheduler",
    num_train_timesteps=1000,
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    steps_offset=1,
    set_alpha_to_one=False,
    clip_sample=False,
)
SINGLE_FILE = dict(  # the config.json files that a single file comes without
    unet={},  # the defaults above
    vae={},
    text_encoder=dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    ),
    scheduler=SCHEDULER,
)
CLIP_COLOURS = dict(  # OpenAI's mean and standard deviation of red, green and blue
    image_mean=[0.48145466, 0.4578275, 0.40821073],
    image_std=[0.26862954, 0.26130258, 0.27577711],
)

# ---------------------------------------------------------------- from where to where

WIDTH = (1, 16384)
RANGES = {  # of the whole numbers in config.json files
    "sample_size": (1, 2048),
    "in_channels": (1, 64),
    "out_channels": (1, 64),
    "latent_channels": (1, 64),
    "layers_per_block": (1, 16),
    "norm_num_groups": (1, 1024),
    "cross_attention_dim": WIDTH,
    "hidden_size": WIDTH,
    "intermediate_size": (1, 65536),
    "projection_dim": WIDTH,
    "num_hidden_layers": (1, 100),
    "num_attention_heads": (1, 1024),
    "max_position_embeddings": (3, 4096),
    "vocab_size": (3, 10**6),
    "image_size": (1, 2048),
    "patch_size": (1, 2048),
    "num_channels": (3, 3),
    "bos_token_id": (0, 10**6),
    "eos_token_id": (0, 10**6),
    "pad_token_id": (0, 10**6),
    "num_train_timesteps": (1, 10**5),
}
FRACTIONS = {  # of the other numbers
    "norm_eps": (0, 0.1),
    "layer_norm_eps": (0, 0.1),
    "scaling_factor": (1e-4, 1e4),
    "beta_start": (1e-9, 0.999),
    "beta_end": (1e-9, 0.999),
    "image_mean": (0, 1),
    "image_std": (1e-3, 10),
}
FLAGS = ("use_linear_projection", "mid_block_add_attention")
NEEDED = {  # settings that no shape of a tensor shows: a file must name them
    "unet": ("sample_size", "attention_head_dim", "norm_num_groups"),
    "vae": ("scaling_factor", "norm_num_groups"),
    "text_encoder": ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act"),
    "image_encoder": ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
                      "image_size", "patch_size"),
    "scheduler": ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps"),
    "preprocessor": ("image_mean", "image_std"),
}  # fmt: skip


@contextmanager
def naming(path):
    """Whatever is wrong with what is built inside becomes a ValueError that begins with the file."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # transformers' are of many kinds
        raise ValueError(f"{path}: {first_line(error)}") from error


def check_number(key, value):
    """ValueError unless `value` is a number in the range of the setting `key`."""
    is_whole = key in RANGES
    kinds = int if is_whole else (int, float)
    least, most = RANGES[key] if is_whole else FRACTIONS[key]
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    if not is_number or not least <= value <= most:  # NaN is in no range
        words = "a whole number" if is_whole else "a number"
        found = one_line(repr(value), 60)
        raise ValueError(f"{key} = {found}: it must be {words} from {least} to {most}")


def check_numbers(config):
    """`check_number` of all settings in `config` that have a range."""
    for key, value in config.items():
        if key in RANGES or key in FRACTIONS:
            check_number(key, value)


def check_needed(config, part):
    """ValueError if `config`, the content of a file, is no table of settings or lacks one of NEEDED.

    Stable Diffusion's own UNet and VAE may leave out what the defaults say; so do their first files.
    """
    if not isinstance(config, dict):
        raise ValueError(f"it holds a {type(config).__name__}, no settings")
    sizes = dict(unet=UNET_DEFAULTS, vae=VAE_DEFAULTS).get(part, {}).get("block_out_channels")
    if sizes is not None and config.get("block_out_channels", sizes) == sizes:
        return
    for key in NEEDED[part]:
        if key not in config:
            raise ValueError(f"{key} is missing")


# ---------------------------------------------------------------- the UNet and the VAE


def complete_config(config, name):
    """`config` of the class `name` with the defaults filled in, lists for tuples.

    ValueError names a setting that is no setting, or one of Stable Diffusion's relatives that is
    not implemented here.
    """
    defaults, only, blocks = SETTINGS[name]
    config = {**defaults, **config}
    for key, value in config.items():
        if isinstance(value, tuple):
            config[key] = list(value)
        if key in defaults or key.startswith("_"):
            continue
        implemented = [only[key]] if key in only else [None, False]
        if value not in implemented:
            raise ValueError(f"{name}: {key} = {one_line(repr(value), 60)} is not implemented")
    try:
        check_numbers(config)
        check_flags(config)
        check_levels(config, blocks)
        check_heads(config)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return {**config, "_class_name": name}


def check_flags(config):
    for key in FLAGS:
        if not isinstance(config.get(key, False), bool):
            raise ValueError(f"{key} = {one_line(repr(config[key]), 60)}: it must be true or false")


def check_levels(config, blocks):
    """ValueError unless the levels of a network have widths and blocks that fit together."""
    keys = ("block_out_channels", "down_block_types", "up_block_types")
    levels = [config[key] for key in keys]
    for key, level in zip(keys, levels):
        if not isinstance(level, list) or not 1 <= len(level) <= 8:
            found = one_line(repr(level), 60)
            raise ValueError(f"{key} = {found}: it must be a list of 1 to 8 levels")
    if not len(levels[0]) == len(levels[1]) == len(levels[2]):
        raise ValueError(f"{', '.join(keys)} differ in length: {levels}")
    for kind in levels[1] + levels[2]:
        if kind not in blocks:
            known = ", ".join(blocks)
            raise ValueError(f"block {one_line(kind, 60)} is not implemented, only {known}")
    groups = config["norm_num_groups"]
    for width in levels[0]:
        least, most = WIDTH
        if type(width) is not int or not least <= width <= most:
            found = one_line(repr(levels[0]), 60)
            raise ValueError(f"{keys[0]} = {found}: it must be whole numbers from {least} to {most}")
        if width % groups:
            raise ValueError(f"norm_num_groups = {groups} does not divide {keys[0]} = {levels[0]}")


def check_heads(config):
    """ValueError unless every level's transformers have a number of heads that divides its width."""
    if "attention_head_dim" not in config:  # the VAE's
        return
    widths = config["block_out_channels"]
    heads = config["attention_head_dim"]
    listed = heads if isinstance(heads, list) else [heads] * len(widths)
    problem = f"attention_head_dim = {one_line(repr(heads), 60)}"
    if len(listed) != len(widths):
        raise ValueError(f"{problem}: it must be one number, or one for each of {len(widths)} levels")
    for level, (width, count) in enumerate(zip(widths, listed)):
        if type(count) is not int or count < 1:
            raise ValueError(f"{problem}: it must be a whole number, 1 or more")
        kinds = config["down_block_types"][level] + config["up_block_types"][-1 - level]
        has_attention = "CrossAttn" in kinds or level == len(widths) - 1
        if has_attention and width % count:
            raise ValueError(f"{problem} does not divide block_out_channels = {widths}")


def check_fit(unet, vae, text_encoder):
    """ValueError unless the parts of a checkpoint belong together; their config.json's contents."""
    unet = {**UNET_DEFAULTS, **unet}
    latents = {**VAE_DEFAULTS, **vae}["latent_channels"]
    channels = (unet["in_channels"], unet["out_channels"])
    if channels != (latents, latents):
        only = "only text-to-image models are supported, no inpainting, no instruct-pix2pix"
        found = f"{channels[0]} channels and answers {channels[1]}, the VAE's latents have {latents}"
        raise ValueError(f"the UNet reads {found}: {only}")
    width = text_encoder["hidden_size"]
    if unet["cross_attention_dim"] != width:
        wanted = unet["cross_attention_dim"]
        raise ValueError(f"the UNet reads text of width {wanted}, the text encoder's is {width}")


# ---------------------------------------------------------------- CLIP

CLIP_SETTINGS = (  # what transformers is told of a config.json
    "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
    "hidden_act", "layer_norm_eps", "max_position_embeddings", "vocab_size", "image_size",
    "patch_size", "num_channels", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
ACTIVATIONS = ("quick_gelu", "gelu")


def clip_config(config):
    """What transformers is to know of an encoder's config.json. ValueError names what is wrong in it."""
    config = {key: config[key] for key in CLIP_SETTINGS if key in config}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if config.get(key, 0) is None:
            del config[key]
    check_numbers(config)
    activation = config.get("hidden_act", ACTIVATIONS[0])
    if activation not in ACTIVATIONS:
        known = " or ".join(ACTIVATIONS)
        raise ValueError(f"hidden_act = {one_line(repr(activation), 60)}: it must be {known}")
    width = config.get("hidden_size", 0)  # a whole CLIP may leave out what transformers assumes
    heads = config.get("num_attention_heads", 1)
    if width % heads:
        raise ValueError(f"num_attention_heads = {heads} does not divide hidden_size = {width}")
    if config.get("image_size", 0) % config.get("patch_size", 1):
        size = config["image_size"]
        raise ValueError(f"patch_size = {config['patch_size']} does not divide image_size = {size}")
    return config


def check_preprocessor(config):
    """ValueError unless the colours' mean and deviation are three usable numbers each, a crop one."""
    for key in ("image_mean", "image_std"):
        values = config[key]
        if not isinstance(values, list) or len(values) != 3:
            found = one_line(repr(values), 60)
            raise ValueError(f"{key} = {found}: it must be a list of three numbers")
        for value in values:
            check_number(key, value)
    find_crop(config)


# ---------------------------------------------------------------- the scheduler


def make_betas(config):
    """The table β of a published scheduler_config.json: (T,) float64.

    ValueError for a kind that Stable Diffusion 1.x is not.
    """
    implemented = dict(
        prediction_type=["epsilon", None],
        trained_betas=[None],
        beta_schedule=["linear", "scaled_linear"],
        rescale_betas_zero_snr=[None, False],
        thresholding=[None, False],
        clip_sample=[None, False],
    )
    for key, values in implemented.items():
        if config.get(key) not in values:
            found = one_line(repr(config.get(key)), 60)
            raise ValueError(f"scheduler: {key} = {found} is not implemented")
    check_needed(config, "scheduler")
    check_numbers(config)
    power = 2 if config["beta_schedule"] == "scaled_linear" else 1
    start = config["beta_start"] ** (1 / power)
    end = config["beta_end"] ** (1 / power)
    steps = config["num_train_timesteps"]
    if not start <= end:
        raise ValueError(f"scheduler: beta_start is greater than beta_end = {config['beta_end']}")
    return torch.linspace(start, end, steps, dtype=torch.float64) ** power


# ---------------------------------------------------------------- the files

CHECKS = dict(
    unet=lambda config: complete_config(config, "UNet2DConditionModel"),
    vae=lambda config: complete_config(config, "AutoencoderKL"),
    text_encoder=clip_config,
    image_encoder=clip_config,
    scheduler=make_betas,
    preprocessor=check_preprocessor,
)


def read_settings(path, part):
    """The content of a JSON file with the settings of `part`, a name in CHECKS.

    ValueError names the file, and the setting that is missing, out of range or not implemented.
    """
    config = read_json(path)
    with naming(path):
        check_needed(config, part)
        CHECKS[part](config)
    return config
