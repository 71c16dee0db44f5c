"""What the benchmarks found: as JSON, as Markdown, in the README."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks import readme
from benchmarks.plots import plot_growth
from mvshared.benchmark.results import Results, Row, Table, format_table, markdown, read_results, write_results
from mvshared.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
TORCH = Row(
    what="step, 4 views of 128 px",
    backend="torch",
    device="cpu",
    dtype="float32",
    threads=2,
    made=4,
    seconds=(1.0, 4.0, 2.0),
    cpu_seconds=(2.0, 5.0, 3.0),
    flops=10**12,
    peak_flops=2e12,
    peak_cpu_flops=1e12,
    ratios=(0.5, 0.8, 0.6),
    work=(("norms", 0.5, 0), ("linear layers", 1.5, 10**12)),
    peak_memory_bytes=300_000_000,
)
MLX = Row(what="step, 4 views of 128 px", backend="mlx", device="cpu", dtype="float32", threads=1, seconds=(8.0,))
CUDA = Row(what="step", backend="torch", device="CUDA, Some GPU", seconds=(0.5,), device_memory_bytes=2_000_000)
METAL = Row(what="step", backend="mlx", device="Metal, Apple M0", seconds=(0.25,))
FAILED = Row(what="step", backend="torch", dtype="float16", failure="no kernel for a | b")


def results(*rows: Row) -> Results:
    machine = {"cpu": "Some CPU", "cores": 2, "ram_bytes": 2**34, "torch": "2.13.0"}
    return Results(
        machine=machine, settings={"repeats": 3}, tables={"step": Table(title="One step", rows=list(rows), notes=("Look.",))}
    )


def lines_of(text: str) -> list[list[str]]:
    """Cells of the lines of a table, rules left out."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= {"-"}]


def test_tables_are_markdown_with_the_columns_of_all_rows() -> None:
    table = format_table([{"name": "mlx", "seconds": "0.12", "empty": ""}, {"name": "torch", "note": "a | b"}])
    assert table.splitlines() == [
        "| name  | seconds | note   |",
        "| ----- | ------- | ------ |",
        "| mlx   | 0.12    |        |",
        "| torch |         | a \\| b |",
    ]


def test_a_row_shows_median_spread_repeats_and_what_follows_from_them() -> None:
    header, row = lines_of(markdown([results(TORCH)]))
    assert dict(zip(header, row, strict=True)) == {
        "what": "step, 4 views of 128 px",
        "backend": "PyTorch",
        "device": "cpu",
        "dtype": "float32",
        "threads": "2",
        "median (s)": "2",
        "spread": "150 %",
        "repeats": "3",
        "CPU time (s)": "3",
        "views/s": "2",
        "TFLOP/s": "0.5",
        "of peak": "25 %",
        "of peak, CPU time": "33 %",
        "x diffusers": "0.60 (0.50 to 0.80)",
        "peak memory (MB)": "300",
    }


def test_memory_stands_beside_what_was_estimated_and_what_the_weights_need() -> None:
    row = Row(
        what="run",
        load_seconds=0.5,
        load_memory_bytes=5_000_000,
        load_peak_bytes=6_000_000,
        peak_memory_bytes=400_000_000,
        activation_bytes=7_000_000,
        estimated_memory_bytes=300_000_000,
        weights_bytes=100_000_000,
        device_memory_bytes=8_000_000,
    )
    header, shown = lines_of(markdown([results(row)]))
    assert dict(zip(header, shown, strict=True)) == {
        "what": "run",
        "load (s)": "0.5",
        "loaded (MB)": "5",
        "peak of loading (MB)": "6",
        "peak memory (MB)": "400",
        "activations (MB)": "7",
        "estimated (MB)": "300",
        "off by": "-25 %",
        "weights (MB)": "100",
        "peak / weights": "4.00",
        "arrays (MB)": "8",
    }


def test_on_a_gpu_the_time_of_the_cpu_which_waits_is_not_shown() -> None:
    on_cpu = replace(TORCH, cpu_ratios=(0.25, 0.25, 0.25))
    header, cpu, gpu = lines_of(markdown([results(on_cpu, replace(on_cpu, device="CUDA, Some GPU"))]))
    for column, value in (
        ("CPU time (s)", "3"),
        ("of peak, CPU time", "33 %"),
        ("x diffusers, CPU time", "0.25 (0.25 to 0.25)"),
    ):
        assert (cpu[header.index(column)], gpu[header.index(column)]) == (value, "")


def test_one_repeat_has_no_spread() -> None:
    header, row = lines_of(markdown([results(MLX)]))
    assert "median (s)" in header and "spread" not in header
    assert "8" in row


def test_machine_and_settings_are_in_words_with_units() -> None:
    text = markdown([results(TORCH)])
    assert "cpu Some CPU, cores 2, ram 16.0 GiB, torch 2.13.0" in text
    assert "repeats 3" in text


def test_mlx_on_a_cpu_is_called_what_it_is() -> None:
    text = markdown([results(MLX, TORCH)])
    assert [row[1] for row in lines_of(text)] == ["backend", "MLX's CPU backend (not Metal)", "PyTorch"]
    assert "say nothing about MLX on a Mac's GPU" in text
    assert "CPU backend" not in markdown([results(METAL, TORCH)])


def test_a_failed_case_has_its_reason_and_no_time() -> None:
    header, _, failed = lines_of(markdown([results(TORCH, FAILED)]))
    assert failed[header.index("median (s)")] == ""
    assert failed[header.index("not measured because")] == "no kernel for a \\| b"


def test_the_readme_shows_why_something_was_not_measured() -> None:
    assert "no kernel for a" in readme.block([results(TORCH, FAILED)], chosen=readme.short)


def test_results_are_the_same_after_a_file(tmp_path: Path) -> None:
    given = results(TORCH, MLX, CUDA, FAILED)
    write_results(tmp_path / "r.json", given)
    assert read_results(tmp_path / "r.json") == given


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "format_version must be 2"),
        ({"machine": []}, "machine must be an object"),
        ({"tables": {"step": []}}, "the table 'step' must be an object with a list of rows"),
        ({"tables": {"step": {"title": "x"}}}, "the table 'step' must be an object with a list of rows"),
        ({"tables": {"step": {"rows": [{"what": "x", "colour": 1}]}}}, "unknown field 'colour'"),
        ({"tables": {"step": {"rows": [{"what": "x", "seconds": ["fast"]}]}}}, "seconds must be"),
    ],
)
def test_files_of_something_else_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "r.json"
    write_results(path, results(TORCH))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        read_results(path)


def test_replacing_the_block_twice_is_replacing_it_once() -> None:
    text = f"# Title\n\n{readme.BEGIN}\nold\n{readme.END}\n\nThe rest.\n"
    once = readme.replace_measured(text, "new")
    assert once == f"# Title\n\n{readme.BEGIN}\nnew\n{readme.END}\n\nThe rest.\n"
    assert readme.replace_measured(once, "new") == once


@pytest.mark.parametrize(
    "text",
    [
        "# Title\n",
        f"{readme.BEGIN}\n",
        f"{readme.END}\n",
        f"{readme.END}\n{readme.BEGIN}\n",
        f"{readme.BEGIN}\n{readme.BEGIN}\n{readme.END}\n",
    ],
)
def test_a_readme_without_the_two_marks_in_order_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="must have one"):
        readme.replace_measured(text, "new")


def test_the_block_says_what_was_not_measured_and_how_to() -> None:
    text = readme.block([results(MLX, TORCH)])
    assert "**Not in these tables: MLX on a Mac's GPU; PyTorch on CUDA.**" in text
    assert "mvmlx benchmark --json demo.json" in text and "python -m benchmarks.readme demo.json" in text


def test_a_failed_case_counts_as_not_measured() -> None:
    failed = Row(what="step", backend="torch", device="CUDA, Some GPU", failure="out of memory")
    assert "PyTorch on CUDA" in readme.block([results(METAL, TORCH, failed)])


def test_mlx_on_cuda_is_not_taken_for_a_mac() -> None:
    on_cuda = Row(what="step", backend="mlx", device="CUDA, Some GPU", seconds=(0.5,))
    assert "**Not in these tables: MLX on a Mac's GPU; PyTorch on CUDA.**" in readme.block([results(on_cuda, TORCH)])


def test_machines_come_one_after_another_and_nothing_is_missing_when_all_are_there() -> None:
    other = replace(results(CUDA, TORCH), machine={"cpu": "Another CPU"})
    text = readme.block([results(METAL), other])
    assert text.count("Some CPU") == text.count("Another CPU") == 1
    assert text.index("0.25") < text.index("CUDA, Some GPU")
    assert "Not in these tables" not in text


def test_files_of_one_machine_stand_under_it_with_their_own_settings() -> None:
    second = replace(results(MLX), settings={"repeats": 7})
    text = readme.block([results(TORCH), second])
    assert text.count("Some CPU") == 1
    assert text.index("repeats 3") < text.index("PyTorch") < text.index("repeats 7")


def test_the_command_fills_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    for page in ("README.md", "docs/benchmarks.md"):
        (tmp_path / page).write_text((ROOT / page).read_text(encoding="utf-8"), encoding="utf-8")
    tables = {
        "run": Table(title="A whole run", rows=[TORCH]),
        "vae": Table(title="VAE", rows=[MLX]),
        "growth": Table(title="Growth with the views: demo", rows=[replace(TORCH, views=1), replace(TORCH, views=2)]),
    }
    both = Results(machine={"cpu": "Some CPU"}, settings={}, tables=tables)
    write_results(tmp_path / "r.json", both)
    monkeypatch.setattr("sys.argv", ["readme", str(tmp_path / "r.json"), "--root", str(tmp_path)])
    readme.main()
    short, long = ((tmp_path / page).read_text(encoding="utf-8") for page in ("README.md", "docs/benchmarks.md"))
    assert readme.block([both], chosen=readme.short) in short and "### VAE" not in short
    assert "TFLOP/s" not in short and "views/s" in short and "x diffusers" in short
    assert readme.block([both]) in long and "### VAE" in long and "TFLOP/s" in long
    assert "![Time and memory against the arithmetic](images/growth.png)" in long
    assert (tmp_path / "docs" / "images" / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert short.startswith("# mvmlx") and "## File map" in short


def test_the_arithmetic_is_drawn_through_the_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *given, **options: drawn.append(figure))
    rows = [
        Row(what="", device="cpu", views=views, flops=views * 10, seconds=(9.0,), cpu_seconds=(time,), activation_bytes=size)
        for views, time, size in ((1, 1.0, 10**6), (2, 3.0, 10**7))
    ]
    plot_growth([Table(title="Growth with the views: demo", rows=rows)])
    (figure,) = drawn
    curves = [{line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes]
    assert curves == [
        {"arithmetic": [[1, 1.5], [2, 3]], "time": [[1, 1], [2, 3]]},  # of the CPU, on a CPU
        {"arithmetic": [[1, 5], [2, 10]], "memory": [[1, 1], [2, 10]]},
    ]


def test_without_a_series_nothing_is_drawn() -> None:
    assert plot_growth([Table(title="VAE", rows=[TORCH])]) is None
