"""Attention over tokens: self-attention of all views together, cross-attention to a context, and the blocks around them.

Joint self-attention over views follows MVDream (arXiv 2308.16512); the transformer block follows diffusers' attention.py.
Tokens are (b, l, c) where l runs over views, rows and columns of one object. Each token of every view attends to the whole
context, so cross-attention and feed-forward need no knowledge of the views.
"""

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mvmlx.convolutions import PointConv2d
from mvmlx.layers import FeedForward, GroupNorm, repeat_objects
from mvmlx.metal import on_metal
from mvshared.attention import AttentionOptions, check_pooling, fused_width, score_slices


class KeyValues(NamedTuple):
    """What queries attend to: keys and values (b, n, l, d). Constant over the sampling steps for a fixed context."""

    keys: mx.array
    values: mx.array


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    options: AttentionOptions,
    causal: bool = False,
    key_bias: mx.array | None = None,
) -> mx.array:
    """softmax(q k^T / sqrt(d)) v of queries (b, n, l, d) to keys and values (b, n, m, d), as (b, n, l, d).

    `causal` lets a token attend to itself and to those before it; there l = m. `key_bias` (m,) is added to the scores of each
    key, and not for causal attention. The softmax is in float32 whatever the dtype. What no kernel takes in half precision is
    `sliced`: MLX would write it out with scores in that dtype, where those beyond 65504 are infinite.
    """
    if options.implementation == "fused":
        mask = "causal" if causal else None if key_bias is None else key_bias.astype(q.dtype)
        half = q.dtype != mx.float32
        try:
            return _fused_attention(q, k, v, mask=mask, force_fused=half)
        except ValueError:  # there is no kernel
            if not half:
                raise
    if options.implementation == "plain":
        return _plain_attention(q, k, v, first=0 if causal else None, key_bias=key_bias)
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
        first = query.start if causal else None
        out[-1].append(_plain_attention(piece, k[head], v[head], first=first, key_bias=key_bias))
    return mx.concatenate([mx.concatenate(row, axis=1) for row in out]).reshape(batch, heads, queries, width)


def _fused_attention(q: mx.array, k: mx.array, v: mx.array, *, mask: mx.array | str | None, force_fused: bool) -> mx.array:
    """The library's attention; on Metal with heads filled up with zeros to a width that its kernel takes."""
    width = q.shape[-1]
    wide = fused_width(width) if on_metal() else None
    if wide not in (None, width):
        q, k, v = (mx.pad(x, [(0, 0)] * 3 + [(0, wide - width)]) for x in (q, k, v))
    out = mx.fast.scaled_dot_product_attention(q, k, v, scale=width**-0.5, mask=mask, force_fused=force_fused)
    return out if out.shape[-1] == width else out[..., :width]


def _plain_attention(q: mx.array, k: mx.array, v: mx.array, *, first: int | None, key_bias: mx.array | None) -> mx.array:
    """Of all queries, or causally of those from number `first` on."""
    scores = (q.astype(mx.float32) * q.shape[-1] ** -0.5) @ k.astype(mx.float32).swapaxes(-1, -2)
    if key_bias is not None:
        scores = scores + key_bias
    if first is not None:
        later = mx.triu(mx.ones(scores.shape[-2:]), first + 1).astype(mx.bool_)
        scores = mx.where(later, -mx.inf, scores)
    return mx.softmax(scores, axis=-1).astype(v.dtype) @ v


def average_squares(x: mx.array, height: int, width: int) -> mx.array:
    """Means (b, v h/2 w/2, c) of 2x2 neighbours among the tokens (b, v h w, c) of views of that height and width."""
    squares = mx.unflatten(x, 1, (-1, height // 2, 2, width // 2, 2))
    return squares.mean(axis=(3, 5)).flatten(1, 3)


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

    def __call__(
        self, x: mx.array, key_values: KeyValues, *, options: AttentionOptions, key_bias: mx.array | None = None
    ) -> mx.array:
        """Tokens (b, l, c) that attend to `key_values`, whose scores get `key_bias` (m,), as (b, l, c)."""
        q = self._split_heads(self.to_q(x))
        return self._merge_heads(attention(q, *key_values, options=options, key_bias=key_bias))

    def _merge_heads(self, x: mx.array) -> mx.array:
        return self.to_out[0](x.swapaxes(1, 2).flatten(2))

    def _split_heads(self, x: mx.array) -> mx.array:
        return mx.unflatten(x, -1, (self.heads, -1)).swapaxes(1, 2)


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

    def cross_keys_values(self, context: mx.array, image_tokens: mx.array | None, *, image_scale: float) -> CrossKeyValues:
        """Of a context (b, l, context_dim) and image tokens (b, m, context_dim), whose share is weighted by `image_scale`."""
        text = self.keys_values(context)
        if image_tokens is None:
            return CrossKeyValues(text, None)
        keys, values = self.to_k_ip(image_tokens), self.to_v_ip(image_tokens) * image_scale
        return CrossKeyValues(text, KeyValues(self._split_heads(keys), self._split_heads(values)))

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: mx.array, cross: CrossKeyValues, *, options: AttentionOptions
    ) -> mx.array:
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

    def __call__(self, x: mx.array, *, options: AttentionOptions) -> mx.array:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(n, h, w, c) to (n, h, w, c)."""
        tokens = self.group_norm(x).flatten(1, 2)
        tokens = super().__call__(tokens, self.keys_values(tokens), options=options)
        return x + tokens.reshape(x.shape)


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

    def __call__(
        self,
        x: mx.array,
        cross: CrossKeyValues | None,
        *,
        options: AttentionOptions,
        key_bias: mx.array | None = None,
        pooled: tuple[int, int] | None = None,
    ) -> mx.array:
        """Tokens (b, l, c), and what they attend to beside themselves, None without cross-attention, to (b, l, c).
        Tokens (1, l, c) are those of all objects up to the cross-attention.

        With `pooled`, the height and width of every view, they attend to the averages of 2x2 tokens of a view. `key_bias` is
        added to the scores of the tokens, or of their averages, in the self-attention.
        """
        h = self.norm1(x)
        context = h if pooled is None else average_squares(h, *pooled)
        x = x + self.attn1(h, self.attn1.keys_values(context), options=options, key_bias=key_bias)
        if cross is not None:
            x = x + self.attn2(self.norm2(x), cross, options=options)
        return x + self.ff(self.norm3(x))


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
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else PointConv2d(channels, channels)
        self.transformer_blocks = [
            TransformerBlock(channels, heads, context_dim=context_dim, image_tokens=image_tokens) for _ in range(depth)
        ]
        self.proj_out = nn.Linear(channels, channels) if linear else PointConv2d(channels, channels)

    def __call__(
        self,
        x: mx.array,
        cross: Sequence[CrossKeyValues] | None,
        frame_bias: mx.array | None = None,
        *,
        views: int,
        options: AttentionOptions,
    ) -> mx.array:
        """Views (b v, h, w, c) and what each block attends to beside the views, to (b v, h, w, c). Views (v, h, w, c) are
        those of all objects.

        `frame_bias` (v,) is added to the scores of each view's keys in the self-attention.
        """
        n, h, w, c = x.shape
        pooling = options.kv_pooling if self.finest else 1
        check_pooling(pooling, h, w)
        keys = h * w // pooling**2  # of every view
        key_bias = None if frame_bias is None else mx.repeat(frame_bias, keys)
        tokens = self.proj_in(self.norm(x)).reshape(n // views, views * h * w, c)
        for block, kv in zip(self.transformer_blocks, cross or [None] * len(self.transformer_blocks), strict=True):
            tokens = block(tokens, kv, options=options, key_bias=key_bias, pooled=None if pooling == 1 else (h, w))
        y = self.proj_out(tokens.reshape(-1, h, w, c))
        return repeat_objects(x, len(y)) + y
