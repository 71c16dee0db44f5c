"""Heads of every width on Metal: filled up with zeros for MLX's kernel, with the same result."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mvmlx.attention import attention
from mvshared.attention import FUSED, AttentionOptions, fused_width

PLAIN = AttentionOptions(implementation="plain")


@pytest.mark.parametrize(
    ("width", "expected"), [(8, 64), (40, 64), (64, 64), (65, 72), (80, 80), (100, 128), (128, 128), (160, None), (512, None)]
)
def test_the_width_that_heads_are_filled_up_to(width: int, expected: int | None) -> None:
    assert fused_width(width) == expected


def heads(width: int, *, dtype: mx.Dtype = mx.float32) -> tuple[mx.array, ...]:
    rng = np.random.default_rng(width)
    return tuple(mx.array(rng.standard_normal((2, 3, tokens, width), np.float32)).astype(dtype) for tokens in (12, 20, 20))


@pytest.mark.parametrize(("width", "filled"), [(40, 64), (80, 80), (100, 128), (160, 160)])
@pytest.mark.parametrize("bias", [False, True])
def test_zeros_change_nothing(monkeypatch: pytest.MonkeyPatch, width: int, filled: int, bias: bool) -> None:
    seen: list[int] = []
    kernel = mx.fast.scaled_dot_product_attention

    def watched(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
        seen.extend(x.shape[-1] for x in (q, k, v))
        return kernel(q, k, v, **options)

    monkeypatch.setattr("mvmlx.attention.on_metal", lambda: True)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watched)
    q, k, v = heads(width)
    key_bias = mx.linspace(-1, 1, 20) if bias else None
    out = attention(q, k, v, options=FUSED, key_bias=key_bias)
    assert seen == [filled] * 3
    assert out.shape == q.shape
    expected = attention(q, k, v, options=PLAIN, key_bias=key_bias)
    np.testing.assert_allclose(np.array(out), np.array(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu("metal")
@pytest.mark.parametrize("width", [40, 64, 80, 96, 128])
def test_the_kernel_takes_all_that_are_narrow_enough(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    def sliced(*_: Any, **__: Any) -> Any:
        raise AssertionError("there was no kernel")

    q, k, v = heads(width, dtype=mx.float16)
    expected = np.array(attention(*(x.astype(mx.float32) for x in (q, k, v)), options=PLAIN))
    monkeypatch.setattr("mvmlx.attention.score_slices", sliced)
    out = attention(q, k, v, options=FUSED)  # in half precision with force_fused
    np.testing.assert_allclose(np.array(out.astype(mx.float32)), expected, rtol=1e-2, atol=1e-2)
