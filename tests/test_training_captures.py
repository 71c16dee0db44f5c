"""What captures may be like, and what may happen to them between two calls of a run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from training_cases import SIZE, UNET, VAE, run, unet_config, vae_config, weights_of, write_object, write_objects

from mvshared.camera import orbit
from mvshared.captures import load_capture, write_capture
from mvshared.checkpoint import read_model_config, read_vae_config
from mvshared.config import GenerationDefaults, SchedulerConfig
from mvshared.errors import DatasetError, MvWarning, OptionError, OutputError
from mvshared.framing import frame_picture
from mvshared.images import load_image, to_model
from mvshared.training import loop
from mvshared.training.checks import check_sizes
from mvshared.training.config import DataConfig, TrainConfig
from mvshared.training.data import (
    Latents,
    ViewBatches,
    encode_captures,
    find_captures,
    read_picture,
    reference_pictures,
)
from mvshared.training.kept import load_arrays
from mvshared.training.samples import sample_writer


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_objects(tmp_path / "data")


@pytest.fixture
def vae(data: Path, tmp_path: Path) -> Path:
    return run(vae_config(data, steps=2), tmp_path / "vae")


def with_samples(config: TrainConfig, folder: Path) -> Path:
    return run(config, folder, on_sample=sample_writer(config, folder, backend="torch", device="cpu"))


def shortened(folder: Path, *, views: int) -> None:
    """Leave the first views of a capture."""
    capture = load_capture(folder)
    rgba, normals = (
        np.stack([np.asarray(Image.open(path)) for path in paths[:views] if path is not None])
        for paths in (capture.image_paths, capture.normal_paths)
    )
    shutil.rmtree(folder)
    write_capture(folder, rgba, normals, capture.poses[:views], 40.0)


def test_a_resumed_run_stays_in_the_space_of_its_first_latents(
    data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[Latents] = []

    class Noted(ViewBatches):
        def __init__(self, latents: Latents, *given: Any, **options: Any) -> None:
            super().__init__(latents, *given, **options)
            learned.append(latents)

    monkeypatch.setattr(loop, "ViewBatches", Noted)
    run(unet_config(data, vae, steps=1), tmp_path / "run")
    before = read_model_config(tmp_path / "run/model").vae
    write_object(data / "added", 9)
    model = run(unet_config(data, vae, steps=2), tmp_path / "run")
    first, _, second, _ = learned  # training and held-out captures of both calls
    added = second.first[2]  # views of the new one, and of its mirror image
    np.testing.assert_array_equal(second.images[added:], first.images)
    np.testing.assert_array_equal(second.normals[added:], first.normals)
    assert before.latents_mean is not None
    assert read_model_config(model).vae == before
    fresh = read_model_config(run(unet_config(data, vae, steps=1), tmp_path / "fresh")).vae
    assert fresh.latents_mean != before.latents_mean


def test_a_run_that_began_with_another_vae_is_refused(data: Path, vae: Path, tmp_path: Path) -> None:
    run(unet_config(data, vae, steps=1), tmp_path / "run")
    kept = weights_of(tmp_path / "run", "vae")
    run(vae_config(data, steps=3), tmp_path / "vae")
    with pytest.raises(OutputError, match="holds a run with another VAE than that of"):
        run(unet_config(data, vae, steps=2), tmp_path / "run")
    for name, weight in weights_of(tmp_path / "run", "vae").items():
        np.testing.assert_array_equal(weight, kept[name])


def test_a_run_without_a_state_begins_anew_with_another_vae(
    data: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "write_safetensors", interrupted)
        run(unet_config(data, vae, steps=1), tmp_path / "run")
    run(vae_config(data, steps=3), tmp_path / "vae")
    run(unet_config(data, vae, steps=1), tmp_path / "run")
    run(unet_config(data, vae, steps=1), tmp_path / "fresh")
    for part in ("vae", "unet"):
        for name, weight in weights_of(tmp_path / "fresh", part).items():
            np.testing.assert_array_equal(weights_of(tmp_path / "run", part)[name], weight)
    assert read_model_config(tmp_path / "run/model") == read_model_config(tmp_path / "fresh/model")


def test_a_model_puts_pictures_over_the_background_that_it_has_learned(data: Path, vae: Path, tmp_path: Path) -> None:
    config = unet_config(data, vae, steps=1)
    dark = replace(config, data=replace(config.data, background=(20, 0, 40)))
    model = read_model_config(run(dark, tmp_path / "run"))
    assert model.framing == replace(config.framing, background=(20, 0, 40))
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[4:, 4:] = 255
    framed = frame_picture(clear, size_px=8, framing=model.framing)
    np.testing.assert_array_equal(framed.picture[0, 0], (20, 0, 40))
    start = {"init_from": str(tmp_path / "run/model"), "unet": None, "vae_from": None, "scheduler": SchedulerConfig()}
    further = replace(config, **start)
    assert read_model_config(run(further, tmp_path / "further")).framing.background == (255, 255, 255)
    with pytest.raises(OptionError, match=r"framing\.background must be that of the data, \(255, 255, 255\), or left out"):
        replace(config, framing=replace(config.framing, background=(0, 0, 0)))


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_damaged_latents_are_made_anew_when_they_are_removed(data: Path, vae: Path, tmp_path: Path) -> None:
    run(unet_config(data, vae, steps=1), tmp_path / "run")
    (latents,) = (tmp_path / "run").glob("latents-training-*")
    whole = latents.read_bytes()
    latents.write_bytes(whole[:1000])
    with pytest.raises(DatasetError, match=r"is no file of latents.*remove it, it is made anew"):
        run(unet_config(data, vae, steps=2), tmp_path / "run")
    latents.unlink()
    run(unet_config(data, vae, steps=2), tmp_path / "run")
    assert load_arrays(latents, Latents).images.shape[0] == 3 * 2 * 6


def test_parts_of_latents_that_a_kill_left_are_removed(data: Path, vae: Path, tmp_path: Path) -> None:
    run(unet_config(data, vae, steps=1), tmp_path / "run")
    for latents in list((tmp_path / "run").glob("latents-*")):
        latents.with_name(latents.stem + ".0-3.npz").write_bytes(latents.read_bytes())
    run(unet_config(data, vae, steps=2), tmp_path / "run")
    assert len(list((tmp_path / "run").glob("latents-*"))) == 2


def test_a_capture_of_one_view_is_left_out_of_a_unet_s_stage_and_learned_by_the_vae(
    data: Path, vae: Path, tmp_path: Path
) -> None:
    shutil.copytree(data, tmp_path / "own")
    path = tmp_path / "own" / "object_1" / "transforms.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"frames": document["frames"][:1]}))
    run(vae_config(tmp_path / "own", steps=1), tmp_path / "own-vae")
    with pytest.warns(MvWarning, match="not learned from, for there is no view"):
        run(unet_config(tmp_path / "own", vae, steps=1), tmp_path / "run", on_sample=None)


def test_cameras_that_do_not_look_at_the_origin_are_warned_of(data: Path, vae: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "own")
    for path in sorted((tmp_path / "own").glob("*/transforms.json"))[1:]:
        document = json.loads(path.read_text())
        for frame in document["frames"]:
            frame["transform_matrix"][1][3] += 50
        path.write_text(json.dumps(document))
    says = r"object_1: camera \d+ looks \d+ degrees past the origin.* \(and 2 more captures\)"
    with pytest.warns(MvWarning, match=says):
        run(unet_config(tmp_path / "own", vae, steps=1), tmp_path / "run", on_sample=None)


def test_maps_that_are_not_used_may_have_another_size(data: Path, vae: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "own")
    for path in (tmp_path / "own").glob("object_*/normal_*.png"):
        Image.open(path).resize((8, 8)).save(path)
    config = unet_config(tmp_path / "own", vae, steps=1)
    run(replace(config, data=replace(config.data, normals=False)), tmp_path / "run")
    with pytest.raises(DatasetError, match=r"normal_000\.png: all pictures must have one size, got 8 x 8"):
        run(config, tmp_path / "other")


def test_a_truncated_picture_is_named_once_with_what_to_do(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "own")
    path = tmp_path / "own" / "object_0" / "view_000.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DatasetError) as caught:
        read_picture(path, background=(255, 255, 255))
    assert str(caught.value).count("cannot be decoded") == 1
    assert caught.value.hint


@pytest.mark.parametrize("limit", [5.0, 30.0, 50.0, 72.0])
def test_a_view_at_the_limit_of_references_is_one_wherever_it_is_asked(tmp_path: Path, limit: float) -> None:
    white, azimuths = np.full((4, 8, 8, 4), 255, np.uint8), (limit, -limit, limit + 0.1, 180.0)
    for elevation in range(-20, 40, 5):
        write_capture(tmp_path / f"{elevation}", white, None, orbit(azimuths, elevation), 40.0)
    folders = sorted(tmp_path.iterdir())
    config = DataConfig(folder="", reference_max_azimuth_deg=limit, targets=1, mirror=True)
    latents = encode_captures(folders, config, lambda pixels: pixels[:, ::8, ::8])
    expected = [4 * capture + view for capture in range(2 * len(folders)) for view in (0, 1)]
    batches = ViewBatches(latents, config, SchedulerConfig(), normal_channels=0)
    assert np.flatnonzero(batches.is_reference).tolist() == expected
    assert sum(len(reference_pictures(folder, config)) for folder in folders) == len(expected)


@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_captures_with_different_numbers_of_views_share_a_sample_sheet(
    stage: str, data: Path, vae: Path, tmp_path: Path
) -> None:
    shortened(data / "object_3", views=3)
    settings = DataConfig(folder=str(data), held_out=0.5, targets=2)
    config = vae_config(data, steps=1, data=settings)
    if stage == "unet":
        config = unet_config(data, vae, steps=1, data=settings)
    with_samples(config, tmp_path / "run")
    sheet = np.asarray(Image.open(tmp_path / "run/samples/step_000001.png").convert("RGB"))
    columns = 2 * 4 if stage == "vae" else 1 + 2 * 4
    assert sheet.shape == (2 * SIZE, columns * SIZE, 3)
    shorter = 2 * 3 if stage == "vae" else 1 + 2 * 2
    assert (sheet[SIZE:, shorter * SIZE :] == 255).all()
    assert (sheet[:SIZE, -SIZE:] != 255).any()


def test_a_model_generates_pictures_of_the_size_that_it_learned(data: Path, vae: Path, tmp_path: Path) -> None:
    config = unet_config(data, vae, steps=1, defaults=GenerationDefaults(size_px=64, steps=1))
    model = with_samples(config, tmp_path / "run")
    assert read_model_config(model).defaults == replace(config.defaults, size_px=SIZE)
    assert (tmp_path / "run/samples/step_000001.png").is_file()


def test_a_model_that_takes_no_picture_is_trained_without_sample_sheets(data: Path, vae: Path, tmp_path: Path) -> None:
    config = unet_config(data, vae, steps=1, unet=replace(UNET, reference_frame=False))
    with pytest.warns(MvWarning, match="no sample sheets: image must be left out: this model takes no picture"):
        with_samples(config, tmp_path / "run")
    assert not any((tmp_path / "run/samples").glob("*"))


@pytest.mark.parametrize("stage", ["vae", "unet"])
def test_captures_that_changed_are_looked_at_again(stage: str, data: Path, vae: Path, tmp_path: Path) -> None:
    def config(steps: int) -> TrainConfig:
        return vae_config(data, steps=steps) if stage == "vae" else unet_config(data, vae, steps=steps)

    run(config(1), tmp_path / "run")
    changed = data / "object_1/view_002.png"
    Image.open(changed).resize((32, 32)).save(changed)
    with pytest.raises(DatasetError, match="all pictures must have one size, got 32 x 32 after 16 x 16") as raised:
        run(config(2), tmp_path / "run")
    assert raised.value.path == changed


def test_folders_that_are_being_written_are_no_captures(data: Path) -> None:
    shutil.copytree(data / "object_0", data / ".object_9.0a1b2c3d.tmp")
    training, held_out = find_captures(data, held_out=0.25)
    assert [path.name for path in (*training, *held_out)] == [f"object_{number}" for number in range(4)]


def test_pictures_are_learned_as_they_are_seen(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8))
    orientation = Image.Exif()
    orientation[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=orientation, quality=95)
    ramp = np.linspace(0, 65535, 16 * 8).reshape(8, 16).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    for name, shape in (("turned.jpg", (16, 8, 3)), ("grey.png", (8, 16, 3))):
        pixels = read_picture(tmp_path / name, background=(255, 255, 255)).pixels
        assert pixels.shape == shape
        np.testing.assert_allclose(pixels, to_model(load_image(tmp_path / name)[None, ..., :3])[0], atol=1e-6)
    grey = read_picture(tmp_path / "grey.png", background=(255, 255, 255)).pixels
    np.testing.assert_allclose(grey[..., 0], ramp / 32767.5 - 1, atol=0.01)


def test_turned_pictures_have_the_size_in_which_they_are_seen(data: Path) -> None:
    for path in (data / "object_0").glob("*.png"):
        turned = Image.Exif()
        turned[0x0112] = 8
        Image.open(path).convert("RGB").resize((8, 16)).save(path, "JPEG", exif=turned)
    check_sizes([load_capture(data / "object_0")], factor=8)
    with pytest.raises(DatasetError, match="got 16 x 8 pixels"):
        check_sizes([load_capture(data / "object_0")], factor=16)


def test_detail_maps_of_16_bits_are_shares_of_white(data: Path) -> None:
    ramp = np.linspace(0, 65535, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.uint16)
    for path in data.glob("*/detail_*.png"):
        Image.fromarray(ramp).save(path)
    config = DataConfig(folder=str(data), mirror=False)
    latents = encode_captures(
        [data / "object_0"], config, lambda pixels: np.zeros((len(pixels), 4, 4, 4), np.float32), with_detail=True
    )
    assert latents.detail is not None
    expected = (ramp / 65535).reshape(4, SIZE // 4, 4, SIZE // 4).mean((1, 3))
    np.testing.assert_allclose(latents.detail[0], expected, atol=2e-3)


@pytest.mark.parametrize("frozen", [("",), ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")])
def test_something_must_be_left_to_train(data: Path, tmp_path: Path, frozen: tuple[str, ...]) -> None:
    with pytest.raises(OptionError, match="frozen must be beginnings that leave some weights to train"):
        run(vae_config(data, frozen=frozen), tmp_path / "run")


def test_networks_that_captures_cannot_feed_are_refused(data: Path, vae: Path) -> None:
    with pytest.raises(OptionError, match=r"in_channels must be 3, which are red, green and blue"):
        vae_config(data, vae=replace(VAE, out_channels=4))
    with pytest.raises(OptionError, match=r"unet\.camera_dim must be 16, or left out, got 8"):
        unet_config(data, vae, unet=replace(UNET, camera_dim=8))


def test_the_vae_of_a_whole_model_is_its_own(data: Path, vae: Path) -> None:
    with pytest.raises(OptionError, match="vae_from must be left out without a table 'unet'"):
        unet_config(data, vae, unet=None, init_from="demo")


@pytest.mark.parametrize("name", ["views", "steps", "size_px"])
def test_defaults_that_no_run_could_have_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} must be a whole number of at least 1, got 0"):
        replace(GenerationDefaults(), **{name: 0})  # type: ignore[arg-type]


def test_the_vae_is_written_before_the_first_step(data: Path, vae: Path, tmp_path: Path) -> None:
    config = unet_config(data, vae, steps=1)
    run(config, tmp_path / "run")
    shutil.copytree(tmp_path / "run/model/vae", tmp_path / "begun/model/vae")
    shutil.copy(tmp_path / "run/config.json", tmp_path / "begun/config.json")
    write_object(data / "added", 9)
    run(config, tmp_path / "begun")  # as after a kill in the first step
    assert read_vae_config(tmp_path / "begun/model") == read_vae_config(tmp_path / "run/model")
