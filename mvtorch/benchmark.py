"""What `mvmlx benchmark` needs of PyTorch itself: the device's own speed, its name, and models without a checkpoint."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from mvshared.backend import Dtype
from mvshared.checkpoint import Component
from mvshared.config import ModelConfig
from mvshared.networks import Networks
from mvshared.upscaling.config import UpscalerConfig
from mvtorch.model import MultiViewModel, random_network
from mvtorch.upscaling import UpscalerModel


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
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn((size, size), generator=generator).to(device, getattr(torch, dtype)) for _ in range(2))

    def call() -> None:
        with torch.inference_mode():
            torch.mm(a, b)
        wait(device)

    return call


def wait(device: str) -> None:
    """Until the device has done its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device.startswith("mps"):
        torch.mps.synchronize()


def device_facts(device: str) -> dict[str, str | int]:
    """Threads on the CPU; on CUDA the GPU's name and the largest sum of arrays there since the start; on mps nothing more."""
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
        return {"device": f"CUDA, {name}", "device_memory_bytes": torch.cuda.max_memory_allocated(device)}
    return {"device": device} | ({"threads": torch.get_num_threads()} if device == "cpu" else {})


def device_memory_bytes(device: str) -> int | None:
    """All memory of a GPU that has its own; None for the CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.startswith("cuda") else None
