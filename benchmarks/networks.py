"""Cases of a loaded model: a whole generation, one step of the U-Net, and the VAE, for the model's default views and size."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import peak_rss_bytes
from benchmarks.worker import Prepared
from mvshared.backend import Model, load
from mvshared.camera import camera_vectors, even_azimuths, orbit
from mvshared.guidance import PLAIN, Branch

TIMESTEP = 500.0


def generate(*, model: str, image: str, backend: str, steps: int) -> Prepared:
    """`Pipeline.generate`, from the picture's file to views in memory, in the dtype that the backend chooses."""
    pipeline = load(model, backend=backend)
    views = pipeline.model.config.defaults.views
    return _prepared(pipeline.model, lambda: pipeline.generate(image, steps=steps, seed=0), views=views)


def unet_step(*, model: str, backend: str, dtype: str) -> Prepared:
    """One call of the U-Net with its constant part prepared, without guidance, its output copied to numpy."""
    loaded = load(model, backend=backend, dtype=dtype).model
    x = loaded.from_numpy(random_latents(loaded))
    condition = condition_of(loaded, x, branches=PLAIN.branches)
    return _prepared(loaded, lambda: loaded.to_numpy(loaded.denoise(x, TIMESTEP, condition, PLAIN.weights)))


def vae_encode(*, model: str, backend: str, dtype: str) -> Prepared:
    """Latents of pictures, copied to numpy."""
    loaded = load(model, backend=backend, dtype=dtype).model
    defaults = loaded.config.defaults
    shape = (defaults.views, defaults.size_px, defaults.size_px, loaded.config.vae.in_channels)
    pixels = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    return _prepared(loaded, lambda: loaded.to_numpy(loaded.encode_latents(pixels)))


def vae_decode(*, model: str, backend: str, dtype: str) -> Prepared:
    """Pictures of latents, as numpy arrays."""
    loaded = load(model, backend=backend, dtype=dtype).model
    x = loaded.from_numpy(random_latents(loaded))
    return _prepared(loaded, lambda: loaded.decode(x))


def condition_of(model: Model[Any], latents: Any, *, branches: Sequence[Branch]) -> Any:
    """The constant part of a step with everything that the model takes, but for normal maps: random states, even cameras."""
    config, rng = model.config, np.random.default_rng(1)
    poses = orbit(even_azimuths(len(latents)), config.defaults.elevation_deg, radius=config.camera.radius)
    text, vision = config.text_encoder, config.image_encoder

    def states(count: int, tokens: int, width: int) -> Any:
        return model.from_numpy(rng.standard_normal((count, tokens, width), np.float32))

    return model.condition(
        text=None if text is None else states(min(2, len(branches)), text.max_position_embeddings, text.hidden_size),
        image_states=None if vision is None else states(1, vision.tokens, vision.hidden_size),
        cameras=camera_vectors(poses) if config.unet.camera_dim else None,
        reference=latents[:1] if config.unet.reference_frame else None,
        normals=None,
        branches=branches,
    )


def random_latents(model: Model[Any]) -> NDArray[np.float32]:
    """Noise for the model's default views and size."""
    defaults, vae = model.config.defaults, model.config.vae
    size = defaults.size_px // vae.downscale
    return np.random.default_rng(0).standard_normal((defaults.views, size, size, vae.latent_channels), np.float32)


def _prepared(model: Model[Any], call: Callable[[], object], *, views: int | None = None) -> Prepared:
    def facts() -> dict[str, Any]:
        return {
            "device": model.device,
            "dtype": model.dtype,
            "views": views,
            "peak_memory_bytes": peak_rss_bytes(),
            **library_facts(model),
        }

    return Prepared(call, facts)


def library_facts(model: Model[Any]) -> dict[str, str | int]:
    """Threads on the CPU; on a GPU its name and the largest sum of arrays there since the start."""
    if model.backend == "torch":
        import torch

        if model.device == "cpu":
            return {"threads": torch.get_num_threads()}
        name = torch.cuda.get_device_name(model.device)
        return {"device": f"CUDA, {name}", "device_memory_bytes": torch.cuda.max_memory_allocated(model.device)}
    import mlx.core as mx

    if model.device == "cpu":
        # MLX computes on the CPU in one thread per stream, and the BLAS in its wheel for Linux has no threads.
        return {"threads": 1}
    kind = "Metal" if mx.metal.is_available() else "CUDA"
    return {"device": f"{kind}, {mx.device_info()['device_name']}", "device_memory_bytes": mx.get_peak_memory()}
