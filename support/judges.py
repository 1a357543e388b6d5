"""Which judges look at pictures. A judge has .name, .resize(images) and .read(images).

| judge | pictures | features for | classes |
|---|---|---|---|
| `InceptionV3` | any photographs | FID, KID, IS | 1008 of ImageNet |
| `FeatureNet` | drawn people | FID, KID, IS; shares of right attributes | hair style × colour |
| `MobileFaceNet` | faces in photographs | identity, rank-1, copying, distance of faces | none |
| `FaceJudge` | faces, cut as a model's photos | the same, of adapters that read MobileFaceNet | none |
"""

from pathlib import Path

from support.checkpoints import TINY
from support.crops import read_crop
from support.face_judge import FaceJudge
from support.face_net import MobileFaceNet, find_face_box, parse_box
from support.inception import InceptionV3, find_weights
from toyfaces.judge import FeatureNet


def load_judge(weights=None, resize="pytorch-fid", device="cpu"):
    """The judge of pictures. ValueError for a file that is none.

    weights: a file: Inception with it; "toy": FeatureNet; None: Inception from torch.hub's cache or
    the network, or FeatureNet if there is neither.
    """
    if weights is None:
        weights = find_weights() or "toy"
    if weights == "toy":
        return FeatureNet.load(TINY / "feature_net").to(device)
    return InceptionV3(weights, resize).to(device)


def load_face_judge(weights, box=None, device="cpu"):
    """The judge of faces. ValueError for a file or a box that is none.

    weights: mobilefacenet.pt; box: words for `parse_box`, None: the whole picture. Or the file of
    experiments.base_judge, which reads pictures as a whole.
    """
    if Path(weights).suffix == ".safetensors":
        return FaceJudge.load(weights).to(device)
    return MobileFaceNet(weights, parse_box(box or "whole")).to(device)


def name_face_box(model):
    """Where the face lies in the pictures of a model, in words for `parse_box`.

    Without a crop they show whole photos, and these are taken to be Deep Funneled's.
    """
    box = find_face_box(read_crop(model))
    return ",".join(map(str, box))
