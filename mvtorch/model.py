"""Loading a checkpoint folder into PyTorch, and the Model that the shared pipeline drives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from mvshared.backend import BackendName, Dtype, VAECodec, parse_dtype
from mvshared.checkpoint import find_model, read_model_config, weight_file
from mvshared.config import ModelConfig, VAEConfig
from mvshared.errors import BackendError
from mvshared.shapes import check_pictures
from mvshared.weights import check_names_and_shapes, match_tensors
from mvtorch.unet import MultiViewUNet
from mvtorch.vae import AutoencoderKL


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

    config: ModelConfig
    backend: BackendName
    device: str
    dtype: Dtype
    weight_files: Sequence[Path]

    def __init__(
        self,
        config: ModelConfig,
        unet: MultiViewUNet,
        vae: AutoencoderKL,
        *,
        device: str,
        dtype: Dtype,
        weight_files: Sequence[Path],
    ) -> None:
        self.backend = "torch"
        self.config, self.unet, self.vae = config, unet, vae
        self.device, self.dtype, self.weight_files = device, dtype, weight_files

    def from_numpy(self, x: NDArray[np.float32]) -> Tensor:
        """A float32 copy on the device."""
        return torch.tensor(np.ascontiguousarray(x, dtype=np.float32), device=self.device)

    def to_numpy(self, x: Tensor) -> NDArray[np.float32]:
        """A float32 copy."""
        return _to_numpy(x)

    def encode_latents(self, pixels: NDArray[np.float32]) -> Tensor:
        """Scaled latents (n, h, w, c), float32: the posterior's mean of pixels (n, H, W, 3) in [-1, 1], one at a time.

        Raises OptionError for shapes that do not fit.
        """
        with torch.inference_mode():
            return self.vae.scale_latents(self.vae.encode(self.from_numpy(pixels), batch=1).mean.float())

    def condition(
        self, *, cameras: NDArray[np.float32] | None, reference: Tensor | None, normals: Tensor | None, guided: bool
    ) -> Condition:
        """What `denoise` needs of camera vectors (v, 16), a clean latent (h, w, c) and latents of normal maps (v, h, w, c).

        The unconditional half has no reference; cameras and normal maps say what is looked at, so both halves have them.
        """

        def batched(x: Tensor | None, *, drop: bool = False) -> Tensor | None:
            if x is None:
                return None
            return torch.stack([torch.zeros_like(x) if drop else x, x]) if guided else x[None]

        with torch.inference_mode():
            views = None if cameras is None else self.from_numpy(cameras)
            return Condition(
                cameras=batched(views), reference=batched(reference, drop=True), normals=batched(normals), guided=guided
            )

    def denoise(self, x: Tensor, t: float, condition: Condition, guidance: float) -> Tensor:
        """The U-Net's output (v, h, w, c), float32, for latents x (v, h, w, c) at timestep t.

        Guided, it is `unconditional + guidance * (conditional - unconditional)`. Raises OptionError for shapes that do not fit.
        """
        unet = self.config.unet
        with torch.inference_mode():
            batch = 2 if condition.guided else 1
            sample = x[None].expand(batch, *x.shape)
            if unet.normal_channels:
                zeros = sample.new_zeros((*sample.shape[:-1], unet.normal_channels))
                sample = torch.cat([sample, zeros if condition.normals is None else condition.normals], dim=-1)
            timesteps = torch.full((batch,), t, dtype=torch.float32, device=self.device)
            out = self.unet(sample, timesteps, camera=condition.cameras, reference=condition.reference).float()
            if not condition.guided:
                return out[0]
            unconditional, conditional = out
            return unconditional + guidance * (conditional - unconditional)

    def decode(self, x: Tensor) -> NDArray[np.float32]:
        """Pixels (v, H, W, 3), about [-1, 1], of scaled latents (v, h, w, c), one view at a time.

        Raises OptionError for shapes that do not fit.
        """
        check_pictures("latents", tuple(x.shape), channels=self.vae.config.latent_channels)
        with torch.inference_mode():
            return self.to_numpy(self.vae.decode(self.vae.unscale_latents(x), batch=1))


def choose_device(device: str = "auto") -> str:
    """`auto` is CUDA if PyTorch finds it, else the CPU. Raises BackendError for a device that PyTorch does not have."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BackendError(
            f"PyTorch cannot use the device {device!r}: {reason}", backend="torch", hint="use cpu, or leave it to auto"
        ) from error
    return device


def choose_dtype(dtype: str | None, *, device: str) -> Dtype:
    """The given dtype, or float16 on a GPU and float32 on the CPU. Raises OptionError for another name."""
    return parse_dtype(dtype, default="float16" if device.startswith("cuda") else "float32")


def load_model(name: str | Path, *, dtype: str | None = None, device: str = "auto") -> MultiViewModel:
    """Load an embedded model by name, or a checkpoint folder.

    Raises CheckpointError, OptionError and BackendError.
    """
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, device=chosen_device)
    folder = find_model(name)
    config = read_model_config(folder)
    files = [weight_file(folder, "unet"), weight_file(folder, "vae")]
    with torch.device("meta"):
        unet, vae = MultiViewUNet(config.unet), AutoencoderKL(config.vae)
    for module, file in ((unet, files[0]), (vae, files[1])):
        load_weights(module, file, dtype=chosen_dtype, device=chosen_device)
        module.eval()
    return MultiViewModel(config, unet, vae, device=chosen_device, dtype=chosen_dtype, weight_files=files)


def load_weights(module: nn.Module, path: Path, *, dtype: Dtype, device: str) -> None:
    """Read a weight file into a module, one tensor at a time; the module's own weights are never needed.

    Raises CheckpointError for a damaged file and TensorMismatchError if names or shapes differ.
    """
    shapes = weight_shapes(module)
    names = match_tensors(path, shapes)
    tensors = {}
    with safe_open(path, framework="pt") as file:
        for name, name_in_file in names.items():
            tensor = file.get_tensor(name_in_file).reshape(shapes[name])
            layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
            tensors[name] = tensor.to(device=device, dtype=getattr(torch, dtype), memory_format=layout, copy=True)
    module.load_state_dict(tensors, strict=True, assign=True)


def load_vae(config: VAEConfig, path: Path, *, device: str = "auto") -> VAECodec:
    """The VAE of a weight file, in float32. Raises CheckpointError and BackendError."""
    chosen = choose_device(device)
    with torch.device("meta"):
        vae = AutoencoderKL(config)
    load_weights(vae, path, dtype="float32", device=chosen)

    def encode(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return _to_numpy(vae.scale_latents(vae.encode(torch.tensor(np.ascontiguousarray(pixels), device=chosen)).mean))

    def decode(latents: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return _to_numpy(vae.decode(vae.unscale_latents(torch.tensor(np.ascontiguousarray(latents), device=chosen))))

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
            tensor.copy_(torch.tensor(np.ascontiguousarray(weights[name])))


def get_weights(module: nn.Module) -> dict[str, NDArray[np.float32]]:
    """Float32 copies of the module's weights in checkpoint layout."""
    return {name: _to_numpy(tensor) for name, tensor in module.state_dict().items()}


def _to_numpy(x: Tensor) -> NDArray[np.float32]:
    return x.detach().to("cpu", torch.float32, memory_format=torch.contiguous_format, copy=True).numpy()
