"""`mvmlx info MODEL --estimate`."""

import importlib
from dataclasses import asdict
from typing import Any

import click

from mvshared.arguments import MAX_VIEWS, picture_size
from mvshared.backend import PACKAGES, choose_backend
from mvshared.checkpoint import components, find_model, read_model_config, weight_files
from mvshared.commands.generate import upscale_parameters
from mvshared.guidance import GUIDANCE_RANGE
from mvshared.memory.budget import Fitted, fit, memory_options
from mvshared.memory.estimate import estimate, model_size, process_bytes, usual_run, with_upscaling
from mvshared.memory.plan import MemoryPlan, plans
from mvshared.messages import print_json
from mvshared.numbers import number, whole
from mvshared.weights import choose_quantization


def show_estimate(name: str, options: dict[str, Any]) -> None:
    """What a run of a model would take, stage by stage. Raises MemoryBudgetError if it does not fit the budget."""
    folder = find_model(name)
    config = read_model_config(folder)
    backend = choose_backend(options["backend"])
    module = importlib.import_module(f"{PACKAGES[backend]}.model")
    device = module.choose_device(options["device"])
    dtype = module.choose_dtype(options["dtype"], device=device)
    loading: dict[str, Any] = {"backend": backend, "device": device, "dtype": dtype, "quantize": options["quantize"]}
    quantization = choose_quantization({part: weight_files(folder, part) for part in components(config)}, options["quantize"])
    model = model_size(folder, **loading)
    defaults = config.defaults
    views = whole("views", defaults.views if options["views"] is None else options["views"], 1, MAX_VIEWS)
    size_px = picture_size(config, options["size"], name="size")
    guidance = number("guidance", defaults.guidance if options["guidance"] is None else options["guidance"], *GUIDANCE_RANGE)
    run = usual_run(config, views=views, size_px=size_px, guidance=guidance)
    upscale = upscale_parameters(options, config)
    if upscale is not None:
        run = with_upscaling(run, upscale, **loading)
    memory = memory_options(low_memory=options["low_memory"], memory_budget=options["memory_budget"])
    before = process_bytes(device)
    fitted = fit(model, run, memory, process_bytes=before)
    lowest = plans(backend, device)[-1]
    least = estimate(model, run, lowest, process_bytes=before).peak_bytes
    if options["as_json"]:
        stages = [asdict(stage) | {"bytes": stage.bytes} for stage in fitted.estimate.stages]
        document = {"peak_bytes": fitted.estimate.peak_bytes, "process_bytes": before, "stages": stages}
        print_json(document | {"plan": asdict(fitted.plan), "low_memory_peak_bytes": least, **loading})
        return
    pixels = f"{views} view{'s' if views > 1 else ''} of {size_px} pixels, guidance {guidance:g}"
    quantized = f", quantised ({quantization})" if quantization else ""
    click.echo(f"{name}: {pixels}, {backend} on {device} in {dtype}{quantized}")
    _print(fitted)
    if fitted.plan != lowest:
        click.echo(f"with --low-memory it would be {least / 1e9:.2f} GB")


def _print(fitted: Fitted) -> None:
    result = fitted.estimate
    click.echo(f"{'stage':<16}{'weights':>10}{'on top':>10}{'together':>10}   GB, with {result.process_bytes / 1e9:.2f} before")
    for stage in result.stages:
        sizes = (stage.weights_bytes, stage.activations_bytes + stage.cached_bytes, result.process_bytes + stage.bytes)
        click.echo(f"{stage.name:<16}" + "".join(f"{size / 1e9:10.2f}" for size in sizes))
    click.echo(f"peak {result.peak_bytes / 1e9:.2f} GB, in the stage {result.largest.name}; {_words(fitted.plan)}")


def _words(plan: MemoryPlan) -> str:
    """What a plan does, for people."""
    parts = ["all networks are in memory" if plan.networks_at_once else "each network is read for its stage"]
    if not plan.branches_at_once:
        parts.append("guidance in two calls")
    if plan.vae_tile is not None:
        parts.append(f"the VAE in tiles of {plan.vae_tile} pixels")
    if plan.attention.implementation == "sliced":
        parts.append(f"attention in slices of {plan.attention.budget_bytes / 1e6:.0f} MB")
    return ", ".join(parts)
