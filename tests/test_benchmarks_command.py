"""`mvmlx benchmark`: what it measures, what it refuses, and what it writes."""

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from mlx.utils import tree_flatten

import mvtorch.benchmark
from mvshared.backend import PACKAGES
from mvshared.benchmark import against, cases, growth, models, run, settings, suite
from mvshared.benchmark.compare import DIFFERENT, ENDED, Case
from mvshared.benchmark.flops import run_flops
from mvshared.benchmark.growth import Point, measure_growth, points_of, verdicts
from mvshared.benchmark.models import RANDOM, measured, open_model
from mvshared.benchmark.results import Results, Row, Table, read_results
from mvshared.benchmark.run import check_measured, measure
from mvshared.benchmark.settings import Needs, Place, Settings, places, resolved
from mvshared.benchmark.suite import Suite
from mvshared.cli import run as run_command
from mvshared.config import SD21, CLIPImageConfig, CLIPTextConfig, CLIPVisionConfig, KUNetConfig, ResamplerConfig
from mvshared.errors import BackendError, CheckpointError, NumericsError, OptionError, OutputError
from mvshared.guidance import Branch, Call, Guidance
from mvshared.metrics import relative_rms
from mvshared.profiling import Recorder
from mvshared.upscaling.config import UpscalerConfig
from tests.helpers import BACKENDS, TINY_MODEL, TINY_UNET, TINY_VAE, Backend, assert_close, write_tiny_model

TEXT = CLIPTextConfig(vocab_size=49408, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
TINY_SD = replace(TINY_MODEL, family="tiny", unet=TINY_UNET, text_encoder=TEXT, defaults=replace(TINY_MODEL.defaults, views=1))
SMALL_SD_UNET = replace(SD21, block_out_channels=(32, 64, 128, 128), attention_head_dim=16, cross_attention_dim=24)
VISION = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
)
RESAMPLER = ResamplerConfig(
    embedding_dim=32, output_dim=TINY_UNET.cross_attention_dim or 0, hidden_dim=64, depth=2, heads=2, dim_head=32, num_queries=4
)
TINY_IMAGEDREAM = replace(
    TINY_SD,
    unet=replace(TINY_UNET, resampler=RESAMPLER, reference_frame=True),
    image_encoder=VISION,
    image_processor=CLIPImageConfig(crop_size=28),
)
TINY_UPSCALER = UpscalerConfig(
    family="tiny",
    unet=KUNetConfig(
        block_out_channels=(32, 64, 64),
        attention_levels=(False, True, True),
        attention_head_dim=32,
        cross_attention_dim=32,
        layers_per_block=2,
        time_cond_proj_dim=40,
    ),
    vae=TINY_VAE,
    text_encoder=replace(TEXT, hidden_size=32),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("benchmark") / "tiny"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products of matrices, and no more calls than asked for."""
    monkeypatch.setattr(suite, "MATMUL_SIZES", (16,))
    monkeypatch.setattr(run, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(run, "PEAK_REPEATS", 1)


def suite_of(name: str, *, backend: Backend = "torch", dtype: str = "float32", **options: Any) -> Suite:
    given, found = resolved(Settings(model=name, backend=backend, **options))
    place = Place(backend, "cpu", cast(Any, dtype))
    return Suite(settings=given, found=found, place=place, needs=Needs(found, place))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in settings.NAMES if name not in ("start", "upscaler")])
def test_every_case_of_a_folder_runs_again_and_again(backend: Backend, name: str, model: str) -> None:
    found = list(suite_of(model, backend=backend, steps=1).cases(name))
    assert found
    for case in found:
        prepared = case.prepare(**case.arguments)
        prepared.call()
        prepared.call()
        row = Row(**{"what": case.what, **case.row, **prepared.facts()})
        assert row.device == "cpu" and row.peak_memory_bytes
        assert case.needed_bytes > settings.PROCESS_BYTES and not case.refused
        assert name == "load" or row.flops is not None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["condition", "step", "vae", "run"])
def test_every_case_of_random_weights_runs_without_a_file(backend: Backend, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RANDOM, "sd21", TINY_SD)
    for case in suite_of("sd21", backend=backend, names=(name,), steps=1, sizes_px=(32,)).cases(name):
        prepared = case.prepare(**case.arguments)
        result = prepared.call()
        assert result is None or np.isfinite(result).all()
        assert prepared.facts()["device"] == "cpu"


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_upscaler_of_random_weights_runs_without_a_file(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "X2_UPSCALER", TINY_UPSCALER)
    prepared = cases.upscaler_step(backend=backend, device="cpu", dtype="float32", views=2, size_px=32)
    assert prepared.call().shape == (2, 16, 16, 4) and np.isfinite(prepared.call()).all()
    assert prepared.facts()["peak_memory_bytes"]


def test_both_backends_have_the_same_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RANDOM, "sd21", TINY_SD)
    outputs = [
        cases.step(model="sd21", backend=backend, device="cpu", dtype="float32", views=2, size_px=32, guided=True).call()
        for backend in BACKENDS
    ]
    assert_close(outputs[1], outputs[0], rms=2e-5)
    assert np.std(outputs[0]) > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_weights_lie_in_memory_as_loaded_ones_do(backend: Backend, model: str) -> None:
    """Or the speed would be another one."""
    package = importlib.import_module(f"{PACKAGES[backend]}.benchmark")
    loaded: Any = open_model(model, ["unet"], backend=backend, dtype="bfloat16", device="cpu")
    random = package.random_model(TINY_MODEL, ["unet"], dtype="bfloat16", device="cpu")
    theirs, ours = (weights_of(each.unet) for each in (loaded, random))
    assert theirs == ours and len(ours) > 50


def weights_of(network: Any) -> dict[str, Any]:
    """Class of every layer, dtype and strides of every weight; MLX's kernels have a shape that says how they lie."""
    if not hasattr(network, "named_buffers"):
        flat: Any = tree_flatten(network.parameters())
        return {name: (each.shape, each.dtype) for name, each in flat}
    found: dict[str, Any] = {name: type(module) for name, module in network.named_modules()}
    return found | {f"{name}'s": (each.shape, each.dtype, each.stride()) for name, each in network.named_parameters()}


def test_views_sizes_and_guidance_make_a_case_each(model: str) -> None:
    found = list(suite_of(model, views=(1, 2, 5), sizes_px=(32, 64)).cases("step"))
    assert len(found) == 12 and len({case.what for case in found}) == 12
    assert found[0].what == "step, 1 view of 32 px, guided"
    flops = {case.what: case.row["flops"] for case in found}
    assert flops["step, 1 view of 32 px, guided"] == 2 * flops["step, 1 view of 32 px"]
    assert len(list(suite_of(model, views=(1, 2, 5), guidance="off").cases("step"))) == 3


def test_one_number_of_views_is_the_model_s_own_if_that_is_asked_for_and_else_the_first(model: str) -> None:
    for views, chosen in (((1, 2), 2), ((4, 1), 4)):
        given = suite_of(model, views=views, steps=1)
        assert {case.arguments["views"] for name in ("condition", "vae", "upscaler", "run") for case in given.cases(name)} == {
            chosen
        }


def test_a_whole_run_has_the_steps_and_the_guidance_asked_for(model: str) -> None:
    rows: dict[str, list[Any]] = {}
    for guidance in ("both", "off"):
        found = list(suite_of(model, guidance=guidance, steps=7).cases("run"))
        rows[guidance] = [case.row["flops"] for case in found]
        assert {case.arguments["steps"] for case in found} == {case.row["steps"] for case in found} == {7}
        assert {case.arguments["guidance"] for case in found} == {1.0 if guidance == "off" else 2.0}
        assert all(case.what.endswith(", not guided") == (guidance == "off") for case in found)
    assert all(off < 0.6 * on for on, off in zip(rows["both"], rows["off"], strict=True))
    images = [
        cases.generation(
            model=model, backend="torch", device="cpu", dtype="float32", views=1, size_px=32, steps=2, guidance=guidance
        ).call()
        for guidance in (1.0, 5.0, 5.0)
    ]
    assert not np.array_equal(images[0], images[1]) and np.array_equal(images[1], images[2])


def test_a_step_embeds_no_time(model: str) -> None:
    """It was announced, as a run announces its times."""
    loaded, names = open_model(model, ["unet"], backend="torch", dtype="float32", device="cpu"), list[str]()
    call = cases.step_of(loaded, views=1, size_px=32, guided=True)
    with loaded.observe(lambda name, array, seconds: names.append(name)):
        call()
    assert "unet.conv_out" in names and "unet.time_embedding" not in names


@pytest.mark.parametrize("name", ["step", "vae", "upscaler"])
def test_arithmetic_of_every_case_is_what_pytorch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr("mvtorch.model.pack_network", lambda network: None)  # packed layers are not counted
    monkeypatch.setitem(RANDOM, "sd21", TINY_SD)
    for module in (cases, suite):
        monkeypatch.setattr(module, "X2_UPSCALER", TINY_UPSCALER)
    found = list(suite_of("sd21", views=(3,), sizes_px=(64,), guidance="off").cases(name))
    for case in found:
        prepared = case.prepare(**case.arguments)
        prepared.call()
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            prepared.call()
        assert case.row["flops"] == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert len(found) == (2 if name == "vae" else 1)


def test_a_gpu_of_any_number_multiplies_large_matrices_and_has_a_share_of_its_own_memory(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = suite_of(model)
    for device, sizes in (("cuda:1", (2048, 4096, 8192)), ("cpu", (1024, 2048))):
        products = replace(given, place=given.place._replace(device=device)).matmul()
        assert [(case.arguments["size"], case.row["flops"]) for case in products] == [(size, 2 * size**3) for size in sizes]
    monkeypatch.setattr(settings, "free_memory_bytes", lambda: 7)
    monkeypatch.setattr("mvtorch.benchmark.device_memory_bytes", lambda device: 1000 if device == "cuda:1" else None)
    limits = [settings.memory_limit(given.place._replace(device=device)) for device in ("cuda:1", "cpu")]
    assert limits == [900, 7]


def test_the_names_without_any_are_those_that_take_a_minute(model: str) -> None:
    assert resolved(Settings(model=model))[0].names == ("start", "load", "condition", "step", "vae", "run")
    assert resolved(Settings(model="sd21"))[0].names == ("start", "condition", "step", "vae", "upscaler")
    assert resolved(Settings(model="sd21", against="diffusers"))[0].names == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"names": ("weather",)}, "name must be one of start, load"),
        ({"names": ("growth", "step")}, "growth alone"),
        ({"guidance": "yes"}, "on, off or both"),
        ({"against": "nothing"}, "against must be diffusers"),
        ({"compiled": "default"}, "together with --against"),
        ({"compiled": "fastest", "against": "diffusers"}, "one of default, reduce-overhead, max-autotune"),
        ({"repeats": 0}, "repeats must be"),
        ({"threads": 0}, "threads must be"),
        ({"views": (0,)}, "views must be"),
        ({"backend": "jax"}, "auto, mlx or torch"),
    ],
)
def test_options_that_say_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Settings(**options)


def test_a_size_that_the_model_cannot_make_is_refused(model: str) -> None:
    with pytest.raises(OptionError, match="sizes must be a multiple of 8"):
        resolved(Settings(model=model, sizes_px=(33,)))
    with pytest.raises(CheckpointError, match="no such model"):
        resolved(Settings(model="weather"))


def test_mlx_on_a_cpu_is_measured_only_where_it_is_named() -> None:
    chosen, notes = places(Settings(dtypes=("float32",), device="cpu"))
    assert [place.backend for place in chosen] == ["torch"] and "--backend mlx" in notes[0]
    chosen, notes = places(Settings(backend="mlx", dtypes=("float32", "float16"), device="cpu"))
    assert [place.dtype for place in chosen] == ["float32", "float16"] and not notes


def test_a_backend_without_the_device_is_left_out_unless_it_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvtorch.model.choose_device", lambda device: device)
    monkeypatch.setattr(settings, "available_backends", lambda: ["mlx", "torch"])
    chosen, notes = places(Settings(dtypes=("float32",), device="mps"))
    assert [(place.backend, place.device) for place in chosen] == [("torch", "mps")]
    assert notes == ["Not measured: MLX has the devices cpu and gpu, got 'mps'."]
    monkeypatch.setattr(settings, "available_backends", lambda: ["mlx"])
    with pytest.raises(BackendError, match="MLX has the devices"):
        places(Settings(dtypes=("float32",), device="mps"))


def test_numbers_that_are_given_twice_are_measured_once_and_series_go_upwards(model: str) -> None:
    given, _ = resolved(Settings(model=model, views=(2, 1, 2), sizes_px=(64, 32, 64)))
    assert (given.views, given.sizes_px) == ((2, 1), (64, 32))
    growing = suite_of(model, views=(4, 1, 4), sizes_px=(64, 32))
    assert [point.views for point in points_of(growing, "views")] == [1, 4]
    assert [point.size_px for point in points_of(growing, "pixels")] == [32, 64]


def test_what_does_not_fit_into_memory_says_so(model: str, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "free_memory_bytes", lambda: 5_000_000)
    options: dict[str, Any] = {"model": model, "backend": "torch", "device": "cpu", "dtypes": ("float32",), "repeats": 1}
    asked: tuple[dict[str, Any], ...] = ({"names": ("vae",)}, {"against": "diffusers"})
    for given in asked:
        tables = measure(Settings(**options, **given), lambda line: None).tables
        rows = [row for name, table in tables.items() if name != "matmul" for row in table.rows]
        assert rows
        assert all("needs about" in row.failure and "0.0 GB are free" in row.failure for row in rows)


def test_the_command_writes_what_it_prints(model: str, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "r.json"
    options = ["--model", model, "--backend", "torch", "--device", "cpu", "--dtype", "float32", "--repeats", "1"]
    assert (
        run_command(["benchmark", "step", "start", *options, "--guidance", "off", "--threads", "1", "--json", str(file)]) == 0
    )
    printed = capsys.readouterr().out
    results = read_results(file)
    assert list(results.tables) == ["start", "matmul", "step"]
    (row,) = results.tables["step"].rows
    assert (row.backend, row.device, row.dtype, row.threads, row.failure) == ("torch", "cpu", "float32", 1, "")
    assert row.seconds and row.cpu_seconds and row.flops and row.peak_flops and row.peak_cpu_flops
    assert "of peak" in printed and "step, 2 views of 32 px" in printed
    assert str(tmp_path) not in json.dumps(dict(results.machine)) and "threads 1" in printed


def test_every_option_of_the_command_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Settings] = []

    def measured_settings(settings: Settings, *rest: Any, **options: Any) -> Results:
        given.append(settings)
        return Results(machine={}, settings={}, tables={})

    monkeypatch.setattr("mvshared.commands.benchmark.measure", measured_settings)
    chosen: dict[str, Any] = {"model": "sd21", "backend": "torch", "device": "cpu", "guidance": "on", "steps": 3, "repeats": 2}
    chosen |= {"threads": 4, "against": "diffusers"}
    options = [text for name, value in chosen.items() for text in (f"--{name}", str(value))]
    options += [
        "--dtype",
        "float16",
        "--dtype",
        "float32",
        "--views",
        "1,4",
        "--sizes",
        "64",
        "--compiled=default",
        "--json",
        "-",
    ]
    assert run_command(["benchmark", "step", "vae", *options]) == 0
    assert given == [
        Settings(
            **chosen,
            names=("step", "vae"),
            dtypes=("float16", "float32"),
            views=(1, 4),
            sizes_px=(64,),
            compiled="default",
        )
    ]


def test_what_was_measured_before_a_run_broke_off_is_printed_and_written(
    model: str, quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Suite, name: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Suite, "cases", lambda self, name: [] if name == "step" else interrupted(self, name))
    monkeypatch.setattr("mvshared.benchmark.run._Timing.guess", lambda *given: None)
    options = ["--model", model, "--backend", "torch", "--device", "cpu", "--dtype", "float32", "--repeats", "1"]
    (tmp_path / "r.json").write_text("of an earlier run")
    assert run_command(["benchmark", "start", "step", "vae", *options, "--json", str(tmp_path / "r.json")]) == 130
    assert list(read_results(tmp_path / "r.json.partial").tables) == ["start", "matmul", "step"]
    assert (tmp_path / "r.json").read_text() == "of an earlier run"
    assert "mvmlx --help, new process" in capsys.readouterr().out
    assert run_command(["benchmark", "start", *options, "--json", str(tmp_path / "r.json")]) == 0
    assert list(read_results(tmp_path / "r.json").tables) == ["start"] and not (tmp_path / "r.json.partial").exists()


def test_a_file_that_cannot_be_written_does_not_keep_the_tables_from_being_printed(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, results: Results) -> None:
        raise OutputError("cannot be written: No space left on device", path=path)

    monkeypatch.setattr("mvshared.commands.benchmark.write_results", full)
    command = ["benchmark", "start", "--model", model, "--repeats", "1", "--json", str(tmp_path / "r.json")]
    assert run_command(command) == OutputError.exit_code
    assert "mvmlx --help, new process" in capsys.readouterr().out


def test_json_is_printed_where_the_file_is_a_dash(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["benchmark", "start", "--model", model, "--repeats", "1", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["format_version"] == 2


def test_numbers_that_are_not_whole_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["benchmark", "--views", "1,2.5"]) == 2
    assert "views must be whole numbers" in capsys.readouterr().err


def test_diffusers_does_the_same_work_in_turns_and_has_a_ratio(model: str, quick: None) -> None:
    options: dict[str, Any] = {"model": model, "backend": "torch", "device": "cpu", "dtypes": ("float32",), "repeats": 2}
    results = measure(Settings(**options, against="diffusers", views=(2,)), lambda line: None)
    check_measured(results)
    rows = results.tables["against"].rows
    assert [(row.backend, row.variant) for row in rows] == 2 * [
        ("torch", ""),
        ("diffusers", "eager, channels_last"),
        ("diffusers", "eager"),
    ]
    assert all(len(row.seconds) == len(row.ratios) == len(row.cpu_ratios) == 2 and not row.failure for row in rows)
    for three in (rows[:3], rows[3:]):
        assert any(row.ratios == (1.0, 1.0) for row in three[1:])


@pytest.mark.parametrize("name", ["sd21", "folder"])
def test_diffusers_computes_the_same_from_random_weights_and_from_files(
    name: str, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RANDOM, "sd21", TINY_SD)
    shared: dict[str, Any] = {"model": model if name == "folder" else name, "device": "cpu", "dtype": "float32"}
    shared |= {"views": 2, "size_px": 32}
    ours = cases.step(**shared, backend="torch", guided=True).call()
    for layout in against.EAGER:
        theirs = against.diffusers_work(**shared, call="step", guided=True, layout=layout, compiled=None)
        assert_close(theirs.call(), ours, rms=2e-5)
        assert theirs.facts()["threads"]


def test_the_layout_of_diffusers_is_what_its_name_says() -> None:
    import torch

    module = importlib.import_module("mvtorch.diffusers_model")
    for layout, memory_format in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        network = module.DiffusersModel(TINY_SD, dtype="bfloat16", device="cpu", parts=["unet"], layout=layout)._networks[
            "unet"
        ]
        kernel = network.conv_in.weight
        assert kernel.is_contiguous(memory_format=memory_format) and kernel.dtype == torch.bfloat16


def test_every_side_of_diffusers_is_what_its_row_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layout, dtype and compilation; and on a CPU as many views are decoded together as are fastest, two of 128 x 128."""
    import torch

    module: Any = importlib.import_module("mvtorch.diffusers_model")
    made: list[Any] = []

    class Kept(module.DiffusersModel):
        modes: tuple[str, ...] = ()

        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, **options)
            made.append(self)

        def compile(self, mode: str) -> None:
            self.modes = (*self.modes, mode)

    monkeypatch.setattr(module, "DiffusersModel", Kept)
    monkeypatch.setitem(RANDOM, "sd21", TINY_SD)
    options: dict[str, Any] = {"views": (2,), "sizes_px": (32,), "against": "diffusers", "compiled": "default"}
    expected = {
        "compiled": (torch.channels_last, ("default",)),
        "eager, channels_last": (torch.channels_last, ()),
        "eager": (torch.contiguous_format, ()),
    }
    for group in suite_of("sd21", dtype="bfloat16", **options).against():
        for case in group[1:]:
            case.prepare(**case.arguments)
        assert {
            case.row["variant"]: (side.memory_format, side.modes) for case, side in zip(group[1:], made, strict=True)
        } == expected
        assert {(side.dtype, side.vae_batch) for side in made} == {("bfloat16", 2 * 128**2 // 32**2)}
        made.clear()


def test_on_a_gpu_both_sides_are_on_the_same_one_and_recorded_calls_of_ours_do_not_count(model: str) -> None:
    given = suite_of(model, against="diffusers", views=(1, 4, 2))
    for backend, device, warm_up, theirs in (
        ("torch", "cuda:1", 3, "cuda:1"),
        ("mlx", "gpu", 1, "mps"),
        ("torch", "cpu", 1, "cpu"),
    ):
        groups = replace(given, place=Place(cast(Any, backend), device, "float16")).against()
        assert [(group[0].arguments["views"], len(group)) for group in groups] == [(1, 3), (4, 3), (2, 3), (4, 3)]
        for ours, *others in groups:
            assert (ours.arguments["device"], ours.warm_up) == (device, warm_up)
            assert {(case.arguments["device"], case.arguments["views"]) for case in others} == {
                (theirs, ours.arguments["views"])
            }


def test_a_ratio_is_of_the_best_eager_diffusers_turn_by_turn() -> None:
    rows = [
        Row(what="ours", backend="torch", seconds=(1.0, 4.0), cpu_seconds=(2.0, 2.0)),
        Row(what="fast", backend="diffusers", variant="compiled", seconds=(0.5, 0.5), cpu_seconds=(1.0, 1.0)),
        Row(what="slow", backend="diffusers", variant="eager, channels_last", seconds=(1.0, 9.0), cpu_seconds=(9.0, 9.0)),
        Row(what="best", backend="diffusers", variant="eager", seconds=(2.0, 5.0), cpu_seconds=(4.0, 8.0)),
    ]
    assert [row.ratios for row in against.with_ratios(rows)] == [(0.5, 0.8), (0.25, 0.1), (0.5, 1.8), (1.0, 1.0)]
    assert against.with_ratios(rows)[0].cpu_ratios == (0.5, 0.25)
    assert against.with_ratios(rows[:2]) == rows[:2]


def test_other_results_than_diffusers_are_an_error() -> None:
    row = Row(what="step", backend="torch", dtype="float32", failure=f"{DIFFERENT}: relative RMS difference 0.5, allowed 0.1")
    results = Results(machine={}, settings={}, tables={"against": Table(title="", rows=[row])})
    with pytest.raises(NumericsError, match=r"step: computes something else.*torch in float32"):
        check_measured(results)


def test_a_case_whose_process_ended_is_an_error_and_one_that_was_left_out_is_none() -> None:
    def results(failure: str) -> Results:
        row = Row(what="step", backend="diffusers", variant="eager", dtype="float32", failure=failure)
        return Results(machine={}, settings={}, tables={"against": Table(title="", rows=[row])})

    with pytest.raises(
        BackendError, match=r"step, diffusers, eager in float32: its process ended: ValueError: no \(exit code 1\)"
    ):
        check_measured(results(f"{ENDED}: ValueError: no (exit code 1)"))
    check_measured(results("needs about 5 GB, 4 GB are free"))
    start = Table(title="", rows=[Row(what="mvmlx --help", failure=f"{ENDED}: (exit code 7)")])
    with pytest.raises(BackendError, match=r"^mvmlx --help: its process ended: \(exit code 7\)"):
        check_measured(Results(machine={}, settings={}, tables={"start": start}))


def test_half_precision_is_not_timed_where_the_same_work_differs_in_float32(
    model: str, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    exact: list[Any] = []

    def compared(group: list[Case], *, repeats: int, agree: float | None = None, **options: Any) -> list[Row]:
        case, given = group[0].arguments, options.get("environment", {})
        asked.append((*(case.get(name) for name in ("dtype", "views", "size_px")), len(group), repeats, agree))
        exact.append(given if repeats == 0 else {name for name in given if name.startswith("MLX_")})
        failure = differs if case.get("dtype") == "float32" and "step" in group[0].what else ""
        return [Row(what=each.what, backend=each.row.get("backend", "torch"), failure=failure) for each in group]

    monkeypatch.setattr(run, "compare", compared)
    given = Settings(
        model=model, backend="torch", device="cpu", dtypes=("bfloat16",), against="diffusers", views=(4,), repeats=3
    )
    differs = ""
    assert [row.failure for row in measure(given, lambda line: None).tables["against"].rows] == [""] * 6
    small, half = ("float32", 2, 16, 3, 0, 1e-4), ("bfloat16", 4, 32, 3, 3, 0.1)
    assert asked[1:] == [small, small, half, half]  # a step and decoding each, after the products
    variables = {"MLX_ENABLE_TF32": "0", "MLX_CONV_WINOGRAD": "0", "MLX_CONV_WINOGRAD_WORKING_SET": "1"}
    assert exact[1:] == [variables, variables, set(), set()]  # what is timed is what a run takes
    asked.clear()
    differs = f"{DIFFERENT}: relative RMS difference 0.5, allowed 0.0001"
    results = measure(given, lambda line: None)
    assert asked[1:] == [small, small]
    assert [row.failure for row in results.tables["against"].rows] == [differs] * 3
    asked.clear()
    both = measure(replace(given, dtypes=("bfloat16", "float16")), lambda line: None).tables["against"].rows
    assert asked.count(small) == 2 and [row.failure for row in both] == [differs] * 6
    with pytest.raises(NumericsError, match="computes something else"):
        check_measured(results)


def test_every_comparison_and_timing_has_the_limits_of_its_dtype_and_the_threads_asked_for(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def compared(
        group: list[Case],
        *,
        repeats: int,
        environment: dict[str, str],
        agree: float | None = None,
        least_seconds: float = 0.0,
    ) -> list[Row]:
        threads = {environment.get(name) for name in run.THREADS}
        exact = environment.get("MLX_ENABLE_TF32") == "0"
        asked.append((group[0].arguments["dtype"], len(group), repeats, least_seconds, agree, exact, threads))
        return [Row(what=each.what, backend="torch") for each in group]

    monkeypatch.setattr(run, "compare", compared)
    given: dict[str, Any] = {"backend": "torch", "device": "cpu", "dtypes": ("float32", "float16"), "views": (1,)}
    given |= {"against": "diffusers", "compiled": "default", "repeats": 2, "threads": 3}
    measure(Settings(model=model, **given), lambda line: None)
    products = [(dtype, 2, 10, 1.0, None, False, {"3"}) for dtype in ("float32", "float16")]
    assert [each for each in asked if each[4] is None] == products
    step_and_decoding = [("float32", 4, 2, 1.0, 1e-4, False, {"3"})] * 2
    compared_before = [("float32", 3, 0, 0.0, 1e-4, True, {"3"})] * 2  # without the compiled side, which takes minutes
    timed = [("float16", 4, 2, 1.0, 2e-2, False, {"3"})] * 2
    assert [each for each in asked if each[4] is not None] == [*step_and_decoding, *compared_before, *timed]


def test_the_peak_is_the_best_call_of_the_best_size_and_diffusers_has_that_of_pytorch() -> None:
    rows = [
        Row(what="1 x 1", flops=100, seconds=(2.0, 1.0), cpu_seconds=(4.0, 2.0)),
        Row(what="2 x 2", flops=800, seconds=(8.0, 4.0), cpu_seconds=(20.0, 10.0)),
        Row(what="3 x 3", failure="no memory"),
    ]
    assert run._peak(rows) == (200.0, 80.0)
    peaks = {("torch", "float32"): (200.0, 80.0), ("mlx", "float32"): (7.0, 7.0)}
    for backend, dtype, peak in (("diffusers", "float32", 200.0), ("mlx", "float32", 7.0), ("torch", "float16", None)):
        assert run._beside(Row(what="", backend=backend, dtype=dtype), peaks).peak_flops == peak


def test_what_takes_minutes_is_said_before(model: str) -> None:
    given, lines = suite_of(model, names=("step",), repeats=4), list[str]()
    flops = sum(case.row["flops"] for case in given.cases("step"))
    timing = run._Timing(given.settings, {}, lines.append)
    for peak in (flops / 18, flops):  # 5 calls of a minute at 0.3 of it, and of 3.3 seconds
        timing.guess([given], {("torch", "float32"): (peak, 1.0)})
    assert lines == ["this is going to take about 5 minutes, and loading"]


@pytest.mark.parametrize("left_out", ["joint attention", "text", "middle"])
def test_every_part_of_a_network_of_random_weights_counts_in_its_result(left_out: str) -> None:
    """Or a side that leaves it out would pass for one that computes the same."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    module = importlib.import_module("mvtorch.diffusers_model")
    loaded = module.DiffusersModel(replace(TINY_SD, unet=SMALL_SD_UNET), dtype="float32", device="cpu", parts=["unet"])
    call, unet = cases.step_of(loaded, views=2, size_px=64, guided=True), loaded._networks["unet"]
    expected = call().copy()
    if left_out == "middle":
        unet.mid_block.register_forward_hook(lambda module, given, out: given[0])
    else:
        kept, ending = dict(unet.attn_processors), ".attn1.processor" if left_out == "joint attention" else ".attn2.processor"
        other = AttnProcessor2_0() if left_out == "joint attention" else lambda attn, tokens, *given, **options: 0 * tokens
        unet.set_attn_processor({name: other if name.endswith(ending) else each for name, each in kept.items()})
    assert relative_rms(call(), expected) > 2 * against.AGREE["float16"]


@pytest.mark.parametrize("pictures", [False, True])
def test_arithmetic_of_diffusers_is_what_pytorch_counts_in_a_step(pictures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    name = "imagedream" if pictures else "sd21"
    monkeypatch.setitem(RANDOM, name, TINY_IMAGEDREAM if pictures else TINY_SD)
    group = suite_of(name, against="diffusers", views=(3,), sizes_px=(32,)).against()[0]
    theirs = against.diffusers_work(**group[-1].arguments)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        theirs.call()
    ours, reckoned, counted = group[0].row["flops"], group[-1].row["flops"], counter.get_total_flops()
    assert reckoned == pytest.approx(counted, rel=2e-3)  # which has an embedding of the time for every frame
    assert ours < 0.99 * counted


def test_diffusers_that_is_not_installed_says_how_to_install_it(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "diffusers.models.unets.unet_2d_condition", None)
    with pytest.raises(BackendError, match=r"diffusers is not installed .*mvmlx\[validate\]"):
        against.diffusers_work(
            call="step",
            model=model,
            device="cpu",
            dtype="float32",
            views=1,
            size_px=32,
            guided=True,
            layout="contiguous",
            compiled=None,
        )


def test_compiled_code_is_kept_in_a_folder_of_its_own(model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    group = suite_of(model, against="diffusers", compiled="max-autotune").against()[0]
    compiled = next(case for case in group if case.arguments.get("compiled"))
    assert compiled.cache == tmp_path / "mvmlx" / "inductor"
    assert compiled.environment == {"TORCHINDUCTOR_CACHE_DIR": str(compiled.cache)}
    assert compiled.warm_up > 1 and group[-1].arguments["layout"] == "contiguous"


@pytest.mark.parametrize("backend", BACKENDS)
def test_growth_is_measured_for_every_size_in_one_process(backend: Backend, model: str) -> None:
    given = suite_of(model, backend=backend, views=(1, 2), repeats=2)
    table = measure_growth(given, "views", limit_bytes=10**12, environment={})
    assert [(row.views, row.failure, len(row.seconds)) for row in table.rows] == [(1, "", 2), (2, "", 2)]
    for row in table.rows:
        assert row.work and sum(flops for _, _, flops in row.work) == pytest.approx(row.flops, rel=0.02)
    assert "verdict" in table.notes[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kinds_of_work_add_up_to_the_time_of_the_network(
    backend: Backend, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Recorder] = []

    def kept() -> Recorder:
        made.append(Recorder())
        return made[-1]

    monkeypatch.setattr(growth, "Recorder", kept)
    loaded = open_model(model, ["unet"], backend=backend, dtype="float32", device="cpu")
    work = growth.work_of(loaded, cases.step_of(loaded, views=1, size_px=32, guided=False))
    (network,) = (event for event in made[0].events if event.name == "unet")
    assert len(work) > 3 and sum(seconds for _, seconds, _ in work) == pytest.approx(network.seconds)


@pytest.mark.parametrize(("warm_up", "before"), [(1, 1 + 2), (3, 0)])
def test_where_calls_get_recorded_a_series_measures_memory_before_and_time_after_that(
    model: str, monkeypatch: pytest.MonkeyPatch, warm_up: int, before: int
) -> None:
    calls, measured = list[int](), list[int]()

    def memory(model: Any, call: Any) -> int:
        measured.append(len(calls))
        call()
        return 7

    monkeypatch.setattr(growth, "warm_up_of", lambda device: warm_up)
    monkeypatch.setattr(growth, "step_of", lambda *_, **__: lambda: calls.append(1))
    monkeypatch.setattr(growth, "activation_bytes", memory)
    options: dict[str, Any] = {"backend": "torch", "device": "cpu", "dtype": "float32", "guided": False, "whole": False}
    made = growth.series(model=model, points=[{"views": 1, "size_px": 32, "steps": 1}], repeats=2, **options)
    made.call()
    (row,) = made.facts()["points"]
    assert (len(row["seconds"]), row["activation_bytes"], measured) == (2, 7, [before])
    assert len(calls) == warm_up + 2 + (2 if warm_up == 1 else 1)  # with those for memory and for the kinds of work


def test_sizes_of_a_series_take_turns_and_the_first_time_of_each_does_not_count(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, called = 0.0, list[int]()

    def step_of(loaded: Any, *, views: int, **options: Any) -> Any:
        def call() -> None:
            nonlocal now
            now += views if views in called else 1000
            called.append(views)

        return call

    monkeypatch.setattr(growth, "step_of", step_of)
    monkeypatch.setattr(growth, "activation_bytes", lambda model, call: None)
    monkeypatch.setattr(growth, "work_of", lambda model, call: [])
    monkeypatch.setattr(growth, "time", SimpleNamespace(perf_counter=lambda: now))
    options: dict[str, Any] = {"backend": "torch", "device": "cpu", "dtype": "float32", "guided": False, "whole": False}
    points = [{"views": views, "size_px": 32, "steps": 1} for views in (1, 2)]
    made = growth.series(model=model, points=points, repeats=2, **options)
    made.call()
    assert called == [1, 2] * 3
    assert [row["seconds"] for row in made.facts()["points"]] == [[1, 1], [2, 2]]


def test_activations_are_what_a_call_takes_on_top_of_what_is_there_before_it(model: str) -> None:
    import mlx.core as mx

    loaded = open_model(model, ["vae"], backend="mlx", dtype="float32", device="cpu")
    kept = mx.arange(2**23, dtype=mx.float32)
    mx.eval(kept)
    mx.eval(mx.arange(2**24, dtype=mx.float32))  # an earlier call that took more
    taken = growth.activation_bytes(loaded, lambda: mx.eval(mx.arange(2**22, dtype=mx.float32)))
    assert taken == pytest.approx(2**24, rel=0.01)
    assert kept.nbytes == 2**25


def test_growth_takes_the_usual_sizes_or_those_asked_for_in_the_dtype_of_the_device(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []

    def measured_growth(suite: Suite, axis: growth.Axis, **options: Any) -> Table:
        points = [(point.views, point.size_px, point.steps) for point in points_of(suite, axis)]
        asked.append((suite.place.dtype, axis, points))
        return Table(title=axis, rows=[])

    both = [Place("torch", "cpu", "float32"), Place("torch", "cpu", "bfloat16")]
    monkeypatch.setattr(run, "places", lambda settings: (both, []))
    monkeypatch.setattr(run, "measure_growth", measured_growth)
    measure(Settings(model=model, names=("growth",), sizes_px=(64,), steps=3), lambda line: None)
    assert asked == [
        ("bfloat16", "views", [(views, 32, 1) for views in growth.VIEWS]),
        ("bfloat16", "pixels", [(2, 64, 1)]),
        ("bfloat16", "steps", [(2, 32, 1), (2, 32, 2)]),
    ]
    asked.clear()
    tables = measure(Settings(model=model, names=("growth",), dtypes=("float32", "bfloat16")), lambda line: None).tables
    assert [dtype for dtype, *_ in asked] == ["float32"] * 3 + ["bfloat16"] * 3 and len(tables) == 6


def test_cases_that_do_not_fit_into_memory_together_are_timed_apart_and_sides_to_compare_not_at_all(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def compared(group: list[Case], **options: Any) -> list[Row]:
        asked.append([case.what for case in group if not case.refused])
        return [Row(what=case.what, failure=case.refused) for case in group]

    monkeypatch.setattr(run, "compare", compared)
    monkeypatch.setattr(run, "memory_limit", lambda place: 10**9)
    group = [
        Case(what=what, prepare=cases.step, arguments={"dtype": "float32"}, needed_bytes=needed)
        for what, needed in (("a", 6 * 10**8), ("b", 7 * 10**8), ("c", 2 * 10**9))
    ]
    timing, place = run._Timing(suite_of(model).settings, {}, lambda line: None), Place("torch", "cpu", "float32")
    rows = timing.rows(group, place=place)
    assert asked == [["a"], ["b"], []]
    assert [row.failure for row in rows] == ["", "", "needs about 2.0 GB of memory, 1.0 GB are free"]
    rows = timing.rows(group[:2], place=place, together=True)
    reason = "needs about 1.3 GB of memory, 1.0 GB are free; all sides have to be in memory"
    assert asked[3:] == [[]] and [row.failure for row in rows] == [reason] * 2


def test_every_case_that_is_recorded_on_a_gpu_has_its_calls_left_out(model: str) -> None:
    given = suite_of(model, backend="torch")
    given = replace(given, place=given.place._replace(device="cuda"))
    cases = [case for name in ("step", "vae", "upscaler") for case in given.cases(name)]
    assert {case.warm_up for case in cases} == {3}


@pytest.mark.parametrize(("guidance", "branches"), [("both", 2), ("on", 2), ("off", 1)])
def test_whole_runs_of_a_series_are_guided_unless_that_is_off(
    guidance: str, branches: int, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, given = list[int](), suite_of(model, guidance=guidance, steps=1, repeats=1)

    def calls(strength: Guidance, there: Branch, *, steps: int) -> list[Call]:
        found = plain(strength, there, steps=steps)
        asked.extend(len(call.mixture.branches) for call in found)
        return found

    plain = Guidance.calls
    monkeypatch.setattr(Guidance, "calls", calls)
    monkeypatch.setattr(growth, "running", in_this_process)
    (row,) = measure_growth(given, "steps", limit_bytes=10**12, environment={}).rows
    assert set(asked) == {branches}
    reckoned = run_flops(given.config, views=2, size_px=32, steps=1, branches=branches).all
    assert row.flops == reckoned and row.what.endswith(", not guided") == (branches == 1)


@contextmanager
def in_this_process(case: Case, **options: Any) -> Iterator[Any]:
    """What `running` gives, without a process of its own."""
    prepared = case.prepare(**case.arguments)
    yield SimpleNamespace(call=prepared.call, facts=prepared.facts, failure="")


def test_a_size_of_a_series_that_does_not_fit_is_left_out(model: str) -> None:
    given = suite_of(model, sizes_px=(32, 1024), repeats=1)
    needed = [given.needs.stage("unet", views=2, size_px=size, guided=False) for size in (32, 1024)]
    table = measure_growth(given, "pixels", limit_bytes=sum(needed) // 2, environment={})
    assert [bool(row.seconds) for row in table.rows] == [True, False]
    assert "needs about" in table.rows[1].failure


def test_the_series_have_their_usual_sizes_unless_others_are_asked_for(model: str) -> None:
    given = suite_of(model)
    plain = replace(given, settings=replace(given.settings, views=(), sizes_px=(), steps=None))
    assert [point.views for point in points_of(plain, "views")] == [1, 2, 4, 8, 16]
    assert [point.size_px for point in points_of(plain, "pixels")] == [128, 256, 384, 512, 768]
    assert points_of(plain, "steps")[-1] == Point(views=2, size_px=32, steps=16)
    assert growth.axes(plain) == ["views", "pixels", "steps"]


def test_growth_beyond_the_arithmetic_is_named_with_what_explains_it() -> None:
    small = Row(
        what="small",
        device="cpu",
        flops=100,
        seconds=(9.0,),
        cpu_seconds=(1.0,),
        activation_bytes=100,
        work=(("self-attention", 0.4, 40), ("norms", 0.6, 0)),
    )
    same = replace(small, what="same", flops=400, cpu_seconds=(4.4,), activation_bytes=440)
    grown = replace(
        small,
        what="grown",
        flops=400,
        cpu_seconds=(6.0,),
        activation_bytes=800,
        work=(("self-attention", 3.4, 160), ("norms", 2.6, 0)),
    )
    (fine,), (bad,) = verdicts([small, same]), verdicts([small, grown])
    assert fine["verdict"] == "no faster than the arithmetic" and (fine["arithmetic"], fine["time"]) == ("x 4.00", "x 4.40")
    assert bad["verdict"].startswith("time 1.50x as fast as the arithmetic: self-attention has 90 % of the excess")
    assert bad["verdict"].endswith("memory 2.00x as fast as the arithmetic")
    assert verdicts([small, replace(grown, seconds=())]) == []


def test_a_name_that_is_not_downloaded_has_random_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MVMLX_HOME", str(tmp_path))
    assert measured("imagedream").folder is None and measured("imagedream").config is models.RANDOM["imagedream"]
    assert measured("demo").folder is not None
    with pytest.raises(CheckpointError):
        measured("sd15")


def test_matrix_products_are_waited_for() -> None:
    for backend in BACKENDS:
        package = importlib.import_module(f"{PACKAGES[backend]}.benchmark")
        assert package.matrix_product(8, dtype="float32", device="cpu")() is None
        package.wait("cpu")
        assert package.device_facts("cpu")["threads"] >= 1
        assert package.device_memory_bytes("cpu") is None


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_matrices_have_the_dtype_whose_peak_is_measured(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx
    import torch

    multiplied: list[Any] = []
    monkeypatch.setattr(torch, "mm", lambda a, b: multiplied.extend((a.dtype, b.dtype)))
    monkeypatch.setattr(mx, "eval", lambda *arrays: multiplied.extend(each.dtype for each in arrays))
    expected = {"torch": getattr(torch, dtype), "mlx": getattr(mx, dtype)}
    for backend in BACKENDS:
        importlib.import_module(f"{PACKAGES[backend]}.benchmark").matrix_product(8, dtype=dtype, device="cpu")()
        assert multiplied and set(multiplied) == {expected[backend]}
        multiplied.clear()


def test_a_gpu_is_named_with_the_memory_of_its_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx
    import torch

    import mvmlx.benchmark

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"name of {device}")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    assert mvtorch.benchmark.device_facts("cuda:1") == {"device": "CUDA, name of cuda:1", "device_memory_bytes": 5}
    monkeypatch.setattr(mx, "device_info", lambda *_: {"device_name": "Apple M0"})
    monkeypatch.setattr(mx, "get_peak_memory", lambda: 6)
    for metal, kind in ((True, "Metal"), (False, "CUDA")):
        monkeypatch.setattr(mx.metal, "is_available", lambda metal=metal: metal)
        assert mvmlx.benchmark.device_facts("gpu") == {"device": f"{kind}, Apple M0", "device_memory_bytes": 6}
