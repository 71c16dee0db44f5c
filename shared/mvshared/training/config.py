"""The training configuration: a TOML file, read strictly into frozen dataclasses."""

import math
import os
import tomllib
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from mvshared.backend import Dtype
from mvshared.camera import from_front_deg
from mvshared.checkpoint import config_from_json
from mvshared.config import (
    CAMERA_DIM,
    CameraConfig,
    Framing,
    GenerationDefaults,
    KUNetConfig,
    SchedulerConfig,
    UNetConfig,
    VAEConfig,
    check_color,
)
from mvshared.errors import ConfigError, OptionError
from mvshared.numbers import whole
from mvshared.upscaling.config import UpscaleDefaults

AZIMUTH_ROUNDING_DEG = 1e-3  # more than what float32 poses do to an azimuth
LARGEST = float(np.finfo(np.float32).max)  # of what the optimisers compute with
Stage = Literal["vae", "unet", "upscaler"]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures are learned and how they are put together.

    `folder` holds captures. The last `held_out` share of them, one at least, is kept for validation, none if it is 0. A
    reference is a view with an azimuth within +-`reference_max_azimuth_deg`; `targets` other views are learned with it.
    `mirror` adds the mirror image of every capture. The reference is dropped with probability `reference_dropout`, the normal
    maps with `normals_dropout`. `prompt` is the text of every picture, for a network that takes one.
    """

    folder: str  # or a path, of which this is the name
    held_out: float = 0.02
    background: tuple[int, int, int] = (255, 255, 255)
    mirror: bool = True
    normals: bool = True
    targets: int = 4
    reference_max_azimuth_deg: float = 50.0
    reference_dropout: float = 0.1
    normals_dropout: float = 0.5
    prompt: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.folder, str | os.PathLike):
            raise OptionError("folder", expected="the name of a folder", got=self.folder)
        if name := os.fspath(self.folder):
            object.__setattr__(self, "folder", str(Path(name)))  # data/ is data
        if not 0 <= self.held_out < 1:
            raise OptionError("held_out", expected="0 to below 1", got=self.held_out)
        for name in ("reference_dropout", "normals_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(name, expected="0 to 1", got=getattr(self, name))
        check_color("background", self.background)
        if self.targets < 1:
            raise OptionError("targets", expected="at least 1", got=self.targets)
        if not 0 <= self.reference_max_azimuth_deg <= 180:
            got = self.reference_max_azimuth_deg
            raise OptionError("reference_max_azimuth_deg", expected="0 to 180", got=got)

    def may_be_references(self, azimuths_deg: NDArray[np.floating]) -> NDArray[np.bool_]:
        """Which views may be references, of azimuths (n,) in degrees, rounded as they may be."""
        return np.abs(from_front_deg(azimuths_deg)) <= self.reference_max_azimuth_deg + AZIMUTH_ROUNDING_DEG


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with a linear warm-up, a cosine decay to `final_learning_rate`, clipping of the global norm, and an EMA."""

    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    ema_decay: float = 0.999

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "betas" and (isinstance(value, bool) or not isinstance(value, int | float | np.number)):
                raise OptionError(name, expected="a number", got=value)
        for name in ("learning_rate", "gradient_clip", "eps"):
            if not 0 < (value := getattr(self, name)) <= LARGEST:
                raise OptionError(name, expected="finite in float32" if value > 0 else "above 0", got=value)
        for name in ("final_learning_rate", "warmup_steps", "weight_decay"):
            if not 0 <= (value := getattr(self, name)) <= LARGEST:
                raise OptionError(name, expected="finite in float32" if value > 0 else "at least 0", got=value)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise OptionError("betas", expected="two numbers from 0 to below 1", got=self.betas)
        if not 0 <= self.ema_decay < 1:
            raise OptionError("ema_decay", expected="0 to below 1", got=self.ema_decay)


def _check_weights(loss: "VAELossConfig | UNetLossConfig") -> None:
    """Raise OptionError for a weight that is negative or not finite in float32."""
    for name, weight in asdict(loss).items():
        if not 0 <= weight <= LARGEST:
            expected = "finite in float32" if 0 < weight < math.inf else "a finite number, at least 0"
            raise OptionError(name, expected=expected, got=weight)


@dataclass(frozen=True, kw_only=True)
class VAELossConfig:
    """L1, L1 of the pixel differences and MSE, each weighted; colour; KL to N(0, 1).

    A pixel's weight is 1 + `foreground_weight` * alpha + `detail_weight` * detail, and `border_weight` more for every side of
    the picture that it is at. Detail, 0 to 1, is the capture's `detail_file_path`, 0 without: what is small and matters, such
    as a mouth, is lost otherwise. As to the border, padding makes the outermost pixels exceptions, and the corners are too few
    to be learned otherwise.

    The colour term is the L1 of errors averaged over one latent's pixels, of luma and, `chroma_weight` times, of the channels'
    deviation from it: without it the colours of large areas, a small part of the variance, take thousands of steps to appear.
    """

    mse_weight: float = 1.0
    gradient_weight: float = 1.0
    foreground_weight: float = 2.0
    border_weight: float = 0.0
    detail_weight: float = 0.0
    coarse_weight: float = 4.0
    chroma_weight: float = 3.0
    kl_weight: float = 2e-4

    def __post_init__(self) -> None:
        _check_weights(self)


@dataclass(frozen=True, kw_only=True)
class UNetLossConfig:
    """Squared error of the network's output.

    A latent's weight is 1 + `detail_weight` * the mean of the capture's detail map over the latent's pixels, divided by the
    batch's mean weight: what is small and matters, such as a mouth, is a small part of the latents otherwise.

    With `distill_rest` the target of latents without detail is the output of the network that training starts from (learning
    without forgetting, arXiv 1606.09282): small batches that improve details change little else.
    """

    detail_weight: float = 0.0
    distill_rest: bool = False

    def __post_init__(self) -> None:
        _check_weights(self)
        if self.distill_rest and not self.detail_weight:
            raise OptionError("distill_rest", expected="false without a detail_weight above 0", got=True)


PLAIN_UNET_LOSS = UNetLossConfig()
_OF_UPSCALERS: tuple[str, ...] = (
    "upscaler",
    "views_from",
    "first_step_share",
    "generated_share",
    "generated_captures",
    "upscale_defaults",
)
_OF_MODELS: tuple[str, ...] = ("scheduler", "camera", "defaults", "framing")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage of training.

    `vae_from` is the checkpoint folder whose VAE the U-Net and the upscaler use, `init_from` one to start from. Without a table
    `unet`, all of the model is that of `init_from`, with its encoders; with one, `vae_from` must be there. Weights whose
    names begin with one of `frozen` are not trained.
    `first_step_share` of an upscaler's examples have the highest noise level, for runs of one step or a few. With `views_from`,
    a model, `generated_share` of them start from views that it generates of up to `generated_captures` training captures.
    `dtype` is that of the computation, float16 with loss scaling, `model_dtype` that of the trained model's files; weights and
    the run's own state are float32.
    """

    stage: Stage
    data: DataConfig
    steps: int
    batch_size: int
    seed: int = 0
    family: str = "custom"
    dtype: Dtype = "float32"
    model_dtype: Literal["float32", "float16"] = "float32"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 500
    log_every: int = 20
    sample_every: int = 500
    optimizer: OptimizerConfig = OptimizerConfig()
    vae: VAEConfig | None = None
    vae_loss: VAELossConfig = VAELossConfig()
    vae_from: str | None = None
    init_from: str | None = None
    frozen: tuple[str, ...] = ()
    unet: UNetConfig | None = None
    unet_loss: UNetLossConfig = PLAIN_UNET_LOSS
    upscaler: KUNetConfig | None = None
    first_step_share: float = 0.0
    views_from: str | None = None
    generated_share: float = 0.5
    generated_captures: int = 500
    upscale_defaults: UpscaleDefaults = field(default_factory=UpscaleDefaults)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    camera: CameraConfig = field(default_factory=CameraConfig)
    defaults: GenerationDefaults = field(default_factory=GenerationDefaults)
    framing: Framing = field(default_factory=Framing)

    def __post_init__(self) -> None:
        if self.stage not in get_args(Stage):
            raise OptionError("stage", expected=f"one of {', '.join(get_args(Stage))}", got=self.stage)
        counts = ("steps", "batch_size", "checkpoint_every", "log_every", "sample_every", "generated_captures")
        for name, least in (*((name, 1) for name in counts), ("seed", 0)):
            object.__setattr__(self, name, whole(name, getattr(self, name), least))
        for name in ("init_from", "vae_from", "views_from"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, value.rstrip("/") or value)  # runs/model/ is runs/model
        if self.framing.background not in (Framing.background, self.data.background):
            expected = f"that of the data, {self.data.background}, or left out"
            raise OptionError("framing.background", expected=expected, got=self.framing.background)
        {"vae": self._check_vae, "unet": self._check_unet, "upscaler": self._check_upscaler}[self.stage]()
        self._check_unused()
        for name in ("first_step_share", "generated_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise OptionError(name, expected="0 to 1", got=getattr(self, name))

    def _check_vae(self) -> None:
        if self.vae is None:
            raise OptionError("vae", expected="a table of VAEConfig fields for stage 'vae'", got=None)
        if self.vae_from is not None:
            raise OptionError("vae_from", expected="left out for stage 'vae', which starts from init_from", got=self.vae_from)

    def _check_unet(self) -> None:
        if self.unet_loss.distill_rest and self.init_from is None:
            raise OptionError("init_from", expected="a model whose outputs are distilled, for distill_rest", got=None)
        if self.unet is None:
            if self.init_from is None:
                expected = "a table of UNetConfig fields, and vae_from, for stage 'unet' without init_from"
                raise OptionError("unet", expected=expected, got=None)
            if self.vae_from is not None:
                expected = "left out without a table 'unet': all of the model is that of init_from"
                raise OptionError("vae_from", expected=expected, got=self.vae_from)
            return
        if self.vae_from is None:
            raise OptionError("vae_from", expected="the model whose VAE is used, beside a table 'unet'", got=None)
        if self.unet.camera_dim not in (None, CAMERA_DIM):
            raise OptionError("unet.camera_dim", expected=f"{CAMERA_DIM}, or left out", got=self.unet.camera_dim)
        if self.unet.cross_attention_dim is not None:
            expected = "left out: a model with encoders comes whole from init_from"
            raise OptionError("cross_attention_dim", expected=expected, got=self.unet.cross_attention_dim)
        scheduler = self.scheduler
        from_noise_alone = scheduler.rescale_betas_zero_snr and scheduler.timestep_spacing != "leading"
        if from_noise_alone and scheduler.prediction_type == "epsilon":
            expected = "v_prediction with rescale_betas_zero_snr: runs start from noise alone, whose noise says nothing"
            hint = 'or timestep_spacing = "leading", with which they start a little later'
            raise OptionError("scheduler.prediction_type", expected=expected, got="epsilon", hint=hint)
        if self.defaults.steps > scheduler.num_train_timesteps:
            expected = f"at most num_train_timesteps ({scheduler.num_train_timesteps}), for its samples"
            raise OptionError("defaults.steps", expected=expected, got=self.defaults.steps)

    def _check_upscaler(self) -> None:
        if self.upscaler is None or self.vae_from is None:
            expected = "a table of KUNetConfig fields, and vae_from, for stage 'upscaler'"
            raise OptionError("upscaler", expected=expected, got=None)
        if self.upscaler.cross_attention_dim is not None:
            expected = "left out: upscalers that are trained here take no text"
            raise OptionError("cross_attention_dim", expected=expected, got=self.upscaler.cross_attention_dim)

    def _check_unused(self) -> None:
        """Raise OptionError for fields that have another value than theirs and no effect: a run's config.json would lie."""
        for stage, name, loss in (("unet", "unet_loss", self.unet_loss), ("vae", "vae_loss", self.vae_loss)):
            for each in fields(loss) if self.stage != stage else ():
                if (got := getattr(loss, each.name)) != each.default:
                    raise OptionError(f"{name}.{each.name}", expected=f"left out but for stage '{stage}'", got=got)
        tables = [name for name in ("vae", "unet") if name != self.stage]
        unused = {name: f"left out but for stage '{name}'" for name in tables}
        if self.stage != "upscaler":
            unused |= dict.fromkeys(_OF_UPSCALERS, "left out but for stage 'upscaler'")
        if self.stage != "unet":
            unused |= dict.fromkeys(_OF_MODELS, "left out but for stage 'unet'")
        elif self.unet is None:
            unused |= dict.fromkeys(_OF_MODELS, "left out without a table 'unet': all of the model is that of init_from")
        for each in fields(self):
            usual = each.default if each.default_factory is MISSING else each.default_factory()
            if each.name in unused and (got := getattr(self, each.name)) != usual:
                raise OptionError(each.name, expected=unused[each.name], got=got)


def load_train_config(path: Path | str) -> TrainConfig:
    """Read a TOML file; relative folders in it are relative to where the command runs.

    Raises ConfigError for a missing or malformed file, unknown fields, wrong types and values that are not allowed.
    """
    path = Path(path)
    try:
        document: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", path=path) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"is no valid TOML: {error}", path=path) from error
    return parse_train_config(document, path=path)


def parse_train_config(document: dict[str, Any], *, path: Path) -> TrainConfig:
    """A TrainConfig of nested tables. Raises ConfigError."""
    return config_from_json(TrainConfig, document, path=path, error=ConfigError)
