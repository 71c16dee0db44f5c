"""`mvmlx evaluate`."""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from mvshared.backend import load
from mvshared.files import check_folder, make_folder, write_atomic, write_json
from mvshared.images import encode_png, sheet

SHEET_ROWS = 8


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
