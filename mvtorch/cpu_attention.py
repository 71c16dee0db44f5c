"""Attention in bfloat16 for CPUs that have instructions for it but no AMX, where PyTorch's kernel is slow.

That kernel has MKL multiply matrices, which on such processors takes more than twice as long as oneDNN. oneDNN's products of
bfloat16 are rounded to bfloat16, which would cost large scores their digits; so an estimate of the largest score of a query is
taken away inside of the product, and where that proves far too low, the query's product is made again. The softmax does not
depend on it, and what is left is small wherever it weighs. docs/speed.md has the errors and the times.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

from mvtorch.onednn import computes_bfloat16_in_avx512, has_packed_linear, linear, packed_matrix

_LEAST_KEYS = 256
_STRIDE = 8  # of the keys that the estimate is taken from
_LARGEST_SCORE = 4.0  # beside the estimate: rounded to bfloat16, a weight then errs by 0.8 % at most
_SCORES_BYTES = 1 << 21  # of the scores that are computed together, per thread: what stays in the cache


def is_for(q: Tensor, k: Tensor) -> bool:
    """Whether `shifted_attention` is faster than PyTorch's kernel for queries (b, n, l, d) and keys (b, n, m, d)."""
    wanted = q.dtype == torch.bfloat16 and q.device.type == "cpu" and k.shape[2] >= _LEAST_KEYS
    return wanted and not torch.is_grad_enabled() and computes_bfloat16_in_avx512()


def shifted_attention(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + key_bias) v of (b, n, l, d), (b, n, m, d) and (m,), as (b, n, l, d).

    Scores less their estimated maximum, and weights, are rounded to bfloat16; the softmax itself is in float32.
    """
    b, n, queries, width = q.shape
    # Only a power of two leaves the digits of bfloat16 what they are; the rest of the factor comes after the estimate is away.
    scale = width**-0.5
    exact = 2.0 ** round(math.log2(scale))
    rest = scale / exact
    keys = k.shape[2]
    numbers = torch.get_num_threads() * _SCORES_BYTES // q.element_size()  # of scores
    heads = min(n, max(1, numbers // (queries * keys)))
    rows = queries if heads > 1 else min(queries, max(64, numbers // keys))
    out = q.new_empty(b, queries, n, width)
    bias = None if key_bias is None else key_bias.float() / rest
    more = 2 if bias is None else 3
    for number, first in product(range(b), range(0, n, heads)):
        some = slice(first, first + heads)
        count = len(k[number, some])
        # Behind the queries their estimate and ones, behind the keys minus one and the bias, which is two numbers of bfloat16.
        wide_q, wide_k = (x.new_full((count, x.shape[2], width + more), value) for x, value in ((q, 1), (k, 0)))
        torch.mul(q[number, some], exact, out=wide_q[:, :, :width])
        wide_k[:, :, :width] = k[number, some]
        wide_k[:, :, width] = -1
        if bias is not None:
            wide_k[:, :, width + 1] = bias
            wide_k[:, :, width + 2] = bias - wide_k[:, :, width + 1]
        wide_q[:, :, width] = 0
        values, transposed = v[number, some].contiguous(), wide_k.transpose(1, 2)
        of_keys, of_some_keys = _products(wide_k, repeated=rows < queries)
        for start in range(0, queries, rows):
            piece = wide_q[:, start : start + rows]
            piece[:, :, width] = of_some_keys(piece).amax(dim=-1)
            weights = of_keys(piece)
            # Positive numbers have the order of their bits, whose maximum takes an eighth of the time.
            largest = weights.view(torch.int16).amax(dim=-1).view(torch.bfloat16)
            above = largest > _LARGEST_SCORE / rest
            for head in above.any(dim=1).nonzero()[:, 0].tolist():
                low = above[head].nonzero()[:, 0]
                again = piece[head, low]
                again[:, width] += largest[head, low]
                weights[head, low] = again @ transposed[head]
            if rest != 1:
                weights *= rest
            torch.softmax(weights, dim=-1, out=weights)
            out[number, start : start + rows, some] = (weights @ values).transpose(0, 1)
    return out.transpose(1, 2)


def _products(keys: Tensor, *, repeated: bool) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The products of queries (h, r, d) with keys (h, m, d), and with one in `_STRIDE` of them.

    If they are `repeated`, for one head, its keys are laid out for oneDNN once: in every product anew, that is work which grows
    with the square of the keys and has come to be most of it for 16 views.
    """
    some = keys[:, ::_STRIDE]
    if not repeated or not has_packed_linear():
        return partial(torch.matmul, other=keys.transpose(1, 2)), partial(torch.matmul, other=some.transpose(1, 2))
    packed, packed_some = packed_matrix(keys[0]), packed_matrix(some[0])
    return lambda x: linear(x[0], packed, None)[None], lambda x: linear(x[0], packed_some, None)[None]
