"""How a run uses memory: what is held together, and what is computed in pieces. It changes results by rounding only."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from mvshared.attention import FUSED, AttentionOptions
from mvshared.backend import BackendName, is_metal
from mvshared.tiling import check_tile


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """How much is in memory at once.

    `networks_at_once`: all networks from the first stage to the last, else each is read for its stage and dropped after it.
    `branches_at_once`: the branches of guidance in one call of the U-Net, else one after the other. `attention` and
    `vae_attention`: how it is computed in all networks, and in the VAE. `vae_tile`: the side of the tiles of the VAE in pixels,
    None for whole pictures.
    `cache_bytes`: how much freed memory MLX may keep for later, None for the backend's own limit. `memory_bytes`: what the
    process may take on Metal before MLX waits for work that runs instead of preparing more, None for all that the system
    recommends; it changes no result, and plans that differ in it are equal. Raises OptionError.
    """

    networks_at_once: bool = True
    branches_at_once: bool = True
    attention: AttentionOptions = FUSED
    vae_attention: AttentionOptions = FUSED
    vae_tile: int | None = None
    cache_bytes: int | None = None
    memory_bytes: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.vae_tile is not None:
            check_tile(self.vae_tile)

    def attach(self, component: str, network: Any) -> Callable[[], None]:
        """Let a network compute attention as planned; the function that is returned undoes that."""
        options = self.vae_attention if component == "vae" else self.attention
        if options == FUSED:
            return lambda: None
        before, network.attention_options = network.attention_options, options
        return lambda: setattr(network, "attention_options", before)


PLAIN = MemoryPlan()
SLICED = AttentionOptions(implementation="sliced", budget_bytes=2**26)
CACHE_BYTES = 2**28
VAE_PIXELS = 2**20  # of pictures that the VAE computes together: four of 512 x 512
VAE_PIXELS_ON_CPU = 2**16  # one of 256 x 256, what stays in the cache: more take longer
VAE_PIXELS_ON_METAL = 2**18  # one of 512 x 512, which takes 1 GB in float32


def vae_batch(plan: MemoryPlan, backend: BackendName, device: str, *, pixels: int) -> int:
    """How many pictures of so many pixels the VAE of PyTorch computes together, unless memory is to be spared: on CUDA, where
    one alone leaves much of the device idle, as many as VAE_PIXELS allow, and on a CPU, where small ones cost more calls than
    arithmetic, as many as VAE_PIXELS_ON_CPU do. One elsewhere."""
    if backend != "torch" or not plan.networks_at_once or plan.vae_tile is not None:
        return 1
    most = {"cuda": VAE_PIXELS, "cpu": VAE_PIXELS_ON_CPU}.get(device.partition(":")[0], 0)
    return max(1, most // max(1, pixels))


def dataset_batch(backend: BackendName, device: str, *, pixels: int) -> int:
    """How many pictures of so many pixels are encoded together for training, where all of the memory is there for it."""
    on_gpu = VAE_PIXELS_ON_METAL if is_metal(backend, device) else VAE_PIXELS
    return max(1, (VAE_PIXELS_ON_CPU if device == "cpu" else on_gpu) // pixels)


def plans(backend: BackendName, device: str) -> tuple[MemoryPlan, ...]:
    """The plans that a backend has, from the fastest to the one that takes least memory."""
    cached = MemoryPlan(networks_at_once=False, cache_bytes=CACHE_BYTES if backend == "mlx" else None)
    # PyTorch's kernels never hold the scores, and MLX's on the GPU not those of the U-Net's heads: slices save nothing there.
    tiled = replace(cached, vae_tile=256, vae_attention=SLICED if backend == "mlx" else FUSED)
    apart = replace(tiled, vae_tile=128, branches_at_once=False)
    sliced = replace(apart, attention=SLICED) if backend == "mlx" and device == "cpu" else apart
    return tuple(dict.fromkeys((PLAIN, cached, tiled, apart, sliced)))
