"""The U-Net of both backends against diffusers' UNet2DConditionModel with the same random weights.

diffusers has neither joint attention over views nor cameras: there, a processor regroups the tokens of attn1, and a hook adds
the camera embedding to the time embedding.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from helpers import (
    BACKENDS,
    FLOAT32_RMS,
    TINY_UNET,
    Backend,
    UNetInputs,
    assert_close,
    denoise,
    from_numpy,
    make_unet,
    norm_eps,
    unet_inputs,
)

import mvmlx.layers
import mvtorch.layers
from mvshared.config import UNetConfig
from mvshared.errors import OptionError
from mvtorch.diffusers_model import unet_arguments

LINEAR = replace(TINY_UNET, transformer_layers_per_block=(2, 1))
CONFIGS = {
    "linear projections, depth 2": LINEAR,
    "convolutional projections": replace(LINEAR, use_linear_projection=False),
    "eight input channels": replace(TINY_UNET, in_channels=8),
    "heads by width": replace(TINY_UNET, num_attention_heads=None, attention_head_dim=16),
    "no attention in the middle": replace(TINY_UNET, mid_attention=False),
    "no cross-attention": replace(TINY_UNET, cross_attention_dim=None),
    "no attention at all": replace(
        TINY_UNET, attention_levels=(False, False), mid_attention=False, cross_attention_dim=None, norm_eps=1e-6
    ),
    "one level": UNetConfig(
        block_out_channels=(32,),
        layers_per_block=(2,),
        transformer_layers_per_block=(1,),
        attention_levels=(True,),
        num_attention_heads=(4,),
        cross_attention_dim=8,
        norm_num_groups=16,
    ),
    "different levels": UNetConfig(
        block_out_channels=(32, 32, 64, 48),
        layers_per_block=(1, 3, 2, 1),
        transformer_layers_per_block=(1, 2, 3, 1),
        attention_levels=(False, True, True, False),
        num_attention_heads=(2, 4, 8, 6),
        cross_attention_dim=16,
        norm_num_groups=16,
    ),
}
MULTI_VIEW = replace(LINEAR, camera_dim=16)
REFERENCE = replace(MULTI_VIEW, reference_frame=True)


class JointAttention:
    """A diffusers attention processor over the tokens of `frames` frames together."""

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        n, tokens, channels = hidden_states.shape
        joint = hidden_states.reshape(n // self.frames, self.frames * tokens, channels)
        return AttnProcessor()(attn, joint, *args, **kwargs).reshape(n, tokens, channels)


def diffusers_unet(config: UNetConfig) -> UNet2DConditionModel:
    """diffusers' model of a config, with the weights of `make_unet`; they must fit exactly."""
    oracle = UNet2DConditionModel(**unet_arguments(config))
    if config.cross_attention_dim is None:  # diffusers' blocks can do without, its U-Net cannot ask for it
        for block in oracle.modules():
            if isinstance(block, BasicTransformerBlock):
                block.norm2, block.attn2 = None, None
    weights = make_unet(config, "torch").state_dict()
    oracle.load_state_dict({name: x for name, x in weights.items() if not name.startswith("camera_embedding.")})
    return oracle.eval()


def denoise_with_diffusers(config: UNetConfig, inputs: UNetInputs) -> torch.Tensor:
    """What diffusers computes for the views (b, v, h, w, out_channels)."""
    oracle, ours = diffusers_unet(config), make_unet(config, "torch")
    sample, timesteps, context, camera, reference = (from_numpy(ours, x) for x in inputs)
    b, views = sample.shape[:2]
    if reference is not None:
        count = reference.shape[1]
        clean = torch.zeros_like(sample[:, :1]).repeat(1, count, 1, 1, 1)
        clean[..., : config.out_channels] = reference
        sample = torch.cat([sample, clean], dim=1)
        camera = None if camera is None else torch.cat([camera, camera.new_zeros(b, count, camera.shape[2])], dim=1)
    frames = sample.shape[1]
    processors: dict[str, Any] = {
        name: JointAttention(frames) if ".attn1." in name else AttnProcessor() for name in oracle.attn_processors
    }
    oracle.set_attn_processor(processors)
    if camera is not None:
        oracle.time_embedding.register_forward_hook(lambda module, args, out: out + ours.camera_embedding(camera.flatten(0, 1)))
    with torch.no_grad():
        out = oracle(
            sample.flatten(0, 1).permute(0, 3, 1, 2),
            timesteps.repeat_interleave(frames),
            encoder_hidden_states=None if context is None else context.repeat_interleave(frames, dim=0),  # pyright: ignore
        ).sample
    return out.permute(0, 2, 3, 1).unflatten(0, (b, frames))[:, :views]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_one_view_without_camera_is_the_plain_unet(name: str, backend: Backend) -> None:
    config = CONFIGS[name]
    inputs = unet_inputs(config, size=(16, 24))
    oracle, model = diffusers_unet(config), make_unet(config, backend)
    sample, timesteps, context = (from_numpy(oracle, x) for x in inputs[:3])
    with torch.no_grad():
        expected = oracle(sample[:, 0].permute(0, 3, 1, 2), timesteps, encoder_hidden_states=context).sample
    assert_close(denoise(model, inputs)[:, 0], expected.permute(0, 2, 3, 1), rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("views", [1, 2, 4, 8])
def test_views_with_cameras_attend_to_each_other_as_in_mvdream(views: int, backend: Backend) -> None:
    inputs = unet_inputs(MULTI_VIEW, views=views)
    expected = denoise_with_diffusers(MULTI_VIEW, inputs)
    assert_close(denoise(make_unet(MULTI_VIEW, backend), inputs), expected, rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("views", [1, 4])
@pytest.mark.parametrize("in_channels", [4, 8])
def test_the_reference_is_one_more_frame_with_a_zero_camera_as_in_imagedream(
    in_channels: int, views: int, backend: Backend
) -> None:
    config = replace(REFERENCE, in_channels=in_channels)
    inputs = unet_inputs(config, views=views)
    expected = denoise_with_diffusers(config, inputs)
    assert_close(denoise(make_unet(config, backend), inputs), expected, rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_references_are_as_many_frames(backend: Backend) -> None:
    inputs = unet_inputs(REFERENCE, views=2)
    assert inputs.reference is not None
    inputs = inputs._replace(reference=np.concatenate([inputs.reference, -inputs.reference, inputs.reference / 2], axis=1))
    expected = denoise_with_diffusers(REFERENCE, inputs)
    assert_close(denoise(make_unet(REFERENCE, backend), inputs), expected, rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_camera_and_reference_neither_is_there(backend: Backend) -> None:
    inputs = unet_inputs(REFERENCE, views=2)._replace(camera=None, reference=None)
    expected = denoise_with_diffusers(REFERENCE, inputs)
    assert_close(denoise(make_unet(REFERENCE, backend), inputs), expected, rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["different levels", "no attention at all"])
def test_every_norm_has_the_eps_of_diffusers(name: str, backend: Backend) -> None:
    eps = norm_eps(make_unet(CONFIGS[name], backend))
    assert eps == norm_eps(diffusers_unet(CONFIGS[name]))
    assert len(eps) > 10


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_timestep_embedding_is_diffusers_with_cosines_first(backend: Backend) -> None:
    timesteps = torch.tensor([0.0, 0.25, 1.0, 500.0, 999.0])
    expected = get_timestep_embedding(timesteps, 32, flip_sin_to_cos=True, downscale_freq_shift=0)
    layers: Any = mvtorch.layers if backend == "torch" else mvmlx.layers
    array = timesteps if backend == "torch" else from_numpy(None, timesteps.numpy())
    assert_close(layers.timestep_embedding(array, 32), expected, rms=FLOAT32_RMS)
    with pytest.raises(OptionError, match="channels must be even"):
        layers.timestep_embedding(array, 31)
