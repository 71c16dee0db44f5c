"""Generation, written once for both backends: from a picture and cameras to views, their latents and an output folder.

The sampler's steps are plain floats (mvshared.schedule), noise is numpy's, and arrays of the backend meet only sums and
products with floats here.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from mvshared.backend import A, Model
from mvshared.camera import as_poses, camera_vectors, even_azimuths, orbit
from mvshared.errors import CheckpointError, NumericsError, OptionError
from mvshared.export import finish, metadata, prepare, transforms
from mvshared.files import write_atomic, write_json
from mvshared.framing import frame_subject
from mvshared.images import encode_png, from_model, grid, load_image, load_normals, save_png, save_turntable, to_model
from mvshared.schedule import SAMPLERS, Step, sampler_steps
from mvshared.weights import sha256_of_files

Picture: TypeAlias = str | Path | Image.Image | NDArray[Any]
Normals: TypeAlias = str | Path | Sequence[str | Path | NDArray[Any]]

MAX_VIEWS = 64
GUIDANCE_RANGE = (1.0, 20.0)
SIZE_RANGE_PX = (16, 2048)


class Progress(NamedTuple):
    """What `on_step` gets: the step from 1 to `steps`, its timestep, and functions for a look at the state.

    `latents()` are float32 (v, h, w, c), `preview()` decodes the picture as far as it is known, uint8 (v, H, W, 3).
    """

    step: int
    steps: int
    timestep: float
    latents: Callable[[], NDArray[np.float32]]
    preview: Callable[[], NDArray[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """A run, completely: everything that changes a pixel, resolved and checked, as JSON values.

    `image_sha256` and `normals_sha256` are of the prepared pixels. `cameras` are poses (v, 4, 4).
    """

    model: str
    family: str
    backend: str
    dtype: str
    device: str
    image: str | None
    image_sha256: str | None
    normals: str | list[str | None] | None
    normals_sha256: str | None
    latents_sha256: str | None
    cameras: list[list[list[float]]]
    fov_deg: float
    steps: int
    guidance: float
    scheduler: str
    eta: float
    seed: int
    size_px: int


@dataclass(frozen=True, kw_only=True)
class Views:
    """The result of `Pipeline.generate`.

    `images` uint8 (v, h, w, 3), `latents` float32 (v, h / f, w / f, c), `cameras` float32 (v, 4, 4) camera-to-world with OpenGL
    axes, `reference` the prepared picture uint8 (h, w, 3) or None, `parameters` what repeats the run.
    """

    images: NDArray[np.uint8]
    latents: NDArray[np.float32]
    cameras: NDArray[np.float32]
    reference: NDArray[np.uint8] | None
    parameters: Parameters
    weight_files: Sequence[Path]

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write view_000.png ..., grid.png, turntable.gif, transforms.json and, last, metadata.json; returns the folder.

        Raises OutputError if the folder holds a finished run and no `force` is given, or cannot be written.
        """
        target = prepare(folder, force=force)
        names = [f"view_{index:03}.png" for index in range(len(self.images))]
        for name, image in zip(names, self.images, strict=True):
            save_png(target / name, image)
        write_atomic(target / "grid.png", encode_png(grid(self.images)))
        save_turntable(target / "turntable.gif", self.images)
        height, width = self.images.shape[1:3]
        document = transforms(self.cameras, width_px=width, height_px=height, fov_deg=self.parameters.fov_deg, file_names=names)
        write_json(target / "transforms.json", document)
        parameters = {field.name: getattr(self.parameters, field.name) for field in fields(self.parameters)}
        finish(target, metadata(parameters, weights=sha256_of_files(self.weight_files)))
        return target


class Pipeline(Generic[A]):
    """A loaded model and what can be done with it. `mvtorch.load` and `mvmlx.load` return one."""

    def __init__(self, model: Model[A], *, name: str) -> None:
        self.model, self.name = model, name

    def generate(
        self,
        image: Picture,
        *,
        views: int | None = None,
        azimuths_deg: Sequence[float] | None = None,
        elevation_deg: float | None = None,
        cameras: ArrayLike | None = None,
        normals: Normals | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        scheduler: str = "ddim",
        eta: float = 0.0,
        seed: int = 0,
        size_px: int | None = None,
        latents: NDArray[np.float32] | None = None,
        on_step: Callable[[Progress], None] | None = None,
    ) -> Views:
        """Views of what `image` shows.

        The cameras are, in this order: `cameras`, matrices (v, 4, 4) or pairs (azimuth_deg, elevation_deg); `azimuths_deg` at
        `elevation_deg`; `views` cameras spread evenly. Azimuth 0 looks at the object's front. `normals` is a folder or a list
        of normal maps, one per view. `guidance` 1 skips the unconditional half. `latents` float32 (v, h, w, c) replaces the
        initial noise of `seed`; with a reference frame it may have one more frame, which is ignored. What is None comes from
        the model's defaults. `on_step` is called after every step.

        Raises OptionError, CameraError and ImageError for arguments that are not allowed, before any long work, and
        NumericsError if the latents end in NaN or infinity.
        """
        config, defaults = self.model.config, self.model.config.defaults
        size_px = _whole("size_px", defaults.size_px if size_px is None else size_px, *SIZE_RANGE_PX)
        factor = config.vae.downscale * config.unet.downscale
        if size_px % factor:
            raise OptionError("size_px", expected=f"a multiple of {factor} for this model", got=size_px)
        steps = defaults.steps if steps is None else steps
        guidance = _number("guidance", defaults.guidance if guidance is None else guidance, *GUIDANCE_RANGE)
        seed = _whole("seed", seed, 0, 2**63 - 1)
        if scheduler not in SAMPLERS:
            raise OptionError("scheduler", expected=f"one of {', '.join(SAMPLERS)}", got=scheduler)
        plan = sampler_steps(scheduler, config.scheduler, steps=steps, eta=eta)
        poses = self._poses(views, azimuths_deg, elevation_deg, cameras)
        count, size = len(poses), size_px // config.vae.downscale
        shape = (count, size, size, config.vae.latent_channels)
        initial = _initial_latents(latents, shape, seed=seed, extra_frame=config.unet.reference_frame)
        reference = frame_subject(load_image(image), size_px=size_px, framing=config.framing)
        normal_pixels = self._normals(normals, views=count, size_px=size_px)

        parameters = Parameters(
            model=self.name,
            family=config.family,
            backend=self.model.backend,
            dtype=self.model.dtype,
            device=self.model.device,
            image=str(Path(image).resolve()) if isinstance(image, str | Path) else None,
            image_sha256=_sha256(reference),
            normals=_names(normals),
            normals_sha256=_sha256(normal_pixels),
            latents_sha256=None if latents is None else _sha256(initial),
            cameras=poses.tolist(),
            fov_deg=config.camera.fov_deg,
            steps=len(plan),
            guidance=guidance,
            scheduler=scheduler,
            eta=eta,
            seed=seed,
            size_px=size_px,
        )
        final = self._sample(initial, plan, poses, reference, normal_pixels, parameters, on_step)
        if not np.isfinite(final).all():
            raise NumericsError("the final latents are not finite", where="sampling", hint="use --dtype float32")
        return Views(
            images=from_model(self.model.decode(self.model.from_numpy(final))),
            latents=final,
            cameras=poses,
            reference=reference,
            parameters=parameters,
            weight_files=self.model.weight_files,
        )

    def _sample(
        self,
        initial: NDArray[np.float32],
        plan: Sequence[Step],
        poses: NDArray[np.float32],
        reference: NDArray[np.uint8],
        normals: NDArray[np.float32] | None,
        parameters: Parameters,
        on_step: Callable[[Progress], None] | None,
    ) -> NDArray[np.float32]:
        """Run the sampler from the initial latents to the final ones, both (v, h, w, c)."""
        model, unet = self.model, self.model.config.unet
        condition = model.condition(
            cameras=camera_vectors(poses) if unet.camera_dim else None,
            reference=model.encode_latents(to_model(reference[None]))[0] if unet.reference_frame else None,
            normals=None if normals is None else model.encode_latents(normals),
            guided=parameters.guidance != 1,
        )
        x = model.from_numpy(initial)
        for index, step in enumerate(plan):
            out = model.denoise(x, step.timestep, condition, parameters.guidance)
            clean = (x, out)  # kept for a preview
            x = step.x * x + step.out * out
            if step.noise:
                random = np.random.default_rng([parameters.seed, index + 1])
                x = x + step.noise * model.from_numpy(random.standard_normal(initial.shape, np.float32))
            if on_step is not None:
                on_step(self._progress(index + 1, len(plan), step, x, clean))
        return model.to_numpy(x)

    def _progress(self, number: int, steps: int, step: Step, x: A, before: tuple[A, A]) -> Progress:
        def preview() -> NDArray[np.uint8]:
            return from_model(self.model.decode(step.x0_x * before[0] + step.x0_out * before[1]))

        return Progress(number, steps, step.timestep, lambda: self.model.to_numpy(x), preview)

    def _poses(
        self,
        views: int | None,
        azimuths_deg: Sequence[float] | None,
        elevation_deg: float | None,
        cameras: ArrayLike | None,
    ) -> NDArray[np.float32]:
        camera, defaults = self.model.config.camera, self.model.config.defaults
        given = {"views": views, "azimuths_deg": azimuths_deg, "cameras": cameras}
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise OptionError(named[1], expected=f"left out where {named[0]} is given", got=given[named[1]])
        if cameras is not None:
            if elevation_deg is not None:
                raise OptionError("elevation_deg", expected="left out where cameras is given", got=elevation_deg)
            poses = as_poses(cameras, camera.radius)
        else:
            count = _whole("views", defaults.views if views is None else views, 1, MAX_VIEWS)
            azimuths = even_azimuths(count, start_deg=defaults.azimuth_start_deg) if azimuths_deg is None else azimuths_deg
            poses = orbit(azimuths, defaults.elevation_deg if elevation_deg is None else elevation_deg, radius=camera.radius)
        if len(poses) > MAX_VIEWS:
            raise OptionError("views", expected=f"at most {MAX_VIEWS}", got=len(poses))
        return poses

    def _normals(self, normals: Normals | None, *, views: int, size_px: int) -> NDArray[np.float32] | None:
        if normals is None:
            return None
        if not self.model.config.unet.normal_channels:
            raise OptionError("normals", expected="left out: this model takes no normal maps", got=str(normals))
        return load_normals(normals, views=views, size_px=size_px)


def repeat(pipeline: Pipeline[Any], parameters: dict[str, Any], *, on_step: Callable[[Progress], None] | None = None) -> Views:
    """The run that `parameters` (of its metadata.json) describe, once more.

    Raises CheckpointError if the run used given latents, which metadata.json does not hold, and OptionError if the picture or
    the normal maps have changed since, or were no files.
    """
    if parameters.get("latents_sha256") is not None:
        raise OptionError("latents", expected="those of the run, which its metadata does not hold", got=None)
    if parameters.get("image") is None:
        raise OptionError("image", expected="a file: the run's picture was given in memory", got=None)
    if isinstance(parameters["normals"], list) and None in parameters["normals"]:
        raise OptionError("normals", expected="files: the run's normal maps were given in memory", got=None)
    views = pipeline.generate(
        parameters["image"],
        cameras=np.asarray(parameters["cameras"], np.float32),
        normals=parameters["normals"],
        steps=parameters["steps"],
        guidance=parameters["guidance"],
        scheduler=parameters["scheduler"],
        eta=parameters["eta"],
        seed=parameters["seed"],
        size_px=parameters["size_px"],
        on_step=on_step,
    )
    for name in ("image_sha256", "normals_sha256"):
        if getattr(views.parameters, name) != parameters[name]:
            raise CheckpointError(f"{name.removesuffix('_sha256')} has changed since the run")
    return replace(views, parameters=replace(views.parameters, fov_deg=parameters["fov_deg"]))


def _initial_latents(
    given: NDArray[np.float32] | None, shape: tuple[int, ...], *, seed: int, extra_frame: bool
) -> NDArray[np.float32]:
    """Noise of deviation 1, drawn view after view so that more views do not change the first ones; or the given latents."""
    if given is None:
        return np.random.default_rng(seed).standard_normal(shape, np.float32)
    array = np.asarray(given)
    if extra_frame and array.shape == (shape[0] + 1, *shape[1:]):
        array = array[:-1]
    if array.shape != shape or array.dtype.kind != "f":
        raise OptionError("latents", expected=f"floats of shape {shape}", got=(array.dtype.name, np.shape(given)))
    if not np.isfinite(array).all():
        raise OptionError("latents", expected="finite", got="NaN or infinity")
    return array.astype(np.float32)


def _whole(name: str, value: object, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise OptionError(name, expected=f"a whole number from {low} to {high}", got=value)
    return int(value)


def _number(name: str, value: object, low: float, high: float) -> float:
    fits = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not fits or not math.isfinite(float(value)) or not low <= float(value) <= high:  # type: ignore[arg-type]
        raise OptionError(name, expected=f"a number from {low:g} to {high:g}", got=value)
    return float(value)  # type: ignore[arg-type]


def _names(normals: Normals | None) -> str | list[str | None] | None:
    """The files of the normal maps, None in the place of a map that was given in memory."""
    if normals is None:
        return None
    if isinstance(normals, str | Path):
        return str(Path(normals).resolve())
    return [str(Path(item).resolve()) if isinstance(item, str | Path) else None for item in normals]


def _sha256(array: NDArray[Any] | None) -> str | None:
    return None if array is None else hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
