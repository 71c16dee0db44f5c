"""Tiny complete checkpoints against what the public reference code computes with them; tests/fixtures/README.md says how."""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import (
    BACKENDS,
    FLOAT32_RMS,
    Backend,
    assert_close,
    assert_different,
    from_numpy,
    pillow_clip_processor,
    record,
    to_numpy,
)
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

import mvmlx.model
import mvmlx.unet
import mvtorch.model
import mvtorch.unet
from mvshared.backend import load
from mvshared.camera import azimuth_elevation, camera_vectors, load_cameras
from mvshared.cli import run
from mvshared.errors import MvWarning, OptionError
from mvshared.images import load_image
from mvshared.names import ldm_unet_names
from mvshared.pipeline import Pipeline
from mvshared.public_configs import IMAGEDREAM_NEGATIVE_PROMPT, ldm_unet
from mvshared.repetition import repeat
from mvshared.runs import Views, read_run

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("tiny-mvdream", "tiny-imagedream")
VIEWS = 4
LATENTS_RMS = 1e-4  # of a whole run in float32
HALF_LATENTS_RMS = 2e-2  # of a whole run in float16


@cache
def golden(name: str) -> dict[str, NDArray[np.float32]]:
    return load_file(FIXTURES / name / "golden.safetensors")


@cache
def unet(name: str, backend: Backend) -> Any:
    """The U-Net of a folder, every tensor of the file in its place."""
    folder = FIXTURES / name / "unet"
    config = ldm_unet(json.loads((folder / "config.json").read_text()), path=folder)
    module, model = (mvtorch.unet, mvtorch.model) if backend == "torch" else (mvmlx.unet, mvmlx.model)
    result: Any = module.MultiViewUNet(config)
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    names = ldm_unet_names(model.weight_shapes(result), config)
    model.set_weights(result, {own: weights.pop(ldm) for own, ldm in names.items()})
    assert not weights
    return result


class Call(NamedTuple):
    """The first call of the U-Net, [unconditional, conditional]; the frames without the reference."""

    sample: NDArray[np.float32]
    timesteps: NDArray[np.float32]
    context: NDArray[np.float32]
    camera: NDArray[np.float32]
    image_states: NDArray[np.float32] | None
    reference: NDArray[np.float32] | None
    out: NDArray[np.float32]


def first_call(name: str) -> Call:
    given = golden(name)

    def views(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return x.reshape(2, -1, *x.shape[1:])[:, :VIEWS]

    image = "in_ip" in given
    return Call(
        sample=views(given["in_x"]).transpose(0, 1, 3, 4, 2),
        timesteps=views(given["in_timesteps"])[:, 0],
        context=views(given["in_context"])[:, 0],
        camera=views(given["in_camera"]),
        image_states=views(given["in_ip"])[:, :1] if image else None,
        reference=given["in_ip_img"].transpose(0, 2, 3, 1)[:, None] if image else None,
        out=views(given["out"]).transpose(0, 1, 3, 4, 2),
    )


def call(model: Any, given: Call, *, image_scale: float = 1.0) -> NDArray[np.float32]:
    def array(x: NDArray[np.float32] | None) -> Any:
        return from_numpy(model, None if x is None else np.ascontiguousarray(x))

    with torch.no_grad():
        image_states = array(given.image_states)
        conditions = {"camera": array(given.camera), "reference": array(given.reference)}
        constants = model.constants(array(given.context), image_states=image_states, image_scale=image_scale, **conditions)
        return to_numpy(model(array(given.sample), model.time_embeddings(array(given.timesteps)), constants))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_the_first_call_of_the_unet_gives_what_the_reference_code_does(name: str, backend: Backend) -> None:
    given = first_call(name)
    assert_close(call(unet(name, backend), given), given.out, rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_share_of_the_image_tokens_can_be_set(backend: Backend) -> None:
    model, given = unet("tiny-imagedream", backend), first_call("tiny-imagedream")
    without = call(model, given._replace(image_states=None))
    assert_close(call(model, given, image_scale=0.0), without, rms=FLOAT32_RMS)
    assert_different(call(model, given, image_scale=0.5), without, rms=1e-3)
    assert_different(call(model, given, image_scale=0.5), given.out, rms=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_picture_adds_its_tokens(backend: Backend) -> None:
    """The same picture twice has the same tokens twice, which weigh as they did; another one changes the result."""
    model, given = unet("tiny-imagedream", backend), first_call("tiny-imagedream")
    states = given.image_states
    assert states is not None
    twice = np.concatenate([states, states], axis=1)
    assert_close(call(model, given._replace(image_states=twice)), given.out, rms=FLOAT32_RMS)
    other = np.concatenate([states, states[:, :, ::-1] * 2], axis=1)
    assert_different(call(model, given._replace(image_states=other)), given.out, rms=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_image_states_that_do_not_fit_are_refused(backend: Backend) -> None:
    given = first_call("tiny-imagedream")
    model = unet("tiny-imagedream", backend)
    for shape in ((2, 1, 17, 31), (1, 1, 17, 32), (2, 17, 32), (2, 0, 17, 32)):
        with pytest.raises(OptionError, match=r"image_states must be of shape \(2, r, m, 32\)"):
            call(model, given._replace(image_states=np.zeros(shape, np.float32)))
    with pytest.raises(OptionError, match="image_states must be None for a model without image tokens"):
        call(unet("tiny-mvdream", backend), first_call("tiny-mvdream")._replace(image_states=given.image_states))


# Whole runs


@cache
def parameters(name: str) -> dict[str, str]:
    with safe_open(FIXTURES / name / "golden.safetensors", framework="np") as file:
        return file.metadata()


@cache
def pipeline(name: str, backend: Backend, dtype: str) -> Pipeline[Any]:
    return load(FIXTURES / name, backend=backend, dtype=dtype, device="cpu")


def generate(name: str, backend: Backend, *, dtype: str = "float32", **changes: Any) -> Views:
    """The run of the golden file, from the same initial latents."""
    given = parameters(name)
    arguments: dict[str, Any] = {
        "image": FIXTURES / name / "input.png" if (FIXTURES / name / "input.png").exists() else None,
        "prompt": given["prompt"],
        "negative_prompt": given["negative_prompt"],
        "views": int(given["num_frames"]),
        "elevation_deg": float(given["elevation"]),
        "steps": int(given["steps"]),
        "guidance": float(given["guidance_scale"]),
        "size_px": int(given["size"]),
        "latents": golden(name)["initial_latents"].transpose(0, 2, 3, 1),
    }
    return pipeline(name, backend, dtype).generate(**(arguments | changes))


@pytest.mark.parametrize("name", NAMES)
def test_token_ids_are_those_of_the_reference_run(name: str) -> None:
    ids = pipeline(name, "torch", "float32").tokenizer([parameters(name)["prompt"]]).ids
    assert ids[0].tolist() == json.loads(parameters(name)["token_ids"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_text_states_are_those_of_the_reference_run(name: str, backend: Backend) -> None:
    pipe = pipeline(name, backend, "float32")
    states = pipe.model.encode_prompt(pipe.tokenizer([parameters(name)["prompt"]]).ids)
    assert_close(states, golden(name)["prompt_embeds"], rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_whole_runs_give_what_the_reference_code_does(name: str, backend: Backend) -> None:
    views, expected = generate(name, backend), golden(name)
    np.testing.assert_allclose(camera_vectors(views.cameras), expected["camera"][:VIEWS], atol=1e-6)
    assert_close(views.latents, expected["final_latents"].transpose(0, 2, 3, 1)[:VIEWS], rms=LATENTS_RMS)
    levels = np.abs(views.images.astype(np.float64) - expected["images"][:VIEWS] * 255)
    assert (levels <= 1).mean() >= 0.999


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_float16_runs_stay_close(name: str, backend: Backend) -> None:
    views = generate(name, backend, dtype="float16")
    assert_close(views.latents, golden(name)["final_latents"].transpose(0, 2, 3, 1)[:VIEWS], rms=HALF_LATENTS_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_pictures_are_taken_at_once(backend: Backend) -> None:
    """The same picture twice weighs more in the joint attention; another second picture changes the views."""
    picture = FIXTURES / "tiny-imagedream" / "input.png"
    one, same, other = (
        generate("tiny-imagedream", backend, image=image, latents=None, steps=1).latents
        for image in (picture, [picture, picture], [picture, np.full((128, 128, 3), 30, np.uint8)])
    )
    assert_different(same, one, rms=1e-5)
    assert_different(other, same, rms=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("tiny-mvdream", {"image": FIXTURES / "tiny-imagedream" / "input.png"}, "image must be left out: this model takes no"),
        ("tiny-mvdream", {"prompt": None}, "prompt must be given: this model makes its views from text"),
        ("tiny-mvdream", {"prompt": 5}, "prompt must be a text, got 5"),
        ("tiny-mvdream", {"normals": [np.zeros((8, 8, 3), np.uint8)] * 4}, "normals must be left out"),
        ("tiny-imagedream", {"image": None}, "image must be 1 to 8 pictures for this model, got 0"),
        ("tiny-imagedream", {"image": ["input.png"] * 9}, "image must be 1 to 8 pictures for this model, got 9"),
        ("tiny-imagedream", {"image_scale": 2.5}, "image_scale must be a number from 0 to 2, got 2.5"),
    ],
)
def test_what_a_model_cannot_use_is_refused(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        generate(name, "torch", **changes)


def test_a_picture_alone_is_enough_and_has_the_family_s_defaults() -> None:
    picture = FIXTURES / "tiny-imagedream" / "input.png"
    with pytest.warns(MvWarning, match="the negative prompt is longer"):  # in the tiny vocabulary
        used = pipeline("tiny-imagedream", "torch", "float32").generate(picture, steps=1).parameters
    assert (used.prompt, used.negative_prompt) == ("", IMAGEDREAM_NEGATIVE_PROMPT)
    assert (used.guidance, used.size_px, len(used.cameras)) == (5.0, 128, 4)
    assert azimuth_elevation(used.cameras).elevations_deg == pytest.approx([5.0] * 4, abs=1e-4)


@pytest.mark.parametrize("shape", [(96, 150, 3), (200, 70, 3), (40, 40, 3)])
def test_pictures_of_any_shape_are_prepared_as_the_reference_code_does(shape: tuple[int, ...]) -> None:
    """Squeezed by PyTorch's bilinear interpolation for the VAE, by transformers' image processor for CLIP."""
    picture = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    recorded = record(pipeline("tiny-imagedream", "torch", "float32"))
    recorded.pipeline.generate(picture, prompt="an owl", negative_prompt="", steps=1)
    (latent_pixels,), (clip,) = (recorded.model.arguments(name)[0] for name in ("encode_latents", "encode_image"))
    image = torch.from_numpy(picture.astype(np.float32) / 255).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(2 * image - 1, (128, 128), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(latent_pixels[0], expected[0].permute(1, 2, 0), atol=1e-5)
    processor = pillow_clip_processor().from_pretrained(FIXTURES / "tiny-imagedream" / "feature_extractor")
    pixels = np.asarray(processor(picture, return_tensors="np").pixel_values)[0].transpose(1, 2, 0)
    assert np.abs(clip[0] - pixels).max() <= 1.01 / 255 / 0.26


def test_a_prompt_that_is_too_long_is_cut_and_said_so() -> None:
    with pytest.warns(MvWarning, match="the prompt is longer than 75 tokens; left out is: small owl"):
        generate("tiny-mvdream", "torch", prompt="owl " * 75 + "small owl", steps=1)


def test_a_run_with_a_prompt_is_repeated_bit_for_bit(tmp_path: Path) -> None:
    pipe = pipeline("tiny-imagedream", "torch", "float32")
    picture = FIXTURES / "tiny-imagedream" / "input.png"
    views = pipe.generate([picture, picture], prompt="an owl", negative_prompt="", image_scale=0.5, steps=2, seed=3)
    again = repeat(pipe, read_run(views.save(tmp_path / "out")))
    np.testing.assert_array_equal(again.latents, views.latents)
    assert again.parameters == views.parameters


def test_families_come_from_the_configs() -> None:
    families = [pipeline(name, "torch", "float32").model.config.family for name in NAMES]
    assert families == ["mvdream", "imagedream"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_whole_runs_of_the_command_line_give_what_the_reference_code_does(name: str, backend: Backend, tmp_path: Path) -> None:
    used, expected = parameters(name), golden(name)
    np.save(tmp_path / "latents.npy", expected["initial_latents"].transpose(0, 2, 3, 1))
    picture = [str(FIXTURES / name / "input.png")] if name == "tiny-imagedream" else []
    arguments = ["generate", *picture, "--model", str(FIXTURES / name), "--backend", backend, "--device", "cpu"]
    arguments += ["--prompt", used["prompt"], "--negative-prompt", used["negative_prompt"]]
    arguments += [
        "--size",
        used["size"],
        "--steps",
        used["steps"],
        "--guidance",
        used["guidance_scale"],
        "--elevation",
        used["elevation"],
    ]
    arguments += ["--latents", str(tmp_path / "latents.npy"), "--dtype", "float32", "-o", str(tmp_path / "out")]
    assert run(arguments) == 0
    latents = np.load(tmp_path / "out" / "latents.npy")
    assert_close(latents, expected["final_latents"].transpose(0, 2, 3, 1)[:VIEWS], rms=LATENTS_RMS)
    pictures = np.stack([load_image(tmp_path / "out" / f"view_{view:03}.png")[..., :3] for view in range(VIEWS)])
    assert (np.abs(pictures.astype(np.float64) - expected["images"][:VIEWS] * 255) <= 1).mean() >= 0.999
    vectors = camera_vectors(load_cameras(tmp_path / "out" / "transforms.json", radius=1.0).poses)
    np.testing.assert_allclose(vectors, expected["camera"][:VIEWS], atol=1e-6)
