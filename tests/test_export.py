"""Output folders, transforms.json, metadata.json, and files that are written whole or not at all."""

import importlib.metadata
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mvshared import camera, export, files
from mvshared.errors import CameraError, ConfigError, OptionError, OutputError

POSES = camera.orbit([0, 30, 200], [0, 10, -20], radius=1.5)
NAMES = ["view_000.png", "view_001.png", "view_002.png"]


def document(**changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"width_px": 80, "height_px": 60, "fov_deg": 40.0, "file_names": NAMES}
    return export.transforms(changes.pop("poses", POSES), **(options | changes))


# transforms.json


def test_transforms_read_back_as_the_same_cameras(tmp_path: Path) -> None:
    files.write_json(tmp_path / "transforms.json", document())
    loaded = camera.load_cameras(tmp_path / "transforms.json")
    np.testing.assert_array_equal(loaded.poses, POSES)
    assert loaded.fov_deg == pytest.approx(40)


def test_a_point_projects_by_the_intrinsics_as_by_the_field_of_view() -> None:
    lens = document()
    edge_y = math.tan(math.radians(20))
    assert lens["fl_y"] * edge_y + lens["cy"] == pytest.approx(60)
    assert lens["fl_x"] * edge_y * 80 / 60 + lens["cx"] == pytest.approx(80)
    assert lens["camera_angle_y"] == pytest.approx(math.radians(40))
    assert lens["fl_x"] == pytest.approx(40 / math.tan(lens["camera_angle_x"] / 2))
    assert (lens["w"], lens["h"], lens["camera_model"]) == (80, 60, "OPENCV")
    assert [lens[name] for name in ("k1", "k2", "p1", "p2")] == [0, 0, 0, 0]


@given(st.floats(5, 120), st.floats(0.1, 50), st.integers(1, 500), st.integers(1, 500))
def test_what_the_cameras_see_at_the_origin_fills_the_unit_cube_of_instant_ngp(
    fov_deg: float, radius: float, width: int, height: int
) -> None:
    poses = camera.orbit([0, 90], 0, radius=radius)
    poses[0, :3, 3] /= 2  # the farther camera sees more
    fields = document(poses=poses, fov_deg=fov_deg, width_px=width, height_px=height, file_names=NAMES[:2])
    half_extent = radius * math.tan(max(fields["camera_angle_x"], fields["camera_angle_y"]) / 2)
    assert half_extent * fields["scale"] + fields["offset"][0] == pytest.approx(1)
    assert fields["aabb_scale"] == 1 and fields["offset"] == [0.5, 0.5, 0.5]


def test_the_up_axis_is_that_of_the_poses() -> None:
    above = camera.orbit([0], 90)[0, :3, 3]
    np.testing.assert_allclose(document()["up"], above, atol=1e-6)


@pytest.mark.parametrize("kind", ["normal", "detail"])
def test_frames_name_their_pictures_normal_and_detail_maps(kind: str) -> None:
    plain, with_maps = document()["frames"], document(**{f"{kind}_names": ["a.png", "b.png", "c.png"]})["frames"]
    assert [frame["file_path"] for frame in plain] == NAMES
    assert all(frame.keys() == {"file_path", "transform_matrix"} for frame in plain)
    assert all(frame.keys() == {"file_path", "transform_matrix", f"{kind}_file_path"} for frame in with_maps)
    assert [frame[f"{kind}_file_path"] for frame in with_maps] == ["a.png", "b.png", "c.png"]


@pytest.mark.parametrize(
    "changes",
    [
        {"width_px": 0},
        {"height_px": -1},
        {"fov_deg": 0},
        {"fov_deg": 180},
        {"fov_deg": math.nan},
        {"file_names": NAMES[:2]},
        {"normal_names": NAMES[:2]},
        {"detail_names": NAMES[:2]},
    ],
)
def test_transforms_refuse_what_does_not_fit(changes: dict[str, Any]) -> None:
    with pytest.raises(OptionError) as caught:
        document(**changes)
    assert caught.value.name == next(iter(changes))


def test_transforms_refuse_what_is_no_pose() -> None:
    with pytest.raises(CameraError, match="camera 0"):
        document(poses=np.zeros((3, 4, 4)))


# Files


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "a", b"old and long")
    files.write_atomic(str(tmp_path / "a"), b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, failure: BaseException
) -> None:
    (tmp_path / "a").write_bytes(b"old")

    def fail(*_: object) -> None:
        raise failure

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OutputError if isinstance(failure, OSError) else KeyboardInterrupt):
        files.write_atomic(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_what_a_link_names_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"of another checkpoint")
    (tmp_path / "link").symlink_to(tmp_path / "model" / "weights")
    files.write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "link").read_bytes() == b"new"
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "model" / "weights").read_bytes() == b"of another checkpoint"


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_atomic(tmp_path / "pipe", b"new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()
    code = "from mvshared.files import write_atomic; write_atomic('/dev/stdout', b'new')"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout == b"new"


def test_a_link_to_nowhere_is_no_folder_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone" / "x")
    for folder in (tmp_path / "out", tmp_path / "out" / "deeper"):
        with pytest.raises(OutputError, match="is a link to what is not there") as caught:
            export.check_free(folder)
        assert caught.value.path == tmp_path / "out"


def test_a_folder_is_copied_file_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("model.safetensors", "deeper/config.json")
    for name in names:
        files.make_folder((tmp_path / "a" / name).parent)
        (tmp_path / "a" / name).write_text(name)
        (tmp_path / "a" / name).chmod(0o444)
    for _ in range(2):  # what cannot be written to is taken the place of
        files.copy_folder(tmp_path / "a", tmp_path / "b")
    assert {path.relative_to(tmp_path / "b").as_posix() for path in (tmp_path / "b").rglob("*.*")} == set(names)
    assert all((tmp_path / "b" / name).read_text() == name for name in names)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match=r"config\.json: cannot be written: No space left on device"):
        files.copy_folder(tmp_path / "a", tmp_path / "c")
    assert [path.name for path in (tmp_path / "c").rglob("*")] == ["deeper"]


def test_what_a_killed_run_left_of_the_folder_that_goes_goes_with_it(tmp_path: Path) -> None:
    options: dict[str, Any] = {"latents": None, "cameras": None, "document": {}}
    images, obsolete = np.zeros((2, 4, 4, 3), np.uint8), tmp_path / "out" / "upscaled"
    export.write_views(obsolete, images, **options)
    (obsolete / ".view_001.png.0a1b2c3d.tmp").write_bytes(b"half")
    export.write_views(tmp_path / "out", images, **options, obsolete=obsolete)
    assert not obsolete.exists()


def test_two_runs_are_not_written_into_one_folder_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, save = np.zeros((2, 4, 4, 3), np.uint8), export.save_png

    def beside(path: Path, image: np.ndarray) -> None:
        options: dict[str, Any] = {"latents": None, "cameras": None, "document": {}, "force": True}
        (tmp_path / "out" / "upscaled").mkdir(exist_ok=True)
        (tmp_path / "out" / "upscaled" / "metadata.json").touch()
        with pytest.raises(OutputError, match="is being written to by another run"):
            export.write_views(tmp_path / "out", images, **options, obsolete=tmp_path / "out" / "upscaled")
        assert (tmp_path / "out" / "upscaled" / "metadata.json").exists()
        save(path, image)

    monkeypatch.setattr(export, "save_png", beside)
    export.write_views(tmp_path / "out", images, latents=None, cameras=None, document={"a": 1})
    monkeypatch.undo()
    export.write_views(tmp_path / "out", images, latents=None, cameras=None, document={"a": 2}, force=True)
    assert json.loads((tmp_path / "out" / "metadata.json").read_text()) == {"a": 2}


def test_two_evaluations_are_not_written_into_one_folder_together(tmp_path: Path) -> None:
    sheets = {"sheet.png": np.zeros((4, 4, 3), np.uint8)}
    unlock = files.lock_folder(tmp_path, busy="is taken")
    with pytest.raises(OutputError, match="is being written to by another evaluation"):
        export.write_evaluation(tmp_path, sheets, {})
    assert contents(tmp_path) == {}
    unlock()
    export.write_evaluation(tmp_path, sheets, {})
    assert contents(tmp_path).keys() == {"evaluation.json", "sheet.png"}


def test_what_a_killed_run_was_writing_goes(tmp_path: Path) -> None:
    folder = export.prepare(tmp_path / "out")
    for name in (".view_000.png.0a1b2c3d.tmp", ".metadata.json.0a1b2c3d.tmp", ".mine.png.0a1b2c3d.tmp"):
        (folder / name).touch()
    export.prepare(folder)
    assert sorted(os.listdir(folder)) == [".mine.png.0a1b2c3d.tmp", ".unfinished"]


def test_a_write_into_a_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file or directory") as caught:
        files.write_atomic(tmp_path / "none" / "a", b"new")
    assert caught.value.path == tmp_path / "none" / "a"


@pytest.mark.parametrize("value", [math.nan, math.inf, np.zeros(2), object()])
def test_what_json_does_not_have_is_refused_before_the_old_file_is_touched(tmp_path: Path, value: object) -> None:
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(OutputError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"value": value})
    assert (tmp_path / "a.json").read_text() == "old"


def test_text_is_readable_and_file_names_that_are_no_utf_8_survive(tmp_path: Path) -> None:
    fields = {"prompt": "Büste, 頭", "image": os.fsdecode(b"\xff.png"), "escape": "\\udcff"}
    files.write_json(tmp_path / "a.json", fields)
    assert "Büste, 頭" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert files.read_json_object(tmp_path / "a.json") == fields


# Output folders


def finished_run(folder: Path) -> Path:
    export.prepare(folder)
    for name in (*NAMES, "view_1000.png", "grid.png", "turntable.gif", "transforms.json"):
        (folder / name).write_text("old")
    export.finish(folder, export.metadata({}, weights={}))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    assert export.prepare(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()


def test_a_run_is_finished_when_its_metadata_is_there(tmp_path: Path) -> None:
    folder = export.prepare(tmp_path / "out")
    assert "metadata.json" not in contents(folder)
    export.finish(folder, {"format": "x"})
    assert contents(folder) == {"metadata.json": b'{\n  "format": "x"\n}\n'}


def test_a_finished_run_is_never_overwritten_without_force(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "out")
    before = contents(folder)
    with pytest.raises(OutputError, match=r"holds a finished run.*force=True"):
        export.prepare(folder)
    assert contents(folder) == before


def test_force_removes_the_files_of_the_old_run_and_no_others(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "out")
    for name in ("notes.txt", "view_1.png", "my_view_000.png", "view_000.png.bak"):
        (folder / name).write_text("mine")
    export.prepare(folder, force=True)
    assert set(contents(folder)) == {"notes.txt", "view_1.png", "my_view_000.png", "view_000.png.bak", ".unfinished"}


def test_force_removes_the_old_metadata_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished_run(tmp_path / "out")
    real_unlink = Path.unlink

    def unlink(self: Path, missing_ok: bool = False) -> None:
        if self.name == NAMES[0]:
            raise OSError(5, "Input/output error")
        real_unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(OutputError, match="Input/output error"):
        export.prepare(folder, force=True)
    assert not (folder / "metadata.json").exists() and (folder / NAMES[0]).exists()


def test_an_unfinished_run_gives_way_without_force(tmp_path: Path) -> None:
    folder = export.prepare(tmp_path / "out")
    (folder / NAMES[0]).write_text("half a run")
    export.prepare(folder)
    assert set(contents(folder)) == {".unfinished"}


@pytest.mark.parametrize("name", ["view_000.png", "transforms.json", "metadata.json"])
def test_files_that_no_run_left_are_not_overwritten_without_force(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match="force=True"):
        export.prepare(tmp_path)
    assert contents(tmp_path) == {name: b"mine"}


def test_a_folder_with_other_files_is_used(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    export.prepare(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_the_place_of_the_folder_is_refused_even_with_force(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        export.prepare(tmp_path / "out", force=True)
    with pytest.raises(OutputError, match="is a file"):
        export.prepare(tmp_path / "out" / "deeper", force=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_folder_that_cannot_be_made_or_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="File name too long"):
        export.prepare(tmp_path / ("x" * 300))

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(OutputError, match="Permission denied"):
        export.prepare(tmp_path / "out")


# metadata.json

PARAMETERS = {
    "steps": 30,
    "guidance": 0.1 + 0.2,
    "seed": 2**63,
    "prompt": 'an öwl "x"',
    "normals": None,
    "azimuths_deg": [0.1, 90],
}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


def write_metadata(folder: Path, **changes: Any) -> Path:
    fields = export.metadata(PARAMETERS, weights={"unet.safetensors": "ab" * 32}) | changes
    files.write_json(folder / "metadata.json", fields)
    return folder / "metadata.json"


def test_parameters_read_back_exactly_from_the_file_and_from_its_folder(tmp_path: Path) -> None:
    path = write_metadata(tmp_path)
    for place in (path, str(path), tmp_path):
        assert export.parameters_from_metadata(place, known=PARAMETERS) == PARAMETERS


@given(parameters=st.dictionaries(st.text(), json_values, max_size=4))
def test_every_json_value_survives_as_a_parameter(tmp_path_factory: pytest.TempPathFactory, parameters: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("run") / "metadata.json"
    files.write_json(path, export.metadata(parameters, weights={}))
    assert export.parameters_from_metadata(path, known=parameters) == parameters


def test_tuples_are_lists_before_and_after_writing(tmp_path: Path) -> None:
    fields = export.metadata({"azimuths_deg": (0, 90)}, weights={})
    files.write_json(tmp_path / "metadata.json", fields)
    assert (
        export.parameters_from_metadata(tmp_path, known=["azimuths_deg"]) == fields["parameters"] == {"azimuths_deg": [0, 90]}
    )


@pytest.mark.parametrize("value", [math.nan, np.float32(1), Path("a"), {1, 2}])
def test_a_parameter_that_json_does_not_have_is_refused_by_name(value: object) -> None:
    with pytest.raises(OptionError, match="guidance must be a JSON value"):
        export.metadata({"steps": 3, "guidance": value}, weights={})
    with pytest.raises(OptionError, match="device must be a JSON value"):
        export.metadata({}, weights={}, details={"device": value})


def test_metadata_says_what_made_the_run() -> None:
    fields = export.metadata(PARAMETERS, weights={"unet.safetensors": "ab" * 32}, details={"device": "cpu"})
    assert fields["weights"] == {"unet.safetensors": "ab" * 32}
    assert fields["details"] == {"device": "cpu"}
    packages = ("mvmlx", "mlx", "torch", "numpy", "pillow", "safetensors", "tokenizers")
    assert fields["packages"] == {name: importlib.metadata.version(name) for name in packages}
    assert fields["python"].split(".")[:2] == [str(part) for part in sys.version_info[:2]]
    assert fields["platform"]


def test_metadata_leaves_out_packages_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "PACKAGES", ("numpy", "no-such-package-of-mvmlx"))
    assert list(export.metadata({}, weights={})["packages"]) == ["numpy"]


def test_metadata_imports_no_array_library_but_numpy() -> None:
    program = (
        "import sys; from mvshared import export; export.metadata({}, weights={}); "
        "print(sorted({'torch', 'mlx', 'mlx.core'} & set(sys.modules)))"
    )
    shared = Path(export.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=shared, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "comfy"}, "no metadata of a run.*got 'comfy'"),
        ({"version": 2}, "version must be 1, got 2"),
        ({"version": "1"}, "version must be 1, got '1'"),
        ({"version": True}, "version must be 1, got True"),
        ({"version": None}, "version must be 1"),
        ({"parameters": [1]}, "parameters must be a JSON object, got list"),
        ({"parameters": {"stepz": 3, "seed": 1, "guidence": 2}}, "unknown parameters: guidence, stepz .*known: .*steps"),
    ],
)
def test_foreign_and_malformed_metadata_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write_metadata(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as caught:
        export.parameters_from_metadata(path, known=PARAMETERS)
    assert caught.value.path == path


@pytest.mark.parametrize("content", ["", "{", "[]", "null", json.dumps({}), json.dumps({"parameters": PARAMETERS})])
def test_what_is_no_metadata_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "metadata.json").write_text(content)
    with pytest.raises(ConfigError):
        export.parameters_from_metadata(tmp_path, known=PARAMETERS)


def test_missing_metadata_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        export.parameters_from_metadata(tmp_path, known=PARAMETERS)
