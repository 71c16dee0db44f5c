"""The benchmarks' helper: what it measures and prints."""

import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import measure
from mvshared.errors import OptionError


def test_machine_names_versions_without_importing_an_array_library() -> None:
    code = "import sys; from benchmarks.measure import machine; print(machine()['numpy']); print('torch' in sys.modules)"
    environment = {"PYTHONPATH": ".:shared"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [np.__version__, "False"]


def test_machine_has_a_cpu_cores_and_memory() -> None:
    machine = measure.machine()
    assert machine["cpu"] and machine["os"]
    assert int(machine["cores"]) >= 1
    assert int(machine["ram_bytes"]) > 2**28


def test_a_package_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PACKAGES", ("numpy", "no-such-package-of-mvmlx"))
    assert "no-such-package-of-mvmlx" not in measure.machine()


def test_measure_leaves_the_warmup_out_and_gives_median_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    durations = iter([100.0, 1.0, 4.0, 2.0])

    def call() -> None:
        nonlocal clock
        clock += next(durations)

    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    assert measure.measure(call, repeats=3, warmup=1) == (2, 1, 4, 1.5)


def test_measure_refuses_to_repeat_nothing() -> None:
    with pytest.raises(OptionError, match="repeats must be at least 1, got 0"):
        measure.measure(lambda: None, repeats=0)


def test_peak_memory_grows_by_what_is_allocated() -> None:
    code = (
        "from benchmarks.measure import peak_rss_bytes; import numpy; before = peak_rss_bytes(); "
        "x = numpy.ones(2**24); print(peak_rss_bytes() - before)"
    )
    environment = {"PYTHONPATH": ".:shared"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert 2**26 < int(result.stdout) < 2**28


def test_tables_are_markdown_with_the_columns_of_all_rows(capsys: pytest.CaptureFixture[str]) -> None:
    measure.print_table([{"name": "mlx", "seconds": 0.123456}, {"name": "torch", "note": "cold"}])
    assert capsys.readouterr().out.splitlines() == [
        "| name  | seconds | note |",
        "| ----- | ------- | ---- |",
        "| mlx   | 0.1235  |      |",
        "| torch |         | cold |",
    ]
