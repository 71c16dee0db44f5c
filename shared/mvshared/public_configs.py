"""Configurations as the public checkpoints write them, read into this project's.

Every field of a U-Net's or a VAE's is used, neutral, or refused; one that a newer library adds is neutral as null. A
scheduler's file has fields of many samplers, of which those of its own class count; a CLIP tower's has transformers' own, of
which those count that say how it computes.

Sources: diffusers' UNet2DConditionModel, AutoencoderKL and DDIMScheduler; MultiViewUNetModel of ashawkey/mvdream_diffusers,
whose fields are those of LDM's openaimodel.py; transformers' CLIPTextConfig and CLIPVisionConfig.
"""

import math
import re
import sys
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mvshared.config import (
    CLIPTextConfig,
    CLIPVisionConfig,
    GenerationDefaults,
    ResamplerConfig,
    SamplerName,
    SchedulerConfig,
    UNetConfig,
    VAEConfig,
)
from mvshared.errors import CheckpointError, OptionError
from mvshared.schedule import alphas_cumprod

Document = Mapping[str, Any]
Config = TypeVar("Config")

# Values that change nothing of what the models here compute; a field with another one is refused.
LDM_UNET_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "dims": (2,),
    "conv_resample": (True,),
    "use_scale_shift_norm": (False,),
    "resblock_updown": (False,),
    "num_classes": (None,),
    "n_embed": (None,),
    "adm_in_channels": (None,),
    "disable_self_attentions": (None,),
    "num_attention_blocks": (None,),
    "disable_middle_self_attn": (False,),
    "num_heads_upsample": (-1, None),
    "ip_mode": ("local_resample",),
}
DIFFUSERS_UNET_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "addition_embed_type": (None,),
    "addition_embed_type_num_heads": (64,),
    "addition_time_embed_dim": (None,),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "downsample_padding": (1,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "projection_class_embeddings_input_dim": (None,),
    "resnet_out_scale_factor": (1.0,),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}
VAE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "shift_factor": (None,),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
}
# Samplers by diffusers' class names, and what the fields must be, where they are given, for it to be the one here.
SIGMAS = {"use_exponential_sigmas": False, "use_beta_sigmas": False, "final_sigmas_type": "zero"}
FLOW = {"use_flow_sigmas": False}
DPM_SOLVER = SIGMAS | FLOW | {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
UNIPC = SIGMAS | FLOW | {"solver_order": 2, "solver_type": "bh2", "predict_x0": True, "disable_corrector": []}
UNIPC |= {"solver_p": None, "lower_order_final": True}
EULER = SIGMAS | {"interpolation_type": "linear", "timestep_type": "discrete"}
DIFFUSERS_SAMPLERS: dict[str, dict[SamplerName, dict[str, Any]]] = {
    "DPMSolverMultistepScheduler": {
        "dpmpp-2m": DPM_SOLVER | {"use_lu_lambdas": False},
        "dpmpp-2m-sde": DPM_SOLVER | {"use_lu_lambdas": False, "algorithm_type": "sde-dpmsolver++"},
    },
    "DPMSolverSinglestepScheduler": {"dpmpp-2s": DPM_SOLVER},
    "UniPCMultistepScheduler": {"unipc": UNIPC},
    "EulerDiscreteScheduler": {"euler": EULER},
    "EulerAncestralDiscreteScheduler": {"euler-ancestral": {}},
}
# What these classes take some of each other's `solver_type` for: a config that was made from another class's may still have it.
SOLVERS_TAKEN_FOR = {
    "DPMSolverMultistepScheduler": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
    "DPMSolverSinglestepScheduler": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint"),
    "UniPCMultistepScheduler": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2"),
}
SCHEDULER_NEUTRAL: dict[str, tuple[Any, ...]] = {"clip_sample": (False,), "thresholding": (False,), "trained_betas": (None,)}
SCHEDULER_NEUTRAL |= {"sigma_min": (None,), "sigma_max": (None,), "use_flow_sigmas": (False,)}
# The schedulers of diffusers that have its noise schedule of betas, and the fields of each beside that schedule's. Files often
# keep those of another class, which diffusers does not read.
BETAS = {"_class_name", "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"}
SPACED = BETAS | {"timestep_spacing", "steps_offset"}
CLIPPED = SPACED | {"clip_sample", "thresholding", "rescale_betas_zero_snr"}
KARRAS = SPACED | {"use_karras_sigmas"}
THRESHOLD = {"thresholding", "use_flow_sigmas"}
SOLVER = KARRAS | THRESHOLD | {"lambda_min_clipped", "rescale_betas_zero_snr"}
SIGMA_RANGE = {"sigma_min", "sigma_max", "rescale_betas_zero_snr"}
SCHEDULER_FIELDS = {
    "DDIMScheduler": CLIPPED | {"set_alpha_to_one"},
    "DDIMParallelScheduler": CLIPPED | {"set_alpha_to_one"},
    "LCMScheduler": CLIPPED | {"set_alpha_to_one"},
    "TCDScheduler": CLIPPED | {"set_alpha_to_one"},
    "DDPMScheduler": CLIPPED,
    "DDPMParallelScheduler": CLIPPED,
    "PNDMScheduler": SPACED | {"set_alpha_to_one"},
    "LMSDiscreteScheduler": KARRAS,
    "HeunDiscreteScheduler": KARRAS | {"clip_sample"},
    "KDPM2DiscreteScheduler": KARRAS,
    "KDPM2AncestralDiscreteScheduler": KARRAS,
    "DPMSolverSDEScheduler": KARRAS,
    "DEISMultistepScheduler": KARRAS | THRESHOLD,
    "SASolverScheduler": KARRAS | THRESHOLD | {"lambda_min_clipped"},
    "DPMSolverMultistepScheduler": SOLVER,
    "DPMSolverSinglestepScheduler": BETAS | THRESHOLD | {"use_karras_sigmas", "lambda_min_clipped"},
    "UniPCMultistepScheduler": KARRAS | THRESHOLD | SIGMA_RANGE,
    "EulerDiscreteScheduler": KARRAS | SIGMA_RANGE,
    "EulerAncestralDiscreteScheduler": SPACED | {"rescale_betas_zero_snr"},
}
# Where a class of diffusers has another default than 0.0001 and 0.02, "linear", "leading", set_alpha_to_one False.
_NARROW = {"beta_start": 0.00085, "beta_end": 0.012}
_LATENT_CONSISTENCY = _NARROW | {"beta_schedule": "scaled_linear", "set_alpha_to_one": True}
SCHEDULER_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"set_alpha_to_one": True},
    "DDIMParallelScheduler": {"set_alpha_to_one": True},
    "LCMScheduler": _LATENT_CONSISTENCY,
    "TCDScheduler": _LATENT_CONSISTENCY,
    "DDPMScheduler": {},
    "DDPMParallelScheduler": {},
    "PNDMScheduler": {},
}
_WITH_NARROW = ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE")
SCHEDULER_DEFAULTS |= {f"{name}Scheduler": _NARROW | {"timestep_spacing": "linspace"} for name in _WITH_NARROW}
# What diffusers' pipelines of Stable Diffusion, and MVDream's, set whatever the file says.
SET_BY_PIPELINES = {"clip_sample": False, "steps_offset": 1}
# Fields that say nothing about the result: sizes of the training, precision of an implementation, regularisation.
IGNORED = {"sample_size", "image_size", "upcast_attention", "dropout", "use_checkpoint", "use_fp16", "legacy"}
IGNORED |= {"force_upcast", "use_new_attention_order", "use_spatial_transformer", "spatial_transformer_attn_type"}
IMAGEDREAM_NEGATIVE_PROMPT = (
    "uniform low no texture ugly, boring, bad anatomy, blurry, pixelated, obscure, unnatural colors, poor lighting, dull, and "
    "unclear."
)
DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}


class Fields:
    """A document whose fields are taken one by one; what nobody took in the end is refused."""

    def __init__(self, document: Document, *, path: Path) -> None:
        self.left = {name: value for name, value in document.items() if not name.startswith("_")}
        self.path = path

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        """The value of a field, of the given kind. Raises CheckpointError if it is another, or missing without a default."""
        value = self.left.pop(name, default)
        if value is ...:
            raise CheckpointError(f"the field {name!r} is missing", path=self.path)
        if value is default:
            return value
        if not _is_of(value, kind if isinstance(kind, tuple) else (kind,)):
            raise self.malformed(name, value)
        return float(value) if kind is float else value

    def take_list(self, name: str, kind: type, default: Any = ...) -> Any:
        """A field that is a list with entries of one kind, as a tuple; or the default. Raises CheckpointError."""
        value = self.take(name, (list, tuple), default)
        if value is default:
            return value
        if not all(_is_of(each, (kind,)) for each in value):
            raise self.malformed(name, value)
        return tuple(value)

    def per_level(self, name: str, levels: int, default: Any = ...) -> Any:
        """A field that is one whole number for all levels, or a list with one for each; a default of None stays None."""
        value = self.take(name, (int, list, tuple), default)
        if value is None:
            return None
        values = (value,) * levels if isinstance(value, int) else tuple(value)
        if len(values) != levels or not all(_is_of(each, (int,)) for each in values):
            raise self.malformed(name, value)
        return values

    def one_of_levels(self, name: str, default: int) -> int:
        """A field that is one whole number for all levels, be it said once or for each. Raises CheckpointError."""
        value = self.take(name, (int, list, tuple), default)
        if not _is_of(_alike(value), (int,)):
            raise self.malformed(name, value)
        return _alike(value)

    def choice(self, name: str, allowed: tuple[str, ...], default: str) -> Any:
        """A field with one of a few values. Raises CheckpointError for another."""
        value = self.take(name, str, default)
        if value not in allowed:
            raise CheckpointError(f"{name} must be one of {', '.join(allowed)}, got {value!r}", path=self.path)
        return value

    def finish(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Raise CheckpointError for a field that is left, not ignored and not neutral, as null is in an unknown field."""
        for name, value in self.left.items():
            if name in IGNORED or (name in neutral and _alike(value) in neutral[name]):
                continue
            if name in neutral:
                expected = " or ".join(map(repr, neutral[name]))
                raise CheckpointError(f"{name} must be {expected} for the models here, got {value!r}", path=self.path)
            if value is not None:
                raise CheckpointError(f"unknown field {name!r} ({value!r})", path=self.path)

    def malformed(self, name: str, value: Any) -> CheckpointError:
        """The error for a value that the field cannot have."""
        return CheckpointError(f"{name} is malformed: {value!r}", path=self.path)


def _is_of(value: object, kinds: tuple[type, ...]) -> bool:
    """Whether a value of a JSON file is of one of the kinds: whole numbers are floats too, booleans no numbers, NaN is none."""
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int | float) and float in kinds and int not in kinds:
        return abs(value) <= sys.float_info.max
    return isinstance(value, kinds)


def _alike(value: Any) -> Any:
    """What all entries of a list are, one for each level, if they are one value; else what is given."""
    return value[0] if isinstance(value, list | tuple) and value and all(each == value[0] for each in value) else value


def _of_one_file(read: Callable[..., Config]) -> Callable[..., Config]:
    """The reader of a file whose values its config may refuse: raises CheckpointError for them, with the file's path."""

    @wraps(read)
    def reading(document: Document, *, path: Path, **options: Any) -> Config:
        try:
            return read(document, path=path, **options)
        except OptionError as refused:
            raise CheckpointError(str(refused), path=path) from refused

    return reading


@_of_one_file
def ldm_unet(document: Document, *, path: Path, linear: bool = True) -> UNetConfig:
    """The U-Net of a `MultiViewUNetModel` config: MVDream's, or with `ip_dim` ImageDream's. Raises CheckpointError.

    `linear` says whether the weights' projections around the transformers are linear layers, where the config does not.
    """
    fields = Fields(document, path=path)
    multipliers = fields.take_list("channel_mult", int)
    width, levels = fields.take("model_channels", int), len(multipliers)
    factors = fields.take_list("attention_resolutions", int)
    context_dim, ip_dim = fields.take("context_dim", int), fields.take("ip_dim", int, 0)
    if fields.take("ip_weight", (int, float), 1.0) != 1.0:
        raise CheckpointError("ip_weight must be 1: the weight of the image tokens is set at generation", path=path)
    if fields.take("with_ip", bool, bool(ip_dim)) != bool(ip_dim):
        raise CheckpointError(f"with_ip must be true where ip_dim is above 0, and nowhere else; ip_dim is {ip_dim}", path=path)
    resampler = ResamplerConfig(
        embedding_dim=fields.take("resampler_embedding_dim", int, 1280),
        output_dim=context_dim,
        hidden_dim=context_dim,
        heads=fields.take("resampler_heads", int, 12),
        num_queries=max(1, ip_dim),
    )
    head_channels, heads = fields.take("num_head_channels", int, -1), fields.take("num_heads", int, -1)
    if head_channels < 1 and heads < 1:
        raise CheckpointError("num_head_channels or num_heads must be given", path=path)
    config = UNetConfig(
        in_channels=fields.take("in_channels", int),
        out_channels=fields.take("out_channels", int),
        block_out_channels=tuple(width * multiplier for multiplier in multipliers),
        layers_per_block=fields.per_level("num_res_blocks", levels),
        transformer_layers_per_block=fields.per_level("transformer_depth", levels, 1),
        attention_levels=tuple(2**level in factors for level in range(levels)),
        num_attention_heads=(heads,) * levels if head_channels < 1 else None,
        attention_head_dim=head_channels if head_channels > 0 else UNetConfig.attention_head_dim,
        cross_attention_dim=context_dim,
        use_linear_projection=fields.take("use_linear_in_transformer", bool, linear),
        camera_dim=fields.take("camera_dim", int, None),
        resampler=resampler if ip_dim else None,
        reference_frame=fields.take("reference_frame", bool, bool(ip_dim)),
    )
    fields.finish(LDM_UNET_NEUTRAL)
    return config


@_of_one_file
def diffusers_unet(document: Document, *, path: Path) -> UNetConfig:
    """The U-Net of a `UNet2DConditionModel` config, such as Stable Diffusion's. Raises CheckpointError."""
    fields = Fields(document, path=path)
    channels = fields.take_list("block_out_channels", int)
    levels = len(channels)
    attention = attention_levels(fields, "down_block_types", DOWN_BLOCKS, levels)
    if attention_levels(fields, "up_block_types", UP_BLOCKS, levels) != attention[::-1]:
        raise CheckpointError("up_block_types must be down_block_types the other way round", path=path)
    # diffusers' attention_head_dim is the number of heads, by a mistake that its own documentation keeps.
    heads = fields.per_level("attention_head_dim", levels, 8)
    heads = fields.per_level("num_attention_heads", levels, None) or heads
    config = UNetConfig(
        in_channels=fields.take("in_channels", int, 4),
        out_channels=fields.take("out_channels", int, 4),
        block_out_channels=channels,
        layers_per_block=fields.per_level("layers_per_block", levels, 2),
        transformer_layers_per_block=fields.per_level("transformer_layers_per_block", levels, 1),
        attention_levels=attention,
        num_attention_heads=heads,
        cross_attention_dim=fields.one_of_levels("cross_attention_dim", 1280),
        use_linear_projection=fields.take("use_linear_projection", bool, False),
        norm_num_groups=fields.take("norm_num_groups", int, 32),
        norm_eps=fields.take("norm_eps", float, 1e-5),
    )
    fields.finish(DIFFUSERS_UNET_NEUTRAL)
    return config


def latent_size(document: Document, *, path: Path, default: int) -> int:
    """Height and width of the latents that a U-Net's config names, in `sample_size` or `image_size`; the default for none.

    Below 64 in a file of diffusers before 0.9 it is 64, as in diffusers' pipeline. Raises CheckpointError for what is no
    number, or two that are not the same.
    """
    name = "sample_size" if "sample_size" in document else "image_size"
    given = Fields({name: document.get(name)}, path=path).per_level(name, 2, None) or (default, default)
    if given[0] != given[1] or given[0] < 1:
        raise CheckpointError(f"{name} must be one number above 0, or two that are the same, got {document[name]!r}", path=path)
    old = re.match(r"0(\.[0-8](\.|$)|$)", str(document.get("_diffusers_version", ""))) and isinstance(
        document.get("sample_size"), int
    )
    return max(64, given[0]) if old else given[0]


def check_kind(document: Document, name: str, expected: str, *, path: Path) -> None:
    """Raise CheckpointError for the config of another network than the expected one, if it says in `name` what it is."""
    if document.get(name, expected) != expected:
        raise CheckpointError(f"{name} must be {expected!r}, got {document[name]!r}", path=path)


def attention_levels(fields: Fields, name: str, kinds: Mapping[str, bool], levels: int) -> tuple[bool, ...]:
    """Which levels attend, by the kinds of their blocks. Raises CheckpointError for other kinds or another number."""
    blocks = fields.take_list(name, str)
    if len(blocks) != levels or not all(block in kinds for block in blocks):
        expected = f"{levels} of {' and '.join(kinds)} for the models here"
        raise CheckpointError(f"{name} must be {expected}, got {list(blocks)!r}", path=fields.path)
    return tuple(kinds[block] for block in blocks)


@_of_one_file
def diffusers_vae(document: Document, *, path: Path) -> VAEConfig:
    """The VAE of an `AutoencoderKL` config. Raises CheckpointError."""
    check_kind(document, "_class_name", "AutoencoderKL", path=path)
    fields = Fields(document, path=path)
    channels = fields.take_list("block_out_channels", int)
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        blocks = fields.take_list(name, str)
        if list(blocks) != [kind] * len(channels):
            raise CheckpointError(f"{name} must be {len(channels)} times {kind}, got {list(blocks)!r}", path=path)
    config = VAEConfig(
        in_channels=fields.take("in_channels", int, 3),
        out_channels=fields.take("out_channels", int, 3),
        latent_channels=fields.take("latent_channels", int, 4),
        block_out_channels=channels,
        layers_per_block=fields.take("layers_per_block", int, 1),
        norm_num_groups=fields.take("norm_num_groups", int, 32),
        mid_block_add_attention=fields.take("mid_block_add_attention", bool, True),
        scaling_factor=fields.take("scaling_factor", float, 0.18215),
        latents_mean=fields.take_list("latents_mean", float, None),
        latents_std=fields.take_list("latents_std", float, None),
        sample_size=max(fields.per_level("sample_size", 2, None) or (256,)),
    )
    fields.finish(VAE_NEUTRAL)
    return config


@_of_one_file
def diffusers_scheduler(document: Document, *, path: Path) -> SchedulerConfig:
    """The noise schedule of a scheduler_config.json, whatever sampler it names; that sampler's own fields are left aside, but
    for Karras' noise levels of one that is here.

    What a file leaves out has the default of that class in diffusers. Raises CheckpointError.
    """
    given, kind = document, document.get("_class_name", "DDIMScheduler")
    if not isinstance(kind, str) or kind not in SCHEDULER_FIELDS:
        allowed = "one of diffusers' schedulers with the noise schedule of Stable Diffusion, such as DDIMScheduler"
        raise CheckpointError(f"_class_name must be {allowed}, got {kind!r}", path=path)
    document = {name: value for name, value in document.items() if name in SCHEDULER_FIELDS[kind]}
    fields, ddim = Fields(document, path=path), kind == "DDIMScheduler"
    for name, neutral in SCHEDULER_NEUTRAL.items():
        value = fields.left.get(name, ddim if name == "clip_sample" else neutral[0])
        if value not in neutral:
            got = f"a list of {len(value)}" if isinstance(value, list | tuple) else repr(value)
            raise CheckpointError(f"{name} must be {neutral[0]!r} for the samplers here, got {got}", path=path)
    lowest = fields.take("lambda_min_clipped", (int, float), -math.inf)
    solver = kind in DIFFUSERS_SAMPLERS and diffusers_sampler(given) != "ddim"
    default = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "timestep_spacing": "leading"}
    default |= SCHEDULER_DEFAULTS.get(kind, {"timestep_spacing": "linspace"})
    spacing = fields.choice("timestep_spacing", ("leading", "trailing", "linspace"), default["timestep_spacing"])
    karras = solver and fields.take("use_karras_sigmas", (bool, type(None)), False)
    config = SchedulerConfig(
        num_train_timesteps=fields.take("num_train_timesteps", int, 1000),
        beta_start=fields.take("beta_start", float, default["beta_start"]),
        beta_end=fields.take("beta_end", float, default["beta_end"]),
        beta_schedule=fields.choice("beta_schedule", ("linear", "scaled_linear"), default["beta_schedule"]),
        prediction_type=fields.choice("prediction_type", ("epsilon", "v_prediction"), "epsilon"),
        timestep_spacing="karras" if karras else spacing,
        karras_ends=spacing if karras and kind == "EulerDiscreteScheduler" and spacing != "linspace" else "training",
        steps_offset=fields.take("steps_offset", int, 0),
        set_alpha_to_one=fields.take("set_alpha_to_one", bool, default.get("set_alpha_to_one", False)),
        rescale_betas_zero_snr=fields.take("rescale_betas_zero_snr", bool, False),
    )
    with np.errstate(divide="ignore"):
        least = float((np.log(alphas := alphas_cumprod(config)) - np.log1p(-alphas)).min() / 2)
    if not lowest <= least:
        raise CheckpointError(
            f"lambda_min_clipped must be at most {least:.3g}, where it clips nothing, got {lowest}", path=path
        )
    return config


def diffusers_sampler(document: Document) -> SamplerName:
    """The sampler that a scheduler_config.json names; for one that is not here, as it is set up there, DDIM."""
    kind = str(document.get("_class_name"))
    solver = str(document.get("solver_type"))
    taken_for = {"solver_type": SOLVERS_TAKEN_FOR[kind][solver]} if solver in SOLVERS_TAKEN_FOR.get(kind, {}) else {}
    given = {**document, **taken_for}
    for name, settings in DIFFUSERS_SAMPLERS.get(kind, {}).items():
        if all(given.get(field, value) == value for field, value in settings.items()):
            return name
    return "ddim"


@_of_one_file
def clip_text(document: Document, *, path: Path, projection: bool) -> CLIPTextConfig:
    """The text tower of a transformers config; `projection` says whether the weights have one. Raises CheckpointError."""
    check_kind(document, "model_type", "clip_text_model", path=path)
    fields = Fields(document, path=path)
    if fields.take("use_attention_mask", bool, False):
        raise CheckpointError("use_attention_mask must be false: all tokens are attended to, padding too", path=path)
    return CLIPTextConfig(
        vocab_size=fields.take("vocab_size", int, 49408),
        max_position_embeddings=fields.take("max_position_embeddings", int, 77),
        eos_token_id=fields.take("eos_token_id", int, 49407),
        **_clip_tower(fields, projection=projection),
    )


@_of_one_file
def clip_vision(document: Document, *, path: Path, projection: bool) -> CLIPVisionConfig:
    """The vision tower of a transformers config; `projection` says whether the weights have one. Raises CheckpointError."""
    if "vision_config" in document:
        hint = "transformers' CLIPVisionModel.from_pretrained(FOLDER).save_pretrained(OTHER) writes its vision tower alone"
        raise CheckpointError("is of a whole CLIP model, and the vision tower is needed", path=path, hint=hint)
    check_kind(document, "model_type", "clip_vision_model", path=path)
    fields = Fields(document, path=path)
    return CLIPVisionConfig(
        num_channels=fields.take("num_channels", int, 3),
        image_size=fields.take("image_size", int, 224),
        patch_size=fields.take("patch_size", int, 32),
        **_clip_tower(fields, projection=projection),
    )


def _clip_tower(fields: Fields, *, projection: bool) -> dict[str, Any]:
    """What both towers have; transformers gives the vision tower larger defaults, so sizes must be there."""
    return {
        "hidden_size": fields.take("hidden_size", int),
        "intermediate_size": fields.take("intermediate_size", int),
        "num_hidden_layers": fields.take("num_hidden_layers", int),
        "num_attention_heads": fields.take("num_attention_heads", int),
        "hidden_act": fields.choice("hidden_act", ("gelu", "quick_gelu"), "quick_gelu"),
        "layer_norm_eps": fields.take("layer_norm_eps", float, 1e-5),
        "projection_dim": fields.take("projection_dim", int, 512) if projection else None,
    }


def family_of(unet: UNetConfig, scheduler: SchedulerConfig) -> str:
    """The family that a public U-Net belongs to."""
    if unet.camera_dim is not None:
        return "mvdream" if unet.resampler is None else "imagedream"
    if not unet.use_linear_projection:
        return "sd15"
    return "sd21" if scheduler.prediction_type == "epsilon" else "sd21-768"


def family_defaults(family: str, *, size_px: int) -> GenerationDefaults:
    """What `generate` takes for a family when the caller does not say.

    MVDream and ImageDream: 30 steps and guidance 5 of run_mvdream.py and run_imagedream.py (ashawkey/mvdream_diffusers);
    elevations of the pipelines that Hugging Face hosts; ImageDream's negative prompt of its own demo.py.
    """
    match family:
        case "mvdream":
            return GenerationDefaults(elevation_deg=15.0, size_px=size_px)
        case "imagedream":
            return GenerationDefaults(elevation_deg=5.0, size_px=size_px, negative_prompt=IMAGEDREAM_NEGATIVE_PROMPT)
        case _:
            return GenerationDefaults(views=1, steps=50, guidance=7.5, size_px=size_px)
