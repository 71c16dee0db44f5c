"""What a latent upscaler is beside its network, as frozen dataclasses: its noise levels, and the whole with its defaults.

Fields follow diffusers' EulerDiscreteScheduler.
"""

from dataclasses import dataclass
from typing import Literal

from mvshared.config import (
    BetaSchedule,
    CLIPTextConfig,
    KUNetConfig,
    TimestepSpacing,
    VAEConfig,
    check_counts,
)
from mvshared.errors import OptionError

MAX_NOISE_LEVEL = 1.0


@dataclass(frozen=True, kw_only=True)
class SigmaConfig:
    """The noise levels of sampling (diffusers' EulerDiscreteScheduler).

    `log_linear` spreads them evenly in the logarithm between those of the first and the last training timestep, `linear` takes
    them from the timesteps of `timestep_spacing`.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    interpolation_type: Literal["linear", "log_linear"] = "log_linear"
    timestep_spacing: TimestepSpacing = "linspace"
    steps_offset: int = 0


@dataclass(frozen=True, kw_only=True)
class UpscaleDefaults:
    """What `upscale` takes when the caller does not say; guidance 0 leaves the prompt out, as diffusers has it."""

    steps: int = 10
    guidance: float = 0.0
    noise_level: float = 0.0

    def __post_init__(self) -> None:
        check_counts(self, "steps")
        if not 0 <= self.noise_level <= MAX_NOISE_LEVEL:
            raise OptionError("noise_level", expected=f"0 to {MAX_NOISE_LEVEL:g}", got=self.noise_level)


@dataclass(frozen=True, kw_only=True)
class UpscalerConfig:
    """A whole upscaler: its network, the VAE of its latents, its text encoder, its noise levels and its defaults.

    `noise_frequencies` (n,) embed the noise level of the low-resolution latents as cosines and sines; None where they are not
    known, as in the public folder: there it is 0.
    """

    family: str
    unet: KUNetConfig
    vae: VAEConfig
    text_encoder: CLIPTextConfig | None
    sigmas: SigmaConfig = SigmaConfig()
    noise_frequencies: tuple[float, ...] | None = None
    defaults: UpscaleDefaults = UpscaleDefaults()

    def __post_init__(self) -> None:
        width, text = self.unet.cross_attention_dim, self.text_encoder
        if width != (text and text.hidden_size):
            raise OptionError("cross_attention_dim", expected="the text encoder's hidden_size", got=width)
        if self.unet.latent_channels != self.vae.latent_channels:
            expected = f"the VAE's {self.vae.latent_channels} and one more"
            raise OptionError("out_channels of the U-Net", expected=expected, got=self.unet.out_channels)
        if self.noise_channels < 2 or self.noise_channels % 2:
            expected = "the pooled text's width and an even number of channels for the noise level"
            raise OptionError("time_cond_proj_dim", expected=expected, got=self.unet.time_cond_proj_dim)
        if self.noise_frequencies is not None and 2 * len(self.noise_frequencies) != self.noise_channels:
            expected = f"{self.noise_channels // 2} numbers"
            raise OptionError("noise_frequencies", expected=expected, got=len(self.noise_frequencies))

    @property
    def noise_channels(self) -> int:
        """Channels of the low-resolution latents' noise level in `time_cond_proj_dim`."""
        return self.unet.time_cond_proj_dim - (self.text_encoder.hidden_size if self.text_encoder else 0)
