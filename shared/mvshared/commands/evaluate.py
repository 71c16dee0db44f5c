"""`mvmlx evaluate`: a model on held-out heads, or the consistency of the views in a folder."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from numpy.typing import NDArray

from mvshared.backend import load
from mvshared.config import ModelConfig
from mvshared.errors import CameraError, DatasetError, OptionError
from mvshared.export import VIEWS_SHEET, check_evaluation, write_evaluation
from mvshared.images import sheet
from mvshared.messages import print_json

if TYPE_CHECKING:
    from mvshared.consistency import Consistency

SHEET_ROWS = 8
WARPS_SHOWN = 32
FOLDER_OPTIONS = ("output", "as_json")
OF_VIEWS = ("views", "together", "scheduler", "spacing", "prompt", "negative_prompt")  # and not of an upscaler
SMALL_GAIN_DB = 1.0


def evaluate_model(options: dict[str, Any]) -> None:
    """`mvmlx evaluate`."""
    from mvshared.evaluation import VIEWS, evaluate

    for name in ("upscale_steps", "upscale_noise"):
        if options[name] is not None:
            raise OptionError(name, expected="left out without --upscaler", got=options[name])
    output: Path | None = options["output"]
    if output is not None:
        check_evaluation(output)
    pipeline = load(options["model"], **{name: options[name] for name in ("backend", "dtype", "device", "quantize")})
    result = evaluate(
        pipeline,
        options["identities"],
        views=VIEWS if options["views"] is None else options["views"],
        together=options["together"],
        steps=options["steps"],
        guidance=options["guidance"],
        scheduler=options["scheduler"],
        spacing=options["spacing"],
        prompt=options["prompt"],
        negative_prompt=options["negative_prompt"],
        normals=options["normals"],
        seed=options["seed"],
    )
    figures = {name: value._asdict() for name, value in result.summaries().items()}
    settings = {
        "model": options["model"],
        "identities": [options["identities"].start, options["identities"].stop],
        "views": result.views,
        "together": options["together"] or result.views,
        **_prompts(pipeline.model.config, options),
        "normals": options["normals"],
        "seed": options["seed"],
        "steps": options["steps"] or pipeline.model.config.defaults.steps,
        "guidance": options["guidance"] or pipeline.model.config.defaults.guidance,
        "scheduler": options["scheduler"] or pipeline.model.config.defaults.scheduler,
        "spacing": options["spacing"] or pipeline.model.config.scheduler.timestep_spacing,
        "backend": pipeline.model.backend,
        "dtype": pipeline.model.dtype,
        "quantization": pipeline.model.quantization,
    }
    document = _finite({**settings, "figures": figures, "shares": result.shares()})
    if options["as_json"]:
        print_json(document)
    else:
        click.echo(f"{result.identities} heads, {result.views} views each; mean +- deviation over views")
        for name, value in figures.items():
            click.echo(f"  {name:25} {value['mean']:8.3f} +- {value['std']:.3f}  ({value['min']:.3f} to {value['max']:.3f})")
        for (name, share), count in zip(
            result.shares().items(), (result.identities, result.identities * result.views), strict=True
        ):
            click.echo(f"  {name:25} {share:8.3f} = {round(share * count)} of {count}")
    if output is not None:
        _write(output, result.rows, document)


def _prompts(config: ModelConfig, options: dict[str, Any]) -> dict[str, str | None]:
    """What every head had; None for a model without text."""
    if config.text_encoder is None:
        return {"prompt": None, "negative_prompt": None}
    given = options["negative_prompt"]
    negative = config.defaults.negative_prompt if given is None else given
    return {"prompt": options["prompt"] or "", "negative_prompt": negative}


def evaluate_upscaler(options: dict[str, Any]) -> None:
    """`mvmlx evaluate --upscaler`."""
    from mvshared.upscaling.evaluation import evaluate_upscaling
    from mvshared.upscaling.views import UpscaleOptions

    for name in ("normals", *OF_VIEWS):
        if options[name] is not None and options[name] is not False:  # 0 is given, and equals False
            raise OptionError(name, expected="left out with --upscaler", got=options[name])
    output: Path | None = options["output"]
    if output is not None:
        check_evaluation(output)
    pipeline = load(options["model"], **{name: options[name] for name in ("backend", "dtype", "device", "quantize")})
    asked = UpscaleOptions(
        method="sd-x2",
        upscaler=options["upscaler"],
        steps=options["upscale_steps"],
        noise_level=options["upscale_noise"],
    )
    result = evaluate_upscaling(
        pipeline,
        options["identities"],
        asked,
        steps=options["steps"],
        guidance=options["guidance"],
        seed=options["seed"],
    )
    figures = {name: value._asdict() for name, value in result.figures.items()}
    settings = {
        "model": options["model"],
        "identities": [options["identities"].start, options["identities"].stop],
        "views": result.views,
        "seed": options["seed"],
        "steps": options["steps"] or pipeline.model.config.defaults.steps,
        "guidance": options["guidance"] or pipeline.model.config.defaults.guidance,
        "upscale": asdict(result.settings),
        "backend": pipeline.model.backend,
        "dtype": pipeline.model.dtype,
        "quantization": pipeline.model.quantization,
    }
    document = _finite({**settings, "figures": figures})
    if options["as_json"]:
        print_json(document)
    else:
        click.echo(f"{result.identities} heads, {result.views} views each at twice their size; mean +- deviation over views")
        for name, value in figures.items():
            click.echo(f"  {name:27} {value['mean']:8.3f} +- {value['std']:.3f}  ({value['min']:.3f} to {value['max']:.3f})")
    if output is not None:
        _write(output, result.rows, document)


def _write(output: Path, rows: Sequence[NDArray[np.uint8]], document: dict[str, Any]) -> None:
    """Write sheet_00.png ... and evaluation.json."""
    parts = [rows[first : first + SHEET_ROWS] for first in range(0, len(rows), SHEET_ROWS)]
    write_evaluation(output, {f"sheet_{number:02}.png": sheet(np.stack(part)) for number, part in enumerate(parts)}, document)


def evaluate_folder(folder: Path, options: dict[str, Any], *, given: Iterable[str]) -> None:
    """`mvmlx evaluate FOLDER`; `given` are the options that the command line has."""
    from mvshared.captures import load_capture, read_views
    from mvshared.consistency import consistency

    for name in given:
        if name not in FOLDER_OPTIONS:
            raise OptionError(
                name, expected="left out with FOLDER", got=options[name], hint="it is about a model, and FOLDER has the views"
            )
    output: Path | None = options["output"]
    if output is not None:
        check_evaluation(output)
    capture = load_capture(folder)
    path = folder / "transforms.json"
    if len(capture.poses) < 2:
        raise DatasetError("has 1 frame, and consistency is one of at least 2", path=path)
    if capture.lens_doubt:
        raise DatasetError(capture.lens_doubt, path=path, hint="undistort, crop, pad or scale the pictures, and say so there")
    if capture.fov_deg is None:
        hint = "add w, h and fl_x, or camera_angle_x"
        raise DatasetError("says no field of view that all frames have", path=path, hint=hint)
    views = read_views(capture)
    try:
        result = consistency(views.pictures, capture.poses, fov_deg=capture.fov_deg, depth=views.depth, masks=views.masks)
    except (CameraError, OptionError) as cause:  # all that it is given is the folder's
        raise DatasetError(cause.message, path=path, hint=cause.hint) from cause
    figures = {
        **result.figures._asdict(),
        "exchanged_psnr_db": result.exchanged.psnr_db,
        "exchanged_ssim": result.exchanged.ssim,
        "gain_db": result.gain_db,
    }
    names = [image.name for image in capture.image_paths]
    per_view = [{"file": name, **view._asdict()} for name, view in zip(names, result.views, strict=True)]
    document = _finite({"folder": str(folder), "views": len(names), "depth": result.depth, **figures, "per_view": per_view})
    if options["as_json"]:
        print_json(document)
    else:
        click.echo(f"{len(names)} views, {len(result.warps) // 2} pairs of neighbours, depth {result.depth}")
        for name, value in figures.items():
            click.echo(f"  {name:18} {_number(value)}")
        for name, view in zip(names, result.views, strict=True):
            seen = f"{_number(view.psnr_db)} dB, SSIM {_number(view.ssim)}, {view.visible_share:.0%} visible"
            click.echo(f"  {name}: {seen if view.psnr_db is not None else 'no neighbour sees the same'}")
        if note := _note(result):
            click.echo(f"note: {note}", err=True)
    if output is not None:
        rows = [
            np.stack([views.pictures[warp.view], warp.picture, np.repeat(warp.visible[..., None] * np.uint8(255), 3, axis=-1)])
            for warp in result.warps[:WARPS_SHOWN]
        ]
        write_evaluation(output, {VIEWS_SHEET: sheet(np.stack(rows))}, document)


def _note(result: "Consistency") -> str:
    """What figures mean that are not those of different views of one object; nothing of others."""
    if result.figures.psnr_db is None:
        causes = {
            "given": "the depth is in another unit than the poses, or has values at few pixels alone, as points of COLMAP have",
            "estimated": "the cameras are others than those of the pictures, or see no common surface",
        }
        return f"no point of a view was found in another: {causes[result.depth]}"
    if result.gain_db is None or result.gain_db < SMALL_GAIN_DB:
        return "exchanging the cameras changes little or helps: these are hardly different views of one object"
    return ""


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _finite(value: Any) -> Any:
    """The document with None for infinite numbers, which JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
