"""FID and KID of pictures that come in groups, one a person.

FID: the bootstrap draws people a thousand times; their Gaussians are kept and only added up.
KID: only strangers are compared. Its formula is unbiased for independent pictures. Two pictures of
one person, or of one scene, are not: where real and generated pictures share people, the plain
number lies below the truth.
"""

import torch

from metrics import Gaussian, frechet_distance


class GroupedGaussian:
    """The Gaussian of the pictures of any people, some perhaps repeatedly, from sums a person.

    x: for each person features (n_p, d). With n = Σ n_p and every person as often as drawn
        μ = Σ n_p·μ_p / n,   (n − 1)·Σ = Σ_p [S_p + n_p·(μ_p − m)(μ_p − m)ᵀ] − n·(μ − m)(μ − m)ᵀ
    where S_p is a person's scatter matrix and m the mean of all, so that nothing large cancels.
    """

    def __init__(self, x):
        parts = [Gaussian(one) for one in x]
        self.center = torch.cat(list(x)).double().mean(0)  # m: (d,)
        self.n = torch.tensor([part.n for part in parts]).double()  # (P,)
        self.sums = []
        self.squares = []
        for part in parts:
            mean = part.mu - self.center if part.n else torch.zeros_like(self.center)
            self.sums.append(part.n * mean)
            self.squares.append(part.scatter + part.n * torch.outer(mean, mean))
        self.sums = torch.stack(self.sums)  # (P, d)
        self.squares = torch.stack(self.squares)  # (P, d, d)

    def of(self, people):
        """-> μ (d,), Σ (d, d). people: their numbers."""
        weights = torch.bincount(torch.tensor(people), minlength=len(self.n)).double()  # (P,)
        n = weights @ self.n
        mean = weights @ self.sums / n
        scatter = torch.tensordot(weights, self.squares, 1) - n * torch.outer(mean, mean)
        return self.center + mean, scatter / (n - 1)


class GroupedFID:
    """Eq. 4 of the pictures of any people, from the GroupedGaussians of two sets of pictures."""

    def __init__(self, real, made):
        self.real = real
        self.made = made

    def __call__(self, people):
        mu_p, sigma_p = self.real.of(people)
        mu_q, sigma_q = self.made.of(people)
        return frechet_distance(mu_p, sigma_p, mu_q, sigma_q)


def sum_kernels(x, y):
    """Sums of KID's kernel k(a, b) = (aᵀb/d + 1)³ over the pictures of two people: (P, P).

    x, y: for each person features (n_p, d).
    """
    counts_x = [len(one) for one in x]
    counts_y = [len(one) for one in y]
    k = (torch.cat(x).double() @ torch.cat(y).double().T / x[0].shape[1] + 1).pow(3)
    rows = torch.stack([part.sum(0) for part in k.split(counts_x)])  # (P, m)
    return torch.stack([part.sum(1) for part in rows.split(counts_y, dim=1)], dim=1)


class StrangersKID:
    """KID = E k(x, x') + E k(y, y') − 2 E k(x, y), over pairs of pictures of different people only.

    So real and generated pictures that share a person or a scene are never compared, and the three
    means are alike: unbiased for people drawn at random (metrics.kernel_distance is so for pictures
    drawn at random). x, y: for each person features (n_p, d) and (m_p, d). The sums of the kernel
    over people are kept, so that the bootstrap only adds them up.
    """

    def __init__(self, x, y):
        n = torch.tensor([float(len(one)) for one in x]).double()
        m = torch.tensor([float(len(one)) for one in y]).double()
        self.sums = sum_kernels(x, x), sum_kernels(y, y), sum_kernels(x, y)
        self.pairs = torch.outer(n, n), torch.outer(m, m), torch.outer(n, m)

    def __call__(self, people):
        """-> float. people: their numbers, perhaps some of them repeatedly."""
        weight = torch.bincount(torch.tensor(people), minlength=len(self.sums[0])).double()
        weights = torch.outer(weight, weight)
        if len(set(people)) > 1:  # else there are no strangers
            weights = weights.fill_diagonal_(0)
        means = []
        for sums, pairs in zip(self.sums, self.pairs):
            means.append((weights * sums).sum() / (weights * pairs).sum())
        within_x, within_y, between = means
        return float(within_x + within_y - 2 * between)
