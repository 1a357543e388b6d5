"""Sampling: reference photos and a prompt in, a picture grid out (sections 3.1.3, 3.3 and 3.5).

    ε̂ = w·ε_θ(x_t, c, t) + (1−w)·ε_θ(x_t, t)                             (11)   --guidance is w
    Z = Attention(Q, K, V) + λ·Attention(Q, K', V')                       (3)    --lam is λ

    python sample.py                                  an unseen person of the toy world, nine photos
    python sample.py --refs me/*.jpg --prompt "a photo of a smiling person wearing a hat"
    python sample.py --model runs/dreambooth --prompt "a photo of a sks person"       text only

Self-attention reads nine references (of more the first nine, fewer are bootstrapped), others all.
Is it the person? For photographs `metrics.py --faces mobilefacenet.pt` measures it; support/README.md
says where to get that file, with one line of curl, and what it may be used for.
"""

import warnings
from pathlib import Path

import torch
from PIL import ImageOps

from aggregators import AGGREGATORS
from data import ToyFaces
from dreambooth import load_lora
from ip_adapter import IPAdapter, generate
from support.checkpoints import TINY, Checkpoint, find_beside, find_shipped, read_adapter
from support.crops import find_crop
from support.devices import DTYPE, Stopwatch, pick_device, pick_precision
from support.fast_cpu import prepare_unet
from support.files import check_writable, digest
from support.finite import check_finite
from support.pictures import load_image, save_grid, save_pictures, to_tensor
from support.program import add_device_arguments, file_path, make_parser, run
from support.text import one_line
from unet import StableDiffusion, UNet


def find_adapter(model, path, image_encoder=None):
    """The adapter file to use, or None.

    `path` if it is given. Else, for the tiny model, that of the newest run that was trained on the
    weights which are there now; else the one shipped in the folder `model` for the image encoder.
    """
    if path is not None:
        return path
    if Path(model).resolve() == TINY.resolve():
        runs = [file for file in Path("runs").glob("*/ip-adapter.safetensors") if file.is_file()]
        if runs:
            files = Checkpoint(TINY, torch.float32)
            weights = digest(files.load("unet", lambda config: UNet(**config), "cpu"))
        for file in sorted(runs, key=lambda file: file.stat().st_mtime, reverse=True):
            try:
                _, metadata = read_adapter(file)
            except ValueError as error:
                warnings.warn(f"{error}: left out")
                continue
            if metadata.get("base", "").startswith(weights):
                return file
    shipped = find_shipped(model, image_encoder)
    return shipped if shipped.is_file() else None


def draw_unseen_person(seed, size):
    """Nine photos and the tenth's prompt of a toy person that no adapter was trained on."""
    person = ToyFaces(100, size=size, seed=2).people[seed % 100]  # data.load_people holds them out
    print(f"references: {person.name}, photos 1 to 9; give your own with --refs")
    return [photo.image for photo in person.photos[:9]], person.photos[9].prompt


@torch.inference_mode()
def embed_references(sd, adapter, images):
    """Reference pictures -> c_i (1, 4M, D), and in the same shape the tokens for "no image"."""
    embeds = sd.embed_images(images)[None]  # (1, N, E)
    check_finite(image_encoder=embeds)
    embeds = adapter.aggregator.fit_references(embeds, torch.Generator().manual_seed(0))
    return adapter.tokens(embeds), adapter.tokens(torch.zeros_like(embeds))


def load_model(model, device, precision, image_encoder, lora):
    """The checkpoint in `precision`, with the LoRA file merged into its UNet if one is given.

    The LoRA is merged in float32: in half precision its small updates would be rounded away; and on
    the CPU, where there is room for float32.
    """
    dtype = DTYPE[precision]
    if lora:
        sd = StableDiffusion.load(model, "cpu", torch.float32, image_encoder)
        load_lora(lora, sd)
        for network in (sd.unet, sd.vae, sd.text_encoder, sd.image_encoder):
            if network is not None:
                network.to(device, dtype)
    else:
        sd = StableDiffusion.load(model, device, dtype, image_encoder)
    if device.type == "cuda":  # as its convolutions like it; for the CPU see prepare_unet
        sd.unet.to(memory_format=torch.channels_last)
        sd.vae.to(memory_format=torch.channels_last)
    return sd


def save_sheet(path, references, images, prompt, per_row=9):
    """A grid: the reference pictures in the upper rows, the pictures (B, 3, H, W) in the lower."""
    size = images.shape[-1]
    shown = [to_tensor([ImageOps.fit(image, (size, size))])[0] for image in references]
    rows, captions = [], []
    for pictures, caption in ((shown, "references"), (list(images), prompt)):
        for start in range(0, len(pictures), per_row):
            rows.append(pictures[start : start + per_row])
            captions.append(caption if start == 0 else "")
    save_grid(path, rows, captions=captions, side=min(max(size, 128), 256))


def parse_arguments():
    parser = make_parser(__doc__)
    parser.ranges["steps"] = (1, 1000)
    add = parser.add_argument
    add("--model", default=str(TINY), help="checkpoint folder, single file or hub id (default: "
        "weights/tiny)")
    add("--image-encoder", help="folder or hub id of the CLIP image encoder, if not in --model; or the "
        "file of a face recogniser, mobilefacenet.pt")
    add("--adapter", type=file_path, help="adapter file (default: the newest in runs/, or the shipped)")
    add("--refs", type=file_path, nargs="+", help="photos of one person (default: a toy person)")
    add("--agg", choices=list(AGGREGATORS), help="use the adapter with another aggregator")
    add("--lora", type=file_path, help="LoRA file to merge into the UNet, ours or diffusers'")
    add("--prompt", help="what to show (default: the scene of the person's tenth photo)")
    add("--negative", default="", help="what not to show")
    add("--lam", type=float, default=1.0, help="weight λ of the references; 0 is text only")
    add("--guidance", type=float, default=4.0, help="classifier-free guidance w; 1 is none")
    add("--sampler", choices=["ddpm", "ddim", "dpm"], default="dpm", help="reverse process")
    add("--steps", type=int, default=30, help="UNet evaluations, 1 to 1000")
    add("--n", type=int, default=6, help="pictures to make")
    add("--seed", type=int, default=0, help="picture k starts from the noise of seed + "
        "k; of toy people, also which person")
    add_device_arguments(parser, precision="number format of the weights")
    add("--compile", action="store_true", help="compile the UNet first, on GPUs: takes a minute")
    add("--benchmark", action="store_true", help="print warm-up, seconds a step and peak memory")
    add("--out", type=Path, default=Path("runs/sample.png"), help="picture to write")
    return parser.parse_args()


def check_arguments(args):
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder: name the picture to write")
    if args.benchmark and args.steps == 1:
        raise ValueError("--benchmark with --steps 1: the first step only warms up, give it more")


def takes_toy_person(model, adapter_file, lora):
    """Whether the references are an unseen toy person's, if none are given."""
    is_tiny = Path(model).resolve() == TINY.resolve()
    return is_tiny and adapter_file is not None and not lora


def choose_image_encoder(args, adapter_file):
    """The one to load: named, or beside the adapter, or None: in the model; False: none is needed."""
    if args.image_encoder:
        return args.image_encoder
    if args.refs or takes_toy_person(args.model, adapter_file, args.lora):
        return adapter_file and find_beside(adapter_file)
    return False


def open_references(files, crop):
    """Reference photos, cut like the photos that the model learned from; a hint if that is a guess."""
    images = [load_image(file) for file in files]
    if crop is None:
        return images
    strange = [file for file, image in zip(files, images) if image.size != crop.frame]
    if strange:
        share = (crop.box[2] - crop.box[0]) / crop.frame[0]
        print(f"note: of {strange[0]}{' and others' if len(strange) > 1 else ''} the centre square is "
              "taken; cut photos yourself so that the face fills it, from the middle of the forehead "
              f"to the chin ({share:.0%} of a Deep Funneled photo)")
    return [crop.cut(image) for image in images]


def find_references(args, adapter_file, size, crop=None):
    """The reference pictures, none for text only, and the prompt: --prompt, or a toy person's scene."""
    if args.refs:
        return open_references(args.refs, crop), args.prompt
    if not takes_toy_person(args.model, adapter_file, args.lora):
        return [], args.prompt
    references, scene = draw_unseen_person(args.seed, size)
    return references, scene if args.prompt is None else args.prompt


def check_request(args, references, prompt, adapter_file):
    if (args.adapter or args.agg) and not references:
        raise ValueError("--adapter and --agg are for reference photos: name some with --refs")
    if prompt is None:
        raise ValueError("no prompt: say what to show with --prompt")
    if references and adapter_file is None:
        raise ValueError(f"{args.model} comes without an adapter: name one with --adapter")


def main():
    args = parse_arguments()
    check_arguments(args)
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    adapter_file = find_adapter(args.model, args.adapter, args.image_encoder)
    image_encoder = choose_image_encoder(args, adapter_file)
    sd = load_model(args.model, device, precision, image_encoder, args.lora)
    crop = find_crop(sd.preprocessor)
    references, prompt = find_references(args, adapter_file, sd.image_size, crop)
    check_request(args, references, prompt, adapter_file)

    # The conditions: image tokens, the prompt's tokens, and those of "no condition".
    source, c_i, null_c_i = "text only", None, None
    if references:
        adapter = IPAdapter.load(adapter_file, sd.unet, args.agg)
        source = f"{adapter_file} ({adapter.agg})"
        c_i, null_c_i = embed_references(sd, adapter, references)
        c_i = c_i.expand(args.n, -1, -1)
    c_t = sd.encode_prompts([prompt]).expand(args.n, -1, -1)
    null_c_t = sd.encode_prompts([args.negative])
    sd.text_encoder = sd.image_encoder = None  # no longer needed: room for pictures

    # From noise to pictures.
    check_writable(args.out.parent)  # before the work, not after it
    stopwatch = Stopwatch(sd.unet, device, count_steps=args.benchmark)
    prepare_unet(sd.unet, device, precision, args.compile)
    try:
        images = generate(sd, c_t, null_c_t, c_i, null_c_i, args.guidance, args.lam, args.steps,
                          args.sampler, args.seed, progress=True)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ValueError(f"--compile: {str(error).splitlines()[0]}") from None
    seconds = stopwatch.seconds()
    save_sheet(args.out, references, images, one_line(prompt))
    folder = args.out.parent / f"{args.out.stem}_pictures"
    save_pictures(folder, images)
    print(f'{source}: "{one_line(prompt)}", {args.n} pictures in {seconds:.1f} s\n'
          f"wrote {args.out}, and each picture by itself to {folder}/")
    if args.benchmark:
        print(stopwatch.report(precision))


if __name__ == "__main__":
    run(main, "make fewer pictures at once (--n)")
