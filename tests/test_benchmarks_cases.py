"""What `python -m benchmarks` has beside `mvmlx benchmark`: every case runs."""

from pathlib import Path

import pytest

import mvtorch.model
from benchmarks import memory, suite, training
from benchmarks.__main__ import main, measure
from benchmarks.suite import TITLES, cases
from mvshared.benchmark.compare import Case
from mvshared.benchmark.results import Row, markdown, read_results
from mvshared.errors import CheckpointError, OptionError
from mvshared.upscaling.folder import write_upscaler
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
    for case in (case for group in cases(name, model=model, backends=list(BACKENDS)) for case in group):
        prepared = case.prepare(**case.arguments)
        prepared.call()
        prepared.call()
        row = Row(**{"what": case.what, **prepared.facts()})
        assert (row.peak_memory_bytes or 0) > (2**22 if name != "quantized" else 2**18)  # there of what was added alone
        if name == "loading":
            assert row.weights_bytes and row.device


def test_the_peak_of_memory_is_that_of_one_run_and_times_are_of_as_many_calls_as_asked_for(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, set[int]] = {}

    def compared(group: list[Case], *, repeats: int) -> list[Row]:
        asked.setdefault(group[0].prepare.__module__, set()).add(repeats)
        return []

    monkeypatch.setattr("benchmarks.__main__.compare", compared)
    measure(["memory", "renderer"], model=str(model), repeats=2)
    assert asked == {"benchmarks.memory": {0}, "benchmarks.renderer": {2}}


def test_an_unknown_model_or_nothing_to_repeat_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="repeats must be at least 1, got 0"):
        measure(["renderer"], repeats=0)
    with pytest.raises(CheckpointError, match="no such model"):
        measure(["renderer"], model=str(tmp_path / "none"))


def test_an_unknown_name_is_answered_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmarks", "weather"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "invalid choice: 'weather'" in capsys.readouterr().err


def test_the_command_prints_tables_and_writes_the_same_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "RENDERER_SIZES_PX", (16,))
    monkeypatch.setattr(suite, "RENDERER_VARIANTS", ("plain",))
    monkeypatch.setattr("sys.argv", ["benchmarks", "renderer", "--repeats", "1", "--json", str(tmp_path / "r.json")])
    main()
    results = read_results(tmp_path / "r.json")
    assert [(name, len(table.rows)) for name, table in results.tables.items()] == [("renderer", 1)]
    assert results.settings["repeats"] == len(results.tables["renderer"].rows[0].seconds) == 1
    assert capsys.readouterr().out == markdown([results])
