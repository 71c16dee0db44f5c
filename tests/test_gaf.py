"""`mvmlx init gaf`: a network that at first computes what its source does, whole folders, and what can be no source."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    BACKENDS,
    FLOAT32_RMS,
    Backend,
    assert_close,
    assert_different,
    from_numpy,
    normal_maps,
    to_numpy,
    unet_inputs,
)
from public_folders import stable_diffusion
from safetensors.numpy import load_file

from mvshared.backend import load
from mvshared.checkpoint import read_model_config
from mvshared.cli import run
from mvshared.conversion.gaf import init_gaf
from mvshared.errors import CheckpointError, OptionError, OutputError
from mvshared.files import write_json
from mvshared.inspection import inspect

FIXTURES = Path(__file__).parent / "fixtures"
SD21 = {"attention_head_dim": [2, 4], "use_linear_projection": True}


def call(model: Any, inputs: Any, *, image_states: Any = None) -> Any:
    """The U-Net of a loaded model on random inputs; missing input channels are zero."""
    sample, timesteps, context, camera, reference = (from_numpy(model.unet, x) for x in inputs)
    unet, states = model.unet, from_numpy(model.unet, image_states)
    constants = unet.constants(context, image_states=states, camera=camera, reference=reference)
    return to_numpy(unet(sample, unet.time_embeddings(timesteps), constants))


@pytest.mark.parametrize("backend", BACKENDS)
def test_from_imagedream_it_makes_the_views_of_imagedream_whatever_the_normal_maps(backend: Backend, tmp_path: Path) -> None:
    source = FIXTURES / "tiny-imagedream"
    init_gaf(source, tmp_path / "gaf")
    arguments: dict[str, Any] = {"prompt": "an owl", "negative_prompt": "", "steps": 2, "elevation_deg": 5, "size_px": 128}
    ours, theirs = (load(folder, backend=backend, device="cpu") for folder in (tmp_path / "gaf", source))
    expected = theirs.generate(source / "input.png", **arguments).latents
    assert_close(ours.generate(source / "input.png", **arguments).latents, expected, rms=FLOAT32_RMS)
    maps = list(normal_maps(4, 128))
    assert_close(ours.generate(source / "input.png", normals=maps, **arguments).latents, expected, rms=FLOAT32_RMS)
    config = ours.model.config
    assert (config.family, config.unet.in_channels, config.unet.reference_frame) == ("gaf", 8, True)
    assert not inspect(tmp_path / "gaf").faults


@pytest.mark.parametrize("backend", BACKENDS)
def test_from_stable_diffusion_it_is_stable_diffusion_until_it_sees_a_picture(backend: Backend, tmp_path: Path) -> None:
    source = stable_diffusion(tmp_path / "sd21", unet=SD21)
    encoder = FIXTURES / "tiny-imagedream" / "image_encoder"
    init_gaf(source, tmp_path / "gaf", image_encoder=encoder, cameras=True)
    ours, theirs = (load(folder, backend=backend, device="cpu").model for folder in (tmp_path / "gaf", source))
    config = ours.config.unet
    inputs = unet_inputs(theirs.config.unet)  # pyright: ignore
    expected = call(theirs, inputs)
    rng = np.random.default_rng(0)
    normals = rng.standard_normal(inputs.sample.shape, dtype=np.float32)
    states = rng.standard_normal((2, 1, 17, config.resampler.embedding_dim), dtype=np.float32)  # type: ignore[union-attr]
    wider = inputs._replace(
        sample=np.concatenate([inputs.sample, normals], axis=-1), camera=rng.standard_normal((2, 1, 16), dtype=np.float32)
    )
    assert_close(call(ours, wider, image_states=states), expected, rms=FLOAT32_RMS)
    reference = rng.standard_normal((2, 1, *inputs.sample.shape[2:]), dtype=np.float32)
    assert_different(call(ours, wider._replace(reference=reference), image_states=states), expected, rms=1e-3)


def test_a_seed_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="seed must be a whole number"):
        init_gaf(tmp_path, tmp_path / "gaf", seed=-1)


def test_new_weights_are_drawn_from_the_seed_and_kept_in_the_dtype_of_the_source(tmp_path: Path) -> None:
    source = stable_diffusion(tmp_path / "sd21", unet=SD21)
    encoder = FIXTURES / "tiny-imagedream" / "image_encoder"
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed in zip(folders, (0, 0, 1), strict=True):
        init_gaf(source, folder, image_encoder=encoder, seed=seed)
    a, b, c = ((folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for folder in folders)
    assert a == b != c
    assert {dtype for part in inspect(folders[0]).components for dtype in part.dtypes} == {"F32"}


def test_without_an_image_encoder_there_are_no_image_tokens(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = stable_diffusion(tmp_path / "sd21", unet=SD21)
    assert run(["init", "gaf", "--from", str(source), str(tmp_path / "gaf")]) == 0
    assert capfd.readouterr().out.startswith(f"gaf in {tmp_path / 'gaf'}\n  unet: ")
    unet = read_model_config(tmp_path / "gaf").unet
    assert (unet.resampler, unet.camera_dim, unet.reference_frame) == (None, None, True)
    views = load(tmp_path / "gaf", backend="torch", device="cpu").generate(
        FIXTURES / "tiny-imagedream" / "input.png", prompt="an owl", steps=1, size_px=16
    )
    assert views.images.shape == (4, 16, 16, 3)


def test_hidden_files_beside_the_weights_of_an_image_encoder_are_no_weights(tmp_path: Path) -> None:
    source = stable_diffusion(tmp_path / "sd21", unet=SD21)
    encoder = shutil.copytree(FIXTURES / "tiny-imagedream" / "image_encoder", tmp_path / "encoder")
    (encoder / "._model.safetensors").write_bytes(b"as macOS leaves on disks of other systems")
    init_gaf(source, tmp_path / "gaf", image_encoder=encoder)
    assert not inspect(tmp_path / "gaf").faults


def test_what_can_be_no_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"from must be an ImageDream, MVDream or Stable Diffusion 2\.1 folder, got .*demo"):
        init_gaf("demo", tmp_path / "gaf")
    init_gaf(FIXTURES / "tiny-mvdream", tmp_path / "gaf")
    with pytest.raises(OptionError, match="from must be"):
        init_gaf(tmp_path / "gaf", tmp_path / "again")
    with pytest.raises(OutputError, match="is not empty"):
        init_gaf(FIXTURES / "tiny-mvdream", tmp_path / "gaf")
    with pytest.raises(OptionError, match="image encoder must be left out: the source has its own"):
        init_gaf(FIXTURES / "tiny-imagedream", tmp_path / "other", image_encoder=FIXTURES)
    with pytest.raises(CheckpointError, match=r"holds no \.safetensors weights"):
        init_gaf(FIXTURES / "tiny-mvdream", tmp_path / "other", image_encoder=FIXTURES)
    shutil.rmtree(tmp_path / "gaf")


def test_of_a_whole_clip_model_the_vision_tower_is_asked_for(tmp_path: Path) -> None:
    encoder = shutil.copytree(FIXTURES / "tiny-imagedream" / "image_encoder", tmp_path / "clip")
    write_json(encoder / "config.json", {"model_type": "clip", "text_config": {}, "vision_config": {}})
    with pytest.raises(CheckpointError, match=r"is of a whole CLIP model.*CLIPVisionModel\.from_pretrained"):
        init_gaf(FIXTURES / "tiny-mvdream", tmp_path / "gaf", image_encoder=encoder)


def break_in_the_vae(name: str, size: int) -> None:
    if name.startswith("encoder.mid_block"):
        raise KeyboardInterrupt


def test_a_broken_run_is_no_checkpoint_and_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        init_gaf(FIXTURES / "tiny-mvdream", tmp_path / "gaf", on_tensor=break_in_the_vae)
    assert not (tmp_path / "gaf" / "model_index.json").exists()
    init_gaf(FIXTURES / "tiny-mvdream", tmp_path / "gaf")
    assert json.loads((tmp_path / "gaf" / "model_index.json").read_text())["family"] == "gaf"
    assert not inspect(tmp_path / "gaf").faults


@pytest.mark.parametrize("other", [{"seed": 1}, {"cameras": True}])
def test_a_broken_run_is_not_gone_on_with_by_one_of_other_options(tmp_path: Path, other: dict[str, Any]) -> None:
    source = stable_diffusion(tmp_path / "sd21", unet=SD21)
    encoder = FIXTURES / "tiny-imagedream" / "image_encoder"
    with pytest.raises(KeyboardInterrupt):
        init_gaf(source, tmp_path / "broken", image_encoder=encoder, on_tensor=break_in_the_vae)
    for folder in ("broken", "fresh"):
        init_gaf(source, tmp_path / folder, image_encoder=encoder, **other)
    broken, fresh = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in (tmp_path / "broken", tmp_path / "fresh")
    )
    assert broken == fresh


@pytest.mark.parametrize(("size_px", "expected"), [(128, 128), (768, 256)])
def test_the_negative_prompt_is_that_of_the_source_and_so_is_the_size_up_to_that_of_gaf(
    tmp_path: Path, size_px: int, expected: int
) -> None:
    source = shutil.copytree(FIXTURES / "tiny-imagedream", tmp_path / "source")
    document = json.loads((source / "unet" / "config.json").read_text())
    write_json(source / "unet" / "config.json", document | {"sample_size": size_px // 8})
    init_gaf(source, tmp_path / "gaf")
    ours, theirs = (read_model_config(folder).defaults for folder in (tmp_path / "gaf", source))
    assert theirs.size_px == size_px and theirs.negative_prompt
    assert (ours.size_px, ours.negative_prompt) == (expected, theirs.negative_prompt)


def test_keys_of_image_tokens_begin_as_those_of_the_text(tmp_path: Path) -> None:
    source = stable_diffusion(tmp_path / "sd21", unet=SD21)
    init_gaf(source, tmp_path / "gaf", image_encoder=FIXTURES / "tiny-imagedream" / "image_encoder")
    weights = load_file(tmp_path / "gaf" / "unet" / "diffusion_pytorch_model.safetensors")
    names = [name for name in weights if name.endswith("to_k_ip.weight")]
    assert names
    for name in names:
        np.testing.assert_array_equal(weights[name], weights[name.replace("to_k_ip", "to_k")])
        assert not weights[name.replace("to_k_ip", "to_v_ip")].any()
