"""Loading a latent upscaler into PyTorch, and what the shared upscaling drives."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvshared.backend import Dtype, TextStates
from mvshared.checkpoint import find_model, read_vae_config, weight_files
from mvshared.errors import OptionError
from mvshared.loading import prepare, upscaler_parts
from mvshared.networks import Networks
from mvshared.shapes import check_pictures, check_same, checked_token_ids
from mvshared.upscaling.config import UpscalerConfig
from mvtorch.attention import KeyValues
from mvtorch.inference import inference
from mvtorch.latents import LatentModel
from mvtorch.model import choose_device, choose_dtype, network_loaders, network_shapes
from mvtorch.upscaler import LatentUpscaler


@dataclass(frozen=True, kw_only=True, eq=False)
class UpscaleCondition:
    """What stays constant over the steps, for b branches, [unconditional, conditional] if guided, else [conditional].

    Keys and values of the text, low-resolution latents (v, 2 h, 2 w, c) at the size of the result, and the embedded noise level
    with the pooled text (b, time_cond_proj_dim).
    """

    text: list[KeyValues]
    low: Tensor
    embedding: Tensor


class UpscalerModel(LatentModel):
    """The network, the VAE and the text encoder of an upscaler on one device: implements `mvshared.backend.UpscalerModel`.

    The VAE is read when it is needed: latents that are upscaled for another model are decoded by that model's.
    """

    config: UpscalerConfig

    def __init__(
        self,
        config: UpscalerConfig,
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
    def unet(self) -> LatentUpscaler:
        """The network that upscales, read if it is not in memory."""
        return self.networks["unet"]

    def encode_text(self, token_ids: NDArray[np.int64]) -> TextStates[Tensor]:
        """The states before the last norm (b, l, c) and the pooled state (b, c), float32, of token ids (b, l).

        Raises OptionError without a text encoder.
        """
        if "text_encoder" not in self.networks:
            raise OptionError("prompt", expected="left out: this upscaler takes no text", got=token_ids.shape)
        assert self.config.text_encoder is not None
        ids = checked_token_ids(token_ids, vocab_size=self.config.text_encoder.vocab_size)
        with inference(self.device):
            out = self.networks["text_encoder"](torch.tensor(ids, device=self.device))
            return TextStates(out.hidden_states[-1].float(), out.pooler_output.float())

    def condition(
        self, low: NDArray[np.float32], noise_embedding: NDArray[np.float32], *, text: TextStates[Tensor] | None
    ) -> UpscaleCondition:
        """What `denoise` needs of low-resolution latents (v, h, w, c), the embedding (k,) of their noise level and a text of b
        branches. Raises OptionError for shapes that do not fit."""
        check_pictures("latents", low.shape, channels=self.config.unet.latent_channels)
        with inference(self.device):
            embedding = self.from_numpy(noise_embedding)[None]
            if text is not None:
                embedding = torch.cat([embedding.expand(len(text.pooled), -1), text.pooled], dim=-1)
            return UpscaleCondition(
                text=list(self.unet.keys_values(None if text is None else text.states)),
                low=self.from_numpy(low.repeat(2, axis=1).repeat(2, axis=2)),
                embedding=embedding,
            )

    def denoise(self, x: Tensor, t: float, condition: UpscaleCondition, guidance: float) -> Tensor:
        """Minus the velocity (v, 2 h, 2 w, c), float32, in latents x of that shape, for t a quarter of ln sigma.

        With two branches it is `unconditional + guidance * (conditional - unconditional)`. Raises OptionError for shapes that
        do not fit.
        """
        check_same("latents", tuple(x.shape), tuple(condition.low.shape))
        with inference(self.device):
            branches = len(condition.embedding)
            unet = self.unet

            def call(x: Tensor, noise: Tensor) -> Tensor:
                sample = torch.cat([x, condition.low], dim=-1)[None].expand(branches, *x.shape[:3], -1)
                return unet(sample, noise, text=condition.text, condition=condition.embedding)[..., :-1].float()

            noise = torch.full((branches,), t, dtype=torch.float32, device=self.device)
            out = self._called(unet, condition, call, x, noise)
            return out[0] if branches == 1 else out[0] + guidance * (out[1] - out[0])


def load_upscaler_model(
    name: str | Path,
    *,
    dtype: str | None = None,
    device: str = "auto",
    quantize: str | None = None,
    at_once: bool = True,
) -> UpscalerModel:
    """Load an upscaler by name, or from a checkpoint folder; its networks but the VAE `at_once`, or each when it is needed.

    `quantize`, q8 or q4, quantises it as it is read.

    Raises CheckpointError, also for a folder of another kind, OptionError and BackendError.
    """
    device = choose_device(device)
    chosen, parts = choose_dtype(dtype, device=device), upscaler_parts(name, quantize=quantize)
    networks = network_loaders(parts.config, parts.files, dtype=chosen, device=device, quantize=quantize)
    prepare(networks, parts, shapes=network_shapes, at_once=at_once)
    return UpscalerModel(
        parts.config, networks, device=device, dtype=chosen, weight_files=parts.weight_files, quantization=parts.quantization
    )


def load_latent_model(name: str | Path, *, dtype: str | None = None, device: str = "auto") -> LatentModel:
    """The VAE alone of a model by name or folder, to encode pictures and to decode latents.

    Raises CheckpointError, OptionError and BackendError.
    """
    chosen = choose_device(device)
    chosen_dtype = choose_dtype(dtype, device=chosen)
    folder = find_model(name)
    files = weight_files(folder, "vae")
    config = SimpleNamespace(vae=read_vae_config(folder))
    networks = network_loaders(config, {"vae": files}, dtype=chosen_dtype, device=chosen)
    return LatentModel(networks, device=chosen, dtype=chosen_dtype, weight_files=files)
