"""Attention over tokens: self-attention of all views together, cross-attention to a context, and the blocks around them.

Joint self-attention over views follows MVDream (arXiv 2308.16512); the transformer block follows diffusers' attention.py.
Tokens are (b, l, c) where l runs over views, rows and columns of one object. Each token of every view attends to the whole
context, so cross-attention and feed-forward need no knowledge of the views.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvshared.attention import AttentionOptions, score_slices
from mvtorch.layers import GroupNorm


class KeyValues(NamedTuple):
    """What queries attend to: keys and values (b, n, l, d). Constant over the sampling steps for a fixed context."""

    keys: Tensor
    values: Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, *, options: AttentionOptions) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of queries (b, n, l, d) to keys and values (b, n, m, d), as (b, n, l, d).

    The softmax is in float32 whatever the dtype.
    """
    if options.implementation == "fused":
        return F.scaled_dot_product_attention(q, k, v)
    if options.implementation == "plain":
        return _plain_attention(q, k, v)
    batch, heads, queries, width = q.shape
    q, k, v = (x.reshape(batch * heads, -1, width) for x in (q, k, v))
    plan = score_slices(heads=batch * heads, queries=queries, keys=k.shape[1], budget_bytes=options.budget_bytes)
    out: list[list[Tensor]] = []
    for head, query in plan:
        if query.start == 0:
            out.append([])
        out[-1].append(_plain_attention(q[head, query], k[head], v[head]))
    return torch.cat([torch.cat(row, dim=1) for row in out]).reshape(batch, heads, queries, width)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
    return scores.softmax(dim=-1).to(v.dtype) @ v


class Attention(nn.Module):
    """Multi-head attention of `channels` wide tokens; `context_dim` is the width of what they attend to, if it differs."""

    def __init__(self, channels: int, heads: int, *, context_dim: int | None = None, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        context_dim = channels if context_dim is None else context_dim
        self.to_q = nn.Linear(channels, channels, bias=bias)
        self.to_k = nn.Linear(context_dim, channels, bias=bias)
        self.to_v = nn.Linear(context_dim, channels, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def keys_values(self, context: Tensor) -> KeyValues:
        """Keys and values (b, n, m, d) of a context (b, m, context_dim)."""
        return KeyValues(self._split_heads(self.to_k(context)), self._split_heads(self.to_v(context)))

    def forward(self, x: Tensor, key_values: KeyValues, *, options: AttentionOptions) -> Tensor:
        """Tokens (b, l, c) that attend to `key_values`, as (b, l, c)."""
        out = attention(self._split_heads(self.to_q(x)), *key_values, options=options)
        return self.to_out[0](out.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class SpatialAttention(Attention):
    """Self-attention with one head over the pixels of each picture: the middle of the VAE."""

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__(channels, 1, bias=True)
        self.group_norm = GroupNorm(groups, channels, eps=eps)

    def forward(self, x: Tensor, *, options: AttentionOptions) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(n, c, h, w) to (n, c, h, w)."""
        tokens = self.group_norm(x).permute(0, 2, 3, 1).flatten(1, 2)
        tokens = super().forward(tokens, self.keys_values(tokens), options=options)
        return x + tokens.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
