"""Loading a latent upscaler into MLX, and what the shared upscaling drives."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mvmlx.attention import KeyValues
from mvmlx.device import evaluated, on_device
from mvmlx.latents import LatentModel
from mvmlx.model import choose_device, choose_dtype, load_network, network_loaders, network_shapes
from mvmlx.upscaler import LatentUpscaler
from mvshared.backend import Dtype, TextStates
from mvshared.checkpoint import find_model, read_vae_config, weight_files
from mvshared.errors import OptionError
from mvshared.loading import prepare, upscaler_parts
from mvshared.networks import Networks
from mvshared.shapes import check_pictures, check_same, checked_token_ids
from mvshared.upscaling.config import UpscalerConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class UpscaleCondition:
    """What stays constant over the steps, for b branches, [unconditional, conditional] if guided, else [conditional].

    Keys and values of the text, low-resolution latents (v, 2 h, 2 w, c) at the size of the result, and the embedded noise level
    with the pooled text (b, time_cond_proj_dim).
    """

    text: list[KeyValues]
    low: mx.array
    embedding: mx.array


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

    def encode_text(self, token_ids: NDArray[np.int64]) -> TextStates[mx.array]:
        """The states before the last norm (b, l, c) and the pooled state (b, c), float32, of token ids (b, l).

        Raises OptionError without a text encoder.
        """
        if "text_encoder" not in self.networks:
            raise OptionError("prompt", expected="left out: this upscaler takes no text", got=token_ids.shape)
        assert self.config.text_encoder is not None
        ids = checked_token_ids(token_ids, vocab_size=self.config.text_encoder.vocab_size)
        with on_device(self.device):
            out = self.networks["text_encoder"](mx.array(ids))
            states, pooled = (x.astype(mx.float32) for x in (out.hidden_states[-1], out.pooler_output))
            return TextStates(evaluated(states), evaluated(pooled))

    def condition(
        self, low: NDArray[np.float32], noise_embedding: NDArray[np.float32], *, text: TextStates[mx.array] | None
    ) -> UpscaleCondition:
        """What `denoise` needs of low-resolution latents (v, h, w, c), the embedding (k,) of their noise level and a text of b
        branches. Raises OptionError for shapes that do not fit."""
        check_pictures("latents", low.shape, channels=self.config.unet.latent_channels)
        with on_device(self.device):
            embedding = self.from_numpy(noise_embedding)[None]
            if text is not None:
                levels = mx.broadcast_to(embedding, (len(text.pooled), embedding.shape[1]))
                embedding = mx.concatenate([levels, text.pooled], axis=-1)
            keys_values = list(self.unet.keys_values(None if text is None else text.states))
            mx.eval(keys_values)
            return UpscaleCondition(
                text=keys_values,
                low=self.from_numpy(low.repeat(2, axis=1).repeat(2, axis=2)),
                embedding=evaluated(embedding),
            )

    def denoise(self, x: mx.array, t: float, condition: UpscaleCondition, guidance: float) -> mx.array:
        """Minus the velocity (v, 2 h, 2 w, c), float32, in latents x of that shape, for t a quarter of ln sigma.

        With two branches it is `unconditional + guidance * (conditional - unconditional)`. Raises OptionError for shapes that
        do not fit.
        """
        check_same("latents", x.shape, condition.low.shape)
        with on_device(self.device):
            branches = len(condition.embedding)
            sample = mx.concatenate([x, condition.low], axis=-1)[None]
            sample = mx.broadcast_to(sample, (branches, *sample.shape[1:]))
            noise = mx.full((branches,), t, dtype=mx.float32)
            unet = self._compiled(self.unet)
            out = unet(sample, noise, text=condition.text, condition=condition.embedding)[..., :-1].astype(mx.float32)
            return evaluated(out[0] if branches == 1 else out[0] + guidance * (out[1] - out[0]))


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
    vae = partial(load_network, read_vae_config(folder), files, dtype=chosen_dtype, device=chosen)
    return LatentModel(Networks({"vae": vae}), device=chosen, dtype=chosen_dtype, weight_files=files)
