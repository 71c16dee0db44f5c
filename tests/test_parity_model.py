"""Loaded models: MLX against PyTorch on one tiny checkpoint folder, and what loading refuses, by name."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from helpers import (
    BACKENDS,
    FLOAT16_RMS,
    FLOAT32_RMS,
    TINY_MODEL,
    TINY_UNET,
    TINY_VAE,
    Backend,
    assert_close,
    assert_different,
    make_unet,
    make_vae,
    parameter_names,
)
from numpy.typing import NDArray

import mvmlx.latents
import mvmlx.model
import mvshared.memory.plan
import mvshared.precision
import mvtorch.model
import mvtorch.train
from mvshared.checkpoint import WEIGHT_FILE, weight_files, write_component, write_model_config
from mvshared.config import CLIPTextConfig, ModelConfig, SchedulerConfig, UNetConfig
from mvshared.errors import BackendError, CheckpointError, OptionError, TensorMismatchError
from mvshared.guidance import ALL, Guidance
from mvshared.networks import Networks
from mvshared.weights import read_weights

MODULES: dict[Backend, Any] = {"torch": mvtorch.model, "mlx": mvmlx.model}
PLAIN = replace(TINY_UNET, cross_attention_dim=None)
FULL = replace(PLAIN, in_channels=8, camera_dim=16, reference_frame=True)
VAE = replace(TINY_VAE, latents_mean=(0.1, -0.2, 0.3, 0.0), latents_std=(1.5, 0.5, 2.0, 1.0), scaling_factor=0.7)
VIEWS = 3
Weights = dict[str, NDArray[Any]]


def write_checkpoint(folder: Path, unet: UNetConfig) -> Path:
    """A checkpoint folder with random weights."""
    write_component(folder, "unet", unet, mvtorch.model.get_weights(make_unet(unet, "torch")))
    write_component(folder, "vae", VAE, mvtorch.model.get_weights(make_vae(VAE, "torch")))
    write_model_config(folder, ModelConfig(family="custom", unet=unet, vae=VAE, scheduler=SchedulerConfig()))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("full"), FULL)


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def pixels(n: int = 2) -> NDArray[np.float32]:
    return np.random.default_rng(1).uniform(-1, 1, (n, 16, 24, 3)).astype(np.float32)


def denoise(
    model: Any, *, cameras: bool, reference: bool | float, normals: bool, guidance: float | None
) -> NDArray[np.float32]:
    """The output for random inputs; `reference` is whether there is a picture, or what its latents are multiplied by."""
    branches = [ALL] if guidance is None else Guidance(guidance=2).mixture(ALL).branches
    weights = [1.0] if guidance is None else [1 - guidance, guidance]
    condition = model.condition(
        cameras=normal(VIEWS, 16, seed=2) if cameras else None,
        reference=None if reference is False else model.from_numpy(float(reference) * normal(1, 4, 6, 4, seed=3)),
        normals=model.from_numpy(normal(VIEWS, 4, 6, 4, seed=4)) if normals else None,
        branches=branches,
    )
    x = model.from_numpy(normal(VIEWS, 4, 6, 4))
    return model.to_numpy(model.denoise(x, 481.0, condition, weights))


# Both backends compute the same


def test_latents_of_pictures_are_the_same_on_both_backends(folder: Path) -> None:
    latents = [model.to_numpy(model.encode_latents(pixels())) for model in (load(name, folder) for name in BACKENDS)]
    assert latents[0].shape == (2, 4, 6, 4)
    assert latents[0].dtype == latents[1].dtype == np.float32
    assert_close(latents[1], latents[0], rms=FLOAT32_RMS)


def test_pixels_of_latents_are_the_same_on_both_backends(folder: Path) -> None:
    decoded = [model.decode(model.from_numpy(normal(2, 4, 6, 4))) for model in (load(name, folder) for name in BACKENDS)]
    assert decoded[0].shape == (2, 16, 24, 3)
    assert decoded[0].dtype == decoded[1].dtype == np.float32
    assert_close(decoded[1], decoded[0], rms=FLOAT32_RMS)


@pytest.mark.parametrize("guidance", [None, 1.0, 4.5])
@pytest.mark.parametrize(
    ("cameras", "reference", "normals"),
    [(True, True, True), (False, True, True), (True, False, True), (True, True, False), (False, False, False)],
)
def test_a_denoising_step_is_the_same_on_both_backends(
    folder: Path, cameras: bool, reference: bool, normals: bool, guidance: float | None
) -> None:
    expected, actual = (
        denoise(load(name, folder), cameras=cameras, reference=reference, normals=normals, guidance=guidance)
        for name in BACKENDS
    )
    assert expected.shape == (VIEWS, 4, 6, 4)
    assert expected.dtype == actual.dtype == np.float32
    assert_close(actual, expected, rms=FLOAT32_RMS * (1 if guidance is None else guidance))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_condition_changes_the_result(folder: Path, backend: Backend) -> None:
    everything: dict[str, Any] = {"cameras": True, "reference": True, "normals": True, "guidance": None}
    model = load(backend, folder)
    full = denoise(model, **everything)
    for change in ({"cameras": False}, {"reference": False}, {"normals": False}, {"guidance": 4.5}):
        arguments: dict[str, Any] = everything | change
        assert_different(denoise(model, **arguments), full, rms=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_guidance_leads_from_the_result_without_reference_to_the_one_with(folder: Path, backend: Backend) -> None:
    model = load(backend, folder)
    conditional = denoise(model, cameras=True, reference=True, normals=True, guidance=None)
    unconditional = denoise(model, cameras=True, reference=0.0, normals=True, guidance=None)
    guided = denoise(model, cameras=True, reference=True, normals=True, guidance=3.0)
    assert_close(guided, unconditional + 3.0 * (conditional - unconditional), rms=3 * FLOAT32_RMS)
    assert_close(denoise(model, cameras=True, reference=True, normals=True, guidance=1.0), conditional, rms=FLOAT32_RMS)


def test_a_plain_base_without_views_and_reference_works_on_both_backends(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path, PLAIN)
    expected, actual = (
        denoise(load(name, checkpoint), cameras=False, reference=False, normals=False, guidance=None) for name in BACKENDS
    )
    assert_close(actual, expected, rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_stays_near_float32_and_hands_out_float32(folder: Path, backend: Backend) -> None:
    half, full = MODULES[backend].load_model(folder, dtype="float16", device="cpu"), load("torch", folder)
    arguments: dict[str, Any] = {"cameras": True, "reference": True, "normals": True, "guidance": None}
    out = denoise(half, **arguments)
    assert out.dtype == np.float32
    assert_close(out, denoise(full, **arguments), rms=FLOAT16_RMS)
    latents = half.encode_latents(pixels())
    assert "float32" in str(latents.dtype)
    assert_close(half.to_numpy(latents), full.to_numpy(full.encode_latents(pixels())), rms=FLOAT16_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_arrays_come_out_as_float32(folder: Path, backend: Backend) -> None:
    model = load(backend, folder)
    x = model.from_numpy(np.array([1.0, 0.5, -3.0], np.float32))
    half = x.bfloat16() if backend == "torch" else x.astype(mx.bfloat16)
    np.testing.assert_array_equal(model.to_numpy(half), np.array([1.0, 0.5, -3.0], np.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_at_the_border_are_copies(folder: Path, backend: Backend) -> None:
    model, given = load(backend, folder), np.zeros(3, np.float32)
    x = model.from_numpy(given)
    given[:] = 1
    out = model.to_numpy(x)
    np.testing.assert_array_equal(out, np.zeros(3))
    out[:] = 2
    np.testing.assert_array_equal(model.to_numpy(x), np.zeros(3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_read_only_arrays_are_taken(folder: Path, backend: Backend) -> None:
    given = np.broadcast_to(np.float32(0.5), (1, 16, 24, 3))
    assert load(backend, folder).encode_latents(given).shape == (1, 4, 6, 4)


def layouts(array: NDArray[Any]) -> list[NDArray[Any]]:
    """The same numbers as views that run backwards, and in the order of columns."""
    backwards = np.ascontiguousarray(array[..., ::-1, :])[..., ::-1, :]
    assert backwards.strides[-2] < 0
    return [backwards, np.asfortranarray(array)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_arrays_may_lie_in_memory_in_any_way(folder: Path, backend: Backend) -> None:
    model, codec = load(backend, folder), MODULES[backend].load_vae(VAE, weight_files(folder, "vae"), device="cpu")
    given, latents = pixels()[:1], normal(1, 4, 6, 4)
    expected = model.to_numpy(model.encode_latents(given))
    for same in layouts(given):
        np.testing.assert_array_equal(model.to_numpy(model.encode_latents(same)), expected)
        np.testing.assert_array_equal(codec.encode(same), codec.encode(given))
    for same in layouts(latents):
        np.testing.assert_array_equal(model.to_numpy(model.from_numpy(same)), latents)
        np.testing.assert_array_equal(codec.decode(same), codec.decode(latents))


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_ids_may_be_of_any_kind_of_whole_numbers_and_lie_in_any_way(backend: Backend) -> None:
    config = CLIPTextConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, eos_token_id=299
    )
    network = MODULES[backend].random_network(config, dtype="float32", device="cpu")
    model = MODULES[backend].MultiViewModel(
        SimpleNamespace(text_encoder=config),
        Networks({"text_encoder": lambda: network}),
        device="cpu",
        dtype="float32",
        weight_files=[],
    )
    ids = np.array([[1, 280, 299], [2, 7, 299]])
    expected = model.to_numpy(model.encode_prompt(ids))
    assert_different(expected[0], expected[1], rms=0.1)
    kinds = [ids.astype(dtype) for dtype in (np.int32, np.uint16, np.uint64, ">i8")]
    for same in [*kinds, *layouts(ids)]:
        np.testing.assert_array_equal(model.to_numpy(model.encode_prompt(same)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pictures_that_do_not_fit_are_refused(folder: Path, backend: Backend) -> None:
    model = load(backend, folder)
    for shape in ((1, 15, 24, 3), (0, 16, 24, 3), (16, 24, 3), (1, 16, 24, 4)):
        with pytest.raises(OptionError, match="pixels must be"):
            model.encode_latents(np.zeros(shape, np.float32))
    with pytest.raises(OptionError, match="latents must be"):
        model.decode(model.from_numpy(np.zeros((1, 4, 6, 3), np.float32)))


def test_an_mlx_model_loaded_in_one_thread_works_in_another_and_leaves_its_default_device(folder: Path) -> None:
    model, results = load("mlx", folder), []
    before = mx.default_device()

    def work() -> None:
        results.append(model.decode(model.from_numpy(normal(1, 4, 6, 4))))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    np.testing.assert_array_equal(results[0], model.decode(model.from_numpy(normal(1, 4, 6, 4))))
    assert mx.default_device() == before


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantize", [None, "q8"])
def test_the_random_numbers_of_the_program_around_go_on_as_if_no_model_was_loaded(
    folder: Path, backend: Backend, quantize: str | None
) -> None:
    def draw() -> list[Any]:
        return [torch.rand(()).item(), mx.random.uniform().item()]

    def drawn() -> list[Any]:
        torch.manual_seed(7)
        mx.random.seed(7 << 32 | 9)
        return draw()

    expected = drawn() + draw()
    first = drawn()
    model = MODULES[backend].load_model(folder, device="cpu", quantize=quantize)
    model.decode(model.from_numpy(normal(1, 4, 6, 4)))
    MODULES[backend].load_vae(VAE, weight_files(folder, "vae"), device="cpu")
    assert first + draw() == expected


def test_what_an_mlx_run_computes_by_itself_is_on_the_model_s_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of arrays go to the default stream, which is the GPU's on a Mac, whatever the model was loaded for."""
    model, entered = load("mlx", folder), []
    real = mvmlx.latents.on_device

    def noted(device: str) -> Any:
        entered.append(device)
        return real(device)

    monkeypatch.setattr(mvmlx.latents, "on_device", noted)
    with model.planned(model.plan):
        assert entered == ["cpu"]


def test_a_model_knows_no_other_cameras_than_there_are() -> None:
    with pytest.raises(OptionError, match="camera_dim of the U-Net must be 16 or null, got 8"):
        replace(TINY_MODEL, unet=replace(TINY_MODEL.unet, camera_dim=8))


def test_a_vae_alone_is_the_same_on_both_backends(folder: Path) -> None:
    ours, twin = (MODULES[name].load_vae(VAE, weight_files(folder, "vae"), device="cpu") for name in ("mlx", "torch"))
    assert_close(ours.encode(pixels()), twin.encode(pixels()), rms=FLOAT32_RMS)
    assert_close(ours.decode(normal(2, 4, 6, 4)), twin.decode(normal(2, 4, 6, 4)), rms=FLOAT32_RMS)
    model = load("torch", folder)
    assert_close(twin.decode(normal(1, 4, 6, 4)), model.decode(model.from_numpy(normal(1, 4, 6, 4))), rms=FLOAT32_RMS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vae_alone_encodes_no_more_pictures_together_than_stay_in_the_cache(
    backend: Backend, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, kind = MODULES[backend].load_vae(VAE, weight_files(folder, "vae"), device="cpu"), type(make_vae(VAE, backend))
    plain, together = kind._encode, list[int]()

    def counted(self: Any, pixels: Any, **options: Any) -> Any:
        together.append(len(pixels))
        return plain(self, pixels, **options)

    monkeypatch.setattr(kind, "_encode", counted)
    monkeypatch.setattr(mvshared.memory.plan, "VAE_PIXELS_ON_CPU", 2 * 32 * 48)
    five = np.tanh(normal(5, 32, 48, 3))
    encoded = codec.encode(five)
    assert together == [2, 2, 1]
    for picture, latents in zip(five, encoded, strict=True):
        assert_close(codec.encode(picture[None])[0], latents, rms=FLOAT32_RMS)


# Weights


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_were_set_come_back_in_checkpoint_layout(backend: Backend) -> None:
    module = make_unet(FULL, backend)
    shapes = MODULES[backend].weight_shapes(module)
    assert shapes["conv_in.weight"] == (32, 8, 3, 3)
    assert shapes.keys() == parameter_names(make_unet(FULL, "torch"))
    weights = {name: normal(*shape, seed=index) for index, (name, shape) in enumerate(shapes.items())}
    MODULES[backend].set_weights(module, {name: np.flip(np.flip(array).copy()) for name, array in weights.items()})
    weights_again = MODULES[backend].get_weights(module)
    assert weights_again.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(weights_again[name], array, strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_setting_weights_of_other_names_or_shapes_is_refused(backend: Backend) -> None:
    module = make_unet(FULL, backend)
    weights = MODULES[backend].get_weights(module)
    with pytest.raises(TensorMismatchError, match=r"missing: conv_in\.bias"):
        MODULES[backend].set_weights(module, {name: array for name, array in weights.items() if name != "conv_in.bias"})
    with pytest.raises(TensorMismatchError, match=r"mis-shaped: conv_in\.weight"):
        MODULES[backend].set_weights(module, weights | {"conv_in.weight": weights["conv_in.weight"].transpose(0, 2, 3, 1)})


def change(folder: Path, edit: Callable[[Weights], None]) -> Path:
    """Rewrite the U-Net's weight file."""
    file = folder / "unet" / WEIGHT_FILE
    weights = safetensors.numpy.load_file(file)
    edit(weights)
    safetensors.numpy.save_file(weights, file)
    return file


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_unexpected_and_mis_shaped_tensors_are_named_with_the_file(tmp_path: Path, backend: Backend) -> None:
    def edit(weights: Weights) -> None:
        del weights["mid_block.resnets.0.conv1.bias"]
        weights["mid_block.resnets.7.conv1.bias"] = np.zeros(3, np.float32)
        weights["conv_out.weight"] = np.ascontiguousarray(weights["conv_out.weight"].transpose(0, 2, 3, 1))

    file = change(write_checkpoint(tmp_path, FULL), edit)
    with pytest.raises(TensorMismatchError) as raised:
        load(backend, tmp_path)
    assert raised.value.missing == ("mid_block.resnets.0.conv1.bias",)
    assert raised.value.unexpected == ("mid_block.resnets.7.conv1.bias",)
    assert raised.value.misshaped == ("conv_out.weight (expected [4, 32, 3, 3], got [4, 3, 3, 32])",)
    assert str(file) in str(raised.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_truncated_weight_file_is_refused(tmp_path: Path, backend: Backend) -> None:
    file = weight_files(write_checkpoint(tmp_path, FULL), "vae")[0]
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        load(backend, tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tensor_under_its_old_and_its_new_name_is_refused(tmp_path: Path, backend: Backend) -> None:
    file = weight_files(write_checkpoint(tmp_path, FULL), "vae")[0]
    weights = safetensors.numpy.load_file(file)
    weights["decoder.mid_block.attentions.0.query.weight"] = weights["decoder.mid_block.attentions.0.to_q.weight"] + 1
    safetensors.numpy.save_file(weights, file)
    with pytest.raises(CheckpointError, match="one tensor under two names"):
        load(backend, tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_of_whole_numbers_are_refused(tmp_path: Path, backend: Backend) -> None:
    change(write_checkpoint(tmp_path, FULL), lambda weights: weights.update({"conv_in.bias": np.zeros(32, np.int32)}))
    with pytest.raises(CheckpointError, match=r"'conv_in\.bias' must be one of F16, BF16, F32, got I32"):
        load(backend, tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_old_names_of_the_vae_attention_are_read(tmp_path: Path, folder: Path, backend: Backend) -> None:
    file = weight_files(write_checkpoint(tmp_path, FULL), "vae")[0]
    weights = safetensors.numpy.load_file(file)
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        for name in [name for name in weights if f".{new}." in name]:
            weights[name.replace(f".{new}.", f".{old}.")] = weights.pop(name)
    assert any("proj_attn" in name for name in weights)
    safetensors.numpy.save_file(weights, file)
    np.testing.assert_array_equal(
        *(model.decode(model.from_numpy(normal(1, 4, 6, 4))) for model in (load(backend, tmp_path), load(backend, folder)))
    )


def test_bfloat16_and_float16_files_are_read_as_the_same_numbers_everywhere(tmp_path: Path) -> None:
    module = make_unet(PLAIN, "torch")
    shapes = mvtorch.model.weight_shapes(module)
    for dtype in (torch.bfloat16, torch.float16):
        file = tmp_path / f"{dtype}.safetensors"
        safetensors.torch.save_file({name: t.to(dtype).contiguous() for name, t in module.state_dict().items()}, file)
        expected = {name: t.to(dtype).float().numpy() for name, t in module.state_dict().items()}
        ours, twin = make_unet(PLAIN, "mlx"), make_unet(PLAIN, "torch")
        mvmlx.model.load_weights(ours, [file], dtype="float32", device="cpu")
        mvtorch.model.load_weights(twin, [file], dtype="float32", device="cpu")
        loaded = (mvmlx.model.get_weights(ours), mvtorch.model.get_weights(twin), read_weights([file], shapes))
        for name, array in expected.items():
            for weights in loaded:
                np.testing.assert_array_equal(weights[name], array, strict=True)


# Devices and dtypes


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_device_that_is_not_there_is_refused(folder: Path, backend: Backend) -> None:
    for device in ("tpu", "", "cpu:zero", "meta", "cuda:77"):
        with pytest.raises(BackendError, match=r"device"):
            MODULES[backend].load_model(folder, device=device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unknown_dtype_is_refused(folder: Path, backend: Backend) -> None:
    with pytest.raises(OptionError, match="dtype must be float32, float16 or bfloat16, got 'int8'"):
        MODULES[backend].load_model(folder, dtype="int8")


def test_the_default_dtype_is_what_the_device_is_good_at(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = [mvmlx.model.choose_dtype(None, device=device) for device in ("gpu", "cpu")]
    assert chosen == ["float16", "float32"]
    for capability, dtype in (((9, 0), "float16"), ((7, 0), "float16"), ((6, 1), "float32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert mvtorch.model.choose_dtype(None, device="cuda:1") == dtype
    for instructions, dtype in (("AMX", "bfloat16"), (None, "float32")):
        monkeypatch.setattr(mvshared.precision, "bfloat16_instructions", lambda found=instructions: found)
        assert mvtorch.model.choose_dtype(None, device="cpu") == dtype
        assert mvmlx.model.choose_dtype(None, device="cpu") == "float32"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(mvshared.precision, "bfloat16_instructions", lambda: "AMX")
    assert mvtorch.model.choose_dtype(None, device="cpu") == "float32"
    assert mvtorch.model.choose_dtype(None, device="meta") == "float32"


def test_bfloat16_is_refused_on_metal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    with pytest.raises(BackendError, match="use float16 or float32"):
        mvmlx.model.choose_dtype("bfloat16", device="gpu")
    assert mvmlx.model.choose_dtype("bfloat16", device="cpu") == "bfloat16"
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert mvmlx.model.choose_dtype("bfloat16", device="gpu") == "bfloat16"


def load(backend: Backend, folder: Path) -> Any:
    """The model in float32 on the CPU."""
    return MODULES[backend].load_model(folder, dtype="float32", device="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_vae_with_old_attention_names_and_1x1_convolutions_is_the_same_vae(
    folder: Path, tmp_path: Path, backend: Backend
) -> None:
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old: Weights = {}
    for name, array in safetensors.numpy.load_file(weight_files(folder, "vae")[0]).items():
        part = next((part for part in old_names if f".attentions.0.{part}." in name), None)
        if part is not None:
            name = name.replace(part, old_names[part])
            array = array[..., None, None] if array.ndim == 2 else array
        old[name] = array
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in old
    path = tmp_path / "old.safetensors"
    safetensors.numpy.save_file({name: np.ascontiguousarray(array) for name, array in old.items()}, path)
    module = MODULES[backend]
    pixels = np.tanh(normal(1, 16, 16, 3))
    current = module.load_vae(VAE, weight_files(folder, "vae"), device="cpu")
    assert np.array_equal(module.load_vae(VAE, [path], device="cpu").encode(pixels), current.encode(pixels))
    shapes = {name: array.shape for name, array in read_weights([path], mvtorch.model.network_shapes(VAE)).items()}
    assert shapes["decoder.mid_block.attentions.0.to_q.weight"] == (VAE.block_out_channels[-1],) * 2
