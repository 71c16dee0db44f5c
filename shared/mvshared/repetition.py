"""A finished run once more, from its metadata: `mvmlx generate --config`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mvshared.arguments import SIZE_RANGE_PX, array_sha256, config_sha256, load_latents, pictures_sha256, whole
from mvshared.camera import as_poses
from mvshared.errors import CheckpointError, OptionError
from mvshared.memory.plan import MemoryPlan
from mvshared.normals import load_normals
from mvshared.pipeline import Pipeline, Progress
from mvshared.runs import Parameters, Run, Views
from mvshared.upscaling.views import check_unchanged, upscaler_files
from mvshared.weights import sha256_of_files


def repeat(
    pipeline: Pipeline[Any],
    run: Run,
    *,
    check_numerics: str | Path | None = None,
    on_step: Callable[[Progress], None] | None = None,
) -> Views:
    """The views of a run, once more: the same bits where backend, dtype, device and versions are the run's.

    Where they were upscaled, `pipeline.upscale_as(views, views.parameters.upscale)` repeats that too.

    Raises, before the sampling, CheckpointError if the weights are others; OptionError if the picture, the normal maps or the
    given latents have changed since or were no files, or if the pipeline or a parameter is not what it was in the run.
    """
    parameters, model = run.parameters, pipeline.model
    for name, sha256 in sha256_of_files(model.weight_files).items():
        if run.weights.get(name) != sha256:
            raise CheckpointError("the weights have changed since the run", path=name, hint="load the model of the run")
    loaded = {name: getattr(model, name) for name in ("backend", "dtype", "device", "quantization")}
    loaded |= {"family": model.config.family, "fov_deg": model.config.camera.fov_deg}
    loaded |= {"config_sha256": config_sha256(model.config)}
    for name, value in loaded.items():
        if getattr(parameters, name) != value:
            raise OptionError(name, expected=f"that of the loaded model, {value!r}", got=getattr(parameters, name))
    if parameters.latents is None and parameters.latents_sha256 is not None:
        raise OptionError("latents", expected="a file: the run's latents were given in memory", got=None)
    if parameters.image is None and parameters.image_sha256 is not None:
        raise OptionError("image", expected="a file: the run's picture was given in memory", got=None)
    if parameters.normals is None and parameters.normals_sha256 is not None:
        raise OptionError("normals", expected="files: the run's normal maps were given in memory", got=None)
    size_px = whole("size_px", parameters.size_px, *SIZE_RANGE_PX)
    pictures = pipeline._pictures(parameters.image, size_px=size_px)
    maps = pipeline._normals(parameters.normals, parameters.normal_space)
    poses = as_poses(parameters.cameras, model.config.camera.radius)
    normals = None if maps is None else load_normals(maps, poses, fov_deg=parameters.fov_deg, size_px=size_px)
    latents = load_latents(parameters.latents)
    now = {"image": pictures_sha256(pictures), "normals": array_sha256(normals), "latents": array_sha256(latents)}
    for name, sha256 in now.items():
        if sha256 != getattr(parameters, f"{name}_sha256"):
            raise OptionError(name, expected="as it was in the run; it has changed", got=getattr(parameters, name))
    if parameters.upscale is not None:
        check_unchanged(parameters.upscale, run.weights)
    with _same_memory(pipeline, parameters.memory):
        views = _generate(pipeline, parameters, size_px=size_px, check_numerics=check_numerics, on_step=on_step)
    return replace(
        views,
        parameters=replace(views.parameters, upscale=parameters.upscale),
        upscaler_files=tuple(upscaler_files(parameters.upscale)),
    )


@contextmanager
def _same_memory(pipeline: Pipeline[Any], plan: MemoryPlan) -> Iterator[None]:
    """Within the context, the pipeline uses memory as the run did, which decides how it rounds."""
    before, pipeline.memory = pipeline.memory, plan
    try:
        yield
    finally:
        pipeline.memory = before


def _generate(pipeline: Pipeline[Any], parameters: Parameters, *, size_px: int, check_numerics: Any, on_step: Any) -> Views:
    return pipeline.generate(
        parameters.image,
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
        size_px=size_px,
        latents=parameters.latents,
        check_numerics=check_numerics,
        on_step=on_step,
    )
