"""The networks that base.py trains, with random weights, and the tokenizer of their prompts."""

import json
from dataclasses import dataclass

import torch

from unet import AutoencoderKL, StableDiffusion, UNet


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


@dataclass
class Sizes:
    """How large the networks of a model of 64 × 64 pictures are."""

    vae: list  # channels at 64 × 64, 32 × 32 and 16 × 16 pixels
    text: int  # width of Γ_τ, so of its tokens and of the embeddings that are compared with them
    text_heads: int
    image: int  # width of Γ_i
    image_layers: int
    image_heads: int
    unet: list  # channels at 16 × 16 and, with attention, at 8 × 8
    unet_heads: int


TOY_SIZES = Sizes([32, 64, 64], 128, 4, 160, 4, 5, [64, 128], 4)
PHOTO_SIZES = Sizes([32, 64, 96], 160, 5, 160, 5, 5, [80, 160], 5)


def make_vae(sizes):
    """Pixels (B, 3, 64, 64) <-> latents (B, 4, 16, 16); of toys 0.9 million numbers."""
    return AutoencoderKL(
        sample_size=64,
        block_out_channels=sizes.vae,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=16,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        mid_block_add_attention=False,
    )


def make_text_encoder(sizes, tokenizer, window):
    """Γ_τ: 3 layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.text,
        intermediate_size=4 * sizes.text,
        num_hidden_layers=3,
        num_attention_heads=sizes.text_heads,
        max_position_embeddings=window,
        projection_dim=sizes.text,
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


def make_image_encoder(sizes):
    """Γ_i: a ViT on 8 × 8 patches of 8 × 8 pixels."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        image_size=64,
        patch_size=8,
        hidden_size=sizes.image,
        intermediate_size=4 * sizes.image,
        num_hidden_layers=sizes.image_layers,
        num_attention_heads=sizes.image_heads,
        projection_dim=sizes.text,
    )
    network = CLIPVisionModelWithProjection(config)
    positions = network.vision_model.embeddings.position_embedding.weight.data
    positions[1:] = 0.5 * sine_positions(side=8, width=sizes.image)  # row 0 is the class token
    return network


def make_unet(sizes):
    """ε_θ for latents 4 × 16 × 16, attention at 8 × 8 only; of toys 4 million numbers."""
    return UNet(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=sizes.unet,
        layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=sizes.text,
        attention_head_dim=sizes.unet_heads,
        norm_num_groups=16,
    )


def make_world(sizes, captions, device):
    """A StableDiffusion with random weights and a tokenizer for `captions`.

    The weights come from PyTorch's global generator, in the order of these lines.
    """
    window = 48
    vae = make_vae(sizes)
    tokenizer = make_tokenizer(captions, window)
    text_encoder = make_text_encoder(sizes, tokenizer, window)
    image_encoder = make_image_encoder(sizes)
    unet = make_unet(sizes)
    for network in (unet, vae, text_encoder, image_encoder):
        network.to(device)
    return StableDiffusion(unet, vae, text_encoder, tokenizer, image_encoder)


def make_tiny_world(captions, device):
    """`make_world` of the size of weights/tiny."""
    return make_world(TOY_SIZES, captions, device)


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
