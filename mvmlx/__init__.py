"""MLX backend of mvmlx, for Apple silicon first. Every model file has a twin of the same name in mvtorch."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

    from mvshared.pipeline import Pipeline


def load(name: str | Path = "demo", *, dtype: str | None = None, device: str = "auto") -> "Pipeline[mx.array]":
    """Load an embedded model by name, or a checkpoint folder, ready for `generate`.

    dtype: float32, float16 or, not on Metal, bfloat16; by default float16 on a GPU, float32 on the CPU. device: auto, cpu, gpu.
    Raises CheckpointError, OptionError and BackendError.
    """
    from mvmlx.model import load_model
    from mvshared.pipeline import Pipeline

    return Pipeline(load_model(name, dtype=dtype, device=device), name=str(name))
