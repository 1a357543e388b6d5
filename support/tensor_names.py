"""Published names of tensors -> ours, which are those of diffusers' folders.

Single-file checkpoints (.safetensors, .ckpt) keep the names of the original code of Stable
Diffusion, and older folders keep older names of the VAE's attention. Names that are already ours
come back unchanged, so every file can be sent through here.
"""

import re

RESNET = {  # inside a ResNet block of the original UNet
    ".in_layers.0.": ".norm1.",
    ".in_layers.2.": ".conv1.",
    ".emb_layers.1.": ".time_emb_proj.",
    ".out_layers.0.": ".norm2.",
    ".out_layers.3.": ".conv2.",
    ".skip_connection.": ".conv_shortcut.",
}
UNET = {  # outside its blocks
    "time_embed.0.": "time_embedding.linear_1.",
    "time_embed.2.": "time_embedding.linear_2.",
    "input_blocks.0.0.": "conv_in.",
    "middle_block.0.": "mid_block.resnets.0.",
    "middle_block.1.": "mid_block.attentions.0.",
    "middle_block.2.": "mid_block.resnets.1.",
    "out.0.": "conv_norm_out.",
    "out.2.": "conv_out.",
}
VAE = {  # the original VAE
    ".mid.block_1.": ".mid_block.resnets.0.",
    ".mid.block_2.": ".mid_block.resnets.1.",
    ".mid.attn_1.norm.": ".mid_block.attentions.0.group_norm.",
    ".mid.attn_1.": ".mid_block.attentions.0.",
    ".downsample.conv.": ".downsamplers.0.conv.",
    ".upsample.conv.": ".upsamplers.0.conv.",
    ".nin_shortcut.": ".conv_shortcut.",
    "coder.norm_out.": "coder.conv_norm_out.",
}
VAE_ATTENTION = {  # the original's, and older folders'
    ".0.q.": ".0.to_q.",
    ".0.k.": ".0.to_k.",
    ".0.v.": ".0.to_v.",
    ".0.query.": ".0.to_q.",
    ".0.key.": ".0.to_k.",
    ".0.value.": ".0.to_v.",
    ".0.proj_out.": ".0.to_out.0.",
    ".0.proj_attn.": ".0.to_out.0.",
}


def our_name(name, config):
    """Our name of a published tensor. config: the network's, a dict of ours or one of transformers'."""
    if not isinstance(config, dict):  # CLIP: published text encoders carry a prefix
        return name.removeprefix("text_model.")
    if config["_class_name"] == "AutoencoderKL":
        return vae_name(name, levels=len(config["block_out_channels"]))
    return unet_name(name, layers=config["layers_per_block"])


def unet_name(name, layers):
    """Of the UNet with so many ResNet blocks a level on the way down, one more on the way up.

    With two of them:
        time_embed.0.weight                  -> time_embedding.linear_1.weight
        input_blocks.1.0.in_layers.0.weight  -> down_blocks.0.resnets.0.norm1.weight
        input_blocks.2.1.norm.weight         -> down_blocks.0.attentions.1.norm.weight
        input_blocks.3.0.op.weight           -> down_blocks.0.downsamplers.0.conv.weight
        output_blocks.4.1.proj_in.weight     -> up_blocks.1.attentions.1.proj_in.weight
        output_blocks.5.2.conv.weight        -> up_blocks.1.upsamplers.0.conv.weight
    """
    for old, new in UNET.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
    block = re.match(r"(input|output)_blocks\.(\d+)\.(\d)\.", name)
    if block:
        side, number, part = block[1], int(block[2]), int(block[3])
        rest = name[block.end() :]
        # The original counts its blocks through all levels; input_blocks.0 is conv_in.
        first = 1 if side == "input" else 0
        level, i = divmod(number - first, layers + 1)
        blocks = f"down_blocks.{level}" if side == "input" else f"up_blocks.{level}"
        if rest.startswith("op."):
            name = f"{blocks}.downsamplers.0.conv.{rest.removeprefix('op.')}"
        elif rest.startswith("conv."):
            name = f"{blocks}.upsamplers.0.{rest}"
        else:
            kind = "resnets" if part == 0 else "attentions"
            name = f"{blocks}.{kind}.{i}.{rest}"
    return replace(name, RESNET)


def vae_name(name, levels):
    """Of the VAE with so many levels; the original's decoder counts them from the top.

    With four of them:
        encoder.down.1.block.0.nin_shortcut.weight -> encoder.down_blocks.1.resnets.0.conv_shortcut.weight
        decoder.up.3.upsample.conv.weight          -> decoder.up_blocks.0.upsamplers.0.conv.weight
        decoder.mid.attn_1.q.weight                -> decoder.mid_block.attentions.0.to_q.weight
    """  # noqa: E501
    block = re.match(r"(encoder\.down|decoder\.up)\.(\d+)\.", name)
    if block:
        level = int(block[2])
        if block[1] == "decoder.up":
            level = levels - 1 - level
        rest = re.sub(r"^block\.(\d+)", r"resnets.\1", name[block.end() :])
        name = f"{block[1]}_blocks.{level}.{rest}"
    name = replace(name, VAE)
    if "attentions" in name:
        name = replace(name, VAE_ATTENTION)
    return name


def replace(name, table):
    for old, new in table.items():
        name = name.replace(old, new)
    return name
