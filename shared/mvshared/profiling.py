"""Where the time and the memory of a run go: by stage, by block and by kind of work, and as a trace for Perfetto.

A run is done three times: briefly to warm up, as it is for the stages, and with every block watched for the shares of the
blocks. Watched blocks are waited for one by one, so that run is a little slower, and with MLX does not fuse across blocks.
"""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mvshared.blocks import ATTENTION_KINDS, Block, Call
from mvshared.pipeline import Pipeline
from mvshared.stages import Stage, Stages

NORM_KINDS = {"GroupNorm", "LayerNorm", "AdaGroupNorm"}
LARGEST = 3


class BlockEvent(NamedTuple):
    """A block that ran: when, on the blocks' clock from the run's start on, and for how long, with and without the blocks
    inside of it. `flops` are its own, and `work` says what kind of work its own time is."""

    name: str
    kind: str
    work: str
    stage: str
    step: int | None
    start: float
    seconds: float
    own_seconds: float
    flops: int
    output_bytes: int
    shape: tuple[int, ...]
    dtype: str


class Row(NamedTuple):
    """A block over all of its calls, or a group of blocks, with `calls` 0. Seconds and flops include what is inside of it;
    `own_seconds` do not. `output_bytes` are those of one call, the largest."""

    name: str
    calls: int
    seconds: float
    own_seconds: float
    flops: int
    output_bytes: int


class StageProfile(NamedTuple):
    """A stage: its time and memory in the run as it is, and in the watched one the time of all its blocks and of the rest."""

    name: str
    calls: int
    seconds: float
    peak_bytes: int | None
    watched_seconds: float
    outside_seconds: float
    rows: tuple[Row, ...]


class Cost(NamedTuple):
    """One kind of work at one level of a network, in the watched run."""

    what: str
    seconds: float
    flops: int


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a run costs. `seconds` are those of the run as it is, `watched_seconds` with every block watched.

    Stages and `rest_seconds`, what is in no stage, add up to `seconds`.
    """

    seconds: float
    rest_seconds: float
    watched_seconds: float
    stages: tuple[StageProfile, ...]
    costs: tuple[Cost, ...]
    blocks: tuple[BlockEvent, ...]
    watched_stages: tuple[Stage, ...]

    @property
    def accounted(self) -> float:
        """The share of the run that is in a stage."""
        return 1 - self.rest_seconds / self.seconds


def profile(pipeline: Pipeline[Any], run: Callable[[], Any], *, warm_up: Callable[[], Any] | None = None) -> Profile:
    """Measure `run`, which calls `pipeline.generate`; `warm_up` comes before, such as the same with one step."""
    if warm_up is not None:
        warm_up()
    plain, watched = list[Stage](), list[Stage]()
    before = pipeline.stages
    try:
        pipeline.stages = Stages(plain.append, memory=pipeline.model)
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        recorder = Recorder()
        with pipeline.model.observe_blocks(recorder.on_end, recorder.on_start) as clock:
            pipeline.stages = recorder.stages = Stages(watched.append, clock=clock)
            recorder.origin = clock()
            run()
            watched_seconds = clock() - recorder.origin
    finally:
        pipeline.stages = before
    watched = [stage._replace(start=stage.start - recorder.origin) for stage in watched]
    return summarised(plain, watched, recorder.events, seconds=seconds, watched_seconds=watched_seconds)


class Recorder:
    """Keeps what is to be known of every block, and no arrays."""

    def __init__(self) -> None:
        self.stages = Stages()
        self.origin = 0.0  # the run's start on the blocks' clock
        self.events: list[BlockEvent] = []
        self._inside: list[float] = []  # seconds that ended within each of the blocks that run

    def on_start(self, call: Call[Any]) -> None:
        """A block begins."""
        self._inside.append(0.0)

    def on_end(self, block: Block[Any]) -> None:
        """A block ended."""
        own = block.seconds - self._inside.pop()
        if self._inside:
            self._inside[-1] += block.seconds
        out: Any = next(iter(block.outputs.values()), None)
        self.events.append(
            BlockEvent(
                name=block.name,
                kind=block.kind,
                work=work_of(block),
                stage=str(self.stages.name),
                step=self.stages.step,
                start=block.start - self.origin,
                seconds=block.seconds,
                own_seconds=own,
                flops=block.flops,
                output_bytes=block.output_bytes,
                shape=() if out is None else tuple(out.shape),
                dtype="" if out is None else str(out.dtype).rpartition(".")[2],
            )
        )


def work_of(block: Block[Any]) -> str:
    """What a block does in its own time."""
    if block.kind.endswith("Conv2d"):
        out, x = next(iter(block.outputs.values())), next(iter(block.inputs.values()))
        side = math.isqrt(block.flops // (2 * math.prod(out.shape) * x.shape[-1]))
        return f"{side}x{side} convolutions"
    if block.kind in ATTENTION_KINDS:
        kinds = {"attn1": "self-attention", "attn2": "cross-attention"}
        return kinds.get(block.name.rpartition(".")[2], "attention")
    if block.kind.endswith("Linear"):
        return "linear layers"
    return "norms" if block.kind in NORM_KINDS else "activations, sums and copies"


def parts(name: str) -> list[str]:
    """A block's name cut where one looks deeper: vae.decoder, up_blocks.3, resnets.1, conv1."""
    head = re.match(r"(?:vae\.)?[^.]+", name)
    assert head is not None
    return [head[0], *re.findall(r"[^.]+(?:\.\d+)*", name[head.end() :])]


def summarised(
    plain: Sequence[Stage], watched: Sequence[Stage], events: Sequence[BlockEvent], *, seconds: float, watched_seconds: float
) -> Profile:
    """The figures of the stages of a run as it is, of a watched one, and of its blocks."""
    names = dict.fromkeys(stage.name for stage in plain)
    stages = tuple(_stage(name, plain, watched, [event for event in events if event.stage == name]) for name in names)
    return Profile(
        seconds=seconds,
        rest_seconds=seconds - sum(stage.seconds for stage in stages),
        watched_seconds=watched_seconds,
        stages=stages,
        costs=costs(events),
        blocks=tuple(events),
        watched_stages=tuple(watched),
    )


def _stage(name: str, plain: Sequence[Stage], watched: Sequence[Stage], events: Sequence[BlockEvent]) -> StageProfile:
    own = [stage for stage in plain if stage.name == name]
    watched_seconds = sum(stage.own_seconds for stage in watched if stage.name == name)
    return StageProfile(
        name=name,
        calls=len(own),
        seconds=sum(stage.own_seconds for stage in own),
        peak_bytes=max((stage.peak_bytes for stage in own if stage.peak_bytes is not None), default=None),
        watched_seconds=watched_seconds,
        outside_seconds=watched_seconds - sum(event.own_seconds for event in events),
        rows=tuple(rows(events)),
    )


def rows(events: Sequence[BlockEvent]) -> list[Row]:
    """A row per block and per group of blocks, each behind the one that it is inside of, in the order in which they run."""
    found: dict[tuple[str, ...], Row] = {}
    for event in sorted(events, key=lambda event: (event.start, -event.seconds)):
        path = parts(event.name)
        for length in range(1, len(path) + 1):
            group = tuple(path[:length])
            row = found.get(group, Row(".".join(group), 0, 0.0, 0.0, 0, 0))
            row = row._replace(seconds=row.seconds + event.own_seconds, flops=row.flops + event.flops)
            if length == len(path):
                largest = max(row.output_bytes, event.output_bytes)
                own = row.own_seconds + event.own_seconds
                row = row._replace(calls=row.calls + 1, own_seconds=own, output_bytes=largest)
            found[group] = row
    order = {group: number for number, group in enumerate(found)}
    return [found[group] for group in sorted(found, key=lambda group: [order[group[: n + 1]] for n in range(len(group))])]


def costs(events: Sequence[BlockEvent]) -> tuple[Cost, ...]:
    """Every kind of work at every level of every network, the largest first."""
    found: dict[str, Cost] = {}
    for event in events:
        what = f"{event.work} of {'.'.join(parts(event.name)[:2])}"
        cost = found.get(what, Cost(what, 0.0, 0))
        found[what] = Cost(what, cost.seconds + event.own_seconds, cost.flops + event.flops)
    return tuple(sorted(found.values(), key=lambda cost: -cost.seconds))


def trace(result: Profile, *, title: str, other: Mapping[str, Any]) -> dict[str, Any]:
    """The watched run as Chrome's trace events, for ui.perfetto.dev: the run, in it the stages, in them the blocks.

    Format: "Trace Event Format" of the Chromium project, complete events, in microseconds.
    """
    common = {"ph": "X", "pid": 1, "tid": 1}
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": title}},
        {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "stages and blocks"}},
        {**common, "name": "run", "cat": "run", "ts": 0.0, "dur": 1e6 * result.watched_seconds, "args": {}},
    ]
    for stage in sorted(result.watched_stages, key=lambda stage: (stage.start, -stage.seconds)):
        times = {"ts": 1e6 * stage.start, "dur": 1e6 * stage.seconds}
        events.append({**common, "name": stage.name, "cat": "stage", **times, "args": {}})
    for block in sorted(result.blocks, key=lambda block: (block.start, -block.seconds)):
        arguments: dict[str, Any] = {"kind": block.kind, "shape": list(block.shape), "dtype": block.dtype}
        arguments |= {"flops": block.flops, "bytes": block.output_bytes}
        if block.step is not None:
            arguments["step"] = block.step
        times = {"ts": 1e6 * block.start, "dur": 1e6 * block.seconds}
        events.append({**common, "name": block.name, "cat": "block", **times, "args": arguments})
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": dict(other)}
