"""Which dtype a device computes in if nothing is said, and why. The backends say what the device is; the words are here."""

import platform
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mvshared.backend import Dtype

DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

# Tensors that stay float32 in half precision: the frequencies of the upscaler's time, and the last layer before pictures.
KEPT_FLOAT32 = ("time_proj.weight", "decoder.conv_out.weight", "decoder.conv_out.bias")

CPUINFO = Path("/proc/cpuinfo")
AVX512 = "AVX-512"
# Intel's processors since AVX512-FP16 multiply bfloat16 in AVX-512 at half the speed of float32 (measured on a Xeon of Emerald
# Rapids): they have AMX for it, which virtual machines may hide.
SLOW_AVX512 = "AVX-512 of a processor whose AMX is hidden"
_INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": AVX512, "bf16": "Arm's BF16"}  # by the kernel's names
TENSOR_CORES = (7, 0)  # compute capability


class DtypeChoice(NamedTuple):
    """A dtype and the reason for it, one sentence without a full stop."""

    dtype: Dtype
    reason: str


METAL = DtypeChoice("float16", "it halves the memory of float32, and convolutions in bfloat16 are inaccurate on Metal")
MLX_CPU = DtypeChoice("float32", "half precision is no faster in the CPU build of MLX")


def tensor_dtype(name: str, dtype: Dtype) -> Dtype:
    """What the tensor of this name in its network is kept in where the network computes in `dtype`."""
    return "float32" if name in KEPT_FLOAT32 else dtype


def on_cuda(capability: tuple[int, int]) -> DtypeChoice:
    """For a GPU of this compute capability."""
    if capability < TENSOR_CORES:
        return DtypeChoice("float32", f"compute capability {capability[0]}.{capability[1]} has no tensor cores for float16")
    return DtypeChoice("float16", "it is as fast as bfloat16 and eight times as exact; softmax, norms and sums are float32")


def on_cpu(instructions: str | None) -> DtypeChoice:
    """For a processor that computes bfloat16 with these instructions, or with none of its own."""
    if instructions is None:
        return DtypeChoice(
            "float32", "this processor has no instructions for bfloat16 that are known, and half precision is slower"
        )
    if instructions == SLOW_AVX512:
        return DtypeChoice("float32", "this processor multiplies bfloat16 at half the speed of float32, without its AMX")
    return DtypeChoice(
        "bfloat16", f"this processor has instructions for it ({instructions}), and it halves the memory of float32"
    )


def elsewhere(device: str) -> DtypeChoice:
    """For a device that nothing is known of."""
    return DtypeChoice("float32", f"half precision was not tried on the device {device}")


@cache
def bfloat16_instructions() -> str | None:
    """The instructions by which this processor computes bfloat16; None for none, and where there is no /proc/cpuinfo.

    The kernel's list is the same for every PyTorch; `torch.cpu.get_capabilities` is newer than the oldest one allowed.
    """
    if platform.system() != "Linux" or not CPUINFO.exists():
        return None
    lines = (line.partition(":") for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines())
    known = {(name.strip(), word) for name, _, value in lines for word in value.split()}
    flags = {word for name, word in known if name in ("flags", "Features")}
    found = next((words for flag, words in _INSTRUCTIONS.items() if flag in flags), None)
    # avx512_fp16 came with AMX.
    hidden = found == AVX512 and ("vendor_id", "GenuineIntel") in known and "avx512_fp16" in flags
    return SLOW_AVX512 if hidden else found
