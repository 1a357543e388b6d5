"""The judge of faces: MobileFaceNet (Chen et al. 2018, arXiv 1804.07573, table 1).

It gives a face 128 numbers whose direction says who it is: the cosine of two photos of one person
is about 0.6, of two people about 0. The five landmarks (eyes, nose, corners of the mouth) must lie
where ArcFace puts them in 112 × 112 pixels. No landmarks are searched for here: of aligned photos,
such as LFW Deep Funneled, one fixed box of the frame does it.

A box is (left, top, right, bottom) in fractions of the frame.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.ops import Conv2dNormActivation

SIZE = 112
WHOLE = (0, 0, 1, 1)
FRAME = (250, 250)  # pixels of Deep Funneled photos
DEEP_FUNNELED = (60.8 / 250, 51.08 / 250, 195.2 / 250, 185.48 / 250)
BOXES = {"whole": WHOLE, "deep-funneled": DEEP_FUNNELED}

# Groups of inverted residuals: expansion, channels, repetitions, stride of the first.
GROUPS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))


# ---------------------------------------------------------------- boxes


def check_box(box):
    """ValueError unless the box has a width and a height and lies in the frame."""
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        numbers = ",".join(f"{value:.4g}" for value in box)
        raise ValueError(f"face box {numbers}: 0 <= left < right <= 1, 0 <= top < bottom <= 1")


def parse_box(text):
    """ "whole", "deep-funneled" or "L,T,R,B" -> a box. ValueError for anything else."""
    if text in BOXES:
        return BOXES[text]
    try:
        left, top, right, bottom = map(float, text.split(","))
    except ValueError:
        kinds = ", ".join(BOXES)
        raise ValueError(
            f"face box {text!r}: {kinds} or left,top,right,bottom in fractions of the picture"
        ) from None
    box = (left, top, right, bottom)
    check_box(box)
    return box


def map_box(box, crop):
    """The box of a frame, in fractions of a crop of this frame. Both are boxes of the frame.

    For pictures that show only the part `crop` of what the data set's photos show. ValueError if
    the crop cuts off a part of the box: what is missing cannot be guessed.
    """
    check_box(crop)
    width = crop[2] - crop[0]
    height = crop[3] - crop[1]
    left = (box[0] - crop[0]) / width
    top = (box[1] - crop[1]) / height
    right = (box[2] - crop[0]) / width
    bottom = (box[3] - crop[1]) / height
    if min(left, top) < -1e-6 or max(right, bottom) > 1 + 1e-6:
        shown = ", ".join(f"{value:.3g}" for value in crop)
        raise ValueError(f"the pictures show {shown} of a photo and cut off a part of the face")
    return max(left, 0), max(top, 0), min(right, 1), min(bottom, 1)


def find_face_box(crop):
    """Where the face lies in pictures that `crop` (crops.Crop, or None: whole photos) cuts.

    Of Deep Funneled photos it is known. Of others the crop itself is taken to be the face.
    """
    if crop is None:
        return DEEP_FUNNELED
    if crop.frame != FRAME:
        return WHOLE
    return map_box(DEEP_FUNNELED, crop.fractions)


def bicubic_weights(pixels, start, end, size=SIZE):
    """W (size, pixels): y = Wx is x from `start` to `end` (fractions), scaled to `size` pixels.

    Bicubic with antialias as in Pillow: where pixels become fewer, the kernel becomes wider.
    """
    scale = (end - start) * pixels / size
    target = torch.arange(size, dtype=torch.float64) + 0.5
    centre = start * pixels + target * scale
    source = torch.arange(pixels, dtype=torch.float64) + 0.5
    distance = (source - centre[:, None]).abs() / max(scale, 1)  # (size, pixels)
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    return weights / weights.sum(1, keepdim=True)


# ---------------------------------------------------------------- the network


class FirstBlock(nn.Module):
    """Depthwise separable convolution: 3 × 3 in each channel, then 1 × 1 across channels."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        x = self.bn1(self.depthwise(x)).relu()
        return self.bn2(self.pointwise(x)).relu()


class GlobalDepthwise(nn.Module):
    """A weighted mean over all 7 × 7 places, with weights of its own in each channel."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.bn(self.depthwise(x))


class MobileFaceNet(nn.Module):
    """A judge of faces: pictures (B, 3, H, W) in [−1, 1] -> features (B, 128).

    weights: the file mobilefacenet.pt of foamliu/MobileFaceNet, or its state dict; ValueError if
    they are none. box: where the face lies in the pictures.
    """

    def __init__(self, weights, box=WHOLE):
        check_box(box)
        with torch.device("meta"):  # no random weights that the file's would replace
            super().__init__()
            self.conv1 = Conv2dNormActivation(3, 64, 3, stride=2, activation_layer=nn.ReLU6)
            self.dw_conv = FirstBlock(64)
            residuals = []
            channels = 64
            for expansion, wider, repetitions, first_stride in GROUPS:
                for k in range(repetitions):
                    stride = first_stride if k == 0 else 1
                    residuals.append(InvertedResidual(channels, wider, stride, expansion))
                    channels = wider
            self.features = nn.Sequential(*residuals)
            self.conv2 = Conv2dNormActivation(channels, 512, 1, activation_layer=nn.ReLU6)
            self.gdconv = GlobalDepthwise(512)
            self.conv3 = nn.Conv2d(512, 128, 1)
            self.bn = nn.BatchNorm2d(128)
        self.box = box
        where = ",".join(f"{value:.3g}" for value in box)
        self.name = f"MobileFaceNet of foamliu, face box {where}"
        self.load_weights(weights)
        self.float().eval().requires_grad_(False)

    def load_weights(self, weights):
        file = "the given weights" if isinstance(weights, dict) else weights
        try:
            if not isinstance(weights, dict):
                weights = torch.load(weights, "cpu", weights_only=True)
            self.load_state_dict(weights, assign=True)
        except Exception as error:  # a wrong file fails in many ways
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{file}: no weights of MobileFaceNet ({reason})") from None

    def resize(self, images):
        """Cut the face out of pictures of any size: (B, 3, H, W) -> (B, 3, 112, 112)."""
        left, top, right, bottom = self.box
        rows = bicubic_weights(images.shape[2], top, bottom).to(images.dtype)
        columns = bicubic_weights(images.shape[3], left, right).to(images.dtype)
        rows = rows.to(images.device)  # float64 stayed behind: mps has none
        columns = columns.to(images.device)
        # Bicubic overshoots at edges; as in Pillow that is clipped after each pass.
        narrow = (images @ columns.T).clamp(-1, 1)  # (B, 3, H, W) x (W, 112)
        return (rows @ narrow).clamp(-1, 1)  # (112, H) x (B, 3, H, 112)

    def forward(self, faces):
        """Faces (B, 3, 112, 112) -> (B, 128)."""
        mean = faces.new_tensor([0.485, 0.456, 0.406])[:, None, None]
        std = faces.new_tensor([0.229, 0.224, 0.225])[:, None, None]
        x = ((faces + 1) / 2 - mean) / std
        x = self.dw_conv(self.conv1(x))
        x = self.conv2(self.features(x))
        x = self.bn(self.conv3(self.gdconv(x)))
        return x.flatten(1)

    def read(self, images):
        """Faces (B, 3, 112, 112) -> features (B, 128), face plus mirror image; no p(y|x)."""
        return self(images) + self(images.flip(3)), None


class FaceEncoder(nn.Module):
    """A judge of faces as the image encoder Γ_i of a model whose pictures are `size` pixels large.

    Its interface is that of the CLIP encoders of transformers: `config`, and an answer that has
    `image_embeds`. It reads colours from −1 to 1 (COLOURS).
    """

    COLOURS = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)  # of the preprocessor

    def __init__(self, net, size):
        super().__init__()
        self.net = net
        self.config = SimpleNamespace(image_size=size, projection_dim=net.bn.num_features)

    def forward(self, pixels):
        """Pictures (B, 3, H, W) in [−1, 1] -> .image_embeds (B, 128): face plus mirror image."""
        embeds, _ = self.net.read(self.net.resize(pixels))
        return SimpleNamespace(image_embeds=embeds)
