"""Which cases there are, by the names of the command line: lists of cases to compare, the backends next to each other."""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import get_args

from benchmarks import commands, full_size, memory, networks, quantized, training
from benchmarks.compare import ROOT, Case
from benchmarks.renderer import renderer
from benchmarks.worker import Prepared
from mvshared.backend import BackendName, Dtype
from mvshared.checkpoint import read_model_config

IMAGE = ROOT / "examples" / "portrait.png"
# Subjects a step: MLX's CPU backend takes minutes for many.
TRAINING = (("demo", "torch", 8), ("larger", "torch", 2), ("demo", "mlx", 2))
RENDERER_VIEWS, RENDERER_SIZES_PX = 8, (64, 128, 256)


def cases(name: str, *, model: Path, backends: Sequence[BackendName], steps: int) -> list[list[Case]]:
    """The cases of a name of results.TITLES; those of an inner list take turns."""
    if name == "help":
        return [[Case(what="mvmlx --help, new process", prepare=commands.help_text)]]
    if name == "renderer":
        return [
            [
                Case(
                    what=f"{RENDERER_VIEWS} views of {size_px} px",
                    prepare=renderer,
                    arguments={"views": RENDERER_VIEWS, "size_px": size_px},
                )
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
            [Case(what="load", prepare=full_size.loading, arguments={"model": str(model), "backend": backend, "dtype": dtype})]
            for backend, dtype in product(backends, ("float32", "float16"))
        ]
    defaults = read_model_config(model).defaults
    if name == "memory":
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
    if name == "quantized":
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
    if name == "imagedream":
        # MLX's CPU backend would take minutes a step.
        sides = [side for side in ("torch", "diffusers") if "torch" in backends]
        return [
            [
                Case(
                    what=f"step, {defaults.views} views of {defaults.size_px} px and the reference",
                    prepare=full_size.step,
                    arguments={"model": str(model), "backend": side, "dtype": dtype},
                )
                for side in sides
            ]
            for dtype in ("float32", "bfloat16")
        ]
    size = f"{defaults.views} views of {defaults.size_px} px"
    if name == "generate":
        both = (("cold: mvmlx generate", commands.generate), ("warm: loaded model", networks.generate))
        arguments = {"model": str(model), "image": str(IMAGE), "steps": steps}
        return [
            [
                Case(what=f"{what}, {size}, {steps} steps", prepare=prepare, arguments={**arguments, "backend": backend})
                for backend in backends
            ]
            for what, prepare in both
        ]
    calls: dict[str, dict[str, Callable[..., Prepared]]] = {
        "unet": {"step": networks.unet_step},
        "vae": {"encode": networks.vae_encode, "decode": networks.vae_decode},
    }
    return [
        [
            Case(
                what=f"{what}, {size}",
                prepare=prepare,
                arguments={"model": str(model), "backend": backend, "dtype": dtype},
            )
            for backend in backends
        ]
        for (what, prepare), dtype in product(calls[name].items(), get_args(Dtype))
    ]
