"""Cases of a loaded model: loading it, its constant part, one step, the VAE, the upscaler's step, a whole run.

Each function loads what it needs and no more, so that the peak of its process says what that takes. The models are driven
through the members of `mvshared.backend.Model` that a run goes through as well.
"""

import importlib
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvshared.backend import PACKAGES, BackendName, Dtype, LatentModel, Model, TextStates, load
from mvshared.benchmark.measure import peak_rss_bytes
from mvshared.benchmark.models import X2_UPSCALER, measured, open_model
from mvshared.benchmark.worker import Prepared
from mvshared.camera import camera_vectors, even_azimuths, orbit
from mvshared.checkpoint import components
from mvshared.conversion.networks import network_shapes
from mvshared.files import make_folder, write_atomic, write_json
from mvshared.guidance import ALL, PLAIN, Branch, Guidance, Mixture
from mvshared.memory import plan as memory
from mvshared.pipeline import Pipeline
from mvshared.precision import DTYPE_BYTES
from mvshared.tokenizer import CLIPTokenizer
from mvshared.upscaling.latents import FACTOR
from mvshared.upscaling.schedule import noise_embedding
from mvshared.validation import textured_subject

# How far a guided step is led costs no time; with more, the rounding of both branches would hide what they have in common.
TIMESTEP, GUIDANCE = 500.0, 2.0


def matmul(*, size: int, backend: BackendName, device: str, dtype: Dtype) -> Prepared:
    """The product of two square matrices: what the device can do at best."""
    package = importlib.import_module(f"{PACKAGES[backend]}.benchmark")
    call = package.matrix_product(size, dtype=dtype, device=device)
    return Prepared(call, lambda: package.device_facts(device) | {"peak_memory_bytes": peak_rss_bytes()})


def loading(*, model: str, backend: BackendName, device: str, dtype: Dtype) -> Prepared:
    """`load`, from the files to networks that are ready; the model before is forgotten first."""
    kept: list[Any] = []

    def call() -> None:
        kept.clear()
        kept.append(load(model, backend=backend, device=device, dtype=dtype).model)

    def facts() -> dict[str, Any]:
        config = kept[0].config
        shapes = [network_shapes(getattr(config, part), backend=backend) for part in components(config)]
        numbers = sum(prod(shape) for part in shapes for shape in part.values())
        return facts_of(kept[0]) | {"weights_bytes": numbers * DTYPE_BYTES[dtype]}

    return Prepared(call, facts)


def condition(
    *, model: str, backend: BackendName, device: str, dtype: Dtype, views: int, size_px: int, guided: bool
) -> Prepared:
    """What stays constant over the steps, without the encoders."""
    loaded = open_model(model, ["unet"], backend=backend, dtype=dtype, device=device)
    given = constants(loaded, views=views, size_px=size_px, mixture=mixture_of(guided=guided))
    package = importlib.import_module(f"{PACKAGES[backend]}.benchmark")

    def call() -> None:
        loaded.condition(**given)
        package.wait(device)

    return _prepared(loaded, call)


def step(*, model: str, backend: BackendName, device: str, dtype: Dtype, views: int, size_px: int, guided: bool) -> Prepared:
    """One call of the U-Net with its constant part prepared, its output copied to numpy."""
    loaded = open_model(model, ["unet"], backend=backend, dtype=dtype, device=device)
    return _prepared(loaded, step_of(loaded, views=views, size_px=size_px, guided=guided))


def step_of(model: Model[Any], *, views: int, size_px: int, guided: bool) -> Callable[[], NDArray[np.float32]]:
    """A step of a loaded model, for random latents."""
    mixture = mixture_of(guided=guided)
    x = model.from_numpy(random_latents(model, views=views, size_px=size_px))
    prepared = model.condition(**constants(model, views=views, size_px=size_px, mixture=mixture))
    return lambda: model.to_numpy(model.denoise(x, TIMESTEP, prepared, mixture.weights))


def vae_encode(*, model: str, backend: BackendName, device: str, dtype: Dtype, views: int, size_px: int) -> Prepared:
    """Latents of pictures, copied to numpy."""
    loaded = open_model(model, ["vae"], backend=backend, dtype=dtype, device=device)
    shape = (views, size_px, size_px, loaded.config.vae.in_channels)
    pixels = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    return _prepared(loaded, lambda: loaded.to_numpy(loaded.encode_latents(pixels)))


def vae_decode(*, model: str, backend: BackendName, device: str, dtype: Dtype, views: int, size_px: int) -> Prepared:
    """Pictures of latents, as numpy arrays."""
    loaded = open_model(model, ["vae"], backend=backend, dtype=dtype, device=device)
    return _prepared(loaded, decode_of(loaded, views=views, size_px=size_px))


def decode_of(model: Model[Any], *, views: int, size_px: int) -> Callable[[], NDArray[np.float32]]:
    """Decoding with a loaded model, of random latents."""
    x = model.from_numpy(random_latents(model, views=views, size_px=size_px))
    return lambda: model.decode(x)


def upscaler_step(*, backend: BackendName, device: str, dtype: Dtype, views: int, size_px: int) -> Prepared:
    """One step of the x2 latent upscaler with random weights, unguided, from views of that size to twice that."""
    package = importlib.import_module(f"{PACKAGES[backend]}.benchmark")
    upscaler, rng = package.random_upscaler(X2_UPSCALER, dtype=dtype, device=device), np.random.default_rng(0)
    side, text = size_px // X2_UPSCALER.vae.downscale, X2_UPSCALER.text_encoder
    assert text is not None
    low = rng.standard_normal((views, side, side, X2_UPSCALER.unet.latent_channels), np.float32)
    x = upscaler.from_numpy(rng.standard_normal((views, FACTOR * side, FACTOR * side, low.shape[3]), np.float32))
    states = upscaler.from_numpy(rng.standard_normal((1, text.max_position_embeddings, text.hidden_size), np.float32))
    pooled = upscaler.from_numpy(rng.standard_normal((1, text.hidden_size), np.float32))
    embedding = noise_embedding(0.0, channels=X2_UPSCALER.noise_channels, frequencies=None)
    prepared = upscaler.condition(low, embedding, text=TextStates(states, pooled))
    return _prepared(upscaler, lambda: upscaler.to_numpy(upscaler.denoise(x, 0.0, prepared, 0.0)))


def _prepared(model: LatentModel[Any], call: Callable[[], Any]) -> Prepared:
    """Calls of a loaded model, as a run makes them."""
    return Prepared(call, lambda: facts_of(model), as_in_a_run(model))


def as_in_a_run(model: LatentModel[Any]) -> AbstractContextManager[None]:
    """The context that a run's calls are made in."""
    return model.planned(memory.PLAIN)


def generation(
    *, model: str, backend: BackendName, device: str, dtype: Dtype, views: int, size_px: int, steps: int, guidance: float
) -> Prepared:
    """`Pipeline.generate` of a loaded model, from a made-up picture and a text to views in memory."""
    pipeline = pipeline_of(model, backend=backend, device=device, dtype=dtype)
    config = pipeline.model.config
    image = textured_subject(size_px) if config.unet.takes_pictures else None
    prompt = None if config.text_encoder is None else "a head"  # with none at all there would be nothing to be guided by
    options: dict[str, Any] = {"prompt": prompt, "views": views, "size_px": size_px, "steps": steps, "seed": 0}
    options["guidance"] = guidance
    return Prepared(lambda: pipeline.generate(image, **options).images, lambda: facts_of(pipeline.model) | {"made": views})


def pipeline_of(name: str, *, backend: BackendName, device: str, dtype: Dtype) -> Pipeline[Any]:
    """The loaded pipeline of a model; one of random weights has a tokenizer that knows the special tokens alone."""
    found = measured(name)
    if found.folder is not None:
        return load(name, backend=backend, device=device, dtype=dtype)
    parts = components(found.config)
    model = open_model(name, parts, backend=backend, dtype=dtype, device=device)
    pipeline = Pipeline(model, name=name)
    if found.config.text_encoder is not None:
        with tempfile.TemporaryDirectory(prefix="mvmlx-benchmark-") as folder:
            write_empty_tokenizer(Path(folder))
            vars(pipeline)["tokenizer"] = CLIPTokenizer(folder)
    return pipeline


def write_empty_tokenizer(folder: Path) -> None:
    """A tokenizer that knows the special tokens of CLIP and nothing else."""
    write_json(make_folder(folder) / "vocab.json", {"<|startoftext|>": 49406, "<|endoftext|>": 49407})
    write_atomic(folder / "merges.txt", b"#version: 0.2\n")


def mixture_of(*, guided: bool) -> Mixture:
    """What a step computes: two branches of guidance, or one."""
    return Guidance(guidance=GUIDANCE).mixture(ALL) if guided else PLAIN


def constants(model: Model[Any], *, views: int, size_px: int, mixture: Mixture = PLAIN) -> dict[str, Any]:
    """What `condition` takes of a model: random states, even cameras, random latents of a reference frame; no normal maps."""
    config, rng = model.config, np.random.default_rng(1)
    poses = orbit(even_azimuths(views), config.defaults.elevation_deg, radius=config.camera.radius)
    text, vision = config.text_encoder, config.image_encoder
    branches: Sequence[Branch] = mixture.branches

    def states(count: int, tokens: int, width: int) -> Any:
        return model.from_numpy(rng.standard_normal((count, tokens, width), np.float32))

    reference = None
    if config.unet.reference_frame:
        reference = model.from_numpy(random_latents(model, views=1, size_px=size_px))
    return {
        "text": None if text is None else states(min(2, len(branches)), text.max_position_embeddings, text.hidden_size),
        "image_states": None if vision is None else states(1, vision.tokens, vision.hidden_size),
        "cameras": camera_vectors(poses) if config.unet.camera_dim else None,
        "reference": reference,
        "normals": None,
        "branches": branches,
        "timesteps": (TIMESTEP,),  # as a run announces them
    }


def random_latents(model: Model[Any], *, views: int, size_px: int) -> NDArray[np.float32]:
    """Noise for views of that size."""
    vae = model.config.vae
    side = size_px // vae.downscale
    return np.random.default_rng(0).standard_normal((views, side, side, vae.latent_channels), np.float32)


def facts_of(model: LatentModel[Any]) -> dict[str, Any]:
    """What a case says of its process and its device."""
    package = importlib.import_module(f"{PACKAGES[model.backend]}.benchmark")
    facts = package.device_facts(model.device)
    return {"device": model.device, "dtype": model.dtype, "peak_memory_bytes": peak_rss_bytes(), **facts}
