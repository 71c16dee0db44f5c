"""What is known of a block: its inputs, its place among the others, its times and its arithmetic, in both backends."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BACKENDS, TINY_UNET, Backend, denoise, make_unet, make_upscaler, to_numpy, unet_inputs
from torch.utils.flop_counter import FlopCounterMode
from upscalers import CONFIGS, run_upscaler, upscaler_inputs

import mvmlx
import mvtorch
import mvtorch.model
from mvshared.attention import AttentionOptions
from mvshared.backend import load
from mvshared.blocks import Block, Call
from mvshared.config import IMAGEDREAM, SD21, SD_VAE
from mvtorch.unet import MultiViewUNet
from mvtorch.vae import AutoencoderKL

FIXTURES = Path(__file__).parent / "fixtures"
PACKAGES: dict[str, Any] = {"torch": mvtorch, "mlx": mvmlx}
PLAIN = AttentionOptions(implementation="plain")  # PyTorch's counter does not know the CPU's fused kernel


def blocks_of(model: Any, call: Any, *, backend: Backend) -> list[Block[Any]]:
    blocks: list[Block[Any]] = []
    with PACKAGES[backend].observe_blocks(model, blocks.append):
        call()
    return blocks


def run(pipe: Any, name: str) -> None:
    picture = None if name == "tiny-mvdream" else FIXTURES / name / "input.png"
    pipe.generate(picture, prompt="an owl", negative_prompt="", steps=1)


def blocks_of_run(name: str, backend: Backend) -> list[Block[Any]]:
    pipe = load(FIXTURES / name, backend=backend, device="cpu", dtype="float32")
    return blocks_of(pipe, lambda: run(pipe, name), backend=backend)


def shapes(arrays: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in arrays.items()}


def counted(call: Any, *networks: torch.nn.Module) -> int:
    """What PyTorch counts for a call of networks, whose attention is written out for it."""
    for network in networks:
        network.requires_grad_(False)
        network.attention_options = PLAIN  # pyright: ignore[reportArgumentType]
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        call()
    return counter.get_total_flops()


def test_both_backends_tell_the_same_of_every_block() -> None:
    expected, actual = blocks_of_run("tiny-imagedream", "torch"), blocks_of_run("tiny-imagedream", "mlx")
    assert len(actual) == len(expected) == 609
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours.name, ours.kind, ours.depth, ours.flops) == (theirs.name, theirs.kind, theirs.depth, theirs.flops)
        assert ours.output_bytes == theirs.output_bytes, ours.name
        assert list(ours.inputs) == list(theirs.inputs), ours.name
        if ours.kind != "Linear":  # PyTorch's linear layers around the transformers are given tokens, MLX's pictures
            assert shapes(ours.inputs) == shapes(theirs.inputs), ours.name
            assert shapes(ours.outputs) == shapes(theirs.outputs), ours.name


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_have_the_names_of_their_arguments_and_the_shapes_of_pictures_and_tokens(backend: Backend) -> None:
    blocks = {block.name: block for block in blocks_of_run("tiny-imagedream", backend)}
    attention = blocks["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2"]
    assert shapes(attention.inputs) == {
        "x": (2, 1280, 32),
        "cross.context.keys": (2, 2, 77, 16),
        "cross.context.values": (2, 2, 77, 16),
        "cross.image.keys": (2, 2, 4, 16),
        "cross.image.values": (2, 2, 4, 16),
    }
    assert shapes(blocks["vae.decoder.conv_in"].inputs) == {"x": (1, 16, 16, 4)}
    assert shapes(blocks["image_encoder"].inputs) == {"pixels": (1, 56, 56, 3)}
    assert shapes(blocks["unet.down_blocks.0.resnets.0"].inputs) == {"x": (10, 16, 16, 32), "emb": (10, 128)}
    inputs = shapes(blocks["unet"].inputs)
    assert (inputs["times"], inputs["constants.camera"]) == ((2, 128), (2, 5, 128))
    assert inputs["constants.reference"] == (2, 1, 16, 16, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_and_outputs_are_the_arrays_that_the_block_saw(backend: Backend) -> None:
    model, inputs = make_unet(TINY_UNET, backend), unet_inputs(TINY_UNET)
    blocks = {block.name: block for block in blocks_of(model, lambda: denoise(model, inputs), backend=backend)}
    resnet = blocks["mid_block.resnets.0"]
    np.testing.assert_array_equal(to_numpy(resnet.inputs["x"]), to_numpy(blocks["mid_block.resnets.0.norm1"].inputs["x"]))
    x, residual = (
        to_numpy(resnet.inputs["x"]),
        to_numpy(blocks["mid_block.resnets.0.conv2"].outputs["mid_block.resnets.0.conv2"]),
    )
    np.testing.assert_allclose(to_numpy(resnet.outputs[resnet.name]), x + residual, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_start_has_its_end_and_blocks_lie_within_those_around_them(backend: Backend) -> None:
    model, inputs = make_unet(TINY_UNET, backend), unet_inputs(TINY_UNET)
    events: list[Call[Any]] = []
    with PACKAGES[backend].observe_blocks({"unet": model}, events.append, events.append) as clock:
        began = clock()
        denoise(model, inputs)
        ended = clock()
    running: list[Call[Any]] = []
    time = began
    for event in events:
        if isinstance(event, Block):
            start = running.pop()
            assert (start.name, start.kind, start.depth, start.start) == (event.name, event.kind, event.depth, event.start)
            assert event.start + event.seconds >= time - 1e-9
            time = event.start + event.seconds
        else:
            assert event.depth == len(running)
            assert event.start >= time - 1e-9
            running.append(event)
            time = event.start
    assert running == []
    assert time <= ended
    assert events[-1].name == "unet"
    assert max(event.depth for event in events) == 5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_that_failed_leaves_the_others_where_they_are(backend: Backend) -> None:
    model, inputs = make_unet(TINY_UNET, backend), unet_inputs(TINY_UNET)
    blocks, failed = list[Block[Any]](), list[Call[Any]]()

    def fail_once(call: Call[Any]) -> None:
        if call.name == "unet.mid_block.resnets.0" and not failed:
            failed.append(call)
            raise RuntimeError("once")

    with PACKAGES[backend].observe_blocks({"unet": model}, blocks.append, fail_once):
        with pytest.raises(RuntimeError, match="once"):
            denoise(model, inputs)
        denoise(model, inputs)
    assert Counter(block.name for block in blocks)["unet"] == 1
    assert (blocks[-1].name, blocks[-1].depth) == ("unet", 0)


@pytest.mark.parametrize("name", ["tiny-imagedream", "tiny-mvdream"])
def test_the_arithmetic_of_a_run_is_what_pytorch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(
            mvtorch.model, "pack_network", lambda network, **options: None
        )  # PyTorch's counter knows no packed layers
        pipe: Any = load(FIXTURES / name, backend="torch", device="cpu")
        networks = list(pipe.model.networks.values())
    with pipe.model.observe(lambda *_: None):  # or what branches of guidance have in common would be computed once
        expected = counted(lambda: run(pipe, name), *networks)
    assert sum(block.flops for block in blocks_of_run(name, "torch")) == expected
    assert expected > 10**10
    unobserved = counted(lambda: run(pipe, name), *networks)
    assert 0.9 * expected < unobserved < expected if name == "tiny-mvdream" else unobserved == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantised_layers_have_the_arithmetic_of_the_ones_that_they_replace(backend: Backend) -> None:
    runs = []
    for quantize in (None, "q8"):
        pipe = load(FIXTURES / "tiny-mvdream", backend=backend, device="cpu", dtype="float32", quantize=quantize)
        runs.append(blocks_of(pipe, lambda pipe=pipe: run(pipe, "tiny-mvdream"), backend=backend))
    plain, quantized = runs
    assert any(block.kind == "QuantizedConv2d" for block in quantized)
    assert [(block.name, block.flops) for block in quantized] == [(block.name, block.flops) for block in plain]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_arithmetic_of_a_latent_upscaler_is_what_pytorch_counts(name: str) -> None:
    inputs = upscaler_inputs(CONFIGS[name])
    network = make_upscaler(CONFIGS[name], "torch")
    expected = counted(lambda: run_upscaler(network, inputs), network)
    for backend in BACKENDS:
        model = make_upscaler(CONFIGS[name], backend)
        blocks = blocks_of({"unet": model}, lambda model=model: run_upscaler(model, inputs), backend=backend)
        assert sum(block.flops for block in blocks) == expected


def test_the_arithmetic_of_full_size_networks_is_what_pytorch_counts() -> None:
    """SD 2.1's U-Net, ImageDream's with a reference frame, and the VAE, without memory for their weights."""
    with torch.device("meta"):
        sd21, imagedream, vae = MultiViewUNet(SD21), MultiViewUNet(IMAGEDREAM), AutoencoderKL(SD_VAE)
        assert IMAGEDREAM.resampler is not None
        context, states = torch.zeros(2, 77, 1024), torch.zeros(2, 1, 257, IMAGEDREAM.resampler.embedding_dim)
        sample, times, camera = torch.zeros(2, 4, 32, 32, 4), torch.zeros(2), torch.zeros(2, 4, 16)

        def run_sd21() -> None:
            sd21(sample[:, :1], sd21.time_embeddings(times), sd21.constants(context))

        def run_imagedream() -> None:
            constants = imagedream.constants(context, image_states=states, camera=camera, reference=sample[:, :1])
            imagedream(sample, imagedream.time_embeddings(times), constants)

        def run_vae() -> None:
            vae.decode(vae.encode(torch.zeros(1, 256, 256, 3)).mean)

        for network, call in ((sd21, run_sd21), (imagedream, run_imagedream), (vae, run_vae)):
            expected = counted(call, network)
            with torch.inference_mode():
                blocks = blocks_of({"network": network}, call, backend="torch")
            assert sum(block.flops for block in blocks) == expected
            assert expected > 10**11


def test_layers_of_other_libraries_count_nothing_and_do_no_harm() -> None:
    class Attention(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states

    layer = Attention()
    (block,) = blocks_of({"other": layer}, lambda: layer(torch.zeros(1, 2, 3)), backend="torch")
    assert (block.flops, block.kind, list(block.inputs)) == (0, "Attention", ["hidden_states"])


def test_nothing_is_left_on_the_modules() -> None:
    model = make_unet(TINY_UNET, "torch")
    with pytest.raises(RuntimeError), mvtorch.observe_blocks({"unet": model}, lambda block: None):
        raise RuntimeError
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    twin = make_unet(TINY_UNET, "mlx")
    kinds = [type(module) for module in twin.modules()]
    with pytest.raises(RuntimeError), mvmlx.observe_blocks({"unet": twin}, lambda block: None):
        raise RuntimeError
    assert [type(module) for module in twin.modules()] == kinds
