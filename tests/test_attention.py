"""attention.py: the formula, eq. 3, and parity of the transformer block with diffusers, in float64."""

import math

import pytest
import torch

import attention as module
from attention import (
    CrossAttention, FeedForward, SpatialAttention, Transformer2D, attention, scaled_dot_product,
)  # fmt: skip
from conftest import close, randn

B, L, M, D = 2, 6, 5, 12


def randomise(net, seed=0):
    """Random weights everywhere (norms and biases too), so that no tensor can be mistaken for another."""
    for i, p in enumerate(net.parameters()):
        p.data = randn(*p.shape, seed=seed + i) / 3
    return net.double().requires_grad_(False)


def with_adapter():
    attn = randomise(CrossAttention(8, D, heads=2, head_dim=3))
    layers = [torch.nn.Linear(D, 6, bias=False) for _ in "kv"]
    attn.image_kv = tuple(randomise(layer, seed) for seed, layer in enumerate(layers, 10))
    return attn


def test_attention_is_the_weighted_mean_of_v_by_softmax_of_qk_over_sqrt_d():
    Q, K, V = randn(1, 1, 3, 4, seed=1), randn(1, 1, 5, 4, seed=2), randn(1, 1, 5, 4, seed=3)
    for l in range(3):
        scores = [math.exp(sum(Q[0, 0, l] * K[0, 0, m]).item() / math.sqrt(4)) for m in range(5)]
        expected = sum(s / sum(scores) * V[0, 0, m] for m, s in enumerate(scores))
        close(attention(Q, K, V)[0, 0, l], expected)


@pytest.mark.parametrize("shape", [(2, 3, 7, 5, 4), (1, 1, 1, 1, 2), (2, 8, 16, 77, 40)])
def test_fused_kernel_equals_written_out_formula(shape):
    b, h, l, m, d = shape
    Q, K, V = randn(b, h, l, d, seed=1), randn(b, h, m, d, seed=2), randn(b, h, m, d, seed=3)
    close(torch.nn.functional.scaled_dot_product_attention(Q, K, V), attention(Q, K, V))
    with torch.no_grad():
        close(scaled_dot_product(Q, K, V), attention(Q, K, V))


def test_cpu_training_takes_the_formula_and_inference_the_fused_kernel(monkeypatch):
    used, Q = [], randn(1, 1, 2, 2)
    monkeypatch.setattr(module, "attention", lambda *_: used.append("formula"))
    monkeypatch.setattr(module.F, "scaled_dot_product_attention", lambda *_: used.append("fused"))
    scaled_dot_product(Q, Q, Q)
    with torch.no_grad():
        scaled_dot_product(Q, Q, Q)
    with torch.inference_mode():
        scaled_dot_product(Q, Q, Q)
    assert used == ["formula", "fused", "fused"]


def test_eq3_adds_lambda_times_attention_to_image_tokens_before_the_output_projection():
    attn = with_adapter()
    x, c_t, c_i = randn(B, L, 8, seed=1), randn(B, M, D, seed=2), randn(B, 4, D, seed=3)
    to_k_ip, to_v_ip = attn.image_kv

    def project(z, layer):
        return (z @ layer.weight.T).reshape(B, -1, 2, 3).permute(0, 2, 1, 3)

    Q, K, V = project(x, attn.to_q), project(c_t, attn.to_k), project(c_t, attn.to_v)
    K_ip, V_ip = project(c_i, to_k_ip), project(c_i, to_v_ip)
    Z = attention(Q, K, V) + 0.7 * attention(Q, K_ip, V_ip)
    expected = Z.permute(0, 2, 1, 3).reshape(B, L, 6) @ attn.to_out[0].weight.T + attn.to_out[0].bias
    close(attn(x, c_t, c_i, lam=0.7), expected)


def test_eq3_at_lam_zero_or_without_image_tokens_or_adapter_is_exactly_text_only():
    attn = with_adapter()
    x, c_t, c_i = randn(B, L, 8, seed=1), randn(B, M, D, seed=2), randn(B, 4, D, seed=3)
    text_only = attn(x, c_t)
    assert not torch.equal(attn(x, c_t, c_i), text_only)
    assert torch.equal(attn(x, c_t, c_i, lam=0), text_only)
    attn.image_kv = None
    assert torch.equal(attn(x, c_t, c_i), text_only)


def test_without_text_it_is_self_attention():
    attn, x = randomise(CrossAttention(8, None, heads=2, head_dim=4)), randn(B, L, 8)
    assert torch.equal(attn(x), attn(x, x))


def test_image_weights_are_no_part_of_the_checkpoint_attached_or_not():
    names = {"to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias"}
    without = CrossAttention(8, D, heads=2, head_dim=3)
    assert without.image_kv is None
    for attn in (without, with_adapter()):
        assert set(attn.state_dict()) == names
        assert {name for name, _ in attn.named_parameters()} == names


def test_feed_forward_is_geglu_with_the_exact_gelu():
    ff, x = randomise(FeedForward(4)), randn(B, L, 4)
    value, gate = (x @ ff.net[0].proj.weight.T + ff.net[0].proj.bias).chunk(2, dim=-1)
    gelu = gate * 0.5 * (1 + torch.erf(gate / math.sqrt(2)))
    close(ff(x), (value * gelu) @ ff.net[2].weight.T + ff.net[2].bias)


@pytest.mark.parametrize("linear", [False, True])
def test_transformer_equals_diffusers(linear):
    diffusers = pytest.importorskip("diffusers")
    theirs = randomise(diffusers.models.Transformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=16, cross_attention_dim=D,
        norm_num_groups=4, use_linear_projection=linear))
    ours = Transformer2D(16, heads=2, context_dim=D, groups=4, linear=linear).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, c_t = randn(B, 16, 3, 5, seed=1), randn(B, M, D, seed=2)
    close(ours(x, c_t), theirs(x, encoder_hidden_states=c_t).sample)
    x = x.to(memory_format=torch.channels_last)
    close(ours(x, c_t), theirs(x, encoder_hidden_states=c_t).sample)


def test_vae_attention_equals_diffusers():
    processor = pytest.importorskip("diffusers.models.attention_processor")
    theirs = randomise(processor.Attention(
        16, heads=1, dim_head=16, norm_num_groups=4, eps=1e-6, bias=True, residual_connection=True))
    ours = SpatialAttention(16, groups=4).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = randn(B, 16, 3, 5)
    close(ours(x), theirs(x))
