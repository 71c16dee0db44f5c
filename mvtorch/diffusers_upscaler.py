"""diffusers' networks in the place of this project's latent upscaler: what `mvmlx validate` compares an upscaler with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mvshared.backend import TextStates
from mvshared.checkpoint import Component, find_model
from mvshared.config import KUNetConfig
from mvshared.errors import OptionError
from mvshared.files import read_json_object
from mvshared.upscaling.folder import component_folders, read_upscaler_config
from mvtorch.diffusers_model import BUILDERS, DiffusersNetworks, library


class UpscaleCondition(NamedTuple):
    """See `mvtorch.upscaling.UpscaleCondition`; the text is the states themselves, or zeros that nobody reads."""

    text: Tensor
    low: Tensor
    embedding: Tensor


class DiffusersUpscaler(DiffusersNetworks):
    """What computes of `mvshared.backend.UpscalerModel`, with diffusers' networks and transformers' CLIP on a folder's weights.

    `mvmlx validate` calls it. It has no memory plan and releases no networks, so no `Upscaler` can run it.
    """

    def __init__(self, name: str | Path, *, dtype: str | None = None, device: str = "auto") -> None:
        """Raises CheckpointError, OptionError and BackendError, also if diffusers or transformers is not installed."""
        folder = find_model(name)
        config = read_upscaler_config(folder)
        builders: dict[Component, Callable[[Path | None, Any], nn.Module]] = {**BUILDERS, "unet": _build_unet}
        super().__init__(config, component_folders(folder, config), builders, dtype=dtype, device=device)

    def encode_text(self, token_ids: NDArray[np.int64]) -> TextStates[Tensor]:
        """States before the last norm (b, l, c) and pooled states (b, c) of token ids (b, l)."""
        with self._computing():
            encoder = self._network("text_encoder", "prompt")
            out = encoder(torch.tensor(token_ids, device=self.device), output_hidden_states=True)
            return TextStates(out.hidden_states[-1].float(), out.pooler_output.float())

    def condition(
        self, low: NDArray[np.float32], noise_embedding: NDArray[np.float32], *, text: TextStates[Tensor] | None
    ) -> UpscaleCondition:
        """See `mvshared.backend.UpscalerModel.condition`."""
        embedding = self.from_numpy(noise_embedding)[None]
        states = embedding.new_zeros((1, 1, 8))
        if text is not None:
            embedding, states = torch.cat([embedding.expand(len(text.pooled), -1), text.pooled], dim=-1), text.states
        return UpscaleCondition(states, self.from_numpy(low.repeat(2, axis=1).repeat(2, axis=2)), embedding)

    def denoise(self, x: Tensor, t: float, condition: UpscaleCondition, guidance: float) -> Tensor:
        """See `mvshared.backend.UpscalerModel.denoise`."""
        with self._computing():
            branches, views = len(condition.embedding), len(x)
            sample = torch.cat([x, condition.low], dim=-1).repeat(branches, 1, 1, 1)
            out = self._networks["unet"](
                self._pictures(sample),
                torch.tensor(t, dtype=torch.float32, device=self.device),
                self._cast(condition.text).repeat_interleave(views, dim=0),
                timestep_cond=self._cast(condition.embedding).repeat_interleave(views, dim=0),
                return_dict=False,
            )[0]
            out = out[:, :-1].float().permute(0, 2, 3, 1).unflatten(0, (branches, views))
            return out[0] if branches == 1 else out[0] + guidance * (out[1] - out[0])


def _build_unet(folder: Path | None, config: Any) -> nn.Module:
    kind: Any = library("diffusers.models.unets.unet_2d_condition").UNet2DConditionModel
    document = {} if folder is None else read_json_object(folder / "unet" / "config.json")
    if document.get("_class_name") == "UNet2DConditionModel":
        document.pop("noise_frequencies", None)
        return kind.from_config(document)
    return kind(**k_unet_arguments(config.unet))


def k_unet_arguments(config: KUNetConfig) -> dict[str, Any]:
    """What diffusers' UNet2DConditionModel is made with to have the blocks of a config.

    Raises OptionError for a network that diffusers cannot have: where a level without attention has another width than the
    finer one, its KUpBlock2D narrows in another place than k-diffusion.
    """
    channels, attends = config.block_out_channels, config.attention_levels
    if any(not attends[level] and channels[level] != channels[level - 1] for level in range(1, len(channels))):
        expected = "the same where a level without attention begins, for a comparison with diffusers"
        raise OptionError("block_out_channels", expected=expected, got=channels)
    down = ["KCrossAttnDownBlock2D" if each else "KDownBlock2D" for each in attends]
    return {
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "mid_block_type": None,
        "block_out_channels": channels,
        "layers_per_block": config.layers_per_block,
        "act_fn": "gelu",
        "norm_num_groups": None,
        "attention_head_dim": config.attention_head_dim,
        "cross_attention_dim": config.cross_attention_dim or 8,
        "resnet_time_scale_shift": "scale_shift",
        "time_embedding_type": "fourier",
        "timestep_post_act": "gelu",
        "time_cond_proj_dim": config.time_cond_proj_dim,
        "conv_in_kernel": 1,
        "conv_out_kernel": 1,
    }
