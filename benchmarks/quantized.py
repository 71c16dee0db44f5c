"""Stable Diffusion 2.1's U-Net at full size with random weights, plain and quantised: loading it, and one step."""

import gc
import importlib
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.full_size import write_random_component
from mvshared.backend import PACKAGES
from mvshared.benchmark.cases import as_in_a_run, facts_of, step_of
from mvshared.benchmark.measure import peak_rss_bytes
from mvshared.benchmark.worker import Prepared
from mvshared.checkpoint import read_model_config, weight_files
from mvshared.config import SD21, SD_VAE, CLIPTextConfig, SchedulerConfig
from mvshared.conversion.configs import clip_document, diffusers_unet_document, scheduler_document, vae_document
from mvshared.files import make_folder, write_json
from mvshared.networks import Networks
from mvshared.process_memory import resident

LATENT_SIDE = 32
PLAIN = "plain"
PRESETS = (PLAIN, "q8", "q4")


def write_random_sd21(folder: Path) -> Path:
    """A checkpoint folder whose U-Net has the sizes of Stable Diffusion 2.1, 1.7 GB in float16; its text encoder has one layer,
    and its VAE no weights. Returns the folder."""
    text = replace(CLIPTextConfig(), num_hidden_layers=1)
    write_random_component(folder, "unet", SD21, diffusers_unet_document(SD21, sample_size=LATENT_SIDE))
    write_random_component(folder, "text_encoder", text, clip_document(text))
    write_json(make_folder(folder / "vae") / "config.json", vae_document(SD_VAE))
    write_json(make_folder(folder / "scheduler") / "scheduler_config.json", scheduler_document(SchedulerConfig()))
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    return folder


def step(*, model: str, backend: str, dtype: str, quantize: str) -> Prepared:
    """One guided call of the U-Net, which is loaded alone, and quantised as it is read unless `quantize` is "plain"."""
    module: Any = importlib.import_module(f"{PACKAGES[backend]}.model")  # type: ignore[index]
    config, device, files = read_model_config(Path(model)), module.choose_device(), weight_files(Path(model), "unet")
    module.network_shapes(config.unet)  # so that what is imported for it does not count
    before, start = resident(), time.perf_counter()
    peak_before = peak_rss_bytes() if sys.platform == "darwin" else before  # what is resident there has a GPU's buffers
    preset = None if quantize == PLAIN else quantize
    unet = module.load_network(config.unet, files, dtype=dtype, device=device, quantize=preset)
    gc.collect()
    seconds, loaded, peak = time.perf_counter() - start, resident() - before, peak_rss_bytes() - peak_before
    networks = Networks({"unet": lambda: unet})
    running = module.MultiViewModel(config, networks, device=device, dtype=dtype, weight_files=files)
    defaults = config.defaults
    call = step_of(running, views=defaults.views, size_px=defaults.size_px, guided=True)

    def facts() -> dict[str, Any]:
        peak_now = peak_rss_bytes() - peak_before
        loading = {"load_seconds": seconds, "load_memory_bytes": loaded, "load_peak_bytes": peak}
        return facts_of(running) | loading | {"peak_memory_bytes": peak_now}

    return Prepared(call, facts, as_in_a_run(running))


def worthwhile(backend: str) -> bool:
    """Whether a step of the full size takes seconds: MLX's CPU backend would take minutes."""
    return backend != "mlx" or sys.platform == "darwin"
