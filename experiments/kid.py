"""KID of pictures that come in groups, one a person: only strangers are compared.

KID's formula is unbiased for independent pictures. Two pictures of one person, or of one scene, are
not: where real and generated pictures share people, the plain number lies below the truth.
"""

import torch


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
