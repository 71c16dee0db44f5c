"""What every model with a VAE does: arrays in and out, pictures to latents and back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvshared.backend import BackendName, Dtype
from mvshared.memory.plan import PLAIN, MemoryPlan, vae_batch
from mvshared.networks import Networks
from mvshared.process_memory import reset_resident_peak, resident_peak, trim_heap
from mvshared.shapes import check_pictures
from mvshared.weights import weight_stamps
from mvtorch.graphs import graphs_on
from mvtorch.inference import inference, to_device
from mvtorch.observation import Observer, OnEnd, OnStart, any_observed, observe, observe_blocks
from mvtorch.vae import AutoencoderKL

_RECORDED_PIXELS = 1 << 18  # of views that are decoded by a recorded call: with more, launching takes no time beside computing


class LatentModel:
    """A VAE on one device; its subclasses add what makes latents.

    `networks` are read when they are needed; `plan` says how memory is used, `quantization` how weights were quantised: q8 or
    q4 as they are read, `stored` and the preset if their files are.
    """

    backend: BackendName
    device: str
    dtype: Dtype
    weight_files: Sequence[Path]
    weight_stamps: Sequence[str]
    quantization: str | None

    def __init__(
        self,
        networks: Networks,
        *,
        device: str,
        dtype: Dtype,
        weight_files: Sequence[Path],
        quantization: str | None = None,
    ) -> None:
        self.backend = "torch"
        self.networks, self.device, self.dtype, self.weight_files = networks, device, dtype, weight_files
        self.weight_stamps = weight_stamps(weight_files)
        self.plan, self.quantization = PLAIN, quantization
        self._graphs = graphs_on(device)
        self._vae_graphs = graphs_on(device)  # of its own, so that one that cannot be recorded leaves the others

    @property
    def vae(self) -> AutoencoderKL:
        """The VAE, read if it is not in memory."""
        return self.networks["vae"]

    def observe(self, fn: Observer) -> AbstractContextManager[None]:
        """See `mvtorch.observation.observe`; the names begin with those of the networks, such as unet or vae."""
        return observe(self.networks, fn)

    def observe_blocks(self, on_end: OnEnd, on_start: OnStart | None = None) -> AbstractContextManager[Callable[[], float]]:
        """See `mvtorch.observation.observe_blocks`; the names are those of `observe`."""
        return observe_blocks(self.networks, on_end, on_start)

    @contextmanager
    def planned(self, plan: MemoryPlan) -> Iterator[None]:
        """Within the context, memory is used as the plan says."""
        before, self.plan = self.plan, plan
        self._spare(plan)
        try:
            with self.networks.watched(plan.attach):
                yield
        finally:
            self.plan = before
            if not plan.networks_at_once:
                self.release()
            self._spare(before)

    def _spare(self, plan: MemoryPlan) -> None:
        """Have networks read as a plan says, and forget those that take more."""
        lean, self.networks.lean = self.networks.lean, not plan.networks_at_once
        if self.networks.lean and not lean:
            self.release()

    def release(self, *components: str) -> None:
        """Forget networks, all if none is named, until they are needed again, and give their memory back to the system."""
        if self.networks.release(*components):
            _free_memory(self.device)

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
        return to_device(torch.from_numpy(np.array(x, np.float32)), self.device)

    def to_numpy(self, x: Tensor) -> NDArray[np.float32]:
        """A float32 copy."""
        return to_numpy(x)

    def all_finite(self, x: Tensor) -> bool:
        """Whether there is neither NaN nor infinity in an array."""
        return bool(torch.isfinite(x).all().item())

    def encode_latents(self, pixels: NDArray[np.float32]) -> Tensor:
        """Scaled latents (n, h, w, c), float32: the posterior's mean of pixels (n, H, W, 3) in [-1, 1], as many at a time
        as `mvshared.memory.plan.vae_batch` says.

        Raises OptionError for shapes that do not fit.
        """
        with inference(self.device):
            together = self._together(prod(pixels.shape[1:3]))
            return self.vae.scale_latents(
                self.vae.encode(self.from_numpy(pixels), batch=together, tile=self.plan.vae_tile).mean.float()
            )

    def decode(self, x: Tensor) -> NDArray[np.float32]:
        """Pixels (v, H, W, 3), about [-1, 1], of scaled latents (v, h, w, c), as many views at a time as
        `mvshared.memory.plan.vae_batch` says.

        Raises OptionError for shapes that do not fit.
        """
        vae = self.vae
        check_pictures("latents", tuple(x.shape), channels=vae.config.latent_channels)
        pixels = prod(x.shape[1:3]) * vae.config.downscale**2
        together, all_pixels = self._together(pixels), len(x) * pixels
        with inference(self.device):
            latents, tile = vae.unscale_latents(x), self.plan.vae_tile
            if tile is not None or together < len(latents):
                return self.to_numpy(vae.decode(latents, batch=together, tile=tile))
            graphs = self._vae_graphs
            if graphs is None or not self.plan.networks_at_once or all_pixels > _RECORDED_PIXELS:
                return self.to_numpy(vae.decode(latents))
            # Its recording outlives runs, between which the weights may be replaced.
            places = tuple(parameter.data_ptr() for parameter in vae.parameters())
            return self.to_numpy(graphs.call(vae, vae, vae.decode, [latents], depends_on=places))

    def _together(self, pixels: int) -> int:
        """How many pictures of so many pixels the VAE takes; one where somebody looks at it, whatever the device."""
        return 1 if any_observed(self.vae) else vae_batch(self.plan, self.backend, self.device, pixels=pixels)

    def _called(self, network: Any, condition: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`function(*inputs)`, recorded where device and plan allow it, see `Graphs.call`."""
        if self._graphs is None or not (self.plan.networks_at_once and self.plan.branches_at_once):
            return function(*inputs)
        return self._graphs.call(network, condition, function, inputs)


def _free_memory(device: str) -> None:
    """Give memory that is not used any more back to the system."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    trim_heap()


def to_numpy(x: Tensor) -> NDArray[np.float32]:
    """A float32 copy."""
    return x.detach().to("cpu", torch.float32, memory_format=torch.contiguous_format, copy=True).numpy()
