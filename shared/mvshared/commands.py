"""What the commands of the command line do: load, run with progress, print. One function per command."""

import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from tqdm import tqdm

from mvshared.backend import load
from mvshared.camera import load_cameras
from mvshared.checkpoint import find_model, read_model_config
from mvshared.errors import CheckpointError, MvWarning, NumericsError, OptionError
from mvshared.export import check_free
from mvshared.files import check_folder, make_folder, write_atomic, write_json
from mvshared.images import encode_png, grid, sheet
from mvshared.inspection import Report, inspect
from mvshared.models import EMBEDDED, REPOSITORIES, read_pins
from mvshared.pipeline import Pipeline, Progress, repeat
from mvshared.runs import Views, read_run

if TYPE_CHECKING:
    from mvshared.conversion.report import Report as ConversionReport

# What may stand beside --config: it changes where the result goes, not what it is.
BESIDE_CONFIG = {"config", "output", "force", "as_json", "stepwise"}
SHEET_ROWS = 8


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
            normals=options["normals"],
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


def list_models(*, as_json: bool) -> None:
    """`mvmlx models`."""
    for name in EMBEDDED:
        folder = find_model(name)
        config = read_model_config(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        defaults = config.defaults
        what = f"{defaults.views} views of {defaults.size_px} pixels, {defaults.steps} steps, guidance {defaults.guidance:g}"
        if as_json:
            click.echo(json.dumps({"name": name, "state": "embedded", "folder": str(folder), "bytes": size}))
        else:
            click.echo(f"{name}: {what}, {_size(size)}, in the package")
    pins = read_pins()
    names = {repository: name for name, repository in REPOSITORIES.items()}
    for repository in (*names, *(pins.keys() - names.keys())):
        name, pin = names.get(repository, repository), pins.get(repository)
        complete = pin is not None and pin.complete()
        if as_json:
            state = "downloaded" if complete else "pinned" if pin else "not downloaded"
            document = {"name": name, "state": state, "repository": repository}
            document |= {"revision": pin.revision, "folder": pin.folder, "bytes": pin.bytes} if pin else {}
            click.echo(json.dumps(document))
        elif pin is not None and complete:
            click.echo(f"{name}: {repository}, revision {pin.revision[:12]}, {_size(pin.bytes)}, in {pin.folder}")
        else:
            pinned = f", pinned to revision {pin.revision[:12]}" if pin else ""
            click.echo(f"{name}: {repository}{pinned}, not downloaded (mvmlx download {name})")


def download_model(name: str, options: dict[str, Any]) -> None:
    """`mvmlx download`."""
    from mvshared.download import Plan, download

    def announce(plan: Plan) -> None:
        licence = plan.licence or "that the repository does not name"
        click.echo(f"{plan.repository}, revision {plan.revision}, under the licence {licence}", err=True)
        click.echo(f"{len(plan.files)} files of {_size(plan.bytes)} go to {plan.cache}", err=True)

    as_json = options.pop("as_json")
    pin = download(name, on_plan=announce, **options)
    if as_json:
        click.echo(json.dumps(asdict(pin)))
    else:
        click.echo(f"{name} is in {pin.folder}: {_size(pin.bytes)}, licence {pin.licence or 'unknown'}")


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def show_model(name: str, *, backend: str, as_json: bool) -> None:
    """`mvmlx info`. Raises CheckpointError if something is wrong with the folder."""
    report = inspect(name, backend=backend)
    if as_json:
        document = {"folder": str(report.folder), "family": report.config.family if report.config else None}
        document |= {"components": [asdict(each) for each in report.components], "faults": report.faults}
        click.echo(json.dumps(document | {"memory_bytes": report.memory_bytes()}))
    else:
        _print_report(report)
    if report.faults:
        count = len(report.faults)
        raise CheckpointError(f"{count} fault{'s' if count > 1 else ''}; the first: {report.faults[0]}")


def _print_report(report: Report) -> None:
    if report.config is not None:
        defaults = report.config.defaults
        views = f"{defaults.views} view{'s' if defaults.views > 1 else ''} of {defaults.size_px} pixels"
        click.echo(f"family {report.config.family}: {views}, {defaults.steps} steps, guidance {defaults.guidance:g}")
    for each in report.components:
        dtypes = ", ".join(f"{dtype} x {count}" for dtype, count in sorted(each.dtypes.items()))
        files = f"{each.files} file{'s' if each.files > 1 else ''}"
        click.echo(f"{each.name}: {each.parameters:,} parameters in {each.tensors} tensors ({dtypes}) of {files}")
    if report.components:
        memory = ", ".join(f"{size / 1e9:.3f} GB in {dtype}" for dtype, size in report.memory_bytes().items())
        click.echo(f"memory for these weights: {memory}")
    for fault in report.faults:
        click.echo(f"fault: {fault}")


def convert_checkpoint(source: Path, dest: Path, options: dict[str, Any]) -> None:
    """`mvmlx convert`."""
    from mvshared.conversion.convert import convert

    as_json, shard_gb = options.pop("as_json"), options.pop("shard_gb")
    with _counting("converting") as count:
        report = convert(source, dest, shard_bytes=round(shard_gb * 1e9), on_tensor=count, **options)
    if as_json:
        click.echo(json.dumps(asdict(report) | {"folder": str(report.folder)}, default=dict))
        return
    _print_conversion(report)
    for reason, number in Counter(report.left_out.values()).items():
        click.echo(f"  left out: {number} tensor{'s' if number > 1 else ''}, {reason}")
    if report.missing:
        click.echo(f"mvmlx: warning: not a whole model yet; add with --with: {', '.join(report.missing)}", err=True)


def init_gaf_model(dest: Path, options: dict[str, Any]) -> None:
    """`mvmlx init gaf`."""
    from mvshared.conversion.gaf import init_gaf

    source = options.pop("source")
    with _counting("writing") as count:
        _print_conversion(init_gaf(source, dest, on_tensor=count, **options))


@contextmanager
def _counting(what: str) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr, if that is a terminal, of the bytes of tensors."""
    with tqdm(desc=what, unit="B", unit_scale=True, disable=None) as bar:

        def count(name: str, size: int) -> None:
            bar.update(size)

        yield count


def _print_conversion(report: "ConversionReport") -> None:
    click.echo(f"{report.family} in {report.folder}")
    for each in report.written:
        dtypes = ", ".join(f"{dtype} x {count}" for dtype, count in each.dtypes.items())
        click.echo(f"  {each.component}: {each.tensors} tensors ({dtypes}) in {each.files} file{'s' if each.files > 1 else ''}")


def validate_model(name: str, options: dict[str, Any]) -> None:
    """`mvmlx validate`. Raises NumericsError if a block leaves the tolerance."""
    from mvshared.validation import validate

    as_json = options.pop("as_json")
    result = validate(name, **options)
    if as_json:
        for check in result.checks:
            click.echo(json.dumps({"event": "block", **asdict(check)}))
    else:
        click.echo(f"{name}: {result.backend} in {result.dtype} against {result.against} in float32")
        click.echo(f"{'relative RMS':>13} {'max':>9} {'seconds':>9} {'reference':>9}  block (shape)")
        for check in result.checks:
            mark = "  <- first to leave the tolerance" if check is result.first_failure else ""
            shape = ", ".join(map(str, check.shape))
            figures = f"{check.rms_error:13.2e} {check.max_error:9.2e}"
            for seconds in (check.seconds, check.reference_seconds):
                figures += f"{'-':>10}" if seconds is None else f" {seconds:9.4f}"
            click.echo(f"{figures}  {check.name} ({shape}){mark}")
    for missing in result.unmatched:
        click.echo(f"not compared: {missing} has no counterpart in {result.against}", err=True)
    worst = max(result.checks, key=lambda check: check.rms_error)
    if result.first_failure is not None:
        bad = result.first_failure
        difference = f"{bad.rms_error:.2g} relative RMS, allowed are {result.tolerance:g}"
        raise NumericsError(f"differs from {result.against} by {difference}", where=bad.name)
    if not as_json:
        count = len(result.checks)
        click.echo(f"{count} blocks agree within {result.tolerance:g}; the largest is {worst.rms_error:.2e}, {worst.name}")


def train_model(config: Path, output: Path, *, backend: str, device: str) -> None:
    """`mvmlx train`."""
    from mvshared.training.config import load_train_config
    from mvshared.training.loop import train
    from mvshared.training.samples import sample_writer

    settings = load_train_config(config)
    write_sample = sample_writer(settings, output, backend=backend, device=device)
    folder = train(settings, output, backend=backend, device=device, on_sample=write_sample)
    click.echo(f"trained model in {folder}")


def render_head_dataset(output: Path, identities: range, *, views: int, size_px: int, processes: int | None) -> None:
    """`mvmlx render-heads`."""
    from mvshared.evaluation import HELD_OUT
    from mvshared.heads.dataset import render_dataset

    count = render_dataset(output, identities, views=views, size_px=size_px, processes=processes)
    click.echo(f"{count} heads rendered, {len(identities)} in {output}")
    if identities.start < HELD_OUT:
        click.echo(f"note: identities below {HELD_OUT} are those that `mvmlx evaluate` holds out", err=True)


def evaluate_model(options: dict[str, Any]) -> None:
    """`mvmlx evaluate`."""
    from mvshared.evaluation import evaluate

    output: Path | None = options["output"]
    if output is not None:
        check_folder(output)
    pipeline = load(options["model"], backend=options["backend"], dtype=options["dtype"], device=options["device"])
    result = evaluate(
        pipeline,
        options["identities"],
        steps=options["steps"],
        guidance=options["guidance"],
        normals=options["normals"],
        seed=options["seed"],
    )
    figures = {name: value._asdict() for name, value in result.summaries().items()}
    settings = {
        "model": options["model"],
        "identities": [options["identities"].start, options["identities"].stop],
        "views": result.views,
        "normals": options["normals"],
        "seed": options["seed"],
        "steps": options["steps"] or pipeline.model.config.defaults.steps,
        "guidance": options["guidance"] or pipeline.model.config.defaults.guidance,
        "backend": pipeline.model.backend,
        "dtype": pipeline.model.dtype,
    }
    if options["as_json"]:
        click.echo(json.dumps({**settings, "figures": figures}))
    else:
        click.echo(f"{result.identities} heads, {result.views} views each; mean +- deviation over views")
        for name, value in figures.items():
            click.echo(f"  {name:16} {value['mean']:8.3f} +- {value['std']:.3f}  ({value['min']:.3f} to {value['max']:.3f})")
    if output is not None:
        make_folder(output)
        for first in range(0, len(result.rows), SHEET_ROWS):
            picture = sheet(np.stack(result.rows[first : first + SHEET_ROWS]))
            write_atomic(output / f"sheet_{first // SHEET_ROWS:02}.png", encode_png(picture))
        write_json(output / "evaluation.json", {**settings, "figures": figures})
