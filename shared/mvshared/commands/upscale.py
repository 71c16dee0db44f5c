"""`mvmlx upscale`."""

from pathlib import Path
from typing import Any

import click

from mvshared.commands.generate import Reporter, shown_warnings, upscale_options
from mvshared.errors import OptionError
from mvshared.upscaling.standalone import Source, read_source, upscale_source
from mvshared.upscaling.views import UpscaleOptions

ASKED = ("upscale", "upscaler", "upscale_steps", "upscale_guidance", "upscale_noise", "upscale_budget")
OF_A_RUN = ("method", "upscaler", "steps", "guidance", "noise_level", "budget_bytes")
GIVEN = ("model", "prompt", "negative_prompt", "seed", "backend", "dtype", "device", "quantize", "force")


def _asked_by(source: Source) -> UpscaleOptions:
    """What a run was to be upscaled by; lanczos for anything else that has pictures."""
    planned = None if source.run is None else source.run.upscale
    if planned is not None:
        return UpscaleOptions(**{name: getattr(planned, name) for name in OF_A_RUN})
    if source.images is None:
        raise OptionError("upscale", expected="given as bilinear or sd-x2 for latents", got=None)
    return UpscaleOptions(method="lanczos")


def upscale_files(paths: tuple[Path, ...], options: dict[str, Any]) -> None:
    """`mvmlx upscale`."""
    reporter = Reporter(as_json=options["as_json"], stepwise=None)
    if options["upscale"] == "none":
        raise OptionError("upscale", expected="bilinear, lanczos or sd-x2", got="none")
    given = upscale_options(options) if any(options[name] is not None for name in ASKED) else None
    with shown_warnings(reporter):
        source = read_source(paths)
        folder = upscale_source(
            source,
            given or _asked_by(source),
            options["output"],
            on_step=reporter.upscale_step,
            **{name: options[name] for name in GIVEN},
        )
    reporter.event("saved", folder=str(folder))
    if not options["as_json"]:
        click.echo(f"twice the size, in {folder} (see grid.png)")
