"""Metrics: FID, Inception Score and KID of two folders of pictures (paper, sections 2 and 4).

    FID = ‖μ_p − μ_q‖² + Tr(Σ_p + Σ_q − 2(Σ_pΣ_q)^½)             (4)
    IS  = exp(E_x[D_KL(p(y|x) ‖ p(y))])                          (5)
    KID = E k(x, x') + E k(y, y') − 2 E k(x, y),   k(a, b) = (aᵀb/d + 1)³

μ and Σ (divided by n − 1) are those of the features of a judge: anything with .name,
.resize(images) and .read(images) -> features, p(y|x). For photographs that is Inception v3 with the
weights of the official FID, for the toy world FeatureNet (toyfaces/judge.py), for faces
MobileFaceNet, which has no classes: its p(y|x) is None. Every table names its judges; numbers of
different judges, resizes or numbers of pictures cannot be compared.

Where we deviate: the paper takes p(y) uniform over the classes, everybody else the mean of p(y|x).
Both are computed and named. Features are float32, all statistics float64.

    python metrics.py REAL_DIR GENERATED_DIR
    python metrics.py REAL_DIR GENERATED_DIR --faces mobilefacenet.pt    DIR/<person>/*: who is it?
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import LinAlgError, cholesky, sqrtm
from scipy.linalg.blas import dtrmm

from support.clip_judge import ClipJudge
from support.command_lines import parse_scoring
from support.devices import pick_device
from support.folders import read_folder, read_people, require_same_people
from support.judges import load_face_judge, load_judge
from support.pictures import picture_files
from support.program import run

EPS = np.finfo(np.float64).eps


# ---------------------------------------------------------------- FID

def textbook_frechet_distance(mu_p, sigma_p, mu_q, sigma_q):
    """FID = ‖μ_p − μ_q‖² + Tr(Σ_p + Σ_q − 2(Σ_pΣ_q)^½)   (eq. 4), as it is written.

    NumPy arrays mu (d,), sigma (d, d) -> float. The oracle of the tests; the programs use
    `frechet_distance`, which is faster and right for singular covariances, too.
    """
    difference = mu_p - mu_q
    root = sqrtm(sigma_p @ sigma_q).real
    return float(difference @ difference + np.trace(sigma_p + sigma_q - 2 * root))


def frechet_distance(mu_p, sigma_p, mu_q, sigma_q):
    """FID = ‖μ_p − μ_q‖² + Tr Σ_p + Tr Σ_q − 2 Tr((Σ_pΣ_q)^½)   (eq. 4).

    mu: (d,), sigma: (d, d), arrays or tensors -> float; right for singular covariances too.
    Raises ValueError for shapes that do not fit and for NaN or infinity.
    """
    inputs = [torch.as_tensor(value).cpu() for value in (mu_p, sigma_p, mu_q, sigma_q)]
    mu_p, sigma_p, mu_q, sigma_q = [np.asarray(value, np.float64) for value in inputs]
    if not (mu_p.shape == mu_q.shape and sigma_p.shape == sigma_q.shape == mu_p.shape * 2):
        shapes = f"{mu_p.shape}, {mu_q.shape} and covariances {sigma_p.shape}, {sigma_q.shape}"
        raise ValueError(f"means {shapes} do not fit together")
    if not all(np.isfinite(value).all() for value in (mu_p, sigma_p, mu_q, sigma_q)):
        raise ValueError("a mean or a covariance holds NaN or infinity")
    means = ((mu_p - mu_q) ** 2).sum()
    traces = np.trace(sigma_p) + np.trace(sigma_q)
    return float(means + traces - 2 * trace_sqrt(sigma_p, sigma_q))


def trace_sqrt(A, B):
    """Tr((AB)^½) of symmetric A, B ≥ 0, both (d, d), without any matrix root.

    The trace of a matrix is the sum of its eigenvalues, and those of a root are the roots of the
    eigenvalues. With B = UᵀU (Cholesky), AB = (AUᵀ)·U has the eigenvalues of U·(AUᵀ), because XY
    and YX always have the same. So Tr((AB)^½) = Σ√eig(UAUᵀ), of one symmetric matrix: ten times
    faster than sqrtm. If AB is singular, √ would turn rounding errors of 1e-16 into 1e-8:
    then `trace_sqrt_singular` is used.
    """
    try:
        U = cholesky(B)
        UA = dtrmm(1.0, U, A)  # U @ A, with half the work: U is triangular
        UAU = dtrmm(1.0, U, UA, side=1, trans_a=1)  # UA @ U.T
        eigenvalues = np.linalg.eigvalsh(UAU)
    except LinAlgError:  # B is singular
        return trace_sqrt_singular(A, B)
    smallest, largest = eigenvalues[0], eigenvalues[-1]
    if smallest <= len(eigenvalues) * EPS * largest:
        return trace_sqrt_singular(A, B)
    return np.sqrt(eigenvalues).sum()


def trace_sqrt_singular(A, B):
    """The same where AB is singular: with A = RRᵀ and B = SSᵀ, the sum of the singular values of RᵀS.

    Why: AB = R·(RᵀSSᵀ) has the eigenvalues of (RᵀS)·(RᵀS)ᵀ, and their roots are the singular values
    of RᵀS. No root is taken of a number that should be zero.
    """

    def factor(S):
        """(d, rank S): a factor R of S = RRᵀ, from the eigenvalues that are not zero."""
        eigenvalues, vectors = np.linalg.eigh(S)
        keep = eigenvalues > len(eigenvalues) * EPS * eigenvalues[-1]
        return vectors[:, keep] * np.sqrt(eigenvalues[keep])

    return np.linalg.svd(factor(A).T @ factor(B), compute_uv=False).sum()


class Gaussian:
    """μ (d,) and Σ (d, d), divided by n − 1, of features that come batch by batch: d² memory."""

    def __init__(self, x=torch.zeros(0, 1)):  # empty: μ = 0, Σ = 0 of any d
        x = torch.as_tensor(x).detach().cpu().double()
        self.n = len(x)
        self.mu = x.sum(0) / max(len(x), 1)
        self.scatter = (x - self.mu).T @ (x - self.mu)  # (d, d): Σ times n − 1

    def update(self, x):
        """Takes in a batch (n, d), or another Gaussian (Chan, Golub and LeVeque 1979)."""
        other = x if isinstance(x, Gaussian) else Gaussian(x)
        n = max(self.n + other.n, 1)
        delta = other.mu - self.mu
        between = torch.outer(delta, delta) * (self.n * other.n / n)
        self.scatter = self.scatter + other.scatter + between
        self.mu = self.mu + delta * (other.n / n)
        self.n = self.n + other.n
        return self

    @property
    def sigma(self):
        if self.n < 2:
            raise ValueError(f"a covariance needs at least two pictures, not {self.n}")
        return self.scatter / (self.n - 1)


def to_double(x, y):
    """Two sets of features as float64 on the CPU; ValueError unless both have two rows."""
    x = torch.as_tensor(x).detach().cpu().double()
    y = torch.as_tensor(y).detach().cpu().double()
    if min(len(x), len(y)) < 2:
        needs = "at least two pictures are needed on both sides"
        raise ValueError(f"{needs}, not {len(x)} and {len(y)}")
    return x, y


def fid(x, y):
    """Eq. 4 from features x (n, d), y (m, d) -> float. ValueError for fewer than two pictures.

    Which way is taken:
        min(n, m) ≤ d              here: the singular values of XYᵀ (n, m)
        else, Σ_pΣ_q invertible    `trace_sqrt`: the eigenvalues of UAUᵀ
        else                       `trace_sqrt_singular`: the singular values of RᵀS
    X = (x − μ_p)/√(n−1), Y likewise: Σ_p = XᵀX and Σ_q = YᵀY, so Xᵀ and Yᵀ are factors as in
    `trace_sqrt_singular`, and no singular (d, d) covariance has to be taken apart.
    """
    x, y = to_double(x, y)
    if min(len(x), len(y)) > x.shape[1]:
        p, q = Gaussian(x), Gaussian(y)
        return frechet_distance(p.mu, p.sigma, q.mu, q.sigma)
    X = (x - x.mean(0)) / (len(x) - 1) ** 0.5
    Y = (y - y.mean(0)) / (len(y) - 1) ** 0.5
    means = (x.mean(0) - y.mean(0)).square().sum()
    traces = means + X.square().sum() + Y.square().sum()
    return float(traces - 2 * torch.linalg.svdvals(X @ Y.T).sum())


# ---------------------------------------------------------------- KID, IS, intervals

def kernel_distance(x, y):
    """KID = Σ_{i≠j} k(x_i, x_j)/n(n−1) + Σ_{i≠j} k(y_i, y_j)/m(m−1) − 2 Σ k(x_i, y_j)/nm

    with k(a, b) = (aᵀb/d + 1)³. x: (n, d), y: (m, d) -> float, unbiased (Bińkowski et al. 2018), so
    it may be negative; computed on all pictures. ValueError for fewer than two.
    """
    x, y = to_double(x, y)

    def sum_pairs(a, b):  # 1024 rows at a time: 50,000² numbers would not fit
        return sum((rows @ b.T / b.shape[1] + 1).pow(3).sum() for rows in a.split(1024))

    def mean_within(a):
        itself = (a.square().mean(1) + 1).pow(3).sum()  # the pairs with i = j
        return (sum_pairs(a, a) - itself) / (len(a) * (len(a) - 1))

    between = sum_pairs(x, y) / (len(x) * len(y))
    return float(mean_within(x) + mean_within(y) - 2 * between)


def inception_score(probs, marginal="empirical", splits=1, seed=2020):
    """IS = exp(E_x[D_KL(p(y|x) ‖ p(y))])   (eq. 5).

    probs: (n, K), rows p(y|x). marginal: "uniform" is the paper's p(y) = 1/K, "empirical" the mean
    of p(y|x) over a split, as usual. A uniform p(y) does not punish collapse: a model that makes one
    perfect picture again and again gets the best score, K, where the empirical one gives it 1.
    -> float, the mean over equal splits, shuffled as torch-fidelity does for a seed. ValueError for
    rows that are no distributions, another marginal, more splits than rows.
    """
    p = torch.as_tensor(probs).detach().cpu().double()
    if marginal not in ("empirical", "uniform") or p.ndim != 2 or not 1 <= splits <= len(p):
        asked = f"marginal {marginal!r} and {splits} splits of probs of shape {tuple(p.shape)}"
        raise ValueError(f"no IS with {asked}")
    if not ((p >= 0).all() and torch.allclose(p.sum(1), p.new_ones(len(p)), atol=1e-4)):
        raise ValueError("every row of probs must be a distribution: no negative, no NaN, sum 1")
    p = p[np.random.RandomState(seed).permutation(len(p))]
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        q = part.mean(0) if marginal == "empirical" else torch.full_like(part[0], 1 / p.shape[1])
        divergence = (torch.xlogy(part, part) - torch.xlogy(part, q)).sum(1)  # (n,) D_KL
        scores.append(divergence.mean().exp())
    return float(torch.stack(scores).mean())


def draw_people(count, n=1000, seed=0):
    """What `bootstrap_ci` draws: n times `count` numbers below `count`, with replacement."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield rng.integers(count, size=count)


def bootstrap_ci(values_per_person, statistic, n=1000, seed=0, runs=()):
    """95 % interval (low, high) of statistic(list with one entry a person).

    People are drawn anew, with replacement, n times; the statistic is computed of each draw, and
    the interval holds the middle 95 % of them (percentile interval: Efron and Tibshirani 1993,
    section 13.3). People are drawn with all their pictures, because pictures of one person are not
    independent. Drawing repeats people, and by that alone a FID rises: the mean of the draws lies
    above the statistic itself. That excess is the bootstrap's estimate of bias (section 10.2); it is
    subtracted from both ends, so the width stays.

    runs: trainings of the same method with other seeds. If there are any, as many are drawn anew each
    time, with replacement and independently of the people, and the interval is that of
    statistic(people, runs). Of few runs it is somewhat too narrow: of three, the part that comes from
    the runs by √(2/3).
    """
    luck = np.random.default_rng(seed + 1)
    values = list(values_per_person)
    given = [list(runs)] if runs else []
    draws = []
    for chosen in draw_people(len(values), n, seed):
        drawn = [[some[i] for i in luck.integers(len(some), size=len(some))] for some in given]
        draws.append(statistic([values[i] for i in chosen], *drawn))
    middle = statistic(values, *given)
    low, high = np.percentile(draws, [2.5, 97.5]) - np.mean(draws) + middle
    return float(low), float(high)


# ---------------------------------------------------------------- identity by embeddings

def compare_embeddings(made, references, held, target=None):
    """Identity = mean cosine to the person's held-out photos;   copy = nearest reference − identity.

    made (P, n, E): embeddings of n pictures of P people; references (P, N, E); held (P, m, E).
    target (n,): the held-out photo whose scene a picture shows, and which therefore does not count;
    None: all count. With CLIP's embeddings the first is called CLIP-I. Returns both, (P·n,).
    """
    made, references, held = [F.normalize(x, dim=2) for x in (made, references, held)]
    counts = torch.ones(made.shape[1], held.shape[1])  # (n, m)
    if target is not None:
        counts = counts - F.one_hot(target, held.shape[1])
    to_held = made @ held.mT  # (P, n, E) x (P, E, m) -> (P, n, m)
    identity = (to_held * counts).sum(2) / counts.sum(1)
    nearest = (made @ references.mT).amax(2)
    return identity.flatten(), (nearest - identity).flatten()


# ---------------------------------------------------------------- identity by faces
#
# Lists have one entry a person; people may have different numbers of pictures.

def compare_people(made, held):
    """Mean cosine of every picture to the held-out photos of every person.

    made: P tensors (n_p, E), features of n_p pictures of person p; held: P tensors (m_p, E).
    Returns P tensors (n_p, P), of which column p is about the right person. ValueError: the lists
    have different lengths.
    """
    if len(made) != len(held):
        raise ValueError(f"pictures of {len(made)} people, held-out photos of {len(held)}")
    # A mean of cosines is the product with the mean of the unit vectors.
    means = torch.stack([F.normalize(photos, dim=1).mean(0) for photos in held])
    return [F.normalize(pictures, dim=1) @ means.T for pictures in made]  # (n_p, E) x (E, P)


def compare_real_people(held):
    """`compare_people` of the held-out photos themselves, each with the *others* of its person.

    Somebody's only photo has no others and is left out: (0, P) for this person.
    """
    cosines = compare_people(held, held)
    for p, rows in enumerate(cosines):
        m = len(rows)
        if m == 1:
            cosines[p] = rows[:0]
        else:
            rows[:, p] = (m * rows[:, p] - 1) / (m - 1)  # 1 is the cosine to itself
    return cosines


def face_identity(cosines):
    """Mean cosine to the right person's held-out photos: P tensors (n_p, P) -> P tensors (n_p,)."""
    return [rows[:, p] for p, rows in enumerate(cosines)]


def rank_one(cosines):
    """1 where the right person is the nearest of all, else 0: P tensors (n_p, P) -> P (n_p,)."""
    return [(rows.argmax(1) == p).float() for p, rows in enumerate(cosines)]


def nearest_reference(made, references):
    """Cosine to the person's nearest reference: P tensors (n_p, E) and (N_p, E) -> P (n_p,)."""
    values = []
    for pictures, photos in zip(made, references, strict=True):
        cosines = F.normalize(pictures, dim=1) @ F.normalize(photos, dim=1).T
        values.append(cosines.amax(1))
    return values


def face_copying(nearest, identity):
    """Copying = nearest reference − identity: how much more like one photo than like the person.

    P tensors (n_p,) each; of somebody's only photo (1,) − (0,) leaves (0,).
    """
    return [one - other for one, other in zip(nearest, identity, strict=True)]


def mean_over_people(values):
    """P tensors (n_p,) -> the mean over people of their means: more photos do not count more."""
    means = [value.mean() for value in values if len(value)]
    return float(torch.stack(means).mean()) if means else float("nan")


# ---------------------------------------------------------------- folders

def score_clip(clip, real, generated, references=None, prompt=None):
    """{name: number} of one person's folders by a ClipJudge: mean cosines of the made pictures.

    CLIP-I: to the real pictures, which should be photos that the method did not see; copy: to the
    nearest of the references, minus CLIP-I; CLIP-T: to the prompt.
    """

    def embed(folder):
        return clip.embed_files(picture_files(folder, "*", "*/*"))[None]  # (1, n, E): one person

    made = embed(generated)
    identity, copied = compare_embeddings(made, embed(references or generated), embed(real))
    rows = {"CLIP-I": float(identity.mean())}
    if references:
        rows["copy"] = float(copied.mean())
    if prompt is not None:
        rows["CLIP-T"] = float(F.cosine_similarity(made[0], clip.embed_text(prompt)).mean())
    return rows


def score_folders(real, generated, judge, batch, device, splits, seed):
    """{name: number}: FID, KID and both IS of two folders."""
    x, _ = read_folder(real, judge, batch, device)
    y, probs = read_folder(generated, judge, batch, device)
    if min(len(x), len(y)) <= x.shape[1]:
        few = f"not more pictures than features ({x.shape[1]})"
        print(f"note: {few}: FID is far too high, compare at equal numbers")
    print(f"features: {judge.name}")
    print(f"pictures: {len(x)} real, {len(y)} generated; IS over {splits} split(s)\n")
    rows = {"FID": fid(x, y), "KID": kernel_distance(x, y)}
    for marginal in ("uniform", "empirical"):
        rows[f"IS ({marginal} p(y))"] = inception_score(probs, marginal, splits, seed)
    return rows


def score_faces(judge, real, generated, references=None, batch=32, device="cpu"):
    """{name: number} of folders of people: identity, rank-1, with references copying, distance.

    Beside the generated pictures: real photos, each with the others of its person, and strangers,
    the photos of the next person. ValueError if the folders do not hold the same people.
    """
    folders = [real, generated]
    if references:
        folders.append(references)
    require_same_people(folders)
    people = [read_people(folder, judge, batch, device) for folder in folders]
    held = people[0]
    made = people[1]
    kinds = {"": (made, compare_people(made, held))}
    kinds[", real photos"] = (held, compare_real_people(held))
    if len(held) > 1:
        strangers = held[1:] + held[:1]
        kinds[", strangers"] = (strangers, compare_people(strangers, held))
    rows = {}
    for kind, (pictures, cosines) in kinds.items():
        identity = face_identity(cosines)
        rows["identity" + kind] = mean_over_people(identity)
        if references:
            nearest = nearest_reference(pictures, people[2])
            rows["copying" + kind] = mean_over_people(face_copying(nearest, identity))
        if len(held) > 1:
            rows["rank-1" + kind] = mean_over_people(rank_one(cosines))
    rows["face distance (Fréchet)"] = fid(torch.cat(held), torch.cat(made))
    print(f"faces: {judge.name}; {len(held)} people")
    return rows


def main():
    args = parse_scoring(__doc__)
    device = pick_device(args.device)
    cosines = {}
    if args.clip:  # first: a wrong name must not cost the rest
        clip = ClipJudge(args.clip, device, args.batch)
        cosines = score_clip(clip, args.real, args.generated, args.references, args.prompt)
        print(f"CLIP: {args.clip}")
    if args.faces:
        judge = load_face_judge(args.faces, args.face_box, device)
        folders = (args.real, args.generated, args.references)
        cosines |= score_faces(judge, *folders, args.batch, device)
    judge = load_judge(args.inception, args.resize, device)
    rows = score_folders(args.real, args.generated, judge, args.batch, device, args.splits, args.seed)
    rows |= cosines
    print("| metric | value |\n|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value:.6g} |")


if __name__ == "__main__":
    run(main, "read fewer pictures at once (--batch)")
