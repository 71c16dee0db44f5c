"""What training starts from: captures, the batches that are drawn of them, and the initial weights."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from training_cases import AZIMUTHS, SIZE, UNET, V_PREDICTION, VAE, some_latents, write_object, write_objects

import mvmlx.model
import mvmlx.train
import mvshared.training.data
import mvshared.training.kept
import mvtorch.model
import mvtorch.train
from mvshared.camera import camera_vectors, mirror_poses, orbit
from mvshared.captures import load_capture, write_capture
from mvshared.config import SchedulerConfig
from mvshared.errors import (
    DatasetError,
)
from mvshared.normals import NormalMaps, load_normals
from mvshared.schedule import alphas_cumprod
from mvshared.training.config import DataConfig
from mvshared.training.data import (
    Latents,
    VAEPictures,
    ViewBatches,
    captures_digest,
    encode_captures,
    find_captures,
    kept_latents,
    read_normals,
    read_picture,
    reference_pictures,
)
from mvshared.training.initial import LOGVAR, UNET_ZEROS, initial_vae_weights, initial_weights
from mvshared.training.kept import load_arrays, save_arrays
from mvshared.training.upscaler_data import encode_pairs, generated_pairs


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_objects(tmp_path_factory.mktemp("data"))


# Captures and batches


def test_the_last_captures_are_held_out_and_both_sides_have_one_unless_the_share_is_0(data: Path) -> None:
    names = [path.name for path in sorted(data.iterdir())]
    for share, count in ((0.0, 0), (0.01, 1), (0.25, 1), (0.5, 2), (1.0, 3)):
        training, held_out = find_captures(data, held_out=share)
        assert [path.name for path in (*training, *held_out)] == names
        assert len(held_out) == count


def test_pictures_outside_of_a_capture_belong_to_its_digest(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "object"
    write_object(folder, 0)
    document = json.loads((folder / "transforms.json").read_text())
    outside = (folder / document["frames"][0]["file_path"]).rename(tmp_path / "view.png")
    document["frames"][0]["file_path"] = "../../view"
    (folder / "transforms.json").write_text(json.dumps(document))
    before = captures_digest([folder])
    assert before == captures_digest([folder])
    os.utime(outside, ns=(1, 1))
    assert before != captures_digest([folder])


def test_what_is_hidden_in_a_capture_does_not_belong_to_its_digest_unless_it_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "object"
    write_object(folder, 0)
    before = captures_digest([folder])
    (folder / ".DS_Store").write_bytes(b"of the Finder")
    (folder / "._view_000.png").write_bytes(b"of a disk without attributes")
    (folder / ".cache").mkdir()
    (folder / ".cache/thumbnail.png").write_bytes(b"of a viewer")
    assert before == captures_digest([folder])
    document = json.loads((folder / "transforms.json").read_text())
    document["frames"][0]["file_path"] = ".cache/thumbnail.png"
    (folder / "transforms.json").write_text(json.dumps(document))
    named = captures_digest([folder])
    os.utime(folder / ".cache/thumbnail.png", ns=(1, 1))
    assert named != captures_digest([folder])


def test_a_digest_is_that_of_earlier_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "object/images").mkdir(parents=True)
    for name, content in (("transforms.json", "{}"), ("b.png", "b"), ("images/a.png", "aa")):
        (tmp_path / "object" / name).write_text(content)
        os.utime(tmp_path / "object" / name, ns=(5, 5))
    lines = ["object/b.png 1 5", "object/images/a.png 2 5", "object/transforms.json 2 5"]
    assert captures_digest([Path("object")]) == hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def test_a_folder_with_too_few_captures_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"needs at least 1 capture .*has 0 .*render-heads"):
        find_captures(tmp_path, held_out=0.0)
    (tmp_path / "lego").mkdir()
    (tmp_path / "lego/transforms_train.json").write_text("{}")
    with pytest.raises(DatasetError, match=r"has 0 \(copy transforms_train\.json to transforms\.json in .*lego\)"):
        find_captures(tmp_path, held_out=0.0)
    (tmp_path / "lego/transforms_train.json").unlink()
    write_object(tmp_path / "one", 1)
    with pytest.raises(DatasetError, match=r"needs at least 2 captures .*has 1 .*with held_out 0 one is enough"):
        find_captures(tmp_path, held_out=0.1)
    with pytest.raises(DatasetError, match="this is a capture itself"):
        find_captures(tmp_path / "one", held_out=0.0)
    assert find_captures(tmp_path, held_out=0.0) == ([tmp_path / "one"], [])


def test_pictures_are_put_on_the_background_and_normals_on_zero(data: Path) -> None:
    capture = load_capture(data / "object_0")
    picture = read_picture(capture.image_paths[0], background=(0, 255, 51))
    np.testing.assert_allclose(picture.pixels[0, 0], [-1, 1, -0.6], atol=1e-6)
    assert picture.alpha[0, 0] == 0
    assert picture.alpha[SIZE // 2, SIZE // 2] == 1
    assert capture.normal_paths[0] is not None
    normals = read_normals(capture.normal_paths[0]).pixels
    np.testing.assert_allclose(normals[0, 0], 0, atol=0.005)
    assert normals[SIZE // 2, SIZE // 2, 2] > 0.9


@pytest.mark.parametrize("background", [None, 0, 127, 255])
def test_normal_maps_are_learned_as_they_steer_whatever_shows_no_surface(tmp_path: Path, background: int | None) -> None:
    write_object(tmp_path / "one", 1)
    for path in (tmp_path / "one").glob("normal_*.png"):
        pixels = np.asarray(Image.open(path))
        if background is not None:
            Image.fromarray(np.where(pixels[..., 3:] == 0, np.uint8(background), pixels[..., :3])).save(path)
    capture = load_capture(tmp_path / "one")
    paths = [path for path in capture.normal_paths if path is not None]
    learned = np.stack([read_normals(path).pixels for path in paths])
    steering = load_normals(NormalMaps(tuple(paths), space="camera"), capture.poses, fov_deg=40.0, size_px=SIZE)
    np.testing.assert_allclose(learned, steering, atol=1e-6)


def test_all_that_is_learned_lies_on_the_background_of_the_data(data: Path) -> None:
    settings, folders = DataConfig(folder="", background=(0, 255, 51), normals=False), [data / "object_0"]
    references = [read() for read in reference_pictures(folders[0], settings)]

    def generated(reference: NDArray[np.uint8], poses: NDArray[np.float32]) -> NDArray[np.float32]:
        references.append(reference)
        return np.zeros((len(poses), 4, 4, 4), np.float32)

    pictures = {
        "of the VAE": VAEPictures(folders, settings, latent_channels=4, downscale=2).batch(0, size=8, seed=0).pixels,
        "of the U-Net": encode_captures(folders, settings, lambda pixels: pixels).images,
        "of the upscaler": encode_pairs(folders, settings, lambda pixels: pixels, multiple=4).high,
        "beside generated ones": generated_pairs(folders, settings, generated, lambda pixels: pixels, multiple=4).high,
    }
    pictures |= {f"reference {index}": reference[None] / 127.5 - 1 for index, reference in enumerate(references)}
    for name, pixels in pictures.items():
        np.testing.assert_allclose(pixels[:, 0, 0], np.tile([-1, 1, -0.6], (len(pixels), 1)), atol=5e-3, err_msg=name)


def test_mirror_images_have_mirrored_cameras_and_normals(data: Path) -> None:
    """A point, its mirror image, and the direction of a normal, seen by a camera and by the mirrored one."""
    latents = encode_captures([data / "object_0"], DataConfig(folder="", mirror=True), lambda pixels: pixels)
    views = len(AZIMUTHS)
    np.testing.assert_array_equal(latents.first, [0, views, 2 * views])
    np.testing.assert_array_equal(latents.images[views:], latents.images[:views, :, ::-1])
    np.testing.assert_array_equal(latents.normals[views:], latents.normals[:views, :, ::-1] * [-1, 1, 1])
    np.testing.assert_allclose(np.cos(np.radians(latents.azimuths_deg[views:])), np.cos(np.radians(AZIMUTHS)), atol=1e-6)
    np.testing.assert_allclose(np.sin(np.radians(latents.azimuths_deg[views:])), -np.sin(np.radians(AZIMUTHS)), atol=1e-6)
    poses = orbit(AZIMUTHS, 10.0)
    np.testing.assert_allclose(latents.cameras[:views], camera_vectors(poses), atol=1e-6)
    np.testing.assert_allclose(latents.cameras[views:], camera_vectors(mirror_poses(poses)), atol=1e-6)
    for vector, w in ((np.array([0.2, 0.1, -0.3]), 1.0), (np.array([0.6, 0.0, 0.8]), 0.0)):
        seen = (np.linalg.inv(poses) @ np.append(vector, w))[:, :3]
        mirrored = (np.linalg.inv(mirror_poses(poses)) @ np.append(vector * [-1, 1, 1], w))[:, :3]
        np.testing.assert_allclose(mirrored, seen * [-1, 1, 1], atol=1e-6)


def test_captures_that_are_encoded_together_give_what_each_of_them_alone_does(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, config, calls = sorted(data.iterdir()), DataConfig(folder="", mirror=True), list[int]()

    def encode(pixels: Any) -> Any:
        calls.append(len(pixels))
        return pixels[:, ::2, ::2]

    monkeypatch.setattr(mvshared.training.data, "ENCODED_TOGETHER", 2 * 2 * len(AZIMUTHS) * SIZE * SIZE)  # two captures
    together = encode_captures(folders, config, encode, with_detail=True)
    assert calls == [4 * len(AZIMUTHS)] * 4
    monkeypatch.setattr(mvshared.training.data, "ENCODED_TOGETHER", 1)
    for ours, alone in zip(together, encode_captures(folders, config, encode, with_detail=True), strict=True):
        np.testing.assert_array_equal(ours, alone)


def test_a_killed_call_s_encoded_captures_are_taken_over(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mvshared.training.kept, "PART", 1)
    folders, config, path = sorted(data.iterdir()), DataConfig(folder="", mirror=True), tmp_path / "latents.npz"
    calls = list[int]()

    def encode(pixels: Any) -> Any:
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pixels[:, ::2, ::2]

    with pytest.raises(KeyboardInterrupt):
        kept_latents(path, folders, config, encode, replaces="latents*.npz", with_detail=True)
    assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / "latents-of-others.npz").touch()
    found = kept_latents(path, folders, config, encode, replaces="latents*.npz", with_detail=True)
    assert calls == [4 * len(AZIMUTHS)] * 5, "two captures, the one at which the call was killed, that one again and the last"
    assert list(tmp_path.iterdir()) == [path]
    whole = encode_captures(folders, config, lambda pixels: pixels[:, ::2, ::2], with_detail=True)
    for ours, kept, expected in zip(found, load_arrays(path, Latents), whole, strict=True):
        assert ours is not None and kept is not None
        np.testing.assert_array_equal(ours, kept)
        assert expected is not None
        assert ours.dtype == expected.dtype
        np.testing.assert_array_equal(ours, expected)


def test_without_mirror_images_every_capture_is_encoded_once(data: Path) -> None:
    latents = encode_captures([data / "object_0"], DataConfig(folder="", mirror=False), lambda pixels: pixels)
    assert len(latents.images) == len(AZIMUTHS)


def test_views_without_a_normal_map_have_zero_normals(data: Path) -> None:
    latents = encode_captures([data / "object_0"], DataConfig(folder="", normals=False), lambda pixels: pixels)
    assert not latents.normals.any()


def test_latents_have_the_mean_detail_of_their_pixels_mirrored_like_them_and_0_without_a_map(tmp_path: Path) -> None:
    random, views = np.random.default_rng(0), 3
    rgba, detail = np.full((views, 8, 12, 4), 255, np.uint8), random.integers(0, 256, (views, 8, 12), np.uint8)
    for name in ("a", "b"):
        write_capture(tmp_path / name, rgba, None, orbit((0.0, 90.0, 180.0), 0.0), 40.0, detail=detail)
    document = json.loads((tmp_path / "b/transforms.json").read_text())
    del document["frames"][1]["detail_file_path"]
    (tmp_path / "b/transforms.json").write_text(json.dumps(document))
    expected = np.zeros((4, views, 2, 3))  # of a, its mirror image, b and its mirror image
    for view in range(views):
        for row in range(2):
            for column in range(3):
                mean = detail[view, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].mean() / 255
                expected[0, view, row, column] = expected[1, view, row, 2 - column] = mean
    expected[2:] = expected[:2]
    expected[2:, 1] = 0
    folders = [tmp_path / "a", tmp_path / "b"]
    latents = encode_captures(folders, DataConfig(folder=""), lambda pixels: pixels[:, ::4, ::4], with_detail=True)
    assert latents.detail is not None
    assert latents.detail.dtype == np.float16
    np.testing.assert_allclose(latents.detail, expected.reshape(-1, 2, 3), atol=5e-4)
    plain = encode_captures(folders, DataConfig(folder=""), lambda pixels: pixels[:, ::4, ::4])
    assert plain.detail is None
    for with_detail, without in zip(latents[:-1], plain[:-1], strict=True):
        np.testing.assert_array_equal(with_detail, without)


def test_latents_without_detail_are_files_without_it_and_those_with_it_come_back(tmp_path: Path) -> None:
    latents, path = some_latents(), tmp_path / "latents.npz"
    save_arrays(path, latents)
    with np.load(path) as arrays:
        assert arrays.files == ["images", "normals", "cameras", "azimuths_deg", "first"]
    assert load_arrays(path, Latents).detail is None
    detail = np.random.default_rng(1).random((len(latents.images), 4, 4)).astype(np.float16)
    save_arrays(path, latents._replace(detail=detail))
    np.testing.assert_array_equal(load_arrays(path, Latents).detail, detail, strict=True)


def test_latents_come_back_from_their_file_and_other_files_are_refused(tmp_path: Path) -> None:
    latents = some_latents()
    save_arrays(tmp_path / "latents.npz", latents)
    for saved, loaded in zip(latents, load_arrays(tmp_path / "latents.npz", Latents), strict=True):
        np.testing.assert_array_equal(loaded, saved, strict=True)
    whole = (tmp_path / "latents.npz").read_bytes()
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    np.save(tmp_path / "array.npy", np.zeros(3))
    contents = (
        b"",
        b"nonsense",
        whole[:100],
        whole[:-30],
        (tmp_path / "other.npz").read_bytes(),
        (tmp_path / "array.npy").read_bytes(),
    )
    for content in contents:
        (tmp_path / "latents.npz").write_bytes(content)
        with pytest.raises(DatasetError, match="is no file of latents"):
            load_arrays(tmp_path / "latents.npz", Latents)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_sample_and_target_of_a_batch_give_back_the_latents_of_its_views(prediction_type: Any) -> None:
    latents, scheduler = some_latents(), SchedulerConfig(prediction_type=prediction_type)
    config = DataConfig(folder="", targets=3, reference_dropout=0.0, normals_dropout=0.0)
    batch = ViewBatches(latents, config, scheduler, normal_channels=4).batch(5, size=8, seed=1)
    assert {array.dtype for array in batch if array is not None} == {np.dtype(np.float32)}
    assert (batch.text, batch.image_states, batch.detail) == (None, None, None)
    alphas = alphas_cumprod(scheduler)[batch.timesteps.astype(int)][:, None, None, None, None]
    noisy = batch.sample[..., :4]
    if prediction_type == "epsilon":
        clean = (noisy - np.sqrt(1 - alphas) * batch.target) / np.sqrt(alphas)
    else:
        clean = np.sqrt(alphas) * noisy - np.sqrt(1 - alphas) * batch.target
    objects = set()
    for number in range(8):
        rows = [int(np.argmin(np.abs(latents.images - view).mean((1, 2, 3)))) for view in clean[number]]
        (reference,) = np.flatnonzero((latents.images == batch.reference[number]).all((1, 2, 3)))
        assert len({*rows, reference}) == 4, "views repeat"
        assert len({row // 6 for row in (*rows, reference)}) == 1, "views are of different objects"
        assert abs(latents.azimuths_deg[reference]) <= config.reference_max_azimuth_deg
        np.testing.assert_allclose(clean[number], latents.images[rows], atol=0.02)
        np.testing.assert_array_equal(batch.sample[number, ..., 4:], latents.normals[rows])
        np.testing.assert_array_equal(batch.camera[number], latents.cameras[rows])
        objects.add(rows[0] // 6)
    assert objects == {0, 1, 2}


def test_detail_in_a_batch_is_that_of_its_target_views_and_changes_nothing_else() -> None:
    latents, config = some_latents(), DataConfig(folder="", targets=3)
    detail = np.random.default_rng(1).random((len(latents.images), 4, 4)).astype(np.float16)
    batch, plain = (
        ViewBatches(each, config, V_PREDICTION, normal_channels=4).batch(5, size=8, seed=1)
        for each in (latents._replace(detail=detail), latents)
    )
    assert batch.detail is not None
    assert (batch.detail.shape, batch.detail.dtype) == ((8, 3, 4, 4), np.float32)
    for number in range(8):
        rows = [int(np.flatnonzero((latents.cameras == camera).all(1))[0]) for camera in batch.camera[number]]
        np.testing.assert_array_equal(batch.detail[number], detail[rows])
    for ours, expected in zip(batch._replace(detail=None), plain, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_references_and_normals_are_dropped_as_often_as_configured_and_independently() -> None:
    config = DataConfig(folder="", targets=2, reference_dropout=0.3, normals_dropout=0.6)
    batches = ViewBatches(some_latents(), config, V_PREDICTION, normal_channels=4)
    drawn = [batches.batch(step, size=20, seed=0) for step in range(50)]
    no_reference = np.concatenate([~batch.reference.any((1, 2, 3)) for batch in drawn])
    no_normals = np.concatenate([~batch.sample[..., 4:].any((1, 2, 3, 4)) for batch in drawn])
    assert np.mean(no_reference) == pytest.approx(0.3, abs=0.05)
    assert np.mean(no_normals) == pytest.approx(0.6, abs=0.05)
    assert np.mean(no_reference & no_normals) == pytest.approx(0.18, abs=0.05)


def test_every_timestep_can_be_drawn() -> None:
    config = DataConfig(folder="", targets=2)
    batches = ViewBatches(some_latents(), config, SchedulerConfig(num_train_timesteps=5), normal_channels=0)
    drawn = np.concatenate([batches.batch(step, size=20, seed=0).timesteps for step in range(5)])
    assert set(drawn) == {0.0, 1.0, 2.0, 3.0, 4.0}


def test_batches_depend_on_the_seed_and_the_step_only(data: Path) -> None:
    config = DataConfig(folder=str(data), targets=2)
    folders, _ = find_captures(data, held_out=0.25)
    makers = [
        lambda: ViewBatches(some_latents(), config, V_PREDICTION, normal_channels=4),
        lambda: VAEPictures(folders, config, latent_channels=4, downscale=2),
    ]
    for make in makers:
        once, again = make(), make()
        expected = once.batch(7, size=3, seed=2)
        again.batch(0, size=5, seed=9)
        for actual, array in zip(again.batch(7, size=3, seed=2), expected, strict=True):
            np.testing.assert_array_equal(actual, array)
        assert not np.array_equal(again.batch(8, size=3, seed=2)[0], expected[0])
        assert not np.array_equal(again.batch(7, size=3, seed=3)[0], expected[0])


def test_batches_for_the_vae_mix_pictures_and_normal_maps_and_their_mirror_images(data: Path) -> None:
    capture = load_capture(data / "object_1")
    pictures = [read_picture(path, background=(255, 255, 255)).pixels for path in capture.image_paths]
    maps = [read_normals(path).pixels for path in capture.normal_paths if path is not None]
    originals = {"picture": pictures, "normals": maps}
    originals |= {"mirrored picture": [picture[:, ::-1] for picture in pictures]}
    originals |= {"mirrored normals": [picture[:, ::-1] * np.array([-1, 1, 1], np.float32) for picture in maps]}
    source = VAEPictures([data / "object_1"], DataConfig(folder=""), latent_channels=4, downscale=2)
    counts = dict.fromkeys(originals, 0)
    for step in range(10):
        for pixels in source.batch(step, size=40, seed=0).pixels:
            kinds = [kind for kind, known in originals.items() if any(np.array_equal(pixels, other) for other in known)]
            assert kinds, "a picture that is none of the capture's"
            counts[kinds[0]] += 1
    assert 0.08 < (counts["normals"] + counts["mirrored normals"]) / 400 < 0.18
    assert min(counts.values()) > 5, counts


def test_detail_maps_come_with_their_pictures_mirrored_like_them_and_normal_maps_have_none(data: Path) -> None:
    capture = load_capture(data / "object_1")
    pictures = [read_picture(path, background=(255, 255, 255)).pixels for path in capture.image_paths]
    details = [np.asarray(Image.open(path), np.float32) / 255 for path in capture.detail_paths if path is not None]
    known = [*zip(pictures, details, strict=True)]
    known += [(picture[:, ::-1], detail[:, ::-1]) for picture, detail in known]
    config = DataConfig(folder="")
    source = VAEPictures([data / "object_1"], config, latent_channels=4, downscale=2, with_detail=True)
    without = VAEPictures([data / "object_1"], config, latent_channels=4, downscale=2)
    found = set()
    for step in range(10):
        batch, plain = source.batch(step, size=20, seed=0), without.batch(step, size=20, seed=0)
        assert plain.detail is None
        np.testing.assert_array_equal(batch.pixels, plain.pixels)
        assert batch.detail is not None
        for pixels, detail in zip(batch.pixels, batch.detail, strict=True):
            number = next((number for number, (picture, _) in enumerate(known) if np.array_equal(pixels, picture)), None)
            expected = np.zeros_like(detail) if number is None else known[number][1]
            np.testing.assert_allclose(detail, expected, atol=1e-6)
            found.add(number)
    assert found > {None, 1, 2, 4, 5, len(AZIMUTHS) + 1}  # views 0 and 3 look the same


def test_a_view_without_a_detail_map_has_no_detail(data: Path, tmp_path: Path) -> None:
    rgba = np.full((2, SIZE, SIZE, 4), 255, np.uint8)
    write_capture(tmp_path / "bare", rgba, None, orbit((0.0, 90.0), 0.0), 40.0)
    config = DataConfig(folder="captures", normals=False)
    both = [data / "object_0", tmp_path / "bare"]
    batch = VAEPictures(both, config, latent_channels=4, downscale=2, with_detail=True).batch(0, size=40, seed=0)
    bare = (batch.pixels == 1).all(axis=(1, 2, 3))
    assert batch.detail is not None
    assert 0 < bare.sum() < 40
    assert not batch.detail[bare].any()
    assert batch.detail[~bare].any(axis=(1, 2)).all()


def test_pictures_of_different_sizes_are_refused(data: Path, tmp_path: Path) -> None:
    rgba = np.full((2, 8, 8, 4), 255, np.uint8)
    write_capture(tmp_path / "small", rgba, None, orbit((0.0, 90.0), 0.0), 40.0)
    source = VAEPictures([data / "object_0", tmp_path / "small"], DataConfig(folder=""), latent_channels=4, downscale=2)
    with pytest.raises(DatasetError, match="one size"):
        source.batch(0, size=32, seed=0)


def test_captures_without_a_frontal_view_or_enough_targets_are_refused() -> None:
    latents = some_latents()
    for config in (DataConfig(folder="", targets=6), DataConfig(folder="", reference_max_azimuth_deg=1.0)):
        with pytest.raises(DatasetError, match="no capture has a view within"):
            ViewBatches(latents, config, V_PREDICTION, normal_channels=4)


# Initial weights


def test_initial_weights_follow_from_seed_and_name_and_are_the_same_for_both_backends() -> None:
    for ours, theirs in (
        (mvmlx.model.network_shapes(VAE), mvtorch.model.network_shapes(VAE)),
        (mvmlx.model.network_shapes(UNET), mvtorch.model.network_shapes(UNET)),
    ):
        assert ours == theirs
        weights, reordered = initial_weights(ours, seed=3), initial_weights(dict(reversed(theirs.items())), seed=3)
        for name, array in weights.items():
            np.testing.assert_array_equal(reordered[name], array, strict=True)
        other = initial_weights(ours, seed=4)
        assert not np.array_equal(other["conv_in.weight" if "conv_in.weight" in ours else "quant_conv.weight"], 0)
        assert any(not np.array_equal(other[name], array) for name, array in weights.items())


def test_initial_weights_have_the_spread_of_their_inputs_and_the_zeros_that_were_asked_for() -> None:
    shapes = mvtorch.model.network_shapes(UNET)
    weights = initial_weights(shapes, seed=0, zeros=UNET_ZEROS)
    zero = {name for name, array in weights.items() if not array.any()}
    assert {name for name in zero if name.endswith(".weight")} == {
        name for name in shapes if name.endswith((".conv2.weight", ".proj_out.weight")) or name == "conv_out.weight"
    }
    assert {name for name in shapes if name.endswith(".bias")} <= zero
    np.testing.assert_array_equal(weights["conv_norm_out.weight"], 1)
    kernel = weights["mid_block.resnets.0.conv1.weight"]
    bound = (32 * 9) ** -0.5
    assert 0.98 * bound < np.abs(kernel).max() <= bound
    assert kernel.std() == pytest.approx(bound / 3**0.5, rel=0.02)


def test_a_vae_starts_with_a_narrow_posterior_and_half_of_its_first_filters_blind_to_grey() -> None:
    shapes = mvtorch.model.network_shapes(VAE)
    weights, plain = initial_vae_weights(shapes, seed=0), initial_weights(shapes, seed=0)
    np.testing.assert_array_equal(weights["quant_conv.bias"], [0] * 4 + [LOGVAR] * 4)
    filters = weights["encoder.conv_in.weight"]
    np.testing.assert_allclose(filters[4:].sum(1), 0, atol=1e-6)
    assert filters[4:].std() > 1.8 * filters[:4].std(), "and more sensitive, since colour varies less"
    np.testing.assert_array_equal(filters[:4], plain["encoder.conv_in.weight"][:4])
    changed = {name for name in shapes if not np.array_equal(weights[name], plain[name])}
    assert changed == {"quant_conv.bias", "encoder.conv_in.weight"}
