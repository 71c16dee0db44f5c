"""PyTorch on CUDA: recorded calls against ordinary ones, their memory, no waiting in the loop. All of it needs a GPU."""

import gc
import logging
import warnings
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import BFLOAT16_RMS, FLOAT16_RMS, assert_close, random_conditions
from test_parity_training import STAGES, make_batch, make_trainer

from mvshared.attention import FUSED
from mvshared.backend import load
from mvshared.pipeline import Pipeline
from mvtorch import cuda_fused
from mvtorch.attention import TransformerBlock
from mvtorch.graphs import CudaRecorder, Graphs
from mvtorch.inference import inference
from mvtorch.layers import FeedForward, GroupNorm, ResnetBlock

pytestmark = pytest.mark.gpu("cuda")

FOLDER = Path(__file__).parent / "fixtures" / "tiny-imagedream"
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
DTYPES = {"float32": 1e-6, "float16": FLOAT16_RMS, "bfloat16": BFLOAT16_RMS}  # libraries may choose other kernels when recorded


def pipeline_of(dtype: str, *, graphs: bool) -> Pipeline[Any]:
    pipeline: Pipeline[Any] = load(FOLDER, backend="torch", device="cuda", dtype=dtype)
    if not graphs:
        pipeline.model._graphs = None  # pyright: ignore[reportAttributeAccessIssue]
    return pipeline


def generate(pipeline: Pipeline[Any], **options: Any) -> Any:
    given = {"prompt": "an owl", "negative_prompt": "blurry", "views": 2, "size_px": 64, "steps": 6, "guidance": 3.0}
    return pipeline.generate(PICTURE, **(given | options))


def trainer_of(stage: str, *, dtype: str, device: str) -> Any:
    return make_trainer("torch", stage, dtype=dtype, device=device)


def recordings(pipeline: Pipeline[Any]) -> int:
    """Calls that are recorded now."""
    graphs: Graphs = pipeline.model._graphs  # pyright: ignore[reportAttributeAccessIssue]
    return sum(entry.recording is not None for entries in graphs._entries.values() for entry in entries.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [{}, {"guidance_interval": (0.5, 1.0), "guidance_rescale": 0.5}, {"reference_scale": 0.5}, {"eta": 1.0}],
    ids=["guided", "in an interval", "weighed references", "noise"],
)
def test_a_run_with_recorded_calls_gives_what_one_without_does(dtype: str, options: dict[str, Any]) -> None:
    recorded, plain = (generate(pipeline_of(dtype, graphs=graphs), **options).latents for graphs in (True, False))
    assert_close(recorded, plain, rms=DTYPES[dtype])


def test_two_runs_give_the_same_bits() -> None:
    pipeline = pipeline_of("float16", graphs=True)
    one, two = (generate(pipeline, guidance_interval=(0.5, 1.0)).latents for _ in range(2))
    np.testing.assert_array_equal(one, two)


def test_conditions_that_take_turns_keep_their_own_recordings_and_results_stay_what_they_were() -> None:
    pipelines = [pipeline_of("float32", graphs=graphs) for graphs in (True, False)]
    conditions = [[random_conditions(pipeline.model, seed=seed) for seed in (0, 1)] for pipeline in pipelines]
    results: list[list[Any]] = [[], []]
    for turn in range(4):
        x = np.random.default_rng(turn).standard_normal((2, 8, 8, 4), np.float32)
        for pipeline, given, kept in zip(pipelines, conditions, results, strict=True):
            model = pipeline.model
            kept += [model.denoise(model.from_numpy(x), 900.0 - turn, each, [-2.0, 3.0]) for each in given]
    assert recordings(pipelines[0]) == 2
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours.cpu().numpy(), theirs.cpu().numpy(), rms=1e-6)


def test_the_memory_of_recordings_goes_with_their_conditions_and_with_the_network() -> None:
    pipeline = pipeline_of("float16", graphs=True)
    model = pipeline.model

    def held() -> int:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    generate(pipeline)  # what libraries keep for themselves
    before = held()
    condition = random_conditions(model)
    x = model.from_numpy(np.zeros((2, 8, 8, 4), np.float32))
    for _ in range(3):
        model.denoise(x, 500.0, condition, [-2.0, 3.0])
    assert recordings(pipeline) == 1
    del condition
    assert recordings(pipeline) == 0
    assert held() <= before
    condition = random_conditions(model)
    for _ in range(3):
        model.denoise(x, 500.0, condition, [-2.0, 3.0])
    network = weakref.ref(model.unet)  # pyright: ignore[reportAttributeAccessIssue]
    model.release()
    assert network() is None
    assert recordings(pipeline) == 0
    for _ in range(3):
        model.denoise(x, 500.0, condition, [-2.0, 3.0])
    assert recordings(pipeline) == 1


def test_a_call_that_cannot_be_recorded_is_made_as_usual(caplog: pytest.LogCaptureFixture) -> None:
    graphs, network = Graphs(CudaRecorder("cuda")), torch.nn.Linear(4, 4, device="cuda")
    network.attention_options = None  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    condition = type("Condition", (), {})()

    def waits(x: torch.Tensor) -> torch.Tensor:
        return network(x) * x.sum().item()

    x = torch.randn(4, 4, device="cuda")
    stream = torch.cuda.current_stream()
    with caplog.at_level(logging.WARNING), inference("cuda"):
        for _ in range(4):
            torch.testing.assert_close(graphs.call(network, condition, waits, [x]), waits(x))
    assert torch.cuda.current_stream() == stream
    assert len([record for record in caplog.records if "could not be recorded" in record.getMessage()]) == 1
    torch.testing.assert_close((x @ x).cpu(), x.cpu() @ x.cpu())  # the device is as it was


def test_no_step_waits_for_the_device() -> None:
    """PyTorch raises at every copy and every number that the host would wait for."""
    pipeline = pipeline_of("float16", graphs=True)
    model = pipeline.model
    condition = random_conditions(model, timesteps=[900.0])
    x = model.from_numpy(np.zeros((2, 8, 8, 4), np.float32))
    for _ in range(2):  # recording waits
        model.denoise(x, 900.0, condition, [-2.0, 3.0], 0.5)
    try:
        with warnings.catch_warnings(action="ignore"):  # that this mode does not see everything
            torch.cuda.set_sync_debug_mode("error")
        for t in (900.0, 3.0):
            noise = model.from_numpy(np.ones((2, 8, 8, 4), np.float32))
            x = 0.5 * x + 0.1 * model.denoise(x, t, condition, [-2.0, 3.0], 0.5) + 0.2 * noise
        with model.observe(lambda name, array, seconds: None):
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(x).all()


def test_float32_has_the_digits_of_the_cpu() -> None:
    """TF32 would leave an error of some 1e-3."""
    ours = generate(pipeline_of("float32", graphs=True), steps=2).latents
    cpu = generate(load(FOLDER, backend="torch", device="cpu", dtype="float32"), steps=2).latents
    assert_close(ours, cpu, rms=1e-4)


def test_projections_are_joined() -> None:
    unet = pipeline_of("float16", graphs=True).model.unet  # pyright: ignore[reportAttributeAccessIssue]
    blocks = [module for name, module in unet.named_modules() if name.endswith("transformer_blocks.0")]
    joints = [unet.joint_times, *(block.attn1.joint for block in blocks)]
    with inference("cuda"):
        assert blocks and all(joint(joint.weight[:1]) is not None for joint in joints)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_recorded_training_steps_learn_what_ordinary_ones_do(stage: str, dtype: str) -> None:
    recorded, plain, cpu = (trainer_of(stage, dtype=dtype, device=device) for device in ("cuda", "cuda", "cpu"))
    plain._recorded = None
    ours, theirs, on_cpu = [], [], []
    for seed in range(6):
        if seed in (2, 4):  # AdamW divides a gradient by its own size: over more steps, what rounds in another order grows
            plain.load_state(recorded.state())
        for trainer, losses in ((plain, theirs), (recorded, ours), (cpu, on_cpu)):
            losses.append(trainer.step(make_batch(stage, seed), learning_rate=1e-2).loss)
    assert recorded._recorded._recording is not None
    np.testing.assert_allclose(
        ours, theirs, rtol=1e-5 if dtype == "float32" else 1e-2, atol=1e-5 if dtype == "float32" else 1e-2
    )
    np.testing.assert_allclose(
        ours, on_cpu, rtol=1e-3 if dtype == "float32" else 5e-2, atol=1e-3 if dtype == "float32" else 5e-2
    )


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_on_cuda_goes_on_from_its_state(stage: str) -> None:
    first, resumed = (trainer_of(stage, dtype="bfloat16", device="cuda") for _ in range(2))
    for seed in range(3):
        first.step(make_batch(stage, seed), learning_rate=1e-2)
    resumed.load_state(first.state())
    state = resumed.state()
    for name, array in first.state().items():
        np.testing.assert_array_equal(state[name], array)
    ours, theirs = (
        [each.step(make_batch(stage, seed), learning_rate=1e-2).loss for seed in range(3, 7)] for each in (resumed, first)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=1e-2)


SHAPES = [
    (8, 320, 32, 32),
    (2, 1920, 16, 16),
    (8, 2560, 8, 8),
    (2, 1280, 4, 4),
    (2, 960, 64, 64),
    (2, 128, 255, 131),
    (1, 64, 1, 1),
    (1, 128, 512, 512),
]


def channels_last(*shape: int, dtype: str) -> torch.Tensor:
    x = torch.randn(shape, device="cuda").to(getattr(torch, dtype))
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def without_kernels(monkeypatch: pytest.MonkeyPatch, call: Any) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr(cuda_fused, "is_for", lambda *arrays: False)
        return call()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_blocks_are_the_plain_ones(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: str) -> None:
    n, c = shape[:2]
    x, emb, tokens = (channels_last(*size, dtype=dtype) for size in (shape, (n, 12), (n, 45, c)))
    cases: list[tuple[torch.nn.Module, tuple[Any, ...]]] = [
        (ResnetBlock(c, 64, groups=32, eps=1e-5, time_embed_dim=12), (x, emb)),
        (ResnetBlock(c, c, groups=32, eps=1e-6), (x,)),
        (GroupNorm(32, c, eps=1e-6), (x + 30,)),
        (FeedForward(c), (tokens,)),
        (TransformerBlock(c, c // 8, context_dim=None, image_tokens=False), (tokens, None)),
    ]
    monkeypatch.setattr(cuda_fused, "_checked", set())
    for layer, given in cases:
        layer.to("cuda", getattr(torch, dtype)).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        with inference("cuda"):
            options = {"options": FUSED} if isinstance(layer, TransformerBlock) else {}
            ours = layer(*given, **options)
            plain = without_kernels(monkeypatch, partial(layer, *given, **options))
        assert ours.dtype == plain.dtype
        if isinstance(layer, GroupNorm):  # of one pixel PyTorch rounds the mean to the dtype, ours does not
            plain = F.group_norm(given[0].float(), layer.num_groups, eps=layer.eps)  # new layers have weights 1 and biases 0
        assert_close(ours.float().cpu(), plain.float().cpu(), rms=max(1e-5, DTYPES[dtype]))
    assert {kind for kind, *_ in cuda_fused._checked} == {"group norm", "layer norm", "sum", "GEGLU"}
    assert not cuda_fused._failed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("graphs", [True, False])
def test_a_run_with_fused_kernels_gives_what_one_without_does(
    monkeypatch: pytest.MonkeyPatch, graphs: bool, dtype: str
) -> None:
    ours = generate(pipeline_of(dtype, graphs=graphs))
    plain = without_kernels(monkeypatch, lambda: generate(pipeline_of(dtype, graphs=graphs)))
    assert not cuda_fused._failed
    assert_close(ours.latents, plain.latents, rms=max(1e-5, DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_decoded_together_and_by_a_recorded_call_are_those_decoded_alone(dtype: str) -> None:
    model = pipeline_of(dtype, graphs=True).model
    x = model.from_numpy(np.random.default_rng(0).standard_normal((3, 8, 8, 4), np.float32))
    alone = np.concatenate([model.decode(x[number : number + 1]) for number in range(3)])
    for _ in range(3):
        assert_close(model.decode(x), alone, rms=max(1e-5, DTYPES[dtype]))
    assert sum(len(entries) for entries in model._vae_graphs._entries.values()) == 1  # pyright: ignore[reportAttributeAccessIssue]
