"""Tiny captures and training configurations, for the tests of training."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from helpers import TINY_UNET, TINY_VAE
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mvshared.camera import orbit
from mvshared.captures import write_capture
from mvshared.checkpoint import weight_files
from mvshared.config import SchedulerConfig
from mvshared.training.config import DataConfig, OptimizerConfig, TrainConfig
from mvshared.training.data import Latents
from mvshared.training.loop import train

AZIMUTHS = (0.0, 40.0, 90.0, 180.0, 270.0, 320.0)
SIZE = 16
VAE = replace(TINY_VAE, block_out_channels=(8, 16), mid_block_add_attention=False)
UNET = replace(
    TINY_UNET, in_channels=8, camera_dim=16, reference_frame=True, cross_attention_dim=None, block_out_channels=(16, 32)
)
V_PREDICTION = SchedulerConfig(prediction_type="v_prediction")
OPTIMIZER = OptimizerConfig(learning_rate=2e-3, warmup_steps=2)


def write_object(folder: Path, number: int) -> None:
    """A capture of a coloured ball beside the axis, with normal maps, and with detail maps of its darker spot."""
    poses = orbit(AZIMUTHS, 10.0)
    across, down = np.meshgrid(np.linspace(-1, 1, SIZE), np.linspace(-1, 1, SIZE))
    rgba = np.zeros((len(AZIMUTHS), SIZE, SIZE, 4), np.uint8)
    normals = np.full((len(AZIMUTHS), SIZE, SIZE, 4), (128, 128, 128, 0), np.uint8)
    detail = np.zeros((len(AZIMUTHS), SIZE, SIZE), np.uint8)
    colour = np.random.default_rng(number).integers(60, 255, 3)
    for view, azimuth in enumerate(np.radians(AZIMUTHS)):
        x, y = (across - 0.3 * np.sin(azimuth)) / 0.6, -down / 0.6
        z = np.sqrt(np.clip(1 - x**2 - y**2, 0, None))
        inside = x**2 + y**2 < 1
        rgba[view, inside] = np.append(colour, 255)
        rgba[view, inside & (z < 0.5), :3] //= 2
        spot = inside & (x > 0.2) & (y > 0.2)  # so that it differs from its mirror image
        rgba[view, spot, view % 3] = 0
        detail[view, spot] = 51 * (view % 3 + 1)
        normals[view, inside] = np.stack([(value[inside] + 1) / 2 * 255 for value in (x, y, z, np.ones_like(z))], axis=-1)
    write_capture(folder, rgba, normals, poses, 40.0, detail=detail)


def write_objects(folder: Path) -> Path:
    """Four captures in a folder, which is returned."""
    for number in range(4):
        write_object(folder / f"object_{number}", number)
    return folder


def some_latents(objects: int = 3, views: int = 6) -> Latents:
    """Random latents of objects with as many views each, all around."""
    random, n = np.random.default_rng(0), objects * views
    return Latents(
        random.standard_normal((n, 4, 4, 4)).astype(np.float16),
        random.standard_normal((n, 4, 4, 4)).astype(np.float16),
        random.standard_normal((n, 16)).astype(np.float32),
        np.tile(np.linspace(-150, 150, views), objects).astype(np.float32),
        np.arange(0, n + 1, views),
    )


def vae_config(folder: Path | str, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "stage": "vae",
        "data": DataConfig(folder=str(folder), held_out=0.25, targets=2),
        "steps": 4,
        "batch_size": 2,
        "checkpoint_every": 2,
        "log_every": 1,
        "sample_every": 3,
        "optimizer": OPTIMIZER,
        "vae": VAE,
    }
    return TrainConfig(**(values | changes))


def unet_config(folder: Path, vae: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "stage": "unet",
        "vae": None,
        "vae_from": str(vae),
        "unet": UNET,
        "scheduler": SchedulerConfig(prediction_type="v_prediction"),
    }
    return vae_config(folder, **(values | changes))


def run(config: TrainConfig, folder: Path, *, backend: str = "torch", **options: Any) -> Path:
    return train(config, folder, backend=backend, device="cpu", **options)


def toml(config: TrainConfig) -> str:
    """The configuration as TOML, which has no null."""

    def lines(values: dict[str, Any]) -> list[str]:
        return [f"{name} = {json.dumps(value)}" for name, value in values.items() if value is not None]

    document = {name: value for name, value in asdict(config).items() if value is not None}
    tables = {name: value for name, value in document.items() if isinstance(value, dict)}
    plain = {name: value for name, value in document.items() if name not in tables}
    return "\n".join([*lines(plain), *(line for name, table in tables.items() for line in (f"[{name}]", *lines(table)))])


def weights_of(run_folder: Path, component: str) -> dict[str, NDArray[Any]]:
    return load_file(weight_files(run_folder / "model", component)[0])  # type: ignore[arg-type]
