"""Tiny complete checkpoints against what the public reference code computes with them; tests/fixtures/README.md says how."""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import BACKENDS, FLOAT32_RMS, Backend, assert_close, assert_different, from_numpy, to_numpy
from numpy.typing import NDArray
from safetensors.numpy import load_file

import mvmlx.model
import mvmlx.unet
import mvtorch.model
import mvtorch.unet
from mvshared.errors import OptionError
from mvshared.names import ldm_unet_names
from mvshared.public_configs import ldm_unet

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("tiny-mvdream", "tiny-imagedream")
VIEWS = 4


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
        reference=given["in_ip_img"].transpose(0, 2, 3, 1) if image else None,
        out=views(given["out"]).transpose(0, 1, 3, 4, 2),
    )


def call(model: Any, given: Call, *, image_scale: float = 1.0) -> NDArray[np.float32]:
    def array(x: NDArray[np.float32] | None) -> Any:
        return from_numpy(model, None if x is None else np.ascontiguousarray(x))

    with torch.no_grad():
        image_states = array(given.image_states)
        cross = model.cross_keys_values(array(given.context), image_states=image_states, image_scale=image_scale)
        conditions = {"cross": cross, "camera": array(given.camera), "reference": array(given.reference)}
        return to_numpy(model(array(given.sample), array(given.timesteps), **conditions))


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
