"""Which judge looks at pictures."""

from support.checkpoints import TINY
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
