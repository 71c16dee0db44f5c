"""A finished run once more, from its metadata: `mvmlx generate --config`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mvshared.arguments import SIZE_RANGE_PX, config_sha256
from mvshared.config import ModelConfig
from mvshared.errors import CheckpointError, OptionError
from mvshared.memory.plan import MemoryPlan
from mvshared.numbers import whole
from mvshared.pipeline import Pipeline, Progress
from mvshared.request import Request, prepare
from mvshared.runs import Parameters, Run, Views
from mvshared.upscaling.views import check_unchanged, upscaler_files
from mvshared.weights import sha256_of_files

if TYPE_CHECKING:
    from mvshared.tokenizer import CLIPTokenizer

_FROM_FILES = {"image": "picture was", "normals": "normal maps were", "latents": "latents were"}


def requested(run: Run, config: ModelConfig, tokenizer: Callable[[], "CLIPTokenizer"]) -> Request:
    """What a run was asked for, once more, of its model with this config; `tokenizer` is that of `mvshared.request.prepare`.

    Raises OptionError if the picture, the normal maps or the given latents have changed since or were no files, or if the
    config or a parameter is not what it was in the run; CheckpointError for weights of the upscaler that have changed; and what
    `prepare` raises, such as ImageError for a picture that is gone.
    """
    parameters = run.parameters
    now = {"family": config.family, "fov_deg": config.camera.fov_deg, "config_sha256": config_sha256(config)}
    _check_same(parameters, now)
    for what, was in _FROM_FILES.items():
        if getattr(parameters, what) is None and getattr(parameters, f"{what}_sha256") is not None:
            raise OptionError(what, expected=f"in a file: the run's {was} given in memory", got=None)
    whole("size_px", parameters.size_px, *SIZE_RANGE_PX)
    request = prepare(
        config,
        tokenizer,
        image=parameters.image,
        prompt=parameters.prompt,
        negative_prompt=parameters.negative_prompt,
        image_scale=parameters.image_scale,
        reference_scale=parameters.reference_scale,
        cameras=parameters.cameras,
        normals=parameters.normals,
        normal_space=parameters.normal_space,
        steps=parameters.steps,
        guidance=parameters.guidance,
        guidance_text=parameters.guidance_text,
        guidance_image=parameters.guidance_image,
        guidance_normals=parameters.guidance_normals,
        guidance_interval=parameters.guidance_interval,
        guidance_every=parameters.guidance_every,
        guidance_rescale=parameters.guidance_rescale,
        scheduler=parameters.scheduler,
        spacing=parameters.spacing,
        eta=parameters.eta,
        kv_pooling=parameters.kv_pooling,
        seed=parameters.seed,
        size_px=parameters.size_px,
        latents=parameters.latents,
    )
    for what in _FROM_FILES:
        if request.options[f"{what}_sha256"] != getattr(parameters, f"{what}_sha256"):
            raise OptionError(what, expected="as it was in the run; it has changed", got=getattr(parameters, what))
    if parameters.upscale is not None:
        check_unchanged(parameters.upscale, run.weights)
    return request


def repeat(
    pipeline: Pipeline[Any],
    run: Run,
    *,
    request: Request | None = None,
    check_numerics: str | Path | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Views:
    """The views of a run, once more: the same bits where backend, dtype, device and versions are the run's. `request` is what
    `requested` made of the run, if that is known already.

    Where they were upscaled, `pipeline.upscale_as(views, views.parameters.upscale)` repeats that too.

    Raises, before the sampling, CheckpointError if the weights are others, OptionError if the pipeline is not that of the
    run, and what `requested` raises.
    """
    parameters, model = run.parameters, pipeline.model
    for name, sha256 in sha256_of_files(model.weight_files).items():
        if run.weights.get(name) != sha256:
            raise CheckpointError("the weights have changed since the run", path=name, hint="load the model of the run")
    _check_same(parameters, {name: getattr(model, name) for name in ("backend", "dtype", "device", "quantization")})
    if request is None:
        request = requested(run, model.config, lambda: pipeline.tokenizer)
    with pipeline.alone(), _same_memory(pipeline, parameters.memory):
        views = pipeline.run(request, check_numerics=check_numerics, on_step=on_step)
    return replace(
        views,
        parameters=replace(views.parameters, upscale=parameters.upscale),
        upscaler_files=tuple(upscaler_files(parameters.upscale)),
    )


def _check_same(parameters: Parameters, now: Mapping[str, object]) -> None:
    for name, value in now.items():
        if getattr(parameters, name) != value:
            raise OptionError(name, expected=f"that of the model, {value!r}", got=getattr(parameters, name))


@contextmanager
def _same_memory(pipeline: Pipeline[Any], plan: MemoryPlan) -> Iterator[None]:
    """Within the context, the pipeline uses memory as the run did, which decides how it rounds."""
    before, pipeline.memory = pipeline.memory, plan
    try:
        yield
    finally:
        pipeline.memory = before
