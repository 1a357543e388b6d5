"""A faster UNet: on CPUs weights packed for the kernels once, on GPUs torch.compile."""

from functools import partial

import torch
from torch import nn

from support.devices import is_large, pick_precision


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
        layer.forward = partial(run_packed, operation, weight, layer.bias, settings)
        layer.weight = None  # frees the old order


def run_packed(operation, weight, bias, settings, x):
    """The packed layer of x; nothing is applied to what comes out ("none")."""
    return operation(x, weight, bias, *settings, "none", [], "")


def compile_whole(unet):
    """torch.compile of the whole UNet: once for the shapes that it is called with."""
    compiled = torch.compile(unet.forward, dynamic=False)

    def forward(x_t, t, c_t, c_i=None, lam=1.0):
        t = torch.as_tensor(t, device=x_t.device)  # for every number it would be compiled anew
        return compiled(x_t, t, c_t, c_i, lam)

    unet.forward = forward


def prepare_unet(unet, device, precision, compiled=False):
    """What is done to a UNet once, so that every step is faster. compiled: --compile."""
    if device.type == "cpu":
        is_fast = precision in ("fp32", pick_precision("auto", device))
        if is_fast and is_large(unet):
            pack(unet)  # the weights of a small one stay in the caches
        if compiled:
            print("--compile is for GPUs: on a CPU it would take longer than it saves; left out")
    elif compiled:
        compile_whole(unet)
