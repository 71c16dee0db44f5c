"""Settings of CUDA while a model computes, joined linear layers, copies to the device: what a CPU tells."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    BFLOAT16_RMS,
    FLOAT32_RMS,
    TINY_UNET,
    assert_close,
    assert_different,
    denoise,
    make_unet,
    set_dtype,
    unet_gradients,
    unet_inputs,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

import mvtorch
from mvshared.backend import load
from mvshared.checkpoint import read_model_config, weight_files
from mvshared.errors import BackendError
from mvshared.quantization.plans import preset_layers
from mvtorch.inference import HOPPER, ORDER, exact_float32, fastest_attention, inference, join_projections, to_device
from mvtorch.model import get_weights, load_network, set_weights, weight_shapes
from mvtorch.quantized import quantize_network

cudnn: Any = torch.backends.cudnn
FOLDER = Path(__file__).parent / "fixtures" / "tiny-imagedream"


@pytest.fixture(autouse=True)
def _settings_of_the_program():
    """PyTorch's settings as they were before."""
    before = cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    yield
    cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before


def kernels() -> list[SDPBackend]:
    """Attention's kernels in the order in which PyTorch tries them."""
    current: Callable[..., Any] = torch.nn.attention._cur_sdpa_kernel_backends
    return [kernel for kernel in current(with_priority=True) if kernel in ORDER]


def test_float32_is_float32_while_a_model_computes_and_pytorchs_own_afterwards() -> None:
    assert cudnn.conv.fp32_precision == "tf32"
    with suppress(ZeroDivisionError), exact_float32():
        assert cudnn.conv.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision != "tf32"
        raise ZeroDivisionError
    assert cudnn.conv.fp32_precision == "tf32"


def test_settings_stay_until_the_last_of_several_threads_has_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines in threads of their own overlap as they like, and all threads share the settings."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    for enter, now in ((exact_float32, lambda: cudnn.conv.fp32_precision), (lambda: fastest_attention("cuda"), kernels)):
        before, one, other = now(), enter(), enter()
        one.__enter__()
        within = now()
        assert within != before
        other.__enter__()
        one.__exit__(None, None, None)
        assert now() == within
        other.__exit__(None, None, None)
        assert now() == before


def test_tf32_stays_where_the_program_allows_it_for_products_of_matrices() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with exact_float32():
        assert cudnn.conv.fp32_precision == "tf32"


def test_from_hopper_on_cudnns_attention_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    before, capability = kernels(), (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with fastest_attention("cuda"):
        assert kernels() == list(ORDER)
        assert kernels()[0] == SDPBackend.CUDNN_ATTENTION
    assert kernels() == before
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        chosen = kernels()
        with fastest_attention("cuda"):
            assert kernels() == chosen
        assert kernels() == chosen
    capability = (8, 9)
    with fastest_attention("cuda"):
        assert kernels() == before


def test_a_cpu_has_its_settings_left_alone() -> None:
    before = kernels()
    with inference("cpu"):
        assert torch.is_inference_mode_enabled()
        assert (cudnn.conv.fp32_precision, kernels()) == ("tf32", before)


def test_every_stage_of_a_run_computes_with_these_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is the CPU, which is taken for CUDA where the settings are chosen."""
    for module in ("model", "latents", "upscaling"):
        monkeypatch.setattr(f"mvtorch.{module}.inference", lambda device: inference("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    pipeline = load(FOLDER, backend="torch", device="cpu", dtype="float32")
    seen: dict[str, set[tuple[str, SDPBackend]]] = {}

    def look(name: str, array: Any, seconds: float) -> None:
        seen.setdefault(name.partition(".")[0], set()).add((cudnn.conv.fp32_precision, kernels()[0]))

    with mvtorch.observe(pipeline, look):
        picture = np.zeros((64, 64, 3), np.uint8)
        pipeline.generate(picture, prompt="owl", negative_prompt="blur", views=1, steps=1, size_px=64)
    parts = ("image_encoder", "text_encoder", "vae", "unet")
    assert seen == {part: {("ieee", SDPBackend.CUDNN_ATTENTION)} for part in parts}


def test_the_copy_to_cuda_starts_from_pinned_memory_and_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **kwargs: calls.append((args, kwargs)) or self)
    to_device(torch.ones(2), "cuda:1")
    assert calls == ["pinned", (("cuda:1",), {"non_blocking": True})]


# Joined projections


def joined(dtype: str = "float32") -> Any:
    network = set_dtype(make_unet(TINY_UNET, "torch"), dtype)
    join_projections(network)
    return network


def joints(network: Any) -> list[Any]:
    return [network.joint_times, *(each.joint for each in attentions(network))]


def attentions(network: Any) -> list[Any]:
    return [module.attn1 for name, module in network.named_modules() if name.endswith("transformer_blocks.0")]


@pytest.mark.parametrize(("dtype", "rms"), [("float32", FLOAT32_RMS), ("bfloat16", BFLOAT16_RMS)])
def test_joined_weights_give_what_the_layers_give(dtype: str, rms: float) -> None:
    network, inputs = joined(dtype), unet_inputs(TINY_UNET, views=2)
    plain = set_dtype(make_unet(TINY_UNET, "torch"), dtype)
    assert_close(denoise(network, inputs), denoise(plain, inputs), rms=rms)
    with torch.no_grad():
        assert all(joint(torch.zeros(1, joint.weight.shape[1]).to(joint.weight)) is not None for joint in joints(network))
    assert network.state_dict().keys() == plain.state_dict().keys()
    for name, weight in get_weights(plain).items():
        np.testing.assert_array_equal(get_weights(network)[name], weight)


def test_joined_weights_take_no_memory_of_their_own() -> None:
    network = joined()
    for joint in joints(network):
        for name in ("weight", "bias"):
            together, parts = getattr(joint, name), [getattr(layer, name) for layer in joint.layers]
            if together is not None:
                assert {part.untyped_storage().data_ptr() for part in parts} == {together.untyped_storage().data_ptr()}
                assert together.untyped_storage().nbytes() == sum(part.nbytes for part in parts)
    assert sum(joint.bias is not None for joint in joints(network)) == 1


def test_queries_keys_and_values_are_one_product_and_so_are_the_times_of_all_resnets(monkeypatch: pytest.MonkeyPatch) -> None:
    network, called = joined(), []
    layers = [layer for joint in joints(network) for layer in joint.layers]
    assert len(layers) == 3 * len(attentions(network)) + sum(
        name.endswith("time_emb_proj") for name, _ in network.named_modules()
    )
    for layer in layers:
        monkeypatch.setattr(layer, "forward", lambda x: called.append(x))
    with torch.inference_mode():
        denoise(network, unet_inputs(TINY_UNET))
    assert called == []


def test_layers_that_are_observed_are_called_and_give_the_same() -> None:
    network, inputs, names = joined(), unet_inputs(TINY_UNET), []
    expected = denoise(network, inputs)
    with mvtorch.observe(network, lambda name, array, seconds: names.append(name)):
        assert_close(denoise(network, inputs), expected, rms=FLOAT32_RMS)
    layers = [name for name in names if name.endswith(("attn1.to_q", "attn1.to_k", "attn1.to_v", "time_emb_proj"))]
    assert len(layers) == sum(len(joint.layers) for joint in joints(network))


def test_gradients_reach_the_layers() -> None:
    inputs = unet_inputs(TINY_UNET)
    ours, expected = (unet_gradients(network, inputs) for network in (joined(), make_unet(TINY_UNET, "torch")))
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(ours[name], gradient, rms=FLOAT32_RMS)


def test_new_weights_are_used_whether_they_come_in_place_or_not() -> None:
    inputs, network = unet_inputs(TINY_UNET), joined()
    before = denoise(network, inputs)
    weights = {name: array * 1.1 for name, array in get_weights(network).items()}
    plain = make_unet(TINY_UNET, "torch")
    set_weights(plain, weights)
    expected = denoise(plain, inputs)
    assert_different(expected, before, rms=1e-3)
    set_weights(network, weights)
    assert_close(denoise(network, inputs), expected, rms=FLOAT32_RMS)
    other = joined()
    other.load_state_dict(plain.state_dict(), assign=True)
    assert_close(denoise(other, inputs), denoise(plain, inputs), rms=FLOAT32_RMS)
    for find, name in (
        (lambda network: attentions(network)[0].to_v, "weight"),
        (lambda network: network.down_blocks[1].resnets[0].time_emb_proj, "weight"),
        (lambda network: network.down_blocks[1].resnets[0].time_emb_proj, "bias"),
    ):
        other, plain = joined(), make_unet(TINY_UNET, "torch")
        for network in (other, plain):
            setattr(find(network), name, torch.nn.Parameter(getattr(find(network), name).detach() * 3 + 1))
        assert_different(denoise(plain, inputs), before, rms=1e-3)
        assert_close(denoise(other, inputs), denoise(plain, inputs), rms=FLOAT32_RMS)
        assert sum(joint.weight is None for joint in joints(other)) == 1  # and takes no memory
    half = set_dtype(joined(), "bfloat16")
    assert_close(denoise(half, inputs), denoise(set_dtype(make_unet(TINY_UNET, "torch"), "bfloat16"), inputs), rms=BFLOAT16_RMS)


def test_quantised_layers_are_not_joined() -> None:
    network = make_unet(TINY_UNET, "torch")
    layers = preset_layers(TINY_UNET, weight_shapes(network), "q8")
    assert all(any(name.endswith(each) for name in layers) for each in ("attn1.to_q", "time_emb_proj"))
    quantize_network(network, layers)
    join_projections(network)
    assert all(joint is None for joint in joints(network))


def test_weights_are_joined_for_cuda_as_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    config, paths, calls = read_model_config(FOLDER).unet, weight_files(FOLDER, "unet"), []
    monkeypatch.setattr("mvtorch.model.join_projections", calls.append)
    load_network(config, paths, dtype="float32", device="cpu")
    assert calls == []
    monkeypatch.setattr("mvtorch.model.read_tensors", lambda *_, **__: {})
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
    network = load_network(config, paths, dtype="float32", device="cuda")
    assert calls == [network]


# The program around


def generated(pipe: Any, **options: Any) -> np.ndarray:
    views = pipe.generate(FOLDER / "input.png", prompt="an owl", negative_prompt="", steps=2, **options)
    return np.concatenate([views.latents.ravel(), views.images.ravel()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_of_the_program_around_changes_nothing(dtype: torch.dtype) -> None:
    expected = generated(load(FOLDER, backend="torch", device="cpu", dtype="float32"), reference_scale=0.7)
    torch.set_default_dtype(dtype)
    try:
        ours = generated(load(FOLDER, backend="torch", device="cpu", dtype="float32"), reference_scale=0.7)
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_device_of_the_program_around_changes_nothing(dtype: str) -> None:
    pipe = load(FOLDER, backend="torch", device="cpu", dtype=dtype)
    expected = generated(pipe)
    with torch.device("meta"):  # as of a GPU, which is not here: what is made without a device lands there
        np.testing.assert_array_equal(generated(pipe), expected)
        np.testing.assert_array_equal(generated(load(FOLDER, backend="torch", device="cpu", dtype=dtype)), expected)


def test_autocast_of_the_program_around_changes_nothing() -> None:
    pipe = load(FOLDER, backend="torch", device="cpu", dtype="float32")
    expected = generated(pipe)
    with torch.autocast("cpu"):
        np.testing.assert_array_equal(generated(pipe), expected)
        assert torch.is_autocast_enabled("cpu")


def test_every_name_of_the_cpu_is_the_cpu() -> None:
    assert load("demo", backend="torch", device="cpu:0").model.device == "cpu"
    with pytest.raises(BackendError, match="there is one CPU device, got 'cpu:1'"):
        load("demo", backend="torch", device="cpu:1")
