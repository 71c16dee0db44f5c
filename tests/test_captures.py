"""Folders of pictures with known cameras: written whole or not at all, read strictly."""

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from mvshared import camera, captures
from mvshared.cli import run
from mvshared.errors import CameraError, DatasetError, OptionError, OutputError
from mvshared.images import load_image

POSES = camera.orbit([0, 30, 200], [0, 10, -20], radius=1.5)
RGBA = np.random.default_rng(0).integers(0, 256, (3, 6, 8, 4), dtype=np.uint8)
NORMALS = np.random.default_rng(1).integers(0, 256, (3, 6, 8, 3), dtype=np.uint8)
ANGLES = {"camera_angle_x": 0.7, "camera_angle_y": 0.7}  # of square pictures, and RGBA is wider than high


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    captures.write_capture(tmp_path / "head", RGBA, NORMALS, POSES, 40.0)
    return tmp_path / "head"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "transforms.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_written_capture_reads_back_exactly(folder: Path) -> None:
    capture = captures.load_capture(folder)
    np.testing.assert_array_equal(capture.poses, POSES)
    assert capture.fov_deg == pytest.approx(40)
    assert capture.mask_paths == (None, None, None)
    for path, picture in zip(capture.image_paths, RGBA, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)
    for path, picture in zip(capture.normal_paths, NORMALS, strict=True):
        assert path is not None
        np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)


def test_a_capture_holds_its_pictures_and_nothing_else(folder: Path) -> None:
    expected = {f"{kind}_00{index}.png" for kind in ("view", "normal") for index in range(3)} | {"transforms.json"}
    assert {path.name for path in folder.iterdir()} == expected
    assert [path.name for path in folder.parent.iterdir()] == ["head"]


def test_normals_are_optional_and_may_have_alpha(tmp_path: Path) -> None:
    captures.write_capture(tmp_path / "without", RGBA, None, POSES, 40.0)
    assert captures.load_capture(tmp_path / "without").normal_paths == (None, None, None)
    captures.write_capture(tmp_path / "deep" / "with", RGBA, RGBA[::-1], POSES, 40.0)
    path = captures.load_capture(tmp_path / "deep" / "with").normal_paths[0]
    assert path is not None
    np.testing.assert_array_equal(np.asarray(Image.open(path)), RGBA[2])


def test_detail_maps_are_optional_and_read_back_exactly(tmp_path: Path) -> None:
    captures.write_capture(tmp_path / "without", RGBA, None, POSES, 40.0)
    assert captures.load_capture(tmp_path / "without").detail_paths == (None, None, None)
    captures.write_capture(tmp_path / "with", RGBA, None, POSES, 40.0, detail=RGBA[..., 0])
    for path, detail in zip(captures.load_capture(tmp_path / "with").detail_paths, RGBA[..., 0], strict=True):
        assert path is not None
        np.testing.assert_array_equal(np.asarray(Image.open(path)), detail)


@pytest.mark.parametrize("detail", [RGBA[:2, ..., 0], RGBA[..., :1], RGBA[..., 0] / np.float32(255)])
def test_detail_maps_that_do_not_fit_the_pictures_are_refused(tmp_path: Path, detail: np.ndarray) -> None:
    with pytest.raises(OptionError) as caught:
        captures.write_capture(tmp_path / "head", RGBA, None, POSES, 40.0, detail=detail)
    assert caught.value.name == "detail"
    assert list(tmp_path.iterdir()) == []


def test_an_existing_capture_is_not_overwritten_but_an_empty_folder_is_used(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OutputError, match="exists already"):
        captures.write_capture(folder, RGBA[::-1], None, POSES, 40.0)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (folder.parent / "empty").mkdir()
    captures.write_capture(folder.parent / "empty", RGBA, None, POSES, 40.0)
    assert len(captures.load_capture(folder.parent / "empty").image_paths) == 3


def test_a_file_in_the_place_of_the_folder_or_of_its_parent_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for place in (tmp_path / "file", tmp_path / "file" / "head"):
        with pytest.raises(OutputError):
            captures.write_capture(place, RGBA, None, POSES, 40.0)
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    real_save, saved = Image.Image.save, []

    def save(self: Image.Image, *args: Any, **options: Any) -> None:
        saved.append(self)
        if len(saved) == 3:
            raise failure
        real_save(self, *args, **options)

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(OutputError if isinstance(failure, OSError) else KeyboardInterrupt):
        captures.write_capture(tmp_path / "head", RGBA, NORMALS, POSES, 40.0)
    assert len(saved) == 3
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_of_the_capture_and_not_of_a_file_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError) as refused:
        captures.write_capture(tmp_path / "head", RGBA, NORMALS, POSES, 40.0)
    assert str(refused.value) == f"{tmp_path / 'head'}: cannot be written: No space left on device"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rgba", "normals", "fov_deg", "name"),
    [
        (RGBA[..., :3], None, 40, "rgba"),
        (RGBA[:2], None, 40, "rgba"),
        (RGBA.astype(np.float32), None, 40, "rgba"),
        (RGBA[0], None, 40, "rgba"),
        (RGBA, NORMALS[:2], 40, "normals"),
        (RGBA, NORMALS[:, :3], 40, "normals"),
        (RGBA, NORMALS / np.float32(255), 40, "normals"),
        (RGBA, NORMALS[..., 0], 40, "normals"),
        (RGBA, None, 180, "fov_deg"),
        (RGBA, None, math.nan, "fov_deg"),
        (RGBA[:, :0], None, 40, "height_px"),
    ],
)
def test_pictures_that_do_not_fit_together_are_refused(
    tmp_path: Path, rgba: np.ndarray, normals: np.ndarray | None, fov_deg: float, name: str
) -> None:
    with pytest.raises(OptionError) as caught:
        captures.write_capture(tmp_path / "head", rgba, normals, POSES, fov_deg)
    assert caught.value.name == name
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_pose_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CameraError, match="camera 0"):
        captures.write_capture(tmp_path / "head", RGBA, None, np.zeros((3, 4, 4)), 40.0)


def test_a_blender_capture_reads_without_extensions_and_with_the_size_of_its_pictures(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    frames = []
    for index, name in enumerate(("r.0", "r.1", "r.2")):
        Image.fromarray(RGBA[index]).save(tmp_path / "train" / f"{name}.png")
        pose = camera.Y_UP_TO_Z_UP @ POSES[index]
        frames.append({"file_path": f"./train/{name}", "transform_matrix": pose.tolist()})
    (tmp_path / "transforms.json").write_text(json.dumps({"camera_angle_x": math.pi / 2, "frames": frames}))
    capture = captures.load_capture(tmp_path)
    np.testing.assert_allclose(capture.poses, POSES, atol=1e-6)
    assert capture.image_paths[1] == tmp_path / "train" / "r.1.png"
    assert capture.fov_deg == pytest.approx(2 * math.degrees(math.atan(6 / 8)))


def test_frames_keep_the_order_of_the_file(folder: Path) -> None:
    edit(folder, lambda document: document["frames"].reverse())
    capture = captures.load_capture(folder)
    np.testing.assert_array_equal(capture.poses, POSES[::-1])
    assert [path.name for path in capture.image_paths] == ["view_002.png", "view_001.png", "view_000.png"]


def test_masks_and_normals_are_per_frame(folder: Path) -> None:
    edit(folder, lambda document: document["frames"][1].pop("normal_file_path"))
    edit(folder, lambda document: document["frames"][2].update(mask_path="view_000.png"))
    capture = captures.load_capture(folder)
    assert capture.normal_paths == (folder / "normal_000.png", None, folder / "normal_002.png")
    assert capture.mask_paths == (None, None, folder / "view_000.png")


@pytest.mark.parametrize(
    ("least", "most", "there"), [(0, 255, True), (0, 1, True), (0, 127, False), (0, 0, False), (1, 1, True)]
)
def test_masks_are_light_where_the_object_is_or_one(folder: Path, least: int, most: int, there: bool) -> None:
    values = np.full(RGBA.shape[1:3], least, np.uint8)
    values[2:5, 1:4] = most
    Image.fromarray(values).save(folder / "mask.png")
    edit(folder, lambda document: document["frames"][1].update(mask_path="mask.png"))
    if there:
        masks = captures.read_views(captures.load_capture(folder)).masks
        np.testing.assert_array_equal(masks[1], values == most)
    else:
        with pytest.raises(DatasetError, match=r"mask.png: shows nothing: no value of its 0 to 255 is 128 or more"):
            captures.read_views(captures.load_capture(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.pop("frames"), "has no frames"),
        (lambda document: document["frames"].clear(), "has no frames"),
        (lambda document: document["frames"][1].pop("file_path"), "frame 1 has no file_path"),
        (lambda document: document["frames"][1].update(file_path=3), "frame 1: file_path must be a file name, got 3"),
        (lambda document: document["frames"][1].update(file_path=""), "frame 1: file_path must be a file name"),
        (lambda document: document["frames"][1].update(file_path="a\0"), "frame 1: file_path must be a file name"),
        (lambda document: document["frames"][1].update(file_path="x" * 5000), "frame 1: file_path names a file that is not"),
        (lambda document: document["frames"][1].update(file_path="."), "frame 1: file_path names a file that is not there"),
        (lambda document: document["frames"][2].update(normal_file_path="none.png"), "frame 2: normal_file_path names a file"),
        (lambda document: document["frames"][2].update(mask_path=None), "frame 2: mask_path must be a file name"),
        (lambda document: document["frames"][1].pop("transform_matrix"), "frame 1 has no transform_matrix"),
        (lambda document: document["frames"][1].update(transform_matrix=np.zeros((4, 4)).tolist()), "camera 1: the last row"),
        (lambda document: document.update(frames=[1]), "frame 0 has no transform_matrix"),
        (lambda document: document.update(fl_y=-1), "fl_y must be a number"),
    ],
)
def test_a_malformed_capture_is_refused(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit(folder, change)
    with pytest.raises(DatasetError, match=message) as caught:
        captures.load_capture(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(camera_model="OPENCV_FISHEYE"), "frame 0: camera_model must be one of PINHOLE, "),
        (lambda d: d.update(cx=1), "frame 0: cx must be 4, the middle of the picture, give or take 5% of it, got 1"),
        (lambda d: d.update(cx=10**400), "frame 0: cx must be 4, the middle of the picture.*got 1000"),
        (lambda d: d.update(cx=math.nan), "frame 0: cx must be 4, the middle of the picture.*got nan"),
        (lambda d: d["frames"][0].update(w=16), "frame 0: w and h must be in proportion to the picture: they are 16 x 6"),
        (lambda d: d["frames"][2].update(cy="3"), "frame 2: cy must be 3, the middle of the picture.*got '3'"),
        (lambda d: d.update(fl_x=d["fl_y"] * 2), "frame 0: pixels must be square, and fl_x .* are of others"),
        (lambda d: d.update(w=d["w"] * 2), r"frame 0: w and h must be in proportion to the picture: they are 16 x 6"),
        (lambda d: d.update(is_fisheye=True), "frame 0: is_fisheye must be false, got True"),
        (lambda d: d.update(equirectangular=True), "frame 0: equirectangular must be left out"),
        (lambda d: d["frames"][1].update(orthographic=True), "frame 1: orthographic must be left out"),
        (lambda d: d["frames"][1].update(ANGLES), "frame 1: pixels must be square, and camera_angle_x 0.7 and "),
        (lambda d: d["frames"][1].update(fl_x=4, camera_angle_y=0.7), "frame 1: pixels must be square, and fl_x 4 and "),
    ],
)
def test_a_lens_that_cameras_here_cannot_have_is_no_matter_of_training_and_refused_by_evaluation(
    folder: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    assert captures.load_capture(folder).lens_doubt == ""
    edit(folder, change)
    assert re.match(message, captures.load_capture(folder).lens_doubt)
    assert run(["evaluate", str(folder)]) == DatasetError.exit_code
    assert re.search(message, capsys.readouterr().err)


def test_angles_beside_focal_lengths_are_no_matter(folder: Path) -> None:
    """Blender's add-ons write the angle of a sensor's height, also for pictures of another shape."""
    edit(folder, lambda document: document.update(camera_angle_y=document["camera_angle_x"]))
    assert captures.load_capture(folder).lens_doubt == ""


def test_a_frame_may_have_a_picture_of_another_size(folder: Path) -> None:
    edit(folder, lambda document: document["frames"][1].update(w=6, h=8, cx=3, cy=4, fl_y=document["fl_y"] * 8 / 6))
    assert captures.load_capture(folder).lens_doubt == ""


def test_alpha_that_is_nowhere_below_a_half_leaves_the_object_to_the_background(tmp_path: Path) -> None:
    rgba = np.full((1, 16, 16, 4), 255, np.uint8)
    rgba[0, 4:12, 6:10, :3] = 0
    rgba[0, :2, :, 3] = 200
    captures.write_capture(tmp_path / "head", rgba, None, POSES[:1], 40.0)
    masks = captures.read_views(captures.load_capture(tmp_path / "head")).masks
    np.testing.assert_array_equal(masks[0], rgba[0, ..., 0] == 0)


def test_files_elsewhere_are_none_of_a_malformed_file(folder: Path) -> None:
    for document in ("{", '{"frames": 5}', '{"frames": [5, {"file_path": 7}]}', '{"frames": [{"file_path": "../gone"}]}'):
        (folder / "transforms.json").write_text(document)
        assert captures.files_elsewhere(folder) == []


def test_for_a_capture_of_a_telephone_there_is_a_way_out(folder: Path) -> None:
    (folder / "view_000.png").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(DatasetError, match=r"view_000\.png: is no picture that can be read \(HEIC .*sips -s format png"):
        captures.load_capture(folder)


def test_a_folder_in_which_the_finder_was_is_free(tmp_path: Path) -> None:
    (tmp_path / "head").mkdir()
    for name in (".DS_Store", "._view_000.png"):
        (tmp_path / "head" / name).write_bytes(b"of the Finder")
    captures.write_capture(tmp_path / "head", RGBA, NORMALS, POSES, 40.0)
    assert captures.load_capture(tmp_path / "head").poses.shape == POSES.shape
    assert not [path for path in (tmp_path / "head").iterdir() if path.name.startswith(".")]


def test_a_folder_with_a_hidden_file_of_somebody_else_is_not_free(tmp_path: Path) -> None:
    for name in ("head/.gitignore", "other/._backup/notes"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("*")
        with pytest.raises(OutputError, match="exists already"):
            captures.write_capture(tmp_path / name.partition("/")[0], RGBA, NORMALS, POSES, 40.0)
        assert (tmp_path / name).read_text() == "*"


def test_what_another_process_writes_meanwhile_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "head").mkdir()
    (tmp_path / "head/.DS_Store").write_bytes(b"of the Finder")
    unlink = Path.unlink

    def meanwhile(path: Path, **options: bool) -> None:
        (tmp_path / "head/view_000.png").write_text("another's")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", meanwhile)
    with pytest.raises(OutputError):
        captures.write_capture(tmp_path / "head", RGBA, NORMALS, POSES, 40.0)
    assert (tmp_path / "head/view_000.png").read_text() == "another's"


def test_a_frame_whose_matrix_is_none_is_named(folder: Path) -> None:
    edit(folder, lambda document: document["frames"][1].update(transform_matrix=None))
    with pytest.raises(DatasetError, match="frame 1: transform_matrix must be real numbers"):
        captures.load_capture(folder)


def test_a_lens_may_be_off_by_a_little_and_speak_of_another_size(folder: Path) -> None:
    before = captures.load_capture(folder)

    def scaled(document: dict[str, Any]) -> None:
        for name in ("w", "h", "fl_x", "fl_y"):
            document[name] *= 4
        document |= {"cx": document["w"] / 2 + 0.5, "cy": document["h"] / 2 - 0.5, "camera_model": "OPENCV", "k1": 0.01}

    edit(folder, scaled)
    capture = captures.load_capture(folder)
    assert (capture.fov_deg, capture.lens_doubt) == (pytest.approx(before.fov_deg), "")


def test_what_a_frame_says_of_its_lens_is_not_overruled_by_the_document(folder: Path) -> None:
    fov_deg = captures.load_capture(folder).fov_deg
    assert fov_deg is not None

    def longer(document: dict[str, Any]) -> None:
        for frame in document["frames"]:
            frame["fl_x"] = 2 * document["fl_y"]

    edit(folder, longer)
    found = captures.load_capture(folder).fov_deg
    assert found == pytest.approx(np.degrees(2 * np.arctan(np.tan(np.radians(fov_deg) / 2) / 2)))


def test_a_capture_of_another_system_is_read(folder: Path) -> None:
    """Names without an extension for files with a large one, a byte order mark, depth that only evaluation would need."""
    for path in folder.glob("view_*.png"):
        path.rename(path.with_suffix(".PNG"))

    def edited(document: dict[str, Any]) -> None:
        for index, frame in enumerate(document["frames"]):
            frame |= {"file_path": f"view_{index:03}", "depth_file_path": f"depth_{index}.png"}

    edit(folder, edited)
    path = folder / "transforms.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    capture = captures.load_capture(folder)
    assert [each.name for each in capture.image_paths] == [f"view_{index:03}.PNG" for index in range(3)]
    with pytest.raises(DatasetError, match=r"depth_0.png: No such file.*without depth_file_path.* depth is estimated"):
        captures.read_views(capture)
    for index in range(3):
        Image.fromarray(RGBA[0, ..., 0]).save(folder / f"depth_{index}.png")
    with pytest.raises(DatasetError, match=r"depth_0.png: is no .npy file of floats and no PNG .* \(without depth_file"):
        captures.read_views(captures.load_capture(folder))
    stored = np.full(RGBA.shape[1:3], 2500, np.uint16)
    stored[0, 0], stored[0, 1] = 0, 65535
    for index in range(3):
        Image.fromarray(stored).save(folder / f"depth_{index}.png")
    depth = captures.read_views(captures.load_capture(folder)).depth
    assert depth is not None and depth.dtype == np.float32
    np.testing.assert_allclose(depth[:, 0, :3], np.tile(np.array([np.inf, 65.535, 2.5], np.float32), (3, 1)), rtol=1e-6)
    whole = (folder / "depth_1.png").read_bytes()
    for damaged in (whole[:-40], whole[:60], whole.replace(b"IDAT", b"IDAX")):
        (folder / "depth_1.png").write_bytes(damaged)
        with pytest.raises(DatasetError, match=r"depth_1.png: .*\(without depth_file_path"):
            captures.read_views(captures.load_capture(folder))


def test_paths_of_windows_are_read(folder: Path) -> None:
    (folder / "images").mkdir()
    (folder / "view_000.png").rename(folder / "images/view_000.png")
    (folder / "view_001.png").rename(folder.parent / "view_001.png")

    def edited(document: dict[str, Any]) -> None:
        for frame, name in zip(document["frames"], (".\\images\\view_000", "..\\view_001.png", ".\\view_002.png"), strict=True):
            frame["file_path"] = name

    edit(folder, edited)
    found = [os.path.relpath(path, folder) for path in captures.load_capture(folder).image_paths]
    assert found == ["images/view_000.png", "../view_001.png", "view_002.png"]
    assert [os.path.relpath(path, folder) for path in captures.files_elsewhere(folder)] == ["../view_001.png"]
    (folder / "images\\view_000.png").write_bytes((folder / "view_002.png").read_bytes())
    edit(folder, lambda document: document["frames"][0].update(file_path="images\\view_000.png"))
    assert captures.load_capture(folder).image_paths[0].parent == folder


def test_a_data_set_of_blender_needs_its_file_copied(folder: Path) -> None:
    path = folder / "transforms.json"
    path.rename(folder / "transforms_train.json")
    with pytest.raises(DatasetError, match=r"transforms\.json: no such file \(copy transforms_train\.json to it\)"):
        captures.load_capture(folder)
    shutil.copy(folder / "transforms_train.json", path)
    np.testing.assert_array_equal(captures.load_capture(folder).poses, POSES)


def test_a_missing_picture_is_named(folder: Path) -> None:
    (folder / "view_001.png").unlink()
    with pytest.raises(DatasetError, match="not there") as caught:
        captures.load_capture(folder)
    assert caught.value.path == folder / "view_001.png"


def test_a_first_picture_that_is_none_is_refused(folder: Path) -> None:
    (folder / "view_000.png").write_text("no picture")
    with pytest.raises(DatasetError, match="no picture that can be read"):
        captures.load_capture(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"\xff", b"[" * 100_000])
def test_a_transforms_file_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / "transforms.json").write_bytes(content)
    with pytest.raises(DatasetError, match="JSON"):
        captures.load_capture(folder)


def test_a_missing_folder_or_file_is_refused(folder: Path) -> None:
    (folder / "transforms.json").unlink()
    with pytest.raises(DatasetError, match="no such file"):
        captures.load_capture(folder)
    shutil.rmtree(folder)
    with pytest.raises(DatasetError, match="no such folder"):
        captures.load_capture(folder)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_the_size_of_a_picture_is_that_of_the_upright_one(tmp_path: Path, format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "picture"
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(path, format, exif=exif.tobytes())
    height, width = load_image(path).shape[:2]
    assert captures.size_px(path) == (width, height)


def test_orientation_may_stand_in_a_png_s_xmp(tmp_path: Path) -> None:
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.png", pnginfo=info)
    height, width = load_image(tmp_path / "a.png").shape[:2]
    assert (width, height) == captures.size_px(tmp_path / "a.png") == (20, 30)


def test_a_damaged_orientation_is_none(tmp_path: Path) -> None:
    as_text = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x02\0\0\0\x04up!\0\0\0\0\0"
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.jpg", exif=as_text)
    assert captures.size_px(tmp_path / "a.jpg") == (30, 20)
