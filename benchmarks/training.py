"""One training step of a U-Net with random weights, with and without gradient checkpointing: time, and above all memory."""

import importlib
from dataclasses import replace
from typing import Any

import numpy as np

from mvshared.backend import PACKAGES
from mvshared.benchmark.measure import peak_rss_bytes
from mvshared.benchmark.worker import Prepared
from mvshared.checkpoint import find_model, read_model_config
from mvshared.config import UNetConfig
from mvshared.training.config import OptimizerConfig
from mvshared.training.data import UNetBatch
from mvshared.training.initial import initial_weights

# Channels, and the side of the latents: of one model with 6.1 M parameters, and of one with 46.6 M.
SIZES = {"small": ((64, 96, 128), 16), "larger": ((128, 256, 384), 32)}
VIEWS = 4


def unet_config(size: str) -> UNetConfig:
    """A U-Net in one of SIZES, with the demo model's inputs; none of its own changes, so that figures stay comparable."""
    channels = SIZES[size][0]
    return replace(
        read_model_config(find_model("demo")).unet,
        block_out_channels=channels,
        layers_per_block=(1, 2, 1),
        attention_levels=(False, True, True),
        num_attention_heads=tuple(max(1, width // 64) for width in channels),
    )


def step(*, size: str, backend: str, dtype: str, batch: int, checkpointing: int) -> Prepared:
    """A step from the batch in memory to new weights and averages; `checkpointing` is 0 or 1."""
    package, config = PACKAGES[backend], unet_config(size)  # type: ignore[index]
    shapes = importlib.import_module(f"{package}.model").network_shapes(config)
    module = importlib.import_module(f"{package}.train")
    trainer = module.unet_trainer(
        config, OptimizerConfig(), initial_weights(shapes, seed=0), dtype=dtype, gradient_checkpointing=bool(checkpointing)
    )
    side, rng = SIZES[size][1], np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    given = UNetBatch(
        sample=normal(batch, VIEWS, side, side, config.in_channels),
        timesteps=np.linspace(20, 980, batch, dtype=np.float32),
        camera=normal(batch, VIEWS, config.camera_dim or 0),
        reference=normal(batch, side, side, config.out_channels),
        target=normal(batch, VIEWS, side, side, config.out_channels),
        text=None,
        image_states=None,
    )

    def facts() -> dict[str, Any]:
        return {"device": trainer.device, "dtype": dtype, "peak_memory_bytes": peak_rss_bytes(), **_arrays(trainer)}

    return Prepared(lambda: trainer.step(given, learning_rate=1e-4), facts, module.memory_limits(trainer.device))


def _arrays(trainer: Any) -> dict[str, int]:
    """The largest sum of arrays, where the library counts it."""
    if importlib.import_module(type(trainer).__module__).__package__ == "mvmlx":
        import mlx.core as mx

        return {"device_memory_bytes": mx.get_peak_memory()}
    if trainer.device == "cpu":
        return {}
    import torch

    return {"device_memory_bytes": torch.cuda.max_memory_allocated(trainer.device)}
