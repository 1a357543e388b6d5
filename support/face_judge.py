"""FaceJudge: a small recogniser of faces that was trained here, for tables in which MobileFaceNet
itself makes the embeddings: nobody is judged by the network that made what is judged.

A judge may know everybody, a method may not: it is trained on all people of a folder, on those of the
table by their references only (experiments/base_judge.py).
"""

import torch
import torch.nn.functional as F
from torch import nn

from support.files import save_tensors
from support.weights import read_safetensors

SIDE = 64  # pixels


class Residual(nn.Module):
    """Two 3 × 3 convolutions of half the side, added to a 1 × 1 convolution of their input."""

    def __init__(self, channels, wider):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv1 = nn.Conv2d(channels, wider, 3, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(8, wider)
        self.conv2 = nn.Conv2d(wider, wider, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, wider, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.shortcut(F.avg_pool2d(x, 2))


class FaceJudge(nn.Module):
    """A judge of faces: pictures (B, 3, 64, 64) in [−1, 1] -> features (B, 128).

    Like MobileFaceNet's, their direction says who it is.
    """

    name = "FaceJudge of experiments.base_judge, which knows everybody, the table's by their references"

    def __init__(self, width=32):
        super().__init__()
        self.config = dict(width=width)
        layers = [nn.Conv2d(3, width, 3, padding=1)]
        channels = width
        for wider in (2 * width, 4 * width, 8 * width):  # 64 -> 32 -> 16 -> 8 pixels
            layers.append(Residual(channels, wider))
            channels = wider
        layers += [nn.GroupNorm(8, channels), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        # Where a thing is counts: one weight for each of the 8 × 8 places, as in MobileFaceNet.
        self.places = nn.Conv2d(channels, channels, SIDE // 8, groups=channels)
        self.head = nn.Linear(channels, 128)

    def resize(self, images):
        """Pictures of any size (B, 3, H, W) -> (B, 3, 64, 64)."""
        if images.shape[-2:] == (SIDE, SIDE):
            return images
        return F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)

    def forward(self, images):
        """Pictures (B, 3, 64, 64) -> (B, 128)."""
        places = self.places(self.body(images)).flatten(1)  # (B, C)
        return self.head(F.silu(places))

    def read(self, images):
        """Faces (B, 3, 64, 64) -> features (B, 128), face plus mirror image; no p(y|x)."""
        return self(images) + self(images.flip(3)), None

    def save(self, path, metadata=None):
        """Write a .safetensors file in float16."""
        tensors = {name: tensor.half() for name, tensor in self.state_dict().items()}
        width = str(self.config["width"])
        save_tensors(path, tensors, {**(metadata or {}), "face_judge": width})

    @classmethod
    def load(cls, path):
        """Read what `save` wrote: float32, in eval mode. ValueError if it is something else."""
        tensors, metadata = read_safetensors(path)
        try:
            with torch.device("meta"):  # draws no random numbers
                judge = cls(int(metadata["face_judge"]))
            tensors = {name: tensor.float() for name, tensor in tensors.items()}
            judge.load_state_dict(tensors, assign=True)
        except Exception as error:  # a wrong file fails in many ways
            hint = "python -m experiments.base_judge makes one"
            raise ValueError(f"{path} is no judge of faces: {hint}") from error
        return judge.eval().requires_grad_(False)
