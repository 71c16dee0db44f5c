"""What is to be measured: the options of `mvmlx benchmark`, checked, and the backends, devices and dtypes at hand."""

import importlib
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

from mvshared.arguments import MAX_VIEWS, picture_size
from mvshared.backend import PACKAGES, BackendName, Dtype, available_backends, check_diffusers, choose_backend
from mvshared.benchmark.measure import free_memory_bytes
from mvshared.benchmark.models import Measured, measured
from mvshared.checkpoint import components
from mvshared.errors import BackendError, OptionError
from mvshared.memory.estimate import ModelSize, config_size, estimate, model_size, usual_run
from mvshared.memory.plan import PLAIN
from mvshared.numbers import whole
from mvshared.schedule import MAX_STEPS

Guided = Literal["on", "off", "both"]
NAMES = ("start", "load", "condition", "step", "vae", "upscaler", "run")
GROWTH = "growth"
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")
PROCESS_BYTES = 400_000_000  # of Python and an array library, before the model
GPU_SHARE = 0.9  # of a GPU's memory that arrays can take


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options. `names` are of NAMES, or GROWTH alone; empty ones, views, sizes and dtypes are what `resolved` chooses.

    `against` is diffusers or None, `compiled` the mode of `torch.compile` that it is compiled in as well. Raises OptionError.
    """

    names: tuple[str, ...] = ()
    model: str = "demo"
    backend: str = "all"
    device: str = "auto"
    dtypes: tuple[str, ...] = ()
    views: tuple[int, ...] = ()
    sizes_px: tuple[int, ...] = ()
    guidance: str = "both"
    steps: int | None = None
    repeats: int = 5
    threads: int | None = None
    against: str | None = None
    compiled: str | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.names if name not in (*NAMES, GROWTH)]
        if unknown:
            raise OptionError("name", expected=f"one of {', '.join((*NAMES, GROWTH))}", got=unknown[0])
        if GROWTH in self.names and len(self.names) > 1:
            raise OptionError("names", expected=f"{GROWTH} alone, or others", got=" ".join(self.names))
        if GROWTH in self.names and self.against is not None:
            raise OptionError("against", expected=f"left out with {GROWTH}, which compares sizes", got=self.against)
        if self.guidance not in get_args(Guided):
            raise OptionError("guidance", expected="on, off or both", got=self.guidance)
        if self.against not in (None, "diffusers"):
            raise OptionError("against", expected="diffusers", got=self.against)
        if self.compiled is not None and self.against is None:
            raise OptionError("compiled", expected="given together with --against", got=self.compiled)
        if self.compiled is not None and self.compiled not in COMPILE_MODES:
            raise OptionError("compiled", expected=f"one of {', '.join(COMPILE_MODES)}", got=self.compiled)
        if self.backend != "all":
            choose_backend(self.backend)
        whole("repeats", self.repeats, 1, 1000)
        for name, value, most in (("threads", self.threads, 1024), ("steps", self.steps, MAX_STEPS)):
            if value is not None:
                whole(name, value, 1, most)
        for count in self.views:
            whole("views", count, 1, MAX_VIEWS)

    @property
    def guided(self) -> tuple[bool, ...]:
        """Whether steps are guided."""
        return {"on": (True,), "off": (False,), "both": (True, False)}[self.guidance]


class Place(NamedTuple):
    """Where something is measured."""

    backend: BackendName
    device: str
    dtype: Dtype


def resolved(settings: Settings) -> tuple[Settings, Measured]:
    """The settings with the model's own views, sizes and steps where none are given, and the model.

    Raises CheckpointError, OptionError for a size that the model cannot make, and BackendError without diffusers to compare it
    with.
    """
    if settings.against == "diffusers":
        check_diffusers()
    found = measured(settings.model)
    defaults = found.config.defaults
    names = settings.names
    if not names:
        names = tuple(name for name in NAMES if name != ("load" if found.folder is None else "upscaler"))
        if found.folder is None:  # minutes to hours of a whole run are only taken where they are asked for
            names = tuple(name for name in names if name != "run")
        names = () if settings.against else names
    sizes = tuple(
        picture_size(found.config, size, name="sizes") for size in dict.fromkeys(settings.sizes_px) or (defaults.size_px,)
    )
    return (
        replace(
            settings,
            names=names,
            views=tuple(dict.fromkeys(settings.views)) or ((1, 4) if settings.against else (defaults.views,)),
            sizes_px=sizes,
            steps=settings.steps or defaults.steps,
        ),
        found,
    )


def places(settings: Settings) -> tuple[list[Place], list[str]]:
    """Backends, devices and dtypes that are measured, and sentences about those that are not.

    Without dtypes it is float32 and what the device computes in by itself. Raises OptionError and BackendError.
    """
    chosen, notes = list[Place](), list[str]()
    available = available_backends()
    backends: list[BackendName] = available if settings.backend == "all" else [choose_backend(settings.backend)]
    if not backends:
        choose_backend("auto")  # says what to install
    for backend in backends:
        module = importlib.import_module(f"{PACKAGES[backend]}.model")
        try:
            device = module.choose_device(settings.device)
        except BackendError as missing:
            if settings.backend != "all" or (backend == backends[-1] and not chosen):
                raise
            notes.append(f"Not measured: {missing.message}.")
            continue
        if settings.backend == "all" and (backend, device) == ("mlx", "cpu") and len(available) > 1:
            notes.append("MLX's CPU backend is there for tests, and not measured unless it is named: --backend mlx.")
            continue
        own: Dtype = module.choose_dtype(None, device=device)
        dtypes = settings.dtypes or tuple(dict.fromkeys(("float32", own)))
        chosen += [Place(backend, device, module.choose_dtype(dtype, device=device)) for dtype in dtypes]
    return chosen, notes


class Needs:
    """What the cases of a model take in memory at a place, as far as `mvshared.memory` can say."""

    def __init__(self, found: Measured, place: Place) -> None:
        options: dict[str, Any] = {"backend": place.backend, "device": place.device, "dtype": place.dtype}
        config = found.config
        self.config, self.device, self.backend = config, place.device, place.backend
        self.size: ModelSize = (
            config_size(config, {part: {} for part in components(config)}, **options)
            if found.folder is None
            else model_size(found.folder, **options)
        )

    def stage(self, name: str, *, views: int, size_px: int, guided: bool) -> int:
        """Bytes of a process that has the networks of one stage alone, unet or vae_decoder."""
        run = usual_run(self.config, views=views, size_px=size_px, guidance=2.0 if guided else 1.0)
        apart = replace(PLAIN, networks_at_once=False)
        stages = estimate(self.size, run, apart).stages
        return PROCESS_BYTES + next(stage.bytes for stage in stages if stage.name == name)

    def run(self, *, views: int, size_px: int) -> int:
        """Bytes of a whole run with all networks."""
        run = usual_run(self.config, views=views, size_px=size_px, guidance=2.0)
        return estimate(self.size, run, PLAIN, process_bytes=PROCESS_BYTES).peak_bytes


def memory_limit(place: Place) -> int:
    """Bytes that cases at a place can take together."""
    package = importlib.import_module(f"{PACKAGES[place.backend]}.benchmark")
    own = package.device_memory_bytes(place.device)
    return free_memory_bytes() if own is None else round(GPU_SHARE * own)


def too_large(needed_bytes: int, limit_bytes: int) -> str:
    """Why something is not measured; empty if it fits."""
    if needed_bytes <= limit_bytes:
        return ""
    return f"needs about {needed_bytes / 1e9:.1f} GB of memory, {limit_bytes / 1e9:.1f} GB are free"
