"""The networks of Stable Diffusion 1.x: the UNet, the VAE, and a whole checkpoint of them.

The UNet is ε_θ of eq. 1, 10 and 11: it reads the noised latent x_t, the step t, the prompt's
tokens c_τ and, with an adapter attached, the image tokens c_i; it answers with the noise. Its U in
Stable Diffusion 1.5, with the channels of every ResNet block's input:

    x_t   4 → conv_in 320                                         320 → conv_out → 4   ε̂
      64×64   down 0   320, 320                up 3   640+320, 320+320, 320+320     → 320
      32×32     down 1   320, 640              up 2   1280+640, 640+640, 640+320    → 640
      16×16       down 2   640, 1280           up 1   1280+1280, 1280+1280, 1280+640 → 1280
       8×8          down 3   1280, 1280        up 0   1280+1280, three times        → 1280
                       mid   1280, 1280

On the way down every output is kept as a skip: that of conv_in, of each ResNet block (with its
transformer) and of each halving, 12 in all. The way up reads them, the latest first: 640+320 is 640
channels from below and a skip of 320. All levels but the lowest have transformers.

The VAE maps pixels in [−1, 1] to latents and back. Its encoder is such a way down, its decoder such
a way up, both without skips. Attributes have the names of the published files (diffusers' layout);
`up_blocks` comes before `mid_block` because published adapters number layers down, up, mid.
"""

import math
from collections import OrderedDict
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attention import SpatialAttention, Transformer2D
from ddpm import Schedule
from support import checkpoints, configs
from support.devices import match
from support.pictures import clip_pixels
from support.text import tokenize


def chain(**layers):
    """The layers one after another, under their names in the checkpoint."""
    return nn.Sequential(OrderedDict(layers))


class ResnetBlock(nn.Module):
    """Two 3×3 convolutions, added to their input; the time embedding comes in between them."""

    def __init__(self, in_channels, out_channels, groups, eps, temb_dim=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(temb_dim, out_channels) if temb_dim else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, temb=None):
        h = self.conv1(F.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(temb)[:, :, None, None]  # (B, C) -> (B, C, 1, 1)
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h + shortcut


def make_downsampler(channels, padding):
    """Halves the size: a 3×3 convolution of stride 2.

    padding: 1 all around in the UNet; in the VAE 0, and one pixel right and bottom instead.
    """
    pad = nn.Identity() if padding else nn.ZeroPad2d((0, 1, 0, 1))
    return chain(pad=pad, conv=nn.Conv2d(channels, channels, 3, stride=2, padding=padding))


class Upsampler(nn.Module):
    """Doubles the size (or goes to `size`) by repeating pixels, then a 3×3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size=None):
        factor = None if size else 2.0
        return self.conv(F.interpolate(x, size=size, scale_factor=factor, mode="nearest"))


class Block(nn.Module):
    """One level: ResNet block i, then attention i if there is one, …; then a new size.

    All arguments are lists of layers; the last two hold one layer or none. forward is that of the
    VAE's levels and of the middle of both networks (two ResNet blocks, one attention).
    """

    def __init__(self, resnets, attentions=(), downsamplers=(), upsamplers=()):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList(downsamplers)
        self.upsamplers = nn.ModuleList(upsamplers)

    def run_layer(self, i, x, temb, context):
        """ResNet block i, and the attention after it if there is one."""
        x = self.resnets[i](x, temb)
        if i < len(self.attentions):
            x = self.attentions[i](x, *context)
        return x

    def forward(self, x, temb=None, context=()):
        """temb: of the UNet. context: the other arguments of the attentions, (c_t, c_i, lam)."""
        for i in range(len(self.resnets)):
            x = self.run_layer(i, x, temb, context)
        for layer in [*self.downsamplers, *self.upsamplers]:
            x = layer(x)
        return x


class DownBlock(Block):
    """A level of the UNet's way down: returns all its outputs, the skips."""

    def forward(self, x, temb, context):
        outputs = []
        for i in range(len(self.resnets)):
            x = self.run_layer(i, x, temb, context)
            outputs.append(x)
        for downsampler in self.downsamplers:
            outputs.append(downsampler(x))
        return outputs


class UpBlock(Block):
    """A level of the UNet's way up: each ResNet block reads [x, skip]."""

    def forward(self, x, temb, context, skips, size=None):
        """skips: one for each ResNet block, in this order. size: (height, width) to double to."""
        for i, skip in enumerate(skips):
            x = torch.cat([x, skip], dim=1)
            x = self.run_layer(i, x, temb, context)
        for upsampler in self.upsamplers:
            x = upsampler(x, size)
        return x


def embed_time(t, dim):
    """[cos(t·ω), sin(t·ω)],   ω_k = 10000^(−k/half),   k = 0 … half − 1,   half = dim/2

    t (B,) -> float32 (B, dim).
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    omega = torch.exp(-math.log(10000) * k / half)
    angle = t[:, None].float() * omega  # (B, half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class UNet(nn.Module):
    """ε_θ(x_t, t, c_τ, c_i), built from the keys of a published `unet/config.json`.

    Without arguments it is Stable Diffusion 1.5's. ValueError for a setting of its relatives that
    is not implemented here (support/configs.py). `gradient_checkpointing = True` trades time
    for memory in training: blocks are computed again in the backward pass.
    """

    def __init__(self, **config):
        super().__init__()
        self.config = configs.complete_config(config, "UNet2DConditionModel")
        self.gradient_checkpointing = False
        widths = self.config["block_out_channels"]
        groups = self.config["norm_num_groups"]
        eps = self.config["norm_eps"]
        temb_dim = 4 * widths[0]
        make_resnet = partial(ResnetBlock, groups=groups, eps=eps, temb_dim=temb_dim)

        self.conv_in = nn.Conv2d(self.config["in_channels"], widths[0], 3, padding=1)
        linear_1 = nn.Linear(widths[0], temb_dim)
        linear_2 = nn.Linear(temb_dim, temb_dim)
        self.time_embedding = chain(linear_1=linear_1, act=nn.SiLU(), linear_2=linear_2)
        self.down_blocks = nn.ModuleList()
        self.up_blocks = nn.ModuleList()
        skips = self.add_down_blocks(widths, make_resnet)
        self.add_up_blocks(widths, make_resnet, skips)
        middle = [make_resnet(widths[-1], widths[-1]) for _ in range(2)]  # after up: see above
        self.mid_block = Block(middle, self.make_transformers(1, -1, "CrossAttn"))
        self.conv_norm_out = nn.GroupNorm(groups, widths[0], eps=eps)
        self.conv_out = nn.Conv2d(widths[0], self.config["out_channels"], 3, padding=1)

    def add_down_blocks(self, widths, make_resnet):
        """Returns `skips`, the channels of every output that the way up will read."""
        layers = self.config["layers_per_block"]
        channels = widths[0]
        skips = [channels]
        for level, kind in enumerate(self.config["down_block_types"]):
            resnets = []
            for _ in range(layers):
                resnets.append(make_resnet(channels, widths[level]))
                channels = widths[level]
                skips.append(channels)
            attentions = self.make_transformers(layers, level, kind)
            downsamplers = []
            if level < len(widths) - 1:
                downsamplers.append(make_downsampler(channels, padding=1))
                skips.append(channels)
            self.down_blocks.append(DownBlock(resnets, attentions, downsamplers))
        return skips

    def add_up_blocks(self, widths, make_resnet, skips):
        """One more ResNet block per level: it reads the skip that entered the level going down."""
        layers = self.config["layers_per_block"] + 1
        channels = widths[-1]
        for i, kind in enumerate(self.config["up_block_types"]):
            level = len(widths) - 1 - i
            resnets = []
            for _ in range(layers):
                resnets.append(make_resnet(channels + skips.pop(), widths[level]))
                channels = widths[level]
            attentions = self.make_transformers(layers, level, kind)
            upsamplers = [Upsampler(channels)] if level > 0 else []
            self.up_blocks.append(UpBlock(resnets, attentions, upsamplers=upsamplers))

    def make_transformers(self, count, level, kind):
        """The transformers of a level, or none if its kind of block has none."""
        if not kind.startswith("CrossAttn"):
            return []
        heads = self.config["attention_head_dim"]  # sic: in Stable Diffusion 1.5 it is their number
        make = partial(
            Transformer2D,
            channels=self.config["block_out_channels"][level],
            heads=heads if isinstance(heads, int) else heads[level],
            context_dim=self.config["cross_attention_dim"],
            groups=self.config["norm_num_groups"],
            linear=self.config["use_linear_projection"],
        )
        return [make() for _ in range(count)]

    def forward(self, x_t, t, c_t, c_i=None, lam=1.0):
        """eps_hat = ε_θ(x_t, t, c_τ, c_i): the noise in x_t.

        x_t (B, C, H, W) latents of any size; t: int or (B,) steps 0 … T−1; c_t (B, L, D) text
        tokens; c_i (B, 4M, D) image tokens or None; lam: λ of eq. 3. Returns (B, C, H, W).
        """
        t = torch.as_tensor(t, device=x_t.device).expand(x_t.shape[0])
        temb = embed_time(t, self.conv_in.out_channels).to(x_t.dtype)
        temb = F.silu(self.time_embedding(temb))  # (B, temb_dim)
        context = (c_t, c_i, lam)

        x = self.conv_in(x_t)
        skips = [x]
        for block in self.down_blocks:
            outputs = self.run(block, skips[-1], temb, context)
            skips.extend(outputs)
        x = self.run(self.mid_block, skips[-1], temb, context)
        for block in self.up_blocks:
            used = []  # the latest skips, the last one first
            for _ in block.resnets:
                used.append(skips.pop())
            size = skips[-1].shape[2:] if skips else None  # of the skips that the next level reads
            x = self.run(block, x, temb, context, used, size)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def run(self, block, *inputs):
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


class Posterior(NamedTuple):
    """N(mean, exp(logvar)), diagonal: what the VAE's encoder answers. Both (B, C, h, w)."""

    mean: torch.Tensor
    logvar: torch.Tensor

    def sample(self, generator=None):
        """μ + σ·ε, ε ~ N(0, I) drawn from `generator`, on its device (None: PyTorch's global one)."""
        mean = self.mean
        device = generator.device if generator else mean.device
        eps = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=device)
        return mean + torch.exp(0.5 * self.logvar) * eps.to(mean.device)


class AutoencoderKL(nn.Module):
    """The VAE, built from the keys of a published `vae/config.json`. ValueError as in UNet."""

    def __init__(self, **config):
        super().__init__()
        self.config = configs.complete_config(config, "AutoencoderKL")
        latent = self.config["latent_channels"]
        self.encoder = self.make_encoder(self.config["in_channels"], 2 * latent)
        self.decoder = self.make_decoder(latent, self.config["out_channels"])
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def make_encoder(self, in_channels, out_channels):
        widths = self.config["block_out_channels"]
        channels = widths[0]
        conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        blocks = []
        for level, width in enumerate(widths):
            resnets = self.make_resnets(channels, width, self.config["layers_per_block"])
            is_last = level == len(widths) - 1
            downsamplers = [] if is_last else [make_downsampler(width, padding=0)]
            blocks.append(Block(resnets, downsamplers=downsamplers))
            channels = width
        down = nn.Sequential(*blocks)
        middle = self.make_middle(channels)
        end = self.make_end(channels, out_channels)
        return chain(conv_in=conv_in, down_blocks=down, mid_block=middle, **end)

    def make_decoder(self, in_channels, out_channels):
        widths = self.config["block_out_channels"]
        channels = widths[-1]
        conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        middle = self.make_middle(channels)
        blocks = []
        for level in reversed(range(len(widths))):
            resnets = self.make_resnets(channels, widths[level], self.config["layers_per_block"] + 1)
            channels = widths[level]
            upsamplers = [Upsampler(channels)] if level > 0 else []
            blocks.append(Block(resnets, upsamplers=upsamplers))
        up = nn.Sequential(*blocks)
        end = self.make_end(channels, out_channels)
        return chain(conv_in=conv_in, mid_block=middle, up_blocks=up, **end)

    def make_resnets(self, in_channels, out_channels, count):
        groups = self.config["norm_num_groups"]
        inputs = [in_channels] + [out_channels] * (count - 1)
        return [ResnetBlock(channels, out_channels, groups, eps=1e-6) for channels in inputs]

    def make_middle(self, channels):
        resnets = self.make_resnets(channels, channels, 2)
        if not self.config["mid_block_add_attention"]:
            return Block(resnets)
        return Block(resnets, [SpatialAttention(channels, self.config["norm_num_groups"])])

    def make_end(self, channels, out_channels):
        norm = nn.GroupNorm(self.config["norm_num_groups"], channels, eps=1e-6)
        conv_out = nn.Conv2d(channels, out_channels, 3, padding=1)
        return dict(conv_norm_out=norm, act=nn.SiLU(), conv_out=conv_out)

    def encode(self, x):
        """x (B, 3, H, W) in [−1, 1] -> Posterior(μ, log σ²); log σ² clamped to [−30, 20]."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30, 20))

    def decode(self, z):
        """z (B, C, h, w), unscaled -> pixels (B, 3, H, W), about [−1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z))


class StableDiffusion:
    """A checkpoint: unet, vae, text_encoder (Γ_τ), tokenizer, image_encoder (Γ_i, or None), schedule.

    `scheduler` and `preprocessor` are the contents of the published JSON files.
    """

    def __init__(self, unet, vae, text_encoder, tokenizer, image_encoder=None,
                 scheduler=configs.SCHEDULER, preprocessor=configs.CLIP_COLOURS):
        self.unet = unet
        self.vae = vae
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer
        self.image_encoder = image_encoder
        self.scheduler = scheduler
        self.preprocessor = preprocessor
        self.schedule = Schedule(configs.make_betas(scheduler))

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32, image_encoder=None, config=None):
        """Read a checkpoint: a folder in diffusers' layout, a hub id, a .safetensors or .ckpt file.

        image_encoder: folder or hub id (h94/IP-Adapter) of Γ_i; default: the one in or beside the
        checkpoint, if any; False: none. config: for a single file, see checkpoints.Checkpoint.
        FileNotFoundError names a missing part, ValueError a tensor or setting that does not fit.
        """
        files = checkpoints.Checkpoint(path, dtype, config)
        unet = files.load("unet", lambda config: UNet(**config), device)
        vae = files.load("vae", lambda config: AutoencoderKL(**config), device)
        text_encoder = files.load("text_encoder", checkpoints.make_text_encoder, device)
        vision, preprocessor = files.load_image_encoder(image_encoder, device)
        scheduler = files.settings("scheduler", "scheduler_config.json")
        tokenizer = files.load_tokenizer()
        return cls(unet, vae, text_encoder, tokenizer, vision, scheduler, preprocessor)

    def save(self, folder, dtype=torch.float16):
        """Write `folder` in the published layout, which diffusers opens; what else is in it stays."""
        networks = dict(unet=self.unet, vae=self.vae)
        networks |= dict(text_encoder=self.text_encoder, image_encoder=self.image_encoder)
        rest = (self.tokenizer, self.scheduler, self.preprocessor, dtype)
        checkpoints.write_checkpoint(folder, networks, *rest)

    @property
    def image_size(self):
        """Side of the pictures in pixels: the UNet's latents times the VAE's reduction."""
        halvings = len(self.vae.config["block_out_channels"]) - 1
        return self.unet.config["sample_size"] * 2**halvings

    def text_features(self, prompts):
        """c_τ = Γ_τ(τ), with gradients: `encode_prompts` for those who train the text encoder."""
        window = self.text_encoder.config.max_position_embeddings
        ids = tokenize(self.tokenizer, prompts, window)  # (B, L)
        return self.text_encoder(ids.to(self.text_encoder.device)).last_hidden_state

    @torch.no_grad()
    def encode_prompts(self, prompts):
        """c_τ = Γ_τ(τ): last hidden states after the final LayerNorm, padded to the window, no mask.

        prompts: list of B strings; one of more than 77 tokens is cut, with a warning -> (B, L, D).
        """
        return self.text_features(prompts)

    @torch.no_grad()
    def encode_latents(self, images, generator=None):
        """z_0 = s·(μ + σ·ε),   N(μ, σ²) = VAE(x),   s = `scaling_factor`, 0.18215 as published.

        images (B, 3, H, W) in [−1, 1] -> (B, C, h, w). ε ~ N(0, I) from `generator`; None: ε = 0.
        """
        posterior = self.vae.encode(match(images, self.vae))
        z = posterior.sample(generator) if generator else posterior.mean
        return self.vae.config["scaling_factor"] * z

    @torch.no_grad()
    def decode_latents(self, z):
        """x = VAE⁻¹(z/s), clamped.   z (B, C, h, w) -> images (B, 3, H, W) in [−1, 1]."""
        z = match(z, self.vae) / self.vae.config["scaling_factor"]
        at_once = 1 if self.image_size > 128 else len(z)  # 512 × 512 pixels need 0.7 GB
        return torch.cat([self.vae.decode(part).clamp(-1, 1) for part in z.split(at_once)])

    @torch.no_grad()
    def embed_images(self, images):
        """Γ_i(x): the CLIP embeddings of photos.

        images: (B, 3, H, W) in [−1, 1], or a list of B PIL images -> (B, E). ValueError if there is
        no image encoder.
        """
        return self.image_encoder(match(self.clip_pixels(images), self.image_encoder)).image_embeds

    def clip_pixels(self, images):
        """Photos as the image encoder reads them; images, errors: as embed_images."""
        if self.image_encoder is None:
            hint = "name the folder or hub id of one (h94/IP-Adapter)"
            raise ValueError(f"the checkpoint has no image encoder: {hint}")
        size = self.image_encoder.config.image_size
        colours = (self.preprocessor["image_mean"], self.preprocessor["image_std"])
        return clip_pixels(images, size, *colours)
