"""A whole run of ImageDream at its public size with random weights: the most memory it takes, beside what was estimated."""

import importlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.full_size import write_random_component, write_random_imagedream
from mvshared.backend import PACKAGES, choose_backend, load
from mvshared.benchmark.cases import facts_of, write_empty_tokenizer
from mvshared.benchmark.models import X2_UPSCALER
from mvshared.benchmark.worker import Prepared
from mvshared.checkpoint import FORMAT_VERSION, OWN_UPSCALER, find_model, read_model_config
from mvshared.config import SD_X2_UNET
from mvshared.conversion.configs import clip_document
from mvshared.files import make_folder, write_json
from mvshared.memory.budget import fit, memory_options
from mvshared.memory.estimate import model_size, process_bytes, usual_run, with_upscaling
from mvshared.upscaling.config import SigmaConfig, UpscaleDefaults
from mvshared.upscaling.views import UpscaleOptions, plan_upscale

GUIDANCE, STEPS = 5.0, 1
UPSCALER = "upscaler"  # the folder of the upscaler, inside of the model's
PLANS = ("plain", "low", "low q8", "low q4")  # what is in memory at once, and how the weights are quantised


def write_random_models(folder: Path) -> Path:
    """ImageDream's folder with an upscaler's inside, 5 GB of random weights in float16; returns the folder."""
    write_random_upscaler(folder / UPSCALER, vae_from=write_random_imagedream(folder))
    return folder


def write_random_upscaler(folder: Path, *, vae_from: Path) -> None:
    """An upscaler's folder of the x2 upscaler's sizes, 1 GB of random weights in float16."""
    text = X2_UPSCALER.text_encoder
    assert text is not None
    write_random_component(folder, "unet", SD_X2_UNET, asdict(SD_X2_UNET))
    write_random_component(folder, "text_encoder", text, clip_document(text))
    write_empty_tokenizer(folder / "tokenizer")
    write_json(make_folder(folder / "scheduler") / "scheduler_config.json", asdict(SigmaConfig()))
    index = {"_class_name": OWN_UPSCALER, "format_version": FORMAT_VERSION, "family": "random-x2"}
    write_json(folder / "model_index.json", index | {"vae_from": str(vae_from), "defaults": asdict(UpscaleDefaults())})


def run(*, model: str, upscaler: str, backend: str, dtype: str, plan: str) -> Prepared:
    """A run of one step, and of the upscaler's if there is one, in a process that does nothing else."""
    memory, _, preset = plan.partition(" ")
    low_memory, folder = memory == "low", find_model(model)
    device = importlib.import_module(f"{PACKAGES[choose_backend(backend)]}.model").choose_device()
    options: dict[str, Any] = {"backend": backend, "device": device, "dtype": dtype, "quantize": preset or None}
    size, config = model_size(folder, **options), read_model_config(folder)
    size_px = config.defaults.size_px
    side = size_px // config.vae.downscale
    asked = (
        UpscaleOptions(upscaler=upscaler, steps=STEPS, low_memory=low_memory) if upscaler else UpscaleOptions(method="lanczos")
    )
    upscaling = plan_upscale(
        asked, vae=config.vae, latent_size=(side, side), backend=options["backend"], dtype=options["dtype"]
    )
    text: dict[str, Any] = {} if config.text_encoder is None else {"prompt": ""}
    usual = usual_run(config, views=config.defaults.views, size_px=size_px, guidance=GUIDANCE)
    planned = with_upscaling(usual, upscaling, **options)
    fitted = fit(size, planned, memory_options(low_memory=low_memory), process_bytes=process_bytes(device))
    pipeline = load(model, **options, low_memory=low_memory)

    def call() -> None:
        picture = np.zeros((64, 64, 3), np.uint8)
        views = pipeline.generate(picture, **text, size_px=size_px, steps=STEPS, guidance=GUIDANCE, upscale=upscaling)
        pipeline.upscale_as(views, upscaling)

    def facts() -> dict[str, Any]:
        return facts_of(pipeline.model) | {"estimated_memory_bytes": fitted.estimate.peak_bytes}

    return Prepared(call, facts)
