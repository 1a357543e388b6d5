"""Sampling: reference photos and a prompt in, a picture grid out (paper, sections 3.1.3, 3.3 and 3.5).

    ε̂ = w·ε_θ(x_t, c, t) + (1−w)·ε_θ(x_t, t)                             (11)   --guidance is w
    Z = Attention(Q, K, V) + λ·Attention(Q, K', V')                       (3)    --lam is λ

    python sample.py                                  an unseen person of the toy world, nine photos
    python sample.py --refs me/*.jpg --prompt "a photo of a smiling person wearing a hat"
    python sample.py --model runs/dreambooth --prompt "a photo of sks person"      no references: text only

Self-attention was trained on nine references: of more, the first nine are used, fewer are bootstrapped.
"""

import argparse
import time
from pathlib import Path

import torch
from PIL import ImageOps

from aggregators import AGGREGATORS, fit_references
from data import ToyFaces, load_image, save_grid, split, to_tensor
from dreambooth import load_lora
from ip_adapter import IPAdapter, generate
from train import ADAPTER, TINY, pick_device, pick_precision, run
from unet import StableDiffusion

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def find_adapter(model, path):
    """--adapter, else (for the tiny model) the newest run's, else the one shipped beside the model, else None."""
    runs = sorted(Path("runs").glob("*/ip-adapter.safetensors"), key=lambda p: p.stat().st_mtime)
    if path is None and runs and Path(model).resolve() == TINY.resolve():
        return runs[-1]
    shipped = Path(model) / ADAPTER
    return path or (shipped if shipped.is_file() else None)


def unseen_person(seed, size):
    """Nine photos and the tenth's prompt of a toy person that no adapter was trained on."""
    _, people = split(ToyFaces(1200, seed=1, size=size).people)
    person = people[seed % len(people)]
    print(f"references: {person.name}, photos 1 to 9; give your own with --refs")
    return [photo.image for photo in person.photos[:9]], person.photos[9].prompt


@torch.inference_mode()
def image_tokens(sd, adapter, images):
    """Reference pictures -> c_i (1, M·4, D) and the tokens of the dropped image condition, the same shape."""
    embeds = sd.embed_images(images)[None]   # (1, N, E)
    if adapter.agg == "selfattn":
        embeds = fit_references(embeds, 9, torch.Generator().manual_seed(0))
    return adapter.tokens(embeds), adapter.tokens(torch.zeros_like(embeds))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=str(TINY), help="checkpoint folder, single file or hub id")
    parser.add_argument("--image-encoder", help="folder or hub id of the CLIP image encoder, if --model has none (h94/IP-Adapter)")
    parser.add_argument("--adapter", type=Path, help="adapter file (default: the newest in runs/, or the shipped one)")
    parser.add_argument("--refs", type=Path, nargs="+", help="reference photos of one person (default: an unseen toy person)")
    parser.add_argument("--agg", choices=list(AGGREGATORS), help="use the adapter's weights with another aggregator")
    parser.add_argument("--lora", type=Path, help="LoRA file to merge into the UNet, of --method dreambooth or diffusers")
    parser.add_argument("--prompt", help="what to show (default: the scene of the person's tenth photo)")
    parser.add_argument("--negative", default="", help="what not to show")
    parser.add_argument("--lam", type=float, default=1.0, help="weight λ of the references; 0 is text only")
    parser.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance w; 1 is none")
    parser.add_argument("--sampler", choices=["ddpm", "ddim", "dpm"], default="dpm", help="reverse process")
    parser.add_argument("--steps", type=int, default=30, help="UNet evaluations, 1 to 1000")
    parser.add_argument("--n", type=int, default=6, help="pictures to make")
    parser.add_argument("--seed", type=int, default=0, help="decides every random number; picture k uses seed + k")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of the weights")
    parser.add_argument("--out", type=Path, default=Path("runs/sample.png"), help="picture to write")
    args = parser.parse_args()
    if args.n < 1:
        raise ValueError(f"--n {args.n}: at least one picture")
    if not 1 <= args.steps <= 1000:
        raise ValueError(f"--steps {args.steps}: from 1 to 1000")
    device = pick_device(args.device)
    dtype = DTYPE[pick_precision(args.precision, device)]

    sd = StableDiffusion.load(args.model, device, dtype, args.image_encoder)
    if args.lora:
        load_lora(args.lora, sd)
    path, references, prompt = find_adapter(args.model, args.adapter), [], args.prompt
    if args.refs:
        references = [load_image(p) for p in args.refs]
    elif path and Path(args.model).resolve() == TINY.resolve() and not args.lora:
        references, scene = unseen_person(args.seed, sd.image_size)
        prompt = prompt or scene
    if prompt is None:
        raise ValueError("no prompt: say what to show with --prompt")
    if references and path is None:
        raise ValueError(f"{args.model} comes without an adapter: name one with --adapter")

    c_i = null_c_i = None
    if references:
        adapter = IPAdapter.load(path, sd.unet, args.agg)
        c_i, null_c_i = image_tokens(sd, adapter, references)
        c_i = c_i.expand(args.n, -1, -1)
    c_t, null_c_t = sd.encode_prompts([prompt]).expand(args.n, -1, -1), sd.encode_prompts([args.negative])
    args.out.parent.mkdir(parents=True, exist_ok=True)   # before the work, not after it
    began = time.perf_counter()
    images = generate(sd, c_t, null_c_t, c_i, null_c_i, args.guidance, args.lam, args.steps, args.sampler, args.seed, True)
    seconds = time.perf_counter() - began

    shown = [to_tensor([ImageOps.fit(i, (images.shape[-1],) * 2)])[0] for i in references]
    rows = [shown[i:i + 9] for i in range(0, len(shown), 9)] + [list(images[i:i + 9]) for i in range(0, args.n, 9)]
    captions = ["references"] * bool(shown) + [""] * ((len(shown) - 1) // 9) + [prompt] + [""] * ((args.n - 1) // 9)
    save_grid(args.out, rows, captions=captions)
    print(f"{f'{path} ({adapter.agg})' if references else 'text only'}: \"{prompt}\", {args.n} pictures in {seconds:.1f} s\n"
          f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
