"""Pictures for CLIP's vision tower: shortest side (or both) to a size, centre crop, normalised; as CLIPImageProcessor.

That is transformers'; the numbers come from a checkpoint's preprocessor_config.json.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvshared.config import CLIPImageConfig
from mvshared.errors import CheckpointError, OptionError
from mvshared.files import read_json_object

MOST_ELONGATED = 256  # times its width, a picture is as high at most: of a longer one the middle counts
ALWAYS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")


def read_clip_image_config(path: Path) -> CLIPImageConfig:
    """The preparation that a preprocessor_config.json describes. Raises CheckpointError for one that CLIP does not have."""
    document = read_json_object(path, error=CheckpointError)
    skipped = [name for name in ALWAYS if document.get(name, True) is not True]
    if skipped:
        raise CheckpointError(f"{skipped[0]} must be true, got {document[skipped[0]]!r}", path=path)
    defaults = CLIPImageConfig()
    values: dict[str, Any] = {
        "shortest_edge": _side(document.get("size", defaults.shortest_edge), path),
        "crop_size": _side(document.get("crop_size", defaults.crop_size), path),
        "squeeze": isinstance(document.get("size"), dict) and "height" in document["size"],
    }
    for name in ("resample", "rescale_factor", "image_mean", "image_std"):
        value = document.get(name, getattr(defaults, name))
        numbers = value if isinstance(value, list | tuple) else [value]
        kinds = int if name == "resample" else int | float
        if len(numbers) != (3 if name.startswith("image_") else 1) or not all(isinstance(n, kinds) for n in numbers):
            raise CheckpointError(f"{name} is malformed: {value!r}", path=path)
        values[name] = tuple(numbers) if name.startswith("image_") else numbers[0]
    try:
        return CLIPImageConfig(**values)
    except OptionError as refused:
        raise CheckpointError(str(refused), path=path) from refused


def clip_pixels(image: NDArray[np.uint8], config: CLIPImageConfig) -> NDArray[np.float32]:
    """Normalised pixels float32 (crop_size, crop_size, 3) of a picture uint8 (h, w, 3) of any size."""
    height, width = image.shape[:2]
    if not config.squeeze:  # what lies beyond is cut away in any case, but would be resized before
        length = MOST_ELONGATED * min(height, width)
        down, right = (max(0, side - length) // 2 for side in (height, width))
        image = image[down : height - down, right : width - right]
        height, width = image.shape[:2]
    long = config.shortest_edge if config.squeeze else int(config.shortest_edge * max(height, width) / min(height, width))
    size = (config.shortest_edge, long) if width <= height else (long, config.shortest_edge)
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling(config.resample)))
    top, left = ((side - config.crop_size) // 2 for side in resized.shape[:2])
    cropped = resized[top : top + config.crop_size, left : left + config.crop_size]
    mean, std = (np.asarray(values, np.float32) for values in (config.image_mean, config.image_std))
    return (cropped.astype(np.float32) * np.float32(config.rescale_factor) - mean) / std


def _side(value: Any, path: Path) -> int:
    """A size as the configs write it: a number, {"shortest_edge": n} or {"height": n, "width": n}."""
    sides = list(value.values()) if isinstance(value, dict) else [value]
    known = not isinstance(value, dict) or set(value) in ({"shortest_edge"}, {"height", "width"})
    if not known or not all(isinstance(side, int) for side in sides) or len(set(sides)) != 1:
        raise CheckpointError(f"a size must be one number for both sides, got {value!r}", path=path)
    return sides[0]
