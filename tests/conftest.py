"""Makes the tests fast on two CPU cores, and skips what needs hardware that is not there."""

import ctypes
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")


def preload_torch_blas() -> None:
    """Give MLX the BLAS inside of PyTorch on Linux; to be called before anything imports mlx.core.

    The MLX wheel for Linux CPUs brings the reference BLAS, some thirty times slower. With PyTorch's library loaded for all to
    see, MLX's `cblas_sgemm` binds to the one in there. PyTorch comes first, so that it keeps its own bindings.
    """
    spec = importlib.util.find_spec("torch")
    if not sys.platform.startswith("linux") or spec is None or spec.origin is None:
        return
    import torch

    torch.set_num_threads(1)
    library = Path(spec.origin).parent / "lib" / "libtorch_cpu.so"
    if library.exists():
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


preload_torch_blas()


settings.register_profile("mvmlx", deadline=None)  # a busy machine fails no test
settings.load_profile("mvmlx")


@cache
def cuda_is_there() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


if not cuda_is_there():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels on the CPU; Triton reads it once, whoever imports it first


@pytest.fixture(autouse=True, scope="session")
def the_same_default_dtype_on_every_processor() -> Iterator[None]:
    """Float32, so that tests compare the same numbers wherever they run; commands in other processes choose for themselves."""
    import mvshared.precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mvshared.precision, "bfloat16_instructions", lambda: None)
        yield


@pytest.fixture
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Of `helpers.multiplied`: a dtype, whose products of packed layers are in it or, where it is "widened", in float32."""
    from mvtorch import widened

    found, *widens = request.param
    monkeypatch.setattr(widened, "is_for", lambda dtype: bool(widens) and dtype == found)
    return found


@cache
def metal_is_there() -> bool:
    if sys.platform != "darwin" or importlib.util.find_spec("mlx") is None:
        return False
    import mlx.core as mx

    return mx.metal.is_available()


def reason_to_skip(item: pytest.Item) -> str | None:
    """What this machine lacks for the test: `gpu` takes "cuda" or "metal" if the test needs that very one."""
    if item.get_closest_marker("mac") and (sys.platform, platform.machine()) != ("darwin", "arm64"):
        return f"needs macOS on Apple silicon; this is {sys.platform} on {platform.machine()}"
    marker = item.get_closest_marker("gpu")
    if marker is None:
        return None
    kinds = marker.args or ("cuda", "metal")
    there = {"cuda": cuda_is_there, "metal": metal_is_there}
    return None if any(there[kind]() for kind in kinds) else f"needs a GPU ({' or '.join(kinds)}); there is none"


def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = reason_to_skip(item)
    if reason is not None:
        pytest.skip(reason)
