"""Training in PyTorch: the losses of the stages, and the optimiser step. All else is in mvshared.training."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mvshared.backend import Dtype, parse_dtype
from mvshared.config import KUNetConfig, UNetConfig, VAEConfig
from mvshared.errors import first_line
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
from mvtorch.graphs import CudaRecorder, Recorder, Recording
from mvtorch.layers import AdaGroupNorm
from mvtorch.model import NETWORKS, choose_device, get_weights, set_weights, weight_shapes
from mvtorch.unet import MultiViewUNet
from mvtorch.upscaler import LatentUpscaler
from mvtorch.vae import AutoencoderKL

_LOGGER = logging.getLogger(__name__)
_FOREACH: Any = torch  # its functions for lists of tensors have no public names


class Trainer:
    """A network, its loss, AdamW and an exponential moving average (EMA) of the weights.

    `loss(network, batch)` gets the batch as tensors. Weights and optimiser are float32; the half dtypes are autocast's on the
    CPU, and those of a copy of the network on CUDA, float16 with a loss scale. A step whose loss or gradient is not finite
    changes no weights, averages and moments. Weights whose names begin with one of `frozen` stay as they are. Raises
    OptionError for another dtype, BackendError for a device that is not there.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        config: OptimizerConfig,
        *,
        frozen: Sequence[str] = (),
        dtype: str = "float32",
        device: str = "auto",
    ) -> None:
        self.device, self.dtype = choose_device(device), parse_dtype(dtype, default="float32")
        self.network = network.to(self.device).train()
        on_cuda = torch.device(self.device).type == "cuda"
        if torch.device(self.device).type == "cpu":
            _use_lean_group_norm(self.network)
        self.loss, self.config = loss, config
        self.parameters = dict(network.named_parameters())
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(not name.startswith(tuple(frozen)))
        # Autocast has float32 norms, twice the bytes of what a GPU waits for; a network in half precision has them inside.
        self._half = _copy_in(self.dtype, self.network) if on_cuda and self.dtype != "float32" else None
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=0.0,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=on_cuda,
        )
        self.ema = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.steps = 0
        self.loss_scale = LossScale() if self.dtype == "float16" else None
        self._recorded = _RecordedGradients(CudaRecorder(self.device)) if on_cuda else None

    def step(self, batch: Any, *, learning_rate: float) -> StepResult:
        """Learn from one batch (a NamedTuple of float32 arrays)."""
        result = self.measure(batch)  # its gradient is the parameters' now
        self.steps, self.loss_scale = counted(result, self.steps, self.loss_scale)
        if result.learned:
            self.optimizer.param_groups[0]["lr"] = learning_rate
            self.optimizer.step()
            share = 1 - ema_decay(self.config, updates(self.steps, self.loss_scale))
            with torch.no_grad():
                _FOREACH._foreach_lerp_(list(self.ema.values()), [self.parameters[name] for name in self.ema], share)
        return result

    def measure(self, batch: Any) -> StepResult:
        """What a step would come to with this batch; nothing is learned."""
        scale = 1.0 if self.loss_scale is None else self.loss_scale.scale
        tensors, factor = self._tensors(batch), torch.full((), scale, device=self.device)
        measured = (
            self._gradients(tensors, factor) if self._recorded is None else self._recorded(self._gradients, tensors, factor)
        )
        loss, norm = measured.tolist()
        return step_result(loss, norm, self.loss_scale)

    def evaluate(self, batch: Any) -> float:
        """The loss of a batch under the EMA weights; nothing is learned."""
        weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        try:
            with torch.no_grad():
                self._assign(self.ema)
                return self._loss(self._tensors(batch)).item()
        finally:
            self._assign(weights)

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """The weights, float32, in checkpoint layout."""
        return get_weights(self.network)

    def ema_weights(self) -> dict[str, NDArray[np.float32]]:
        """The averaged weights, float32, in checkpoint layout."""
        return _to_numpy(self.ema)

    def state(self) -> dict[str, NDArray[np.float32]]:
        """All that a resumed run needs, in checkpoint layout: the same names in both backends, see `optimizer.pack_state`."""
        exp_avg, exp_avg_sq = (_to_numpy(self._moments(key)) for key in ("exp_avg", "exp_avg_sq"))
        return pack_state(TrainerState(self.weights(), self.ema_weights(), exp_avg, exp_avg_sq, self.steps, self.loss_scale))

    def load_state(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Continue from what `state` gave, in either backend. Raises TensorMismatchError for another network's."""
        unpacked = unpack_state(state, weight_shapes(self.network), scaled=self.loss_scale is not None)
        set_weights(self.network, unpacked.model)
        self.steps, self.loss_scale = unpacked.steps, unpacked.loss_scale
        device = self.device if self.optimizer.defaults["fused"] else "cpu"
        for name, parameter in self.parameters.items():
            self.ema[name].copy_(torch.from_numpy(np.array(unpacked.ema[name])))
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(updates(self.steps, self.loss_scale)), device=device),
                "exp_avg": torch.empty_like(parameter).copy_(torch.from_numpy(np.array(unpacked.exp_avg[name]))),
                "exp_avg_sq": torch.empty_like(parameter).copy_(torch.from_numpy(np.array(unpacked.exp_avg_sq[name]))),
            }

    def _gradients(self, batch: Any, scale: Tensor) -> Tensor:
        """Loss and norm of the gradient (2,) of a batch of tensors; the gradient stays with the parameters, clipped."""
        self.optimizer.zero_grad(set_to_none=True)
        if self._half is not None:
            self._half.zero_grad(set_to_none=True)  # which a call that failed may have left
        loss = self._loss(batch)
        (loss * scale).backward()
        if self._half is not None:
            for master, computed in zip(self.parameters.values(), self._half.parameters(), strict=True):
                master.grad = None if computed.grad is None else computed.grad.float()
                computed.grad = None
        if self.loss_scale is not None:
            _FOREACH._foreach_div_([each.grad for each in self.parameters.values() if each.grad is not None], scale)
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.gradient_clip)
        return torch.stack([loss.detach().float(), norm])

    def _tensors(self, batch: Any) -> Any:
        """A batch of arrays on the device."""
        return type(batch)(
            *(
                None if array is None else torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self.device)
                for array in batch
            )
        )

    def _loss(self, batch: Any) -> Tensor:
        if self._half is not None:
            with torch.no_grad():
                _FOREACH._foreach_copy_(list(self._half.parameters()), list(self.parameters.values()))
            return self.loss(self._half, batch)
        with self._autocast():
            return self.loss(self.network, batch)

    def _moments(self, key: str) -> dict[str, Tensor]:
        """AdamW's running means of the gradient or of its square; zeros before the first step."""
        found = {name: self.optimizer.state.get(parameter, {}) for name, parameter in self.parameters.items()}
        return {name: found[name].get(key, torch.zeros_like(parameter)) for name, parameter in self.parameters.items()}

    def _assign(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=getattr(torch, self.dtype))


def _copy_in(dtype: Dtype, network: nn.Module) -> nn.Module:
    """A copy of a network that computes in a half dtype."""
    half = copy.deepcopy(network)
    for name, parameter in half.named_parameters():
        parameter.data = parameter.data.to(getattr(torch, tensor_dtype(name, dtype)))
    return half


class _RecordedGradients:
    """A CUDA graph of all that comes before the optimiser's step: some 2,000 kernels, launched as one.

    The first call with tensors of new shapes is an ordinary one, the second is recorded. After a recording that failed, which
    is logged, all are ordinary ones.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._shapes: list[torch.Size] = []
        self._inputs: list[Tensor] = []
        self._recording: Recording | None = None
        self._failed = False

    def __call__(self, gradients: Callable[[Any, Tensor], Tensor], batch: Any, scale: Tensor) -> Tensor:
        given = [each for each in (*batch, scale) if each is not None]
        shapes = [each.shape for each in given]
        if self._failed or shapes != self._shapes:
            self._shapes, self._recording = shapes, None
            return gradients(batch, scale)
        if self._recording is None:
            self._inputs = [each.clone() for each in given]
            inputs = iter(self._inputs)
            static = type(batch)(*(None if each is None else next(inputs) for each in batch))
            static_scale = next(inputs)
            try:
                self._recording = self._recorder.record(lambda: gradients(static, static_scale))
            except RuntimeError as error:
                self._failed = True
                _LOGGER.warning("no CUDA graph: a training step could not be recorded (%s)", first_line(error))
                return gradients(batch, scale)
        for kept, each in zip(self._inputs, given, strict=True):
            kept.copy_(each)
        self._recording.replay()
        return self._recording.out


def _to_numpy(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    """Float32 copies in checkpoint layout."""
    layout = torch.contiguous_format
    return {name: tensor.detach().to("cpu", memory_format=layout, copy=True).numpy() for name, tensor in tensors.items()}


class _LeanGroupNorm(torch.autograd.Function):
    """Group normalisation of channels_last pictures (n, c, h, w) as a few passes over the pixels.

    PyTorch's own backward took a third of a training step on the CPU; this one takes a fifth of that. The variance is
    E[x^2] - E[x]^2, so its sums are float64: in float32 it would lose its digits where the mean is large. Weight and bias are
    (c,), or (n, c) of an adaptive norm. Pixels in half precision are multiplied by float32: a constant group's scale times its
    mean, which the shift takes away, is beyond float16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        n, c, h, w = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(n, h * w, c)
        count = h * w * c // groups
        sums = pixels.sum(1, dtype=torch.float64).view(n, groups, -1).sum(-1)
        squares = torch.linalg.vector_norm(pixels, dim=1, dtype=torch.float64).square().view(n, groups, -1).sum(-1)
        mean = sums / count
        rstd = torch.rsqrt((squares / count - mean * mean).clamp_min(0) + eps)
        mean, rstd = (value.float().repeat_interleave(c // groups, 1) for value in (mean, rstd))
        scale = weight * rstd
        shift = bias - mean * scale
        out = torch.addcmul(shift[:, None], pixels, scale[:, None]).to(x.dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return out.view(n, h, w, c).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        n, c, h, w = x.shape
        pixels, gradient = (value.permute(0, 2, 3, 1).reshape(n, h * w, c) for value in (x, gradients[0]))
        count = h * w * c // ctx.groups

        def group_mean(value: Tensor) -> Tensor:
            return (value.view(n, ctx.groups, -1).sum(-1) / count).repeat_interleave(c // ctx.groups, 1)

        total = gradient.sum(1, dtype=torch.float32)
        aligned = ((gradient.float() * pixels).sum(1) - mean * total) * rstd
        # dx = rstd (weight g - mean(weight g) - normalised mean(weight g normalised)), gathered into three factors.
        along = rstd * rstd * group_mean(weight * aligned)
        constant = along * mean - rstd * group_mean(weight * total)
        constant, along, own = (value[:, None] for value in (constant, -along, rstd * weight))
        dx = torch.addcmul(torch.addcmul(constant, pixels, along), gradient, own).to(x.dtype)
        if weight.ndim == 1:
            aligned, total = aligned.sum(0), total.sum(0)
        return dx.view(n, h, w, c).permute(0, 3, 1, 2), aligned, total, None, None


def _use_lean_group_norm(network: nn.Module) -> None:
    def forward(norm: nn.GroupNorm, x: Tensor) -> Tensor:
        return _LeanGroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)

    def adaptive(norm: AdaGroupNorm, x: Tensor, emb: Tensor) -> Tensor:
        return _LeanGroupNorm.apply(x, *norm.scale_shift(emb), norm.groups, norm.eps)

    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = partial(forward, module)  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(module, AdaGroupNorm):
            module.forward = partial(adaptive, module)  # pyright: ignore[reportAttributeAccessIssue]


def _network(
    config: VAEConfig | UNetConfig | KUNetConfig,
    weights: Mapping[str, NDArray[np.float32]],
    *,
    gradient_checkpointing: bool = False,
) -> nn.Module:
    with torch.device("meta"):
        network = NETWORKS[type(config)](config, gradient_checkpointing=gradient_checkpointing)
    set_weights(network.to_empty(device="cpu"), weights)
    return network


def _teacher(config: UNetConfig, weights: Mapping[str, NDArray[np.float32]], *, dtype: str, device: str) -> nn.Module:
    """The network that training starts from, in the dtype of the computation: autocast's is that of float32 weights."""
    device, network = choose_device(device), _network(config, weights).requires_grad_(False)
    if torch.device(device).type == "cuda":
        network = _copy_in(parse_dtype(dtype, default="float32"), network)
    return network.to(device)


def memory_limits(device: str) -> AbstractContextManager[None]:
    """A context for all of a training, which keeps to what the device's memory allows. Raises BackendError."""
    choose_device(device)
    return nullcontext()  # PyTorch keeps to it by itself


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
    network = _network(config, weights, gradient_checkpointing=gradient_checkpointing)
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
    teacher: Any = _teacher(config, weights, dtype=dtype, device=device) if loss.distill_rest else None
    network = _network(config, weights, gradient_checkpointing=gradient_checkpointing)
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
    network = _network(config, weights, gradient_checkpointing=gradient_checkpointing)
    return Trainer(network, upscaler_loss, optimizer, frozen=frozen, dtype=dtype, device=device)


def vae_loss(vae: AutoencoderKL, batch: VAEBatch[Tensor], config: VAELossConfig) -> Tensor:
    """The terms of VAELossConfig, as means."""
    moments = vae.encode(batch.pixels)
    mean, logvar = moments.mean.float(), moments.logvar.float()
    error = vae.decode(mean + torch.exp(logvar / 2) * batch.noise).float() - batch.pixels
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return picture_loss(error, batch.foreground, batch.detail, config, downscale=vae.config.downscale) + config.kl_weight * kl


def picture_loss(error: Tensor, foreground: Tensor, detail: Tensor | None, config: VAELossConfig, *, downscale: int) -> Tensor:
    """The terms of VAELossConfig but for the KL: those of the error (n, h, w, 3) of pictures in [-1, 1].

    Foreground and detail are those of a VAEBatch, and `downscale` is how many pixels one latent stands for along an edge.
    """
    rows, columns = (F.pad(error.new_zeros(side - 2), (1, 1), value=config.border_weight) for side in error.shape[1:3])
    weight = 1 + config.foreground_weight * foreground[..., None] + (rows[:, None] + columns)[..., None]
    if detail is not None:
        weight = weight + config.detail_weight * detail[..., None]
    weight = weight / weight.mean()
    loss = (weight * error.abs()).mean() + config.mse_weight * (weight * error.square()).mean()
    down, right = error[:, 1:] - error[:, :-1], error[:, :, 1:] - error[:, :, :-1]
    edges = (weight[:, 1:] * down.abs()).mean() + (weight[:, :, 1:] * right.abs()).mean()
    (n, height, width, _), f = error.shape, downscale
    coarse = error.reshape(n, height // f, f, width // f, f, 3).mean(dim=(2, 4))
    luma = coarse.mean(dim=-1, keepdim=True)
    color = luma.abs().mean() + config.chroma_weight * (coarse - luma).abs().mean()
    return loss + config.gradient_weight * edges + config.coarse_weight * color


def unet_loss(
    unet: MultiViewUNet, batch: UNetBatch[Tensor], config: UNetLossConfig, *, teacher: MultiViewUNet | None = None
) -> Tensor:
    """UNetLossConfig's squared error of the network's output; `teacher` is the one whose output is the target of the rest."""
    target, detail = batch.target, batch.detail
    out = _output(unet, batch)
    if detail is None:
        return F.mse_loss(out, target)
    if teacher is not None:
        with torch.no_grad():
            target = torch.where(detail[..., None] > 0, target, _output(teacher, batch))
    weight = 1 + config.detail_weight * detail[..., None]
    return (weight / weight.mean() * (out - target).square()).mean()


def _output(unet: MultiViewUNet, batch: UNetBatch[Tensor]) -> Tensor:
    """What the network makes of a batch, float32."""
    states = None if batch.image_states is None else batch.image_states[:, None]
    constants = unet.constants(
        batch.text,
        image_states=states,
        camera=batch.camera if unet.config.camera_dim else None,
        reference=batch.reference[:, None] if unet.config.reference_frame else None,
    )
    return unet(batch.sample, unet.time_embeddings(batch.timesteps), constants).float()


def upscaler_loss(network: LatentUpscaler, batch: UpscalerBatch[Tensor]) -> Tensor:
    """Negative log-likelihood of the target, whose variance the network gives for each picture (k-diffusion's has_variance)."""
    sample, noise, condition, target = batch
    out = network(sample, noise, text=[], condition=condition).float()
    logvar = out[..., -1:].mean(dim=(1, 2, 3, 4), keepdim=True)
    return 0.5 * ((out[..., :-1] - target).square() * torch.exp(-logvar) + logvar).mean()
