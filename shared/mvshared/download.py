"""Getting public models: `mvmlx download`, with huggingface_hub underneath.

The first download of a repository pins its revision and the SHA-256 of every file; later ones get the same bytes or fail.
What is there needs no network. Broken downloads go on where they stopped.
"""

import errno
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvshared.errors import DownloadError, OptionError, OutputError, first_line
from mvshared.models import REPOSITORIES, Pin, PinnedFile, read_pins, repository_of, write_pin

ATTEMPTS = 3
KEPT_SUFFIXES = (".json", ".txt", ".safetensors", ".model")
SKIPPED_FOLDERS = ("safety_checker/", "onnx/")


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a repository: its size, and the hash that the hub has of it: SHA-256 of large files, git's of others."""

    size: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is about to be downloaded, and where it will lie."""

    repository: str
    revision: str
    licence: str | None
    cache: Path
    files: Mapping[str, RemoteFile]

    @property
    def bytes(self) -> int:
        return sum(file.size for file in self.files.values())


def download(
    name: str,
    *,
    revision: str | None = None,
    verify: bool = False,
    on_plan: Callable[[Plan], None] = lambda plan: None,
) -> Pin:
    """Download a model by its name (see REPOSITORIES) or repository, `owner/name`; returns where it is.

    Without `revision`, the pinned one, or the repository's newest the first time; with it, that one is pinned. What is there
    and complete is not downloaded; `verify` hashes it. `on_plan` is called before a download starts.
    Raises OptionError for a name that is none, DownloadError if the hub cannot be reached, has no such thing, or sends other
    bytes than it says, or than were pinned.
    """
    repository = repository_of(name)
    if repository is None:
        known = ", ".join(REPOSITORIES)
        raise OptionError("name", expected=f"one of {known}, or a repository such as owner/name", got=name)
    pin = read_pins().get(repository)
    wanted = revision or (pin.revision if pin else None)
    if pin is not None and pin.revision == wanted and pin.complete():
        if verify:
            _verify(pin)
        return pin
    plan = _plan(repository, wanted)
    on_plan(plan)
    pinned = pin.files if pin is not None and pin.revision == plan.revision else {}
    files, folder = {}, None
    for file, remote in plan.files.items():
        path = _get(plan, file, remote, pinned.get(file))
        folder = folder or _snapshot(path, file)
        files[file] = PinnedFile(size=remote.size, sha256=_sha256(path))
    assert folder is not None
    done = Pin(repository=repository, revision=plan.revision, folder=str(folder), licence=plan.licence, files=files)
    write_pin(done)
    return done


def _verify(pin: Pin) -> None:
    """Raise DownloadError for a file that is not what it was."""
    for name, file in pin.files.items():
        if _sha256(pin.path(name)) != file.sha256:
            pin.path(name).resolve().unlink()
            hint = "it was removed; download again"
            raise DownloadError(f"{pin.path(name)} has changed since it was downloaded", repository=pin.repository, hint=hint)


def _plan(repository: str, revision: str | None) -> Plan:
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE

    info = _call(repository, lambda: HfApi(endpoint=_endpoint()).model_info(repository, revision=revision, files_metadata=True))
    files = {}
    for sibling in info.siblings or []:
        if sibling.size is None:
            raise DownloadError(f"the hub does not say how large {sibling.rfilename} is", repository=repository)
        sha256 = None if sibling.lfs is None else sibling.lfs.sha256
        sha1 = sibling.blob_id if sha256 is None else None
        files[sibling.rfilename] = RemoteFile(size=sibling.size, sha256=sha256, git_sha1=sha1)
    wanted = {name: files[name] for name in _wanted(files)}
    if not any(name.endswith(".safetensors") for name in wanted):
        hint = "download the files yourself, and use mvmlx convert"
        raise DownloadError("has no .safetensors weights in diffusers' layout", repository=repository, hint=hint)
    card = info.card_data
    return Plan(
        repository=repository,
        revision=str(info.sha),
        licence=None if card is None else card.get("license"),
        cache=Path(os.environ.get("HF_HUB_CACHE") or HF_HUB_CACHE),
        files=wanted,
    )


def _wanted(names: Mapping[str, Any]) -> list[str]:
    """What a model in diffusers' layout needs: its configs, its tokenizer, the weights of each component once."""
    kept = []
    for name in sorted(names):
        folder, _, file = name.rpartition("/")
        if not file.endswith(KEPT_SUFFIXES) or name.startswith(SKIPPED_FOLDERS):
            continue
        if not folder and file != "model_index.json":
            continue  # single-file checkpoints beside the folders
        unnumbered = re.sub(r"-\d{5}-of-\d{5}(?=\.)", "", file)
        variant = [part for part in unnumbered.split(".")[1:-1] if part not in ("safetensors", "index")]
        other = bool(variant) and (variant != ["fp16"] or _plain_weights(folder, names))
        if other and ".safetensors" in file:
            continue
        if file.endswith(".index.json") and ".safetensors" not in file:
            continue  # of pickled shards
        kept.append(name)
    return kept


def _plain_weights(folder: str, names: Mapping[str, Any]) -> bool:
    """Whether a component has safetensors of no variant, in one file or in several."""
    files = (name.rpartition("/")[2] for name in names if name.startswith(f"{folder}/") and name.endswith(".safetensors"))
    return any(file.count(".") == 1 for file in files)


def _get(plan: Plan, name: str, remote: RemoteFile, pinned: PinnedFile | None) -> Path:
    """A file of the plan, checked. A damaged one is downloaded again."""
    from huggingface_hub import hf_hub_download

    def fetch(*, force: bool) -> Path:
        return Path(
            hf_hub_download(
                plan.repository,
                name,
                revision=plan.revision,
                endpoint=_endpoint(),
                cache_dir=plan.cache,
                force_download=force,
            )
        )

    path = _call(plan.repository, lambda: fetch(force=False))
    for _ in range(ATTEMPTS - 1):
        if _fault(path, remote) is not None:
            path = _call(plan.repository, lambda: fetch(force=True))
    fault = _fault(path, remote)
    if fault is not None:
        path.resolve().unlink(missing_ok=True)
        raise DownloadError(f"{name} {fault}", repository=plan.repository, hint="the hub sends damaged files; try later")
    if pinned is not None and _sha256(path) != pinned.sha256:
        hint = "--revision pins another one"
        raise DownloadError(f"{name} is not the file that was first downloaded", repository=plan.repository, hint=hint)
    return path


def _fault(path: Path, remote: RemoteFile) -> str | None:
    """What is wrong with a downloaded file, if anything."""
    size = path.stat().st_size
    if size != remote.size:
        return f"has {size} bytes, and should have {remote.size}"
    if remote.sha256 is not None and _sha256(path) != remote.sha256:
        return "does not have the SHA-256 that the hub names"
    if remote.git_sha1 is not None and _git_sha1(path) != remote.git_sha1:
        return "does not have the hash that the hub names"
    return None


def _call(repository: str, function: Callable[[], Any]) -> Any:
    """Call the hub, again if a connection breaks. Raises DownloadError."""
    from huggingface_hub import errors

    for attempt in range(1, ATTEMPTS + 1):
        try:
            return function()
        except errors.HFValidationError as refused:
            raise DownloadError("is no name of a repository", repository=repository, hint=first_line(refused)) from refused
        except errors.GatedRepoError as refused:
            hint = f"accept its licence at https://huggingface.co/{repository}, then run: hf auth login"
            raise DownloadError("asks for a login", repository=repository, hint=hint) from refused
        except errors.RepositoryNotFoundError as missing:
            raise DownloadError("is no repository of the hub, or a private one", repository=repository) from missing
        except errors.RevisionNotFoundError as missing:
            raise DownloadError("has no such revision", repository=repository) from missing
        except errors.EntryNotFoundError as missing:
            if not isinstance(missing, errors.LocalEntryNotFoundError) or attempt == ATTEMPTS:
                raise DownloadError(first_line(missing), repository=repository, hint=_AGAIN) from missing
        except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as broken:
            if isinstance(broken, OSError) and broken.errno in _DISK:
                raise OutputError(f"cannot be written: {broken.strerror}", path=broken.filename or repository) from broken
            if isinstance(broken, errors.OfflineModeIsEnabled) or attempt == ATTEMPTS:
                raise DownloadError(first_line(broken), repository=repository, hint=_AGAIN) from broken
        except Exception as broken:  # of the libraries underneath, whichever they are, or by what was sent
            if "http" not in type(broken).__module__ or attempt == ATTEMPTS:
                raise DownloadError(first_line(broken), repository=repository, hint=_AGAIN) from broken
    raise AssertionError("unreachable")


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
_AGAIN = "check the connection, and run it again: it goes on where it stopped"


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT")


def _snapshot(path: Path, name: str) -> Path:
    """The folder of the revision, of the path of one of its files."""
    return path.parents[name.count("/")]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _git_sha1(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
