"""The compiled head renderer beside the same code on NumPy arrays."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mvshared.camera import orbit
from mvshared.heads import DEFAULT_RADIUS, HeadViews, render
from mvshared.heads.dataset import render_dataset

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
