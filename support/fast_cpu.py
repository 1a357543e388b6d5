"""A faster UNet on CPUs: weights packed for the kernels once, and torch.compile block by block."""

from functools import partial

import torch
from torch import nn

from support.devices import is_large, pick_precision

PACKED = []  # (operation, packed weight, bias, settings) of every packed layer; kept until the end


@torch.library.custom_op("fast_cpu::packed", mutates_args=())
def packed(x: torch.Tensor, number: int) -> torch.Tensor:
    """The layer PACKED[number] of x.

    One operation to torch.compile, which cannot look into packed weights.
    """
    operation, weight, bias, settings = PACKED[number]
    return operation(x, weight, bias, *settings, "none", [], "")


@packed.register_fake
def _(x, number):
    """The shape of the answer, which torch.compile wants to know."""
    _, weight, _, settings = PACKED[number]
    channels = weight.shape[0]
    if not settings:  # a linear layer
        return x.new_empty(*x.shape[:-1], channels)
    stride = settings[1][0]
    height = -(-x.shape[2] // stride)  # rounded up
    width = -(-x.shape[3] // stride)
    empty = x.new_empty(len(x), channels, height, width)
    return empty.to(memory_format=torch.channels_last)


@torch.no_grad()
def pack(unet):
    """Bring weights into the order that the CPU's kernels read, once; PyTorch does it at every step.

    In float32 it halves the time of Stable Diffusion's deep convolutions. The functions are private
    ones of PyTorch, used as torch.compile uses them; without them (macOS) nothing is packed.
    """
    if not torch.backends.mkldnn.is_available():
        return
    onednn = torch.ops.mkldnn
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            settings = (layer.padding, layer.stride, layer.dilation, layer.groups)
            operation = onednn._convolution_pointwise
            weight = onednn._reorder_convolution_weight(layer.weight, *settings, [])
        elif isinstance(layer, nn.Linear) and "proj_" not in name:  # Transformer2D reads those
            settings = ()
            operation = onednn._linear_pointwise
            weight = onednn._reorder_linear_weight(layer.weight)
        else:
            continue
        PACKED.append((operation, weight, layer.bias, settings))
        layer.forward = partial(packed, number=len(PACKED) - 1)
        layer.weight = None  # frees the old order


def compile_blocks(unet):
    """torch.compile, block by block: what lies between the packed layers becomes a few loops."""
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    torch._dynamo.config.recompile_limit = 2 * len(blocks)  # blocks share their functions
    for block in blocks:  # dynamic=False: or the second block would share the first one's shapes
        block.forward = torch.compile(block.forward, dynamic=False)


def prepare_unet(unet, device, precision, compiled=False):
    """What is done to a UNet once, so that every step is faster. compiled: --compile."""
    is_fast = precision in ("fp32", pick_precision("auto", device))
    if device.type == "cpu" and is_fast and is_large(unet):
        pack(unet)  # the weights of a small one stay in the caches
    if compiled:
        compile_blocks(unet)
