"""How time and memory grow with views, pixels and steps, beside the arithmetic: `mvmlx benchmark growth`.

All sizes of a series run in one process, in turns, on the same weights: what disturbs one disturbs all.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

from mvshared.backend import BackendName, Dtype, Model
from mvshared.benchmark.against import warm_up_of
from mvshared.benchmark.cases import as_in_a_run, facts_of, pipeline_of, step_of
from mvshared.benchmark.compare import Case, running
from mvshared.benchmark.flops import run_flops
from mvshared.benchmark.measure import cpu_seconds, timing_of
from mvshared.benchmark.models import open_model
from mvshared.benchmark.results import Row, Table, format_table
from mvshared.benchmark.settings import too_large
from mvshared.benchmark.suite import Suite, sized, step_flops
from mvshared.benchmark.worker import Prepared
from mvshared.process_memory import trim_heap
from mvshared.profiling import Recorder
from mvshared.validation import textured_subject

Axis = Literal["views", "pixels", "steps"]
VIEWS = (1, 2, 4, 8, 16)
SIZES_PX = (128, 256, 384, 512, 768)
STEPS = (1, 2, 4, 8, 16)
TITLES: dict[Axis, str] = {
    "views": "Growth with the views",
    "pixels": "Growth with the pixels",
    "steps": "Growth of a whole run with the steps",
}
TOLERANCE = 1.15  # how much faster than the arithmetic something may grow from one size to the next
LARGEST = 2  # kinds of work that are named for what grows faster


@dataclass(frozen=True, kw_only=True)
class Point:
    """One size of a series."""

    views: int
    size_px: int
    steps: int


def series(
    *,
    model: str,
    backend: BackendName,
    device: str,
    dtype: Dtype,
    guided: bool,
    whole: bool,
    points: Sequence[Mapping[str, int]],
    repeats: int,
) -> Prepared:
    """Every point in turns, `repeats` times after those that do not count: steps, or with `whole` whole runs, which have the
    model's own guidance if they are `guided`.

    The facts are those of the device, and `points` with fields of their rows.
    """
    given = [Point(**point) for point in points]
    if whole:
        pipeline = pipeline_of(model, backend=backend, device=device, dtype=dtype)
        loaded: Model[Any] = pipeline.model
        takes = loaded.config.unet.takes_pictures
        prompt = None if loaded.config.text_encoder is None else "a head"

        def run(point: Point) -> Callable[[], object]:
            image = textured_subject(point.size_px) if takes else None
            options: dict[str, Any] = {"views": point.views, "size_px": point.size_px, "steps": point.steps, "prompt": prompt}
            options |= {} if guided else {"guidance": 1.0}
            return lambda: pipeline.generate(image, **options)

        calls = [run(point) for point in given]
    else:
        loaded = open_model(model, ["unet"], backend=backend, dtype=dtype, device=device)
        calls = [step_of(loaded, views=point.views, size_px=point.size_px, guided=guided) for point in given]
    rows: list[dict[str, Any]] = []
    warm_up = warm_up_of(device)

    def call() -> None:
        times: list[list[tuple[float, float]]] = [[] for _ in calls]
        # Later calls repeat a recording on CUDA, which has its memory already.
        ordinary = [activation_bytes(loaded, each) for each in calls] if warm_up > 1 else None
        for _ in range(max(1, warm_up - 1) + repeats):
            for each, mine in zip(calls, times, strict=True):
                start, cpu_start = time.perf_counter(), cpu_seconds()
                each()
                mine.append((time.perf_counter() - start, cpu_seconds() - cpu_start))
        rows.extend(
            {
                "seconds": [wall for wall, _ in mine[-repeats:]],
                "cpu_seconds": [cpu for _, cpu in mine[-repeats:]],
                "activation_bytes": activation_bytes(loaded, each) if ordinary is None else ordinary[number],
                "work": work_of(loaded, each),
            }
            for number, (each, mine) in enumerate(zip(calls, times, strict=True))
        )

    return Prepared(call, lambda: {"facts": facts_of(loaded), "points": rows}, as_in_a_run(loaded))


def activation_bytes(model: Model[Any], call: Callable[[], object]) -> int | None:
    """The most memory that a call takes on top of what is there before it; None where that cannot be measured."""
    trim_heap()
    model.reset_memory_peak()
    before = model.memory_peak()
    call()
    after = model.memory_peak()
    return None if before is None or after is None else after - before


def work_of(model: Model[Any], call: Callable[[], object]) -> list[tuple[str, float, int]]:
    """Seconds and flops of every kind of work of a call whose blocks are watched."""
    recorder, found = Recorder(), dict[str, tuple[float, int]]()
    with model.observe_blocks(recorder.on_end, recorder.on_start):
        call()
    for event in recorder.events:
        seconds, flops = found.get(event.work, (0.0, 0))
        found[event.work] = seconds + event.own_seconds, flops + event.flops
    return [(name, seconds, flops) for name, (seconds, flops) in found.items()]


def points_of(suite: Suite, axis: Axis) -> list[Point]:
    """The sizes of a series; views and sizes that were asked for take the place of the usual ones."""
    defaults, settings = suite.config.defaults, suite.settings
    views, size_px = defaults.views, defaults.size_px
    if suite.found.folder is None:
        size_px = min(256, size_px)
    match axis:
        case "views":
            return [Point(views=count, size_px=size_px, steps=1) for count in sorted({*settings.views} or VIEWS)]
        case "pixels":
            return [Point(views=views, size_px=size, steps=1) for size in sorted({*settings.sizes_px} or SIZES_PX)]
        case "steps":
            steps = [count for count in STEPS if settings.steps is None or count <= settings.steps]
            return [Point(views=views, size_px=size_px, steps=count) for count in steps]


def measure_growth(suite: Suite, axis: Axis, *, limit_bytes: int, environment: Mapping[str, str]) -> Table:
    """The rows of a series with their verdicts; sizes that do not fit into memory say so."""
    rows = [_row(suite, axis, point, limit_bytes=limit_bytes) for point in points_of(suite, axis)]
    fitting = [row for row in rows if not row.failure]
    arguments: dict[str, Any] = {**suite.arguments, "guided": _guided(suite, axis), "whole": axis == "steps"}
    arguments["points"] = [{"views": row.views, "size_px": row.size_px, "steps": row.steps} for row in fitting]
    case = Case(what=axis, prepare=series, arguments={**arguments, "repeats": suite.settings.repeats})
    with running(case, environment=environment) as worker:
        worker.call()
        found, failure = worker.facts(), worker.failure
    if found is None:
        measured = [replace(row, failure=failure) for row in fitting]
    else:
        facts = {name: found["facts"][name] for name in ("device", "threads") if name in found["facts"]}
        measured = [_filled(row, facts, point) for row, point in zip(fitting, found["points"], strict=True)]
    rest = iter(measured)
    rows = [row if row.failure else next(rest) for row in rows]
    title = f"{TITLES[axis]}: {suite.found.name}, {suite.place.dtype}, {suite.place.backend}"
    grown = verdicts(rows)
    return Table(title=title, rows=rows, notes=(format_table(grown),) if grown else ())


def _guided(suite: Suite, axis: Axis) -> bool:
    """Whole runs are guided as the model's own are unless that is off, single steps only if it is on."""
    return suite.run_guidance > 1 if axis == "steps" else suite.settings.guidance == "on"


def _row(suite: Suite, axis: Axis, point: Point, *, limit_bytes: int) -> Row:
    """The row of a size before it is measured."""
    guided, views, size_px, steps = _guided(suite, axis), point.views, point.size_px, point.steps
    if axis == "steps":
        branches = 2 if guided else 1
        flops = run_flops(suite.config, views=views, size_px=size_px, steps=steps, branches=branches).all
        needed = suite.needs.run(views=views, size_px=size_px)
        what = f"run, {sized(views, size_px)}, {steps} step{'s' if steps > 1 else ''}{'' if guided else ', not guided'}"
    else:
        flops = step_flops(suite.config, views=views, size_px=size_px, guided=guided)
        needed = suite.needs.stage("unet", views=views, size_px=size_px, guided=guided)
        what = f"step, {sized(views, size_px)}{', guided' if guided else ''}"
    return Row(
        what=what,
        backend=suite.place.backend,
        dtype=suite.place.dtype,
        views=views,
        size_px=size_px,
        steps=steps,
        flops=flops,
        failure=too_large(needed, limit_bytes),
    )


def _filled(row: Row, facts: Mapping[str, Any], point: Mapping[str, Any]) -> Row:
    """The row with what was measured."""
    return replace(
        row,
        **facts,
        seconds=tuple(point["seconds"]),
        cpu_seconds=tuple(point["cpu_seconds"]),
        work=tuple((name, seconds, flops) for name, seconds, flops in point["work"]),
        activation_bytes=point["activation_bytes"],
    )


def verdicts(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Of each size and the one before it: how much more arithmetic, time and memory it is, and whether time or memory grow
    faster than the arithmetic. Time is CPU time on a CPU, since that is safe from other work."""
    timed = [row for row in rows if row.seconds and row.flops]
    return [_verdict(before, row) for before, row in pairwise(timed)]


def _verdict(before: Row, row: Row) -> dict[str, str]:
    assert row.flops and before.flops
    flops, time_ratio = row.flops / before.flops, _seconds(row) / _seconds(before)
    memory = row.activation_bytes / before.activation_bytes if row.activation_bytes and before.activation_bytes else None
    slower, larger = time_ratio > TOLERANCE * flops, memory is not None and memory > TOLERANCE * flops
    parts = []
    if slower:
        parts.append(f"time {time_ratio / flops:.2f}x as fast as the arithmetic: {_why(before, row)}")
    if larger:
        assert memory is not None
        parts.append(f"memory {memory / flops:.2f}x as fast as the arithmetic")
    return {
        "from": before.what,
        "to": row.what,
        "arithmetic": f"x {flops:.2f}",
        "time": f"x {time_ratio:.2f}",
        "memory": "" if memory is None else f"x {memory:.2f}",
        "verdict": "; ".join(parts) or "no faster than the arithmetic",
    }


def _seconds(row: Row) -> float:
    return timing_of(row.cpu_seconds if row.device == "cpu" and row.cpu_seconds else row.seconds).median


def _why(before: Row, row: Row) -> str:
    """The kinds of work that took most of the time beyond what the arithmetic would have made of it."""
    assert row.flops and before.flops
    earlier = {name: (seconds, flops) for name, seconds, flops in before.work}
    excess = {
        name: (seconds - earlier.get(name, (0.0, 0))[0] * row.flops / before.flops, seconds, flops)
        for name, seconds, flops in row.work
    }
    worst = sorted((name for name in excess if excess[name][0] > 0), key=lambda name: -excess[name][0])[:LARGEST]
    total = sum(each[0] for each in excess.values() if each[0] > 0)
    return ", ".join(
        f"{name} has {100 * excess[name][0] / total:.0f} % of the excess"
        + _rates(earlier.get(name, (0.0, 0)), excess[name][1:])
        for name in worst
    )


def _rates(before: tuple[float, int], after: tuple[float, int]) -> str:
    if not (before[0] and before[1] and after[1]):
        return ""
    return f" ({before[1] / before[0] / 1e9:.0f} to {after[1] / after[0] / 1e9:.0f} GFLOP/s)"


def axes(suite: Suite) -> list[Axis]:
    """The series of a model: whole runs of a full-size model would take hours."""
    known: list[Axis] = ["views", "pixels"]
    return known if suite.found.folder is None else [*known, "steps"]
