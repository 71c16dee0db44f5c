"""Runs the source of the Metal kernel for group norms as C++, one thread for each of a threadgroup's.

And checks what MLX makes of it, with its signature and the types of a call, as far as C++ is like Metal's language.
"""

import ctypes
import re
import subprocess
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvmlx.group_norm import SOURCE

HEADER = """
#include <barrier>
#include <cmath>
#include <thread>
#include <vector>
using std::size_t;
typedef unsigned int uint;
struct uint3 { uint x, y, z; };
enum class mem_flags { mem_threadgroup };
namespace metal::precise {
float rsqrt(float x) { return 1 / std::sqrt(x); }
float exp(float x) { return std::exp(x); }
}
constexpr uint LANES = %(threads)d;
std::barrier<> everybody(LANES);
float values[LANES];
thread_local uint me;
void threadgroup_barrier(mem_flags) { everybody.arrive_and_wait(); }
float simd_sum(float value) {  // a butterfly over the 32 threads of a simdgroup
    values[me] = value;
    everybody.arrive_and_wait();
    float sums[32];
    for (uint i = 0; i < 32; i++) sums[i] = values[me / 32 * 32 + i];
    for (uint step = 16; step > 0; step /= 2) {
        float next[32];
        for (uint i = 0; i < 32; i++) next[i] = sums[i] + sums[i ^ step];
        for (uint i = 0; i < 32; i++) sums[i] = next[i];
    }
    everybody.arrive_and_wait();
    return sums[me %% 32];
}
#define threadgroup static
typedef float T;
constexpr uint WIDTH = %(width)d;
constexpr bool SILU = %(silu)d;
void kernel(const float* x, const int* x_shape, const float* weight, const float* bias, const float* eps, float* out,
            uint thread_index_in_threadgroup, uint3 threads_per_threadgroup, uint3 threadgroup_position_in_grid,
            uint thread_index_in_simdgroup, uint simdgroup_index_in_threadgroup, uint simdgroups_per_threadgroup) {
"""
FOOTER = """
}
extern "C" void run(const float* x, const int* shape, const float* weight, const float* bias, const float* eps, float* out) {
    std::vector<std::thread> threads;
    for (uint lane = 0; lane < LANES; lane++) threads.emplace_back([=] {
        me = lane;
        for (uint group = 0; group < shape[0] * shape[2] / WIDTH; group++) {
            kernel(x, shape, weight, bias, eps, out, lane, {LANES, 1, 1}, {group, 0, 0}, lane %% 32, lane / 32, LANES / 32);
            everybody.arrive_and_wait();
        }
    });
    for (auto& thread : threads) thread.join();
}
"""


def group_norm_on_cpu(
    x: NDArray[np.float32],
    weight: NDArray[np.float32],
    bias: NDArray[np.float32],
    *,
    width: int,
    eps: float,
    silu: bool,
    threads: int,
    folder: Path,
) -> NDArray[np.float32]:
    """What the kernel makes of x (n, pixels, c), in a folder for the compiler; needs g++."""
    source, library = folder / "kernel.cpp", folder / f"kernel-{width}-{silu:d}-{threads}.so"
    source.write_text(HEADER % {"threads": threads, "width": width, "silu": silu} + SOURCE + FOOTER.replace("%%", "%"))
    options = ["-std=c++20", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["g++", *options, str(source), "-o", str(library)], check=True)
    out = np.full_like(x, np.nan)
    arrays = (x, np.array(x.shape, np.int32), weight, bias, np.array([eps], np.float32), out)
    ctypes.CDLL(str(library)).run(*(array.ctypes.data_as(ctypes.c_void_p) for array in arrays))
    return out


# What MLX puts before a kernel, in its names; a half is no number that C++ computes with, so that all of it must be converted.
METAL = """
#include <cstddef>
using std::size_t;
typedef unsigned int uint;
struct uint3 { uint x, y, z; };
struct half { explicit half(float); explicit operator float() const; };
typedef half float16_t;
#define device
#define constant
#define threadgroup static
namespace metal {
enum class mem_flags { mem_none, mem_device, mem_threadgroup };
void threadgroup_barrier(mem_flags);
float simd_sum(float);
half simd_sum(half);
namespace precise { float rsqrt(float); half rsqrt(half); float exp(float); half exp(half); }
}
using namespace metal;
"""


def check_as_cpp(source: str, *, folder: Path) -> None:
    """Raise AssertionError unless a whole Metal source is one of C++, but for attributes; needs g++."""
    file = folder / "generated.cpp"
    file.write_text(METAL + re.sub(r"\[\[[^\[\]]*(\([^()]*\))?\]\]", "", source))
    command = ["g++", "-std=c++17", "-fsyntax-only", "-Wall", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
