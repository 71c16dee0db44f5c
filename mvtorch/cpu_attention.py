"""Attention in bfloat16 for CPUs that have instructions for it but no AMX, where PyTorch's kernel is slow.

That kernel has MKL multiply matrices, which on such processors takes more than twice as long as oneDNN. oneDNN's products of
bfloat16 are rounded to bfloat16, which would cost large scores their digits; so an estimate of the largest score of a query is
taken away inside of the product, and where that proves far too low, the query's product is made again. The softmax does not
depend on it, and what is left is small wherever it weighs. docs/speed.md has the errors and the times.
"""

from functools import cache

import torch
from torch import Tensor

from mvshared import precision

_LEAST_KEYS = 256
_STRIDE = 8  # of the keys that the estimate is taken from
_LARGEST_SCORE = 4.0  # beside the estimate: rounded to bfloat16, a weight then errs by 0.8 % at most
_SCORES_BYTES = 1 << 21  # of the scores that are computed together, per thread: what stays in the cache


def is_for(q: Tensor, k: Tensor) -> bool:
    """Whether `shifted_attention` is faster than PyTorch's kernel for queries (b, n, l, d) and keys (b, n, m, d)."""
    wanted = q.dtype == torch.bfloat16 and q.device.type == "cpu" and k.shape[2] >= _LEAST_KEYS
    return wanted and not torch.is_grad_enabled() and _has_slow_kernel()


def shifted_attention(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + key_bias) v of (b, n, l, d), (b, n, m, d) and (m,), as (b, n, l, d).

    Scores less their estimated maximum, and weights, are rounded to bfloat16; the softmax itself is in float32.
    """
    b, n, queries, width = q.shape
    keys = k.shape[2]
    rows = min(queries, max(64, torch.get_num_threads() * _SCORES_BYTES // (q.element_size() * keys)))
    out = q.new_empty(b, queries, n, width)
    scores = q.new_empty(rows, keys)
    # Behind the queries their estimate and a one, behind the keys minus one and the bias.
    wide_q, wide_k = q.new_ones(queries, width + 2), k.new_zeros(keys, width + 2)
    wide_k[:, width] = -1
    if key_bias is not None:
        wide_k[:, width + 1] = key_bias
    for number in range(b * n):
        head = divmod(number, n)
        torch.mul(q[head], width**-0.5, out=wide_q[:, :width])
        wide_k[:, :width] = k[head]
        wide_q[:, width] = 0
        values, some, transposed = v[head].contiguous(), wide_k[::_STRIDE].t(), wide_k.t()
        for start in range(0, queries, rows):
            piece = wide_q[start : start + rows]
            piece[:, width] = (piece @ some).amax(dim=-1)
            weights = torch.mm(piece, transposed, out=scores[: len(piece)])
            # Positive numbers have the order of their bits, whose maximum takes an eighth of the time.
            largest = weights.view(torch.int16).amax(dim=-1).view(torch.bfloat16)
            low = (largest > _LARGEST_SCORE).nonzero()[:, 0]
            if len(low):
                again = piece[low]
                again[:, width] += largest[low]
                weights[low] = again @ transposed
            torch.softmax(weights, dim=-1, out=weights)
            out[head[0], start : start + rows, head[1]] = weights @ values
    return out.transpose(1, 2)


@cache
def _has_slow_kernel() -> bool:
    instructions = precision.bfloat16_instructions() if torch.backends.mkldnn.is_available() else None
    return instructions == precision.INSTRUCTIONS["avx512_bf16"]
