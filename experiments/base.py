"""weights/tiny from scratch: a checkpoint of the tiny world, its adapter and its judge.

    python -m experiments.base --people 4000       two hours on two CPU cores

Seven trainings (STAGES), one after another, each with the loop of train.py. When one runs, all that
the others trained is frozen:

    vae            pictures 64 × 64 <-> latents 4 × 16 × 16
    vae_sharp      the same with smaller batches: more steps in the same time
    vae_decoder    its decoder alone: the latents stay as they are
    clip           the CLIP pair: photos and captions
    feature_net    FeatureNet, the judge (toyfaces/judge.py)
    unet           text to image: eq. 1 without image tokens
    ip_adapter     eq. 1, every photo its own and only reference, as the original IP-Adapter

Logs and checkpoints go to runs/base. --out is written at the end, all at once: until then a
checkpoint that is there stays whole.
"""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import Features, ToyFaces
from ip_adapter import IPAdapter, adapter_loss
from support.checkpoints import ADAPTER, TINY
from support.claim import claim
from support.devices import autocast, device_of, pick_device, pick_precision
from support.distributed import processes, refuse_torchrun
from support.files import check_writable, load_or_compute
from support.pictures import open_photos, to_bytes, to_tensor
from support.program import add_device_arguments, make_parser, run
from toyfaces import drawing
from toyfaces.captions import write_caption
from toyfaces.drawing import ATTRIBUTES
from toyfaces.judge import FeatureNet, augment, label_tensors, masked_cross_entropy, share_right
from train import Options, Task, adapter_task, draw_t_and_eps, fit, fixed_validation
from unet import AutoencoderKL, Posterior, StableDiffusion, UNet

RUNS = Path("runs/base")  # logs and checkpoints of the stages
FINISHED = RUNS / "finished"  # is there when the results of these checkpoints are written
VERSION = 1  # of the pixels in the cache: raised by hand when this code gives other ones

STAGES = {  # name: steps, batch, peak learning rate
    "vae": (1500, 32, 2e-3),
    "vae_sharp": (3000, 16, 1e-3),
    "vae_decoder": (800, 16, 5e-4),
    "clip": (1000, 192, 1e-3),
    "feature_net": (1600, 64, 1e-3),
    "unet": (3400, 64, 1e-3),
    "ip_adapter": (900, 64, 1e-3),
}


# ---------------------------------------------------------------- people


class Faces(NamedTuple):
    """Toy people, and all their photos in one row."""

    people: list
    pixels: torch.Tensor  # (n, 3, 64, 64), uint8
    labels: list  # n dictionaries {attribute: class number}


def make_faces(count, seed):
    """`count` people of ToyFaces with ten photos each."""
    people = ToyFaces(count, seed=seed).people
    photos = [photo for person in people for photo in person.photos]
    labels = [photo.labels for photo in photos]
    return Faces(people, make_pixels(photos), labels)


def make_pixels(photos):
    """The pixels of n drawn photos, drawn once and kept on disk: (n, 3, S, S), uint8."""

    def draw():
        pixels = [pixels for pixels, _ in open_photos(photos)]
        return {"x": torch.from_numpy(np.stack(pixels))}

    data = [photo.key for photo in photos]
    return load_or_compute(draw, "pixels", VERSION, data)["x"]


def make_numpy_generator(generator):
    """A NumPy generator for captions, seeded by a torch.Generator."""
    seed = torch.randint(2**31, (1,), generator=generator).item()
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- networks with random weights


def write_corpus(labels):
    """What the tokenizer is made from: captions, and words of prompts that no caption has."""
    rng = np.random.default_rng(0)
    captions = [write_caption(one, rng) for one in labels[:5000]]
    words = "man woman sks serious sad contemptuous disgusted frightened"
    return captions + [words] * 100


def make_tokenizer(captions, window):
    """A CLIP tokenizer (byte-level BPE, lower case) that is made from `captions`.

    window: the most tokens of a prompt. The same captions give the same tokenizer.
    """
    from tokenizers.pre_tokenizers import ByteLevel  # here: transformers takes seconds to import
    from tokenizers.trainers import BpeTrainer
    from transformers import CLIPTokenizer

    # Find the pairs of pieces that stand together most often: these are the merges. Of two pairs
    # that are equally frequent the trainer takes the one with the smaller numbers, but it numbers
    # last letters ("n</w>") in the random order of a hash table. Named as special tokens they keep
    # the order given here, and the same captions always give the same tokenizer. (The order is
    # backwards because that gives the tokenizer of weights/tiny.)
    special = ["<|startoftext|>", "<|endoftext|>"]
    letters = sorted(ByteLevel.alphabet())
    last_letters = [letter + "</w>" for letter in letters]
    trainer = BpeTrainer(
        vocab_size=2000,
        special_tokens=special + letters + last_letters[::-1],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend = CLIPTokenizer().backend_tokenizer
    backend.train_from_iterator(captions, trainer)
    content = json.loads(backend.to_str())
    merges = [tuple(pair) for pair in content["model"]["merges"]]

    # Number the tokens in the order of OpenAI's file.
    merged = ["".join(pair) for pair in merges]
    tokens = letters + last_letters + merged + special
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=window)


def make_tiny_vae():
    """Pixels (B, 3, 64, 64) <-> latents (B, 4, 16, 16); 0.9 million numbers."""
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=[32, 64, 64],
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        mid_block_add_attention=False,
    )


def make_tiny_text_encoder(tokenizer, window):
    """Γ_τ: 3 layers of width 128."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=window,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    network = CLIPTextModel(config)
    # Both embeddings start as N(0, 0.02²). That is so little that the layers would drown a word of
    # which no caption teaches anything, such as DreamBooth's sks. If its embedding is large, and
    # larger than that of its position, the word stays itself.
    for name, weight in network.named_parameters():
        if "token_embedding" in name:
            weight.data *= 15
        elif "position_embedding" in name:
            weight.data *= 5
    return network


def make_tiny_image_encoder():
    """Γ_i: 4 layers of width 160 on 8 × 8 patches of 8 × 8 pixels."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        image_size=64,
        patch_size=8,
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=5,
        projection_dim=128,
    )
    network = CLIPVisionModelWithProjection(config)
    positions = network.vision_model.embeddings.position_embedding.weight.data
    positions[1:] = 0.5 * sine_positions(side=8, width=160)  # row 0 is the class token
    return network


def make_tiny_unet():
    """ε_θ for latents 4 × 16 × 16, attention at 8 × 8 only; 4 million numbers."""
    return UNet(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=[64, 128],
        layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_tiny_world(captions, device):
    """A StableDiffusion of the tiny scale with random weights and a tokenizer for `captions`.

    The weights come from PyTorch's global generator, in the order of these lines.
    """
    window = 48
    vae = make_tiny_vae()
    tokenizer = make_tokenizer(captions, window)
    text_encoder = make_tiny_text_encoder(tokenizer, window)
    image_encoder = make_tiny_image_encoder()
    unet = make_tiny_unet()
    for network in (unet, vae, text_encoder, image_encoder):
        network.to(device)
    return StableDiffusion(unet, vae, text_encoder, tokenizer, image_encoder)


def sine_positions(side, width):
    """Sines and cosines of row and column: a ViT knows from the start where its patches are.

    Returns (side², width), the patches row by row.
    """
    frequencies = 100 ** (-torch.arange(0, 1, 4 / width))  # (width/4,), from 1 down to 1/100
    angles = torch.arange(side)[:, None] * frequencies  # (side, width/4)
    one = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width/2)
    rows = one.repeat_interleave(side, dim=0)  # (side², width/2): 0 0 0 … 1 1 1 …
    columns = one.repeat(side, 1)  # (side², width/2): 0 1 2 … 0 1 2 …
    return torch.cat([rows, columns], dim=1)


# ---------------------------------------------------------------- the VAE


def edge_loss(a, b):
    """L1 between the differences of neighbouring pixels of a and b (B, 3, H, W): a scalar."""
    across = F.l1_loss(a.diff(dim=3), b.diff(dim=3))
    down = F.l1_loss(a.diff(dim=2), b.diff(dim=2))
    return across + down


def vae_task(name, sd, faces, held, device):
    """L1 on pixels and on edges, which identity is made of, and a little KL.

    name: of the stage; "vae_decoder" trains the decoder alone. validation: PSNR in dB.
    """
    vae = sd.vae
    module = vae
    if name == "vae_decoder":
        module = nn.ModuleList([vae.post_quant_conv, vae.decoder])

    def loss(batch, generator):
        i = torch.randint(len(faces.pixels), (batch,), generator=generator)
        images = to_tensor(faces.pixels[i]).to(device)
        # Encode, draw from the posterior, decode: in float32 outside of the network.
        posterior = vae.encode(images)
        mean = posterior.mean.float()
        logvar = posterior.logvar.float()
        z = Posterior(mean, logvar).sample(generator)
        decoded = vae.decode(z).float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.l1_loss(decoded, images) + edge_loss(decoded, images) + 1e-4 * kl

    def validate():
        images = to_tensor(held.pixels[:256]).to(device)
        decoded = [vae.decode(vae.encode(part).mean) for part in images.split(64)]
        decoded = torch.cat(decoded).float().clamp(-1, 1)
        error = F.mse_loss(decoded, images).item()
        return {"validation": 10 * math.log10(4 / error)}  # pixels span 2, and 2² = 4

    return Task(name, module, loss, validate)


@torch.inference_mode()
def measure_scaling_factor(sd, pixels, device):
    """1/σ of the latents of up to 1,024 photos: what makes them as large as the noise."""
    latents = []
    for part in pixels[:1024].split(64):
        posterior = sd.vae.encode(to_tensor(part).to(device))
        latents.append(posterior.mean.float())
    return round(1 / torch.cat(latents).std().item(), 5)


def encode_and_decode(sd, pixels):
    """Photos (B, 3, H, W) -> their round trips through the VAE, the same shape; both uint8."""
    images = to_tensor(pixels).to(device_of(sd.vae))
    z = sd.encode_latents(images)
    return to_bytes(sd.decode_latents(z))


# ---------------------------------------------------------------- the CLIP pair


class ClipPair(nn.Module):
    """Both encoders of `sd`, and what only their training needs: `head` and `scale`.

    head: every attribute, read off an image embedding. scale: the log of the factor of the cosines.
    """

    def __init__(self, sd):
        super().__init__()
        self.sd = sd
        self.text = sd.text_encoder
        self.vision = sd.image_encoder
        for encoder in (self.text, self.vision):
            # Twice as fast as the fused kernel, whose backward pass is slow on CPUs.
            encoder.set_attn_implementation("eager")
        self.classes = {name: len(words) for name, words in ATTRIBUTES.items()}
        width = sd.image_encoder.config.projection_dim
        self.head = nn.Linear(width, sum(self.classes.values()))
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # as in CLIP

    def embed(self, pixels):
        """Photos (B, 3, 64, 64), uint8 -> embeddings (B, E)."""
        images = to_tensor(pixels).to(self.scale.device)
        return self.vision(self.sd.clip_pixels(images)).image_embeds

    def compare(self, embeds, captions):
        """Embeddings (B, E) and n captions -> their cosines times a learned factor: (B, n)."""
        settings = dict(padding=True, truncation=True, return_tensors="pt")
        ids = self.sd.tokenizer(captions, **settings).input_ids  # (n, L)
        text = self.text(ids.to(self.scale.device)).pooler_output  # (n, E)
        text = F.normalize(text.float(), dim=1)
        embeds = F.normalize(embeds.float(), dim=1)
        factor = self.scale.exp().clamp(max=100)
        return embeds @ text.T * factor

    def read_attributes(self, embeds):
        """Embeddings (B, E) -> {attribute: logits (B, K)}."""
        parts = self.head(embeds).split(list(self.classes.values()), dim=1)
        return dict(zip(self.classes, parts))


def clip_task(sd, faces, held, device):
    """CLIP between photos and captions, and every attribute read off the image embedding.

    Colours alone tell most captions of a batch apart. The second term, by a linear head that is
    thrown away afterwards, makes 40,000 photos teach shapes too, which the real CLIP has from
    400 million. validation: share of up to 160 photos that pick their own caption.
    """
    pair = ClipPair(sd).to(device)
    classes, seen = label_tensors(faces.labels)

    def loss(batch, generator):
        # Photos, and a new caption of each.
        i = torch.randint(len(faces.pixels), (batch,), generator=generator)
        rng = make_numpy_generator(generator)
        captions = [write_caption(faces.labels[k], rng) for k in i.tolist()]
        embeds = pair.embed(faces.pixels[i])
        # Photo k and caption k belong together, whichever of the two is looked for.
        logits = pair.compare(embeds, captions)  # (B, B)
        target = torch.arange(batch, device=device)
        contrastive = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        # All attributes together.
        answers = pair.read_attributes(embeds)
        error = masked_cross_entropy(answers, classes[i].to(device), seen[i].to(device))
        return contrastive + len(ATTRIBUTES) * error

    def validate():
        rng = np.random.default_rng(0)
        captions = [write_caption(one, rng, traits=5) for one in held.labels[:160]]
        logits = pair.compare(pair.embed(held.pixels[:160]), captions)
        picked = logits.argmax(dim=1).cpu()
        own = torch.arange(len(picked))
        return {"validation": (picked == own).float().mean().item()}

    return Task("clip", pair, loss, validate)


# ---------------------------------------------------------------- the judge and the UNet


def feature_net_task(judge, sd, faces, held, device):
    """Cross-entropy of every attribute that can be seen, on photos and on their VAE round trips.

    Both are shifted, blurred and noisy (`augment`): a judge must not depend on what only a real
    photo has. validation: share of right answers.
    """
    classes, seen = label_tensors(faces.labels)
    held_classes, held_seen = label_tensors(held.labels)

    @cache
    def make_round_trips():
        """Of the first 6,000 photos, when first asked for: a stage that is finished needs none."""
        parts = tqdm(faces.pixels[:6000].split(64), "round trips", leave=False)
        return torch.cat([encode_and_decode(sd, part) for part in parts])

    def loss(batch, generator):
        i = torch.randint(len(faces.pixels), (batch,), generator=generator)
        # Every second picture is a round trip. Only the first photos have one: round trip k is that
        # of photo k, so larger numbers start again from 0, and the labels are those of photo k.
        round_trips = make_round_trips()
        k = i[::2] % len(round_trips)
        i[::2] = k
        pixels = faces.pixels[i]
        pixels[::2] = round_trips[k]
        images = to_tensor(pixels).to(device)
        answers = judge(augment(images, generator))
        return masked_cross_entropy(answers, classes[i].to(device), seen[i].to(device))

    def validate():
        answers = judge(to_tensor(held.pixels).to(device))
        shares = share_right(answers, held_classes, held_seen)  # (A,)
        return {"validation": shares.mean().item()}

    return Task("feature_net", judge, loss, validate)


def unet_task(sd, features, labels, held_features, device):
    """Eq. 1 without image tokens: text to image on captions, one in ten of them empty.

    features: of the photos with these labels. validation: eq. 1 on held-out people.
    """

    def loss(batch, generator):
        i = torch.randint(len(labels), (batch,), generator=generator)
        z_0 = features.z_0[i].to(device)
        rng = make_numpy_generator(generator)
        captions = []
        for k in i.tolist():
            is_named = rng.random() > 0.1
            captions.append(write_caption(labels[k], rng) if is_named else "")
        c_t = sd.encode_prompts(captions).float()
        t, eps = draw_t_and_eps(sd, z_0, generator)
        return adapter_loss(sd.unet, z_0, t, eps, c_t, None, sd.schedule)

    def make_no_tokens(embeds):
        return None

    validate = fixed_validation(sd, held_features, make_no_tokens, device)
    return Task("unet", sd.unet, loss, validate)


# ---------------------------------------------------------------- all stages


def train_stage(task, sd, options, people):
    """Train what the task says, with all networks of `sd` but that frozen."""
    for network in (sd.vae, sd.text_encoder, sd.image_encoder, sd.unet):
        network.requires_grad_(False)
    task.module.requires_grad_(True)
    steps, batch, lr = STAGES[task.name]
    options = replace(options, steps=options.steps or steps, batch=batch, lr=lr)
    rows = fit(task, RUNS, options, {"people": people, "drawing": drawing.VERSION})
    start = rows[0]["validation"]
    end = rows[-1]["validation"]
    print(f"{task.name}: validation {start:.4f} -> {end:.4f} in {rows[-1]['seconds']:.0f} s")


def forget_older_run():
    """Remove the checkpoints of a finished run: the later ones would be taken for this run's.

    ValueError if there are some of a run that is not finished.
    """
    checkpoints = [RUNS / f"{name}.pt" for name in STAGES]
    found = [path for path in checkpoints if path.exists()]
    if found and not FINISHED.exists():
        ways = "go on with --resume, or move that folder away to start anew"
        raise ValueError(f"{RUNS} holds the checkpoints of a run that is not finished: {ways}")
    for path in found:
        path.unlink()


def train_base(out, options, people):
    """All stages on so many people; writes the folder `out` at the end.

    options: train.Options, of which steps is None (each stage its own) or for all stages, and batch
    and lr do not count.
    """
    device = options.device
    if not options.resume:
        forget_older_run()
    FINISHED.unlink(missing_ok=True)
    faces = make_faces(people, seed=0)
    held = make_faces(min(people, 100), seed=2)  # validation people, as in data.load_people
    sd = make_tiny_world(write_corpus(faces.labels), device)

    # The VAE, and the unit in which its latents are measured.
    for name in ("vae", "vae_sharp", "vae_decoder"):
        train_stage(vae_task(name, sd, faces, held, device), sd, options, people)
    with autocast(device, options.precision):
        sd.vae.config["scaling_factor"] = measure_scaling_factor(sd, faces.pixels, device)

    # What looks at pictures: the CLIP pair, and the judge of all tables.
    train_stage(clip_task(sd, faces, held, device), sd, options, people)
    judge = FeatureNet().to(device)
    train_stage(feature_net_task(judge, sd, faces, held, device), sd, options, people)

    # What makes pictures, from the features of the frozen encoders.
    with autocast(device, options.precision):
        features = Features(sd, faces.people)
        held_features = Features(sd, held.people)
    task = unet_task(sd, features, faces.labels, held_features, device)
    train_stage(task, sd, options, people)
    adapter = IPAdapter(sd.unet, features.embeds.shape[-1])
    task = adapter_task("ip_adapter", sd, adapter, features, held_features, device, alone=True)
    train_stage(task, sd, options, people)
    save_world(out, sd, judge, adapter)
    FINISHED.touch()


def save_world(out, sd, judge, adapter):
    """Write the checkpoint, the judge and the adapter, all in float16."""
    with claim(out):
        sd.save(out)
        judge.save(out / "feature_net")
        path = out / ADAPTER
        path.parent.mkdir(exist_ok=True)
        adapter.half().save(path)
    print(f"wrote {out}")


# ---------------------------------------------------------------- command line


def parse_arguments():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--people", type=int, default=4000, help="toy people to draw and train on")
    add("--steps", type=int, help="optimiser steps of every stage (default: each stage's own)")
    add("--accumulate", type=int, default=1, help="batches added up before each optimiser step")
    add("--every", type=int, default=100, help="steps between checkpoints and validations")
    add("--seed", type=int, default=0, help="decides every random number, but not the people")
    add_device_arguments(parser)
    add("--out", type=Path, default=TINY, help="folder for the checkpoint")
    add("--resume", action="store_true", help=f"go on from the last checkpoints in {RUNS}")
    return parser.parse_args()


@processes()
def main():
    args = parse_arguments()
    refuse_torchrun("experiments.base")
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    options = Options(
        device,
        precision,
        steps=args.steps,
        accumulate=args.accumulate,
        every=args.every,
        seed=args.seed,
        resume=args.resume,
    )
    torch.manual_seed(args.seed)
    check_writable(args.out)
    with claim(RUNS):
        train_base(args.out, options, args.people)


if __name__ == "__main__":
    run(main)
