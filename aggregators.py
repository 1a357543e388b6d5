"""From the embeddings of N reference photos to what the adapter reads (paper, sections 3.4 and 3.5).

    none      the first reference alone, as in the original IP-Adapter     (B, N, E) -> (B, 1, E)
    max, avg  Max and Average Pooling, no training                         (B, N, E) -> (B, 1, E)
    selfattn  Algorithm 1: Q = x·W_q, K = x·W_k, V = x·W_v,
              softmax(Q·Kᵀ/√d_k)·V·W_out                                   (B, N, E) -> (B, N, E)
    concat    every reference as it is (ours, for comparison)              (B, N, E) -> (B, N, E)

`fit_references` truncates or bootstraps to the nine references that Self-Attention was trained on.
The paper does not say how Algorithm 1 starts: we take W_k = 0 and W_v = W_out = I, so that every
one of its N outputs is at first the average of the inputs.
"""

import torch
from torch import nn

from attention import attention


class SelfAttention(nn.Module):
    """Algorithm 1: one head, d_k = E, no bias, no residual, no position code, all N outputs kept.

    So a permutation of the references permutes the outputs, and zero embeddings stay zero.
    W_k = 0 makes all weights 1/N at first; training leaves that point because W_q is random
    (with W_q = W_k = 0 both gradients would vanish).
    """

    def __init__(self, dim):
        super().__init__()
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.to_k.weight)
        nn.init.eye_(self.to_v.weight)
        nn.init.eye_(self.to_out.weight)

    def forward(self, embeds):
        """softmax(Q·Kᵀ/√d_k)·V·W_out   (Algorithm 1).   (B, N, E) -> (B, N, E)."""
        return self.to_out(attention(self.to_q(embeds), self.to_k(embeds), self.to_v(embeds)))


AGGREGATORS = {   # each of embeds (B, N, E), by the formulas above
    "none": lambda embeds: embeds[:, :1],
    "max": lambda embeds: embeds.amax(dim=1, keepdim=True),
    "avg": lambda embeds: embeds.mean(dim=1, keepdim=True),
    "selfattn": SelfAttention,
    "concat": lambda embeds: embeds,
}


def make_aggregator(name, dim):
    """The aggregator `name` for embeddings of width `dim`: a function, or a module if it has weights.

    ValueError for a name that is not in AGGREGATORS.
    """
    if name not in AGGREGATORS:
        raise ValueError(f"unknown aggregator {name!r}: choose one of {', '.join(AGGREGATORS)}")
    aggregator = AGGREGATORS[name]
    return aggregator(dim) if isinstance(aggregator, type) else aggregator


def fit_references(embeds, n=9, generator=None):
    """Exactly n references: more than n are cut to the first n, fewer are bootstrapped (section 3.5).

    Bootstrapping keeps every given reference and draws the missing ones from them with replacement,
    for each row of the batch on its own. embeds: (..., N, E) -> (..., n, E). ValueError if N = 0.
    """
    given = embeds.shape[-2]
    if given == 0:
        raise ValueError("no reference photos: at least one is needed")
    if given >= n:
        return embeds[..., :n, :]
    device = generator.device if generator else embeds.device
    drawn = torch.randint(given, (*embeds.shape[:-2], n - given), generator=generator, device=device)
    drawn = drawn.to(embeds.device)[..., None].expand(*drawn.shape, embeds.shape[-1])
    return torch.cat([embeds, embeds.gather(-2, drawn)], dim=-2)  # (..., n, E)
