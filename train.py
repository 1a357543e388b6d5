"""Training: one visible loop for the base model, the adapters and DreamBooth (paper, sections 2, 3 and 4).

    L = ‖ε − ε_θ(c_τ, c_i, t, z_t)‖²                                       (1)

    python train.py --agg selfattn             the paper's method: leave-one-out on --data
    python train.py --agg none | avg | max     the same loop with another aggregator
    python train.py --method dreambooth --images DIR --noun man
    python train.py --method base              weights/tiny from scratch, stage after stage

A `Task` says what trains and what its loss is; `fit` is the loop for all of them. Every random number
of step k comes from a generator seeded with (seed, k): a step depends on nothing before it but the
weights and the optimiser, so --resume continues bit for bit.
"""

import argparse
import hashlib
import json
import math
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from aggregators import AGGREGATORS
from data import (ATTRIBUTES, LFW, Features, FeatureNet, ToyFaces, caption_of, digest, fingerprint, leave_one_out,
                  picture_files, pixels, save_grid, split, to_bytes, to_tensor, visible)
from dreambooth import (add_lora, check_identifier, class_images, latents, prior_preservation_loss, prompts,
                        save_lora)
from ip_adapter import IPAdapter, adapter_loss, drop_conditions, generate
from unet import AutoencoderKL, StableDiffusion, UNet, write_whole

TINY = Path(__file__).parent / "weights" / "tiny"
ADAPTER = "ip_adapter/ip-adapter_tiny.safetensors"   # in TINY, beside the model
DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}   # of --precision


@dataclass
class Task:
    """What `fit` trains: all parameters of `module` that require gradients, by `loss(batch, generator)`."""

    name: str
    module: nn.Module
    loss: Callable
    validate: Callable   # () -> float, the same at every call


def fit(task, out, steps, batch, lr, args):
    """Train `task.module`; log to out/<name>.csv, checkpoint to out/<name>.pt every args.every steps.

    AdamW; 100 steps of warm-up times cosine decay to 1 % of lr; gradients clipped to norm 1. Returns the
    log's rows (step, training loss, validation, seconds). ValueError at a loss or gradient that is not finite: the
    checkpoint before it stays; also at --resume with other options than the checkpoint's.
    Ctrl-C finishes the step, writes a checkpoint and raises KeyboardInterrupt.
    """
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, parameters = out / f"{task.name}.pt", [p for p in task.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr, weight_decay=0.01)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.precision == "fp16")
    settings = {name: str(v) for name, v in {**vars(args), "steps": steps, "batch": batch, "lr": lr}.items()
                if name not in ("out", "resume", "every", "device")}
    first, rows, window, spent = 0, [], [], 0.0
    if not args.resume:
        checkpoint.unlink(missing_ok=True)   # an older run's must not be taken for this one's
    elif checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        old = state.get("settings", {})
        if other := [f"--{name} {old.get(name)}, not {new}" for name, new in settings.items() if old.get(name) != new]:
            raise ValueError(f"--resume: {checkpoint} was trained with other options: {', '.join(other)}")
        task.module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        first, rows, window, spent = (state[name] for name in ("step", "rows", "window", "spent"))
        del state   # a second copy of the weights
    began = time.perf_counter() - spent

    def validate(step):
        with torch.inference_mode(), autocast(args):
            rows.append([step, sum(window) / max(1, len(window)), task.validate(), time.perf_counter() - began])
        window.clear()

    def save(step):
        state = dict(module=task.module.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                     step=step, rows=rows, window=window, spent=time.perf_counter() - began, settings=settings)
        write_whole(checkpoint, lambda path: torch.save(state, path))
        lines = ["step,train,validation,seconds"] + [",".join(f"{v:.6g}" for v in row) for row in rows]
        write_whole(out / f"{task.name}.csv", lambda path: path.write_text("\n".join(lines) + "\n"))

    def check(name, value, step):
        if not torch.isfinite(value):
            raise ValueError(f"{task.name}: the {name} is {value.item()} at step {step}; {checkpoint} holds the last good "
                             "state, if there is one. Start again with a smaller --lr or with --precision fp32")

    if first == 0:
        validate(0)
    bar = tqdm(range(first, steps), task.name, initial=first, total=steps, mininterval=1, smoothing=0.05)
    with interruptible() as interrupted:
        for step in bar:
            generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 100) * (0.505 + 0.495 * math.cos(math.pi * step / steps))
            optimizer.zero_grad(set_to_none=True)
            for _ in range(args.accumulate):
                with autocast(args):
                    loss = task.loss(batch, generator) / args.accumulate
                check("loss", loss, step)
                scaler.scale(loss).backward()
                window.append(loss.item() * args.accumulate)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            if not scaler.is_enabled():   # with fp16 the scaler skips such a step itself
                check("gradient", norm, step)
            scaler.step(optimizer)
            scaler.update()
            if (step + 1) % args.every == 0 or step + 1 == steps:
                validate(step + 1)
                bar.set_postfix_str(f"loss {rows[-1][1]:.4f}, validation {rows[-1][2]:.4f}")
            if (step + 1) % args.every == 0 or step + 1 == steps or interrupted():
                save(step + 1)
            if interrupted():
                bar.close()
                raise KeyboardInterrupt(f"stopped at step {step + 1}; the same command with --resume goes on from there")
    return rows


@contextmanager
def interruptible():
    """Inside, Ctrl-C only sets a flag that the loop asks for: no step is cut in half."""
    flag = []
    old = signal.signal(signal.SIGINT, lambda *_: flag.append(True))
    try:
        yield lambda: bool(flag)
    finally:
        signal.signal(signal.SIGINT, old)


def is_large(unet):
    """Whether this is Stable Diffusion's UNet (0.86·10⁹ numbers) rather than the tiny world's (0.004·10⁹)."""
    return sum(p.numel() for p in unet.parameters()) > 1e8


def autocast(args):
    """float32 as it is; bf16 and fp16 under autocast."""
    return nullcontext() if args.precision == "fp32" else torch.autocast(args.device.type, DTYPE[args.precision])


# --------------------------------------------------------------------------- the adapters

def noised_loss(sd, z_0, c_t, c_i, generator):
    """Eq. 1 for one batch: t ~ U{0…T−1} and ε ~ N(0, I) drawn from `generator`."""
    t = torch.randint(len(sd.schedule.beta), (len(z_0),), generator=generator)
    eps = torch.randn(z_0.shape, generator=generator)
    return adapter_loss(sd.unet, z_0, t.to(z_0.device), eps.to(z_0), c_t, c_i, sd.schedule)


def validation_batch(z_0):
    """64 latents of the tiny world, or as many numbers."""
    return max(1, 64 * 16**2 // z_0[0, 0].numel())


def fixed_validation(sd, held, tokens, device, photos=192):
    """() -> eq. 1 on people held out: the same targets, references, prompts, t and ε at every call."""
    batch = validation_batch(held.z_0)
    target, references = leave_one_out(held.groups, photos, torch.Generator().manual_seed(0))

    def validate():
        generator, losses = torch.Generator().manual_seed(1), []
        for i, refs in zip(target.split(batch), references.split(batch)):
            c_t, c_i = held.c_t[held.prompt[i]].to(device), tokens(held.embeds[refs].to(device))
            losses.append(noised_loss(sd, held.z_0[i].to(device), c_t, c_i, generator).item() * len(i))
        return sum(losses) / photos

    return validate


def adapter_task(name, sd, adapter, features, held, device, alone=False):
    """Eq. 1 leave-one-out; `alone`: every photo is its own and only reference, as the original IP-Adapter trains."""
    null_c_t = features.null_c_t.to(device)

    def loss(batch, generator):
        if alone:
            target = torch.randint(len(features.z_0), (batch,), generator=generator)
            references = target[:, None]
        else:
            target, references = leave_one_out(features.groups, batch, generator)
        c_t, embeds = features.c_t[features.prompt[target]].to(device), features.embeds[references].to(device)
        c_t, embeds = drop_conditions(c_t, embeds, null_c_t, 0.05, generator)
        return noised_loss(sd, features.z_0[target].to(device), c_t, adapter.tokens(embeds), generator)

    return Task(name, adapter, loss, fixed_validation(sd, held, adapter.tokens, device))


def dataset(args, size):
    """--data -> (people, cache key) to train on and (people, cache key) held out: never the same person in both."""
    if args.data == "toy":   # seed 0 is the base model's
        people = args.people or 800
        ours, others = ToyFaces(people, size=size, seed=1), ToyFaces(min(people, 100), size=size, seed=2)
        return (ours.people, ours.key), (others.people, others.key)
    lfw = LFW(args.data, size)
    ours, others = split(lfw.people)
    return (ours, lfw.key), (others[:100], lfw.key)


def beside(adapter):
    """The folder of an adapter file if it holds the image encoder too, as h94/IP-Adapter's `models` does, else None."""
    return adapter.parent if (adapter.parent / "image_encoder/config.json").is_file() else None


def train_adapter(args):
    """The paper's section 3.5 (selfattn), and its controls: an adapter trained leave-one-out from --init."""
    out, device = args.out or Path("runs") / args.agg, args.device
    steps, batch, init = args.steps or 400, args.batch or 64, args.init or Path(args.model) / ADAPTER
    if not init.is_file():
        raise ValueError(f"{init}: no such adapter to start from; name one with --init (ip-adapter_sd15.safetensors), or "
                         f"another --model than {args.model}")
    sd = StableDiffusion.load(args.model, device, image_encoder=args.image_encoder or beside(init))
    adapter, lr = IPAdapter.load(init, sd.unet, agg=args.agg), args.lr or (1e-4 if is_large(sd.unet) else 1e-3)
    args.base = f"{digest(sd.unet)} {fingerprint(sd)} {hashlib.sha256(init.read_bytes()).hexdigest()[:16]}"   # for --resume
    out.mkdir(parents=True, exist_ok=True)
    people, others = dataset(args, sd.image_size)
    args.photos = hashlib.sha256(f"{people[1]} {others[1]}".encode()).hexdigest()[:16]
    if not others[0]:
        raise ValueError(f"{args.data}: only one person with two photos; at least one more must be held out for validation")
    with autocast(args):
        features, held = Features(sd, *people), Features(sd, *others)
    vae, sd.vae, sd.text_encoder, sd.image_encoder = sd.vae.cpu(), None, None, None   # their work is cached
    sd.unet.gradient_checkpointing = args.checkpointing
    rows = fit(adapter_task("adapter", sd, adapter, features, held, device), out, steps, batch, lr, args)
    path, settings = out / "ip-adapter.safetensors", dict(
        model=args.model, data=args.data, people=len(features.groups), steps=steps, batch=batch * args.accumulate, lr=lr,
        seed=args.seed, precision=args.precision, init=init, base=args.base)
    adapter.save(path, {name: str(value) for name, value in settings.items()})
    print(f"validation loss {rows[0][2]:.4f} -> {rows[-1][2]:.4f} in {rows[-1][3]:.0f} s\nwrote {path}, {out}/adapter.csv")
    sd.vae = vae.to(device)
    picture(sd, adapter, held, out / "samples.png", args)
    print(f"peak memory {peak_memory(device):.2f} GB")


@torch.inference_mode()
def picture(sd, adapter, held, path, args, people=6):
    """The references of a few held-out people, the removed photo, and what the adapter makes of its prompt."""
    generator, groups = torch.Generator().manual_seed(0), [group for group in held.groups if len(group) > 1][:people]
    target, references = map(torch.cat, zip(*(leave_one_out([group], 1, generator) for group in groups)))
    c_t, c_i = held.c_t[held.prompt[target]].to(args.device), adapter.tokens(held.embeds[references].to(args.device))
    null_c_i = adapter.tokens(torch.zeros_like(held.embeds[references[:1]]).to(args.device))
    with autocast(args):
        made = generate(sd, c_t, held.null_c_t.to(args.device), c_i, null_c_i, seed=args.seed)
        z = held.z_0[torch.cat([references, target[:, None]], 1).flatten()].to(args.device)
        shown = torch.cat([sd.decode_latents(one) for one in z.split(1 if sd.image_size > 128 else 64)]).float()
    rows = [[*r, m] for r, m in zip(shown.unflatten(0, (len(groups), -1)), made)]
    save_grid(path, rows, [f"reference {k + 1}" for k in range(9)] + ["removed", "generated"])
    print(f"wrote {path}")


# --------------------------------------------------------------------------- DreamBooth

DREAMBOOTH = {"steps": 200, "batch": 8, "lr": 1e-3, "class_images": 200}   # unless the command line says otherwise,
LARGE = {"steps": 800, "batch": 1}                                          # and for Stable Diffusion


def dreambooth_task(sd, module, texts, z_0, z_pr, args, draws=64):
    """Section 3.2: each step a batch of photos and, if there are any, as many class pictures."""
    c_t = sd.encode_prompts(texts).float()   # (2, L, D)

    def encode():   # `__wrapped__`: without the no_grad around it
        return (sd.encode_prompts.__wrapped__(sd, texts) if args.train_text_encoder else c_t).split(1)

    def loss(batch, generator):
        i = torch.randint(len(z_0), (batch,), generator=generator)
        j = torch.randint(len(z_pr), (batch,), generator=generator) if len(z_pr) else i[:0]
        t = torch.randint(len(sd.schedule.beta), (len(i) + len(j),), generator=generator)
        eps = torch.randn(len(t), *z_0.shape[1:], generator=generator)
        return prior_preservation_loss(sd.unet, z_0[i], z_pr[j], t.to(z_0.device), eps.to(z_0), *encode(), sd.schedule,
                                       args.prior_weight)

    def validate():   # the first term alone: the same photos, t and ε at every call
        shown, generator, c = z_0[torch.arange(draws) % len(z_0)], torch.Generator().manual_seed(1), encode()[0]
        parts = shown.split(validation_batch(z_0))
        return sum(noised_loss(sd, z, c.expand(len(z), -1, -1), None, generator).item() * len(z) for z in parts) / draws

    return Task("dreambooth", module, loss, validate)


def fine_tune(sd, texts, z_0, z_pr, out, args):
    """Section 3.2 from latents z_0 of photos and z_pr of class pictures (none: plain fine-tuning) -> the rows of `fit`.

    texts: the prompt of the person and that of the class. What trains: sd.unet, or as --lora, --train-text-encoder say.
    """
    for network in (sd.unet, sd.vae, sd.text_encoder):
        network.requires_grad_(False)
    if args.lora is not None:
        module = add_lora(sd.unet, args.lora, generator=torch.Generator().manual_seed(args.seed))
    else:
        module = nn.ModuleDict({"unet": sd.unet, **({"text_encoder": sd.text_encoder} if args.train_text_encoder else {})})
        module.requires_grad_(True)
    sd.unet.gradient_checkpointing = args.checkpointing
    usual = DREAMBOOTH if not is_large(sd.unet) else {**LARGE, "lr": 5e-6 if args.lora is None else 1e-4}
    steps, batch, lr = (getattr(args, name) or usual[name] for name in ("steps", "batch", "lr"))
    task = dreambooth_task(sd, module, texts, z_0, z_pr, args)
    idle = [part for part in (sd.vae, sd.image_encoder, None if args.train_text_encoder else sd.text_encoder) if part]
    for part in idle:   # their work is done: no room for them on a GPU
        part.cpu()
    rows = fit(task, out, steps, batch, lr, args)
    for part in idle:
        part.to(args.device)
    return rows


def train_dreambooth(args):
    """The paper's section 3.2: the UNet (and the text encoder, or only a LoRA) learns one person from a few photos."""
    if not (args.images and args.noun):
        raise ValueError("--method dreambooth needs --images, a folder of photos, and --noun, what they show")
    if args.prior_weight < 0 or args.class_images < 1:
        raise ValueError("--prior-weight cannot be negative, and --class-images must be at least 1")
    if args.lora is not None and (args.lora < 1 or args.train_text_encoder):
        raise ValueError("--lora takes a rank of at least 1, and trains the UNet only: without --train-text-encoder")
    out, files, texts = args.out or Path("runs/dreambooth"), picture_files(args.images), prompts(args.identifier, args.noun)
    sd, generator = StableDiffusion.load(args.model, args.device), torch.Generator().manual_seed(args.seed)
    began, args.base = time.perf_counter(), digest(sd.unet, sd.text_encoder, sd.vae)   # for --resume, and the photos too:
    args.photos = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    check_identifier(sd.tokenizer, args.identifier)
    with autocast(args):
        z_0 = latents(sd, files, generator)
        z_pr = z_0[:0]
        if args.prior_weight:
            z_pr = latents(sd, class_images(sd, texts[1], out, args.class_images, args.seed), generator)
    rows = fine_tune(sd, texts, z_0, z_pr, out, args)
    if args.lora is not None:
        save_lora(sd.unet, out / "pytorch_lora_weights.safetensors")
    else:
        sd.save(out)
    print(f"validation loss {rows[0][2]:.4f} -> {rows[-1][2]:.4f} in {rows[-1][3]:.0f} s, with all pictures "
          f"{time.perf_counter() - began:.0f} s\nwrote {out}{'' if args.lora is None else '/pytorch_lora_weights.safetensors'}, {out}/dreambooth.csv")
    variations(sd, f"{args.identifier} {args.noun}", args.noun, out / "samples.png", args)
    print(f"peak memory {peak_memory(args.device):.2f} GB")


def variations(sd, person, noun, path, args, seeds=4):
    """A column each: the person, the class (what the prior preserved), the person in other scenes; a row each: a seed."""
    columns = {"identity": f"a photo of a {person}", "class": f"a photo of a {noun}",
               "hat": f"a photo of a smiling {person} wearing a hat, green background",
               "sunglasses": f"a photo of a surprised {person} wearing sunglasses, blue background"}
    with autocast(args):
        *c_t, null_c_t = sd.encode_prompts([*columns.values(), ""]).float().split(1)
        made = [generate(sd, c.expand(seeds, -1, -1), null_c_t, seed=args.seed) for c in c_t]
    save_grid(path, [list(row) for row in zip(*made)], list(columns))
    print(f"wrote {path}")


# --------------------------------------------------------------------------- the base model, stage by stage

BASE = {  # stage: steps, batch, learning rate
    "vae": (1500, 32, 2e-3),
    "vae_sharp": (3000, 16, 1e-3),   # more, smaller steps for the same time
    "vae_decoder": (800, 16, 5e-4),  # the latents stay as they are
    "clip": (1000, 192, 1e-3),
    "feature_net": (1600, 64, 1e-3),
    "unet": (3400, 64, 1e-3),
    "ip_adapter": (900, 64, 1e-3),
}


def tokenizer_of(captions, window):
    """A CLIP tokenizer (byte-level BPE, lower case) whose merges come from `captions`."""
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import CLIPTokenizer

    special, letters = ["<|startoftext|>", "<|endoftext|>"], sorted(ByteLevel.alphabet())
    backend = CLIPTokenizer().backend_tokenizer
    backend.train_from_iterator(captions, BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=letters,
                                                     end_of_word_suffix="</w>", show_progress=False))
    merges = [tuple(m) for m in json.loads(backend.to_str())["model"]["merges"]]
    words = letters + [c + "</w>" for c in letters] + ["".join(m) for m in merges] + special   # as in OpenAI's file
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=merges, model_max_length=window)


def tiny_world(captions, device):
    """A StableDiffusion of the tiny scale with random weights: 64 × 64 pixels, latents 4 × 16 × 16."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    vae = AutoencoderKL(
        sample_size=64, block_out_channels=[32, 64, 64], latent_channels=4, layers_per_block=1, norm_num_groups=16,
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        mid_block_add_attention=False)
    tokenizer = tokenizer_of(captions, window=48)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=48, projection_dim=128, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    for name, w in text.named_parameters():   # both N(0, 0.02²): the layers would drown a word that no caption has, such
        if "embedding" in name:               # as DreamBooth's sks; larger, and larger than its position, it stays itself
            w.data *= 15 if "token" in name else 5
    vision = CLIPVisionModelWithProjection(CLIPVisionConfig(
        image_size=64, patch_size=8, hidden_size=160, intermediate_size=640, num_hidden_layers=4, num_attention_heads=5,
        projection_dim=128))
    vision.vision_model.embeddings.position_embedding.weight.data[1:] = 0.5 * sine_positions(8, 160)
    unet = UNet(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=[64, 128], layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16)
    return StableDiffusion(unet.to(device), vae.to(device), text.to(device), tokenizer, vision.to(device))


def sine_positions(side, width):
    """(side², width): sines and cosines of row and column, so that a ViT knows from the start where things are."""
    angles = torch.arange(side)[:, None] * 100 ** (-torch.arange(0, 1, 4 / width))
    one = torch.cat([angles.sin(), angles.cos()], 1)   # (side, width / 2)
    return torch.cat([one.repeat_interleave(side, 0), one.repeat(side, 1)], 1)


def vae_task(name, sd, x, held_out, device):
    """L1 on pixels and on their gradients (edges are what identity is made of), and a little KL."""
    vae = sd.vae

    def edges(a, b):
        return F.l1_loss(a.diff(dim=3), b.diff(dim=3)) + F.l1_loss(a.diff(dim=2), b.diff(dim=2))

    def loss(batch, generator):
        i = torch.randint(len(x), (batch,), generator=generator)
        images = to_tensor(x[i]).to(device)
        q = vae.encode(images)
        mean, logvar = q.mean.float(), q.logvar.float()
        noise = torch.randn(mean.shape, generator=generator).to(device)
        y = vae.decode(mean + torch.exp(0.5 * logvar) * noise).float()
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(y, images) + edges(y, images) + 1e-4 * kl

    def validate():   # PSNR in dB
        images = to_tensor(held_out[:256]).to(device)
        y = torch.cat([vae.decode(vae.encode(part).mean) for part in images.split(64)]).float().clamp(-1, 1)
        return 10 * math.log10(4 / F.mse_loss(y, images).item())

    module = nn.ModuleList([vae.post_quant_conv, vae.decoder]) if name == "vae_decoder" else vae
    return Task(name, module, loss, validate)


def clip_task(sd, x, labels, held_out, held_labels, device):
    """CLIP between photos and captions: the contrastive loss, and every attribute read off the image embedding.

    Colours alone tell most captions of a batch apart; the second term, by a linear head thrown away afterwards,
    makes 40,000 photos teach shapes too, which the real CLIP has from 400 million.
    """
    for part in (sd.text_encoder, sd.image_encoder):
        part.set_attn_implementation("eager")   # twice as fast as the fused kernel, whose backward is slow on CPUs
    heads = {k: len(v) for k, v in ATTRIBUTES.items()}
    module = nn.ModuleDict({"text": sd.text_encoder, "vision": sd.image_encoder,
                            "head": nn.Linear(sd.image_encoder.config.projection_dim, sum(heads.values())).to(device)})
    module.register_parameter("scale", nn.Parameter(torch.tensor(math.log(1 / 0.07), device=device)))
    classes, seen = label_tensors(labels)

    def similarity(embeds, captions):
        ids = sd.tokenizer(captions, padding=True, truncation=True, return_tensors="pt").input_ids
        c = F.normalize(sd.text_encoder(ids.to(device)).pooler_output.float(), dim=1)
        return F.normalize(embeds.float(), dim=1) @ c.T * module.scale.exp().clamp(max=100)

    def embed(pixels):
        return sd.image_encoder(sd.clip_pixels(to_tensor(pixels).to(device))).image_embeds

    def loss(batch, generator):
        i = torch.randint(len(x), (batch,), generator=generator)
        rng = np.random.default_rng(torch.randint(2**31, (1,), generator=generator).item())
        embeds = embed(x[i])
        logits = similarity(embeds, [caption_of(labels[k], rng) for k in i.tolist()])
        target = torch.arange(len(i), device=device)
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        said = dict(zip(heads, module["head"](embeds).split(list(heads.values()), dim=1)))
        return contrastive + len(heads) * masked_cross_entropy(said, classes[i].to(device), seen[i].to(device))

    def validate():   # share of (up to) 160 held-out photos that pick their own caption, each with five traits
        rng = np.random.default_rng(0)
        captions = [caption_of(one, rng, traits=5) for one in held_labels[:160]]
        logits = similarity(embed(held_out[:160]), captions)
        return (logits.argmax(1).cpu() == torch.arange(len(logits))).float().mean().item()

    return Task("clip", module, loss, validate)


def feature_net_task(sd, x, labels, held_out, held_labels, device, precision):
    """Cross-entropy of every attribute that can be seen, on photos and on their VAE round trips,
    shifted, blurred and noisy: a judge must not depend on what only a real photo has."""
    net = FeatureNet().to(device)
    classes, seen = label_tensors(labels)
    held_classes, held_seen = label_tensors(held_labels)
    trips = []   # made when first asked for: a finished stage needs none

    def loss(batch, generator):
        if not trips:
            with torch.inference_mode(), precision:
                trips.extend(y for part in tqdm(x[:6000].split(64), "round trips", leave=False) for y in round_trip(sd, part))
        i = torch.randint(len(x), (batch,), generator=generator)
        i[::2] %= len(trips)
        images = to_tensor(x[i]).to(device)
        images[::2] = to_tensor(torch.stack([trips[k] for k in i[::2]])).to(device)
        return masked_cross_entropy(net(worn(images, generator)), classes[i].to(device), seen[i].to(device))

    def validate():   # share of right answers
        return share_right(net(to_tensor(held_out).to(device)), held_classes, held_seen).mean().item()

    return Task("feature_net", net, loss, validate)


def label_tensors(labels):
    """List of n label dicts -> classes (n, A) and seen (n, A), whether the accessory leaves it visible."""
    names = list(ATTRIBUTES)
    return (torch.tensor([[one[k] for k in names] for one in labels]),
            torch.tensor([[k in visible(one) for k in names] for one in labels]))


def share_right(logits, classes, seen):
    """-> (A,): for every attribute the share of right answers where it can be seen."""
    right = torch.stack([v.argmax(1).cpu() for v in logits.values()], 1) == classes
    return (right & seen).sum(0) / seen.sum(0)


def masked_cross_entropy(logits, classes, seen):
    each = torch.stack([F.cross_entropy(v.float(), classes[:, k], reduction="none") for k, v in enumerate(logits.values())], 1)
    return each[seen].mean()


def worn(images, generator):
    """Shifted by up to 3 pixels; half of them blurred, all a little noisy."""
    b, s = len(images), images.shape[-1]
    dx, dy = torch.randint(0, 7, (2, b), generator=generator).to(images.device)
    grid = torch.arange(s, device=images.device)
    padded = F.pad(images, (3, 3, 3, 3), "replicate")
    rows, cols = (dy[:, None] + grid)[:, None, :, None], (dx[:, None] + grid)[:, None, None, :]
    images = padded[torch.arange(b, device=images.device)[:, None, None, None],
                    torch.arange(3, device=images.device)[None, :, None, None], rows, cols]
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), "replicate"), 3, stride=1)
    amount = torch.rand(b, 1, 1, 1, generator=generator).to(images.device)
    images = torch.lerp(images, blurred, (2 * amount - 1).clamp(min=0))
    return images + 0.05 * torch.randn(images.shape, generator=generator).to(images.device)


def round_trip(sd, x):
    """uint8 photos (B, 3, H, W) -> their VAE round trips, uint8."""
    return to_bytes(sd.decode_latents(sd.encode_latents(to_tensor(x).to(next(sd.vae.parameters()).device))))


def unet_task(sd, features, labels, held, device):
    """Eq. 1 without image tokens: text to image on captions, one in ten of them empty."""

    def loss(batch, generator):
        i = torch.randint(len(labels), (batch,), generator=generator)
        rng = np.random.default_rng(torch.randint(2**31, (1,), generator=generator).item())
        captions = [caption_of(labels[k], rng) if rng.random() > 0.1 else "" for k in i.tolist()]
        with torch.no_grad():
            c_t = sd.encode_prompts(captions).float()
        return noised_loss(sd, features.z_0[i].to(device), c_t, None, generator)

    return Task("unet", sd.unet, loss, fixed_validation(sd, held, lambda embeds: None, device))


def train_base(args):
    """weights/tiny, from scratch: VAE, CLIP pair, FeatureNet, UNet, single-image IP-Adapter, in this order."""
    out, device, runs = args.out or TINY, args.device, Path("runs/base")
    if args.batch or args.lr:
        raise ValueError("--method base: every stage has its own --batch and --lr")
    if not args.resume:   # or an older run's later stages would be taken for this one's
        for name in BASE:
            (runs / f"{name}.pt").unlink(missing_ok=True)
    people = args.people or 4000
    faces, others = ToyFaces(people, seed=0), ToyFaces(min(people, 100), seed=2)   # as `dataset`: 2 is held out
    labels, held_labels = ([photo.labels for one in d.people for photo in one.photos] for d in (faces, others))
    x, held_x = pixels(faces), pixels(others)
    rng = np.random.default_rng(0)
    words = ["man woman sks serious sad contemptuous disgusted frightened"]
    sd = tiny_world([caption_of(one, rng) for one in labels[:5000]] + words * 100, device)

    def stage(task):
        for part in (sd.vae, sd.text_encoder, sd.image_encoder, sd.unet):
            part.requires_grad_(False)
        task.module.requires_grad_(True)
        steps, batch, lr = BASE[task.name]
        rows = fit(task, runs, args.steps or steps, batch, lr, args)
        print(f"{task.name}: validation {rows[0][2]:.4f} -> {rows[-1][2]:.4f} in {rows[-1][3]:.0f} s")

    for name in ("vae", "vae_sharp", "vae_decoder"):
        stage(vae_task(name, sd, x, held_x, device))
    with torch.inference_mode(), autocast(args):
        z = torch.cat([sd.vae.encode(to_tensor(part).to(device)).mean.float() for part in x[:1024].split(64)])
    sd.vae.config["scaling_factor"] = round(1 / z.std().item(), 5)
    stage(clip_task(sd, x, labels, held_x, held_labels, device))
    judge = feature_net_task(sd, x, labels, held_x, held_labels, device, autocast(args))
    stage(judge)
    with autocast(args):
        features, held = Features(sd, faces.people, faces.key), Features(sd, others.people, others.key)
    stage(unet_task(sd, features, labels, held, device))
    adapter = IPAdapter(sd.unet, features.embeds.shape[-1])
    stage(adapter_task("ip_adapter", sd, adapter, features, held, device, alone=True))
    sd.save(out)   # all parts at the end: what was in `out` stays whole until then
    judge.module.save(out / "feature_net")
    (out / "ip_adapter").mkdir(exist_ok=True)
    adapter.half().save(out / ADAPTER)
    print(f"wrote {out}")


# --------------------------------------------------------------------------- command line

def pick_device(name):
    """auto: cuda, else mps, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        raise ValueError(f"no device {name!r} on this machine; --device auto | cpu | cuda | mps") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)   # cuda:1: also the one to wait for and whose memory is counted
    return device


def pick_precision(name, device):
    """auto: bf16 where the hardware has it, else fp16 on cuda and fp32 elsewhere."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


def peak_memory(device):
    """The most memory held so far, in GB of 10⁹ bytes: the device's on cuda, now on mps, else the process's (not Windows)."""
    if device.type != "cpu":
        return (torch.cuda.max_memory_allocated() if device.type == "cuda" else torch.mps.driver_allocated_memory()) / 1e9
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def run(main):
    """Call a program's main(): bad input is one clear line and exit code 2, Ctrl-C is 130, warnings are one line."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        main()
    except KeyboardInterrupt as e:
        sys.exit(print(e, file=sys.stderr) or 130)
    except RuntimeError as e:   # torch.OutOfMemoryError is one, mps and cpu raise it plain
        if "memory" not in str(e):
            raise
        sys.exit(print(f"error: {str(e).split('. ')[0]}: make or train fewer at once (--n, --batch), train with "
                       "--checkpointing", file=sys.stderr) or 2)
    except (ValueError, OSError) as e:
        sys.exit(print(f"error: {e}", file=sys.stderr) or 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--method", choices=["adapter", "dreambooth", "base"], default="adapter", help="what to train")
    parser.add_argument("--agg", choices=list(AGGREGATORS), default="selfattn", help="aggregator over the references")
    parser.add_argument("--model", default=str(TINY), help="checkpoint folder, single file or hub id")
    parser.add_argument("--image-encoder", help="folder or hub id of the CLIP image encoder, if --model has none (h94/IP-Adapter)")
    parser.add_argument("--data", default="toy", help="toy, or a folder with one folder of photos a person")
    parser.add_argument("--people", type=int, help="toy people to draw and train on (default: 800; base: 4000)")
    parser.add_argument("--init", type=Path, help="adapter file to start from (default: the one shipped in --model)")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: 400; dreambooth: 200, of Stable Diffusion 800; "
                        "base: each stage's own)")
    parser.add_argument("--batch", type=int, help="pictures a step (default: 64; dreambooth: 8 photos and 8 of the class, of "
                        "Stable Diffusion 1 and 1)")
    parser.add_argument("--accumulate", type=int, default=1, help="batches added up before each optimiser step")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: 1e-3; for Stable Diffusion 1e-4, or 5e-6 for "
                        "DreamBooth without --lora)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations: slower, far less memory")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints and validations")
    parser.add_argument("--seed", type=int, default=0, help="decides every random number")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="of the forward pass")
    parser.add_argument("--out", type=Path, help="folder for results (default: runs/<agg>; base: weights/tiny)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out (base: in runs/base)")
    own = parser.add_argument_group("--method dreambooth")
    own.add_argument("--images", type=Path, help="folder of photos of one person, one to hundreds")
    own.add_argument("--noun", help="the class: man, woman, person, dog, …")
    own.add_argument("--identifier", default="sks", help="rare word for the person")
    own.add_argument("--prior-weight", type=float, default=1.0, help="λ of the class term; 0 is plain fine-tuning")
    own.add_argument("--class-images", type=int, default=DREAMBOOTH["class_images"], help="class pictures the original model makes first")
    own.add_argument("--train-text-encoder", action="store_true", help="train it too")
    own.add_argument("--lora", type=int, metavar="RANK", help="train only updates of this rank of the attention")
    args = parser.parse_args()
    for name in ("batch", "accumulate", "every", "steps", "people"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: at least 1")
    if args.method != "dreambooth" and (args.images or args.noun or args.lora is not None or args.train_text_encoder):
        raise ValueError("--images, --noun, --lora and --train-text-encoder are for --method dreambooth")
    args.device = pick_device(args.device)
    args.precision = pick_precision(args.precision, args.device)
    torch.manual_seed(args.seed)
    {"adapter": train_adapter, "dreambooth": train_dreambooth, "base": train_base}[args.method](args)


if __name__ == "__main__":
    run(main)
