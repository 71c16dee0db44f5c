"""Helpers of the tests: comparisons that raise, tiny configurations, and the same call on both backends."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_map
from numpy.typing import NDArray

import mvmlx.unet
import mvmlx.upscaler
import mvmlx.vae
import mvtorch.model
import mvtorch.onednn
import mvtorch.unet
import mvtorch.upscaler
import mvtorch.vae
from mvshared.attention import FUSED, AttentionOptions
from mvshared.camera import camera_vectors, even_azimuths, orbit
from mvshared.checkpoint import write_component, write_model_config
from mvshared.config import GenerationDefaults, KUNetConfig, ModelConfig, SchedulerConfig, UNetConfig, VAEConfig
from mvshared.files import is_same
from mvshared.guidance import ALL
from mvshared.networks import Networks
from mvshared.pipeline import Pipeline

Backend = Literal["torch", "mlx"]
BACKENDS: tuple[Backend, ...] = ("torch", "mlx")

# Relative root mean square of differences that rounding explains, per dtype.
FLOAT32_RMS = 2e-5
FLOAT16_RMS = 5e-3
BFLOAT16_RMS = 4e-2

TINY_UNET = UNetConfig(
    block_out_channels=(32, 64),
    layers_per_block=(1, 1),
    transformer_layers_per_block=(1, 1),
    attention_levels=(True, True),
    num_attention_heads=(2, 4),
    cross_attention_dim=24,
    norm_num_groups=8,
)
TINY_VAE = VAEConfig(block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8)

TINY_MODEL = ModelConfig(
    family="custom",
    unet=replace(TINY_UNET, in_channels=8, cross_attention_dim=None, camera_dim=16, reference_frame=True),
    vae=TINY_VAE,
    scheduler=SchedulerConfig(),
    defaults=GenerationDefaults(views=2, azimuth_start_deg=45.0, steps=2, guidance=2.0, size_px=32),
)


def packs_bfloat16() -> bool:
    """Whether oneDNN lays weights in bfloat16 out on this processor: it needs instructions of AVX-512, or of AMX or Arm's."""
    try:
        torch.ops.mkldnn._reorder_linear_weight(torch.zeros((16, 16), dtype=torch.bfloat16))
    except RuntimeError:
        return False
    return True


NEEDS_PACKED_BFLOAT16 = pytest.mark.skipif(not packs_bfloat16(), reason="oneDNN packs no bfloat16 on this processor")


def multiplied(rms: Mapping[torch.dtype, float]) -> pytest.MarkDecorator:
    """Run a test with every way in which packed layers multiply: `dtype` is the fixture of conftest, `rms` the dtype's."""
    ways = [
        pytest.param((torch.float32,), rms[torch.float32], id="float32"),
        pytest.param((torch.bfloat16,), rms[torch.bfloat16], id="bfloat16", marks=NEEDS_PACKED_BFLOAT16),
        pytest.param((torch.bfloat16, "widened"), rms[torch.bfloat16], id="widened-bfloat16"),
        pytest.param((torch.float16, "widened"), rms[torch.float16], id="widened-float16"),
    ]
    return pytest.mark.parametrize(("dtype", "rms"), ways, indirect=["dtype"])


def to_numpy(x: Any) -> NDArray[Any]:
    """A torch or MLX array of any dtype as numpy; bfloat16 becomes float32, which holds it exactly."""
    if isinstance(x, torch.Tensor):
        x = x.detach()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    if isinstance(x, mx.array):
        return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)
    return np.asarray(x)


def relative_rms(actual: Any, expected: Any) -> float:
    """Root mean square of the difference over that of `expected`."""
    a, e = to_numpy(actual).astype(np.float64), to_numpy(expected).astype(np.float64)
    if a.shape != e.shape:
        raise AssertionError(f"the shapes differ: {a.shape}, expected {e.shape}")
    scale = np.sqrt(np.mean(e**2))
    if not scale:
        raise AssertionError("the expected array is all zeros, a relative difference says nothing")
    return float(np.sqrt(np.mean((a - e) ** 2)) / scale)


def pillow_clip_processor() -> Any:
    """transformers' class of image processors for CLIP that resize by Pillow; version 5 gave it a name of its own."""
    import transformers

    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def assert_close(actual: Any, expected: Any, *, rms: float) -> None:
    """Raise AssertionError unless shapes agree, everything is finite, and `relative_rms` is at most `rms`."""
    for name, x in (("actual", actual), ("expected", expected)):
        values = to_numpy(x).astype(np.float64)
        if not np.isfinite(values).all():
            raise AssertionError(f"the {name} array has {int((~np.isfinite(values)).sum())} values that are not finite")
    difference = relative_rms(actual, expected)
    if not difference <= rms:
        worst = np.max(np.abs(to_numpy(actual).astype(np.float64) - to_numpy(expected).astype(np.float64)))
        raise AssertionError(f"the relative RMS difference is {difference:.3g}, allowed {rms:.3g}; the largest is {worst:.3g}")


def assert_different(actual: Any, expected: Any, *, rms: float) -> None:
    """Raise AssertionError unless `relative_rms` is more than `rms`."""
    difference = relative_rms(actual, expected)
    if not difference > rms:
        raise AssertionError(f"the relative RMS difference is only {difference:.3g}, more than {rms:.3g} was expected")


class UNetInputs(NamedTuple):
    """Float32 arguments of a U-Net, in the layout of the border."""

    sample: NDArray[np.float32]
    timesteps: NDArray[np.float32]
    context: NDArray[np.float32] | None
    camera: NDArray[np.float32] | None
    reference: NDArray[np.float32] | None


def unet_inputs(config: UNetConfig, *, batch: int = 2, views: int = 1, size: tuple[int, int] = (8, 12)) -> UNetInputs:
    """Random arguments, with everything that the config can take."""
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    return UNetInputs(
        sample=normal(batch, views, *size, config.in_channels),
        timesteps=np.linspace(3.5, 981.0, batch, dtype=np.float32),
        context=None if config.cross_attention_dim is None else normal(batch, 7, config.cross_attention_dim),
        camera=None if config.camera_dim is None else normal(batch, views, config.camera_dim),
        reference=normal(batch, 1, *size, config.out_channels) if config.reference_frame else None,
    )


def randomise(module: torch.nn.Module) -> None:
    """Replace every weight by seeded noise, around 1 for the scales of norms, so that norms, biases and new parts count."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            spread = 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            centre = 1.0 if parameter.ndim == 1 and name.endswith(".weight") else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))


def make_unet(
    config: UNetConfig, backend: Backend, *, options: AttentionOptions = FUSED, gradient_checkpointing: bool = False
) -> Any:
    """A U-Net with random weights, the same on both backends."""
    arguments: dict[str, Any] = {"attention_options": options, "gradient_checkpointing": gradient_checkpointing}
    model = mvtorch.unet.MultiViewUNet(config, **arguments)
    randomise(model)
    return model if backend == "torch" else copy_weights(model, mvmlx.unet.MultiViewUNet(config, **arguments))


def make_vae(
    config: VAEConfig, backend: Backend, *, options: AttentionOptions = FUSED, gradient_checkpointing: bool = False
) -> Any:
    """A VAE with random weights, the same on both backends."""
    arguments: dict[str, Any] = {"attention_options": options, "gradient_checkpointing": gradient_checkpointing}
    model = mvtorch.vae.AutoencoderKL(config, **arguments)
    randomise(model)
    return model if backend == "torch" else copy_weights(model, mvmlx.vae.AutoencoderKL(config, **arguments))


def make_upscaler(
    config: KUNetConfig, backend: Backend, *, options: AttentionOptions = FUSED, gradient_checkpointing: bool = False
) -> Any:
    """An upscaler's network with random weights, the same on both backends."""
    arguments: dict[str, Any] = {"attention_options": options, "gradient_checkpointing": gradient_checkpointing}
    model = mvtorch.upscaler.LatentUpscaler(config, **arguments)
    randomise(model)
    return model if backend == "torch" else copy_weights(model, mvmlx.upscaler.LatentUpscaler(config, **arguments))


def copy_weights(source: torch.nn.Module, target: mlx.nn.Module) -> mlx.nn.Module:
    """Give an MLX module the weights of its twin, names and shapes exact; convolution kernels become channels-last."""
    weights = [(name, mx.array(kernel_to_mlx(to_numpy(value)))) for name, value in source.state_dict().items()]
    return target.load_weights(weights, strict=True)


def kernel_to_mlx(weight: NDArray[Any]) -> NDArray[Any]:
    """Convolution kernels (out, in, h, w) as (out, h, w, in); anything else as it is."""
    return weight.transpose(0, 2, 3, 1) if weight.ndim == 4 else weight


def set_dtype(model: Any, dtype: str) -> Any:
    """The model with its weights in "float32", "float16" or "bfloat16"."""
    if isinstance(model, torch.nn.Module):
        return model.to(getattr(torch, dtype))
    model.set_dtype(getattr(mx, dtype))
    return model


def from_numpy(model: Any, x: NDArray[Any] | None) -> Any:
    """The array for the backend of `model`; None stays None."""
    if x is None:
        return None
    return torch.from_numpy(np.array(x)) if isinstance(model, torch.nn.Module) else mx.array(x)


def denoise(model: Any, inputs: UNetInputs, *, reference_scale: float = 1.0) -> NDArray[Any]:
    """The U-Net's output as numpy, without gradients."""
    sample, timesteps, context, camera, reference = (from_numpy(model, x) for x in inputs)
    with torch.no_grad():
        constants = model.constants(context, camera=camera, reference=reference, reference_scale=reference_scale)
        return to_numpy(model(sample, model.time_embeddings(timesteps), constants))


def unet_gradients(model: Any, inputs: UNetInputs) -> dict[str, NDArray[Any]]:
    """Gradients by name, kernels in PyTorch's layout, of a loss that weighs every output differently."""
    sample, timesteps, context, camera, reference = (from_numpy(model, x) for x in inputs)
    shape = (*inputs.sample.shape[:4], model.config.out_channels)
    target = from_numpy(model, np.random.default_rng(2).standard_normal(shape, dtype=np.float32))

    def loss(unet: Any) -> Any:
        constants = unet.constants(context, camera=camera, reference=reference)
        return ((unet(sample, unet.time_embeddings(timesteps), constants) - target) ** 2).mean()

    return gradients(model, loss)


def gradients(model: Any, loss: Any) -> dict[str, NDArray[Any]]:
    """Gradients of `loss(model)` by name, kernels in PyTorch's layout; parameters without one are left out."""
    if isinstance(model, torch.nn.Module):
        model.zero_grad()
        loss(model).backward()
        return {name: to_numpy(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    _, tree = mlx.nn.value_and_grad(model, loss)(model)
    arrays: Any = tree_flatten(tree_map(to_numpy, tree))
    return {name: x.transpose(0, 3, 1, 2) if x.ndim == 4 else x for name, x in arrays}


def parameter_names(model: Any) -> set[str]:
    """Names of all parameters."""
    if isinstance(model, torch.nn.Module):
        return {name for name, _ in model.named_parameters()}
    flat: Any = tree_flatten(model.parameters())
    return {name for name, _ in flat}


def norm_eps(model: Any) -> dict[str, float]:
    """The eps of every normalisation by the name of its module."""
    return {name: module.eps for name, module in model.named_modules() if hasattr(module, "eps")}


def run_under_two_names(folder: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run the command line beside a folder whose name in small letters leads to it as well, as on most Macs.

    Where the file system tells the names apart, the folder is mounted under the other one for this process; the test is skipped
    where that is not allowed.
    """
    other = folder.with_name(folder.name.lower())
    command = [sys.executable, "-c", "from mvshared.entry import main; main()", *arguments]
    if not is_same(folder, other):
        own = ["unshare", "--map-root-user", "--mount"]
        if shutil.which(own[0]) is None or subprocess.run([*own, "true"], capture_output=True).returncode:
            pytest.skip("the file system tells letters of either case apart, and nothing can be mounted")
        other.mkdir(exist_ok=True)
        command = [*own, "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', str(folder), str(other), *command]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True)


def write_tiny_model(folder: Path, config: ModelConfig = TINY_MODEL) -> Path:
    """A complete checkpoint folder with random weights, which makes 32 px pictures in milliseconds; returns the folder."""
    write_component(folder, "unet", config.unet, mvtorch.model.get_weights(make_unet(config.unet, "torch")))
    write_component(folder, "vae", config.vae, mvtorch.model.get_weights(make_vae(config.vae, "torch")))
    write_model_config(folder, config)
    return folder


def normal_maps(count: int, size_px: int = 32) -> NDArray[np.uint8]:
    """Different normal maps (count, size_px, size_px, 3) of bumpy surfaces that face the camera."""
    slopes = np.random.default_rng(1).uniform(-0.5, 0.5, (count, size_px, size_px, 2))
    vectors = np.concatenate([slopes, np.ones((count, size_px, size_px, 1))], axis=-1)
    return np.rint((vectors / np.linalg.norm(vectors, axis=-1, keepdims=True) + 1) * 127.5).astype(np.uint8)


class RecordingModel:
    """A model that keeps the calls of its methods, as (name, positional arguments), and is otherwise the one inside."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.model, name)
        if not callable(value):
            return value

        def recorded(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args))
            return value(*args, **kwargs)

        return recorded

    def arguments(self, name: str) -> list[tuple[Any, ...]]:
        """The positional arguments of every call of one method."""
        return [args for called, args in self.calls if called == name]


class Recorded(NamedTuple):
    """A pipeline and its model, which keeps the calls."""

    pipeline: Pipeline[Any]
    model: RecordingModel


def record(pipeline: Pipeline[Any]) -> Recorded:
    """The pipeline around a model that keeps its calls."""
    model: Any = RecordingModel(pipeline.model)
    return Recorded(Pipeline(model, name=pipeline.name), model)


def with_unet(pipeline: Pipeline[Any], unet: Any) -> Pipeline[Any]:
    """A pipeline of the same networks but another U-Net."""
    model: Any = copy(pipeline.model)
    kept: Networks = model.networks
    loaders = {name: lambda name=name: kept[name] for name in kept}
    model.networks = Networks({**loaders, "unet": lambda: unet})
    return Pipeline(model, name=pipeline.name)


def random_conditions(model: Any, *, seed: int = 0, timesteps: Sequence[float] = ()) -> Any:
    """What the U-Net of tiny-imagedream is conditioned on for two views of 64 px, with and without the text; random states."""
    random = np.random.default_rng(seed)
    text, states, reference = (
        model.from_numpy(random.standard_normal(shape, np.float32)) for shape in ((2, 77, 32), (1, 17, 32), (1, 8, 8, 4))
    )
    return model.condition(
        text=text,
        image_states=states,
        cameras=camera_vectors(orbit(even_azimuths(2), 10.0)),
        reference=reference,
        normals=None,
        branches=[ALL._replace(text=False), ALL],
        timesteps=timesteps,
    )


def program_of_the_demo_model(name: str) -> Any:
    """A program of examples/demo-model as a module, whose main part has not run."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"examples/demo-model/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
