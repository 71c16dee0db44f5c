"""Models in the package: unpacked once, from eight bits to a checkpoint folder of float16."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import write_tiny_model
from safetensors.numpy import load_file

from mvshared import embedded
from mvshared.checkpoint import find_model, read_model_config, weight_files
from mvshared.quantization.folders import quantize_folder

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tiny model of eight bits in the place of the embedded one, and an empty cache."""
    write_tiny_model(tmp_path / "plain")
    quantize_folder(tmp_path / "plain", tmp_path / "small", backend="torch", device="cpu", measure=False)
    monkeypatch.setattr(embedded, "embedded_source", lambda name: tmp_path / "small")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    embedded.embedded_folder.cache_clear()
    yield tmp_path / "small"
    embedded.embedded_folder.cache_clear()


def found() -> Path:
    embedded.embedded_folder.cache_clear()
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


def test_it_is_unpacked_once_and_anew_for_other_weights(source: Path) -> None:
    folder = found()
    times = folder.stat().st_mtime_ns, (folder / UNET).stat().st_mtime_ns
    assert found() == folder
    assert (folder.stat().st_mtime_ns, (folder / UNET).stat().st_mtime_ns) == times
    (source / "README.md").write_text("another card")
    assert found() != folder


def test_what_a_killed_process_left_half_written_is_not_taken(source: Path) -> None:
    folder = found()
    (folder / "model_index.json").unlink()
    folder.rename(folder.with_name(f".{folder.name}.0000.tmp"))
    assert (found() / "model_index.json").is_file()


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
