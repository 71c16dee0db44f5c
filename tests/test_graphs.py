"""Recorded calls, without a GPU: a recorder that keeps the call itself and repeats it on the same memory, as CUDA graphs do."""

import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_close, random_conditions
from torch import Tensor, nn
from upscalers import write_tiny_models

from mvshared.attention import FUSED, AttentionOptions
from mvshared.backend import load, load_upscaler
from mvshared.memory.plan import PLAIN, MemoryPlan
from mvshared.pipeline import Pipeline
from mvtorch.graphs import Graphs, Recording, graphs_on

FIXTURES = Path(__file__).parent / "fixtures"
FOLDER = FIXTURES / "tiny-imagedream"
PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


class Recorder:
    """Keeps what it records, and counts. As with a CUDA graph, a replay writes where the first call wrote."""

    def __init__(self, *, keeps: bool = True) -> None:
        self.keeps, self.is_busy, self.error = keeps, False, ""
        self.tries = self.recorded = self.replayed = 0

    def busy(self) -> bool:
        return self.is_busy

    def record(self, function: Callable[[], Tensor]) -> Recording:
        self.tries += 1
        if self.error:
            raise RuntimeError(self.error)
        self.recorded += 1
        out, kept = function(), function if self.keeps else None

        def replay() -> None:
            self.replayed += 1
            if kept is not None:
                out.copy_(kept())

        out.fill_(torch.nan)  # recording computes nothing
        return Recording(out, replay)


def pipeline_of(recorder: Recorder | None, folder: Path = FOLDER) -> Pipeline[Any]:
    pipeline: Pipeline[Any] = load(folder, backend="torch", device="cpu", dtype="float32")
    if recorder is not None:
        pipeline.model._graphs = Graphs(recorder)  # pyright: ignore[reportAttributeAccessIssue]
    return pipeline


def generate(pipeline: Pipeline[Any], **options: Any) -> Any:
    given = {"prompt": "an owl", "negative_prompt": "blurry", "views": 2, "size_px": 64, "steps": 6, "guidance": 3.0}
    picture = PICTURE if pipeline.model.config.unet.takes_pictures else None
    return pipeline.generate(picture, **(given | options))


RUNS: dict[str, Any] = {
    "guided": {},
    "guided in an interval": {"guidance_interval": (0.5, 1.0), "guidance_rescale": 0.5},
    "weighed references": {"reference_scale": 0.5},
    "noise in every step": {"eta": 1.0},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_run_with_recorded_calls_gives_what_one_without_does(options: dict[str, Any]) -> None:
    recorder = Recorder()
    recorded, plain = (generate(pipeline_of(each), **options).latents for each in (recorder, None))
    np.testing.assert_array_equal(recorded, plain)
    mixtures = 2 if "guidance_interval" in options else 1
    assert (recorder.recorded, recorder.replayed) == (mixtures, 6 - mixtures)  # the first call of each is an ordinary one


def test_branches_that_differ_only_in_what_they_attend_to_are_recorded_as_one_sample() -> None:
    recorder, options = Recorder(), {"guidance_interval": (0.5, 1.0)}
    recorded, plain = (generate(pipeline_of(each, FIXTURES / "tiny-mvdream"), **options).latents for each in (recorder, None))
    np.testing.assert_array_equal(recorded, plain)
    assert (recorder.recorded, recorder.replayed) == (2, 4)


def test_conditions_that_take_turns_keep_their_own_recordings_and_results_stay_what_they_were() -> None:
    recorder = Recorder()
    model, plain = pipeline_of(recorder).model, pipeline_of(None).model
    conditions = [random_conditions(model, seed=seed) for seed in (0, 1)]
    expected = [random_conditions(plain, seed=seed) for seed in (0, 1)]
    results: list[tuple[Any, Any]] = []
    for turn in range(4):
        x = np.random.default_rng(turn).standard_normal((2, 8, 8, 4), np.float32)
        for ours, theirs in zip(conditions, expected, strict=True):
            t = 900.0 - turn  # of which none is announced
            outs = model.guided(model.from_numpy(x), t, ours, [-2.0, 3.0])
            results += zip(outs, plain.guided(plain.from_numpy(x), t, theirs, [-2.0, 3.0]), strict=True)
    for out, reference in results:
        np.testing.assert_array_equal(model.to_numpy(out), plain.to_numpy(reference))
    assert (recorder.recorded, recorder.replayed) == (2, 6)


def test_blocks_that_are_observed_are_called() -> None:
    recorder, names = Recorder(), []
    pipeline = pipeline_of(recorder)
    expected = generate(pipeline_of(None)).latents
    condition = random_conditions(pipeline.model)
    x = pipeline.model.from_numpy(np.zeros((2, 8, 8, 4), np.float32))

    def step() -> None:
        pipeline.model.denoise(x, 500.0, condition, [-2.0, 3.0])

    with pipeline.model.observe(lambda name, array, seconds: names.append(name)):
        assert_close(generate(pipeline).latents, expected, rms=1e-5)  # packed layers run one by one, which rounds otherwise
        for _ in range(2):
            step()
        assert names.count("unet") == names.count("unet.conv_out") == 8
    assert recorder.tries == 0
    step()
    step()
    assert (recorder.recorded, recorder.replayed) == (1, 2)
    hook = pipeline.model.unet.mid_block.resnets[0].register_forward_hook(lambda *_: names.append("mine"))  # pyright: ignore[reportAttributeAccessIssue]
    step()
    assert names[-1] == "mine"
    hook.remove()
    step()
    assert (recorder.recorded, recorder.replayed) == (1, 3)


@pytest.mark.parametrize("plan", [MemoryPlan(networks_at_once=False), MemoryPlan(branches_at_once=False)])
def test_a_plan_that_saves_memory_records_nothing(plan: MemoryPlan) -> None:
    recorder = Recorder()
    pipeline = pipeline_of(recorder)
    pipeline.memory = plan
    expected = pipeline_of(None)
    expected.memory = plan
    np.testing.assert_array_equal(generate(pipeline).latents, generate(expected).latents)
    assert recorder.tries == 0
    assert PLAIN.networks_at_once and PLAIN.branches_at_once


def test_a_search_for_nan_records_nothing(tmp_path: Path) -> None:
    recorder = Recorder()
    generate(pipeline_of(recorder), check_numerics=tmp_path / "nan")
    assert recorder.tries == 0


def test_a_recording_that_fails_is_said_once_and_tried_no_more(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    recorder.error = "operation not permitted when stream is capturing\nand a second line"
    pipeline = pipeline_of(recorder)
    with caplog.at_level(logging.WARNING):
        first, second = (generate(pipeline, guidance_interval=(0.5, 1.0)).latents for _ in range(2))
    expected = generate(pipeline_of(None), guidance_interval=(0.5, 1.0)).latents
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(second, expected)
    assert recorder.tries == 1
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("mvtorch")]
    assert "could not be recorded (operation not permitted when stream is capturing)" in line


def test_the_upscaler_is_recorded_too(tmp_path: Path) -> None:
    recorder = Recorder()
    folder = write_tiny_models(tmp_path) / "x2"
    latents = np.random.default_rng(0).standard_normal((3, 8, 8, 4), np.float32)

    def upscaled(graphs: Graphs | None) -> Any:
        upscaler = load_upscaler(folder, backend="torch", device="cpu", dtype="float32")
        upscaler.model._graphs = graphs  # pyright: ignore[reportAttributeAccessIssue]
        return upscaler.upscale(latents, steps=4)

    np.testing.assert_array_equal(upscaled(Graphs(recorder)), upscaled(None))
    assert (recorder.recorded, recorder.replayed) == (1, 3)
    model: Any = load_upscaler(folder, backend="torch", device="cpu", dtype="float32").model
    model._graphs = Graphs(Recorder())
    condition = model.condition(latents, np.zeros(model.config.noise_channels, np.float32), text=None)
    outs = [
        model.denoise(model.from_numpy(np.full((3, 16, 16, 4), value, np.float32)), 0.1, condition, 1.0) for value in range(4)
    ]
    assert len({float(out.sum()) for out in outs}) == 4  # none was overwritten by a later one


# The recorder's book-keeping


class Network(nn.Linear):
    """What a network is to a recorder."""

    attention_options = FUSED

    def __init__(self) -> None:
        super().__init__(2, 2)


class Condition:
    """What a condition is to a recorder."""


def call(graphs: Graphs, network: Network, condition: Condition, *, rows: int = 3) -> None:
    with torch.inference_mode():
        graphs.call(network, condition, network.forward, [torch.ones(rows, 2, dtype=network.weight.dtype)])


def test_another_shape_dtype_and_way_of_attention_are_recorded_anew() -> None:
    recorder, network, condition = Recorder(keeps=False), Network(), Condition()
    graphs = Graphs(recorder)
    plain = AttentionOptions(implementation="plain")
    for rows, options, dtype, recorded in [
        (3, FUSED, torch.float32, 1),
        (4, FUSED, torch.float32, 2),
        (3, FUSED, torch.float32, 3),
        (3, plain, torch.float32, 4),
        (3, plain, torch.float64, 5),
    ]:
        network.to(dtype)
        network.attention_options = options
        for _ in range(3):
            call(graphs, network, condition, rows=rows)
        assert recorder.recorded == recorded
    assert recorder.replayed == 10


def test_decoding_is_recorded_anew_when_the_vae_has_other_weights() -> None:
    recorder, latents = Recorder(keeps=False), torch.zeros(1, 4, 4, 4)
    model: Any = pipeline_of(None).model
    model._vae_graphs = Graphs(recorder)
    for recorded in (1, 2):
        for _ in range(3):
            model.decode(latents)
        assert recorder.recorded == recorded
        for parameter in model.vae.parameters():
            parameter.data = 1.5 * parameter
    assert recorder.replayed == 4


def test_large_views_and_plans_that_spare_memory_are_decoded_without_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(keeps=False)
    model: Any = pipeline_of(None).model
    model._vae_graphs = Graphs(recorder)
    monkeypatch.setattr("mvtorch.latents._RECORDED_PIXELS", 32 * 32)
    for size, plan, tries in (((4, 5), PLAIN, 0), ((4, 4), MemoryPlan(networks_at_once=False), 0), ((4, 4), PLAIN, 1)):
        with model.planned(plan):
            for _ in range(3):
                model.decode(torch.zeros(1, *size, 4))
        assert recorder.tries == tries


def test_gradients_and_recordings_of_the_program_around_get_an_ordinary_call() -> None:
    recorder, network, condition = Recorder(), Network(), Condition()
    graphs = Graphs(recorder)
    outs = [graphs.call(network, condition, network.forward, [torch.ones(3, 2)]) for _ in range(3)]
    assert all(out.requires_grad for out in outs)
    recorder.is_busy = True
    for _ in range(3):
        call(graphs, network, condition)
    assert recorder.tries == 0


def test_a_recording_goes_with_its_condition_and_with_its_network() -> None:
    recorder, network = Recorder(keeps=False), Network()
    graphs = Graphs(recorder)
    conditions = [Condition(), Condition()]
    for turn in range(6):
        call(graphs, network, conditions[turn % 2])
    assert [len(entries) for entries in graphs._entries.values()] == [2]
    del conditions[0]
    gc.collect()
    assert [len(entries) for entries in graphs._entries.values()] == [1]
    del network
    gc.collect()
    assert len(graphs._entries) == 0


def test_a_network_that_was_dropped_and_read_again_is_recorded_anew() -> None:
    recorder = Recorder(keeps=False)
    model = pipeline_of(recorder).model
    condition = random_conditions(model)
    x = model.from_numpy(np.zeros((2, 8, 8, 4), np.float32))
    for recorded in (1, 2):
        for _ in range(3):
            model.denoise(x, 500.0, condition, [-2.0, 3.0])
        assert recorder.recorded == recorded
        model.release("unet")


def test_there_are_recordings_on_cuda_alone() -> None:
    assert graphs_on("cpu") is None
    assert isinstance(graphs_on("cuda:1"), Graphs)
