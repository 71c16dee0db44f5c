"""What a model is, as frozen dataclasses: U-Net, VAE, noise schedule, and the whole of them with its defaults.

Field names follow diffusers' config.json wherever diffusers has the field (UNet2DConditionModel, AutoencoderKL, DDIMScheduler).
Sizes of the presets: the public configs of Stable Diffusion 2.1, MVDream and the x2 latent upscaler.
"""

from dataclasses import dataclass, replace
from operator import index
from typing import Any, Literal, SupportsIndex, TypeAlias, get_args

from mvshared.errors import OptionError

PredictionType = Literal["epsilon", "v_prediction"]
BetaSchedule = Literal["linear", "scaled_linear"]
TimestepSpacing = Literal["leading", "trailing", "linspace", "karras"]
SamplerName = Literal["ddim", "euler", "euler-ancestral", "dpmpp-2m", "dpmpp-2m-sde", "dpmpp-2s", "unipc"]
Activation = Literal["gelu", "quick_gelu"]

CAMERA_DIM = 16  # numbers of `mvshared.camera.camera_vectors`
MOST, MOST_LAYERS = 10**6, 100  # what a config may ask for: more than any model has, and few enough to be refused at once
MOST_EDGE_PX = 10_000  # of a picture for CLIP
_LAYERS = ("layers_per_block", "transformer_layers_per_block", "num_hidden_layers", "depth")
K_GROUP_WIDTH, K_NORM_EPS = 32, 1e-5  # of the upscaler: channels that are normalised together


def _at_least(value: object, low: int) -> bool:
    """Whether it is a whole number, perhaps numpy's, of at least `low`."""
    return isinstance(value, SupportsIndex) and not isinstance(value, bool) and index(value) >= low


def check_counts(config: Any, *names: str) -> None:
    """Raise OptionError unless every field is None, a whole number from 1 to MOST (layers: MOST_LAYERS), or a tuple of them."""
    for name in names:
        value = getattr(config, name)
        entries = value if isinstance(value, tuple) else (value,)
        if value is not None and (not entries or not all(_at_least(entry, 1) for entry in entries)):
            expected = "a whole number of at least 1" if entries else "one or more whole numbers of at least 1"
            expected = "a tuple" if isinstance(value, list) else expected
            raise OptionError(name, expected=expected, got=value)
        most = MOST_LAYERS if name in _LAYERS else MOST
        if value is not None and any(entry > most for entry in entries):
            raise OptionError(name, expected=f"at most {most}", got=value)


def _check_transformer(config: "CLIPTextConfig | CLIPVisionConfig") -> None:
    """Raise OptionError for widths and counts of a CLIP tower that make none."""
    check_counts(config, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "projection_dim")
    if config.hidden_size % config.num_attention_heads:
        expected = f"a multiple of num_attention_heads ({config.num_attention_heads})"
        raise OptionError("hidden_size", expected=expected, got=config.hidden_size)
    if not config.layer_norm_eps > 0:
        raise OptionError("layer_norm_eps", expected="above 0", got=config.layer_norm_eps)
    if config.hidden_act not in get_args(Activation):
        raise OptionError("hidden_act", expected=f"one of {', '.join(get_args(Activation))}", got=config.hidden_act)


@dataclass(frozen=True, kw_only=True)
class CLIPImageConfig:
    """How a picture is prepared: `resample` is Pillow's number of the filter, 3 the bicubic one.

    With `squeeze` both of its sides become `shortest_edge`, whatever its shape.
    """

    shortest_edge: int = 224
    crop_size: int = 224
    squeeze: bool = False
    resample: int = 3
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        check_counts(self, "shortest_edge", "crop_size")
        if self.shortest_edge > MOST_EDGE_PX:
            raise OptionError("shortest_edge", expected=f"at most {MOST_EDGE_PX}", got=self.shortest_edge)
        if self.crop_size > self.shortest_edge:
            expected = f"from 1 to shortest_edge ({self.shortest_edge})"
            raise OptionError("crop_size", expected=expected, got=self.crop_size)
        if self.resample not in range(6):
            raise OptionError("resample", expected="one of Pillow's filters, 0 to 5", got=self.resample)
        if not all(std > 0 for std in self.image_std):
            raise OptionError("image_std", expected="above 0", got=self.image_std)


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig:
    """ImageDream's `image_embed`: `num_queries` tokens of `output_dim` from the vision tower's of `embedding_dim`."""

    embedding_dim: int = 1280
    output_dim: int = 1024
    hidden_dim: int = 1024
    depth: int = 4
    heads: int = 12
    dim_head: int = 64
    num_queries: int = 16
    ff_mult: int = 4

    def __post_init__(self) -> None:
        check_counts(self, "embedding_dim", "output_dim", "hidden_dim", "depth", "heads", "dim_head", "num_queries", "ff_mult")


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """A multi-view U-Net of the Stable Diffusion shape.

    Per level, from fine to coarse: `block_out_channels`, `layers_per_block`, `transformer_layers_per_block`,
    `attention_levels`, and `num_attention_heads`, which if not given follows from the heads' width `attention_head_dim`.
    `cross_attention_dim` None leaves out cross-attention, `camera_dim` None the camera MLP, `resampler` None the image tokens.
    `reference_frame` adds the clean latent of the reference picture as one more frame.
    """

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: tuple[int, ...] = (2, 2, 2, 2)
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 1)
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    mid_attention: bool = True
    num_attention_heads: tuple[int, ...] | None = None
    attention_head_dim: int = 64
    cross_attention_dim: int | None = None
    use_linear_projection: bool = True
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    camera_dim: int | None = None
    resampler: ResamplerConfig | None = None
    reference_frame: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "in_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups")
        check_counts(self, "transformer_layers_per_block", "num_attention_heads", "attention_head_dim")
        check_counts(self, "cross_attention_dim", "camera_dim")
        if self.in_channels < self.out_channels:
            raise OptionError("in_channels", expected=f"at least out_channels ({self.out_channels})", got=self.in_channels)
        if not self.norm_eps > 0:
            raise OptionError("norm_eps", expected="above 0", got=self.norm_eps)
        if self.resampler is not None and self.resampler.output_dim != self.cross_attention_dim:
            expected = f"cross_attention_dim ({self.cross_attention_dim})"
            raise OptionError("output_dim of the resampler", expected=expected, got=self.resampler.output_dim)
        levels = len(self.block_out_channels)
        for name in ("layers_per_block", "transformer_layers_per_block", "attention_levels"):
            if len(getattr(self, name)) != levels:
                raise OptionError(name, expected=f"one entry per level ({levels})", got=getattr(self, name))
        heads = self.num_attention_heads
        if heads is not None and (not isinstance(heads, tuple) or len(heads) != levels):
            raise OptionError("num_attention_heads", expected=f"one entry per level ({levels})", got=self.num_attention_heads)
        if self.block_out_channels[0] % 2:
            expected = "even at the finest level, as wide as the timestep's sines and cosines"
            raise OptionError("block_out_channels", expected=expected, got=self.block_out_channels)
        for level, channels in enumerate(self.block_out_channels):
            if channels % self.norm_num_groups:
                raise OptionError(
                    "block_out_channels", expected=f"multiples of norm_num_groups ({self.norm_num_groups})", got=channels
                )
            attends = self.attention_levels[level] or (level == levels - 1 and self.mid_attention)
            if attends and channels % self.heads(level):
                raise OptionError(
                    "num_attention_heads", expected=f"a divisor of {channels} at level {level}", got=self.heads(level)
                )

    def heads(self, level: int) -> int:
        """Number of attention heads at a level (0 is the finest)."""
        if self.num_attention_heads is not None:
            return self.num_attention_heads[level]
        return max(1, self.block_out_channels[level] // self.attention_head_dim)

    @property
    def finest_attention(self) -> int:
        """The finest level with attention; the coarsest one if there is none but in the middle."""
        return self.attention_levels.index(True) if any(self.attention_levels) else len(self.attention_levels) - 1

    @property
    def time_embed_dim(self) -> int:
        return 4 * self.block_out_channels[0]

    @property
    def takes_pictures(self) -> bool:
        """Whether reference pictures are a condition, as image tokens, frames or both."""
        return self.reference_frame or self.resampler is not None

    @property
    def normal_channels(self) -> int:
        """Latent channels of the normal maps that are concatenated to the noisy latents; 0 without."""
        return self.in_channels - self.out_channels

    @property
    def downscale(self) -> int:
        """Latent heights and widths must be multiples of this."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """AutoencoderKL. The U-Net sees `(z - latents_mean) * scaling_factor / latents_std`, mean 0, deviation 1 if not given."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    scaling_factor: float = 0.18215
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    sample_size: int = 256

    def __post_init__(self) -> None:
        check_counts(self, "in_channels", "out_channels", "latent_channels", "block_out_channels", "layers_per_block")
        check_counts(self, "norm_num_groups", "sample_size")
        if self.in_channels != 3 or self.out_channels != 3:
            expected = "3, which are red, green and blue, as many as out_channels"
            raise OptionError("in_channels", expected=expected, got=(self.in_channels, self.out_channels))
        if not self.scaling_factor > 0:
            raise OptionError("scaling_factor", expected="above 0", got=self.scaling_factor)
        if self.latents_std is not None and not all(value > 0 for value in self.latents_std):
            raise OptionError("latents_std", expected="above 0", got=self.latents_std)
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise OptionError(
                    "block_out_channels", expected=f"multiples of norm_num_groups ({self.norm_num_groups})", got=channels
                )
        for name in ("latents_mean", "latents_std"):
            given = getattr(self, name)
            if given is not None and len(given) != self.latent_channels:
                raise OptionError(name, expected=f"{self.latent_channels} numbers", got=given)

    @property
    def downscale(self) -> int:
        """Pixels per latent, in height and width."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True, kw_only=True)
class CLIPTextConfig:
    """CLIP's text tower (transformers' CLIPTextModel). `projection_dim` None leaves out the pooled state's projection."""

    vocab_size: int = 49408
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 23
    num_attention_heads: int = 16
    max_position_embeddings: int = 77
    hidden_act: Activation = "gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = None
    eos_token_id: int = 49407

    def __post_init__(self) -> None:
        check_counts(self, "vocab_size", "max_position_embeddings")
        _check_transformer(self)


@dataclass(frozen=True, kw_only=True)
class CLIPVisionConfig:
    """CLIP's vision tower (transformers' CLIPVisionModel). `projection_dim` None leaves out the pooled state's projection."""

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 14
    hidden_act: Activation = "gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = None

    def __post_init__(self) -> None:
        check_counts(self, "num_channels", "image_size", "patch_size")
        _check_transformer(self)
        if self.image_size < self.patch_size:
            raise OptionError("image_size", expected=f"at least patch_size ({self.patch_size})", got=self.image_size)

    @property
    def tokens(self) -> int:
        """Tokens of a picture: one of the class, one per patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class KUNetConfig:
    """The U-Net of k-diffusion's ImageDenoiserModelV1 that upscales latents.

    `in_channels` are noisy latents and the low-resolution ones, `out_channels` latents and one of their log-variance. Levels go
    from fine to coarse; one in `attention_levels` attends to a text of width `cross_attention_dim`, the coarsest to itself as
    well. `time_cond_proj_dim` is the width of what is known beside the noise level: that of the low-resolution latents, and
    the pooled text.
    """

    in_channels: int = 8
    out_channels: int = 5
    block_out_channels: tuple[int, ...] = (384, 384, 768, 768)
    layers_per_block: int = 4
    attention_levels: tuple[bool, ...] = (False, False, False, False)
    attention_head_dim: int = 64
    cross_attention_dim: int | None = None
    time_cond_proj_dim: int = 128

    def __post_init__(self) -> None:
        check_counts(self, "in_channels", "out_channels", "block_out_channels", "layers_per_block", "attention_head_dim")
        check_counts(self, "cross_attention_dim", "time_cond_proj_dim")
        channels, attends = self.block_out_channels, self.attention_levels
        if self.in_channels != 2 * self.latent_channels:
            expected = f"twice the {self.latent_channels} latent channels of out_channels, which has one more"
            raise OptionError("in_channels", expected=expected, got=self.in_channels)
        if len(attends) != len(channels):
            raise OptionError("attention_levels", expected=f"one entry per level ({len(channels)})", got=attends)
        if any(attends) != (self.cross_attention_dim is not None):
            expected = "given exactly if a level attends to the text"
            raise OptionError("cross_attention_dim", expected=expected, got=self.cross_attention_dim)
        for level, count in enumerate(channels):
            if count % K_GROUP_WIDTH:
                raise OptionError("block_out_channels", expected=f"multiples of {K_GROUP_WIDTH}", got=count)
            if attends[level] and count % self.attention_head_dim:
                expected = f"a multiple of attention_head_dim ({self.attention_head_dim}) at level {level}"
                raise OptionError("block_out_channels", expected=expected, got=count)
            narrower = channels[max(0, level - 1)]  # the last attention of the way up has the next level's width
            if attends[level] and narrower % self.attention_head_dim:
                expected = f"a multiple of attention_head_dim ({self.attention_head_dim}) above level {level}"
                raise OptionError("block_out_channels", expected=expected, got=narrower)
        # diffusers tells the first block of the way up by these widths.
        if attends[-1] and not (len(channels) > 1 and channels[-1] == channels[-2] == self.time_embed_dim):
            expected = f"{self.time_embed_dim} at the two coarsest levels, if the coarsest one attends"
            raise OptionError("block_out_channels", expected=expected, got=channels)

    @property
    def latent_channels(self) -> int:
        return self.out_channels - 1

    @property
    def time_embed_dim(self) -> int:
        return 2 * self.block_out_channels[0]

    @property
    def downscale(self) -> int:
        """Upscaled latents must have a height and width that are multiples of this."""
        return 2 ** (len(self.block_out_channels) - 1)


NetworkConfig: TypeAlias = UNetConfig | VAEConfig | CLIPTextConfig | CLIPVisionConfig | KUNetConfig


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The noise schedule and the default spacing of timesteps (diffusers' scheduler_config.json).

    `karras_ends` says between which noise levels Karras' are for Euler's method: those of the whole training, or the first and
    the last one of a spacing, as in diffusers' EulerDiscreteScheduler with that `timestep_spacing`.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    prediction_type: PredictionType = "epsilon"
    timestep_spacing: TimestepSpacing = "leading"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    rescale_betas_zero_snr: bool = False
    karras_ends: Literal["training", "leading", "trailing"] = "training"

    def __post_init__(self) -> None:
        check_counts(self, "num_train_timesteps")
        if self.rescale_betas_zero_snr and self.num_train_timesteps < 2:
            raise OptionError("num_train_timesteps", expected="at least 2 for zero terminal SNR", got=self.num_train_timesteps)
        for name in ("beta_start", "beta_end"):
            beta = getattr(self, name)
            if not 0 < 1 - beta < 1:
                raise OptionError(name, expected="a number between 0 and 1, both left out", got=beta)
        if not _at_least(self.steps_offset, 0):
            raise OptionError("steps_offset", expected="a whole number of at least 0", got=self.steps_offset)


@dataclass(frozen=True, kw_only=True)
class CameraConfig:
    """How a family's pictures are taken: the pose of `camera.orbit` and what `transforms.json` says of the lens."""

    fov_deg: float = 49.1
    radius: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.fov_deg < 180:
            raise OptionError("fov_deg", expected="between 0 and 180", got=self.fov_deg)
        if not self.radius > 0:
            raise OptionError("radius", expected="above 0", got=self.radius)


@dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """What `generate` takes when the caller does not say. Timesteps are spaced as the schedule's config says."""

    views: int = 4
    azimuth_start_deg: float = 0.0
    elevation_deg: float = 0.0
    steps: int = 30
    guidance: float = 5.0
    size_px: int = 256
    negative_prompt: str = ""
    scheduler: SamplerName = "ddim"

    def __post_init__(self) -> None:
        for name in ("views", "steps", "size_px"):
            if not _at_least(getattr(self, name), 1):
                raise OptionError(name, expected="a whole number of at least 1", got=getattr(self, name))


def check_color(name: str, color: tuple[int, int, int]) -> None:
    """Raise OptionError unless a colour's numbers are bytes."""
    if not all(0 <= channel <= 255 for channel in color):
        raise OptionError(name, expected="0 to 255 in red, green and blue", got=color)


@dataclass(frozen=True, kw_only=True)
class Framing:
    """How the subject of a picture is placed in the square frame, in shares of its side.

    `subject` scales it to `height`, at most `width` wide, its lower edge at `bottom`, centred; a square picture whose subject
    has a height within `kept_heights` and stands within `kept_offset` of that place is kept. `pad` only pads to a square,
    `none` resizes the picture whatever its shape. `resample` is how: `bilinear` without anti-aliasing, as PyTorch's interpolate
    does and the public models were given their pictures, only where nothing is framed. `background`, red, green and blue from 0
    to 255, is put under what is transparent, and with `subject` in the place of a plain background.
    """

    mode: Literal["subject", "pad", "none"] = "pad"
    resample: Literal["lanczos", "bilinear"] = "lanczos"
    height: float = 0.9
    width: float = 0.98
    bottom: float = 1.0
    kept_heights: tuple[float, float] = (0.75, 1.0)
    kept_offset: float = 0.08
    background: tuple[int, int, int] = (255, 255, 255)

    def __post_init__(self) -> None:
        check_color("background", self.background)
        for name in ("height", "width", "bottom"):
            if not 0 < getattr(self, name) <= 1:
                raise OptionError(name, expected="above 0, at most 1", got=getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A whole model: its family name, its parts, and its defaults.

    `text_encoder` is there exactly if the U-Net has cross-attention, `image_encoder` and its `image_processor` exactly if it
    has a resampler.
    """

    family: str
    unet: UNetConfig
    vae: VAEConfig
    scheduler: SchedulerConfig
    text_encoder: CLIPTextConfig | None = None
    image_encoder: CLIPVisionConfig | None = None
    image_processor: CLIPImageConfig | None = None
    camera: CameraConfig = CameraConfig()
    defaults: GenerationDefaults = GenerationDefaults()
    framing: Framing = Framing()

    def __post_init__(self) -> None:
        self._check_encoders()
        if self.unet.out_channels != self.vae.latent_channels:
            raise OptionError(
                "out_channels of the U-Net", expected=f"the VAE's {self.vae.latent_channels}", got=self.unet.out_channels
            )
        if self.unet.camera_dim not in (None, CAMERA_DIM):
            raise OptionError("camera_dim of the U-Net", expected=f"{CAMERA_DIM} or null", got=self.unet.camera_dim)
        if self.unet.normal_channels not in (0, self.vae.latent_channels):
            expected = f"{self.vae.latent_channels}, or twice that for normal maps"
            raise OptionError("in_channels of the U-Net", expected=expected, got=self.unet.in_channels)

    def _check_encoders(self) -> None:
        unet, text, vision = self.unet, self.text_encoder, self.image_encoder
        wanted = {"cross_attention_dim": (unet.cross_attention_dim, text and text.hidden_size)}
        wanted["embedding_dim of the resampler"] = (
            unet.resampler and unet.resampler.embedding_dim,
            vision and vision.hidden_size,
        )
        for name, (needed, got) in wanted.items():
            if needed != got:
                encoder = "text encoder" if name == "cross_attention_dim" else "image encoder"
                raise OptionError(name, expected=f"the {encoder}'s hidden_size, {got}", got=needed)
        if vision is not None and (self.image_processor is None or self.image_processor.crop_size != vision.image_size):
            got = None if self.image_processor is None else self.image_processor.crop_size
            raise OptionError("crop_size", expected=f"the image encoder's image_size, {vision.image_size}", got=got)


SD21 = UNetConfig(cross_attention_dim=1024)
MVDREAM = replace(SD21, camera_dim=16)
IMAGEDREAM = replace(MVDREAM, resampler=ResamplerConfig(), reference_frame=True)
SD_VAE = VAEConfig()
SD_X2_UNET = KUNetConfig(attention_levels=(False, True, True, True), cross_attention_dim=768, time_cond_proj_dim=896)
