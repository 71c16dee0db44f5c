"""Where the time of a run goes: the figures add up, cover the run, and come out the same on both backends where they must."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from helpers import BACKENDS, Backend

import mvshared.commands.profile
from mvshared.backend import load
from mvshared.blocks import Block, Call
from mvshared.cli import run
from mvshared.profiling import (
    BlockEvent,
    Cost,
    Profile,
    Recorder,
    Row,
    costs,
    parts,
    profile,
    rows,
    summarised,
    trace,
)
from mvshared.stages import Stage, Stages

FIXTURES = Path(__file__).parent / "fixtures"
STEPS = 2


class Picture:
    """An array of a shape."""

    dtype = "torch.float16"

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.nbytes = 1000


@pytest.fixture(scope="module", params=BACKENDS)
def measured(request: pytest.FixtureRequest) -> tuple[Profile, Backend]:
    pipeline: Any = load(FIXTURES / "tiny-imagedream", backend=request.param, device="cpu")
    picture = FIXTURES / "tiny-imagedream" / "input.png"

    def generate() -> None:
        pipeline.generate(picture, prompt="an owl", negative_prompt="", steps=STEPS)

    stages = pipeline.stages
    result = profile(pipeline, generate)
    assert pipeline.stages is stages
    return result, request.param


def test_the_times_of_stages_and_blocks_add_up_to_the_run(measured: tuple[Profile, Backend]) -> None:
    result, _ = measured
    assert sum(stage.seconds for stage in result.stages) + result.rest_seconds == pytest.approx(result.seconds, rel=1e-12)
    assert result.accounted == pytest.approx(sum(stage.seconds for stage in result.stages) / result.seconds)
    assert 0.5 < result.accounted <= 1
    assert sum(stage.seconds for stage in result.watched_stages) <= result.watched_seconds
    for stage in result.stages:
        blocks = [block for block in result.blocks if block.stage == stage.name]
        own = sum(block.own_seconds for block in blocks)
        assert own + stage.outside_seconds == pytest.approx(stage.watched_seconds, rel=1e-9)
        assert sum(row.own_seconds for row in stage.rows) == pytest.approx(own)
        assert sum(row.seconds for row in stage.rows if len(parts(row.name)) == 1) == pytest.approx(own)
        assert stage.outside_seconds >= 0
        assert sum(row.calls for row in stage.rows) == len(blocks)
    assert sum(cost.seconds for cost in result.costs) == pytest.approx(sum(block.own_seconds for block in result.blocks))
    assert sum(cost.flops for cost in result.costs) == sum(block.flops for block in result.blocks)


def test_every_stage_has_its_blocks(measured: tuple[Profile, Backend]) -> None:
    result, backend = measured
    assert [stage.name for stage in result.stages] == [
        "pictures",
        "image_encoder",
        "text_encoder",
        "vae_encoder",
        "condition",
        "unet",
        "vae_decoder",
    ]
    first = {stage.name: {parts(row.name)[0] for row in stage.rows} for stage in result.stages}
    assert first["image_encoder"] == {"image_encoder"}
    assert first["vae_encoder"] == {"vae.encoder", "vae.quant_conv"}
    assert first["condition"] == first["unet"] == {"unet"}
    calls = {row.name: row.calls for stage in result.stages for row in stage.rows if stage.name in ("unet", "vae_decoder")}
    assert (calls["unet"], calls["unet.conv_in"], calls["unet.down_blocks.0"], calls["vae.decoder"]) == (STEPS, STEPS, 0, 4)
    if backend == "mlx":
        assert all(stage.peak_bytes for stage in result.stages)
    assert {block.step for block in result.blocks if block.stage == "unet"} == {1, 2}
    assert {block.step for block in result.blocks if block.stage == "vae_decoder"} == {None}


def test_the_trace_nests_blocks_in_stages_and_stages_in_the_run(measured: tuple[Profile, Backend]) -> None:
    result, backend = measured
    document = json.loads(json.dumps(trace(result, title="a run", other={"backend": backend})))
    events = [event for event in document["traceEvents"] if event["ph"] == "X"]
    assert [event["cat"] for event in events].count("block") == len(result.blocks)
    around: list[dict[str, Any]] = []
    inside: defaultdict[str, float] = defaultdict(float)
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        while around and event["ts"] >= around[-1]["ts"] + around[-1]["dur"] - 1e-6:
            around.pop()
        if around:
            assert event["ts"] + event["dur"] <= around[-1]["ts"] + around[-1]["dur"] + 1e-6
        categories = [each["cat"] for each in around]
        assert categories[:2] == {"run": [], "stage": ["run"], "block": ["run", "stage"]}[event["cat"]]
        if event["cat"] == "block" and categories[-1] == "block" and around[-1]["args"]["kind"] != "TransformerBlock":
            assert event["name"].startswith(around[-1]["name"].rpartition(".")[0])
        inside[event["cat"]] += event["dur"]
        around.append(event)
    assert inside["stage"] <= inside["run"]
    conv = next(event for event in events if event["name"] == "unet.conv_in")
    assert conv["args"]["shape"] == [10, 16, 16, 32]
    assert conv["args"]["flops"] == 2 * 10 * 16 * 16 * 32 * 9 * 4
    assert (conv["args"]["kind"], conv["args"]["dtype"], conv["args"]["step"]) == ("Conv2d", "float32", 1)


def test_both_backends_do_the_same_work_in_the_same_places() -> None:
    found = []
    for backend in BACKENDS:
        pipeline: Any = load(FIXTURES / "tiny-mvdream", backend=backend, device="cpu")
        recorder = Recorder()
        with pipeline.model.observe_blocks(recorder.on_end, recorder.on_start):
            pipeline.stages = recorder.stages
            pipeline.generate(prompt="an owl", negative_prompt="", steps=1)
        found.append([(event.name, event.kind, event.work, event.stage, event.step, event.flops) for event in recorder.events])
        assert {cost.what for cost in costs(recorder.events)} >= {
            "3x3 convolutions of unet.up_blocks.0",
            "1x1 convolutions of vae.post_quant_conv",
            "self-attention of unet.mid_block",
            "cross-attention of unet.mid_block",
            "attention of text_encoder.encoder",
            "linear layers of text_encoder.encoder",
            "norms of vae.decoder.up_blocks.0",
        }
    assert found[0] == found[1]


def event(name: str, start: float, seconds: float, own: float, **values: Any) -> BlockEvent:
    given = {"kind": "Conv2d", "work": "3x3 convolutions", "stage": "unet", "step": 1, "flops": 10, "output_bytes": 5}
    return BlockEvent(name=name, start=start, seconds=seconds, own_seconds=own, shape=(1,), dtype="float32", **(given | values))


EVENTS = [
    event("unet.down.0.a", 1, 2, 2),
    event("unet.down.0.b", 3, 1, 1, work="norms", flops=0, output_bytes=7),
    event("unet", 0, 5, 2, work="rest", flops=0),
    event("unet.down.0.a", 6, 3, 3, step=2, output_bytes=9),
    event("unet", 5, 5, 2, work="rest", flops=0, step=2),
]


def test_a_block_within_others_counts_once_in_each_of_them() -> None:
    assert rows(EVENTS) == [
        Row("unet", 2, 10, 4, 20, 5),
        Row("unet.down.0", 0, 6, 0, 20, 0),
        Row("unet.down.0.a", 2, 5, 5, 20, 9),
        Row("unet.down.0.b", 1, 1, 1, 0, 7),
    ]


def test_costs_are_those_of_a_kind_of_work_at_a_level_and_the_largest_comes_first() -> None:
    assert costs(EVENTS) == (
        Cost("3x3 convolutions of unet.down.0", 5, 20),
        Cost("rest of unet", 4, 0),
        Cost("norms of unet.down.0", 1, 0),
    )


def test_stages_that_run_twice_are_one_with_the_higher_peak() -> None:
    plain = [Stage("vae_encoder", 0, 2, 2, 100, None), Stage("unet", 2, 5, 4, None, None)]
    plain += [Stage("vae_encoder", 7, 1, 1, 300, None)]
    watched = [Stage("unet", 0, 12, 11, None, None)]
    result = summarised(plain, watched, EVENTS, seconds=10, watched_seconds=13)
    encoder, unet = result.stages
    assert (encoder.name, encoder.calls, encoder.seconds, encoder.peak_bytes, encoder.rows) == ("vae_encoder", 2, 3, 300, ())
    assert (unet.seconds, unet.peak_bytes, unet.watched_seconds, unet.outside_seconds) == (4, None, 11, 1)
    assert (result.rest_seconds, result.accounted) == (3, pytest.approx(0.7))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unet", ["unet"]),
        ("unet.up_blocks.3.resnets.1.conv1", ["unet", "up_blocks.3", "resnets.1", "conv1"]),
        ("vae.decoder.up_blocks.0", ["vae.decoder", "up_blocks.0"]),
        ("vae.quant_conv", ["vae.quant_conv"]),
        ("text_encoder.encoder.layers.11.mlp", ["text_encoder", "encoder", "layers.11", "mlp"]),
    ],
)
def test_names_are_cut_where_one_looks_deeper(name: str, expected: list[str]) -> None:
    assert parts(name) == expected


def test_a_recorder_takes_the_blocks_inside_off() -> None:
    recorder = Recorder()
    recorder.stages, recorder.origin = Stages(), 100.0
    outer = {"name": "unet.a", "kind": "ResnetBlock", "depth": 0, "inputs": {}, "start": 101.0}
    inner = {"name": "unet.a.conv", "kind": "Conv2d", "depth": 1, "inputs": {"x": Picture(1, 8, 8, 3)}, "start": 102.0}
    recorder.on_start(Call(**outer))
    recorder.on_start(Call(**inner))
    out = Picture(1, 8, 8, 5)
    with recorder.stages("unet"):
        recorder.stages.step = 3
        recorder.on_end(Block(**inner, outputs={"unet.a.conv": out}, seconds=2.0, flops=2 * 8 * 8 * 5 * 3 * 49))
        recorder.on_end(Block(**outer, outputs={"unet.a": out}, seconds=5.0, flops=0))
    conv, block = recorder.events
    assert (conv.start, conv.seconds, conv.own_seconds, conv.work) == (2.0, 2.0, 2.0, "7x7 convolutions")
    assert (block.start, block.seconds, block.own_seconds, block.work) == (1.0, 5.0, 3.0, "activations, sums and copies")
    assert (conv.stage, conv.step, conv.output_bytes, conv.dtype) == ("unet", 3, 1000, "float16")


# The command line

COMMAND = ["profile", str(FIXTURES / "tiny-mvdream"), "--device", "cpu", "--prompt", "an owl", "--negative-prompt", ""]
COMMAND += ["--steps", "1", "--views", "2", "--size", "64"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_command_prints_stages_blocks_and_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: Backend
) -> None:
    assert run([*COMMAND, "--backend", backend, "--trace", str(tmp_path / "new" / "trace.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    for word in ("text_encoder", "condition", "unet", "vae_decoder", "the rest", "outside of blocks", "  up_blocks.1"):
        assert any(line.startswith(word) for line in lines), text
    assert not any("resnets" in line for line in lines)
    start = next(number for number, line in enumerate(lines) if line.startswith("the 3 largest costs"))
    assert all(" of unet." in line or " of vae." in line or " of text" in line for line in lines[start + 1 : start + 4]), text
    document = json.loads((tmp_path / "new" / "trace.json").read_text())
    assert document["otherData"]["backend"] == backend


def test_depth_shows_blocks_within_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*COMMAND, "--backend", "torch", "--depth", "3"]) == 0
    assert "    resnets.0" in capsys.readouterr().out
    assert run([*COMMAND, "--backend", "torch", "--depth", "1"]) == 0
    assert "up_blocks" not in capsys.readouterr().out.split("the 3 largest costs")[0]


def test_json_has_all_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*COMMAND, "--backend", "torch", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["backend"], document["dtype"], document["steps"], document["size_px"]) == ("torch", "float32", 1, 64)
    assert sum(stage["seconds"] for stage in document["stages"]) + document["rest_seconds"] == pytest.approx(
        document["seconds"]
    )
    rows_found = {row["name"]: row for stage in document["stages"] for row in stage["rows"]}
    assert rows_found["unet.mid_block.resnets.0.conv1"]["calls"] == 1
    assert document["costs"][0]["seconds"] >= document["costs"][1]["seconds"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "steps must be a whole number from 1 to"),
        (["--trace", "."], "trace must be a file"),
        (["--depth", "0"], "0 is not in the range x>=1"),
        (["--image", "picture.png"], "this model takes no picture"),
    ],
)
def test_what_cannot_be_profiled_is_refused(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert run([*COMMAND, "--backend", "torch", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_size_of_the_picture_that_stands_in_is_looked_at(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mvshared.commands.profile, "load", lambda *_, **__: pytest.fail("weights were read"))
    assert run(["profile", "demo", "--backend", "torch", "--device", "cpu", "--size", "-5"]) == 2
    assert run(["profile", "demo", "--backend", "torch", "--device", "cpu", "--views", "0"]) == 2
    assert run(["profile", "demo", "--image", "gone.png"]) == 3
    assert "size must be a whole number from" in capsys.readouterr().err


def test_a_model_with_pictures_gets_one_if_none_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["profile", "demo", "--backend", "torch", "--device", "cpu", "--steps", "1", "--views", "1", "--size", "64"]
    assert run(command) == 0
    assert "vae_encoder" in capsys.readouterr().out
