"""Metrics: FID, Inception Score and KID of two folders of pictures (paper, section 2).

    FID = ‖μ_p − μ_q‖² + Tr(Σ_p + Σ_q − 2(Σ_pΣ_q)^½)             (4)
    IS  = exp(E_x[D_KL(p(y|x) ‖ p(y))])                          (5)
    KID = E k(x, x') + E k(y, y') − 2 E k(x, y),   k(a, b) = (aᵀb/d + 1)³

μ and Σ (divided by n − 1) are those of the features of a judge: Inception v3 with the weights of the
official FID or, where these are not at hand, the tiny world's FeatureNet. Every table names its judge;
numbers of different judges, resizes or numbers of pictures cannot be compared.

Where we deviate: the paper takes p(y) uniform over the classes, everybody else the mean of p(y|x).
Both are computed and named. Features are float32, all statistics float64.
"""

import argparse
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.linalg import LinAlgError, cholesky
from scipy.linalg.blas import dtrmm
from torchvision.models.inception import Inception3
from tqdm import tqdm

from data import PICTURES, FeatureNet, to_tensor
from train import pick_device, run

EPS = np.finfo(np.float64).eps


def frechet_distance(mu_p, sigma_p, mu_q, sigma_q):
    """FID = ‖μ_p − μ_q‖² + Tr(Σ_p + Σ_q − 2(Σ_pΣ_q)^½)   (eq. 4).

    mu: (d,), sigma: (d, d), arrays or tensors -> float; right for singular covariances too.
    Raises ValueError for shapes that do not fit and for NaN or infinity.
    """
    m, A, k, B = (np.asarray(torch.as_tensor(v).cpu(), np.float64) for v in (mu_p, sigma_p, mu_q, sigma_q))
    if not (m.shape == k.shape and A.shape == B.shape == m.shape * 2):
        raise ValueError(f"means {m.shape}, {k.shape} and covariances {A.shape}, {B.shape} do not fit together")
    if not all(np.isfinite(v).all() for v in (m, A, k, B)):
        raise ValueError("a mean or a covariance holds NaN or infinity")
    return float(((m - k) ** 2).sum() + np.trace(A) + np.trace(B) - 2 * trace_sqrt(A, B))


def trace_sqrt(A, B):
    """Tr((AB)^½) = Σ√eig(B^½AB^½) = Σ√eig(UAUᵀ) with UᵀU = B, for symmetric A, B ≥ 0 of shape (d, d).

    Eigenvalues of a symmetric matrix, ten times faster than scipy.linalg.sqrtm(A @ B). Where the product is
    singular √ would turn rounding errors of 1e-16 into 1e-8: there, the singular values of A^½B^½.
    """
    def root(S):   # (d, rank S)
        w, V = np.linalg.eigh(S)
        keep = w > len(w) * EPS * w[-1]
        return V[:, keep] * np.sqrt(w[keep])

    try:
        U = cholesky(B)
        w = np.linalg.eigvalsh(dtrmm(1.0, U, dtrmm(1.0, U, A), side=1, trans_a=1))   # dtrmm: half of matmul's work
        if w[0] > len(w) * EPS * w[-1]:
            return np.sqrt(w).sum()
    except LinAlgError:
        pass   # B is singular
    return np.linalg.svd(root(A).T @ root(B), compute_uv=False).sum()


class Gaussian:
    """μ (d,) and Σ (d, d), divided by n − 1, of features that come batch by batch: float64, d² memory."""

    def __init__(self, x=torch.zeros(0, 1)):
        x = torch.as_tensor(x).detach().cpu().double()
        self.n, self.mu = len(x), x.sum(0) / max(len(x), 1)
        self.scatter = (x - self.mu).T @ (x - self.mu)

    def update(self, x):
        """Takes in a batch (n, d), or another Gaussian (Chan, Golub and LeVeque 1979)."""
        other = x if isinstance(x, Gaussian) else Gaussian(x)
        n, delta = max(self.n + other.n, 1), other.mu - self.mu
        self.scatter = self.scatter + other.scatter + torch.outer(delta, delta) * (self.n * other.n / n)
        self.mu, self.n = self.mu + delta * (other.n / n), self.n + other.n
        return self

    @property
    def sigma(self):
        if self.n < 2:
            raise ValueError(f"a covariance needs at least two pictures, not {self.n}")
        return self.scatter / (self.n - 1)


def _two_sets(x, y):
    x, y = (torch.as_tensor(v).detach().cpu().double() for v in (x, y))
    if min(len(x), len(y)) < 2:
        raise ValueError(f"at least two pictures are needed on both sides, not {len(x)} and {len(y)}")
    return x, y


def fid(x, y):
    """Eq. 4 from features (n₁, d), (n₂, d): for centred X, Y, Tr((Σ_pΣ_q)^½) = ‖XYᵀ‖_* / √((n₁ − 1)(n₂ − 1)).

    The singular values of (n₁, n₂) numbers: exact where (d, d) is singular, and less work. Raises ValueError.
    """
    x, y = _two_sets(x, y)
    if min(len(x), len(y)) > x.shape[1]:
        p, q = Gaussian(x), Gaussian(y)
        return frechet_distance(p.mu, p.sigma, q.mu, q.sigma)
    X, Y = ((v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x, y))
    cross = torch.linalg.svdvals(X @ Y.T).sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + X.square().sum() + Y.square().sum() - 2 * cross)


def kernel_distance(x, y):
    """KID = Σ_{i≠j} k(x_i, x_j)/n(n−1) + Σ_{i≠j} k(y_i, y_j)/m(m−1) − 2 Σ k(x_i, y_j)/nm,  k(a, b) = (aᵀb/d + 1)³.

    x: (n, d), y: (m, d) -> float, unbiased (Bińkowski et al. 2018), so it may be negative; of all pictures, not of
    random subsets. Raises ValueError for fewer than two.
    """
    x, y = _two_sets(x, y)

    def total(a, b):   # 1024 rows at a time: 50,000² numbers would not fit
        return sum((rows @ b.T / b.shape[1] + 1).pow(3).sum() for rows in a.split(1024))

    def within(a):
        return (total(a, a) - (a.square().mean(1) + 1).pow(3).sum()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * total(x, y) / (len(x) * len(y)))


def inception_score(probs, marginal="empirical", splits=1, seed=2020):
    """IS = exp(E_x[D_KL(p(y|x) ‖ p(y))])   (eq. 5).

    probs: (n, K), rows p(y|x). marginal: "uniform" is the paper's p(y) = 1/K, "empirical" the mean of p(y|x)
    over a split, as usual. -> float, the mean over equal splits, shuffled as torch-fidelity does for a seed.
    Raises ValueError for rows that are no distributions, another marginal, more splits than rows.
    """
    p = torch.as_tensor(probs).detach().cpu().double()
    if marginal not in ("empirical", "uniform") or p.ndim != 2 or not 1 <= splits <= len(p):
        raise ValueError(f"no IS with marginal {marginal!r} and {splits} splits of probs of shape {tuple(p.shape)}")
    if not ((p >= 0).all() and torch.allclose(p.sum(1), p.new_ones(len(p)), atol=1e-4)):
        raise ValueError("every row of probs must be a distribution: no negative number, no NaN, sum 1")
    p, scores = p[np.random.RandomState(seed).permutation(len(p))], []
    for i in range(splits):
        part = p[i * len(p) // splits: (i + 1) * len(p) // splits]
        q = part.mean(0) if marginal == "empirical" else torch.full_like(part[0], 1 / p.shape[1])
        scores.append((torch.xlogy(part, part) - torch.xlogy(part, q)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def bootstrap_ci(values_per_person, statistic, n=1000, seed=0):
    """95 % interval (low, high) of statistic(list with one entry a person) when people are drawn anew n times.

    People, with all their pictures, because pictures of one person are not independent. Shifted by the mean
    excess of the draws, because repeating people by itself raises a FID.
    """
    rng, values = np.random.default_rng(seed), list(values_per_person)
    draws = [statistic([values[i] for i in rng.integers(len(values), size=len(values))]) for _ in range(n)]
    low, high = np.percentile(draws, [2.5, 97.5]) - np.mean(draws) + statistic(values)
    return float(low), float(high)


# --------------------------------------------------------------------------- the judges

def _fid_block(block, pool, x):
    """A block of torchvision's Inception whose last branch pools as the TensorFlow graph of 2015 does."""
    branches = block._forward(x)   # its own pooled branch, a few percent of the time, is thrown away
    return torch.cat([*branches[:-1], block.branch_pool(pool(x, 3, stride=1, padding=1))], 1)


class InceptionV3(Inception3):
    """Inception v3 of the official FID (2015-12-05, 1008 classes): (B, 3, H, W) in [−1, 1] -> features (B, 2048).

    weights: pt_inception-2015-12-05-6726825d.pth of pytorch-fid (torch-fidelity's is the same) or its state dict.
    resize to 299 × 299, both bilinear without antialias: "pytorch-fid" lays pixel centres on each other and scales
    to [−1, 1]; "torch-fidelity" upper left corners, as TensorFlow 1 did, and to (v − 128)/128. Raises ValueError.
    """
    RESIZE = ("pytorch-fid", "torch-fidelity")

    def __init__(self, weights, resize="pytorch-fid"):
        if resize not in self.RESIZE:
            raise ValueError(f"resize is one of {', '.join(self.RESIZE)}, not {resize!r}")
        with torch.device("meta"):   # no random weights that the file's would replace
            super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        for block in self.children():
            if hasattr(block, "branch_pool"):
                block.forward = partial(_fid_block, block, partial(F.avg_pool2d, count_include_pad=False))
        self.Mixed_7c.forward = partial(_fid_block, self.Mixed_7c, F.max_pool2d)   # a slip that became the standard
        self.tf1 = resize == "torch-fidelity"
        self.name = f"InceptionV3 of 2015-12-05, resize as {resize}"
        try:
            state = weights if isinstance(weights, dict) else torch.load(weights, "cpu", weights_only=True)
            self.load_state_dict(state, assign=True)
        except Exception as e:
            raise ValueError(f"no Inception weights of the official FID: {' '.join(str(e).split())[:200]}") from None
        self.eval().requires_grad_(False)

    def resize(self, images):
        if not self.tf1:
            return F.interpolate(images, (299, 299), mode="bilinear", align_corners=False)
        for dim in (3, 2):
            at = torch.arange(299, device=images.device, dtype=images.dtype) * (images.shape[dim] / 299)
            low = at.long()
            upper = images.index_select(dim, (low + 1).clamp(max=images.shape[dim] - 1))
            images = images.index_select(dim, low).lerp(upper, (at - low).view(-1, *[1] * (3 - dim)))
        return images

    def forward(self, images):
        x = self.resize(images)
        x = (127.5 * x - 0.5) / 128 if self.tf1 else x   # v = 127.5 (x + 1)
        for layer in list(self.children())[:-2]:   # all but dropout and classes
            x = layer(x)
        return x.flatten(1)

    def read(self, images):
        """-> features (B, 2048), p(y|x) (B, 1008) without the bias, as torch-fidelity's "logits_unbiased"."""
        features = self(images)
        return features, (features @ self.fc.weight.T).double().softmax(1)


class ToyJudge(FeatureNet):
    """FeatureNet in Inception's place; p(y|x) over hair style × hair colour."""
    name = "FeatureNet of the tiny world: not comparable with papers, which use InceptionV3"

    def resize(self, images):
        return F.interpolate(images, (64, 64), mode="bilinear", antialias=True)

    def read(self, images):
        """-> features (B, d), p(y|x) (B, K)."""
        style, colour = (self(images)[head].double().softmax(1) for head in ("hair", "hair_colour"))
        return self.features(images), (style[:, :, None] * colour[:, None]).flatten(1)


def load_judge(weights=None, resize="pytorch-fid", device="cpu"):
    """Inception from the file `weights` or from torch.hub's cache; else the ToyJudge. Raises ValueError."""
    cached = sorted(Path(torch.hub.get_dir(), "checkpoints").glob("*inception-2015-12-05-6726825d.pth"))
    if weights or cached:
        return InceptionV3(weights or cached[0], resize).to(device)
    return ToyJudge.load(Path(__file__).parent / "weights/tiny/feature_net").to(device)


@torch.inference_mode()
def read_folder(folder, judge, batch=32, device="cpu"):
    """Folder -> features (n, d), p(y|x) (n, K) of its pictures, sorted by name; prints what it had to convert.

    If there are none, those of its sub-folders (LFW). Each is resized on its own; greyscale and the like become RGB
    as Pillow does it. Raises ValueError: no folder, no pictures, one that cannot be read (named), features not finite.
    """
    found = [sorted(f for f in Path(folder).glob(p) if f.suffix.lower() in PICTURES) for p in ("*", "*/*")]
    files, facts, parts = found[0] or found[1], Counter(), []
    if not files:
        raise ValueError(f"{folder}: {'no pictures in it' if Path(folder).is_dir() else 'no such folder'}")
    for i in tqdm(range(0, len(files), batch), f"{folder}", leave=False):
        images = []
        for file in files[i:i + batch]:
            try:
                with Image.open(file) as picture:
                    images.append(judge.resize(to_tensor([picture.convert("RGB")]).to(device)))
                    facts.update([picture.mode, picture.size])
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
                raise ValueError(f"{file}: not a readable picture ({e})") from None
        parts.append([v.cpu() for v in judge.read(torch.cat(images))])
    features, probs = map(torch.cat, zip(*parts))
    if not (features.isfinite().all() and probs.isfinite().all()):
        raise ValueError(f"{folder}: {judge.name} gives features that are not finite")
    modes, sizes = ([k for k in facts if isinstance(k, t)] for t in (str, tuple))
    if len(sizes) > 1 or modes != ["RGB"]:
        print(f"note: {folder}: {len(sizes)} different sizes, modes {', '.join(modes)}; each converted to RGB and resized")
    return features, probs


def compare_folders(args):
    """Prints FID, KID and both IS of two folders as a Markdown table that says how they were made."""
    judge = load_judge(args.inception, args.resize, args.device)
    (x, _), (y, probs) = (read_folder(f, judge, args.batch, args.device) for f in (args.real, args.generated))
    rows = {"FID": fid(x, y), "KID": kernel_distance(x, y)}
    for marginal in ("uniform", "empirical"):
        rows[f"IS ({marginal} p(y))"] = inception_score(probs, marginal, args.splits, args.seed)
    if min(len(x), len(y)) <= x.shape[1]:
        print(f"note: not more pictures than features ({x.shape[1]}): FID is far too high, compare only at equal numbers")
    print(f"features: {judge.name}\npictures: {len(x)} real, {len(y)} generated; IS over {args.splits} split(s)\n")
    print("| metric | value |\n|---|---|\n" + "\n".join(f"| {k} | {v:.6g} |" for k, v in rows.items()))


def main():
    parser = argparse.ArgumentParser(description="FID, KID and IS of two folders of pictures",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("real", metavar="REAL_DIR", help="folder of real pictures")
    parser.add_argument("generated", metavar="GENERATED_DIR", help="folder of generated pictures")
    parser.add_argument("--inception", metavar="FILE", help="pt_inception-2015-12-05-6726825d.pth of pytorch-fid; "
                        "without it the one in torch.hub's cache, else the tiny world's FeatureNet")
    parser.add_argument("--resize", choices=InceptionV3.RESIZE, default="pytorch-fid", help="whose resize to 299 x 299")
    parser.add_argument("--splits", type=int, default=1, help="IS is the mean over so many parts (torch-fidelity: 10)")
    parser.add_argument("--batch", type=int, default=32, help="pictures at once")
    parser.add_argument("--seed", type=int, default=2020, help="of the shuffle before the splits")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    args = parser.parse_args()
    args.device = pick_device(args.device)
    compare_folders(args)


if __name__ == "__main__":
    run(main)
