"""Times cases side by side: a process for each, which take turns call by call, so that what disturbs one disturbs all."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE
from typing import IO, Any

from benchmarks.results import Row
from benchmarks.worker import Prepared

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is called: a module's function and its arguments, as JSON values."""

    what: str
    prepare: Callable[..., Prepared]
    arguments: Mapping[str, str | int] = field(default_factory=dict)


class Worker:
    """The process of a case. A case that fails has the reason in `failure`, and answers None from then on."""

    def __init__(self, process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.failure = ""
        self._process, self._stderr = process, stderr
        self._stdin, self._stdout = process.stdin, process.stdout

    def seconds(self) -> float | None:
        """Seconds of one call; None if the case failed."""
        with suppress(BrokenPipeError):
            self._stdin.write(b"\n")
        return self._answer()

    def facts(self) -> dict[str, Any] | None:
        """End the process; fields of a Row that it says about itself, None if the case failed."""
        self._stdin.close()
        return self._answer()

    def _answer(self) -> Any:
        answer = self._stdout.readline()
        if answer:
            return json.loads(answer)
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        self.failure = " ".join([*lines[-1:], f"(exit code {code})"]).strip()
        return None


@contextmanager
def running(case: Case) -> Iterator[Worker]:
    """The process of a case, killed at the end if it still runs."""
    function = (case.prepare.__module__, case.prepare.__name__, json.dumps(case.arguments))
    command = [sys.executable, "-m", "benchmarks.worker", *function]
    with (
        tempfile.TemporaryFile() as stderr,
        # Unbuffered, so that nothing is left to be flushed into the pipe of a process that ended.
        subprocess.Popen(command, cwd=ROOT, bufsize=0, stdin=PIPE, stdout=PIPE, stderr=stderr) as process,
    ):
        try:
            yield Worker(process, stderr)
        finally:
            process.kill()


def compare(cases: Sequence[Case], *, repeats: int) -> list[Row]:
    """A row for every case, of `repeats` calls after one that does not count, or of that one if there are none; or with the
    reason why there is none."""
    seconds: list[list[float]] = [[] for _ in cases]
    with ExitStack() as stack:
        workers = [stack.enter_context(running(case)) for case in cases]
        for _ in range(1 + repeats):
            for worker, mine in zip(workers, seconds, strict=True):
                answer = worker.seconds()
                if answer is not None:
                    mine.append(answer)
        return [_row(*each) for each in zip(cases, workers, seconds, strict=True)]


def _row(case: Case, worker: Worker, seconds: list[float]) -> Row:
    known = {name: case.arguments[name] for name in ("backend", "dtype") if name in case.arguments}
    facts = worker.facts()
    if facts is None:
        return Row(**{"what": case.what, **known, "failure": worker.failure})
    return Row(**{"what": case.what, **known, **facts, "seconds": tuple(seconds[1:] or seconds)})
