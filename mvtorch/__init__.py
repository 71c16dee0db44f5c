"""PyTorch backend of mvmlx, for CUDA and CPU. Every model file has a twin of the same name in mvmlx."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from mvshared.pipeline import Pipeline


def load(name: str | Path = "demo", *, dtype: str | None = None, device: str = "auto") -> "Pipeline[Tensor]":
    """Load an embedded model by name, or a checkpoint folder, ready for `generate`.

    dtype: float32, float16 or bfloat16; by default float16 on CUDA, float32 on the CPU. device: auto, cpu, cuda or cuda:N.
    Raises CheckpointError, OptionError and BackendError.
    """
    from mvshared.pipeline import Pipeline
    from mvtorch.model import load_model

    return Pipeline(load_model(name, dtype=dtype, device=device), name=str(name))
