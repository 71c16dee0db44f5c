"""What both backends' packages show, imported when it is asked for: `import mvtorch` alone reads no array library."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvshared.backend import BackendName

_PLACES = {
    "Pipeline": "mvshared.pipeline",
    "Progress": "mvshared.pipeline",
    "Upscaler": "mvshared.upscaling.latents",
    "Views": "mvshared.runs",
}


def lazily(package: str, name: str) -> Any:
    """What `__getattr__` of a package gives for a name that it does not have. Raises AttributeError for any other."""
    if name not in _PLACES:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


@contextmanager
def importing(backend: "BackendName") -> Iterator[None]:
    """A context in which a backend's modules are imported. Raises BackendError if its array library is not installed."""
    try:
        yield
    except ModuleNotFoundError as cause:
        if cause.name not in (backend, f"{backend}.core"):  # as its library is named; what is imported of MLX is mlx.core
            raise
        from mvshared.backend import not_installed

        raise not_installed(backend) from cause
