"""Checkpoints as they are published: diffusers' folders, hub ids, single files, adapter files.

A folder holds unet, vae, text_encoder, tokenizer, scheduler and sometimes image_encoder, each with
a config.json and a weight file. A single file holds all weights under older names (tensor_names.py)
and no settings; those are Stable Diffusion 1.5's.
"""

import pickle
import re
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from support.files import read_json, save_tensors, write_json
from support.tensor_names import our_name

TINY = Path(__file__).parent.parent / "weights" / "tiny"  # the model that ships with this code
ADAPTER = "ip_adapter/ip-adapter_tiny.safetensors"  # in its folder

# ---------------------------------------------------------------- settings
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


def complete_config(config, name):
    """`config` of the class `name` with the defaults filled in, lists for tuples.

    ValueError names a setting of Stable Diffusion's relatives that is not implemented here.
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
            raise ValueError(f"{name}: {key} = {value!r} is not implemented")
    keys = ("block_out_channels", "down_block_types", "up_block_types")
    levels = [config[key] for key in keys]
    if not len(levels[0]) == len(levels[1]) == len(levels[2]):
        raise ValueError(f"{name}: {', '.join(keys)} differ in length: {levels}")
    for kind in levels[1] + levels[2]:
        if kind not in blocks:
            known = ", ".join(blocks)
            raise ValueError(f"{name}: block {kind} is not implemented, only {known}")
    return {**config, "_class_name": name}


# ---------------------------------------------------------------- files

STEMS = dict(  # file names of the weights, without variant and suffix
    unet="diffusion_pytorch_model",
    vae="diffusion_pytorch_model",
    text_encoder="model",
    image_encoder="model",
)
PREFIXES = dict(  # of the names in a single file
    unet="model.diffusion_model.",
    vae="first_stage_model.",
    text_encoder="cond_stage_model.transformer.",
)


def weight_patterns(dtype):
    """File names to look for, best first: safetensors before pickles, fp16 first for half precision."""
    variants = ["", ".fp16"]
    if dtype not in (torch.float32, torch.float64):
        variants = [".fp16", ""]
    safe = [f"*model{variant}.safetensors" for variant in variants]
    pickled = [f"*model{variant}.bin" for variant in variants]
    return safe + pickled


def weight_file(folder, dtype):
    """The weight file in a folder of a checkpoint. FileNotFoundError names the one to be there."""
    for pattern in weight_patterns(dtype):
        for path in folder.glob(pattern):
            return path
    stem = folder / STEMS.get(folder.name, "model")
    raise FileNotFoundError(f"{stem}.safetensors is missing, and so are its .fp16 and .bin forms")


def locate(path, parts, dtype):
    """`path` if it exists; else the snapshot of that hub id with the weights of `parts`.

    HF_HUB_OFFLINE=1 works. FileNotFoundError if there is neither.
    """
    if Path(path).exists():
        return Path(path)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise FileNotFoundError(f"{path}: no such file or folder")
    folders = [*parts, "image_encoder"] if parts else []
    for pattern in weight_patterns(dtype):
        wanted = ["*.json", "*.txt"] + [f"{part}/{pattern}" for part in folders]
        found = download(path, wanted)
        if all(any(found.glob(f"{part}/{pattern}")) for part in parts):
            break
    return found


def download(hub_id, wanted):
    """The snapshot folder of a hub id with the files that match `wanted`."""
    try:
        return Path(snapshot_download(str(hub_id), allow_patterns=wanted))
    except Exception as error:  # of many kinds
        incomplete = getattr(error, "snapshot_path", None)
        if incomplete:  # offline, and the snapshot in the cache lacks a wanted file
            return Path(incomplete)
        reason = (str(error) or repr(error)).splitlines()[0]
        problem = f"{hub_id}: no such folder, and the hub did not give such a model: {reason}"
        raise FileNotFoundError(problem) from error


def find_image_encoder(checkpoint, given, dtype):
    """The folder of the image encoder, or None.

    given: the folder or hub id of --image-encoder, or a folder that holds it; None: it is looked
    for in and beside the checkpoint. FileNotFoundError if the given one holds none.
    """
    names = ["image_encoder", "models/image_encoder"]
    if given:
        places = [locate(given, ["models/image_encoder"], dtype)]
        names.append(".")
    else:
        places = [checkpoint, checkpoint.parent, checkpoint.parent / "IP-Adapter"]
    for place in places:
        for name in names:
            if (place / name / "config.json").is_file():
                return place / name
    if given:
        missing = "image_encoder/config.json is missing"
        raise FileNotFoundError(f"{given} holds no image encoder: {missing}")
    return None


def find_inside(checkpoint):
    """The folder of the image encoder in a checkpoint's folder, or False."""
    folder = Path(checkpoint) / "image_encoder"
    return (folder / "config.json").is_file() and folder


def find_beside(adapter):
    """The folder of an adapter file if it holds the image encoder too, as h94/IP-Adapter's `models`."""
    folder = Path(adapter).parent
    return folder if (folder / "image_encoder" / "config.json").is_file() else None


def read_tensors(path, prefix=""):
    """Yield (name, tensor) of the names under `prefix`, memory-mapped: nothing is read before use.

    ValueError unless it is .safetensors or a pickle of plain tensors (opened with weights_only).
    """
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            names, get = file.keys(), file.get_tensor
            if sys.platform == "linux" and path.stat().st_size > 1e9:

                def get(name):  # a mapping each: else one tensor that is kept keeps the whole file
                    return safe_open(path, framework="pt").get_tensor(name)
        else:
            mapped = zipfile.is_zipfile(path)
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            tensors = tensors.get("state_dict", tensors)
            names, get = tensors.keys(), tensors.get
        for name in names:
            if name.startswith(prefix):
                yield name.removeprefix(prefix), get(name)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{path} is not a readable weight file: {reason}") from error


def load_network(make, config, path, prefix="", device="cpu", dtype=torch.float32):
    """make(config), an nn.Module whose parameters *are* the tensors of a file: no second copy.

    path: the file, or its folder. prefix: of its names in a single file. ValueError names the first
    tensor that is missing, misshapen or unexpected.
    """
    path = path if path.is_file() else weight_file(path, dtype)
    with torch.device("meta"):  # the layers without numbers
        model = make(config)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    own_names = {our_name(name, model.config): name for name in expected}
    found = {}
    wrong = []
    for published, tensor in read_tensors(path, prefix):
        name = own_names.get(our_name(published, model.config))
        if name and len(expected[name]) == 2 and tensor.shape[2:] == (1, 1):
            tensor = tensor.flatten(1)  # a 1×1 convolution that newer files hold as a matrix
        if name and list(tensor.shape) == expected[name]:
            found[name] = tensor.to(device, dtype)
        elif name:
            shape = f"shape {list(tensor.shape)}, but the config asks for {expected[name]}"
            wrong.append(f"tensor {published} has {shape}")
        elif not published.endswith("position_ids"):  # a constant that older transformers wrote
            wrong.append(f"tensor {published} is unexpected: the config has no place for it")
    wrong = wrong or [f"tensor {name} is missing" for name in expected if name not in found]
    if wrong:
        count = f"({len(wrong)} such in all)"
        raise ValueError(f"{path}: {wrong[0]} {count}: not the weights of this config, or not all")
    model.load_state_dict(found, assign=True)
    for module in model.modules():
        if hasattr(module, "position_ids"):  # CLIP's one buffer, which files do not hold
            count = module.position_ids.shape[-1]
            module.position_ids = torch.arange(count, device=device)[None]
    return model.eval()


class Checkpoint:
    """Where the parts of a published checkpoint are: a folder, a hub id or a single file.

    config: for a single file, the folder or hub id of its tokenizer and, if it is not Stable
    Diffusion 1.5, of its config.json files; default: its own folder if `tokenizer` is there.
    """

    def __init__(self, path, dtype, config=None):
        self.path = locate(path, PREFIXES, dtype)
        self.dtype = dtype
        self.is_single_file = self.path.is_file()
        self.root = self.path
        if self.is_single_file:
            has_tokenizer = (self.path.parent / "tokenizer").is_dir()
            default = self.path.parent if has_tokenizer else "openai/clip-vit-large-patch14"
            self.root = locate(config or default, [], dtype)

    def settings(self, part, file="config.json"):
        path = self.root / part / file
        if path.is_file():
            return read_json(path)
        if self.is_single_file:
            return SINGLE_FILE[part]
        parts = "unet, vae, text_encoder, tokenizer and scheduler"
        raise FileNotFoundError(f"{path} is missing: a checkpoint has {parts}")

    def load(self, part, make, device):
        """The network `part`, built by make(config)."""
        path, prefix = self.path / part, ""
        if self.is_single_file:
            path, prefix = self.path, PREFIXES[part]
        return load_network(make, self.settings(part), path, prefix, device, self.dtype)

    def load_image_encoder(self, given, device):
        """The image encoder and the content of its preprocessor_config.json; None if there is none.

        given: see find_image_encoder; False: none is wanted.
        """
        folder = given is not False and find_image_encoder(self.path, given, self.dtype)
        if not folder:
            return None, CLIP_COLOURS
        config = read_json(folder / "config.json")
        network = load_network(make_image_encoder, config, folder, "", device, self.dtype)
        name = "preprocessor_config.json"
        for path in (self.root / "feature_extractor" / name, folder / name):
            if path.is_file():
                return network, read_json(path)
        return network, CLIP_COLOURS

    def load_tokenizer(self):
        """FileNotFoundError if there is no vocabulary: transformers would make up an empty one."""
        folder = self.root / "tokenizer"
        if self.is_single_file and not folder.is_dir():
            folder = self.root
        files = [folder / "tokenizer.json", folder / "vocab.json"]
        if not any(file.is_file() for file in files):
            missing = "vocab.json and merges.txt are missing"
            raise FileNotFoundError(f"{folder} holds no tokenizer: {missing}")
        from transformers import CLIPTokenizer  # here: it takes seconds

        return CLIPTokenizer.from_pretrained(folder)


def make_text_encoder(config):
    """Γ_τ of transformers with a config.json's settings."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig.from_dict(config))


def make_image_encoder(config):
    """Γ_i of transformers with a config.json's settings."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig.from_dict(config))


def make_betas(config):
    """The table β of a published scheduler_config.json: (T,) float64.

    ValueError for a kind that Stable Diffusion 1.x is not.
    """
    implemented = dict(
        prediction_type=["epsilon", None],
        trained_betas=[None],
        beta_schedule=["linear", "scaled_linear"],
    )
    for key, values in implemented.items():
        if config.get(key) not in values:
            raise ValueError(f"scheduler: {key} = {config.get(key)!r} is not implemented")
    power = 2 if config["beta_schedule"] == "scaled_linear" else 1
    start = config["beta_start"] ** (1 / power)
    end = config["beta_end"] ** (1 / power)
    steps = config["num_train_timesteps"]
    return torch.linspace(start, end, steps, dtype=torch.float64) ** power


def write_checkpoint(folder, *parts):
    """Write a checkpoint in diffusers' layout, whole or not at all; what else is there stays.

    parts: as in write_parts. Everything is written to a temporary folder first, then each part takes
    the place of the old one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        new = Path(temporary, "new")
        old = Path(temporary, "old")
        old.mkdir()
        write_parts(new, *parts)
        for part in new.iterdir():
            if (folder / part.name).exists():
                (folder / part.name).rename(old / part.name)
            part.rename(folder / part.name)


def write_parts(folder, networks, tokenizer, scheduler, preprocessor, dtype):
    """networks: {part: network or None}. scheduler, preprocessor: the contents of their JSON files."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
    }
    for part, network in networks.items():
        if network is None:
            continue
        config = network.config
        index[part] = ["transformers", type(network).__name__]
        if isinstance(config, dict):  # one of ours
            index[part] = ["diffusers", config["_class_name"]]
        else:
            config = config.to_diff_dict()
        write_json(folder / part / "config.json", config)
        prefix = "text_model." if part == "text_encoder" else ""
        tensors = {}
        for name, tensor in network.state_dict().items():
            tensors[prefix + name.removeprefix(prefix)] = tensor.to("cpu", dtype)
        save_tensors(folder / part / f"{STEMS[part]}.safetensors", tensors, {"format": "pt"})
    write_tokenizer(folder / "tokenizer", tokenizer)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    if networks["image_encoder"] is not None:
        index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
        size = networks["image_encoder"].config.image_size
        processor = {
            **preprocessor,
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": size},
            "crop_size": {"height": size, "width": size},
        }
        write_json(folder / "feature_extractor" / "preprocessor_config.json", processor)
    write_json(folder / "model_index.json", index)


def write_tokenizer(folder, tokenizer):
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend:  # it remembers the padding of its last call
        backend.no_truncation()
        backend.no_padding()
    tokenizer.save_pretrained(folder)
    if backend:
        backend.model.save(str(folder))  # vocab.json and merges.txt, which transformers 5 leaves out


# ---------------------------------------------------------------- adapter files

UNSUPPORTED_ADAPTERS = {  # one tensor that only this kind of published file has
    "image_proj.latents": "IP-Adapter Plus",
    "image_proj.perceiver_resampler.proj_in.weight": "IP-Adapter FaceID Plus",
    "image_proj.proj.3.weight": "IP-Adapter Full Face",
    "image_proj.proj.0.weight": "IP-Adapter FaceID",
}


def read_adapter(path):
    """An IP-Adapter file -> its tensors by flat published name, its metadata.

    .safetensors, or .bin with nested keys. ValueError, in one line: unreadable, no IP-Adapter, or of
    a kind that is not supported.
    """
    try:
        if str(path).endswith(".safetensors"):
            tensors, metadata = read_safetensors(path)
        else:
            tensors, metadata = {}, {}
            nested = torch.load(path, map_location="cpu", weights_only=True)
            for part, inner in nested.items():
                for name, tensor in inner.items():
                    tensors[f"{part}.{name}"] = tensor
    except Exception as error:  # each reader fails in its own ways; to the user they are one
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"cannot read the adapter {path}: {reason}") from error
    for name, kind in UNSUPPORTED_ADAPTERS.items():
        if name in tensors:
            raise ValueError(f"{path} is an {kind} file: only the plain IP-Adapter is supported")
    if not any(name.startswith(("image_proj.", "ip_adapter.")) for name in tensors):
        nothing = "it has neither image_proj nor ip_adapter tensors"
        raise ValueError(f"{path} is no IP-Adapter: {nothing}")
    for name in ("image_proj.proj.weight", "image_proj.norm.weight"):
        if name not in tensors:
            raise ValueError(f"{path} lacks the tensor {name}")
    return tensors, metadata


def read_safetensors(path):
    """A .safetensors file -> {name: tensor}, {name: string} of its header."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        return tensors, file.metadata() or {}


def check_adapter(path, tensors, expected):
    """ValueError, naming the tensor, unless `tensors` fits the adapter whose state_dict is `expected`."""
    for name, tensor in expected.items():
        if name not in tensors:
            raise ValueError(f"{path} lacks the tensor {name}")
        if tensors[name].shape != tensor.shape:
            found = tuple(tensors[name].shape)
            wanted = tuple(tensor.shape)
            raise ValueError(f"{path}: tensor {name} has shape {found}, this UNet needs {wanted}")
    for name in tensors:
        if name.startswith(("image_proj.", "ip_adapter.")) and name not in expected:
            raise ValueError(f"{path}: tensor {name} has no place in this UNet")
