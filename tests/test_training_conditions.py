"""Training a network with text and image tokens: GAF from ImageDream's weights, on tiny data."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, Backend, assert_close, assert_different
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import load_file, save_file
from training_cases import SIZE, run, some_latents, weights_of, write_objects

import mvshared.training.conditions
import mvshared.training.kept
from mvshared.backend import load
from mvshared.captures import load_capture
from mvshared.checkpoint import read_model_config, weight_files
from mvshared.clip_images import clip_pixels
from mvshared.config import SchedulerConfig
from mvshared.conversion.gaf import init_gaf
from mvshared.errors import DatasetError, NumericsError, OptionError
from mvshared.inspection import inspect
from mvshared.training.conditions import encode_conditions
from mvshared.training.config import DataConfig, OptimizerConfig, TrainConfig
from mvshared.training.data import ViewBatches, encode_captures, reference_pictures
from mvtorch.model import load_network

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_objects(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def gaf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gaf") / "gaf"
    init_gaf(FIXTURES / "tiny-imagedream", folder)
    return folder


def config(data: Path, gaf: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "stage": "unet",
        "data": DataConfig(folder=str(data), held_out=0.25, targets=2, reference_dropout=0.25, prompt="a ball"),
        "steps": 3,
        "batch_size": 2,
        "checkpoint_every": 2,
        "log_every": 1,
        "sample_every": 1,
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
        "init_from": str(gaf),
    }
    return TrainConfig(**(values | changes))


def test_both_backends_learn_the_same_and_leave_a_whole_model(data: Path, gaf: Path, tmp_path: Path) -> None:
    # With a small eps, Adam makes steps of one size from gradients that are nothing but rounding.
    smooth = config(data, gaf, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=1, eps=1e-2))
    models = {backend: run(smooth, tmp_path / backend, backend=backend) for backend in BACKENDS}
    before = weights_of(tmp_path / "torch", "unet")  # of the averages
    after = weights_of(tmp_path / "mlx", "unet")
    for name, weight in before.items():
        assert_close(after[name], weight, rms=1e-2)
    source = load_network(read_model_config(gaf).unet, weight_files(gaf, "unet"), dtype="float32", device="cpu").state_dict()
    for name in ("conv_in.weight", "image_embed.latents", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k_ip.weight"):
        assert np.abs(before[name] - source[name].numpy()).max() > 1e-5, name
    assert np.abs(before["conv_in.weight"][:, 4:]).max() > 0  # the normal maps have begun to count
    for model in models.values():
        assert not inspect(model).faults
        config_before, size_px = read_model_config(gaf), SIZE
        assert config_before.defaults.size_px != size_px
        expected = replace(config_before, defaults=replace(config_before.defaults, size_px=size_px, negative_prompt=""))
        assert read_model_config(model) == expected
        views = load(model, backend="torch", device="cpu").generate(
            FIXTURES / "tiny-imagedream" / "input.png", prompt="an owl", negative_prompt="", steps=1, size_px=128
        )
        assert views.images.shape == (4, 128, 128, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_run_goes_on_without_encoding_again(
    backend: Backend, data: Path, gaf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(model: Path, step: int) -> None:
        raise KeyboardInterrupt

    run(config(data, gaf), tmp_path / "whole", backend=backend)
    with pytest.raises(KeyboardInterrupt):  # after the first step: there is no state yet
        run(config(data, gaf), tmp_path / "broken", backend=backend, on_sample=break_off)

    def never(*args: Any) -> Any:
        raise AssertionError("encoded again")

    monkeypatch.setattr(mvshared.training.conditions, "reference_pictures", never)
    run(config(data, gaf), tmp_path / "broken", backend=backend)
    broken = weights_of(tmp_path / "broken", "unet")
    for name, weight in weights_of(tmp_path / "whole", "unet").items():
        np.testing.assert_array_equal(broken[name], weight)


@pytest.mark.parametrize(
    ("network", "weight", "message"),
    [
        ("vae", "encoder.conv_in.weight", r"^vae: latents of the pictures in \S*object_0 are not finite in float16"),
        ("image_encoder", "embeddings.class_embedding", r"^image_encoder: states of the pictures in \S*object_0"),
        ("text_encoder", "encoder.layers.1.mlp.fc1.weight", r"^text_encoder: states of the prompt are not finite \("),
        ("unet", "conv_out.weight", r"^training step 0: loss nan, gradient norm nan \("),
    ],
)
def test_damaged_weights_are_told_from_a_rate_that_is_too_high(
    network: str, weight: str, message: str, data: Path, gaf: Path, tmp_path: Path
) -> None:
    damaged = shutil.copytree(gaf, tmp_path / "gaf")
    (path,) = (damaged / network).glob("*.safetensors")
    tensors = load_file(path)
    tensors[next(name for name in tensors if name.endswith(weight))].flat[0] = np.nan
    save_file(tensors, path)
    with pytest.raises(NumericsError, match=message) as caught:
        run(config(data, damaged), tmp_path / "run", backend="torch")
    assert re.search(r"are the weights of .* damaged\?", caught.value.hint)
    if network == "unet":
        with pytest.raises(NumericsError, match=r"\(train in float32, or are the weights of .* damaged\?"):
            run(config(data, damaged, dtype="bfloat16"), tmp_path / "half", backend="torch")
    kept = {"vae": "latents-*", "unet": "state.*"}.get(network, "reference-states-*")
    assert not list((tmp_path / "run").glob(kept))


def test_a_damaged_file_of_image_states_says_what_to_do(data: Path, gaf: Path, tmp_path: Path) -> None:
    run(config(data, gaf, steps=1), tmp_path / "run")
    (path,) = (tmp_path / "run").glob("reference-states-training-*.npy")
    whole = path.read_bytes()
    for length in (len(whole) // 2, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(DatasetError, match=r"is no file of image states.*remove it, it is made anew"):
            run(config(data, gaf, steps=2), tmp_path / "run")
    path.unlink()
    run(config(data, gaf, steps=2), tmp_path / "run")
    assert path.read_bytes() == whole


def test_references_are_in_the_order_of_the_latents(data: Path) -> None:
    folders = sorted(data.glob("object_*"))
    settings = DataConfig(folder=str(data), reference_max_azimuth_deg=50.0)
    latents = encode_captures(folders, settings, lambda pixels: pixels[:, ::8, ::8, :1])
    pictures = [read() for folder in folders for read in reference_pictures(folder, settings)]  # mirrored ones, too
    rows = np.flatnonzero(np.abs(latents.azimuths_deg) <= 50)
    assert len(rows) == len(pictures) > len(folders)
    for row, picture in zip(rows, pictures, strict=True):
        expected = latents.images[row].astype(np.float32)
        assert_close((picture.astype(np.float32) / 127.5 - 1)[::8, ::8, :1], expected, rms=1e-2)


def test_image_states_are_those_of_the_references(data: Path, gaf: Path, tmp_path: Path) -> None:
    run(config(data, gaf, steps=1), tmp_path / "run")
    (path,) = (tmp_path / "run").glob("reference-states-training-*.npy")
    states = np.load(path)
    settings = config(data, gaf).data
    pictures = [read() for folder in sorted(data.glob("object_*"))[:3] for read in reference_pictures(folder, settings)]
    pipe = load(gaf, backend="torch", device="cpu")
    processor = pipe.model.config.image_processor
    assert processor is not None
    assert len(states) == len(pictures)
    for state, picture in zip(states, pictures, strict=True):
        expected = pipe.model.to_numpy(pipe.model.encode_image(clip_pixels(picture, processor)[None]))[0]
        assert_close(state, expected, rms=2e-3)
    assert_different(states[0], states[-1], rms=1e-3)


def test_a_reference_goes_with_its_own_image_state() -> None:
    latents = some_latents()
    settings = DataConfig(folder="", targets=2, reference_dropout=0.0)
    is_reference = settings.may_be_references(latents.azimuths_deg)
    rows = np.flatnonzero(is_reference)
    states = np.broadcast_to(latents.images[rows, 0, 0, 0][:, None, None], (len(rows), 3, 5))
    options: dict[str, Any] = {"normal_channels": 0, "image_states": states}
    batch = ViewBatches(latents, settings, SchedulerConfig(), **options).batch(0, size=20, seed=0)
    assert batch.image_states is not None
    np.testing.assert_array_equal(batch.image_states[:, 0, 0], batch.reference[:, 0, 0, 0])
    with pytest.raises(
        DatasetError, match=f"{len(rows)} views may be references, and there are image states of {len(rows) - 1}"
    ):
        ViewBatches(latents, settings, SchedulerConfig(), **{**options, "image_states": states[1:]})


def test_a_run_killed_while_it_encodes_references_takes_over_what_is_done(
    data: Path, gaf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mvshared.training.kept, "PART", 1)
    read, calls = mvshared.training.conditions.reference_pictures, list[Path]()

    def counted(folder: Path, settings: DataConfig) -> Any:
        calls.append(folder)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(folder, settings)

    monkeypatch.setattr(mvshared.training.conditions, "reference_pictures", counted)
    with pytest.raises(KeyboardInterrupt):
        run(config(data, gaf, steps=1), tmp_path / "run")
    run(config(data, gaf, steps=1), tmp_path / "run")
    assert [folder.name for folder in calls] == ["object_0", "object_1", "object_2", "object_2", "object_3"]
    run(config(data, gaf, steps=1), tmp_path / "whole")
    ours, expected = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("reference-states-*")} for name in ("run", "whole")
    )
    assert ours == expected and len(ours) == 2


def test_a_network_with_encoders_comes_whole(data: Path, gaf: Path) -> None:
    unet = read_model_config(gaf).unet
    with pytest.raises(OptionError, match="cross_attention_dim must be left out: a model with encoders comes whole"):
        config(data, gaf, unet=unet, vae_from=str(gaf))
    with pytest.raises(OptionError, match="unet must be a table of UNetConfig fields, and vae_from,"):
        config(data, gaf, init_from=None)


def test_states_of_changed_pictures_or_of_another_encoder_are_not_taken(data: Path, gaf: Path, tmp_path: Path) -> None:
    source, captures = shutil.copytree(gaf, tmp_path / "gaf"), shutil.copytree(data, tmp_path / "data")
    folders = sorted(captures.glob("object_*"))[:1]

    def states() -> NDArray[np.float16]:
        settings, given = config(data, gaf).data, [("training", folders)]
        model = read_model_config(source)
        (found,) = encode_conditions(source, model, settings, given, tmp_path / "run", backend="torch", device="cpu")
        assert found.image_states is not None
        return np.array(found.image_states)

    first = states()
    for path in load_capture(folders[0]).image_paths:
        Image.open(path).convert("L").convert("RGB").save(path)
    second = states()
    assert not np.array_equal(first, second)
    (file,) = weight_files(source, "image_encoder")
    save_file({name: weight / 2 for name, weight in load_file(file).items()}, file)
    assert not np.array_equal(second, states())
    assert len(list((tmp_path / "run").glob("reference-states-*"))) == 1


def test_a_dropped_reference_has_no_image_state() -> None:
    latents, settings = some_latents(), DataConfig(folder="", targets=2, reference_dropout=0.5)
    rows = np.flatnonzero(settings.may_be_references(latents.azimuths_deg))
    states = np.broadcast_to(latents.images[rows, 0, 0, 0][:, None, None], (len(rows), 3, 5))
    batches = ViewBatches(latents, settings, SchedulerConfig(), normal_channels=0, image_states=states)
    batch = batches.batch(0, size=20, seed=0)
    assert batch.image_states is not None and batch.reference is not None
    np.testing.assert_array_equal(batch.image_states[:, 0, 0], batch.reference[:, 0, 0, 0])
    assert (batch.image_states == 0).all((1, 2)).any()
