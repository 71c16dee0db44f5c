"""Types that both backends' packages show, imported when they are asked for: `import mvtorch` alone reads no array library."""

import importlib
from typing import Any

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
