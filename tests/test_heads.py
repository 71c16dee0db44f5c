"""The head renderer: one number is one head, seen consistently from everywhere."""

import functools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mvshared.camera import azimuth_elevation, mirror_poses, orbit
from mvshared.errors import CameraError, OptionError
from mvshared.heads import (
    DEFAULT_FOV_DEG,
    DEFAULT_RADIUS,
    HeadIdentity,
    HeadViews,
    Part,
    render,
    sample_identity,
)
from mvshared.heads.dataset import dataset_poses, render_dataset
from mvshared.heads.shape import HeadShape
from mvshared.heads.trace import BOX, Tracer
from mvshared.images import composite

FACE_PARTS = (Part.EYE, Part.BROW, Part.MOUTH, Part.NOSE)


@functools.cache
def around(number: int, *, size_px: int = 64) -> HeadViews:
    return render(number, orbit([0, 45, 90, 180, 270], 10, radius=DEFAULT_RADIUS), size_px=size_px)


def from_side(number: int, azimuth_deg: float, *, size_px: int = 48, elevation_deg: float = 10) -> HeadViews:
    return render(number, orbit([azimuth_deg], elevation_deg, radius=DEFAULT_RADIUS), size_px=size_px)


def assert_complete(views: HeadViews) -> None:
    """Every view shows a head, its normals are unit vectors, and all four pictures agree on what is background."""
    alpha = views.rgba[..., 3]
    empty = alpha == 0
    assert ((~empty).mean(axis=(1, 2)) > 0.25).all(), "a view is nearly blank"
    assert ((~empty).mean(axis=(1, 2)) < 0.95).all(), "the head fills a whole view"
    np.testing.assert_array_equal(views.normals[..., 3], alpha)
    np.testing.assert_array_equal(np.isinf(views.depth), empty)
    np.testing.assert_array_equal(views.parts == Part.BACKGROUND, empty)
    assert not np.isnan(views.depth).any()
    normals = views.normals[~empty][:, :3].astype(np.float64) / 127.5 - 1
    np.testing.assert_allclose(np.linalg.norm(normals, axis=-1), 1, atol=0.015)
    assert (normals[:, 2] > 0.2).mean() > 0.5, "most visible surface must face the camera"
    assert views.rgba[~empty][:, :3].std() > 10, "the head is one flat colour"


def reproject(views: HeadViews, poses: np.ndarray, *, first: int, second: int, size_px: int) -> tuple[np.ndarray, ...]:
    """Solid pixels of the first view seen by the second: their colours, depth there, and the second's colours and depth."""
    half = math.tan(math.radians(DEFAULT_FOV_DEG) / 2)
    rows, columns = np.nonzero(views.rgba[first, ..., 3] == 255)
    depth = views.depth[first, rows, columns].astype(np.float64)
    x = ((columns + 0.5) / size_px * 2 - 1) * half * depth
    y = (1 - (rows + 0.5) / size_px * 2) * half * depth
    world = np.stack([x, y, -depth, np.ones_like(x)]).T @ poses[first].T.astype(np.float64)
    local = world @ np.linalg.inv(poses[second].astype(np.float64)).T
    target_columns = np.floor((local[:, 0] / -local[:, 2] / half + 1) / 2 * size_px).astype(int)
    target_rows = np.floor((1 - local[:, 1] / -local[:, 2] / half) / 2 * size_px).astype(int)
    inside = (np.minimum(target_rows, target_columns) >= 0) & (np.maximum(target_rows, target_columns) < size_px)
    target = second, target_rows[inside], target_columns[inside]
    colors = views.rgba[first, rows, columns][inside][:, :3].astype(int)
    return colors, -local[inside, 2], views.rgba[target][:, :3].astype(int), views.depth[target]


def test_one_number_gives_the_same_bytes_every_time() -> None:
    poses = orbit([20, 200], 5, radius=DEFAULT_RADIUS)
    first, again = render(11, poses, size_px=32), render(sample_identity(11), poses, size_px=32)
    for array, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(array, other)


def test_a_view_does_not_depend_on_the_views_rendered_with_it() -> None:
    poses = orbit([0, 70, 180], [0, 20, -10], radius=DEFAULT_RADIUS)
    together, alone = render(5, poses, size_px=40), render(5, poses[1:2], size_px=40)
    np.testing.assert_array_equal(together.parts[1], alone.parts[0])
    assert np.abs(together.rgba[1].astype(int) - alone.rgba[0]).max() <= 1
    np.testing.assert_allclose(together.depth[1], alone.depth[0], atol=1e-5)


def test_different_numbers_give_different_heads() -> None:
    pictures = {from_side(number, 20, size_px=32).rgba.tobytes() for number in range(12)}
    assert len(pictures) == 12


def test_identities_cover_every_style() -> None:
    heads = [sample_identity(number) for number in range(600)]
    assert len({head.hair_style for head in heads}) == 14
    assert {head.hat_style for head in heads} == {"none", "beanie", "brim", "cap", "headband"}
    assert {head.animal_ears for head in heads} == {"none", "cat", "bear", "rabbit"}
    assert {head.glasses_style for head in heads} == {"none", "round", "square"}
    assert {head.collar_style for head in heads} == {"none", "ring", "turtleneck", "scarf", "shirt"}
    assert {head.mouth_style for head in heads} == {"line", "smile", "open"}
    assert {head.ear_style for head in heads} == {"human", "elf"}
    assert {head.beard for head in heads} == {head.moustache for head in heads} == {True, False}
    assert any(head.skin_color[1] > head.skin_color[0] for head in heads), "no fantasy skin"


def test_numpy_integers_are_numbers_of_heads_too() -> None:
    assert sample_identity(np.int64(7)) == sample_identity(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [-1, 1.5, True, "3", None])
def test_what_is_no_number_of_a_head_is_refused(number: object) -> None:
    with pytest.raises(OptionError, match="identity"):
        sample_identity(number)  # type: ignore[arg-type]


@pytest.mark.parametrize("number", range(24))
def test_heads_render_completely(number: int) -> None:
    assert_complete(around(number, size_px=24))


@pytest.mark.slow
def test_three_hundred_heads_render_completely() -> None:
    for number in range(1000, 1300):
        assert_complete(render(number, orbit([30, 160], 10, radius=DEFAULT_RADIUS), size_px=24))


def test_every_style_of_hair_and_hat_renders_completely() -> None:
    seen: set[str] = set()
    for number in range(400):
        head = sample_identity(number)
        styles = {head.hair_style, f"hat {head.hat_style}", f"ears {head.animal_ears}", f"collar {head.collar_style}"}
        if styles - seen:
            seen |= styles
            assert_complete(render(head, orbit([45], 10, radius=DEFAULT_RADIUS), size_px=24))
    assert len(seen) == 14 + 5 + 4 + 5


@pytest.mark.parametrize("number", [0, 3, 8, 13])
def test_a_point_seen_in_two_views_has_the_same_place_and_color(number: int) -> None:
    size_px = 128
    poses = orbit([0, 25], [5, 15], radius=DEFAULT_RADIUS)
    views = render(number, poses, size_px=size_px)
    colors, depth, other_colors, other_depth = reproject(views, poses, first=0, second=1, size_px=size_px)
    assert (depth < other_depth - 0.04).mean() < 0.03, "points float in front of what the other view sees"
    both = np.abs(depth - other_depth) < 0.03
    assert both.mean() > 0.6
    difference = np.abs(colors - other_colors)[both].max(axis=1)
    assert np.median(difference) <= 8
    assert (difference < 40).mean() > 0.9


@pytest.mark.parametrize("number", [1, 6])
def test_twice_the_size_downsampled_is_the_same_picture(number: int) -> None:
    pose = orbit([30], 10, radius=DEFAULT_RADIUS)
    small = composite(render(number, pose, size_px=64).rgba)[0].astype(float)
    large = composite(render(number, pose, size_px=128).rgba)[0].astype(float)
    downsampled = large.reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(downsampled - small).mean() < 2.5
    assert np.abs(downsampled - small).std() < 9


def test_mirrored_cameras_see_mirrored_shapes() -> None:
    number = next(n for n in range(100) if sample_identity(n).hair_style == "bob" and sample_identity(n).collar_style == "ring")
    poses = orbit([35], 10, radius=DEFAULT_RADIUS)
    views = render(number, np.concatenate([poses, mirror_poses(poses)]), size_px=64)
    here, there = views.depth[0], views.depth[1, :, ::-1]
    assert (np.isinf(here) != np.isinf(there)).mean() < 0.01
    both = np.isfinite(here) & np.isfinite(there)
    assert np.median(np.abs(here[both] - there[both])) < 0.002
    assert (views.parts[0] != views.parts[1, :, ::-1]).mean() < 0.02
    unflipped = both & np.isfinite(views.depth[1])
    assert np.abs(here[unflipped] - views.depth[1][unflipped]).mean() > 0.02, "the head must not look the same without the flip"


def test_faces_are_seen_from_the_front_and_never_from_the_back() -> None:
    for number in range(6):
        front, back = (np.isin(from_side(number, azimuth).parts, FACE_PARTS) for azimuth in (0, 180))
        assert front.mean() > 0.02
        assert not back.any()
        assert (from_side(number, 0).parts == Part.EYE).sum() >= 20
        assert not np.isin(from_side(number, 140, elevation_deg=25).parts, (Part.MOUTH, Part.BROW)).any()


def test_mouths_are_large_and_distinct_enough_to_read() -> None:
    heads = [sample_identity(number) for number in range(600)]
    distances = [np.linalg.norm(np.subtract(head.mouth_color, head.skin_color)) for head in heads]
    assert min(distances) > 0.45, "the lips have nearly the colour of the skin"
    heights = []
    for number in range(40):
        head = sample_identity(number)
        if not (head.moustache or head.beard):
            mouth = from_side(number, 0, size_px=128, elevation_deg=0).parts[0] == Part.MOUTH
            heights += [mouth.sum(axis=0).max()]
    assert len(heights) >= 25
    assert min(heights) >= 4


def test_the_front_tells_whether_there_is_a_ponytail() -> None:
    heads = [sample_identity(number) for number in range(600)]
    tails = [head for head in heads if head.hair_style == "ponytail"]
    assert len(tails) >= 20
    for head in heads:
        assert (head.hat_style == "headband") == (head.hair_style == "ponytail")
    assert min(np.abs(np.subtract(head.hat_band_color, head.hair_color)).sum() for head in tails) >= 0.6
    for head in tails[:8]:
        parts = render(head, orbit([-15, 15], 10, radius=DEFAULT_RADIUS), size_px=64).parts
        assert ((parts == Part.HAT_BAND).sum(axis=(1, 2)) >= 40).all()


def test_eyes_are_large_enough_to_read() -> None:
    widths = []
    for number in range(40):
        if sample_identity(number).glasses_style == "none" and sample_identity(number).hat_style == "none":
            eyes = from_side(number, 0, size_px=128).parts[0] == Part.EYE
            widths += [np.ptp(np.nonzero(half.any(axis=0))[0]) + 1 for half in (eyes[:, :64], eyes[:, 64:])]
    assert len(widths) >= 12
    assert np.median(widths) >= 14
    assert min(widths) >= 10


def test_heads_fill_the_frame_and_stand_on_its_lower_border() -> None:
    for number in range(8):
        seen = around(number).rgba[0, ..., 3] > 0
        rows = np.nonzero(seen.any(axis=1))[0]
        assert rows[0] <= 0.25 * 64
        assert rows[-1] == 63
        assert not seen[:32, 0].any() and not seen[:32, -1].any()


def test_edges_are_antialiased() -> None:
    alpha = around(2).rgba[..., 3]
    levels = set(np.unique(alpha).tolist())
    assert levels == {0, 64, 128, 191, 255}
    assert 0.005 < np.isin(alpha, (64, 128, 191)).mean() < 0.1


def test_silhouettes_have_no_seams_inside() -> None:
    for number in range(6):
        seen = around(number).rgba[..., 3] > 0
        ringed = seen[:, :-2, 1:-1] & seen[:, 2:, 1:-1] & seen[:, 1:-1, :-2] & seen[:, 1:-1, 2:]
        assert (ringed & ~seen[:, 1:-1, 1:-1]).sum() <= 2


@pytest.mark.parametrize(
    "pose",
    [
        pytest.param(orbit([0], 90, radius=DEFAULT_RADIUS), id="above"),
        pytest.param(orbit([0], -90, radius=DEFAULT_RADIUS), id="below"),
        pytest.param(orbit([123], -40, radius=2.2), id="near"),
        pytest.param(orbit([10], 0, radius=0.2), id="inside"),
        pytest.param(orbit([10], 0, radius=40), id="far"),
    ],
)
def test_any_pose_renders(pose: np.ndarray) -> None:
    views = render(4, pose, size_px=24)
    assert (views.rgba[..., 3] > 0).any()
    assert not np.isnan(views.depth).any()
    assert (views.depth >= 0).all()


def test_a_camera_that_looks_away_sees_nothing() -> None:
    pose = orbit([0], 0, radius=DEFAULT_RADIUS)
    pose[0, :3, :3] = pose[0, :3, :3] @ np.diag([-1.0, 1.0, -1.0]).astype(np.float32)
    views = render(4, pose, size_px=16)
    assert not views.rgba.any() and not views.normals.any() and not views.parts.any()
    assert np.isinf(views.depth).all()


def test_depth_is_measured_along_the_optical_axis() -> None:
    pose = orbit([0], 0, radius=DEFAULT_RADIUS)
    wide = render(9, pose, size_px=65, fov_deg=60).depth[0]
    nose_to_camera = wide[28:36, 32].min()
    assert 2.6 < nose_to_camera < 3.1
    turned = pose.copy()
    c, s = math.cos(0.3), math.sin(0.3)
    turned[0, :3, :3] = pose[0, :3, :3] @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]], np.float32)
    aside = render(9, turned, size_px=65, fov_deg=60).depth[0]
    assert aside[np.isfinite(aside)].min() == pytest.approx(nose_to_camera * c, abs=0.15)


def test_more_heads_than_can_be_counted_in_memory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="identities must be at most 10,000,000 heads at a time"):
        render_dataset(tmp_path / "out", range(10**23), views=2, size_px=16)


@pytest.mark.parametrize("size_px", [0, 7, 2049, -8, 32.0, True])
def test_sizes_outside_the_bounds_are_refused(size_px: int) -> None:
    with pytest.raises(OptionError, match="size_px"):
        render(0, orbit([0], 0, radius=DEFAULT_RADIUS), size_px=size_px)


@pytest.mark.parametrize("fov_deg", [0.0, 121.0, math.nan, -30.0])
def test_fields_of_view_outside_the_bounds_are_refused(fov_deg: float) -> None:
    with pytest.raises(OptionError, match="fov_deg"):
        render(0, orbit([0], 0, radius=DEFAULT_RADIUS), size_px=16, fov_deg=fov_deg)


def test_cameras_that_are_no_poses_are_refused() -> None:
    pose = orbit([0, 0], 0, radius=DEFAULT_RADIUS)
    scaled = pose * np.array([2, 2, 2, 1], np.float32)
    for cameras in (pose[0], np.full((1, 4, 4), np.nan), scaled, np.zeros((0, 4, 4))):
        with pytest.raises(CameraError):
            render(0, cameras, size_px=16)


def test_looking_up_candidates_finds_the_same_surface_as_asking_every_part() -> None:
    for number in (0, 2, 7):
        shape, tracer = HeadShape(sample_identity(number)), Tracer(sample_identity(number))
        points = np.random.default_rng(number).uniform(-0.95 * BOX, 0.95 * BOX, (3, 40_000)).astype(np.float32)
        every = np.stack([shape.distance_of(index, *points) for index in range(len(shape.parts))])
        near = np.abs(every.min(axis=0)) < 0.05
        assert near.sum() > 500
        distance, owner = tracer._nearest(points[:, near])
        wrong = np.abs(distance - every.min(axis=0)[near]) > 1e-6
        assert wrong.mean() < 0.002
        assert (owner != every.argmin(axis=0)[near]).mean() < 0.002


def test_identities_are_values() -> None:
    head = sample_identity(1)
    assert isinstance(head, HeadIdentity)
    assert hash(head) == hash(sample_identity(1))
    with pytest.raises(AttributeError):
        head.lid = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(("side", "lit", "other"), [(-0.8, slice(0, 32), slice(32, 64)), (0.8, slice(32, 64), slice(0, 32))])
def test_the_side_of_the_light_is_the_brighter_one(side: float, lit: slice, other: slice) -> None:
    head = replace(sample_identity(3), light=(side, 0.6, 0.0))
    views = render(head, orbit([0], 5, radius=DEFAULT_RADIUS), size_px=64)
    grey = np.where(views.parts[0] == Part.SKIN, views.rgba[0, ..., :3].mean(-1), np.nan)
    assert np.nanmean(grey[:, lit]) > np.nanmean(grey[:, other]) + 10


def test_a_quarter_of_a_data_set_s_views_show_the_face_from_eye_level_or_above() -> None:
    seen = azimuth_elevation(np.concatenate([dataset_poses(number, views=8) for number in range(200)]))
    azimuths, elevations = seen.azimuths_deg.reshape(200, 8), seen.elevations_deg.reshape(200, 8)
    front, around = (azimuths[:, :2] + 180) % 360 - 180, np.sort((azimuths[:, 2:] + 180) % 360)
    assert 34 < np.abs(front).max() <= 35.001
    assert -1e-3 < elevations[:, :2].min() < 1 and 19 < elevations[:, :2].max() < 20 + 1e-3
    assert -5.001 < elevations[:, 2:].min() < -4 and 29 < elevations[:, 2:].max() < 30.001
    assert (np.abs(around - np.arange(6) * 60 - 30) <= 30 + 1e-3).all(), "one of the others in each sixth of the circle"


@pytest.mark.parametrize("axis", [0, 1])
def test_eyes_look_where_the_gaze_goes(axis: int) -> None:
    """To the right of the picture and up, both of them."""
    centres = []
    for amount in (-0.015, 0.015):
        gaze = (amount, 0.0) if axis == 0 else (0.0, amount)
        head = replace(sample_identity(3), gaze=gaze, lid=0.0, lashes=0.0, light=(0.5, 0.6, 0.0))
        views = render(head, orbit([0], 0, radius=DEFAULT_RADIUS), size_px=256)
        dark = (views.parts[0] == Part.EYE) & (views.rgba[0, ..., :3].mean(-1) < 70)
        eyes = [np.argwhere(dark[:, half])[:, 1 - axis].mean() for half in (slice(0, 128), slice(128, 256))]
        centres.append(np.array(eyes) * (1 if axis == 0 else -1))
    assert (centres[1] - centres[0] > 1).all()


def test_front_views_show_noses() -> None:
    for number in range(4):
        views = render(number, orbit([0], 5, radius=DEFAULT_RADIUS), size_px=64)
        assert (views.parts == Part.NOSE).mean() > 0.001
