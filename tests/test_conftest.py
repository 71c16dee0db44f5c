"""The test set-up itself: fast BLAS for MLX, and skips with their reasons."""

import sys
import time

import numpy as np
import pytest

pytest_plugins = ["pytester"]

PROBE = """
import pytest

@pytest.mark.gpu
def test_any_gpu(): pass

@pytest.mark.gpu("cuda")
def test_cuda(): pass

@pytest.mark.gpu("metal")
def test_metal(): pass

@pytest.mark.mac
def test_mac(): pass

def test_everywhere(): pass
"""


def test_a_test_that_needs_absent_hardware_is_skipped_with_the_reason(
    pytester: pytest.Pytester, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    conftest = request.config.pluginmanager.get_plugin(str(request.path.parent / "conftest.py"))
    assert conftest is not None
    monkeypatch.setattr(conftest, "cuda_is_there", lambda: False)
    monkeypatch.setattr(conftest, "metal_is_there", lambda: False)
    monkeypatch.setattr(sys, "platform", "linux")
    pytester.makeini("[pytest]\nmarkers =\n    gpu: needs a GPU\n    mac: needs a Mac\n")
    pytester.makepyfile(PROBE)
    result = pytester.inline_run("-p", "no:cacheprovider", plugins=[conftest])
    passed, skipped, failed = result.listoutcomes()
    assert [report.nodeid.split("::")[1] for report in passed] == ["test_everywhere"]
    assert not failed
    reasons = {report.nodeid.split("::")[1]: report.longrepr[2] for report in skipped}  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    assert reasons.keys() == {"test_any_gpu", "test_cuda", "test_metal", "test_mac"}
    assert "needs a GPU (cuda or metal)" in reasons["test_any_gpu"]
    assert "needs a GPU (metal)" in reasons["test_metal"]
    assert "needs macOS" in reasons["test_mac"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="MLX brings a slow BLAS on Linux only")
def test_mlx_multiplies_with_the_blas_of_torch() -> None:
    pytest.importorskip("torch")
    mx = pytest.importorskip("mlx.core")
    a = mx.array(np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32))
    mx.eval(a @ a)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        mx.eval(a @ a)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.2, f"2.1 GFLOP took {min(seconds):.3f} s: the reference BLAS takes about 0.4 s"
