"""aggregators.py: Algorithm 1 against a loop over its definition, invariances, truncation and bootstrap."""

import math

import pytest
import torch

from aggregators import AGGREGATORS, SelfAttention, fit_references, make_aggregator
from conftest import close, randn

B, N, E = 3, 5, 8


def trained():
    """A Self-Attention whose four matrices are all random."""
    attention = SelfAttention(E).double()
    for seed, weight in enumerate(attention.parameters(), 10):
        weight.data = randn(E, E, seed=seed)
    return attention


def test_alg1_is_what_the_paper_writes():
    x, attention = randn(B, N, E), trained()
    W_q, W_k, W_v, W_out = (m.weight.T for m in (attention.to_q, attention.to_k, attention.to_v, attention.to_out))
    expected = torch.zeros_like(x)
    for b in range(B):
        Q, K, V = x[b] @ W_q, x[b] @ W_k, x[b] @ W_v
        for i in range(N):
            weights = [math.exp((Q[i] @ K[j]).item() / math.sqrt(E)) for j in range(N)]
            Z = sum(weight * V[j] for j, weight in enumerate(weights)) / sum(weights)
            expected[b, i] = Z @ W_out
    close(attention(x), expected)
    assert list(attention.state_dict()) == ["to_q.weight", "to_k.weight", "to_v.weight", "to_out.weight"]


def test_selfattn_starts_as_average():
    x = randn(B, N, E)
    close(SelfAttention(E).double()(x), AGGREGATORS["avg"](x).expand(B, N, E))


def test_selfattn_leaves_the_average_when_trained():
    torch.manual_seed(0)
    x, attention = randn(B, N, E), SelfAttention(E).double()
    for _ in range(2):
        loss = (attention(x) - x).square().mean()
        gradients = torch.autograd.grad(loss, list(attention.parameters()))
        for weight, gradient in zip(attention.parameters(), gradients):
            weight.data -= gradient
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients)
    assert (attention(x) - attention(x).mean(1, keepdim=True)).abs().max() > 1e-4


def test_selfattn_of_zero_embeddings_is_zero():
    assert not trained()(torch.zeros(B, N, E, dtype=torch.float64)).any()


@pytest.mark.parametrize("name", ["selfattn", "concat"])
def test_permuted_references_permute_the_outputs(name):
    x, order = randn(B, N, E), torch.tensor([3, 0, 4, 1, 2])
    aggregate = trained() if name == "selfattn" else AGGREGATORS[name]
    close(aggregate(x[:, order]), aggregate(x)[:, order])


@pytest.mark.parametrize("name", ["max", "avg"])
def test_pooling_ignores_the_order_of_references(name):
    x = randn(B, N, E)
    close(AGGREGATORS[name](x.flip(1)), AGGREGATORS[name](x))


def test_closed_forms_of_none_max_avg_concat():
    x = torch.tensor([[[1.0, -4.0], [3.0, -2.0], [-1.0, 0.0]]])
    expected = {"none": [[[1, -4]]], "max": [[[3, 0]]], "avg": [[[1, -2]]], "concat": x.tolist()}
    for name, values in expected.items():
        assert make_aggregator(name, 2)(x).tolist() == values


@pytest.mark.parametrize("name", AGGREGATORS)
def test_shapes_and_single_reference_of_every_aggregator(name):
    aggregate = make_aggregator(name, E)
    assert aggregate(torch.zeros(B, N, E)).shape == (B, N if name in ("selfattn", "concat") else 1, E)
    x = randn(B, 1, E).float()
    close(aggregate(x), x, 1e-6)  # of one reference all five are that reference


def test_unknown_aggregator_is_one_clear_line():
    with pytest.raises(ValueError, match="^unknown aggregator 'mean': choose one of none, max, avg, selfattn, concat$"):
        make_aggregator("mean", E)


def test_more_references_than_n_keep_the_first_n():
    x = randn(B, 12, E)
    assert torch.equal(fit_references(x), x[:, :9])
    for given in (9, 10):
        assert torch.equal(fit_references(x[:, :given]), x[:, :9])


@pytest.mark.parametrize("given", [1, 2, 4, 8])
def test_fewer_references_are_kept_and_bootstrapped_up_to_n(given):
    x = randn(B, given, E)
    fitted = fit_references(x, 9, torch.Generator().manual_seed(0))
    assert fitted.shape == (B, 9, E)
    assert torch.equal(fitted[:, :given], x)
    for row, pool in zip(fitted, x):
        assert all(any(torch.equal(one, other) for other in pool) for one in row)


def test_bootstrap_draws_uniformly_with_replacement_each_row_on_its_own():
    x = torch.arange(3.0)[:, None].expand(4000, 3, 1)
    drawn = fit_references(x, 5, torch.Generator().manual_seed(0))[:, 3:, 0]  # (4000, 2)
    counts = torch.stack([((drawn[:, 0] == i) & (drawn[:, 1] == j)).sum() for i in range(3) for j in range(3)])
    assert ((counts / 4000 - 1 / 9).abs() < 0.02).all()  # all nine pairs, repetitions among them


def test_bootstrap_follows_its_generator():
    x = randn(B, 4, E)
    one, same, other = (fit_references(x, 9, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_bootstrap_works_on_one_person_without_a_batch():
    x = randn(4, E)
    fitted = fit_references(x)
    assert fitted.shape == (9, E) and torch.equal(fitted[:4], x)


def test_no_references_is_one_clear_line():
    with pytest.raises(ValueError, match="^no reference photos: at least one is needed$"):
        fit_references(torch.zeros(B, 0, E))
