"""`mvmlx benchmark`."""

import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from mvshared.benchmark.models import RANDOM
from mvshared.benchmark.results import Results, document, markdown, write_results
from mvshared.benchmark.run import check_measured, measure
from mvshared.benchmark.settings import GROWTH, Settings
from mvshared.errors import OptionError, OutputError
from mvshared.files import check_folder, make_folder
from mvshared.messages import print_json

LONGER = (
    "--model sd21 --views 1,4,5,8 --sizes 256,512",
    "--model imagedream",
    "--model sd21 --against diffusers --sizes 256",
    GROWTH,
)


def run_benchmark(names: tuple[str, ...], options: dict[str, Any]) -> None:
    """`mvmlx benchmark`: print tables or JSON, and write the results into a file.

    Raises OptionError for numbers that are none, and as `check_measured` does."""
    path: Path | None = options["file"]
    if path is not None:
        check_folder(path.parent)
        if path.is_dir():
            raise OptionError("json", expected="a file", got=str(path))
    settings = Settings(
        names=names,
        **{name: options[name] for name in ("model", "backend", "device", "guidance", "steps", "repeats", "threads")},
        dtypes=options["dtype"],
        views=_whole("views", options["views"]),
        sizes_px=_whole("sizes", options["sizes"]),
        against=options["against"],
        compiled=options["compiled"],
    )
    as_json, file = str(path) == "-", None if str(path) == "-" else path
    so_far: list[Results] = []

    def keep(results: Results) -> None:
        """Hours of measurements are not lost, whatever ends them."""
        so_far[:] = [results]
        if file is not None:
            with suppress(OutputError):  # the end may fare better
                write_results(_partial(file), results)

    if file is not None:
        make_folder(file.parent)
    try:
        results = measure(settings, lambda line: click.echo(line, err=True), on_table=keep)
    except BaseException:
        if so_far and not as_json:
            click.echo(markdown(so_far), nl=False)
        raise
    if as_json:
        print_json(document(results))
    else:
        click.echo(markdown([results]), nl=False)
    if file is not None:
        write_results(file, results)
        _partial(file).unlink(missing_ok=True)
    check_measured(results)
    if not names and options["model"] not in RANDOM:
        for arguments in LONGER:
            click.echo(f"longer: mvmlx benchmark {shlex.join(shlex.split(arguments))}", err=True)


def _partial(file: Path) -> Path:
    """Where the tables are that are done, until all are."""
    return file.with_name(f"{file.name}.partial")


def _whole(name: str, given: list[float] | None) -> tuple[int, ...]:
    """Numbers of the command line as whole ones."""
    for value in given or ():
        if not value.is_integer():
            raise OptionError(name, expected="whole numbers with commas between them", got=value)
    return tuple(int(value) for value in given or ())
