"""`mvmlx train` and `mvmlx render-heads`."""

from pathlib import Path

import click


def train_model(config: Path, output: Path, *, backend: str, device: str) -> None:
    """`mvmlx train`."""
    from mvshared.training.config import load_train_config
    from mvshared.training.loop import train
    from mvshared.training.samples import sample_writer

    settings = load_train_config(config)
    write_sample = sample_writer(settings, output, backend=backend, device=device)
    folder = train(settings, output, backend=backend, device=device, on_sample=write_sample)
    click.echo(f"trained model in {folder}")


def render_head_dataset(output: Path, identities: range, *, views: int, size_px: int, processes: int | None) -> None:
    """`mvmlx render-heads`."""
    from mvshared.evaluation import HELD_OUT
    from mvshared.heads.dataset import render_dataset

    count = render_dataset(output, identities, views=views, size_px=size_px, processes=processes)
    click.echo(f"{count} heads rendered, {len(identities)} in {output}")
    if identities.start < HELD_OUT:
        click.echo(f"note: identities below {HELD_OUT} are those that `mvmlx evaluate` holds out", err=True)
