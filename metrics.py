"""Metrics: FID, Inception Score and KID of two folders of pictures, and Table 1 (paper, sections 2 and 4).

    FID = ‖μ_p − μ_q‖² + Tr(Σ_p + Σ_q − 2(Σ_pΣ_q)^½)             (4)
    IS  = exp(E_x[D_KL(p(y|x) ‖ p(y))])                          (5)
    KID = E k(x, x') + E k(y, y') − 2 E k(x, y),   k(a, b) = (aᵀb/d + 1)³

μ and Σ (divided by n − 1) are those of the features of a judge: Inception v3 with the weights of the
official FID or, where these are not at hand, the tiny world's FeatureNet. Every table names its judge;
numbers of different judges, resizes or numbers of pictures cannot be compared.

Where we deviate: the paper takes p(y) uniform over the classes, everybody else the mean of p(y|x).
Both are computed and named. Features are float32, all statistics float64.

    python metrics.py REAL_DIR GENERATED_DIR
    python metrics.py --table                    Table 1 on toy people never seen in training (`Exam`)
    python metrics.py --sweep refs | lam | kinds quality against the number of references, λ, or what they hide
"""

import argparse
import copy
import hashlib
import inspect
import json
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors import SafetensorError
from scipy.linalg import LinAlgError, cholesky
from scipy.linalg.blas import dtrmm
from torchvision.models.inception import Inception3
from tqdm import tqdm

from aggregators import fit_references
from data import (IDENTITY, FeatureNet, ToyFaces, cached, digest, draw_face, fingerprint, load_image, open_all,
                  picture_files, save_grid, to_bytes, to_tensor)
from dreambooth import class_images, latents, prompts
from ip_adapter import IPAdapter, generate, read_adapter
from train import (ADAPTER, DREAMBOOTH, TINY, autocast, fine_tune, label_tensors, pick_device, pick_precision,
                   round_trip, run)
from unet import StableDiffusion, write_whole

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
        return features, (features @ self.fc.weight.T).cpu().double().softmax(1)   # mps has no float64


class ToyJudge(FeatureNet):
    """FeatureNet in Inception's place; p(y|x) over hair style × hair colour."""
    name = "FeatureNet of the tiny world: not comparable with papers, which use InceptionV3"

    def resize(self, images):
        return F.interpolate(images, (64, 64), mode="bilinear", antialias=True)

    def read(self, images):
        """-> features (B, d), p(y|x) (B, K)."""
        features = self.features(images)
        style, colour = (self.answers(features)[head].cpu().double().softmax(1) for head in ("hair", "hair_colour"))
        return features, (style[:, :, None] * colour[:, None]).flatten(1)


INCEPTION = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


def load_judge(weights=None, resize="pytorch-fid", device="cpu"):
    """Inception from the file `weights`, else from torch.hub's cache or the network; the ToyJudge without any of these,
    or if asked for by "toy". Raises ValueError."""
    cached = sorted(Path(torch.hub.get_dir(), "checkpoints").glob("*inception-2015-12-05-6726825d.pth"))
    try:
        weights = weights or (cached[0] if cached else torch.hub.load_state_dict_from_url(
            INCEPTION, map_location="cpu", weights_only=True, check_hash=True))
    except (OSError, HTTPException):   # no network
        weights = "toy"
    except RuntimeError as e:
        raise ValueError(f"{INCEPTION}: {e}") from None
    if weights == "toy":
        return ToyJudge.load(TINY / "feature_net").to(device)
    return InceptionV3(weights, resize).to(device)


@torch.inference_mode()
def read_folder(folder, judge, batch=32, device="cpu"):
    """Folder -> features (n, d), p(y|x) (n, K) of its pictures, or of its folders' (LFW); prints what it had to convert.

    Each is resized on its own; greyscale and the like become RGB as Pillow does it. Raises ValueError: no folder, no
    pictures, one that cannot be read (named), features not finite.
    """
    files, facts, parts = picture_files(folder, "*", "*/*"), Counter(), []
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
        print(f"note: {folder}: {len(sizes)} different sizes, modes {', '.join(modes)}; all converted to RGB, resized")
    return features, probs


def compare_folders(args):
    """Prints FID, KID and both IS of two folders as a Markdown table that says how they were made."""
    cosines = clip_cosines(args) if args.clip else {}   # first: a wrong name must not cost the rest
    judge = load_judge(args.inception, args.resize, args.device)
    (x, _), (y, probs) = (read_folder(f, judge, args.batch, args.device) for f in (args.real, args.generated))
    rows = {"FID": fid(x, y), "KID": kernel_distance(x, y)}
    for marginal in ("uniform", "empirical"):
        rows[f"IS ({marginal} p(y))"] = inception_score(probs, marginal, args.splits, args.seed)
    if args.clip:
        rows |= cosines
        print(f"CLIP: {args.clip}")
    if min(len(x), len(y)) <= x.shape[1]:
        print(f"note: not more pictures than features ({x.shape[1]}): FID is far too high, compare at equal numbers")
    print(f"features: {judge.name}\npictures: {len(x)} real, {len(y)} generated; IS over {args.splits} split(s)\n")
    print("| metric | value |\n|---|---|\n" + "\n".join(f"| {k} | {v:.6g} |" for k, v in rows.items()))


@torch.inference_mode()
def clip_cosines(args):
    """{name: mean cosine of CLIP embeddings} of folders of one person, by the published CLIP --clip.

    CLIP-I: generated to real pictures, which should be photos that the method did not see; CLIP-T: to the --prompt;
    copy: to the nearest of the --references, minus CLIP-I. ValueError: no such CLIP, no pictures, one unreadable.
    """
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer   # here: it takes seconds

    try:
        clip, info = CLIPModel.from_pretrained(args.clip, output_loading_info=True)
        processor, tokenizer = (kind.from_pretrained(args.clip) for kind in (CLIPImageProcessor, CLIPTokenizer))
    except (OSError, ValueError, RuntimeError, SafetensorError) as e:
        raise ValueError(f"--clip {args.clip}: no CLIP of transformers ({str(e).strip().splitlines()[0]})") from None
    if info["missing_keys"]:
        raise ValueError(f"--clip {args.clip}: not a whole CLIP, {sorted(info['missing_keys'])[0]} is missing")
    clip = clip.float().to(args.device).eval()

    def embeds(folder):
        files = picture_files(folder, "*", "*/*")
        views = (processor([load_image(f) for f in files[i:i + args.batch]], return_tensors="pt")["pixel_values"]
                 for i in range(0, len(files), args.batch))
        seen = [clip.visual_projection(clip.vision_model(x.to(args.device)).pooler_output).cpu() for x in views]
        return torch.cat(seen)[None]   # (1, n, E): one person

    e, rows = embeds(args.generated), {}
    clip_i, copied = likeness(e, embeds(args.references) if args.references else e, embeds(args.real))
    rows["CLIP-I"] = float(clip_i.mean())
    if args.references:
        rows["copy"] = float(copied.mean())
    if args.prompt:
        ids = tokenizer([args.prompt], truncation=True, return_tensors="pt").to(args.device)
        text = clip.text_projection(clip.text_model(**ids).pooler_output).cpu()
        rows["CLIP-T"] = float(F.cosine_similarity(e[0], text).mean())
    return rows


# --------------------------------------------------------------------------- Table 1

OPTIONS = ("data", "people", "steps", "batch", "lr", "seed", "precision", "init")   # that `train.train_adapter` writes
RECIPE = (*OPTIONS, "base")                                                           # into its files, and two digests


def trained_adapters(args, unet, *names):
    """{aggregator: its file in --runs}, trained if it is missing. ValueError unless all were trained on `unet`, by the
    recipe of the first one."""
    files, recipe = {name: args.runs / name / "ip-adapter.safetensors" for name in names}, {}
    for name, file in files.items():
        if not file.is_file():
            words = [sys.executable, Path(__file__).with_name("train.py"), "--agg", name, "--model", TINY, "--out",
                     file.parent, "--device", args.device, "--resume",
                     *(word for k in OPTIONS if recipe for word in (f"--{k}", recipe[k]))]
            with subprocess.Popen([str(word) for word in words]) as training:
                try:
                    failed = training.wait()
                except KeyboardInterrupt:
                    training.wait()   # it ends its step and writes a checkpoint
                    raise
            if failed:
                raise ValueError(f"{file} is missing, and training it failed; if {file.parent} holds a checkpoint of other "
                                 "options, move it away")
        found = read_adapter(file)[1]
        recipe = recipe or {k: found.get(k, "known") for k in RECIPE}
        wrong = [f"{k} {found.get(k, 'unknown')}, not {v}" for k, v in recipe.items() if found.get(k) != v]
        if wrong := "; ".join(wrong) or "another UNet" * (not found["base"].startswith(digest(unet))):
            raise ValueError(f"{file} was not trained with the options of {names[0]} on the UNet that is there now "
                             f"({wrong}): move {file.parent} away, and this command trains it anew")
    return files


@torch.inference_mode()
def make_pictures(sd, texts, args, seed, adapter=None, embeds=None, lam=1.0):
    """{"x": pictures of n prompts from the noise of seed, seed + 1, …, uint8 (n, 3, H, W), "seconds": those of all}.

    embeds (n, N, E): the references of each, for `adapter`.
    """
    began, made, c_i, null_c_i = time.perf_counter(), [], None, None
    for i in tqdm(range(0, len(texts), args.batch), "pictures", leave=False):
        with autocast(args):
            c_t = sd.encode_prompts([*texts[i:i + args.batch], ""]).float()
            if adapter:
                e = embeds[i:i + args.batch].to(c_t)
                c_i, null_c_i = adapter.tokens(e), adapter.tokens(torch.zeros_like(e[:1]))
            images = generate(sd, c_t[:-1], c_t[-1:], c_i, null_c_i, args.guidance, lam, args.steps, seed=seed + i)
        made.append(to_bytes(images))
    return {"x": torch.cat(made), "seconds": torch.tensor(time.perf_counter() - began)}


def taught(sd, x, args, **options):
    """A copy of `sd` that DreamBooth taught the photos x (uint8) as "sks person"; options: where not train.py's own."""
    options = argparse.Namespace(**{
        **vars(args), **DREAMBOOTH, "prior_weight": 1.0, "lora": None, "train_text_encoder": False,
        "checkpointing": False, "accumulate": 1, "every": 10**9, "resume": False, **options})
    person, texts = copy.copy(sd), prompts("sks", "person")
    with autocast(args):   # as train.train_dreambooth; the class pictures are made once and then kept
        generator = torch.Generator().manual_seed(args.seed)
        z_0 = sd.encode_latents(to_tensor(x).to(args.device), generator).float()
        z_pr = z_0[:0]
        if options.prior_weight:
            z_pr = latents(sd, class_images(sd, texts[1], Path(".cache"), options.class_images, args.seed), generator)
    person.unet = copy.deepcopy(sd.unet)
    with TemporaryDirectory() as out:
        fine_tune(person, texts, z_0, z_pr, Path(out), options)
    return person


@torch.inference_mode()
def judged(judge, x, labels, device):
    """uint8 pictures -> what `judge` says of each: features, p(y|x), shares of right identity and scene attributes.

    Only attributes that the accessory of the prompt leaves visible are asked for (`data.visible`).
    """
    features, probs = map(torch.cat, zip(*(judge.read(to_tensor(part).to(device)) for part in x.split(64))))
    answers = torch.stack([v.argmax(1) for v in judge.answers(features).values()], 1).cpu()
    truth, seen = label_tensors(labels)
    right, n = (answers == truth) & seen, len(IDENTITY)
    return {"features": features.cpu(), "probs": probs.cpu(), "identity": right[:, :n].sum(1) / seen[:, :n].sum(1),
            "prompt": right[:, n:].sum(1) / seen[:, n:].sum(1)}


@torch.inference_mode()
def embedded(sd, x):
    """uint8 pictures (n, 3, H, W) -> their image embeddings (n, E)."""
    return torch.cat([sd.embed_images(to_tensor(part)).cpu() for part in x.split(64)])


def likeness(e, references, held, target=None):
    """CLIP-I = mean cosine to the person's held-out photos;   copy = cosine to the nearest reference − CLIP-I.

    Embeddings e (P, n, E) of n pictures of P people, references (P, N, E), held (P, m, E) -> CLIP-I, copy: (P·n,).
    target (n,): the held-out photo whose scene a picture shows, and which therefore does not count; None: all count.
    """
    e, references, held = (F.normalize(v, dim=2) for v in (e, references, held))
    others = torch.ones(e.shape[1], held.shape[1]) if target is None else 1 - F.one_hot(target, held.shape[1])   # (n, m)
    clip_i = (e @ held.mT * others).sum(2) / others.sum(1)
    return clip_i.flatten(), ((e @ references.mT).amax(2) - clip_i).flatten()


def shown(v):
    """A cell: a number, or (number, low, high), or nothing."""
    if isinstance(v, tuple):
        return f"{shown(v[0])} ({shown(v[1])} … {shown(v[2])})"
    return "–" if v is None else str(v) if isinstance(v, int) else f"{v:.1f}" if abs(v) >= 10 else f"{v:.3f}"


KINDS = {   # of references, for --sweep kinds: each as it was drawn (None), with another accessory, or of somebody else
    "as drawn": 9, "bare faces": [0] * 9, "nine in sunglasses": [1] * 9, "nine in hats": [2] * 9,
    "nine in scarves": [3] * 9, "eight in sunglasses, one bare": [1] * 8 + [0], "eight in hats, one bare": [2] * 8 + [0],
    "three of somebody else": [None] * 6 + ["stranger"] * 3,
}


# The files that pictures depend on besides this one: with another line in them they are made anew.
MAKERS = ("aggregators", "attention", "ddpm", "dreambooth", "ip_adapter", "train", "unet")


class Exam:
    """Toy people that nobody was trained on: what every method is given of them, and what is said of its pictures.

    ToyFaces' seed 0 is the base model's, seed 1 the adapters', and the first hundred people of seed 2 are validation.
    A person has nine references and, held out, as many photos as pictures will be made: the real photos of FID and KID.
    The prompts of the first --photos of these are asked for, --seeds times each, every picture from noise of its own.
    As many photos again show what real pictures of the same people score, and new drawings of the scenes asked for what a
    perfect method would.
    """
    COLUMNS = ("FID ↓", "KID ↓", "IS uniform ↑", "IS empirical ↑", "identity ↑", "prompt ↑", "copy", "CLIP-I ↑",
               "CLIP-T ↑", "s/picture ↓", "N")

    def __init__(self, args):
        self.args, self.n, self.rows, self.said, self.fids, self.lines = args, args.photos * args.seeds, {}, {}, {}, []
        self.sd = StableDiffusion.load(TINY, args.device)
        self.judge = ToyJudge.load(TINY / "feature_net").to(args.device)
        self.people = ToyFaces(100 + args.people, 9 + 2 * self.n, self.sd.image_size, seed=2).people[100:]
        x = torch.from_numpy(np.stack([x for x, _ in open_all([photo for one in self.people for photo in one.photos])]))
        self.x, self.embeds = (v.unflatten(0, (len(self.people), -1)) for v in (x, embedded(self.sd, x)))
        real = (to_tensor(x[9:9 + self.n]).to(args.device) for x in self.x)
        self.real = torch.cat([self.judge.features(x).detach().cpu() for x in real])
        self.groups = torch.arange(len(self.real)).view(len(self.people), -1)   # pictures of each person
        self.target = torch.arange(args.photos).repeat_interleave(args.seeds)   # (n,) held-out photo of each picture
        self.texts = [person.photos[9 + q].prompt for person in self.people for q in self.target]
        code = [Path(__file__).with_name(f"{name}.py").read_text() for name in MAKERS] + [
            inspect.getsource(part) for part in (make_pictures, taught)]
        self.key = [ToyFaces(0, seed=2).key, code, digest(self.sd.unet, self.sd.vae), fingerprint(self.sd), *(
            getattr(args, k) for k in ("photos", "seeds", "guidance", "steps", "seed", "precision", "device", "batch")), self.texts]
        self.say("method", *self.COLUMNS)
        self.say(*["---"] * (1 + len(self.COLUMNS)))

    def say(self, *cells):
        self.lines.append(f"| {' | '.join(cells)} |")
        print(self.lines[-1], flush=True)

    @torch.inference_mode()
    def other_references(self, kinds):
        """(P, 9, E): embeddings of the nine references, each as its entry of `kinds` says (KINDS)."""
        embeds, strangers = self.embeds[:, :9].clone(), self.embeds.roll(1, 0)
        for k, kind in enumerate(kinds):
            if kind == "stranger":
                embeds[:, k] = strangers[:, k]
            elif kind is not None:
                faces = [draw_face(person.photos[k].labels | {"accessory": kind}, {}, [p, k], self.sd.image_size)
                         for p, person in enumerate(self.people)]
                embeds[:, k] = self.sd.embed_images(to_tensor(faces).to(self.args.device)).cpu()
        return embeds

    def adapter(self, file, agg, references=9, lam=1.0):
        """Pictures of an adapter with the first `references`, or nine of the given KINDS; file None: text only."""
        def compute():
            adapter = file and IPAdapter.load(file, self.sd.unet, agg)
            few = isinstance(references, int)
            embeds = self.embeds[:, :references] if few else self.other_references(references)
            if agg == "selfattn":
                embeds = fit_references(embeds, 9, torch.Generator().manual_seed(0))
            return make_pictures(self.sd, self.texts, self.args, self.args.seed, adapter,
                                 embeds.repeat_interleave(self.n, 0), lam)

        weights = file and hashlib.sha256(file.read_bytes()).hexdigest()
        return cached(compute, *self.key, self.args.people, weights, agg, references, lam)

    def dreambooth(self):
        """Pictures of "sks person", each person learned from the same weights; the seconds include that."""
        def compute():
            began, first = time.perf_counter(), p * self.n
            texts = [text.replace("person", "sks person") for text in self.texts[first:first + self.n]]
            person = taught(self.sd, self.x[p, :9], self.args)
            made = make_pictures(person, texts, self.args, self.args.seed + first)
            return {"x": made["x"], "seconds": torch.tensor(time.perf_counter() - began)}

        made = []
        for p in tqdm(range(self.args.people), "DreamBooth, people"):
            made.append(cached(compute, *self.key[:-1], self.texts[p * self.n], "DreamBooth", p, DREAMBOOTH))
        return {"x": torch.cat([one["x"] for one in made]), "seconds": sum(one["seconds"] for one in made)}

    def interval(self, statistic, draws=1000):
        """(statistic(i) of all pictures i, and its 95 % interval over people)."""
        return statistic(self.groups.flatten()), *bootstrap_ci(self.groups, lambda g: statistic(torch.cat(g)), draws)

    @torch.inference_mode()
    def row(self, name, x, seconds=None, scenes=None):
        """Judge n pictures of every person. scenes (n,): the photo after the references whose scene each shows; None: the
        photos whose prompts every method is given."""
        scenes = self.target if scenes is None else scenes
        shots = [person.photos[9 + q] for person in self.people for q in scenes]
        said, e = judged(self.judge, x, [shot.labels for shot in shots], self.args.device), embedded(self.sd, x)
        references, held, _ = self.embeds.split([9, self.n, self.n], dim=1)
        said["CLIP-I"], said["copy"] = likeness(e[self.groups], references, held, scenes if scenes[0] < self.n else None)
        ids = self.sd.tokenizer([shot.prompt for shot in shots], padding=True, return_tensors="pt").input_ids
        clip_t = F.cosine_similarity(e, self.sd.text_encoder(ids.to(self.args.device)).pooler_output.cpu()).mean()
        self.said[name] = said
        row = self.rows[name] = dict(zip(self.COLUMNS, (
            self.interval(partial(self.fid, name), 200),
            self.interval(lambda i: kernel_distance(self.real[i], said["features"][i]), 200),
            *(self.interval(lambda i: inception_score(said["probs"][i], marginal)) for marginal in ("uniform", "empirical")),
            *(self.interval(lambda i: float(said[key][i].mean())) for key in ("identity", "prompt", "copy")),
            float(said["CLIP-I"].mean()), float(clip_t), None if seconds is None else float(seconds) / len(x), len(x))))
        self.say(name, *map(shown, row.values()))
        return row

    def fid(self, name, i):
        """FID of the pictures i of a row and of the real photos of the same people; every row draws the same i."""
        key = name, i.numpy().tobytes()
        if key not in self.fids:
            self.fids[key] = fid(self.real[i], self.said[name]["features"][i])
        return self.fids[key]

    def differences(self, best="IP-Adapter + Self-Attention"):
        """Other rows minus `best`, with intervals over the same people for both: narrower than those of each alone."""
        self.lines += ["", f"| minus {best} | FID | identity |", "|---|---|---|"]
        for name in [name for name in self.said if name != best]:
            identity = self.said[name]["identity"] - self.said[best]["identity"]
            cells = (self.interval(lambda i: self.fid(name, i) - self.fid(best, i), 200),
                     self.interval(lambda i: float(identity[i].mean())))
            self.say(name, *map(shown, cells))

    def write(self, stem):
        """--out/<stem>.md and .json."""
        a, command = self.args, " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
        note = f"""
`{command}`: {a.people} people never seen in training, {a.photos} prompts each, {a.seeds} pictures a prompt,
w = {a.guidance}, {a.steps} steps, seed {a.seed}. FID, KID and IS: {self.judge.name}.
In brackets: 95 % intervals over people. Identity, prompt: right attributes among those that the prompt leaves visible.
CLIP-I: cosine to the person's other held-out photos; copy: cosine to the nearest reference, minus CLIP-I.
DreamBooth's seconds include fine-tuning, and a share of the class pictures if these were not there yet.
IS counts a guess for the hair under a hat, too.
"""
        content = {"command": command, "features": self.judge.name, "dreambooth": DREAMBOOTH,
                   "settings": {k: str(v) for k, v in vars(a).items()}, "rows": self.rows}
        a.out.mkdir(parents=True, exist_ok=True)
        for end, text in ((".md", "\n".join([*self.lines, note])), (".json", json.dumps(content, indent=1))):
            write_whole(a.out / (stem + end), lambda part: part.write_text(text, encoding="utf-8"))
        print(f"{note}wrote {a.out}/{stem}.md, {stem}.json")


def report(args):
    """--table: the paper's Table 1 and, below a line, controls. --sweep: of some of its methods, every number of
    references, every λ or every kind of references. What was made before is not made again."""
    if args.people < 2 or min(args.photos, args.seeds) < 1 or args.photos * args.seeds < 2:
        raise ValueError("at least two people (--people), and two pictures of each (--photos times --seeds)")
    controls = {"refs": ("avg",), "lam": (), "kinds": ("avg", "concat")}.get(args.sweep, ("max", "avg", "concat"))
    files = trained_adapters(args, StableDiffusion.load(TINY).unet, "selfattn", *controls)
    exam, curves, shipped = Exam(args), {}, TINY / ADAPTER
    methods = {"IP-Adapter": (shipped, "none"), "DreamBooth": None, "IP-Adapter + Max Pooling": (shipped, "max"),
               "IP-Adapter + Avg Pooling": (shipped, "avg"),
               "IP-Adapter + Self-Attention": (files["selfattn"], "selfattn"), "text only": (None, None),
               **{f"{agg.title()}, fine-tuned": (files[agg], agg) for agg in controls}}
    if args.no_dreambooth:
        del methods["DreamBooth"]
    if args.sweep == "refs":
        names = [name for name in methods if "Pooling" in name or "Self" in name] + ["Avg, fine-tuned"]
        methods = {f"{name}; references: {n}": (*methods[name], n) for name in names for n in range(1, 10)}
    elif args.sweep == "lam":
        names = "IP-Adapter", "IP-Adapter + Self-Attention"
        methods = {f"{name}; λ = {k / 4}": (*methods[name], 9, k / 4) for name in names for k in range(7)}
    elif args.sweep == "kinds":
        names = "IP-Adapter + Self-Attention", "Avg, fine-tuned", "Concat, fine-tuned"
        methods = {f"{name}; {kind}": (*methods[name], KINDS[kind]) for kind in KINDS for name in names}
    sheet = {"reference": exam.x[:, 0]}
    for name, method in methods.items():
        if name == "text only":
            exam.say("*controls*", *[""] * len(exam.COLUMNS))
        made = exam.adapter(*method) if method else exam.dreambooth()
        row = exam.row(name, **made)
        sheet[name.removeprefix("IP-Adapter + ")] = made["x"][::exam.n]
        if args.sweep in ("refs", "lam"):
            x = method[2] if args.sweep == "refs" else row["prompt ↑"][0]
            curves.setdefault(name.split(";")[0], []).append((x, row["identity ↑"][0]))
    if args.sweep:
        exam.write(f"sweep_{args.sweep}")
        if args.sweep == "kinds":
            return
        title = f"identity against {'number of references' if args.sweep == 'refs' else 'prompt fidelity'}"
        return plot(args.out / f"sweep_{args.sweep}.png", curves, title)
    drawn = [draw_face(person.photos[9 + q].labels, {}, [p, k], exam.sd.image_size)
             for p, person in enumerate(exam.people) for k, q in enumerate(exam.target)]
    exam.row("the scenes asked for, drawn anew", to_bytes(to_tensor(drawn)))
    exam.row("VAE round trip of real photos", torch.cat([round_trip(exam.sd, x[9:9 + exam.n]) for x in exam.x]),
             scenes=torch.arange(exam.n))
    exam.row("other real photos of the same people", exam.x[:, 9 + exam.n:].flatten(0, 1),
             scenes=torch.arange(exam.n, 2 * exam.n))
    exam.differences()
    exam.write("table")
    rows = [list(to_tensor(row)) for row in torch.stack(list(sheet.values()), 1)[:8]]
    save_grid(args.out / "figure6.png", rows, list(sheet), exam.texts[::exam.n][:8], side=96)


def plot(path, curves, title, side=480):
    """{name: [(x, y), …]} -> a picture of the curves."""
    points, sheet = np.array(sum(curves.values(), [])), Image.new("RGB", (side + 160, side), "white")
    low, size, pen = points.min(0), np.ptp(points, 0) + 1e-9, ImageDraw.Draw(sheet)

    def at(point):
        return tuple([50, side - 50] + (point - low) / size * [side - 70, 90 - side])

    pen.text((side / 2, 20), title, "black", anchor="mm")
    for v in low + size * np.linspace(0, 1, 5)[:, None]:
        pen.text((at(v)[0], side - 20), f"{v[0]:.3g}", "black", anchor="mm")
        pen.text((22, at(v)[1]), f"{v[1]:.3g}", "black", anchor="mm")
    for k, (name, curve) in enumerate(curves.items()):
        pen.line([at(point) for point in curve], colour := ("red", "black", "blue", "green")[k], 2)
        pen.text((side + 5, 40 + 16 * k), name, colour)
    write_whole(path, lambda part: sheet.save(part, "PNG"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("real", metavar="REAL_DIR", nargs="?", help="folder of real pictures")
    parser.add_argument("generated", metavar="GENERATED_DIR", nargs="?", help="folder of generated pictures")
    parser.add_argument("--inception", metavar="FILE", help="pt_inception-2015-12-05-6726825d.pth of pytorch-fid, "
                        "or toy: the tiny world's FeatureNet (default: from torch.hub or, without a network, toy)")
    parser.add_argument("--resize", choices=InceptionV3.RESIZE, default="pytorch-fid", help="whose resize to 299 x 299")
    parser.add_argument("--clip", help="folder or hub id of a CLIP (openai/clip-vit-large-patch14): adds the cosines of one "
                        "person's pictures to REAL_DIR (CLIP-I), to --prompt (CLIP-T), to --references (copy)")
    parser.add_argument("--prompt", help="with --clip: what all generated pictures should show")
    parser.add_argument("--references", help="with --clip: folder of the photos that the method was given")
    parser.add_argument("--splits", type=int, default=1, help="IS is the mean over so many parts (torch-fidelity: 10)")
    parser.add_argument("--batch", type=int, default=32, help="pictures at once")
    parser.add_argument("--seed", type=int, default=2020, help="of the shuffle before the splits; of a table's noise")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    own = parser.add_argument_group("on toy people that nobody trained on")
    own.add_argument("--table", action="store_true", help="the paper's Table 1 and Figure 6")
    own.add_argument("--sweep", choices=["refs", "lam", "kinds"], help="its numbers for 1 to 9 references, for λ of 0 to "
                     "1.5, or for references that hide or mislead")
    own.add_argument("--people", type=int, default=60, help="people, with nine references each")
    own.add_argument("--photos", type=int, default=3, help="prompts a person")
    own.add_argument("--seeds", type=int, default=3, help="pictures a prompt")
    own.add_argument("--no-dreambooth", action="store_true", help="leave out its row, which takes most of the time")
    own.add_argument("--guidance", type=float, default=4.0, help="classifier-free guidance w")
    own.add_argument("--steps", type=int, default=20, help="UNet evaluations a picture")
    own.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the adapters; missing ones are trained")
    own.add_argument("--out", type=Path, default=Path("runs/table"), help="folder for tables and pictures")
    args = parser.parse_args()
    args.device = pick_device(args.device)
    args.precision = pick_precision("auto", args.device)
    for name in ("batch", "steps", "splits"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: at least 1")
    if args.table and args.sweep or (args.table or args.sweep) and (args.real or args.clip or args.inception):
        raise ValueError("--table, --sweep and folders (with --inception, --clip) are three programs: ask for one")
    if args.table or args.sweep:
        try:
            report(args)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on after the last finished row or person") from None
    elif args.real and args.generated:
        if (args.prompt or args.references) and not args.clip:
            raise ValueError("--prompt and --references need --clip, a CLIP to compare with")
        compare_folders(args)
    else:
        raise ValueError("name two folders, REAL_DIR and GENERATED_DIR, or ask for --table or --sweep")


if __name__ == "__main__":
    run(main)
