"""What `mvmlx benchmark` needs of MLX itself: the device's own speed, its name, and models without a checkpoint."""

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx

from mvmlx.device import gpu_info, on_device
from mvmlx.model import MultiViewModel, random_network
from mvmlx.upscaling import UpscalerModel
from mvshared.backend import Dtype
from mvshared.checkpoint import Component
from mvshared.config import ModelConfig
from mvshared.networks import Networks
from mvshared.upscaling.config import UpscalerConfig


def random_model(config: ModelConfig, parts: Sequence[Component], *, dtype: Dtype, device: str) -> MultiViewModel:
    """A model with these parts of random weights; each is made when it is needed."""
    networks = {part: partial(random_network, getattr(config, part), dtype=dtype, device=device) for part in parts}
    return MultiViewModel(config, Networks(networks), device=device, dtype=dtype, weight_files=())


def random_upscaler(config: UpscalerConfig, *, dtype: Dtype, device: str) -> UpscalerModel:
    """An upscaler whose network has random weights, without VAE and text encoder."""
    networks = Networks({"unet": partial(random_network, config.unet, dtype=dtype, device=device)})
    return UpscalerModel(config, networks, device=device, dtype=dtype, weight_files=())


def matrix_product(size: int, *, dtype: Dtype, device: str) -> Callable[[], None]:
    """The product of two square matrices, which waits for the device."""
    with on_device(device):
        a, b = (mx.random.normal((size, size), key=mx.random.key(seed)).astype(getattr(mx, dtype)) for seed in range(2))
        mx.eval(a, b)

    def call() -> None:
        with on_device(device):
            mx.eval(a @ b)

    return call


def wait(device: str) -> None:
    """Until the device has done its work."""
    mx.synchronize(mx.default_stream(mx.Device(getattr(mx, device))))


def device_facts(device: str) -> dict[str, str | int]:
    """Threads on the CPU; on a GPU its name and the largest sum of arrays there since the start."""
    if device == "cpu":
        # MLX computes on the CPU in one thread per stream, and the BLAS in its wheel for Linux has no threads.
        return {"device": device, "threads": 1}
    kind = "Metal" if mx.metal.is_available() else "CUDA"
    return {"device": f"{kind}, {gpu_info()['device_name']}", "device_memory_bytes": mx.get_peak_memory()}


def device_memory_bytes(device: str) -> int | None:
    """All memory of a GPU that has its own; None for the CPU."""
    if device == "cpu" or mx.metal.is_available():
        return None
    return int(gpu_info().get("total_memory", 0)) or None
