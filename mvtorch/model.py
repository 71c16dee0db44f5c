"""Loading a checkpoint folder into PyTorch, and the Model that the shared pipeline drives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from mvshared.backend import BackendName, Dtype
from mvshared.checkpoint import find_model, read_model_config, weight_file
from mvshared.config import ModelConfig, VAEConfig
from mvshared.errors import BackendError, OptionError
from mvshared.weights import check_names_and_shapes, read_header, rename_old_vae_attention
from mvtorch.unet import MultiViewUNet
from mvtorch.vae import AutoencoderKL

DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What stays constant over the sampling steps; batches are [unconditional, conditional] if guided, else [conditional].

    Cameras (b, v, 16), reference latents (b, h, w, c), latents of the normal maps (b, v, h, w, c).
    """

    cameras: Tensor | None
    reference: Tensor | None
    normals: Tensor | None
    guided: bool


class MultiViewModel:
    """A U-Net and a VAE on one device: implements `mvshared.backend.Model`."""

    backend: BackendName = "torch"

    def __init__(
        self,
        config: ModelConfig,
        unet: MultiViewUNet,
        vae: AutoencoderKL,
        *,
        device: str,
        dtype: Dtype,
        weight_files: list[Path],
    ) -> None:
        self.config, self.unet, self.vae = config, unet, vae
        self.device, self.dtype, self.weight_files = device, dtype, weight_files

    def from_numpy(self, x: NDArray[np.float32]) -> Tensor:
        """A float32 tensor on the device."""
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)).to(self.device)

    def to_numpy(self, x: Tensor) -> NDArray[np.float32]:
        """A float32 copy."""
        return x.detach().float().cpu().numpy().copy()

    @torch.inference_mode()
    def encode_latents(self, pixels: NDArray[np.float32]) -> Tensor:
        """Scaled latents (n, h, w, c), float32: the posterior's mean of pixels (n, H, W, 3) in [-1, 1]."""
        moments = self.vae.encode(self.from_numpy(pixels), batch=1)
        return self.vae.scale_latents(moments.mean.float())

    @torch.inference_mode()
    def condition(
        self, *, cameras: NDArray[np.float32] | None, reference: Tensor | None, normals: Tensor | None, guided: bool
    ) -> Condition:
        """Batch the conditions for `denoise`; the unconditional half has a zero reference and no normal maps."""

        def batched(x: Tensor | None, *, drop: bool) -> Tensor | None:
            if x is None:
                return None
            return torch.stack([torch.zeros_like(x) if drop else x, x]) if guided else x[None]

        views = None if cameras is None else self.from_numpy(cameras)
        return Condition(
            cameras=batched(views, drop=False),
            reference=batched(reference, drop=True),
            normals=batched(normals, drop=False),
            guided=guided,
        )

    @torch.inference_mode()
    def denoise(self, x: Tensor, t: float, condition: Condition, guidance: float) -> Tensor:
        """The U-Net's output (v, h, w, c), float32, guided as `unconditional + guidance * (conditional - unconditional)`."""
        batch = 2 if condition.guided else 1
        sample = x[None].expand(batch, *x.shape)
        if self.config.unet.normal_channels:
            normals = condition.normals
            if normals is None:
                normals = sample.new_zeros((*sample.shape[:-1], self.config.unet.normal_channels))
            sample = torch.cat([sample, normals], dim=-1)
        timesteps = torch.full((batch,), t, device=self.device)
        out = self.unet(sample, timesteps, camera=condition.cameras, reference=condition.reference).float()
        if not condition.guided:
            return out[0]
        unconditional, conditional = out
        return unconditional + guidance * (conditional - unconditional)

    @torch.inference_mode()
    def decode(self, x: Tensor) -> NDArray[np.float32]:
        """Pixels (v, H, W, 3), about [-1, 1], of scaled latents (v, h, w, c), one view at a time."""
        return self.to_numpy(self.vae.decode(self.vae.unscale_latents(x), batch=1))


def choose_device(device: str = "auto") -> str:
    """`auto` is CUDA if PyTorch finds it, else the CPU. Raises BackendError for a device that PyTorch does not have."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BackendError(
            f"PyTorch cannot use the device {device!r}: {reason}", backend="torch", hint="use cpu, or leave it to auto"
        ) from error
    return device


def choose_dtype(dtype: str | None, *, device: str) -> Dtype:
    """The given dtype, or float16 on CUDA and float32 elsewhere. Raises OptionError for another name."""
    if dtype is None:
        return "float16" if device.startswith("cuda") else "float32"
    if dtype not in get_args(Dtype):
        raise OptionError("dtype", expected="float32, float16 or bfloat16", got=dtype)
    return dtype  # type: ignore[return-value]


def load_model(name: str | Path, *, dtype: str | None = None, device: str = "auto") -> MultiViewModel:
    """Load an embedded model by name, or a checkpoint folder.

    Raises CheckpointError, OptionError and BackendError.
    """
    folder = find_model(name)
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, device=chosen_device)
    config = read_model_config(folder)
    files = [weight_file(folder, "unet"), weight_file(folder, "vae")]
    with torch.device("meta"):
        unet, vae = MultiViewUNet(config.unet), AutoencoderKL(config.vae)
    for module, file in ((unet, files[0]), (vae, files[1])):
        load_weights(module, file, dtype=DTYPES[chosen_dtype], device=chosen_device)
        module.eval()
    return MultiViewModel(config, unet, vae, device=chosen_device, dtype=chosen_dtype, weight_files=files)


def load_weights(module: nn.Module, path: Path, *, dtype: torch.dtype, device: str) -> None:
    """Read a weight file into a module, whose parameters may be on the meta device.

    Raises CheckpointError for a damaged file and TensorMismatchError if names or shapes differ.
    """
    found = {rename_old_vae_attention(name): info.shape for name, info in read_header(path).tensors.items()}
    expected = weight_shapes(module)
    check_names_and_shapes(expected=expected, found=found, path=path)
    tensors = {
        rename_old_vae_attention(name): tensor.to(device=device, dtype=dtype, memory_format=_memory_format(tensor))
        for name, tensor in load_file(path).items()
    }
    module.load_state_dict(tensors, strict=True, assign=True)


def _memory_format(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last if tensor.ndim == 4 else torch.contiguous_format


class VAECodec(NamedTuple):
    """A VAE alone: pixels (n, H, W, 3) in [-1, 1] to scaled latents (n, h, w, c) and back, float32."""

    encode: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    decode: Callable[[NDArray[np.float32]], NDArray[np.float32]]


def load_vae(config: VAEConfig, path: Path, *, device: str = "auto") -> VAECodec:
    """The VAE of a weight file, in float32. Raises CheckpointError and BackendError."""
    chosen = choose_device(device)
    with torch.device("meta"):
        vae = AutoencoderKL(config)
    load_weights(vae, path, dtype=torch.float32, device=chosen)

    @torch.inference_mode()
    def encode(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        moments = vae.encode(torch.from_numpy(np.ascontiguousarray(pixels)).to(chosen))
        return vae.scale_latents(moments.mean).cpu().numpy()

    @torch.inference_mode()
    def decode(latents: NDArray[np.float32]) -> NDArray[np.float32]:
        return vae.decode(vae.unscale_latents(torch.from_numpy(np.ascontiguousarray(latents)).to(chosen))).cpu().numpy()

    return VAECodec(encode, decode)


def weight_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a checkpoint of this module."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def set_weights(module: nn.Module, weights: Mapping[str, NDArray[Any]]) -> None:
    """Overwrite the module's weights with arrays in checkpoint layout. Raises TensorMismatchError."""
    found = {name: array.shape for name, array in weights.items()}
    check_names_and_shapes(expected=weight_shapes(module), found=found, path=None)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(weights[name])))


def get_weights(module: nn.Module) -> dict[str, NDArray[np.float32]]:
    """Float32 copies of the module's weights in checkpoint layout."""
    return {name: tensor.detach().float().cpu().contiguous().numpy().copy() for name, tensor in module.state_dict().items()}
