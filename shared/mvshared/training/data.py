"""Batches for both training stages, all of their randomness drawn in numpy from (seed, step): resuming repeats it exactly.

The network's target is the one of the schedule's prediction type: v of arXiv 2202.00512, or the noise.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvshared.backend import A
from mvshared.camera import azimuth_elevation, camera_vectors, from_front_deg, mirror_poses
from mvshared.captures import TRAINING_PART, Capture, files_elsewhere, load_capture
from mvshared.config import SchedulerConfig
from mvshared.errors import DatasetError, ImageError
from mvshared.files import file_stamps, visible
from mvshared.images import load_image, load_values
from mvshared.normals import is_void
from mvshared.schedule import add_noise, velocity
from mvshared.training.ahead import ahead
from mvshared.training.config import DataConfig
from mvshared.training.kept import in_half, in_one, kept_arrays

ENCODED_TOGETHER = 2**20  # pixels that `encode` is given in one call, at least
VAE_STREAM, UNET_STREAM = 1, 2  # first numbers of the random seeds, so that the stages draw differently


class Picture(NamedTuple):
    """A decoded picture: pixels float32 (h, w, 3) in [-1, 1] over the background, and alpha float32 (h, w) in [0, 1]."""

    pixels: NDArray[np.float32]
    alpha: NDArray[np.float32]


class VAEBatch(NamedTuple, Generic[A]):
    """Pixels (n, h, w, 3) in [-1, 1], foreground (n, h, w) in [0, 1], noise (n, h / f, w / f, c) of the posterior; detail
    (n, h, w) in [0, 1] if the loss weighs it."""

    pixels: A
    foreground: A
    noise: A
    detail: A | None = None


class UNetBatch(NamedTuple, Generic[A]):
    """Inputs and target of the U-Net, v views of b objects.

    Noisy latents and normal latents (b, v, h, w, in_channels), timesteps (b,), camera vectors (b, v, 16), the clean reference
    latent (b, h, w, c), and the target (b, v, h, w, c). For a network with cross-attention, text states (b, l, c); with image
    tokens, states of the reference picture (b, m, e). Detail (b, v, h, w) in [0, 1] if the loss weighs it.
    """

    sample: A
    timesteps: A
    camera: A
    reference: A
    target: A
    text: A | None = None
    image_states: A | None = None
    detail: A | None = None


def find_captures(folder: Path | str, *, held_out: float) -> tuple[list[Path], list[Path]]:
    """The capture folders to train on and to validate on, by name; the last ones are held out, none with `held_out` 0.

    Each side has one at least. Raises DatasetError if there are too few for that.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError("no such folder", path=folder, hint="make one with: mvmlx render-heads")
    found = visible(path.parent for path in folder.glob("*/transforms.json"))
    needed = 2 if held_out else 1
    if len(found) < needed:
        hint = "with held_out 0 one is enough" if found else "make some with: mvmlx render-heads"
        if (folder / "transforms.json").is_file():
            hint = "this is a capture itself: name the folder that it is in"
        elif parts := visible(path.parent for path in folder.glob(f"*/{TRAINING_PART}") if path.parent not in found):
            hint = f"copy {TRAINING_PART} to transforms.json in {parts[0]}"
        counted = f"{needed} capture{'s' if needed > 1 else ''} (folders with a transforms.json)"
        raise DatasetError(f"needs at least {counted}, has {len(found)}", path=folder, hint=hint)
    if not held_out:
        return found, []
    count = min(max(1, round(held_out * len(found))), len(found) - 1)
    return found[:-count], found[-count:]


def captures_digest(folders: list[Path]) -> str:
    """Of captures, as far as the names, sizes and times of their files tell: what was made of them belongs to it."""
    lines = [line for folder in folders for path in (folder, *files_elsewhere(folder)) for line in file_stamps(path)]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:12]


def read_picture(path: Path, *, background: tuple[int, int, int]) -> Picture:
    """A picture composited over the background. Raises DatasetError if it cannot be decoded."""
    return _read(path, load_image, background=background)


def _read(path: Path, load: Callable[[Path], NDArray[Any]], *, background: tuple[int, int, int]) -> Picture:
    try:
        rgba = load(path)
    except ImageError as error:
        hint = error.hint or "replace the picture, or remove its capture"
        raise DatasetError(error.message.removeprefix(f"{path}: "), path=path, hint=hint) from error
    alpha = np.divide(rgba[..., 3], 255, dtype=np.float32)
    pixels, plain = rgba[..., :3].astype(np.float32), np.asarray(background, np.float32)
    pixels -= plain
    pixels *= alpha[..., None]
    pixels += plain
    pixels /= np.float32(127.5)
    pixels -= 1
    return Picture(pixels, alpha)


def read_normals(path: Path) -> Picture:
    """A normal map: components in [-1, 1], zero (as near as 128 of 255 comes to it) where there is no surface, as
    `normals.load_normals` has it."""
    return _read(path, _load_normals, background=(128, 128, 128))


def _load_normals(path: Path) -> NDArray[np.float32]:
    values = load_values(path)
    values[..., 3:][is_void(values[..., :3])] = 0
    return values


def _read_detail(path: Path) -> NDArray[np.float32]:
    """A detail map (h, w) in [0, 1]."""
    detail = _read(path, load_values, background=(0, 0, 0)).pixels[..., 0] + 1
    detail /= 2
    return detail


def mirror_picture(picture: Picture) -> Picture:
    return Picture(picture.pixels[:, ::-1], picture.alpha[:, ::-1])


def mirror_normals(picture: Picture) -> Picture:
    """The normal map of the mirrored scene: x points the other way."""
    return Picture(picture.pixels[:, ::-1] * np.array([-1, 1, 1], np.float32), picture.alpha[:, ::-1])


class VAEPictures:
    """Random pictures, and normal maps among them, for the VAE stage."""

    def __init__(
        self, folders: list[Path], config: DataConfig, *, latent_channels: int, downscale: int, with_detail: bool = False
    ) -> None:
        """With `with_detail` batches have the captures' detail maps, 0 for a view without."""
        captures = [load_capture(folder) for folder in folders]
        self.config, self.latent_channels, self.downscale = config, latent_channels, downscale
        self.images = [path for capture in captures for path in capture.image_paths]
        self.details = [path for capture in captures for path in capture.detail_paths] if with_detail else None
        self.normals = [path for capture in captures for path in capture.normal_paths if path] if config.normals else []

    def batch(self, step: int, *, size: int, seed: int) -> VAEBatch[NDArray[np.float32]]:
        """The batch of a step: one picture in eight is a normal map, every second one is mirrored if the config says so."""
        random = np.random.default_rng([VAE_STREAM, seed, step])
        pictures, details = [], []
        for _ in range(size):
            is_normal = bool(self.normals) and random.random() < 1 / 8
            paths = self.normals if is_normal else self.images
            number = int(random.integers(len(paths)))
            path = paths[number]
            picture = read_normals(path) if is_normal else read_picture(path, background=self.config.background)
            mirrored = random.random() < 0.5 and self.config.mirror
            if mirrored:
                picture = mirror_normals(picture) if is_normal else mirror_picture(picture)
            pictures.append(picture)
            if self.details is not None:
                detail_path = None if is_normal else self.details[number]
                detail = np.zeros_like(picture.alpha) if detail_path is None else _read_detail(detail_path)
                details.append(detail[:, ::-1] if mirrored else detail)
        pixels = _stack([picture.pixels for picture in pictures])
        height, width = pixels.shape[1] // self.downscale, pixels.shape[2] // self.downscale
        noise = random.standard_normal((size, height, width, self.latent_channels), np.float32)
        foreground = _stack([picture.alpha for picture in pictures])
        return VAEBatch(pixels, foreground, noise, None if self.details is None else _stack(details))


def _stack(arrays: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    return in_one([array[None] for array in arrays])


class Latents(NamedTuple):
    """Encoded captures: object o has the views `first[o]` to `first[o + 1]` of all other fields.

    `images` and `normals` are float16 (n, h, w, c) in the U-Net's scale (`normals` zero where a view has none), `cameras`
    float32 (n, 16), `azimuths_deg` float32 (n,) in [-180, 180). `detail`, if the loss weighs it, is float16 (n, h, w): the mean
    of the detail map over each latent's pixels, 0 where a view has none.
    """

    images: NDArray[np.float16]
    normals: NDArray[np.float16]
    cameras: NDArray[np.float32]
    azimuths_deg: NDArray[np.float32]
    first: NDArray[np.int64]
    detail: NDArray[np.float16] | None = None

    @classmethod
    def joined(cls, parts: Sequence["Latents"]) -> "Latents":
        """The captures of several, in their order."""
        arrays = {
            name: in_one([getattr(part, name) for part in parts])
            for name in cls._fields
            if name != "first" and getattr(parts[0], name) is not None
        }
        counts = np.concatenate([np.diff(part.first) for part in parts])
        return cls(first=np.concatenate([[0], np.cumsum(counts)]), **arrays)


def kept_latents(
    path: Path,
    folders: list[Path],
    config: DataConfig,
    encode: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    *,
    replaces: str,
    with_detail: bool = False,
) -> Latents:
    """What `encode_captures` gives, from a file that is made of it as `kept_arrays` does. Raises DatasetError as both do."""

    def make(chosen: list[Path], after_each: Callable[[], object]) -> Latents:
        return encode_captures(chosen, config, encode, with_detail=with_detail, after_each=after_each)

    return kept_arrays(path, folders, make, Latents.joined, Latents, replaces=replaces, desc="encoding")


def encode_captures(
    folders: list[Path],
    config: DataConfig,
    encode: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    *,
    with_detail: bool = False,
    after_each: Callable[[], object] = lambda: None,
) -> Latents:
    """Encode every capture, and its mirror image if the config says so, with `encode` (pixels to scaled latents).

    With `with_detail` the latents have the captures' detail maps; `after_each` is called for every capture that was read.
    Raises DatasetError for pictures of different sizes, NumericsError for latents that are not finite.
    """
    images, normals, cameras, azimuths, first, details = [], [], [], [], [0], []
    captures = {folder: load_capture(folder) for folder in folders}
    for group in _groups(_read_views(captures, config, with_detail=with_detail, after_each=after_each)):
        latents = encode(_stack([pixels for views in group for pixels in views.pixels]))
        at = 0
        for views in group:
            count = len(views.poses)
            mine = in_half(latents[at : at + len(views.pixels)], f"latents of the pictures in {views.folder}", where="vae")
            at += len(views.pixels)
            images.append(mine[:count])
            normals.append(np.zeros_like(mine[:count]))
            normals[-1][views.with_normals] = mine[count:]
            cameras.append(camera_vectors(views.poses))
            azimuths.append(from_front_deg(azimuth_elevation(views.poses).azimuths_deg))
            first.append(first[-1] + count)
            if views.detail is not None:
                details.append(_pooled(views.detail, *mine.shape[1:3]).astype(np.float16))
    return Latents(
        in_one(images),
        in_one(normals),
        np.concatenate(cameras),
        np.concatenate(azimuths).astype(np.float32),
        np.asarray(first, np.int64),
        in_one(details) if with_detail else None,
    )


def _pooled(detail: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Detail maps (v, h, w) as means over the pixels of each of height x width latents."""
    v, h, w = detail.shape
    return detail.reshape(v, height, h // height, width, w // width).mean((2, 4))


def reference_pictures(folder: Path, config: DataConfig) -> list[Callable[[], NDArray[np.uint8]]]:
    """Functions that read the pictures of a capture, and of its mirror image, that can be references, in the order in which
    `encode_captures` has them: uint8 (h, w, 3). Raises DatasetError."""
    capture, found = load_capture(folder), []
    for mirrored in (False, True) if config.mirror else (False,):
        poses = mirror_poses(capture.poses) if mirrored else capture.poses
        for view in np.flatnonzero(config.may_be_references(azimuth_elevation(poses).azimuths_deg)):
            found.append(partial(_read_reference, capture.image_paths[view], config, mirrored))
    return found


def _read_reference(path: Path, config: DataConfig, mirrored: bool) -> NDArray[np.uint8]:
    picture = read_picture(path, background=config.background)
    pixels = mirror_picture(picture).pixels if mirrored else picture.pixels
    return np.round((pixels + 1) * 127.5).astype(np.uint8)


class _Views(NamedTuple):
    """A capture's folder, poses (v, 4, 4), pixels (h, w, 3) of its pictures and then of its normal maps, and whose views these
    are; detail (v, h, w) if it was asked for."""

    folder: Path
    poses: NDArray[np.float32]
    pixels: list[NDArray[np.float32]]
    with_normals: list[int]
    detail: NDArray[np.float32] | None


def _read_views(
    captures: Mapping[Path, Capture], config: DataConfig, *, with_detail: bool, after_each: Callable[[], object]
) -> Iterator[_Views]:
    """Every capture, and its mirror image if the config says so. Raises DatasetError."""
    pictures = ahead(lambda read: read(), (read for capture in captures.values() for read in _reads(capture, config)))
    details = ahead(_read_detail, (path for capture in captures.values() for path in capture.detail_paths if path is not None))
    for folder, capture in captures.items():
        with_normals = [view for view, path in enumerate(capture.normal_paths) if path is not None and config.normals]
        read = list(islice(pictures, len(capture.image_paths) + len(with_normals)))
        detail = None
        if with_detail:
            blank = np.zeros_like(read[0].alpha)
            detail = _stack([blank if path is None else next(details) for path in capture.detail_paths])
        yield _Views(folder, capture.poses, [picture.pixels for picture in read], with_normals, detail)
        if config.mirror:
            mirrored = [mirror_picture(picture) for picture in read[: len(capture.poses)]]
            mirrored += [mirror_normals(picture) for picture in read[len(capture.poses) :]]
            detail = None if detail is None else detail[:, :, ::-1]
            yield _Views(folder, mirror_poses(capture.poses), [picture.pixels for picture in mirrored], with_normals, detail)
        after_each()


def _reads(capture: Capture, config: DataConfig) -> list[Callable[[], Picture]]:
    """Functions that read a capture's pictures and then its normal maps."""
    normals = [path for path in capture.normal_paths if path is not None and config.normals]
    pictures = [partial(read_picture, path, background=config.background) for path in capture.image_paths]
    return [*pictures, *(partial(read_normals, path) for path in normals)]


def _groups(read: Iterable[_Views]) -> Iterator[list[_Views]]:
    """All of them in order, in groups of ENCODED_TOGETHER pixels at least but for the last."""
    group, pixels = list[_Views](), 0
    for views in read:
        group.append(views)
        pixels += views.pixels[0].size // 3 * len(views.pixels)
        if pixels >= ENCODED_TOGETHER:
            yield group
            group, pixels = [], 0
    if group:
        yield group


class ViewBatches:
    """Objects with a reference and target views, noised, for the U-Net stage."""

    def __init__(
        self,
        latents: Latents,
        config: DataConfig,
        scheduler: SchedulerConfig,
        *,
        normal_channels: int,
        text: NDArray[np.float32] | None = None,
        image_states: NDArray[np.float16] | None = None,
    ) -> None:
        """`text` (l, c) is the same for all, `image_states` (r, m, e) are of the views that may be references; see
        `conditions.Conditions`. Raises DatasetError for captures without references or with too few views, and for states of
        other references than the captures have."""
        self.latents, self.config, self.normal_channels = latents, config, normal_channels
        self.text, self.image_states = text, image_states
        self.prediction_type = scheduler.prediction_type
        timesteps = range(scheduler.num_train_timesteps)
        self.noised = np.array([add_noise(scheduler, each) for each in timesteps], np.float32)
        self.velocities = np.array([velocity(scheduler, each) for each in timesteps], np.float32)
        views = np.diff(latents.first)
        is_reference = config.may_be_references(latents.azimuths_deg)
        references = np.add.reduceat(is_reference, latents.first[:-1])
        self.objects = np.flatnonzero((references > 0) & (views > config.targets))
        self.is_reference, self.state_rows = is_reference, np.cumsum(is_reference) - 1
        if image_states is not None and len(image_states) != (count := np.count_nonzero(is_reference)):
            raise DatasetError(f"{count} views may be references, and there are image states of {len(image_states)}")
        if not len(self.objects):
            raise DatasetError(
                f"no capture has a view within +-{config.reference_max_azimuth_deg:g} degrees of the front "
                f"and {config.targets} others"
            )

    def batch(self, step: int, *, size: int, seed: int) -> UNetBatch[NDArray[np.float32]]:
        """The batch of a step: `size` objects with `config.targets` views each."""
        random = np.random.default_rng([UNET_STREAM, seed, step])
        data, config = self.latents, self.config
        rows, references = [], []
        for number in self.objects[random.integers(len(self.objects), size=size)]:
            views = np.arange(int(data.first[number]), int(data.first[number + 1]))
            reference = random.choice(views[self.is_reference[views]])
            rows.append(random.choice(views[views != reference], size=config.targets, replace=False))
            references.append(reference)
        chosen = np.stack(rows)
        clean = data.images[chosen].astype(np.float32)
        reference_latents = data.images[np.asarray(references)].astype(np.float32)
        noise = random.standard_normal(clean.shape, np.float32)
        timesteps = random.integers(len(self.noised), size=size)
        keep_reference = random.random(size) >= config.reference_dropout
        keep_normals = random.random(size) >= config.normals_dropout

        def mixed(mixes: NDArray[np.float32]) -> NDArray[np.float32]:
            of_clean, of_noise = mixes[timesteps].T[:, :, None, None, None, None]
            return of_clean * clean + of_noise * noise

        sample = mixed(self.noised)
        target = mixed(self.velocities) if self.prediction_type == "v_prediction" else noise
        if self.normal_channels:
            normals = data.normals[chosen].astype(np.float32) * keep_normals[:, None, None, None, None]
            sample = np.concatenate([sample, normals.astype(np.float32)], axis=-1)
        states = self.image_states
        if states is not None:
            states = np.stack([states[self.state_rows[row]] for row in references]).astype(np.float32)
            states *= keep_reference[:, None, None].astype(np.float32)
        return UNetBatch(
            sample=np.asarray(sample, np.float32),
            timesteps=timesteps.astype(np.float32),
            camera=data.cameras[chosen],
            reference=reference_latents * keep_reference[:, None, None, None].astype(np.float32),
            target=np.asarray(target, np.float32),
            text=None if self.text is None else np.broadcast_to(self.text, (size, *self.text.shape)),
            image_states=states,
            detail=None if data.detail is None else data.detail[chosen].astype(np.float32),
        )
