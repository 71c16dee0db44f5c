"""`mvmlx generate`."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from mvshared.backend import load
from mvshared.camera import load_cameras
from mvshared.checkpoint import find_model, read_model_config
from mvshared.errors import MvWarning, OptionError
from mvshared.export import check_free
from mvshared.files import check_folder, make_folder, write_atomic
from mvshared.images import encode_png, grid
from mvshared.pipeline import Pipeline, Progress
from mvshared.repetition import repeat
from mvshared.runs import Views, read_run

# What may stand beside --config: it changes where the result goes, not what it is.
BESIDE_CONFIG = {"config", "output", "force", "as_json", "stepwise"}


class Reporter:
    """Progress of a run: a bar on stderr if that is a terminal, events on stdout with --json."""

    def __init__(self, *, as_json: bool, stepwise: Path | None) -> None:
        self.as_json, self.stepwise = as_json, stepwise
        self.bar: tqdm[Any] | None = None

    def event(self, name: str, **values: Any) -> None:
        """Print an event if asked to."""
        if self.as_json:
            click.echo(json.dumps({"event": name, **values}))

    def step(self, progress: Progress) -> None:
        """Show a sampling step."""
        if self.stepwise is not None:
            write_atomic(make_folder(self.stepwise) / f"step_{progress.step:04}.png", encode_png(grid(progress.preview())))
        self.event("step", step=progress.step, steps=progress.steps, timestep=progress.timestep)
        if self.bar is None:
            self.bar = tqdm(total=progress.steps, desc="sampling", unit="step", disable=None, file=sys.stderr)
        self.bar.update()
        if progress.step == progress.steps:
            self.bar.close()
            self.bar = None


def generate_views(options: dict[str, Any], *, given: set[str]) -> None:
    """`mvmlx generate`: `given` names the options that the user wrote."""
    reporter = Reporter(as_json=options["as_json"], stepwise=options["stepwise"])
    seeds = list(options["seeds"]) or [0]
    folders = _output_folders(options, seeds)
    for folder in folders:
        check_free(folder, force=options["force"])
    if reporter.stepwise is not None:
        check_folder(reporter.stepwise)
    config = options["config"]
    runs = _new_runs(options, seeds) if config is None else [_repeated_run(config, given)]
    for folder, run in zip(folders, runs, strict=True):
        if len(folders) > 1 and options["stepwise"] is not None:
            reporter.stepwise = options["stepwise"] / folder.name
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", MvWarning)
            views = run(reporter)
        for text in sorted({str(each.message) for each in caught if issubclass(each.category, MvWarning)}):
            reporter.event("warning", message=text)
            click.echo(f"mvmlx: warning: {text}", err=True)
        views.save(folder, force=options["force"])
        reporter.event("saved", folder=str(folder), views=len(views.images), seed=views.parameters.seed)
        if not options["as_json"]:
            click.echo(f"{len(views.images)} views in {folder} (see grid.png)")


def _output_folders(options: dict[str, Any], seeds: list[int]) -> list[Path]:
    output, image = options["output"], options["image"][0] if options["image"] else None
    if output is None:
        source = options["config"].resolve().parent if options["config"] is not None else image
        output = Path(f"{source.stem}-views") if source is not None else Path("views")
    return [output] if len(seeds) == 1 else [output / f"seed_{seed}" for seed in seeds]


def _repeated_run(config: Path, given: set[str]) -> Callable[[Reporter], Views]:
    clash = sorted(given - BESIDE_CONFIG)
    if clash:
        raise OptionError(clash[0], expected="left out where --config is given", got="both")
    run = read_run(config)
    parameters = run.parameters

    def repeated(reporter: Reporter) -> Views:
        pipeline = load(parameters.model, backend=parameters.backend, dtype=parameters.dtype, device=parameters.device)
        return repeat(pipeline, run, on_step=reporter.step)

    return repeated


def _new_runs(options: dict[str, Any], seeds: list[int]) -> list[Callable[[Reporter], Views]]:
    if not options["image"] and options["prompt"] is None:
        hint = "mvmlx generate PICTURE, or --prompt with a model that takes text"
        raise OptionError("image", expected="a picture to start from", got=None, hint=hint)
    if len(set(seeds)) != len(seeds):
        raise OptionError("seed", expected="different for every result", got=seeds)
    radius = read_model_config(find_model(options["model"])).camera.radius
    cameras = None if options["cameras"] is None else load_cameras(options["cameras"], radius=radius).poses
    normals = options["normals"][0] if len(options["normals"]) == 1 else list(options["normals"]) or None
    loaded: list[Pipeline[Any]] = []

    def run(reporter: Reporter, seed: int) -> Views:
        if not loaded:
            loaded.append(load(options["model"], backend=options["backend"], dtype=options["dtype"], device=options["device"]))
            model = loaded[0].model
            reporter.event("loaded", model=options["model"], backend=model.backend, device=model.device, dtype=model.dtype)
        return loaded[0].generate(
            list(options["image"]) or None,
            prompt=options["prompt"],
            negative_prompt=options["negative_prompt"],
            image_scale=options["image_scale"],
            views=options["views"],
            azimuths_deg=options["azimuths"],
            elevation_deg=options["elevation"],
            cameras=cameras,
            normals=normals,
            normal_space=options["normal_space"],
            steps=options["steps"],
            guidance=options["guidance"],
            scheduler=options["scheduler"],
            eta=options["eta"],
            seed=seed,
            size_px=options["size"],
            latents=options["latents"],
            on_step=reporter.step,
        )

    return [lambda reporter, seed=seed: run(reporter, seed) for seed in seeds]
