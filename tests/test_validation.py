"""`mvmlx validate`: every family against diffusers and against the other backend, and faults found where they are."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import safetensors.numpy
import torch
from helpers import BACKENDS, Backend, make_unet
from public_folders import stable_diffusion
from upscalers import diffusers_pipeline, write_tiny_models

import mvmlx.layers
import mvshared.backend
import mvshared.validation
import mvtorch.layers
import mvtorch.upscaler
from mvshared.checkpoint import read_model_config, weight_files
from mvshared.cli import run
from mvshared.clip_images import clip_pixels
from mvshared.errors import BackendError, OptionError, OutputError
from mvshared.names import ldm_unet_names
from mvshared.quantization.folders import quantize_folder
from mvshared.tokenizer import CLIPTokenizer
from mvshared.validation import TOLERANCES, _Recorder, validate
from mvtorch.model import get_weights

FIXTURES = Path(__file__).parent / "fixtures"
# The U-Nets of diffusers' folders; 8 heads and convolutional projections are Stable Diffusion 1's.
STABLE_DIFFUSIONS: dict[str, dict[str, Any]] = {
    "sd15": {"unet": {"attention_head_dim": 8}},
    "sd21": {"unet": {"attention_head_dim": [2, 4], "use_linear_projection": True}},
    "sd21-768": {
        "unet": {"attention_head_dim": [2, 4], "use_linear_projection": True},
        "prediction_type": "v_prediction",
    },
    "other layer counts": {
        "unet": {
            "block_out_channels": (32, 32, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": [1, 3, 2],
            "transformer_layers_per_block": [1, 2, 3],
        }
    },
}


def write_unet(folder: Path, **fields: Any) -> Path:
    """The folder's U-Net again with other fields in its config and random weights under LDM's names."""
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    config = read_model_config(folder).unet
    if "use_linear_in_transformer" in fields:
        config = replace(config, use_linear_projection=fields["use_linear_in_transformer"])
    weights = get_weights(make_unet(config, "torch"))
    names = ldm_unet_names(weights, config)
    (file,) = weight_files(folder, "unet")
    safetensors.numpy.save_file({names[name]: np.ascontiguousarray(array) for name, array in weights.items()}, file)
    return folder


def copied(name: str, folder: Path) -> Path:
    for source in (FIXTURES / name).rglob("*"):
        if source.is_file():
            target = folder / source.relative_to(FIXTURES / name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    return folder


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: stable_diffusion(tmp_path_factory.mktemp("sd"), **arguments) for name, arguments in STABLE_DIFFUSIONS.items()}
    made["mvdream"], made["imagedream"] = FIXTURES / "tiny-mvdream", FIXTURES / "tiny-imagedream"
    on_sd15 = {"num_head_channels": -1, "num_heads": 8, "use_linear_in_transformer": False}
    made["mvdream on sd15"] = write_unet(copied("tiny-mvdream", tmp_path_factory.mktemp("mvdream")), **on_sd15)
    made["imagedream local"] = write_unet(
        copied("tiny-imagedream", tmp_path_factory.mktemp("imagedream")), reference_frame=False
    )
    made["demo"] = Path("demo")
    return made


def test_quantised_convolutions_around_transformers_are_not_taken_for_linear_layers(
    families: dict[str, Path], tmp_path: Path
) -> None:
    """Where the config does not say which they are: packed weights have two dimensions either way."""
    source = families["mvdream on sd15"]
    quantize_folder(source, tmp_path / "q", chosen=("unet",), bits=8, group_size=32, measure=False, backend="torch")
    path = tmp_path / "q" / "unet" / "config.json"
    document = json.loads(path.read_text())
    assert document.pop("use_linear_in_transformer") is False
    path.write_text(json.dumps(document))
    assert read_model_config(tmp_path / "q").unet == read_model_config(source).unet


FAMILIES = [*STABLE_DIFFUSIONS, "mvdream", "imagedream", "mvdream on sd15", "imagedream local", "demo"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_block_of_every_family_agrees_with_diffusers(name: str, backend: Backend, families: dict[str, Path]) -> None:
    result = validate(families[name], against="diffusers", backend=backend, device="cpu")
    assert result.first_failure is None
    assert max(check.rms_error for check in result.checks) > 0
    assert len(result.checks) > 200
    assert not [missing for missing in result.unmatched if ".image_embed.layers." not in missing]


def test_the_backends_agree_block_by_block(families: dict[str, Path]) -> None:
    for against in BACKENDS:
        result = validate(families["imagedream"], against=against, device="cpu")
        assert result.backend != against
        assert (result.first_failure, result.unmatched) == (None, ())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_within_its_tolerance(dtype: Any, backend: Backend, families: dict[str, Path]) -> None:
    result = validate(families["mvdream"], against="diffusers", backend=backend, dtype=dtype, device="cpu")
    assert result.tolerance == TOLERANCES[dtype]
    assert result.first_failure is None


def test_token_ids_and_clip_s_pixels_are_compared_with_transformers(
    families: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied("tiny-imagedream", tmp_path / "model")
    settings = folder / "tokenizer" / "tokenizer_config.json"
    document = json.loads(settings.read_text())
    del document["model_max_length"]
    settings.write_text(json.dumps(document))
    vocab, merges = folder / "tokenizer" / "vocab.json", folder / "tokenizer" / "merges.txt"
    ids, lines = json.loads(vocab.read_text()), merges.read_text().splitlines()
    words = [word for word in sorted(ids, key=ids.__getitem__) if word not in {line.replace(" ", "") for line in lines[-2:]}]
    added = {"<owl>": len(words), "<owl>_1": len(words) + 1}  # in the places of the last two merges
    vocab.write_text(json.dumps({word: number for number, word in enumerate(words)}))
    merges.write_text("\n".join(lines[:-2]) + "\n")
    (folder / "tokenizer" / "added_tokens.json").write_text(json.dumps(added))

    def inputs(**options: Any) -> dict[str, float]:
        result = validate(folder, against="diffusers", device="cpu", **options)
        return {check.name: check.rms_error for check in result.checks[:2]}

    right = inputs()
    assert right["tokenizer"] == 0 and 0 <= right["image_processor"] < 1e-6
    monkeypatch.setattr(CLIPTokenizer, "_encoded", lambda self, text: (text, self._tokenizer.encode(text.lower())))
    monkeypatch.setattr(mvshared.validation, "clip_pixels", lambda *given: clip_pixels(*given) * np.float32(1.001))
    assert inputs(dtype="bfloat16") == {"tokenizer": math.inf, "image_processor": math.inf}


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_block_that_is_wrong_is_named(
    backend: Backend, families: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The tanh approximation of GELU instead of the exact one: an error of some 1e-4."""

    def approximate(self: Any, x: Any) -> Any:
        if backend == "torch":
            x, gate = self.proj(x).chunk(2, dim=-1)
            return x * torch.nn.functional.gelu(gate, approximate="tanh")
        x, gate = mx.split(self.proj(x), 2, axis=-1)
        return x * 0.5 * gate * (1 + mx.tanh(0.7978845608 * (gate + 0.044715 * gate**3)))

    layers: Any = mvtorch.layers if backend == "torch" else mvmlx.layers
    monkeypatch.setattr(layers.GEGLU, "forward" if backend == "torch" else "__call__", approximate)
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0"
    arguments = ["validate", str(families["mvdream"]), "--against", "diffusers", "--backend", backend, "--device", "cpu"]
    assert run(arguments) == 10
    out, err = capfd.readouterr()
    assert f"mvmlx: error: {name}: differs from diffusers by" in err
    (marked,) = [line for line in out.splitlines() if "first to leave the tolerance" in line]
    assert name in marked
    assert f"{name}.proj (" in out
    assert run([*arguments, "--tolerance", "0.1"]) == 0


def test_a_reference_of_other_networks_is_refused_before_anything_runs(
    families: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mvshared.validation, "_Comparer", lambda *_, **__: pytest.fail("ran"))
    with pytest.raises(OptionError, match="reference must be a folder of the same networks, and its unet is another, got"):
        validate(families["imagedream"], against="diffusers", backend="torch", device="cpu", reference=families["mvdream"])


def test_a_reference_may_name_another_size_of_pictures(families: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(families["mvdream"], tmp_path / "other")
    path = tmp_path / "other" / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 768}))
    found = validate(families["mvdream"], against="mlx", backend="torch", device="cpu", reference=tmp_path / "other")
    assert found.checks


def test_blocks_that_the_reference_has_no_counterpart_of_are_said(
    families: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--against", "diffusers", "--backend", "torch", "--device", "cpu", "--summary"]
    assert run(["validate", str(families["imagedream"]), *arguments]) == 0
    said = capfd.readouterr().err.splitlines()
    assert "not compared: unet.image_embed.layers.0.0 has no counterpart in diffusers" in said


def test_a_table_or_json_is_printed_and_both_sides_are_saved(
    families: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["validate", str(families["mvdream"]), "--against", "diffusers", "--backend", "torch", "--device", "cpu"]
    assert run([*arguments, "--save", str(tmp_path / "activations")]) == 0
    out = capfd.readouterr().out
    assert "310 blocks agree within 2e-05; the largest is" in out
    assert "unet.conv_in (10" not in out
    assert "unet.conv_in (8, 16, 16, 32)" in out
    ours, theirs = (np.load(tmp_path / "activations" / side / "unet.conv_in.npy") for side in ("torch", "diffusers"))
    assert ours.shape == (8, 16, 16, 32)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert run([*arguments, "--json"]) == 0
    blocks = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert len(blocks) == 310
    assert {"event", "name", "shape", "max_error", "rms_error", "seconds", "reference_seconds"} == set(blocks[0])


def test_activations_that_cannot_be_written_are_an_error_without_a_part_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, array: np.ndarray) -> None:
        path.write_bytes(b"part")
        raise OSError("16384 requested and 10208 written")  # as numpy says it, without a number

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OutputError, match=r"unet\.npy: cannot be written: 16384 requested and 10208 written"):
        _Recorder(tmp_path)("unet", np.zeros(3, np.float32), None)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_compared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="against must be mlx, torch, diffusers or float32, got 'jax'"):
        validate("demo", against="jax")
    with pytest.raises(OptionError, match="against must be another implementation than the backend, got 'torch'"):
        validate("demo", against="torch", backend="torch")
    for tolerance in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(OptionError, match="tolerance must be above 0"):
            validate("demo", against="torch", tolerance=tolerance)
    monkeypatch.setattr(mvshared.backend, "find_spec", lambda name: None if name == "transformers" else True)
    with pytest.raises(BackendError, match=r"transformers is not installed \(pip install 'mvmlx\[validate\]'\)"):
        validate("no/folder", against="diffusers", backend="torch", device="cpu")  # before anything is loaded


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_compared_with_the_same_backend_in_float32(
    backend: Backend, families: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    results = {}
    for dtype in ("float16", "bfloat16"):
        results[dtype] = validate(families["imagedream"], against="float32", backend=backend, device="cpu", dtype=dtype)
        assert (results[dtype].first_failure, results[dtype].unmatched) == (None, ())
        assert results[dtype].backend == backend
    names = ["text_encoder", "image_encoder", "vae.encoder", "unet.image_embed", "unet", "vae.decoder"]
    for fine, coarse in zip(*(result.components() for result in results.values()), strict=True):
        assert fine.name == coarse.name == names.pop(0)
        assert 1e-5 < 3 * fine.output.rms_error < coarse.output.rms_error
        assert fine.worst.rms_error >= fine.output.rms_error
    assert sum(each.blocks for each in results["float16"].components()) == len(results["float16"].checks)

    arguments = ["validate", str(families["imagedream"]), "--against", "float32", "--backend", backend, "--device", "cpu"]
    assert run([*arguments, "--dtype", "float16", "--summary"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].endswith(f"{backend} in float16 against {backend} in float32")
    assert [line.split()[3] for line in lines[2:-1]] == [each.name for each in results["float16"].components()]
    assert run([*arguments, "--dtype", "float16", "--summary", "--json"]) == 0
    documents = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    expected = [(each.name, each.output.rms_error) for each in results["float16"].components()]
    assert [(each["name"], each["output_rms_error"]) for each in documents] == expected
    assert run(arguments) == 2  # float32 against float32


@pytest.mark.parametrize("against", ["diffusers", "mlx"])
def test_every_block_of_an_upscaler_agrees(against: str, tmp_path: Path) -> None:
    diffusers_pipeline().save_pretrained(tmp_path)
    result = validate(tmp_path, against=against, backend="torch", device="cpu")
    assert result.first_failure is None
    names = {check.name for check in result.checks}
    assert {"unet.down_blocks.3.attentions.1.attn1", "unet.up_blocks.3.resnets.1.conv2", "unet.time_embedding"} <= names
    assert {"unet.up_blocks.0.attentions.0.attn2.norm_cross", "vae.decoder.conv_out", "unet.guided", "pixels"} <= names
    assert len(names) > 250
    assert not result.unmatched


def test_an_upscaler_without_text_agrees_with_diffusers(tmp_path: Path) -> None:
    folders = write_tiny_models(tmp_path)
    for backend in BACKENDS:
        result = validate(folders / "x2", against="diffusers", backend=backend, device="cpu")
        assert result.first_failure is None
        assert not result.unmatched


def test_a_fault_of_the_upscaler_is_found_at_its_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = write_tiny_models(tmp_path)
    original = mvtorch.upscaler.blur_upsample
    monkeypatch.setattr(mvtorch.upscaler, "blur_upsample", lambda x: original(x) * 1.001)
    result = validate(folders / "x2", against="diffusers", backend="torch", device="cpu")
    assert result.first_failure is not None
    assert result.first_failure.name.startswith("unet.up_blocks.1.")
