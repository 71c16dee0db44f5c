"""Run by test_training: a run killed at every point where it writes a file, and resumed, against one that was left alone.

Prints one JSON line per kill: how many files had been written, and which files of the resumed run differ. Every run is a fork,
so that SIGKILL hits a real process and the libraries are imported only once.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import mvshared.files
from mvshared.training.config import TrainConfig, load_train_config
from mvshared.training.log import TrainingLog, read_log
from mvshared.training.loop import train


def in_fork(work: Callable[[], object]) -> int:
    """Exit status of a forked process that does the work; negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_before_file(number: int, config: TrainConfig, folder: Path) -> Callable[[], object]:
    """A run that dies when it is about to rename the file of this number into place."""

    def work() -> None:
        written, replace = 0, os.replace

        def counting(source: Path, target: Path) -> None:
            nonlocal written
            if written == number:
                os.kill(os.getpid(), signal.SIGKILL)
            written += 1
            replace(source, target)

        mvshared.files.os.replace = counting
        train(config, folder, backend="torch", device="cpu")

    return work


def contents(folder: Path) -> dict[str, object]:
    """What every file of a run says; of the log all but the seconds."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    found: dict[str, object] = {name: path.read_bytes() for name, path in files.items() if path.name != "log.csv"}
    return found | {"log.csv": [row._replace(seconds_per_step=0.0) for row in read_log(folder / "log.csv")]}


def main(config_path: Path, root: Path, *, stride: int) -> None:
    torch.set_num_threads(1)
    TrainingLog.plot = lambda self: False  # matplotlib's import would be most of the time
    config = load_train_config(config_path)
    train(config, root / "whole", backend="torch", device="cpu")  # in this process: it imports what the forks need
    whole = contents(root / "whole")
    for number in range(0, 1000, stride):
        folder = root / f"killed-{number}"
        status = in_fork(killed_before_file(number, config, folder))
        if status == 0:
            return
        assert status == -signal.SIGKILL
        assert in_fork(lambda folder=folder: train(config, folder, backend="torch", device="cpu")) == 0
        resumed = contents(folder)
        different = [name for name in sorted(whole.keys() | resumed.keys()) if whole.get(name) != resumed.get(name)]
        print(json.dumps({"written": number, "different": different}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), stride=int(sys.argv[3]))
