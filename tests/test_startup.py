"""What a new process of `mvmlx` imports, and what it asks of OpenMP: both decide how long a user waits for the first view."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROBE = """
import json, os, sys
from mvshared.cli import main
report, arguments = sys.argv[1], sys.argv[2:]
sys.argv = ["mvmlx", *arguments]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
found = {"modules": sorted(sys.modules), "spins": os.environ.get("GOMP_SPINCOUNT")}
open(report, "w").write(json.dumps(found))
"""

INTERRUPTED = """
import builtins, sys
real = builtins.__import__
def interrupted(name, *rest, **named):
    if name == "mvshared.commands" or name == "click":
        raise KeyboardInterrupt
    return real(name, *rest, **named)
builtins.__import__ = interrupted
from mvshared.entry import main
main()
"""
ARRAYS_AND_PICTURES = {"numpy", "PIL", "torch", "mlx", "safetensors", "tokenizers", "tqdm"}
NOT_FOR_THE_DEMO = {
    *("mlx", "tokenizers", "huggingface_hub", "diffusers", "transformers", "matplotlib", "scipy"),
    *(
        "mvshared.tokenizer",
        "mvshared.download",
        "mvshared.conversion",
        "mvshared.training",
        "mvshared.heads",
        "mvshared.evaluation",
    ),
    *("mvtorch.train", "mvtorch.diffusers_model", "torch._dynamo", "torch._inductor"),
}


def test_ctrl_c_while_the_command_is_imported_is_one_line() -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'shared'}"}
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], env=environment, capture_output=True, text=True)
    expected = "mvmlx: error: interrupted; nothing half-written will be taken for a result\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", expected)


@pytest.mark.parametrize("package", ["mvmlx", "mvtorch", "mvshared"])
def test_a_package_is_run_as_the_command(package):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'shared'}"}
    command = [sys.executable, "-m", package]
    helped = subprocess.run([*command, "models", "--help"], env=environment, capture_output=True, text=True)
    assert (helped.returncode, helped.stderr) == (0, "") and helped.stdout.startswith("Usage: mvmlx models [OPTIONS]\n")
    wrong = subprocess.run([*command, "nothing"], env=environment, capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("mvmlx: error: No such command 'nothing'")


def started(tmp_path, *arguments, **environment):
    report = tmp_path / "report.json"
    command = [sys.executable, "-c", PROBE, str(report), *arguments]
    env = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT, env={**env, **environment})
    return json.loads(report.read_text())


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["--version"]], ids=" ".join)
def test_help_imports_neither_arrays_nor_pictures(tmp_path, arguments):
    assert not ARRAYS_AND_PICTURES & set(started(tmp_path, *arguments)["modules"])


def test_the_first_view_imports_only_what_it_needs(tmp_path):
    arguments = ["examples/portrait.png", "-o", str(tmp_path / "out"), "--backend", "torch", "--steps", "1"]
    modules = set(started(tmp_path, "generate", *arguments)["modules"])
    assert not NOT_FOR_THE_DEMO & modules
    assert "mvtorch.unet" in modules  # the run did happen in that process


def test_the_command_line_lets_waiting_threads_sleep_unless_told_otherwise(tmp_path):
    assert started(tmp_path, "--version")["spins"] == "10000"
    assert started(tmp_path, "--version", GOMP_SPINCOUNT="7")["spins"] == "7"
    assert started(tmp_path, "--version", OMP_WAIT_POLICY="active")["spins"] is None
