"""NaN and infinity: found in the block, the step and the view where they begin, and never written as pictures."""

import json
import shutil
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from helpers import BACKENDS, TINY_MODEL, Backend, assert_close, normal_maps, write_tiny_model
from safetensors.numpy import load_file, save_file
from upscalers import write_tiny_models

import mvshared.memory.plan
from mvshared.backend import load
from mvshared.blocks import Call
from mvshared.cli import run
from mvshared.errors import NumericsError, OptionError, OutputError
from mvshared.images import from_model
from mvshared.memory.plan import MemoryPlan
from mvshared.numerics import check_views, frames_with_nan
from mvshared.upscaling.latents import view_bytes

FIXTURES = Path(__file__).parent / "fixtures"
PICTURE = FIXTURES / "tiny-imagedream" / "input.png"
SIZE_PX = 64
TOKENS = (SIZE_PX // 8) ** 2  # of a view


def imagedream(backend: Backend, *, dtype: str = "float32") -> Any:
    return load(FIXTURES / "tiny-imagedream", backend=backend, device="cpu", dtype=dtype)


def generate(pipeline: Any, folder: Path | None, **options: Any) -> Any:
    given = {"prompt": "an owl", "negative_prompt": "", "steps": 3, "size_px": SIZE_PX}
    return pipeline.generate(PICTURE, check_numerics=folder, **(given | options))


def break_block(network: Any, path: str, when: Any = lambda out: True, part: Any = ...) -> None:
    """From now on a block's output is NaN in `part` of it, a numpy index of (n, h, w, c) or (n, l, c), where `when(calls)`."""
    parent, _, name = path.rpartition(".")
    holder = network
    for step in filter(None, parent.split(".")):
        holder = holder[int(step)] if step.isdecimal() else getattr(holder, step)
    block = holder[int(name)] if name.isdecimal() else getattr(holder, name)
    kind, calls = type(block), []
    method = "forward" if hasattr(kind, "forward") else "__call__"
    original = getattr(kind, method)

    @wraps(original)
    def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        calls.append(out)
        if not when(len(calls)):
            return out
        mask = np.zeros(out.shape if method == "__call__" or out.ndim != 4 else np.array(out.shape)[[0, 2, 3, 1]], np.float32)
        mask[part] = np.nan
        if method == "__call__":
            return out + type(out)(mask)
        return out + out.new_tensor(mask if out.ndim != 4 else mask.transpose(0, 3, 1, 2))

    object.__setattr__(block, "__class__", type(kind.__name__, (kind,), {method: broken}))


def report(error: NumericsError) -> dict[str, Any]:
    assert error.path is not None
    return json.loads(error.path.with_suffix(".json").read_text())


# Where it begins

BEGINNINGS = [
    # network, block, the call of the block that breaks, part of its output; step and view
    ("text_encoder", "encoder.layers.1.mlp.fc1", 1, (1,), None, "prompt"),
    ("text_encoder", "final_layer_norm", 1, (0,), None, "negative prompt"),
    ("image_encoder", "encoder.layers.0.self_attn.q_proj", 1, ..., None, "picture 0"),
    ("vae", "encoder.down_blocks.0.resnets.0.conv1", 1, ..., None, "picture 0"),
    ("unet", "image_embed.proj_in", 1, ..., None, None),
    ("unet", "conv_in", 1, (1,), 1, "view 1"),
    ("unet", "mid_block.resnets.0.conv1", 2, (7,), 2, "view 2"),  # of the second branch: 4 views and a reference frame each
    ("unet", "mid_block.resnets.0.conv1", 3, (slice(4, 9),), 3, "view 0"),
    ("unet", "mid_block.resnets.0.conv1", 1, (4,), 1, "reference frame 0"),
    ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0", 2, (0, 3 * TOKENS + 5), 2, "view 3"),
    ("unet", "time_embedding.linear_2", 1, ..., None, None),  # of all steps at once, before the first
    ("unet", "conv_out", 3, (6,), 3, "view 2"),  # behind the last level the reference frame is gone
    ("vae", "post_quant_conv", 3, ..., None, "view 2"),  # one view at a time
    ("vae", "decoder.up_blocks.1.resnets.0.conv2", 2, ..., None, "view 1"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("network", "block", "call", "part", "step", "view"), BEGINNINGS)
def test_the_first_block_step_and_view_are_named_and_the_inputs_saved(
    tmp_path: Path, backend: Backend, network: str, block: str, call: int, part: Any, step: int | None, view: str | None
) -> None:
    pipeline = imagedream(backend)
    break_block(pipeline.model.networks[network], block, lambda number: number == call, part)
    with pytest.raises(NumericsError) as caught:
        generate(pipeline, tmp_path / "nan")
    error = caught.value
    assert (error.where, error.step, error.view) == (f"{network}.{block}", step, view)
    document = report(error)
    assert (document["block"], document["step"], document["dtype"]) == (error.where, step, "float32")
    assert document["views"][:1] == ([] if view is None else [view])
    assert document["output"]["nan"] > 0
    assert error.path is not None
    with np.load(error.path) as inputs:
        assert {name: list(inputs[name].shape) for name in inputs} == {
            name: described["shape"] for name, described in document["inputs"].items()
        }
        assert all(np.isfinite(inputs[name]).all() for name in inputs)
    assert str(error.path) in error.hint
    assert sorted(path.suffix for path in (tmp_path / "nan").iterdir()) == [".json", ".npz"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_saved_inputs_are_those_of_the_block(tmp_path: Path, backend: Backend) -> None:
    pipeline = imagedream(backend)
    seen: list[dict[str, Any]] = []

    def on_start(call: Call[Any]) -> None:
        if call.name == "unet.mid_block.resnets.0":
            seen.append({name: pipeline.model.to_numpy(array) for name, array in call.inputs.items()})

    with pipeline.model.observe_blocks(lambda block: None, on_start):
        generate(pipeline, None)
    break_block(pipeline.model.unet, "mid_block.resnets.0", lambda number: number == 2)
    with pytest.raises(NumericsError) as caught:
        generate(pipeline, tmp_path)
    assert caught.value.path == tmp_path / "unet.mid_block.resnets.0-step_0002.npz"
    with np.load(tmp_path / "unet.mid_block.resnets.0-step_0002.npz") as inputs:
        assert set(inputs) == {"x", "emb"}
        for name in inputs:
            np.testing.assert_array_equal(inputs[name], seen[1][name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_beyond_float16_are_found_where_they_leave_it(tmp_path: Path, backend: Backend) -> None:
    """Of a convolution whose weights are 60,000 times as large; what it was given is saved in float16."""
    pipeline = imagedream(backend, dtype="float16")
    conv = pipeline.model.unet.up_blocks[0].resnets[0].conv2
    if backend == "torch":  # it is packed
        conv.packed = conv.packed * 60000
    else:
        conv.weight = conv.weight * 60000
    with pytest.raises(NumericsError) as caught:
        generate(pipeline, tmp_path)
    assert (caught.value.where, caught.value.step) == ("unet.up_blocks.0.resnets.0.conv2", 1)
    assert 'dtype="float32"' in caught.value.hint
    assert caught.value.path is not None
    with np.load(caught.value.path) as inputs:
        assert inputs["x"].dtype == np.float16
    document = report(caught.value)
    assert document["dtype"] == document["inputs"]["x"]["dtype"] == "float16"
    assert 0 < document["inputs"]["x"]["largest_finite"] < 65504


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_and_whole_numbers_are_saved(tmp_path: Path, backend: Backend) -> None:
    pipeline = imagedream(backend, dtype="bfloat16")
    break_block(pipeline.model.networks["text_encoder"], "embeddings")
    with pytest.raises(NumericsError) as caught:
        generate(pipeline, tmp_path / "text")
    assert caught.value.path is not None
    with np.load(caught.value.path) as inputs:
        assert (inputs["ids"].dtype.kind, inputs["ids"].shape) == ("i", (2, 77))
    pipeline = imagedream(backend, dtype="bfloat16")
    break_block(pipeline.model.unet, "mid_block.resnets.0")
    with pytest.raises(NumericsError) as caught:
        generate(pipeline, tmp_path / "unet")
    assert caught.value.path is not None
    with np.load(caught.value.path) as inputs:
        assert inputs["x"].dtype == np.float32
    assert report(caught.value)["inputs"]["x"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_that_is_given_nan_says_so(tmp_path: Path, backend: Backend) -> None:
    pipeline = imagedream(backend)
    original = pipeline.model.encode_latents
    pipeline.model.encode_latents = lambda pixels: float("nan") * original(pixels)
    with pytest.raises(NumericsError, match=", which the block is given, has some already") as caught:
        generate(pipeline, tmp_path)
    assert caught.value.where == "unet.conv_in"


@pytest.mark.parametrize("backend", BACKENDS)
def test_normal_maps_are_told_from_pictures(tmp_path: Path, backend: Backend) -> None:
    config = replace(TINY_MODEL, unet=replace(TINY_MODEL.unet, in_channels=8))
    pipeline: Any = load(write_tiny_model(tmp_path / "model", config), backend=backend, device="cpu")
    break_block(pipeline.model.vae, "encoder.conv_in", lambda number: number == 3)  # the first is the picture
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    with pytest.raises(NumericsError) as caught:
        pipeline.generate(picture, normals=list(normal_maps(2)), views=2, steps=1, size_px=32, check_numerics=tmp_path / "nan")
    assert caught.value.view == "normal map 1"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_check_that_finds_nothing_changes_and_writes_nothing(tmp_path: Path, backend: Backend) -> None:
    pipeline = imagedream(backend)
    plain, checked = generate(pipeline, None), generate(pipeline, tmp_path / "nan")
    assert_close(checked.latents, plain.latents, rms=1e-5)  # fused layers run one by one while they are looked at
    assert np.abs(checked.images.astype(int) - plain.images).max() <= 1
    assert not (tmp_path / "nan").exists()


def test_without_a_check_no_block_is_watched() -> None:
    pipeline = imagedream("torch")
    seen: list[int] = []
    generate(
        pipeline,
        None,
        on_step=lambda progress: seen.append(
            sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pipeline.model.unet.modules())
        ),
    )
    assert seen == [0, 0, 0]


def test_a_file_in_place_of_the_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        generate(imagedream("torch"), tmp_path / "file")


def test_frames_are_told_by_the_shape_of_what_a_network_computes() -> None:
    def found(shape: tuple[int, ...], index: Any, **counts: int) -> list[int]:
        finite = np.ones(shape, np.bool_)
        finite[index] = False
        return frames_with_nan(finite, **counts)

    counts = {"objects": 2, "views": 4, "frames": 5}
    assert found((2, 4, 3, 3, 1), (1, 2), **counts) == [2]
    assert found((10, 3, 3, 1), (9,), **counts) == [4]
    assert found((8, 3, 3, 1), (5,), **counts) == [1]
    assert found((10, 7), (slice(3, 7),), **counts) == [0, 1, 3, 4]
    assert found((2, 45, 7), (0, 44), **counts) == [4]
    assert found((2, 7), (0,), **counts) == []
    assert found((2, 77, 7), (0,), **counts) == []
    assert found((3, 9, 7), (2,), objects=1, views=3, frames=3) == [2]


# Pictures made of NaN


def test_values_that_are_not_finite_name_their_view_and_the_way_out() -> None:
    values = np.zeros((3, 2, 2, 3), np.float32)
    assert check_views(values, "the pixels", where="decoding", dtype="float16") is values
    values[1, 0, 0, 0] = np.inf
    values[2] = np.nan
    with pytest.raises(
        NumericsError, match=r"pixels of view 1 are not finite.*dtype=.float32.*check_numerics=FOLDER"
    ) as caught:
        check_views(values, "the pixels", where="decoding", dtype="float16")
    assert (caught.value.view, caught.value.where) == ("view 1", "decoding")
    with pytest.raises(NumericsError, match="weights damaged"):
        check_views(values, "the pixels", where="decoding", dtype="float32")
    with pytest.raises(NumericsError):
        from_model(values)


def decoder_overflow(pipeline: Any, monkeypatch: pytest.MonkeyPatch, *, view: int = 0) -> None:
    """Break the decoder for one view of every decoding, of which each is one call."""
    monkeypatch.setattr(mvshared.memory.plan, "VAE_PIXELS_ON_CPU", 0)
    break_block(pipeline.model.vae, "decoder.conv_out", lambda number: (number - 1) % 4 == view)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_decoder_that_overflows_makes_no_pictures_and_no_previews(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = imagedream(backend)
    decoder_overflow(pipeline, monkeypatch, view=2)
    with pytest.raises(NumericsError, match="decoding: the pixels of view 2 are not finite"):
        generate(pipeline, None)
    with pytest.raises(NumericsError, match="decoding: the pixels of view 2"):
        generate(pipeline, None, on_step=lambda progress: progress.preview())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", ["bilinear", "sd-x2"])
def test_a_decoder_that_overflows_makes_no_upscaled_pictures(
    tmp_path: Path, backend: Backend, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_models(tmp_path)
    pipeline = load(tmp_path / "tiny", backend=backend, device="cpu")
    views = pipeline.generate(np.zeros((32, 32, 3), np.uint8), views=2, steps=1, size_px=32)
    decoder_overflow(pipeline, monkeypatch, view=1)
    with pytest.raises(NumericsError, match="decoding: the pixels of view 1"):
        pipeline.upscale(views, method=method, upscaler=tmp_path / "x2" if method == "sd-x2" else None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_blocks_of_an_upscaler_are_looked_at_too(tmp_path: Path, backend: Backend) -> None:
    write_tiny_models(tmp_path)
    pipeline = load(tmp_path / "tiny", backend=backend, device="cpu")
    views = pipeline.generate(np.zeros((32, 32, 3), np.uint8), views=3, steps=1, size_px=32)
    pipeline.upscale(views, upscaler=tmp_path / "x2", check_numerics=tmp_path / "nan")
    assert not (tmp_path / "nan").exists()
    assert pipeline._upscaler is not None
    upscaler: Any = pipeline._upscaler[1]
    break_block(upscaler.model.unet, "conv_in", lambda number: number == 4)  # two groups of views with two steps each
    height = views.latents.shape[1]
    needed = view_bytes(upscaler.model.config.unet, (height, height), backend=backend, dtype="float32")
    with pytest.raises(NumericsError) as caught:
        pipeline.upscale(views, upscaler=tmp_path / "x2", guidance=1, budget_bytes=2 * needed, check_numerics=tmp_path / "nan")
    assert (caught.value.where, caught.value.step, caught.value.view) == ("upscaler.unet.conv_in", 2, "view 2")


def test_the_command_line_names_the_block_and_writes_no_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES / "tiny-mvdream", "model")
    (path,) = Path("model/unet").glob("*.safetensors")
    weights = load_file(path)
    weights["middle_block.2.in_layers.2.bias"][0] = np.inf
    save_file(weights, path)
    arguments = ["generate", "--model", "model", "--prompt", "x", "--steps", "2", "--backend", "torch", "--device", "cpu"]
    assert run([*arguments, "-o", "views", "--check-numerics", "nan"]) == 10
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "unet.mid_block.resnets.1.conv1: NaN or infinity for the first time (unet, step 1, view 0)" in line
    assert "nan/unet.mid_block.resnets.1.conv1-step_0001.npz" in line
    assert not Path("views").exists()
    assert run([*arguments, "-o", "views"]) == 10
    assert "--check-numerics FOLDER" in capsys.readouterr().err
    assert not Path("views").exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_of_the_vae_do_not_count_as_views(backend: Backend, tmp_path: Path) -> None:
    pipeline = imagedream(backend)
    pipeline.memory = MemoryPlan(vae_tile=32)
    tiles = (SIZE_PX // 32) ** 2  # of each view
    break_block(pipeline.model.vae, "decoder.conv_out", lambda number: number == tiles + 3)
    with pytest.raises(NumericsError) as caught:
        generate(pipeline, tmp_path / "nan")
    assert (caught.value.where, caught.value.view) == ("vae.decoder.conv_out", "view 1")


def test_what_is_no_folder_is_refused_before_anything_runs() -> None:
    with pytest.raises(OptionError, match="check_numerics must be a folder for what is found, got True"):
        generate(imagedream("torch"), cast(Any, True))
