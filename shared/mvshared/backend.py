"""The seam between the shared pipeline and the two backends: the Model protocol, and which backend to use."""

import importlib
import platform
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, Protocol, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from mvshared.blocks import Block, Call
from mvshared.config import ModelConfig
from mvshared.errors import BackendError, OptionError
from mvshared.guidance import Branch

if TYPE_CHECKING:
    from mvshared.memory.plan import MemoryPlan
    from mvshared.pipeline import Pipeline
    from mvshared.upscaling.config import UpscalerConfig
    from mvshared.upscaling.latents import Upscaler

BackendName = Literal["mlx", "torch"]
Dtype = Literal["float32", "float16", "bfloat16"]

PACKAGES: dict[BackendName, str] = {"mlx": "mvmlx", "torch": "mvtorch"}
TORCH = "torch>=2.11,<2.14"  # as pyproject.toml has it


class Array(Protocol):
    """What the pipeline does with a backend's arrays: sums, and products with Python floats."""

    def __add__(self, other: Any, /) -> Any: ...
    def __rmul__(self, other: float, /) -> Any: ...


A = TypeVar("A", bound=Array)


class LatentModel(Protocol[A]):
    """What every loaded model with a VAE does. Arrays of type A live on its device; pictures and latents are (v, h, w, c)."""

    backend: BackendName
    device: str
    dtype: Dtype
    weight_files: Sequence[Path]
    weight_stamps: Sequence[str]  # of `mvshared.weights.weight_stamps`, when the model was loaded
    quantization: str | None
    plan: "MemoryPlan"

    def planned(self, plan: "MemoryPlan") -> AbstractContextManager[None]:
        """Within the context, memory is used as the plan says, and what is computed with arrays is computed on the device."""
        ...

    def release(self, *components: str) -> None:
        """Forget networks, all if none is named, until they are needed again."""
        ...

    def observe(self, fn: Callable[[str, A, float], None]) -> AbstractContextManager[None]:
        """Within the context, `fn(name, array, seconds)` is called after every block; see `mvtorch.observe`."""
        ...

    def observe_blocks(
        self, on_end: Callable[[Block[A]], None], on_start: Callable[[Call[A]], None] | None = None
    ) -> AbstractContextManager[Callable[[], float]]:
        """As `observe`, with all that is known of a block; the context gives the blocks' clock: see `mvtorch`."""
        ...

    def all_finite(self, x: A) -> bool:
        """Whether there is neither NaN nor infinity in an array."""
        ...

    def memory_peak(self) -> int | None:
        """Most bytes in use since `reset_memory_peak`, once the device has done its work; see `mvshared.stages.MemoryMeter`."""
        ...

    def reset_memory_peak(self) -> None:
        """Begin to measure anew."""
        ...

    def from_numpy(self, x: NDArray[np.float32]) -> A:
        """A float32 array on the device."""
        ...

    def to_numpy(self, x: A) -> NDArray[np.float32]:
        """A float32 copy."""
        ...

    def encode_latents(self, pixels: NDArray[np.float32]) -> A:
        """Scaled latents (n, h, w, c), float32: the posterior's mean of pixels (n, H, W, 3) in [-1, 1]."""
        ...

    def decode(self, x: A) -> NDArray[np.float32]:
        """Pixels (v, H, W, 3), about [-1, 1], of latents (v, h, w, c)."""
        ...


class Guided(NamedTuple, Generic[A]):
    """Outputs of the network (v, h, w, c): the sum over the branches, and those of the branch with all conditions alone."""

    out: A
    conditional: A


class Model(LatentModel[A], Protocol[A]):
    """A loaded multi-view model."""

    config: ModelConfig

    def encode_prompt(self, token_ids: NDArray[np.int64]) -> A:
        """The text tower's last states (n, l, c) of token ids (n, l)."""
        ...

    def encode_image(self, pixels: NDArray[np.float32]) -> A:
        """The vision tower's states before its last layer (n, m, c) of normalised pixels (n, s, s, 3)."""
        ...

    def condition(
        self,
        *,
        text: A | None = None,
        image_states: A | None = None,
        image_scale: float = 1.0,
        cameras: NDArray[np.float32] | None,
        reference: A | None,
        reference_scale: float = 1.0,
        normals: A | None,
        branches: Sequence[Branch],
        timesteps: Sequence[float] = (),
    ) -> Any:
        """Everything that stays constant over the sampling steps, for `denoise`.

        Text states (n, l, c) of the prompt, behind those of the negative one if a branch needs them; states (r, m, c) of r
        pictures and the weight of their tokens, camera vectors (v, 16), clean reference latents (r, h, w, c) and the weight of
        their tokens, latents of the normal maps (v, h, w, c). `branches` says what is computed at once, `timesteps` which ones
        are to be expected; `denoise` takes others too.
        """
        ...

    @property
    def defers(self) -> bool:
        """Whether `denoise` only puts together what `start` begins to compute."""
        ...

    def start(self, x: A) -> None:
        """Begin to compute an array, where arrays are computed when they are needed."""
        ...

    def wait(self, x: A) -> None:
        """Return when an array is computed, where a device is given more work before that."""
        ...

    def guided(self, x: A, t: float, condition: Any, weights: Sequence[float], rescale: float = 0.0) -> "Guided[A]":
        """What `denoise` gives, and beside it the last branch's outputs alone."""
        ...

    def denoise(self, x: A, t: float, condition: Any, weights: Sequence[float], rescale: float = 0.0) -> A:
        """The network's outputs (v, h, w, c), float32, for latents x at timestep t: the sum over the condition's branches, each
        times its weight, `rescale` of it brought back to the deviation of the last branch."""
        ...


class TextStates(NamedTuple, Generic[A]):
    """What an upscaler takes of texts: states (b, l, c) and pooled states (b, c)."""

    states: A
    pooled: A


class UpscalerModel(LatentModel[A], Protocol[A]):
    """A loaded latent upscaler."""

    config: "UpscalerConfig"

    def encode_text(self, token_ids: NDArray[np.int64]) -> TextStates[A]:
        """States before the last norm and pooled states, float32, of token ids (b, l)."""
        ...

    def condition(self, low: NDArray[np.float32], noise_embedding: NDArray[np.float32], *, text: TextStates[A] | None) -> Any:
        """Everything that stays constant over the steps: of low-resolution latents, the embedding (k,) of their noise level,
        and a text of b branches, [unconditional, conditional] or [conditional]."""
        ...

    def denoise(self, x: A, t: float, condition: Any, guidance: float) -> A:
        """Minus the velocity, float32, in latents x of twice the size; t is a quarter of ln sigma."""
        ...


class VAECodec(NamedTuple):
    """A VAE alone: pixels (n, H, W, 3) in [-1, 1] to scaled latents (n, h, w, c) and back, float32."""

    encode: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    decode: Callable[[NDArray[np.float32]], NDArray[np.float32]]


def available_backends() -> list[BackendName]:
    """The backends whose array library is installed; nothing is imported."""
    return [name for name in PACKAGES if find_spec(name) is not None]  # named as their libraries are


def install_hint(name: BackendName) -> str:
    """How a backend's array library is installed on this machine."""
    if name == "mlx":
        return "install it with: pip install 'mvmlx' on a Mac, pip install 'mvmlx[cpu]' or 'mvmlx[cuda]' on Linux"
    if platform.system() == "Linux" and not has_nvidia_driver():  # by default it comes with gigabytes of CUDA
        return f"install it with: pip install '{TORCH}' --index-url https://download.pytorch.org/whl/cpu"
    return "install it with: pip install 'mvmlx[torch]'"


def is_metal(name: BackendName, device: str) -> bool:
    """Whether a backend's device is a Mac's GPU under MLX, whose "gpu" is one of CUDA elsewhere."""
    return name == "mlx" and device != "cpu" and platform.system() == "Darwin"


def has_nvidia_driver() -> bool:
    """Whether this machine, a Linux, has an NVIDIA GPU that can be computed on, as far as can be told without a library."""
    return Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


def not_installed(name: BackendName) -> BackendError:
    """The error of a backend whose array library is not there."""
    return BackendError(f"the {name} backend is not installed", backend=name, hint=install_hint(name))


def check_diffusers() -> None:
    """Raise BackendError unless what this project is compared with is installed: diffusers, transformers, PyTorch."""
    if "torch" not in available_backends():
        raise not_installed("torch")
    for library in ("diffusers", "transformers"):
        if find_spec(library) is None:
            raise BackendError(f"{library} is not installed", backend="torch", hint="pip install 'mvmlx[validate]'")


def choose_backend(name: str = "auto") -> BackendName:
    """The backend to use: `auto` is MLX on a Mac with Apple silicon, elsewhere PyTorch, else whichever is there.

    Raises OptionError for another name, BackendError if it is not installed.
    """
    if name not in ("auto", *get_args(BackendName)):
        raise OptionError("backend", expected="auto, mlx or torch", got=name)
    available = available_backends()
    if name in available:
        return name
    if name in PACKAGES:
        raise not_installed(name)
    if not available:
        hint = f"{install_hint('torch')}; or for MLX {install_hint('mlx')}"
        raise BackendError("no backend is installed", backend="auto", hint=hint)
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    preferred: BackendName = "mlx" if apple else "torch"
    return preferred if preferred in available else available[0]


def parse_dtype(name: str | None, *, default: Dtype) -> Dtype:
    """The dtype of that name, `default` for None. Raises OptionError for another name."""
    if name is None:
        return default
    for dtype in get_args(Dtype):
        if name == dtype:
            return dtype
    raise OptionError("dtype", expected="float32, float16 or bfloat16", got=name)


def chosen_dtype(dtype: str | None, *, backend: BackendName, device: str) -> Dtype:
    """The dtype that a model is loaded in: the given one, or the device's. Raises OptionError and BackendError."""
    module = importlib.import_module(f"{PACKAGES[backend]}.model")
    return module.choose_dtype(dtype, device=module.choose_device(device))


def load(
    name: str | Path = "demo",
    *,
    backend: str = "auto",
    dtype: str | None = None,
    device: str = "auto",
    quantize: str | None = None,
    low_memory: bool = False,
    memory_budget: str | float | None = None,
) -> "Pipeline[Any]":
    """Load a model in a backend: see `mvtorch.load` and `mvmlx.load`, which this calls.

    Raises OptionError, BackendError and CheckpointError.
    """
    package = importlib.import_module(PACKAGES[choose_backend(backend)])
    return package.load(name, dtype=dtype, device=device, quantize=quantize, low_memory=low_memory, memory_budget=memory_budget)


def load_upscaler(
    name: str | Path,
    *,
    backend: str = "auto",
    dtype: str | None = None,
    device: str = "auto",
    quantize: str | None = None,
    low_memory: bool = False,
) -> "Upscaler[Any]":
    """Load a latent upscaler in a backend: see `mvtorch.load_upscaler` and `mvmlx.load_upscaler`, which this calls.

    Raises OptionError, BackendError and CheckpointError.
    """
    package = importlib.import_module(PACKAGES[choose_backend(backend)])
    return package.load_upscaler(name, dtype=dtype, device=device, quantize=quantize, low_memory=low_memory)
