"""Attention over tokens: self-attention of all views together, cross-attention to a context, and the blocks around them.

Joint self-attention over views follows MVDream (arXiv 2308.16512); the transformer block follows diffusers' attention.py.
Tokens are (b, l, c) where l runs over views, rows and columns of one object. Each token of every view attends to the whole
context, so cross-attention and feed-forward need no knowledge of the views.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvshared.attention import AttentionOptions, check_pooling, score_slices
from mvtorch import cpu_attention, cuda_fused, widened
from mvtorch.joined import JoinedLinears
from mvtorch.layers import FeedForward, GroupNorm, repeat_objects
from mvtorch.observation import is_observed


class KeyValues(NamedTuple):
    """What queries attend to: keys and values (b, n, l, d). Constant over the sampling steps for a fixed context."""

    keys: Tensor
    values: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    options: AttentionOptions,
    causal: bool = False,
    key_bias: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of queries (b, n, l, d) to keys and values (b, n, m, d), as (b, n, l, d).

    `causal` lets a token attend to itself and to those before it; there l = m. `key_bias` (m,) is added to the scores of each
    key, and not for causal attention. The softmax is in float32 whatever the dtype.
    """
    if options.implementation == "fused":
        if not causal and cpu_attention.is_for(q, k):
            return cpu_attention.shifted_attention(q, k, v, key_bias=key_bias)
        mask = None if key_bias is None else key_bias.to(q.dtype)[None, None, None]
        if widened.is_for_array(q):
            return widened.attention(q, k, v, causal=causal, mask=mask)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, attn_mask=mask)
    if options.implementation == "plain":
        return _plain_attention(q, k, v, first=0 if causal else None, key_bias=key_bias)
    batch, heads, queries, width = q.shape
    q, k, v = (x.reshape(batch * heads, -1, width) for x in (q, k, v))
    plan = score_slices(heads=batch * heads, queries=queries, keys=k.shape[1], budget_bytes=options.budget_bytes)
    out: list[list[Tensor]] = []
    for head, query in plan:
        if query.start == 0:
            out.append([])
        first = query.start if causal else None
        out[-1].append(_plain_attention(q[head, query], k[head], v[head], first=first, key_bias=key_bias))
    return torch.cat([torch.cat(row, dim=1) for row in out]).reshape(batch, heads, queries, width)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, *, first: int | None, key_bias: Tensor | None) -> Tensor:
    """Of all queries, or causally of those from number `first` on."""
    scores = (q.float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
    if key_bias is not None:
        scores = scores + key_bias
    if first is not None:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(first + 1)
        scores = scores.masked_fill(later, -torch.inf)
    if widened.is_for_array(v):
        return (scores.softmax(dim=-1) @ v.float()).to(v.dtype)
    return scores.softmax(dim=-1).to(v.dtype) @ v


def average_squares(x: Tensor, height: int, width: int) -> Tensor:
    """Means (b, v h/2 w/2, c) of 2x2 neighbours among the tokens (b, v h w, c) of views of that height and width."""
    squares = x.unflatten(1, (-1, height // 2, 2, width // 2, 2))
    return squares.mean(dim=(3, 5)).flatten(1, 3)


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
        self.joint: JoinedLinears | None = None  # to_q, to_k and to_v

    def keys_values(self, context: Tensor) -> KeyValues:
        """Keys and values (b, n, m, d) of a context (b, m, context_dim)."""
        return KeyValues(self._split_heads(self.to_k(context)), self._split_heads(self.to_v(context)))

    def forward(self, x: Tensor, key_values: KeyValues, *, options: AttentionOptions, key_bias: Tensor | None = None) -> Tensor:
        """Tokens (b, l, c) that attend to `key_values`, whose scores get `key_bias` (m,), as (b, l, c)."""
        q = self._split_heads(self.to_q(x))
        return self._merge_heads(attention(q, *key_values, options=options, key_bias=key_bias))

    def _to_itself(self, x: Tensor, *, options: AttentionOptions, key_bias: Tensor | None) -> Tensor:
        """Tokens (b, l, c) that attend to each other: one product for queries, keys and values if these layers are joined."""
        projected = None if self.joint is None or is_observed(self) else self.joint(x)
        if projected is None:
            return self(x, self.keys_values(x), options=options, key_bias=key_bias)
        q, k, v = map(self._split_heads, projected)
        return self._merge_heads(attention(q, k, v, options=options, key_bias=key_bias))

    def _merge_heads(self, x: Tensor) -> Tensor:
        return self.to_out[0](x.transpose(1, 2).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class CrossKeyValues(NamedTuple):
    """Keys and values of a context and of image tokens, which have their own projections; None without image tokens."""

    context: KeyValues
    image: KeyValues | None


class CrossAttention(Attention):
    """Attention to a context, plus that of the same queries to image tokens if there are any (IP-Adapter, arXiv 2308.06721)."""

    def __init__(self, channels: int, heads: int, *, context_dim: int, image_tokens: bool) -> None:
        super().__init__(channels, heads, context_dim=context_dim)
        if image_tokens:
            self.to_k_ip = nn.Linear(context_dim, channels, bias=False)
            self.to_v_ip = nn.Linear(context_dim, channels, bias=False)

    def cross_keys_values(self, context: Tensor, image_tokens: Tensor | None, *, image_scale: float) -> CrossKeyValues:
        """Of a context (b, l, context_dim) and image tokens (b, m, context_dim), whose share is weighted by `image_scale`."""
        text = self.keys_values(context)
        if image_tokens is None:
            return CrossKeyValues(text, None)
        keys, values = self.to_k_ip(image_tokens), self.to_v_ip(image_tokens) * image_scale
        return CrossKeyValues(text, KeyValues(self._split_heads(keys), self._split_heads(values)))

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, cross: CrossKeyValues, *, options: AttentionOptions
    ) -> Tensor:
        """Tokens (b, l, c) that attend to `cross`, as (b, l, c). Those of one object may attend to what is of b objects."""
        q = self._split_heads(repeat_objects(self.to_q(x), len(cross.context.keys)))
        out = attention(q, *cross.context, options=options)
        if cross.image is not None:
            out = out + attention(q, *cross.image, options=options)
        return self._merge_heads(out)


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


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention if `context_dim` is given, feed-forward, each with a norm before and a residual."""

    def __init__(self, channels: int, heads: int, *, context_dim: int | None, image_tokens: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads)
        if context_dim is not None:
            self.norm2 = nn.LayerNorm(channels)
            self.attn2 = CrossAttention(channels, heads, context_dim=context_dim, image_tokens=image_tokens)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(
        self,
        x: Tensor,
        cross: CrossKeyValues | None,
        *,
        options: AttentionOptions,
        key_bias: Tensor | None = None,
        pooled: tuple[int, int] | None = None,
    ) -> Tensor:
        """Tokens (b, l, c), and what they attend to beside themselves, None without cross-attention, to (b, l, c).
        Tokens (1, l, c) are those of all objects up to the cross-attention.

        With `pooled`, the height and width of every view, they attend to the averages of 2x2 tokens of a view. `key_bias` is
        added to the scores of the tokens, or of their averages, in the self-attention.
        """
        x, h = _normed(self.norm1, x)
        if pooled is None:
            out = self.attn1._to_itself(h, options=options, key_bias=key_bias)
        else:
            out = self.attn1(h, self.attn1.keys_values(average_squares(h, *pooled)), options=options, key_bias=key_bias)
        if cross is not None:
            x, h = _normed(self.norm2, x, out)
            out = self.attn2(h, cross, options=options)
        x, h = _normed(self.norm3, x, out)
        return x + self.ff(h)


def _normed(norm: nn.LayerNorm, x: Tensor, rest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Tokens x (b, l, c), or x + rest, where one of them may be of one object for all, and the norm of that."""
    out = None if is_observed(norm) else cuda_fused.layer_norm(x, rest, norm.weight, norm.bias, eps=norm.eps)
    if out is not None:
        return out
    x = x if rest is None else x + rest
    return x, norm(x)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of all views of an object together.

    `linear` makes the projections around the blocks linear layers instead of convolutions of size 1: the same function, other
    tensor shapes. `finest` says that there is no finer level with attention, so that `kv_pooling` applies.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        depth: int,
        context_dim: int | None,
        image_tokens: bool,
        groups: int,
        linear: bool,
        finest: bool = False,
    ) -> None:
        super().__init__()
        self.finest = finest
        self.linear = linear
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads, context_dim=context_dim, image_tokens=image_tokens) for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(
        self,
        x: Tensor,
        cross: Sequence[CrossKeyValues] | None,
        frame_bias: Tensor | None = None,
        *,
        views: int,
        options: AttentionOptions,
    ) -> Tensor:
        """Views (b v, c, h, w) and what each block attends to beside the views, to (b v, c, h, w). Views (v, c, h, w) are
        those of all objects.

        `frame_bias` (v,) is added to the scores of each view's keys in the self-attention.
        """
        n, c, h, w = x.shape
        pooling = options.kv_pooling if self.finest else 1
        check_pooling(pooling, h, w)
        keys = h * w // pooling**2  # of every view
        key_bias = None if frame_bias is None else frame_bias.repeat_interleave(keys)
        y = self.norm(x)
        if not self.linear:
            y = self.proj_in(y)
        tokens = y.permute(0, 2, 3, 1).reshape(n // views, views * h * w, c)
        if self.linear:
            tokens = self.proj_in(tokens)
        for block, kv in zip(self.transformer_blocks, cross or [None] * len(self.transformer_blocks), strict=True):
            tokens = block(tokens, kv, options=options, key_bias=key_bias, pooled=None if pooling == 1 else (h, w))
        if self.linear:
            tokens = self.proj_out(tokens)
        y = tokens.reshape(-1, h, w, c).permute(0, 3, 1, 2)
        return repeat_objects(x, len(y)) + (y if self.linear else self.proj_out(y))
