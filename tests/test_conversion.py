"""Checkpoints under the names of the original code to folders and back: against diffusers' converter, bit by bit."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint as convert_open_clip_with_diffusers
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from helpers import randomise, run_under_two_names
from transformers import CLIPTextConfig as TransformersTextConfig
from transformers import CLIPTextModel, CLIPVisionModel

from mvshared.backend import load
from mvshared.checkpoint import find_model, read_model_config, weight_files
from mvshared.cli import run
from mvshared.config import (
    CLIPImageConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    NetworkConfig,
    ResamplerConfig,
    SchedulerConfig,
    UNetConfig,
    VAEConfig,
)
from mvshared.conversion.configs import (
    clip_document,
    diffusers_unet_document,
    image_processor_document,
    ldm_unet_document,
    open_clip_text_config,
    scheduler_document,
    vae_document,
)
from mvshared.conversion.convert import convert
from mvshared.conversion.folders import STATE
from mvshared.conversion.raw import RawTensor, cast, read_safetensors, write_safetensors
from mvshared.errors import CheckpointError, MvError, OptionError, OutputError, TensorMismatchError
from mvshared.files import file_stamps, is_within, lock_folder, make_folder
from mvshared.inspection import inspect
from mvshared.names import ldm_unet_names
from mvshared.schedule import alphas_cumprod
from mvtorch.model import _network, network_shapes

FIXTURES = Path(__file__).parent / "fixtures"
TOKENIZER = FIXTURES / "tiny-mvdream" / "tokenizer"

# As wide as heads are in the public models, or a multiple of that: shapes do not tell how many heads there are.
UNET = UNetConfig(
    block_out_channels=(64, 128),
    layers_per_block=(1, 2),
    transformer_layers_per_block=(1, 2),
    attention_levels=(True, True),
    cross_attention_dim=64,
)
SD15 = replace(UNET, use_linear_projection=False, num_attention_heads=(8, 8), transformer_layers_per_block=(1, 1))
MVDREAM = replace(UNET, camera_dim=16)
RESAMPLER = ResamplerConfig(
    embedding_dim=128, output_dim=64, hidden_dim=64, depth=4, heads=2, dim_head=64, num_queries=4, ff_mult=4
)
IMAGEDREAM = replace(MVDREAM, resampler=RESAMPLER, reference_frame=True)
VAE = VAEConfig(block_out_channels=(32, 64), layers_per_block=1)
TEXT = CLIPTextConfig(
    vocab_size=525, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1, eos_token_id=524
)
VISION = CLIPVisionConfig(
    hidden_size=128, intermediate_size=96, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14
)
MODELS: dict[str, UNetConfig] = {"sd15": SD15, "sd21": UNET, "sd21-768": UNET, "mvdream": MVDREAM, "imagedream": IMAGEDREAM}


def weights(config: NetworkConfig) -> dict[str, torch.Tensor]:
    network = _network(config)
    randomise(network)
    return {name: tensor.contiguous() for name, tensor in network.state_dict().items()}


def write_folder(folder: Path, unet: UNetConfig, *, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint folder of diffusers' layout, written by the test itself; MVDream's U-Net has LDM's names there."""
    text = replace(TEXT, hidden_act="quick_gelu" if unet is SD15 else "gelu")
    parts: dict[str, tuple[NetworkConfig, dict[str, Any], str]] = {
        "unet": (unet, diffusers_unet_document(unet, sample_size=64), "diffusion_pytorch_model"),
        "vae": (VAE, vae_document(VAE), "diffusion_pytorch_model"),
        "text_encoder": (text, clip_document(text), "model"),
    }
    if unet.camera_dim is not None:
        parts["unet"] = (unet, ldm_unet_document(unet, image_size=32), "diffusion_pytorch_model")
    if unet.resampler is not None:
        parts["image_encoder"] = (VISION, clip_document(VISION), "model")
        processor = image_processor_document(CLIPImageConfig(shortest_edge=56, crop_size=56))
        (folder / "feature_extractor").mkdir(parents=True)
        (folder / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(processor))
    for component, (config, document, stem) in parts.items():
        (folder / component).mkdir(parents=True)
        (folder / component / "config.json").write_text(json.dumps(document))
        tensors = {name: tensor.to(dtype) for name, tensor in weights(config).items()}
        if component == "unet" and unet.camera_dim is not None:
            names = ldm_unet_names(tensors, unet)
            tensors = {names[name]: tensor for name, tensor in tensors.items()}
        safetensors.torch.save_file(tensors, folder / component / f"{stem}.safetensors", metadata={"format": "pt"})
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler_document(SchedulerConfig())))
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline"}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_folder(tmp_path_factory.mktemp(name), unet) for name, unet in MODELS.items() if name != "sd21-768"}


@pytest.fixture(scope="module")
def originals(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same checkpoints in one file each, under the original names."""
    files = {name: tmp_path_factory.mktemp(name) / f"{name}.safetensors" for name in folders}
    for name, folder in folders.items():
        convert(folder, files[name])
    return files


def tensors_of(folder: Path, component: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(folder, component):
        found |= safetensors.torch.load_file(file)
    return found


def assert_same_tensors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


# Names against diffusers' own converter


def test_unet_names_are_those_of_diffusers_converter(tmp_path: Path) -> None:
    """With the same number of layers at every level, as diffusers' converter counts them."""
    unet = replace(SD15, layers_per_block=(2, 2))
    original = tmp_path / "original.safetensors"
    folder = write_folder(tmp_path / "folder", unet)
    convert(folder, original)
    document = json.loads((folder / "unet" / "config.json").read_text())
    oracle: Any = UNet2DConditionModel.from_config(document)
    assert_same_tensors(
        convert_ldm_unet_checkpoint(safetensors.torch.load_file(original), dict(oracle.config)), tensors_of(folder, "unet")
    )


def test_vae_names_are_those_of_diffusers_converter(folders: dict[str, Path], originals: dict[str, Path]) -> None:
    config = json.loads((folders["sd21"] / "vae" / "config.json").read_text())
    converted = convert_ldm_vae_checkpoint(safetensors.torch.load_file(originals["sd21"]), config)
    assert_same_tensors(converted, tensors_of(folders["sd21"], "vae"))


def test_open_clip_names_are_those_of_diffusers_converter(folders: dict[str, Path], originals: dict[str, Path]) -> None:
    prefix = "cond_stage_model.model."
    original = safetensors.torch.load_file(originals["sd21"])
    original[f"{prefix}text_projection"] = torch.zeros(64, 64)  # diffusers takes the width of the attention from it
    text = CLIPTextModel(
        TransformersTextConfig(
            vocab_size=525,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=1,
            bos_token_id=523,
            eos_token_id=524,
            pad_token_id=0,
        )
    )
    converted = convert_open_clip_with_diffusers(text, original, prefix=prefix)
    own = {name.removeprefix("text_model."): tensor for name, tensor in converted.items() if "projection" not in name}
    own.pop("embeddings.position_ids", None)
    assert_same_tensors(own, tensors_of(folders["sd21"], "text_encoder"))


@pytest.mark.parametrize("name", ["sd15", "sd21"])
def test_diffusers_loads_a_converted_stable_diffusion(name: str, originals: dict[str, Path], tmp_path: Path) -> None:
    convert(originals[name], tmp_path / "out", extra=[TOKENIZER])
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    picture = pipe(
        "an owl", num_inference_steps=2, height=16, width=16, output_type="np", generator=torch.Generator().manual_seed(0)
    )
    assert np.isfinite(picture.images).all()  # pyright: ignore
    ours = load(tmp_path / "out", backend="torch", device="cpu").model
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        expected = pipe.text_encoder(input_ids=ids).last_hidden_state
    np.testing.assert_allclose(ours.encode_prompt(ids.numpy()).numpy(), expected.numpy(), atol=1e-4)


def test_transformers_loads_a_converted_vision_tower(originals: dict[str, Path], tmp_path: Path) -> None:
    convert(originals["imagedream"], tmp_path / "out", extra=[TOKENIZER])
    tower = CLIPVisionModel.from_pretrained(tmp_path / "out" / "image_encoder")
    pixels = np.random.default_rng(0).standard_normal((1, 56, 56, 3), dtype=np.float32)
    with torch.no_grad():
        states = tower(torch.from_numpy(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True).hidden_states[-2]
    ours = load(tmp_path / "out", backend="torch", device="cpu").model.encode_image(pixels)
    np.testing.assert_allclose(ours.numpy(), states.numpy(), atol=1e-4)


# Round trips


@pytest.mark.parametrize("name", ["sd15", "sd21", "mvdream", "imagedream"])
def test_a_round_trip_is_bit_equal(name: str, folders: dict[str, Path], originals: dict[str, Path], tmp_path: Path) -> None:
    report = convert(originals[name], tmp_path / "folder", extra=[TOKENIZER])
    assert (report.family, report.missing, report.left_out) == (name, (), {})
    for component in report.names:
        prefixes = ("text_model.", "vision_model.")
        found = {re.sub(r"^(text|vision)_model\.", "", n): t for n, t in tensors_of(report.folder, component).items()}
        assert all(not n.startswith(prefixes) for n in found)
        assert_same_tensors(found, tensors_of(folders[name], component))
    expected, found = read_model_config(folders[name]), read_model_config(report.folder)
    assert replace(found.unet, num_attention_heads=None) == replace(expected.unet, num_attention_heads=None)
    assert [found.unet.heads(level) for level in range(2)] == [expected.unet.heads(level) for level in range(2)]
    assert (found.vae.block_out_channels, found.text_encoder) == (expected.vae.block_out_channels, expected.text_encoder)
    assert (found.image_encoder, found.scheduler, found.family) == (expected.image_encoder, expected.scheduler, name)
    convert(report.folder, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == originals[name].read_bytes()
    assert not inspect(report.folder).faults


def test_every_name_is_in_the_report(originals: dict[str, Path], tmp_path: Path) -> None:
    convert(originals["imagedream"], tmp_path / "out", extra=[TOKENIZER])
    report = json.loads((tmp_path / "out" / "conversion.json").read_text())
    stored = set(safetensors.torch.load_file(originals["imagedream"]))
    assert {name for names in report["names"].values() for name in names} | set(report["left_out"]) == stored
    for component, names in report["names"].items():
        assert {own for each in names.values() for own in each} == set(tensors_of(tmp_path / "out", component))
    joined = report["names"]["text_encoder"]["clip_model.model.transformer.resblocks.0.attn.in_proj_weight"]
    assert [name.split(".")[-2] for name in joined] == ["q_proj", "k_proj", "v_proj"]


# Pickles and the odds and ends of real checkpoints


def as_trained(original: Path) -> dict[str, torch.Tensor]:
    """With what the published files hold beside the weights."""
    tensors = safetensors.torch.load_file(original)
    tensors["alphas_cumprod"] = torch.from_numpy(alphas_cumprod(SchedulerConfig()).astype(np.float32))
    tensors["betas"] = torch.zeros(1000)
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["model_ema.diffusion_modelinput_blocks00weight"] = torch.zeros(3)
    tensors["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    tensors["cond_stage_model.model.attn_mask"] = torch.zeros(77, 77)
    return tensors


@pytest.mark.parametrize("layout", ["plain", "state_dict", "lightning", "numbers", "legacy"])
def test_pickles_are_read_as_tensors(layout: str, originals: dict[str, Path], tmp_path: Path) -> None:
    tensors: Any = as_trained(originals["sd21"])
    content = tensors if layout == "plain" else {"state_dict": tensors, "epoch": 3, "global_step": 470000}
    if layout == "lightning":
        module = type(sys)("pytorch_lightning.callbacks.model_checkpoint")
        kind = type("ModelCheckpoint", (), {"__module__": module.__name__})
        module.__dict__["ModelCheckpoint"] = kind
        names = ["pytorch_lightning", "pytorch_lightning.callbacks"]
        sys.modules |= {name: type(sys)(name) for name in names} | {module.__name__: module}
        content["callbacks"] = {kind: {"best_model_path": "x"}}
    elif layout == "numbers":
        content |= {"loss": np.float64(0.5), "losses": [np.float32(0.25), np.int64(3)]}
    torch.save(content, tmp_path / "sd.ckpt", _use_new_zipfile_serialization=layout != "legacy")
    for name in list(sys.modules):
        if name.startswith("pytorch_lightning"):
            del sys.modules[name]
    report = convert(tmp_path / "sd.ckpt", tmp_path / "out", extra=[TOKENIZER], family="sd21-768")
    assert sorted(report.left_out) == sorted(tensors.keys() - safetensors.torch.load_file(originals["sd21"]).keys())
    assert read_model_config(tmp_path / "out").scheduler.prediction_type == "v_prediction"
    convert(tmp_path / "out", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == originals["sd21"].read_bytes()


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


@pytest.mark.parametrize("layout", ["zip", "legacy", "bare pickle"])
def test_a_malicious_pickle_is_refused_and_nothing_of_it_runs(
    layout: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trap, path = tmp_path / "ran", tmp_path / "evil.ckpt"
    content = {"state_dict": {"a": torch.zeros(2)}, "callbacks": Malicious(f"touch {trap}")}
    if layout == "bare pickle":
        path.write_bytes(pickle.dumps({"a": Malicious(f"touch {trap}")}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout == "zip")
    with path.open("rb") as file:  # the trap works: an ordinary unpickler would run it
        assert b"system" in file.read()
    assert run(["convert", str(path), str(tmp_path / "out")]) == 5
    assert "evil.ckpt: is no checkpoint of tensors alone" in capfd.readouterr().err
    assert not trap.exists()
    assert not (tmp_path / "out").exists()


def test_a_refused_pickle_is_told_without_advice_to_let_it_run(tmp_path: Path) -> None:
    torch.save({"string_to_param": torch.nn.ParameterDict()}, tmp_path / "a.pt")  # as textual inversion's were
    with pytest.raises(
        CheckpointError, match=r"Unsupported global: GLOBAL torch\S+ParameterDict \(only files of plain tensors"
    ):
        convert(tmp_path / "a.pt", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a checkpoint", b"\x80\x02}q\x00."])
def test_what_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError):
        convert(tmp_path / "a.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_whole_open_clip_tower_loses_its_last_layer_as_stable_diffusion_2_has_it(
    originals: dict[str, Path], tmp_path: Path
) -> None:
    tensors = as_trained(originals["sd21"])
    prefix = "cond_stage_model.model."
    last = [name for name in tensors if f"{prefix}transformer.resblocks.1." in name]
    tensors |= {name.replace("resblocks.1.", "resblocks.2."): tensors[name] + 1 for name in last}
    tensors[f"{prefix}text_projection"] = torch.zeros(64, 64)
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "whole.safetensors")
    report = convert(tmp_path / "whole.safetensors", tmp_path / "out", extra=[TOKENIZER])
    assert read_model_config(tmp_path / "out").text_encoder == TEXT
    assert report.left_out[f"{prefix}text_projection"] == "behind the text states that the U-Net takes"
    assert f"{prefix}transformer.resblocks.2.ln_1.weight" in report.left_out


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_noise_schedule_is_known_in_every_dtype(originals: dict[str, Path], tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = safetensors.torch.load_file(originals["sd21"])
    tensors["alphas_cumprod"] = torch.from_numpy(alphas_cumprod(SchedulerConfig())).to(dtype)
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "out", extra=[TOKENIZER])
    assert not inspect(tmp_path / "out").faults


@pytest.mark.parametrize(
    ("name", "given"),
    [("extra files", {"extra": [TOKENIZER]}), ("like", {"like": FIXTURES / "tiny-mvdream"}), ("family", {"family": "sd15"}),
     ("shard size", {"shard_bytes": 10**6})],
)  # fmt: skip
def test_what_one_file_has_no_use_for_is_refused(tmp_path: Path, name: str, given: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{name} must be left out for one file"):
        convert(FIXTURES / "tiny-mvdream", tmp_path / "one.safetensors", **given)
    assert not (tmp_path / "one.safetensors").exists()


def with_scheduler(folder: Path, tmp_path: Path, **changes: Any) -> Path:
    """A folder whose scheduler is another one."""
    shutil.copytree(folder, tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return tmp_path


def test_a_scheduler_that_comes_along_decides_what_the_model_predicts(
    originals: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    file = originals["sd21"]
    velocity = with_scheduler(folders["sd21"], tmp_path / "v", prediction_type="v_prediction")
    for beside, family, says in ((velocity, "sd21", "v_prediction"), (folders["sd21"], "sd21-768", "epsilon")):
        both: list[dict[str, Any]] = [{"extra": [beside]}, {"like": beside}]
        for options in both:
            with pytest.raises(OptionError, match=f"family must be another than {family}: the scheduler beside it says {says}"):
                convert(file, tmp_path / "out", family=family, **options)
    report = convert(file, tmp_path / "out", like=velocity)
    assert report.family == "sd21-768"
    config = read_model_config(tmp_path / "out")
    assert (config.family, config.scheduler.prediction_type) == ("sd21-768", "v_prediction")


def test_a_scheduler_that_comes_along_is_the_one_that_diffusers_loads(
    folders: dict[str, Path], originals: dict[str, Path], tmp_path: Path
) -> None:
    like = with_scheduler(folders["sd21"], tmp_path / "dpm", _class_name="DPMSolverMultistepScheduler")
    convert(originals["sd21"], tmp_path / "out", like=like)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    assert type(pipe.scheduler).__name__ == "DPMSolverMultistepScheduler"
    assert read_model_config(tmp_path / "out").defaults.scheduler == "dpmpp-2m"


def test_a_file_is_not_converted_onto_itself(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.ones(3)}, file)
    before = file.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(file)
    for dest in (file, tmp_path / "link.safetensors"):
        with pytest.raises(OptionError, match="dest must be another place than the source's"):
            convert(file, dest, dtype="float16", force=True)
    assert file.read_bytes() == before


def test_a_family_that_nothing_says_is_warned_of(
    originals: dict[str, Path], folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    warning = (
        "mvmlx: warning: nothing says whether it predicts noise or velocity: it is taken for sd21, and may be --family sd21-768"
    )
    assert run(["convert", str(originals["sd21"]), str(tmp_path / "a")]) == 0
    assert warning in capfd.readouterr().err
    said: dict[str, dict[str, Any]] = {
        "family": {"family": "sd21"},
        "scheduler": {"extra": [with_scheduler(folders["sd21"], tmp_path / "v", prediction_type="v_prediction")]},
        "like": {"like": folders["sd21"]},
    }
    assert convert(originals["sd21"], tmp_path / "b").guessed == "sd21-768"
    for name, options in said.items():
        assert convert(originals["sd21"], tmp_path / name, **options).guessed is None
    assert convert(originals["sd15"], tmp_path / "c").guessed is None
    assert convert(folders["sd21"], tmp_path / "d").guessed is None


def test_stable_diffusion_1_5_may_predict_the_velocity(
    originals: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    velocity = with_scheduler(folders["sd15"], tmp_path / "v", prediction_type="v_prediction")
    for family in (None, "sd15"):
        out = tmp_path / str(family)
        assert convert(originals["sd15"], out, family=family, extra=[velocity]).family == "sd15"
        assert read_model_config(out).scheduler.prediction_type == "v_prediction"


def test_a_folder_of_one_network_does_not_take_the_place_of_a_model(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["sd15"] / "unet", tmp_path / "alone" / "unet")
    shutil.copytree(folders["sd15"], tmp_path / "model")
    with pytest.raises(OutputError, match="holds vae, text_encoder too, which this would remove"):
        convert(tmp_path / "alone", tmp_path / "model", family="sd15", force=True)
    assert not inspect(tmp_path / "model").faults
    assert "vae" in convert(tmp_path / "alone", tmp_path / "part", family="sd15").missing


def test_networks_of_folders_that_make_no_model_are_not_written_as_one(folders: dict[str, Path], tmp_path: Path) -> None:
    unet = save_unet(replace(SD15, cross_attention_dim=32), tmp_path / "unet.safetensors")
    with pytest.raises(CheckpointError, match="cross_attention_dim must be the text encoder's hidden_size, 64, got 32"):
        convert(unet, tmp_path / "out", extra=[folders["sd15"]])
    assert not (tmp_path / "out" / "model_index.json").exists()


def test_a_local_folder_stays_local(originals: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    convert(originals["imagedream"], tmp_path / "local", family="imagedream-local", extra=[TOKENIZER])
    convert(tmp_path / "local", tmp_path / "half", family="imagedream-local", dtype="float16")
    assert not read_model_config(tmp_path / "half").unet.reference_frame
    with pytest.raises(OptionError, match="family must be imagedream, which this folder is"):
        convert(folders["imagedream"], tmp_path / "other", family="imagedream-local")


def test_linked_weights_are_not_written_to(folders: dict[str, Path], tmp_path: Path) -> None:
    (file,) = weight_files(folders["sd15"], "unet")
    before, link = file.read_bytes(), tmp_path / "out" / "unet" / file.name
    link.parent.mkdir(parents=True)
    link.symlink_to(file)
    convert(folders["sd15"], tmp_path / "out", dtype="float16", force=True)
    assert file.read_bytes() == before


def test_a_folder_is_of_the_family_that_it_is_of(folders: dict[str, Path], tmp_path: Path) -> None:
    for family in ("sd21-768", "mvdream"):
        with pytest.raises(OptionError, match=f"family must be sd21, which this folder is, or left out, got '{family}'"):
            convert(folders["sd21"], tmp_path / "out", family=family)
    assert convert(folders["sd21"], tmp_path / "out", family="sd21").family == "sd21"


@pytest.mark.parametrize(
    ("name", "family", "allowed"),
    [("sd21", "mvdream", "sd21 or sd21-768"), ("imagedream", "sd15", "imagedream or imagedream-local")],
)
def test_a_folder_without_an_index_is_of_the_family_of_its_network(
    name: str, family: str, allowed: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    source = shutil.copytree(folders[name], tmp_path / "source")
    (source / "model_index.json").unlink()
    with pytest.raises(OptionError, match=f"family must be {allowed}, which these tensors are, got '{family}'"):
        convert(source, tmp_path / "out", family=family)
    assert not (tmp_path / "out").exists()
    assert convert(source, tmp_path / "out", family=name).family == name
    assert read_model_config(tmp_path / "out") == read_model_config(folders[name])


def test_the_noise_schedule_is_compared_with_that_of_the_scheduler_that_comes_along(
    originals: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    linear = with_scheduler(folders["sd21"], tmp_path / "linear", beta_schedule="linear")
    tensors = as_trained(originals["sd21"])
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="with another noise schedule than that of the scheduler beside it"):
        convert(tmp_path / "a.safetensors", tmp_path / "out", like=linear)
    config = SchedulerConfig(beta_schedule="linear")
    tensors["alphas_cumprod"] = torch.from_numpy(alphas_cumprod(config).astype(np.float32))
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "out", like=linear)
    assert read_model_config(tmp_path / "out").scheduler.beta_schedule == "linear"


def test_a_file_that_has_betas_alone_is_known_by_them(originals: dict[str, Path], tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(originals["sd21"])
    tensors["betas"] = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().float()
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "out", extra=[TOKENIZER])
    tensors["betas"] = torch.linspace(1e-4, 0.02, 1000)
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="was trained with another noise schedule than Stable Diffusion's"):
        convert(tmp_path / "a.safetensors", tmp_path / "other", extra=[TOKENIZER])


@pytest.mark.parametrize(("count", "projection", "layers"), [(24, True, 23), (24, False, 23), (23, True, 23), (23, False, 23)])
def test_stable_diffusion_2_takes_the_states_before_the_last_layer_of_its_text_tower(
    count: int, projection: bool, layers: int
) -> None:
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (49408, 1024), "positional_embedding": (77, 1024)}
    for number in range(count):
        shapes[f"transformer.resblocks.{number}.ln_1.weight"] = (1024,)
        shapes[f"transformer.resblocks.{number}.mlp.c_fc.weight"] = (4096, 1024)
    shapes |= {"text_projection": (1024, 1024)} if projection else {}
    assert open_clip_text_config(shapes).num_hidden_layers == layers


def with_text_encoder(folder: Path, dest: Path, config: CLIPTextConfig) -> Path:
    """A copy of a model's folder with another, random text encoder."""
    shutil.copytree(folder, dest)
    (dest / "text_encoder/config.json").write_text(json.dumps(clip_document(config)))
    safetensors.torch.save_file(weights(config), dest / "text_encoder/model.safetensors")
    return dest


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", ["sd21", "mvdream"])
def test_a_text_tower_keeps_its_layers_in_one_file_and_loses_its_projection_alone(
    name: str, layers: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    text = replace(TEXT, num_hidden_layers=layers, projection_dim=64)
    folder = with_text_encoder(folders[name], tmp_path / "given", text)
    report = convert(folder, tmp_path / "one.safetensors")
    assert report.left_out == {"text_encoder/text_projection.weight": "behind the text states that the U-Net takes"}
    again = convert(tmp_path / "one.safetensors", tmp_path / "again", extra=[TOKENIZER]).folder
    assert read_model_config(again).text_encoder == replace(text, projection_dim=None)
    expected = tensors_of(folder, "text_encoder")
    del expected["text_projection.weight"]
    found = tensors_of(again, "text_encoder")
    assert_same_tensors({name.removeprefix("text_model."): tensor for name, tensor in found.items()}, expected)
    like = convert(tmp_path / "one.safetensors", tmp_path / "like", like=folder).folder
    assert read_model_config(like).text_encoder == replace(text, projection_dim=None)
    assert json.loads((like / "text_encoder/config.json").read_text())["architectures"] == ["CLIPTextModel"]
    CLIPTextModel.from_pretrained(like / "text_encoder")


def test_a_text_tower_of_more_layers_than_are_read_from_one_file_is_not_written_to_one(tmp_path: Path) -> None:
    text = replace(TEXT, hidden_size=1024, num_attention_heads=16, num_hidden_layers=24)
    wide = write_folder(tmp_path / "wide", replace(UNET, cross_attention_dim=1024))
    folder = with_text_encoder(wide, tmp_path / "given", text)
    with pytest.raises(CheckpointError, match=r"text_encoder: has 24 layers, and of files with .* 23 are read"):
        convert(folder, tmp_path / "one.safetensors")
    assert not (tmp_path / "one.safetensors").exists()


def save_unet(config: UNetConfig, path: Path) -> Path:
    """A U-Net in one file, under its original names."""
    tensors, names = weights(config), ldm_unet_names(network_shapes(config), config)
    safetensors.torch.save_file({f"model.diffusion_model.{names[name]}": tensors[name] for name in tensors}, path)
    return path


def test_mvdream_on_stable_diffusion_1_5_is_converted(folders: dict[str, Path], tmp_path: Path) -> None:
    config = replace(SD15, camera_dim=16)
    file = save_unet(config, tmp_path / "unet.safetensors")
    convert(file, tmp_path / "out", extra=[folders["mvdream"]])
    assert read_model_config(tmp_path / "out").unet == config
    assert not inspect(tmp_path / "out").faults


def test_image_tokens_without_cameras_keep_their_resampler(folders: dict[str, Path], tmp_path: Path) -> None:
    config = replace(IMAGEDREAM, camera_dim=None)
    report = convert(save_unet(config, tmp_path / "unet.safetensors"), tmp_path / "part", extra=[folders["mvdream"]])
    assert report.missing == ("image_encoder", "feature_extractor")
    convert(save_unet(config, tmp_path / "unet.safetensors"), tmp_path / "out", extra=[folders["imagedream"]])
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["unet"] == ["mv_unet", "MultiViewUNetModel"]
    assert "image_encoder" in index
    assert read_model_config(tmp_path / "out").unet == config
    assert not inspect(tmp_path / "out").faults


def test_networks_that_make_no_model_are_refused_before_anything_is_written(originals: dict[str, Path], tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(originals["sd15"])
    name = "model.diffusion_model.input_blocks.0.0.weight"
    safetensors.torch.save_file(
        tensors | {name: tensors[name].repeat(1, 3, 1, 1)[:, :9].contiguous()}, tmp_path / "a.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"in_channels must be as many as out_channels .* got 9 and 4"):
        convert(tmp_path / "a.safetensors", tmp_path / "out", extra=[TOKENIZER])
    wide = save_unet(replace(SD15, cross_attention_dim=32), tmp_path / "wide.safetensors")
    rest = {name: each for name, each in tensors.items() if not name.startswith("model.diffusion_model.")}
    safetensors.torch.save_file(safetensors.torch.load_file(wide) | rest, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="holds networks that make no model: cross_attention_dim must be"):
        convert(tmp_path / "b.safetensors", tmp_path / "out", extra=[TOKENIZER])
    assert not (tmp_path / "out").exists()


def test_a_vae_in_a_file_of_its_own_may_have_what_its_training_left(originals: dict[str, Path], tmp_path: Path) -> None:
    prefix, tensors = "first_stage_model.", safetensors.torch.load_file(originals["sd15"])
    vae = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    vae |= {"loss.logvar": torch.zeros(1), "loss.discriminator.main.0.weight": torch.zeros(2)}
    safetensors.torch.save_file(vae, tmp_path / "vae.safetensors")
    report = convert(tmp_path / "vae.safetensors", tmp_path / "out")
    assert {"loss.logvar", "loss.discriminator.main.0.weight"} <= report.left_out.keys()


def test_a_text_tower_may_lack_its_prefix(originals: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(originals["sd15"])
    short = {name.replace("transformer.text_model.", "transformer."): tensor for name, tensor in tensors.items()}
    assert short.keys() != tensors.keys()
    safetensors.torch.save_file(short, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "out", extra=[TOKENIZER])
    expected = {f"text_model.{name}": tensor for name, tensor in tensors_of(folders["sd15"], "text_encoder").items()}
    assert_same_tensors(tensors_of(tmp_path / "out", "text_encoder"), expected)


@pytest.mark.parametrize(
    ("name", "prefix", "more", "reason"),
    [
        ("sd21", "conditioner.embedders.0.model.", "denoiser.sigmas", "the noise schedule: scheduler_config.json says it"),
        (
            "sd15",
            "cond_stage_model.transformer.",
            "cond_stage_model.text_projection",
            "behind the text states that the U-Net takes",
        ),
    ],
)
def test_other_programs_names_are_known(
    name: str, prefix: str, more: str, reason: str, originals: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    tensors = safetensors.torch.load_file(originals[name]) | {more: torch.ones(64, 64)}
    renamed = {each.replace("cond_stage_model.model.", prefix): tensor for each, tensor in tensors.items()}
    safetensors.torch.save_file(renamed, tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", tmp_path / "out", extra=[TOKENIZER])
    assert report.left_out == {more: reason}
    for component in ("unet", "vae"):
        assert_same_tensors(tensors_of(tmp_path / "out", component), tensors_of(folders[name], component))
    expected = {f"text_model.{each}": tensor for each, tensor in tensors_of(folders[name], "text_encoder").items()}
    assert_same_tensors(tensors_of(tmp_path / "out", "text_encoder"), expected)


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight", "lora_te_text_model.alpha"], "a LoRA?"),
        (["unet.mid_block.attentions.0.proj_in.lora_A.weight"], "a LoRA?"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet?"),
        (["conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.x"], "Stable Diffusion XL?"),
        (["emb_params"], "an embedding of textual inversion?"),
        (["cc_projection.weight"], "a model of conditions that no model here takes?"),
        (["decoder.mid_block.resnets.0.conv1.weight"], "a network of diffusers or transformers?"),
        (["down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"], "a network of diffusers or transformers?"),
        (["embeddings.token_embedding.weight"], "a network of diffusers or transformers?"),
        (["something.weight"], ""),
    ],
)
def test_files_of_other_kinds_are_told_what_they_seem_to_be(names: list[str], hint: str, tmp_path: Path) -> None:
    safetensors.torch.save_file({name: torch.ones(2) for name in names}, tmp_path / "a.safetensors")
    with pytest.raises(TensorMismatchError) as refused:
        convert(tmp_path / "a.safetensors", tmp_path / "out")
    assert refused.value.unexpected == tuple(sorted(names))
    assert refused.value.hint.startswith(hint)
    assert bool(refused.value.hint) == bool(hint), "of a file's own folder, which there is none of"


def test_the_default_size_is_the_family_s_whatever_the_vae(originals: dict[str, Path], tmp_path: Path) -> None:
    convert(originals["sd21"], tmp_path / "out", extra=[TOKENIZER])  # its VAE has two pixels a latent
    assert read_model_config(tmp_path / "out").defaults.size_px == 512


def test_another_noise_schedule_is_refused(originals: dict[str, Path], tmp_path: Path) -> None:
    tensors = as_trained(originals["sd21"])
    tensors["alphas_cumprod"] = tensors["alphas_cumprod"] ** 2
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="was trained with another noise schedule"):
        convert(tmp_path / "a.safetensors", tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lost", r"1 missing: middle_block\.0\.in_layers\.2\.weight"),
        ("invented", r"1 unexpected: model\.diffusion_model\.control\.weight|1 unexpected: control\.weight"),
        ("foreign", r"1 unexpected: lora\.weight"),
        ("misshaped", r"1 mis-shaped: middle_block\.0\.in_layers\.2\.weight"),
    ],
)
def test_a_tensor_too_many_or_too_few_is_refused_by_name(
    change: str, message: str, originals: dict[str, Path], tmp_path: Path
) -> None:
    tensors = safetensors.torch.load_file(originals["mvdream"])
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    if change == "lost":
        del tensors[name]
    elif change == "misshaped":
        tensors[name] = torch.zeros(3, 3)
    else:
        tensors["model.diffusion_model.control.weight" if change == "invented" else "lora.weight"] = torch.zeros(2)
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(TensorMismatchError, match=message):
        convert(tmp_path / "a.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_families_that_the_tensors_are_not_are_refused(originals: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="family must be mvdream, which these tensors are, got 'sd21'"):
        convert(originals["mvdream"], tmp_path / "out", family="sd21")
    with pytest.raises(OptionError, match="family must be one of mvdream,"):
        convert(originals["mvdream"], tmp_path / "out", family="flux")
    convert(originals["imagedream"], tmp_path / "local", family="imagedream-local", extra=[TOKENIZER])
    config = read_model_config(tmp_path / "local").unet
    assert config.resampler is not None
    assert not config.reference_frame


def test_head_counts_come_from_a_folder_of_the_same_sizes(tmp_path: Path, folders: dict[str, Path]) -> None:
    source = FIXTURES / "tiny-imagedream"  # 16 wide heads
    convert(source, tmp_path / "tiny.safetensors")
    convert(tmp_path / "tiny.safetensors", tmp_path / "out", like=source)
    assert read_model_config(tmp_path / "out") == read_model_config(source)
    picture = source / "input.png"
    arguments: dict[str, Any] = {"prompt": "an owl", "negative_prompt": "", "steps": 1, "size_px": 128}
    ours, theirs = (
        load(folder, backend="torch", device="cpu").generate(picture, **arguments).latents
        for folder in (tmp_path / "out", source)
    )
    np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(CheckpointError, match="its text_encoder has other tensors than the one to convert"):
        convert(tmp_path / "tiny.safetensors", tmp_path / "other", like=folders["imagedream"])


# Parts, dtypes, shards


def test_parts_come_from_several_sources(originals: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tensors = safetensors.torch.load_file(originals["imagedream"])
    prefixes = {"unet": "model.diffusion_model.", "vae": "vae_model.", "clip": "clip_model.model."}
    for part, prefix in prefixes.items():
        alone = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        safetensors.torch.save_file(alone, tmp_path / f"{part}.safetensors")
    unet, vae, clip = (str(tmp_path / f"{part}.safetensors") for part in prefixes)
    assert run(["convert", unet, str(tmp_path / "part")]) == 0
    assert "not a whole model yet; add with --with: vae, text_encoder, tokenizer, image_encoder" in capfd.readouterr().err
    assert not (tmp_path / "part" / "model_index.json").exists()
    others = ["--with", vae, "--with", clip, "--with", str(TOKENIZER)]
    assert run(["convert", unet, str(tmp_path / "whole"), *others]) == 0
    assert capfd.readouterr().err.count("warning") == 0
    convert(tmp_path / "whole", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == originals["imagedream"].read_bytes()
    with pytest.raises(CheckpointError, match="holds another vae: one source has it already"):
        convert(originals["imagedream"], tmp_path / "twice", extra=[Path(vae)])


def test_what_an_earlier_source_has_is_said_to_be_left_out(folders: dict[str, Path], tmp_path: Path) -> None:
    report = convert(folders["sd21"], tmp_path / "out", extra=[folders["mvdream"]])
    assert report.left_out[str(folders["mvdream"] / "vae")] == "another source, before this one, has it"
    assert_same_tensors(tensors_of(tmp_path / "out", "vae"), tensors_of(folders["sd21"], "vae"))


def test_a_network_in_a_folder_of_its_own_is_checked_as_well(originals: dict[str, Path], tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(originals["mvdream"])
    convert(originals["mvdream"], tmp_path / "whole", extra=[TOKENIZER])
    encoder = tensors_of(tmp_path / "whole", "text_encoder")
    del encoder[next(name for name in encoder if name.endswith("layers.0.layer_norm2.weight"))]
    shutil.copytree(tmp_path / "whole/text_encoder", tmp_path / "clip/text_encoder")
    safetensors.torch.save_file(encoder, weight_files(tmp_path / "clip", "text_encoder")[0])
    others = {name: each for name, each in tensors.items() if not name.startswith("clip_model.")}
    others = {name: each for name, each in others.items() if not name.startswith("cond_stage_model.")}
    safetensors.torch.save_file(others, tmp_path / "rest.safetensors")
    with pytest.raises(TensorMismatchError, match=r"1 missing: .*encoder\.layers\.0\.layer_norm2\.weight"):
        convert(tmp_path / "rest.safetensors", tmp_path / "out", extra=[tmp_path / "clip", TOKENIZER])
    assert not (tmp_path / "out/model_index.json").exists()


def test_a_folder_of_one_network_of_diffusers_may_have_any_name(folders: dict[str, Path], tmp_path: Path) -> None:
    source, vae = shutil.copytree(folders["sd15"], tmp_path / "source"), tmp_path / "sd-vae-ft-mse"
    shutil.move(source / "vae", vae)
    (vae / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant, which is not read")
    (source / "model_index.json").unlink()
    report = convert(source, tmp_path / "out", family="sd15", extra=[vae])
    assert not report.missing
    assert_same_tensors(tensors_of(tmp_path / "out", "vae"), tensors_of(folders["sd15"], "vae"))
    twice = convert(folders["sd15"], tmp_path / "twice", extra=[vae])
    assert twice.left_out[str(vae)] == "another source, before this one, has it"
    (vae / "diffusion_pytorch_model.fp16.safetensors").unlink()
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "vae-ft-mse-840000.safetensors")
    for name in ("._vae-ft-mse-840000.safetensors", "._x.index.json", "._x.bin"):  # as macOS leaves on disks of other systems
        (vae / name).write_bytes(b"no weights")
    convert(source, tmp_path / "renamed", family="sd15", extra=[vae])
    assert_same_tensors(tensors_of(tmp_path / "renamed", "vae"), tensors_of(folders["sd15"], "vae"))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ({"_class_name": "AutoencoderKLTemporalDecoder"}, "holds no component of a checkpoint"),
        ({"model_type": "clip"}, "holds both towers of CLIP; a folder of one of them can be taken"),
    ],
)
def test_folders_of_other_networks_are_refused(
    kind: dict[str, str], reason: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    other = shutil.copytree(folders["sd15"] / "vae", tmp_path / "other")
    (other / "config.json").write_text(json.dumps(kind))
    with pytest.raises(CheckpointError, match=reason):
        convert(folders["sd15"], tmp_path / "out", extra=[other])
    with pytest.raises(CheckpointError, match=r"is no whole model: model_index.json is missing \(name the family"):
        convert(folders["sd15"] / "vae", tmp_path / "out")


def test_a_tokenizer_takes_the_place_of_all_of_another(folders: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(folders["mvdream"], tmp_path / "source")
    shutil.copytree(source, tmp_path / "dest")
    for name in ("added_tokens.json", "tokenizer.json", "special.model"):
        (tmp_path / "dest/tokenizer" / name).write_text("{}")
    convert(source, tmp_path / "dest", force=True)
    names = {file.name for file in (tmp_path / "dest/tokenizer").iterdir()}
    assert names == {file.name for file in (source / "tokenizer").iterdir()}


def test_what_an_earlier_model_has_left_is_no_part_of_one(
    originals: dict[str, Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders["mvdream"], tmp_path / "dest")
    report = convert(originals["mvdream"], tmp_path / "dest", force=True)
    assert report.missing == ("tokenizer",)
    assert not (tmp_path / "dest/model_index.json").exists()


def test_two_runs_do_not_write_into_one_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    unlock = lock_folder(make_folder(tmp_path / "out"), busy="")
    with pytest.raises(OutputError, match="is being written to by another run"):
        convert(folders["mvdream"], tmp_path / "out")
    unlock()
    convert(folders["mvdream"], tmp_path / "out")


def test_components_that_are_not_converted_are_not_in_the_index(originals: dict[str, Path], tmp_path: Path) -> None:
    convert(originals["sd21"], tmp_path / "source", extra=[TOKENIZER])
    source = tmp_path / "source"
    document = json.loads((source / "model_index.json").read_text())
    document |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (source / "model_index.json").write_text(json.dumps(document))
    convert(source, tmp_path / "out")
    written = json.loads((tmp_path / "out/model_index.json").read_text())
    expected = {"safety_checker": [None, None], "requires_safety_checker": False}
    assert {name: written[name] for name in expected} == expected
    assert written["unet"] == document["unet"]


def test_float64_is_rounded_where_a_dtype_is_asked_for(originals: dict[str, Path], tmp_path: Path) -> None:
    tensors = {name: each.double() for name, each in safetensors.torch.load_file(originals["mvdream"]).items()}
    safetensors.torch.save_file(tensors, tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match=r"got F64 .*dtype="):
        convert(tmp_path / "wide.safetensors", tmp_path / "out", extra=[TOKENIZER])
    convert(tmp_path / "wide.safetensors", tmp_path / "out", extra=[TOKENIZER], dtype="float32")
    convert(originals["mvdream"], tmp_path / "expected", extra=[TOKENIZER])
    for component in ("unet", "vae", "text_encoder"):
        assert_same_tensors(tensors_of(tmp_path / "out", component), tensors_of(tmp_path / "expected", component))


def test_projections_of_several_dtypes_become_one_tensor_of_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    source = shutil.copytree(folders["mvdream"], tmp_path / "source")
    encoder = {name: each.clone() for name, each in tensors_of(source, "text_encoder").items()}  # the file is written anew
    key = "encoder.layers.0.self_attn.q_proj.weight"
    encoder[key] = encoder[key].bfloat16()
    safetensors.torch.save_file(encoder, weight_files(source, "text_encoder")[0])
    convert(source, tmp_path / "one.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "one.safetensors")
    found = next(each for name, each in tensors.items() if "0.attn.in_proj_weight" in name)
    assert found.dtype == torch.float32
    names = [f"encoder.layers.0.self_attn.{each}_proj.weight" for each in "qkv"]
    assert torch.equal(found, torch.cat([encoder[name].float() for name in names]))


def test_files_behind_linked_folders_are_part_of_a_source_s_state(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/weights").write_text("a")
    (tmp_path / "source").mkdir()
    (tmp_path / "source/unet").symlink_to("../real")
    (tmp_path / "source/loop").symlink_to(".")
    before = file_stamps(tmp_path / "source")
    (tmp_path / "real/weights").write_text("ab")
    after = file_stamps(tmp_path / "source")
    assert len(before) == len(after) == 1 and before != after


def test_hidden_files_are_no_part_of_a_source_nor_of_what_is_made_of_it(folders: dict[str, Path], tmp_path: Path) -> None:
    source, out = shutil.copytree(folders["sd15"], tmp_path / "source"), tmp_path / "out"
    convert(source, tmp_path / "plain")
    before = file_stamps(source)
    for name in (".DS_Store", "tokenizer/._vocab.json", "tokenizer/.DS_Store", "unet/._config.json"):
        (source / name).write_bytes(b"of macOS")
    assert file_stamps(source) == before
    out.mkdir()
    (out / ".DS_Store").write_bytes(b"of macOS")
    convert(source, out)
    assert files_in(out) == files_in(tmp_path / "plain") | {".DS_Store"}


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_folder_in_another_dtype_and_in_shards(dtype: str, folders: dict[str, Path], tmp_path: Path) -> None:
    convert(folders["mvdream"], tmp_path / "out", dtype=dtype, shard_bytes=1_000_000)
    assert len(weight_files(tmp_path / "out", "unet")) > 3
    for component in ("unet", "vae", "text_encoder"):
        expected = {
            name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors_of(folders["mvdream"], component).items()
        }
        assert_same_tensors(tensors_of(tmp_path / "out", component), expected)
    assert read_model_config(tmp_path / "out") == read_model_config(folders["mvdream"])
    load(tmp_path / "out", backend="torch", device="cpu")


def test_rounding_is_that_of_pytorch() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    values = torch.from_numpy(bits.view(np.float32).copy())
    small = values[values.abs() < 60000]
    for dtype, name in ((torch.bfloat16, "BF16"), (torch.float16, "F16")):
        given = small if name == "F16" else values[values.abs() < 3e38]
        raw = RawTensor(dtype="F32", shape=tuple(given.shape), read=lambda given=given: given.numpy().view(np.uint32))
        expected = given.to(dtype)
        assert torch.equal(torch.from_numpy(cast(raw, name, name="x").read().view(np.int16)), expected.view(torch.int16))
        back = cast(
            RawTensor(dtype=name, shape=raw.shape, read=lambda e=expected: e.view(torch.uint16).numpy()), "F32", name="x"
        )
        assert torch.equal(torch.from_numpy(back.read().view(np.float32)), expected.float())


def test_values_too_large_for_float16_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["mvdream"], tmp_path / "model")
    (file,) = weight_files(tmp_path / "model", "vae")
    tensors = safetensors.torch.load_file(file)
    tensors["decoder.conv_in.bias"][0] = 1e6
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"decoder\.conv_in\.bias: 1 values are too large for float16 \(use float32 or"):
        convert(tmp_path / "model", tmp_path / "out", dtype="float16")


@pytest.mark.parametrize("dest", ["model", "link", ".", "model/unet", "model/new", "model/one.safetensors"])
def test_nothing_is_written_where_the_source_lies_not_even_by_force(
    dest: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "model"
    shutil.copytree(folders["mvdream"], source)
    (tmp_path / "link").symlink_to(source)

    def written() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in source.rglob("*")}

    before = written()
    with pytest.raises(OptionError, match="dest must be another place than the source's"):
        convert(source, tmp_path / dest, dtype="float16", force=True)
    with pytest.raises(OptionError, match="dest must be another place than the source's"):
        convert(folders["mvdream"], tmp_path / dest, like=source, force=True)
    assert written() == before


@pytest.mark.parametrize(("source", "dest"), [("Model", "model"), ("Model", "model/new"), ("Model/unet", "model")])
def test_nor_where_its_folder_has_another_name(source: str, dest: str, folders: dict[str, Path], tmp_path: Path) -> None:
    model = shutil.copytree(folders["mvdream"], tmp_path / "Model")
    before = {path: path.read_bytes() for path in model.rglob("*.*")}
    refused = run_under_two_names(model, ["convert", source, dest, "--family", "mvdream", "--force"])
    assert (refused.returncode, "must be another place than the source's" in refused.stderr) == (2, True), refused.stderr
    assert {path: path.read_bytes() for path in model.rglob("*.*")} == before


def test_paths_are_compared_as_the_file_system_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def same_but_for_case(one: Path, other: Path) -> bool:
        return str(one).lower() == str(other).lower()

    source, model = tmp_path / "Model" / "unet", tmp_path / "Model"
    assert not is_within(source, tmp_path / "model")
    monkeypatch.setattr(os.path, "samefile", same_but_for_case)
    assert is_within(source, tmp_path / "model")
    assert is_within(tmp_path / "model" / "new" / "folder", model)
    assert not is_within(model, source)
    assert not is_within(tmp_path / "Models", model)


# Breaks


def test_a_broken_run_goes_on_and_is_no_checkpoint_before(originals: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def break_at(name: str, size: int) -> None:
        if name.startswith("text_model.encoder"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(originals["mvdream"], out, extra=[TOKENIZER], on_tensor=break_at)
    assert (out / STATE).is_file()
    assert not (out / "model_index.json").exists()
    assert not list(out.rglob("*.tmp"))
    with pytest.raises(MvError):
        load(out, backend="torch", device="cpu")
    unet = out / "unet" / "diffusion_pytorch_model.safetensors"
    before = unet.stat().st_mtime_ns
    vae = out / "vae" / "diffusion_pytorch_model.safetensors"
    vae.write_bytes(vae.read_bytes()[:-1] + b"\0")  # damaged in between: written again
    report = convert(originals["mvdream"], out, extra=[TOKENIZER])
    assert unet.stat().st_mtime_ns == before
    assert not report.missing
    assert not (out / STATE).exists()
    convert(out, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == originals["mvdream"].read_bytes()


def test_a_kill_leaves_nothing_half_written(originals: dict[str, Path], tmp_path: Path) -> None:
    code = f"""
import os, sys
from pathlib import Path
from mvshared.conversion.convert import convert
def die(name, size):
    if name.startswith("encoder.mid_block"):
        os.kill(os.getpid(), 9)
convert(Path({str(originals["mvdream"])!r}), Path("out"), extra=[Path({str(TOKENIZER)!r})], on_tensor=die)
"""
    paths = os.pathsep.join(sys.path)
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths})
    assert killed.returncode == -9
    out = tmp_path / "out"
    assert sorted(path.name for path in out.rglob("*.safetensors")) == ["diffusion_pytorch_model.safetensors"]
    (out / "unet" / ".config.json.0a1b2c3d.tmp").write_bytes(b"half")  # of a kill at another moment
    convert(originals["mvdream"], out, extra=[TOKENIZER])
    assert not list(out.rglob("*.tmp"))
    assert not inspect(out).faults
    convert(out, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == originals["mvdream"].read_bytes()


@pytest.mark.parametrize("source", ["a folder", "a file"])
def test_what_a_killed_run_left_of_its_one_file_is_removed_after_an_hour(
    originals: dict[str, Path], folders: dict[str, Path], tmp_path: Path, source: str
) -> None:
    names = (".x.safetensors.0a1b2c3d.tmp", ".x.safetensors.1a1b2c3d.tmp", ".y.safetensors.0a1b2c3d.tmp")
    left, in_work, other = (tmp_path / name for name in names)
    mine = tmp_path / ".x.safetensors.my-notes.tmp"
    for path in (left, in_work, other, mine):
        path.write_bytes(b"half")
    for path in (left, other, mine):
        os.utime(path, (0, 0))
    given = folders["mvdream"] if source == "a folder" else originals["mvdream"]
    convert(given, tmp_path / "x.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors", in_work.name, other.name, mine.name}


WRITERS = {
    "convert": "convert(Path({source!r}), Path('out'), dtype='float16', on_tensor=at_first)",
    "quantize": "quantize_folder({source!r}, Path('out'), backend='torch', measure=False, on_layer=at_first)",
    "init gaf": "init_gaf({source!r}, Path('out'), on_tensor=at_first)",
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_run_killed_in_its_first_file_goes_on(folders: dict[str, Path], tmp_path: Path, writer: str) -> None:
    code = f"""
import os, sys
from pathlib import Path
from mvshared.conversion.convert import convert
from mvshared.conversion.gaf import init_gaf
from mvshared.quantization.folders import quantize_folder
def at_first(name, size):
    if sys.argv[1] == "die":
        os.kill(os.getpid(), 9)
{WRITERS[writer].format(source=str(folders["sd21"]))}
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for argument, returned in (("die", -9), ("live", 0)):
        done = subprocess.run([sys.executable, "-c", code, argument], cwd=tmp_path, env=environment)
        assert done.returncode == returned
        if argument == "die":
            assert list((tmp_path / "out").rglob("*.tmp")) and not list((tmp_path / "out").rglob("*.safetensors"))
    assert not inspect(tmp_path / "out").faults
    assert not list((tmp_path / "out").rglob("*.tmp")) and not (tmp_path / "out" / STATE).exists()


def _add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lora.weight"] = torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda tensors: tensors.pop("conv_in.bias"), TensorMismatchError, "1 missing: conv_in.bias"),
        (_add, TensorMismatchError, "1 unexpected: lora.weight"),
        (lambda tensors: tensors.update({"conv_in.bias": tensors["conv_in.bias"].double()}), CheckpointError, "got F64"),
        (lambda tensors: tensors.update({"conv_in.bias": tensors["conv_in.bias"].long()}), CheckpointError, "got I64"),
        (
            lambda tensors: tensors.update({"conv_in.bias": tensors["conv_in.bias"].to(torch.float8_e4m3fn)}),
            CheckpointError,
            "got F8_E4M3",
        ),
    ],
)
@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"family": "sd21"}])
def test_a_folder_whose_tensors_are_not_those_of_its_configs_is_refused(
    folders: dict[str, Path], tmp_path: Path, change: Any, error: type[MvError], message: str, options: dict[str, Any]
) -> None:
    shutil.copytree(folders["sd21"], tmp_path / "source")
    file = weight_files(tmp_path / "source", "unet")[0]
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(error, match=message):
        convert(tmp_path / "source", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_an_earlier_model_had_and_the_new_one_has_not_is_removed_with_force(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert(folders["imagedream"], out)
    (out / "text_encoder" / "notes.md").write_text("mine")
    convert(Path("demo"), out, force=True)
    assert (out / "text_encoder" / "notes.md").read_text() == "mine"
    (out / "text_encoder" / "notes.md").unlink()
    (out / "text_encoder").rmdir()
    convert(folders["imagedream"], out, force=True)
    for name in (".DS_Store", "._config.json"):
        (out / "image_encoder" / name).write_bytes(b"of macOS")
    convert(Path("demo"), out, force=True)
    assert not (out / "image_encoder").exists()
    assert not inspect(out).faults


def test_a_network_alone_does_not_take_the_place_of_a_model(folders: dict[str, Path], tmp_path: Path) -> None:
    model, unet = tmp_path / "model", tmp_path / "unet.safetensors"
    convert(folders["mvdream"], model)
    shutil.copy(model / "unet" / "diffusion_pytorch_model.safetensors", model / "unet" / "my_lora.safetensors")
    tensors = read_original(folders["mvdream"], tmp_path)
    safetensors.torch.save_file(tensors, unet)
    before = {path: path.stat().st_size for path in model.rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match=r"holds vae, text_encoder too, which this would remove, and unet alone is no model"):
        convert(unet, model, like=folders["mvdream"], force=True)
    assert {path: path.stat().st_size for path in model.rglob("*") if path.is_file()} == before
    convert(folders["mvdream"], model, dtype="float16", force=True)
    assert (model / "unet" / "my_lora.safetensors").exists()
    assert not inspect(model).faults


def read_original(folder: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """The U-Net of a folder under its original names."""
    convert(folder, tmp_path / "whole.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "whole.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("model.diffusion_model.")}


def test_numbers_of_64_bits_are_rounded_where_a_dtype_is_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    source, dest = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    values = torch.tensor([0.1, -3.0, 1e30], dtype=torch.float64)
    safetensors.torch.save_file({"a": values, "n": torch.arange(3)}, source)
    convert(source, dest, dtype="float32")
    found = safetensors.torch.load_file(dest)
    assert torch.equal(found["a"], values.float())
    assert torch.equal(found["n"], torch.arange(3))
    with pytest.raises(CheckpointError, match="a: 1 values are too large for float16"):
        convert(source, dest, dtype="float16", force=True)
    safetensors.torch.save_file({"a": torch.tensor([1e300, 1.0], dtype=torch.float64)}, source)
    with pytest.raises(CheckpointError, match="a: 1 values are too large for float32"):
        convert(source, dest, dtype="float32", force=True)


def test_what_is_there_is_not_overwritten(originals: dict[str, Path], folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(originals["mvdream"], out, extra=[TOKENIZER])
    with pytest.raises(OutputError, match="is not empty"):
        convert(originals["mvdream"], out, extra=[TOKENIZER])
    convert(originals["mvdream"], out, extra=[TOKENIZER], force=True)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file, and a folder is needed"):
        convert(originals["mvdream"], tmp_path / "file")
    with pytest.raises(OutputError, match="exists"):
        convert(originals["mvdream"], originals["sd15"])
    with pytest.raises(OutputError, match="exists"):
        convert(folders["mvdream"], originals["sd15"])
    for missing in (tmp_path / "nothing.pt", tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="no such file or folder"):
            convert(missing, tmp_path / "new")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no component of a checkpoint"):
        convert(tmp_path / "empty", tmp_path / "new")


def test_files_of_an_earlier_conversion_do_not_stay_in_the_way(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(folders["mvdream"], out)
    convert(folders["mvdream"], out, dtype="float16", shard_bytes=1_000_000, force=True)
    assert len(weight_files(out, "unet")) > 3
    convert(folders["mvdream"], out, dtype="bfloat16", force=True)
    assert [path.name for path in (out / "unet").iterdir() if "safetensors" in path.name] == [
        "diffusion_pytorch_model.safetensors"
    ]
    assert {dtype for part in inspect(out).components for dtype in part.dtypes} == {"BF16"}


def test_a_folder_of_this_project_and_a_name_are_sources(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "demo", str(tmp_path / "demo"), "--dtype", "float32"]) == 0
    assert "warning" not in capfd.readouterr().err
    assert read_model_config(tmp_path / "demo") == read_model_config(find_model("demo"))
    assert not inspect(tmp_path / "demo").faults


def test_a_pickle_becomes_a_safetensors_file_under_the_same_names(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 2), "a": torch.arange(5), "c": torch.randn(4).half()}
    torch.save({"state_dict": tensors}, tmp_path / "a.ckpt")
    convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert_same_tensors(safetensors.torch.load_file(tmp_path / "a.safetensors"), tensors)
    convert(tmp_path / "a.ckpt", tmp_path / "b.safetensors", dtype="bfloat16")
    found = safetensors.torch.load_file(tmp_path / "b.safetensors")
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "a": torch.int64, "b": torch.bfloat16, "c": torch.bfloat16,
    }  # fmt: skip


@pytest.mark.parametrize("shape", [(), (3,), (1, 1), (0, 4, 3, 3)])
@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.0.0.weight",
        "first_stage_model.encoder.conv_in.weight",
        "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        "cond_stage_model.model.token_embedding.weight",
        "visual.conv1.weight",
        "inner_model.proj_in.weight",
    ],
)
def test_tensors_of_impossible_sizes_are_one_error(name: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    safetensors.torch.save_file({name: torch.zeros(shape)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError):
        convert(tmp_path / "a.safetensors", tmp_path / "out")


def test_the_report_can_be_json(originals: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(originals["mvdream"]), str(tmp_path / "out"), "--with", str(TOKENIZER), "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert (report["family"], report["missing"]) == ("mvdream", [])
    assert {each["component"] for each in report["written"]} == {"unet", "vae", "text_encoder"}


def test_the_towers_shapes_are_those_of_the_public_checkpoints() -> None:
    """What a converted SD 2.1 text tower and ImageDream's vision tower have at full size."""
    for config, name in ((CLIPTextConfig(), "sd21_text23"), (CLIPVisionConfig(), "clip_vit_h_vision")):
        manifest = json.loads((FIXTURES / "manifests" / f"{name}.json").read_text())
        names = {re.sub(r"^(text|vision)_model\.", "", name): tuple(shape) for name, shape in manifest.items()}
        plain = {name: shape for name, shape in names.items() if "position_ids" not in name}
        assert network_shapes(config) == plain


# What our own converter does not tell: the published files


def test_the_vae_s_attention_is_made_of_convolutions_in_one_file(originals: dict[str, Path]) -> None:
    """As CompVis' autoencoder has it; diffusers' converter takes linear layers, too."""
    stored = safetensors.torch.load_file(originals["sd21"])
    for half in ("encoder", "decoder"):
        for part in ("q", "k", "v", "proj_out"):
            assert stored[f"first_stage_model.{half}.mid.attn_1.{part}.weight"].shape == (64, 64, 1, 1)


def test_files_of_stable_diffusion_1_5_have_position_numbers(originals: dict[str, Path], tmp_path: Path) -> None:
    tensors = safetensors.torch.load_file(originals["sd15"])
    name = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    tensors[name] = torch.arange(77)[None]
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    report = convert(tmp_path / "a.safetensors", tmp_path / "out", extra=[TOKENIZER])
    assert (report.family, report.left_out) == ("sd15", {name: "position numbers"})


def test_safetensors_by_another_name_are_read(originals: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copy(originals["mvdream"], tmp_path / "model.ckpt"))
    assert convert(other, tmp_path / "out", extra=[TOKENIZER]).family == "mvdream"


@pytest.mark.parametrize(
    ("options", "changed"),
    [({}, {"dtype": "float16"}), ({"shard_bytes": 1_500_000}, {"shard_bytes": 1_600_000})],
    ids=["dtype", "shards"],
)
def test_a_broken_run_is_not_gone_on_with_by_other_options(
    options: dict[str, Any], changed: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    def break_off(name: str, size: int) -> None:
        if "encoder.layers" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(folders["mvdream"], tmp_path / "out", on_tensor=break_off, **options)
    found, fresh = (convert(folders["mvdream"], tmp_path / name, **changed).folder for name in ("out", "fresh"))
    for component in ("unet", "vae", "text_encoder"):
        ours, expected = ([path.read_bytes() for path in weight_files(folder, component)] for folder in (found, fresh))
        assert ours == expected, component


def test_nan_stays_nan_in_bfloat16() -> None:
    bits = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
    found = cast(RawTensor(dtype="F32", shape=(3,), read=lambda: bits), "BF16", name="x").read()
    assert torch.from_numpy(found.view(np.int16)).view(torch.bfloat16).isnan().all()


def test_a_source_that_vanishes_is_named_and_not_what_is_written(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(3)}, tmp_path / "in.safetensors")
    tensors = read_safetensors(tmp_path / "in.safetensors")
    (tmp_path / "in.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"in\.safetensors: 'a' cannot be read: No such file"):
        write_safetensors(tmp_path / "out.safetensors", tensors)
    assert not list(tmp_path.iterdir())
