"""Models in the package: unpacked once, from eight bits to a checkpoint folder of float16."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import write_tiny_model
from safetensors.numpy import load_file

from mvshared import embedded
from mvshared.checkpoint import find_model, read_model_config, weight_files
from mvshared.errors import CheckpointError, OutputError
from mvshared.files import user_cache
from mvshared.models import pins_path
from mvshared.quantization.folders import quantize_folder

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tiny model of eight bits in the place of the embedded one, and an empty cache."""
    write_tiny_model(tmp_path / "plain")
    quantize_folder(tmp_path / "plain", tmp_path / "small", backend="torch", device="cpu", measure=False)
    monkeypatch.setattr(embedded, "embedded_source", lambda name: tmp_path / "small")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    embedded._made.cache_clear()
    yield tmp_path / "small"
    embedded._made.cache_clear()


def found() -> Path:
    embedded._made.cache_clear()
    return find_model("demo")


def test_the_unpacked_folder_is_a_usual_one_with_the_numbers_that_the_bits_stand_for(source: Path) -> None:
    folder = found()
    assert folder.is_relative_to(source.parent / "cache" / "mvmlx")
    assert read_model_config(folder) == read_model_config(source.parent / "plain")
    before, after = (load_file(each / UNET) for each in (source.parent / "plain", folder))
    assert before.keys() == after.keys() and {array.dtype.name for array in after.values()} == {"float16"}
    assert len(load_file(source / UNET)) > len(after)
    for name, array in before.items():
        assert array.shape == after[name].shape
        np.testing.assert_allclose(after[name], array, atol=0.01 * np.abs(array).max() + 1e-6)
    assert weight_files(folder, "vae")


def test_a_relative_folder_for_caches_or_data_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MVMLX_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for variable, place, at_home in (
        ("XDG_CACHE_HOME", user_cache, ".cache/mvmlx"),
        ("XDG_DATA_HOME", lambda: pins_path().parent, ".local/share/mvmlx"),
    ):
        for relative in ("", ".", "relative/dir"):
            monkeypatch.setenv(variable, relative)
            assert place() == tmp_path / at_home
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
        assert place() == tmp_path / "elsewhere" / "mvmlx"


def test_it_is_unpacked_once_and_anew_for_other_weights(source: Path) -> None:
    folder = found()
    times = folder.stat().st_mtime_ns, (folder / UNET).stat().st_mtime_ns
    assert found() == folder
    assert (folder.stat().st_mtime_ns, (folder / UNET).stat().st_mtime_ns) == times
    (source / "README.md").write_text("another card")
    assert found() != folder


@pytest.mark.parametrize("damage", ["a file is missing", "a file is cut off", "it is empty"])
def test_a_folder_that_is_not_whole_is_made_anew_in_its_place(source: Path, damage: str) -> None:
    folder = found()
    if damage == "a file is missing":
        (folder / "vae" / "config.json").unlink()
    elif damage == "a file is cut off":
        (folder / UNET).write_bytes((folder / UNET).read_bytes()[:100])
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    assert found() == folder
    assert weight_files(folder, "vae") and len(load_file(folder / UNET)) > 0
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("cache", ["cache", "cache/../plain/model_index.json"], ids=["in the cache", "in a temporary folder"])
def test_a_folder_that_goes_while_its_process_runs_is_made_anew(
    source: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(source.parent / cache))
    folder = found()
    assert folder.is_relative_to(source.parent / "cache") == (cache == "cache")
    shutil.rmtree(folder)
    again = find_model("demo")
    assert len(load_file(again / UNET)) > 0
    assert find_model("demo") == again


def test_what_a_killed_process_was_writing_is_not_taken_and_goes_after_a_day(source: Path) -> None:
    folder = found()
    left = folder.rename(folder.with_name(f".{folder.name}.0000.tmp"))
    old = shutil.copytree(left, folder.with_name("demo-0123"))
    assert found() == folder
    assert left.exists() and old.exists()
    for path, days in ((left, 2), (old, 29)):
        os.utime(path, times=(0, time.time() - 86400 * days))
    shutil.rmtree(folder)
    assert found() == folder
    assert not left.exists() and old.exists()
    os.utime(old, times=(0, time.time() - 86400 * 31))
    shutil.rmtree(folder)
    assert found() == folder
    assert not old.exists()


def test_the_folder_that_was_just_made_stays_even_where_the_clock_is_ahead(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = time.time() + 86400 * 365
    monkeypatch.setattr(embedded, "time", SimpleNamespace(time=lambda: later))
    assert weight_files(found(), "unet")


@pytest.mark.parametrize("error", [OutputError("no space left", path="x"), KeyboardInterrupt(), CheckpointError("damaged")])
def test_unpacking_that_fails_leaves_nothing_in_the_cache(
    source: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write, written = embedded.write_atomic, list[Path]()

    def fails_at_the_third(path: Path, data: bytes) -> None:
        written.append(path)
        if len(written) == 3:
            raise error
        write(path, data)

    monkeypatch.setattr(embedded, "write_atomic", fails_at_the_third)
    if isinstance(error, OutputError):
        folder = found()
        assert not folder.is_relative_to(source.parent / "cache")
        assert weight_files(folder, "unet")
    else:
        with pytest.raises(type(error)):
            found()
    assert not list((source.parent / "cache" / "mvmlx").iterdir())


def test_without_room_anywhere_the_error_says_where(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path, data: bytes) -> None:
        raise OutputError("cannot be written: No space left on device", path=path)

    monkeypatch.setattr(embedded, "write_atomic", fails)
    with pytest.raises(OutputError, match="No space left on device"):
        found()


def test_a_process_that_was_slower_takes_what_the_other_made(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack = embedded.unpack

    def and_another_does(given: Path, target: Path) -> None:
        unpack(given, target)
        if target.name.endswith(".tmp"):
            unpack(given, target.with_name(target.name[1:].rpartition(".")[0].rpartition(".")[0]))

    monkeypatch.setattr(embedded, "unpack", and_another_does)
    folder = found()
    assert folder.is_relative_to(source.parent / "cache" / "mvmlx")
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_without_a_cache_it_is_unpacked_for_the_process_alone(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, where no folder can be made")
    code = "from mvshared.checkpoint import find_model; folder = find_model('demo'); print(folder, len(list(folder.iterdir())))"
    paths = os.pathsep.join(str(Path(path).resolve()) for path in sys.path)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": paths, "TMPDIR": str(tmp_path)}
    folder, count = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()
    assert int(count) >= 4
    assert not Path(folder).exists() and not list(tmp_path.glob("mvmlx-*"))
