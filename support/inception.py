"""The judge of photographs: Inception v3 of the official FID, built on torchvision's.

It differs from torchvision's in four places: 1008 classes, average pools that do not count the
padding, a max pool in the last block, and how pictures are brought to 299 × 299.
"""

from functools import partial
from http.client import HTTPException
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.models.inception import Inception3

from support.text import one_line
from support.weights import check_tensor, read_pickle

FILE = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SIZE = 299


def forward_block(block, pool, x):
    """A block of torchvision's Inception whose last branch pools as the TensorFlow graph of 2015."""
    *branches, _ = block._forward(x)  # its own pooled branch is thrown away: a few percent of time
    pooled = block.branch_pool(pool(x, 3, stride=1, padding=1))
    return torch.cat([*branches, pooled], dim=1)


class InceptionV3(Inception3):
    """Inception v3 of 2015-12-05: (B, 3, H, W) in [−1, 1] -> features (B, 2048).

    weights: the file of pytorch-fid (torch-fidelity's is the same), or its state dict.
    resize: "pytorch-fid" or "torch-fidelity", see `resize`. ValueError if either is something else.
    """

    RESIZE = ("pytorch-fid", "torch-fidelity")

    def __init__(self, weights, resize="pytorch-fid"):
        if resize not in self.RESIZE:
            raise ValueError(f"resize is one of {', '.join(self.RESIZE)}, not {resize!r}")
        with torch.device("meta"):  # no random weights that the file's would replace
            super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        for block in self.children():
            if hasattr(block, "branch_pool"):
                average = partial(F.avg_pool2d, count_include_pad=False)
                block.forward = partial(forward_block, block, average)
        last = self.Mixed_7c
        last.forward = partial(forward_block, last, F.max_pool2d)  # a slip that became the standard
        self.like_tensorflow = resize == "torch-fidelity"
        self.name = f"InceptionV3 of 2015-12-05, resize as {resize}"
        self.load_weights(weights)
        self.eval().requires_grad_(False)

    def load_weights(self, weights):
        try:
            if not isinstance(weights, dict):
                weights = read_pickle(weights)
            self.load_state_dict(weights, assign=True)
            for name, tensor in weights.items():
                if tensor.is_floating_point():  # not the counters of batches
                    check_tensor("the file", name, tensor)
        except Exception as error:
            reason = one_line(error)
            raise ValueError(f"no Inception weights of the official FID: {reason}") from error

    def resize(self, images):
        """(B, 3, H, W) -> (B, 3, 299, 299), bilinear without antialias, in one of two ways.

        "pytorch-fid" lays the centres of pixels on each other, "torch-fidelity" their upper left
        corners, as TensorFlow 1 did.
        """
        if not self.like_tensorflow:
            return F.interpolate(images, (SIZE, SIZE), mode="bilinear", align_corners=False)
        for dim in (3, 2):
            pixels = images.shape[dim]
            target = torch.arange(SIZE, device=images.device, dtype=images.dtype)
            position = target * (pixels / SIZE)
            lower = position.long()
            upper = (lower + 1).clamp(max=pixels - 1)
            share = (position - lower).view(-1, *[1] * (3 - dim))  # of the upper neighbour
            a = images.index_select(dim, lower)
            b = images.index_select(dim, upper)
            images = a.lerp(b, share)
        return images

    def forward(self, images):
        x = self.resize(images)
        if self.like_tensorflow:
            x = (127.5 * x - 0.5) / 128  # (v − 128)/128 of bytes v = 127.5·(x + 1)
        for layer in list(self.children())[:-2]:  # all but dropout and classes
            x = layer(x)
        return x.flatten(1)

    def read(self, images):
        """-> features (B, 2048), p(y|x) (B, 1008) without the bias, as torch-fidelity's."""
        features = self(images)
        logits = features @ self.fc.weight.T
        return features, logits.cpu().double().softmax(1)  # on the CPU: mps has no float64


def find_weights():
    """The official weights: a file in torch.hub's cache, else downloaded; None without a network."""
    folder = Path(torch.hub.get_dir(), "checkpoints")
    files = sorted(folder.glob(f"*{FILE.removeprefix('pt_')}"))
    if files:
        return files[0]
    try:
        return torch.hub.load_state_dict_from_url(
            URL, map_location="cpu", weights_only=True, check_hash=True
        )
    except (OSError, HTTPException):
        return None
    except RuntimeError as error:
        raise ValueError(f"{URL}: {error}") from None
