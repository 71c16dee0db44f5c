"""The networks of diffusers and transformers in the place of this project's own: what `mvmlx validate` compares with.

diffusers has neither joint attention over views, nor cameras, nor a reference frame; they are added to its U-Net from outside,
with its own attention processors of IP-Adapter for the image tokens. diffusers and transformers are imported by nothing else
here, and only once a model is loaded.
"""

import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mvshared.backend import BackendName, Dtype, Guided
from mvshared.checkpoint import Component, components, find_model, read_model_config, weight_files
from mvshared.config import ModelConfig, ResamplerConfig, UNetConfig
from mvshared.errors import BackendError, OptionError
from mvshared.files import read_json_object
from mvshared.guidance import Branch, check_branches, check_weights
from mvshared.weights import read_dequantized, stored_quantization, weight_stamps
from mvtorch.inference import exact_float32
from mvtorch.model import choose_device, choose_dtype, network_shapes, random_tensors, read_tensors, rescaled
from mvtorch.observation import Observer, observe

# Contiguous is diffusers' default, and more exact: PyTorch's group norm for channels_last loses digits on the CPU.
Layout: TypeAlias = Literal["contiguous", "channels_last"]


class Condition(NamedTuple):
    """What stays constant over the steps, with a batch per branch of the guidance; see `mvtorch.model.Condition`."""

    text: Tensor | None
    image_states: Tensor | None
    image_scale: float
    cameras: Tensor | None
    reference: Tensor | None
    reference_scale: float
    normals: Tensor | None
    branches: Sequence[Branch]


class DiffusersNetworks:
    """Networks of diffusers and transformers with a folder's weights, and what every model with a VAE does."""

    backend: BackendName
    device: str
    dtype: Dtype
    weight_files: Sequence[Path]
    weight_stamps: Sequence[str]
    quantization: str | None = None
    config: Any
    vae_batch = 1  # views that are decoded at once

    def __init__(
        self,
        config: Any,
        places: Mapping[Component, Path | None],
        builders: Mapping[Component, Callable[[Path | None, Any], nn.Module]],
        *,
        dtype: str | None,
        device: str,
        layout: Layout = "contiguous",
    ) -> None:
        """`places` are the folders of the components that are loaded, None for random weights; `builders` make them without
        weights. `layout` is that of pictures and kernels in memory.

        Raises CheckpointError, OptionError and BackendError, also if diffusers or transformers is not installed.
        """
        self.backend, self.device, self.config = "torch", choose_device(device), config
        self.dtype = choose_dtype(dtype, device=self.device)
        self.weight_files = [
            file for component, folder in places.items() if folder is not None for file in weight_files(folder, component)
        ]
        self.weight_stamps = weight_stamps(self.weight_files)
        self.memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        self._networks: dict[str, Any] = {}
        for component, folder in places.items():
            network, own = builders[component](folder, config), getattr(config, component)
            unet = own if isinstance(own, UNetConfig) else None
            tensors = self._tensors(folder, component, own)
            _set_weights(network, tensors, resampler=None if unet is None else unet.resampler)
            nn.Module.to(network, device=self.device, dtype=getattr(torch, self.dtype))
            self._networks[component] = network.to(memory_format=self.memory_format).eval()  # pyright: ignore[reportCallIssue]

    def compile(self, mode: str) -> None:
        """Let `torch.compile` make the networks faster: with frozen weights on a CPU, in that mode of its on a GPU. Each is
        compiled when it is first called, which takes minutes."""
        on_cpu = self.device == "cpu"
        if on_cpu:
            inductor: Any = importlib.import_module("torch._inductor.config")
            inductor.freezing = True
        for network in self._networks.values():
            for module in (network.decoder, network.encoder) if hasattr(network, "decoder") else (network,):
                module.compile(mode=None if on_cpu else mode)

    def _tensors(self, folder: Path | None, component: Component, config: Any) -> dict[str, Tensor]:
        """The weights of a component by this project's names."""
        shapes, unet = network_shapes(config), config if isinstance(config, UNetConfig) else None
        if folder is None:
            return random_tensors(shapes, dtype=self.dtype, device=self.device)
        files = weight_files(folder, component)
        if not stored_quantization(files).layers:
            return read_tensors(files, shapes, dtype=self.dtype, device=self.device, unet=unet)
        arrays = read_dequantized(files, shapes, unet=unet)
        return {name: torch.from_numpy(array).to(getattr(torch, self.dtype)) for name, array in arrays.items()}

    def observe(self, fn: Observer) -> AbstractContextManager[None]:
        """As `mvtorch.observation.observe`, with this project's names for the blocks."""

        def renamed(name: str, array: Tensor, seconds: float) -> None:
            component, _, path = name.partition(".")
            if path.endswith(".group_norm"):  # tokens lie (n, c, l) there
                array = array.transpose(1, 2)
            fn(f"{component}.{_own_name(path)}" if path else component, array, seconds)

        return observe(self._networks, renamed)

    def from_numpy(self, x: NDArray[np.float32]) -> Tensor:
        """A float32 copy on the device."""
        return torch.tensor(np.ascontiguousarray(x, dtype=np.float32), device=self.device)

    def to_numpy(self, x: Tensor) -> NDArray[np.float32]:
        """A float32 copy."""
        return x.detach().float().cpu().contiguous().numpy().copy()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """A context without gradients, in which float32 is float32, as it is for this project's networks."""
        with torch.inference_mode(), exact_float32():
            yield

    def encode_latents(self, pixels: NDArray[np.float32]) -> Tensor:
        """Scaled latents (n, h, w, c) of pixels (n, H, W, 3) in [-1, 1]: the posterior's mean."""
        mean, scale = self._latent_statistics()
        with self._computing():
            means = [self._networks["vae"].encode(self._pictures(x[None])).latent_dist.mean for x in self.from_numpy(pixels)]
            return (torch.cat(means).float().permute(0, 2, 3, 1) - mean) * scale

    def decode(self, x: Tensor) -> NDArray[np.float32]:
        """Pixels (v, H, W, 3) of scaled latents (v, h, w, c)."""
        mean, scale = self._latent_statistics()
        with self._computing():
            latents = self._pictures(x / scale + mean)
            pixels = [self._networks["vae"].decode(some).sample for some in latents.split(self.vae_batch)]
            return self.to_numpy(torch.cat(pixels).permute(0, 2, 3, 1))

    def _network(self, component: str, argument: str) -> Any:
        if component not in self._networks:
            raise OptionError(argument, expected=f"left out: this model has no {component}", got="a value")
        return self._networks[component]

    def _latent_statistics(self) -> tuple[Tensor, Tensor]:
        vae = self.config.vae
        mean = self.from_numpy(np.array(vae.latents_mean or [0.0] * vae.latent_channels, np.float32))
        std = self.from_numpy(np.array(vae.latents_std or [1.0] * vae.latent_channels, np.float32))
        return mean, vae.scaling_factor / std

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(getattr(torch, self.dtype))

    def _pictures(self, x: Tensor) -> Tensor:
        """(n, h, w, c) as (n, c, h, w) in the networks' dtype and layout."""
        return self._cast(x).permute(0, 3, 1, 2).contiguous(memory_format=self.memory_format)


class DiffusersModel(DiffusersNetworks):
    """What computes of `mvshared.backend.Model`, with diffusers' U-Net and VAE and transformers' CLIP, on a folder's weights.

    `mvmlx validate` and `mvmlx benchmark` call it. It has no memory plan and releases no networks, so no pipeline can run it.
    """

    def __init__(
        self,
        name: str | Path | ModelConfig,
        *,
        dtype: str | None = None,
        device: str = "auto",
        parts: Sequence[Component] | None = None,
        layout: Layout = "contiguous",
    ) -> None:
        """`name` is that of a model, or a config, whose networks get random weights. `parts` are the networks that are loaded,
        all of them if not given.

        Raises CheckpointError, OptionError and BackendError, also if diffusers or transformers is not installed.
        """
        folder = None if isinstance(name, ModelConfig) else find_model(name)
        config = name if isinstance(name, ModelConfig) else read_model_config(find_model(name))
        chosen = components(config) if parts is None else parts
        super().__init__(config, dict.fromkeys(chosen, folder), BUILDERS, dtype=dtype, device=device, layout=layout)

    def encode_prompt(self, token_ids: NDArray[np.int64]) -> Tensor:
        """The text tower's last states (n, l, c) of token ids (n, l)."""
        with self._computing():
            states = self._network("text_encoder", "prompt")(torch.tensor(token_ids, device=self.device))
            return states.last_hidden_state.float()

    def encode_image(self, pixels: NDArray[np.float32]) -> Tensor:
        """The vision tower's states before its last layer (n, m, c) of normalised pixels (n, s, s, 3)."""
        with self._computing():
            x = self._pictures(self.from_numpy(pixels))
            return self._network("image_encoder", "image")(x, output_hidden_states=True).hidden_states[-2].float()

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
        """See `mvshared.backend.Model.condition`; diffusers embeds every timestep when it is used."""
        check_branches(branches, texts=None if text is None else len(text))

        def batched(x: Tensor | None, seen: Sequence[bool]) -> Tensor | None:
            return None if x is None else torch.stack([x if each else torch.zeros_like(x) for each in seen])

        pictured = [branch.image for branch in branches]
        return Condition(
            text=None if text is None else torch.stack([text[-1 if branch.text else 0] for branch in branches]),
            image_states=batched(image_states, pictured),
            image_scale=image_scale,
            cameras=batched(None if cameras is None else self.from_numpy(cameras), [True] * len(branches)),
            reference=batched(reference, pictured),
            reference_scale=reference_scale,
            normals=batched(normals, [branch.normals for branch in branches]),
            branches=branches,
        )

    def denoise(self, x: Tensor, t: float, condition: Condition, weights: Sequence[float], rescale: float = 0.0) -> Tensor:
        """See `mvshared.backend.Model.denoise`."""
        return self.guided(x, t, condition, weights, rescale).out

    def guided(
        self, x: Tensor, t: float, condition: Condition, weights: Sequence[float], rescale: float = 0.0
    ) -> Guided[Tensor]:
        """See `mvshared.backend.Model.guided`."""
        check_weights(weights, branches=condition.branches)
        unet, config = self._networks["unet"], self.config.unet
        with self._computing():
            batch, views = len(condition.branches), len(x)
            sample = x[None].expand(batch, *x.shape)
            if config.normal_channels:
                zeros = sample.new_zeros((*sample.shape[:-1], config.normal_channels))
                sample = torch.cat([sample, zeros if condition.normals is None else condition.normals], dim=-1)
            if condition.reference is not None:
                clean = nn.functional.pad(condition.reference, (0, config.normal_channels))
                sample = torch.cat([sample, clean], dim=1)
            frames = sample.shape[1]
            cameras = condition.cameras
            if cameras is not None:
                cameras = self._cast(nn.functional.pad(cameras, (0, 0, 0, frames - views)).flatten(0, 1))
            tokens = self._image_tokens(condition)
            scales = {"image_scale": condition.image_scale, "reference_scale": condition.reference_scale}
            unet.extras.set(frames=frames, views=views, cameras=cameras, **scales)
            context: Any = None
            if condition.text is not None:
                context = self._cast(condition.text).repeat_interleave(frames, dim=0)
                if tokens is not None:
                    context = (context, [tokens.repeat_interleave(frames, dim=0)])
            timesteps = torch.full((batch * frames,), t, dtype=torch.float32, device=self.device)
            out = unet(self._pictures(sample.flatten(0, 1)), timesteps, context, return_dict=False)[0]
            out = out.float().permute(0, 2, 3, 1).unflatten(0, (batch, views))
            mixed = sum((weight * each for weight, each in zip(weights, out, strict=True)), torch.zeros_like(out[0]))
            return Guided(rescaled(mixed, out[-1], rescale) if rescale else mixed, out[-1])

    def _image_tokens(self, condition: Condition) -> Tensor | None:
        """Tokens (b, r m, c) of the pictures."""
        states = condition.image_states
        if states is None:
            return None
        tokens = self._networks["unet"].image_embed(self._cast(states).flatten(0, 1))
        return tokens.unflatten(0, states.shape[:2]).flatten(1, 2)


class _Extras:
    """What a call adds to diffusers' U-Net: frames that attend to each other, cameras, the scales of the image tokens and of
    the reference frames."""

    def __init__(self, unet: Any) -> None:
        self.frames = self.views = 1
        self.cameras: Tensor | None = None
        self.image_scale = self.reference_scale = 1.0
        self.unet = [unet]  # in a list, or the network would be a part of itself
        unet.time_embedding.register_forward_hook(self._add_cameras)
        unet.conv_norm_out.register_forward_pre_hook(self._drop_references)

    def set(self, *, frames: int, views: int, cameras: Tensor | None, image_scale: float, reference_scale: float) -> None:
        self.frames, self.views, self.cameras, self.reference_scale = frames, views, cameras, reference_scale
        if image_scale != self.image_scale:  # looking through the network for them takes a millisecond
            self.image_scale = image_scale
            for processor in self.unet[0].attn_processors.values():
                if hasattr(processor, "scale"):
                    processor.scale = [image_scale]

    def attend(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Self-attention over the tokens of all frames of an object: diffusers' own, on other groups."""
        n, tokens, channels = hidden_states.shape
        joint = hidden_states.reshape(n // self.frames, self.frames * tokens, channels)
        plain = library("diffusers.models.attention_processor").AttnProcessor2_0()
        if self.reference_scale != 1:
            scales = torch.ones(len(joint), 1, joint.shape[1], dtype=joint.dtype, device=joint.device)
            scales[:, :, self.views * tokens :] = self.reference_scale
            kwargs["attention_mask"] = scales.log()
        return plain(attn, joint, *args, **kwargs).reshape(n, tokens, channels)

    def _add_cameras(self, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out if self.cameras is None else out + self.unet[0].camera_embedding(self.cameras)

    def _drop_references(self, module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        return args[0].unflatten(0, (-1, self.frames))[:, : self.views].flatten(0, 1)


def library(name: str) -> Any:
    """A module of diffusers or transformers. Raises BackendError if the library is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as missing:
        raise BackendError(
            f"{name.partition('.')[0]} is not installed", backend="torch", hint="pip install 'mvmlx[validate]'"
        ) from missing


def _build_unet(folder: Path | None, config: Any) -> nn.Module:
    kind: Any = library("diffusers.models.unets.unet_2d_condition").UNet2DConditionModel
    document = _document(folder, "unet")
    with torch.device("meta"):
        if document.get("_class_name") == "UNet2DConditionModel":
            unet: Any = kind.from_config(document)
        else:
            unet = kind(**unet_arguments(config.unet))
    _add_parts(unet, config.unet)
    return unet


def unet_arguments(config: UNetConfig) -> dict[str, Any]:
    """What diffusers' UNet2DConditionModel is made with to have the blocks of a config."""
    attends = config.attention_levels
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": config.block_out_channels,
        "layers_per_block": list(config.layers_per_block),
        "transformer_layers_per_block": list(config.transformer_layers_per_block),
        "attention_head_dim": tuple(config.heads(level) for level in range(len(attends))),
        "cross_attention_dim": config.cross_attention_dim or 8,
        "use_linear_projection": config.use_linear_projection,
        "norm_num_groups": config.norm_num_groups,
        "norm_eps": config.norm_eps,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "mid_block_type": "UNetMidBlock2DCrossAttn" if config.mid_attention else "UNetMidBlock2D",
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
    }


def _add_parts(unet: Any, config: UNetConfig) -> None:
    """Cameras, image tokens and joint attention."""
    embeddings, processors = library("diffusers.models.embeddings"), library("diffusers.models.attention_processor")
    if config.cross_attention_dim is None:  # diffusers' blocks can do without, its U-Net cannot ask for it
        for block in unet.modules():
            if type(block).__name__ == "BasicTransformerBlock":
                block.norm2, block.attn2 = None, None
    if config.camera_dim is not None:
        unet.camera_embedding = embeddings.TimestepEmbedding(config.camera_dim, config.time_embed_dim)
    unet.extras = _Extras(unet)
    chosen: dict[str, Any] = {}
    for name in unet.attn_processors:
        if ".attn1." in name:
            chosen[name] = unet.extras.attend
        elif config.resampler is None:
            chosen[name] = processors.AttnProcessor2_0()
        else:
            channels = unet.get_submodule(name.removesuffix(".processor")).to_q.in_features
            tokens = (config.resampler.num_queries,)
            chosen[name] = processors.IPAdapterAttnProcessor2_0(channels, config.cross_attention_dim, num_tokens=tokens)
    unet.set_attn_processor(chosen)
    if config.resampler is not None:
        r = config.resampler
        unet.image_embed = embeddings.IPAdapterPlusImageProjection(
            r.embedding_dim, r.output_dim, r.hidden_dim, r.depth, r.dim_head, r.heads, r.num_queries, r.ff_mult
        )


def _build_vae(folder: Path | None, config: Any) -> nn.Module:
    kind: Any = library("diffusers.models.autoencoders.autoencoder_kl").AutoencoderKL
    document = _document(folder, "vae")
    vae, levels = config.vae, len(config.vae.block_out_channels)
    with torch.device("meta"):
        if document.get("_class_name") == "AutoencoderKL":
            return kind.from_config(document)
        return kind(
            in_channels=vae.in_channels,
            out_channels=vae.out_channels,
            latent_channels=vae.latent_channels,
            block_out_channels=vae.block_out_channels,
            layers_per_block=vae.layers_per_block,
            norm_num_groups=vae.norm_num_groups,
            mid_block_add_attention=vae.mid_block_add_attention,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
        )


def _build_text_encoder(folder: Path | None, config: Any) -> nn.Module:
    return _build_tower(folder, "text_encoder", "CLIPText", config.text_encoder)


def _build_image_encoder(folder: Path | None, config: Any) -> nn.Module:
    return _build_tower(folder, "image_encoder", "CLIPVision", config.image_encoder)


def _build_tower(folder: Path | None, component: str, prefix: str, config: Any) -> nn.Module:
    transformers = library("transformers")
    document = _document(folder, component)
    given = document if "model_type" in document or "architectures" in document else asdict(config)
    projected = "" if config.projection_dim is None else "WithProjection"
    return getattr(transformers, f"{prefix}Model{projected}")(getattr(transformers, f"{prefix}Config").from_dict(given))


def _document(folder: Path | None, component: str) -> dict[str, Any]:
    """A component's config.json; nothing without a folder."""
    return {} if folder is None else read_json_object(folder / component / "config.json")


BUILDERS: dict[Component, Callable[[Path | None, Any], nn.Module]] = {
    "unet": _build_unet,
    "vae": _build_vae,
    "text_encoder": _build_text_encoder,
    "image_encoder": _build_image_encoder,
}

# Parts of a layer of diffusers' Resampler, and ours.
_RESAMPLER_PARTS = {
    "ln0": "0.norm1",
    "ln1": "0.norm2",
    "attn.to_q": "0.to_q",
    "attn.to_out.0": "0.to_out",
    "ff.0": "1.0",
    "ff.1.net.0.proj": "1.1",
    "ff.1.net.2": "1.3",
}
_RESAMPLER_LAYER = re.compile(r"(image_embed\.layers\.\d+)\.(.+)")


def _own_name(path: str) -> str:
    """This project's name of a block of diffusers or transformers."""
    name = re.sub(r"\.processor\.(to_[kv]_ip)\.0", r".\1", re.sub(r"^(text|vision)_model\.", "", path))
    layer = _RESAMPLER_LAYER.fullmatch(name)
    return f"{layer[1]}.{_RESAMPLER_PARTS.get(layer[2], layer[2])}" if layer else name


def _set_weights(network: nn.Module, tensors: Mapping[str, Tensor], *, resampler: ResamplerConfig | None) -> None:
    """Give a network weights with this project's names, every one; its own are never needed."""
    theirs = set(network.state_dict())
    prefix = next((p for p in ("text_model.", "vision_model.") if any(name.startswith(p) for name in theirs)), "")
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for other, tensor_there in _their_names(name, tensor, resampler=resampler):
            renamed[other if other in theirs else f"{prefix}{other}"] = tensor_there
    buffers = {name for name in theirs - renamed.keys() if name.endswith("position_ids")}
    network.load_state_dict({**renamed, **{name: network.state_dict()[name] for name in buffers}}, strict=True, assign=True)


def _their_names(name: str, tensor: Tensor, *, resampler: ResamplerConfig | None) -> Iterator[tuple[str, Tensor]]:
    """A weight of ours with diffusers' name, or the two that it is there."""
    path, _, kind = name.rpartition(".")
    layer = _RESAMPLER_LAYER.fullmatch(path)
    if resampler is not None and path.endswith(("to_k_ip", "to_v_ip")):
        path = re.sub(r"\.(to_[kv]_ip)$", r".processor.\1.0", path)
    elif resampler is not None and layer and layer[2] == "0.to_kv":
        for half, values in zip(("to_k", "to_v"), tensor.chunk(2), strict=True):
            yield f"{layer[1]}.attn.{half}.{kind}", values
        return
    elif resampler is not None and layer:
        path = f"{layer[1]}.{next(theirs for theirs, own in _RESAMPLER_PARTS.items() if own == layer[2])}"
    yield f"{path}.{kind}" if path else kind, tensor
