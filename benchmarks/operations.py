"""Counts what MLX computes in a step of Stable Diffusion 2.1's U-Net, and times it: `python -m benchmarks.operations`.

Primitives are counted in the graph, before it is evaluated: as the CPU runs it, and as Metal would, where layer norms,
attention and this project's group norms are one kernel each. `--against FOLDER` does the same with the U-Net of mlx-examples,
from its folder stable_diffusion; `--channels` sets the widths, and `--repeats` times both in turns, in seconds of the process.
The work is the same: two pictures, a context of 77 tokens, no joint attention.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

import mvmlx.norms
from mvmlx.unet import MultiViewUNet
from mvshared.config import SD21

TOKENS = 77
# They change how an array is read, and compute nothing.
VIEWS = {"Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unflatten"}
Call = Callable[[], mx.array]


def ours(channels: Sequence[int], *, size: int) -> tuple[Call, dict[str, mx.array]]:
    """A step of this project's U-Net with constants that are prepared, and its random weights."""
    unet = MultiViewUNet(replace(SD21, block_out_channels=tuple(channels)))
    rng = np.random.default_rng(0)
    weights = {}
    parameters: Any = tree_flatten(unet.parameters())
    for name, old in parameters:
        spread = 0.1 if old.ndim == 1 else (len(old) / old.size) ** 0.5
        weights[name] = mx.array(rng.normal(old.ndim == 1 and name.endswith("weight"), spread, old.shape).astype(np.float32))
        mx.eval(weights[name])
    unet.load_weights(list(weights.items()), strict=True)
    unet.eval()
    sample, context, timesteps = inputs(size)
    constants, times = unet.constants(context), unet.time_embeddings(timesteps)
    mx.eval(constants[0], times)
    return lambda: unet(sample[:, None], times, constants)[:, 0], weights


def theirs(folder: Path, channels: Sequence[int], weights: dict[str, mx.array], *, size: int) -> Call:
    """A step of mlx-examples' U-Net with the same weights."""
    sys.path.insert(0, str(folder))
    from stable_diffusion.config import UNetConfig as Config  # pyright: ignore[reportMissingImports]
    from stable_diffusion.unet import UNetModel  # pyright: ignore[reportMissingImports]

    unet = UNetModel(
        Config(
            block_out_channels=tuple(channels),
            num_attention_heads=tuple(width // SD21.attention_head_dim for width in channels),
            up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),  # as its loader gives them, from fine to coarse
        )
    )
    renamed = {}
    for name, weight in weights.items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        if "ff.net.0.proj" in name:
            for number, half in enumerate(mx.split(weight, 2), start=1):
                renamed[name.replace("ff.net.0.proj", f"linear{number}")] = half
        else:
            renamed[name] = weight.reshape(len(weight), -1) if "conv_shortcut.weight" in name else weight
    unet.load_weights(list(renamed.items()), strict=True)
    for module in unet.modules():
        if type(module).__name__ == "Transformer2D":
            module.norm.eps = 1e-6  # Stable Diffusion's
    sample, context, timesteps = inputs(size)
    return lambda: unet(sample, timesteps, context)


NAMES = {
    "downsamplers.0.conv": "downsample",
    "upsamplers.0.conv": "upsample",
    "mid_block.resnets.0": "mid_blocks.0",
    "mid_block.attentions.0": "mid_blocks.1",
    "mid_block.resnets.1": "mid_blocks.2",
    "to_q": "query_proj",
    "to_k": "key_proj",
    "to_v": "value_proj",
    "to_out.0": "out_proj",
    "ff.net.2": "linear3",
}


def inputs(size: int) -> tuple[mx.array, mx.array, mx.array]:
    """Latents of two pictures, their context, their timesteps."""
    rng = np.random.default_rng(1)
    shapes = ((2, size, size, SD21.in_channels), (2, TOKENS, SD21.cross_attention_dim or 0))
    sample, context = (mx.array(rng.standard_normal(shape, np.float32)) for shape in shapes)
    timesteps = mx.array([500.0, 500.0])
    mx.eval(sample, context, timesteps)
    return sample, context, timesteps


def primitives(*arrays: mx.array) -> Counter[str]:
    """How many primitives of each kind have to run for arrays that are not evaluated."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        mx.export_to_dot(str(path), *arrays)
        return Counter(re.findall(r'label ="(\w+)", shape=rectangle', path.read_text()))


def computing(counts: Counter[str]) -> int:
    """Those that compute something."""
    return sum(number for name, number in counts.items() if name not in VIEWS)


@contextmanager
def as_on_metal() -> Iterator[None]:
    """Within the context, one primitive stands for each kernel that Metal has and the CPU has not."""

    def kernel(x: mx.array, *others: Any, **options: Any) -> mx.array:
        arrays = [each for each in (*others, *options.values()) if isinstance(each, mx.array)]
        return mx.depends([x], arrays or [x])[0]

    def group_norm(x: mx.array, weight: mx.array, bias: mx.array, **_: Any) -> mx.array:
        return kernel(x.reshape(len(x), -1, x.shape[-1]), weight, bias).reshape(x.shape)

    places: list[tuple[Any, str, Any]] = [
        (mx.fast, "layer_norm", kernel),
        (mx.fast, "scaled_dot_product_attention", kernel),
        (mvmlx.norms, "usable", lambda x: True),
        (mvmlx.norms, "fused_group_norm", group_norm),
    ]
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, new in places:
        setattr(module, name, new)
    try:
        yield
    finally:
        for (module, name, _), old in zip(places, before, strict=True):
            setattr(module, name, old)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operations", description=__doc__)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="stable_diffusion of a clone of ml-explore/mlx-examples")
    parser.add_argument("--channels", type=int, nargs=4, default=(64, 128, 256, 256), help="widths of the four levels")
    parser.add_argument("--size", type=int, default=32, help="side of the latents")
    parser.add_argument("--repeats", type=int, default=0, help="calls of each that are timed")
    arguments = parser.parse_args()
    mine, weights = ours(arguments.channels, size=arguments.size)
    calls = {"mvmlx": mine}
    if arguments.against is not None:
        calls["mlx-examples"] = theirs(arguments.against, arguments.channels, weights, size=arguments.size)
    for name, call in calls.items():
        plain = primitives(call())
        with as_on_metal():
            metal = primitives(call())
        print(f"{name}: CPU {plain.total()} primitives, {computing(plain)} compute; Metal {metal.total()}, {computing(metal)}")
    if arguments.repeats:
        outs = [call() for call in calls.values()]
        mx.eval(outs)
        print("largest difference", *(mx.abs(out - outs[0]).max().item() for out in outs[1:]))
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(arguments.repeats):
            for name, call in calls.items():
                start = time.process_time()
                mx.eval(call())
                seconds[name].append(time.process_time() - start)
        for name, each in seconds.items():
            print(f"{name}: {statistics.median(each):.3f} s ({min(each):.3f} to {max(each):.3f})")


if __name__ == "__main__":
    main()
