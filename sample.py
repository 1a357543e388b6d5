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
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import ImageOps
from torch import nn

from aggregators import AGGREGATORS, fit_references
from data import ToyFaces, digest, load_image, save_grid, to_images, to_tensor
from dreambooth import load_lora
from ip_adapter import IPAdapter, generate, read_adapter
from train import ADAPTER, DTYPE, TINY, beside, is_large, peak_memory, pick_device, pick_precision, run
from unet import StableDiffusion, UNet, build, read_json, write_whole


def find_adapter(model, path):
    """--adapter, else (for the tiny model) the newest run's, else the one shipped beside the model, else None."""
    runs = sorted(Path("runs").glob("*/ip-adapter.safetensors"), key=lambda p: p.stat().st_mtime)
    if path is None and runs and Path(model).resolve() == TINY.resolve():
        unet = digest(build(UNet, read_json(TINY / "unet/config.json"), TINY / "unet"))   # in float32, as in training
        for run_ in reversed(runs):
            if read_adapter(run_)[1].get("base", "").startswith(unet):
                return run_
    shipped = Path(model) / ADAPTER
    return path or (shipped if shipped.is_file() else None)


def unseen_person(seed, size):
    """Nine photos and the tenth's prompt of a toy person that no adapter was trained on."""
    person = ToyFaces(100, size=size, seed=2).people[seed % 100]   # train.dataset holds them out
    print(f"references: {person.name}, photos 1 to 9; give your own with --refs")
    return [photo.image for photo in person.photos[:9]], person.photos[9].prompt


@torch.inference_mode()
def image_tokens(sd, adapter, images):
    """Reference pictures -> c_i (1, M·4, D) and the tokens of the dropped image condition, the same shape."""
    embeds = sd.embed_images(images)[None]   # (1, N, E)
    if adapter.agg == "selfattn":
        embeds = fit_references(embeds, 9, torch.Generator().manual_seed(0))
    return adapter.tokens(embeds), adapter.tokens(torch.zeros_like(embeds))


PACKED = []   # for every packed layer its operation and what that wants after x; here until the program ends


@torch.library.custom_op("sample::packed", mutates_args=())
def packed(x: torch.Tensor, number: int) -> torch.Tensor:
    """The layer PACKED[number] of x; one operation to torch.compile, which cannot look into packed weights."""
    operation, weight, bias, how = PACKED[number]
    return operation(x, weight, bias, *how, "none", [], "")


@packed.register_fake
def _(x, number):
    _, weight, _, how = PACKED[number]
    if not how:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    h, w = (-(-side // how[1][0]) for side in x.shape[2:])   # how[1]: the stride; half, rounded up
    return x.new_empty(len(x), weight.shape[0], h, w).to(memory_format=torch.channels_last)


@torch.no_grad()
def pack(unet):
    """Bring weights into the order that the CPU's kernels read, once; PyTorch does it anew at every step.

    In float32 it halves the time of Stable Diffusion's deep convolutions. Private functions, as torch.compile calls them.
    """
    onednn, available = torch.ops.mkldnn, torch.backends.mkldnn.is_available()   # not on macOS
    for name, layer in unet.named_modules() if available else ():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            how, operation = (layer.padding, layer.stride, layer.dilation, layer.groups), onednn._convolution_pointwise
            weight = onednn._reorder_convolution_weight(layer.weight, *how, [])
        elif isinstance(layer, nn.Linear) and "proj_" not in name:   # Transformer2D.project reads those itself
            how, operation, weight = (), onednn._linear_pointwise, onednn._reorder_linear_weight(layer.weight)
        else:
            continue
        PACKED.append((operation, weight, layer.bias, how))
        layer.forward, layer.weight = partial(packed, number=len(PACKED) - 1), None   # the old order is freed


def compile_blocks(unet):
    """torch.compile, block by block: what lies between the packed layers becomes a few loops."""
    blocks = *unet.down_blocks, unet.mid_block, *unet.up_blocks
    torch._dynamo.config.recompile_limit = 2 * len(blocks)   # all are forms of one function; by default, 8 are allowed
    for block in blocks:
        block.forward = torch.compile(block.forward, dynamic=False)   # or the second would share the first one's shapes


def prepare(unet, device, precision, compiled=False):
    """What is done to a UNet once, so that every step is faster. compiled: --compile."""
    if is_large(unet) and device.type == "cpu" and precision in ("fp32", pick_precision("auto", device)):
        pack(unet)   # a small one's weights stay in the caches
    if compiled:
        compile_blocks(unet)


def save_pictures(folder, images):
    """(B, 3, H, W) in [−1, 1] -> folder/000.png, 001.png, … instead of those of an older run: for metrics.py."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9][0-9][0-9]*.png"):
        old.unlink()
    for k, image in enumerate(to_images(images)):
        write_whole(folder / f"{k:03d}.png", lambda part: image.save(part, "PNG"))


def now(device):
    """Seconds on the clock, read when `device` has finished what it was given."""
    getattr(torch, device.type).synchronize()
    return time.perf_counter()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default=str(TINY), help="checkpoint folder, single file or hub id")
    parser.add_argument("--image-encoder", help="folder or hub id of the CLIP image encoder, if not in --model")
    parser.add_argument("--adapter", type=Path, help="adapter file (default: the newest in runs/, or the shipped one)")
    parser.add_argument("--refs", type=Path, nargs="+", help="photos of one person (default: an unseen toy person)")
    parser.add_argument("--agg", choices=list(AGGREGATORS), help="use the adapter's weights with another aggregator")
    parser.add_argument("--lora", type=Path, help="LoRA file to merge into the UNet, ours or diffusers'")
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
    parser.add_argument("--compile", action="store_true", help="compile the UNet first: a minute and, on CPUs, a C++ compiler")
    parser.add_argument("--benchmark", action="store_true", help="print warm-up, seconds a step and peak memory in GB")
    parser.add_argument("--out", type=Path, default=Path("runs/sample.png"), help="picture to write")
    args = parser.parse_args()
    if args.n < 1:
        raise ValueError(f"--n {args.n}: at least one picture")
    if not 1 <= args.steps <= 1000:
        raise ValueError(f"--steps {args.steps}: from 1 to 1000")
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder: name the picture to write")
    if args.benchmark and args.steps == 1:
        raise ValueError("--benchmark with --steps 1: the first step only warms up, give it more")
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)

    path, references, prompt = find_adapter(args.model, args.adapter), [], args.prompt
    dtype = torch.float32 if args.lora else DTYPE[precision]
    sd = StableDiffusion.load(args.model, device, dtype, args.image_encoder or path and beside(path))
    if args.lora:   # merged in float32: in half precision small updates would round away
        load_lora(args.lora, sd)
        for network in filter(None, (sd.unet, sd.vae, sd.text_encoder, sd.image_encoder)):
            network.to(DTYPE[precision])
    if device.type == "cuda":   # as its convolutions like it; on CPUs `pack` brings weights into their order
        for network in (sd.unet, sd.vae):
            network.to(memory_format=torch.channels_last)
    if args.refs:
        references = [load_image(p) for p in args.refs]
    elif path and Path(args.model).resolve() == TINY.resolve() and not args.lora:
        references, scene = unseen_person(args.seed, sd.image_size)
        prompt = scene if prompt is None else prompt
    if (args.adapter or args.agg) and not references:
        raise ValueError("--adapter and --agg are for reference photos: name some with --refs")
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
    began, times = now(device), []   # at which each step ended
    prepare(sd.unet, device, precision, args.compile)
    if args.benchmark:
        sd.unet.register_forward_hook(lambda *_: times.append(now(device)))
    try:
        images = generate(sd, c_t, null_c_t, c_i, null_c_i, args.guidance, args.lam, args.steps, args.sampler, args.seed,
                          progress=True)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ValueError(f"--compile: {str(error).splitlines()[0]}") from None
    seconds = now(device) - began

    shown = [to_tensor([ImageOps.fit(i, (images.shape[-1],) * 2)])[0] for i in references]
    rows = [shown[i:i + 9] for i in range(0, len(shown), 9)] + [list(images[i:i + 9]) for i in range(0, args.n, 9)]
    captions = ["references"] * bool(shown) + [""] * ((len(shown) - 1) // 9) + [prompt] + [""] * ((args.n - 1) // 9)
    save_grid(args.out, rows, captions=captions, side=min(max(images.shape[-1], 128), 256))
    folder = args.out.parent / f"{args.out.stem}_pictures"
    save_pictures(folder, images)
    print(f"{f'{path} ({adapter.agg})' if references else 'text only'}: \"{prompt}\", {args.n} pictures in "
          f"{seconds:.1f} s\nwrote {args.out}, and each picture by itself to {folder}/")
    if args.benchmark:
        print(f"warm-up (to the end of the first step) {times[0] - began:.3f} s, then {np.median(np.diff(times)):.4f} s a step "
              f"(median), peak memory {peak_memory(device):.2f} GB, on {device} in {precision}")


if __name__ == "__main__":
    run(main)
