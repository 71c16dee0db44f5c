"""What quantising one layer alone does to the output of its network, on fixed inputs, in float32."""

import importlib
from collections.abc import Callable
from math import lcm
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mvshared.backend import PACKAGES, BackendName, TextStates
from mvshared.camera import camera_vectors, even_azimuths, orbit
from mvshared.checkpoint import Component
from mvshared.config import ModelConfig
from mvshared.guidance import PLAIN
from mvshared.networks import Networks
from mvshared.upscaling.config import UpscalerConfig
from mvshared.upscaling.latents import FACTOR
from mvshared.upscaling.schedule import noise_embedding

Probe: TypeAlias = Callable[[], NDArray[np.float32]]

LATENT_SIDE = 16  # at least; the smallest multiple of what the network needs
VIEWS, TOKENS = 2, 8
TIMESTEPS = (0.25, 0.75)  # shares of the training timesteps
SIGMAS = (-0.5, 0.5)  # quarters of ln sigma


class Network:
    """One network of a model, with weights of full precision in float32, and its outputs on fixed inputs."""

    def __init__(
        self,
        config: ModelConfig | UpscalerConfig,
        component: Component,
        paths: list[Path],
        *,
        backend: BackendName,
        device: str,
    ) -> None:
        package = PACKAGES[backend]
        module = importlib.import_module(f"{package}.model")
        self.module: Any = importlib.import_module(f"{package}.quantized")
        self.network: Any = module.load_network(getattr(config, component), paths, dtype="float32", device=device)
        networks = Networks({component: lambda: self.network})
        arguments = {"device": device, "dtype": "float32", "weight_files": paths}
        if component == "vae":
            latent_model = importlib.import_module(f"{package}.latents").LatentModel
            self.run: Probe = _vae_probe(latent_model(networks, **arguments), config)
        elif isinstance(config, ModelConfig):
            model = module.MultiViewModel(config, networks, **arguments)
            self.run = {"unet": _unet_probe, "text_encoder": _text_probe, "image_encoder": _image_probe}[component](
                model, config
            )
        else:
            upscaler = importlib.import_module(f"{package}.upscaling").UpscalerModel
            model = upscaler(config, networks, **arguments)
            self.run = _upscaler_probe(model, config) if component == "unet" else _text_probe(model, config)

    def set_weight(self, layer: str, weight: NDArray[np.float32]) -> None:
        """Overwrite a layer's weight, in checkpoint layout."""
        self.module.set_layer_weight(self.network, layer, weight)


def _normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _unet_probe(model: Any, config: ModelConfig) -> Probe:
    unet, text, vision = config.unet, config.text_encoder, config.image_encoder
    side = lcm(LATENT_SIDE, unet.downscale)
    views = VIEWS if unet.camera_dim or unet.reference_frame else 1
    x = model.from_numpy(_normal(0, views, side, side, unet.out_channels))
    poses = orbit(even_azimuths(views), config.defaults.elevation_deg, radius=config.camera.radius)
    given: dict[str, Any] = {
        "text": None if text is None else model.from_numpy(_normal(1, 1, TOKENS, text.hidden_size)),
        "image_states": None if vision is None else model.from_numpy(_normal(2, 1, vision.tokens, vision.hidden_size)),
        "cameras": camera_vectors(poses) if unet.camera_dim else None,
        "reference": model.from_numpy(_normal(3, 1, side, side, unet.out_channels)) if unet.reference_frame else None,
        "normals": model.from_numpy(_normal(4, views, side, side, unet.normal_channels)) if unet.normal_channels else None,
    }
    steps = config.scheduler.num_train_timesteps

    def run() -> NDArray[np.float32]:
        # The keys and values of what is attended to are in here: their layers count too.
        condition = model.condition(**given, branches=PLAIN.branches)
        outs = [model.denoise(x, round(share * (steps - 1)), condition, PLAIN.weights) for share in TIMESTEPS]
        return np.stack([model.to_numpy(out) for out in outs])

    return run


def _upscaler_probe(model: Any, config: UpscalerConfig) -> Probe:
    side = lcm(LATENT_SIDE, config.unet.downscale)
    channels = config.unet.latent_channels
    low, x = _normal(0, 1, side, side, channels), _normal(1, 1, FACTOR * side, FACTOR * side, channels)
    embedding = noise_embedding(0.0, channels=config.noise_channels, frequencies=config.noise_frequencies)
    text = None
    if config.text_encoder is not None:
        width = config.text_encoder.hidden_size
        text = TextStates(model.from_numpy(_normal(2, 1, TOKENS, width)), model.from_numpy(_normal(3, 1, width)))

    def run() -> NDArray[np.float32]:
        condition = model.condition(low, embedding, text=text)
        outs = [model.denoise(model.from_numpy(x), sigma, condition, 1.0) for sigma in SIGMAS]
        return np.stack([model.to_numpy(out) for out in outs])

    return run


def _text_probe(model: Any, config: ModelConfig | UpscalerConfig) -> Probe:
    text = config.text_encoder
    assert text is not None
    ids = np.random.default_rng(0).integers(0, text.vocab_size, (1, min(TOKENS, text.max_position_embeddings)))
    if isinstance(config, ModelConfig):
        return lambda: model.to_numpy(model.encode_prompt(ids))
    return lambda: model.to_numpy(model.encode_text(ids).states)


def _image_probe(model: Any, config: ModelConfig) -> Probe:
    vision = config.image_encoder
    assert vision is not None
    pixels = _normal(0, 1, vision.image_size, vision.image_size, vision.num_channels)
    return lambda: model.to_numpy(model.encode_image(pixels))


def _vae_probe(model: Any, config: ModelConfig | UpscalerConfig) -> Probe:
    side = LATENT_SIDE * config.vae.downscale
    pixels = np.tanh(_normal(0, 1, side, side, config.vae.in_channels))

    def run() -> NDArray[np.float32]:
        latents = model.encode_latents(pixels)
        return np.concatenate([model.to_numpy(latents).ravel(), model.decode(latents).ravel()])

    return run
