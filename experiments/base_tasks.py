"""What each stage of base.py learns: the losses of the VAE, the CLIP pair, the judge and the UNet."""

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from dreambooth import snr
from experiments.base_data import make_numpy_generator
from ip_adapter import adapter_loss, noise_error
from support.devices import device_of
from support.pictures import to_bytes, to_tensor
from toyfaces.captions import write_caption
from toyfaces.drawing import ATTRIBUTES
from toyfaces.judge import augment, label_tensors, masked_cross_entropy, share_right
from train import Task, draw_t_and_eps, fixed_validation
from unet import Posterior

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
        images = to_tensor(faces.pick(i, generator)).to(device)
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
    """Both encoders of `sd`, and `scale`, the log of the factor of their cosines."""

    def __init__(self, sd):
        super().__init__()
        self.sd = sd
        self.text = sd.text_encoder
        self.vision = sd.image_encoder
        for encoder in (self.text, self.vision):
            # Twice as fast as the fused kernel, whose backward pass is slow on CPUs.
            encoder.set_attn_implementation("eager")
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


class AttributePair(ClipPair):
    """The pair, and a head that reads every attribute off an image embedding: for training only."""

    def __init__(self, sd):
        super().__init__(sd)
        self.classes = {name: len(words) for name, words in ATTRIBUTES.items()}
        width = sd.image_encoder.config.projection_dim
        self.head = nn.Linear(width, sum(self.classes.values()))

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
    pair = AttributePair(sd).to(device)
    classes, seen = label_tensors(faces.labels)

    def loss(batch, generator):
        # Photos, and a new caption of each.
        i = torch.randint(len(faces.pixels), (batch,), generator=generator)
        rng = make_numpy_generator(generator)
        captions = [faces.write_caption(k, rng) for k in i.tolist()]
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


def min_snr_weights(t, schedule, gamma):
    """min(SNR, γ)/SNR,   SNR = ᾱ_t/(1−ᾱ_t): steps with little noise count less (Hang et al. 2023).

    t (B,) -> (B,) float32.
    """
    ratio = snr(schedule)[t.cpu()]
    weights = ratio.clamp(max=gamma) / ratio
    return weights.float().to(t.device)


def diffusion_loss(sd, z_0, t, eps, c_t, c_i, gamma=0.0):
    """Eq. 1, its steps weighted by `min_snr_weights` if γ is not 0: a scalar."""
    if not gamma:
        return adapter_loss(sd.unet, z_0, t, eps, c_t, c_i, sd.schedule)
    error = noise_error(sd.unet, z_0, t, eps, c_t, c_i, sd.schedule)
    error = error.mean(dim=(1, 2, 3))  # (B,)
    return (min_snr_weights(t, sd.schedule, gamma) * error).mean()


def unet_task(sd, z_0, faces, held_features, device):
    """Eq. 1 without image tokens: text to image on captions, one in ten of them empty.

    z_0 (n, C, h, w): the latents of `faces`. validation: eq. 1 on held-out people.
    """

    def loss(batch, generator):
        i = torch.randint(len(faces.pixels), (batch,), generator=generator)
        latents = z_0[i].to(device)
        rng = make_numpy_generator(generator)
        captions = []
        for k in i.tolist():
            is_named = rng.random() > 0.1
            captions.append(faces.write_caption(k, rng) if is_named else "")
        c_t = sd.encode_prompts(captions).float()
        t, eps = draw_t_and_eps(sd, latents, generator)
        return adapter_loss(sd.unet, latents, t, eps, c_t, None, sd.schedule)

    return Task("unet", sd.unet, loss, validate_text_alone(sd, held_features, device))


def validate_text_alone(sd, held_features, device):
    """() -> eq. 1 without image tokens on held-out people, always with the same t and ε."""

    def make_no_tokens(embeds):
        return None

    return fixed_validation(sd, held_features, make_no_tokens, device)
