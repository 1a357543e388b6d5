"""The UNet of Stable Diffusion 1.5 side by side with diffusers, on a CPU.

    python -m experiments.benchmark_diffusers                  needs Linux, diffusers, accelerate,
                                                               5 GB of disk
    python -m experiments.benchmark_diffusers --tiny           to try the program, not to measure

Both get the same random weights, noise, text embeddings and steps: one picture of 256 × 256 pixels,
DDIM with guidance (two branches), no VAE. Each contender runs in a process of its own, so the peak
of resident memory (mapped weights included) is its own. They take turns. Of each the fastest step
of all rounds is printed: other programs can only make a step slower. Loading, packing and a run of
two steps are the warm-up. "of the rate" is the share of this machine's highest matrix rate that
the step reaches, see `measure_rate`. Exit code 1 if the results differ by more than rounding
explains.

    python -m experiments.benchmark_diffusers --write FOLDER   a checkpoint and an adapter of
                                                               published sizes, 7 GB
    python train.py --agg selfattn --model FOLDER --init FOLDER/ip-adapter_sd15.safetensors \\
        --data PHOTOS --steps 2 --batch 1 --checkpointing

is a dry run of the training at full size; it prints its peak memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from torch import nn

from ddpm import Schedule
from ip_adapter import IPAdapter, draw_noise, generate
from support.checkpoints import SINGLE_FILE, load_network
from support.devices import DTYPE
from support.fast_cpu import pack, prepare_unet
from support.files import read_json, save_tensors, write_json
from support.program import make_parser, run
from unet import AutoencoderKL, StableDiffusion, UNet

CONTENDERS = ("diffusers", "ours")
PRECISIONS = ("fp32", "bf16")
MOST_TIME = 0.95  # the aim: seconds a step over diffusers'
MOST_MEMORY = 1.0  # the aim: peak memory over diffusers'
MATRICES = (1024, 2048)  # sides; these layers show how fast this machine can be
CONVOLUTIONS = ((320, 32), (640, 16), (640, 32), (1280, 16))  # channels, side of the picture
SMALL_UNET = dict(  # of --tiny
    block_out_channels=[32, 64, 64, 64],
    cross_attention_dim=48,
    norm_num_groups=8,
    attention_head_dim=2,
)
SMALL_VAE = dict(block_out_channels=[8, 8, 8, 8], norm_num_groups=4)
SMALL_CLIP = dict(
    hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
)
VIT_H = dict(  # OpenCLIP's ViT-H, the image encoder of ip-adapter_sd15
    image_size=224,
    patch_size=14,
    hidden_size=1280,
    intermediate_size=5120,
    hidden_act="gelu",
    num_hidden_layers=32,
    num_attention_heads=16,
    projection_dim=1024,
)


# ---------------------------------------------------------------- random weights


def make_random(make):
    """The network that make() returns, with random weights and activations of a natural size.

    Matrices and kernels are N(0, 1/inputs), biases 0, the weights of norms 1.
    """
    with torch.device("meta"):  # without numbers: they would be drawn twice
        network = make()
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, weight in network.named_parameters():
        if weight.ndim > 1:
            inputs = weight[0].numel()
            nn.init.normal_(weight, std=inputs**-0.5, generator=generator)
        elif name.endswith("weight"):
            nn.init.ones_(weight)
        else:
            nn.init.zeros_(weight)
    return network.requires_grad_(False)


def draw_text(width, dtype):
    """Text embeddings of a prompt and of the empty one: c_t, null_c_t, (1, 77, width) each."""
    generator = torch.Generator().manual_seed(1)
    c_t, null_c_t = torch.randn(2, 1, 77, width, generator=generator).to(dtype)
    return c_t, null_c_t


def count_flops(unet):
    """Floating-point operations of one step: one latent, two branches. Moves `unet` to "meta"."""
    from torch.utils.flop_counter import FlopCounterMode  # here: contenders need no memory for it

    unet.to("meta")
    x_t = torch.empty(2, 4, 32, 32, device="meta")
    t = torch.empty(2, device="meta")
    c_t = torch.empty(2, 77, unet.config["cross_attention_dim"], device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x_t, t, c_t)
    return counter.get_total_flops()


def write_unets(folder, config, precisions):
    """folder/<precision>/unet, as published, for each precision. Returns the FLOP of one step."""
    unet = make_random(lambda: UNet(**config))
    print(f"{sum(weight.numel() for weight in unet.parameters()):,} parameters")
    for precision in precisions:
        part = folder / precision / "unet"
        write_json(part / "config.json", unet.config)
        tensors = {}
        for name, weight in unet.state_dict().items():
            tensors[name] = weight.to(DTYPE[precision])
        path = part / "diffusion_pytorch_model.safetensors"
        save_tensors(path, tensors, {"format": "pt"})
    return count_flops(unet)


def write_checkpoint(folder, config, tiny):
    """Stable Diffusion 1.5 and an IP-Adapter in the published layout, all random."""
    from transformers import CLIPTextConfig, CLIPTextModel  # here: they take seconds to import
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from experiments.base_networks import make_tokenizer

    # Settings: those of Stable Diffusion 1.5 and of IP-Adapter, some made smaller for --tiny.
    small_clip = SMALL_CLIP if tiny else {}
    text_config = {**SINGLE_FILE["text_encoder"], "projection_dim": 768, **small_clip}
    text_config = CLIPTextConfig(**text_config)
    vision_config = CLIPVisionConfig(**{**VIT_H, **small_clip})
    vae_config = SMALL_VAE if tiny else {}

    # The checkpoint.
    unet = make_random(lambda: UNet(**config))
    vae = make_random(lambda: AutoencoderKL(**vae_config))
    text_encoder = make_random(lambda: CLIPTextModel(text_config))
    image_encoder = make_random(lambda: CLIPVisionModelWithProjection(vision_config))
    tokenizer = make_tokenizer(["a photo of a person"], window=77)
    sd = StableDiffusion(unet, vae, text_encoder, tokenizer, image_encoder)
    sd.save(folder, torch.float32)

    # The adapter: W'_k and W'_v are copies of W_k and W_v, the projection is random.
    torch.manual_seed(0)
    adapter = IPAdapter(unet, VIT_H["projection_dim"], attach=False)
    adapter.save(folder / "ip-adapter_sd15.safetensors")
    numbers = sum(weight.numel() for weight in adapter.parameters())
    print(f"wrote {folder}; {numbers:,} parameters in the adapter")


# ---------------------------------------------------------------- one contender, in its own process


def load_diffusers(folder, dtype):
    """Its UNet, and its pipeline with DDIM as users call it: a function of the number of steps."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(
        folder / "unet", torch_dtype=dtype, low_cpu_mem_usage=True
    )
    # A pipeline without the networks that are not measured.
    settings = dict(SINGLE_FILE["scheduler"])
    del settings["_class_name"]
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(**settings),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    c_t, null_c_t = draw_text(unet.config["cross_attention_dim"], dtype)
    x_T = draw_noise(unet, [0]).to(dtype)  # as `generate` draws it

    def make(steps):
        return pipeline(
            prompt_embeds=c_t,
            negative_prompt_embeds=null_c_t,
            latents=x_T,
            height=256,
            width=256,
            guidance_scale=7.5,
            num_inference_steps=steps,
            output_type="latent",
        ).images

    return unet, make


def load_ours(folder, precision):
    """The same of ours, as sample.py does it: load, prepare the UNet, generate; but for the VAE."""
    dtype = DTYPE[precision]
    config = read_json(folder / "unet" / "config.json")
    unet = load_network(lambda config: UNet(**config), config, folder / "unet", dtype=dtype)
    prepare_unet(unet, torch.device("cpu"), precision)
    sd = SimpleNamespace(
        unet=unet, schedule=Schedule.stable_diffusion(), decode_latents=lambda z: z
    )
    c_t, null_c_t = draw_text(unet.config["cross_attention_dim"], dtype)

    def make(steps):
        return generate(sd, c_t, null_c_t, w=7.5, steps=steps, sampler="ddim")

    return unet, make


def read_peak_memory():
    """The most memory that this process has held, in GB of 10⁹ bytes, as Linux says it."""
    status = Path("/proc/self/status").read_text()
    line = status.split("VmHWM:")[1]
    return int(line.split()[0]) * 1024 / 1e9


def contend(name, folder, precision, steps):
    """Keep the latents in the folder; print warm-up, seconds a step (fastest), peak memory."""
    start = time.perf_counter()
    if name == "diffusers":
        unet, make = load_diffusers(folder, DTYPE[precision])
    else:
        unet, make = load_ours(folder, precision)
    make(2)

    # Time of each step: the UNet is called once a step, on both branches at once.
    ends = [time.perf_counter()]  # of the warm-up, then of each step
    unet.register_forward_hook(lambda *_: ends.append(time.perf_counter()))
    z = make(steps)
    seconds = [after - before for before, after in zip(ends, ends[1:])]

    # What the parent process reads: latents from a file, numbers from the last line printed.
    save_tensors(folder / f"{name}.safetensors", {"z": z.float()})
    warm_up = ends[0] - start
    step = min(seconds)
    print(json.dumps({"warm_up": warm_up, "step": step, "peak": read_peak_memory()}))


# ---------------------------------------------------------------- all contenders in turn


def make_probes(precision):
    """Layers that show what this machine's matrix units can do: a list of (function, its FLOP).

    As large as the UNet's, and packed like the UNet's: PyTorch's plain matrix product comes from
    another library, which may be far from the best here.
    """
    dtype = DTYPE[precision]
    probes = []

    def add_layer(layer, x):
        layer = nn.Sequential(layer.to(dtype).requires_grad_(False))
        positions = x.numel() // x.shape[1]  # rows of a matrix, or pixels
        flop = 2 * layer[0].weight.numel() * positions
        pack(layer)
        probes.append((partial(layer, x), flop))

    for n in MATRICES:
        a, b = torch.randn(2, n, n).to(dtype)
        probes.append((partial(torch.matmul, a, b), 2 * n**3))
        add_layer(nn.Linear(n, n), a)
    for channels, side in CONVOLUTIONS:
        x = torch.randn(2, channels, side, side).to(dtype, memory_format=torch.channels_last)
        add_layer(nn.Conv2d(channels, channels, 3, padding=1), x)
    return probes


@torch.inference_mode()
def measure_rate(probes, repeats=15):
    """The highest rate of all probes, each in its fastest repeat, in GFLOP/s.

    The UNet is made of such layers and of slower things, so it reaches a share of it below 1.
    """
    best = 0.0
    for function, flop in probes:
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            seconds = time.perf_counter() - start
            best = max(best, flop / seconds / 1e9)
    return best


def start_contender(name, folder, precision, steps):
    """Run `contend` in a process of its own -> what it measured."""
    module = [sys.executable, "-m", "experiments.benchmark_diffusers"]
    words = ["--run", name, "--folder", folder / precision]
    words += ["--precision", precision, "--steps", steps]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    command = module + [str(word) for word in words]
    answer = subprocess.run(command, check=True, env=environment, stdout=subprocess.PIPE)
    return json.loads(answer.stdout.splitlines()[-1])


def run_rounds(folder, precisions, rounds, steps):
    """All contenders in turn, in every round another one first.

    Returns {(contender, precision): list of measurements}, {precision: the machine's GFLOP/s}.
    """
    contenders = [(name, precision) for precision in precisions for name in CONTENDERS]
    results = {contender: [] for contender in contenders}
    rates = {precision: 0.0 for precision in precisions}
    probes = {precision: make_probes(precision) for precision in precisions}
    for k in range(rounds):
        # How fast this machine is just now: other work may slow it down.
        for precision in precisions:
            rates[precision] = max(rates[precision], measure_rate(probes[precision]))
        # Round k begins with contender k.
        first = k % len(contenders)
        for name, precision in contenders[first:] + contenders[:first]:
            result = start_contender(name, folder, precision, steps)
            results[name, precision].append(result)
            line = f"round {k + 1}: {name}, {precision}: {result}"
            print(line, file=sys.stderr, flush=True)
    return results, rates


def measure_differences(folder, contenders, truth):
    """{contender: ‖z − z*‖/‖z*‖}, z* the latents of the contender `truth`."""
    latents = {}
    for name, precision in contenders:
        path = folder / precision / f"{name}.safetensors"
        latents[name, precision] = load_file(path)["z"]
    z = latents[truth]
    return {key: ((other - z).norm() / z.norm()).item() for key, other in latents.items()}


def summarise(results):
    """{contender: fastest step and warm-up, median of memory, and ratios to diffusers}."""
    # Of each contender alone.
    rows = {}
    for contender, rounds in results.items():
        rows[contender] = {
            "step": min(one["step"] for one in rounds),
            "peak": statistics.median(one["peak"] for one in rounds),
            "warm_up": min(one["warm_up"] for one in rounds),
        }
    # Beside diffusers in the same precision.
    for (name, precision), row in rows.items():
        base = rows["diffusers", precision]
        row["time"] = row["step"] / base["step"]
        row["memory"] = row["peak"] / base["peak"]
    return rows


def print_table(rows, differences, rates, flops, truth):
    columns = ["contender", "precision", "s per step", "ratio", "peak GB", "ratio", "GFLOP/s"]
    columns += ["machine's GFLOP/s", "of the rate", "warm-up s", f"off {' '.join(truth)}"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for (name, precision), row in rows.items():
        rate = flops / row["step"] / 1e9
        cells = [
            name,
            precision,
            f"{row['step']:.3f}",
            f"{row['time']:.2f}",
            f"{row['peak']:.2f}",
            f"{row['memory']:.2f}",
            f"{rate:.0f}",
            f"{rates[precision]:.0f}",
            f"{rate / rates[precision]:.2f}",
            f"{row['warm_up']:.1f}",
            f"{differences[name, precision]:.1e}",
        ]
        print(f"| {' | '.join(cells)} |")


def print_verdicts(rows):
    """Whether time and memory are what the project aims at."""
    for (name, precision), row in rows.items():
        if name == "diffusers":
            continue
        verdicts = []
        for what, most in {"time": MOST_TIME, "memory": MOST_MEMORY}.items():
            verdict = "meets" if row[what] <= most else "MISSES"
            verdicts.append(f"{what} {row[what]:.2f} {verdict} {most}")
        print(f"{name}, {precision}: {', '.join(verdicts)}")


def compete(folder, config, precisions, rounds, steps):
    """Measure and print everything. True if the latents of all contenders agree."""
    flops = write_unets(folder, config, precisions)
    results, rates = run_rounds(folder, precisions, rounds, steps)
    rows = summarise(results)
    truth = ("diffusers", precisions[0])
    differences = measure_differences(folder, rows, truth)
    print_table(rows, differences, rates, flops, truth)
    threads = torch.get_num_threads()
    print(f"{flops / 1e9:.0f} GFLOP a step, {steps} steps, {rounds} rounds, {threads} threads, "
          f"PyTorch {torch.__version__}")  # fmt: skip
    print_verdicts(rows)

    # In half precision diffusers' own latents differ from its float32; ours may differ by half as
    # much again.
    for (name, precision), difference in differences.items():
        most = max(1e-3, 1.5 * differences["diffusers", precision])
        if difference > most:
            print(f"{name}, {precision}: latents differ by {difference:.1e}, more than {most:.1e}")
            return False
    return True


# ---------------------------------------------------------------- command line


def parse_arguments():
    parser = make_parser(__doc__)
    parser.ranges["steps"] = (2, 1000)  # the first one only warms up
    add = parser.add_argument
    add("--write", type=Path, metavar="FOLDER", help="only write a checkpoint and an adapter")
    add("--tiny", action="store_true", help="small networks: to try the program, not to measure")
    add("--size", type=int, default=256, help="side in pixels of the pictures of --write")
    add("--repeats", type=int, default=3, help="rounds")
    add("--steps", type=int, default=10, help="DDIM steps")
    add("--precision", choices=PRECISIONS, nargs="+", default=PRECISIONS, help="of the UNet")
    add("--run", help=argparse.SUPPRESS)  # this and the next are for start_contender
    add("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    args = parse_arguments()
    config = dict(SMALL_UNET) if args.tiny else {}
    config["sample_size"] = args.size // 8
    if args.run:
        contend(args.run, args.folder, args.precision[0], args.steps)
    elif args.write:
        write_checkpoint(args.write, config, args.tiny)
    else:
        with tempfile.TemporaryDirectory() as folder:
            agree = compete(Path(folder), config, args.precision, args.repeats, args.steps)
        sys.exit(0 if agree else 1)


if __name__ == "__main__":
    run(main)
