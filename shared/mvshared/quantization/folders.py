"""`mvmlx quantize`: a checkpoint folder with quantised weights, and what each layer loses.

The folder is made as `mvmlx convert` makes its own: file by file, each whole or not at all, model_index.json last; what a
broken run has finished, the next one finds and keeps.
"""

import csv
import importlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvshared.backend import PACKAGES, choose_backend
from mvshared.checkpoint import Component, components, find_model, read_model_config, weight_files
from mvshared.config import ModelConfig, UNetConfig
from mvshared.conversion.convert import PLAIN_FOLDERS
from mvshared.conversion.folders import Progress, copy_files, fingerprint, remove_weights, write_weights
from mvshared.conversion.raw import RawTensor, cast, read_safetensors
from mvshared.errors import CheckpointError, OptionError
from mvshared.files import copy_file, make_folder, visible, write_atomic, write_json
from mvshared.metrics import relative_rms
from mvshared.quantization.groups import GROUP_SIZES, Packed
from mvshared.quantization.plans import (
    METADATA,
    PRESETS,
    Layers,
    Quantization,
    QuantizedLayer,
    Shapes,
    check_preset,
    dequantize_weight,
    keep_sensitive,
    part_of,
    preset_layers,
    quantizable,
    quantize_weight,
    to_metadata,
    with_bits,
)
from mvshared.quantization.sensitivity import Network
from mvshared.upscaling.config import UpscalerConfig
from mvshared.upscaling.folder import component_folders, is_upscaler, read_upscaler_config
from mvshared.weights import Stored, match_tensors

DEFAULT_COMPONENTS: tuple[Component, ...] = ("unet", "text_encoder", "image_encoder")
SHARD_BYTES = 1 << 62  # never: a quantised component is one file, which names its layers

OnLayer = Callable[[str, int], None]  # what is done, and how many layers it will be done for


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """A quantised layer: its numbers and bytes, what quantising changes in its weight, and in its network's output alone.

    Errors are relative RMS; `output_error` is None where nothing was measured.
    """

    component: Component
    name: str
    bits: int
    group_size: int
    weights: int
    bytes: int
    weight_error: float
    output_error: float | None


@dataclass(frozen=True, kw_only=True)
class ComponentReport:
    """A quantised component: bytes of its weights before and after, and its output's relative RMS with all layers quantised."""

    name: Component
    preset: str
    bytes_before: int
    bytes: int
    output_error: float | None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `quantize_folder` made."""

    folder: Path
    components: tuple[ComponentReport, ...]
    layers: tuple[LayerReport, ...]


@dataclass(frozen=True)
class _Source:
    """A component's weights of full precision: shapes of the model's tensors, and the stored ones and where they are by the
    model's names."""

    component: Component
    network: Any
    paths: list[Path]
    shapes: Shapes
    tensors: dict[str, RawTensor]
    places: Mapping[str, Stored]

    def weight(self, layer: str) -> NDArray[np.float32]:
        """A layer's weight in float32."""
        name = f"{layer}.weight"
        bits = np.array(cast(self.tensors[name], "F32", name=name).read())
        return bits.view(np.float32).reshape(self.shapes[name])

    def quantized(self, name: str, layer: QuantizedLayer) -> Packed:
        """A layer's weight, quantised. Raises CheckpointError for one that is not finite, by its name in its file."""
        place = self.places[f"{name}.weight"]
        return quantize_weight(self.weight(name), layer, name=place.name, path=place.path)


def quantize_folder(
    source: str | Path,
    dest: Path,
    *,
    preset: str | None = None,
    bits: int | None = None,
    group_size: int = GROUP_SIZES[0],
    chosen: Sequence[str] | None = None,
    measure: bool = True,
    backend: str = "auto",
    device: str = "auto",
    force: bool = False,
    on_layer: OnLayer = lambda what, count: None,
) -> Report:
    """Quantise the `chosen` components of a model, by default its U-Net and encoders, into the folder `dest`.

    `preset` is q8, the default, or q4; `bits` quantises every layer alike instead. `measure` runs each network once per layer:
    q4 keeps the layers in 8 bits that lose most, instead of those that its rule names. `on_layer` is called for every layer.
    Raises CheckpointError for a source that is damaged or quantised, OptionError, OutputError for a folder that holds
    something else, BackendError.
    """
    if preset is not None and bits is not None:
        raise OptionError("bits", expected="left out with a preset", got=bits)
    if bits is None:
        preset = preset or "q8"
        check_preset(preset)
        if group_size != GROUP_SIZES[0]:
            raise OptionError("group size", expected=f"{GROUP_SIZES[0]} with a preset", got=group_size)
    else:
        QuantizedLayer(bits=bits, group_size=group_size, shape=(1, GROUP_SIZES[0]))  # refuses what is not allowed
    folder = find_model(source)
    config = read_upscaler_config(folder) if is_upscaler(folder) else read_model_config(folder)
    here = _components(config, folder)
    names = _chosen(here, chosen)
    package = PACKAGES[choose_backend(backend)]
    module = importlib.import_module(f"{package}.model")
    options = f"{preset} {bits} {group_size} {measure} {' '.join(names)}"
    state = Progress(dest, fingerprint([folder], options, config.family, 0), sources=[folder], force=force)
    sources = [_source(folder, name, getattr(config, name), module.network_shapes) for name in names]
    plans = [_planned(each, preset, bits, group_size) for each in sources]
    with state.writing(here):
        layer_reports: list[LayerReport] = []
        component_reports = []
        for each, layers in zip(sources, plans, strict=True):
            probe = None
            if measure:
                probe = Network(
                    config, each.component, each.paths, backend=choose_backend(backend), device=module.choose_device(device)
                )
            layers, errors, whole = _measured(
                each, layers, probe, keep=preset == "q4" and each.component == "unet", on_layer=on_layer
            )
            del probe
            label = preset or f"{bits} bits"
            _write(dest, each, Quantization(preset=label, layers=layers), state, on_layer)
            layer_reports += [
                LayerReport(
                    component=each.component,
                    name=name,
                    bits=layer.bits,
                    group_size=layer.group_size,
                    weights=prod(layer.shape),
                    bytes=layer.bytes,
                    weight_error=errors[name][0],
                    output_error=errors[name][1],
                )
                for name, layer in layers.items()
            ]
            component_reports.append(
                ComponentReport(
                    name=each.component,
                    preset=label,
                    bytes_before=sum(tensor.bytes for tensor in each.tensors.values()),
                    bytes=sum(tensor.bytes for tensor in _tensors(each, layers).values()),
                    output_error=whole,
                )
            )
            copy_files(folder / each.component, dest / each.component, only=("config.json",))
        for name in here:
            if name not in names:
                _copy_component(folder, dest, name)
        for name in PLAIN_FOLDERS:
            if (folder / name).is_dir():
                copy_files(folder / name, dest / name)
        copy_files(folder, dest, only=("model_index.json",))
    return Report(folder=dest, components=tuple(component_reports), layers=tuple(layer_reports))


def _components(config: ModelConfig | UpscalerConfig, folder: Path) -> list[Component]:
    """The components whose weights are in the folder itself."""
    if isinstance(config, ModelConfig):
        return components(config)
    return [name for name, place in component_folders(folder, config).items() if place == folder]


def _chosen(here: Sequence[Component], chosen: Sequence[str] | None) -> list[Component]:
    if chosen is None:
        return [name for name in here if name in DEFAULT_COMPONENTS]
    for name in chosen:
        if name not in here:
            raise OptionError("components", expected=f"of {', '.join(here)} in this folder", got=name)
    if not chosen:
        raise OptionError("components", expected=f"one or more of {', '.join(here)}", got=[])
    return [name for name in here if name in chosen]


def _source(folder: Path, component: Component, network: Any, network_shapes: Callable[[Any], Shapes]) -> _Source:
    paths, shapes = weight_files(folder, component), network_shapes(network)
    raw = {path: read_safetensors(path) for path in paths}
    places = match_tensors(paths, shapes, unet=network if isinstance(network, UNetConfig) else None)
    tensors = {name: raw[place.path][place.name] for name, place in places.items()}
    return _Source(component, network, paths, shapes, tensors, places)


def _planned(source: _Source, preset: str | None, bits: int | None, group_size: int) -> dict[str, QuantizedLayer]:
    if bits is not None:
        layers = with_bits(quantizable(source.shapes, group_size=group_size), bits)
    elif source.component == "vae":
        assert preset is not None
        layers = with_bits(quantizable(source.shapes), PRESETS[preset])
    else:
        layers = preset_layers(source.network, source.shapes, preset)
    if not layers:
        raise CheckpointError(f"its {source.component} has no layer that can be quantised", path=source.paths[0])
    return layers


def _measured(
    source: _Source, layers: dict[str, QuantizedLayer], probe: Network | None, *, keep: bool, on_layer: OnLayer
) -> tuple[dict[str, QuantizedLayer], dict[str, tuple[float, float | None]], float | None]:
    """The layers, with `keep` those of the largest error in more bits; each layer's error of the weight and of the output; and
    the output's with all layers quantised."""
    if probe is None:
        errors = {name: (_weight_error(source, name, layer), None) for name, layer in layers.items()}
        return layers, dict(errors), None
    expected = probe.run()
    if not np.isfinite(expected).all():
        for name, layer in layers.items():
            source.quantized(name, layer)  # names the weight if it is one of these
        reason = f"its {source.component} gives numbers that are not finite"
        raise CheckpointError(reason, path=source.paths[0], hint="are the weights damaged?")

    def measure(name: str, layer: QuantizedLayer) -> tuple[float, float | None]:
        weight = source.weight(name)
        rounded = dequantize_weight(source.quantized(name, layer), layer)
        probe.set_weight(name, rounded)
        error = relative_rms(probe.run(), expected)
        probe.set_weight(name, weight)
        on_layer(f"measuring {source.component}", len(layers))
        return relative_rms(rounded, weight), error

    if keep:
        layers = with_bits(layers, PRESETS["q4"])
    found = {name: measure(name, layer) for name, layer in layers.items()}
    if keep:
        kept = keep_sensitive(source.shapes, layers, {name: error or 0.0 for name, (_, error) in found.items()})
        changed = {name: layer for name, layer in kept.items() if layer != layers[name]}
        found |= {name: measure(name, layer) for name, layer in changed.items()}
        layers = kept
    for name, layer in layers.items():
        probe.set_weight(name, dequantize_weight(source.quantized(name, layer), layer))
    return layers, found, relative_rms(probe.run(), expected)


def _weight_error(source: _Source, name: str, layer: QuantizedLayer) -> float:
    return relative_rms(dequantize_weight(source.quantized(name, layer), layer), source.weight(name))


def _tensors(source: _Source, layers: Layers) -> dict[str, RawTensor]:
    """What is written of a component, by the model's names: packed layers, everything else as it is stored."""
    result = {name: tensor for name, tensor in source.tensors.items() if part_of(name, layers) is None}
    last: dict[str, Packed] = {}  # a layer's three tensors are written one after the other

    def reader(name: str, kind: str) -> Callable[[], NDArray[Any]]:
        def read() -> NDArray[Any]:
            if name not in last:
                last.clear()
                last[name] = source.quantized(name, layers[name])
            array = getattr(last[name], kind)
            return array if kind == "weight" else array.view(np.uint16)

        return read

    for name, layer in layers.items():
        result[f"{name}.weight"] = RawTensor(dtype="U32", shape=layer.packed_shape, read=reader(name, "weight"))
        for kind in ("scales", "biases"):
            result[f"{name}.{kind}"] = RawTensor(dtype="F16", shape=layer.groups_shape, read=reader(name, kind))
    return result


def _write(dest: Path, source: _Source, quantization: Quantization, state: Progress, on_layer: OnLayer) -> None:
    layers = quantization.layers

    def written(name: str, size: int) -> None:
        part = part_of(name, layers)
        if part is not None and part.kind == "weight":
            on_layer(f"writing {source.component}", len(layers))

    write_weights(
        dest,
        source.component,
        _tensors(source, layers),
        shard_bytes=SHARD_BYTES,
        state=state,
        on_tensor=written,
        metadata={METADATA: to_metadata(quantization)},
    )


def _copy_component(folder: Path, dest: Path, name: Component) -> None:
    """A component's folder as it is: configs, weights, and the index of several weight files."""
    target, files = make_folder(dest / name), weight_files(folder, name)
    copy_files(folder / name, target, only=("config.json",))
    indices = [index for index in visible((folder / name).glob("*.index*.json")) if len(files) > 1]
    remove_weights(dest, name, keep=[path.name for path in (*files, *indices)])
    for path in (*files, *indices):
        copy_file(path, target / path.name)


def write_report(path: Path, report: Report) -> None:
    """Write the layers as CSV, or everything as JSON if the name ends in .json. Raises OutputError."""
    if path.suffix == ".json":
        write_json(path, asdict(report) | {"folder": str(report.folder)})
        return
    text = io.StringIO()
    rows = [asdict(layer) for layer in report.layers]
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())
