"""The README's commands and Python run as written, with the demo model; its links lead somewhere."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

BLOCKS = BLOCK.findall((ROOT / "README.md").read_text())
COMMANDS = [text for language, text in BLOCKS if language == "bash" and text.startswith("mvmlx")]
SCRIPTS = [text for language, text in BLOCKS if language == "python"]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """What a reader has beside the installed package: a folder with the examples in it."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    return tmp_path


def run(*command: str, cwd: Path) -> None:
    """Run with this interpreter's `mvmlx` and `python` first on the path, no network, and a home that holds no cache."""
    environment = os.environ | {
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "shared"))),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(cwd),
    }
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command[-1]}\n{result.stdout}\n{result.stderr}"


def finished_runs(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.rglob("metadata.json"))


def test_the_readme_shows_the_command_line_and_python() -> None:
    assert len(COMMANDS) >= 3
    assert len(SCRIPTS) >= 1
    assert len(COMMANDS) + len(SCRIPTS) == len(BLOCKS), "every bash block starts with mvmlx, or it would not be tested"


@pytest.mark.slow
@pytest.mark.parametrize("commands", COMMANDS, ids=lambda text: text.splitlines()[0][:60])
def test_the_commands_of_the_readme_run_as_written(commands: str, clone: Path) -> None:
    run("bash", "-euo", "pipefail", "-c", commands, cwd=clone)
    outputs = re.findall(r"-o (\S+)", commands)
    assert finished_runs(clone) == sorted(clone / output for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=range(len(SCRIPTS)))
def test_the_python_of_the_readme_runs_as_written(script: str, clone: Path) -> None:
    pytest.importorskip("torch")
    run(sys.executable, "-c", script, cwd=clone)
    assert finished_runs(clone) == [clone / "out" / "python"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_between_pages_lead_to_files(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_the_file_map_names_what_is_there() -> None:
    rows = re.findall(r"^\| `([^`]+/)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert "mvmlx/" in rows
    assert not [row for row in rows if not (ROOT / row).is_dir()]


def test_the_pytorch_that_comes_first_is_one_that_the_package_takes() -> None:
    """Else pip replaces the build without CUDA by one with it."""
    (first,) = re.findall(r'pip install "(torch[^"]+)" --index-url', (ROOT / "README.md").read_text())
    assert first in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["torch"]
