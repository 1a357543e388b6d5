"""aggregators.py: Algorithm 1 against a loop, the contract of every aggregator, cutting and bootstrapping."""

import ast
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import aggregators
from aggregators import (
    AGGREGATORS, Aggregator, SelfAttention, choose_references, fit_references, make_aggregator,
)  # fmt: skip
from conftest import close, randn
from ip_adapter import IPAdapter
from unet import UNet

B, N, E = 3, 5, 8


def randomise(aggregator):
    """The same with random weights in float64, if it has any."""
    for seed, weight in enumerate(aggregator.parameters(), 10):
        weight.data = randn(*weight.shape, seed=seed)
    return aggregator.double()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- Algorithm 1

def test_alg1_is_what_the_paper_writes():
    x, attention = randn(B, N, E), randomise(SelfAttention(E))
    W_q, W_k, W_v, W_out = [weight.T for weight in attention.parameters()]
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
    average = make_aggregator("avg", E)(x)
    close(SelfAttention(E).double()(x), average.expand(B, N, E))


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
    assert not randomise(SelfAttention(E))(torch.zeros(B, N, E, dtype=torch.float64)).any()


@pytest.mark.parametrize("name", ["selfattn", "concat"])
def test_permuted_references_permute_the_outputs(name):
    x, order = randn(B, N, E), torch.tensor([3, 0, 4, 1, 2])
    aggregator = randomise(make_aggregator(name, E))
    close(aggregator(x[:, order]), aggregator(x)[:, order])


# ---------------------------------------------------------------- the others

@pytest.mark.parametrize("name", ["max", "avg"])
def test_pooling_ignores_the_order_of_references(name):
    x, aggregator = randn(B, N, E), AGGREGATORS[name](E)
    close(aggregator(x.flip(1)), aggregator(x))


def test_closed_forms_of_none_max_avg_concat():
    x = torch.tensor([[[1.0, -4.0], [3.0, -2.0], [-1.0, 0.0]]])
    expected = {"none": [[[1, -4]]], "max": [[[3, 0]]], "avg": [[[1, -2]]], "concat": x.tolist()}
    for name, values in expected.items():
        assert make_aggregator(name, 2)(x).tolist() == values


@pytest.mark.parametrize("name", ["none", "max", "avg", "selfattn", "concat"])
def test_shapes_and_single_reference_of_every_aggregator(name):
    aggregator = make_aggregator(name, E)
    for given in range(1, 13):
        M = given if name in ("selfattn", "concat") else 1
        assert aggregator(torch.zeros(B, given, E)).shape == (B, M, E)
    x = randn(B, 1, E).float()
    close(aggregator(x), x, 1e-6)  # of one reference all five are that reference


def test_only_selfattn_wants_nine_references_the_others_take_any_number():
    assert make_aggregator("selfattn", E).references == 9
    for name in ("none", "max", "avg", "concat"):
        assert make_aggregator(name, E).references is None


def test_unknown_aggregator_is_one_clear_line():
    known = ", ".join(AGGREGATORS)
    assert known.startswith("none, max, avg, selfattn, concat")
    with pytest.raises(ValueError, match=f"^unknown aggregator 'mean': choose one of {known}$"):
        make_aggregator("mean", E)


# ---------------------------------------------------------------- the contract, and a new aggregator

@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_aggregator_takes_any_number_of_references(name):
    aggregator = randomise(make_aggregator(name, E))
    for given in range(1, 13):
        answer = aggregator(randn(B, given, E))
        M = answer.shape[1]
        assert M >= 1 and answer.shape == (B, M, E)
        assert answer.dtype == torch.float64 and answer.isfinite().all()


@pytest.mark.parametrize("name", AGGREGATORS)
def test_zeros_in_are_zeros_out_whatever_the_weights(name):
    aggregator = randomise(make_aggregator(name, E))
    for given in (1, N, 12):
        assert not aggregator(torch.zeros(B, given, E, dtype=torch.float64)).any()


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_aggregator_is_fitted_to_as_many_references_as_it_wants(name):
    aggregator = make_aggregator(name, E)
    assert aggregator.references is None or aggregator.references >= 1
    for given in (1, 4, 9, 12):
        x = randn(B, given, E)
        fitted = aggregator.fit_references(x, seeded(0))
        if aggregator.references is None:
            assert torch.equal(fitted, x)
        else:
            assert torch.equal(fitted, fit_references(x, aggregator.references, seeded(0)))


class ScaledMedian(Aggregator):
    """What a reader would add: no line but this class, and one in AGGREGATORS."""

    references = 3

    def __init__(self, dim):
        super().__init__(dim)
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, embeds):
        return self.scale * embeds.median(dim=1, keepdim=True).values


def test_a_new_aggregator_is_a_class_and_a_line(tmp_path, monkeypatch):
    monkeypatch.setitem(AGGREGATORS, "median", ScaledMedian)
    unet = UNet(
        sample_size=4, block_out_channels=[8], layers_per_block=1, norm_num_groups=4,
        down_block_types=["CrossAttnDownBlock2D"], up_block_types=["CrossAttnUpBlock2D"],
        cross_attention_dim=12, attention_head_dim=2,
    )  # fmt: skip
    embeds = randn(B, 3, E).float()

    # tokens and training
    adapter = IPAdapter(unet, E, "median")
    scale = adapter.aggregator.scale
    assert any(weight is scale for weight in adapter.trainable_parameters())
    scale.data = torch.arange(1.0, E + 1)
    median = embeds.sort(dim=1).values[:, 1:2]
    close(adapter.tokens(embeds), adapter.image_proj(scale * median), 1e-6)

    # a file, its name in it
    adapter.save(tmp_path / "median.safetensors")
    with safe_open(tmp_path / "median.safetensors", "pt") as file:
        assert file.metadata()["agg"] == "median"
        assert torch.equal(file.get_tensor("aggregator.scale"), scale)
    loaded = IPAdapter.load(tmp_path / "median.safetensors", unet)
    assert loaded.agg == "median" and type(loaded.aggregator) is ScaledMedian
    assert torch.equal(loaded.tokens(embeds), adapter.tokens(embeds))

    # in place of another file's aggregator
    IPAdapter(unet, E, "selfattn").save(tmp_path / "selfattn.safetensors")
    changed = IPAdapter.load(tmp_path / "selfattn.safetensors", unet, agg="median")
    assert changed.agg == "median"
    close(changed.tokens(embeds), changed.image_proj(median), 1e-6)

    # as many references as it says
    assert loaded.aggregator.fit_references(randn(B, 12, E)).shape == (B, 3, E)


def find_comparisons(source, word):
    """The lines of a Python source that compare with a word: ==, != or in, or a case of match."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Compare, ast.MatchValue)):
            constants = [part for part in ast.walk(node) if isinstance(part, ast.Constant)]
            if any(constant.value == word for constant in constants):
                lines.append(node.lineno)
    return lines


def test_nothing_outside_aggregators_compares_with_selfattn():
    for test in ('agg == "selfattn"', '"selfattn" != agg', 'agg not in ("avg", "selfattn")'):
        assert find_comparisons(f"x = 1\nif {test}:\n    x = 2", "selfattn") == [2]
    assert find_comparisons('files["selfattn"]; add("--agg", default="selfattn")', "selfattn") == []
    root = Path(aggregators.__file__).parent
    sources = [path for path in [*root.glob("*.py"), *root.glob("*/*.py")] if path.parent.name != "tests"]
    assert len(sources) > 20
    for path in sources:
        if path.name != "aggregators.py":
            found = find_comparisons(path.read_text(encoding="utf-8"), "selfattn")
            assert not found, f"{path.name}, lines {found}: ask the aggregator, not its name"


# ---------------------------------------------------------------- nine references

def test_of_twelve_references_the_first_nine_take_part_and_nothing_is_drawn():
    generator = seeded(0)
    before = generator.get_state()
    assert choose_references(12, 9, generator=generator).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert choose_references(12, 9, (2,), generator).tolist() == 2 * [[0, 1, 2, 3, 4, 5, 6, 7, 8]]
    assert torch.equal(generator.get_state(), before)


def test_of_four_references_all_take_part_first_and_the_missing_ones_are_drawn():
    seen = set()
    for seed in range(20):
        chosen = choose_references(4, 9, generator=seeded(seed)).tolist()
        assert len(chosen) == 9 and chosen[:4] == [0, 1, 2, 3]
        assert set(chosen[4:]) <= {0, 1, 2, 3}
        seen.add(tuple(chosen))
    assert len(seen) > 10
    rows = choose_references(4, 9, (2, 3), seeded(0))
    assert rows.shape == (2, 3, 9)
    assert len({tuple(row.tolist()) for row in rows.flatten(0, 1)}) > 1  # each row draws on its own


def test_more_references_than_n_keep_the_first_n():
    x = randn(B, 12, E)
    assert torch.equal(fit_references(x), x[:, :9])
    for given in (9, 10):
        assert torch.equal(fit_references(x[:, :given]), x[:, :9])


@pytest.mark.parametrize("given", [1, 2, 4, 8])
def test_fewer_references_are_kept_and_bootstrapped_up_to_n(given):
    x = randn(B, given, E)
    fitted = fit_references(x, 9, seeded(0))
    assert fitted.shape == (B, 9, E)
    assert torch.equal(fitted[:, :given], x)
    for row, pool in zip(fitted, x):
        assert all(any(torch.equal(one, other) for other in pool) for one in row)


def test_bootstrap_draws_uniformly_with_replacement_each_row_on_its_own():
    x = torch.arange(3.0)[:, None].expand(4000, 3, 1)
    drawn = fit_references(x, 5, seeded(0))[:, 3:, 0]  # (4000, 2)
    for i in range(3):
        for j in range(3):
            share = ((drawn[:, 0] == i) & (drawn[:, 1] == j)).float().mean()
            assert abs(share - 1 / 9) < 0.02  # all nine pairs, repetitions among them


def test_bootstrap_follows_its_generator():
    x = randn(B, 4, E)
    one, same, other = [fit_references(x, 9, seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_bootstrap_works_on_one_person_without_a_batch():
    x = randn(4, E)
    fitted = fit_references(x)
    assert fitted.shape == (9, E) and torch.equal(fitted[:4], x)


def test_no_references_is_one_clear_line():
    with pytest.raises(ValueError, match="^no reference photos: at least one is needed$"):
        fit_references(torch.zeros(B, 0, E))
