"""Poses, orbits, the conditioning vector, and files of cameras."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from mvshared import camera
from mvshared.errors import CameraError, ConfigError, OptionError

# Rows of 16 as the public MVDream code gives them for (elevation, azimuth) in degrees.
S15, C15 = 0.25881904510252074, 0.9659258262890683
MVDREAM_ROWS = {
    (0, 0): [1, 0, 0, 0, 0, 0, -1, -1, 0, 1, 0, 0, 0, 0, 0, 1],
    (0, 90): [0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1],
    (0, 180): [-1, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 1],
    (0, 270): [0, 0, -1, -1, -1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1],
    (15, 0): [1, 0, 0, 0, 0, S15, -C15, -C15, 0, C15, S15, S15, 0, 0, 0, 1],
    (15, 90): [0, -S15, C15, C15, 1, 0, 0, 0, 0, C15, S15, S15, 0, 0, 0, 1],
}

azimuths = st.floats(-720, 720)
elevations = st.floats(-90, 90)
radii = st.floats(0.01, 100)
orbits = st.lists(st.tuples(azimuths, elevations), min_size=1, max_size=6)


def look_at(position: np.ndarray) -> np.ndarray:
    """Camera-to-world pose by cross products, as MVDream's code does it; undefined at the poles."""
    back = position / np.linalg.norm(position)
    right = np.cross([0, 1, 0], back)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(back, right), back, position], axis=-1)
    return pose


def assert_rigid(poses: np.ndarray) -> None:
    rotations = poses[:, :3, :3].astype(np.float64)
    np.testing.assert_allclose(rotations.transpose(0, 2, 1) @ rotations, np.broadcast_to(np.eye(3), rotations.shape), atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(rotations), 1, atol=1e-6)
    np.testing.assert_array_equal(poses[:, 3], np.broadcast_to([0, 0, 0, 1], (len(poses), 4)))


# Orbits


@given(orbits, radii)
def test_an_orbit_is_rigid_and_looks_at_the_origin(pairs: list[tuple[float, float]], radius: float) -> None:
    poses = camera.orbit([a for a, _ in pairs], [e for _, e in pairs], radius=radius)
    assert poses.shape == (len(pairs), 4, 4) and poses.dtype == np.float32
    assert_rigid(poses)
    np.testing.assert_allclose(poses[:, :3, 3], radius * poses[:, :3, 2], rtol=1e-5, atol=1e-6 * radius)


@given(azimuths, st.floats(-89, 89), radii)
def test_an_orbit_is_the_look_at_of_the_documented_position(azimuth: float, elevation: float, radius: float) -> None:
    a, e = math.radians(azimuth), math.radians(elevation)
    position = radius * np.array([math.cos(e) * math.sin(a), math.sin(e), math.cos(e) * math.cos(a)])
    np.testing.assert_allclose(
        camera.orbit([azimuth], elevation, radius=radius)[0], look_at(position), rtol=1e-5, atol=1e-5 * max(1, radius)
    )


@pytest.mark.parametrize("elevation", [90, -90])
@given(azimuth=azimuths)
def test_at_the_poles_the_azimuth_still_turns_the_camera(elevation: int, azimuth: float) -> None:
    pose = camera.orbit([azimuth], elevation)
    a = math.radians(azimuth)
    assert_rigid(pose)
    np.testing.assert_allclose(pose[0, :3, 0], [math.cos(a), 0, -math.sin(a)], atol=1e-6)
    np.testing.assert_allclose(pose[0, :3, 3], [0, math.copysign(1, elevation), 0], atol=1e-6)


def test_an_orbit_takes_one_elevation_per_view() -> None:
    poses = camera.orbit([10, 20], [-30, 40])
    np.testing.assert_array_equal(poses, np.concatenate([camera.orbit([10], -30), camera.orbit([20], 40)]))


@pytest.mark.parametrize("elevation", [90.001, -91, math.nan, math.inf])
def test_an_elevation_beyond_the_poles_is_refused(elevation: float) -> None:
    with pytest.raises(OptionError, match="elevation_deg must be -90 to 90"):
        camera.orbit([0, 90], elevation)
    with pytest.raises(CameraError, match="camera 1: the elevation must be -90 to 90") as caught:
        camera.orbit([0, 90], [0, elevation])
    assert caught.value.index == 1


@pytest.mark.parametrize(
    ("azimuths_deg", "elevation_deg", "message"),
    [
        ([0, math.inf], 0, "camera 1: the azimuth"),
        ([], 0, "at least one"),
        (30, 0, "must be a list"),
        ([[0, 90]], 0, "must be a list"),
        ([0, 90], [0, 0, 0], r"one per view \(2\), got shape \(3,\)"),
        (["0"], 0, "azimuths_deg must be real numbers"),
        ([True], 0, "azimuths_deg must be real numbers"),
        ([0, [90]], 0, "regular shape"),
    ],
)
def test_an_orbit_refuses_what_is_no_list_of_angles(azimuths_deg: object, elevation_deg: object, message: str) -> None:
    with pytest.raises(CameraError, match=message):
        camera.orbit(azimuths_deg, elevation_deg)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("radius", [0, -1, math.nan, math.inf, 1e-7, 1e7])
def test_a_radius_out_of_range_is_refused(radius: float) -> None:
    with pytest.raises(OptionError, match="radius"):
        camera.orbit([0], 0, radius=radius)


def test_even_azimuths_leave_out_the_end_of_the_span() -> None:
    assert camera.even_azimuths(4) == [0, 90, 180, 270]
    assert camera.even_azimuths(4, start_deg=90) == [90, 180, 270, 360]
    assert camera.even_azimuths(2, start_deg=-60, span_deg=120) == [-60, 0]


@given(st.integers(1, 200), st.floats(-360, 360), st.floats(-360, 360))
def test_even_azimuths_are_as_many_as_asked_for(views: int, start: float, span: float) -> None:
    assert len(camera.even_azimuths(views, start_deg=start, span_deg=span)) == views


@pytest.mark.parametrize("views", [0, -1, 2.0, True])
def test_a_number_of_views_that_cannot_be_is_refused(views: int) -> None:
    with pytest.raises(OptionError, match="views"):
        camera.even_azimuths(views)
    with pytest.raises(OptionError, match="span_deg"):
        camera.even_azimuths(2, span_deg=math.nan)


# Checks


@given(orbits, radii)
def test_every_orbit_passes_the_check_unchanged(pairs: list[tuple[float, float]], radius: float) -> None:
    poses = camera.orbit([a for a, _ in pairs], [e for _, e in pairs], radius=radius)
    np.testing.assert_array_equal(camera.validate_poses(poses.tolist()), poses)


def test_poses_written_with_four_decimals_pass_the_check() -> None:
    rounded = np.round(camera.orbit([10, 100, 200], 15), 4)
    np.testing.assert_array_equal(camera.validate_poses(rounded), rounded)


def broken(row: int | slice, column: int | slice, value: ArrayLike) -> np.ndarray:
    poses = camera.orbit([0, 30, 60], 20).astype(np.float64)
    poses[1, row, column] = value
    return poses


@pytest.mark.parametrize(
    ("cameras", "message"),
    [
        (broken(0, 0, math.nan), "finite"),
        (broken(2, 3, math.inf), "finite"),
        (broken(2, 3, 1e39), "finite float32"),
        (broken(3, slice(None), [0, 0, 0, 2]), "last row must be 0 0 0 1, got 0 0 0 2"),
        (broken(3, slice(None), [0, 0, 1, 1]), "last row"),
        (broken(slice(0, 3), slice(0, 3), 1.01 * np.eye(3)), "not orthonormal"),
        (broken(slice(0, 3), slice(0, 3), np.zeros((3, 3))), "not orthonormal"),
        (broken(slice(0, 3), slice(0, 3), [[1, 0.1, 0], [0, 1, 0], [0, 0, 1]]), "not orthonormal"),
        (broken(0, 0, 1e200), "finite"),
        (broken(0, 0, 1e30), "not orthonormal"),
        (broken(slice(0, 3), slice(0, 3), np.diag([-1, 1, 1])), "reflection"),
        (broken(slice(0, 3), 3, 0), "at the origin"),
        (broken(slice(0, 3), 3, 1e-9), "at the origin"),
    ],
)
def test_what_is_no_rigid_pose_is_refused_with_its_index(cameras: np.ndarray, message: str) -> None:
    with pytest.raises(CameraError, match=f"camera 1: .*{message}") as caught:
        camera.validate_poses(cameras)
    assert caught.value.index == 1


def test_a_transposed_pose_is_refused_with_a_hint() -> None:
    with pytest.raises(CameraError, match="position in the last column"):
        camera.validate_poses(camera.orbit([30], 20).transpose(0, 2, 1))


@given(st.floats(1.002, 3), azimuths, elevations)
def test_a_scaled_rotation_is_never_taken_for_a_pose(scale: float, azimuth: float, elevation: float) -> None:
    poses = camera.orbit([azimuth], elevation)
    poses[:, :3, :3] *= scale
    with pytest.raises(CameraError, match="not orthonormal"):
        camera.validate_poses(poses)


@pytest.mark.parametrize("shape", [(4, 4), (0, 4, 4), (2, 3, 4), (2, 16), (1, 1, 4, 4), ()])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CameraError, match="shape"):
        camera.validate_poses(np.zeros(shape))
    if shape != (2, 16):
        with pytest.raises(CameraError, match="shape"):
            camera.as_poses(np.zeros(shape), 1.0)


@pytest.mark.parametrize("cameras", [None, "front", [["0", "0"]], [[0, 0], [1]], np.eye(4)[None] + 0j, [[True, False]]])
def test_what_are_no_numbers_is_refused(cameras: object) -> None:
    with pytest.raises(CameraError):
        camera.as_poses(cameras, 1.0)  # pyright: ignore[reportArgumentType]


def test_pairs_are_azimuth_and_elevation_at_the_given_radius() -> None:
    np.testing.assert_array_equal(camera.as_poses([(0, 5), (90, -5)], 1.5), camera.orbit([0, 90], [5, -5], radius=1.5))
    np.testing.assert_array_equal(camera.as_poses([(0, 5)], 2), camera.orbit([0], 5, radius=2))


def test_the_name_of_a_file_is_no_camera_and_the_message_says_who_reads_it(tmp_path: Path) -> None:
    for name in ("transforms.json", tmp_path / "transforms.json"):
        with pytest.raises(CameraError, match=r"got the name '.*transforms.json' \(mvshared.camera.load_cameras reads a file"):
            camera.as_poses(name, 1.0)  # type: ignore[arg-type]


def test_matrices_keep_their_own_radius() -> None:
    poses = camera.orbit([0, 90], 5, radius=3)
    np.testing.assert_array_equal(camera.as_poses(poses.tolist(), 1.5), poses)


# The conditioning vector


@pytest.mark.parametrize(("elevation", "azimuth"), MVDREAM_ROWS)
def test_camera_vectors_are_those_of_mvdream(elevation: int, azimuth: int) -> None:
    vectors = camera.camera_vectors(camera.orbit([azimuth], elevation))
    assert vectors.shape == (1, 16) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[0], MVDREAM_ROWS[elevation, azimuth], rtol=0, atol=1e-6)


def test_a_positive_elevation_is_a_camera_above_the_object() -> None:
    """LGM's copy of the pipeline hands the elevation to a function with y = -r sin(e) and so looks from below."""
    vector = camera.camera_vectors(camera.orbit([40], 15))[0].reshape(4, 4)
    assert vector[2, 3] == pytest.approx(S15, abs=1e-6)
    assert not np.allclose(vector, camera.camera_vectors(camera.orbit([40], -15))[0].reshape(4, 4), atol=0.1)


@given(azimuths, elevations, radii)
def test_camera_vectors_do_not_depend_on_the_radius(azimuth: float, elevation: float, radius: float) -> None:
    near, far = camera.orbit([azimuth], elevation), camera.orbit([azimuth], elevation, radius=radius)
    np.testing.assert_allclose(camera.camera_vectors(far), camera.camera_vectors(near), atol=2e-6)


def test_camera_vectors_refuse_what_is_no_pose() -> None:
    with pytest.raises(CameraError, match="camera 1"):
        camera.camera_vectors(broken(slice(0, 3), 3, 0))


# Inverse and mirror


@given(st.floats(0, 359.99), st.floats(-89.9, 89.9), radii)
def test_azimuth_elevation_is_the_inverse_of_an_orbit(azimuth: float, elevation: float, radius: float) -> None:
    found = camera.azimuth_elevation(camera.orbit([azimuth], elevation, radius=radius))
    assert 0 <= found.azimuths_deg[0] < 360
    assert abs((found.azimuths_deg[0] - azimuth + 180) % 360 - 180) < 1e-4
    assert found.elevations_deg[0] == pytest.approx(elevation, abs=1e-4)
    assert found.radii[0] == pytest.approx(radius, rel=1e-6)


@pytest.mark.parametrize("elevation", [90, -90])
@pytest.mark.parametrize("azimuth", [0, 45, 200, 359])
def test_azimuth_elevation_finds_the_azimuth_at_the_poles(azimuth: int, elevation: int) -> None:
    found = camera.azimuth_elevation(np.round(camera.orbit([azimuth], elevation), 6))
    assert found.azimuths_deg[0] == pytest.approx(azimuth, abs=1e-4)
    assert found.elevations_deg[0] == pytest.approx(elevation, abs=1e-4)


def test_a_tiny_negative_azimuth_is_not_reported_as_360() -> None:
    assert camera.azimuth_elevation(camera.orbit([-1e-20], 0)).azimuths_deg[0] == 0


@given(azimuths, elevations)
def test_mirrored_orbits_have_the_azimuth_negated(azimuth: float, elevation: float) -> None:
    poses = camera.orbit([azimuth], elevation, radius=1.5)
    mirrored = camera.mirror_poses(poses)
    assert mirrored.dtype == np.float32
    np.testing.assert_allclose(mirrored, camera.orbit([-azimuth], elevation, radius=1.5), atol=2e-6)
    np.testing.assert_array_equal(camera.mirror_poses(mirrored), poses)


def test_a_mirrored_pose_sees_mirrored_points_at_flipped_pixels() -> None:
    pose = look_at(np.array([0.6, 0.8, 1.2]))
    roll = np.eye(4)
    roll[:2, :2] = [[0.8, -0.6], [0.6, 0.8]]
    pose = pose @ roll
    point = np.array([0.3, -0.2, 0.1, 1])
    seen = np.linalg.inv(pose) @ point
    seen_mirrored = np.linalg.inv(camera.mirror_poses(pose[None])[0]) @ (point * [-1, 1, 1, 1])
    np.testing.assert_allclose(seen_mirrored, seen * [-1, 1, 1, 1], atol=1e-6)


# Files


def write(folder: Path, document: object) -> Path:
    path = folder / "cameras.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


POSES = camera.orbit([0, 30, 200], [0, 10, -20], radius=1.5)
PAIRS = [[0, 0], [30, 10], [200, -20]]


@pytest.mark.parametrize("wrap", [lambda cameras: cameras, lambda cameras: {"cameras": cameras}])
@pytest.mark.parametrize("cameras", [PAIRS, POSES.tolist()])
def test_cameras_load_from_pairs_and_from_matrices(tmp_path: Path, wrap: Callable, cameras: list) -> None:
    loaded = camera.load_cameras(write(tmp_path, wrap(cameras)), radius=1.5)
    np.testing.assert_array_equal(loaded.poses, POSES)
    assert loaded.fov_deg is None


def frames(poses: np.ndarray) -> list[dict]:
    return [{"file_path": f"{9 - index}.png", "transform_matrix": pose.tolist()} for index, pose in enumerate(poses)]


def test_a_transforms_file_with_y_up_loads_as_it_is_in_the_order_of_its_frames(tmp_path: Path) -> None:
    loaded = camera.load_cameras(write(tmp_path, {"up": [0, 1, 0], "frames": frames(POSES)}))
    np.testing.assert_array_equal(loaded.poses, POSES)


@pytest.mark.parametrize("document", [{}, {"up": [0, 0, 1.0]}])
def test_a_transforms_file_with_z_up_is_turned_to_y_up_with_the_front_from_minus_y(tmp_path: Path, document: dict) -> None:
    front = np.array([[1, 0, 0, 0], [0, 0, -1, -1.5], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=np.float32)
    loaded = camera.load_cameras(write(tmp_path, {**document, "frames": frames(front[None])}))
    np.testing.assert_allclose(loaded.poses, camera.orbit([0], 0, radius=1.5), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "fov_deg"),
    [
        ({}, None),
        ({"fl_y": 100, "h": 200, "w": 400}, 90),
        ({"fl_x": 100, "h": 200, "w": 400}, 90),
        ({"fl_x": 50, "fl_y": 100, "h": 200}, 90),
        ({"camera_angle_y": math.pi / 2}, 90),
        ({"camera_angle_x": math.pi / 2}, 90),
        ({"camera_angle_x": math.pi / 2, "w": 400, "h": 200}, 2 * math.degrees(math.atan(0.5))),
        ({"fl_x": 100}, None),
    ],
)
def test_the_vertical_field_of_view_is_read_from_every_usual_field(tmp_path: Path, fields: dict, fov_deg: float | None) -> None:
    in_file = camera.load_cameras(write(tmp_path, {**fields, "frames": frames(POSES)}))
    in_frames = camera.load_cameras(write(tmp_path, {"frames": [{**frame, **fields} for frame in frames(POSES)]}))
    for loaded in (in_file, in_frames):
        assert loaded.fov_deg == (None if fov_deg is None else pytest.approx(fov_deg))


def test_views_with_different_lenses_have_no_common_field_of_view(tmp_path: Path) -> None:
    different = frames(POSES)
    different[1]["fl_y"] = 200
    loaded = camera.load_cameras(write(tmp_path, {"fl_y": 100, "h": 200, "frames": different}))
    assert loaded.fov_deg is None
    assert loaded.fov_doubt == "all frames must have one field of view, and theirs are 53.1 to 90.0 degrees"
    assert camera.load_cameras(write(tmp_path, {"h": 200, "frames": different})).fov_doubt == ""


@pytest.mark.parametrize(("lengths", "middle"), [([100, 100.3, 99.6], 99.95), ([100, 100, 100], 100)])
def test_views_with_nearly_the_same_lens_have_its_middle_one(tmp_path: Path, lengths: list[float], middle: float) -> None:
    near = [{**frame, "fl_y": length} for frame, length in zip(frames(POSES), lengths, strict=True)]
    loaded = camera.load_cameras(write(tmp_path, {"h": 200, "frames": near}))
    assert loaded.fov_deg == pytest.approx(2 * math.degrees(math.atan(100 / middle)), abs=1e-3)
    assert loaded.fov_doubt == ""


def test_a_focal_length_that_is_longer_by_two_hundredths_is_another_lens(tmp_path: Path) -> None:
    other = [{**frame, "fl_y": length} for frame, length in zip(frames(POSES), [100, 102, 100], strict=True)]
    assert camera.load_cameras(write(tmp_path, {"h": 200, "frames": other})).fov_deg is None


def test_a_blender_file_without_a_size_takes_the_one_of_its_pictures() -> None:
    document = {"camera_angle_x": math.pi / 2, "frames": frames(POSES)}
    read = camera.read_transforms(document, path="transforms.json", size_px=(400, 200))
    assert read.fov_deg == pytest.approx(2 * math.degrees(math.atan(0.5)))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({}, "no cameras"),
        ("front", "no cameras"),
        ({"cameras": "front"}, "no cameras"),
        ({"cameras": []}, "shape"),
        ([[0, 0], [0, 100]], "camera 1: the elevation"),
        ([[0, 0, 1]], "shape"),
        ({"cameras": [[0, None]]}, "real numbers"),
        ({"frames": []}, "no frames"),
        ({"frames": 3}, "no frames"),
        ({"frames": [{"file_path": "0.png"}]}, "frame 0 has no transform_matrix"),
        ({"frames": [3]}, "frame 0 has no transform_matrix"),
        ({"frames": [{"transform_matrix": np.diag([-1, 1, 1, 1]).tolist()}]}, "camera 0: the rotation is a reflection"),
        ({"frames": [{"transform_matrix": np.eye(3).tolist()}]}, r"frame 0: transform_matrix .* shape \(4, 4\), got \(3, 3\)$"),
        ({"frames": [*frames(POSES), {"transform_matrix": [0, 90]}]}, r"frame 3: transform_matrix must .* got \(2,\)$"),
        ({"frames": [{"transform_matrix": [0, 90]}]}, r"frame 0: transform_matrix must .* got \(2,\)$"),
        ({"frames": [{"transform_matrix": None}]}, "frame 0: transform_matrix must be real numbers"),
        ({"frames": frames(POSES), "up": [1, 0, 0]}, "up must be"),
        ({"frames": frames(POSES), "up": "y"}, "up must be"),
        ({"frames": frames(POSES), "fl_x": "wide"}, "fl_x must be a number"),
        ({"frames": frames(POSES), "h": 0}, "h must be a number"),
        ({"frames": frames(POSES), "w": 10**400}, "w must be a number"),
        ({"frames": frames(POSES), "camera_angle_x": 3.2}, "camera_angle_x must be a number"),
        ({"frames": frames(POSES), "camera_angle_y": True}, "camera_angle_y must be a number"),
    ],
)
def test_a_malformed_file_of_cameras_is_refused_with_its_path(tmp_path: Path, document: object, message: str) -> None:
    path = write(tmp_path, document)
    with pytest.raises(ConfigError, match=message) as caught:
        camera.load_cameras(path)
    assert caught.value.path == path and str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cameras.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="JSON"):
        camera.load_cameras(path)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        camera.load_cameras(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        camera.load_cameras(tmp_path)


def test_rolled_cameras_are_doubted_and_those_of_a_world_that_is_up_elsewhere_by_name(tmp_path: Path) -> None:
    poses = camera.orbit([0, 45, 90, 200], [0, 20, -5, 10])
    assert camera.doubt_of(poses) == ""
    assert camera.doubt_of(camera.orbit([30], 90)) == ""
    turn = math.radians(20)
    rolled = poses.copy()
    across, up = poses[2, :3, 0], poses[2, :3, 1]
    rolled[2, :3, 0] = math.cos(turn) * across + math.sin(turn) * up
    rolled[2, :3, 1] = math.cos(turn) * up - math.sin(turn) * across
    assert camera.doubt_of(rolled) == "camera 2 is rolled by 20 degrees, and views are upright"
    frames = [{"transform_matrix": pose.tolist()} for pose in poses]
    document = {"camera_angle_x": 0.5, "frames": frames}
    misread = camera.read_transforms(document, path=tmp_path).poses
    assert 'is +Y up in its transforms.json, without "up": [0, 1, 0]?' in camera.doubt_of(misread)
    assert camera.doubt_of(camera.read_transforms(document | {"up": [0, 1, 0]}, path=tmp_path).poses) == ""
