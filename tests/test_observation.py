"""Looking into both backends: the same blocks, in the same order, with the same values, at no cost when nobody looks."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from helpers import BACKENDS, TINY_UNET, Backend, assert_close, denoise, make_unet, to_numpy, unet_inputs

import mvmlx
import mvtorch
from mvshared.backend import load
from mvshared.errors import OptionError

FIXTURES = Path(__file__).parent / "fixtures"
PACKAGES: dict[str, Any] = {"torch": mvtorch, "mlx": mvmlx}


class Block(NamedTuple):
    name: str
    array: Any
    seconds: float


def observed(model: Any, call: Any, *, backend: Backend) -> list[Block]:
    blocks: list[Block] = []
    with PACKAGES[backend].observe(model, lambda name, array, seconds: blocks.append(Block(name, to_numpy(array), seconds))):
        call()
    return blocks


def observed_run(backend: Backend) -> list[Block]:
    pipe = load(FIXTURES / "tiny-imagedream", backend=backend, device="cpu")
    picture = FIXTURES / "tiny-imagedream" / "input.png"
    return observed(pipe, lambda: pipe.generate(picture, prompt="an owl", negative_prompt="", steps=1), backend=backend)


def test_both_backends_show_the_same_blocks_with_the_same_values() -> None:
    expected, actual = observed_run("torch"), observed_run("mlx")
    assert [block.name for block in actual] == [block.name for block in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.array.size == theirs.array.size, ours.name
        if theirs.array.any():
            assert_close(ours.array.ravel(), theirs.array.ravel(), rms=1e-3)  # flat areas of the picture amplify rounding


def test_every_part_of_a_model_is_seen_in_the_order_in_which_it_ends() -> None:
    names = [block.name for block in observed_run("torch")]
    for name in (
        "image_encoder.encoder.layers.1.self_attn.q_proj",
        "text_encoder.pooler_output",
        "vae.encoder.down_blocks.0.resnets.0",
        "vae.decoder.conv_out",
        "unet.image_embed.layers.1.0",
        "unet.camera_embedding.linear_2",
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k_ip",
        "unet",
    ):
        assert name in names
    block = "unet.mid_block.resnets.0"
    assert names.index(f"{block}.norm1") < names.index(f"{block}.conv1") < names.index(block) < names.index("unet")


@pytest.mark.parametrize("backend", BACKENDS)
def test_pictures_are_channels_last(backend: Backend) -> None:
    model, inputs = make_unet(TINY_UNET, backend), unet_inputs(TINY_UNET, size=(8, 12))
    shapes = {block.name: block.array.shape for block in observed(model, lambda: denoise(model, inputs), backend=backend)}
    assert shapes["conv_in"] == (2, 8, 12, 32)
    assert shapes["down_blocks.0.downsamplers.0"] == (2, 4, 6, 32)
    assert shapes["down_blocks.0.attentions.0.transformer_blocks.0.attn1"] == (2, 96, 32)
    assert shapes["time_embedding"] == (2, 128)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_seen_afterwards_and_the_result_stays_the_same(backend: Backend) -> None:
    model, inputs = make_unet(TINY_UNET, backend), unet_inputs(TINY_UNET)
    before = denoise(model, inputs)
    blocks: list[str] = []

    def fail(name: str, array: Any, seconds: float) -> None:
        blocks.append(name)
        if len(blocks) == 3:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"), PACKAGES[backend].observe(model, fail):
        denoise(model, inputs)
    assert len(blocks) == 3
    np.testing.assert_array_equal(denoise(model, inputs), before)
    assert len(blocks) == 3
    within: list[Any] = []
    observed(model, lambda: within.append(denoise(model, inputs)), backend=backend)
    np.testing.assert_array_equal(within[0], before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", [3, None, {"unet": 3}, [1]], ids=str)
def test_what_is_no_network_cannot_be_looked_at(model: Any, backend: Backend) -> None:
    with (
        pytest.raises(OptionError, match="model must be a pipeline, an upscaler or a network, got '"),
        PACKAGES[backend].observe(model, print),
    ):
        pytest.fail("entered")


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_may_look_at_once(backend: Backend) -> None:
    model, inputs = make_unet(TINY_UNET, backend), unet_inputs(TINY_UNET)
    outer: list[Block] = []
    inner = observed(
        model, lambda: outer.extend(observed(model, lambda: denoise(model, inputs), backend=backend)), backend=backend
    )
    assert [block.name for block in inner] == [block.name for block in outer]


@pytest.mark.parametrize("backend", BACKENDS)
def test_those_who_look_may_leave_in_any_order(backend: Backend) -> None:
    model, inputs = make_unet(TINY_UNET, backend), unet_inputs(TINY_UNET)
    seen: dict[str, list[str]] = {"first": [], "second": []}
    first, second = (
        PACKAGES[backend].observe(model, lambda name, array, seconds, who=who: seen[who].append(name)) for who in seen
    )
    first.__enter__()
    second.__enter__()
    denoise(model, inputs)
    assert seen["first"] == seen["second"] != []
    first.__exit__(None, None, None)
    before = len(seen["first"])
    denoise(model, inputs)
    assert (len(seen["first"]), len(seen["second"])) == (before, 2 * before)
    second.__exit__(None, None, None)
    denoise(model, inputs)
    assert (len(seen["first"]), len(seen["second"])) == (before, 2 * before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_comes_while_a_block_runs_sees_those_that_begin_then(backend: Backend) -> None:
    """As another thread may, at any time: blocks that had begun before are not its own, and nothing fails."""
    model, inputs = make_unet(TINY_UNET, backend), unet_inputs(TINY_UNET)
    expected, late = denoise(model, inputs), list[str]()
    looking = PACKAGES[backend].observe(model, lambda name, array, seconds: late.append(name))

    def come(name: str, array: Any, seconds: float) -> None:
        if name == "down_blocks.0.resnets.0.conv1":
            looking.__enter__()

    with PACKAGES[backend].observe(model, come):
        np.testing.assert_array_equal(denoise(model, inputs), expected)
    assert "down_blocks.0.resnets.0.conv2" in late and "mid_block.resnets.0" in late
    assert not {"down_blocks.0.resnets.0", "conv_in"} & set(late)
    late.clear()
    denoise(model, inputs)
    assert "down_blocks.0.resnets.0" in late
    looking.__exit__(None, None, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_several_threads_are_told_apart(backend: Backend) -> None:
    """As of a run, and of a preview that another thread shows: the second begins and ends within a block of the first."""
    model, inputs = make_unet(TINY_UNET, backend), unet_inputs(TINY_UNET)
    depths: dict[bool, list[tuple[str, int]]] = {True: [], False: []}

    def on_end(block: Any) -> None:
        depths[threading.current_thread() is threading.main_thread()].append((block.name, block.depth))

    def on_start(call: Any) -> None:
        if call.name == "down_blocks.0.resnets.0.conv1" and threading.current_thread() is threading.main_thread():
            other.submit(denoise, model, inputs).result()

    with ThreadPoolExecutor(1) as other, PACKAGES[backend].observe_blocks(model, on_end, on_start):
        denoise(model, inputs)
    assert depths[True] == depths[False]
    assert ("conv_in", 0) in depths[True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_observers_do_in_one_thread_is_not_taken_from_the_blocks_of_another(backend: Backend) -> None:
    model, inputs, seconds = make_unet(TINY_UNET, backend), unet_inputs(TINY_UNET), list[float]()

    def on_end(block: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            seconds.append(block.seconds)
        else:
            time.sleep(1e-3)

    def on_start(call: Any) -> None:
        if call.name == "down_blocks.0.resnets.0.conv1" and threading.current_thread() is threading.main_thread():
            other.submit(denoise, model, inputs).result()

    with ThreadPoolExecutor(1) as other, PACKAGES[backend].observe_blocks(model, on_end, on_start):
        denoise(model, inputs)
    assert min(seconds) >= 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nobody_looks_on_after_an_error_in_the_beginning(backend: Backend) -> None:
    class Broken:
        def parameters(self) -> list[Any]:
            return []

        def named_modules(self) -> Any:
            raise AttributeError

    model, inputs, names = make_unet(TINY_UNET, backend), unet_inputs(TINY_UNET), list[str]()
    observer = PACKAGES[backend].observe({"unet": model, "other": Broken()}, lambda name, array, seconds: names.append(name))
    with pytest.raises(AttributeError), observer:
        pytest.fail("one of them is no network")
    denoise(model, inputs)
    assert not names


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_have_their_names_for_both_who_look(backend: Backend) -> None:
    model, inputs = make_unet(TINY_UNET, backend), unet_inputs(TINY_UNET)
    seen: dict[str, dict[str, list[str]]] = {"first": {}, "second": {}}
    first, second = (
        PACKAGES[backend].observe_blocks(model, lambda block, who=who: seen[who].__setitem__(block.name, list(block.inputs)))
        for who in seen
    )
    with first, second:
        denoise(model, inputs)
    assert seen["first"] == seen["second"]
    assert seen["first"]["mid_block.resnets.0"] == ["x", "emb"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_seconds_count_what_is_inside_a_block_and_not_the_observer(backend: Backend) -> None:
    """The observer sleeps 20 ms a block: a whole level takes far less than its dozens of blocks would then."""
    model, inputs = make_unet(TINY_UNET, backend), unet_inputs(TINY_UNET)
    seconds: dict[str, float] = {}

    def slow(name: str, array: Any, taken: float) -> None:
        seconds[name] = taken
        time.sleep(0.02)

    with PACKAGES[backend].observe(model, slow):
        denoise(model, inputs)
    parent = "down_blocks.0.attentions.0"
    children = [taken for name, taken in seconds.items() if name.startswith(f"{parent}.transformer_blocks.0.attn1.")]
    assert len(children) == 4
    assert all(taken > 0 for taken in seconds.values())
    assert sum(children) < seconds[parent] < len(seconds) * 0.02


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_block_that_is_not_finite_can_be_found(backend: Backend) -> None:
    model, inputs = make_unet(TINY_UNET, backend), unet_inputs(TINY_UNET)
    broken = model.mid_block.resnets[0].conv1
    broken.bias = type(broken.bias)(broken.bias * np.nan) if backend == "torch" else broken.bias * np.nan
    blocks = observed(model, lambda: denoise(model, inputs), backend=backend)
    assert next(block.name for block in blocks if not np.isfinite(block.array).all()) == "mid_block.resnets.0.conv1"
