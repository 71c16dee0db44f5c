"""Fitting a run into memory: the fastest plan that a budget allows, or what would fit instead."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from mvshared.errors import MemoryBudgetError, OptionError
from mvshared.memory.estimate import Estimate, ModelSize, RunSize, estimate
from mvshared.memory.plan import MemoryPlan, plans

UNITS = {"": 10**9, "gb": 10**9, "mb": 10**6, "gib": 2**30, "mib": 2**20}
SMALLER_SIZES_PX = (512, 384, 256, 192, 128, 64)


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """What a caller allows: as little memory as possible with `low_memory`, at most `budget_bytes` if that is given."""

    low_memory: bool = False
    budget_bytes: int | None = None

    @property
    def at_once(self) -> bool:
        """Whether all networks may be loaded before the first run."""
        return not self.low_memory and self.budget_bytes is None


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A plan, and what a run takes with it."""

    plan: MemoryPlan
    estimate: Estimate


def memory_options(*, low_memory: bool = False, memory_budget: str | float | None = None) -> MemoryOptions:
    """The options of a budget such as "6GB", "500MB", "6GiB", or a number of GB. Raises OptionError for any other."""
    if not isinstance(low_memory, bool):
        raise OptionError("low_memory", expected="True or False", got=low_memory)
    if memory_budget is None:
        return MemoryOptions(low_memory=low_memory)
    size = 0.0
    if isinstance(memory_budget, int | float) and not isinstance(memory_budget, bool):
        size = memory_budget * UNITS["gb"]
    elif found := re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*", str(memory_budget).lower()):
        size = float(found[1]) * UNITS.get(found[2], 0)
    if not 0 < size < math.inf:
        raise OptionError("memory budget", expected="a size above 0 such as 6GB, 500MB or 6GiB", got=memory_budget)
    return MemoryOptions(low_memory=low_memory, budget_bytes=max(1, round(size)))


def fit(model: ModelSize, run: RunSize, options: MemoryOptions, *, process_bytes: int) -> Fitted:
    """The fastest plan of a run that fits the budget, the one of least memory with `low_memory`; with either, MLX on Metal is
    held to it.

    Raises MemoryBudgetError, with what would fit instead, where none fits.
    """
    allowed = plans(model.backend, model.device)
    candidates = [
        Fitted(plan=plan, estimate=estimate(model, run, plan, process_bytes=process_bytes))
        for plan in (allowed[-1:] if options.low_memory else allowed)
    ]
    budget = options.budget_bytes
    if budget is None:
        first = candidates[0]
        return _held(first, model, allowed_bytes=first.estimate.peak_bytes) if options.low_memory else first
    for fitted in candidates:
        if fitted.estimate.peak_bytes <= budget:
            return _held(fitted, model, allowed_bytes=budget)
    least = min((fitted.estimate for fitted in candidates), key=lambda each: each.peak_bytes)
    raise MemoryBudgetError(
        needed_bytes=least.peak_bytes,
        budget_bytes=budget,
        stage=least.largest.name,
        hint=_what_fits(model, run, budget_bytes=budget, process_bytes=process_bytes),
    )


def _held(fitted: Fitted, model: ModelSize, *, allowed_bytes: int) -> Fitted:
    """The same with what MLX may take on Metal before it waits. It looks after an operation that has its memory, so what that
    takes at most is left free."""
    if model.backend != "mlx" or model.device == "cpu":
        return fitted
    largest = max(stage.activations_bytes for stage in fitted.estimate.stages)
    return replace(fitted, plan=replace(fitted.plan, memory_bytes=max(0, allowed_bytes - largest)))


def _what_fits(model: ModelSize, run: RunSize, *, budget_bytes: int, process_bytes: int) -> str:
    """The changes that make a run fit, each alone, the mildest ones first; where none does, a smaller model's with a smaller
    run."""
    plan = plans(model.backend, model.device)[-1]

    def fitting(changes: Iterable[tuple[str, ModelSize, RunSize]]) -> list[str]:
        found: dict[str, str] = {}  # by the argument
        for words, changed_model, changed_run in changes:
            peak = estimate(changed_model, changed_run, plan, process_bytes=process_bytes).peak_bytes
            if peak <= budget_bytes:
                found.setdefault(words.partition("=")[0], f"{words} ({peak / 1e9:.2f} GB)")
        return list(found.values())

    models, runs = list(_smaller_models(model)), list(_smaller_runs(run))
    alone = [*((words, each, run) for words, each in models), *((words, model, each) for words, each in runs)]
    pairs = ((f"{a} and {b}", smaller, shorter) for a, smaller in models for b, shorter in runs)
    found = fitting(alone) or fitting(pairs)
    return f"what would fit: {', '.join(found)}" if found else "no smaller size, dtype or quantisation fits either"


def _smaller_models(model: ModelSize) -> Iterator[tuple[str, ModelSize]]:
    """Arguments that make weights smaller, and what they make of them."""
    if model.half_size is not None:
        yield f'dtype="{model.half_size.dtype}"', model.half_size
    for preset, smaller in model.quantized_sizes.items():
        yield f'quantize="{preset}"', smaller


def _smaller_runs(run: RunSize) -> Iterator[tuple[str, RunSize]]:
    """Arguments that make a run smaller, and what they make of it."""
    for size_px in SMALLER_SIZES_PX:
        if size_px < run.size_px:
            yield f"size_px={size_px}", replace(run, size_px=size_px)
    for views in range(run.views - 1, 0, -1):
        yield f"views={views}", replace(run, views=views)
    if run.upscaler is not None:
        yield 'method="lanczos"', replace(run, upscaler=None, enlarged=1)
