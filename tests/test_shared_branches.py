"""What the branches of guidance have in common is computed once, and changes nothing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.nn
import numpy as np
import pytest
import torch
from helpers import (
    BACKENDS,
    TINY_MODEL,
    TINY_UNET,
    Backend,
    assert_close,
    assert_different,
    from_numpy,
    make_unet,
    to_numpy,
    unet_inputs,
)

import mvmlx.model
import mvtorch.model
from mvshared.attention import AttentionOptions
from mvshared.backend import load
from mvshared.config import CLIPImageConfig, CLIPTextConfig, CLIPVisionConfig, ResamplerConfig, UNetConfig
from mvshared.errors import OptionError
from mvshared.guidance import ALL, Branch, frames_are_alike
from mvshared.memory.plan import MemoryPlan
from mvshared.networks import Networks

PACKAGES: dict[Backend, Any] = {"torch": mvtorch, "mlx": mvmlx}
MVDREAM = Path(__file__).parent / "fixtures" / "tiny-mvdream"
EXACT_RMS = 2e-6  # products of fewer rows may be added up in another order
HEIGHT, WIDTH, TEXT = 8, 12, 7
NO_TEXT, NO_PICTURE = ALL._replace(text=False), ALL._replace(image=False)
NOTHING = Branch(text=False, image=False, normals=True)

RESAMPLER = ResamplerConfig(
    hidden_dim=32, depth=1, dim_head=16, heads=2, num_queries=3, embedding_dim=40, output_dim=TINY_UNET.cross_attention_dim or 0
)
TEXT_TOWER, VISION_TOWER = CLIPTextConfig(num_attention_heads=2), CLIPVisionConfig(num_attention_heads=2)
CAMERAS = replace(TINY_UNET, camera_dim=16)
PICTURES = replace(CAMERAS, resampler=RESAMPLER)
FRAMES = replace(PICTURES, reference_frame=True)
NORMALS = replace(CAMERAS, in_channels=8)
CONFIGS: dict[str, tuple[UNetConfig, Sequence[Branch]]] = {
    "text": (TINY_UNET, (NO_TEXT, ALL)),
    "cameras": (CAMERAS, (NO_TEXT, ALL)),
    "image tokens": (PICTURES, (NOTHING, ALL)),
    "three branches": (PICTURES, (NOTHING, NO_TEXT, ALL)),
    "a reference frame that all see": (FRAMES, (NO_TEXT, ALL)),
    "normal maps that all see": (NORMALS, (NO_TEXT, ALL)),
    "no attention at the finest level": (replace(CAMERAS, attention_levels=(False, True)), (NO_TEXT, ALL)),
    "attention in the middle alone": (replace(CAMERAS, attention_levels=(False, False)), (NO_TEXT, ALL)),
    "deeper": (replace(CAMERAS, layers_per_block=(2, 1), transformer_layers_per_block=(2, 1)), (NO_TEXT, ALL)),
    "convolutions around the blocks": (replace(CAMERAS, use_linear_projection=False), (NO_TEXT, ALL)),
}
APART: dict[str, tuple[UNetConfig, Sequence[Branch]]] = {
    "a reference frame that one sees": (FRAMES, (NOTHING, ALL)),
    "normal maps that one sees": (NORMALS, (ALL._replace(normals=False), ALL)),
    "no cross-attention": (replace(CAMERAS, cross_attention_dim=None), (NO_PICTURE, ALL)),
    "no attention at all": (replace(CAMERAS, attention_levels=(False, False), mid_attention=False), (NO_TEXT, ALL)),
}


def normal(*shape: int, seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def model_of(config: UNetConfig, backend: Backend, *, options: AttentionOptions | None = None) -> Any:
    unet = make_unet(config, backend) if options is None else make_unet(config, backend, options=options)
    kind = {"torch": mvtorch.model, "mlx": mvmlx.model}[backend].MultiViewModel
    text = None if config.cross_attention_dim is None else replace(TEXT_TOWER, hidden_size=config.cross_attention_dim)
    vision = None if config.resampler is None else replace(VISION_TOWER, hidden_size=config.resampler.embedding_dim)
    processor = None if vision is None else CLIPImageConfig()
    given = replace(TINY_MODEL, unet=config, text_encoder=text, image_encoder=vision, image_processor=processor)
    return kind(given, Networks({"unet": lambda: unet}), device="cpu", dtype="float32", weight_files=[])


def conditioned(model: Any, branches: Sequence[Branch], *, views: int) -> Any:
    config = model.config.unet
    text = None if config.cross_attention_dim is None else normal(2, TEXT, config.cross_attention_dim, seed=1)
    states = None if config.resampler is None else normal(1, 5, config.resampler.embedding_dim, seed=2)
    frame = normal(1, HEIGHT, WIDTH, 4, seed=3) if config.reference_frame else None
    maps = normal(views, HEIGHT, WIDTH, config.normal_channels, seed=4) if config.normal_channels else None
    text, states, frame, maps = (None if each is None else model.from_numpy(each) for each in (text, states, frame, maps))
    return model.condition(
        text=text,
        image_states=states,
        cameras=None if config.camera_dim is None else normal(views, config.camera_dim, seed=5),
        reference=frame,
        normals=maps,
        branches=branches,
        timesteps=[481.0],
    )


def outputs(model: Any, branches: Sequence[Branch], *, views: int, t: float = 481.0) -> Any:
    """Those of every branch (b, v, h, w, c)."""
    given = conditioned(model, branches, views=views)
    x = model.from_numpy(normal(views, HEIGHT, WIDTH, 4, seed=6))
    with torch.no_grad():
        return to_numpy(model._outputs(x, t, given, slice(0, len(branches))))


def whole(model: Any, branches: Sequence[Branch], *, views: int) -> Any:
    """The same by the U-Net itself, which is given everything for every branch."""
    given, config = conditioned(model, branches, views=views), model.config.unet
    sample = np.stack([normal(views, HEIGHT, WIDTH, 4, seed=6)] * len(branches))
    if config.normal_channels:
        maps = normal(views, HEIGHT, WIDTH, config.normal_channels, seed=4)
        sample = np.concatenate([sample, np.stack([maps * np.float32(branch.normals) for branch in branches])], axis=-1)
    with torch.no_grad():
        times = model.unet.time_embeddings(model.from_numpy(np.full(len(branches), 481.0, np.float32)))
        return to_numpy(model.unet(model.from_numpy(sample), times, given.constants))


@contextmanager
def rows(unet: Any) -> Iterator[dict[str, list[int]]]:
    """How many rows some layers are given, by their names. No hooks, with which nothing is shared."""
    seen: dict[str, list[int]] = {}
    names = {id(module): name for name, module in unet.named_modules()}

    def counting(kind: Any, call: str) -> Any:
        inner = getattr(kind, call)

        def counted(module: Any, x: Any) -> Any:
            if id(module) in names:
                seen.setdefault(names[id(module)], []).append(x.shape[0])
            return inner(module, x)

        return counted

    library, call = (torch.nn, "forward") if isinstance(unet, torch.nn.Module) else (mlx.nn, "__call__")
    with pytest.MonkeyPatch.context() as patch:
        for kind in (library.Conv2d, library.Linear):
            patch.setattr(kind, call, counting(kind, call))
        yield seen


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize(("config", "branches"), (CONFIGS | APART).values(), ids=CONFIGS | APART)
@pytest.mark.parametrize("backend", BACKENDS)
def test_branches_come_out_as_if_each_had_everything_of_its_own(
    config: UNetConfig, branches: Sequence[Branch], views: int, backend: Backend
) -> None:
    model = model_of(config, backend)
    expected = whole(model, branches, views=views)
    assert_close(outputs(model, branches, views=views), expected, rms=EXACT_RMS)
    if config.cross_attention_dim is not None and (any(config.attention_levels) or config.mid_attention):
        assert_different(expected[0], expected[1], rms=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_comes_before_the_first_cross_attention_is_computed_for_one_branch(name: str, backend: Backend) -> None:
    config, branches = CONFIGS[name]
    model = model_of(config, backend)
    frames, count = 3 + config.reference_frame, len(branches)
    with rows(model.unet) as seen:
        outputs(model, branches, views=3)
    levels = [level for level, attends in enumerate(config.attention_levels) if attends]
    first = f"down_blocks.{levels[0]}" if levels else "mid_block"
    assert seen["conv_in"] == seen["down_blocks.0.resnets.0.conv1"] == seen[f"{first}.resnets.0.conv2"] == [frames]
    block = f"{first}.attentions.0.transformer_blocks.0"
    assert seen[f"{block}.attn1.to_q"] == seen[f"{block}.attn2.to_q"] == [1]
    assert seen[f"{block}.ff.net.2"] == seen[f"{block}.attn2.to_out.0"] == [count]
    assert seen["up_blocks.0.resnets.0.conv1"] == seen["mid_block.resnets.1.conv1"] == [frames * count]
    assert seen["conv_out"] == [3 * count]


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("backend", BACKENDS)
def test_branches_whose_frames_differ_or_that_attend_to_nothing_share_nothing(name: str, backend: Backend) -> None:
    config, branches = APART[name]
    model = model_of(config, backend)
    with rows(model.unet) as seen:
        outputs(model, branches, views=3)
    assert seen["conv_in"] == [(3 + config.reference_frame) * len(branches)]


@pytest.mark.parametrize("options", [AttentionOptions(kv_pooling=2), AttentionOptions(implementation="plain")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_way_of_attention_takes_the_queries_of_one_branch(backend: Backend, options: AttentionOptions) -> None:
    config, branches = CONFIGS["three branches"]
    model = model_of(config, backend, options=options)
    assert_close(outputs(model, branches, views=2), whole(model, branches, views=2), rms=EXACT_RMS)
    sliced = replace(options, implementation="sliced", budget_bytes=50 * 4 * TEXT)
    model = model_of(config, backend, options=sliced)
    assert_close(outputs(model, branches, views=2), whole(model, branches, views=2), rms=EXACT_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_timestep_that_was_not_announced_is_shared_too(backend: Backend) -> None:
    config, branches = CONFIGS["cameras"]
    model = model_of(config, backend)
    with rows(model.unet) as seen:
        other = outputs(model, branches, views=2, t=17.5)
    assert seen["conv_in"] == [2]
    assert_different(other, outputs(model, branches, views=2), rms=1e-3)
    assert_close(outputs(model, branches[:1], views=2, t=17.5), other[:1], rms=EXACT_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_that_are_observed_are_those_of_all_branches(backend: Backend) -> None:
    config, branches = CONFIGS["cameras"]
    model = model_of(config, backend)
    expected = outputs(model, branches, views=3)
    seen: dict[str, Any] = {}
    with PACKAGES[backend].observe(model.unet, lambda name, array, seconds: seen.update({name: tuple(array.shape)})):
        assert_close(outputs(model, branches, views=3), expected, rms=EXACT_RMS)
    assert seen["conv_in"] == seen["down_blocks.0.resnets.0"] == (6, HEIGHT, WIDTH, 32)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert seen[f"{block}.norm1"] == seen[f"{block}.attn2"] == seen[block] == (2, 3 * HEIGHT * WIDTH, 32)
    assert seen["camera_embedding"] == (2, 3, 128)


def test_a_hook_on_any_layer_shows_all_branches() -> None:
    config, branches = CONFIGS["cameras"]
    model, shapes = model_of(config, "torch"), []
    model.unet.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda module, args, out: shapes.append(out.shape[0]))
    outputs(model, branches, views=3)
    assert shapes == [6]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_network_itself_takes_one_sample_for_all_that_attend_to_different_things(backend: Backend) -> None:
    unet = make_unet(CAMERAS, backend)
    inputs = unet_inputs(CAMERAS, batch=3, views=2)
    assert inputs.context is not None and inputs.camera is not None
    sample, times, camera = inputs.sample[:1], inputs.timesteps[1:2], inputs.camera[:1]

    def call(copies: int, *, times_copies: int | None = None) -> Any:
        many = (np.repeat(each, copies, axis=0) for each in (sample, camera))
        given, cameras = (from_numpy(unet, each) for each in many)
        with torch.no_grad():
            constants = unet.constants(from_numpy(unet, inputs.context))._replace(
                camera=unet._embed_cameras(cameras, references=0)
            )
            embedded = unet.time_embeddings(from_numpy(unet, np.repeat(times, times_copies or copies)))
            return to_numpy(unet(given, embedded, constants))

    assert call(1).shape[:2] == (3, 2)
    assert_close(call(1), call(3), rms=EXACT_RMS)
    with pytest.raises(OptionError, match="cross must be of 2 objects, or the sample of one, got 3"):
        call(2)
    with pytest.raises(OptionError, match=r"times must be of shape \(1, 128\), one per object, got \(3, 128\)"):
        call(1, times_copies=3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_is_that_of_branches_one_by_one(backend: Backend) -> None:
    pipeline: Any = load(MVDREAM, backend=backend, device="cpu", dtype="float32")
    given: dict[str, Any] = {"prompt": "an owl", "negative_prompt": "blurry", "views": 2, "size_px": 64, "steps": 3, "seed": 0}
    given |= {"guidance": 3.0, "guidance_interval": (0.0, 0.7), "guidance_rescale": 0.5}
    latents = pipeline.generate(**given).latents
    pipeline.memory = MemoryPlan(branches_at_once=False)
    assert_close(latents, pipeline.generate(**given).latents, rms=2e-5)


def test_frames_are_alike_unless_a_branch_does_not_see_what_is_in_them() -> None:
    for references in (False, True):
        for normals in (False, True):
            there = {"references": references, "normals": normals}
            assert frames_are_alike([NO_TEXT, ALL], **there)
            assert frames_are_alike([NOTHING, ALL], **there) is not references
            assert frames_are_alike([ALL._replace(normals=False), ALL], **there) is not normals
            assert frames_are_alike([NOTHING], **there)
