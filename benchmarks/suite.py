"""Which cases the repository has beside those of `mvmlx benchmark`, by the names of the command line."""

from importlib.util import find_spec
from itertools import product
from pathlib import Path

from benchmarks import memory, quantized, training
from benchmarks.renderer import renderer
from mvshared.backend import BackendName
from mvshared.benchmark.cases import loading
from mvshared.benchmark.compare import Case
from mvshared.checkpoint import read_model_config

TITLES = {
    "renderer": "Head renderer",
    "training": "One training step, with and without gradient checkpointing",
    "loading": "Loading ImageDream at full size, random weights, from float16 files",
    "memory": "A run of ImageDream at full size, random weights: loading, one step, decoding",
    "quantized": "Stable Diffusion 2.1's U-Net at full size, random weights, quantised as it is loaded from float16",
}
# Subjects a step: MLX's CPU backend takes minutes for many.
TRAINING = (("small", "torch", 8), ("larger", "torch", 2), ("small", "mlx", 2))
RENDERER_VIEWS, RENDERER_SIZES_PX = 8, (64, 128, 256)
RENDERER_VARIANTS = ("plain", "compiled") if find_spec("numba") else ("plain",)


def cases(name: str, *, model: Path, backends: list[BackendName]) -> list[list[Case]]:
    """The cases of a name of TITLES; those of an inner list take turns."""
    if name == "renderer":
        return [
            [
                Case(
                    what=f"{RENDERER_VIEWS} views of {size_px} px",
                    prepare=renderer,
                    arguments={"views": RENDERER_VIEWS, "size_px": size_px},
                    row={"variant": variant},
                    environment={"NUMBA_DISABLE_JIT": "1"} if variant == "plain" else {},
                )
                for variant in RENDERER_VARIANTS
            ]
            for size_px in RENDERER_SIZES_PX
        ]
    if name == "training":
        return [
            [
                Case(
                    what=f"{size} U-Net, {batch} subjects, {'checkpointed' if checkpointing else 'plain'}",
                    prepare=training.step,
                    arguments={
                        "size": size,
                        "backend": backend,
                        "dtype": dtype,
                        "batch": batch,
                        "checkpointing": checkpointing,
                    },
                )
                for checkpointing in (0, 1)
            ]
            for (size, backend, batch), dtype in product(TRAINING, ("float32", "bfloat16"))
            if backend in backends
        ]
    if name == "loading":
        return [
            [
                Case(
                    what="load",
                    prepare=loading,
                    arguments={"model": str(model), "backend": backend, "device": "auto", "dtype": dtype},
                )
            ]
            for backend, dtype in product(backends, ("float32", "float16"))
        ]
    if name == "memory":
        defaults = read_model_config(model).defaults
        return [
            [
                Case(
                    what=f"{defaults.views} views of {defaults.size_px} px{', then twice that' if upscaler else ''}; {plan}",
                    prepare=memory.run,
                    arguments={"model": str(model), "upscaler": upscaler, "backend": backend, "dtype": dtype, "plan": plan},
                )
            ]
            for backend, dtype in (("torch", "bfloat16"), ("torch", "float32"), ("mlx", "float16"))
            if backend in backends and quantized.worthwhile(backend)
            for upscaler, plan in product(("", str(model / memory.UPSCALER)), memory.PLANS)
            if dtype != "float32" or plan in ("plain", "low")
        ]
    return [
        [
            Case(
                what=f"guided step, {preset}",
                prepare=quantized.step,
                arguments={"model": str(model), "backend": backend, "dtype": dtype, "quantize": preset},
            )
            for preset in quantized.PRESETS
        ]
        for backend, dtype in product(filter(quantized.worthwhile, backends), ("float32", "bfloat16"))
        if (backend, dtype) != ("mlx", "bfloat16")
    ]
