"""Loading a checkpoint folder into PyTorch, and the Model that the shared pipeline drives."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any
from weakref import proxy

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from mvshared import precision
from mvshared.backend import Dtype, Guided, VAECodec, parse_dtype
from mvshared.config import CLIPTextConfig, CLIPVisionConfig, KUNetConfig, ModelConfig, NetworkConfig, UNetConfig, VAEConfig
from mvshared.errors import BackendError, OptionError, first_line
from mvshared.guidance import Branch, check_branches, check_weights, frames_are_alike
from mvshared.loading import encoder_parts, model_parts, prepare
from mvshared.memory.plan import dataset_batch
from mvshared.networks import Networks
from mvshared.precision import DtypeChoice
from mvshared.process_memory import trim_heap
from mvshared.quantization.plans import Layers, part_of, preset_layers, quantize_weight, quantized_shapes
from mvshared.random_weights import random_weights
from mvshared.shapes import check_step, checked_token_ids
from mvshared.weights import (
    Stored,
    check_names_and_shapes,
    match_tensors,
    stored_quantization,
)
from mvtorch.clip import CLIPTextModel, CLIPVisionModel
from mvtorch.inference import inference, join_projections
from mvtorch.latents import LatentModel, to_numpy
from mvtorch.observation import any_observed
from mvtorch.packed import added_bytes, pack_network
from mvtorch.quantized import packed_tensors, quantize_network
from mvtorch.unet import Constants, MultiViewUNet, frames_in_common, select_objects
from mvtorch.upscaler import LatentUpscaler
from mvtorch.vae import AutoencoderKL

_MAPPED_BYTES = 128_000_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Condition:
    """What stays constant over the sampling steps, for b branches of the guidance.

    The U-Net's constants, the embeddings (b, time_embed_dim) of the timesteps that were announced, latents of the normal maps
    (b, v, h, w, c).
    """

    constants: Constants
    times: Mapping[float, Tensor]
    normals: Tensor | None
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

    def encode_prompt(self, token_ids: NDArray[np.int64]) -> Tensor:
        """The text tower's last states (n, l, c), float32, of token ids (n, l). Raises OptionError without a text tower."""
        if "text_encoder" not in self.networks:
            raise OptionError("prompt", expected="left out: this model takes no text", got=token_ids.shape)
        assert self.config.text_encoder is not None
        ids = checked_token_ids(token_ids, vocab_size=self.config.text_encoder.vocab_size)
        with inference(self.device):
            return self.networks["text_encoder"](torch.tensor(ids, device=self.device)).last_hidden_state.float()

    def encode_image(self, pixels: NDArray[np.float32]) -> Tensor:
        """The vision tower's states before its last layer (n, m, c), float32, of normalised pixels (n, s, s, 3).

        Raises OptionError without a vision tower.
        """
        if "image_encoder" not in self.networks:
            raise OptionError("image", expected="left out: this model has no image encoder", got=pixels.shape)
        with inference(self.device):
            return self.networks["image_encoder"](self.from_numpy(pixels)).hidden_states[-2].float()

    def condition(
        self,
        *,
        text: Tensor | None = None,
        image_states: Tensor | None = None,
        image_scale: float = 1.0,
        cameras: NDArray[np.float32] | None,
        reference: Tensor | None,
        reference_scale: float = 1.0,
        normals: Tensor | None,
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

        def batched(x: Tensor | None, seen: Sequence[bool]) -> Tensor | None:
            return None if x is None else torch.stack([x if each else torch.zeros_like(x) for each in seen])

        with inference(self.device):
            pictured = [branch.image for branch in branches]
            context = None if text is None else torch.stack([text[-1 if branch.text else 0] for branch in branches])
            states = batched(image_states, pictured)
            constants = self.unet.constants(
                context,
                image_states=states,
                image_scale=image_scale,
                camera=batched(None if cameras is None else self.from_numpy(cameras), [True] * len(branches)),
                reference=batched(reference, pictured),
                reference_scale=reference_scale,
            )
            return Condition(
                constants=constants,
                times=self._times(timesteps, batch=len(branches)),
                normals=batched(normals, [branch.normals for branch in branches]),
                branches=branches,
            )

    @property
    def defers(self) -> bool:
        """Whether `denoise` only puts together what `start` begins to compute: PyTorch begins at once."""
        return False

    def start(self, x: Tensor) -> None:
        """Begin to compute an array: PyTorch has begun."""

    def wait(self, x: Tensor) -> None:
        """Return when an array is computed: whatever reads it waits for it."""

    def denoise(self, x: Tensor, t: float, condition: Condition, weights: Sequence[float], rescale: float = 0.0) -> Tensor:
        """The outputs of `guided` without those of the last branch."""
        return self.guided(x, t, condition, weights, rescale).out

    def guided(
        self, x: Tensor, t: float, condition: Condition, weights: Sequence[float], rescale: float = 0.0
    ) -> Guided[Tensor]:
        """The U-Net's outputs (v, h, w, c), float32, for latents x (v, h, w, c) at timestep t, summed over the branches with
        their weights, and `rescale` of the sum brought back to the deviation of the last branch; and those of the last branch.

        Raises OptionError for shapes that do not fit, and unless there is a weight per branch.
        """
        check_weights(weights, branches=condition.branches)
        normals = None if condition.normals is None else tuple(condition.normals.shape)
        check_step(self.config.unet, x=tuple(x.shape), normals=normals)
        count = len(condition.branches)
        together = count if self.plan.branches_at_once else 1
        with inference(self.device):
            outs: list[Tensor] = []
            for first in range(0, count, together):
                outs.extend(self._outputs(x, t, condition, slice(first, first + together)))
            mixed = reduce(add, (float(weight) * out for weight, out in zip(weights, outs, strict=True)))
            return Guided(rescaled(mixed, outs[-1], rescale) if rescale else mixed, outs[-1])

    def _times(self, timesteps: Sequence[float], *, batch: int) -> dict[float, Tensor]:
        """The embeddings (batch, time_embed_dim) of timesteps."""
        distinct = list(dict.fromkeys(timesteps))
        if not distinct:
            return {}
        embedded = self.unet.time_embeddings(torch.tensor(distinct, dtype=torch.float32, device=self.device))
        return {t: each.expand(batch, -1) for t, each in zip(distinct, embedded, strict=True)}

    def _outputs(self, x: Tensor, t: float, condition: Condition, branches: slice) -> Tensor:
        """The U-Net's outputs (b, v, h, w, c), float32, of some of the condition's branches.

        Branches that differ only in what the views attend to go in as one, unless somebody looks at the blocks.
        """
        unet, times = self.unet, condition.times.get(t)
        if times is None:
            times = unet.time_embeddings(torch.full((len(condition.branches),), t, dtype=torch.float32, device=self.device))
        constants, normals = select_objects(condition.constants, branches), condition.normals
        channels = self.config.unet.normal_channels
        references = constants.reference is not None
        alike = frames_are_alike(condition.branches[branches], references=references, normals=normals is not None)

        def call(x: Tensor, times: Tensor) -> Tensor:
            given = constants
            if alike and given.cross and not any_observed(unet):
                times, given = times[:1], frames_in_common(given)
            sample = x[None].expand(len(times), *x.shape)
            if normals is not None:
                sample = torch.cat([sample, normals[branches][: len(times)]], dim=-1)
            elif channels:
                sample = F.pad(sample, (0, channels))
            return unet(sample, times, given).float()

        return self._called(unet, condition, call, x, times[branches])


def rescaled(x: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Guided outputs (v, h, w, c), a share of them with the deviation of the conditional ones, view by view.

    Section 3.4 of arXiv 2305.08891; a view without any deviation stays as it is.
    """
    deviation = x.std(dim=(1, 2, 3), keepdim=True)
    ratio = conditional.std(dim=(1, 2, 3), keepdim=True) / deviation
    # torch.where would bring the number from the host.
    return x * (1 - share + share * ratio).masked_fill(~(deviation > 0), 1.0)


def choose_device(device: str = "auto") -> str:
    """`auto` is CUDA if PyTorch finds it, else the CPU. Raises BackendError for a device that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        unknown = str(error).startswith(("Expected one of", "Invalid device string"))  # with a list of all that it ever knew
        reason = "it knows none of that name" if unknown else first_line(error).partition(". ")[0]
        hint = "use cpu, cuda or cuda:1, or leave it to auto"
        raise BackendError(f"PyTorch cannot use the device {device!r}: {reason}", backend="torch", hint=hint) from error
    if torch.device(device).type != "cpu":
        return device
    if torch.device(device).index:  # PyTorch takes any number
        raise BackendError(f"there is one CPU device, got {device!r}", backend="torch", hint="use cpu")
    return "cpu"  # for cpu:0, too


def default_dtype(device: str) -> DtypeChoice:
    """The dtype of a device for which none is given, and why."""
    kind = torch.device(device).type
    if kind == "cuda":
        return precision.on_cuda(torch.cuda.get_device_capability(device))
    if kind == "cpu":  # where oneDNN has the fast products
        return precision.on_cpu(precision.bfloat16_instructions() if torch.backends.mkldnn.is_available() else None)
    return precision.elsewhere(kind)


def choose_dtype(dtype: str | None, *, device: str) -> Dtype:
    """The given dtype, or that of `default_dtype`. Raises OptionError for another name."""
    return parse_dtype(dtype, default=default_dtype(device).dtype)


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
    """The networks of the components that have files, read when they are needed, and packed for inference on a CPU.

    The config has one for each."""
    options: dict[str, Any] = {"dtype": dtype, "device": device, "quantize": quantize}

    def load_packed(part: Any) -> Any:
        network = load_network(getattr(config, part), files[part], **options)
        pack_network(network, lean=owner.lean)
        return network

    networks = Networks({part: partial(load_packed, part) for part in files})
    owner = proxy(networks)  # else they would hold each other, and a model's memory would wait for the garbage collector
    return networks


def load_network(
    config: NetworkConfig, paths: Sequence[Path], *, dtype: Dtype, device: str, quantize: str | None = None
) -> Any:
    """One network with the weights of files, ready to compute; `quantize`, q8 or q4, quantises it as it is read.

    Raises CheckpointError for a damaged file, TensorMismatchError if names or shapes differ, and OptionError for another
    preset.
    """
    with torch.device("meta"):
        network = _network(config)
        shapes = weight_shapes(network)
        stored, layers = stored_quantization(paths).layers, preset_layers(config, shapes, quantize)
        expected = quantized_shapes(shapes, stored)
        quantize_network(network, stored or layers)
    unet = config if isinstance(config, UNetConfig) else None
    tensors = read_tensors(paths, expected, dtype=dtype, device=device, unet=unet, stored=stored, quantize=layers)
    return filled(network, tensors, device=device)


def random_network(config: NetworkConfig, *, dtype: Dtype, device: str) -> Any:
    """One network with random weights, the same in both backends, ready to compute: for measurements without a checkpoint."""
    with torch.device("meta"):
        network = _network(config)
    network = filled(network, random_tensors(weight_shapes(network), dtype=dtype, device=device), device=device)
    pack_network(network)
    return network


def random_tensors(shapes: Mapping[str, tuple[int, ...]], *, dtype: Dtype, device: str) -> dict[str, Tensor]:
    """Random weights by their names in the model."""
    return {name: _placed(torch.from_numpy(array), name, dtype=dtype, device=device) for name, array in random_weights(shapes)}


def filled(network: Any, tensors: Mapping[str, Tensor], *, device: str) -> Any:
    """A network with these weights, ready to compute on the device that they are on."""
    network.load_state_dict(tensors, strict=True, assign=True)
    if isinstance(network, MultiViewUNet) and torch.device(device).type == "cuda":
        join_projections(network)
    return network.eval()


def _placed(tensor: Tensor, name: str, *, dtype: Dtype, device: str) -> Tensor:
    """A copy of a weight as the network of this dtype has it, kernels in channels_last memory."""
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    used = getattr(torch, precision.tensor_dtype(name, dtype))
    return tensor.to(device=device, dtype=used, memory_format=layout, copy=True)


NETWORKS: dict[type[NetworkConfig], Callable[..., Any]] = {
    UNetConfig: MultiViewUNet,
    VAEConfig: AutoencoderKL,
    CLIPTextConfig: CLIPTextModel,
    CLIPVisionConfig: CLIPVisionModel,
    KUNetConfig: LatentUpscaler,
}


def _network(config: NetworkConfig) -> Any:
    return NETWORKS[type(config)](config)


def load_weights(
    module: nn.Module, paths: Sequence[Path], *, dtype: Dtype, device: str, unet: UNetConfig | None = None
) -> None:
    """Read weight files into a module, one tensor at a time; the module's own weights are never needed.

    `unet` is the config, if the module is a U-Net. Raises CheckpointError for a damaged file and TensorMismatchError if names
    or shapes differ.
    """
    tensors = read_tensors(paths, weight_shapes(module), dtype=dtype, device=device, unet=unet)
    module.load_state_dict(tensors, strict=True, assign=True)


def read_tensors(
    paths: Sequence[Path],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    dtype: Dtype,
    device: str,
    unet: UNetConfig | None = None,
    stored: Layers | None = None,
    quantize: Layers | None = None,
) -> dict[str, Tensor]:
    """The tensors of weight files by their names in the model, kernels in channels_last memory.

    Of the layers in `stored`, which the files hold quantised, the packed tensors; those in `quantize` are quantised as they are
    read. Raises CheckpointError for a damaged file and TensorMismatchError if names or shapes differ.
    """
    tensors = {}
    stored, quantize = stored or {}, quantize or {}
    for path, places in _readings(match_tensors(paths, shapes, unet=unet, layers=stored)):
        # The oldest safetensors make tensors on the device of the program around this.
        with torch.device("cpu"), safe_open(path, framework="pt") as file:
            for name, place in places:
                tensor = file.get_tensor(place.name).reshape(shapes[name])
                part = part_of(name, quantize)
                if part is not None:
                    packed = quantize_weight(tensor.float().numpy(), quantize[part.layer], name=place.name, path=path)
                    tensors |= packed_tensors(part.layer, packed, device=device)
                elif part_of(name, stored) is not None:
                    tensors[name] = tensor.to(device=device, copy=True)
                else:
                    tensors[name] = _placed(tensor, name, dtype=dtype, device=device)
        if quantize:
            trim_heap()
    return tensors


def _readings(stored: Mapping[str, Stored]) -> Iterator[tuple[Path, list[tuple[str, Stored]]]]:
    """The tensors file by file, in pieces of _MAPPED_BYTES: what was read of an open file stays in memory too."""
    pieces: list[tuple[Path, list[tuple[str, Stored]]]] = []
    size = 0
    for name, place in sorted(stored.items(), key=lambda item: (item[1].path, item[1].info.start)):
        if not pieces or pieces[-1][0] != place.path or size > _MAPPED_BYTES:
            pieces.append((place.path, []))
            size = 0
        pieces[-1][1].append((name, place))
        size += place.info.end - place.info.start
    return iter(pieces)


def load_vae(config: VAEConfig, paths: Sequence[Path], *, device: str = "auto") -> VAECodec:
    """The VAE of weight files, in float32. Raises CheckpointError and BackendError."""
    chosen = choose_device(device)
    with torch.device("meta"):
        vae = AutoencoderKL(config)
    load_weights(vae, paths, dtype="float32", device=chosen)

    def encode(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        batch = dataset_batch("torch", chosen, pixels=pixels.shape[1] * pixels.shape[2])
        with inference(chosen):
            moments = vae.encode(torch.tensor(np.ascontiguousarray(pixels), device=chosen), batch=batch)
            return to_numpy(vae.scale_latents(moments.mean))

    def decode(latents: NDArray[np.float32]) -> NDArray[np.float32]:
        with inference(chosen):
            return to_numpy(vae.decode(vae.unscale_latents(torch.tensor(np.ascontiguousarray(latents), device=chosen))))

    return VAECodec(encode, decode)


def network_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a network, without a checkpoint and without memory for them."""
    with torch.device("meta"):
        return weight_shapes(_network(config))


def packing_bytes(config: NetworkConfig, *, dtype: Dtype, device: str) -> int:
    """How much more memory a network's weights take once they are laid out for inference, unless memory is to be spared."""
    if device != "cpu":
        return 0
    with torch.device("meta"):
        return added_bytes(_network(config).to(getattr(torch, dtype)))


def weight_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a checkpoint of this module."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def set_weights(module: nn.Module, weights: Mapping[str, NDArray[Any]]) -> None:
    """Overwrite the module's weights with arrays in checkpoint layout. Raises TensorMismatchError."""
    found = {name: array.shape for name, array in weights.items()}
    check_names_and_shapes(expected=weight_shapes(module), found=found, path=None)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(torch.from_numpy(np.array(weights[name])))


def get_weights(module: nn.Module) -> dict[str, NDArray[np.float32]]:
    """Float32 copies of the module's weights in checkpoint layout."""
    return {name: to_numpy(tensor) for name, tensor in module.state_dict().items()}
