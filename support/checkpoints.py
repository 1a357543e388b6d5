"""Checkpoints as they are published: diffusers' folders, hub ids, single files, adapter files.

A folder holds unet, vae, text_encoder, tokenizer, scheduler and sometimes image_encoder, each with
a config.json and a weight file. A single file holds all weights under older names (tensor_names.py)
and no settings; those are Stable Diffusion 1.5's.
"""

import re
import tempfile
import warnings
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from support.configs import (CLIP_COLOURS, SINGLE_FILE, UNET_DEFAULTS, VAE_DEFAULTS, check_fit,
                             clip_config, naming, read_settings)
from support.crops import read_crop
from support.files import digest, find_reason, save_tensors, write_json
from support.tensor_names import our_name
from support.text import first_line, one_line, tokenize
from support.weights import check_dtypes, check_tensor, read_pickle, read_safetensors, read_tensors

TINY = Path(__file__).parent.parent / "weights" / "tiny"  # the models that ship with this code
PHOTOS = TINY.parent / "photos"
ADAPTER = "ip_adapter/ip-adapter_tiny.safetensors"  # in its folder
FACE_ADAPTER = "ip_adapter/ip-adapter_mobilefacenet.safetensors"  # for the embeddings of faces

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
    if not is_hub_id(str(path)):
        where = f"looked for in {Path.cwd()}"
        if Path(path).name == "mobilefacenet.pt":
            where += "; support/README.md, Faces, says where to get it"
        raise FileNotFoundError(f"{path}: no such file or folder ({where})")
    folders = [*parts, "image_encoder"] if parts else []
    for pattern in weight_patterns(dtype):
        wanted = ["*.json", "*.txt"] + [f"{part}/{pattern}" for part in folders]
        found = download(path, wanted)
        if all(any(found.glob(f"{part}/{pattern}")) for part in parts):
            break
    return found


def is_hub_id(name):
    """Whether a name that no folder has may be asked of the hub: not if it means a folder or file."""
    means_folder = name.split("/")[0] in ("runs", "weights", ".", "..")
    means_file = Path(name).suffix in (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
    looks_right = re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    return bool(looks_right) and not means_folder and not means_file


def download(hub_id, wanted):
    """The snapshot folder of a hub id with the files that match `wanted`."""
    try:
        return Path(snapshot_download(str(hub_id), allow_patterns=wanted))
    except Exception as error:  # of many kinds
        incomplete = getattr(error, "snapshot_path", None)
        if incomplete:  # offline, and the snapshot in the cache lacks a wanted file
            return Path(incomplete)
        problem = "no such folder, and the hub did not give such a model"
        problem = f"{hub_id}: {problem}: {first_line(error)}"
        raise FileNotFoundError(problem) from error


def find_image_encoder(checkpoint, given, dtype):
    """The folder of the image encoder, or None.

    given: the folder or hub id of --image-encoder, or a folder that holds it; None: it is looked
    for in and beside the checkpoint. FileNotFoundError if the given one holds none.
    """
    names = ["image_encoder", "models/image_encoder"]
    if given:
        places = [locate_image_encoder(given, dtype)]
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


def locate_image_encoder(given, dtype):
    """`given` if it exists; else the snapshot of that hub id with an encoder in it or at its root."""
    if Path(given).exists() or not is_hub_id(str(given)):
        return locate(given, [], dtype)
    for pattern in weight_patterns(dtype):
        stem = "pytorch_model" if pattern.endswith(".bin") else "model"
        at_root = pattern.replace("*model", stem)
        wanted = [f"models/image_encoder/{pattern}", f"image_encoder/{pattern}", at_root]
        found = download(given, ["*.json", "*.txt", *wanted])
        if any(any(found.glob(file)) for file in wanted):
            break
    return found


def locate_clip(path):
    """`path` if it is a folder; else the snapshot of a hub id with a whole CLIP at its root."""
    if Path(path).is_dir() or not is_hub_id(str(path)):
        return locate(path, [], torch.float32)
    found = download(path, ["*.json", "*.txt", "model.safetensors"])
    if not (found / "model.safetensors").is_file():
        found = download(path, ["*.json", "*.txt", "pytorch_model.bin"])
    return found


def find_inside(checkpoint):
    """The folder of the image encoder in a checkpoint's folder, or False."""
    folder = Path(checkpoint) / "image_encoder"
    return (folder / "config.json").is_file() and folder


def is_shipped(model):
    """Whether a model's name is the folder of one that ships with this code: they are small."""
    return Path(model).resolve() in (TINY.resolve(), PHOTOS.resolve())


def find_shipped(model, image_encoder=None):
    """Where the adapter of one photo is in a model's folder: the one that reads this encoder.

    image_encoder: --image-encoder; a file is a face recogniser.
    """
    is_face_net = image_encoder and Path(image_encoder).is_file()
    return Path(model) / (FACE_ADAPTER if is_face_net else ADAPTER)


def find_beside(adapter):
    """The folder of an adapter file if it holds the image encoder too, as h94/IP-Adapter's `models`."""
    folder = Path(adapter).parent
    return folder if (folder / "image_encoder" / "config.json").is_file() else None


def load_network(make, config, path, prefix="", device="cpu", dtype=torch.float32):
    """make(config), an nn.Module whose parameters *are* the tensors of a file: no second copy.

    path: the file, or its folder. prefix: of its names in a single file. ValueError names the first
    tensor that is missing, misshapen, unexpected or not of finite numbers.
    """
    with naming(path), torch.device("meta"):  # the layers without numbers
        model = make(config)
    path = path if path.is_file() else weight_file(path, dtype)
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    own_names = {our_name(name, model.config): name for name in expected}
    found = {}
    wrong = []
    dtypes = set()
    for published, tensor in read_tensors(path, prefix):
        name = own_names.get(our_name(published, model.config))
        if name is None:
            if not published.endswith("position_ids"):  # a constant that older transformers wrote
                wrong.append(f"tensor {published} is unexpected: the config has no place for it")
            continue
        check_tensor(path, published, tensor, dtype)
        dtypes.add(tensor.dtype)
        if len(expected[name]) == 2 and tensor.shape[2:] == (1, 1):
            tensor = tensor.flatten(1)  # a 1×1 convolution that newer files hold as a matrix
        if name in found:
            wrong.append(f"tensor {published} is there twice, under an older name, too")
        elif list(tensor.shape) == expected[name]:
            found[name] = tensor.to(device, dtype)
        else:
            shape = f"shape {list(tensor.shape)}, but the config asks for {expected[name]}"
            wrong.append(f"tensor {published} has {shape}")
    check_dtypes(path, dtypes)
    wrong = wrong or [f"tensor {name} is missing" for name in expected if name not in found]
    if wrong:
        count = f"({len(wrong)} such in all)"
        raise ValueError(f"{path}: {wrong[0]} {count}: not the weights of this config, or not all")
    model.load_state_dict(found, assign=True)
    number_positions(model, device)
    return model.eval()


def number_positions(model, device):
    """Fill CLIP's one buffer, which files do not hold: 0, 1, 2, …"""
    for module in model.modules():
        if hasattr(module, "position_ids"):
            count = module.position_ids.shape[-1]
            module.position_ids = torch.arange(count, device=device)[None]


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
            if self.path.suffix not in (".safetensors", ".ckpt"):
                raise ValueError(f"{path}: neither a folder nor a .safetensors or .ckpt file")
            has_tokenizer = (self.path.parent / "tokenizer").is_dir()
            default = self.path.parent if has_tokenizer else "openai/clip-vit-large-patch14"
            self.root = locate(config or default, [], dtype)
        configs = {part: self.settings(part) for part in PREFIXES}  # before gigabytes are read
        self.settings("scheduler", "scheduler_config.json")
        with naming(self.root):
            check_fit(**configs)

    def settings(self, part, file="config.json"):
        path = self.root / part / file
        if path.is_file():
            return read_settings(path, part)
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

        given: see find_image_encoder, or the file of a face recogniser (face_net.FaceEncoder);
        False: none is wanted. The crop of the checkpoint's pictures stays whatever the encoder is.
        """
        crop = read_crop(self.root)
        cut = crop.describe() if crop else {}
        if given and Path(given).is_file():
            encoder = self.load_face_encoder(given, crop).to(device, self.dtype)
            return encoder, {**encoder.COLOURS, **cut}
        folder = given is not False and find_image_encoder(self.path, given, self.dtype)
        if not folder:
            return None, {**CLIP_COLOURS, **cut}
        config = read_settings(folder / "config.json", "image_encoder")
        name = "preprocessor_config.json"
        colours = CLIP_COLOURS
        for path in (self.root / "feature_extractor" / name, folder / name):  # its own wins
            if path.is_file():
                colours = read_settings(path, "preprocessor")
        network = load_network(make_image_encoder, config, folder, "", device, self.dtype)
        return network, {**colours, **cut}

    def load_face_encoder(self, file, crop):
        """The face recogniser in a file as the image encoder of this checkpoint's pictures."""
        from support.face_net import FaceEncoder, MobileFaceNet, find_face_box  # takes seconds

        unet = {**UNET_DEFAULTS, **self.settings("unet")}
        vae = {**VAE_DEFAULTS, **self.settings("vae")}
        halvings = len(vae["block_out_channels"]) - 1
        net = MobileFaceNet(file, find_face_box(crop))
        return FaceEncoder(net, unet["sample_size"] * 2**halvings)

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

        with naming(folder):
            tokenizer = CLIPTokenizer.from_pretrained(folder)
            check_tokenizer(tokenizer, self.settings("text_encoder").get("vocab_size", 49408))
        return tokenizer


def check_tokenizer(tokenizer, vocabulary):
    """ValueError unless it makes token numbers that a text encoder with so many tokens can read."""
    length = tokenizer.model_max_length
    if not isinstance(length, int) or length < 3:
        raise ValueError(f"model_max_length = {one_line(repr(length), 60)}: it must be 3 or more")
    numbers = tokenizer.get_vocab().values()
    if not all(0 <= number < vocabulary for number in numbers):
        many = f"numbers up to {max(numbers)}, the text encoder has {vocabulary} tokens"
        raise ValueError(f"the tokenizer gives {many}")
    ids = tokenize(tokenizer, ["a photo"], 77)[0].tolist()
    if ids[0] != tokenizer.bos_token_id or tokenizer.eos_token_id not in ids:
        raise ValueError("no tokenizer of CLIP: a prompt does not begin and end with its marks")
    # The words that the last merges make: most of them are one token, unless merges are missing.
    by_number = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    words = [token[:-4] for token, _ in by_number if re.fullmatch("[a-z]+</w>", token)][-20:]
    whole = [word for word in words if len(tokenizer.tokenize(word)) == 1]
    if 2 * len(whole) < len(words):
        raise ValueError("its merges do not make the words of its vocabulary")


def make_text_encoder(config):
    """Γ_τ of transformers with a config.json's settings."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**clip_config(config)))


def make_image_encoder(config):
    """Γ_i of transformers with a config.json's settings."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(CLIPVisionConfig(**clip_config(config)))


def write_checkpoint(folder, *parts):
    """Write a checkpoint in diffusers' layout, whole or not at all; what else is there stays.

    parts: as in write_parts.
    """
    replace_parts(folder, lambda new: write_parts(new, *parts))


def replace_parts(folder, write):
    """All that write(new) puts into the folder `new` comes into `folder`, all or nothing of it.

    It is written to a temporary folder first, then each file or folder takes the place of the old one
    of its name. If it is killed in between, support.claim puts the old ones back.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        new = Path(temporary, "new")
        old = Path(temporary, "old")
        old.mkdir()
        write(new)
        for part in new.iterdir():
            if (folder / part.name).exists():
                (folder / part.name).rename(old / part.name)
            part.rename(folder / part.name)
        old.rename(Path(temporary, "done"))  # from here on the new ones count


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
    try:
        tokenizer.save_pretrained(folder)
        if backend:
            backend.model.save(str(folder))  # vocab.json and merges.txt: transformers 5 leaves them out
    except Exception as error:  # of many kinds
        reason = find_reason(folder / "vocab.json", error)
        raise OSError(f"{folder} cannot be written: {reason}") from error


# ---------------------------------------------------------------- adapter files

UNSUPPORTED_ADAPTERS = {  # one tensor that only this kind of published file has
    "image_proj.latents": "IP-Adapter Plus",
    "image_proj.perceiver_resampler.proj_in.weight": "IP-Adapter FaceID Plus",
    "image_proj.proj.3.weight": "IP-Adapter Full Face",
    "image_proj.proj.0.weight": "IP-Adapter FaceID",
}


def read_adapter(path, dtype=torch.float32):
    """An IP-Adapter file -> its tensors by flat published name, its metadata.

    .safetensors, or .bin with nested keys. ValueError, in one line: unreadable, no IP-Adapter, of a
    kind that is not supported, or with numbers that are not finite in `dtype`.
    """
    try:
        if str(path).endswith(".safetensors"):
            tensors, metadata = read_safetensors(path)
        else:
            tensors, metadata = read_nested(path), {}
    except ValueError as error:
        raise ValueError(f"cannot read the adapter: {error}") from error
    for name, kind in UNSUPPORTED_ADAPTERS.items():
        if name in tensors:
            raise ValueError(f"{path} is an {kind} file: only the plain IP-Adapter is supported")
    if not any(name.startswith(("image_proj.", "ip_adapter.")) for name in tensors):
        nothing = "it has neither image_proj nor ip_adapter tensors"
        raise ValueError(f"{path} is no IP-Adapter: {nothing}")
    for name in ("image_proj.proj.weight", "image_proj.norm.weight"):
        if name not in tensors:
            raise ValueError(f"{path} lacks the tensor {name}")
    for name, tensor in tensors.items():
        check_tensor(path, name, tensor, dtype)
    check_dtypes(path, [tensor.dtype for tensor in tensors.values()])
    return tensors, metadata


def read_nested(path):
    """A .bin file of two tables, image_proj and ip_adapter -> {flat name: tensor}."""
    tensors = {}
    nested = read_pickle(path)
    parts = nested if isinstance(nested, dict) else {}
    for part, inner in parts.items():
        if not isinstance(inner, dict):
            raise ValueError(f"{path}: {one_line(part, 60)} is no table of tensors")
        for name, tensor in inner.items():
            tensors[f"{part}.{name}"] = tensor
    return tensors


def adapter_sizes(path, tensors):
    """Of an adapter file: the image embeddings' width, tokens per image, the text's width."""
    weight = tensors["image_proj.proj.weight"]
    norm = tensors["image_proj.norm.weight"]
    if weight.ndim != 2 or norm.ndim != 1 or len(weight) % len(norm):
        shapes = f"{tuple(weight.shape)} and {tuple(norm.shape)}"
        raise ValueError(f"{path}: image_proj.proj.weight and .norm.weight of shapes {shapes}")
    rows, image_dim = weight.shape
    return image_dim, rows // len(norm), len(norm)


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
        if name not in expected:
            raise ValueError(f"{path}: tensor {one_line(name, 100)} has no place in this UNet")


def find_newest_adapter(load_unet, runs=Path("runs")):
    """The file of the newest run whose adapter was trained on this UNet's weights, or None.

    load_unet: () -> UNet; called only if there are runs. Files that are none are named and left out.
    """
    files = [file for file in runs.glob("*/ip-adapter.safetensors") if file.is_file()]
    weights = digest(load_unet()) if files else ""
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        try:
            _, metadata = read_adapter(file)
        except ValueError as error:
            warnings.warn(f"{error}: left out")
            continue
        if metadata.get("base", "").startswith(weights):
            return file
    return None


def digest_encoders(sd):
    """A digest of all that features depend on of a model (the VAE's decoder encodes nothing).

    ValueError if there is no image encoder.
    """
    if sd.image_encoder is None:
        hint = "name one with --image-encoder (h94/IP-Adapter)"
        raise ValueError(f"the model comes without an image encoder: {hint}")
    networks = (sd.vae.encoder, sd.vae.quant_conv, sd.text_encoder, sd.image_encoder)
    scale = sd.vae.config["scaling_factor"]
    return digest(*networks, size=sd.image_size, scale=scale, preprocessor=sd.preprocessor)
