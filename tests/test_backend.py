"""Which backend is used, and what is said where one is not installed."""

import os
import platform
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mvshared import backend
from mvshared.errors import BackendError

ROOT = Path(__file__).resolve().parent.parent

# Loads without a module, and prints which errors lead to which.
WITHOUT = """
import importlib, sys
missing, package, function = sys.argv[1:]
sys.modules[missing] = None
try:
    getattr(importlib.import_module(package), function)("demo")
except Exception as error:
    print(type(error).__name__, type(error.__cause__).__name__, error)
"""


def without(missing: str, package: str, function: str) -> str:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'shared'}"}
    command = [sys.executable, "-c", WITHOUT, missing, package, function]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("function", ["load", "load_upscaler"])
@pytest.mark.parametrize(("library", "package"), [("torch", "mvtorch"), ("mlx", "mvmlx")])
def test_loading_without_the_array_library_says_how_to_install_it(library: str, package: str, function: str) -> None:
    expected = f"BackendError ModuleNotFoundError the {library} backend is not installed (install it with: pip install '"
    assert without(library, package, function).startswith(expected)


def test_another_module_that_is_not_there_is_not_taken_for_the_array_library() -> None:
    assert without("mvtorch.vae", "mvtorch", "load").startswith("ModuleNotFoundError NoneType import of mvtorch.vae halted")


@pytest.mark.parametrize(
    ("system", "driver", "expected"),
    [
        ("Linux", False, f"pip install '{backend.TORCH}' --index-url https://download.pytorch.org/whl/cpu"),
        ("Linux", True, "pip install 'mvmlx[torch]'"),
        ("Darwin", False, "pip install 'mvmlx[torch]'"),
        ("Windows", False, "pip install 'mvmlx[torch]'"),
    ],
)
def test_pytorch_comes_without_cuda_where_there_is_no_use_for_it(
    system: str, driver: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "available_backends", list)
    monkeypatch.setattr(backend, "has_nvidia_driver", lambda: driver)
    monkeypatch.setattr(platform, "system", lambda: system)
    with pytest.raises(BackendError) as none:
        backend.choose_backend()
    assert none.value.hint.startswith(f"install it with: {expected}; or for MLX install it with: pip install 'mvmlx' on a Mac")
    with pytest.raises(BackendError) as one:
        backend.choose_backend("torch")
    assert one.value.hint == f"install it with: {expected}"


def test_the_versions_of_pytorch_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"]["torch"] == [backend.TORCH]


def test_a_gpu_is_known_by_its_driver_s_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a driver")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not backend.has_nvidia_driver()
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert backend.has_nvidia_driver()
