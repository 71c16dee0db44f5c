"""Training in PyTorch: the losses of the two stages, and the optimiser step. All else is in mvshared.training."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mvshared.config import UNetConfig, VAEConfig
from mvshared.training.config import OptimizerConfig, VAELossConfig
from mvshared.training.data import UNetBatch, VAEBatch
from mvtorch.model import choose_device, get_weights, set_weights, weight_shapes
from mvtorch.unet import MultiViewUNet
from mvtorch.vae import AutoencoderKL


class StepResult(NamedTuple):
    """The loss of a batch before the update, and the global norm of its gradient before clipping."""

    loss: float
    gradient_norm: float


class Trainer:
    """A network, its loss, AdamW and an exponential moving average (EMA) of the weights."""

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        config: OptimizerConfig,
        *,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        self.network = network.to(device).train()
        if device == "cpu":
            _use_lean_group_norm(self.network)
        self.loss, self.config, self.dtype, self.device = loss, config, dtype, device
        self.parameters = dict(network.named_parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=0.0, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        self.ema = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.steps = 0

    def step(self, batch: Any, *, learning_rate: float) -> StepResult:
        """Learn from one batch (a NamedTuple of float32 arrays)."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss = self.loss(self.network, self._to_device(batch))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters.values(), self.config.gradient_clip)
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.step()
        self.steps += 1
        decay = ema_decay(self.config, self.steps)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.values()), list(self.parameters.values()), 1 - decay)
        return StepResult(loss.item(), norm.item())

    def evaluate(self, batch: Any) -> float:
        """The loss of a batch under the EMA weights; nothing is learned."""
        weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._assign(self.ema)
        try:
            with torch.no_grad(), self._autocast():
                return self.loss(self.network, self._to_device(batch)).item()
        finally:
            self._assign(weights)

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """The weights, float32, in checkpoint layout."""
        return get_weights(self.network)

    def ema_weights(self) -> dict[str, NDArray[np.float32]]:
        """The averaged weights, float32, in checkpoint layout."""
        return {name: tensor.cpu().contiguous().numpy().copy() for name, tensor in self.ema.items()}

    def state(self) -> dict[str, NDArray[np.float32]]:
        """All that a resumed run needs, in checkpoint layout: the same names in both backends."""
        state = {f"model.{name}": array for name, array in self.weights().items()}
        state |= {f"ema.{name}": array for name, array in self.ema_weights().items()}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                moment = moments[key] if key in moments else torch.zeros_like(parameter)
                state[f"{key}.{name}"] = moment.detach().cpu().contiguous().numpy().copy()
        return state | {"steps": np.asarray([self.steps], np.float32)}

    def load_state(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Continue from what `state` gave. Raises TensorMismatchError if the weights are another network's."""

        def part(prefix: str) -> dict[str, Tensor]:
            found = {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
            return {name: torch.from_numpy(array).to(self.device) for name, array in found.items()}

        set_weights(self.network, {name: tensor.cpu().numpy() for name, tensor in part("model.").items()})
        ema, averages, squares = part("ema."), part("exp_avg."), part("exp_avg_sq.")
        self.steps = int(state["steps"][0])
        for name, parameter in self.parameters.items():
            self.ema[name].copy_(ema[name])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.steps)),
                "exp_avg": torch.empty_like(parameter).copy_(averages[name]),
                "exp_avg_sq": torch.empty_like(parameter).copy_(squares[name]),
            }

    def _assign(self, weights: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(weights[name])

    def _to_device(self, batch: Any) -> Any:
        return type(batch)(*(torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for array in batch))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, dtype=getattr(torch, self.dtype))


class _LeanGroupNorm(torch.autograd.Function):
    """Group normalisation of channels_last pictures (n, c, h, w) as a few passes over the pixels.

    PyTorch's own backward took a third of a training step on the CPU; this one takes a fifth of that. Statistics are float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        n, c, h, w = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(n, h * w, c)
        count = h * w * c // groups
        sums = pixels.sum(1, dtype=torch.float32).view(n, groups, -1).sum(-1)
        squares = torch.linalg.vector_norm(pixels, dim=1, dtype=torch.float32).square().view(n, groups, -1).sum(-1)
        mean = sums / count
        rstd = torch.rsqrt((squares / count - mean * mean).clamp_min(0) + eps)
        mean, rstd = (value.repeat_interleave(c // groups, 1) for value in (mean, rstd))
        scale = weight * rstd
        shift = bias - mean * scale
        out = torch.addcmul(shift[:, None].to(x.dtype), pixels, scale[:, None].to(x.dtype))
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
        aligned = ((gradient * pixels).sum(1, dtype=torch.float32) - mean * total) * rstd
        # dx = rstd (weight g - mean(weight g) - normalised mean(weight g normalised)), gathered into three factors.
        along = rstd * rstd * group_mean(weight * aligned)
        constant = along * mean - rstd * group_mean(weight * total)
        factors = (value[:, None].to(x.dtype) for value in (constant, -along, rstd * weight))
        constant, along, own = factors
        dx = torch.addcmul(torch.addcmul(constant, pixels, along), gradient, own)
        return dx.view(n, h, w, c).permute(0, 3, 1, 2), aligned.sum(0), total.sum(0), None, None


def _use_lean_group_norm(network: nn.Module) -> None:
    def forward(norm: nn.GroupNorm, x: Tensor) -> Tensor:
        return _LeanGroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)  # type: ignore[no-any-return]

    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = partial(forward, module)


def ema_decay(config: OptimizerConfig, steps: int) -> float:
    """The EMA's decay, smaller at first so that the initial weights are forgotten."""
    return min(config.ema_decay, (1 + steps) / (10 + steps))


def vae_trainer(
    config: VAEConfig,
    optimizer: OptimizerConfig,
    loss: VAELossConfig,
    weights: Mapping[str, NDArray[np.float32]],
    *,
    dtype: str = "float32",
    device: str = "auto",
) -> Trainer:
    """A trainer of the VAE that starts from `weights` (checkpoint layout)."""
    network = AutoencoderKL(config)
    set_weights(network, weights)
    return Trainer(network, lambda vae, batch: vae_loss(vae, batch, loss), optimizer, dtype=dtype, device=choose_device(device))


def unet_trainer(
    config: UNetConfig,
    optimizer: OptimizerConfig,
    weights: Mapping[str, NDArray[np.float32]],
    *,
    dtype: str = "float32",
    device: str = "auto",
    gradient_checkpointing: bool = False,
) -> Trainer:
    """A trainer of the U-Net that starts from `weights` (checkpoint layout)."""
    network = MultiViewUNet(config, gradient_checkpointing=gradient_checkpointing)
    set_weights(network, weights)
    return Trainer(network, unet_loss, optimizer, dtype=dtype, device=choose_device(device))


def vae_weight_shapes(config: VAEConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a checkpoint of the VAE."""
    with torch.device("meta"):
        return weight_shapes(AutoencoderKL(config))


def unet_weight_shapes(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in a checkpoint of the U-Net."""
    with torch.device("meta"):
        return weight_shapes(MultiViewUNet(config))


def vae_loss(vae: AutoencoderKL, batch: VAEBatch, config: VAELossConfig) -> Tensor:
    """Weighted L1, MSE and L1 of the differences of neighbouring pixels, and the KL divergence to N(0, 1), as means."""
    pixels, foreground, noise = (_tensor(array) for array in batch)
    moments = vae.encode(pixels)
    mean, logvar = moments.mean.float(), moments.logvar.float()
    error = vae.decode(mean + torch.exp(logvar / 2) * noise).float() - pixels
    weight = 1 + config.foreground_weight * foreground[..., None]
    weight = weight / weight.mean()
    loss = (weight * error.abs()).mean() + config.mse_weight * (weight * error.square()).mean()
    down, right = error[:, 1:] - error[:, :-1], error[:, :, 1:] - error[:, :, :-1]
    edges = (weight[:, 1:] * down.abs()).mean() + (weight[:, :, 1:] * right.abs()).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return loss + config.gradient_weight * edges + config.kl_weight * kl


def unet_loss(unet: MultiViewUNet, batch: UNetBatch) -> Tensor:
    """Mean squared error of the network's output."""
    sample, timesteps, camera, reference, target = (_tensor(array) for array in batch)
    config = unet.config
    out = unet(
        sample,
        timesteps,
        camera=camera if config.camera_dim else None,
        reference=reference if config.reference_frame else None,
    )
    return F.mse_loss(out.float(), target)


def _tensor(array: Any) -> Tensor:
    """A batch's field inside the trainer, where the fields are tensors."""
    return array
