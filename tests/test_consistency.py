"""Consistency by reprojection: true renders score best, copies and other wrong sets badly, with depth and without."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

import mvshared.consistency
from mvshared import metrics
from mvshared.camera import orbit
from mvshared.captures import load_capture, read_views, write_capture
from mvshared.cli import run
from mvshared.consistency import Consistency, consistency, foreground, neighbour_pairs
from mvshared.errors import CameraError, DatasetError, ImageError, MvError, OptionError, OutputError
from mvshared.heads import DEFAULT_FOV_DEG, DEFAULT_RADIUS, HeadViews, render
from mvshared.images import composite, load_image
from mvshared.projection import project, rays, sample, unproject

SIZE_PX = 80
Pictures = NDArray[np.uint8]


def cameras(views: int, *, elevation_deg: float = 10.0) -> NDArray[np.float32]:
    return orbit(45 + np.arange(views) * 360 / views, elevation_deg, radius=DEFAULT_RADIUS)


@pytest.fixture(scope="module", params=[(0, 4), (2, 8)], ids=lambda value: f"head {value[0]}, {value[1]} views")
def head(request: pytest.FixtureRequest) -> HeadViews:
    identity, views = request.param
    return render(identity, cameras(views), size_px=SIZE_PX)


@pytest.fixture(scope="module")
def estimated(head: HeadViews) -> Consistency:
    return score(head.rgba, None)


@pytest.fixture(scope="module")
def truth() -> HeadViews:
    return render(0, cameras(4), size_px=SIZE_PX)


def score(rgba: Pictures, depth: NDArray[np.float32] | None) -> Consistency:
    """With depth of the truth, or estimated within the pictures' own silhouettes."""
    masks = None if depth is not None else rgba[..., 3] > 127
    return consistency(composite(rgba), cameras(len(rgba)), fov_deg=DEFAULT_FOV_DEG, depth=depth, masks=masks)


def psnr_db(result: Consistency) -> float:
    assert result.figures.psnr_db is not None
    return result.figures.psnr_db


def gain_db(result: Consistency) -> float:
    assert result.gain_db is not None
    return result.gain_db


def copied(rgba: Pictures) -> Pictures:
    return np.repeat(rgba[:1], len(rgba), axis=0)


def swapped(rgba: Pictures) -> Pictures:
    """Every second picture changes places with the one after it."""
    order = np.arange(len(rgba)).reshape(-1, 2)[:, ::-1].ravel()
    return rgba[order]


def mirrored(rgba: Pictures) -> Pictures:
    return rgba[:, :, ::-1]


def distorted(rgba: Pictures) -> Pictures:
    """Each picture bent in another way, by a few hundredths of its size."""
    size = rgba.shape[1]
    row, column = np.mgrid[:size, :size].astype(np.float32)
    result = []
    for view, picture in enumerate(rgba.astype(np.float32)):
        coarse = np.random.default_rng(view).normal(0, 0.04 * size, (2, 5, 5)).astype(np.float32)
        bends = [np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in coarse]
        x, y = (np.clip(a + bend, 0, size - 1) for a, bend in zip((column, row), bends, strict=True))
        result.append(np.rint(sample(picture, x, y)[0]).astype(np.uint8))
    return np.stack(result)


WRONG = [copied, swapped, mirrored, distorted]


@pytest.mark.parametrize("wrong", WRONG)
def test_with_given_depth_true_renders_score_far_above_wrong_pictures(
    head: HeadViews, wrong: Callable[[Pictures], Pictures]
) -> None:
    true, other = score(head.rgba, head.depth), score(wrong(head.rgba), head.depth)
    assert psnr_db(true) >= psnr_db(other) + 8
    assert true.figures.ssim is not None and other.figures.ssim is not None
    assert true.figures.ssim >= other.figures.ssim + 0.2
    assert gain_db(true) >= gain_db(other) + 8
    assert true.figures.visible_share == other.figures.visible_share


@pytest.mark.parametrize("wrong", WRONG)
def test_with_estimated_depth_true_renders_score_above_wrong_pictures(
    head: HeadViews, estimated: Consistency, wrong: Callable[[Pictures], Pictures]
) -> None:
    other = score(wrong(head.rgba), None)
    assert psnr_db(estimated) >= psnr_db(other) + 2
    assert gain_db(estimated) >= gain_db(other) + 2


@pytest.mark.parametrize("depth", ["given", "estimated"])
@pytest.mark.parametrize("picture", [0, 2])
def test_copies_of_any_picture_gain_nothing_and_true_renders_much(truth: HeadViews, depth: str, picture: int) -> None:
    given = truth.depth if depth == "given" else None
    copies = score(np.repeat(truth.rgba[picture : picture + 1], 4, axis=0), given)
    assert copies.gain_db == 0 and copies.depth == depth
    assert copies.figures.psnr_db == copies.exchanged.psnr_db and copies.figures.ssim == copies.exchanged.ssim
    if picture == 0:
        assert gain_db(score(truth.rgba, given)) >= (10 if depth == "given" else 4)


def test_true_renders_agree_almost_exactly_where_both_see_the_same(head: HeadViews) -> None:
    figures = score(head.rgba, head.depth).figures
    assert figures.psnr_db is not None and figures.psnr_db > 24
    assert figures.ssim is not None and figures.ssim > 0.88
    assert figures.visible_share > (0.3 if len(head.rgba) == 4 else 0.55)


def test_estimated_depth_brings_the_colours_that_true_depth_does(head: HeadViews, estimated: Consistency) -> None:
    given = {(warp.view, warp.neighbour): warp for warp in score(head.rgba, head.depth).warps}
    near = [
        np.abs(warp.picture.astype(float) - other.picture).max(axis=-1)[both] < 40
        for warp in estimated.warps
        if (both := warp.visible & (other := given[warp.view, warp.neighbour]).visible).any()
    ]
    assert np.concatenate(near).mean() > 0.85


def test_the_figures_are_those_of_the_warps(truth: HeadViews) -> None:
    result = score(truth.rgba, truth.depth)
    pictures = composite(truth.rgba)
    errors, counts = [], []
    for warp in result.warps:
        [value] = metrics.psnr(warp.picture[None], pictures[[warp.view]], mask=warp.visible[None])
        errors.append(10 ** (-value / 10))
        counts.append(warp.visible.sum())
        assert (warp.picture[~warp.visible] == 255).all()
    assert psnr_db(result) == pytest.approx(-10 * math.log10(np.average(errors, weights=counts)), abs=0.05)
    seen = [np.any([warp.visible for warp in result.warps if warp.view == view], axis=0).sum() for view in range(4)]
    objects = np.isfinite(truth.depth).sum(axis=(1, 2))
    assert result.figures.visible_share == pytest.approx(np.sum(seen) / objects.sum())
    assert [view.visible_share for view in result.views] == pytest.approx(list(seen / objects))


def test_hidden_surfaces_are_not_compared() -> None:
    """A small near plate hides a part of a far wall from one of two cameras; no pixel of the other's hidden part is visible."""
    poses = orbit([-15, 15], 0, radius=4)
    directions = rays((64, 64), 40)
    depth, pictures = [], []
    for pose in poses.astype(np.float64):
        world = directions @ pose[:3, :3].T
        wall = (-1 - pose[2, 3]) / world[..., 2]
        plate = (0.5 - pose[2, 3]) / world[..., 2]
        hit = np.abs(pose[:2, 3] + plate[..., None] * world[..., :2]).max(axis=-1) < 0.3
        depth.append(np.where(hit, plate, wall))
        pictures.append(np.where(hit[..., None], [1.0, 0, 0], [0, 0, 1.0]))
    result = consistency(np.stack(pictures), poses, fov_deg=40, depth=np.stack(depth).astype(np.float32))
    for warp in result.warps:
        own = pictures[warp.view][warp.visible]
        np.testing.assert_allclose(warp.picture[warp.visible] / 255, own, atol=0.01)
    hidden = ~result.warps[0].visible & (np.stack(pictures)[result.warps[0].view, ..., 2] == 1)
    assert hidden[20:44, 20:44].sum() > 20
    assert psnr_db(result) > 60


def test_points_are_found_again_by_projection() -> None:
    [pose] = orbit([30], 25, radius=3)
    depth = np.random.default_rng(0).uniform(2, 4, (6, 9)).astype(np.float32)
    x, y, z = project(unproject(depth, pose, 50), pose, (6, 9), 50)
    row, column = np.mgrid[:6, :9]
    for found, expected in ((x, column), (y, row), (z, depth)):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_cameras_are_those_of_the_renderer(truth: HeadViews) -> None:
    """Depth to points and normals of their surface: the renderer's normals, turned to the world, agree."""
    points = unproject(np.where(np.isfinite(truth.depth[0]), truth.depth[0], np.nan), cameras(4)[0], DEFAULT_FOV_DEG)
    across, down = np.diff(points, axis=1)[:-1], np.diff(points, axis=0)[:, :-1]
    normal = np.cross(down, across)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    given = (truth.normals[0, :-1, :-1, :3] / 127.5 - 1) @ cameras(4)[0, :3, :3].T
    cosine = (normal * given).sum(axis=-1)
    assert np.nanmedian(cosine) > 0.98


@pytest.mark.parametrize(
    ("azimuths", "pairs"),
    [
        ([0, 90, 180, 270], [(0, 1), (0, 3), (1, 2), (2, 3)]),
        (range(0, 360, 45), [(0, 1), (0, 7), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7)]),
        ([0, 60], [(0, 1)]),
        ([0, 40, 180], [(0, 1)]),
        ([0, 1, 90], [(0, 2), (1, 2)]),
        # View 0 has four that are hardly farther than the nearest, and the fourth has two that are nearer than view 0.
        ([0, 10, -10, -12, 14, 20, 22], [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 5), (1, 6), (4, 5), (4, 6)]),
    ],
)
def test_neighbours_are_the_nearest_views_that_share_a_surface(azimuths: Any, pairs: list[tuple[int, int]]) -> None:
    assert neighbour_pairs(orbit(list(azimuths), 0)) == pairs


def test_a_view_without_neighbours_has_no_figures() -> None:
    poses = orbit([0, 45, 190], 0, radius=DEFAULT_RADIUS)
    head = render(1, poses, size_px=64)
    result = consistency(composite(head.rgba), poses, fov_deg=DEFAULT_FOV_DEG, depth=head.depth)
    assert result.views[2] == (None, None, 0.0)
    assert result.views[0].psnr_db is not None and result.figures.psnr_db is not None


def test_flat_copies_score_infinitely_but_gain_nothing() -> None:
    depth = np.full((2, 32, 32), np.inf, np.float32)
    depth[:, 8:24, 8:24] = 3
    result = consistency(np.full((2, 32, 32, 3), 0.5), orbit([0, 10], 0, radius=3), fov_deg=30, depth=depth)
    assert result.figures.psnr_db == math.inf and result.gain_db == 0


def test_bytes_and_floats_give_the_same(truth: HeadViews) -> None:
    pictures = composite(truth.rgba)
    both = [consistency(x, cameras(4), fov_deg=DEFAULT_FOV_DEG, depth=truth.depth) for x in (pictures, pictures / 255)]
    assert both[0].figures == pytest.approx(both[1].figures, rel=1e-5)


def test_silhouettes_come_from_a_plain_background() -> None:
    pictures = np.full((2, 32, 32, 3), 200, np.uint8)
    pictures[0, 10:20, 5:30] = [250, 20, 20]
    pictures[1] = np.random.default_rng(0).integers(0, 255, (32, 32, 3))
    found = foreground(pictures)
    assert found[0].sum() == 250 and found[0, 10:20, 5:30].all()
    assert found[1].all()


DEPTH = np.ones((2, 32, 32), np.float32)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("pictures", {"pictures": np.zeros((1, 32, 32, 3))}),
        ("pictures", {"pictures": np.zeros((2, 32, 32))}),
        ("pictures", {"pictures": np.zeros((2, 32, 32, 4))}),
        ("pictures", {"pictures": np.zeros((2, 32, 32, 3), np.int32)}),
        ("pictures", {"pictures": np.full((2, 32, 32, 3), 1.5)}),
        ("pictures", {"pictures": np.full((2, 32, 32, 3), np.nan)}),
        ("fov_deg", {"fov_deg": 0.0}),
        ("fov_deg", {"fov_deg": math.nan}),
        ("depth", {"depth": DEPTH[:1]}),
        ("depth", {"depth": DEPTH * np.nan}),
        ("depth", {"depth": -DEPTH}),
        ("depth", {"depth": DEPTH.astype(np.float64) * 1e-60}),  # zero in float32
        ("depth", {"depth": DEPTH.astype(np.int64)}),
        ("depth", {"depth": DEPTH * np.inf}),
        ("depth", {"depth": [[1.0]]}),
        ("masks", {"depth": None, "masks": [[True]]}),
        ("pictures", {"pictures": [[0.5]]}),
        ("fov_deg", {"fov_deg": "30"}),
        ("masks", {"depth": None, "masks": np.zeros((2, 32, 32), np.bool_)}),
        ("masks", {"depth": None, "masks": np.ones((2, 8, 8), np.bool_)}),
        ("masks", {"depth": None, "masks": np.ones((2, 32, 32))}),
    ],
)
def test_arrays_that_do_not_fit_are_refused_by_name(name: str, changes: dict[str, Any]) -> None:
    given: dict[str, Any] = {
        "pictures": np.zeros((2, 32, 32, 3)), "poses": orbit([0, 40], 0), "fov_deg": 30.0, "depth": DEPTH
    }  # fmt: skip
    with pytest.raises(OptionError) as caught:
        consistency(**(given | changes))
    assert caught.value.name == name


@pytest.mark.parametrize(
    ("poses", "says"),
    [
        (orbit([0, 40, 80], 0), "one camera per picture"),
        (orbit([0, 0], 0), "5 to 100 degrees apart"),
        (orbit([0, 180], 0), "5 to 100 degrees apart"),
        (np.concatenate([orbit([0], 0), orbit([40], 0) @ np.diag([-1, 1, -1, 1])]), "degrees apart"),
        (orbit([0, 40], 0, radius=1e6) @ np.diag([1, 1, 1, 1]) + 1e30 * np.eye(1, 16, 3).reshape(4, 4), r"is 1e\+30 from the"),
        (np.stack([orbit([0], 0)[0], orbit([40], 0)[0] + np.eye(4, k=3) * 0 + 50 * np.eye(1, 16, 7).reshape(4, 4)]), "look"),
    ],
)
def test_cameras_that_cannot_be_compared_are_refused(poses: NDArray[np.float32], says: str) -> None:
    with pytest.raises(CameraError, match=says):
        consistency(np.zeros((2, 32, 32, 3)), poses, fov_deg=30)


# Folders


@pytest.fixture
def folder(tmp_path: Path, truth: HeadViews) -> Path:
    """A capture in tmp_path / "views" with depth files that its transforms.json does not name."""
    target = tmp_path / "views"
    write_capture(target, truth.rgba, None, cameras(4), DEFAULT_FOV_DEG)
    for view, depth in enumerate(truth.depth):
        np.save(target / f"depth_{view:03}.npy", depth)
    return target


def change(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((folder / "transforms.json").read_text())
    edit(document)
    (folder / "transforms.json").write_text(json.dumps(document))


def add_depth(document: dict[str, Any]) -> None:
    for view, frame in enumerate(document["frames"]):
        frame["depth_file_path"] = f"depth_{view:03}.npy"


@pytest.mark.parametrize("depth", ["given", "estimated"])
def test_evaluate_prints_and_writes_a_folders_consistency(
    folder: Path, truth: HeadViews, depth: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if depth == "given":
        change(folder, add_depth)
    out = folder.parent / "out"
    assert run(["evaluate", str(folder), "-o", str(out)]) == 0
    captured = capfd.readouterr()
    assert run(["evaluate", str(folder), "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert json.loads((out / "evaluation.json").read_text()) == document
    expected = score(truth.rgba, truth.depth if depth == "given" else None)
    assert document["psnr_db"] == pytest.approx(expected.figures.psnr_db, abs=0.3)
    assert document["depth"] == depth and document["per_view"][0]["file"] == "view_000.png"
    for name in ("psnr_db", "ssim", "visible_share", "exchanged_psnr_db", "exchanged_ssim", "gain_db"):
        assert f"{name:18} {document[name]:.3f}" in captured.out
    assert captured.err == ""
    assert load_image(out / "sheet.png").shape == (8 * SIZE_PX, 3 * SIZE_PX, 4)


def test_a_folder_of_copies_gets_a_note(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for view in range(1, 4):
        (folder / f"view_{view:03}.png").write_bytes((folder / "view_000.png").read_bytes())
    assert run(["evaluate", str(folder)]) == 0
    captured = capfd.readouterr()
    assert "gain_db            0.000" in captured.out
    assert captured.err.startswith("note: ") and captured.err.count("\n") == 1


@pytest.mark.parametrize("depth", ["thousandths", "sparse"])
def test_depth_that_brings_no_figures_gets_a_note(
    folder: Path, truth: HeadViews, depth: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for view, given in enumerate(truth.depth):
        few = np.zeros(given.shape, bool)
        few[::9, ::9] = True
        np.save(folder / f"depth_{view:03}.npy", given * 1000 if depth == "thousandths" else np.where(few, given, np.inf))
    change(folder, add_depth)
    assert run(["evaluate", str(folder)]) == 0
    captured = capfd.readouterr()
    assert "psnr_db            none" in captured.out
    assert captured.err.startswith("note: no point of a view was found in another: the depth is in another unit")
    assert captured.err.count("\n") == 1


def test_masks_of_a_capture_stand_for_alpha(folder: Path, truth: HeadViews) -> None:
    Image.fromarray(np.where(truth.rgba[1, ..., 3] > 0, 255, 0).astype(np.uint8)).save(folder / "mask.png")
    change(folder, lambda document: document["frames"][1].update(mask_path="mask.png"))
    masks = read_views(load_capture(folder)).masks
    np.testing.assert_array_equal(masks[1], truth.rgba[1, ..., 3] > 0)
    np.testing.assert_array_equal(masks[0], truth.rgba[0, ..., 3] >= 128)


def test_the_field_of_view_is_that_of_upright_pictures(folder: Path) -> None:
    no_lens(folder)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for number, path in enumerate(sorted(folder.glob("view_*.png"))):
        Image.new("RGB", (32, 64)).save(folder / f"turned_{number}.jpg", exif=exif)
        path.unlink()

    def edit(document: dict[str, Any]) -> None:
        del document["w"], document["h"]
        document["camera_angle_x"] = 2 * np.arctan(1.0)  # twice as wide as high
        for number, frame in enumerate(document["frames"]):
            frame["file_path"] = f"turned_{number}.jpg"

    change(folder, edit)
    assert load_capture(folder).fov_deg == pytest.approx(2 * np.degrees(np.arctan(0.5)))


def no_transforms(folder: Path) -> None:
    (folder / "transforms.json").unlink()


def one_view(folder: Path) -> None:
    change(folder, lambda document: document.update(frames=document["frames"][:1]))


def no_lens(folder: Path) -> None:
    def edit(document: dict[str, Any]) -> None:
        for name in ("fl_x", "fl_y", "camera_angle_x", "camera_angle_y"):
            document.pop(name, None)

    change(folder, edit)


def other_size(folder: Path) -> None:
    Image.new("RGB", (32, 48)).save(folder / "view_002.png")


def no_picture(folder: Path) -> None:
    (folder / "view_002.png").write_text("no picture")


def clear_picture(folder: Path) -> None:
    Image.new("RGBA", (SIZE_PX, SIZE_PX)).save(folder / "view_003.png")


def bad_depth(folder: Path) -> None:
    change(folder, add_depth)
    np.save(folder / "depth_001.npy", np.ones((4, 4), np.float32))


def text_depth(folder: Path) -> None:
    change(folder, add_depth)
    (folder / "depth_001.npy").write_text("deep")


def negative_depth(folder: Path) -> None:
    change(folder, add_depth)
    np.save(folder / "depth_001.npy", np.zeros((SIZE_PX, SIZE_PX), np.float32))


def tiny_depth(folder: Path) -> None:
    change(folder, add_depth)
    np.save(folder / "depth_001.npy", np.full((SIZE_PX, SIZE_PX), 1e-60))  # zero in float32


def one_camera(folder: Path) -> None:
    def edit(document: dict[str, Any]) -> None:
        for frame in document["frames"]:
            frame["transform_matrix"] = document["frames"][0]["transform_matrix"]

    change(folder, edit)


def wide_lens(folder: Path) -> None:
    no_lens(folder)
    change(folder, lambda document: document.update(camera_angle_x=2.9))


def zoomed(folder: Path) -> None:
    change(folder, lambda document: document["frames"][1].update(fl_x=1.2 * document["fl_x"]))


@pytest.mark.parametrize(
    ("damage", "kind", "says"),
    [
        (no_transforms, DatasetError, "transforms.json: no such file"),
        (one_view, DatasetError, "1 frame"),
        (no_lens, DatasetError, "says no field of view"),
        (zoomed, DatasetError, "all frames must have one field of view, and theirs are "),
        (other_size, DatasetError, "view_002.png: has 32 x 48 pixels, the first picture 80 x 80"),
        (no_picture, ImageError, "view_002.png"),
        (clear_picture, DatasetError, "view_003.png: shows nothing"),
        (bad_depth, DatasetError, "depth_001.npy: must hold floats of shape (80, 80)"),
        (text_depth, DatasetError, "depth_001.npy"),
        (negative_depth, DatasetError, "depth_001.npy: must be positive"),
        (tiny_depth, DatasetError, "depth_001.npy: must be positive in float32"),
        (one_camera, DatasetError, "transforms.json: no two of the"),
        (wide_lens, DatasetError, "transforms.json: fov_deg must be 1 to 150 degrees"),
    ],
)
def test_a_folder_that_cannot_be_evaluated_is_refused_in_one_line(
    damage: Callable[[Path], None], kind: type[MvError], says: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    out = folder.parent / "out"
    assert run(["evaluate", str(folder), "-o", str(out)]) == kind.exit_code
    captured = capfd.readouterr()
    assert says in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not out.exists()


def test_a_sheet_of_somebody_else_is_in_the_way_before_anything_is_computed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "sheet.png").write_bytes(b"mine")
    monkeypatch.setattr(mvshared.consistency, "consistency", lambda *_, **__: pytest.fail("the figures are computed"))
    assert run(["evaluate", str(folder), "-o", str(folder)]) == OutputError.exit_code
    assert "holds sheet.png, which no evaluation left there" in capfd.readouterr().err


@pytest.mark.parametrize(
    "option",
    ["--model demo", "--identities 0:4", "--steps 3", "--guidance 2", "--normals", "--seed 0", "--dtype float32",
     "--backend torch", "--device cpu"],
)  # fmt: skip
def test_options_about_a_model_are_refused_with_a_folder(option: str, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", str(folder), *option.split()]) == 2
    error = capfd.readouterr().err
    assert option.split()[0].strip("-") in error and "left out with FOLDER" in error
