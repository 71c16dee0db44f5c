"""Calls of a network as CUDA graphs: recorded once for a condition, and replayed at every step after that.

A call of the U-Net launches some 850 kernels, one after the other from Python, which for a few views takes the host longer than
the device needs to run them. A recorded call is a single launch; it reads and writes the same memory every time.
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mvshared.errors import first_line

_LOGGER = logging.getLogger(__name__)
WARM_UPS = 2  # libraries choose their kernels and take their workspaces at first, which a recording cannot hold


class Recording(NamedTuple):
    """A call that can be repeated: `replay` computes `out` anew, from what then lies where its inputs were."""

    out: Tensor
    replay: Callable[[], None]


class Recorder(Protocol):
    """What records calls on a device."""

    def busy(self) -> bool:
        """Whether the device is recording already, for the program around this."""
        ...

    def record(self, function: Callable[[], Tensor]) -> Recording:
        """The call, recorded. Raises RuntimeError if that fails."""
        ...


class CudaRecorder:
    """Records calls on a CUDA device. All share the memory of their intermediate results, as they never run together."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.pool: Any = None
        self.side: torch.cuda.Stream | None = None

    def busy(self) -> bool:
        """Whether the current stream is being captured."""
        with torch.cuda.device(self.device):
            return torch.cuda.is_current_stream_capturing()

    def record(self, function: Callable[[], Tensor]) -> Recording:
        """The call, recorded after `WARM_UPS` calls beside the current stream. Raises RuntimeError if that fails."""
        with torch.cuda.device(self.device):
            if self.side is None:
                self.pool, self.side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            current, side = torch.cuda.current_stream(), self.side
            try:
                side.wait_stream(current)
                with torch.cuda.stream(side):
                    for _ in range(WARM_UPS):
                        function()
                current.wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self.pool, stream=side, capture_error_mode="thread_local"):
                    out = function()
            finally:
                torch.cuda.set_stream(current)  # a capture that fails leaves its own
            return Recording(out, graph.replay)


class Graphs:
    """The recorded calls of networks, for every condition the latest one.

    Nothing is kept for longer than its network and its condition: a condition that nobody holds any more takes its recording
    with it, and so does a network that is dropped.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._entries: WeakKeyDictionary[nn.Module, WeakKeyDictionary[Any, _Entry]] = WeakKeyDictionary()
        self._failed = False

    def call(
        self,
        network: Any,
        condition: Any,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        *,
        depends_on: object = None,
    ) -> Tensor:
        """`function(*inputs)`, which calls the network with the inputs and with what the condition holds, and nothing else.

        With another value of `depends_on` than before, what was recorded is of no use.

        The first call for a condition and for shapes is an ordinary one, the second is recorded, others are replayed. Blocks
        that are observed, gradients, and recordings of the program around this need the ordinary call. So does everything after
        a recording that failed, which is logged once.
        """
        if self._failed or torch.is_grad_enabled() or self._recorder.busy():
            return function(*inputs)
        entries = self._entries.setdefault(network, WeakKeyDictionary())
        key = (network.attention_options, tuple((each.shape, each.dtype) for each in inputs), depends_on)
        entry = entries.get(condition)
        if entry is None or entry.key != key:
            entry = entries[condition] = _Entry(key, _hooks(network))
            return function(*inputs)
        if any(entry.hooks):
            return function(*inputs)
        if entry.recording is None and not self._record(entry, function, inputs):
            return function(*inputs)
        assert entry.recording is not None
        for static, given in zip(entry.inputs, inputs, strict=True):
            static.copy_(given)
        entry.recording.replay()
        return entry.recording.out.clone()

    def _record(self, entry: "_Entry", function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> bool:
        """Record a call; whether that went well."""
        static = [torch.empty_like(each, memory_format=torch.contiguous_format).copy_(each) for each in inputs]
        try:
            recording = self._recorder.record(lambda: function(*static))
        except RuntimeError as error:
            self._failed = True
            self._entries.clear()
            reason = first_line(error)
            _LOGGER.warning(
                "no CUDA graphs: a network's call could not be recorded (%s); its kernels are launched apart", reason
            )
            return False
        entry.inputs, entry.recording = static, recording
        return True


@dataclass
class _Entry:
    """A condition's call: what it depends on beside its inputs' values, the hooks of the network's modules, its recording."""

    key: tuple[Any, ...]
    hooks: Sequence[Any]
    inputs: Sequence[Tensor] = ()
    recording: Recording | None = None


def _hooks(network: nn.Module) -> list[Any]:
    """The dictionaries of all hooks of a network, which stay the same ones; they do not keep the network in memory."""
    return [hooks for module in network.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]


def graphs_on(device: str) -> Graphs | None:
    """What records calls on a device; None where there are no such graphs."""
    return Graphs(CudaRecorder(device)) if torch.device(device).type == "cuda" else None
