"""The wheel, built from the source distribution, and the editable install: complete, and usable from any folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import mvshared

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"mvmlx": "mvmlx", "mvtorch": "mvtorch", "mvshared": "shared/mvshared"}
BUILD_FILES = ["pyproject.toml", "README.md", "LICENSE"]
LEFT_OUT = {"__pycache__", ".DS_Store"}

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, in an environment without PYTHON* variables and without an index."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "PIP_"))}
    environment |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def package_files() -> set[str]:
    """Every file of the packages, by its name in a wheel."""
    return {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and not LEFT_OUT & set(path.parts)
    }


def copy_sources(to: Path) -> None:
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, to / name)
    for folder in PACKAGES.values():
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns(*LEFT_OUT))


def clean_environment(folder: Path) -> Path:
    """The interpreter of a new environment that sees the dependencies installed here, but not mvmlx."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    here = sysconfig.get_paths()
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip())
    # A folder named in a .pth file goes onto the path, but the .pth files in that folder, an editable mvmlx among them, do not.
    (site / "dependencies.pth").write_text("\n".join(dict.fromkeys((here["purelib"], here["platlib"]))) + "\n")
    return python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built the way a release is: source distribution first, wheel from that."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    python = clean_environment(tmp_path_factory.mktemp("installed") / "venv")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=python.parent)
    return python


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    extra = {name for name in names if ".dist-info/" in name}
    assert names - extra == package_files()
    assert {name.partition("/")[0] for name in extra} == {f"mvmlx-{mvshared.__version__}.dist-info"}


def test_the_wheel_holds_the_demo_model(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        demo = {
            Path(name).suffix: archive.getinfo(name).file_size
            for name in archive.namelist()
            if name.startswith("mvshared/demo/")
        }
    assert demo.get(".safetensors", 0) > 100_000
    assert demo.get(".json", 0) > 0
    assert demo.get(".md", 0) > 0


def test_the_source_distribution_holds_what_its_pages_lead_to(wheel: Path) -> None:
    [source] = wheel.parent.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*BUILD_FILES, "CONTRIBUTING.md", "CHANGELOG.md", "Makefile", "docs/index.md", "tests/conftest.py"} <= names
    assert not {name for name in names if name.startswith((".git/", ".venv", ".hypothesis", "out/"))}


def test_the_wheel_says_its_version_licence_and_python(wheel: Path) -> None:
    fields = metadata(wheel)
    assert fields["Version"] == mvshared.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert fields["Requires-Python"] == ">=3.11"
    assert set(fields.get_all("Provides-Extra", [])) == {"cpu", "cuda", "torch", "mesh", "train", "validate", "dev"}


def test_a_plain_install_pulls_in_no_array_library_but_mlx_on_a_mac(wheel: Path) -> None:
    required = [line for line in metadata(wheel).get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not [line for line in required if line.startswith(("torch", "diffusers", "transformers"))]
    [mlx] = [line for line in required if line.startswith("mlx")]
    assert "sys_platform == 'darwin'" in mlx.replace('"', "'")


def test_the_installed_command_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    command = installed.parent / "mvmlx"
    assert mvshared.__version__ in run(command, "--version", cwd=tmp_path)
    assert "generate" in run(command, "--help", cwd=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_installed_command_measures_without_the_repository(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    options = ["--backend", "torch", "--device", "cpu", "--dtype", "float32", "--sizes", "64", "--views", "1", "--repeats", "1"]
    said = run(installed.parent / "mvmlx", "benchmark", "step", *options, "--json", "results.json", cwd=tmp_path)
    assert "step, 1 view of 64 px, guided" in said and "not measured because" not in said
    document = json.loads((tmp_path / "results.json").read_text())
    assert [table["rows"][0]["failure"] for table in document["tables"].values()] == ["", ""]


@pytest.mark.parametrize(("package", "needs"), [("mvshared", "numpy"), ("mvtorch", "torch"), ("mvmlx", "mlx.core")])
def test_the_installed_packages_import_from_another_folder(package: str, needs: str, installed: Path, tmp_path: Path) -> None:
    pytest.importorskip(needs)
    where = run(installed, "-c", f"import {package}; print({package}.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parent.parent), f"{package} comes from {where}, not from the wheel"


def test_an_editable_install_sees_a_new_file_of_every_package(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    copy_sources(project)
    python = clean_environment(tmp_path / "venv")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation")
    run(*pip, "--editable", project, cwd=tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for package, folder in PACKAGES.items():
        (project / folder / "__init__.py").write_text("")
        (project / folder / "added_later.py").write_text(f"NAME = '{package}'\n")
        said = run(python, "-c", f"from {package}.added_later import NAME; print(NAME)", cwd=tmp_path / "elsewhere")
        assert said.strip() == package
