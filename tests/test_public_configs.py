"""Folders as the public checkpoints have them: families, sizes and schedules from their configs, weights in every layout."""

import inspect
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from helpers import BACKENDS, FLOAT32_RMS, Backend, assert_close
from public_folders import SD_SCHEDULER, stable_diffusion
from transformers import CLIPTextModel

from mvshared.backend import load
from mvshared.checkpoint import read_model_config, weight_files
from mvshared.config import MVDREAM, SD21, SD_VAE, SchedulerConfig
from mvshared.errors import CheckpointError, OptionError
from mvshared.public_configs import (
    SCHEDULER_FIELDS,
    clip_text,
    clip_vision,
    diffusers_sampler,
    diffusers_scheduler,
    diffusers_unet,
    diffusers_vae,
    family_defaults,
    latent_size,
    ldm_unet,
)
from mvshared.samplers import sampler_steps
from mvshared.upscaling.folder import k_unet

FIXTURES = Path(__file__).parent / "fixtures"
HERE = Path("config.json")
K_UNET = {"_class_name": "UNet2DConditionModel", "down_block_types": [], "up_block_types": []}
DPM = {"_class_name": "DPMSolverMultistepScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VAE: dict[str, Any] = {
    "block_out_channels": [32],
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
}

# What the public folders say, without the fields that are diffusers' defaults.
MVDREAM_UNET = {
    "_class_name": "MultiViewUNetModel",
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attention_resolutions": [4, 2, 1],
    "num_head_channels": 64,
    "transformer_depth": 1,
    "context_dim": 1024,
    "camera_dim": 16,
}
SD21_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.8.0",
    "act_fn": "silu",
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 1024,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "use_linear_projection": True,
}


def test_the_public_mvdream_config_is_the_preset() -> None:
    assert ldm_unet(MVDREAM_UNET, path=HERE) == MVDREAM


def test_the_public_imagedream_config_has_its_resampler_and_its_frame() -> None:
    config = ldm_unet(MVDREAM_UNET | {"ip_dim": 16, "ip_weight": 1.0}, path=HERE)
    assert config.reference_frame
    assert config.resampler is not None
    assert (config.resampler.num_queries, config.resampler.heads, config.resampler.embedding_dim) == (16, 12, 1280)


def test_a_config_may_keep_the_fields_of_the_original_code() -> None:
    original = {"use_spatial_transformer": True, "use_linear_in_transformer": True, "use_checkpoint": False, "legacy": False}
    original |= {"ip_dim": 16, "with_ip": True, "ip_mode": "local_resample"}  # of imagedream's sd_v2_base_ipmv.yaml
    assert ldm_unet(MVDREAM_UNET | original, path=HERE) == ldm_unet(MVDREAM_UNET | {"ip_dim": 16}, path=HERE)


def test_the_local_variant_has_tokens_and_no_frame() -> None:
    config = ldm_unet(MVDREAM_UNET | {"ip_dim": 16, "reference_frame": False}, path=HERE)
    assert config.resampler is not None
    assert not config.reference_frame


def test_mvdream_on_stable_diffusion_1_5_has_its_heads_by_number() -> None:
    given = {name: value for name, value in MVDREAM_UNET.items() if name != "num_head_channels"}
    config = ldm_unet(given | {"num_heads": 8, "context_dim": 768}, path=HERE, linear=False)
    assert [config.heads(level) for level in range(4)] == [8] * 4
    assert (config.cross_attention_dim, config.use_linear_projection, config.camera_dim) == (768, False, 16)
    with pytest.raises(CheckpointError, match="num_head_channels or num_heads must be given"):
        ldm_unet(given, path=HERE)


def test_the_public_stable_diffusion_2_1_config_is_the_preset() -> None:
    config = diffusers_unet(SD21_UNET, path=HERE)
    assert [config.heads(level) for level in range(4)] == [SD21.heads(level) for level in range(4)]
    assert vars(config) | {"num_attention_heads": None} == vars(SD21)


def test_stable_diffusion_1_5_has_eight_heads_and_convolutions_around_its_transformers() -> None:
    changes = {"attention_head_dim": 8, "cross_attention_dim": 768}
    given = {name: value for name, value in SD21_UNET.items() if name != "use_linear_projection"} | changes
    config = diffusers_unet(given, path=HERE)
    assert [config.heads(level) for level in range(4)] == [8] * 4
    assert (config.cross_attention_dim, config.use_linear_projection) == (768, False)


def test_every_field_of_diffusers_own_configs_is_known() -> None:
    """With diffusers' defaults written out, as save_pretrained does it."""
    unet = UNet2DConditionModel(block_out_channels=(32, 32, 32, 32), cross_attention_dim=16)
    assert diffusers_unet(dict(unet.config), path=HERE).cross_attention_dim == 16
    assert diffusers_vae(dict(AutoencoderKL(block_out_channels=(32,)).config), path=HERE).block_out_channels == (32,)
    schedule = dict(DDIMScheduler(**SD_SCHEDULER).config)
    assert diffusers_scheduler(schedule, path=HERE) == SchedulerConfig()
    schedule = dict(PNDMScheduler(**{n: v for n, v in SD_SCHEDULER.items() if n != "clip_sample"}).config)
    assert diffusers_scheduler(schedule | {"_class_name": "PNDMScheduler"}, path=HERE) == SchedulerConfig()


def test_what_a_scheduler_leaves_out_has_the_default_of_diffusers() -> None:
    config = diffusers_scheduler({"_class_name": "DDIMScheduler", "clip_sample": False}, path=HERE)
    oracle = DDIMScheduler(clip_sample=False).config
    fields = {name: value for name, value in vars(config).items() if name != "karras_ends"}
    assert {name: oracle[name] for name in fields} == fields
    other = diffusers_scheduler({"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction"}, path=HERE)
    assert (other.set_alpha_to_one, other.prediction_type) == (False, "v_prediction")


BETAS = ("beta_start", "beta_end", "beta_schedule")
SOLVERS: list[tuple[Any, dict[str, Any], str, str]] = [
    (DDIMScheduler, {}, "ddim", "leading"),
    (PNDMScheduler, {}, "ddim", "leading"),
    (DPMSolverMultistepScheduler, {}, "dpmpp-2m", "linspace"),
    (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, "dpmpp-2m", "karras"),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, "dpmpp-2m-sde", "linspace"),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "ddim", "linspace"),
    (DPMSolverSinglestepScheduler, {}, "dpmpp-2s", "linspace"),
    (UniPCMultistepScheduler, {"timestep_spacing": "trailing"}, "unipc", "trailing"),
    (UniPCMultistepScheduler, {"solver_order": 3, "timestep_spacing": "trailing"}, "ddim", "trailing"),
    (EulerDiscreteScheduler, {"use_karras_sigmas": True}, "euler", "karras"),
    (EulerDiscreteScheduler, {"timestep_type": "continuous", "use_karras_sigmas": True}, "ddim", "linspace"),
    (EulerAncestralDiscreteScheduler, {}, "euler-ancestral", "linspace"),
]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' arrays are of before numpy 2
@pytest.mark.parametrize(("cls", "settings", "name", "spacing"), SOLVERS)
def test_a_sampler_that_is_here_is_the_default_with_its_spacing(
    cls: Any, settings: dict[str, Any], name: str, spacing: str
) -> None:
    document = dict(cls(**{name: SD_SCHEDULER[name] for name in BETAS}, **settings).config)
    document |= {"_class_name": cls.__name__, "clip_sample": False}
    assert diffusers_sampler(document) == name
    assert diffusers_scheduler(document, path=HERE).timestep_spacing == spacing


@pytest.mark.parametrize(
    ("cls", "name", "taken", "others"),
    [
        (UniPCMultistepScheduler, "unipc", "bh2", ("midpoint", "heun", "logrho")),
        (DPMSolverMultistepScheduler, "dpmpp-2m", "midpoint", ("bh1", "bh2", "logrho")),
        (DPMSolverSinglestepScheduler, "dpmpp-2s", "midpoint", ("bh1", "bh2", "logrho")),
    ],
)
def test_what_diffusers_takes_for_a_solver_is_taken_for_it(cls: Any, name: str, taken: str, others: tuple[str, ...]) -> None:
    for other in others:
        assert cls(solver_type=other).config["solver_type"] == taken
        assert diffusers_sampler({"_class_name": cls.__name__, "solver_type": other}) == name
    with pytest.raises(NotImplementedError):
        cls(solver_type="none of them")
    assert diffusers_sampler({"_class_name": cls.__name__, "solver_type": "none of them"}) == "ddim"


def test_karras_ends_are_those_of_the_file_s_spacing_for_euler_alone() -> None:
    karras = SD_SCHEDULER | {"use_karras_sigmas": True}
    del karras["clip_sample"], karras["set_alpha_to_one"]
    for kind, spacing, expected in (
        ("EulerDiscreteScheduler", "leading", "leading"),
        ("EulerDiscreteScheduler", "trailing", "trailing"),
        ("EulerDiscreteScheduler", "linspace", "training"),
        ("DPMSolverMultistepScheduler", "leading", "training"),
    ):
        config = diffusers_scheduler(karras | {"_class_name": kind, "timestep_spacing": spacing}, path=HERE)
        assert (config.timestep_spacing, config.karras_ends) == ("karras", expected)
    plain = diffusers_scheduler(karras | {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": False}, path=HERE)
    assert plain.karras_ends == "training"


ASIDE: dict[str, Any] = {  # what classes without such a field do
    "num_train_timesteps": 1000,
    "beta_start": None,
    "beta_end": None,
    "beta_schedule": None,
    "prediction_type": None,
    "steps_offset": 0,
    "set_alpha_to_one": False,
    "rescale_betas_zero_snr": False,
    "timestep_spacing": "linspace",
}


@pytest.mark.parametrize("kind", [kind for kind in SCHEDULER_FIELDS if kind != "DPMSolverSDEScheduler"])  # needs torchsde
def test_what_a_scheduler_s_file_leaves_out_is_as_in_diffusers(kind: str) -> None:
    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
    ours = diffusers_scheduler({"_class_name": kind, "clip_sample": False}, path=HERE)
    for field, without in ASIDE.items():
        default = parameters[field].default if field in parameters else without
        assert getattr(ours, field) == default, field


def test_flow_matching_is_refused_of_every_solver() -> None:
    for kind in ("DEISMultistepScheduler", "SASolverScheduler", "UniPCMultistepScheduler", "DPMSolverMultistepScheduler"):
        with pytest.raises(CheckpointError, match="use_flow_sigmas must be False"):
            diffusers_scheduler({"_class_name": kind, "use_flow_sigmas": True}, path=HERE)


@pytest.mark.parametrize(
    ("read", "document", "message"),
    [
        (ldm_unet, MVDREAM_UNET | {"num_classes": 10}, "num_classes must be None"),
        (ldm_unet, MVDREAM_UNET | {"surprise": 1}, "unknown field 'surprise'"),
        (ldm_unet, {"model_channels": 320}, "the field 'channel_mult' is missing"),
        (ldm_unet, MVDREAM_UNET | {"num_res_blocks": [2, 2]}, "num_res_blocks is malformed"),
        (ldm_unet, MVDREAM_UNET | {"context_dim": "1024"}, "context_dim is malformed"),
        (ldm_unet, MVDREAM_UNET | {"context_dim": True}, "context_dim is malformed"),
        (ldm_unet, MVDREAM_UNET | {"ip_dim": 16, "ip_weight": 0.5}, "ip_weight must be 1"),
        (diffusers_unet, SD21_UNET | {"class_embed_type": "projection"}, "class_embed_type must be None"),
        (diffusers_unet, SD21_UNET | {"down_block_types": ["KDownBlock2D"] * 4}, "down_block_types must be 4 of Cross"),
        (diffusers_unet, SD21_UNET | {"up_block_types": ["CrossAttnUpBlock2D"] * 4}, "the other way round"),
        (diffusers_unet, SD21_UNET | {"attention_head_dim": [5, 10]}, "attention_head_dim is malformed"),
        (ldm_unet, MVDREAM_UNET | {"channel_mult": [1, None]}, "channel_mult is malformed"),
        (diffusers_unet, SD21_UNET | {"block_out_channels": [320, 640, None, 1280]}, "block_out_channels is malformed"),
        (diffusers_unet, SD21_UNET | {"num_attention_heads": [8, 8, 8, None]}, "num_attention_heads is malformed"),
        (diffusers_unet, SD21_UNET | {"attention_head_dim": True}, "attention_head_dim is malformed"),
        (diffusers_unet, SD21_UNET | {"down_block_types": [["DownBlock2D"]] * 4}, "down_block_types is malformed"),
        (ldm_unet, MVDREAM_UNET | {"ip_dim": 16, "with_ip": False}, "with_ip must be true where ip_dim is above 0"),
        (ldm_unet, MVDREAM_UNET | {"ip_dim": 4, "ip_mode": "global"}, "ip_mode must be 'local_resample' for the models"),
        (diffusers_unet, SD21_UNET | {"norm_num_groups": 7}, "config.json: block_out_channels must be multiples of"),
        (
            diffusers_unet,
            SD21_UNET | {"block_out_channels": [15, 640, 1280, 1280], "norm_num_groups": 5},
            "config.json: block_out_channels must be even at the finest level",
        ),
        (diffusers_unet, SD21_UNET | {"layers_per_block": 2**31}, "layers_per_block must be at most 100, got"),
        (
            diffusers_unet,
            SD21_UNET | {"transformer_layers_per_block": 10**9},
            "transformer_layers_per_block must be at most",
        ),
        (diffusers_vae, VAE | {"block_out_channels": [2**31]}, "block_out_channels must be at most 1000000, got"),
        (k_unet, K_UNET | {"block_out_channels": []}, "block_out_channels must be one or more whole numbers"),
        (
            diffusers_vae,
            {"block_out_channels": [32], "down_block_types": ["X"]},
            "down_block_types must be 1 times DownEncoderBlock2D",
        ),
        (diffusers_vae, VAE | {"latents_std": ["a", 1.0, 1.0, 1.0]}, "latents_std is malformed"),
        (diffusers_vae, {"_class_name": "AutoencoderTiny"}, "_class_name must be 'AutoencoderKL', got 'AutoencoderTiny'"),
        (partial(clip_text, projection=False), {"model_type": "t5"}, "model_type must be 'clip_text_model', got 't5'"),
        (
            partial(clip_vision, projection=False),
            {"model_type": "dinov2"},
            "model_type must be 'clip_vision_model', got 'dinov2'",
        ),
        (diffusers_vae, VAE | {"latents_mean": [0.0, 0.0, 0.0, float("nan")]}, "latents_mean is malformed"),
        (diffusers_vae, VAE | {"scaling_factor": float("inf")}, "scaling_factor is malformed"),
        (diffusers_scheduler, SD_SCHEDULER | {"clip_sample": True}, "clip_sample must be False"),
        (diffusers_scheduler, {"_class_name": "DDIMScheduler"}, "clip_sample must be False"),
        (diffusers_scheduler, SD_SCHEDULER | {"trained_betas": [0.1]}, "trained_betas must be None"),
        (diffusers_scheduler, SD_SCHEDULER | {"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule must be one of"),
        (diffusers_scheduler, SD_SCHEDULER | {"steps_offset": 1.5}, "steps_offset is malformed"),
        (diffusers_scheduler, {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "_class_name must be one of"),
        (diffusers_scheduler, {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "_class_name must be one of"),
        (diffusers_scheduler, {"_class_name": ["DDIMScheduler"]}, "_class_name must be one of"),
        (diffusers_scheduler, {"_class_name": "EulerDiscreteScheduler", "sigma_min": 0.1}, "sigma_min must be None"),
        (diffusers_scheduler, {"_class_name": "UniPCMultistepScheduler", "sigma_max": 5.0}, "sigma_max must be None"),
        (diffusers_scheduler, DPM | {"lambda_min_clipped": -2.0}, "lambda_min_clipped must be at most -2.68"),
    ],
)
def test_configs_that_the_models_here_cannot_be_are_refused(read: Any, document: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(document, path=HERE)


@pytest.mark.parametrize(("read", "document"), [(ldm_unet, MVDREAM_UNET), (diffusers_unet, SD21_UNET), (diffusers_vae, VAE)])
def test_fields_that_newer_libraries_add_as_null_are_off(read: Any, document: dict[str, Any]) -> None:
    assert read(document | {"new_kind_of_attention": None}, path=HERE) == read(document, path=HERE)
    with pytest.raises(CheckpointError, match=r"unknown field 'new_kind_of_attention' \(False\)"):
        read(document | {"new_kind_of_attention": False}, path=HERE)


@pytest.mark.parametrize(
    ("name", "leftover"),
    [
        ("EulerAncestralDiscreteScheduler", {"use_karras_sigmas": True, "sigma_min": 0.1}),
        ("DPMSolverSinglestepScheduler", {"timestep_spacing": "leading", "rescale_betas_zero_snr": True, "steps_offset": 1}),
        ("PNDMScheduler", {"clip_sample": True, "rescale_betas_zero_snr": True, "thresholding": True}),
        ("DPMSolverMultistepScheduler", {"clip_sample": True, "set_alpha_to_one": True, "lambda_min_clipped": -math.inf}),
        ("EulerDiscreteScheduler", {"lambda_min_clipped": -2.0, "clip_sample": True}),
        ("EulerDiscreteScheduler", {"use_lu_lambdas": True, "use_flow_sigmas": True}),
        ("UniPCMultistepScheduler", {"use_lu_lambdas": True}),
    ],
)
def test_fields_of_another_scheduler_s_class_count_for_nothing(name: str, leftover: dict[str, Any]) -> None:
    plain = {"_class_name": name, **{field: SD_SCHEDULER[field] for field in BETAS}}
    assert diffusers_scheduler(plain | leftover, path=HERE) == diffusers_scheduler(plain, path=HERE)
    assert diffusers_sampler(plain | leftover) == diffusers_sampler(plain)


def test_one_answer_for_all_levels_may_be_a_list() -> None:
    assert diffusers_unet(SD21_UNET | {"only_cross_attention": [False] * 4}, path=HERE) == diffusers_unet(SD21_UNET, path=HERE)
    with pytest.raises(CheckpointError, match="only_cross_attention must be False"):
        diffusers_unet(SD21_UNET | {"only_cross_attention": [True, False, False, False]}, path=HERE)


# Whole folders


@pytest.mark.parametrize("changes", [{"steps_offset": 0}, {"clip_sample": True}, {"steps_offset": 0, "clip_sample": True}])
def test_a_folder_is_read_as_diffusers_pipeline_reads_it(changes: dict[str, Any], tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path, **changes)
    with pytest.warns(FutureWarning):  # which say that the pipeline changes the file's values
        pipe = StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(folder / "vae"),
            text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
            tokenizer=None,  # type: ignore[arg-type]
            unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
            scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),  # type: ignore[arg-type]
            safety_checker=None,  # type: ignore[arg-type]
            feature_extractor=None,  # type: ignore[arg-type]
            requires_safety_checker=False,
        )
    pipe.scheduler.set_timesteps(7)
    config = read_model_config(folder)
    ours = [step.timestep for step in sampler_steps("ddim", config.scheduler, steps=7, eta=0.0)]
    assert ours == pipe.scheduler.timesteps.tolist()
    assert not pipe.scheduler.config.clip_sample


def test_the_scheduler_is_of_the_class_that_the_index_names(tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path)
    assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["_class_name"] == "DDIMScheduler"
    index = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    theirs: Any = EulerDiscreteScheduler.from_pretrained(folder / "scheduler")  # of that class in their pipelines, too
    config = read_model_config(folder)
    assert config.defaults.scheduler == "euler"
    assert config.scheduler.timestep_spacing == theirs.config["timestep_spacing"]


@pytest.mark.parametrize(("size", "expected"), [(16, 16), ([16, 16], 16), (None, 32)])
def test_the_size_of_the_latents_is_one_number_or_two_that_are_the_same(size: Any, expected: int) -> None:
    assert latent_size({"sample_size": size}, path=HERE, default=32) == expected
    assert latent_size({"image_size": size}, path=HERE, default=32) == expected
    assert latent_size({}, path=HERE, default=32) == 32


def test_folders_of_old_diffusers_are_as_large_as_its_pipeline_makes_them() -> None:
    for version, size, expected in (
        ("0.8.0", 8, 64),
        ("0.8.1", 96, 96),
        ("0.8", 8, 64),
        ("0.9", 8, 8),
        ("0.10.2", 8, 8),
        ("0.42.1", 8, 8),
    ):
        assert latent_size({"sample_size": size, "_diffusers_version": version}, path=HERE, default=32) == expected
    old: dict[str, Any] = {"image_size": 32, "_diffusers_version": "0.8.0"}
    assert latent_size(old, path=HERE, default=64) == 32, "MVDream's, whose pipeline does not"


def test_what_diffusers_takes_for_the_same_is_the_same() -> None:
    same = {"cross_attention_dim": [1024] * 4, "act_fn": "swish"}
    assert diffusers_unet(SD21_UNET | same, path=HERE) == diffusers_unet(SD21_UNET, path=HERE)
    assert diffusers_vae(VAE | {"act_fn": "swish"}, path=HERE) == diffusers_vae(VAE, path=HERE)
    with pytest.raises(CheckpointError, match="cross_attention_dim is malformed"):
        diffusers_unet(SD21_UNET | {"cross_attention_dim": [1024, 1024, 768, 1024]}, path=HERE)
    unused = {"block_out_channels": [320, 640, 1280, 1280], "attention_head_dim": [3, 10, 20, 20]}
    without = {"down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3]}
    without |= {"up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"]}
    assert diffusers_unet(SD21_UNET | unused | without, path=HERE).heads(0) == 3
    with pytest.raises(CheckpointError, match="num_attention_heads must be a divisor of 320 at level 0"):
        diffusers_unet(SD21_UNET | unused, path=HERE)


def test_a_text_tower_with_an_attention_mask_is_refused() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    clip_text(sizes | {"use_attention_mask": False}, path=HERE, projection=False)
    with pytest.raises(CheckpointError, match="use_attention_mask must be false"):
        clip_text(sizes | {"use_attention_mask": True}, path=HERE, projection=False)


@pytest.mark.parametrize("size", [8.0, True, 0, "16", [16, 24], [16], [[16], [16]]])
def test_other_sizes_of_the_latents_are_refused(size: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: sample_size"):
        latent_size({"sample_size": size}, path=HERE, default=32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_folder_that_diffusers_saved_computes_what_diffusers_does(backend: Backend, tmp_path: Path) -> None:
    pipe = load(stable_diffusion(tmp_path), backend=backend, device="cpu")
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4), np.float32)
    views = pipe.generate(prompt="a red owl", negative_prompt="dull", steps=3, guidance=7.5, latents=latents, size_px=16)
    ids = torch.from_numpy(pipe.tokenizer(["dull", "a red owl"]).ids)
    unet, scheduler = (
        UNet2DConditionModel.from_pretrained(tmp_path / "unet"),
        DDIMScheduler(**SD_SCHEDULER),
    )
    with torch.no_grad():
        text = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")(input_ids=ids).last_hidden_state
        scheduler.set_timesteps(3)
        x = torch.from_numpy(latents).permute(0, 3, 1, 2)
        for t in scheduler.timesteps:
            unconditional, conditional = unet(x.repeat(2, 1, 1, 1), t, encoder_hidden_states=text).sample.chunk(2)
            x = scheduler.step(unconditional + 7.5 * (conditional - unconditional), int(t), x).prev_sample  # pyright: ignore
    assert_close(views.latents, x.permute(0, 2, 3, 1), rms=5 * FLOAT32_RMS)


def test_families_and_defaults_come_from_the_sizes(tmp_path: Path) -> None:
    linear = {"use_linear_projection": True}
    config = read_model_config(stable_diffusion(tmp_path / "epsilon", unet=linear))
    assert (config.family, config.defaults.views, config.defaults.guidance, config.defaults.size_px) == ("sd21", 1, 7.5, 16)
    v = stable_diffusion(tmp_path / "v", unet=linear, prediction_type="v_prediction")
    assert read_model_config(v).family == "sd21-768"
    assert read_model_config(stable_diffusion(tmp_path / "convolutions")).family == "sd15"


def test_a_model_without_cameras_makes_one_view(tmp_path: Path) -> None:
    pipe = load(stable_diffusion(tmp_path), backend="torch", device="cpu")
    with pytest.raises(OptionError, match="views must be 1: this model knows no cameras, got 2"):
        pipe.generate(prompt="owl", views=2)
    for name, options in {
        "elevation_deg": {"elevation_deg": 40.0},
        "azimuths_deg": {"azimuths_deg": [90.0]},
        "cameras": {"cameras": [[0.0, 40.0]]},
    }.items():
        with pytest.raises(OptionError, match=f"{name} must be left out: this model knows no cameras"):
            pipe.generate(prompt="owl", **options)
    views = pipe.generate(prompt="owl", steps=1, size_px=16)
    again = pipe.generate(prompt="owl", steps=1, size_px=16, cameras=views.cameras)  # as a run that is repeated does
    np.testing.assert_array_equal(views.images, again.images)


def test_models_that_edit_pictures_are_no_models_with_normal_maps(tmp_path: Path) -> None:
    for channels in (8, 9):
        folder = stable_diffusion(tmp_path / f"{channels}", unet={"in_channels": channels})
        with pytest.raises(CheckpointError, match=f"in_channels must be as many as out_channels .*got {channels} and 4"):
            read_model_config(folder)


@pytest.mark.parametrize("backend", BACKENDS)
def test_shards_and_the_float16_variant_are_read(backend: Backend, tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path)
    arguments: dict[str, Any] = {"prompt": "owl", "steps": 1, "guidance": 1, "size_px": 16}
    expected = load(folder, backend=backend, device="cpu").generate(**arguments).latents
    (file,) = weight_files(folder, "unet")
    weights = safetensors.numpy.load_file(file)
    file.unlink()
    places = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(sorted(weights))}
    for part in set(places.values()):
        mine = {name: weights[name] for name in weights if places[name] == part}
        safetensors.numpy.save_file(mine, file.with_name(part))
    index = file.with_name(f"{file.name}.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert len(weight_files(folder, "unet")) == 2
    np.testing.assert_array_equal(load(folder, backend=backend, device="cpu").generate(**arguments).latents, expected)
    index.unlink()
    half = {name: array.astype(np.float16) for name, array in weights.items()}
    safetensors.numpy.save_file(half, file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert_close(load(folder, backend=backend, device="cpu").generate(**arguments).latents, expected, rms=5e-3)


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        (["model.fp16.safetensors", "model.safetensors"], ["model.safetensors"]),
        (["model.fp16.safetensors"], ["model.fp16.safetensors"]),
        (["model.fp16.safetensors.index.json", "a.safetensors", "b.safetensors"], ["a.safetensors", "b.safetensors"]),
        (["model.safetensors.index.fp16.json", "a.safetensors", "b.safetensors"], ["a.safetensors", "b.safetensors"]),
        (
            ["model.safetensors.index.json", "model.fp16.safetensors", "a.safetensors", "b.safetensors"],
            ["a.safetensors", "b.safetensors"],
        ),
    ],
)
def test_the_variant_in_float16_is_taken_where_there_is_no_other(there: list[str], taken: list[str], tmp_path: Path) -> None:
    (tmp_path / "text_encoder").mkdir()
    for name in there:
        weight_map = {"x": "a.safetensors", "y": "b.safetensors"}
        (tmp_path / "text_encoder" / name).write_text(json.dumps({"weight_map": weight_map}))
    assert [path.name for path in weight_files(tmp_path, "text_encoder")] == taken


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "must hold a weight_map"),
        ({"a": 1}, "must hold a weight_map"),
        ({"a": "../escape.safetensors"}, "a shard must lie beside its index"),
        ({"a": ""}, "a shard must lie beside its index"),
        ({"a": "gone.safetensors"}, "gone.safetensors: the weight file is missing"),
    ],
)
def test_broken_indices_are_refused(weight_map: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=message):
        weight_files(tmp_path, "unet")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path)
    (file,) = weight_files(folder, "vae")
    shutil.copy(file, file.with_name("b.safetensors"))
    file.rename(file.with_name("a.safetensors"))
    names = {"a": "a.safetensors", "b": "b.safetensors"}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(CheckpointError, match=r"which a\.safetensors holds too"):
        load(folder, backend="torch", device="cpu")


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.bin"])
def test_pickled_weights_are_pointed_to(name: str, tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path)
    (file,) = weight_files(folder, "unet")
    pickled = file.rename(file.with_name(name))
    (file.with_name("training_args.bin")).touch()
    with pytest.raises(CheckpointError) as caught:
        weight_files(folder, "unet")
    assert caught.value.hint == f"mvmlx convert {pickled} {file} makes it of what is there"


def test_weights_under_other_names_are_named(tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path)
    (file,) = weight_files(folder, "unet")
    for name in ("diffusion_pytorch_model-00001-of-00002.bin", "diffusion_pytorch_model-00002-of-00002.bin"):
        (file.with_name(name)).touch()
    file.unlink()
    with pytest.raises(CheckpointError) as caught:
        weight_files(folder, "unet")
    assert caught.value.hint == (
        "what is there, diffusion_pytorch_model-00001-of-00002.bin and 1 more, is not read under this name"
    )
    for other in file.parent.glob("*.bin"):
        other.unlink()
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors: the weight file is missing$"):
        weight_files(folder, "unet")


def test_a_vae_of_other_than_three_colours_is_refused(tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path)
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 4, "out_channels": 4}))
    with pytest.raises(CheckpointError, match=r"in_channels must be 3, which are red, .* got \(4, 4\)"):
        read_model_config(folder)


def test_other_classes_are_refused(tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(CheckpointError, match="_class_name must be MultiViewUNetModel or UNet2DConditionModel, got 'Flux"):
        read_model_config(folder)


def test_components_that_the_model_would_lose_are_refused(tmp_path: Path) -> None:
    folder, path = stable_diffusion(tmp_path), tmp_path / "model_index.json"
    index = {"_class_name": "MVDreamPipeline", "unet": ["diffusers", "UNet2DConditionModel"], "image_encoder": [None, None]}
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "camera_proj": [None, None]}
    path.write_text(json.dumps(index))
    assert read_model_config(folder).family == "sd15"
    path.write_text(json.dumps(index | {"_class_name": ["pipeline_mvdream", "MVDreamPipeline"]}))  # of a file in the folder
    assert read_model_config(folder).family == "sd15"
    path.write_text(json.dumps(index | {"camera_proj": ["mvdream.camera_proj", "CameraMatrixEmbedding"]}))
    with pytest.raises(CheckpointError, match=r"component 'camera_proj' \(CameraMatrixEmbedding\), which no model here has"):
        read_model_config(folder)


@pytest.mark.parametrize(
    ("component", "kind", "message"),
    [
        (
            "unet",
            ["modules", "UNet2p5DConditionModel"],
            "the class of unet must be MultiViewUNetModel or UNet2DConditionModel, got 'UNet2p5DConditionModel'",
        ),
        ("vae", ["diffusers", "AutoencoderTiny"], "the class of vae must be AutoencoderKL, got 'AutoencoderTiny'"),
        ("text_encoder", ["transformers", "BertModel"], r"the class of text_encoder must be CLIPTextModel .*got 'BertModel'"),
    ],
)
def test_the_index_may_name_no_class_that_is_not_read(component: str, kind: list[str], message: str, tmp_path: Path) -> None:
    folder, path = stable_diffusion(tmp_path), tmp_path / "model_index.json"
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    index |= {"vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"]}
    path.write_text(json.dumps(index))
    assert read_model_config(folder).family == "sd15"
    path.write_text(json.dumps(index | {component: kind}))
    with pytest.raises(CheckpointError, match=rf"model_index\.json: {message}"):
        read_model_config(folder)


def test_the_class_of_a_pipeline_whose_code_comes_with_the_folder_is_no_component(tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path)
    index = {"_class_name": ["pipeline", "LongPromptPipeline"], "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert read_model_config(folder).family == "sd15"


def test_a_model_without_text_is_told_from_one_whose_files_are_missing(tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path)
    shutil.rmtree(folder / "text_encoder")
    index = {"unet": ["diffusers", "UNet2DConditionModel"], "image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names no text_encoder, .* given a picture alone"):
        read_model_config(folder)
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": ["transformers", "CLIPTextModel"]}))
    with pytest.raises(CheckpointError, match="the weight file is missing"):
        read_model_config(folder)


@pytest.mark.parametrize(
    ("field", "most"),
    [("vocab_size", 10**6), ("intermediate_size", 10**6), ("max_position_embeddings", 10**6), ("num_hidden_layers", 100)],
)
def test_encoders_of_absurd_sizes_are_refused_before_they_are_made(tmp_path: Path, field: str, most: int) -> None:
    folder = stable_diffusion(tmp_path)
    path = folder / "text_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: 10**30}))
    with pytest.raises(CheckpointError, match=f"{field} must be at most {most}, got 1000"):
        read_model_config(folder)


def test_encoders_of_another_width_are_refused(tmp_path: Path) -> None:
    folder = stable_diffusion(tmp_path)
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": 48}))
    with pytest.raises(CheckpointError, match="cross_attention_dim must be the text encoder's hidden_size, 32, got 48"):
        read_model_config(folder)


def test_the_vae_preset_is_the_public_config() -> None:
    given = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 256,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    assert diffusers_vae(given, path=HERE) == SD_VAE
    for size, read in (([256, 128], 256), (None, 256)):
        assert diffusers_vae(given | {"sample_size": size}, path=HERE).sample_size == read


@pytest.mark.parametrize(
    ("read", "oracle"), [(clip_text, transformers.CLIPTextConfig), (clip_vision, transformers.CLIPVisionConfig)]
)
def test_what_a_tower_s_file_leaves_out_has_the_default_of_transformers(read: Any, oracle: Any) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    theirs = oracle(**sizes)
    for name, value in vars(read(sizes, path=HERE, projection=True)).items():
        assert value == getattr(theirs, name), name


def test_views_without_options_are_those_of_the_reference_code() -> None:
    mvdream, imagedream = (family_defaults(family, size_px=256) for family in ("mvdream", "imagedream"))
    assert (mvdream.views, mvdream.steps, mvdream.guidance, mvdream.elevation_deg) == (4, 30, 5.0, 15.0)
    assert mvdream.negative_prompt == ""
    assert (imagedream.views, imagedream.steps, imagedream.guidance, imagedream.elevation_deg) == (4, 30, 5.0, 5.0)
    assert imagedream.negative_prompt is not None and imagedream.negative_prompt.startswith("uniform low no texture ugly")
