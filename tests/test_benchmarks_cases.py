"""The benchmarks' cases: each of them runs, they take turns, and one that fails does not stop the others."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast, get_args

import mlx.core as mx
import pytest
import torch

import mvtorch.model
from benchmarks import memory, networks, suite, training
from benchmarks.__main__ import main, measure
from benchmarks.compare import Case, compare
from benchmarks.results import TITLES, Row, markdown, read_results
from benchmarks.suite import cases
from benchmarks.worker import Prepared
from mvshared.backend import Dtype
from mvshared.errors import CheckpointError, OptionError
from mvshared.upscaling.folder import write_upscaler
from tests import benchmark_cases
from tests.helpers import BACKENDS, make_upscaler, write_tiny_model
from tests.upscalers import PLAIN, UPSCALER


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("benchmarks") / "tiny")
    weights = mvtorch.model.get_weights(make_upscaler(PLAIN, "torch"))
    write_upscaler(folder / memory.UPSCALER, UPSCALER, weights, vae_from=str(folder))
    return folder


@pytest.mark.parametrize("name", TITLES)
def test_every_case_can_be_called_again_and_says_what_it_measured(
    name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "RENDERER_SIZES_PX", (16,))
    monkeypatch.setattr(suite, "TRAINING", (("tiny", "torch", 1), ("tiny", "mlx", 1)))
    monkeypatch.setitem(training.SIZES, "tiny", ((16, 16, 16), 4))
    for case in (case for group in cases(name, model=model, backends=BACKENDS, steps=1) for case in group):
        prepared = case.prepare(**case.arguments)
        prepared.call()
        prepared.call()
        row = Row(**{"what": case.what, **prepared.facts()})
        assert (row.peak_memory_bytes or 0) > (2**22 if name != "quantized" else 2**18)  # there of what was added alone
        if name in ("generate", "unet", "vae"):
            assert row.device and row.views == (2 if name == "generate" else None)
            assert row.dtype == case.arguments.get("dtype", row.dtype) != ""


@pytest.mark.parametrize("name", ["unet", "vae", "generate"])
def test_the_backends_of_one_dtype_take_turns(name: str, model: Path) -> None:
    groups = cases(name, model=model, backends=BACKENDS, steps=1)
    for group in groups:
        assert [case.arguments["backend"] for case in group] == list(BACKENDS)
        assert len({(case.what, case.arguments.get("dtype")) for case in group}) == 1
    if name != "generate":
        assert {group[0].arguments["dtype"] for group in groups} == set(get_args(Dtype))


def test_cases_take_turns_in_processes_of_their_own(tmp_path: Path) -> None:
    log = tmp_path / "log"
    given = [Case(what=n, prepare=benchmark_cases.logging, arguments={"name": n, "file": str(log)}) for n in ("a", "b")]
    rows = compare(given, repeats=2)
    assert log.read_text().split() == ["a", "b"] * 3
    assert [(row.what, row.device, len(row.seconds)) for row in rows] == [("a", "of a", 2), ("b", "of b", 2)]
    assert rows[0].views != rows[1].views


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
    other = Case(what="b", prepare=benchmark_cases.logging, arguments={"name": "b", "file": str(tmp_path / "log")})
    failed, row = compare([Case(what="a", prepare=prepare, arguments=arguments), other], repeats=2)
    assert failure in failed.failure
    assert (failed.what, failed.backend, failed.seconds) == ("a", arguments.get("backend", ""), ())
    assert len(row.seconds) == 2 and not row.failure


def test_an_unknown_model_or_nothing_to_repeat_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="repeats must be at least 1, got 0"):
        measure(["help"], repeats=0)
    with pytest.raises(OptionError, match="steps must be at least 1, got 0"):
        measure(["help"], steps=0)
    with pytest.raises(CheckpointError, match="no such model"):
        measure(["help"], model=str(tmp_path / "none"))


def test_an_unknown_name_is_answered_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "weather"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert f"no such benchmark: weather; there are {', '.join(TITLES)}" in capsys.readouterr().err


def test_a_model_is_measured_in_processes_of_its_own(model: Path) -> None:
    group = cases("unet", model=model, backends=BACKENDS, steps=1)[0]
    rows = compare(group, repeats=1)
    assert [(row.backend, row.device, row.dtype, row.failure) for row in rows] == [
        (backend, "cpu", "float32", "") for backend in BACKENDS
    ]
    assert all(len(row.seconds) == 1 and row.threads for row in rows)


def test_a_gpu_is_named_with_the_memory_of_its_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"name of {device}")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    on_cuda = SimpleNamespace(backend="torch", device="cuda:1")
    assert networks.library_facts(cast(Any, on_cuda)) == {"device": "CUDA, name of cuda:1", "device_memory_bytes": 5}

    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M0"})
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 6)
    on_gpu = SimpleNamespace(backend="mlx", device="gpu")
    for metal, kind in ((True, "Metal"), (False, "CUDA")):
        monkeypatch.setattr(mx.metal, "is_available", lambda metal=metal: metal)
        assert networks.library_facts(cast(Any, on_gpu)) == {"device": f"{kind}, Apple M0", "device_memory_bytes": 6}


def test_the_command_prints_tables_and_writes_the_same_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "help", "--repeats", "1", "--json", str(tmp_path / "r.json")])
    main()
    results = read_results(tmp_path / "r.json")
    assert [(name, len(rows)) for name, rows in results.tables.items()] == [("help", 1)]
    assert results.settings["repeats"] == len(results.tables["help"][0].seconds) == 1
    assert capsys.readouterr().out == markdown(results)
