"""The x2 latent upscaler under the names of k-diffusion, in which it was published, to a folder of diffusers' layout."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BACKENDS, FLOAT32_RMS, assert_close, make_upscaler
from safetensors.torch import load_file
from upscalers import FIXTURES, TINY, diffusers_pipeline, run_upscaler, upscaler_inputs, write_tiny_models

from mvshared.backend import load_upscaler
from mvshared.conversion.convert import convert
from mvshared.errors import CheckpointError
from mvshared.inspection import inspect
from mvshared.upscaling.folder import read_upscaler_config


def convolution(name: str, shape: list[int]) -> tuple[int, ...]:
    """The shape in k-diffusion, where these projections of pictures are convolutions of size 1."""
    return (*shape, 1, 1) if name in ("q_proj", "out_proj", "qkv_proj") and len(shape) == 2 else tuple(shape)


def k_diffusion_names(manifest: dict[str, list[int]]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """k-diffusion's tensors of diffusers' ones, as its scripts/convert_k_upscaler_to_diffusers.py has them."""
    outer = {
        "conv_in": "proj_in",
        "conv_out": "proj_out",
        "time_embedding.linear_1": "mapping.0",
        "time_embedding.linear_2": "mapping.2",
        "time_embedding.cond_proj": "mapping_cond",
    }
    for name, shape in manifest.items():
        path, _, kind = name.rpartition(".")
        block = re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", path)
        if name == "time_proj.weight":
            yield "inner_model.timestep_embed.weight", (*shape, 1)
        elif path in outer:
            yield f"inner_model.{outer[path]}.{kind}", tuple(shape)
        else:
            assert block
            way, number, what, layer, rest = block.groups()
            base = f"{way}_blocks.{number}"
            attends = f"{base}.attentions.0.norm2.linear.weight" in manifest
            both = f"{base}.attentions.0.norm1.linear.weight" in manifest
            first = (1 + attends + both) * int(layer) + (way == "down")
            here = f"inner_model.u_net.{way[0]}_blocks.{number}"
            if what == "resnets":
                part = {"norm1.linear": "main.0.mapper", "conv1": "main.2", "norm2.linear": "main.4.mapper"}
                part |= {"conv2": "main.6", "conv_shortcut": "skip"}
                yield f"{here}.{first}.{part[rest]}.{kind}", tuple(shape)
            elif rest in ("norm1.linear", "attn1.to_out.0"):
                part = "norm_in.mapper" if "norm" in rest else "out_proj"
                yield f"{here}.{first + 1}.{part}.{kind}", convolution(part, shape)
            elif rest == "attn1.to_q":
                yield f"{here}.{first + 1}.qkv_proj.{kind}", convolution("qkv_proj", [3 * shape[0], *shape[1:]])
            elif rest == "attn2.to_k":
                yield f"{here}.{first + 1 + both}.kv_proj.{kind}", (2 * shape[0], *shape[1:])
            elif rest not in ("attn1.to_k", "attn1.to_v", "attn2.to_v"):
                part = {"norm2.linear": "norm_dec.mapper", "attn2.norm_cross": "norm_enc", "attn2.to_q": "q_proj"}
                there = (part | {"attn2.to_out.0": "out_proj"})[rest]
                yield f"{here}.{first + 1 + both}.{there}.{kind}", convolution(there, shape)


def test_the_upscaler_has_the_names_and_shapes_of_the_public_one(tmp_path: Path) -> None:
    """At full width and depth, of zeros in half precision, with its moving average as in the published file."""
    manifest = json.loads((FIXTURES / "manifests" / "sd_x2_latent_upscaler_unet.json").read_text())
    tiny = {name: [max(1, size // 32) if size > 8 else size for size in shape] for name, shape in manifest.items()}
    tensors = {name: torch.randn(shape).half() for name, shape in k_diffusion_names(tiny)}
    for place in ("d_blocks.1.0", "u_blocks.0.12"):
        tensors[f"inner_model.u_net.{place}.kernel"] = torch.zeros(4, 4)
    tensors["low_res_noise_embed.weight"] = torch.randn(64, 1)
    torch.save({"model": {}, "model_ema": tensors, "epoch": 1}, tmp_path / "upscaler.pth")
    report = convert(tmp_path / "upscaler.pth", tmp_path / "out")
    found = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in found.items()} == tiny
    assert report.family == "sd-x2-latent-upscaler"
    assert report.missing == ("vae", "text_encoder", "tokenizer")
    q, k, v = tensors["inner_model.u_net.d_blocks.3.2.qkv_proj.weight"][..., 0, 0].chunk(3)
    for name, part in (("to_q", q), ("to_k", k), ("to_v", v)):
        assert torch.equal(found[f"down_blocks.3.attentions.0.attn1.{name}.weight"], part)
    scheduler = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["prediction_type"]) == ("EulerDiscreteScheduler", "sample")
    document = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
    assert document["layers_per_block"] == 4
    assert document["down_block_types"] == ["KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3]
    assert document["only_cross_attention"] == [True, True, True, False]
    assert document["noise_frequencies"] == tensors["low_res_noise_embed.weight"].flatten().tolist()
    assert report.left_out["low_res_noise_embed.weight"] == "kept as noise_frequencies in unet/config.json"


def test_a_converted_upscaler_computes_what_the_original_does(tmp_path: Path) -> None:
    """Its own network under k-diffusion's names, and the other components of a folder of diffusers."""
    config = replace(TINY, block_out_channels=(64, 64, 128, 128), attention_head_dim=64)
    diffusers_pipeline(config).save_pretrained(tmp_path / "diffusers")
    network = make_upscaler(config, "torch")
    weights = network.state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in weights.items()}
    joined = {"qkv_proj": ("to_q", "to_k", "to_v"), "kv_proj": ("to_k", "to_v")}
    originals = dict(zip(own_names(shapes), k_diffusion_names(shapes), strict=True))
    tensors = {}
    for own, (other, shape) in originals.items():
        layer = other.split(".")[-2]
        parts = [weights[re.sub(r"to_[qk]\.", f"{part}.", own)] for part in joined.get(layer, ())] or [weights[own]]
        tensors[other] = torch.cat(parts).reshape(shape)
    torch.save({"model_ema": tensors}, tmp_path / "upscaler.pth")
    convert(tmp_path / "upscaler.pth", tmp_path / "out", extra=[tmp_path / "diffusers"])
    for backend in BACKENDS:
        loaded: Any = load_upscaler(tmp_path / "out", backend=backend, device="cpu", dtype="float32")
        inputs = upscaler_inputs(config, batch=1, views=1, size=(16, 16))
        assert_close(run_upscaler(loaded.model.unet, inputs), run_upscaler(network, inputs), rms=FLOAT32_RMS)
        assert loaded.model.config.sigmas.interpolation_type == "log_linear"


def test_a_folder_is_stored_in_another_dtype(tmp_path: Path) -> None:
    for source in ("public", "own"):
        if source == "public":
            diffusers_pipeline().save_pretrained(tmp_path / "public")
        else:
            write_tiny_models(tmp_path / "own-models").joinpath("x2").rename(tmp_path / "own")
        convert(tmp_path / source, tmp_path / f"{source}-half", dtype="float16")
        report = inspect(tmp_path / f"{source}-half", backend="torch")
        assert not report.faults
        assert report.components[0].dtypes.keys() == {"F16"}
        assert read_upscaler_config(tmp_path / f"{source}-half") == read_upscaler_config(tmp_path / source)


def own_names(manifest: dict[str, list[int]]) -> list[str]:
    """diffusers' names in the order of `k_diffusion_names`, the first one of those that are one tensor there."""
    return [name for name in manifest if not re.search(r"attn1\.to_[kv]\.|attn2\.to_v\.", name)]


@pytest.mark.parametrize("given", [3.0, ["1"], [True, 1.0], [10**400], [float("nan")]], ids=str)
def test_frequencies_of_the_noise_that_are_no_numbers_are_refused(given: object, tmp_path: Path) -> None:
    folder = tmp_path / "diffusers"
    diffusers_pipeline(replace(TINY, block_out_channels=(64, 64, 128, 128), attention_head_dim=64)).save_pretrained(folder)
    path = folder / "unet" / "config.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"noise_frequencies": [0, 1.5, *[-2] * 62]}))
    assert read_upscaler_config(folder).noise_frequencies == (0.0, 1.5, *[-2.0] * 62)
    path.write_text(json.dumps(document | {"noise_frequencies": given}))
    with pytest.raises(CheckpointError, match="noise_frequencies must be a list of numbers"):
        read_upscaler_config(folder)
