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
import hashlib
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

from data import (IDENTITY, PICTURES, Features, FeatureNet, ToyFaces, cached, open_all, save_grid, split, to_tensor,
                  write_whole)
from ip_adapter import IPAdapter, generate
from sample import DTYPE
from train import ADAPTER, TINY, label_tensors, pick_device, pick_precision, round_trip, run
from unet import StableDiffusion

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


# --------------------------------------------------------------------------- Table 1

def methods(runs):
    """Rows of Table 1: name -> (adapter file, aggregator), None for text only. Runs that are not there are left out."""
    rows = {"IP-Adapter": (TINY / ADAPTER, "none"), "IP-Adapter + Max Pooling": (TINY / ADAPTER, "max"),
            "IP-Adapter + Avg Pooling": (TINY / ADAPTER, "avg"), "IP-Adapter + Self-Attention": (runs / "selfattn", "selfattn"),
            "text only": None}
    rows |= {f"{agg}, trained like Self-Attention": (runs / agg, agg) for agg in ("none", "max", "avg", "concat")}
    files = {name: row and (row[0] if row[0].suffix else row[0] / "ip-adapter.safetensors", row[1]) for name, row in rows.items()}
    return {name: row for name, row in files.items() if row is None or row[0].is_file()}


@torch.inference_mode()
def make_pictures(sd, row, held, targets, references, args):
    """One picture for every target photo: its prompt and the person's other photos -> uint8 (n, 3, H, W)."""
    adapter, made = row and IPAdapter.load(row[0], sd.unet, row[1]), []
    weights = next(sd.unet.parameters())
    null_c_t = held.null_c_t.to(weights)
    for i in tqdm(range(0, len(targets), args.batch), "pictures", leave=False):
        c_t, c_i, null_c_i = held.c_t[held.prompt[targets[i:i + args.batch]]].to(weights), None, None
        if adapter:
            embeds = held.embeds[references[i:i + args.batch]].to(weights)
            c_i, null_c_i = adapter.tokens(embeds), adapter.tokens(torch.zeros_like(embeds[:1]))
        images = generate(sd, c_t, null_c_t, c_i, null_c_i, args.guidance, args.lam, args.steps, seed=args.seed + i)
        made.append(((images.float().cpu() + 1) * 127.5).round().byte())
    return torch.cat(made)


@torch.inference_mode()
def judged(judge, x, labels, device):
    """uint8 pictures -> what `judge` says of each: features, p(y|x), shares of right identity and scene attributes.

    Only attributes that the accessory of the prompt leaves visible are asked for (`data.visible`).
    """
    parts = [(*judge.read(images), torch.stack([v.argmax(1) for v in judge(images).values()], 1))
             for images in (to_tensor(part).to(device) for part in x.split(64))]
    features, probs, answers = (torch.cat(v).cpu() for v in zip(*parts))
    truth, seen = label_tensors(labels)
    right, n = (answers == truth) & seen, len(IDENTITY)
    return {"features": features, "probs": probs, "identity": right[:, :n].sum(1) / seen[:, :n].sum(1),
            "prompt": right[:, n:].sum(1) / seen[:, n:].sum(1)}


def table_row(name, said, real, people, photos):
    """One Markdown row; identity, prompt and FID with 95 % intervals over people."""
    groups = torch.arange(people * photos).view(people, photos)

    def interval(statistic, n=1000):
        low, high = bootstrap_ci(groups, lambda g: statistic(torch.cat(g)), n)
        return f"{statistic(groups.flatten()):.3g} ({low:.3g}–{high:.3g})"

    def mean(key):
        return interval(lambda i: float(said[key][i].double().mean()))

    cells = [interval(lambda i: fid(real["features"], said["features"][i]), 100),
             f"{kernel_distance(real['features'], said['features']):.3g}",
             *(f"{inception_score(said['probs'], marginal):.2f}" for marginal in ("uniform", "empirical")),
             mean("identity"), mean("prompt"), str(people * photos)]
    return f"| {name} | " + " | ".join(cells) + " |"


def table(args):
    """The paper's Table 1 on toy people that nobody trained on; rows that were made before are not made again."""
    for name, most in (("people", 150), ("photos", 10)):   # of 400 test people the first hundred are for validation
        if not 2 <= getattr(args, name) <= most:
            raise ValueError(f"--{name} {getattr(args, name)}: from 2 to {most}")
    device, dtype = args.device, DTYPE[pick_precision("auto", args.device)]
    sd, judge = StableDiffusion.load(TINY, device, dtype), ToyJudge.load(TINY / "feature_net").to(device)
    faces = ToyFaces(1200, seed=1, size=sd.image_size)
    _, people = split(faces.people)
    tested, others = people[-args.people:], people[-2 * args.people:-args.people]   # the first hundred are for validation
    held = Features(sd, tested, faces.key)
    targets = torch.cat([group[:args.photos] for group in held.groups])
    references = torch.stack([group[group != i] for group in held.groups for i in group[:args.photos]])
    shots = [photo for person in tested for photo in person.photos[:args.photos]]
    other_shots = [photo for person in others for photo in person.photos[:args.photos]]
    weights = hashlib.sha256((TINY / "unet/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    labels, real = [shot.labels for shot in shots], torch.from_numpy(np.stack(list(open_all(shots))))
    truth = judged(judge, real, labels, device)

    def row(name, x, labels=labels):
        lines.append(table_row(name, judged(judge, x, labels, device), truth, args.people, args.photos))
        print(lines[-1], flush=True)

    head = ["method", "FID ↓", "KID ↓", "IS uniform ↑", "IS empirical ↑", "identity ↑", "prompt ↑", "N"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    print(f"features: {judge.name}\n\n" + "\n".join(lines))
    sheet = {"a photo of the person": real}
    for name, method in methods(args.runs).items():
        adapter = method and hashlib.sha256(method[0].read_bytes()).hexdigest()
        settings = (args.people, args.photos, args.guidance, args.lam, args.steps, args.seed, args.batch, dtype)
        sheet[name] = cached(lambda: {"x": make_pictures(sd, method, held, targets, references, args)},
                             "table", faces.key, weights, adapter, method and method[1], settings)["x"]
        row(name, sheet[name])
    row("VAE round trip of the real photos", torch.cat([round_trip(sd, part) for part in real.split(64)]))
    row("photos of other people", torch.from_numpy(np.stack(list(open_all(other_shots)))), [s.labels for s in other_shots])
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(args.out / "table.md", lambda part: part.write_text("\n".join(lines) + "\n"))
    save_grid(args.out / "figure6.png", [list(to_tensor(x[: 8 * args.photos: args.photos])) for x in sheet.values()], captions=list(sheet))
    print(f"wrote {args.out}/table.md and figure6.png")


def main():
    parser = argparse.ArgumentParser(description="FID, KID and IS of two folders of pictures, or the paper's Table 1",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("real", metavar="REAL_DIR", nargs="?", help="folder of real pictures")
    parser.add_argument("generated", metavar="GENERATED_DIR", nargs="?", help="folder of generated pictures")
    parser.add_argument("--inception", metavar="FILE", help="pt_inception-2015-12-05-6726825d.pth of pytorch-fid; "
                        "without it the one in torch.hub's cache, else the tiny world's FeatureNet")
    parser.add_argument("--resize", choices=InceptionV3.RESIZE, default="pytorch-fid", help="whose resize to 299 x 299")
    parser.add_argument("--splits", type=int, default=1, help="IS is the mean over so many parts (torch-fidelity: 10)")
    parser.add_argument("--batch", type=int, default=32, help="pictures at once")
    parser.add_argument("--seed", type=int, default=2020, help="of the shuffle before the splits")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--table", action="store_true", help="Table 1 on people of the toy world that nobody trained on")
    parser.add_argument("--people", type=int, default=64, help="--table: people")
    parser.add_argument("--photos", type=int, default=5, help="--table: pictures a person")
    parser.add_argument("--guidance", type=float, default=4.0, help="--table: classifier-free guidance w")
    parser.add_argument("--lam", type=float, default=1.0, help="--table: weight λ of the references")
    parser.add_argument("--steps", type=int, default=30, help="--table: UNet evaluations a picture")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="--table: folder of the trained adapters")
    parser.add_argument("--out", type=Path, default=Path("runs/table"), help="--table: folder for table.md and figure6.png")
    args = parser.parse_args()
    args.device = pick_device(args.device)
    if args.table:
        table(args)
    elif args.real and args.generated:
        compare_folders(args)
    else:
        raise ValueError("name two folders, REAL_DIR and GENERATED_DIR, or ask for --table")


if __name__ == "__main__":
    run(main)
