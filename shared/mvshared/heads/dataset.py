"""A training set of heads on disk: one capture per identity, rendered by many processes."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mvshared.camera import orbit
from mvshared.captures import write_capture
from mvshared.errors import DatasetError, MvError, OptionError, OutputError
from mvshared.files import LEFT_OVER_S, check_folder, read_json_object
from mvshared.heads.identity import SEED
from mvshared.heads.parts import Part, with_rim
from mvshared.heads.render import DEFAULT_FOV_DEG, DEFAULT_RADIUS, HeadViews, render
from mvshared.processors import usable_processors

FRONT_DEG = 35.0  # the first quarter of the views looks at the face from within this azimuth
ELEVATIONS_DEG = (-5.0, 30.0)
MAX_VIEWS = 1000
MAX_HEADS = 10_000_000  # of a call, whose numbers are kept in memory
RENDERER = 3  # which heads a number stands for: raised when they look otherwise, so that no folder holds both
MIN_SIZE_PX, MAX_SIZE_PX = 8, 2048
PATIENCE_S = 5.0  # with heads that are being rendered after an interruption
POLL_S = 0.1  # how often is looked whether there was one

# How much the small parts of a face count beside the rest of it. Those that are painted on the skin have a rim of one pixel,
# which takes in their outlines.
DETAIL = {Part.MOUTH: 255, Part.EYE: 160, Part.BROW: 96, Part.GLASSES: 80, Part.NOSE: 64, Part.BEARD: 48}
RIMMED = (Part.MOUTH, Part.EYE, Part.BROW, Part.NOSE)


class Poses(Protocol):
    """Gives the cameras (v, 4, 4) of an identity, the same at every call."""

    def __call__(self, identity: int, *, views: int) -> NDArray[np.float32]: ...


Details = Callable[[int, NDArray[np.float32], HeadViews], NDArray[np.uint8]]  # detail maps of an identity, cameras and views


def dataset_poses(identity: int, *, views: int) -> NDArray[np.float32]:
    """Random but fixed cameras (v, 4, 4) of an identity: a quarter of the front, the others spread evenly around the head."""
    random = np.random.default_rng([SEED, 1, identity])
    front = max(1, views // 4)
    around = views - front
    azimuths = np.concatenate(
        [random.uniform(-FRONT_DEG, FRONT_DEG, front), (np.arange(around) + random.random(around)) * 360 / max(1, around) - 180]
    )
    low, high = ELEVATIONS_DEG
    elevations = random.uniform(low, high, views)
    elevations[:front] = random.uniform(0, 20, front)
    poses = [
        orbit([azimuth], float(elevation), radius=DEFAULT_RADIUS)
        for azimuth, elevation in zip(azimuths, elevations, strict=True)
    ]
    return np.concatenate(poses)


def face_details(identity: int, poses: NDArray[np.float32], views: HeadViews) -> NDArray[np.uint8]:
    """The detail maps of a data set: `detail_maps` of what its views show."""
    del identity, poses
    return detail_maps(views.parts)


def render_dataset(
    folder: Path | str,
    identities: Sequence[int],
    *,
    views: int = 8,
    size_px: int = 128,
    processes: int | None = None,
    poses: Poses = dataset_poses,
    details: Details = face_details,
) -> int:
    """Render the identities that `folder` does not have yet as captures `head_000000` ...; returns how many were rendered.

    `poses` and `details` are called in the processes that render: functions of a module, or `functools.partial` of one. That
    the heads of a folder have those of earlier calls is not checked.

    Raises OptionError for numbers out of range, OutputError if the folder cannot be written, or has heads of another size, with
    another number of views or from another version of the renderer, MvError if a process was ended.
    """
    if not 2 <= views <= MAX_VIEWS:
        raise OptionError("views", expected=f"at least 2, at most {MAX_VIEWS}", got=views)
    if not MIN_SIZE_PX <= size_px <= MAX_SIZE_PX:
        raise OptionError("size", expected=f"{MIN_SIZE_PX} to {MAX_SIZE_PX} pixels", got=size_px)
    if processes is not None and processes < 1:
        raise OptionError("processes", expected="at least 1", got=processes)
    if len(identities[MAX_HEADS : MAX_HEADS + 1]):  # a range may have more than `len` can count
        raise OptionError("identities", expected=f"at most {MAX_HEADS:,} heads at a time", got=f"more from {identities[0]} on")
    identities = list(dict.fromkeys(identities))
    if identities and min(identities) < 0:
        raise OptionError("identities", expected="at least 0", got=min(identities))
    folder = Path(folder)
    check_folder(folder)
    _remove_left_over(folder)
    other = next((path.name for path in folder.glob("head_*") if path.name.removeprefix("head_").isdecimal()), None)
    if other is not None:  # any of them: all pictures of a data set have one size
        _is_there(folder, int(other.removeprefix("head_")), views=views, size_px=size_px)
    missing = [number for number in identities if not _is_there(folder, number, views=views, size_px=size_px)]
    work = partial(_render_one, folder=folder, views=views, size_px=size_px, poses=poses, details=details)
    progress = tqdm(total=len(missing), desc="rendering", unit="head", disable=None)
    if missing:  # the first head here: what numba compiles for it is then on disk for all processes
        work(missing[0])
        progress.update()
    with progress:
        _in_processes(work, missing[1:], processes=processes or usable_processors(), on_done=progress.update)
    return len(missing)


def detail_maps(parts: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Detail maps uint8 (v, h, w) of part labels (v, h, w): `DETAIL` where a small part of the face is, else 0."""
    detail = np.zeros_like(parts)
    for part, value in DETAIL.items():
        covered = parts == part
        if part in RIMMED:
            covered = with_rim(covered, 1)
        np.maximum(detail, value, out=detail, where=covered)
    return detail


def _remove_left_over(folder: Path) -> None:
    """Remove what calls that were killed have left unfinished, but nothing that another call may be working on."""
    for unfinished in folder.glob(".head_*.tmp"):
        with suppress(OSError):  # renamed or removed in the meantime
            if time.time() - unfinished.stat().st_mtime > LEFT_OVER_S:
                shutil.rmtree(unfinished)


def _capture_folder(folder: Path, number: int) -> Path:
    return folder / f"head_{number:06}"


def _is_there(folder: Path, number: int, *, views: int, size_px: int) -> bool:
    """Whether an identity is rendered already. Raises OutputError if it is in another way."""
    path = _capture_folder(folder, number) / "transforms.json"
    if not path.exists():
        return False
    document = read_json_object(path, error=DatasetError)
    frames, width = document.get("frames"), document.get("w")
    count = len(frames) if isinstance(frames, list) else 0
    if document.get("renderer", 1) != RENDERER:
        raise OutputError("is of another version of the renderer", path=path.parent, hint="name another folder")
    if (count, width) != (views, size_px):
        asked = f"holds {count} views of {width} pixels, {views} of {size_px} were asked for"
        raise OutputError(asked, path=path.parent, hint="name another folder")
    return True


def _render_one(number: int, *, folder: Path, views: int, size_px: int, poses: Poses, details: Details) -> None:
    cameras = poses(number, views=views)
    shown = render(number, cameras, size_px=size_px)
    capture, detail, fields = _capture_folder(folder, number), details(number, cameras, shown), {"renderer": RENDERER}
    try:
        write_capture(capture, shown.rgba, shown.normals, cameras, DEFAULT_FOV_DEG, detail=detail, fields=fields)
    except OutputError:
        if not _is_there(folder, number, views=views, size_px=size_px):  # else another call was faster
            raise


def _in_processes(
    work: Callable[[int], object], numbers: Sequence[int], *, processes: int, on_done: Callable[[], object]
) -> None:
    """Do the work for every number, and call `on_done` after each.

    Raises what the work does, MvError if a process was ended by something else, and KeyboardInterrupt after an interruption: as
    soon as what is being done is done, PATIENCE_S are over, or another one comes.
    """
    context = _Spawning()
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent)
    end = threading.Timer(PATIENCE_S, context.terminate)
    try:
        with _Interruptions(context.terminate) as interruptions:
            try:
                futures = []
                for number in numbers:
                    with _interrupts_blocked():  # in the workers, which start here, for as long as they live
                        futures.append(pool.submit(work, number))
                    interruptions.check()
                for future in futures:
                    while wait([future], timeout=POLL_S).not_done:
                        interruptions.check()
                    future.result()
                    on_done()
                    interruptions.check()
            except KeyboardInterrupt:
                end.start()
                raise
            finally:
                pool.shutdown(cancel_futures=True)
                end.cancel()
    except BrokenProcessPool as cause:
        reason = "a process that rendered heads was ended by something else, for want of memory maybe"
        raise MvError(reason, hint="the same command goes on; name fewer processes than it took") from cause


class _Spawning(SpawnContext):
    """Processes that are spawned, and can be ended."""

    def __init__(self) -> None:
        self.workers: list[BaseProcess] = []

    def Process(self, *arguments: Any, **options: Any) -> SpawnProcess:  # pyright: ignore[reportIncompatibleVariableOverride]
        worker = SpawnProcess(*arguments, **options)
        self.workers.append(worker)
        return worker

    def terminate(self) -> None:
        for worker in self.workers:
            if worker.is_alive():  # and not one that is still to start
                worker.terminate()


class _Interruptions:
    """A context in which Ctrl-C is noted, for `check`, and not raised wherever the program is: an executor is no place for it.
    From the second one on it also calls `at_once`. Nothing is changed where others handle it, and outside of the main thread.
    """

    def __init__(self, at_once: Callable[[], None]) -> None:
        self.count, self._at_once, self._mine = 0, at_once, False

    def __enter__(self) -> "_Interruptions":
        main = threading.current_thread() is threading.main_thread()
        self._mine = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._mine:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._mine:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if kind is None:
            self.check()

    def check(self) -> None:
        if self.count:
            raise KeyboardInterrupt

    def _note(self, *_: object) -> None:
        self.count += 1
        if self.count > 1:
            self._at_once()


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A context in which this thread gets no Ctrl-C: nor do the processes that it starts, which a terminal would send one each.
    Not on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """End this worker when the process that it works for is gone, killed for example: nobody would end it."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="end with parent", daemon=True).start()
