"""Group normalisation, with SiLU or without, as one Metal kernel: for networks that only infer, on a Mac's GPU.

MLX has no such kernel, and written in its operations the norm reads and writes the feature map several times. One threadgroup
has the numbers of one group of one picture: it goes over them three times, for their mean, for their deviation from that, and
for the result. Sums are of differences from the group's first number, so that a large mean costs no digits and a constant group
comes out as zero. `MVMLX_METAL_KERNELS=0` in the environment turns it off.
"""

import os
from functools import cache
from typing import Any

import mlx.core as mx

from mvmlx.metal import on_metal
from mvshared.errors import warn

THREADS, MANY_THREADS = 256, 512  # of a threadgroup, for groups of up to MANY numbers and of more
MANY = 16384
TRIED = (5, 7), (91, 91)  # sizes of maps that take THREADS and MANY_THREADS, with two channels in a group

# x (n, pixels, channels), weight and bias (channels,), eps (1,); WIDTH channels make a group, and a template's constant divides
# faster than a variable. A simdgroup has 32 threads, so a threadgroup of at most 1024 has at most 32 of them.
SOURCE = """
    constexpr uint SUMMED = 64;  // numbers that a thread adds up one after the other, for float32 loses digits in long sums

    threadgroup float parts[32];

    const uint lane = thread_index_in_threadgroup;
    const uint lanes = threads_per_threadgroup.x;
    const uint channels = x_shape[2];
    const uint groups = channels / WIDTH;
    const uint picture = threadgroup_position_in_grid.x / groups;
    const uint channel = (threadgroup_position_in_grid.x % groups) * WIDTH;
    const uint count = uint(x_shape[1]) * WIDTH;
    const size_t start = size_t(picture) * size_t(x_shape[1]) * channels + channel;
    const float first = float(x[start]);

    float total = 0;
    for (uint i = lane; i < count;) {
        float part = 0;
        for (uint end = i + SUMMED * lanes; i < end && i < count; i += lanes) {
            part += float(x[start + size_t(i / WIDTH) * channels + i % WIDTH]) - first;
        }
        total += part;
    }
    total = simd_sum(total);
    if (thread_index_in_simdgroup == 0) {
        parts[simdgroup_index_in_threadgroup] = total;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float mean = 0;
    for (uint i = 0; i < simdgroups_per_threadgroup; i++) {
        mean += parts[i];
    }
    mean /= float(count);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    total = 0;
    for (uint i = lane; i < count;) {
        float part = 0;
        for (uint end = i + SUMMED * lanes; i < end && i < count; i += lanes) {
            const float centred = float(x[start + size_t(i / WIDTH) * channels + i % WIDTH]) - first - mean;
            part += centred * centred;
        }
        total += part;
    }
    total = simd_sum(total);
    if (thread_index_in_simdgroup == 0) {
        parts[simdgroup_index_in_threadgroup] = total;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float variance = 0;
    for (uint i = 0; i < simdgroups_per_threadgroup; i++) {
        variance += parts[i];
    }
    const float scale = metal::precise::rsqrt(variance / float(count) + eps[0]);

    for (uint i = lane; i < count; i += lanes) {
        const size_t place = start + size_t(i / WIDTH) * channels + i % WIDTH;
        const uint c = channel + i % WIDTH;
        float y = (float(x[place]) - first - mean) * (scale * float(weight[c])) + float(bias[c]);
        if (SILU) {
            y = y / (1.0f + metal::precise::exp(-y));
        }
        out[place] = T(y);
    }
"""


def usable(x: mx.array) -> bool:
    """Whether the kernel can be used for an array: on Metal, in float32 or float16, if it works there."""
    return on_metal() and x.dtype in (mx.float32, mx.float16) and x.size > 0 and _works()


def fused_group_norm(x: mx.array, weight: mx.array, bias: mx.array, *, groups: int, eps: float, silu: bool) -> mx.array:
    """Normalise x (n, h, w, c) with weight and bias (c,), then SiLU if asked for; only where `usable` says so.

    Not differentiable.
    """
    n, channels = x.shape[0], x.shape[-1]
    width = channels // groups
    count = x.size // n // groups
    threads = THREADS if count <= MANY else MANY_THREADS
    (out,) = _kernel()(
        inputs=[x.reshape(n, -1, channels), weight, bias, mx.array([eps], dtype=mx.float32)],
        template=[("T", x.dtype), ("WIDTH", width), ("SILU", silu)],
        grid=(n * groups * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[x.dtype],
    )
    return out


@cache
def _kernel() -> Any:
    return mx.fast.metal_kernel(
        name="mvmlx_group_norm", input_names=["x", "weight", "bias", "eps"], output_names=["out"], source=SOURCE
    )


@cache
def _works() -> bool:
    """Whether Metal builds the kernel, and the kernel gives what it should; tried once."""
    if os.environ.get("MVMLX_METAL_KERNELS") == "0":
        return False
    try:
        for height, width in TRIED:
            ramp = mx.linspace(0, 1, 2 * height * width * 12).reshape(2, height, width, 12)
            grouped = ramp.reshape(2, -1, 6, 2)
            centred = grouped - grouped.mean(axis=(1, 3), keepdims=True)
            expected = (centred * mx.rsqrt(centred.square().mean(axis=(1, 3), keepdims=True))).reshape(ramp.shape)
            for dtype in (mx.float32, mx.float16):
                weight, bias = mx.ones((12,), dtype), mx.zeros((12,), dtype)
                out = fused_group_norm(ramp.astype(dtype), weight, bias, groups=6, eps=0.0, silu=False)
                if not mx.allclose(out.astype(mx.float32), expected, atol=0.01):
                    raise RuntimeError(f"its result in {dtype} is wrong")
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        warn(f"group norms are computed without a Metal kernel: {reason}")
        return False
    return True
