"""Fitting a run into memory: the fastest plan that a budget allows, or what would fit instead."""

import re
from collections.abc import Iterator
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
    if memory_budget is None:
        return MemoryOptions(low_memory=low_memory)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(memory_budget).lower())
    if found is None or found[2] not in UNITS or not float(found[1]) > 0:
        raise OptionError("memory budget", expected="a size above 0 such as 6GB, 500MB or 6GiB", got=memory_budget)
    return MemoryOptions(low_memory=low_memory, budget_bytes=round(float(found[1]) * UNITS[found[2]]))


def fit(model: ModelSize, run: RunSize, options: MemoryOptions, *, process_bytes: int) -> Fitted:
    """The fastest plan of a run that fits the budget, the one of least memory with `low_memory`.

    Raises MemoryBudgetError, with what would fit instead, where none fits.
    """
    allowed = plans(model.backend, model.device)
    candidates = [
        Fitted(plan=plan, estimate=estimate(model, run, plan, process_bytes=process_bytes))
        for plan in (allowed[-1:] if options.low_memory else allowed)
    ]
    budget = options.budget_bytes
    if budget is None:
        return candidates[0]
    for fitted in candidates:
        if fitted.estimate.peak_bytes <= budget:
            return fitted
    least = min((fitted.estimate for fitted in candidates), key=lambda each: each.peak_bytes)
    raise MemoryBudgetError(
        needed_bytes=least.peak_bytes,
        budget_bytes=budget,
        stage=least.largest.name,
        hint=_what_fits(model, run, budget_bytes=budget, process_bytes=process_bytes),
    )


def _what_fits(model: ModelSize, run: RunSize, *, budget_bytes: int, process_bytes: int) -> str:
    """The changes that make a run fit, each alone, the mildest ones first."""
    fitting = []
    plan = plans(model.backend, model.device)[-1]
    for words, changed_model, changed_run in _changes(model, run):
        peak = estimate(changed_model, changed_run, plan, process_bytes=process_bytes).peak_bytes
        if peak <= budget_bytes and words.partition("=")[0] not in {each.partition("=")[0] for each in fitting}:
            fitting.append(f"{words} ({peak / 1e9:.2f} GB)")
    return f"what would fit: {', '.join(fitting)}" if fitting else "no smaller size, dtype or quantisation fits either"


def _changes(model: ModelSize, run: RunSize) -> Iterator[tuple[str, ModelSize, RunSize]]:
    """Arguments that save memory, and what they make of the sizes."""
    if model.half_size is not None:
        yield f'dtype="{model.half_size.dtype}"', model.half_size, run
    for preset, smaller in model.quantized_sizes.items():
        yield f'quantize="{preset}"', smaller, run
    for size_px in SMALLER_SIZES_PX:
        if size_px < run.size_px:
            yield f"size_px={size_px}", model, replace(run, size_px=size_px)
    for views in range(run.views - 1, 0, -1):
        yield f"views={views}", model, replace(run, views=views)
    if run.upscaler is not None:
        yield 'method="lanczos"', model, replace(run, upscaler=None, enlarged=1)
