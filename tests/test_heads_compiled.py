"""The compiled head renderer beside the same code on NumPy arrays."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvshared.camera import orbit
from mvshared.captures import load_capture
from mvshared.entry import INTERRUPT_EXIT, INTERRUPTED
from mvshared.errors import MvError, OptionError, OutputError
from mvshared.heads import DEFAULT_RADIUS, HeadViews, Part, dataset, render
from mvshared.heads.dataset import DETAIL, detail_maps, render_dataset

ROOT = Path(__file__).resolve().parent.parent
HIDDEN = "import sys; sys.modules['numba'] = None"  # importing it raises ImportError
# The first numbers that together have every hair style, hat, ear, pair of glasses, collar, pattern and mouth.
NUMBERS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 14, 15, 16, 17, 18, 19, 24, 31, 33, 34, 37, 42, 54, 63)

PLAIN = """
import sys
import numpy as np
{first}
from mvshared.heads import render
from mvshared.heads.jit import COMPILED
assert not COMPILED
numbers, poses = np.load(sys.argv[1]).values()
views = [render(int(number), pose[None], size_px=int(sys.argv[3])) for number, pose in zip(numbers, poses, strict=True)]
np.savez(sys.argv[2], *(np.concatenate(arrays) for arrays in zip(*views, strict=True)))
"""


def rendered_plain(folder: Path, numbers: list[int], poses: np.ndarray, *, size_px: int, hide: bool = False) -> HeadViews:
    """The view of each number from its pose, by a process that does not compile."""
    np.savez(folder / "work.npz", np.asarray(numbers), poses)
    program = PLAIN.format(first=HIDDEN if hide else "")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "shared")))}
    environment |= {} if hide else {"NUMBA_DISABLE_JIT": "1"}
    arguments = [str(folder / "work.npz"), str(folder / "views.npz"), str(size_px)]
    result = subprocess.run([sys.executable, "-c", program, *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return HeadViews(*np.load(folder / "views.npz").values())


def rendered(numbers: list[int], poses: np.ndarray, *, size_px: int) -> HeadViews:
    views = [render(number, pose[None], size_px=size_px) for number, pose in zip(numbers, poses, strict=True)]
    return HeadViews(*(np.concatenate(arrays) for arrays in zip(*views, strict=True)))


def assert_same(views: HeadViews, plain: HeadViews) -> None:
    for name in ("rgba", "normals"):
        difference = np.abs(getattr(views, name).astype(int) - getattr(plain, name))
        assert (difference <= 1).mean() > 0.999, f"{name} differ by up to {difference.max()}"
    assert (views.parts == plain.parts).mean() > 0.999
    assert (np.isinf(views.depth) == np.isinf(plain.depth)).mean() > 0.999
    both = np.isfinite(views.depth) & np.isfinite(plain.depth)
    assert (np.abs(views.depth[both] - plain.depth[both]) < 1e-4).mean() > 0.999


@pytest.fixture(autouse=True)
def compiled() -> None:
    pytest.importorskip("numba")
    from mvshared.heads.jit import COMPILED

    if not COMPILED:
        pytest.skip("NUMBA_DISABLE_JIT is set")


def test_compiled_heads_of_every_style_are_those_of_numpy(tmp_path: Path) -> None:
    numbers = [number for number in NUMBERS for _ in range(2)]
    poses = np.concatenate([orbit([10 + 67 * k], k % 30, radius=DEFAULT_RADIUS) for k in range(len(numbers))])
    assert_same(rendered(numbers, poses, size_px=64), rendered_plain(tmp_path, numbers, poses, size_px=64))


def test_compiled_heads_from_anywhere_are_those_of_numpy(tmp_path: Path) -> None:
    """From inside, above, below, near and far, at the least size."""
    places = (([10], 0, 0.2), ([0], 90, 3), ([0], -90, 3), ([9], 5, 1.5), ([30], 0, 12))
    poses = np.concatenate([orbit(azimuth, elevation, radius=radius) for azimuth, elevation, radius in places])
    for size_px in (8, 40):
        numbers = [4, 0, 3, 7, 11]
        views, plain = rendered(numbers, poses, size_px=size_px), rendered_plain(tmp_path, numbers, poses, size_px=size_px)
        assert (views.rgba[..., 3] > 0).any(axis=(1, 2)).all()
        assert_same(views, plain)


def test_a_compiled_head_that_nothing_hits_is_empty(tmp_path: Path) -> None:
    pose = orbit([0], 0, radius=DEFAULT_RADIUS)
    pose[0, :3, :3] = pose[0, :3, :3] @ np.diag([-1.0, 1.0, -1.0]).astype(np.float32)
    views, plain = rendered([4], pose, size_px=8), rendered_plain(tmp_path, [4], pose, size_px=8)
    for name in HeadViews._fields:
        np.testing.assert_array_equal(getattr(views, name), getattr(plain, name))
    assert not views.rgba.any()


def test_heads_render_where_numba_is_not_installed(tmp_path: Path) -> None:
    pose = orbit([20], 5, radius=DEFAULT_RADIUS)
    assert_same(rendered([6], pose, size_px=48), rendered_plain(tmp_path, [6], pose, size_px=48, hide=True))


def test_machine_code_is_kept_for_the_next_process_until_a_source_changes() -> None:
    from mvshared.heads import jit, loops

    render(0, orbit([20], 5, radius=DEFAULT_RADIUS), size_px=8)
    for function in (loops.first_hits, loops.surface):
        stats = function.stats  # type: ignore[attr-defined]
        assert stats.cache_hits or stats.cache_misses
        assert jit._sources() in function._cache._cache_file._source_stamp  # type: ignore[attr-defined]
    imported = {path.stem for path in Path(jit.__file__).parent.glob("*.py") if "jit import" in path.read_text()}
    assert imported - {"paint", "trace"} <= set(jit.COMPILED_MODULES)


def test_a_data_set_is_rendered_by_processes_and_completed_later(tmp_path: Path) -> None:
    assert render_dataset(tmp_path / "heads", range(3), views=2, size_px=16, processes=2) == 3
    assert render_dataset(tmp_path / "heads", range(4), views=2, size_px=16, processes=1) == 1
    assert render_dataset(tmp_path / "heads", range(4), views=2, size_px=16, processes=1) == 0
    assert len(list((tmp_path / "heads").glob("head_*/view_001.png"))) == 4


def test_a_data_set_has_detail_maps_of_what_its_pictures_show(tmp_path: Path) -> None:
    render_dataset(tmp_path / "heads", range(1), views=4, size_px=48, processes=1)
    capture = load_capture(tmp_path / "heads" / "head_000000")
    parts = render(0, capture.poses, size_px=48).parts
    maps = [np.asarray(Image.open(path)) for path in capture.detail_paths if path is not None]
    np.testing.assert_array_equal(maps, detail_maps(parts))
    for detail, shown in zip(maps, parts, strict=True):
        assert (detail[shown == Part.MOUTH] == DETAIL[Part.MOUTH]).all()
        assert detail.any() == np.isin(shown, list(DETAIL)).any()
    assert maps[0].any(), "the first view shows the face"


def from_one_side(identity: int, *, views: int) -> np.ndarray:
    return orbit([90.0 + identity] * views, 5, radius=DEFAULT_RADIUS)


def where_hair_is(identity: int, poses: np.ndarray, views: HeadViews) -> np.ndarray:
    np.testing.assert_array_equal(poses, from_one_side(identity, views=len(poses)))
    return np.uint8(200) * (views.parts == Part.HAIR)


def test_a_data_set_takes_other_cameras_and_detail_maps_of_any_identities(tmp_path: Path) -> None:
    heads = [7, 3]
    assert render_dataset(tmp_path, heads, views=2, size_px=16, processes=2, poses=from_one_side, details=where_hair_is) == 2
    for number in heads:
        capture = load_capture(tmp_path / f"head_{number:06}")
        poses = from_one_side(number, views=2)
        np.testing.assert_allclose(capture.poses, poses, atol=1e-6)
        maps = [np.asarray(Image.open(path)) for path in capture.detail_paths if path is not None]
        hair = render(number, poses, size_px=16).parts == Part.HAIR
        assert hair.any()
        np.testing.assert_array_equal(maps, 200 * hair)


def test_detail_has_a_rim_around_what_is_painted_and_the_larger_value_where_parts_meet() -> None:
    parts = np.full((1, 5, 6), Part.SKIN, np.uint8)
    parts[0, 1, 1], parts[0, 1, 3], parts[0, 4, 5] = Part.MOUTH, Part.GLASSES, Part.EYE
    m, g, e = (DETAIL[part] for part in (Part.MOUTH, Part.GLASSES, Part.EYE))
    expected = [[m, m, m, 0, 0, 0], [m, m, m, g, 0, 0], [m, m, m, 0, 0, 0], [0, 0, 0, 0, e, e], [0, 0, 0, 0, e, e]]
    np.testing.assert_array_equal(detail_maps(parts), [expected])


def test_heads_of_another_size_or_number_of_views_are_not_mixed_into_a_folder(tmp_path: Path) -> None:
    render_dataset(tmp_path / "heads", range(1), views=2, size_px=16, processes=1)
    for views, size_px in ((3, 16), (2, 24)):
        with pytest.raises(OutputError, match=f"holds 2 views of 16 pixels, {views} of {size_px} were asked for"):
            render_dataset(tmp_path / "heads", range(3), views=views, size_px=size_px, processes=1)
    assert len(list((tmp_path / "heads").iterdir())) == 1


def test_heads_of_another_version_of_the_renderer_are_not_mixed_into_a_folder(tmp_path: Path) -> None:
    render_dataset(tmp_path / "heads", range(1), views=2, size_px=16, processes=1)
    path = tmp_path / "heads/head_000000/transforms.json"
    document = json.loads(path.read_text())
    assert document.pop("renderer") == dataset.RENDERER
    path.write_text(json.dumps(document))  # as before there was a number
    with pytest.raises(OutputError, match="is of another version of the renderer"):
        render_dataset(tmp_path / "heads", range(2), views=2, size_px=16, processes=1)
    path.write_text(json.dumps({"renderer": dataset.RENDERER, "frames": 5}))
    with pytest.raises(OutputError, match="holds 0 views of None pixels"):
        render_dataset(tmp_path / "heads", range(2), views=2, size_px=16, processes=1)


def test_a_head_that_is_named_twice_is_rendered_once_and_there_is_none_below_0(tmp_path: Path) -> None:
    assert render_dataset(tmp_path, [2, 2], views=2, size_px=16, processes=1) == 1
    with pytest.raises(OptionError, match="identities must be at least 0, got -1"):
        render_dataset(tmp_path, [3, -1], views=2, size_px=16, processes=1)


def end_process(identity: int, poses: np.ndarray, views: HeadViews) -> np.ndarray:
    if identity:  # the first is rendered by this process
        os.kill(os.getpid(), signal.SIGKILL)
    return views.parts


@pytest.mark.skipif(sys.platform == "win32", reason="has no SIGKILL")
def test_a_process_that_is_ended_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MvError, match=r"ended by something else.*name fewer processes"):
        render_dataset(tmp_path, range(3), views=2, size_px=16, processes=2, details=end_process)
    assert render_dataset(tmp_path, range(3), views=2, size_px=16, processes=1) == 2


def test_what_a_killed_call_left_unfinished_is_removed(tmp_path: Path) -> None:
    left, in_work, other = (tmp_path / name for name in (".head_000000.0a.tmp", ".head_000001.0b.tmp", ".mine"))
    for folder in (left, in_work, other):
        folder.mkdir()
        (folder / "view_000.png").touch()
    long_ago = time.time() - 2 * dataset.LEFT_OVER_S
    for folder in (left, other):
        os.utime(folder, (long_ago, long_ago))
    render_dataset(tmp_path, range(1), views=2, size_px=16, processes=1)
    assert {path.name for path in tmp_path.iterdir()} == {in_work.name, other.name, "head_000000"}


def test_a_head_that_another_call_finished_first_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = dataset.write_capture

    def twice(*arguments: Any, **options: Any) -> None:
        write(*arguments, **options)
        write(*arguments, **options)

    monkeypatch.setattr(dataset, "write_capture", twice)
    assert render_dataset(tmp_path / "heads", range(1), views=2, size_px=16, processes=1) == 1
    assert [path.name for path in (tmp_path / "heads").iterdir()] == ["head_000000"]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for child processes in /proc")
def test_workers_end_with_the_process_that_they_work_for(tmp_path: Path) -> None:
    command = "from pathlib import Path; from mvshared.heads.dataset import render_dataset as r; "
    command += f"r(Path({str(tmp_path / 'heads')!r}), range(1000), views=2, size_px=64, processes=2)"
    script = tmp_path / "script.py"
    script.write_text(f"if __name__ == '__main__':\n    {command}\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "shared")))}
    with subprocess.Popen([sys.executable, str(script)], env=environment, stderr=subprocess.DEVNULL) as process:
        until(lambda: len(list((tmp_path / "heads").glob("head_*/transforms.json"))) > 4)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
    assert len(children) >= 2
    until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="cannot hold interruptions back")
@pytest.mark.parametrize("heads", [1, 5], ids=["workers start", "workers render"])
def test_an_interruption_of_all_processes_is_one_line_and_leaves_no_half_head(tmp_path: Path, heads: int) -> None:
    command = [
        "-c",
        "from mvshared.entry import main; main()",
        "render-heads",
        "heads",
        "--identities",
        "0:10000",
        "--size",
        "32",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "shared")))}
    with subprocess.Popen(
        [sys.executable, *command, "--processes", "2"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts in the background ignores it
    ) as process:
        until(lambda: len(list((tmp_path / "heads").glob("head_*/transforms.json"))) >= heads)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, error = process.communicate()
    assert process.returncode == INTERRUPT_EXIT
    assert error == f"mvmlx: error: {INTERRUPTED}\n"
    there = [path.name for path in (tmp_path / "heads").iterdir()]
    assert heads <= len(there) < 1000 and all(name.startswith("head_") for name in there)


def takes_long(identity: int, poses: np.ndarray, views: HeadViews) -> np.ndarray:
    if identity:  # the first is rendered by this process
        time.sleep(300)
    return views.parts


@pytest.mark.skipif(sys.platform == "win32", reason="sends no SIGINT to itself")
@pytest.mark.parametrize(("patience_s", "interruptions"), [(0.5, 1), (300, 2)])
def test_workers_whose_heads_take_long_are_ended_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience_s: float, interruptions: int
) -> None:
    monkeypatch.setattr(dataset, "PATIENCE_S", patience_s)
    other = get_context("spawn").Process(target=time.sleep, args=(300,), daemon=True)
    handler = signal.getsignal(signal.SIGINT)

    def interrupt() -> None:
        until(lambda: len(active_children()) == 2)
        other.start()  # of the caller's own
        for _ in range(interruptions):
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGINT)

    begun, thread = time.monotonic(), threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        render_dataset(tmp_path, range(9), views=2, size_px=16, processes=2, details=takes_long)
    thread.join()
    assert time.monotonic() - begun < 100
    assert other.is_alive() and set(active_children()) == {other}
    assert signal.getsignal(signal.SIGINT) is handler
    other.terminate()
    assert [path.name for path in tmp_path.iterdir()] == ["head_000000"]


def test_an_interruption_while_workers_start_is_raised_when_they_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, submitted = ProcessPoolExecutor.submit, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if not submitted:
            signal.raise_signal(signal.SIGINT)
        submitted.append(submit(*arguments, **options))
        return submitted[-1]

    monkeypatch.setattr(ProcessPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render_dataset(tmp_path, range(9), views=2, size_px=16, processes=1)
    assert len(submitted) == 1


def test_an_interruption_is_seen_however_fast_heads_come() -> None:
    done: list[int] = []

    def on_done() -> None:
        done.append(len(done))
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        dataset._in_processes(abs, range(500), processes=1, on_done=on_done)
    assert done == [0]


def test_the_handler_of_a_caller_stays(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        threading.Timer(0.5, signal.raise_signal, [signal.SIGINT]).start()
        assert render_dataset(tmp_path, range(20), views=2, size_px=16, processes=1) == 20
        until(lambda: bool(seen))
    finally:
        signal.signal(signal.SIGINT, before)


def until(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_machine_code_that_cannot_be_kept_is_used_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from numba.core.caching import IndexDataCacheFile

    from mvshared.heads import jit

    def no_room(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IndexDataCacheFile, "save", no_room)
    monkeypatch.setattr(IndexDataCacheFile, "load", lambda *_: None)
    assert jit.entry(twice)(21) == 42


def twice(number: int) -> int:
    return 2 * number
