"""How PyTorch computes outside of training: without gradients, float32 that is float32, attention by the fastest kernel.

What concerns CUDA only is set while a model works and put back afterwards: the settings belong to the program around this.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mvtorch.attention import TransformerBlock
from mvtorch.joined import join_linears
from mvtorch.unet import MultiViewUNet

HOPPER = (9, 0)
# From Hopper on cuDNN's kernel is faster than PyTorch's flash attention, which PyTorch prefers: docs/speed.md.
ORDER = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)


@contextmanager
def inference(device: str) -> Iterator[None]:
    """A context in which a network computes on a device, and keeps nothing for gradients."""
    kind = torch.device(device).type
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        if torch.is_autocast_enabled(kind):  # by the program around this: a model has a dtype
            stack.enter_context(torch.autocast(kind, enabled=False))
        if kind == "cuda":
            stack.enter_context(exact_float32())
            stack.enter_context(fastest_attention(device))
        yield


class _Shared:
    """A context that changes what all threads share: what the first one to enter changes, the last one to leave puts back."""

    def __init__(self) -> None:
        self._lock, self._changed, self._inside = Lock(), ExitStack(), 0

    @contextmanager
    def __call__(self, change: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._changed.enter_context(change())
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._changed.close()


_float32, _attention = _Shared(), _Shared()


def exact_float32() -> AbstractContextManager[None]:
    """Convolutions of float32 on CUDA in float32, where PyTorch would take TF32 with its 10 bits after the point.

    Who allows TF32 for products of matrices, as by `torch.set_float32_matmul_precision("high")`, gets what PyTorch does.
    """
    return _float32(_exact_float32)


@contextmanager
def _exact_float32() -> Iterator[None]:
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        yield
        return
    cudnn: Any = torch.backends.cudnn
    before, cudnn.conv.fp32_precision = cudnn.conv.fp32_precision, "ieee"
    try:
        yield
    finally:
        cudnn.conv.fp32_precision = before


def fastest_attention(device: str) -> AbstractContextManager[None]:
    """From Hopper on, the kernels of attention in the order of their speed; not where the program chose among them itself."""
    return _attention(partial(_fastest_attention, device))


@contextmanager
def _fastest_attention(device: str) -> Iterator[None]:
    backends = torch.backends.cuda
    enabled = (
        backends.cudnn_sdp_enabled(),
        backends.flash_sdp_enabled(),
        backends.mem_efficient_sdp_enabled(),
        backends.math_sdp_enabled(),
    )
    if torch.cuda.get_device_capability(device) < HOPPER or not all(enabled):
        yield
        return
    with sdpa_kernel(list(ORDER), set_priority=True):
        yield


def join_projections(network: MultiViewUNet) -> None:
    """Let a U-Net compute the queries, keys and values of a self-attention, and the time's projections for all of its resnets,
    as one product each; see `JoinedLinears`."""
    for block in network.modules():
        if isinstance(block, TransformerBlock):
            block.attn1.joint = join_linears([block.attn1.to_q, block.attn1.to_k, block.attn1.to_v])
    levels: tuple[Any, ...] = (*network.down_blocks, network.mid_block, *network.up_blocks)
    network.joint_times = join_linears([resnet.time_emb_proj for level in levels for resnet in level.resnets])


def to_device(host: Tensor, device: str) -> Tensor:
    """A tensor of the host on a device. CUDA fetches it while the host goes on, from memory that the system does not move."""
    if torch.device(device).type == "cuda":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)
