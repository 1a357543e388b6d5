"""The judge of the tiny world: a small network that reads every attribute off a picture.

`FeatureNet` plays the part of Inception v3. Its features give FID and KID, its probabilities of
hair style × hair colour give IS. And because a drawing knows the truth, it measures what Inception
cannot (`grade`): identity, the share of the person's attributes that are right, and prompt, the
share of the scene's.

An attribute that the accessory hides (`HIDES`) is never asked for, neither in training nor in
grading, also where a part of it still shows: there FeatureNet would be wrong, not the picture.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from support.files import write_whole
from support.pictures import to_tensor
from toyfaces.drawing import ATTRIBUTES, IDENTITY, visible_attributes


def norm_and_act(channels):
    """What stands before each convolution but the first: two layers, in a list."""
    return [nn.GroupNorm(8, channels), nn.SiLU()]


class FeatureNet(nn.Module):
    """Pictures (B, 3, 64, 64) in [−1, 1] -> {attribute: logits (B, K)}, K its number of classes.

    A judge as metrics.py wants them: it has `name`, `resize` and `read`.
    `heads` is {attribute: K}.
    """
    name = "FeatureNet of the tiny world: not comparable with papers, which use InceptionV3"

    def __init__(self, width=32):
        super().__init__()
        self.heads = {name: len(words) for name, words in ATTRIBUTES.items()}

        # Three times half the side and more channels: 64 -> 32 -> 16 -> 8 pixels.
        layers = [nn.Conv2d(3, width, 3, padding=1)]
        channels = width
        for wider in (2 * width, 4 * width, 4 * width):
            layers += norm_and_act(channels)
            layers.append(nn.Conv2d(channels, wider, 3, stride=2, padding=1))
            layers += norm_and_act(wider)
            layers.append(nn.Conv2d(wider, wider, 3, padding=1))
            channels = wider

        # Where a thing is counts as much as what it is: flatten the 8 × 8 pixels, do not average.
        layers += norm_and_act(channels)
        layers.append(nn.Conv2d(channels, width, 1))
        layers.append(nn.Flatten())
        layers.append(nn.Linear(width * 8 * 8, 256))
        layers.append(nn.LayerNorm(256))
        self.body = nn.Sequential(*layers)

        # One linear layer for all attributes; `answers` cuts its output into theirs.
        self.head = nn.Linear(256, sum(self.heads.values()))

    def features(self, x):
        """Pictures (B, 3, 64, 64) -> features (B, 256)."""
        return self.body(x)

    def answers(self, features):
        """Features (B, 256) -> {attribute: logits (B, K)}, in the order of ATTRIBUTES."""
        logits = self.head(F.silu(features))
        parts = logits.split(list(self.heads.values()), dim=1)
        return dict(zip(self.heads, parts))

    def forward(self, x):
        return self.answers(self.features(x))

    def resize(self, images):
        """Pictures of any size (B, 3, H, W) -> (B, 3, 64, 64)."""
        return F.interpolate(images, (64, 64), mode="bilinear", antialias=True)

    def read(self, images):
        """Pictures (B, 3, 64, 64) -> features (B, 256), p(y|x) (B, 36) of hair style × colour.

        The probabilities are float64 and on the CPU: IS is computed there, and mps has no float64.
        """
        features = self.features(images)
        answers = self.answers(features)
        style = answers["hair"].cpu().double().softmax(1)
        colour = answers["hair_colour"].cpu().double().softmax(1)
        pair = style[:, :, None] * colour[:, None, :]   # (B, 6, 1) x (B, 1, 6) -> (B, 6, 6)
        return features, pair.flatten(1)

    def save(self, folder):
        """Write folder/model.safetensors, float16. OSError if it cannot be written."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.half().cpu() for name, tensor in self.state_dict().items()}
        write_whole(folder / "model.safetensors", lambda part: save_file(tensors, part))

    @classmethod
    def load(cls, folder):
        """Read what `save` wrote: float32, CPU, in eval mode. ValueError if there is no file."""
        path = Path(folder) / "model.safetensors"
        if not path.is_file():
            raise ValueError(f"{folder}: no FeatureNet there; python -m experiments.base makes one")
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
        net = cls()
        net.load_state_dict(tensors)
        return net.eval()


# ---------------------------------------------------------------- right and wrong answers
#
# n pictures, A attributes in the order of ATTRIBUTES:
#     logits   {attribute: (n, K)}
#     classes  (n, A) integers, the truth
#     seen     (n, A) booleans, whether the accessory leaves the attribute visible

def label_tensors(labels):
    """List of n dictionaries {attribute: class number} -> classes (n, A), seen (n, A)."""
    classes = []
    seen = []
    for one in labels:
        visible = visible_attributes(one)
        classes.append([one[name] for name in ATTRIBUTES])
        seen.append([name in visible for name in ATTRIBUTES])
    return torch.tensor(classes), torch.tensor(seen)


def pick_classes(logits):
    """logits -> (n, A), the most likely class of each attribute, on the CPU."""
    best = [one.argmax(1) for one in logits.values()]
    return torch.stack(best, 1).cpu()


def share_right(logits, classes, seen):
    """-> (A,), for each attribute the share of right answers among the pictures that show it."""
    right = pick_classes(logits) == classes
    return (right & seen).sum(0) / seen.sum(0)


def masked_cross_entropy(logits, classes, seen):
    """Mean cross-entropy over all pictures and attributes that can be seen: a scalar."""
    columns = []
    for k, one in enumerate(logits.values()):
        columns.append(F.cross_entropy(one.float(), classes[:, k], reduction="none"))
    losses = torch.stack(columns, 1)   # (n, A)
    return losses[seen].mean()


def augment(images, generator):
    """Shift by up to 3 pixels, blur half of the pictures, add a little noise to all.

    The judge must not depend on what only a real photo has: sharp edges and exact places.
    images: (B, 3, S, S) in [−1, 1]; generator: torch.Generator on the CPU. Returns the same shape.
    """
    batch = len(images)
    side = images.shape[-1]
    device = images.device

    # Shift: repeat the edge pixels 3 times on every side, then cut a window at another place.
    shifts = torch.randint(0, 7, (2, batch), generator=generator)   # 3 is no shift
    padded = F.pad(images, (3, 3, 3, 3), "replicate")
    windows = []
    for k in range(batch):
        left, top = shifts[:, k].tolist()
        windows.append(padded[k, :, top:top + side, left:left + side])
    shifted = torch.stack(windows)

    # Blur: 3 × 3 means, mixed in by a weight that is 0 for half of the pictures, else up to 1.
    blurred = F.avg_pool2d(F.pad(shifted, (1, 1, 1, 1), "replicate"), 3, stride=1)
    amount = torch.rand(batch, 1, 1, 1, generator=generator)
    weight = (2 * amount - 1).clamp(min=0).to(device)
    mixed = torch.lerp(shifted, blurred, weight)

    noise = torch.randn(images.shape, generator=generator).to(device)
    return mixed + 0.05 * noise


@torch.inference_mode()
def grade(judge, pictures, labels, device):
    """What a judge says of pictures, and how much of it is right.

    pictures: uint8 (n, 3, 64, 64); labels: what each should show, n dictionaries
    {attribute: class number}, of which only what can be seen is asked for.
    judge: a FeatureNet on `device`. Returns a dictionary of tensors on the CPU:
    features (n, 256), probs (n, 36) as `FeatureNet.read`, identity (n,) and prompt (n,), the
    shares of right attributes of the person and of the scene.
    """
    # 64 pictures at a time, to bound the memory.
    features = []
    probs = []
    for part in pictures.split(64):
        some_features, some_probs = judge.read(to_tensor(part).to(device))
        features.append(some_features)
        probs.append(some_probs)
    features = torch.cat(features)
    shares = grade_features(judge, features, labels)
    return {"features": features.cpu(), "probs": torch.cat(probs).cpu(), **shares}


@torch.inference_mode()
def grade_features(judge, features, labels):
    """`grade` of features (n, 256) that the judge gave before: identity (n,) and prompt (n,)."""
    # ATTRIBUTES begins with those of IDENTITY; the rest are those of SCENE.
    classes, seen = label_tensors(labels)
    right = (pick_classes(judge.answers(features)) == classes) & seen
    n = len(IDENTITY)
    return {
        "identity": right[:, :n].sum(1) / seen[:, :n].sum(1),
        "prompt": right[:, n:].sum(1) / seen[:, n:].sum(1),
    }
