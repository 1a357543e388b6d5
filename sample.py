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

from pathlib import Path

import torch

from aggregators import AGGREGATORS
from data import ToyFaces
from ip_adapter import IPAdapter, generate
from support.checkpoints import TINY, Checkpoint, find_beside, find_newest_adapter, find_shipped
from support.command_lines import choose_guidance, parse_sampling
from support.crops import find_crop, open_references
from support.devices import DTYPE, Stopwatch, pick_device, pick_precision
from support.fast_cpu import prepare_unet
from support.files import check_writable
from support.finite import check_finite
from support.hints import check_request, note_references
from support.lora import load_lora
from support.pictures import save_pictures, save_sheet
from support.program import run
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
        files = Checkpoint(TINY, torch.float32)
        newest = find_newest_adapter(lambda: files.load("unet", lambda config: UNet(**config), "cpu"))
        if newest:
            return newest
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


def find_references(args, adapter_file, sd):
    """The reference pictures, none for text only, and the prompt: --prompt, or a toy person's scene."""
    if args.refs:
        return open_references(args.refs, find_crop(sd.preprocessor)), args.prompt
    if not takes_toy_person(args.model, adapter_file, args.lora):
        return [], args.prompt
    references, scene = draw_unseen_person(args.seed, sd.image_size)
    return references, scene if args.prompt is None else args.prompt


def main():
    args = parse_sampling(__doc__, list(AGGREGATORS))
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    adapter_file = find_adapter(args.model, args.adapter, args.image_encoder)
    image_encoder = choose_image_encoder(args, adapter_file)
    sd = load_model(args.model, device, precision, image_encoder, args.lora)
    references, prompt = find_references(args, adapter_file, sd)
    check_request(args, references, prompt, adapter_file)

    # The conditions: image tokens, the prompt's tokens, and those of "no condition".
    source, c_i, null_c_i = "text only", None, None
    if references:
        adapter = IPAdapter.load(adapter_file, sd.unet, args.agg)
        note_references(adapter, adapter_file, len(references))
        source = f"{adapter_file} ({adapter.agg})"
        c_i, null_c_i = embed_references(sd, adapter, references)
        c_i = c_i.expand(args.n, -1, -1)
    c_t = sd.encode_prompts([prompt]).expand(args.n, -1, -1)
    null_c_t = sd.encode_prompts([args.negative])
    sd.text_encoder = sd.image_encoder = None  # no longer needed: room for pictures
    w = choose_guidance(args.guidance, args.model)

    # From noise to pictures.
    check_writable(args.out.parent)  # before the work, not after it
    stopwatch = Stopwatch(sd.unet, device, count_steps=args.benchmark)
    prepare_unet(sd.unet, device, precision, args.compile)
    try:
        images = generate(sd, c_t, null_c_t, c_i, null_c_i, w, args.lam, args.steps,
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
