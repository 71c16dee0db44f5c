"""Convolutional blocks of the U-Net and the VAE, and the timestep embedding, after diffusers' resnet.py and embeddings.py.

Inside the networks pictures are (n, c, h, w) in channels_last memory, where n counts the views of all objects.
"""

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mvshared.errors import OptionError
from mvtorch import cpu_norms, cuda_fused
from mvtorch.cpu_norms import norm_silu
from mvtorch.observation import is_observed


class GroupNorm(nn.GroupNorm):
    """Group normalisation of (n, c, h, w) with statistics in float32.

    PyTorch's CPU kernel for channels_last takes the variance as E[x^2] - E[x]^2, which loses every digit where the mean is
    large. So the mean is subtracted first; the result does not depend on it, and neither does the gradient.
    """

    def __init__(self, groups: int, channels: int, *, eps: float) -> None:
        super().__init__(groups, channels, eps=eps)

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(n, c, h, w) to (n, c, h, w)."""
        if cpu_norms.is_for(x):
            return cpu_norms.normalised(x, self.num_groups, self.weight, self.bias, eps=self.eps)
        out = None
        if not is_observed(self):
            out = cuda_fused.group_norm(x, self.num_groups, self.weight, self.bias, eps=self.eps)
        return super().forward(_centred(x, self.num_groups)) if out is None else out


class AdaGroupNorm(nn.Module):
    """Group normalisation whose scale and shift are linear in an embedding, after diffusers' class of that name."""

    def __init__(self, groups: int, channels: int, *, embed_dim: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.linear = nn.Linear(embed_dim, 2 * channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """(n, c, h, w) and embeddings (n, embed_dim) to (n, c, h, w)."""
        scale, shift = self.scale_shift(emb)
        if cpu_norms.is_for(x):
            return cpu_norms.normalised(x, self.groups, scale, shift, eps=self.eps)
        scale, shift = (value[:, :, None, None] for value in (scale, shift))
        return torch.addcmul(shift, F.group_norm(_centred(x, self.groups), self.groups, eps=self.eps), scale)

    def scale_shift(self, emb: Tensor) -> tuple[Tensor, Tensor]:
        """Factors and summands (n, c)."""
        scale, shift = self.linear(emb).chunk(2, dim=1)
        return 1 + scale, shift


def _centred(x: Tensor, groups: int) -> Tensor:
    """x (n, c, h, w) without the means of its groups, on the CPU, where its kernel needs that; see GroupNorm."""
    if x.device.type != "cpu":
        return x
    n, c = x.shape[:2]
    means = x.detach().mean(dim=3).mean(dim=2).view(n, groups, -1).mean(dim=-1, keepdim=True)
    return x - means.expand(-1, -1, c // groups).reshape(n, c, 1, 1)


class Float32Conv2d(nn.Conv2d):
    """A convolution in float32 whatever the dtype of its weights and input, for the last layer before pictures."""

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Convolve x (n, c, h, w); the result is float32."""
        bias = None if self.bias is None else self.bias.float()
        device = x.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return self._conv_forward(x.float(), self.weight.float(), bias)


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, and a shortcut; the projected time embedding is added in between.

    `time_embed_dim` None leaves the time embedding out, as in the VAE.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int, eps: float, time_embed_dim: int | None = None
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if time_embed_dim is not None:
            self.time_emb_proj = nn.Linear(time_embed_dim, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps=eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """x (n, in_channels, h, w) and time embeddings after SiLU (n, time_embed_dim) to (n, out_channels, h, w)."""
        return self._shifted(x, emb, None)

    def _shifted(self, x: Tensor, emb: Tensor | None, shift: Tensor | None) -> Tensor:
        """The same, where `shift` (n, out_channels) is what `time_emb_proj` gives for the embeddings, if that is known."""
        reuse = cpu_norms.may_overwrite(*self.children())
        if reuse and (out := cuda_fused.resnet(self, x, emb, shift)) is not None:
            return out
        h = self.conv1(norm_silu(self.norm1, x))
        if emb is not None and shift is None:
            shift = self.time_emb_proj(emb)
        if shift is not None:
            h = h.add_(shift[:, :, None, None]) if reuse else h + shift[:, :, None, None]
        h = self.conv2(norm_silu(self.norm2, h, overwrite=reuse))
        rest = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h.add_(rest) if reuse else h + rest


class Downsample(nn.Module):
    """A convolution of stride 2. `pad_after` pads below and to the right only, as the VAE does."""

    def __init__(self, channels: int, *, pad_after: bool = False) -> None:
        super().__init__()
        self.pad_after = pad_after
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if pad_after else 1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to (n, c, h / 2, w / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pad_after else x)


class Upsample(nn.Module):
    """Every pixel twice in both directions, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(n, c, h, w) to (n, c, 2 h, 2 w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class TimestepEmbedding(nn.Module):
    """Linear, SiLU, Linear: of the sinusoidal timestep and of the camera vector."""

    def __init__(self, in_channels: int, time_embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_channels) to (..., time_embed_dim)."""
        return self.linear_2(F.silu(self.linear_1(x)))


class GEGLU(nn.Module):
    """A linear layer whose first half is gated by the exact GELU of its second half."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to (..., hidden)."""
        projected = self.proj(x)
        out = None if is_observed(self.proj) else cuda_fused.gated(projected)
        if out is not None:
            return out
        x, gate = projected.chunk(2, dim=-1)
        return x * gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width and back; `net.1` is diffusers' dropout, which has no weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        """(..., channels) to (..., channels)."""
        return self.net[2](self.net[0](x))


def gelu(x: Tensor) -> Tensor:
    """The exact GELU, which PyTorch computes in float32."""
    return F.gelu(x)


def timestep_embedding(timesteps: Tensor, channels: int) -> Tensor:
    """Sinusoids float32 (b, channels) of timesteps (b,), cosines first: diffusers' flip_sin_to_cos with freq_shift 0.

    Raises OptionError for an odd number of channels.
    """
    if channels % 2:
        raise OptionError("channels", expected="even for a timestep embedding", got=channels)
    half, device = channels // 2, timesteps.device
    exact = torch.float32 if device.type == "mps" else torch.float64  # made on the device: graphs hold no copies from the host
    frequencies = torch.exp(torch.arange(half, dtype=exact, device=device) * (-math.log(10000) / half)).float()
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def repeat_objects(x: Tensor, n: int) -> Tensor:
    """x (m, ...) as often as gives (n, ...): what objects have in common, for each of them."""
    return x if len(x) == n else torch.cat([x] * (n // len(x)))


def run_block(block: nn.Module, *inputs: Any, recompute: bool, **static: Any) -> Tensor:
    """Call a module; with `recompute`, keep its inputs only and compute it again for the gradient (gradient checkpointing).

    `inputs` are arrays, lists and tuples of them, or None; `static` holds arguments that are none of these.
    """
    if not (recompute and torch.is_grad_enabled()):
        return block(*inputs, **static)
    # Nothing in a block is random, so the generators' states, which a CUDA graph could not read, need not be kept.
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **static)
