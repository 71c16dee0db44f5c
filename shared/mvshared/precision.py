"""Which dtype a device computes in if nothing is said, and why. The backends say what the device is; the words are here."""

import platform
from pathlib import Path
from typing import NamedTuple

from mvshared.backend import Dtype

DTYPE_BYTES: dict[Dtype, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

# Tensors that stay float32 in half precision: the frequencies of the upscaler's time, and the last layer before pictures.
KEPT_FLOAT32 = ("time_proj.weight", "decoder.conv_out.weight", "decoder.conv_out.bias")

CPUINFO = Path("/proc/cpuinfo")
INSTRUCTIONS = {
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512",
    "bf16": "Arm's BF16",
}  # the kernel's names of what computes bfloat16
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
            "float32", "this processor has no instructions for bfloat16 that are known, and float16 is slow on CPUs"
        )
    return DtypeChoice(
        "bfloat16", f"this processor has instructions for it ({instructions}), and it halves the memory of float32"
    )


def elsewhere(device: str) -> DtypeChoice:
    """For a device that nothing is known of."""
    return DtypeChoice("float32", f"half precision was not tried on the device {device}")


def bfloat16_instructions() -> str | None:
    """The instructions by which this processor computes bfloat16; None for none, and where there is no /proc/cpuinfo.

    The kernel's list is the same for every PyTorch; `torch.cpu.get_capabilities` is newer than the oldest one allowed.
    """
    if platform.system() != "Linux" or not CPUINFO.exists():
        return None
    lines = (line.partition(":") for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines())
    flags = {flag for name, _, value in lines if name.strip() in ("flags", "Features") for flag in value.split()}
    return next((words for flag, words in INSTRUCTIONS.items() if flag in flags), None)
