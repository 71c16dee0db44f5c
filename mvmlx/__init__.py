"""MLX backend of mvmlx, for Apple silicon first. Every model file has a twin of the same name in mvtorch."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvshared import __version__
from mvshared.lazy import importing, lazily

if TYPE_CHECKING:
    import mlx.core as mx

    from mvshared.blocks import Block, Call
    from mvshared.pipeline import Pipeline, Progress
    from mvshared.runs import Views
    from mvshared.upscaling.latents import Upscaler

__all__ = [
    "Pipeline",
    "Progress",
    "Upscaler",
    "Views",
    "__version__",
    "load",
    "load_upscaler",
    "observe",
    "observe_blocks",
]


def load(
    name: str | Path = "demo",
    *,
    dtype: str | None = None,
    device: str = "auto",
    quantize: str | None = None,
    low_memory: bool = False,
    memory_budget: str | float | None = None,
) -> "Pipeline[mx.array]":
    """Load an embedded or downloaded model by its name or repository, or a checkpoint folder, ready for `generate`.

    dtype: float32, float16 or, not on Metal, bfloat16; by default float16 on a GPU, float32 on the CPU. device: auto, cpu, gpu.
    quantize: q8 or q4 quantises the weights as they are read; see docs/quantization.md. low_memory: runs take as little memory
    as they can. memory_budget: such as "6GB", or a number of GB, which runs keep to or refuse; see docs/memory.md.
    Raises CheckpointError, OptionError and BackendError.
    """
    from mvshared.memory.budget import memory_options
    from mvshared.pipeline import Pipeline

    with importing("mlx"):
        from mvmlx.model import load_model

    memory = memory_options(low_memory=low_memory, memory_budget=memory_budget)
    model = load_model(name, dtype=dtype, device=device, quantize=quantize, at_once=memory.at_once)
    return Pipeline(model, name=str(name), memory=memory)


def load_upscaler(
    name: str | Path,
    *,
    dtype: str | None = None,
    device: str = "auto",
    quantize: str | None = None,
    low_memory: bool = False,
) -> "Upscaler[mx.array]":
    """Load a latent upscaler by name or from a folder, for `Pipeline.upscale` and for latents alone.

    dtype, device, quantize: as `load`. low_memory: its networks are read when they are needed.
    Raises CheckpointError, also for a folder of another kind, OptionError and BackendError.
    """
    from mvshared.upscaling.latents import Upscaler

    with importing("mlx"):
        from mvmlx.upscaling import load_upscaler_model

    model = load_upscaler_model(name, dtype=dtype, device=device, quantize=quantize, at_once=not low_memory)
    return Upscaler(model, name=str(name))


def observe(model: Any, fn: "Callable[[str, mx.array, float], None]") -> AbstractContextManager[None]:
    """Within the context, `fn(name, array, seconds)` is called after every block of a pipeline, an upscaler or a network.

    See `mvmlx.observation.observe`. Names are the same in both backends; if `model` is no
    single network, they begin with unet, vae, text_encoder or image_encoder.
    """
    from mvmlx.observation import observe as observe_networks

    model = _network(model)
    return model.observe(fn) if hasattr(model, "observe") else observe_networks(model, fn)


def observe_blocks(
    model: Any, on_end: "Callable[[Block[mx.array]], None]", on_start: "Callable[[Call[mx.array]], None] | None" = None
) -> AbstractContextManager[Callable[[], float]]:
    """As `observe`, with all that is known of a block: its inputs, outputs, times and arithmetic. See `mvshared.blocks.Block`.

    The context gives a function that tells the time on the blocks' clock, which stands still while `on_end` or `on_start` work.
    """
    from mvmlx.observation import observe_blocks as observe_networks

    model = _network(model)
    watched = hasattr(model, "observe_blocks")
    return model.observe_blocks(on_end, on_start) if watched else observe_networks(model, on_end, on_start)


def _network(model: Any) -> Any:
    """What is inside of a pipeline or an upscaler; a network is that itself."""
    return model.model if hasattr(model, "generate") or hasattr(model, "upscale") else model


def __getattr__(name: str) -> Any:
    return lazily(__name__, name)
