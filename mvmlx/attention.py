"""Attention over tokens: self-attention of all views together, cross-attention to a context, and the blocks around them.

Joint self-attention over views follows MVDream (arXiv 2308.16512); the transformer block follows diffusers' attention.py.
Tokens are (b, l, c) where l runs over views, rows and columns of one object. Each token of every view attends to the whole
context, so cross-attention and feed-forward need no knowledge of the views.
"""

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mvmlx.layers import FeedForward, GroupNorm
from mvshared.attention import AttentionOptions, score_slices


class KeyValues(NamedTuple):
    """What queries attend to: keys and values (b, n, l, d). Constant over the sampling steps for a fixed context."""

    keys: mx.array
    values: mx.array


def attention(q: mx.array, k: mx.array, v: mx.array, *, options: AttentionOptions, causal: bool = False) -> mx.array:
    """softmax(q k^T / sqrt(d)) v of queries (b, n, l, d) to keys and values (b, n, m, d), as (b, n, l, d).

    `causal` lets a token attend to itself and to those before it; there l = m. The softmax is in float32 whatever the dtype.
    """
    if options.implementation == "fused":
        mask = "causal" if causal else None
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)
    if options.implementation == "plain":
        return _plain_attention(q, k, v, first=0 if causal else None)
    batch, heads, queries, width = q.shape
    q, k, v = (x.reshape(batch * heads, -1, width) for x in (q, k, v))
    plan = score_slices(heads=batch * heads, queries=queries, keys=k.shape[1], budget_bytes=options.budget_bytes)
    out: list[list[mx.array]] = []
    for head, query in plan:
        if query.start == 0:
            out.append([])
        piece = q[head, query]
        if out[0]:  # evaluation is lazy: without an order, twice as many pieces are in flight together
            piece = mx.depends(piece, (out[-1] or out[-2])[-1])
        out[-1].append(_plain_attention(piece, k[head], v[head], first=query.start if causal else None))
    return mx.concatenate([mx.concatenate(row, axis=1) for row in out]).reshape(batch, heads, queries, width)


def _plain_attention(q: mx.array, k: mx.array, v: mx.array, *, first: int | None) -> mx.array:
    """Of all queries, or causally of those from number `first` on."""
    scores = (q.astype(mx.float32) * q.shape[-1] ** -0.5) @ k.astype(mx.float32).swapaxes(-1, -2)
    if first is not None:
        later = mx.triu(mx.ones(scores.shape[-2:]), first + 1).astype(mx.bool_)
        scores = mx.where(later, -mx.inf, scores)
    return mx.softmax(scores, axis=-1).astype(v.dtype) @ v


class Attention(nn.Module):
    """Multi-head attention of `channels` wide tokens; `context_dim` is the width of what they attend to, if it differs."""

    def __init__(self, channels: int, heads: int, *, context_dim: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        context_dim = channels if context_dim is None else context_dim
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_dim, channels, bias=bias)
        self.to_v = nn.Linear(context_dim, channels, bias=bias)
        self.to_out = [nn.Linear(channels, channels)]

    def keys_values(self, context: mx.array) -> KeyValues:
        """Keys and values (b, n, m, d) of a context (b, m, context_dim)."""
        return KeyValues(self._split_heads(self.to_k(context)), self._split_heads(self.to_v(context)))

    def __call__(self, x: mx.array, key_values: KeyValues, *, options: AttentionOptions) -> mx.array:
        """Tokens (b, l, c) that attend to `key_values`, as (b, l, c)."""
        out = attention(self._split_heads(self.to_q(x)), *key_values, options=options)
        return self.to_out[0](out.swapaxes(1, 2).flatten(2))

    def _split_heads(self, x: mx.array) -> mx.array:
        return mx.unflatten(x, -1, (self.heads, -1)).swapaxes(1, 2)


class SpatialAttention(Attention):
    """Self-attention with one head over the pixels of each picture: the middle of the VAE."""

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__(channels, 1, bias=True)
        self.group_norm = GroupNorm(groups, channels, eps=eps)

    def __call__(self, x: mx.array, *, options: AttentionOptions) -> mx.array:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(n, h, w, c) to (n, h, w, c)."""
        tokens = self.group_norm(x).flatten(1, 2)
        tokens = super().__call__(tokens, self.keys_values(tokens), options=options)
        return x + tokens.reshape(x.shape)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention if `context_dim` is given, feed-forward, each with a norm before and a residual."""

    def __init__(self, channels: int, heads: int, *, context_dim: int | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        if context_dim is not None:
            self.norm2 = nn.LayerNorm(channels)
            self.attn2 = Attention(channels, heads, context_dim=context_dim)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def __call__(self, x: mx.array, context: mx.array | None, *, options: AttentionOptions) -> mx.array:
        """Tokens (b, l, c) and a context (b, m, context_dim), None without cross-attention, to (b, l, c)."""
        h = self.norm1(x)
        x = x + self.attn1(h, self.attn1.keys_values(h), options=options)
        if context is not None:
            x = x + self.attn2(self.norm2(x), self.attn2.keys_values(context), options=options)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of all views of an object together.

    `linear` makes the projections around the blocks linear layers instead of convolutions of size 1: the same function, other
    tensor shapes.
    """

    def __init__(self, channels: int, heads: int, *, depth: int, context_dim: int | None, groups: int, linear: bool) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = [TransformerBlock(channels, heads, context_dim=context_dim) for _ in range(depth)]
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def __call__(self, x: mx.array, context: mx.array | None, *, views: int, options: AttentionOptions) -> mx.array:
        """Views (b v, h, w, c) and a context (b, m, context_dim) to (b v, h, w, c)."""
        n, h, w, c = x.shape
        tokens = self.proj_in(self.norm(x)).reshape(n // views, views * h * w, c)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, options=options)
        return x + self.proj_out(tokens.reshape(x.shape))
