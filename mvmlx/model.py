"""Loading a checkpoint folder into MLX, and the Model that the shared pipeline drives.

Checkpoint layout is PyTorch's: convolution kernels are (out, in, h, w) in files and at the border, (out, h, w, in) inside.
MLX's default device belongs to the program around this: what is computed here runs under `with mx.stream(device)`, and is
evaluated before it is handed out, so that another thread may use it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray

from mvmlx.clip import CLIPTextModel, CLIPVisionModel
from mvmlx.device import evaluated, keeping_random_state, on_device
from mvmlx.latents import LatentModel, to_numpy
from mvmlx.layout import checkpoint_shape, from_checkpoint, to_checkpoint
from mvmlx.observation import any_observed
from mvmlx.quantized import packed_tensors, quantize_network
from mvmlx.unet import Constants, MultiViewUNet, frames_in_common, select_objects
from mvmlx.upscaler import LatentUpscaler
from mvmlx.vae import AutoencoderKL
from mvshared import precision
from mvshared.backend import Dtype, Guided, VAECodec, parse_dtype
from mvshared.config import CLIPTextConfig, CLIPVisionConfig, KUNetConfig, ModelConfig, NetworkConfig, UNetConfig, VAEConfig
from mvshared.errors import BackendError, OptionError
from mvshared.guidance import Branch, check_branches, check_weights, frames_are_alike
from mvshared.loading import encoder_parts, model_parts, prepare
from mvshared.memory.plan import dataset_batch
from mvshared.networks import Networks
from mvshared.precision import DtypeChoice
from mvshared.process_memory import trim_heap
from mvshared.quantization.plans import Layers, part_of, preset_layers, quantize_weight, quantized_shapes
from mvshared.random_weights import random_weights
from mvshared.shapes import check_step, checked_token_ids
from mvshared.weights import check_names_and_shapes, match_tensors, stored_quantization


@dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """What stays constant over the sampling steps, for b branches of the guidance.

    The U-Net's constants, the embeddings (b, time_embed_dim) of the timesteps that were announced, latents of the normal maps
    (b, v, h, w, c).
    """

    constants: Constants
    times: Mapping[float, mx.array]
    normals: mx.array | None
    branches: Sequence[Branch]


class MultiViewModel(LatentModel):
    """A U-Net, a VAE and the encoders of its conditions on one device: implements `mvshared.backend.Model`."""

    config: ModelConfig

    def __init__(
        self,
        config: ModelConfig,
        networks: Networks,
        *,
        device: str,
        dtype: Dtype,
        weight_files: Sequence[Path],
        quantization: str | None = None,
    ) -> None:
        super().__init__(networks, device=device, dtype=dtype, weight_files=weight_files, quantization=quantization)
        self.config = config

    @property
    def unet(self) -> MultiViewUNet:
        """The U-Net, read if it is not in memory."""
        return self.networks["unet"]

    def encode_prompt(self, token_ids: NDArray[np.int64]) -> mx.array:
        """The text tower's last states (n, l, c), float32, of token ids (n, l). Raises OptionError without a text tower."""
        if "text_encoder" not in self.networks:
            raise OptionError("prompt", expected="left out: this model takes no text", got=token_ids.shape)
        assert self.config.text_encoder is not None
        ids = checked_token_ids(token_ids, vocab_size=self.config.text_encoder.vocab_size)
        with on_device(self.device):
            return evaluated(self.networks["text_encoder"](mx.array(ids)).last_hidden_state.astype(mx.float32))

    def encode_image(self, pixels: NDArray[np.float32]) -> mx.array:
        """The vision tower's states before its last layer (n, m, c), float32, of normalised pixels (n, s, s, 3).

        Raises OptionError without a vision tower.
        """
        if "image_encoder" not in self.networks:
            raise OptionError("image", expected="left out: this model has no image encoder", got=pixels.shape)
        with on_device(self.device):
            return evaluated(self.networks["image_encoder"](self.from_numpy(pixels)).hidden_states[-2].astype(mx.float32))

    def condition(
        self,
        *,
        text: mx.array | None = None,
        image_states: mx.array | None = None,
        image_scale: float = 1.0,
        cameras: NDArray[np.float32] | None,
        reference: mx.array | None,
        reference_scale: float = 1.0,
        normals: mx.array | None,
        branches: Sequence[Branch],
        timesteps: Sequence[float] = (),
    ) -> Condition:
        """What `denoise` needs of text states (n, l, c), the last ones of the prompt and the first ones of the negative prompt,
        states (r, m, c) and clean latents (r, h, w, c) of r pictures, camera vectors (v, 16) and latents of normal maps
        (v, h, w, c). What it needs of the timesteps is computed here for those that are announced, else at each step.

        A branch that does not see the pictures or the normal maps has zeros for them; the cameras say what is looked at, so all
        have them. Raises OptionError for shapes that do not fit.
        """
        check_branches(branches, texts=None if text is None else len(text))

        def batched(x: mx.array | None, seen: Sequence[bool]) -> mx.array | None:
            return None if x is None else evaluated(mx.stack([x if each else mx.zeros_like(x) for each in seen]))

        with on_device(self.device):
            pictured = [branch.image for branch in branches]
            context = None if text is None else mx.stack([text[-1 if branch.text else 0] for branch in branches])
            states = batched(image_states, pictured)
            constants = self.unet.constants(
                context,
                image_states=states,
                image_scale=image_scale,
                camera=batched(None if cameras is None else self.from_numpy(cameras), [True] * len(branches)),
                reference=batched(reference, pictured),
                reference_scale=reference_scale,
            )
            mx.eval(constants[:3])
            return Condition(
                constants=constants,
                times=self._times(timesteps, batch=len(branches)),
                normals=batched(normals, [branch.normals for branch in branches]),
                branches=branches,
            )

    @property
    def defers(self) -> bool:
        """Whether `denoise` only puts together what `start` begins to compute: unless little memory is to be taken, or somebody
        looks at the blocks."""
        observed = any(any_observed(self.networks[component]) for component in self.networks.loaded)
        return self.plan.networks_at_once and not observed

    def start(self, x: mx.array) -> None:
        """Begin to compute an array."""
        with on_device(self.device):
            mx.async_eval(x)

    def wait(self, x: mx.array) -> None:
        """Return when an array is computed."""
        mx.eval(x)

    def denoise(self, x: mx.array, t: float, condition: Condition, weights: Sequence[float], rescale: float = 0.0) -> mx.array:
        """The outputs of `guided` without those of the last branch."""
        return self.guided(x, t, condition, weights, rescale).out

    def guided(
        self, x: mx.array, t: float, condition: Condition, weights: Sequence[float], rescale: float = 0.0
    ) -> Guided[mx.array]:
        """The U-Net's outputs (v, h, w, c), float32, for latents x (v, h, w, c) at timestep t, summed over the branches with
        their weights, and `rescale` of the sum brought back to the deviation of the last branch; and those of the last branch.
        Not computed yet.

        Raises OptionError for shapes that do not fit, and unless there is a weight per branch.
        """
        check_weights(weights, branches=condition.branches)
        normals = None if condition.normals is None else condition.normals.shape
        check_step(self.config.unet, x=x.shape, normals=normals)
        count = len(condition.branches)
        together = count if self.plan.branches_at_once else 1
        with on_device(self.device):
            outs: list[mx.array] = []
            for first in range(0, count, together):
                more = list(self._outputs(x, t, condition, slice(first, first + together)))
                if together < count:  # one after the other, for the sake of memory
                    mx.eval(more)
                outs.extend(more)
            mixed = reduce(add, (float(weight) * out for weight, out in zip(weights, outs, strict=True)))
            return Guided(rescaled(mixed, outs[-1], rescale) if rescale else mixed, outs[-1])

    def _times(self, timesteps: Sequence[float], *, batch: int) -> dict[float, mx.array]:
        """The embeddings (batch, time_embed_dim) of timesteps."""
        distinct = list(dict.fromkeys(timesteps))
        if not distinct:
            return {}
        embedded = evaluated(self.unet.time_embeddings(mx.array(distinct, dtype=mx.float32)))
        return {t: mx.broadcast_to(each, (batch, each.size)) for t, each in zip(distinct, embedded, strict=True)}

    def _outputs(self, x: mx.array, t: float, condition: Condition, branches: slice) -> mx.array:
        """The U-Net's outputs (b, v, h, w, c), float32, of some of the condition's branches.

        Branches that differ only in what the views attend to go in as one, unless somebody looks at the blocks.
        """
        times = condition.times.get(t)
        if times is None:
            times = self.unet.time_embeddings(mx.full((len(condition.branches),), t, dtype=mx.float32))
        times, constants = times[branches], select_objects(condition.constants, branches)
        normals, channels = condition.normals, self.config.unet.normal_channels
        references = constants.reference is not None
        alike = frames_are_alike(condition.branches[branches], references=references, normals=normals is not None)
        if alike and constants.cross and not any_observed(self.unet):
            times, constants = times[:1], frames_in_common(constants)
        sample = mx.broadcast_to(x[None], (len(times), *x.shape))
        if normals is not None:
            sample = mx.concatenate([sample, normals[branches][: len(times)]], axis=-1)
        elif channels:
            sample = mx.pad(sample, [(0, 0)] * 4 + [(0, channels)])
        return self._compiled(self.unet)(sample, times, constants).astype(mx.float32)


def rescaled(x: mx.array, conditional: mx.array, share: float) -> mx.array:
    """Guided outputs (v, h, w, c), a share of them with the deviation of the conditional ones, view by view.

    Section 3.4 of arXiv 2305.08891; a view without any deviation stays as it is.
    """
    deviation = x.std(axis=(1, 2, 3), keepdims=True)
    ratio = conditional.std(axis=(1, 2, 3), keepdims=True) / deviation
    return x * mx.where(deviation > 0, 1 - share + share * ratio, 1.0)


def choose_device(device: str = "auto") -> str:
    """`auto` is MLX's default device, else `cpu` or `gpu`. Raises BackendError for a device that MLX does not have."""
    if device == "auto":
        return "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"
    if device not in ("cpu", "gpu"):
        raise BackendError(f"MLX has the devices cpu and gpu, got {device!r}", backend="mlx", hint="leave it to auto")
    if device == "gpu" and not mx.is_available(mx.gpu):
        raise BackendError("MLX finds no GPU on this machine", backend="mlx", hint="use cpu, or leave it to auto")
    return device


def default_dtype(device: str) -> DtypeChoice:
    """The dtype of a device for which none is given, and why."""
    if device == "cpu":
        return precision.MLX_CPU
    return precision.METAL if mx.metal.is_available() else precision.on_cuda(precision.TENSOR_CORES)


def choose_dtype(dtype: str | None, *, device: str) -> Dtype:
    """The given dtype, or that of `default_dtype`. Raises OptionError for another name.

    Raises BackendError for bfloat16 on Metal: its fast convolutions keep their transforms in the tensor's dtype, which leaves
    an error of some 6 % per layer in bfloat16.
    """
    chosen = parse_dtype(dtype, default=default_dtype(device).dtype)
    if chosen == "bfloat16" and device == "gpu" and mx.metal.is_available():
        raise BackendError("convolutions in bfloat16 are inaccurate on Metal", backend="mlx", hint="use float16 or float32")
    return chosen


def load_model(
    name: str | Path,
    *,
    dtype: str | None = None,
    device: str = "auto",
    quantize: str | None = None,
    at_once: bool = True,
) -> MultiViewModel:
    """Load an embedded or downloaded model by its name or repository, or a checkpoint folder.

    Its networks are read `at_once`, or each when it is needed; `quantize`, q8 or q4, quantises them as they are read.

    Raises CheckpointError, OptionError and BackendError.
    """
    device = choose_device(device)
    chosen, parts = choose_dtype(dtype, device=device), model_parts(name, quantize=quantize)
    networks = network_loaders(parts.config, parts.files, dtype=chosen, device=device, quantize=quantize)
    prepare(networks, parts, shapes=network_shapes, at_once=at_once)
    return MultiViewModel(
        parts.config, networks, device=device, dtype=chosen, weight_files=parts.weight_files, quantization=parts.quantization
    )


def load_encoders(name: str | Path, *, device: str = "auto") -> MultiViewModel:
    """The text and image encoders of a folder in float32, in a model that can encode prompts and pictures and nothing else.

    Raises CheckpointError, OptionError and BackendError.
    """
    chosen, parts = choose_device(device), encoder_parts(name)
    networks = network_loaders(parts.config, parts.files, dtype="float32", device=chosen)
    return MultiViewModel(parts.config, networks, device=chosen, dtype="float32", weight_files=parts.weight_files)


def network_loaders(
    config: Any, files: Mapping[Any, Sequence[Path]], *, dtype: Dtype, device: str, quantize: str | None = None
) -> Networks:
    """The networks of the components that have files, read when they are needed; the config has one for each."""
    options: dict[str, Any] = {"dtype": dtype, "device": device, "quantize": quantize}
    return Networks({part: partial(load_network, getattr(config, part), paths, **options) for part, paths in files.items()})


def load_network(
    config: NetworkConfig, paths: Sequence[Path], *, dtype: Dtype, device: str, quantize: str | None = None
) -> Any:
    """One network with the weights of files, ready to compute; `quantize`, q8 or q4, quantises it as it is read.

    Raises CheckpointError for a damaged file, TensorMismatchError if names or shapes differ, and OptionError for another
    preset.
    """
    network = _network(config)
    shapes = weight_shapes(network)
    stored, layers = stored_quantization(paths).layers, preset_layers(config, shapes, quantize)
    expected = quantized_shapes(shapes, stored)
    unet = config if isinstance(config, UNetConfig) else None
    with on_device(device):
        with keeping_random_state():
            quantize_network(network, stored or layers)
        tensors = read_tensors(paths, expected, dtype=dtype, device=device, unet=unet, stored=stored, quantize=layers)
    return filled(network, tensors, device=device)


def random_network(config: NetworkConfig, *, dtype: Dtype, device: str) -> Any:
    """One network with random weights, the same in both backends, ready to compute: for measurements without a checkpoint."""
    network = _network(config)
    return filled(network, random_tensors(weight_shapes(network), dtype=dtype, device=device), device=device)


def random_tensors(shapes: Mapping[str, tuple[int, ...]], *, dtype: Dtype, device: str) -> dict[str, mx.array]:
    """Random weights by their names in the model."""
    with on_device(device):
        return {name: _placed(mx.array(array), name, dtype=dtype) for name, array in random_weights(shapes)}


def filled(network: Any, tensors: Mapping[str, mx.array], *, device: str) -> Any:
    """A network with these weights, ready to compute on the device that they are on."""
    with on_device(device):
        network.load_weights(list(tensors.items()), strict=True)
    return network.eval()


def _placed(tensor: mx.array, name: str, *, dtype: Dtype) -> mx.array:
    """A weight of a checkpoint as the network of this dtype has it, kernels channels-last."""
    return from_checkpoint(tensor.astype(getattr(mx, precision.tensor_dtype(name, dtype))))


NETWORKS: dict[type[NetworkConfig], Callable[..., Any]] = {
    UNetConfig: MultiViewUNet,
    VAEConfig: AutoencoderKL,
    CLIPTextConfig: CLIPTextModel,
    CLIPVisionConfig: CLIPVisionModel,
    KUNetConfig: LatentUpscaler,
}


def _network(config: NetworkConfig) -> Any:
    with keeping_random_state():  # MLX's layers draw weights, which others take the place of
        return NETWORKS[type(config)](config)


def load_weights(
    module: nn.Module, paths: Sequence[Path], *, dtype: Dtype, device: str, unet: UNetConfig | None = None
) -> None:
    """Read weight files into a module, one tensor at a time; the module's own weights are never needed.

    `unet` is the config, if the module is a U-Net. Raises CheckpointError for a damaged file and TensorMismatchError if names
    or shapes differ.
    """
    with on_device(device):
        tensors = read_tensors(paths, weight_shapes(module), dtype=dtype, device=device, unet=unet)
        module.load_weights(list(tensors.items()), strict=True)


def read_tensors(
    paths: Sequence[Path],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: Dtype,
    device: str,
    unet: UNetConfig | None = None,
    stored: Layers | None = None,
    quantize: Layers | None = None,
) -> dict[str, mx.array]:
    """The tensors of weight files by their names in the model, kernels channels-last.

    Of the layers in `stored`, which the files hold quantised, the packed tensors; those in `quantize` are quantised as they are
    read. Raises CheckpointError for a damaged file and TensorMismatchError if names or shapes differ.
    """
    stored, quantize = stored or {}, quantize or {}
    places = match_tensors(paths, shapes, unet=unet, layers=stored)
    with on_device(device):
        lazy: dict[Path, Any] = {path: mx.load(str(path)) for path in paths}
        tensors: dict[str, mx.array] = {}
        for name, place in places.items():
            tensor = lazy[place.path].pop(place.name).reshape(shapes[name])
            part = part_of(name, quantize)
            if part is not None:
                packed = quantize_weight(to_numpy(tensor), quantize[part.layer], name=place.name, path=place.path)
                tensors |= packed_tensors(part.layer, packed, device=device)
            elif part_of(name, stored) is not None:
                tensors[name] = evaluated(tensor)
            else:
                tensors[name] = _placed(tensor, name, dtype=dtype)
        if quantize:
            mx.clear_cache()
            trim_heap()
        return tensors


def load_vae(config: VAEConfig, paths: Sequence[Path], *, device: str = "auto") -> VAECodec:
    """The VAE of weight files, in float32. Raises CheckpointError and BackendError."""
    chosen = choose_device(device)
    vae = _network(config)
    load_weights(vae, paths, dtype="float32", device=chosen)
    vae.eval()

    def encode(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        batch = dataset_batch("mlx", chosen, pixels=pixels.shape[1] * pixels.shape[2])
        with on_device(chosen):
            return to_numpy(vae.scale_latents(vae.encode(mx.array(np.ascontiguousarray(pixels)), batch=batch).mean))

    def decode(latents: NDArray[np.float32]) -> NDArray[np.float32]:
        with on_device(chosen):
            return to_numpy(vae.decode(vae.unscale_latents(mx.array(np.ascontiguousarray(latents)))))

    return VAECodec(encode, decode)


def network_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a network, without a checkpoint and without memory for them."""
    return weight_shapes(_network(config))


def packing_bytes(config: NetworkConfig, *, dtype: Dtype, device: str) -> int:
    """How much more memory a network's weights take once they are laid out for inference: none, MLX keeps them as they are."""
    return 0


def weight_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a checkpoint of this module."""
    return {name: checkpoint_shape(array.shape) for name, array in _weights(module)}


def set_weights(module: nn.Module, weights: Mapping[str, NDArray[Any]]) -> None:
    """Overwrite the module's weights with arrays in checkpoint layout. Raises TensorMismatchError."""
    found = {name: array.shape for name, array in weights.items()}
    check_names_and_shapes(expected=weight_shapes(module), found=found, path=None)
    tensors = [
        (name, from_checkpoint(mx.array(np.array(weights[name])).astype(array.dtype))) for name, array in _weights(module)
    ]
    module.load_weights(tensors, strict=True)


def get_weights(module: nn.Module) -> dict[str, NDArray[np.float32]]:
    """Float32 copies of the module's weights in checkpoint layout."""
    return {name: to_checkpoint(array) for name, array in _weights(module)}


def _weights(module: nn.Module) -> list[tuple[str, mx.array]]:
    flat: Any = tree_flatten(module.parameters())
    return flat
