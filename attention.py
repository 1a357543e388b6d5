"""Attention, the paper's section 2, equation 3.

    Attention(Q, K, V) = softmax(QKᵀ/√d)·V
    Z_new = Attention(Q, K, V) + λ·Attention(Q, K', V')                          (3)
    Q = Z·W_q,   K = c_τ·W_k,   V = c_τ·W_v,   K' = c_i·W'_k,   V' = c_i·W'_v

Z is a picture inside the UNet, one row a pixel. It asks (Q) the prompt's tokens c_τ, as Stable
Diffusion always did, and, through two new matrices W'_k and W'_v, the image tokens c_i. That is all
IP-Adapter adds to the UNet: Q and the output projection are shared, and λ = 0 gives the
text-to-image model back exactly.

Around it stand the parts of a Stable Diffusion transformer block: self-attention, cross-attention,
GEGLU. Attributes carry the names of the published checkpoints (`to_q`, `to_out.0`, `ff.net.2`),
local variables the paper's.
"""

import torch
import torch.nn.functional as F
from torch import nn


def attention(Q, K, V):
    """Attention(Q, K, V) = softmax(QKᵀ/√d)·V, written out.

    Q (…, L, d), K and V (…, S, d) -> (…, L, d); below, with heads, … is (B, h).
    """
    d = Q.shape[-1]
    scores = (Q / d**0.5) @ K.transpose(-2, -1)  # (B, h, L, d) x (B, h, d, S) -> (B, h, L, S)
    weights = torch.softmax(scores, dim=-1)
    return weights @ V  # (B, h, L, S) x (B, h, S, d) -> (B, h, L, d)


def scaled_dot_product(Q, K, V):
    """`attention(Q, K, V)` by the faster of two equal ways; the only place that chooses.

    PyTorch's fused kernel never stores the (L, S) weights. It wins everywhere except in training on
    a CPU, where its backward pass is slower than the formula's (measured, PyTorch 2.14).
    """
    if torch.is_grad_enabled() and Q.device.type == "cpu":
        return attention(Q, K, V)
    return F.scaled_dot_product_attention(Q, K, V)


class CrossAttention(nn.Module):
    """Eq. 3 for `heads` heads of `head_dim` channels; without c_t it is self-attention.

    `context_dim` is the width of c_t and c_i (default: `query_dim`).

    `image_kv` is None until `ip_adapter.IPAdapter` attaches W'_k and W'_v, a tuple of two nn.Linear.
    It is a tuple on purpose: nn.Module registers layers, but not tuples of layers. So the adapter
    owns these weights, and the UNet's parameters and checkpoint are those of the text-to-image
    model, whether an adapter is attached or not.
    """

    def __init__(self, query_dim, context_dim=None, heads=8, head_dim=64, bias=False):
        super().__init__()
        context_dim = query_dim if context_dim is None else context_dim
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(query_dim, inner, bias=bias)
        self.to_k = nn.Linear(context_dim, inner, bias=bias)
        self.to_v = nn.Linear(context_dim, inner, bias=bias)
        self.to_out = nn.Sequential(nn.Linear(inner, query_dim))
        self.image_kv = None

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, L, h·d) -> (B, h, L, d)

    def merge_heads(self, x):
        return x.transpose(1, 2).flatten(2)  # (B, h, L, d) -> (B, L, h·d)

    def forward(self, x, c_t=None, c_i=None, lam=1.0):
        """Z_new = Attention(Q, K, V) + λ·Attention(Q, K', V')                  (3), then `to_out`.

        x (B, L, query_dim): Z; c_t (B, L_t, context_dim): text tokens, None: x itself;
        c_i (B, 4M, context_dim): image tokens, None (or no adapter attached): only the first term
        is computed; lam: λ. Returns (B, L, query_dim).
        """
        c_t = x if c_t is None else c_t
        Q = self.split_heads(self.to_q(x))
        K = self.split_heads(self.to_k(c_t))
        V = self.split_heads(self.to_v(c_t))
        Z = scaled_dot_product(Q, K, V)
        if c_i is not None and self.image_kv is not None:
            to_k_ip, to_v_ip = self.image_kv
            K_ip = self.split_heads(to_k_ip(c_i))
            V_ip = self.split_heads(to_v_ip(c_i))
            Z = Z + lam * scaled_dot_product(Q, K_ip, V_ip)
        return self.to_out(self.merge_heads(Z))


class GEGLU(nn.Module):
    """x ↦ (x·W + b) ⊙ GELU(x·V + c), with the exact GELU; `proj` holds both matrices."""

    def __init__(self, dim, inner):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back."""

    def __init__(self, dim):
        super().__init__()
        dropout = nn.Identity()  # in the checkpoint `net.1` is a dropout, which has no weights
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), dropout, nn.Linear(4 * dim, dim))

    def forward(self, x):
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention (eq. 3), feed-forward: each after a LayerNorm, each added."""

    def __init__(self, dim, heads, context_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = CrossAttention(dim, None, heads, dim // heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = CrossAttention(dim, context_dim, heads, dim // heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x, c_t, c_i=None, lam=1.0):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), c_t, c_i, lam)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """A TransformerBlock over the pixels of a feature map (B, C, H, W), added to it.

    `linear`: the checkpoint holds the projections before and after it as nn.Linear (Stable
    Diffusion 2.x) instead of as 1×1 convolutions (1.x).
    """

    def __init__(self, channels, heads, context_dim, groups=32, linear=False):
        super().__init__()

        def make_projection():
            if linear:
                return nn.Linear(channels, channels)
            return nn.Conv2d(channels, channels, kernel_size=1)

        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = make_projection()
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, context_dim)])
        self.proj_out = make_projection()

    def forward(self, x, c_t, c_i=None, lam=1.0):
        z = self.norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)
        z = self.project(self.proj_in, z)
        for block in self.transformer_blocks:
            z = block(z, c_t, c_i, lam)
        z = self.project(self.proj_out, z)
        return x + z.transpose(1, 2).unflatten(2, x.shape[2:])  # back to (B, C, H, W)

    def project(self, layer, z):
        """Either kind of layer on (B, HW, C): a 1×1 convolution is one linear map at every pixel."""
        matrix = layer.weight.flatten(1)  # (C, C) or (C, C, 1, 1) -> (C, C)
        return F.linear(z, matrix, layer.bias)


class SpatialAttention(CrossAttention):
    """The VAE's self-attention over pixels: one head, biases, a GroupNorm before, added to x."""

    def __init__(self, channels, groups):
        super().__init__(channels, heads=1, head_dim=channels, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)

    def forward(self, x):
        z = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)
        z = super().forward(z)
        return x + z.transpose(1, 2).unflatten(2, x.shape[2:])
