"""Times cases side by side: a process for each, which take turns call by call, so that what disturbs one disturbs all."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import PIPE
from typing import IO, Any, NamedTuple

import numpy as np

from mvshared.benchmark.results import Row
from mvshared.benchmark.worker import Prepared
from mvshared.metrics import relative_rms

MOST_ROUNDS = 10  # times the repeats, for calls that are short
# How reasons begin of cases that were to be measured, and failed.
DIFFERENT, ENDED = "computes something else", "its process ended"


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is called: a module's function and its arguments, as JSON values.

    `row` are fields of its Row that are known before, `environment` variables of its process. `cache` is a folder that the
    process keeps compiled code in: if the first call fails, it is emptied and tried once more, since what was killed while it
    compiled leaves half-written files there. `needed_bytes` is the memory that it will take. `refused` is the reason why it is
    not run at all. `warm_up` is how many calls do not count: code that is compiled while it runs, or recorded for a GPU, needs
    more than one.
    """

    what: str
    prepare: Callable[..., Prepared]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    row: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    cache: Path | None = None
    needed_bytes: int = 0
    refused: str = ""
    warm_up: int = 1


class Call(NamedTuple):
    """Wall-clock seconds of one call, and CPU seconds of all its threads."""

    seconds: float
    cpu_seconds: float


class Worker:
    """The process of a case. A case that fails has the reason in `failure`, and answers None from then on."""

    def __init__(self, process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.failure = ""
        self._process, self._stderr = process, stderr
        self._stdin, self._stdout = process.stdin, process.stdout

    def call(self, *, save: Path | None = None) -> Call | None:
        """One call, its result saved in a file if one is named; None if the case failed."""
        if self.failure:
            return None
        with suppress(BrokenPipeError):
            self._stdin.write(b"\n" if save is None else f"{save}\n".encode())
        answer = self._answer()
        return None if answer is None else Call(*answer)

    def fail(self, reason: str) -> None:
        """End the process: its results do not count."""
        self.failure = reason
        self._process.kill()

    def facts(self) -> dict[str, Any] | None:
        """End the process; fields of a Row that it says about itself, None if the case failed."""
        if self.failure:
            return None
        self._stdin.close()
        return self._answer()

    def _answer(self) -> Any:
        answer = self._stdout.readline()
        if answer:
            return json.loads(answer)
        code = self._process.wait()
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        self.failure = f"{ENDED}: {' '.join([*lines[-1:], f'(exit code {code})'])}"
        return None


@contextmanager
def running(case: Case, *, environment: Mapping[str, str] | None = None) -> Iterator[Worker]:
    """The process of a case, killed at the end if it still runs; it finds the modules that this process finds."""
    function = (case.prepare.__module__, case.prepare.__name__, json.dumps(case.arguments))
    command = [sys.executable, "-m", "mvshared.benchmark.worker", *function]
    paths = os.pathsep.join(str(Path(path).resolve()) for path in sys.path)
    with (
        tempfile.TemporaryFile() as stderr,
        # Where a file of any name hides no module; what a child of the process still writes there is no fault.
        tempfile.TemporaryDirectory(prefix="mvmlx-benchmark-", ignore_cleanup_errors=True) as empty,
        # Unbuffered, so that nothing is left to be flushed into the pipe of a process that ended.
        subprocess.Popen(
            command,
            cwd=empty,
            # What it keeps in files goes with it, however it ends.
            env={**os.environ, "TMPDIR": empty, "PYTHONPATH": paths, **(environment or {}), **case.environment},
            bufsize=0,
            stdin=PIPE,
            stdout=PIPE,
            stderr=stderr,
        ) as process,
    ):
        try:
            yield Worker(process, stderr)
        finally:
            process.kill()


def compare(
    cases: Sequence[Case],
    *,
    repeats: int,
    least_seconds: float = 0.0,
    agree: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> list[Row]:
    """A row for every case, of `repeats` calls after those that do not count, or of the last of these if there are none; or
    with the reason why there is none.

    Rounds go on until a case has `least_seconds` of calls. With `agree` the results of the first calls are compared with the
    last case's: a case whose relative root mean square of differences is larger is not timed. `environment` are variables of
    all processes.
    """
    calls: list[list[Call]] = [[] for _ in cases]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mvmlx-benchmark-")))
        # All are started before the first is called: they load at the same time.
        workers = [None if case.refused else stack.enter_context(running(case, environment=environment)) for case in cases]
        for number, (case, worker) in enumerate(zip(cases, workers, strict=True)):
            save = folder / f"{number}.npy" if agree is not None else None
            if worker is not None:
                workers[number] = _warm(case, worker, stack, calls[number], save=save, environment=environment)
        if agree is not None:
            _check_results(workers, [folder / f"{number}.npy" for number in range(len(cases))], agree=agree)
        rounds = 0
        while rounds < repeats or (rounds < MOST_ROUNDS * repeats and _spent(calls) < least_seconds):
            for worker, mine in zip(workers, calls, strict=True):
                answer = None if worker is None else worker.call()
                if answer is not None:
                    mine.append(answer)
            rounds += 1
            if not any(worker is not None and not worker.failure for worker in workers):
                break
        return [_row(*each) for each in zip(cases, workers, calls, strict=True)]


def _warm(
    case: Case, worker: Worker, stack: ExitStack, calls: list[Call], *, save: Path | None, environment: Mapping[str, str] | None
) -> Worker:
    """The worker of a case, or another one if it failed for its cache, after the calls that do not count, of which the last one
    is kept."""
    first = save if case.warm_up == 1 else None
    answer = worker.call(save=first)
    if answer is None and case.cache is not None and case.cache.is_dir():
        shutil.rmtree(case.cache)
        worker = stack.enter_context(running(case, environment=environment))
        answer = worker.call(save=first)
    for number in range(2, case.warm_up + 1):  # the result of the last one is that of the calls that count
        answer = worker.call(save=save if number == case.warm_up else None) or answer
    if answer is not None:
        calls.append(answer)
    return worker


def _spent(calls: Sequence[Sequence[Call]]) -> float:
    return max((sum(call.seconds for call in each[1:]) for each in calls), default=0.0)


def _check_results(workers: Sequence[Worker | None], files: Sequence[Path], *, agree: float) -> None:
    """Fail the workers whose result differs from that of the last case."""
    reference = workers[-1]
    if reference is None or reference.failure:
        reason = "the result that its own is compared with" if reference is None else reference.failure
        for worker in workers[:-1]:
            if worker is not None and not worker.failure:
                worker.fail(f"nothing to compare with: {reason}")
        return
    expected = np.load(files[-1])
    for worker, file in zip(workers[:-1], files[:-1], strict=True):
        if worker is None or worker.failure:
            continue
        difference = relative_rms(np.load(file), expected)
        if not difference <= agree:
            worker.fail(f"{DIFFERENT}: relative RMS difference {difference:.3g}, allowed {agree:.3g}")


def _row(case: Case, worker: Worker | None, calls: list[Call]) -> Row:
    known = {name: case.arguments[name] for name in ("backend", "dtype") if name in case.arguments} | dict(case.row)
    if worker is None:
        return Row(**{"what": case.what, **known, "failure": case.refused})
    facts = worker.facts()
    if facts is None:
        return Row(**{"what": case.what, **known, "failure": worker.failure})
    counted = calls[1:] or calls
    times = {"seconds": tuple(call.seconds for call in counted), "cpu_seconds": tuple(call.cpu_seconds for call in counted)}
    return Row(**{"what": case.what, **known, **facts, **times})
