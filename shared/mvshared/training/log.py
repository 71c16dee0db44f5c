"""The training log: a CSV file that survives a kill, and a plot of the loss."""

import csv
import io
from pathlib import Path
from typing import NamedTuple

from mvshared.errors import ConfigError
from mvshared.files import write_atomic


class LogRow(NamedTuple):
    """Means since the row before: training loss and gradient norm, the rate, and the speed; `held_out_loss` may be empty.

    A run in float16 has its loss scale, and how many steps it skipped since the row before; all of them leave no norm.
    """

    step: int
    loss: float
    held_out_loss: float | None
    gradient_norm: float | None
    learning_rate: float
    seconds_per_step: float
    loss_scale: float | None = None
    skipped_steps: int = 0


class TrainingLog:
    """Rows in `folder`/log.csv. Rows after `last_step`, of a run that was killed, are dropped."""

    def __init__(self, folder: Path, *, last_step: int) -> None:
        self.path, self.plot_path = folder / "log.csv", folder / "loss.png"
        self.rows = [row for row in read_log(self.path) if row.step <= last_step] if self.path.exists() else []

    def add(self, row: LogRow) -> None:
        """Append a row; the file is rewritten whole."""
        self.rows.append(row)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(LogRow._fields)
        writer.writerows(["" if value is None else value for value in row] for row in self.rows)
        write_atomic(self.path, text.getvalue().encode())

    def plot(self) -> bool:
        """Draw loss.png; False if matplotlib is not installed (`pip install 'mvmlx[train]'`)."""
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            return False
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([row.step for row in self.rows], [row.loss for row in self.rows], label="training")
        held_out = [(row.step, row.held_out_loss) for row in self.rows if row.held_out_loss is not None]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), marker="o", label="held out, EMA weights")
        positive = all(row.loss > 0 and (row.held_out_loss is None or row.held_out_loss > 0) for row in self.rows)
        # The upscaler's loss, a negative logarithm of a likelihood, falls below zero.
        axes.set(xlabel="step", ylabel="loss", yscale="log" if positive else "linear")
        axes.legend()
        axes.grid(alpha=0.3)
        encoded = io.BytesIO()
        figure.savefig(encoded, format="png", dpi=100)
        write_atomic(self.plot_path, encoded.getvalue())
        return True


def read_log(path: Path) -> list[LogRow]:
    """The rows of a log.csv. Raises ConfigError if it is none."""
    try:
        with path.open(newline="") as file:
            return [
                LogRow(
                    step=int(row["step"]),
                    loss=float(row["loss"]),
                    held_out_loss=_number(row["held_out_loss"]),
                    gradient_norm=_number(row["gradient_norm"]),
                    learning_rate=float(row["learning_rate"]),
                    seconds_per_step=float(row["seconds_per_step"]),
                    loss_scale=_number(row.get("loss_scale")),  # logs from before it have no such column
                    skipped_steps=int(row.get("skipped_steps") or 0),
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise ConfigError(f"is no training log: {error}", path=path, hint="remove it; the run goes on without it") from error


def _number(text: str | None) -> float | None:
    return float(text) if text else None
