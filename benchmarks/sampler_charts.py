"""Charts and tables of `python -m benchmarks.samplers`, for docs/samplers.md."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from mvshared.files import write_atomic
from mvshared.guidance import Branch, Guidance

EQUAL_DB = 60.0  # what counts for pictures without any difference, whose PSNR is infinite
SEEN = Branch(text=False, image=True, normals=False)  # of the heads


class Curve(NamedTuple):
    """A line of a chart: what `generate` is called with, and at how many steps."""

    chart: str
    name: str
    options: dict[str, Any]
    steps: Sequence[int]


class Run(NamedTuple):
    """One head by one curve with one number of steps; the lists have a number per view."""

    head: int
    curve: str
    steps: int
    psnr_db: list[float]
    ssim: list[float]
    reference_psnr_db: list[float]


class Point(NamedTuple):
    """Means over all views: PSNR and SSIM to the true views, PSNR to those of many steps; and network calls a run, where a
    guided step is two."""

    psnr_db: float
    ssim: float
    reference_psnr_db: float
    calls: int


Points = Mapping[tuple[str, int], Point]


def points(runs: Sequence[Run], curves: Sequence[Curve], *, guidance: float) -> tuple[Points, int]:
    """Every point of the curves, by name and steps, over the heads that have all of them, and how many heads those are; no
    points if there is none."""
    wanted = {(curve.name, steps): curve for curve in curves for steps in curve.steps}
    found = {(run.head, run.curve, run.steps): run for run in runs}
    heads = sorted({run.head for run in runs})
    heads = [head for head in heads if all((head, *key) in found for key in wanted)]
    result = {}
    for (name, steps), curve in wanted.items() if heads else ():
        those = [found[head, name, steps] for head in heads]
        given: dict[str, Any] = {"guidance": guidance}
        given |= {k: v for k, v in curve.options.items() if k.startswith("guidance")}
        strength = Guidance(**given)
        result[name, steps] = Point(
            psnr_db=float(np.mean([run.psnr_db for run in those])),
            ssim=float(np.mean([run.ssim for run in those])),
            reference_psnr_db=float(np.mean(np.minimum([run.reference_psnr_db for run in those], EQUAL_DB))),
            calls=sum(len(call.mixture.branches) for call in strength.calls(SEEN, steps=steps)),
        )
    return result, len(heads)


def write_report(
    folder: Path, runs: Sequence[Run], curves: Sequence[Curve], *, guidance: float, baseline: str, baseline_steps: int
) -> int:
    """Write samplers.png, guidance.png, savings.png and tables.md; returns the number of heads, 0 if nothing could be written.

    `guidance` is the model's. The last two charts show beside their curves the baseline, that all of these vary.
    """
    found, heads = points(runs, curves, guidance=guidance)
    if not heads:
        return 0
    of = {chart: [curve for curve in curves if curve.chart == chart] for chart in ("samplers", "guidance", "savings")}
    base = next(curve for curve in curves if curve.name == baseline)
    unguided = [curve for curve in of["guidance"] if curve.options["guidance"] == 1]
    savings = [base, *unguided, *of["savings"]]
    scales = [(guidance, found[baseline, baseline_steps])]
    scales += [(curve.options["guidance"], found[curve.name, baseline_steps]) for curve in of["guidance"]]
    scales.sort()
    write_atomic(folder / "samplers.png", _samplers_chart(of["samplers"], found, heads))
    write_atomic(folder / "guidance.png", _guidance_chart(scales, f"{baseline}, {baseline_steps} steps, {heads} heads"))
    write_atomic(folder / "savings.png", _savings_chart(savings, found, f"{baseline}, {heads} heads"))
    lines = [*_pivot(of["samplers"], found), ""]
    lines += ["| guidance | to truth, dB | SSIM | to 200 steps, dB |", "|---|---|---|---|"]
    lines += [f"| {scale:g} | {p.psnr_db:.2f} | {p.ssim:.3f} | {p.reference_psnr_db:.1f} |" for scale, p in scales]
    lines += ["", "| | steps | calls | to truth, dB | SSIM | to 200 steps, dB |", "|---|---|---|---|---|---|"]
    for curve in savings:
        for steps in curve.steps:
            p = found[curve.name, steps]
            name = f"`{baseline}`, guidance {guidance:g}" if curve.name == baseline else curve.name
            figures = f"{p.psnr_db:.2f} | {p.ssim:.3f} | {p.reference_psnr_db:.1f}"
            lines.append(f"| {name} | {steps} | {p.calls} | {figures} |")
    write_atomic(folder / "tables.md", "\n".join([*lines, ""]).encode())
    return heads


def _pivot(curves: Sequence[Curve], found: Points) -> list[str]:
    """A row per sampler, a column per number of steps."""
    columns = sorted({steps for curve in curves for steps in curve.steps})
    lines = ["| | " + " | ".join(map(str, columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    for curve in curves:
        cells = [found.get((curve.name, steps)) for steps in columns]
        texts = ["" if p is None else f"{p.reference_psnr_db:.1f}, {p.psnr_db:.2f}, {p.ssim:.3f}" for p in cells]
        lines.append(f"| `{curve.name}` | " + " | ".join(texts) + " |")
    return lines


def _samplers_chart(curves: Sequence[Curve], found: Points, heads: int) -> bytes:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for curve in curves:
        long = len(curve.steps) > 2
        style: dict[str, Any] = {"marker": "o", "markersize": 3} if long else {"marker": "x", "linestyle": ":", "alpha": 0.6}
        values = [found[curve.name, steps] for steps in curve.steps]
        left.plot(curve.steps, [p.reference_psnr_db for p in values], label=curve.name, **style)
        right.plot(curve.steps, [p.psnr_db for p in values], **style)
    left.set(title="to the views of 200 DDIM steps", ylabel="PSNR, dB")
    right.set(title=f"to the true views ({heads} heads)")
    for axes in (left, right):
        axes.set(xlabel="steps", xscale="log")
        ticks = sorted({steps for curve in curves for steps in curve.steps})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small")
    return _png(figure)


def _guidance_chart(scales: Sequence[tuple[float, Point]], title: str) -> bytes:
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, name, label in ((left, "psnr_db", "PSNR to truth, dB"), (right, "ssim", "SSIM to truth")):
        axes.plot([scale for scale, _ in scales], [getattr(p, name) for _, p in scales], marker="o", markersize=3)
        axes.set(xlabel="guidance", ylabel=label)
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize="medium")
    return _png(figure)


def _savings_chart(curves: Sequence[Curve], found: Points, title: str) -> bytes:
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for curve in curves:
        values = [found[curve.name, steps] for steps in curve.steps]
        for axes, name in ((left, "reference_psnr_db"), (right, "psnr_db")):
            label = curve.name if axes is left else None
            axes.plot([p.calls for p in values], [getattr(p, name) for p in values], marker="o", markersize=3, label=label)
    left.set(title="to the views of 200 DDIM steps", xlabel="network calls, guided steps count 2", ylabel="PSNR, dB")
    right.set(title="to the true views", xlabel="network calls, guided steps count 2")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize="medium")
    figure.legend(loc="outside right center", fontsize="small")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=90)
    return encoded.getvalue()
