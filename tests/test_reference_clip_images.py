"""Pictures for CLIP against transformers' image processor."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_close, pillow_clip_processor
from numpy.typing import NDArray

from mvshared import clip_images
from mvshared.clip_images import clip_pixels, read_clip_image_config
from mvshared.config import CLIPImageConfig
from mvshared.conversion.configs import image_processor_document
from mvshared.errors import CheckpointError, OptionError

# Smaller and larger than the crop, square and not, one pixel, and sides whose quotient rounds badly.
SIZES = [(224, 224), (256, 256), (100, 80), (80, 100), (1, 1), (3, 700), (225, 224), (640, 427), (33, 34)]


def picture(size: tuple[int, int]) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)


def write(path: Path, document: Any) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def oracle(image: NDArray[np.uint8], *, edge: int, crop: int, squeeze: bool = False) -> NDArray[np.float32]:
    size = {"height": edge, "width": edge} if squeeze else {"shortest_edge": edge}
    processor = pillow_clip_processor()(size=size, crop_size={"height": crop, "width": crop})
    return processor(image, return_tensors="np", input_data_format="channels_last").pixel_values[0].transpose(1, 2, 0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [224, 56])
def test_pixels_are_those_of_transformers(size: tuple[int, int], side: int) -> None:
    config = CLIPImageConfig(shortest_edge=side, crop_size=side)
    pixels = clip_pixels(picture(size), config)
    assert pixels.shape == (side, side, 3)
    assert pixels.dtype == np.float32
    levels = np.abs(pixels - oracle(picture(size), edge=side, crop=side)) * np.asarray(config.image_std) * 255
    assert levels.max() <= 1e-3  # one 8-bit level is 1


def test_a_crop_is_taken_from_the_middle() -> None:
    image = picture((60, 45))
    pixels = clip_pixels(image, CLIPImageConfig(shortest_edge=40, crop_size=20))
    np.testing.assert_allclose(pixels, oracle(image, edge=40, crop=20), atol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [
        {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}},
        {"size": 56, "crop_size": 56},
    ],
)
def test_sizes_are_read_however_they_are_written(sizes: dict[str, Any], tmp_path: Path) -> None:
    mean = [0.5, 0.25, 0.125]
    config = read_clip_image_config(write(tmp_path / "config.json", sizes | {"image_mean": mean, "resample": 2}))
    assert config == CLIPImageConfig(shortest_edge=56, crop_size=56, image_mean=(0.5, 0.25, 0.125), resample=2)


@pytest.mark.parametrize("size", SIZES)
def test_a_size_of_height_and_width_squeezes_the_picture(size: tuple[int, int], tmp_path: Path) -> None:
    document = {"size": {"height": 56, "width": 56}, "crop_size": 56}
    config = read_clip_image_config(write(tmp_path / "config.json", document))
    assert config == CLIPImageConfig(shortest_edge=56, crop_size=56, squeeze=True)
    assert read_clip_image_config(write(tmp_path / "again.json", image_processor_document(config))) == config
    pixels = clip_pixels(picture(size), config)
    levels = np.abs(pixels - oracle(picture(size), edge=56, crop=56, squeeze=True)) * np.asarray(config.image_std) * 255
    assert levels.max() <= 1e-3


def test_what_is_not_said_is_clip_s_own(tmp_path: Path) -> None:
    assert read_clip_image_config(write(tmp_path / "config.json", {"feature_extractor_type": "x"})) == CLIPImageConfig()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"do_resize": False}, "do_resize must be true, got False"),
        ({"size": {"longest_edge": 3}}, "a size must be one number"),
        ({"crop_size": {"height": 3, "width": 4}}, "a size must be one number"),
        ({"size": "224"}, "a size must be one number"),
        ({"crop_size": 300}, "crop_size must be from 1 to shortest_edge"),
        ({"size": {"shortest_edge": 10**30}}, "shortest_edge must be at most 1000000, got"),
        ({"size": {"shortest_edge": 10_001}}, "shortest_edge must be at most 10000, got"),
        ({"crop_size": 0}, "crop_size must be a whole number of at least 1, got 0"),
        ({"resample": 9}, "resample must be one of Pillow's filters"),
        ({"image_mean": [0.5]}, "image_mean is malformed"),
        ({"image_std": [1, 1, 0]}, "image_std must be above 0"),
        ({"rescale_factor": "1/255"}, "rescale_factor is malformed"),
    ],
)
def test_other_preparations_are_refused(document: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_clip_image_config(write(tmp_path / "config.json", document))


def test_a_crop_larger_than_the_picture_is_refused() -> None:
    with pytest.raises(OptionError, match="crop_size must be from 1 to shortest_edge"):
        CLIPImageConfig(shortest_edge=10, crop_size=11)


@pytest.mark.parametrize("shape", [(2, 9000), (9000, 2), (5, 4001)])
def test_the_middle_of_a_narrow_strip_is_what_counts(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    waves = np.sin(np.arange(shape[0])[:, None] / 3 + np.arange(shape[1]) / 3)[..., None] * np.array([100, 60, 20]) + 120
    strip = waves.astype(np.uint8)
    ours = clip_pixels(strip, CLIPImageConfig())
    monkeypatch.setattr(clip_images, "MOST_ELONGATED", 10**6)
    assert_close(ours, clip_pixels(strip, CLIPImageConfig()), rms=2e-2)
