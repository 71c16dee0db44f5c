"""What is in a checkpoint file: its tensors, sorted by network and by the layout of their names."""

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mvshared.backend import PACKAGES, available_backends, install_hint
from mvshared.conversion.raw import RawTensor, read_safetensors
from mvshared.errors import BackendError, CheckpointError, TensorMismatchError

Layout = Literal["ldm_unet", "ldm_vae", "hf_text", "hf_vision", "open_clip", "k_upscaler"]

# Beginnings of names in whole checkpoints; the rest is the name in the network.
PREFIXES: tuple[tuple[str, Layout], ...] = (
    ("model.diffusion_model.", "ldm_unet"),
    ("first_stage_model.", "ldm_vae"),
    ("vae_model.", "ldm_vae"),  # ImageDream
    ("cond_stage_model.transformer.", "hf_text"),  # Stable Diffusion 1
    ("cond_stage_model.model.", "open_clip"),  # Stable Diffusion 2, MVDream
    ("clip_model.model.", "open_clip"),  # ImageDream
    ("conditioner.embedders.0.model.", "open_clip"),  # Stable Diffusion 2 of Stability's generative-models, such as SD Turbo
)
# A name that only one layout has, for files of one network without prefixes.
MARKS: tuple[tuple[str, Layout], ...] = (
    ("input_blocks.0.0.weight", "ldm_unet"),
    ("encoder.down.0.block.0.conv1.weight", "ldm_vae"),
    ("text_model.embeddings.token_embedding.weight", "hf_text"),
    ("vision_model.embeddings.class_embedding", "hf_vision"),
    ("transformer.resblocks.0.ln_1.weight", "open_clip"),
    ("visual.conv1.weight", "open_clip"),
    ("inner_model.proj_in.weight", "k_upscaler"),
)
SCHEDULE = "the noise schedule: scheduler_config.json says it"
# What holds nothing that a model computes with, by the end or the whole of its name.
LEFT_OUT: tuple[tuple[str, str], ...] = (
    (r"model_ema\..+", "moving averages beside the weights"),
    (r"(?:betas|(?:sqrt_|sqrt_one_minus_|log_one_minus_|sqrt_recip_|sqrt_recipm1_)?alphas_cumprod(?:_prev)?)", SCHEDULE),
    (r"posterior_(?:variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar|denoiser\.sigmas", SCHEDULE),
    (r"(?:(?:first_stage_model|vae_model)\.)?(?:loss|model_ema)\..+", "of the VAE's training"),
    (r".*\bposition_ids", "position numbers"),
    (r".*\bnum_batches_tracked", "of the training"),
    (r".*\battn_mask", "the causal mask"),
    (r".*\blogit_scale", "of CLIP's training"),
    (r"cond_stage_model\.text_projection", "behind the text states that the U-Net takes"),  # ComfyUI wrote it
    (r"inner_model\.u_net\.[du]_blocks\..+\.kernel", "the fixed kernel of the resampling"),
)
# What files of other kinds hold, by the beginning of a name that nothing above knows, and what can be done.
FOREIGN: tuple[tuple[str, str], ...] = (
    (r"lora_|.*\.lora[_.]", "a LoRA? it has to be merged into its model before"),
    (r"control_model\.", "a ControlNet? no model here takes one"),
    (r"conditioner\.embedders\.1\.", "Stable Diffusion XL? no model here is one"),
    (r"emb_params", "an embedding of textual inversion? it has to be in the tokenizer and the text encoder of a folder"),
    (r"(?:cc_projection|depth_model|noise_augmentor|low_scale_model)\.", "a model of conditions that no model here takes?"),
    (
        r"(?:(?:encoder|decoder)\.)?(?:down_blocks|mid_block|up_blocks)\.|embeddings\.",
        "a network of diffusers or transformers? its folder can be taken, with its config.json",
    ),
)


@dataclass(kw_only=True)
class Source:
    """A file's tensors by layout, each with its name there and the whole one; why others are left out; the noise schedule, by
    either name."""

    networks: dict[Layout, dict[str, RawTensor]] = field(default_factory=dict)
    prefixes: dict[Layout, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    alphas_cumprod: RawTensor | None = None
    betas: RawTensor | None = None


def read_file(path: Path) -> dict[str, RawTensor]:
    """The tensors of a safetensors file or a pickled one, unread. Raises CheckpointError, and BackendError without PyTorch."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as cause:
        raise CheckpointError(f"cannot be read: {cause.strerror or cause}", path=path) from cause
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return read_safetensors(path)
    if "torch" not in available_backends():
        raise BackendError(
            f"{path} is pickled, and only PyTorch reads that",
            backend="torch",
            hint=f"{install_hint('torch')}; or use .safetensors",
        )
    return importlib.import_module(f"{PACKAGES['torch']}.pickled").read_pickled(path)


def sort_tensors(tensors: Mapping[str, RawTensor], *, path: Path) -> Source:
    """The networks in a file. Raises TensorMismatchError for tensors of which nobody knows what they are."""
    source = Source(alphas_cumprod=tensors.get("alphas_cumprod"), betas=tensors.get("betas"))
    marks: list[Layout] = [layout for mark, layout in MARKS if mark in tensors]
    whole: list[tuple[str, Layout]] = [
        (prefix, layout) for prefix, layout in PREFIXES if any(name.startswith(prefix) for name in tensors)
    ]
    layouts: dict[str, Layout] = dict(whole or [("", layout) for layout in marks[:1]])
    unknown: list[str] = []
    for name, tensor in tensors.items():
        reason = next((why for pattern, why in LEFT_OUT if re.fullmatch(pattern, name)), None)
        prefix = next((start for start, _ in whole if name.startswith(start)), "")
        layout = layouts.get(prefix)
        if reason is not None:
            source.left_out[name] = reason
        elif layout is None:
            unknown.append(name)
        else:
            if source.prefixes.setdefault(layout, prefix) != prefix:
                raise CheckpointError(f"holds a network twice: {source.prefixes[layout]}* and {prefix}*", path=path)
            source.networks.setdefault(layout, {})[name[len(prefix) :]] = tensor
    if unknown:
        hints = (hint for pattern, hint in FOREIGN if any(re.match(pattern, name) for name in unknown))
        raise TensorMismatchError(path=path, unexpected=sorted(unknown), hint=next(hints, ""))
    return source
