"""`mvmlx info`: what it counts, and that it finds every fault of a folder without loading it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from helpers import BACKENDS, Backend
from public_folders import stable_diffusion

from mvshared.checkpoint import weight_files
from mvshared.cli import run
from mvshared.errors import CheckpointError
from mvshared.inspection import inspect

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(FIXTURES / "tiny-imagedream", tmp_path / "model")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sound_folder_is_counted_tensor_by_tensor(folder: Path, backend: Backend) -> None:
    report = inspect(folder, backend=backend)
    assert not report.faults
    assert report.config is not None and report.config.family == "imagedream"
    assert [each.name for each in report.components] == ["unet", "vae", "text_encoder", "image_encoder"]
    for each in report.components:
        weights = safetensors.numpy.load_file(weight_files(folder, each.name)[0])
        assert (each.files, each.tensors, each.dtypes) == (1, len(weights), {"F32": len(weights)})
        assert each.parameters == sum(array.size for array in weights.values())
    numbers = sum(each.parameters for each in report.components)
    assert report.memory_bytes() == {"float32": 4 * numbers, "float16": 2 * numbers, "bfloat16": 2 * numbers}


def test_dtypes_are_those_of_the_files(folder: Path) -> None:
    (file,) = weight_files(folder, "vae")
    weights = safetensors.numpy.load_file(file)
    first = next(iter(weights))
    safetensors.numpy.save_file({n: a if n == first else a.astype(np.float16) for n, a in weights.items()}, file)
    assert inspect(folder).components[1].dtypes == {"F32": 1, "F16": len(weights) - 1}


def test_every_fault_is_found_at_once(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (unet,), (vae,) = weight_files(folder, "unet"), weight_files(folder, "vae")
    weights = safetensors.numpy.load_file(unet)
    weights["surprise"] = weights.pop("input_blocks.0.0.bias")
    safetensors.numpy.save_file(weights, unet)
    vae.write_bytes(vae.read_bytes()[:-1])
    weight_files(folder, "text_encoder")[0].write_bytes(b"")
    shutil.rmtree(folder / "tokenizer")
    report = inspect(folder)
    # The width of the text encoder's projection stands in its weights, so nothing can be said without them.
    assert report.config is None and len(report.faults) == 1 and "text_encoder" in report.faults[0]
    shutil.copy(FIXTURES / "tiny-imagedream" / "text_encoder" / "model.safetensors", folder / "text_encoder")
    faults = inspect(folder).faults
    for fault, words in zip(faults, (("unet", "conv_in.bias", "surprise"), ("vae", "truncated"), ("vocab.json",)), strict=True):
        assert all(word in fault for word in words), fault
    assert run(["info", str(folder)]) == CheckpointError.exit_code
    printed = capfd.readouterr()
    assert printed.out.count("fault: ") == 3
    assert printed.err.startswith("mvmlx: error: 3 faults; the first: ") and printed.err.count("\n") == 1


def test_a_config_that_cannot_be_read_is_a_fault(folder: Path) -> None:
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_classes": 3}))
    report = inspect(folder)
    assert (report.config, report.components) == (None, ())
    assert "num_classes must be None" in report.faults[0]


def test_the_report_is_printed_for_people_and_for_programs(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "demo"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "family demo: 4 views of 128 pixels, 10 steps of dpmpp-2m, guidance 1.75"
    assert lines[1].startswith("unet: 13,151,464 parameters in 398 tensors (F16 x 398)")
    assert run(["info", "demo", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["components"][0]["parameters"] == 13_151_464
    assert document["memory_bytes"]["float16"] == 2 * sum(each["parameters"] for each in document["components"])


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model"):
        inspect(tmp_path / "nowhere")


def test_a_scheduler_that_is_not_here_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = stable_diffusion(tmp_path / "sd")
    path = folder / "scheduler" / "scheduler_config.json"
    document = json.loads(path.read_text())
    for kind, replaced in (("LCMScheduler", True), ("DDIMScheduler", False), ("EulerDiscreteScheduler", False)):
        path.write_text(json.dumps(document | {"_class_name": kind}))
        assert inspect(folder).replaced_scheduler == (kind if replaced else None)
        assert run(["info", str(folder)]) == 0
        said = "the scheduler is LCMScheduler, which is not here: ddim takes its place"
        assert (said in capfd.readouterr().out) == replaced
    assert inspect("demo").replaced_scheduler is None
