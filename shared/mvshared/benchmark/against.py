"""The same work from diffusers, on the same weights and inputs, in turns with this project's: `--against diffusers`.

What diffusers has no code for, attention over all views, is done by its own attention on other groups of tokens; see
`mvtorch.diffusers_model`. Before anything is timed, the results are compared.
"""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mvshared.backend import PACKAGES, BackendName, Dtype
from mvshared.benchmark.cases import decode_of, step, step_of, vae_decode
from mvshared.benchmark.compare import Case
from mvshared.benchmark.measure import peak_rss_bytes, timing_of
from mvshared.benchmark.models import measured
from mvshared.benchmark.results import Row
from mvshared.benchmark.worker import Prepared
from mvshared.files import user_cache

EAGER = {"contiguous": "eager", "channels_last": "eager, channels_last"}
COMPILED = "compiled"
WARM_UP = 4  # the second call of a compiled network often compiles it anew, for what has changed
RECORDED_WARM_UP = 3  # the second call on CUDA is recorded
# Relative RMS that rounding explains between two orders of computing a guided step or a picture.
AGREE: dict[Dtype, float] = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
DIFFUSERS_PIXELS_ON_CPU = 2**15  # of pictures that diffusers' VAE computes together


def diffusers_work(
    *,
    call: str,
    model: str,
    device: str,
    dtype: Dtype,
    views: int,
    size_px: int,
    guided: bool,
    layout: str,
    compiled: str | None,
) -> Prepared:
    """`call`, step or decode, by diffusers. Raises BackendError if it is not installed."""
    module = importlib.import_module(f"{PACKAGES['torch']}.diffusers_model")
    found = measured(model)
    part = "unet" if call == "step" else "vae"
    source: Any = found.config if found.folder is None else found.folder
    loaded = module.DiffusersModel(source, dtype=dtype, device=device, parts=[part], layout=layout)
    # What is fastest for it: on a CPU one view at a time, and two of small ones.
    loaded.vae_batch = views if loaded.device != "cpu" else max(1, DIFFUSERS_PIXELS_ON_CPU // size_px**2)
    if compiled is not None:
        loaded.compile(compiled)
    work = step_of(loaded, views=views, size_px=size_px, guided=guided) if call == "step" else None
    package = importlib.import_module(f"{PACKAGES['torch']}.benchmark")

    def facts() -> dict[str, Any]:
        return {"dtype": dtype, "peak_memory_bytes": peak_rss_bytes(), **package.device_facts(loaded.device)}

    return Prepared(work or decode_of(loaded, views=views, size_px=size_px), facts)


def warm_up_of(device: str) -> int:
    """How many of this project's calls on a device do not count."""
    return RECORDED_WARM_UP if device.startswith("cuda") else 1


def cache_folder() -> Path:
    """Where compiled code is kept, apart from that of other programs."""
    return user_cache() / "inductor"


def against_group(
    call: str,
    *,
    what: str,
    model: str,
    backend: BackendName,
    device: str,
    dtype: Dtype,
    views: int,
    size_px: int,
    guided: bool,
    compiled: str | None,
    row: dict[str, Any],
    needed_bytes: int,
    repeated_flops: int = 0,
) -> list[Case]:
    """Ours, and diffusers in every way; the last one is what the others' results are compared with. `repeated_flops` is what
    diffusers computes in every call, and this project once."""
    shapes: dict[str, Any] = {"model": model, "device": device, "dtype": dtype, "views": views, "size_px": size_px}
    guidance = {"guided": guided} if call == "step" else {}
    known: dict[str, Any] = {"row": row, "needed_bytes": needed_bytes}
    ours = Case(
        what=what,
        prepare=step if call == "step" else vae_decode,
        arguments={**shapes, **guidance, "backend": backend},
        warm_up=warm_up_of(device),
        **known,
    )
    their_row = row | {"backend": "diffusers", "flops": row["flops"] + repeated_flops}
    # MLX's GPU is PyTorch's under another name.
    theirs = shapes | {"device": {"gpu": "mps"}.get(device, device), "call": call, "guided": guided}
    cases = [
        Case(
            what=what,
            prepare=diffusers_work,
            arguments={**theirs, "layout": layout, "compiled": None},
            row=their_row | {"variant": variant},
            needed_bytes=needed_bytes,
        )
        for layout, variant in EAGER.items()
    ]
    if compiled is not None:
        cache = cache_folder()
        named = f"{COMPILED}, {compiled}" if device.startswith("cuda") else COMPILED
        cases.append(
            Case(
                what=what,
                prepare=diffusers_work,
                arguments={**theirs, "layout": "channels_last", "compiled": compiled},
                row=their_row | {"variant": named},
                environment={"TORCHINDUCTOR_CACHE_DIR": str(cache)},
                cache=cache,
                needed_bytes=2 * needed_bytes,  # frozen weights are copies
                warm_up=WARM_UP,
            )
        )
    return [ours, *reversed(cases)]


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows with their seconds over those of the best eager diffusers, turn by turn; without, if that was not measured."""
    eager = [row for row in rows if row.variant in EAGER.values() and row.seconds]
    if not eager:
        return list(rows)
    best = min(eager, key=lambda row: timing_of(row.seconds).median)
    return [
        replace(row, ratios=_over(row.seconds, best.seconds), cpu_ratios=_over(row.cpu_seconds, best.cpu_seconds))
        for row in rows
    ]


def _over(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, ...]:
    return tuple(a / b for a, b in zip(ours, theirs, strict=False) if b)
