"""Normal maps: where they are found, what their pixels say, and which ones are refused before any work."""

import json
import math
import struct
import unicodedata
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import BACKENDS, Backend, assert_close, assert_different, normal_maps, record, to_numpy, write_tiny_model
from numpy.typing import NDArray
from PIL import Image

import mvshared.memory.plan
from mvshared.backend import load
from mvshared.camera import Y_UP_TO_Z_UP, orbit
from mvshared.captures import write_capture
from mvshared.errors import CameraError, ConfigError, ImageError, MvError, MvWarning, OptionError
from mvshared.export import transforms
from mvshared.guidance import ALL
from mvshared.heads import DEFAULT_FOV_DEG, DEFAULT_RADIUS, render
from mvshared.images import composite, load_image, load_values, save_png
from mvshared.normals import NO_SURFACE, Normals, check_cameras, find_normals, load_normals
from mvshared.repetition import repeat
from mvshared.runs import read_run

SIZE = 32
FRONT = orbit([0.0], 0)
AZIMUTHS = (0.0, 120.0, 240.0)
POSES = orbit(AZIMUTHS, 15.0, radius=DEFAULT_RADIUS)
PICTURE = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def head() -> Any:
    return render(7, POSES, size_px=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def read(given: Normals, poses: NDArray[np.float32] = FRONT, *, size_px: int = 16, space: str | None = None) -> NDArray[Any]:
    return load_normals(find_normals(given, space), poses, fov_deg=DEFAULT_FOV_DEG, size_px=size_px)


def ball(side: int = 16) -> NDArray[np.uint8]:
    """A ball, alpha 0 around it, with colour under the transparency that must not leak."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side * 2 - 1
    z = np.sqrt(np.clip(0.8 - x**2 - y**2, 0, None))
    unit = np.stack([x, -y, z], -1) / np.sqrt(0.8)
    inside = z > 0
    return np.where(inside[..., None], np.dstack([(unit + 1) * 127.5, inside * 255.0]), (255, 0, 255, 0)).astype(np.uint8)


def in_world(normals: NDArray[np.uint8], poses: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Camera-space maps (v, h, w, 4) of 8 bits as world-space ones of 16."""
    vectors = normals[..., :3] / 127.5 - 1
    turned = np.stack([view @ pose[:3, :3].T.astype(np.float64) for view, pose in zip(vectors, poses, strict=True)])
    values = np.rint((np.clip(turned, -1, 1) + 1) * 32767.5).astype(np.uint16)
    return np.concatenate([values, normals[..., 3:].astype(np.uint16) * 257], axis=-1)


def png_of_16_bits(values: NDArray[np.uint16], *, extra: bytes = b"") -> bytes:
    """A PNG of (h, w, 3 or 4), whose rows are filtered by their left and upper neighbours in turn."""
    height, width, channels = values.shape
    rows = values.astype(">u2").tobytes()
    plain = np.frombuffer(rows, np.uint8).reshape(height, -1)
    step = 2 * channels
    left, above = np.pad(plain, ((0, 0), (step, 0)))[:, :-step], np.pad(plain, ((1, 0), (0, 0)))[:-1]
    filtered = b"".join(
        bytes([1 + row % 2]) + (plain[row] - (above if row % 2 else left)[row]).astype(np.uint8).tobytes()
        for row in range(height)
    )
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if channels == 3 else 6, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered)), (b"IEND", b""))
    chunks = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts]
    return b"\x89PNG\r\n\x1a\n" + chunks[0] + extra + chunks[1] + chunks[2]


def write_maps(folder: Path, normals: NDArray[Any], poses: NDArray[np.float32] | None = None, **fields: Any) -> Path:
    """A folder of normal_000.png ..., with a transforms.json if poses are given."""
    folder.mkdir()
    names = [f"normal_{index:03}.png" for index in range(len(normals))]
    for name, pixels in zip(names, normals, strict=True):
        (folder / name).write_bytes(png_of_16_bits(pixels)) if pixels.dtype == np.uint16 else save_png(folder / name, pixels)
    if poses is not None:
        size = normals.shape[1]
        document = transforms(poses, width_px=size, height_px=size, fov_deg=DEFAULT_FOV_DEG, file_names=names)
        (folder / "transforms.json").write_text(json.dumps(document | fields))
    return folder


# What the pixels say


def test_maps_are_vectors_with_zero_where_there_is_no_surface(tmp_path: Path) -> None:
    for view in range(2):
        save_png(tmp_path / f"normal_{view:03}.png", ball())
    save_png(tmp_path / "view_000.png", PICTURE)
    save_png(tmp_path / "._normal_000.png", PICTURE)
    maps = read(tmp_path, orbit([0, 90], 0))
    assert maps.shape == (2, 16, 16, 3) and maps.dtype == np.float32
    inside = ball()[..., 3] > 0
    np.testing.assert_allclose(maps[:, ~inside], NO_SURFACE)
    np.testing.assert_allclose(np.linalg.norm(maps[0, inside], axis=-1), 1, atol=0.02)
    assert maps[0, 3, 8, 1] > 0.3 and maps[0, 8, 12, 0] > 0.3 and maps[0, 8, 8, 2] > 0.9, "y is up, x right, z to the camera"


def test_smaller_maps_do_not_mix_with_what_is_under_transparency() -> None:
    (small,) = read([ball(64)])
    (plain,) = read([np.where(ball(64)[..., 3:] > 0, ball(64), 0).astype(np.uint8)])
    np.testing.assert_array_equal(small, plain)
    assert np.linalg.norm(small, axis=-1).max() < 1.05
    np.testing.assert_allclose(small[0, 0], NO_SURFACE, atol=1e-4)


def test_partial_alpha_blends_with_no_surface() -> None:
    pixels = np.full((SIZE, SIZE, 4), (128, 128, 255, 255), np.uint8)
    pixels[0, 0, 3] = 51
    (values,) = read([pixels], size_px=SIZE)
    np.testing.assert_allclose(values[0, 0, 2], 0.2 + 0.8 * NO_SURFACE, rtol=1e-5)
    np.testing.assert_array_equal(values[1, 1], np.array([128, 128, 255], np.float32) / np.float32(127.5) - 1)


@pytest.mark.parametrize("space", ["camera", "world"])
@pytest.mark.parametrize("void", [(128, 128, 128), (127, 127, 127), (0, 0, 0), (255, 255, 255), (3, 0, 2)], ids=str)
def test_a_map_without_alpha_shows_no_surface_where_it_is_grey_black_or_white(void: tuple[int, ...], space: str) -> None:
    solid = ball(64)
    flat = np.where(solid[..., 3:] > 0, solid[..., :3], np.array(void, np.uint8))
    poses = orbit([20.0], 10.0)
    if space == "world":
        solid, flat = in_world(solid[None], poses)[0], in_world(np.dstack([flat, solid[..., 3]])[None], poses)[0, ..., :3]
        flat = np.where(solid[..., 3:] > 0, flat, np.array(void, np.uint16) * 257)
    given, expected = read([flat], poses, size_px=64, space=space), read([solid], poses, size_px=64, space=space)
    np.testing.assert_array_equal(given, expected)
    np.testing.assert_allclose(given[0, 0, 0], NO_SURFACE)


def test_8_bits_16_bits_and_floats_say_the_same() -> None:
    eight = ball(SIZE)
    forms = (eight, eight.astype(np.uint16) * 257, eight / 255, (eight / 255).astype(np.float32))
    expected = read([eight])
    for form in forms:
        np.testing.assert_allclose(read([form]), expected, atol=1e-6)


@pytest.mark.parametrize("channels", [3, 4])
def test_all_16_bits_of_a_png_are_read(tmp_path: Path, channels: int) -> None:
    values = np.random.default_rng(3).integers(0, 65536, (9, 7, channels)).astype(np.uint16)
    path = tmp_path / "deep.png"
    path.write_bytes(png_of_16_bits(values))
    loaded = load_values(path)
    np.testing.assert_allclose(loaded[..., :channels] * 257, values, atol=0.01)
    np.testing.assert_array_equal(loaded[..., 3] if channels == 3 else 255, 255)
    np.testing.assert_array_equal(load_image(path)[..., :channels], values >> 8)
    with path.open("rb") as file:
        for opened in (Image.open(path), Image.open(file)):  # whose file Pillow closes, and one that it does not
            np.testing.assert_array_equal(load_values(opened), loaded)


def test_a_damaged_png_of_16_bits_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(png_of_16_bits(np.full((64, 64, 3), 40000, np.uint16))[:100])
    with pytest.raises(ImageError, match=r"deep.png: cannot be decoded"):
        load_values(path)


def test_a_slope_finer_than_8_bits_reaches_the_model(tmp_path: Path) -> None:
    x = np.linspace(-0.002, 0.002, SIZE)
    unit = np.stack(np.broadcast_arrays(x[None], np.zeros((SIZE, SIZE)), 1.0), -1)
    path = tmp_path / "normal_000.png"
    path.write_bytes(png_of_16_bits(np.rint((unit + 1) * 32767.5).astype(np.uint16)))
    (values,) = read(tmp_path, size_px=SIZE)
    np.testing.assert_allclose(values[..., 0], np.broadcast_to(x, (SIZE, SIZE)), atol=2e-5)


def test_a_colour_profile_does_not_change_vectors(tmp_path: Path) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.fromarray(ball()).save(tmp_path / "normal_0.png", icc_profile=profile)
    np.testing.assert_array_equal(read(tmp_path), read([ball()]))


# Camera and world space


def test_world_maps_are_turned_into_each_camera(head: Any, tmp_path: Path) -> None:
    folder = write_maps(tmp_path / "world", in_world(head.normals, POSES))
    surface = head.normals[..., 3] == 255
    expected = head.normals[..., :3] / 127.5 - 1
    turned = read(folder, POSES, size_px=64, space="world")
    np.testing.assert_allclose(turned[surface], expected[surface], atol=4e-3)
    np.testing.assert_allclose(turned[head.normals[..., 3] == 0], NO_SURFACE)


@pytest.mark.parametrize("up", ["y", "z", "unsaid"])
def test_world_maps_beside_a_transforms_json_are_in_its_world(head: Any, tmp_path: Path, up: str) -> None:
    turn = np.eye(4, dtype=np.float32) if up == "y" else Y_UP_TO_Z_UP.astype(np.float32)
    theirs = turn @ POSES
    folder = write_maps(tmp_path / "maps", in_world(head.normals, theirs), theirs, up=[0, 1, 0] if up == "y" else [0, 0, 1])
    if up == "unsaid":
        document = json.loads((folder / "transforms.json").read_text())
        del document["up"]
        (folder / "transforms.json").write_text(json.dumps(document))
    maps = find_normals(folder, "world")
    assert maps.poses is not None
    np.testing.assert_allclose(maps.poses, POSES, atol=1e-6)
    surface = head.normals[..., 3] == 255
    values = load_normals(maps, maps.poses, fov_deg=DEFAULT_FOV_DEG, size_px=64)
    np.testing.assert_allclose(values[surface], (head.normals[..., :3] / 127.5 - 1)[surface], atol=4e-3)


def test_the_space_is_that_of_the_transforms_json_unless_the_caller_contradicts(head: Any, tmp_path: Path) -> None:
    folder = write_maps(tmp_path / "maps", in_world(head.normals, POSES), POSES, normal_space="world")
    assert find_normals(folder).space == "world"
    assert find_normals(folder, "world").space == "world"
    with pytest.raises(OptionError, match=r"normal_space must be world, as the maps' transforms\.json says, got 'camera'"):
        find_normals(folder, "camera")
    for wrong in ("tangent", "", "World"):
        with pytest.raises(OptionError, match="normal_space must be camera or world"):
            find_normals(folder, wrong)


# Where maps are found


def test_a_folder_files_and_arrays_are_the_same(tmp_path: Path) -> None:
    pixels = normal_maps(2)
    for name, picture in zip(("b.png", "a.png"), pixels, strict=True):
        save_png(tmp_path / name, picture)
    save_png(tmp_path / "._a.png", PICTURE)
    poses, expected = orbit([0, 90], 0), pixels[::-1] / np.float32(127.5) - 1
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    in_memory = [Image.open(paths[0]), pixels[0]]
    for given in (tmp_path, str(tmp_path), paths, tuple(map(str, paths)), pixels[::-1], list(pixels[::-1]), in_memory):
        np.testing.assert_array_equal(read(given, poses, size_px=SIZE), expected)
    np.testing.assert_array_equal(read(paths[0], size_px=SIZE), expected[:1])


@pytest.mark.parametrize("given", [5, object(), {"a": 1}, np.zeros((4, 4, 3), np.uint8)], ids=lambda x: type(x).__name__)
def test_what_is_no_list_of_maps_is_refused(given: Any) -> None:
    with pytest.raises(OptionError, match="normals must be a folder or a list of normal maps"):
        find_normals(given)


def test_the_maps_of_a_capture_come_with_its_cameras(head: Any, tmp_path: Path) -> None:
    write_capture(tmp_path / "head", head.rgba, head.normals, POSES, DEFAULT_FOV_DEG)
    maps = find_normals(tmp_path / "head")
    assert [Path(str(source)).name for source in maps.sources] == [f"normal_{index:03}.png" for index in range(3)]
    np.testing.assert_array_equal(maps.poses, POSES)
    assert maps.fovs_deg == pytest.approx([DEFAULT_FOV_DEG] * 3)
    path = tmp_path / "head" / "transforms.json"
    document = json.loads(path.read_text())
    document["frames"][2]["camera_angle_y"] = math.radians(65)
    path.write_text(json.dumps(document))
    backwards = find_normals([tmp_path / "head" / f"normal_{index:03}.png" for index in (2, 0)])
    np.testing.assert_array_equal(backwards.poses, POSES[[2, 0]])
    assert backwards.fovs_deg == pytest.approx([65, DEFAULT_FOV_DEG])
    with pytest.warns(MvWarning, match=r"a field of view of 65.0 degrees in 1 of 2 views, the model's views"):
        load_normals(backwards, POSES[[2, 0]], fov_deg=DEFAULT_FOV_DEG, size_px=32)


def test_frames_name_their_maps_without_extension_and_in_any_order(head: Any, tmp_path: Path) -> None:
    folder = write_maps(tmp_path / "maps", head.normals, POSES)
    document = json.loads((folder / "transforms.json").read_text())
    document["frames"] = [
        {"file_path": "./gone", "normal_file_path": f"./normal_{index:03}", "transform_matrix": POSES[index].tolist()}
        for index in (1, 2, 0)
    ]
    (folder / "transforms.json").write_text(json.dumps(document))
    np.testing.assert_array_equal(find_normals(folder).poses, POSES[[1, 2, 0]])
    np.testing.assert_array_equal(find_normals(folder / "normal_002.png").poses, POSES[[2]])


@pytest.mark.parametrize(("on_disk", "in_frames"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_names_in_another_form_of_unicode_are_the_same(on_disk: Any, in_frames: Any, head: Any, tmp_path: Path) -> None:
    folder = write_maps(tmp_path / "maps", head.normals, POSES)
    for index in range(3):
        old, new = f"normal_{index:03}.png", f"Köpfe {index}.png"
        (folder / old).rename(folder / unicodedata.normalize(on_disk, new))
        document = (folder / "transforms.json").read_text("utf-8").replace(old, unicodedata.normalize(in_frames, new))
        (folder / "transforms.json").write_text(document, "utf-8")
    np.testing.assert_array_equal(find_normals(folder).poses, POSES)
    assert all(Path(str(source)).is_file() for source in find_normals(folder).sources)


def test_cameras_that_are_of_none_of_the_maps_are_told(head: Any, tmp_path: Path) -> None:
    folder = write_maps(tmp_path / "maps", head.normals, POSES)
    document = (folder / "transforms.json").read_text().replace("normal_", "view_")
    (folder / "transforms.json").write_text(document)
    with pytest.warns(MvWarning, match=r"transforms\.json names none of the normal maps beside it") as told:
        assert find_normals(folder).poses is None
    assert len(told) == 1


def test_a_transforms_json_about_other_pictures_brings_no_cameras(head: Any, tmp_path: Path) -> None:
    folder = write_maps(tmp_path / "maps", head.normals, POSES)
    document = (folder / "transforms.json").read_text().replace("normal_001", "view_001")
    (folder / "transforms.json").write_text(document)
    assert find_normals(folder).poses is None
    assert len(find_normals(folder).sources) == 3
    (folder / "transforms.json").write_text("{")
    with pytest.raises(ConfigError, match=r"transforms\.json"):
        find_normals(folder)


# What is refused


def test_maps_of_a_wrong_number_size_shape_or_place_are_refused(tmp_path: Path) -> None:
    save_png(tmp_path / "normal_0.png", ball(8))
    (tmp_path / "text.png").write_text("text")
    cases: list[tuple[Any, NDArray[np.float32], type[MvError], str]] = [
        ([ball()], orbit([0, 90], 0), OptionError, r"one map per view \(2\), got '1 maps'"),
        ([], FRONT, OptionError, r"one map per view \(1\), got '0 maps'"),
        ([ball(64)[:48]], FRONT, ImageError, "square, got 64 x 48 pixels for view 0"),
        ([ball(32), ball(16)], orbit([0, 90], 0), ImageError, "view 1 has 16 x 16 pixels, those before it have 32 x 32"),
        (tmp_path, FRONT, ImageError, r"normal_0\.png: the normal map of view 0 has 8 x 8 pixels, less than the views' 16"),
        (tmp_path / "gone", FRONT, ImageError, "no such folder or file"),
        ([tmp_path / "gone.png"], FRONT, ImageError, "no such file"),
        (tmp_path / "text.png", FRONT, ImageError, "is no picture"),
        ([ball() * np.array([1, 1, 1, 0], np.uint8)], FRONT, ImageError, "view 0 shows no surface"),
        ([np.full((16, 16, 3), 128, np.uint8)], FRONT, ImageError, "view 0 shows no surface"),
        ([ball() / 127.5 - 1], FRONT, ImageError, "within 0 to 1"),
        ([np.full((16, 16, 3), np.nan)], FRONT, ImageError, "within 0 to 1"),
        ([ball().astype(np.int64)], FRONT, ImageError, "uint8, uint16 or float"),
        ([None], FRONT, ImageError, "must be a path"),
    ]
    for given, poses, error, message in cases:
        with pytest.raises(error, match=message):
            read(given, poses)


@pytest.mark.parametrize("identity", range(5))
def test_photographs_and_depth_are_not_taken_for_normal_maps(identity: int) -> None:
    views = render(identity, POSES[:1], size_px=64)
    finite = np.isfinite(views.depth[0])
    depth = np.where(finite, (views.depth[0] - 2.4) / 2, 0).clip(0, 1)
    for picture in (views.rgba[0], composite(views.rgba[0]), depth[..., None].repeat(3, -1)):
        with pytest.raises(ImageError, match="of view 0"):
            read([picture], POSES[:1])


def test_noise_is_not_taken_for_a_normal_map() -> None:
    with pytest.raises(ImageError, match=r"no unit vectors.*photograph"):
        read([np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)])


def test_world_maps_given_as_camera_space_are_refused_with_the_way_out(head: Any) -> None:
    maps = list(in_world(head.normals, POSES))
    with pytest.raises(ImageError, match=r"of the surface in the normal map of view 1 faces away.*normal_space=.world"):
        read(maps, POSES, size_px=64)
    read(maps, POSES, size_px=64, space="world")


def test_camera_maps_given_as_world_space_are_refused_with_the_way_out(head: Any) -> None:
    with pytest.raises(CameraError, match=r"camera 1: .*faces away.*normal_space=.camera") as caught:
        read(list(head.normals), POSES, size_px=64, space="world")
    assert caught.value.index == 1


@pytest.mark.parametrize("off_deg", [45, 90, 180])
def test_world_maps_with_cameras_that_stand_elsewhere_are_refused(head: Any, off_deg: float) -> None:
    moved = orbit([azimuth + off_deg for azimuth in AZIMUTHS], 15.0, radius=DEFAULT_RADIUS)
    with pytest.raises(CameraError, match="do the cameras belong to the maps"):
        read(list(in_world(head.normals, POSES)), moved, size_px=64, space="world")


def test_camera_axes_of_opencv_are_refused(head: Any) -> None:
    flipped = head.normals.copy()
    flipped[..., 1:3] = 255 - flipped[..., 1:3]
    with pytest.raises(ImageError, match="z toward the camera"):
        read(list(flipped), POSES, size_px=64)


def test_a_surface_faces_away_or_not_by_its_place_in_the_picture_and_the_maps_own_lens(tmp_path: Path) -> None:
    """What leans up can be seen from above, at the bottom of a wide picture, and not at its top."""
    leaning = np.full((64, 64, 4), 0, np.uint8)
    leaning[..., :3], leaning[..., 3] = np.rint((np.array([0, 1.0, 0.0]) + 1) / 2 * 255), 255
    bottom, top = leaning.copy(), leaning.copy()
    bottom[:32, :, 3], top[16:, :, 3] = 0, 0
    read([bottom], size_px=64)
    with pytest.raises(ImageError, match="faces away from the camera"):
        read([top], size_px=64)
    narrow = {"camera_angle_x": 0.1, "camera_angle_y": 0.1, "fl_x": 639.5, "fl_y": 639.5}
    with pytest.warns(MvWarning, match="field of view of 5.7 degrees"):
        read(write_maps(tmp_path / "narrow", top[None], FRONT, **narrow), size_px=64)


@pytest.mark.parametrize("identity", range(3, 100_003, 12_500))
def test_true_maps_of_heads_pass_from_everywhere(identity: int) -> None:
    random = np.random.default_rng(identity)
    poses = orbit(random.uniform(0, 360, 3), random.uniform(-40, 85, 3), radius=DEFAULT_RADIUS)
    views = render(identity, poses, size_px=48)
    for form in (views.normals, np.where(views.normals[..., 3:] > 127, views.normals, 0)[..., :3]):
        read(list(form), poses, size_px=48)
        read(list(in_world(np.concatenate([form[..., :3], views.normals[..., 3:]], -1), poses)), poses, space="world")


# Generation


def test_the_cameras_of_the_maps_are_those_of_the_views(model: Path, head: Any, tmp_path: Path) -> None:
    folder = write_maps(tmp_path / "maps", head.normals, POSES)
    pipeline = load(model, backend="torch", device="cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        views = pipeline.generate(PICTURE, normals=folder, steps=1)
    np.testing.assert_array_equal(views.cameras, POSES)
    assert views.parameters.normal_space == "camera"
    [warning] = caught
    assert warning.category is MvWarning and "field of view of 30.0 degrees, the model's views 49.1" in str(warning.message)


@pytest.mark.parametrize(
    "named",
    [
        {"views": 3},
        {"elevation_deg": 13.5},
        {"azimuths_deg": [0, 122, 240]},
        {"cameras": [[0, 15], [240, 15], [120, 15]]},
        {"cameras": np.concatenate([POSES[:1], POSES[1:] @ np.diag(np.array([-1, -1, 1, 1], np.float32))])},
    ],
    ids=str,
)
def test_other_cameras_than_those_of_the_maps_are_refused(
    model: Path, head: Any, tmp_path: Path, named: dict[str, Any]
) -> None:
    recorded = record(load(model, backend="torch", device="cpu"))
    folder = write_maps(tmp_path / "maps", head.normals, POSES)
    with pytest.raises(
        MvError, match=r"camera \d: it is .* degrees from that of its normal map normal_00\d.png|one map per view"
    ):
        recorded.pipeline.generate(PICTURE, normals=folder, **named)
    assert not recorded.model.calls


def test_cameras_that_look_the_same_way_from_another_place_are_refused(head: Any, tmp_path: Path) -> None:
    maps = find_normals(write_maps(tmp_path / "maps", head.normals, POSES))
    check_cameras(maps, POSES, fov_deg=DEFAULT_FOV_DEG)
    moved = POSES.copy()
    moved[1, :3, 3] += 0.1 * moved[1, :3, 0]
    with pytest.raises(CameraError, match=r"camera 1: it is .* degrees from that of its normal map normal_001.png"):
        check_cameras(maps, moved, fov_deg=DEFAULT_FOV_DEG)


@pytest.mark.filterwarnings("ignore::mvshared.errors.MvWarning")
def test_the_same_cameras_may_be_named(model: Path, head: Any, tmp_path: Path) -> None:
    folder = write_maps(tmp_path / "maps", head.normals, POSES)
    pipeline = load(model, backend="torch", device="cpu")
    views = pipeline.generate(PICTURE, normals=folder, azimuths_deg=[0.5, 120, 239.5], elevation_deg=15.4, steps=1)
    np.testing.assert_allclose(views.cameras, orbit([0.5, 120, 239.5], 15.4), atol=1e-6)


@pytest.mark.filterwarnings("ignore::mvshared.errors.MvWarning")
def test_a_run_with_world_maps_repeats_and_equals_that_with_camera_maps(model: Path, head: Any, tmp_path: Path) -> None:
    pipeline = load(model, backend="torch", device="cpu")
    save_png(tmp_path / "picture.png", PICTURE)
    world = write_maps(tmp_path / "world", in_world(head.normals, POSES))
    views = pipeline.generate(tmp_path / "picture.png", normals=world, normal_space="world", cameras=POSES, steps=1)
    run = read_run(views.save(tmp_path / "out"))
    assert run.parameters.normal_space == "world"
    np.testing.assert_array_equal(repeat(pipeline, run).latents, views.latents)
    camera = pipeline.generate(tmp_path / "picture.png", normals=list(head.normals), cameras=POSES, steps=1)
    assert_close(views.latents, camera.latents, rms=1e-4)


def test_metadata_that_is_older_than_the_space_is_read(model: Path, tmp_path: Path) -> None:
    pipeline = load(model, backend="torch", device="cpu")
    save_png(tmp_path / "picture.png", PICTURE)
    maps = write_maps(tmp_path / "maps", normal_maps(2))
    views = pipeline.generate(tmp_path / "picture.png", normals=maps, steps=1)
    path = views.save(tmp_path / "out") / "metadata.json"
    document = json.loads(path.read_text())
    del document["parameters"]["normal_space"]
    path.write_text(json.dumps(document))
    np.testing.assert_array_equal(repeat(pipeline, read_run(path)).latents, views.latents)


def test_a_space_without_maps_is_refused(model: Path) -> None:
    with pytest.raises(OptionError, match="normal_space must be left out where no normals are given"):
        load(model, backend="torch", device="cpu").generate(PICTURE, normal_space="world")


@pytest.mark.parametrize("backend", BACKENDS)
def test_absent_maps_are_latents_of_zero(model: Path, backend: Backend) -> None:
    network = load(model, backend=backend, device="cpu").model
    rng = np.random.default_rng(0)
    x, latents = (network.from_numpy(rng.standard_normal((2, 4, 4, 4), np.float32)) for _ in range(2))
    outputs = []
    for normals in (None, network.from_numpy(np.zeros((2, 4, 4, 4), np.float32)), latents):
        condition = network.condition(cameras=None, reference=None, normals=normals, branches=[ALL])
        outputs.append(to_numpy(network.denoise(x, 500.0, condition, [1.0])))
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert_different(outputs[2], outputs[0], rms=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_more_maps_are_encoded_together_than_stay_in_the_cache(
    model: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mvshared.memory.plan, "VAE_PIXELS_ON_CPU", 2 * SIZE**2)
    network: Any = load(model, backend=backend, device="cpu").model
    sizes = []
    encode = network.vae._encode

    def counted(pixels: Any, **options: Any) -> Any:
        sizes.append(pixels.shape[0])
        return encode(pixels, **options)

    monkeypatch.setattr(network.vae, "_encode", counted)
    network.encode_latents(np.zeros((3, SIZE, SIZE, 3), np.float32))
    assert sizes == ([2, 1] if backend == "torch" else [1, 1, 1])


def test_a_large_map_is_checked_all_over() -> None:
    """At every second pixel of 512: a ball at the lower border, right under a wide void."""
    maps = np.full((512, 512, 4), (255, 0, 255, 0), np.uint8)
    maps[320:448, 192:320] = ball(128)
    assert read([maps], size_px=512).shape == (1, 512, 512, 3)
