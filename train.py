"""Training: one visible loop for the adapters and for DreamBooth (paper, sections 2, 3 and 4).

    ε_θ* = argmin L(ε, ε_θ)                                                (2)   fit
    L = ‖ε − ε_θ(c_τ, c_i, t, z_t)‖²                                       (1)   adapter_task

    python train.py --agg selfattn             the paper's method: leave-one-out on --data
    python train.py --agg none | avg | …       the same loop with another aggregator
    python train.py --method dreambooth --images DIR --noun man

A `Task` says what trains and what its loss is; `fit` is the loop for all of them. Every random
number of step k comes from generators seeded with (seed, k, number of the batch): a step depends on
nothing before it but the weights and the optimiser. So --resume continues bit for bit (same machine,
same threads), and the processes of torchrun, which share out the batches of --accumulate, agree.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable

import torch
from torch import nn
from tqdm import tqdm

from aggregators import AGGREGATORS
from data import Features, leave_one_out, load_people
from dreambooth import (DreamBooth, add_lora, encode_files, make_class_images,
                        prior_preservation_loss, save_variations, write_prompts)
from ip_adapter import (IPAdapter, adapter_loss, draw_t_and_eps, drop_conditions,
                        generate_in_parts, validate_eq1)
from support.checkpoints import digest_encoders, find_beside, find_inside, find_shipped
from support.command_lines import parse_training
from support.crops import find_crop
from support.devices import (autocast, device_of, frozen_dtype, is_large, move, peak_memory,
                             pick_device, pick_precision)
from support.distributed import (agree, begin_alike, first_alone, is_first, my_share, processes,
                                 sum_gradients, sum_over_processes)
from support.files import digest, digest_bytes, digest_file
from support.history import History, own_run, report
from support.lora import move_to_learn, save_lora
from support.pictures import picture_files, save_grid
from support.program import interruptible, run
from support.text import check_identifier
from unet import StableDiffusion

DEFAULTS = {  # method and whether the UNet is Stable Diffusion's: steps, batch, peak learning rate
    ("adapter", False): (400, 64, 1e-3),
    ("adapter", True): (400, 64, 1e-4),
    ("dreambooth", False): (200, 8, 1e-3),
    ("dreambooth", True): (800, 1, 5e-6),
    ("lora", False): (200, 8, 1e-3),
    ("lora", True): (800, 1, 1e-4),
}


@dataclass
class Task:
    """What `fit` trains: all parameters of `module` that require gradients."""

    name: str
    module: nn.Module
    loss: Callable  # (batch, generator) -> scalar tensor
    validate: Callable  # () -> {"validation": number, perhaps more}, the same at every call


@dataclass
class Options:
    """How `fit` trains. None: the value of DEFAULTS, see `complete`."""

    device: torch.device
    precision: str = "fp32"  # of the forward pass: fp32, or bf16 or fp16 by autocast
    steps: int = None
    batch: int = None  # pictures
    lr: float = None  # the peak
    accumulate: int = 1  # batches added up before each optimiser step
    every: int = 100  # steps between checkpoints
    seed: int = 0
    resume: bool = False
    checkpointing: bool = False  # recompute activations in the backward pass: slower, less memory

    def complete(self, method, unet):
        """These options with the defaults of `method` for the size of `unet`."""
        missing = {}
        for name, default in zip(("steps", "batch", "lr"), DEFAULTS[method, is_large(unet)]):
            if getattr(self, name) is None:
                missing[name] = default
        return replace(self, **missing)


def learning_rate(step, steps, peak, warm_up=100):
    """The learning rate of a step: peak · warm-up · cosine decay."""
    # 1. Warm-up: in a straight line from 1 % of the peak, in 100 steps.
    rise = min(1, (step + 1) / warm_up)
    # 2. Decay: half a cosine from 1 down to 0.01. 0.505 = (1 + 0.01)/2 and 0.495 = (1 − 0.01)/2.
    fall = 0.505 + 0.495 * math.cos(math.pi * step / steps)
    # 3. Both at once: the decay begins with the first step.
    return peak * rise * fall


def seeded(seed, step, m):
    """The generator of batch m of a step. It takes 32 bits: m·2³²/φ keeps all batches far apart."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step + m * 2_654_435_761)


def fit(task, out, options, settings=None):
    """ε_θ* = argmin L(ε, ε_θ)   (eq. 2), by AdamW. Returns the log's rows (support/history.py).

    Writes the log out/<name>.csv and the checkpoint out/<name>.pt every `options.every` steps.
    settings: what else the result depends on; --resume refuses other ones. ValueError at a loss or
    gradient that is not finite: the checkpoint before it stays. Ctrl-C and SIGTERM finish the step,
    write a checkpoint and raise KeyboardInterrupt.
    """
    parameters = [weight for weight in task.module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, options.lr, weight_decay=0.01)
    scaler = torch.amp.GradScaler(options.device.type, enabled=options.precision == "fp16")
    history = History(task, out, options, settings or {}, optimizer, scaler)
    first = history.start()
    begin_alike(parameters, first)
    bar = tqdm(range(first, options.steps), task.name, initial=first, total=options.steps,
               mininterval=1, smoothing=0.05)
    with interruptible() as interrupted:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, options.steps, options.lr)
            # Zero, loss, backward; of N processes each takes every N-th batch. Gradients add up.
            optimizer.zero_grad(set_to_none=True)
            losses = torch.zeros(options.accumulate, dtype=torch.float64)
            for m in my_share(options.accumulate):
                with autocast(options.device, options.precision):
                    loss = task.loss(options.batch, seeded(options.seed, step, m))
                losses[m] = loss.item()
                scaler.scale(loss / options.accumulate).backward()
            sum_over_processes(losses)
            history.add_losses(losses, step)
            sum_gradients(parameters)
            # Clip, step. With fp16 the scaler itself skips a step that overflows.
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            if not scaler.is_enabled():
                history.check_finite("gradient", norm, step)
            scaler.step(optimizer)
            scaler.update()
            history.end_step(step + 1, bar, lambda: agree(interrupted()))
    return history.rows


# ---------------------------------------------------------------- the adapters

def validation_batch(z_0):
    """64 for latents of 16 × 16, fewer for larger ones: about the same memory."""
    return max(1, 64 * 16**2 // z_0[0, 0].numel())


def fixed_validation(sd, held, tokens, device, photos=192, n=10):
    """() -> eq. 1 on people held out: the same targets, references, prompts, t and ε every time."""
    batch = validation_batch(held.z_0)
    generator = torch.Generator().manual_seed(0)
    target, references = leave_one_out(held.groups, photos, generator, n)

    def make_batches():  # anew at each call, because `tokens` changes in training
        for i, others in zip(target.split(batch), references.split(batch)):
            c_t = held.c_t[held.prompt[i]].to(device)
            c_i = tokens(held.embeds[others].to(device))
            yield held.z_0[i].to(device), c_t, c_i

    return lambda: validate_eq1(sd, make_batches())


def adapter_task(name, sd, adapter, features, held, device, alone=False, strangers=0.0):
    """Eq. 1, leave-one-out. alone: every photo is its own and only reference, as in IP-Adapter.

    strangers: see data.leave_one_out; never in validation.
    """
    null_c_t = features.null_c_t.to(device)
    n = adapter.aggregator.photos

    def loss(batch, generator):
        if alone:
            target = torch.randint(len(features.z_0), (batch,), generator=generator)
            references = target[:, None]
        else:
            target, references = leave_one_out(features.groups, batch, generator, n,
                                               strangers)
        z_0 = features.z_0[target].to(device)
        c_t = features.c_t[features.prompt[target]].to(device)
        embeds = features.embeds[references].to(device)  # (B, N, E)
        c_t, embeds = drop_conditions(c_t, embeds, null_c_t, 0.05, generator)
        t, eps = draw_t_and_eps(sd, z_0, generator)
        return adapter_loss(sd.unet, z_0, t, eps, c_t, adapter.tokens(embeds), sd.schedule)

    return Task(name, adapter, loss, fixed_validation(sd, held, adapter.tokens, device, n=n))


def train_adapter(out, options, model, agg, data, people, init=None, image_encoder=None,
                  strangers=0.0, alone=False):
    """The paper's section 3.5 (selfattn), and its controls: an adapter trained leave-one-out.

    init: the adapter file to start from; None: the one shipped in the folder `model`. data, people:
    see data.load_people; strangers, alone: adapter_task. Writes the adapter, log and pictures.
    """
    device = options.device
    # The model, the adapter to start from, and digests of both for --resume.
    init = init or find_shipped(model, image_encoder)
    if not init.is_file():
        hint = f"name one with --init (ip-adapter_sd15.safetensors), or another --model than {model}"
        raise ValueError(f"{init}: no such adapter to start from; {hint}")
    sd = StableDiffusion.load(model, image_encoder=image_encoder or find_beside(init))
    adapter = IPAdapter.load(init, sd.unet, agg=agg).to(device)
    options = options.complete("adapter", sd.unet)
    encoders = digest_encoders(sd)
    base = f"{digest(sd.unet)} {encoders} {digest_file(init)}"
    learned, held_out = load_people(data, sd.image_size, people, find_crop(sd.preprocessor))
    photos = digest_bytes([(p.key, p.prompt) for one in learned + held_out for p in one.photos])
    vae = sd.vae
    features, held = encode_people(sd, learned, held_out, encoders, options)
    sd.unet.gradient_checkpointing = options.checkpointing
    task = adapter_task("adapter", sd, adapter, features, held, device, alone, strangers)
    beyond = {"strangers": strangers} if strangers else {}  # of the paper
    beyond |= {"references": "same-photo"} if alone else {}
    rows = fit(task, out, options, dict(agg=agg, people=people, base=base, photos=photos, **beyond))
    if not is_first():
        return

    # The adapter, with how it was made, and pictures.
    path = out / "ip-adapter.safetensors"
    recipe = dict(model=model, data=data, people=len(features.groups), steps=options.steps,
                  batch=options.batch * options.accumulate, lr=options.lr, seed=options.seed,
                  precision=options.precision, init=init, base=base, **beyond)
    adapter.save(path, {name: str(value) for name, value in recipe.items()})
    report(rows, out, f"adapter, {agg}", path)
    sd.vae = vae.to(device)
    save_samples(sd, adapter, held, out / "samples.png", options)
    print(f"peak memory {peak_memory(device):.2f} GB")


def encode_people(sd, learned, held_out, encoders, options):
    """The frozen features of both; first the encoders are on the device, then the UNet: never both."""
    device = options.device
    dtype = frozen_dtype(sd.unet, options.precision)
    for network in (sd.vae, sd.text_encoder, sd.image_encoder):
        move(network, device, dtype)
    with autocast(device, options.precision), first_alone():
        features = Features(sd, learned, encoders)
        held = Features(sd, held_out, encoders)
    sd.vae.cpu()
    sd.vae = sd.text_encoder = sd.image_encoder = None
    move(sd.unet, device, dtype)
    return features, held


@torch.inference_mode()
def save_samples(sd, adapter, held, path, options, people=6):
    """The references of held-out people, the removed photo, what the adapter makes of its prompt."""
    device = options.device
    generator = torch.Generator().manual_seed(0)
    groups = [group for group in held.groups if len(group) > 1][:people]
    n = adapter.aggregator.photos
    pairs = [leave_one_out([group], 1, generator, n) for group in groups]
    target = torch.cat([pair[0] for pair in pairs])  # (P,)
    references = torch.cat([pair[1] for pair in pairs])  # (P, n − 1)
    c_t = held.c_t[held.prompt[target]].to(device)
    embeds = held.embeds[references].to(device)  # (P, n − 1, E)
    c_i = adapter.tokens(embeds)
    null_c_i = adapter.tokens(torch.zeros_like(embeds[:1]))
    shown = torch.cat([references, target[:, None]], dim=1)  # (P, n)
    null_c_t = held.null_c_t.to(device)
    with autocast(device, options.precision):
        made = generate_in_parts(sd, options.batch, c_t, null_c_t, c_i, null_c_i, options.seed)
        photos = sd.decode_latents(held.z_0[shown.flatten()]).float()
    photos = photos.unflatten(0, shown.shape)
    rows = [[*photos[p], made[p]] for p in range(len(groups))]
    columns = [f"reference {k}" for k in range(1, n)] + ["removed", "generated"]
    save_grid(path, rows, columns)
    print(f"wrote {path}")


# ---------------------------------------------------------------- DreamBooth

def dreambooth_task(sd, module, texts, z_0, z_pr, method, draws=64):
    """Section 3.2: each step a batch of photos and, if there are any, as many class pictures."""
    fixed = sd.encode_prompts(texts).float()  # (2, L, D): of the person and of the class

    def encode():
        return sd.text_features(texts) if method.train_text_encoder else fixed

    def loss(batch, generator):
        i = torch.randint(len(z_0), (batch,), generator=generator)
        j = i[:0]
        if len(z_pr):
            j = torch.randint(len(z_pr), (batch,), generator=generator)
        photos, others = z_0[i], z_pr[j]
        t, eps = draw_t_and_eps(sd, torch.cat([photos, others]), generator)
        c, c_pr = encode().split(1)
        return prior_preservation_loss(sd.unet, photos, others, t, eps, c, c_pr, sd.schedule,
                                       method.prior_weight)

    def validate():  # the first term alone, on the same photos every time
        c = encode()[:1]
        photos = z_0[torch.arange(draws) % len(z_0)]
        parts = photos.split(validation_batch(z_0))
        return validate_eq1(sd, ((z, c.expand(len(z), -1, -1), None) for z in parts))

    return Task("dreambooth", module, loss, validate)


def fine_tune(sd, texts, z_0, z_pr, out, options, method, settings=None):
    """Section 3.2 from latents z_0 of photos and z_pr of class pictures. Returns the log's rows.

    texts: the prompt of the person and that of the class. What trains: sd.unet, or what `method`
    says. z_pr without rows: plain fine-tuning.
    """
    # What trains: a LoRA, or the UNet and perhaps the text encoder.
    for network in (sd.unet, sd.vae, sd.text_encoder):
        network.requires_grad_(False)
    if method.lora is not None:
        generator = torch.Generator().manual_seed(options.seed)
        module = add_lora(sd.unet, method.lora, generator=generator)
    else:
        module = nn.ModuleDict({"unet": sd.unet})
        if method.train_text_encoder:
            module["text_encoder"] = sd.text_encoder
        module.requires_grad_(True)
    sd.unet.gradient_checkpointing = options.checkpointing
    options = options.complete("dreambooth" if method.lora is None else "lora", sd.unet)
    task = dreambooth_task(sd, module, texts, z_0, z_pr, method)
    # What has done its work leaves the device until the end.
    idle = [sd.vae, sd.image_encoder]
    if not method.train_text_encoder:
        idle.append(sd.text_encoder)
    places = {network: device_of(network) for network in idle if network is not None}
    for network in places:
        network.cpu()
    rows = fit(task, out, options, settings)
    for network, place in places.items():
        network.to(place)
    return rows


def train_dreambooth(out, options, method, model, images, identifier, noun):
    """The paper's section 3.2: the model learns one person from the photos of the folder `images`.

    Writes a whole checkpoint to the folder `out`, or with method.lora a LoRA file.
    """
    files = picture_files(images)
    texts = write_prompts(identifier, noun)
    # An image encoder is not used: what is written holds the one that the folder `model` holds.
    sd = StableDiffusion.load(model, image_encoder=method.lora is None and find_inside(model))
    began = time.perf_counter()
    options = options.complete("dreambooth" if method.lora is None else "lora", sd.unet)
    base = digest(sd.unet, sd.text_encoder, sd.vae)
    photos = digest_bytes(*files)
    settings = dict(vars(method), base=base, photos=photos, noun=noun, identifier=identifier)
    check_identifier(sd.tokenizer, identifier)
    move_to_learn(sd, options.device, options.precision, method)
    generator = torch.Generator().manual_seed(options.seed)
    with autocast(options.device, options.precision):
        z_0 = encode_files(sd, files, generator)
        z_pr = z_0[:0]
        if method.prior_weight:
            at_once = options.batch if is_large(sd.unet) else 8
            pictures = make_class_images(sd, texts[1], out, method.class_images, options.seed,
                                         batch=at_once, model=base, w=method.class_guidance)
            z_pr = encode_files(sd, pictures, generator)
    rows = fine_tune(sd, texts, z_0, z_pr, out, options, method, settings)
    if not is_first():
        return
    written = out
    if method.lora is None:
        sd.save(out)
    else:
        written = out / "pytorch_lora_weights.safetensors"
        save_lora(sd.unet, written)
    report(rows, out, f"DreamBooth, {identifier} {noun}", written)
    print(f"with all pictures {time.perf_counter() - began:.0f} s")
    with autocast(options.device, options.precision):
        save_variations(sd, f"{identifier} {noun}", noun, out / "samples.png", options.seed,
                        options.batch)
    print(f"peak memory {peak_memory(options.device):.2f} GB")


# ---------------------------------------------------------------- command line

@processes()
def main():
    args = parse_training(__doc__, list(AGGREGATORS))
    my_share(args.accumulate)  # refuses fewer batches than processes, before the work
    device = pick_device(args.device)
    options = Options(device, pick_precision(args.precision, device), args.steps, args.batch,
                      args.lr, args.accumulate, args.every, args.seed, args.resume,
                      args.checkpointing)
    torch.manual_seed(args.seed)
    out = args.out or Path("runs") / (args.agg if args.method == "adapter" else "dreambooth")
    method = DreamBooth(args.prior_weight, args.class_images, args.train_text_encoder, args.lora)
    with own_run(out, args.method, args.resume):
        if args.method == "adapter":
            train_adapter(out, options, args.model, args.agg, args.data, args.people, args.init,
                          args.image_encoder, args.strangers)
        else:
            train_dreambooth(out, options, method, args.model, args.images, args.identifier,
                             args.noun)


if __name__ == "__main__":
    run(main, "take fewer photos at once (--batch, with --accumulate), or --checkpointing")
