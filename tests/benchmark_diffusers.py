"""The UNet of Stable Diffusion 1.5 side by side with diffusers: the same random weights, noise, prompts and steps.

    python tests/benchmark_diffusers.py                  needs Linux, diffusers, accelerate, g++, 5 GB of disk
    python tests/benchmark_diffusers.py --write FOLDER   a checkpoint and an adapter of published sizes, 7 GB, for

    python train.py --agg selfattn --model FOLDER --init FOLDER/ip-adapter_sd15.safetensors --data PHOTOS \\
        --steps 2 --batch 1 --checkpointing              a dry run of the training at full size; prints its peak memory

One picture of 256 × 256 pixels, DDIM with guidance (two branches), text embeddings given, no VAE. Each contender runs
in a process of its own, so the peak of resident memory (mapped weights included) is its own; they take turns, and the
medians over the rounds are printed. Loading, packing, compiling and a short run are the warm-up. --tiny tries it all quickly.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from ddpm import Schedule  # noqa: E402
from unet import SD15, AutoencoderKL, StableDiffusion, UNet, build, read_json, write_json  # noqa: E402

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}
TINY = dict(block_out_channels=[32, 64, 64, 64], cross_attention_dim=48, norm_num_groups=8, attention_head_dim=2)


def fill(kind, *config, **settings):
    """A `kind` of network with matrices ~ N(0, 1/inputs), biases 0 and norms 1: activations of a natural size."""
    with torch.device("meta"):
        net = kind(*config, **settings)
    generator = torch.Generator().manual_seed(0)
    for name, p in net.to_empty(device="cpu").named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5, generator=generator)
        else:
            torch.nn.init.constant_(p, float(name.endswith("weight")))
    return net.requires_grad_(False)


def write_unets(folder, config):
    """FOLDER/fp32/unet and FOLDER/bf16/unet, each as published; returns the floating-point operations of one step."""
    from torch.utils.flop_counter import FlopCounterMode

    unet = fill(UNet, **config)
    print(f"{sum(p.numel() for p in unet.parameters()):,} parameters")
    for name, dtype in DTYPE.items():
        write_json(folder / name / "unet/config.json", unet.config)
        tensors = {key: p.to(dtype) for key, p in unet.state_dict().items()}
        save_file(tensors, folder / name / "unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    x_t, (c_t, null_c_t) = torch.empty(2, 4, 32, 32, device="meta"), inputs(unet.config, torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet.to("meta")(x_t, torch.empty(2, device="meta"), torch.cat([c_t, null_c_t]).to("meta"))
    return counter.get_total_flops()


def write_checkpoint(folder, config, tiny):
    """A checkpoint in the layout of Stable Diffusion 1.5 and the files of IP-Adapter, all random: for the dry run."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    from ip_adapter import IPAdapter
    from train import tokenizer_of

    text = CLIPTextConfig(**SD15["text_encoder"], projection_dim=768)
    vision = CLIPVisionConfig(image_size=224, patch_size=14, hidden_size=1280, intermediate_size=5120,
                              hidden_act="gelu", num_hidden_layers=32, num_attention_heads=16,
                              projection_dim=1024)   # OpenCLIP's ViT-H
    vae = dict(block_out_channels=[8, 8, 8, 8], norm_num_groups=4) if tiny else {}
    if tiny:
        for clip in (text, vision):
            clip.update(dict(hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2))
    networks = fill(UNet, **config), fill(AutoencoderKL, **vae), fill(CLIPTextModel, text)
    tokenizer = tokenizer_of(["a photo of a person"], window=77)
    StableDiffusion(*networks, tokenizer, fill(CLIPVisionModelWithProjection, vision)).save(folder, torch.float32)
    adapter = IPAdapter(networks[0], 1024, attach=False)
    adapter.save(folder / "ip-adapter_sd15.safetensors")
    print(f"wrote {folder}; {sum(p.numel() for p in adapter.parameters()):,} parameters in the adapter")


def inputs(config, dtype):
    """The prompt's tokens c_t (1, 77, D) and the empty prompt's."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 1, 77, config["cross_attention_dim"], generator=generator).to(dtype)


def diffusers_sampler(folder, dtype):
    """Its pipeline and its DDIM scheduler, as its users call them."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype, low_cpu_mem_usage=True)
    settings = {key: value for key, value in SD15["scheduler"].items() if key != "_class_name"}
    pipeline = StableDiffusionPipeline(None, None, None, unet, DDIMScheduler(**settings), None, None,
                                       requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    c_t, null_c_t = inputs(unet.config, dtype)
    x_T = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).to(dtype)   # as ip_adapter.generate
    return unet, lambda steps: pipeline(
        prompt_embeds=c_t, negative_prompt_embeds=null_c_t, latents=x_T, height=256, width=256, guidance_scale=7.5,
        num_inference_steps=steps, output_type="latent").images


def our_sampler(folder, dtype, compiled):
    """What sample.py does: load, prepare the UNet, generate; but for the VAE."""
    from ip_adapter import generate
    from sample import prepare

    unet = build(UNet, read_json(folder / "unet/config.json"), folder / "unet", dtype=dtype)
    prepare(unet, torch.device("cpu"), {dtype: name for name, dtype in DTYPE.items()}[dtype], compiled)
    sd = SimpleNamespace(unet=unet, schedule=Schedule.stable_diffusion(), decode_latents=lambda z: z)
    c_t, null_c_t = inputs(unet.config, dtype)
    return unet, lambda steps: generate(sd, c_t, null_c_t, w=7.5, steps=steps, sampler="ddim")


def contend(name, folder, dtype, steps):
    """Run in its own process: print what was measured and keep the latents."""
    start = time.perf_counter()
    if name == "diffusers":
        unet, sampler = diffusers_sampler(folder, dtype)
    else:
        unet, sampler = our_sampler(folder, dtype, "compile" in name)
    sampler(2)
    times = [time.perf_counter()]
    unet.register_forward_hook(lambda *_: times.append(time.perf_counter()))
    z = sampler(steps)
    seconds = [after - before for before, after in zip(times, times[1:])]
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9   # of this process
    save_file({"z": z.float().contiguous()}, folder / f"{name}.safetensors")
    print(json.dumps(dict(warm_up=times[0] - start, step=statistics.median(seconds), peak=peak)))


def matmul_peak(dtype, n=2048):
    """The fastest of some multiplications of n × n matrices, in GFLOP/s."""
    a, b, seconds = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype), []
    for _ in range(15):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds) / 1e9


def compete(folder, args, config):
    """Rounds of all contenders, each round in another order; prints the table, and whether time and memory meet
    what the project promises. True if the pictures agree."""
    flops, environment = write_unets(folder, config), {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    contenders = [(name, p) for p in args.precision for name in ("diffusers", "ours", "ours --compile")]
    results, peak = {c: [] for c in contenders}, {p: 0 for p in args.precision}
    for k in range(args.repeats):
        peak = {p: max(peak[p], matmul_peak(DTYPE[p])) for p in args.precision}
        for name, p in contenders[k % len(contenders):] + contenders[:k % len(contenders)]:
            command = [sys.executable, __file__, "--run", name, "--folder", str(folder / p), "--precision", p]
            answer = subprocess.run([*command, "--steps", str(args.steps)], check=True, env=environment,
                                    stdout=subprocess.PIPE)
            results[name, p].append(json.loads(answer.stdout.splitlines()[-1]))
            print(f"round {k + 1}: {name}, {p}: {results[name, p][-1]}", file=sys.stderr, flush=True)
    z = {(name, p): load_file(folder / p / f"{name}.safetensors")["z"] for name, p in contenders}
    truth, off, ratios = z["diffusers", args.precision[0]], {}, {}
    print("| contender | precision | s per step | ratio | peak GB | ratio | GFLOP/s | matmul GFLOP/s | warm-up s "
          f"| off diffusers {args.precision[0]} |\n|{'---|' * 10}")
    for name, p in contenders:
        step, memory = (statistics.median(r[key] for r in results[name, p]) for key in ("step", "peak"))
        warm_up = max(r["warm_up"] for r in results[name, p])   # the first round's, of an empty cache
        base, base_memory = (statistics.median(r[key] for r in results["diffusers", p]) for key in ("step", "peak"))
        ratios[name, p] = step / base, memory / base_memory
        off[name, p] = ((z[name, p] - truth).norm() / truth.norm()).item()
        print(f"| {name} | {p} | {step:.3f} | {step / base:.2f} | {memory:.2f} | {memory / base_memory:.2f} "
              f"| {flops / step / 1e9:.0f} | {peak[p]:.0f} | {warm_up:.1f} | {off[name, p]:.1e} |")
    print(f"{flops / 1e9:.0f} GFLOP a step, {args.steps} steps, {args.repeats} rounds, "
          f"{torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    for name, p in contenders:
        if name != "diffusers":
            step, memory = ratios[name, p]
            verdicts = [f"{what} {value:.2f} {'meets' if value <= most else 'MISSES'} {most}" for what, value, most in (
                ("time", step, 0.65 if "compile" in name else 0.95), ("memory", memory, 1.0))]
            print(f"{name}, {p}: {', '.join(verdicts)}")
    return all(off[name, p] <= max(1e-3, 1.5 * off["diffusers", p]) for name, p in contenders)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="only write a checkpoint and an adapter")
    parser.add_argument("--tiny", action="store_true", help="a small UNet: to try the program, not to measure")
    parser.add_argument("--size", type=int, default=256, help="side in pixels of the pictures of --write")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--steps", type=int, default=10, help="DDIM steps")
    parser.add_argument("--precision", choices=DTYPE, nargs="+", default=list(DTYPE))
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = {**(TINY if args.tiny else {}), "sample_size": args.size // 8}
    if args.run:
        contend(args.run, args.folder, DTYPE[args.precision[0]], args.steps)
    elif args.write:
        write_checkpoint(args.write, config, args.tiny)
    else:
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(not compete(Path(folder), args, config))
