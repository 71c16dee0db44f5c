"""What every model with a VAE does: arrays in and out, pictures to latents and back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mvmlx.compiled import CompiledCalls
from mvmlx.device import evaluated, on_device
from mvmlx.metal import memory_limits, worth_compiling
from mvmlx.observation import Observer, OnEnd, OnStart, observe, observe_blocks
from mvmlx.vae import AutoencoderKL
from mvshared.backend import BackendName, Dtype
from mvshared.memory.plan import PLAIN, MemoryPlan
from mvshared.networks import Networks
from mvshared.process_memory import trim_heap
from mvshared.shapes import check_pictures
from mvshared.weights import weight_stamps


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
    _memory_at_reset = 0

    def __init__(
        self,
        networks: Networks,
        *,
        device: str,
        dtype: Dtype,
        weight_files: Sequence[Path],
        quantization: str | None = None,
    ) -> None:
        self.backend = "mlx"
        self.networks, self.device, self.dtype, self.weight_files = networks, device, dtype, weight_files
        self.weight_stamps = weight_stamps(weight_files)
        self.plan, self.quantization = PLAIN, quantization
        self._compiled = CompiledCalls(worthwhile=device == "gpu" and worth_compiling())

    @property
    def vae(self) -> AutoencoderKL:
        """The VAE, read if it is not in memory."""
        return self.networks["vae"]

    def observe(self, fn: Observer) -> AbstractContextManager[None]:
        """See `mvmlx.observation.observe`; the names begin with those of the networks, such as unet or vae."""
        return observe(self.networks, fn)

    def observe_blocks(self, on_end: OnEnd, on_start: OnStart | None = None) -> AbstractContextManager[Callable[[], float]]:
        """See `mvmlx.observation.observe_blocks`; the names are those of `observe`."""
        return observe_blocks(self.networks, on_end, on_start)

    @contextmanager
    def planned(self, plan: MemoryPlan) -> Iterator[None]:
        """Within the context, memory is used as the plan says, and MLX computes on the model's device."""
        before, self.plan = self.plan, plan
        if before.networks_at_once and not plan.networks_at_once:
            self.release()
        with on_device(self.device), memory_limits(self.device, plan.cache_bytes, plan.memory_bytes):
            try:
                with self.networks.watched(plan.attach):
                    yield
            finally:
                self.plan = before
                if not plan.networks_at_once:
                    self.release()

    def release(self, *components: str) -> None:
        """Forget networks, all if none is named, until they are needed again, and give their memory back to the system."""
        self._compiled.forget()
        if self.networks.release(*components):
            _free_memory()

    def memory_peak(self) -> int | None:
        """Most bytes in use since `reset_memory_peak`, once the device has done its work: of MLX's arrays, on any device."""
        mx.synchronize(mx.default_stream(mx.Device(getattr(mx, self.device))))
        return max(mx.get_peak_memory(), self._memory_at_reset)

    def reset_memory_peak(self) -> None:
        """Begin to measure anew."""
        self._memory_at_reset = mx.get_active_memory()  # MLX begins with zero and looks when memory is asked for
        mx.reset_peak_memory()

    def from_numpy(self, x: NDArray[np.float32]) -> mx.array:
        """A float32 copy on the device."""
        with on_device(self.device):
            return evaluated(mx.array(np.asarray(x, dtype=np.float32, order="C")))  # MLX takes no negative strides

    def to_numpy(self, x: mx.array) -> NDArray[np.float32]:
        """A float32 copy."""
        return to_numpy(x)

    def all_finite(self, x: mx.array) -> bool:
        """Whether there is neither NaN nor infinity in an array."""
        with on_device(self.device):
            return bool(mx.isfinite(x).all().item())

    def encode_latents(self, pixels: NDArray[np.float32]) -> mx.array:
        """Scaled latents (n, h, w, c), float32: the posterior's mean of pixels (n, H, W, 3) in [-1, 1], one at a time.

        Raises OptionError for shapes that do not fit.
        """
        vae = self.vae.config
        check_pictures("pixels", pixels.shape, channels=vae.in_channels, multiple=vae.downscale)
        with on_device(self.device):
            x = self.from_numpy(pixels)
            means = [
                evaluated(self.vae.encode(x[n : n + 1], tile=self.plan.vae_tile).mean.astype(mx.float32)) for n in range(len(x))
            ]
            return evaluated(self.vae.scale_latents(mx.concatenate(means)))

    def decode(self, x: mx.array) -> NDArray[np.float32]:
        """Pixels (v, H, W, 3), about [-1, 1], of scaled latents (v, h, w, c), one view at a time.

        Raises OptionError for shapes that do not fit.
        """
        check_pictures("latents", x.shape, channels=self.vae.config.latent_channels)
        with on_device(self.device):
            latents, tile = self.vae.unscale_latents(x), self.plan.vae_tile
            decode = partial(self.vae.decode, tile=tile) if tile else self._compiled(self.vae, "decode")
            decoded = [self.to_numpy(decode(latents[v : v + 1])) for v in range(len(latents))]
            return np.concatenate(decoded)


def _free_memory() -> None:
    """Give memory that is not used any more back to the system."""
    mx.clear_cache()
    trim_heap()


def to_numpy(x: mx.array) -> NDArray[np.float32]:
    """A float32 copy; numpy cannot read bfloat16."""
    return np.array(x.astype(mx.float32))
