"""Checkpoint folders: what is written is read back, and no configuration that makes no sense is accepted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY_MODEL, write_tiny_model

from mvshared.checkpoint import find_model, read_model_config, weight_files
from mvshared.config import CameraConfig, Framing, KUNetConfig, SchedulerConfig, UNetConfig, VAEConfig
from mvshared.errors import CheckpointError, OptionError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_a_written_model_is_read_back(tmp_path: Path) -> None:
    config = replace(
        TINY_MODEL,
        family="round trip",
        vae=replace(TINY_MODEL.vae, latents_mean=(0.1, -0.2, 0.3, 0.4), latents_std=(1.0, 2.0, 3.0, 4.0)),
        scheduler=SchedulerConfig(prediction_type="v_prediction", timestep_spacing="trailing", steps_offset=0),
        camera=CameraConfig(fov_deg=30.0, radius=3.4),
        framing=Framing(mode="subject", kept_heights=(0.5, 0.9)),
    )
    assert read_model_config(write_tiny_model(tmp_path, config)) == config


def test_the_embedded_model_is_found_by_name_whatever_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert weight_files(find_model("demo"), "unet")[0].is_file()
    assert read_model_config(find_model("demo")).family == "demo"


@pytest.mark.parametrize("name", ["", "dmo", "demo/", "/nowhere"])
def test_an_unknown_model_is_refused_with_the_known_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"demo|model_index\.json"):
        find_model(name)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("model_index.json", "format_version", 2),
        ("model_index.json", "format_version", None),
        ("model_index.json", "camera", []),
        ("model_index.json", "camera", {"fov_deg": "wide"}),
        ("model_index.json", "camera", {"fov_deg": 180}),
        ("model_index.json", "framing", {"mode": "tight"}),
        ("model_index.json", "defaults", {"views": 2.5}),
        ("unet/config.json", "block_out_channels", "wide"),
        ("unet/config.json", "block_out_channels", [32, "64"]),
        ("unet/config.json", "attention_levels", [1, 0]),
        ("unet/config.json", "reference_frame", 1),
        ("unet/config.json", "norm_eps", float("nan")),
        ("unet/config.json", "out_channels", 8),
        ("unet/config.json", "in_channels", 5),
        ("vae/config.json", "scaling_factor", True),
        ("vae/config.json", "latents_std", [1, 1, 1, 0]),
        ("scheduler/scheduler_config.json", "beta_schedule", "cosine"),
        ("scheduler/scheduler_config.json", "surprise", 1),
    ],
)
def test_a_malformed_field_is_refused_by_name(folder: Path, tmp_path: Path, file: str, field: str, value: Any) -> None:
    for path in folder.rglob("*.json"):
        target = tmp_path / path.relative_to(folder)
        target.parent.mkdir(exist_ok=True)
        target.write_text(path.read_text())
    document = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(document | {field: value}))
    with pytest.raises(CheckpointError) as caught:
        read_model_config(tmp_path)
    assert field in str(caught.value)
    assert caught.value.path is not None


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (UNetConfig, {"in_channels": 0}),
        (UNetConfig, {"in_channels": 3}),
        (UNetConfig, {"in_channels": 4.0}),
        (UNetConfig, {"block_out_channels": ()}),
        (UNetConfig, {"block_out_channels": (320, 640)}),
        (UNetConfig, {"block_out_channels": (320, 640, 1280, 0)}),
        (UNetConfig, {"block_out_channels": (321, 640, 1280, 1280)}),
        (UNetConfig, {"layers_per_block": (2, 2, 2)}),
        (UNetConfig, {"layers_per_block": (2, 2, 2, 0)}),
        (UNetConfig, {"transformer_layers_per_block": (1, 1, 1, -1)}),
        (UNetConfig, {"num_attention_heads": (5, 10)}),
        (UNetConfig, {"num_attention_heads": (5, 10, 20, 3)}),
        (UNetConfig, {"num_attention_heads": (0, 10, 20, 20)}),
        (UNetConfig, {"attention_head_dim": 0}),
        (UNetConfig, {"norm_num_groups": 0}),
        (UNetConfig, {"norm_eps": 0.0}),
        (UNetConfig, {"cross_attention_dim": 0}),
        (UNetConfig, {"camera_dim": -16}),
        (KUNetConfig, {"cross_attention_dim": 24}),
        (
            KUNetConfig,
            {
                "block_out_channels": (32, 64, 64),
                "attention_levels": (False, True, False),
                "attention_head_dim": 64,
                "cross_attention_dim": 24,
            },
        ),
        (VAEConfig, {"latent_channels": 0}),
        (VAEConfig, {"block_out_channels": (128, 250)}),
        (VAEConfig, {"norm_num_groups": 0}),
        (VAEConfig, {"layers_per_block": 0}),
        (VAEConfig, {"scaling_factor": 0.0}),
        (VAEConfig, {"latents_mean": (1.0,)}),
        (VAEConfig, {"latents_std": (1.0, 1.0, 1.0, -1.0)}),
        (SchedulerConfig, {"num_train_timesteps": 0}),
        (SchedulerConfig, {"num_train_timesteps": 10**12}),
        (SchedulerConfig, {"beta_start": 0.0}),
        (SchedulerConfig, {"beta_end": 1.0}),
        (SchedulerConfig, {"steps_offset": -1}),
        (CameraConfig, {"radius": 0.0}),
        (CameraConfig, {"fov_deg": 0.0}),
        (Framing, {"height": 0.0}),
        (Framing, {"bottom": 1.5}),
        (Framing, {"background": (0, 0, 256)}),
    ],
)
def test_a_configuration_that_makes_no_sense_cannot_be_made(kind: type[Any], values: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        kind(**values)
    assert caught.value.name.split()[0] in (*values, "layers_per_block")


def test_a_unet_and_a_vae_of_different_latents_make_no_model() -> None:
    with pytest.raises(OptionError, match="out_channels of the U-Net must be the VAE's 8, got 4"):
        replace(TINY_MODEL, vae=replace(TINY_MODEL.vae, latent_channels=8))


@pytest.mark.parametrize("name", [None, 3, b"demo"])
def test_what_is_no_name_of_a_model_is_refused(name: Any) -> None:
    with pytest.raises(OptionError, match="model must be a name or a folder"):
        find_model(name)
