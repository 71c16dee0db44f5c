"""Training in MLX: the losses of the stages, and the optimiser step. All else is in mvshared.training."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import AdamW, clip_grad_norm
from mlx.utils import tree_flatten, tree_unflatten
from numpy.typing import NDArray

from mvmlx import metal
from mvmlx.device import keeping_random_state, on_device
from mvmlx.layout import from_checkpoint, to_checkpoint
from mvmlx.model import NETWORKS, choose_device, choose_dtype, set_weights, weight_shapes
from mvmlx.unet import MultiViewUNet
from mvmlx.upscaler import LatentUpscaler
from mvmlx.vae import AutoencoderKL
from mvshared.attention import FUSED, AttentionOptions
from mvshared.backend import Dtype, parse_dtype
from mvshared.config import KUNetConfig, UNetConfig, VAEConfig
from mvshared.precision import tensor_dtype
from mvshared.training.config import PLAIN_UNET_LOSS, OptimizerConfig, UNetLossConfig, VAELossConfig
from mvshared.training.data import UNetBatch, VAEBatch
from mvshared.training.loss_scale import LossScale
from mvshared.training.optimizer import (
    StepResult,
    TrainerState,
    counted,
    ema_decay,
    pack_state,
    step_result,
    unpack_state,
    updates,
)
from mvshared.training.upscaler_data import UpscalerBatch


class Trainer:
    """A network, its loss, AdamW and an exponential moving average (EMA) of the weights.

    `loss(network, batch)` gets the batch as arrays. Weights and optimiser are float32; in the half dtypes the loss is computed
    with copies of the weights, in float16 with a loss scale. A step whose loss or gradient is not finite changes no weights,
    averages and moments. Weights whose names begin with one of `frozen` stay as they are. Raises OptionError for another dtype,
    BackendError for a device that is not there, and for bfloat16 on Metal.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Any, Any], mx.array],
        config: OptimizerConfig,
        *,
        frozen: Sequence[str] = (),
        dtype: str = "float32",
        device: str = "auto",
    ) -> None:
        self.device = choose_device(device)
        self.dtype: Dtype = choose_dtype(parse_dtype(dtype, default="float32"), device=self.device)
        self.network = network.train()
        self.loss, self.config, self.frozen = loss, config, tuple(frozen)
        # Parameters, moments and averages are kept flat, by name: a tree to MLX like any other, and the border's form.
        self.parameters: dict[str, mx.array] = dict(_flat(network.trainable_parameters()))
        self.optimizer = AdamW(0.0, list(config.betas), config.eps, config.weight_decay, bias_correction=True)
        self.optimizer.init(self.parameters)
        self.ema = {name: mx.array(parameter) for name, parameter in self.parameters.items()}
        self.steps = 0
        self.loss_scale = LossScale() if self.dtype == "float16" else None

    def step(self, batch: Any, *, learning_rate: float) -> StepResult:
        """Learn from one batch (a NamedTuple of float32 arrays)."""
        result, learned, gradients = self._measure(batch)
        self.steps, self.loss_scale = counted(result, self.steps, self.loss_scale)
        if result.learned:
            with on_device(self.device):
                self._update(learned, gradients, learning_rate=learning_rate)
        return result

    def measure(self, batch: Any) -> StepResult:
        """What a step would come to with this batch; nothing is learned."""
        return self._measure(batch)[0]

    def _measure(self, batch: Any) -> tuple[StepResult, dict[str, mx.array], dict[str, mx.array]]:
        """Also the weights that learn, and their gradient, clipped."""
        with on_device(self.device):
            arrays, scale = _to_arrays(batch), 1.0 if self.loss_scale is None else self.loss_scale.scale

            def scaled_loss(weights: dict[str, mx.array]) -> tuple[mx.array, mx.array]:
                self._assign(self._computed(self.parameters | weights))
                loss = self.loss(self.network, arrays)
                return loss * scale, loss

            try:
                learned = {name: array for name, array in self.parameters.items() if not name.startswith(self.frozen)}
                (_, loss), gradients = mx.value_and_grad(scaled_loss)(learned)
            finally:  # the network has arrays of the trace
                self._assign(self.parameters)
            if self.loss_scale is not None:
                gradients = {name: gradient / scale for name, gradient in gradients.items()}
            gradients, norm = clip_grad_norm(gradients, self.config.gradient_clip)
            mx.eval(loss, norm, gradients)
            return step_result(_float(loss), _float(norm), self.loss_scale), learned, gradients

    def evaluate(self, batch: Any) -> float:
        """The loss of a batch under the EMA weights; nothing is learned."""
        try:
            with on_device(self.device):
                self._assign(self._computed(self.ema))
                return _float(self.loss(self.network, _to_arrays(batch)))
        finally:
            self._assign(self.parameters)

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """The weights, float32, in checkpoint layout."""
        return _to_numpy(self.parameters)

    def ema_weights(self) -> dict[str, NDArray[np.float32]]:
        """The averaged weights, float32, in checkpoint layout."""
        return _to_numpy(self.ema)

    def state(self) -> dict[str, NDArray[np.float32]]:
        """All that a resumed run needs, in checkpoint layout: the same names in both backends, see `optimizer.pack_state`."""
        exp_avg, exp_avg_sq = (
            _to_numpy({name: self.optimizer.state[name][key] for name in self.parameters}) for key in ("m", "v")
        )
        return pack_state(TrainerState(self.weights(), self.ema_weights(), exp_avg, exp_avg_sq, self.steps, self.loss_scale))

    def load_state(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Continue from what `state` gave, in either backend. Raises TensorMismatchError for another network's."""
        unpacked = unpack_state(state, weight_shapes(self.network), scaled=self.loss_scale is not None)
        with on_device(self.device):
            self.parameters, self.ema = _from_numpy(unpacked.model), _from_numpy(unpacked.ema)
            exp_avg, exp_avg_sq = _from_numpy(unpacked.exp_avg), _from_numpy(unpacked.exp_avg_sq)
        self.steps, self.loss_scale = unpacked.steps, unpacked.loss_scale
        step = mx.array(updates(self.steps, self.loss_scale), mx.uint64)
        moments: dict[str, Any] = {name: {"m": exp_avg[name], "v": exp_avg_sq[name]} for name in self.parameters}
        self.optimizer.state = moments | {"step": step, "learning_rate": mx.array(0.0)}
        self._assign(self.parameters)

    def _update(self, weights: dict[str, mx.array], gradients: dict[str, mx.array], *, learning_rate: float) -> None:
        """AdamW's step of some weights, and the average's of all."""
        self.optimizer.learning_rate = learning_rate
        self.parameters |= self.optimizer.apply_gradients(gradients, weights)
        share = 1 - ema_decay(self.config, updates(self.steps, self.loss_scale))
        self.ema = {name: mean + share * (self.parameters[name] - mean) for name, mean in self.ema.items()}
        self._assign(self.parameters)
        mx.eval(self.parameters, self.ema, self.optimizer.state)

    def _computed(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The weights in the dtype of the computation."""
        return _cast(weights, self.dtype)

    def _assign(self, weights: dict[str, mx.array]) -> None:
        self.network.update(tree_unflatten(list(weights.items())))


def _network(
    config: VAEConfig | UNetConfig | KUNetConfig,
    weights: Mapping[str, NDArray[np.float32]],
    *,
    dtype: str,
    gradient_checkpointing: bool = False,
) -> Any:
    # With gradients MLX has no kernel for attention, and would keep scores in half precision.
    options = FUSED if dtype == "float32" else AttentionOptions(implementation="plain")
    with keeping_random_state():
        network = NETWORKS[type(config)](config, attention_options=options, gradient_checkpointing=gradient_checkpointing)
    set_weights(network, weights)
    return network


def _teacher(config: UNetConfig, weights: Mapping[str, NDArray[np.float32]], *, dtype: str, device: str) -> Any:
    """The network that training starts from, in the dtype of the computation."""
    device = choose_device(device)
    computed = choose_dtype(parse_dtype(dtype, default="float32"), device=device)
    with on_device(device):
        network = _network(config, weights, dtype=dtype)
        network.update(tree_unflatten(list(_cast(dict(_flat(network.parameters())), computed).items())))
        mx.eval(network.parameters())
    return network


def memory_limits(device: str) -> AbstractContextManager[None]:
    """A context for all of a training, which keeps to what the device's memory allows. Raises BackendError."""
    return metal.memory_limits(choose_device(device))


def vae_trainer(
    config: VAEConfig,
    optimizer: OptimizerConfig,
    loss: VAELossConfig,
    weights: Mapping[str, NDArray[np.float32]],
    *,
    frozen: Sequence[str] = (),
    dtype: str = "float32",
    device: str = "auto",
    gradient_checkpointing: bool = False,
) -> Trainer:
    """A trainer of the VAE that starts from `weights` (checkpoint layout).

    Raises TensorMismatchError for weights that do not fit, OptionError and BackendError as `Trainer` does.
    """
    network = _network(config, weights, dtype=dtype, gradient_checkpointing=gradient_checkpointing)
    return Trainer(network, partial(vae_loss, config=loss), optimizer, frozen=frozen, dtype=dtype, device=device)


def unet_trainer(
    config: UNetConfig,
    optimizer: OptimizerConfig,
    weights: Mapping[str, NDArray[np.float32]],
    *,
    loss: UNetLossConfig = PLAIN_UNET_LOSS,
    frozen: Sequence[str] = (),
    dtype: str = "float32",
    device: str = "auto",
    gradient_checkpointing: bool = False,
) -> Trainer:
    """A trainer of the U-Net that starts from `weights` (checkpoint layout).

    Raises TensorMismatchError for weights that do not fit, OptionError and BackendError as `Trainer` does.
    """
    teacher = _teacher(config, weights, dtype=dtype, device=device) if loss.distill_rest else None
    network = _network(config, weights, dtype=dtype, gradient_checkpointing=gradient_checkpointing)
    return Trainer(
        network, partial(unet_loss, config=loss, teacher=teacher), optimizer, frozen=frozen, dtype=dtype, device=device
    )


def upscaler_trainer(
    config: KUNetConfig,
    optimizer: OptimizerConfig,
    weights: Mapping[str, NDArray[np.float32]],
    *,
    frozen: Sequence[str] = (),
    dtype: str = "float32",
    device: str = "auto",
    gradient_checkpointing: bool = False,
) -> Trainer:
    """A trainer of a latent upscaler without text that starts from `weights` (checkpoint layout).

    Raises TensorMismatchError for weights that do not fit, OptionError and BackendError as `Trainer` does.
    """
    network = _network(config, weights, dtype=dtype, gradient_checkpointing=gradient_checkpointing)
    return Trainer(network, upscaler_loss, optimizer, frozen=frozen, dtype=dtype, device=device)


def vae_loss(vae: AutoencoderKL, batch: VAEBatch[mx.array], config: VAELossConfig) -> mx.array:
    """The terms of VAELossConfig, as means."""
    mean, logvar = (moment.astype(mx.float32) for moment in vae.encode(batch.pixels))
    error = vae.decode(mean + mx.exp(logvar / 2) * batch.noise) - batch.pixels
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return picture_loss(error, batch.foreground, batch.detail, config, downscale=vae.config.downscale) + config.kl_weight * kl


def picture_loss(
    error: mx.array, foreground: mx.array, detail: mx.array | None, config: VAELossConfig, *, downscale: int
) -> mx.array:
    """The terms of VAELossConfig but for the KL: those of the error (n, h, w, 3) of pictures in [-1, 1].

    Foreground and detail are those of a VAEBatch, and `downscale` is how many pixels one latent stands for along an edge.
    """
    rows, columns = (mx.pad(mx.zeros(side - 2), 1, constant_values=config.border_weight) for side in error.shape[1:3])
    weight = 1 + config.foreground_weight * foreground[..., None] + (rows[:, None] + columns)[..., None]
    if detail is not None:
        weight = weight + config.detail_weight * detail[..., None]
    weight = weight / weight.mean()
    loss = (weight * error.abs()).mean() + config.mse_weight * (weight * error.square()).mean()
    down, right = error[:, 1:] - error[:, :-1], error[:, :, 1:] - error[:, :, :-1]
    edges = (weight[:, 1:] * down.abs()).mean() + (weight[:, :, 1:] * right.abs()).mean()
    (n, height, width, _), f = error.shape, downscale
    coarse = error.reshape(n, height // f, f, width // f, f, 3).mean(axis=(2, 4))
    luma = coarse.mean(axis=-1, keepdims=True)
    color = luma.abs().mean() + config.chroma_weight * (coarse - luma).abs().mean()
    return loss + config.gradient_weight * edges + config.coarse_weight * color


def unet_loss(
    unet: MultiViewUNet, batch: UNetBatch[mx.array], config: UNetLossConfig, *, teacher: MultiViewUNet | None = None
) -> mx.array:
    """UNetLossConfig's squared error of the network's output; `teacher` is the one whose output is the target of the rest."""
    target, detail = batch.target, batch.detail
    out = _output(unet, batch)
    if detail is None:
        return (out - target).square().mean()
    if teacher is not None:
        target = mx.where(detail[..., None] > 0, target, _output(teacher, batch))
    weight = 1 + config.detail_weight * detail[..., None]
    return (weight / weight.mean() * (out - target).square()).mean()


def _output(unet: MultiViewUNet, batch: UNetBatch[mx.array]) -> mx.array:
    """What the network makes of a batch, float32."""
    states = None if batch.image_states is None else batch.image_states[:, None]
    constants = unet.constants(
        batch.text,
        image_states=states,
        camera=batch.camera if unet.config.camera_dim else None,
        reference=batch.reference[:, None] if unet.config.reference_frame else None,
    )
    return unet(batch.sample, unet.time_embeddings(batch.timesteps), constants).astype(mx.float32)


def upscaler_loss(network: LatentUpscaler, batch: UpscalerBatch[mx.array]) -> mx.array:
    """Negative log-likelihood of the target, whose variance the network gives for each picture (k-diffusion's has_variance)."""
    sample, noise, condition, target = batch
    out = network(sample, noise, text=[], condition=condition).astype(mx.float32)
    logvar = out[..., -1:].mean(axis=(1, 2, 3, 4), keepdims=True)
    return 0.5 * ((out[..., :-1] - target).square() * mx.exp(-logvar) + logvar).mean()


def _cast(weights: Mapping[str, mx.array], dtype: Dtype) -> dict[str, mx.array]:
    return {name: array.astype(getattr(mx, tensor_dtype(name, dtype))) for name, array in weights.items()}


def _to_arrays(batch: Any) -> Any:
    return type(batch)(*(None if array is None else mx.array(np.ascontiguousarray(array)) for array in batch))


def _float(x: mx.array) -> float:
    value: Any = x.item()
    return value


def _from_numpy(weights: Mapping[str, NDArray[np.float32]]) -> dict[str, mx.array]:
    return {name: from_checkpoint(mx.array(array)) for name, array in weights.items()}


def _to_numpy(weights: dict[str, mx.array]) -> dict[str, NDArray[np.float32]]:
    """Float32 copies in checkpoint layout."""
    return {name: to_checkpoint(array) for name, array in weights.items()}


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    flat: Any = tree_flatten(tree)
    return flat
