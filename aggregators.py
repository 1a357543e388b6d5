"""Aggregators: the function G of eq. 1, many reference photos in, what the adapter reads out.

(paper, sections 3.4 and 3.5, Algorithm 1)

    none      G = Γ_i(x_1)                  the first reference alone       (B, N, E) -> (B, 1, E)
    max       G = max_k Γ_i(x_k)            number by number                (B, N, E) -> (B, 1, E)
    avg       G = 1/N Σ_k Γ_i(x_k)                                          (B, N, E) -> (B, 1, E)
    selfattn  G = softmax(QKᵀ/√d_k)·V·W_out, Algorithm 1                    (B, N, E) -> (B, N, E)
    concat    every reference as it is (ours, for comparison)               (B, N, E) -> (B, N, E)

To add one, write a subclass of `Aggregator`, whose docstring is the contract, and a line in
AGGREGATORS: `train.py --agg`, `sample.py --agg` and adapter files then accept it.
"""

import torch
from torch import nn

from attention import attention


class Aggregator(nn.Module):
    """G: the embeddings of N references of a person -> M embeddings that stand for all of them.

    The contract of a new one:
      - forward: (B, N, E) -> (B, M, E), for every N ≥ 1 that it is given. M may depend on N, and
        every embedding becomes four image tokens.
      - zeros in, zeros out: a dropped image condition is a zeroed embedding (section 3.3).
      - `references`: how many it wants. A number: it is trained on exactly that many, and when
        sampling more are cut and fewer are bootstrapped (`fit_references`). None: it is trained on
        nine, like the paper's, and takes any number when sampling.
      - __init__(dim), dim = E. Weights are trained and saved with the adapter automatically.
    """

    references = None

    @property
    def photos(self):
        """Photos of a person in a step of training: a target and its references (data.leave_one_out)."""
        return 1 + (self.references or 9)

    def __init__(self, dim):
        super().__init__()

    def forward(self, embeds):
        raise NotImplementedError

    def fit_references(self, embeds, generator=None):
        """As many references as it wants: (B, N, E) -> (B, self.references or N, E)."""
        if self.references is None:
            return embeds
        return fit_references(embeds, self.references, generator)


class FirstReference(Aggregator):
    """G = Γ_i(x_1): the original IP-Adapter, which reads one photo."""

    def forward(self, embeds):
        return embeds[:, :1]


class MaxPooling(Aggregator):
    """G = max_k Γ_i(x_k), number by number."""

    def forward(self, embeds):
        return embeds.amax(dim=1, keepdim=True)


class AveragePooling(Aggregator):
    """G = 1/N Σ_k Γ_i(x_k)."""

    def forward(self, embeds):
        return embeds.mean(dim=1, keepdim=True)


class SelfAttention(Aggregator):
    """Algorithm 1: one head, d_k = E, no bias, no residual, no position code, all N outputs kept.

    So a permutation of the references permutes the outputs, and zero embeddings stay zero. It was
    trained on nine references and wants nine (section 3.5).

    The paper does not say how it starts. We take W_k = 0 and W_v = W_out = I: then all scores are
    0, all weights 1/N, and every output is the average of the inputs. Training starts exactly at
    average pooling: of N equal groups of tokens, softmax gives each 1/N of the weight of one group.
    It does leave that point: the gradient of W_k contains Q = x·W_q ≠ 0, so W_k moves in the first
    step, and W_q from the second. W_q = 0 with a random W_k would do as well; with both zero
    neither would ever move.
    """

    references = 9

    def __init__(self, dim):
        super().__init__(dim)
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.to_k.weight)
        nn.init.eye_(self.to_v.weight)
        nn.init.eye_(self.to_out.weight)

    def forward(self, embeds):
        """softmax(Q·Kᵀ/√d_k)·V·W_out   (Algorithm 1).   (B, N, E) -> (B, N, E)."""
        Q = self.to_q(embeds)
        K = self.to_k(embeds)
        V = self.to_v(embeds)
        Z = attention(Q, K, V)
        return self.to_out(Z)


class Concatenation(Aggregator):
    """Every reference as it is: the UNet's attention chooses among 4·N tokens."""

    def forward(self, embeds):
        return embeds


AGGREGATORS = {
    "none": FirstReference,
    "max": MaxPooling,
    "avg": AveragePooling,
    "selfattn": SelfAttention,
    "concat": Concatenation,
}


def make_aggregator(name, dim):
    """The aggregator `name` for embeddings of width `dim`. ValueError if there is no such one."""
    if name not in AGGREGATORS:
        raise ValueError(f"unknown aggregator {name!r}: choose one of {', '.join(AGGREGATORS)}")
    return AGGREGATORS[name](dim)


def choose_references(given, n, rows=(), generator=None):
    """Which n of `given` references take part: (*rows, n) numbers from 0 to given−1.

    Of more than n the first n. Of fewer all, and the missing ones are drawn from them with
    replacement, for each row on its own (bootstrap, section 3.5). Twelve and four for n = 9:
        [0, 1, 2, 3, 4, 5, 6, 7, 8]      and      [0, 1, 2, 3, 2, 0, 0, 3, 1], say.
    Only the second is random, from `generator` (None: PyTorch's global one); sample.py always takes
    seed 0. In training a random ten of a person's photos take part first (data.leave_one_out).
    ValueError if none is given.
    """
    if given == 0:
        raise ValueError("no reference photos: at least one is needed")
    kept = torch.arange(min(given, n)).expand(*rows, -1)
    missing = max(n - given, 0)
    if missing == 0:
        return kept
    device = generator.device if generator else "cpu"
    drawn = torch.randint(given, (*rows, missing), generator=generator, device=device)
    return torch.cat([kept, drawn.cpu()], dim=-1)


def fit_references(embeds, n=9, generator=None):
    """Exactly n references, see `choose_references`: embeds (..., N, E) -> (..., n, E)."""
    *rows, given, width = embeds.shape
    chosen = choose_references(given, n, rows, generator).to(embeds.device)  # (..., n)
    index = chosen[..., None].expand(*chosen.shape, width)  # (..., n, E)
    return embeds.gather(-2, index)
