"""Which layers of a network are quantised, with how many bits: presets, sizes, and how a weight file says it of itself.

A quantised layer X is stored as MLX's own quantised layers are: `X.weight` packed in uint32, `X.scales` and `X.biases` in
float16, and `X.bias` as it was. Kernels (o, i, h, w) are matrices (o, h * w * i), channels last. The file's metadata names the
layers, so that nothing beside it is needed to load it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvshared.config import CLIPTextConfig, CLIPVisionConfig, NetworkConfig, VAEConfig
from mvshared.errors import CheckpointError, OptionError
from mvshared.quantization.groups import BITS, GROUP_SIZES, Packed, dequantize_matrix, quantize_matrix

Shapes = Mapping[str, tuple[int, ...]]

METADATA = "quantization"
FORMAT_VERSION = 1
PRESETS = {"q8": 8, "q4": 4}
ENCODER_BITS = 8
KEPT_BITS = 8
# What q4 may spend on layers of KEPT_BITS, in bits per number of the network. SD 2.1's 866 million need 4.53 bits without.
EXTRA_BITS = 0.08

# In a network's dtype: the first and last layers, which are small and tell the network's dtype, and tables of embeddings.
_DENSE = re.compile(r"(^|\.)(conv_in|conv_out|quant_conv|post_quant_conv|(token|position|patch)_embedding)$")
# What q4 keeps where nothing was measured, as far as EXTRA_BITS go, in this order: of the last level, whose errors nothing
# after it evens out, the layers that work on the sum of both ways through the U-Net, then the rest of its convolutions; the
# embeddings, which go to every block.
_KEPT = (r"conv_shortcut$|proj_in$|proj_out$", r"conv2$", r"conv1$", r"^(time|camera)_embedding\.")


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """How a layer's weight of a `shape` (o, i) or (o, i, h, w) is stored: bits per number, and numbers per group."""

    bits: int
    group_size: int
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise OptionError("bits", expected=f"one of {', '.join(map(str, BITS))}", got=self.bits)
        if self.group_size not in GROUP_SIZES:
            raise OptionError("group size", expected=f"one of {', '.join(map(str, GROUP_SIZES))}", got=self.group_size)
        if len(self.shape) not in (2, 4) or min(self.shape) < 1 or self.columns % self.group_size:
            expected = f"(o, i) or (o, i, h, w) in groups of {self.group_size}"
            raise OptionError("shape", expected=expected, got=self.shape)

    @property
    def columns(self) -> int:
        """Numbers per output."""
        return prod(self.shape[1:])

    @property
    def packed_shape(self) -> tuple[int, int]:
        """Of the packed weight."""
        return self.shape[0], self.columns * self.bits // 32

    @property
    def groups_shape(self) -> tuple[int, int]:
        """Of scales and biases."""
        return self.shape[0], self.columns // self.group_size

    @property
    def bytes(self) -> int:
        """Of the packed weight, scales and biases."""
        return 4 * prod(self.packed_shape) + 4 * prod(self.groups_shape)


Layers = Mapping[str, QuantizedLayer]


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """The quantised layers of a weight file by their names in the model, and what chose them: q8, q4, or a number of bits."""

    preset: str = ""
    layers: Layers = field(default_factory=dict)


class Part(NamedTuple):
    """One of a quantised layer's three tensors: which layer it is of, and which of weight, scales and biases."""

    layer: str
    kind: str


def quantizable(shapes: Shapes, *, group_size: int = GROUP_SIZES[0]) -> dict[str, QuantizedLayer]:
    """The layers that can be quantised, in 8 bits: linear ones and convolutions, except the first and last ones.

    Groups have `group_size` numbers, or 32 where that does not divide the numbers per output; other layers are left out.
    Raises OptionError for a group size that is not allowed.
    """
    if group_size not in GROUP_SIZES:
        raise OptionError("group size", expected=f"one of {', '.join(map(str, GROUP_SIZES))}", got=group_size)
    layers = {}
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or len(shape) not in (2, 4) or _DENSE.search(layer):
            continue
        fitting = [size for size in GROUP_SIZES if size <= group_size and prod(shape[1:]) % size == 0]
        if fitting:
            layers[layer] = QuantizedLayer(bits=8, group_size=fitting[0], shape=tuple(shape))
    return layers


def with_bits(layers: Layers, bits: Mapping[str, int] | int) -> dict[str, QuantizedLayer]:
    """The layers with other numbers of bits, by name or one for all."""
    return {
        name: QuantizedLayer(bits=bits if isinstance(bits, int) else bits[name], group_size=layer.group_size, shape=layer.shape)
        for name, layer in layers.items()
    }


def check_preset(preset: str) -> None:
    """Raise OptionError unless there is a preset of that name."""
    if preset not in PRESETS:
        raise OptionError("quantize", expected=f"one of {', '.join(PRESETS)}", got=preset)


def preset_of(quantization: str | None) -> str | None:
    """The preset by which a model was quantised as it was loaded, of what it says of itself; None if its files are."""
    return quantization if quantization in PRESETS else None


def preset_layers(config: NetworkConfig, shapes: Shapes, preset: str | None) -> dict[str, QuantizedLayer]:
    """The layers that a preset quantises in a network where nothing is measured: none of a VAE, and none without a preset.

    q8 takes 8 bits for all. q4 takes 4 bits in the U-Net, and 8 for the first of those that are KEPT. Encoders have 8 bits in
    both: they run once, and what they lose is in every step. Raises OptionError for another preset.
    """
    if preset is None or isinstance(config, VAEConfig):
        return {}
    check_preset(preset)
    layers = quantizable(shapes)
    if isinstance(config, CLIPTextConfig | CLIPVisionConfig):
        return with_bits(layers, ENCODER_BITS)
    layers = with_bits(layers, PRESETS[preset])
    last = max((name.split(".")[1] for name in layers if name.startswith("up_blocks.")), key=int, default="")
    order = []
    for pattern in _KEPT:
        inside = "" if pattern.startswith("^") else f"up_blocks.{last}."
        order += [name for name in layers if name.startswith(inside) and re.search(pattern, name)]
    return _keep(shapes, layers, order)


def keep_sensitive(shapes: Shapes, layers: Layers, errors: Mapping[str, float]) -> dict[str, QuantizedLayer]:
    """The layers, those of the largest squared error per byte with KEPT_BITS as far as EXTRA_BITS go.

    `errors` are what the network's output loses, as a relative RMS, by each layer alone.
    """
    return _keep(shapes, layers, sorted(layers, key=lambda name: (-(errors[name] ** 2) / prod(layers[name].shape), name)))


def _keep(shapes: Shapes, layers: Layers, order: Sequence[str]) -> dict[str, QuantizedLayer]:
    """The layers, the first in an order with KEPT_BITS as far as EXTRA_BITS go; one that is too large is passed over."""
    left = EXTRA_BITS * sum(prod(shape) for shape in shapes.values())
    bits = {name: layer.bits for name, layer in layers.items()}
    for name in order:
        extra = prod(layers[name].shape) * (KEPT_BITS - bits[name])
        if 0 < extra <= left:
            left -= extra
            bits[name] = KEPT_BITS
    return with_bits(layers, bits)


def part_of(name: str, layers: Layers) -> Part | None:
    """Which part of a quantised layer a tensor is; None for all other tensors."""
    layer, _, kind = name.rpartition(".")
    return Part(layer, kind) if kind in ("weight", "scales", "biases") and layer in layers else None


def quantized_shapes(shapes: Shapes, layers: Layers) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a network once these layers are quantised.

    Raises CheckpointError for a layer that the network does not have in this shape.
    """
    result = dict(shapes)
    for name, layer in layers.items():
        found = result.get(f"{name}.weight")
        if found != layer.shape:
            has = f"has the shape {found}" if found else "is not there"
            raise CheckpointError(f"the quantised layer {name} {has} in the model, {layer.shape} in the file's metadata")
        result[f"{name}.weight"] = layer.packed_shape
        result[f"{name}.scales"] = result[f"{name}.biases"] = layer.groups_shape
    return result


def stored_bytes(shapes: Shapes, layers: Layers, *, dense_bytes: int = 2) -> int:
    """What a network's weights take, on disk and in memory: quantised layers, and `dense_bytes` for every other number."""
    dense = sum(prod(shape) for name, shape in shapes.items() if part_of(name, layers) is None)
    return dense * dense_bytes + sum(layer.bytes for layer in layers.values())


def quantize_weight(
    weight: NDArray[np.float32], layer: QuantizedLayer, *, name: str = "a weight", path: Path | None = None
) -> Packed:
    """Quantise a weight (o, i) or (o, i, h, w), the tensor `name` of a file.

    Raises CheckpointError for numbers that float16 scales cannot stand for.
    """
    matrix = weight.transpose(0, 2, 3, 1) if weight.ndim == 4 else weight
    try:
        return quantize_matrix(matrix.reshape(layer.shape[0], layer.columns), bits=layer.bits, group_size=layer.group_size)
    except CheckpointError as fault:
        raise CheckpointError(f"{name} holds {fault.message}", path=path, hint="are the weights damaged?") from fault


def dequantize_weight(packed: Packed, layer: QuantizedLayer) -> NDArray[np.float32]:
    """The weight (o, i) or (o, i, h, w) that quantised numbers stand for."""
    matrix = dequantize_matrix(packed, bits=layer.bits, group_size=layer.group_size)
    if len(layer.shape) == 2:
        return matrix
    outputs, inputs, height, width = layer.shape
    return np.ascontiguousarray(matrix.reshape(outputs, height, width, inputs).transpose(0, 3, 1, 2))


def to_metadata(quantization: Quantization) -> str:
    """What a weight file says of its quantised layers."""
    layers = {name: asdict(layer) for name, layer in sorted(quantization.layers.items())}
    document = {"format_version": FORMAT_VERSION, "preset": quantization.preset, "layers": layers}
    return json.dumps(document, separators=(",", ":"))


def from_metadata(text: str, *, path: Path) -> Quantization:
    """The quantised layers of a weight file by what it says. Raises CheckpointError for anything malformed or of another
    version."""

    def fault(reason: str) -> CheckpointError:
        return CheckpointError(f"has malformed metadata about its quantisation: {reason}", path=path)

    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise fault(str(cause)) from cause
    if not isinstance(document, dict):
        raise fault("it is no JSON object")
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"is quantised in the format {version!r}, and {FORMAT_VERSION} is known", path=path, hint="quantise it again"
        )
    preset, entries = document.get("preset"), document.get("layers")
    if set(document) != {"format_version", "preset", "layers"} or not isinstance(preset, str) or not isinstance(entries, dict):
        raise fault("it must hold format_version, preset and layers")
    return Quantization(preset=preset, layers={name: _layer(name, entry, fault) for name, entry in entries.items()})


def _layer(name: str, entry: Any, fault: Any) -> QuantizedLayer:
    if not isinstance(entry, dict) or set(entry) != {"bits", "group_size", "shape"}:
        raise fault(f"{name!r} must have bits, group_size and shape")
    shape = entry["shape"]
    numbers = (entry["bits"], entry["group_size"], *(shape if isinstance(shape, list) else [None]))
    if not all(isinstance(number, int) and not isinstance(number, bool) and 0 < number < 2**31 for number in numbers):
        raise fault(f"{name!r} has {entry!r}")
    try:
        return QuantizedLayer(bits=entry["bits"], group_size=entry["group_size"], shape=tuple(shape))
    except OptionError as refused:
        raise fault(f"{name!r}: {refused}") from refused
