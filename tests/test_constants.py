"""What is constant over the sampling steps is computed before the first one, and the steps leave the device alone."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BACKENDS, FLOAT32_RMS, Backend, assert_close, random_conditions, record
from torch.utils._python_dispatch import TorchDispatchMode

import mvmlx
import mvtorch
from benchmarks.operations import primitives
from mvshared.backend import load
from mvshared.pipeline import Pipeline
from mvtorch import cpu_norms
from mvtorch.model import MultiViewModel

PACKAGES: dict[str, Any] = {"torch": mvtorch, "mlx": mvmlx}
FOLDER = Path(__file__).parent / "fixtures" / "tiny-imagedream"
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
ONCE = ("unet.camera_embedding", "unet.time_embedding", "unet.image_embed")


def pipeline_of(backend: Backend) -> Pipeline[Any]:
    return load(FOLDER, backend=backend, device="cpu", dtype="float32")


def generate(pipeline: Pipeline[Any], **options: Any) -> Any:
    given = {
        "prompt": "an owl",
        "negative_prompt": "blurry",
        "views": 2,
        "size_px": 64,
        "steps": 4,
        "guidance": 3.0,
        "eta": 1.0,
        "reference_scale": 0.5,
    }
    return pipeline.generate(PICTURE, **(given | options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_cameras_times_and_tokens_are_embedded_once_for_every_mixture_of_branches(backend: Backend) -> None:
    pipeline = pipeline_of(backend)
    counts: Counter[str] = Counter()
    with PACKAGES[backend].observe(pipeline, lambda name, array, seconds: counts.update([name])):
        generate(pipeline, guidance_interval=(0.25, 0.75))
    assert {name: counts[name] for name in ONCE} == dict.fromkeys(ONCE, 2)
    keys = [name for name in counts if name.endswith((".attn2.to_k", ".attn2.to_v", ".attn2.to_k_ip", ".attn2.to_v_ip"))]
    assert len(keys) > 4
    assert {counts[name] for name in keys} == {2}
    assert counts["unet"] == 4


def test_mlx_computes_what_is_constant_before_the_first_step() -> None:
    condition = random_conditions(pipeline_of("mlx").model, timesteps=[998.0])
    found = condition.constants
    attended = [array for blocks in found.cross for each in blocks for kv in each if kv is not None for array in kv]
    assert len(attended) > 4
    assert primitives(*attended, found.camera, found.reference) == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_timestep_that_was_not_announced_gives_what_an_announced_one_does(backend: Backend) -> None:
    model = pipeline_of(backend).model
    x = model.from_numpy(np.random.default_rng(1).standard_normal((2, 8, 8, 4), np.float32))
    announced, other = (random_conditions(model, timesteps=timesteps) for timesteps in ([998.0, 480.25, 998.0], []))
    for t in (998.0, 480.25, 3.0):
        expected = model.to_numpy(model.denoise(x, t, other, [-2.0, 3.0]))
        assert_close(model.to_numpy(model.denoise(x, t, announced, [-2.0, 3.0])), expected, rms=FLOAT32_RMS)


class _HostTraffic(TorchDispatchMode):
    """Counts what waits for a device, or brings numbers to it from the host, in the calls of `denoise`."""

    OPERATIONS = ("_local_scalar_dense", "lift_fresh", "nonzero", "is_nonzero", "equal", "item")

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.OPERATIONS or ("device" in (kwargs or {}) and name == "_to_copy"):
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def test_no_step_of_a_run_brings_numbers_to_the_device_or_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    traffic, inner = _HostTraffic(), MultiViewModel.denoise

    def watched(*args: Any, **kwargs: Any) -> Any:
        with traffic:
            return inner(*args, **kwargs)

    monkeypatch.setattr(MultiViewModel, "denoise", watched)
    monkeypatch.setattr(cpu_norms, "is_for", lambda x: False)  # the CPU stands for a GPU, where looking at a mean is waiting
    generate(pipeline_of("torch"), guidance_rescale=0.5)
    assert traffic.seen == {}
    with traffic:  # the counter counts
        torch.tensor([1.0]).sum().item()
    assert traffic.seen == {"lift_fresh": 1, "_local_scalar_dense": 1}


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_noise_goes_to_the_device_in_a_run_without_previews_and_only_the_result_comes_back(backend: Backend) -> None:
    recorded = record(pipeline_of(backend))
    generate(recorded.pipeline)
    calls = [name for name, _ in recorded.model.calls if name not in ("start", "wait")]  # which bring nothing
    assert calls.count("denoise") == 4
    first = calls.index("denoise")
    assert calls[first - 1 :] == ["from_numpy", *["denoise", "from_numpy"] * 4, "to_numpy", "from_numpy", "decode"]
