"""The folder of a training run: what was asked, the state that a resumed run needs, and one process at a time."""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from mvshared.errors import CheckpointError, ConfigError, OutputError
from mvshared.files import check_folder, is_empty, lock_folder, make_folder, read_json_object, remove_leftovers, write_json
from mvshared.training.config import TrainConfig, parse_train_config
from mvshared.training.optimizer import Weights, steps_of
from mvshared.weights import read_header, sha256_of_files

STATE = "state.safetensors"
TEACHER = "teacher.json"  # hashes of the weights that `distill_rest` distils
VAE = "vae.json"  # hashes of the weights whose latents are learned
MAY_CHANGE = ("steps", "checkpoint_every", "log_every", "sample_every")  # within a run: how far it goes and what it tells


def sheet_path(folder: Path, step: int) -> Path:
    """The sample sheet of a step in the folder of a run."""
    return folder / "samples" / f"step_{step:06}.png"


class RunFolder:
    """The folder `path` of a run of `config`. `close` it, so that another process may go on with the run."""

    def __init__(self, path: Path | str, config: TrainConfig) -> None:
        """Nothing is made. Raises OutputError if another process trains in the folder."""
        self.path, self.config = Path(path), config
        check_folder(self.path)
        self._unlock: Callable[[], None] | None = None
        if self.path.exists():
            self._lock()

    @property
    def state_path(self) -> Path:
        return self.path / STATE

    def last_state(self) -> Weights | None:
        """The last state of the run that the folder holds, if any; nothing is written.

        Raises OutputError unless the folder is free or holds a run of the same config, but for MAY_CHANGE, with no more steps
        than are asked for.
        """
        path = self.path / "config.json"
        if path.exists():
            before = parse_train_config(read_json_object(path, error=ConfigError), path=path)
            asked = replace(before, **{name: getattr(self.config, name) for name in MAY_CHANGE})
            if changed := list(_changes(asdict(asked), asdict(self.config))):
                reason = f"holds a run with other values: {', '.join(changed)}"
                raise OutputError(reason, path=self.path, hint="name a new folder for this run")
        elif self.path.exists() and not is_empty(self.path, but_for=r"config\.json"):
            raise OutputError("is not empty and holds no training run", path=self.path, hint="name a new folder for this run")
        if not self.state_path.exists():
            return None
        try:
            read_header(self.state_path)
        except CheckpointError as damaged:
            if not isinstance(damaged.__cause__, OSError):  # else it may be whole
                damaged.hint = "remove it, and the run begins anew"
            raise
        state = load_file(self.state_path)
        if steps_of(state) > self.config.steps:
            reason = f"holds a run of {steps_of(state)} steps, {self.config.steps} were asked for"
            raise OutputError(reason, path=self.path, hint="ask for more, or name a new folder")
        return state

    def prepare(self) -> None:
        """Make the folder, write its config.json, and remove what was being written when an earlier run was killed.

        Raises OutputError if another process trains in it.
        """
        make_folder(self.path)
        self._lock()
        for folder in {path.parent for path in self.path.rglob(".*.tmp")}:
            remove_leftovers(folder)
        write_json(self.path / "config.json", asdict(self.config))

    def teach(self, files: Sequence[Path]) -> None:
        """Note which weights the run is taught by, those that it starts from. Raises OutputError if it began with others."""
        other = f"holds a run that is taught by other weights than those that {self.config.init_from} has now"
        self._note(TEACHER, sha256_of_files(files), other)

    def learn_latents_of(self, hashes: Mapping[str, str], source: Path | str) -> None:
        """Note the VAE, that of `source`, whose latents the run learns. Raises OutputError if the run began with another; one
        that was killed before its first state begins anew, and the model that it left, with its VAE, is removed."""
        self._note(VAE, hashes, f"holds a run with another VAE than that of {source}", outdated="model")

    def _note(self, name: str, hashes: Mapping[str, str], other: str, *, outdated: str | None = None) -> None:
        """Note the hashes of weights in the run's file `name`. If others were noted, and the run has a state, OutputError,
        `other`, is raised; without a state the folder `outdated` is removed."""
        path = self.path / name
        changed = path.exists() and read_json_object(path, error=ConfigError) != hashes
        if changed and self.state_path.exists():
            raise OutputError(other, path=self.path, hint="name a new folder")
        self.prepare()
        if changed and outdated is not None:
            shutil.rmtree(self.path / outdated, ignore_errors=True)
        write_json(path, hashes)

    def close(self) -> None:
        if self._unlock is not None:
            self._unlock()
            self._unlock = None

    def _lock(self) -> None:
        if self._unlock is None:
            self._unlock = lock_folder(self.path, busy="another process trains in it")


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """What is another value in two configurations, by the names of a file of them, and what it was."""
    for name, value in now.items():
        old = before[name]
        if isinstance(value, dict) and isinstance(old, dict) and value.keys() == old.keys():
            yield from _changes(old, value, f"{above}{name}.")
        elif value != old:
            yield f"{above}{name}" if isinstance(value, dict) or isinstance(old, dict) else f"{above}{name} (was {old!r})"
