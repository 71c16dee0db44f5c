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

from benchmarks.measure import children_peak_rss_bytes
from benchmarks.worker import Prepared
from mvshared.errors import MvError


def console_script() -> list[str]:
    """The installed `mvmlx` of this interpreter; without an installation, what that script does."""
    script = Path(sysconfig.get_path("scripts")) / "mvmlx"
    return [str(script)] if script.exists() else [sys.executable, "-c", "from mvshared.cli import main; main()"]


def help_text() -> Prepared:
    """`mvmlx --help`."""
    return Prepared(lambda: _run(["--help"]), lambda: {"peak_memory_bytes": children_peak_rss_bytes()})


def generate(*, model: str, image: str, backend: str, steps: int) -> Prepared:
    """`mvmlx generate` into a new folder, on the device and in the dtype that the backend chooses."""
    folder = tempfile.TemporaryDirectory(prefix="mvmlx-benchmark-")
    outputs = (Path(folder.name) / str(number) for number in count())
    options = ["--model", model, "--backend", backend, "--steps", str(steps), "--seed", "0"]
    done: list[Path] = []

    def call() -> None:
        output = next(outputs)
        _run(["generate", image, *options, "--output", str(output)])
        done.append(output)

    def facts() -> dict[str, Any]:
        parameters = json.loads((done[-1] / "metadata.json").read_text(encoding="utf-8"))["parameters"]
        views = len(parameters["cameras"])
        folder.cleanup()
        chosen = {name: parameters[name] for name in ("device", "dtype")}
        return {**chosen, "views": views, "peak_memory_bytes": children_peak_rss_bytes()}

    return Prepared(call, facts)


def _run(arguments: list[str]) -> None:
    result = subprocess.run([*console_script(), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise MvError(f"mvmlx {arguments[0]}: {lines[-1]}")
