"""Cases that start the command line as a user does: every call is a new process, from its start to its end.

The files on disk are in the system's cache after the first call, which does not count.
"""

import json
import subprocess
import sys
import sysconfig
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

from mvshared.benchmark.measure import children_peak_rss_bytes
from mvshared.benchmark.worker import Prepared
from mvshared.errors import MvError


def console_script() -> list[str]:
    """The installed `mvmlx` of this interpreter; without an installation, what that script does."""
    script = Path(sysconfig.get_path("scripts")) / "mvmlx"
    return [str(script)] if script.exists() else [sys.executable, "-c", "from mvshared.cli import main; main()"]


def help_text() -> Prepared:
    """`mvmlx --help`."""
    return Prepared(lambda: _run(["--help"]), lambda: {"device": "cpu", "peak_memory_bytes": children_peak_rss_bytes()})


def generate(
    *, model: str, backend: str, device: str, dtype: str, views: int, size_px: int, steps: int, guidance: float
) -> Prepared:
    """`mvmlx generate` of a made-up picture into a new folder."""
    # Not before: the memory of this process is the least that its children's peak can be.
    from mvshared.benchmark.models import measured
    from mvshared.images import save_png
    from mvshared.validation import textured_subject

    folder, config = tempfile.TemporaryDirectory(prefix="mvmlx-benchmark-"), measured(model).config
    images = [Path(folder.name) / "picture.png"] if config.unet.takes_pictures else []
    for image in images:
        save_png(image, textured_subject(size_px))
    outputs = (Path(folder.name) / str(number) for number in count())
    options = ["--model", model, "--backend", backend, "--device", device, "--dtype", dtype, "--seed", "0"]
    options += ["--views", str(views), "--size", str(size_px), "--steps", str(steps)]
    options += ["--guidance", str(guidance)]
    options += [] if config.text_encoder is None else ["--prompt", "a head"]
    done: list[Path] = []

    def call() -> None:
        output = next(outputs)
        _run(["generate", *map(str, images), *options, "--output", str(output)])
        done.append(output)

    def facts() -> dict[str, Any]:
        parameters = json.loads((done[-1] / "metadata.json").read_text(encoding="utf-8"))["parameters"]
        made = len(parameters["cameras"])
        folder.cleanup()
        chosen = {name: parameters[name] for name in ("device", "dtype")}
        return {**chosen, "made": made, "peak_memory_bytes": children_peak_rss_bytes()}

    return Prepared(call, facts)


def _run(arguments: list[str]) -> None:
    result = subprocess.run([*console_script(), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise MvError(f"mvmlx {arguments[0]}: {lines[-1]}")
