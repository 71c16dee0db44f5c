"""`mvmlx profile`."""

import json
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import click
from tqdm import tqdm

from mvshared.arguments import picture_size
from mvshared.backend import load
from mvshared.commands.generate import LOAD_OPTIONS, Reporter, described, poses_in, shown_warnings
from mvshared.config import ModelConfig
from mvshared.errors import MvWarning, OptionError
from mvshared.export import package_versions
from mvshared.files import check_folder, make_folder, write_atomic
from mvshared.messages import print_json
from mvshared.numbers import whole
from mvshared.pipeline import Pipeline, Progress
from mvshared.profiling import LARGEST, Profile, Row, StageProfile, parts, profile, trace
from mvshared.request import prepare
from mvshared.schedule import MAX_STEPS
from mvshared.validation import textured_subject


def profile_model(name: str, options: dict[str, Any]) -> None:
    """`mvmlx profile`."""
    depth, trace_path = options["depth"], options["trace"]
    steps = whole("steps", options["steps"], 1, MAX_STEPS)
    if trace_path is not None:
        check_folder(trace_path.parent)
        if trace_path.is_dir():
            raise OptionError("trace", expected="a file", got=str(trace_path))
    config, tokenizer = described(name)
    arguments = _arguments(config, options)
    with warnings.catch_warnings():  # which the run gives once more
        warnings.simplefilter("ignore", MvWarning)
        prepare(config, tokenizer, **arguments, steps=steps)  # refuses what it would, before weights are read
    start = time.perf_counter()
    pipeline = load(name, **{option: options[option] for option in LOAD_OPTIONS})
    loading = time.perf_counter() - start
    with (
        shown_warnings(Reporter(as_json=False, stepwise=None)),
        tqdm(total=1 + 2 * steps, desc="profiling", unit="step", disable=None, file=sys.stderr) as bar,
    ):

        def on_step(progress: Progress) -> None:
            bar.update()

        def run(steps: int) -> None:
            pipeline.generate(**arguments, steps=steps, on_step=on_step)

        result = profile(pipeline, lambda: run(steps), warm_up=lambda: run(1))
    about = _about(name, pipeline, options)
    if trace_path is not None:
        document = trace(result, title=f"mvmlx profile {name}", other=about)
        write_atomic(make_folder(trace_path.parent) / trace_path.name, json.dumps(document).encode())
    if options["as_json"]:
        print_json(_document(result, about, loading=loading))
    else:
        for line in _report(result, about, loading=loading, depth=depth):
            click.echo(line)
        if trace_path is not None:
            click.echo(f"\ntrace in {trace_path}: open it at ui.perfetto.dev")


def _arguments(config: ModelConfig, options: dict[str, Any]) -> dict[str, Any]:
    """What `generate` is called with; a made-up picture, and no text, stand in for what is not given."""
    image: list[Any] = list(options["image"])
    if not image and config.unet.takes_pictures:
        image = [textured_subject(picture_size(config, options["size"], name="size"))]
    prompt = options["prompt"]
    if prompt is None and config.text_encoder is not None:
        prompt = ""
    poses = None
    if options["cameras"] is not None:
        poses = poses_in(options["cameras"], config)
    return {
        "image": image or None,
        "prompt": prompt,
        "negative_prompt": options["negative_prompt"],
        "views": options["views"],
        "azimuths_deg": options["azimuths"],
        "elevation_deg": options["elevation"],
        "cameras": poses,
        "guidance": options["guidance"],
        "scheduler": options["scheduler"],
        "spacing": options["spacing"],
        "size_px": options["size"],
    }


def _about(name: str, pipeline: Pipeline[Any], options: dict[str, Any]) -> dict[str, Any]:
    model, defaults = pipeline.model, pipeline.model.config.defaults
    return {
        "model": name,
        "backend": model.backend,
        "device": model.device,
        "dtype": model.dtype,
        "steps": options["steps"],
        "size_px": defaults.size_px if options["size"] is None else options["size"],
        "packages": package_versions(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _document(result: Profile, about: dict[str, Any], *, loading: float) -> dict[str, Any]:
    return {
        **about,
        "loading_seconds": loading,
        "seconds": result.seconds,
        "accounted": result.accounted,
        "rest_seconds": result.rest_seconds,
        "watched_seconds": result.watched_seconds,
        "stages": [{**stage._asdict(), "rows": [row._asdict() for row in stage.rows]} for stage in result.stages],
        "costs": [cost._asdict() for cost in result.costs],
    }


def _report(result: Profile, about: dict[str, Any], *, loading: float, depth: int) -> Iterator[str]:
    """The lines that are printed."""
    what = f"{about['backend']} on {about['device']} in {about['dtype']}"
    yield f"{about['model']}: {what}, {about['size_px']} pixels, {about['steps']} steps"
    yield f"loaded in {loading:.3g} s, generated in {result.seconds:.3g} s, of which {result.accounted:.1%} are in stages"
    yield ""
    yield f"{'stage':<15} {'seconds':>9} {'share':>7} {'peak MB':>9}"
    for stage in result.stages:
        peak = "-" if stage.peak_bytes is None else f"{stage.peak_bytes / 1e6:.0f}"
        yield f"{stage.name:<15} {stage.seconds:>9.4f} {stage.seconds / result.seconds:>7.1%} {peak:>9}"
    yield f"{'the rest':<15} {result.rest_seconds:>9.4f} {result.rest_seconds / result.seconds:>7.1%} {'':>9}"
    if all(stage.peak_bytes is None for stage in result.stages):
        yield "the peak memory of a stage cannot be measured on this device"
    yield ""
    slower = result.watched_seconds / result.seconds - 1
    yield f"block by block ({abs(slower):.0%} {'slower' if slower >= 0 else 'faster'} than without watching)"
    for stage in result.stages:
        if stage.rows:
            yield from _blocks(stage, depth)
    yield ""
    yield f"the {LARGEST} largest costs, of {result.watched_seconds:.3g} s"
    for cost in result.costs[:LARGEST]:
        rate = f", {cost.flops / cost.seconds / 1e9:.3g} GFLOP/s" if cost.flops else ""
        yield f"{cost.seconds / result.watched_seconds:>7.1%}  {cost.what}: {cost.seconds:.3g} s{rate}"


def _blocks(stage: StageProfile, depth: int) -> Iterator[str]:
    shown = [row for row in stage.rows if len(parts(row.name)) <= depth]
    width = max(30, *(len(_indented(row)) for row in shown))
    yield ""
    columns = f"{'calls':>6} {'seconds':>9} {'itself':>9} {'share':>7} {'out MB':>8} {'GFLOP':>9} {'GFLOP/s':>8}"
    yield f"{stage.name:<{width}} {columns}"
    for row in shown:
        rate = f"{row.flops / row.seconds / 1e9:.1f}" if row.flops and row.seconds else "-"
        calls, out = (f"{row.calls}", f"{row.output_bytes / 1e6:.2f}") if row.calls else ("-", "-")
        share = f"{row.seconds / stage.watched_seconds:.1%}"
        figures = (
            f"{calls:>6} {row.seconds:>9.4f} {row.own_seconds:>9.4f} {share:>7} {out:>8} {row.flops / 1e9:>9.3f} {rate:>8}"
        )
        yield f"{_indented(row):<{width}} {figures}"
    share = f"{stage.outside_seconds / stage.watched_seconds:.1%}"
    yield f"{'outside of blocks':<{width}} {'':>6} {stage.outside_seconds:>9.4f} {'':>9} {share:>7}"
    yield f"{'all':<{width}} {'':>6} {stage.watched_seconds:>9.4f}"


def _indented(row: Row) -> str:
    path = parts(row.name)
    return "  " * (len(path) - 1) + path[-1]
