"""A training set of heads on disk: one capture per identity, rendered by many processes."""

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from mvshared.camera import orbit
from mvshared.captures import write_capture
from mvshared.errors import OptionError
from mvshared.files import check_folder
from mvshared.heads.identity import SEED
from mvshared.heads.render import DEFAULT_FOV_DEG, DEFAULT_RADIUS, render

FRONT_DEG = 35.0  # the first quarter of the views looks at the face from within this azimuth
ELEVATIONS_DEG = (-5.0, 30.0)
MAX_VIEWS = 1000
MIN_SIZE_PX, MAX_SIZE_PX = 8, 2048


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


def render_dataset(
    folder: Path | str, identities: range, *, views: int = 8, size_px: int = 128, processes: int | None = None
) -> int:
    """Render the identities that `folder` does not have yet as captures `head_000000` ...; returns how many were rendered.

    Raises OptionError for numbers out of range, OutputError if the folder cannot be written.
    """
    if not 2 <= views <= MAX_VIEWS:
        raise OptionError("views", expected=f"at least 2, at most {MAX_VIEWS}", got=views)
    if not MIN_SIZE_PX <= size_px <= MAX_SIZE_PX:
        raise OptionError("size", expected=f"{MIN_SIZE_PX} to {MAX_SIZE_PX} pixels", got=size_px)
    if processes is not None and processes < 1:
        raise OptionError("processes", expected="at least 1", got=processes)
    folder = Path(folder)
    check_folder(folder)
    missing = [number for number in identities if not (_capture_folder(folder, number) / "transforms.json").exists()]
    work = partial(_render_one, folder=folder, views=views, size_px=size_px)
    progress = tqdm(total=len(missing), desc="rendering", unit="head", disable=None)
    if missing:  # the first head here: what numba compiles for it is then on disk for all processes
        work(missing[0])
        progress.update()
    with progress, ProcessPoolExecutor(processes or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for _ in pool.map(work, missing[1:], chunksize=4):
            progress.update()
    return len(missing)


def _capture_folder(folder: Path, number: int) -> Path:
    return folder / f"head_{number:06}"


def _render_one(number: int, *, folder: Path, views: int, size_px: int) -> None:
    poses = dataset_poses(number, views=views)
    pictures = render(number, poses, size_px=size_px)
    write_capture(_capture_folder(folder, number), pictures.rgba, pictures.normals, poses, DEFAULT_FOV_DEG)
