"""Cases in processes of their own: they take turns, one that fails does not stop the others, and what is equal stays so."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mvshared.benchmark.compare import DIFFERENT, Case, compare
from mvshared.benchmark.worker import Prepared
from tests import benchmark_cases


def logging(name: str, log: Path, **fields: int) -> Case:
    arguments = {"name": name, "file": str(log)}
    return Case(what=name, prepare=benchmark_cases.logging, arguments=arguments, **fields)  # pyright: ignore[reportArgumentType]


def test_cases_take_turns_in_processes_of_their_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    rows = compare([logging("a", log), logging("b", log)], repeats=2)
    assert log.read_text().split() == ["a", "b"] * 3
    assert [(row.what, row.device, len(row.seconds), len(row.cpu_seconds)) for row in rows] == [
        ("a", "of a", 2, 2),
        ("b", "of b", 2, 2),
    ]
    assert rows[0].made != rows[1].made


def test_short_calls_are_repeated_more_often(tmp_path: Path) -> None:
    (row,) = compare([logging("a", tmp_path / "log")], repeats=2, least_seconds=100.0)
    assert len(row.seconds) == 20


def test_a_case_that_is_not_run_makes_the_others_no_more_often(tmp_path: Path) -> None:
    refused = Case(what="a", prepare=benchmark_cases.logging, refused="too large")
    _, row = compare([refused, logging("b", tmp_path / "log")], repeats=2, least_seconds=1e-9)
    assert len(row.seconds) == 2


def test_calls_that_warm_up_do_not_count(tmp_path: Path) -> None:
    log = tmp_path / "log"
    (row,) = compare([logging("a", log, warm_up=3)], repeats=2)
    assert (len(log.read_text().split()), len(row.seconds)) == (5, 2)


def test_a_case_that_is_refused_is_not_run(tmp_path: Path) -> None:
    log = tmp_path / "log"
    refused = Case(what="a", prepare=benchmark_cases.logging, arguments={"name": "a", "file": str(log)}, refused="too large")
    rows = compare([refused, logging("b", log)], repeats=1)
    assert [(row.what, row.failure, len(row.seconds)) for row in rows] == [("a", "too large", 0), ("b", "", 1)]
    assert log.read_text().split() == ["b", "b"]


def test_all_calls_of_a_case_are_made_in_its_context() -> None:
    case = Case(what="a", prepare=benchmark_cases.within_a_context)
    (row,) = compare([case], repeats=2)
    assert row.variant == str([*[(1, 0)] * 3, (1, 1)])  # the first does not count


def test_variables_reach_the_processes() -> None:
    case = Case(what="a", prepare=benchmark_cases.environment, environment={"CASE": "its own"})
    (row,) = compare([case], repeats=1, environment={"OMP_NUM_THREADS": "3"})
    assert (row.variant, row.dtype) == ("3", "its own")
    assert Path(row.device).is_absolute() and not Path(row.device).parent.exists(), "what it kept in files is gone"


@pytest.mark.parametrize(
    ("prepare", "arguments", "failure"),
    [
        (benchmark_cases.refusing, {"backend": "torch"}, "made of wood"),
        (benchmark_cases.failing_in_the_third_call, {}, "StopIteration"),
        (benchmark_cases.ending_without_a_word, {}, "exit code 7"),
        (benchmark_cases.failing_in_its_facts, {}, "no facts"),
    ],
)
def test_a_case_that_fails_has_its_reason_and_the_others_go_on(
    prepare: Callable[..., Prepared], arguments: dict[str, str], failure: str, tmp_path: Path
) -> None:
    failed, row = compare([Case(what="a", prepare=prepare, arguments=arguments), logging("b", tmp_path / "log")], repeats=2)
    assert failure in failed.failure
    assert (failed.what, failed.backend, failed.seconds) == ("a", arguments.get("backend", ""), ())
    assert len(row.seconds) == 2 and not row.failure


def test_what_computes_something_else_is_not_timed() -> None:
    numbers = {"same": [1.0, 2.0, 2.0], "near": [1.0, 2.0, 2.01], "other": [1.0, 2.0, 2.3], "reference": [1.0, 2.0, 2.0]}
    given = [Case(what=name, prepare=benchmark_cases.computing, arguments={"values": each}) for name, each in numbers.items()]
    rows = compare(given, repeats=1, agree=0.01)
    assert [bool(row.seconds) for row in rows] == [True, True, False, True]
    assert rows[2].failure == f"{DIFFERENT}: relative RMS difference 0.1, allowed 0.01"
    rows = compare(given, repeats=1)
    assert all(row.seconds for row in rows)


def test_what_computes_something_else_once_it_is_warm_is_not_timed() -> None:
    """As a recording that goes wrong does."""
    cold = Case(what="a", prepare=benchmark_cases.changing, arguments={"values": [[1.0], [2.0], [3.0]]}, warm_up=3)
    right, wrong = ({"values": [each]} for each in ([3.0], [1.0]))
    for arguments, timed in ((right, True), (wrong, False)):
        reference = Case(what="reference", prepare=benchmark_cases.changing, arguments=arguments)
        assert bool(compare([cold, reference], repeats=1, agree=0.01)[0].seconds) is timed


def test_without_anything_to_compare_with_nothing_is_timed() -> None:
    values = Case(what="a", prepare=benchmark_cases.computing, arguments={"values": [1.0]})
    broken = Case(what="b", prepare=benchmark_cases.refusing, arguments={"backend": "torch"})
    rows = compare([values, broken], repeats=1, agree=0.01)
    assert "nothing to compare with" in rows[0].failure and "made of wood" in rows[0].failure
    assert not rows[0].seconds


def test_a_cache_with_something_half_written_is_emptied_and_the_case_starts_again(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "half-written.so").touch()
    arguments = {"folder": str(cache)}
    (row,) = compare([Case(what="a", prepare=benchmark_cases.compiled_before, arguments=arguments)], repeats=1)
    assert "file too short" in row.failure
    case = Case(what="a", prepare=benchmark_cases.compiled_before, arguments=arguments, cache=cache)
    (row,) = compare([case], repeats=1)
    assert row.seconds and not (cache / "half-written.so").exists()


def test_a_module_of_the_current_folder_does_not_get_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (row,) = compare([logging("a", tmp_path / "log")], repeats=1)
    assert row.seconds
