"""`mvmlx upscale`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from mvshared.commands.generate import Reporter, shown_warnings, upscale_options
from mvshared.errors import OptionError
from mvshared.upscaling.standalone import Source, read_source, upscale_source
from mvshared.upscaling.views import UpscaleOptions

ASKED = ("upscale", "upscaler", "upscale_steps", "upscale_guidance", "upscale_noise", "upscale_budget")
GIVEN = ("model", "prompt", "negative_prompt", "seed", "backend", "dtype", "device", "quantize", "force")


def _asked_by(source: Source, options: dict[str, Any]) -> UpscaleOptions:
    """What is given, beside what a run was to be upscaled by if no method and no upscaler are; lanczos for other pictures."""
    run = source.run
    if run is not None and run.upscale is not None and options["upscale"] is None and options["upscaler"] is None:
        planned, asked = run.upscale, upscale_options(options | {"upscale": run.upscale.method})
        assert asked is not None
        names = ["upscaler", "steps", "guidance", "noise_level"]
        if options["backend"] in ("auto", run.backend) and options["dtype"] in (None, run.dtype):
            names.append("budget_bytes")  # it was chosen by what a view takes
        return replace(asked, **{name: getattr(planned, name) for name in names if getattr(asked, name) is None})
    given = upscale_options(options) if any(options[name] is not None for name in ASKED) else None
    if given is None and source.images is None:
        raise OptionError("upscale", expected="given as bilinear or sd-x2 for latents", got=None)
    return given or UpscaleOptions(method="lanczos")


def upscale_files(paths: tuple[Path, ...], options: dict[str, Any]) -> None:
    """`mvmlx upscale`."""
    reporter = Reporter(as_json=options["as_json"], stepwise=None)
    if options["upscale"] == "none":
        raise OptionError("upscale", expected="bilinear, lanczos or sd-x2", got="none")
    with shown_warnings(reporter):
        source = read_source(paths)
        folder = upscale_source(
            source,
            _asked_by(source, options),
            options["output"],
            on_step=reporter.upscale_step,
            **{name: options[name] for name in GIVEN},
        )
    reporter.event("saved", folder=str(folder))
    if not options["as_json"]:
        click.echo(f"twice the size, in {folder} (see grid.png)")
