"""The benchmarks' helpers: the machine, timings, peaks of memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mvshared.benchmark import measure

ROOT = Path(__file__).resolve().parent.parent


def run(code: str) -> list[str]:
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'shared'}"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout.split()


def test_machine_names_versions_without_importing_an_array_library() -> None:
    code = (
        "import sys; from mvshared.benchmark.measure import machine; "
        "print(machine()['numpy'], {'torch', 'mlx'} & {*sys.modules})"
    )
    assert run(code) == [np.__version__, "set()"]


def test_machine_has_a_cpu_cores_and_memory() -> None:
    machine = measure.machine()
    assert machine["cpu"] and machine["os"]
    assert int(machine["cores"]) >= 1
    assert int(machine["ram_bytes"]) > 2**28


def test_machine_says_how_many_threads_the_environment_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert measure.machine()["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert measure.machine()["OMP_NUM_THREADS"] == "not set"


def test_a_package_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PACKAGES", ("numpy", "no-such-package-of-mvmlx"))
    assert "numpy" in measure.machine()
    assert "no-such-package-of-mvmlx" not in measure.machine()


def test_a_timing_has_median_shortest_longest_and_relative_spread() -> None:
    assert measure.timing_of([1.0, 4.0, 2.0]) == (2.0, 1.0, 4.0, 1.5)
    assert measure.timing_of([1.0, 3.0]) == (2.0, 1.0, 3.0, 1.0)
    assert measure.timing_of([5.0]) == (5.0, 5.0, 5.0, 0.0)


def test_peak_memory_grows_by_what_is_allocated() -> None:
    code = (
        "from mvshared.benchmark.measure import peak_rss_bytes; before = peak_rss_bytes(); "
        "x = b'1' * 2**27; print(peak_rss_bytes() - before)"
    )
    assert 2**26 < int(run(code)[0]) < 2**28


def test_peak_memory_of_children_is_theirs() -> None:
    code = (
        "import subprocess, sys; "
        "from mvshared.benchmark.measure import children_peak_rss_bytes as peak, peak_rss_bytes as own; "
        "subprocess.run([sys.executable, '-c', 'x = b\"1\" * 2**27']); print(peak() - own())"
    )
    assert 2**26 < int(run(code)[0]) < 2**28


def test_cpu_time_is_that_of_all_threads_and_children() -> None:
    code = (
        "import subprocess, sys; from mvshared.benchmark.measure import cpu_seconds; before = cpu_seconds(); "
        "subprocess.run([sys.executable, '-c', 'sum(range(10_000_000))']); print(cpu_seconds() - before)"
    )
    assert float(run(code)[0]) > 0.02


def test_free_memory_is_what_the_system_says_or_a_share_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   2048 kB\n")
    monkeypatch.setattr(measure, "MEMINFO", tmp_path / "meminfo")
    assert measure.free_memory_bytes() == 2**21
    monkeypatch.setattr(measure, "MEMINFO", tmp_path / "none")
    assert measure.free_memory_bytes() == pytest.approx(0.8 * int(measure.machine()["ram_bytes"]))
