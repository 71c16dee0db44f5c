"""`mvmlx train` and `mvmlx render-heads`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mvshared.errors import OptionError

if TYPE_CHECKING:
    from mvshared.training.config import TrainConfig


def train_model(config: Path | None, output: Path, options: Mapping[str, Any], *, backend: str, device: str) -> None:
    """`mvmlx train`. Options that were not given are None."""
    from mvshared.training.loop import train
    from mvshared.training.samples import sample_writer

    settings = _settings(config, {name: value for name, value in options.items() if value is not None})
    write_sample = sample_writer(settings, output, backend=backend, device=device)
    folder = train(settings, output, backend=backend, device=device, on_sample=write_sample)
    click.echo(f"trained model in {folder}")


def _settings(config: Path | None, given: dict[str, Any]) -> "TrainConfig":
    """What a TOML file says, or the recipe of a family with the options that change it."""
    from mvshared.training.config import load_train_config
    from mvshared.training.presets import preset

    if config is not None:
        for name, value in given.items():
            raise OptionError(name, expected="left out beside a CONFIG file, which says it all", got=value)
        return load_train_config(config)
    if "family" not in given:
        raise OptionError("config", expected="a TOML file, or --family with --from and --data", got=None)
    family = given.pop("family")
    for name, what in {"from": "the model to start from", "data": "a folder of captures"}.items():
        if name not in given:
            raise OptionError(name, expected=f"given with --family: {what}", got=None)
    return preset(family, source=given.pop("from"), data=given.pop("data"), changes=given)


def render_head_dataset(output: Path, identities: range, *, views: int, size_px: int, processes: int | None) -> None:
    """`mvmlx render-heads`."""
    from mvshared.evaluation import HELD_OUT
    from mvshared.heads.dataset import render_dataset

    count = render_dataset(output, identities, views=views, size_px=size_px, processes=processes)
    click.echo(f"{count} heads rendered, {sum(1 for _ in output.glob('head_*/transforms.json'))} in {output}")
    if identities.start < HELD_OUT:
        click.echo(f"note: identities below {HELD_OUT} are those that `mvmlx evaluate` holds out", err=True)
