"""The commands about checkpoints: `mvmlx models`, `download`, `info`, `convert`, `init gaf`, `validate`."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from mvshared.checkpoint import find_model, read_model_config
from mvshared.embedded import embedded_source
from mvshared.errors import CheckpointError, NumericsError, OptionError
from mvshared.files import check_folder, make_folder
from mvshared.inspection import Report, inspect, inspect_devices
from mvshared.messages import print_json
from mvshared.models import EMBEDDED, REPOSITORIES, read_pins
from mvshared.numbers import number
from mvshared.upscaling.config import UpscalerConfig

if TYPE_CHECKING:
    from mvshared.conversion.report import Report as ConversionReport
    from mvshared.validation import Validation


WORST_LAYERS = 10


def list_models(*, as_json: bool) -> None:
    """`mvmlx models`."""
    for name in EMBEDDED:
        folder = find_model(name)
        size = sum(path.stat().st_size for path in embedded_source(name).rglob("*.safetensors"))
        defaults = read_model_config(folder).defaults
        what = f"{defaults.views} views of {defaults.size_px} pixels, {defaults.steps} steps, guidance {defaults.guidance:g}"
        if as_json:
            print_json({"name": name, "state": "embedded", "folder": str(folder), "bytes": size})
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
            print_json(document)
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
        print_json(asdict(pin))
    else:
        click.echo(f"{name} is in {pin.folder}: {_size(pin.bytes)}, licence {pin.licence or 'unknown'}")


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def show_model(name: str | None, *, backend: str, as_json: bool) -> None:
    """`mvmlx info`. Raises CheckpointError if something is wrong with the folder."""
    report = None if name is None else inspect(name, backend=backend)
    devices = inspect_devices(backend=backend)
    if as_json:
        document: dict[str, Any] = {}
        if report is not None:
            document |= {"folder": str(report.folder), "family": report.config.family if report.config else None}
            document |= {"components": [asdict(each) for each in report.components], "faults": report.faults}
            document |= {"memory_bytes": report.memory_bytes(), "replaced_scheduler": report.replaced_scheduler}
        print_json(document | {"devices": [asdict(each) for each in devices]})
    else:
        if report is not None:
            _print_report(report)
        for each in devices:
            click.echo(f"{each.backend} computes on {each.device} in {each.dtype} unless it is told otherwise: {each.reason}")
    if report is not None and report.faults:
        count = len(report.faults)
        raise CheckpointError(f"{count} fault{'s' if count > 1 else ''}; the first: {report.faults[0]}")


def _print_report(report: Report) -> None:
    if isinstance(report.config, UpscalerConfig):
        settings = report.config.defaults
        steps = f"{settings.steps} step{'s' if settings.steps > 1 else ''}"
        click.echo(f"{report.config.family}: upscales latents to twice their size, {steps}, guidance {settings.guidance:g}")
    elif report.config is not None:
        defaults = report.config.defaults
        views = f"{defaults.views} view{'s' if defaults.views > 1 else ''} of {defaults.size_px} pixels"
        how = f"{defaults.steps} steps of {defaults.scheduler}, guidance {defaults.guidance:g}"
        click.echo(f"family {report.config.family}: {views}, {how}")
        if report.replaced_scheduler is not None:
            click.echo(f"the scheduler is {report.replaced_scheduler}, which is not here: ddim takes its place")
    for each in report.components:
        dtypes = ", ".join(f"{dtype} x {count}" for dtype, count in sorted(each.dtypes.items()))
        files = f"{each.files} file{'s' if each.files > 1 else ''}"
        quantized = "" if each.quantization is None else f", quantised ({each.quantization})"
        click.echo(f"{each.name}: {each.parameters:,} parameters in {each.tensors} tensors ({dtypes}) of {files}{quantized}")
    if report.components:
        memory = ", ".join(f"{size / 1e9:.3f} GB in {dtype}" for dtype, size in report.memory_bytes().items())
        click.echo(f"memory for these weights: {memory}")
    for fault in report.faults:
        click.echo(f"fault: {fault}")


def convert_checkpoint(source: Path, dest: Path, options: dict[str, Any]) -> None:
    """`mvmlx convert`."""
    from mvshared.conversion.convert import convert

    as_json, shard_gb = options.pop("as_json"), number("shard size", options.pop("shard_gb"), 0, 1e9)
    with _counting("converting") as count:
        report = convert(source, dest, shard_bytes=round(shard_gb * 1e9), on_tensor=count, **options)
    if as_json:
        print_json(asdict(report) | {"folder": str(report.folder)})
        return
    _print_conversion(report)
    for reason, count in Counter(report.left_out.values()).items():
        click.echo(f"  left out ({count}): {reason}")
    if report.guessed:
        reason = f"nothing says whether it predicts noise or velocity: it is taken for {report.family}, and may be"
        click.echo(f"mvmlx: warning: {reason} --family {report.guessed}", err=True)
    if report.missing:
        click.echo(f"mvmlx: warning: not a whole model yet; add with --with: {', '.join(report.missing)}", err=True)


def quantize_model(source: str, dest: Path, options: dict[str, Any]) -> None:
    """`mvmlx quantize`."""
    from mvshared.quantization.folders import quantize_folder, write_report

    as_json, report_file, components = options.pop("as_json"), options.pop("report"), options.pop("components")
    chosen = None if components is None else components.split(",")
    if report_file is not None:
        if report_file.suffix not in (".csv", ".json"):
            raise OptionError("report", expected="a file named .csv or .json", got=str(report_file))
        check_folder(report_file.parent)
    with _layers() as on_layer:
        report = quantize_folder(source, dest, chosen=chosen, on_layer=on_layer, **options)
    if report_file is not None:
        make_folder(report_file.parent)
        write_report(report_file, report)
    if as_json:
        print_json(asdict(report) | {"folder": str(report.folder)})
        return
    for each in report.components:
        error = "" if each.output_error is None else f", relative RMS of its output {each.output_error:.2e}"
        click.echo(f"{each.name} ({each.preset}): {_size(each.bytes_before)} to {_size(each.bytes)}{error}")
        layers = [layer for layer in report.layers if layer.component == each.name]
        for bits, count in sorted(Counter(layer.bits for layer in layers).items()):
            click.echo(f"  {count} layers of {bits} bits")
        worst = sorted(layers, key=lambda layer: -(layer.output_error or layer.weight_error))[:WORST_LAYERS]
        click.echo(f"  {'output error':>12} {'weight error':>12} bits  layer, those that lose most")
        for layer in worst:
            output = "-" if layer.output_error is None else f"{layer.output_error:.2e}"
            click.echo(f"  {output:>12} {layer.weight_error:12.2e} {layer.bits:4}  {layer.name}")
    click.echo(f"in {report.folder}")


@contextmanager
def _layers() -> Iterator[Callable[[str, int], None]]:
    """Bars on stderr, if that is a terminal, of the layers of each thing that is done."""
    bars: dict[str, tqdm[Any]] = {}

    def advance(what: str, count: int) -> None:
        if what not in bars:
            bars[what] = tqdm(desc=what, total=count, unit="layer", disable=None)
        bars[what].update()

    try:
        yield advance
    finally:
        for bar in bars.values():
            bar.close()


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


def _print_components(result: "Validation") -> None:
    """Relative RMS of what every network makes, and of its worst block."""
    click.echo(f"{'output':>9} {'worst':>9} {'blocks':>7}  component (worst block)")
    for each in result.components():
        figures = f"{each.output.rms_error:9.2e} {each.worst.rms_error:9.2e} {each.blocks:7}"
        click.echo(f"{figures}  {each.name} ({each.worst.name})")


def _print_blocks(result: "Validation") -> None:
    click.echo(f"{'relative RMS':>13} {'max':>9} {'seconds':>9} {'reference':>9}  block (shape)")
    for check in result.checks:
        mark = "  <- first to leave the tolerance" if check is result.first_failure else ""
        shape = ", ".join(map(str, check.shape))
        figures = f"{check.rms_error:13.2e} {check.max_error:9.2e}"
        for seconds in (check.seconds, check.reference_seconds):
            figures += f"{'-':>10}" if seconds is None else f" {seconds:9.4f}"
        click.echo(f"{figures}  {check.name} ({shape}){mark}")


def validate_model(name: str, options: dict[str, Any]) -> None:
    """`mvmlx validate`. Raises NumericsError if a block leaves the tolerance."""
    from mvshared.validation import validate

    as_json, summary = options.pop("as_json"), options.pop("summary")
    result = validate(name, **options)
    if as_json:
        for check in () if summary else result.checks:
            print_json({"event": "block", **asdict(check)})
        for each in result.components() if summary else ():
            figures = {"output_rms_error": each.output.rms_error, "worst_rms_error": each.worst.rms_error}
            document = {"name": each.name, "blocks": each.blocks, **figures, "worst": each.worst.name}
            print_json({"event": "component", **document})
    else:
        other = result.backend if result.against == "float32" else result.against
        quantized = "" if result.quantization is None else f", {result.quantization},"
        click.echo(f"{name}: {result.backend} in {result.dtype}{quantized} against {other} in float32")
        (_print_components if summary else _print_blocks)(result)
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
