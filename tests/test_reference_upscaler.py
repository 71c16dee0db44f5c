"""The upscaler's network of both backends against diffusers' UNet2DConditionModel with K blocks and the same random weights."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BACKENDS, FLOAT16_RMS, FLOAT32_RMS, Backend, assert_close, from_numpy, gradients, make_upscaler, set_dtype
from upscalers import CONFIGS, FIXTURES, TINY, UpscalerInputs, diffusers_upscaler, run_upscaler, upscaler_inputs

import mvmlx.model
import mvmlx.upscaler
import mvtorch.model
import mvtorch.upscaler
from mvshared.attention import AttentionOptions
from mvshared.config import SD_X2_UNET, KUNetConfig
from mvshared.errors import OptionError


def run_diffusers(config: KUNetConfig, inputs: UpscalerInputs) -> torch.Tensor:
    """What diffusers computes for the views, one text and one noise level per picture."""
    views = inputs.sample.shape[1]
    context = np.zeros((len(inputs.noise), 1, 8), np.float32) if inputs.context is None else inputs.context
    noise, text, condition = (
        torch.from_numpy(x).repeat_interleave(views, dim=0) for x in (inputs.noise, context, inputs.condition)
    )
    pictures = torch.from_numpy(inputs.sample).flatten(0, 1).permute(0, 3, 1, 2)
    with torch.no_grad():
        out: Any = diffusers_upscaler(config)(pictures, noise, encoder_hidden_states=text, timestep_cond=condition)
    return out.sample.permute(0, 2, 3, 1).unflatten(0, inputs.sample.shape[:2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_one_call_is_that_of_diffusers(name: str, backend: Backend) -> None:
    config = CONFIGS[name]
    inputs = upscaler_inputs(config, batch=2, views=3, size=(16, 24))
    assert_close(run_upscaler(make_upscaler(config, backend), inputs), run_diffusers(config, inputs), rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_view_of_the_smallest_size_is_that_of_diffusers(backend: Backend) -> None:
    inputs = upscaler_inputs(TINY, batch=1, views=1, size=(16, 16))
    assert_close(run_upscaler(make_upscaler(TINY, backend), inputs), run_diffusers(TINY, inputs), rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_stays_close(backend: Backend) -> None:
    inputs = upscaler_inputs(TINY)
    half = run_upscaler(set_dtype(make_upscaler(TINY, backend), "float16"), inputs)
    assert_close(half, run_upscaler(make_upscaler(TINY, backend), inputs), rms=FLOAT16_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("implementation", ["plain", "sliced"])
def test_every_way_of_attention_computes_the_same(implementation: Any, backend: Backend) -> None:
    inputs = upscaler_inputs(TINY)
    options = AttentionOptions(implementation=implementation, budget_bytes=1000)
    assert_close(
        run_upscaler(make_upscaler(TINY, backend, options=options), inputs),
        run_upscaler(make_upscaler(TINY, backend), inputs),
        rms=FLOAT32_RMS,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_know_nothing_of_each_other(backend: Backend) -> None:
    model, inputs = make_upscaler(TINY, backend), upscaler_inputs(TINY)
    alone = run_upscaler(model, inputs._replace(sample=inputs.sample[:, 1:2]))
    assert_close(alone, run_upscaler(model, inputs)[:, 1:2], rms=FLOAT32_RMS)


@pytest.mark.parametrize("package", [mvtorch.model, mvmlx.model])
def test_names_and_shapes_at_full_size_are_those_of_the_public_network(package: Any) -> None:
    manifest = json.loads((FIXTURES / "manifests" / "sd_x2_latent_upscaler_unet.json").read_text())
    expected = {name: tuple(shape) for name, shape in manifest.get("tensors", manifest).items()}
    assert package.network_shapes(SD_X2_UNET) == expected
    assert len(expected) == 639
    assert sum(int(np.prod(shape)) for shape in expected.values()) == 372_560_645


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_both_backends_are_the_same(checkpointing: bool) -> None:
    inputs = upscaler_inputs(TINY, batch=1, views=2, size=(16, 16))
    found = {}
    for backend in BACKENDS:
        model = make_upscaler(TINY, backend, gradient_checkpointing=checkpointing)

        def loss(network: Any) -> Any:
            sample, noise, context, condition = (from_numpy(network, x) for x in inputs)
            return (network(sample, noise, text=network.keys_values(context), condition=condition) ** 2).mean()

        found[backend] = gradients(model, loss)
    assert found["torch"].keys() == found["mlx"].keys() == dict(make_upscaler(TINY, "torch").named_parameters()).keys()
    for name, gradient in found["torch"].items():
        if not name.endswith(".to_k.bias"):  # adds the same to every score of a query, which the softmax does not see
            assert_close(found["mlx"][name], gradient, rms=1e-4)


def expect(match: str, backend: Backend, inputs: UpscalerInputs, config: KUNetConfig = TINY) -> None:
    with pytest.raises(OptionError, match=match):
        run_upscaler(make_upscaler(config, backend), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_that_do_not_fit_are_refused(backend: Backend) -> None:
    good = upscaler_inputs(TINY)
    expect("sample must be of shape", backend, good._replace(sample=good.sample[..., :7]))
    expect("sample must be of a height", backend, good._replace(sample=good.sample[:, :, :12]))
    expect("sample must be of a height", backend, good._replace(sample=good.sample[:, :, :8]))
    expect("noise must be of shape", backend, good._replace(noise=good.noise[:1]))
    expect("condition must be of shape", backend, good._replace(condition=good.condition[:, :-1]))
    expect("context must be of shape", backend, good._replace(context=None))
    assert good.context is not None
    expect("text must be of 2 texts", backend, good._replace(context=good.context[:1]))
    plain = CONFIGS["no attention"]
    without = upscaler_inputs(plain)
    expect("context must be None", backend, without._replace(context=good.context), plain)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"block_out_channels": (32, 48, 64, 64)}, "multiples of 32"),
        ({"in_channels": 9}, "twice the 4 latent channels"),
        ({"attention_levels": (True, True)}, "one entry per level"),
        ({"cross_attention_dim": None}, "exactly if a level attends"),
        ({"attention_head_dim": 48}, "multiple of attention_head_dim"),
        ({"block_out_channels": (32, 32, 64, 96)}, "two coarsest levels"),
        ({"layers_per_block": 0}, "at least 1"),
    ],
)
def test_configs_that_make_no_network_are_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        replace(TINY, **changes)
