"""What a caller asks for, checked by a model's config alone and with all its files read: no weights are needed for that.

`Pipeline.generate` prepares a request and runs it. The command line prepares it first and loads the model after that, so that a
wrong option is refused at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mvshared.arguments import (
    Latents,
    Pictures,
    array_sha256,
    checked_latents,
    config_sha256,
    image_names,
    load_latents,
    noise,
    normals_names,
    picture_size,
    pictures_sha256,
    view_poses,
)
from mvshared.attention import check_pooling
from mvshared.camera import doubt_of
from mvshared.clip_images import clip_pixels
from mvshared.config import ModelConfig
from mvshared.errors import OptionError, warn
from mvshared.framing import Framed, load_framed
from mvshared.guidance import Branch, Call, Guidance, check_scales
from mvshared.memory.estimate import RunSize
from mvshared.normals import NormalMaps, Normals, find_normals, load_normals
from mvshared.numbers import MAX_SEED, number, whole
from mvshared.samplers import Step, sampler_steps
from mvshared.schedule import MAX_STEPS, with_spacing
from mvshared.stages import Stages

if TYPE_CHECKING:
    from mvshared.tokenizer import CLIPTokenizer

MAX_PICTURES = 8


class Prompts(NamedTuple):
    """The prompt, the negative one, and token ids int64 (2, l): first those of the negative prompt."""

    prompt: str
    negative: str
    ids: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """A run of a model with this config, all but the model itself.

    `poses` float32 (v, 4, 4); `pictures` of the subject and `normals` of the views as the VAE takes them, float32 (n, size_px,
    size_px, 3) in [-1, 1], `clip_pixels` (n, s, s, 3) as the vision tower takes the pictures, each None where there is none;
    `reference` the first picture as it is framed; `prompts` None for a model without text; `latents` float32 (v, h, w, c), None
    for the noise of `seed`; `steps` of the sampler, and the `calls` of the network in them; `options` what
    `mvshared.runs.Parameters` says of all this, by the names of its fields.
    """

    config: ModelConfig
    poses: NDArray[np.float32]
    size_px: int
    pictures: NDArray[np.float32] | None
    clip_pixels: NDArray[np.float32] | None
    reference: NDArray[np.uint8] | None
    normals: NDArray[np.float32] | None
    prompts: Prompts | None
    seed: int
    latents: NDArray[np.float32] | None
    steps: tuple[Step, ...]
    calls: tuple[Call, ...]
    options: Mapping[str, Any]

    def with_seed(self, seed: int) -> "Request":
        """The same with another seed. Raises OptionError."""
        return replace(self, seed=_seed(seed))

    def initial(self) -> NDArray[np.float32]:
        """The initial latents (v, h, w, c) of deviation 1."""
        if self.latents is not None:
            return self.latents
        return noise(_latents_shape(self.config, len(self.poses), self.size_px), seed=self.seed)

    @property
    def size(self) -> RunSize:
        """All that memory depends on."""
        return RunSize(
            views=len(self.poses),
            size_px=self.size_px,
            pictures=0 if self.pictures is None else len(self.pictures),
            branches=max(len(call.mixture.branches) for call in self.calls),
            texts=0 if self.prompts is None else len(self.prompts.ids),
            normals=self.normals is not None,
        )


def prepare(
    config: ModelConfig,
    tokenizer: "Callable[[], CLIPTokenizer]",
    *,
    image: Pictures | None = None,
    prompt: str | None = None,
    negative_prompt: str | None = None,
    image_scale: float = 1.0,
    reference_scale: float = 1.0,
    views: int | None = None,
    azimuths_deg: Sequence[float] | None = None,
    elevation_deg: float | None = None,
    cameras: ArrayLike | None = None,
    normals: Normals | None = None,
    normal_space: str | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    guidance_text: float | None = None,
    guidance_image: float | None = None,
    guidance_normals: float | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_every: int = 1,
    guidance_rescale: float = 0.0,
    scheduler: str | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    kv_pooling: int = 1,
    seed: int = 0,
    size_px: int | None = None,
    latents: Latents | None = None,
    stages: Stages | None = None,
) -> Request:
    """The request that these arguments of `Pipeline.generate`, which says what they mean, are for a model with a config.

    `tokenizer` is called for a model that takes text. Pictures and normal maps are read within the stage of that name. Raises
    OptionError, CameraError and ImageError; CheckpointError for the tokenizer's folder.
    """
    stages, defaults = stages or Stages(), config.defaults
    size_px = picture_size(config, size_px)
    steps = whole("steps", defaults.steps if steps is None else steps, 1, MAX_STEPS)
    strength = Guidance(
        guidance=defaults.guidance if guidance is None else guidance,
        guidance_text=guidance_text,
        guidance_image=guidance_image,
        guidance_normals=guidance_normals,
        guidance_interval=guidance_interval,
        guidance_every=guidance_every,
        guidance_rescale=guidance_rescale,
    )
    seed, eta = _seed(seed), number("eta", eta, 0, 1)
    scheduler = defaults.scheduler if scheduler is None else scheduler
    schedule = with_spacing(config.scheduler, spacing)
    plan = sampler_steps(scheduler, schedule, steps=steps, eta=eta)
    maps = _found_normals(config, normals, normal_space)
    poses = view_poses(
        config,
        views=views,
        azimuths_deg=azimuths_deg,
        elevation_deg=elevation_deg,
        cameras=cameras,
        without_cameras=None if maps is None else maps.poses,
    )
    named = cameras is not None or (maps is not None and poses is maps.poses)
    if named and (doubt := doubt_of(poses)):
        warn(doubt)
    shape = _latents_shape(config, len(poses), size_px)
    kv_pooling = whole("kv_pooling", kv_pooling, 1, 2)
    check_pooling(kv_pooling, *(side >> config.unet.finest_attention for side in shape[1:3]))
    with stages("pictures"):
        framed = _framed_pictures(config, image, size_px=size_px)
        processor = config.image_processor
        clip = None if processor is None else np.stack([clip_pixels(each.full, processor) for each in framed])
    scales = check_scales(config.unet, image_scale=image_scale, reference_scale=reference_scale)
    prompts = _tokenised(config, tokenizer, prompt, negative_prompt, pictures=len(framed))
    given = load_latents(latents)
    fitting = checked_latents(given, shape, extra=len(framed) if config.unet.reference_frame else 0)
    fov_deg = config.camera.fov_deg
    normal_pixels = None
    if maps is not None:
        with stages("pictures"):
            normal_pixels = load_normals(maps, poses, fov_deg=fov_deg, size_px=size_px)
    text = prompts is not None and bool(prompts.prompt or prompts.negative)
    there = Branch(text=text, image=bool(framed), normals=normal_pixels is not None)
    strength.check_there(there, config)
    _warn_of_doubts(image, framed)
    return Request(
        config=config,
        poses=poses,
        size_px=size_px,
        pictures=np.stack([each.pixels for each in framed]) if framed else None,
        clip_pixels=clip,
        reference=framed[0].picture if framed else None,
        normals=normal_pixels,
        prompts=prompts,
        seed=seed,
        latents=fitting,
        steps=tuple(plan),
        calls=tuple(strength.calls(there, steps=len(plan))),
        options={
            "family": config.family,
            "image": image_names(image),
            "image_sha256": pictures_sha256(framed),
            **scales,
            "prompt": None if prompts is None else prompts.prompt,
            "negative_prompt": None if prompts is None else prompts.negative,
            "normals": normals_names(normals),
            "normal_space": None if maps is None else maps.space,
            "normals_sha256": array_sha256(normal_pixels),
            "latents": str(Path(latents).resolve()) if isinstance(latents, str | Path) else None,
            "latents_sha256": array_sha256(given),
            "cameras": tuple(tuple(map(tuple, pose)) for pose in poses.tolist()),
            "fov_deg": fov_deg,
            "steps": len(plan),
            **vars(strength),
            "scheduler": scheduler,
            "spacing": schedule.timestep_spacing,
            "eta": eta,
            "kv_pooling": kv_pooling,
            "size_px": size_px,
            "config_sha256": config_sha256(config),
        },
    )


def _seed(seed: int) -> int:
    return whole("seed", seed, 0, MAX_SEED)


def _latents_shape(config: ModelConfig, views: int, size_px: int) -> tuple[int, int, int, int]:
    size = size_px // config.vae.downscale
    return views, size, size, config.vae.latent_channels


def _framed_pictures(config: ModelConfig, image: Pictures | None, *, size_px: int) -> tuple[Framed, ...]:
    """The reference pictures, framed; none for a model that takes none."""
    given: list[Any] = list(image) if isinstance(image, list | tuple) else [] if image is None else [image]
    if not config.unet.takes_pictures:
        if given:
            raise OptionError("image", expected="left out: this model takes no picture", got=image_names(image) or "pixels")
        return ()
    if not 1 <= len(given) <= MAX_PICTURES:
        raise OptionError("image", expected=f"1 to {MAX_PICTURES} pictures for this model", got=len(given))
    return tuple(load_framed(each, size_px=size_px, framing=config.framing) for each in given)


def _warn_of_doubts(image: Pictures | None, framed: Sequence[Framed]) -> None:
    given = image if isinstance(image, list | tuple) else [image]
    for source, doubt in zip(given, (each.doubt for each in framed), strict=False):  # a model that takes none has framed none
        if doubt:
            name = source if isinstance(source, str | Path) else "the picture"
            warn(f"no subject was found in {name}, and all of it is taken: {doubt}")


def _tokenised(
    config: ModelConfig,
    tokenizer: "Callable[[], CLIPTokenizer]",
    prompt: str | None,
    negative_prompt: str | None,
    *,
    pictures: int,
) -> Prompts | None:
    """Both prompts and their token ids; None for a model without text."""
    if config.text_encoder is None:
        for name, value in (("prompt", prompt), ("negative_prompt", negative_prompt)):
            if value is not None:
                raise OptionError(name, expected="left out: this model takes no text", got=value)
        return None
    if prompt is None and not pictures:
        raise OptionError("prompt", expected="given: this model makes its views from text", got=None)
    positive = "" if prompt is None else prompt
    negative = config.defaults.negative_prompt if negative_prompt is None else negative_prompt
    tokens = tokenizer()([negative, positive])
    tokens.warn_of_cuts("negative prompt", "prompt")
    return Prompts(positive, negative, tokens.ids)


def _found_normals(config: ModelConfig, normals: Normals | None, space: str | None) -> NormalMaps | None:
    """The normal maps, found and not read; None without."""
    if normals is None:
        if space is not None:
            raise OptionError("normal_space", expected="left out where no normals are given", got=space)
        return None
    if not config.unet.normal_channels:
        raise OptionError("normals", expected="left out: this model takes no normal maps", got=normals_names(normals))
    return find_normals(normals, space)
