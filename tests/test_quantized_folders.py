"""Quantised checkpoint folders: how they are made, that both backends load them, and who refuses them."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from helpers import BACKENDS, TINY_MODEL, Backend, relative_rms, write_tiny_model
from PIL import Image
from upscalers import write_tiny_models

from mvshared.backend import load, load_upscaler
from mvshared.checkpoint import find_model, read_model_config, weight_files
from mvshared.cli import run
from mvshared.conversion.convert import convert
from mvshared.conversion.folders import STATE
from mvshared.errors import CheckpointError, NumericsError, OptionError, OutputError, TensorMismatchError
from mvshared.images import load_image
from mvshared.inspection import inspect
from mvshared.metrics import psnr
from mvshared.quantization.folders import quantize_folder
from mvshared.quantization.plans import METADATA, preset_layers, quantizable, quantized_shapes, with_bits
from mvshared.validation import validate
from mvshared.weights import choose_quantization, match_tensors, read_dequantized, read_weights, stored_quantization
from mvtorch.model import network_shapes

FIXTURES = Path(__file__).parent / "fixtures"
PICTURE = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def tiny_q4(tiny: Path) -> Path:
    quantize_folder(tiny, tiny.parent / "q4", preset="q4", measure=False, backend="torch")
    return tiny.parent / "q4"


def unet_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return network_shapes(read_model_config(folder).unet)


def rewrite(file: Path, change: Any) -> None:
    """Write a quantised file again; `change(weights, document)` changes its tensors and its metadata."""
    weights, document = safetensors.numpy.load_file(file), json.loads(metadata(file))
    change(weights, document)
    safetensors.numpy.save_file(weights, file, metadata={"format": "pt", METADATA: json.dumps(document)})


def metadata(file: Path) -> str:
    with safetensors.safe_open(file, framework="np") as opened:
        return opened.metadata()[METADATA]


# Both backends


@pytest.mark.filterwarnings("ignore:no subject was found")  # noise has none
@pytest.mark.parametrize("name", ["tiny-imagedream", "tiny-mvdream", "demo"])
def test_a_quantised_folder_gives_the_same_views_in_both_backends(name: str, tmp_path: Path) -> None:
    source: Any = name if name == "demo" else FIXTURES / name
    quantize_folder(source, tmp_path / "q", bits=6, measure=False, backend="torch")
    config = read_model_config(tmp_path / "q")
    picture = PICTURE if config.unet.reference_frame or config.image_encoder else None
    prompt = None if config.text_encoder is None else "an owl"
    arguments: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": None if prompt is None else "blur",
        "views": 2,
        "steps": 2,
    }
    images = {}
    for backend in BACKENDS:
        pipeline = load(tmp_path / "q", backend=backend, device="cpu", dtype="float32")
        assert pipeline.model.quantization == "stored 6 bits"
        images[backend] = pipeline.generate(picture, **arguments).images
    difference = np.abs(images["torch"].astype(int) - images["mlx"])
    assert (difference <= 1).mean() > 0.999
    plain = load(source, backend="torch", device="cpu", dtype="float32").generate(picture, **arguments)
    assert 20 < psnr(images["torch"], plain.images).mean() < 70  # close to the float views, and not those themselves


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["q8", "q4"])
def test_quantising_on_load_gives_what_the_stored_folder_gives(
    tiny: Path, tmp_path: Path, backend: Backend, preset: str
) -> None:
    quantize_folder(tiny, tmp_path / "q", preset=preset, measure=False, backend=backend)
    stored = load(tmp_path / "q", backend=backend, device="cpu").generate(PICTURE, seed=3)
    loaded = load(tiny, backend=backend, device="cpu", quantize=preset).generate(PICTURE, seed=3)
    np.testing.assert_array_equal(stored.latents, loaded.latents)
    assert (stored.parameters.quantization, loaded.parameters.quantization) == (f"stored {preset}", preset)
    assert load(tiny, backend=backend, device="cpu").model.quantization is None


def test_an_estimate_says_how_the_model_is_quantised(tiny: Path, tiny_q4: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows: list[tuple[Path, list[str], str]] = [
        (tiny_q4, [], ", quantised (stored q4)"),
        (tiny, ["--quantize", "q8"], ", quantised (q8)"),
        (tiny, [], " in float32"),
    ]
    for folder, options, end in rows:
        assert run(["info", str(folder), "--estimate", "--backend", "torch", "--device", "cpu", *options]) == 0
        assert capfd.readouterr().out.splitlines()[0].endswith(end)


def test_both_backends_write_the_same_files(tiny: Path, tmp_path: Path) -> None:
    for backend in BACKENDS:
        quantize_folder(tiny, tmp_path / backend, preset="q8", measure=False, backend=backend)
    written = [
        {path.relative_to(tmp_path / backend): path.read_bytes() for path in (tmp_path / backend).rglob("*") if path.is_file()}
        for backend in BACKENDS
    ]
    assert written[0].keys() == written[1].keys()
    assert written[0] == written[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_upscaler_is_quantised_on_load_and_in_a_folder(tmp_path: Path, backend: Backend) -> None:
    write_tiny_models(tmp_path)
    report = quantize_folder(tmp_path / "x2", tmp_path / "q", preset="q4", backend=backend)
    assert [each.name for each in report.components] == ["unet"]
    assert all(0 < (layer.output_error or 0) < 1 for layer in report.layers)
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    upscalers = [load_upscaler(tmp_path / "q", backend=backend, device="cpu")]
    upscalers += [load_upscaler(tmp_path / "x2", backend=backend, device="cpu", quantize=each) for each in ("q8", None)]
    assert [each.model.quantization for each in upscalers] == ["stored q4", "q8", None]
    q4, q8, plain = (each.upscale(latents) for each in upscalers)
    assert 0 < relative_rms(q8, plain) < relative_rms(q4, plain) < 0.5


def test_a_quantised_model_quantises_its_upscaler_unless_that_is_stored_so(tiny: Path, tmp_path: Path) -> None:
    write_tiny_models(tmp_path)
    quantize_folder(tmp_path / "x2", tmp_path / "stored", bits=8, measure=False, backend="torch")
    pipeline = load(tmp_path / "tiny", backend="torch", device="cpu", quantize="q4")
    views = pipeline.generate(PICTURE, seed=3)
    for name, expected in (("x2", "q4"), ("stored", "stored 8 bits")):
        pipeline.upscale(views, upscaler=tmp_path / name)
        assert pipeline._upscaler is not None and pipeline._upscaler[1] is not None
        assert pipeline._upscaler[1].model.quantization == expected


# What is written


def test_the_file_holds_what_mlx_s_layers_hold_and_names_them(tiny: Path, tiny_q4: Path) -> None:
    (file,) = weight_files(tiny_q4, "unet")
    config, shapes = read_model_config(tiny).unet, unet_shapes(tiny)
    layers = preset_layers(config, shapes, "q4")
    assert stored_quantization([file]).layers == layers and stored_quantization([file]).preset == "q4"
    weights = safetensors.numpy.load_file(file)
    assert {name: array.shape for name, array in weights.items()} == quantized_shapes(shapes, layers)
    plain = safetensors.numpy.load_file(weight_files(tiny, "unet")[0])
    for name in set(weights) & set(plain) - {f"{layer}.weight" for layer in layers}:
        np.testing.assert_array_equal(weights[name], plain[name])
    assert weight_files(tiny_q4, "vae")[0].read_bytes() == weight_files(tiny, "vae")[0].read_bytes()


def test_dequantised_weights_differ_from_the_first_ones_by_what_the_report_says(tiny: Path, tmp_path: Path) -> None:
    report = quantize_folder(tiny, tmp_path / "q", bits=4, measure=False, backend="torch")
    (file,), shapes = weight_files(tmp_path / "q", "unet"), unet_shapes(tiny)
    back, plain = read_dequantized([file], shapes), read_weights(weight_files(tiny, "unet"), shapes)
    assert len(report.layers) > 30
    for layer in report.layers:
        error = relative_rms(back[f"{layer.name}.weight"], plain[f"{layer.name}.weight"])
        assert error == pytest.approx(layer.weight_error, rel=1e-5) and 0.02 < error < 0.2
        assert layer.output_error is None


def test_the_errors_are_those_of_one_layer_alone_and_q4_keeps_the_worst(tiny: Path, tmp_path: Path) -> None:
    bits4 = quantize_folder(tiny, tmp_path / "4", bits=4, backend="torch")
    q4 = quantize_folder(tiny, tmp_path / "q4", preset="q4", backend="torch")
    errors = {layer.name: (layer.output_error or 0) for layer in bits4.layers}
    assert all(0 < error < 1 for error in errors.values())
    numbers = {layer.name: layer.weights for layer in bits4.layers}
    kept = [layer.name for layer in q4.layers if layer.bits == 8]
    assert kept
    by_worth = sorted(errors, key=lambda name: -(errors[name] ** 2) / numbers[name])
    fitting = [name for name in by_worth if numbers[name] <= max(numbers[each] for each in kept)]
    assert fitting[0] in kept
    for layer in q4.layers:
        if layer.bits == 8:
            assert (layer.output_error or 0) < errors[layer.name] / 4
    before, after = (report.components[0].output_error or 0 for report in (bits4, q4))
    assert 0 < after < before
    # Errors of single layers add up as those of independent noise do, more or less.
    assert 0.3 < before / np.sqrt(sum(error**2 for error in errors.values())) < 3


@pytest.mark.parametrize("component", ["text_encoder", "image_encoder", "vae"])
def test_every_component_can_be_quantised_and_measured(component: str, tmp_path: Path) -> None:
    source = FIXTURES / "tiny-imagedream"
    report = quantize_folder(source, tmp_path / "q", bits=4, group_size=32, chosen=[component], backend="torch")
    assert [each.name for each in report.components] == [component]
    # The last layers of the vision tower come behind the states that the U-Net takes.
    unused = [layer for layer in report.layers if not layer.output_error]
    assert len(report.layers) > 5 and len(unused) < len(report.layers) / 2
    inspected = {each.name: each.quantization for each in inspect(tmp_path / "q").components}
    assert inspected == {name: "4 bits" if name == component else None for name in inspected}
    load(tmp_path / "q", backend="torch", device="cpu")


def test_info_counts_the_model_s_numbers_and_the_bytes_that_they_take(tiny: Path, tiny_q4: Path) -> None:
    plain, quantised = inspect(tiny), inspect(tiny_q4)
    assert not quantised.faults
    unet = quantised.components[0]
    assert unet.parameters == plain.components[0].parameters and unet.quantization == "q4"
    dense = sum(each.parameters for each in plain.components) - unet.quantized_parameters
    assert quantised.memory_bytes()["float16"] == 2 * dense + unet.quantized_bytes
    assert unet.quantized_bytes < 0.7 * unet.quantized_parameters


# Who refuses what


def test_quantising_on_load_what_is_stored_quantised_is_refused(tiny_q4: Path) -> None:
    for backend in BACKENDS:
        with pytest.raises(OptionError, match="quantize must be left out: this model is stored as q4, got 'q8'"):
            load(tiny_q4, backend=backend, device="cpu", quantize="q8")
        with pytest.raises(OptionError, match="quantize must be one of q8, q4, got 'q5'"):
            load(tiny_q4, backend=backend, device="cpu", quantize="q5")


def test_whoever_needs_full_precision_says_so(tiny_q4: Path, tmp_path: Path) -> None:
    files = weight_files(tiny_q4, "unet")
    for refused in (
        lambda: read_weights(files, unet_shapes(tiny_q4)),
        lambda: convert(tiny_q4, tmp_path / "converted"),
        lambda: convert(tiny_q4, tmp_path / "one.safetensors"),
        lambda: quantize_folder(tiny_q4, tmp_path / "twice", backend="torch"),
    ):
        with pytest.raises(CheckpointError, match=r"is quantised.*full precision are needed here"):
            refused()
    assert not list(tmp_path.iterdir())
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights, document: document.update(format_version=2), "is quantised in the format 2"),
        (lambda weights, document: document["layers"].popitem(), "weight' must be one of F16, BF16, F32, got U32"),
        (
            lambda weights, document: document["layers"].update(other={"bits": 4, "group_size": 64, "shape": [4, 64]}),
            "the quantised layer other is not there",
        ),
        (lambda weights, document: weights.pop("time_embedding.linear_1.scales"), "1 missing: time_embedding.linear_1.scales"),
        (
            lambda weights, document: weights.update(
                {"time_embedding.linear_1.scales": weights["time_embedding.linear_1.scales"].astype(np.float32)}
            ),
            "'time_embedding.linear_1.scales' must be F16, got F32",
        ),
        (
            lambda weights, document: weights.update(
                {"time_embedding.linear_1.weight": weights["time_embedding.linear_1.weight"].astype(np.float32)}
            ),
            "'time_embedding.linear_1.weight' must be U32, got F32",
        ),
        (
            lambda weights, document: weights.update({"conv_in.bias": weights["conv_in.bias"].astype(np.uint32)}),
            "'conv_in.bias' must be one of F16, BF16, F32, got U32",
        ),
    ],
)
def test_a_malformed_quantised_file_is_refused(tiny_q4: Path, tmp_path: Path, change: Any, message: str) -> None:
    folder = shutil.copytree(tiny_q4, tmp_path / "q")
    rewrite(weight_files(folder, "unet")[0], change)
    for backend in BACKENDS:
        with pytest.raises(CheckpointError, match=message):
            load(folder, backend=backend, device="cpu")
    assert any(message in fault for fault in inspect(folder).faults)


def test_packed_numbers_without_metadata_are_refused(tiny_q4: Path, tmp_path: Path) -> None:
    (file,) = weight_files(tiny_q4, "unet")
    safetensors.numpy.save_file(safetensors.numpy.load_file(file), tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="must be one of F16, BF16, F32, got U32"):
        match_tensors([tmp_path / "plain.safetensors"], unet_shapes(tiny_q4))
    with pytest.raises(TensorMismatchError):
        match_tensors([file], unet_shapes(tiny_q4), layers=with_bits(quantizable(unet_shapes(tiny_q4)), 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "q4", "bits": 4}, "bits must be left out with a preset, got 4"),
        ({"preset": "q5"}, "quantize must be one of q8, q4, got 'q5'"),
        ({"bits": 7}, "bits must be one of 2, 3, 4, 5, 6, 8, got 7"),
        ({"bits": 4, "group_size": 128}, "group size must be one of 64, 32, got 128"),
        ({"group_size": 32}, "group size must be 64 with a preset, got 32"),
        ({"chosen": ["text_encoder"]}, "components must be of unet, vae in this folder, got 'text_encoder'"),
        ({"chosen": []}, "components must be one or more of unet, vae"),
    ],
)
def test_options_are_checked_before_anything_is_written(
    tiny: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        quantize_folder(tiny, tmp_path / "q", backend="torch", **options)
    assert not (tmp_path / "q").exists()
    with pytest.raises(OptionError, match="dest must be another place"):
        quantize_folder(tiny, tiny, backend="torch")


def test_a_component_that_cannot_be_quantised_is_refused_before_another_is(tmp_path: Path) -> None:
    vae = replace(TINY_MODEL.vae, block_out_channels=(9, 21), norm_num_groups=3)
    folder = write_tiny_model(tmp_path / "odd", replace(TINY_MODEL, vae=vae))
    with pytest.raises(CheckpointError, match="its vae has no layer that can be quantised"):
        quantize_folder(folder, tmp_path / "q", bits=4, chosen=["unet", "vae"], measure=False, backend="torch")
    assert not (tmp_path / "q").exists()


def test_hidden_indices_are_not_copied(tiny: Path, tmp_path: Path) -> None:
    convert(tiny, tmp_path / "shards", shard_bytes=20_000)
    index = next((tmp_path / "shards" / "vae").glob("*.index.json"))
    index.with_name(f"._{index.name}").write_bytes(b"as macOS leaves on disks of other systems")
    quantize_folder(tmp_path / "shards", tmp_path / "q", chosen=["unet"], measure=False, backend="torch")
    assert (tmp_path / "q" / "vae" / index.name).exists()
    assert not list((tmp_path / "q").rglob(".*"))


def test_a_folder_that_holds_something_is_written_with_force_only(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is not empty"):
        quantize_folder(tiny, tmp_path / "q", measure=False, backend="torch")
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["notes.txt"]
    quantize_folder(tiny, tmp_path / "q", measure=False, backend="torch", force=True)
    assert not inspect(tmp_path / "q").faults


def test_a_kill_leaves_no_checkpoint_and_the_next_run_completes_it(tiny: Path, tmp_path: Path) -> None:
    code = f"""
import os
import re
from pathlib import Path
import mvshared.quantization.folders as folders
def die(*arguments):
    os.kill(os.getpid(), 9)
folders._copy_component = die
folders.quantize_folder({str(tiny)!r}, Path("q"), measure=False, backend="torch")
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
    assert killed.returncode == -9
    out = tmp_path / "q"
    assert (out / STATE).exists() and not (out / "model_index.json").exists()
    with pytest.raises(CheckpointError, match=r"model_index\.json is missing"):
        find_model(out)
    first = weight_files(out, "unet")[0].stat().st_mtime_ns
    quantize_folder(tiny, out, measure=False, backend="torch")
    assert weight_files(out, "unet")[0].stat().st_mtime_ns == first
    assert not inspect(out).faults and not list(out.rglob("*.tmp")) and not (out / STATE).exists()


# The command line, and other commands


def test_a_broken_run_is_not_gone_on_with_by_another_group_size(tmp_path: Path) -> None:
    def break_off(what: str, count: int) -> None:
        if what == "writing text_encoder":
            raise KeyboardInterrupt

    source, options = FIXTURES / "tiny-imagedream", {"bits": 8, "measure": False, "backend": "torch"}
    with pytest.raises(KeyboardInterrupt):
        quantize_folder(source, tmp_path / "out", group_size=64, on_layer=break_off, **options)
    quantize_folder(source, tmp_path / "out", group_size=32, **options)
    layers = stored_quantization(weight_files(tmp_path / "out", "unet")).layers
    assert {layer.group_size for layer in layers.values()} == {32}


def test_mvmlx_quantize_reports_every_layer(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["quantize", str(tiny), str(tmp_path / "q"), "--preset", "q4", "--backend", "torch", "--device", "cpu"]
    assert run([*arguments, "--report", str(tmp_path / "layers.csv")]) == 0
    printed = capfd.readouterr().out
    assert printed.startswith("unet (q4): ") and "layers of 4 bits" in printed and "layers of 8 bits" in printed
    with (tmp_path / "layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    layers = stored_quantization(weight_files(tmp_path / "q", "unet")).layers
    assert {row["name"]: int(row["bits"]) for row in rows} == {name: layer.bits for name, layer in layers.items()}
    assert all(float(row["output_error"]) > 0 for row in rows)
    assert run([*arguments, "--force", "--no-measure", "--json", "--report", str(tmp_path / "layers.json")]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document == json.loads((tmp_path / "layers.json").read_text())
    assert document["components"][0]["bytes"] < document["components"][0]["bytes_before"] / 4  # from float32
    assert run([*arguments, "--force", "--report", str(tmp_path / "layers.txt")]) == OptionError.exit_code
    assert run(["info", str(tmp_path / "q")]) == 0
    assert "quantised (q4)" in capfd.readouterr().out


@pytest.mark.parametrize("quantize", ["q8", None])
def test_a_quantised_run_is_repeated_from_its_metadata(
    tiny: Path, tiny_q4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PICTURE).save("picture.png")
    model = ["--model", str(tiny), "--quantize", quantize] if quantize else ["--model", str(tiny_q4)]
    assert run(["generate", "picture.png", *model, "--backend", "torch", "--device", "cpu", "-o", "first"]) == 0
    assert json.loads(Path("first/metadata.json").read_text())["parameters"]["quantization"] == (quantize or "stored q4")
    assert run(["generate", "--config", "first/metadata.json", "-o", "second"]) == 0
    for path in sorted(Path("first").glob("view_*.png")):
        np.testing.assert_array_equal(load_image(path), load_image(Path("second") / path.name))
    assert run(["generate", "picture.png", "--model", str(tiny_q4), "--quantize", "q4", "-o", "third"]) == OptionError.exit_code


@pytest.mark.parametrize("against", ["mlx", "diffusers"])
def test_a_quantised_folder_agrees_with_the_weights_that_its_bits_stand_for(tiny_q4: Path, against: str) -> None:
    result = validate(tiny_q4, against=against, backend="torch", device="cpu")
    assert result.first_failure is None and result.quantization == "stored q4"


def test_quantising_is_compared_with_full_precision_block_by_block(tiny: Path, tiny_q4: Path) -> None:
    loaded = validate(tiny, against="mlx", backend="torch", device="cpu", quantize="q4")
    stored = validate(tiny_q4, against="mlx", backend="torch", device="cpu", reference=tiny, tolerance=1.0)
    assert loaded.first_failure is None
    errors = [{check.name: check.rms_error for check in result.checks} for result in (loaded, stored)]
    assert errors[0].keys() == errors[1].keys()
    assert errors[0]["unet.guided"] == pytest.approx(errors[1]["unet.guided"], rel=1e-3)
    assert 1e-3 < errors[0]["unet.guided"] < 1 and errors[0]["vae.decoder"] < 1e-5
    eight = {check.name: check.rms_error for check in validate(tiny, against="mlx", backend="torch", quantize="q8").checks}
    assert eight["unet.guided"] < errors[0]["unet.guided"] / 4


def test_mvmlx_validate_names_the_first_block_that_loses_too_much(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["validate", str(tiny), "--against", "mlx", "--backend", "torch", "--quantize", "q4"]
    assert run([*arguments, "--tolerance", "1e-5"]) == NumericsError.exit_code
    assert "torch in float32, q4, against mlx in float32" in capfd.readouterr().out
    assert run(arguments) == 0


def test_how_components_are_quantised_is_said_once(tiny: Path, tiny_q4: Path) -> None:
    plain, stored = (weight_files(folder, "unet") for folder in (tiny, tiny_q4))
    assert choose_quantization({"unet": plain}, None) is None
    assert choose_quantization({"unet": plain}, "q8") == "q8"
    assert choose_quantization({"unet": stored, "vae": plain}, None) == "stored q4"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_that_is_not_finite_is_named(backend: Backend, tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "tiny-mvdream", tmp_path / "model")
    path = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    name = next(name for name in tensors if name.endswith("to_q.weight"))
    tensors[name][0, 0] = np.nan
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} holds numbers that are not finite") as caught:
        load(tmp_path / "model", backend=backend, device="cpu", quantize="q8")
    assert caught.value.path == path
    for measure in (False, True):
        with pytest.raises(CheckpointError, match=f"{re.escape(name)} holds numbers that are not finite") as caught:
            quantize_folder(tmp_path / "model", tmp_path / "q", measure=measure, backend=backend, chosen=["unet"], force=True)
        assert caught.value.path == path
    tensors[name][0, 0] = 0
    tensors[next(name for name in tensors if name.endswith("to_out.0.bias"))][0] = np.inf  # which stays as it is
    safetensors.numpy.save_file(tensors, path)
    with pytest.raises(CheckpointError, match="its unet gives numbers that are not finite"):
        quantize_folder(tmp_path / "model", tmp_path / "q", backend=backend, chosen=["unet"], force=True)
