"""What every model with a VAE does: arrays in and out, pictures to latents and back."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvshared.backend import BackendName, Dtype
from mvshared.process_memory import reset_resident_peak, resident_peak
from mvshared.shapes import check_pictures
from mvtorch.vae import AutoencoderKL


class LatentModel:
    """A VAE on one device; its subclasses add what makes latents."""

    backend: BackendName
    device: str
    dtype: Dtype
    weight_files: Sequence[Path]

    def __init__(self, vae: AutoencoderKL, *, device: str, dtype: Dtype, weight_files: Sequence[Path]) -> None:
        self.backend = "torch"
        self.vae, self.device, self.dtype, self.weight_files = vae, device, dtype, weight_files

    def memory_peak(self) -> int | None:
        """Most bytes in use since `reset_memory_peak`, once the device has done its work: of PyTorch's tensors on CUDA, of the
        whole process on the CPU, None where neither is known."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        return resident_peak() if self.device == "cpu" else None

    def reset_memory_peak(self) -> None:
        """Begin to measure anew."""
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            reset_resident_peak()

    def from_numpy(self, x: NDArray[np.float32]) -> Tensor:
        """A float32 copy on the device."""
        return torch.tensor(np.ascontiguousarray(x, dtype=np.float32), device=self.device)

    def to_numpy(self, x: Tensor) -> NDArray[np.float32]:
        """A float32 copy."""
        return to_numpy(x)

    def all_finite(self, x: Tensor) -> bool:
        """Whether there is neither NaN nor infinity in an array."""
        return bool(torch.isfinite(x).all().item())

    def encode_latents(self, pixels: NDArray[np.float32]) -> Tensor:
        """Scaled latents (n, h, w, c), float32: the posterior's mean of pixels (n, H, W, 3) in [-1, 1], one at a time.

        Raises OptionError for shapes that do not fit.
        """
        with torch.inference_mode():
            return self.vae.scale_latents(self.vae.encode(self.from_numpy(pixels), batch=1).mean.float())

    def decode(self, x: Tensor) -> NDArray[np.float32]:
        """Pixels (v, H, W, 3), about [-1, 1], of scaled latents (v, h, w, c), one view at a time.

        Raises OptionError for shapes that do not fit.
        """
        check_pictures("latents", tuple(x.shape), channels=self.vae.config.latent_channels)
        with torch.inference_mode():
            return self.to_numpy(self.vae.decode(self.vae.unscale_latents(x), batch=1))


def to_numpy(x: Tensor) -> NDArray[np.float32]:
    """A float32 copy."""
    return x.detach().to("cpu", torch.float32, memory_format=torch.contiguous_format, copy=True).numpy()
