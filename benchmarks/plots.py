"""Plots of what `mvmlx benchmark growth` found."""

import io
from collections.abc import Sequence

from mvshared.benchmark.measure import timing_of
from mvshared.benchmark.results import Row, Table

COORDINATES = {"Growth with the views": "views", "Growth with the pixels": "size_px", "Growth of a whole run": "steps"}
LABELS = {"views": "views", "size_px": "width and height in pixels", "steps": "steps"}


def plot_growth(tables: Sequence[Table]) -> bytes | None:
    """A PNG: a column per series, time above memory, each beside the arithmetic, which is scaled to the largest size; None if
    no table is a series. Both axes are logarithmic, so that what grows as fast as the arithmetic runs beside it."""
    series = [(axis, table) for table in tables for begin, axis in COORDINATES.items() if table.title.startswith(begin)]
    if not series:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(series), 6), layout="constrained")
    axes = figure.subplots(2, len(series), squeeze=False)
    for column, (name, table) in enumerate(series):
        rows = [row for row in table.rows if row.seconds and row.flops]
        _, _, what = table.title.partition(": ")
        axes[0][column].set(title=what, ylabel="seconds" if not column else "")
        axes[1][column].set(ylabel="MB on top of the weights" if not column else "")
        _curve(axes[0][column], rows, name, [_seconds(row) for row in rows], label="time")
        measured = [row for row in rows if row.activation_bytes]
        _curve(axes[1][column], measured, name, [(row.activation_bytes or 0) / 1e6 for row in measured], label="memory")
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=80)
    return encoded.getvalue()


def _seconds(row: Row) -> float:
    return timing_of(row.cpu_seconds if row.device == "cpu" and row.cpu_seconds else row.seconds).median


def _curve(axes: object, rows: Sequence[Row], name: str, values: Sequence[float], *, label: str) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    axes.set(xscale="log", yscale="log", xlabel=LABELS[name])
    if rows:
        x = [getattr(row, name) for row in rows]
        largest = rows[-1].flops or 1
        axes.plot(x, [values[-1] * (row.flops or 0) / largest for row in rows], linestyle="--", label="arithmetic")
        axes.plot(x, values, marker="o", label=label)
        axes.set_xticks(x, [str(each) for each in x])
        axes.minorticks_off()
        axes.legend()
    axes.grid(alpha=0.3)
