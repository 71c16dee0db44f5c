"""`mvmlx upscale`."""

from pathlib import Path
from typing import Any

import click

from mvshared.commands.generate import Reporter, shown_warnings, upscale_options
from mvshared.errors import OptionError
from mvshared.upscaling.standalone import read_source, upscale_source
from mvshared.upscaling.views import UpscaleOptions

ASKED = ("upscale", "upscaler", "upscale_steps", "upscale_guidance", "upscale_noise", "upscale_budget")
GIVEN = ("model", "prompt", "negative_prompt", "seed", "backend", "dtype", "device", "quantize", "force")


def upscale_files(paths: tuple[Path, ...], options: dict[str, Any]) -> None:
    """`mvmlx upscale`."""
    reporter = Reporter(as_json=options["as_json"], stepwise=None)
    if options["upscale"] == "none":
        raise OptionError("upscale", expected="bilinear, lanczos or sd-x2", got="none")
    given = upscale_options(options) if any(options[name] is not None for name in ASKED) else None
    asked = given or UpscaleOptions(method="lanczos")
    with shown_warnings(reporter):
        folder = upscale_source(
            read_source(paths),
            asked,
            options["output"],
            on_step=reporter.upscale_step,
            **{name: options[name] for name in GIVEN},
        )
    reporter.event("saved", folder=str(folder))
    if not options["as_json"]:
        click.echo(f"twice the size, in {folder} (see grid.png)")
