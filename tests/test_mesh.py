"""Normal maps of meshes: against what is known of balls and boxes, against the renderer of heads, and what is refused."""

import builtins
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh
from numpy.typing import NDArray

from benchmarks.normals import head_mesh
from mvshared.backend import load
from mvshared.camera import as_poses, orbit
from mvshared.cli import run
from mvshared.config import Framing
from mvshared.errors import BackendError, CameraError, ImageError, MeshError, OptionError
from mvshared.export import transforms
from mvshared.files import lock_folder
from mvshared.heads import DEFAULT_FOV_DEG, DEFAULT_RADIUS, render
from mvshared.images import load_values
from mvshared.mesh import Mesh, NormalRenderer, fit_mesh, load_mesh
from mvshared.metrics import background_mask, iou
from mvshared.normals import NormalSpace, find_normals, load_normals
from mvshared.obj_files import plain_obj

FOV_DEG, RADIUS = 40.0, 3.0
POSES = as_poses([[0, 0], [75, 30], [200, -50], [310, 89]], RADIUS)
SIZE = 64
BUST = Framing(mode="subject")


def written(path: Path, mesh: Any) -> Path:
    mesh.export(path)
    return path


def rendered(mesh: Mesh, poses: NDArray[np.float32] = POSES, space: NormalSpace = "camera") -> NDArray[np.uint8]:
    maps = NormalRenderer(mesh).render_all(poses, size_px=SIZE, fov_deg=FOV_DEG, space=space)
    # What is rendered is what generation takes.
    load_normals(find_normals(list(maps), space), poses, fov_deg=FOV_DEG, size_px=SIZE)
    return maps


def vectors(maps: NDArray[np.uint8]) -> NDArray[np.float64]:
    return maps[..., :3] / 127.5 - 1


def angles_deg(one: NDArray[np.float64], two: NDArray[np.float64]) -> NDArray[np.float64]:
    units = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (one, two)]
    return np.degrees(2 * np.arcsin(np.linalg.norm(units[0] - units[1], axis=-1) / 2))


def rays(poses: NDArray[np.float32]) -> NDArray[np.float64]:
    """World directions (v, h, w, 3) through the centres of pixels."""
    steps = ((np.arange(SIZE) + 0.5) / SIZE * 2 - 1) * math.tan(math.radians(FOV_DEG) / 2)
    y, x = np.meshgrid(-steps, steps, indexing="ij")
    slopes = np.stack([x, y, -np.ones_like(x)], axis=-1)
    slopes /= np.linalg.norm(slopes, axis=-1, keepdims=True)
    return np.einsum("vij,hwj->vhwi", poses[:, :3, :3].astype(np.float64), slopes)


def ball_truth(centre: Any, radius: float) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Where a ball is, and its world normals, at the centres of pixels."""
    directions, origins = rays(POSES), POSES[:, None, None, :3, 3].astype(np.float64) - centre
    along = (directions * origins).sum(-1)
    inside = along**2 - (origins**2).sum(-1) + radius**2
    points = origins + directions * (-along - np.sqrt(np.maximum(inside, 0)))[..., None]
    return inside > 0, points / radius


@pytest.mark.parametrize("suffix", ["obj", "ply", "glb"])
@pytest.mark.parametrize("space", ["camera", "world"])
def test_a_ball_has_its_normals_and_its_outline_in_every_view(tmp_path: Path, suffix: str, space: NormalSpace) -> None:
    centre = np.array([0.2, -0.1, 0.3])
    ball = trimesh.creation.icosphere(subdivisions=4, radius=0.6)
    ball.apply_translation(centre)
    maps = rendered(load_mesh(written(tmp_path / f"ball.{suffix}", ball)), space=space)
    inside, normals = ball_truth(centre, 0.6)
    if space == "camera":
        normals = np.einsum("vhwi,vij->vhwj", normals, POSES[:, :3, :3].astype(np.float64))
    assert iou(maps[..., 3] >= 128, inside).min() > 0.98
    np.testing.assert_allclose(maps[..., 3].mean() / 255, inside.mean(), rtol=0.01)
    solid = (maps[..., 3] == 255) & inside
    error_deg = angles_deg(vectors(maps)[solid], normals[solid])
    assert np.median(error_deg) < 0.4 and np.percentile(error_deg, 95) < 1.5
    np.testing.assert_array_equal(maps[maps[..., 3] == 0, :3], 128)


@pytest.mark.parametrize("with_normals", [False, True], ids=["without normals", "with averaged normals"])
def test_a_box_faces_the_axes(tmp_path: Path, with_normals: bool) -> None:
    box = trimesh.creation.box(extents=[1, 1.2, 0.8])
    if with_normals:
        assert len(box.vertex_normals) == 8
    maps = rendered(load_mesh(written(tmp_path / "box.ply", box)), space="world")
    solid = maps[..., 3] == 255
    faces, counts = np.unique(np.abs(vectors(maps)[solid]).round(1), axis=0, return_counts=True)
    common = {tuple(face) for face, count in zip(faces.tolist(), counts, strict=True) if count > 20}
    assert common == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}
    assert np.abs(vectors(maps[0])[SIZE // 2, SIZE // 2] - [0, 0, 1]).max() < 0.01


def test_round_sides_are_smooth_and_their_ends_are_flat(tmp_path: Path) -> None:
    cylinder = trimesh.creation.cylinder(radius=0.5, height=1, sections=24)
    mesh = load_mesh(written(tmp_path / "cylinder.ply", cylinder), up="z")
    ends = np.abs(mesh.normals[..., 1]) > 0.5
    np.testing.assert_allclose(np.abs(mesh.normals[ends]), np.broadcast_to([0, 1, 0], (ends.sum(), 3)), atol=1e-6)
    corners = mesh.vertices[mesh.faces][~ends]
    outward = corners * [1, 0, 1] / np.linalg.norm(corners * [1, 0, 1], axis=-1, keepdims=True)
    np.testing.assert_allclose(mesh.normals[~ends], outward, atol=0.02)


def test_normals_of_the_file_are_kept(tmp_path: Path) -> None:
    """A flat square whose file says that it bulges."""
    corners = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], float)
    bulging = (corners * 0.5 + [0, 0, 1]) / np.sqrt(1.5)
    square = trimesh.Trimesh(corners, [[0, 1, 2], [0, 2, 3]], vertex_normals=bulging, process=False)
    for suffix in ("ply", "obj", "glb"):
        mesh = load_mesh(written(tmp_path / f"square.{suffix}", square))
        np.testing.assert_allclose(
            mesh.normals, mesh.vertices[mesh.faces] * 0.5 / np.sqrt(1.5) + [0, 0, 1 / np.sqrt(1.5)], atol=1e-5
        )


@pytest.mark.parametrize("turned", [False, True])
def test_both_sides_of_a_surface_face_the_camera(tmp_path: Path, turned: bool) -> None:
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    square = trimesh.Trimesh([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], faces[:, ::-1] if turned else faces)
    mesh = load_mesh(written(tmp_path / "square.ply", square))
    maps = rendered(mesh, orbit([0, 180], 0, radius=RADIUS))
    np.testing.assert_allclose(vectors(maps)[maps[..., 3] == 255], [[0, 0, 1]] * (maps[..., 3] == 255).sum(), atol=0.01)


def test_no_normal_of_a_coarse_mesh_faces_away(tmp_path: Path) -> None:
    ball = trimesh.creation.icosphere(subdivisions=1, radius=0.8)
    smooth = trimesh.Trimesh(ball.vertices, ball.faces, vertex_normals=ball.vertices / 0.8 * [1, -1, 1], process=False)
    maps = rendered(load_mesh(written(tmp_path / "odd.ply", smooth)), space="world")
    solid = maps[..., 3] == 255
    assert (vectors(maps)[solid] * rays(POSES)[solid]).sum(-1).max() < 0.02


def test_parts_of_a_scene_are_where_its_transforms_put_them(tmp_path: Path) -> None:
    """One ball, placed twice: moved, and mirrored and squeezed."""
    scene = trimesh.Scene()
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.3)
    squeezed = np.diag([-2.0, 1.0, 1.0, 1.0])
    squeezed[:3, 3] = [0.6, 0.2, 0]
    scene.add_geometry(ball, geom_name="ball", transform=trimesh.transformations.translation_matrix([-0.6, 0, 0.1]))
    scene.add_geometry(ball, geom_name="ball", transform=squeezed)
    mesh = load_mesh(written(tmp_path / "scene.glb", scene))
    np.testing.assert_allclose(mesh.vertices.min(axis=0), [-0.9, -0.3, -0.3], atol=0.01)
    np.testing.assert_allclose(mesh.vertices.max(axis=0), [1.2, 0.5, 0.4], atol=0.01)
    places, second = mesh.vertices[mesh.faces], mesh.vertices[mesh.faces][..., 0] > 0
    outward = (places[second] - [0.6, 0.2, 0]) / np.array([4.0, 1, 1])
    outward /= np.linalg.norm(outward, axis=-1, keepdims=True)
    assert (mesh.normals[second] * outward).sum(-1).min() > 0.99
    rendered(mesh)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("v ", "v\t").replace("f ", "f\t"),
        lambda text: text.replace("\n", "  # a remark\n"),
        lambda text: "".join(f"  {line}\n" for line in text.splitlines()),
        lambda text: text.replace("f ", " f "),
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: text.replace("f 2 ", "f 2\\\n"),
        lambda text: text.replace("f 2 ", "# from C:\\models\\\nf 2 "),
        lambda text: text.replace("f 2 ", "g C:\\models\\ \r\nf 2 "),
    ],
    ids=[
        "tabs",
        "remarks",
        "indents",
        "indented faces",
        "byte order mark",
        "Windows",
        "returns",
        "continued lines",
        "remark that ends with a backslash",
        "name that ends with a backslash",
    ],
)
def test_an_obj_file_is_the_same_mesh_however_its_lines_are_laid_out(tmp_path: Path, change: Callable[[str], str]) -> None:
    ball = trimesh.creation.icosphere(subdivisions=1)
    points = "".join(f"v {x!r} {y!r} {z!r}\n" for x, y, z in ball.vertices.tolist())
    text = points + "".join(f"f {a} {b} {c}\n" for a, b, c in (ball.faces + 1).tolist())
    (tmp_path / "ball.obj").write_bytes(change(text).encode())
    mesh = load_mesh(tmp_path / "ball.obj")
    np.testing.assert_array_equal(mesh.vertices[mesh.faces], ball.vertices[ball.faces])


@pytest.mark.parametrize(
    ("encoding", "name"), [("gbk", "測試文誠"), ("shift_jis", "日本語の表"), ("latin-1", "tête"), ("utf-16", "tête")]
)
def test_an_obj_file_may_have_names_in_any_encoding(
    tmp_path: Path, encoding: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last byte of the first two is a backslash, after which the next line, a face, is one of its own."""
    monkeypatch.setitem(sys.modules, "charset_normalizer", None)  # which the extra does not bring
    points = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\n"
    text = f"{points}# {name}\nf 1 2 3\ng {name}\nf 1 2 4\no {name}\nf 1 3 4\n"
    (tmp_path / "named.obj").write_bytes(text.encode(encoding))
    assert len(load_mesh(tmp_path / "named.obj").faces) == 3


def test_negative_numbers_in_an_obj_file_count_back_from_the_face(tmp_path: Path) -> None:
    lines, faces = list[str](), trimesh.creation.box().triangles
    for triangle in faces:
        lines += [f"v {x} {y} {z}" for x, y, z in triangle.tolist()]
        lines += ["vt 0 0", "vn 0 0 1", "f -3/-1/-1 -2/-1/-1 -1/-1/-1"]
    (tmp_path / "soup.obj").write_text("\n".join(lines))
    mesh = load_mesh(tmp_path / "soup.obj")
    np.testing.assert_allclose(mesh.vertices[mesh.faces], faces)


L_SHAPE = [(0, 0), (2, 0), (2, 0.6), (0.6, 0.6), (0.6, 2), (0, 2)]  # which no corner but one sees all of


@pytest.mark.parametrize("first", range(6))
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("form", ["{0}", "-{1}", "{0}//1"])
def test_a_concave_polygon_of_an_obj_file_keeps_its_notch(tmp_path: Path, first: int, mirrored: bool, form: str) -> None:
    corners = [(first + corner) % 6 for corner in range(6)][:: -1 if mirrored else 1]
    face = " ".join(form.format(corner + 2, 6 - corner) for corner in corners)  # behind a vertex of no face
    points = [(9.0, 9.0, 9.0), *((x, y, x / 2 - y) for x, y in L_SHAPE), (1.0, 1.0, 1.0)]
    text = "".join(f"v {x} {y} {z}\n" for x, y, z in points[:-1])
    (tmp_path / "l.obj").write_text(f"{text}vn 0 0 1\nf {face}\nv 1 1 1\n")
    mesh = load_mesh(tmp_path / "l.obj")
    corner = mesh.vertices[mesh.faces]
    crossed = np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0])
    assert len(mesh.faces) == 4
    assert np.abs(crossed[:, 2]).sum() / 2 == pytest.approx(2 * 0.6 + 1.4 * 0.6)
    assert (crossed[:, 2] < 0).all() if mirrored else (crossed[:, 2] > 0).all()


def test_small_convex_faces_far_from_the_origin_stay_as_they_are() -> None:
    corners = np.random.default_rng(0).uniform(1e6, 3e6, (40, 1, 3)) + 0.01 * np.array(
        [[0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1]]
    )
    lines = [f"v {x!r} {y!r} {z!r}" for x, y, z in corners.reshape(-1, 3).tolist()]
    lines += [f"f {first} {first + 1} {first + 2} {first + 3}" for first in range(1, 161, 4)]
    assert plain_obj("\n".join(lines).encode()).decode().splitlines() == lines


@pytest.mark.parametrize("face", ["f 1 2 x 4", "f 1 2 3 9", "f 1 2 3 0", "f -1 -2 -3 -9", "f 1 3 2 4"])
def test_polygons_that_cannot_be_cut_are_left_to_trimesh(tmp_path: Path, face: str) -> None:
    lines = ["v 0 0 0", "v 1 0 0", "v 1 1 0", "v 0 1 0", face]
    assert plain_obj("\n".join(lines).encode()).decode().splitlines() == lines


def test_without_earcut_a_concave_polygon_is_refused_and_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mapbox_earcut", None)
    points = "".join(f"v {x} {y} 0\n" for x, y in L_SHAPE)
    (tmp_path / "quad.obj").write_text(f"{points}f 1 2 3 4\n")
    assert len(load_mesh(tmp_path / "quad.obj").faces) == 2
    (tmp_path / "l.obj").write_text(f"{points}f 1 2 3 4 5 6\n")
    with pytest.raises(BackendError, match=r"mapbox_earcut is not installed.*mvmlx\[mesh\]"):
        load_mesh(tmp_path / "l.obj")


def test_a_binary_ply_of_triangles_and_quads_is_not_called_damaged_alone(tmp_path: Path) -> None:
    header = "ply\nformat binary_little_endian 1.0\nelement vertex 5\nproperty float x\nproperty float y\nproperty float z\n"
    header += "element face 2\nproperty list uchar int vertex_indices\nend_header\n"
    points = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1]], "<f4")
    faces = [bytes([len(face)]) + np.array(face, "<i4").tobytes() for face in ([0, 1, 2, 3], [0, 1, 4])]
    (tmp_path / "mixed.ply").write_bytes(header.encode() + points.tobytes() + b"".join(faces))
    with pytest.raises(MeshError, match="different numbers of corners: export it as triangles"):
        load_mesh(tmp_path / "mixed.ply")


def test_a_z_up_mesh_is_turned_upright_with_its_front_to_the_camera(tmp_path: Path) -> None:
    nose = trimesh.creation.box(extents=[0.2, 0.4, 0.6])
    nose.apply_translation([0, -1, 2])
    mesh = load_mesh(written(tmp_path / "nose.ply", nose), up="z")
    np.testing.assert_allclose(mesh.vertices.mean(axis=0), [0, 2, 1], atol=1e-6)
    np.testing.assert_allclose(np.ptp(mesh.vertices, axis=0), [0.2, 0.6, 0.4], atol=1e-6)
    with pytest.raises(OptionError, match="up must be y or z, got 'x'"):
        load_mesh(tmp_path / "nose.ply", up="x")


@pytest.mark.filterwarnings("ignore:Setting the shape on a NumPy array:DeprecationWarning")  # scikit-image, NumPy 2.5
def test_a_head_as_a_mesh_has_the_maps_of_the_renderer_of_heads() -> None:
    poses = orbit([30, 160, 290], 10, radius=DEFAULT_RADIUS)
    truth = render(3, poses, size_px=SIZE).normals
    maps = NormalRenderer(head_mesh(3)).render_all(poses, size_px=SIZE, fov_deg=DEFAULT_FOV_DEG, space="camera")
    assert iou(maps[..., 3] >= 128, truth[..., 3] >= 128).min() > 0.96
    both = (maps[..., 3] == 255) & (truth[..., 3] == 255)
    assert np.median(angles_deg(vectors(maps)[both], vectors(truth)[both])) < 3


# Fitting


def outline(mesh: Mesh, poses: NDArray[np.float32]) -> NDArray[np.float64]:
    """Left, top, right and bottom (v, 4) of the rendered mesh, in shares of the frame."""
    boxes = []
    for alpha in rendered(mesh, poses)[..., 3] > 0:
        rows, columns = np.nonzero(alpha.any(axis=1))[0], np.nonzero(alpha.any(axis=0))[0]
        boxes.append([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    return np.array(boxes) / SIZE


def test_a_subject_stands_on_the_bottom_line_as_high_as_the_framing_says(tmp_path: Path) -> None:
    tall = trimesh.creation.box(extents=[20, 100, 30])
    tall.apply_translation([500, 70, -3])
    mesh = load_mesh(written(tmp_path / "tall.ply", tall))
    poses = orbit([0, 50, 100], 0, radius=RADIUS)
    for framing in (BUST, Framing(mode="subject", height=0.6, bottom=0.8)):
        boxes = outline(fit_mesh(mesh, poses, fov_deg=FOV_DEG, framing=framing), poses)
        np.testing.assert_allclose(boxes[:, 1], framing.bottom - framing.height, atol=0.05)
        np.testing.assert_allclose(boxes[:, 3], framing.bottom, atol=0.06)
        np.testing.assert_allclose(boxes[[0], 0] + boxes[[0], 2], 1, atol=0.03)
    wide = load_mesh(written(tmp_path / "wide.ply", trimesh.creation.box(extents=[10, 1, 10])))
    boxes = outline(fit_mesh(wide, poses, fov_deg=FOV_DEG, framing=BUST), poses)
    assert 0.9 < (boxes[:, 2] - boxes[:, 0]).max() < 1


@pytest.mark.parametrize("elevation", [-80, 0, 45, 90])
def test_without_a_place_for_the_subject_the_largest_view_fills_nine_tenths(tmp_path: Path, elevation: float) -> None:
    mesh = load_mesh(written(tmp_path / "box.ply", trimesh.creation.box(extents=[1, 3, 2])))
    poses = orbit([0, 45, 130], elevation, radius=1.0)
    boxes = outline(fit_mesh(mesh, poses, fov_deg=FOV_DEG, framing=Framing(mode="none")), poses)
    np.testing.assert_allclose(max(boxes[:, 2:].max(), 1 - boxes[:, :2].min()), 0.95, atol=0.03)


# What is refused


def test_files_that_are_no_meshes_are_refused(tmp_path: Path) -> None:
    ball = trimesh.creation.icosphere(subdivisions=1)
    whole = {suffix: written(tmp_path / f"ball.{suffix}", ball).read_bytes() for suffix in ("ply", "glb", "obj")}
    (tmp_path / "folder.ply").mkdir()
    contents: dict[str, tuple[bytes, str]] = {
        "empty.ply": (b"", "cannot be read|no faces"),
        "empty.obj": (b"", "cannot be read|no faces"),
        "empty.glb": (b"", "cannot be read"),
        "text.glb": (b"not a mesh at all, but text", "cannot be read"),
        "text.obj": (b"not a mesh at all, but text", "cannot be read|no faces"),
        "cut.ply": (whole["ply"][: len(whole["ply"]) // 2], "cannot be read|names vertex|no faces"),
        "cut.glb": (whole["glb"][: len(whole["glb"]) // 2], "cannot be read"),
        "range.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 9\n", "cannot be read|names vertex"),
        "nan.obj": (b"v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "NaN"),
        "infinite.obj": (b"v 0 0 inf\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "NaN, infinite"),
        "huge.obj": (b"v 0 0 1e200\nv 1 0 0\nv 0 1 0\nf 1 2 3\n", "beyond 1e"),
        "line.obj": (b"v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "no faces"),
        "points.obj": (b"v 0 0 0\nv 1 0 0\nv 0 1 0\n", "points without faces|no faces"),
        "mesh.fbx": (whole["ply"], r"of no kind that can be read: \.fbx"),
        "mesh": (whole["ply"], "of no kind that can be read: no suffix"),
    }
    for name, (content, _) in contents.items():
        (tmp_path / name).write_bytes(content)
    written(tmp_path / "points.ply", trimesh.PointCloud(ball.vertices))
    cases = {name: message for name, (_, message) in contents.items()}
    cases |= {"gone.ply": "no such file", "folder.ply": "is a folder", "points.ply": "a cloud of 42 points without faces"}
    for name, message in cases.items():
        with pytest.raises(MeshError, match=message) as caught:
            load_mesh(tmp_path / name)
        assert caught.value.path == tmp_path / name and "\n" not in str(caught.value), name


def test_a_missing_library_comes_with_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "box.ply", trimesh.creation.box())
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("trimesh"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="embreex.rtcore_scene")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(BackendError, match=r"embreex is not installed \(pip install 'mvmlx\[mesh\]'\)"):
        load_mesh(path)


def test_a_view_that_sees_nothing_is_refused(tmp_path: Path) -> None:
    box = trimesh.creation.box()
    box.apply_translation([0, 50, 0])
    with pytest.raises(CameraError, match="camera 0: sees nothing of the mesh"):
        rendered(load_mesh(written(tmp_path / "box.ply", box)))


# The command line


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "ball.glb", trimesh.creation.icosphere(subdivisions=3))
    return tmp_path


def test_the_command_writes_maps_and_their_cameras(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "render-normals ball.glb -o maps --azimuths 10,200 --elevation 5 --size 32 --space world --json"
    assert run([*command.split()]) == 0
    event = json.loads(capsys.readouterr().out)
    assert event == {
        "event": "saved", "folder": "maps", "views": 2, "size_px": 32, "triangles": 1280, "space": "world",
    }  # fmt: skip
    assert {path.name for path in (desk / "maps").iterdir()} == {"normal_000.png", "normal_001.png", "transforms.json"}
    maps = find_normals(desk / "maps")
    assert maps.space == "world" and maps.fovs_deg == pytest.approx([DEFAULT_FOV_DEG] * 2)
    assert maps.poses is not None
    np.testing.assert_allclose(maps.poses, orbit([10, 200], 5, radius=DEFAULT_RADIUS), atol=1e-6)
    load_normals(maps, maps.poses, fov_deg=DEFAULT_FOV_DEG, size_px=32)


def test_maps_are_overwritten_only_by_force_and_never_in_a_run(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["render-normals", "ball.glb", "-o", "maps", "--size", "16", "--views"]
    assert run([*command, "3"]) == 0
    (desk / "maps" / "mine.txt").write_text("kept")
    before = (desk / "maps" / "transforms.json").read_bytes()
    assert run([*command, "2"]) == 7
    assert "normal_000.png already" in capsys.readouterr().err
    assert (desk / "maps" / "transforms.json").read_bytes() == before
    assert run([*command, "2", "--force"]) == 0
    names = {path.name for path in (desk / "maps").iterdir()}
    assert names == {"normal_000.png", "normal_001.png", "transforms.json", "mine.txt"}
    (desk / "maps" / "metadata.json").write_text("{}")
    assert run([*command, "2", "--force"]) == 7
    assert "a finished run" in capsys.readouterr().err


@pytest.mark.parametrize("written", range(4))
@pytest.mark.parametrize("before", [False, True])
def test_maps_of_a_killed_run_are_not_taken_and_make_way(
    desk: Path, monkeypatch: pytest.MonkeyPatch, before: bool, written: int
) -> None:
    """Without their transforms.json they would be those of the cameras that generate happens to have."""
    command = ["render-normals", "ball.glb", "-o", "maps", "--size", "16", "--azimuths"]
    if before:
        assert run([*command, "0,100,200"]) == 0
    replace, left = os.replace, written + 1  # of the files of a run: the marker first

    def killed(source: Path, target: Path) -> None:
        nonlocal left
        if Path(target).parent.name == "maps":
            if not left:
                shutil.copy(source, Path(source).with_name(".normal_002.png.0123abcd.tmp"))  # as a kill leaves it
                raise KeyboardInterrupt
            left -= 1
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        assert run([*command, "10,190,280", *["--force"] * before]) == 130
    assert not (desk / "maps" / "transforms.json").exists()
    one = desk / "maps" / "normal_000.png"
    for given in (desk / "maps", [one], [one, np.zeros((16, 16, 3), np.uint8)], [one, desk / "elsewhere.png"]):
        with pytest.raises(ImageError, match="run that renders these normal maps has not come to its end"):
            find_normals(given)
    assert run([*command, "10,190"]) == 0
    names = {path.name for path in (desk / "maps").iterdir()}
    assert names == {"normal_000.png", "normal_001.png", "transforms.json"}
    maps = find_normals(desk / "maps")
    assert maps.poses is not None and len(maps.sources) == len(maps.poses) == 2


def test_two_runs_do_not_write_maps_into_one_folder(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (desk / "maps").mkdir()
    unlock = lock_folder(desk / "maps", busy="is taken")
    assert run(["render-normals", "ball.glb", "-o", "maps", "--size", "16"]) == 7
    assert "is being written to by another run" in capsys.readouterr().err
    unlock()
    assert run(["render-normals", "ball.glb", "-o", "maps", "--size", "16"]) == 0


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ("gone.obj -o new", 12, "gone.obj: no such file"),
        ("ball.glb -o new --up x", 2, "up must be y or z"),
        ("ball.glb -o new --space tangent", 2, "space must be camera or world"),
        ("ball.glb -o new --size 4", 2, "size must be a whole number from 16 to 2048"),
        ("ball.glb -o new --views 0", 2, "views must be"),
        ("ball.glb -o new --model gone", 5, "no such model"),
        ("ball.glb -o ball.glb", 7, "is a file"),
        ("ball.glb -o new --no-fit --cameras close.json --size 16", 4, "sees nothing"),
    ],
)
def test_wrong_calls_are_refused_in_one_line(
    desk: Path, capsys: pytest.CaptureFixture[str], options: str, code: int, says: str
) -> None:
    away = orbit([0], 0, radius=3.0)
    away[0, :3, :3] = away[0, :3, :3] @ np.diag([-1, 1, -1])
    (desk / "close.json").write_text(json.dumps({"cameras": away.tolist()}))
    assert run(["render-normals", *options.split()]) == code
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (desk / "new").exists()


PORTRAIT = Path(__file__).resolve().parent.parent / "examples" / "portrait.png"


def test_cameras_of_a_file_that_models_do_not_have_are_warned_of(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both commands: the maps bring their cameras to the second, which would otherwise take them without a word."""
    poses = np.concatenate([orbit([60], 10, radius=DEFAULT_RADIUS), orbit([200], 10, radius=2 * DEFAULT_RADIUS)])
    (desk / "far.json").write_text(json.dumps(poses.tolist()))
    (desk / "good.json").write_text(json.dumps(orbit([60, 200], 10, radius=DEFAULT_RADIUS).tolist()))
    lens = transforms(orbit([60], 10, radius=DEFAULT_RADIUS), width_px=32, height_px=32, fov_deg=65.0, file_names=["a.png"])
    (desk / "lens.json").write_text(json.dumps(lens))
    for name, says, again in (
        ("far", "the cameras stand at distances from 3.4 to 6.8, and models know of one", True),
        ("lens", "lens.json: has a field of view of 65.0 degrees, and views have that of the model, 30.0", False),
        ("good", "", True),
    ):
        assert run(["render-normals", "ball.glb", "-o", f"maps-{name}", "--cameras", f"{name}.json"]) == 0
        err = capsys.readouterr().err
        assert says in err and bool(says) == ("warning" in err), err
        command = ["generate", str(PORTRAIT), "--normals", f"maps-{name}", "-o", f"views-{name}", "--steps", "1"]
        assert run([*command, "--backend", "torch"]) == 0
        err = capsys.readouterr().err
        assert ("warning" in err) == bool(says and again) and (says if again else "") in err, err


@pytest.mark.parametrize("space", ["camera", "world"])
def test_the_folder_of_maps_is_all_that_generate_needs(desk: Path, space: str) -> None:
    assert run(["render-normals", "ball.glb", "-o", "maps", "--azimuths", "60,200", "--space", space]) == 0
    assert run(["generate", str(PORTRAIT), "--normals", "maps", "-o", "views", "--steps", "1", "--backend", "torch"]) == 0
    own, theirs = (json.loads((desk / name / "transforms.json").read_text()) for name in ("views", "maps"))
    poses = [[frame["transform_matrix"] for frame in document["frames"]] for document in (own, theirs)]
    assert poses[0] == poses[1] and own["fl_x"] == pytest.approx(theirs["fl_x"])


def test_maps_of_a_mesh_steer_the_demo_model(desk: Path) -> None:
    """A ball is no head: without its maps the outlines of the views have little in common with it."""
    assert run(["render-normals", "ball.glb", "-o", "maps", "--azimuths", "60,200"]) == 0
    pipeline = load("demo", backend="torch", device="cpu")
    steered = pipeline.generate(PORTRAIT, normals=desk / "maps", steps=8)
    free = pipeline.generate(PORTRAIT, cameras=steered.cameras, steps=8)
    alpha = np.stack([load_values(path)[..., 3] for path in sorted((desk / "maps").glob("*.png"))]) >= 128
    scores = [iou(background_mask(views.images, background=(255, 255, 255)), alpha).mean() for views in (steered, free)]
    assert scores[0] > 0.8 and scores[0] > scores[1] + 0.12, scores


def block() -> Mesh:
    vertices = np.array([[x, y, z] for x in (-1.0, 1) for y in (0.0, 2) for z in (-1.0, 1)])
    faces = np.array([[0, 1, 2], [1, 2, 3], [4, 5, 6], [5, 6, 7]])
    return Mesh(vertices, faces, np.zeros((4, 3, 3)))


def fitted(mesh: Mesh, elevation_deg: float) -> NDArray[np.float64]:
    return fit_mesh(mesh, orbit([0.0, 90.0], elevation_deg, radius=3.4), fov_deg=30.0, framing=Framing(mode="subject")).vertices


def test_from_high_above_a_subject_stands_as_from_30_degrees() -> None:
    np.testing.assert_allclose(fitted(block(), 75.0), fitted(block(), 30.0), atol=1e-6)


def test_vertices_of_no_face_do_not_count() -> None:
    mesh = block()
    stray = mesh._replace(vertices=np.concatenate([mesh.vertices, [[50.0, 50.0, 50.0]]]))
    np.testing.assert_allclose(fitted(stray, 10.0)[:8], fitted(mesh, 10.0))
