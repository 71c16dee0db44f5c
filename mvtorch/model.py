"""Loading a checkpoint folder into PyTorch, and the Model that the shared pipeline drives."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor, nn

from mvshared import precision
from mvshared.backend import Dtype, VAECodec, parse_dtype
from mvshared.checkpoint import Component, components, find_model, read_model_config, weight_files
from mvshared.config import CLIPTextConfig, CLIPVisionConfig, KUNetConfig, ModelConfig, NetworkConfig, UNetConfig, VAEConfig
from mvshared.errors import BackendError, OptionError
from mvshared.guidance import Branch, check_branches, check_weights
from mvshared.precision import DtypeChoice
from mvshared.weights import Stored, check_names_and_shapes, match_tensors
from mvtorch.clip import CLIPTextModel, CLIPVisionModel
from mvtorch.latents import LatentModel, to_numpy
from mvtorch.observation import Observer, observe
from mvtorch.unet import Cross, MultiViewUNet
from mvtorch.upscaler import LatentUpscaler
from mvtorch.vae import AutoencoderKL

_MAPPED_BYTES = 128_000_000


NO_NETWORKS: dict[str, Any] = {"unet": None, "vae": None}


@dataclass(frozen=True, kw_only=True)
class Condition:
    """What stays constant over the sampling steps, for b branches of the guidance.

    What the views attend to beside themselves, cameras (b, v, 16), reference latents (b, r, h, w, c) and the weight of their
    tokens, latents of the normal maps (b, v, h, w, c).
    """

    cross: Cross | None
    cameras: Tensor | None
    reference: Tensor | None
    reference_scale: float
    normals: Tensor | None
    branches: Sequence[Branch]


class MultiViewModel(LatentModel):
    """A U-Net, a VAE and the encoders of its conditions on one device: implements `mvshared.backend.Model`."""

    config: ModelConfig

    def __init__(
        self,
        config: ModelConfig,
        unet: MultiViewUNet,
        vae: AutoencoderKL,
        *,
        text_encoder: CLIPTextModel | None = None,
        image_encoder: CLIPVisionModel | None = None,
        device: str,
        dtype: Dtype,
        weight_files: Sequence[Path],
    ) -> None:
        super().__init__(vae, device=device, dtype=dtype, weight_files=weight_files)
        self.config, self.unet = config, unet
        self.text_encoder, self.image_encoder = text_encoder, image_encoder

    def observe(self, fn: Observer) -> AbstractContextManager[None]:
        """See `mvtorch.observation.observe`; the names begin with unet, vae, text_encoder or image_encoder."""
        encoders = {"text_encoder": self.text_encoder, "image_encoder": self.image_encoder}
        encoders = {name: encoder for name, encoder in encoders.items() if encoder is not None}
        return observe({"unet": self.unet, "vae": self.vae, **encoders}, fn)

    def encode_prompt(self, token_ids: NDArray[np.int64]) -> Tensor:
        """The text tower's last states (n, l, c), float32, of token ids (n, l). Raises OptionError without a text tower."""
        if self.text_encoder is None:
            raise OptionError("prompt", expected="left out: this model takes no text", got=token_ids.shape)
        with torch.inference_mode():
            return self.text_encoder(torch.tensor(token_ids, device=self.device)).last_hidden_state.float()

    def encode_image(self, pixels: NDArray[np.float32]) -> Tensor:
        """The vision tower's states before its last layer (n, m, c), float32, of normalised pixels (n, s, s, 3).

        Raises OptionError without a vision tower.
        """
        if self.image_encoder is None:
            raise OptionError("image", expected="left out: this model has no image encoder", got=pixels.shape)
        with torch.inference_mode():
            return self.image_encoder(self.from_numpy(pixels)).hidden_states[-2].float()

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
    ) -> Condition:
        """What `denoise` needs of text states (n, l, c), the last ones of the prompt and the first ones of the negative prompt,
        states (r, m, c) and clean latents (r, h, w, c) of r pictures, camera vectors (v, 16) and latents of normal maps
        (v, h, w, c).

        A branch that does not see the pictures or the normal maps has zeros for them; the cameras say what is looked at, so all
        have them. Raises OptionError for shapes that do not fit.
        """
        check_branches(branches, texts=None if text is None else len(text))

        def batched(x: Tensor | None, seen: Sequence[bool]) -> Tensor | None:
            return None if x is None else torch.stack([x if each else torch.zeros_like(x) for each in seen])

        with torch.inference_mode():
            pictured = [branch.image for branch in branches]
            context = None if text is None else torch.stack([text[-1 if branch.text else 0] for branch in branches])
            states = batched(image_states, pictured)
            return Condition(
                cross=self.unet.cross_keys_values(context, image_states=states, image_scale=image_scale),
                cameras=batched(None if cameras is None else self.from_numpy(cameras), [True] * len(branches)),
                reference=batched(reference, pictured),
                reference_scale=reference_scale,
                normals=batched(normals, [branch.normals for branch in branches]),
                branches=branches,
            )

    def denoise(self, x: Tensor, t: float, condition: Condition, weights: Sequence[float], rescale: float = 0.0) -> Tensor:
        """The U-Net's outputs (v, h, w, c), float32, for latents x (v, h, w, c) at timestep t, summed over the branches with
        their weights, and `rescale` of the sum brought back to the deviation of the last branch.

        Raises OptionError for shapes that do not fit, and unless there is a weight per branch.
        """
        check_weights(weights, branches=condition.branches)
        unet = self.config.unet
        with torch.inference_mode():
            batch = len(condition.branches)
            sample = x[None].expand(batch, *x.shape)
            if unet.normal_channels:
                zeros = sample.new_zeros((*sample.shape[:-1], unet.normal_channels))
                sample = torch.cat([sample, zeros if condition.normals is None else condition.normals], dim=-1)
            timesteps = torch.full((batch,), t, dtype=torch.float32, device=self.device)
            out = self.unet(
                sample,
                timesteps,
                cross=condition.cross,
                camera=condition.cameras,
                reference=condition.reference,
                reference_scale=condition.reference_scale,
            ).float()
            mixed = (torch.tensor(weights, device=self.device)[:, None, None, None, None] * out).sum(0)
            return rescaled(mixed, out[-1], rescale) if rescale else mixed


def rescaled(x: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Guided outputs (v, h, w, c), a share of them with the deviation of the conditional ones, view by view.

    Section 3.4 of arXiv 2305.08891; a view without any deviation stays as it is.
    """
    deviation = x.std(dim=(1, 2, 3), keepdim=True)
    ratio = conditional.std(dim=(1, 2, 3), keepdim=True) / deviation
    return x * torch.where(deviation > 0, 1 - share + share * ratio, 1.0)


def choose_device(device: str = "auto") -> str:
    """`auto` is CUDA if PyTorch finds it, else the CPU. Raises BackendError for a device that PyTorch does not have."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BackendError(
            f"PyTorch cannot use the device {device!r}: {reason}", backend="torch", hint="use cpu, or leave it to auto"
        ) from error
    return device


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


def load_model(name: str | Path, *, dtype: str | None = None, device: str = "auto") -> MultiViewModel:
    """Load an embedded model by name, or a checkpoint folder.

    Raises CheckpointError, OptionError and BackendError.
    """
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, device=chosen_device)
    folder = find_model(name)
    config = read_model_config(folder)
    files = {component: weight_files(folder, component) for component in components(config)}
    parts: dict[Any, Any] = {
        component: load_network(getattr(config, component), paths, dtype=chosen_dtype, device=chosen_device)
        for component, paths in files.items()
    }
    weights = [file for component in files for file in files[component]]
    return MultiViewModel(config, **parts, device=chosen_device, dtype=chosen_dtype, weight_files=weights)


def load_encoders(name: str | Path, *, device: str = "auto") -> MultiViewModel:
    """The text and image encoders of a folder in float32, in a model that can encode prompts and pictures and nothing else.

    Raises CheckpointError, OptionError and BackendError.
    """
    chosen, folder = choose_device(device), find_model(name)
    config = read_model_config(folder)
    files = {component: weight_files(folder, component) for component in components(config) if component not in ("unet", "vae")}
    parts: dict[Any, Any] = {
        component: load_network(getattr(config, component), paths, dtype="float32", device=chosen)
        for component, paths in files.items()
    }
    weights = [file for component in files for file in files[component]]
    return MultiViewModel(config, **NO_NETWORKS, **parts, device=chosen, dtype="float32", weight_files=weights)


def load_network(config: NetworkConfig, paths: Sequence[Path], *, dtype: Dtype, device: str) -> Any:
    """One network with the weights of files, ready to compute.

    Raises CheckpointError for a damaged file and TensorMismatchError if names or shapes differ.
    """
    with torch.device("meta"):
        network = _network(config)
    unet = config if isinstance(config, UNetConfig) else None
    load_weights(network, paths, dtype=dtype, device=device, unet=unet)
    return network.eval()


def _network(config: NetworkConfig) -> Any:
    match config:
        case UNetConfig():
            return MultiViewUNet(config)
        case VAEConfig():
            return AutoencoderKL(config)
        case CLIPTextConfig():
            return CLIPTextModel(config)
        case CLIPVisionConfig():
            return CLIPVisionModel(config)
        case KUNetConfig():
            return LatentUpscaler(config)


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
) -> dict[str, Tensor]:
    """The tensors of weight files by their names in the model, kernels in channels_last memory.

    Raises CheckpointError for a damaged file and TensorMismatchError if names or shapes differ.
    """
    tensors = {}
    for path, places in _readings(match_tensors(paths, shapes, unet=unet)):
        with safe_open(path, framework="pt") as file:
            for name, place in places:
                tensor = file.get_tensor(place.name).reshape(shapes[name])
                layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
                tensors[name] = tensor.to(
                    device=device, dtype=getattr(torch, precision.tensor_dtype(name, dtype)), memory_format=layout, copy=True
                )
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
        with torch.inference_mode():
            return to_numpy(vae.scale_latents(vae.encode(torch.tensor(np.ascontiguousarray(pixels), device=chosen)).mean))

    def decode(latents: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return to_numpy(vae.decode(vae.unscale_latents(torch.tensor(np.ascontiguousarray(latents), device=chosen))))

    return VAECodec(encode, decode)


def expected_shapes(config: ModelConfig) -> dict[Component, dict[str, tuple[int, ...]]]:
    """Names and shapes of the weights of every component, without a checkpoint and without memory for them."""
    return {component: network_shapes(getattr(config, component)) for component in components(config)}


def network_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a network, without a checkpoint and without memory for them."""
    with torch.device("meta"):
        return weight_shapes(_network(config))


def weight_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a checkpoint of this module."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def set_weights(module: nn.Module, weights: Mapping[str, NDArray[Any]]) -> None:
    """Overwrite the module's weights with arrays in checkpoint layout. Raises TensorMismatchError."""
    found = {name: array.shape for name, array in weights.items()}
    check_names_and_shapes(expected=weight_shapes(module), found=found, path=None)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(torch.tensor(np.ascontiguousarray(weights[name])))


def get_weights(module: nn.Module) -> dict[str, NDArray[np.float32]]:
    """Float32 copies of the module's weights in checkpoint layout."""
    return {name: to_numpy(tensor) for name, tensor in module.state_dict().items()}
