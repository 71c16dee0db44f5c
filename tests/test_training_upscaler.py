"""Training of a latent upscaler: its batches, a run on tiny captures, and what the trained folder can do."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import TINY_MODEL, assert_close, write_tiny_model
from training_cases import SIZE, run, toml, vae_config, weights_of, write_objects

import mvshared.training.kept
import mvshared.training.loop
import mvshared.training.upscaler
import mvshared.training.upscaler_data
from mvshared.backend import load, load_upscaler
from mvshared.camera import orbit
from mvshared.captures import load_capture, write_capture
from mvshared.checkpoint import read_vae_config
from mvshared.config import Framing, KUNetConfig
from mvshared.conversion.networks import network_shapes
from mvshared.errors import ConfigError, DatasetError, OptionError, OutputError
from mvshared.heads import DEFAULT_FOV_DEG, render
from mvshared.heads.dataset import dataset_poses
from mvshared.images import from_model
from mvshared.training.config import TrainConfig, load_train_config
from mvshared.training.data import read_picture
from mvshared.training.initial import initial_upscaler_weights
from mvshared.training.kept import load_arrays
from mvshared.training.log import read_log
from mvshared.training.samples import sample_writer
from mvshared.training.upscaler_data import LatentPairs, UpscalerBatches, _noisy, encode_pairs, halved
from mvshared.upscaling.config import SigmaConfig
from mvshared.upscaling.folder import is_upscaler, read_upscaler_config

NETWORK = KUNetConfig(block_out_channels=(32, 32), layers_per_block=1, attention_levels=(False, False), time_cond_proj_dim=6)
MODEL = replace(TINY_MODEL, vae=replace(TINY_MODEL.vae, block_out_channels=(16, 32)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_objects(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), MODEL)


def config(data: Path, model: Path, **changes: Any) -> TrainConfig:
    own: dict[str, Any] = {"stage": "upscaler", "vae": None, "vae_from": str(model), "upscaler": NETWORK}
    return vae_config(data, **(own | {"family": "tiny-x2"} | changes))


def pairs(count: int = 6) -> LatentPairs:
    random = np.random.default_rng(0)
    low, high = (random.standard_normal((count, size, size, 4)).astype(np.float16) for size in (4, 8))
    return LatentPairs(low, high)


def test_the_vae_may_be_that_of_a_run_of_its_stage(data: Path, tmp_path: Path) -> None:
    vae = run(vae_config(data, steps=1), tmp_path / "vae")
    upscaler = run(config(data, vae, steps=1, model_dtype="float16"), tmp_path / "run")
    assert {array.dtype.name for array in weights_of(tmp_path / "run", "unet").values()} == {"float16"}
    assert not (vae / "model_index.json").exists()
    assert read_upscaler_config(upscaler).vae == read_vae_config(vae)


def test_a_batch_holds_what_undoes_its_noise() -> None:
    """From the sample, the noise level and the target, the clean latents come back: x_0 = signal x_t + noise target."""
    found = UpscalerBatches(pairs(), SigmaConfig(), channels=6, frequencies=(0.0, 1.0, 2.0)).batch(3, size=40, seed=1)
    sigma = np.exp(4 * found.noise)[:, None, None, None, None]
    signal = 1 / np.sqrt(sigma**2 + 1)
    clean = signal * found.sample[..., :4] + sigma * signal * found.target
    known = pairs().high.astype(np.float32)
    errors = np.abs(clean - known[None]).reshape(40, 6, -1).max(axis=-1)
    assert errors.min(axis=1).max() < 1e-3
    assert found.sample.shape == (40, 1, 8, 8, 8)
    assert 0.02 < sigma.min() < 0.1 and 5 < sigma.max() < 15
    low = found.sample[..., 4:]
    np.testing.assert_array_equal(low[:, :, ::2, ::2], low[:, :, 1::2, 1::2])  # every latent twice in both directions


def test_low_resolution_latents_are_those_of_the_same_picture_or_noised_as_the_condition_says() -> None:
    frequencies = (0.0, 1.0, 2.0)
    found = UpscalerBatches(pairs(), SigmaConfig(), channels=6, frequencies=frequencies).batch(0, size=200, seed=0)
    clean = found.condition[:, 3:].any(axis=1) == 0  # sines of the level
    assert 0.35 < clean.mean() < 0.65
    known = pairs().low.astype(np.float32)
    low = found.sample[:, 0, ::2, ::2, 4:]
    distance = np.abs(low[:, None] - known[None]).reshape(200, 6, -1).max(axis=-1).min(axis=1)
    assert distance[clean].max() == 0
    assert distance[~clean].min() > 0
    np.testing.assert_allclose(found.condition[:, 0], 1)


def test_batches_are_drawn_from_seed_and_step() -> None:
    batches = UpscalerBatches(pairs(), SigmaConfig(), channels=6, frequencies=(0.0, 1.0, 2.0))
    first, again, other = batches.batch(1, size=2, seed=0), batches.batch(1, size=2, seed=0), batches.batch(2, size=2, seed=0)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.sample, other.sample)


def test_pairs_are_encoded_at_both_sizes(data: Path) -> None:
    settings = vae_config(data).data
    folders = sorted(data.iterdir())[:2]
    found = encode_pairs(folders, settings, lambda pixels: pixels[:, ::2, ::2], multiple=4)
    assert found.high.shape == (24, SIZE // 2, SIZE // 2, 3)  # six views and their mirror images, of two objects
    assert found.low.shape == (24, SIZE // 4, SIZE // 4, 3)
    picture = read_picture(folders[0] / "view_000.png", background=settings.background).pixels
    np.testing.assert_allclose(found.low[0], halved(picture[None])[0, ::2, ::2], atol=1e-3)
    with pytest.raises(DatasetError, match="a multiple of 32 pixels"):
        encode_pairs(folders, settings, lambda pixels: pixels, multiple=32)


def test_a_run_learns_and_its_folder_upscales(data: Path, model: Path, tmp_path: Path) -> None:
    settings = config(data, model, steps=60, batch_size=8, checkpoint_every=30, sample_every=60)
    write = sample_writer(settings, tmp_path / "run", backend="torch", device="cpu")
    trained = run(settings, tmp_path / "run", on_sample=write)
    losses = [row.held_out_loss for row in read_log(tmp_path / "run" / "log.csv") if row.held_out_loss is not None]
    assert losses[-1] < losses[0] < 0.6
    assert (tmp_path / "run" / "samples" / "step_000060.png").exists()
    assert is_upscaler(trained)
    assert read_vae_config(trained) == MODEL.vae
    upscaler = load_upscaler(trained, backend="torch", device="cpu")
    latents = np.random.default_rng(0).standard_normal((2, 4, 4, 4), np.float32)
    assert_close(
        load_upscaler(trained, backend="mlx", device="cpu").upscale(latents, noise_level=0.3),
        upscaler.upscale(latents, noise_level=0.3),
        rms=1e-3,
    )


def test_the_frequencies_of_time_are_not_trained(data: Path, model: Path, tmp_path: Path) -> None:
    settings = config(data, model, steps=4, frozen=("conv_in.",))
    start = initial_upscaler_weights(network_shapes(NETWORK, backend="torch"), seed=settings.seed)
    after = weights_of(run(settings, tmp_path / "run").parent, "unet")
    same = {name for name, array in start.items() if np.array_equal(array, after[name])}
    assert same == {name for name in start if name.startswith(("time_proj.", "conv_in."))}


def test_a_killed_run_goes_on_to_the_same_weights(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(data, model, steps=4, checkpoint_every=2)
    whole = run(settings, tmp_path / "whole")
    original, calls = mvshared.training.loop.learning_rate, iter(range(100))

    def killed(*args: Any, **kwargs: Any) -> float:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(mvshared.training.loop, "learning_rate", killed)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "killed")
    monkeypatch.undo()
    resumed = run(settings, tmp_path / "killed")
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (resumed / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_run_that_began_with_another_vae_is_refused(data: Path, tmp_path: Path) -> None:
    vae = run(vae_config(data, steps=1, vae=MODEL.vae), tmp_path / "vae")
    kept = run(config(data, vae, steps=1), tmp_path / "run") / "vae/diffusion_pytorch_model.safetensors"
    before = kept.read_bytes()
    run(vae_config(data, steps=2, vae=MODEL.vae), tmp_path / "vae")
    with pytest.raises(OutputError, match="holds a run with another VAE than that of"):
        run(config(data, vae, steps=2), tmp_path / "run")
    assert kept.read_bytes() == before


def test_a_run_that_holds_nothing_out_has_no_held_out_loss(data: Path, model: Path, tmp_path: Path) -> None:
    settings = config(data, model, steps=1)
    run(replace(settings, data=replace(settings.data, held_out=0.0)), tmp_path / "run")
    assert [row.held_out_loss for row in read_log(tmp_path / "run" / "log.csv")] == [None]


def test_wrong_configurations_are_refused(data: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="upscaler must be a table of KUNetConfig fields, and vae_from"):
        config(data, model, upscaler=None)
    text = replace(NETWORK, attention_levels=(True, False), attention_head_dim=32, cross_attention_dim=8)
    with pytest.raises(OptionError, match="upscalers that are trained here take no text"):
        config(data, model, upscaler=text)
    with pytest.raises(DatasetError):
        run(config(tmp_path / "nowhere", model), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    small = np.full((2, 4, 4, 4), 255, np.uint8)
    for number in range(2):
        write_capture(tmp_path / "small" / f"{number}", small, None, orbit((0.0, 90.0), 0.0), 40.0)
    with pytest.raises(DatasetError, match=r"view_000.png: width and height must be at least 8 for this model, got 4 x 4"):
        run(config(tmp_path / "small", model), tmp_path / "run")
    scaled = write_tiny_model(tmp_path / "scaled", replace(MODEL, vae=replace(MODEL.vae, scaling_factor=0.5)))
    with pytest.raises(OptionError, match="views_from must be of the same latents"):
        run(config(data, model, views_from=str(scaled)), tmp_path / "run")
    with pytest.raises(ConfigError, match="the upscaler has 8 latent channels, the VAE of vae_from 4"):
        run(config(data, model, upscaler=replace(NETWORK, in_channels=16, out_channels=9)), tmp_path / "run")


def test_the_configuration_is_read_from_toml(data: Path, model: Path, tmp_path: Path) -> None:
    settings = config(data, model)
    (tmp_path / "config.toml").write_text(toml(settings))
    assert load_train_config(tmp_path / "config.toml") == settings


def test_a_share_of_the_examples_begins_where_a_run_does(data: Path, model: Path) -> None:
    batches = UpscalerBatches(pairs(), SigmaConfig(), channels=6, frequencies=(0.0, 1.0, 2.0), first_step_share=0.5)
    noise = batches.batch(0, size=400, seed=0).noise
    assert 0.4 < (noise == noise.max()).mean() < 0.6
    assert np.exp(4 * noise.max()) == pytest.approx(14.6146, rel=1e-4)
    with pytest.raises(OptionError, match="first_step_share must be 0 to 1"):
        config(data, model, first_step_share=1.5)


def test_a_run_from_another_upscaler_keeps_its_frequencies(data: Path, model: Path, tmp_path: Path) -> None:
    first = run(config(data, model, steps=1, seed=3), tmp_path / "first")
    second = run(config(data, model, steps=1, seed=4, init_from=str(first)), tmp_path / "second")
    other = run(config(data, model, steps=1, seed=4), tmp_path / "other")
    found = [read_upscaler_config(folder).noise_frequencies for folder in (first, second, other)]
    assert found[0] == found[1] != found[2]


def test_a_share_of_the_examples_starts_from_views_that_a_model_generates(model: Path, tmp_path: Path) -> None:
    for number in range(3):
        poses = dataset_poses(number, views=3)
        pictures = render(number, poses, size_px=32)
        write_capture(tmp_path / "heads" / f"head_{number}", pictures.rgba, pictures.normals, poses, DEFAULT_FOV_DEG)
    settings = config(tmp_path / "heads", model, steps=1, views_from=str(model), generated_captures=1)
    run(settings, tmp_path / "run")
    (path,) = (tmp_path / "run").glob("pairs-generated-*.npz")
    found = load_arrays(path, LatentPairs)
    assert (found.low.shape, found.high.shape) == ((3, 8, 8, 4), (3, 16, 16, 4))
    capture = load_capture(tmp_path / "heads" / "head_0")
    # The azimuths are 31, 336 and 47 degrees: the second view is nearest to the front.
    front = read_picture(capture.image_paths[1], background=settings.data.background).pixels
    pipeline = load(model, backend="torch", device="cpu")
    expected = pipeline.generate(from_model(halved(front)), cameras=capture.poses, size_px=16).latents
    np.testing.assert_allclose(found.low, expected, atol=2e-2)


def test_a_run_killed_while_it_makes_pairs_takes_over_what_is_done(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    white = np.full((2, 32, 32, 4), 255, np.uint8)
    for number in range(4):
        write_capture(tmp_path / "data" / f"{number}", white, None, orbit((0.0, 90.0), 0.0), 40.0)
    monkeypatch.setattr(mvshared.training.kept, "PART", 1)
    read, calls = mvshared.training.upscaler_data.read_picture, list[str]()

    def counted(path: Path, **options: Any) -> Any:
        calls.append(path.parent.name)
        if len(calls) in (4, 12):  # of the second capture's generated views, and of the third one's encoded ones
            raise KeyboardInterrupt
        return read(path, **options)

    settings = config(tmp_path / "data", model, steps=1, views_from=str(model), generated_captures=2)
    monkeypatch.setattr(mvshared.training.upscaler_data, "read_picture", counted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(settings, tmp_path / "run")
    run(settings, tmp_path / "run")
    assert "".join(calls) == "0011" + "11" + "001122" + "22" + "33"
    run(settings, tmp_path / "whole")
    names, whole = (sorted(path.name for path in (tmp_path / name).glob("pairs-*")) for name in ("run", "whole"))
    assert names == whole and len(names) == 3
    for name in names:
        ours, expected = (load_arrays(tmp_path / folder / name, LatentPairs) for folder in ("run", "whole"))
        np.testing.assert_array_equal(ours.low, expected.low)
        np.testing.assert_array_equal(ours.high, expected.high)


def test_views_are_generated_in_groups_of_references_as_they_are(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cameras, reference = orbit([0.0, 90.0, 180.0], 0.0), np.full((16, 16, 3), 255, np.uint8)
    reference[2:5, 3:9] = 0  # small, and not where the model's framing puts a subject
    framed = tmp_path / "framed"
    shutil.copytree(model, framed)
    index = json.loads((framed / "model_index.json").read_text())
    (framed / "model_index.json").write_text(json.dumps(index | {"framing": asdict(Framing(mode="subject"))}))
    settings = config(tmp_path, framed, views_from=str(framed))
    monkeypatch.setattr(mvshared.training.upscaler, "MAX_VIEWS", 2)
    made = mvshared.training.upscaler._view_maker(settings, backend="torch", device="cpu")(reference, cameras)
    pipeline = load(model, backend="torch", device="cpu")
    pipeline.model.config = replace(pipeline.model.config, framing=Framing(mode="none"))
    expected = [pipeline.generate(reference, cameras=part, size_px=16).latents for part in (cameras[:2], cameras[2:])]
    np.testing.assert_array_equal(made, np.concatenate(expected))


def test_the_generated_share_is_drawn_in_pairs() -> None:
    generated = LatentPairs(np.full((1, 4, 4, 4), 7, np.float16), np.full((1, 8, 8, 4), 9, np.float16))
    options = {"channels": 6, "frequencies": (0.0, 1.0, 2.0)}
    batches = UpscalerBatches(pairs(), SigmaConfig(), generated=generated, generated_share=0.25, **options)  # type: ignore[arg-type]
    found = batches.batch(0, size=400, seed=0)
    sigma = np.exp(4 * found.noise)[:, None, None, None, None]
    signal = 1 / np.sqrt(sigma**2 + 1)
    clean = signal * found.sample[..., :4] + sigma * signal * found.target
    ours = np.abs(clean - 9).max(axis=(1, 2, 3, 4)) < 0.1
    assert 0.18 < ours.mean() < 0.32
    plain = ~found.condition[:, 3:].any(axis=1)
    assert (found.sample[ours & plain, ..., 4:] == 7).all()
    assert (found.sample[~ours & plain, ..., 4:] != 7).any(axis=(1, 2, 3, 4)).all()


def test_noised_latents_keep_their_variance() -> None:
    random = np.random.default_rng(0)
    low = random.standard_normal((3, 1, 64, 64, 4)).astype(np.float32)
    found = _noisy(low, np.array([0.0, 0.5, 1.0]), random)
    np.testing.assert_array_equal(found[0], low[0])
    np.testing.assert_allclose(found.std(axis=(1, 2, 3, 4)), 1, atol=0.03)


def test_adaptive_norms_begin_as_plain_ones() -> None:
    shapes = {"time_proj.weight": (8,), "down_blocks.0.resnets.0.norm1.linear.weight": (8, 4), "conv_in.weight": (8, 4, 1, 1)}
    weights = initial_upscaler_weights(shapes, seed=0)
    assert not weights["down_blocks.0.resnets.0.norm1.linear.weight"].any()
    assert weights["conv_in.weight"].any() and weights["time_proj.weight"].std() > 0.3
