"""What `mvmlx validate` runs of a latent upscaler: its text encoder, its VAE, and one guided call of its network."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvshared.backend import TextStates, UpscalerModel
from mvshared.images import to_model
from mvshared.tokenizer import CLIPTokenizer
from mvshared.upscaling.config import UpscalerConfig
from mvshared.upscaling.latents import FACTOR
from mvshared.upscaling.schedule import noise_embedding
from mvshared.validation import GUIDANCE, PROMPT, Suite, textured_picture

VIEWS = 2
MAX_SIDE = 32  # of the low-resolution latents


class Inputs(NamedTuple):
    """Noisy latents of twice the size, a quarter of ln sigma, the embedded noise level, token ids, pixels of the VAE."""

    sample: NDArray[np.float32]
    noise: float
    embedding: NDArray[np.float32]
    token_ids: NDArray[np.int64] | None
    pixels: NDArray[np.float32]


class States(NamedTuple):
    """What the first side's encoders made, for both networks."""

    text: NDArray[np.float32] | None
    pooled: NDArray[np.float32] | None
    low: NDArray[np.float32]


def _inputs(config: UpscalerConfig, folder: Path) -> Inputs:
    side = min(MAX_SIDE, max(config.unet.downscale, config.vae.sample_size // config.vae.downscale))
    picture = to_model(textured_picture(side * config.vae.downscale))
    large = (VIEWS, FACTOR * side, FACTOR * side, config.unet.latent_channels)
    return Inputs(
        sample=np.random.default_rng(0).standard_normal(large, dtype=np.float32),
        noise=0.25,
        embedding=noise_embedding(0.0, channels=config.noise_channels, frequencies=config.noise_frequencies),
        token_ids=None if config.text_encoder is None else CLIPTokenizer(folder / "tokenizer")(["", PROMPT]).ids,
        pixels=np.stack([picture, picture[:, ::-1]]),
    )


def _frames(inputs: Inputs) -> tuple[int, ...]:
    return (len(inputs.sample),)


def _run(model: UpscalerModel[Any], inputs: Inputs, observer: Any, *, states: States | None) -> States:
    """Every network once. Without `states`, the upscaler's gets those of this model's own encoders."""

    def observed(name: str, array: Any, seconds: float) -> None:
        observer(name, model.to_numpy(array), seconds)

    with model.observe(observed):
        text = None if inputs.token_ids is None else model.encode_text(inputs.token_ids)
        low = model.to_numpy(model.encode_latents(inputs.pixels))
        if states is None:
            arrays = (None, None) if text is None else (model.to_numpy(text.states), model.to_numpy(text.pooled))
            states = States(*arrays, low)
        given = None
        if states.text is not None and states.pooled is not None:
            given = TextStates(model.from_numpy(states.text), model.from_numpy(states.pooled))
        condition = model.condition(states.low, inputs.embedding, text=given)
        out = model.denoise(model.from_numpy(inputs.sample), inputs.noise, condition, GUIDANCE)
        pixels = model.decode(model.from_numpy(states.low))
    for name, array in (("latents", low), ("unet.guided", model.to_numpy(out)), ("pixels", pixels)):
        observer(name, array, None)
    return states


UPSCALER = Suite(("upscaling", "load_upscaler_model"), ("diffusers_upscaler", "DiffusersUpscaler"), _inputs, _frames, _run)
