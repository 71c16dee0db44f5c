"""How far views follow normal maps of meshes, the table of docs/normals.md: `python -m benchmarks.normals [--heads 3,7,11]`.

Heads of the renderer as meshes, in their place and where `mvmlx render-normals` puts a mesh, and a ball, which is no head:
silhouette IoU of the views with the maps, for views that are led by them and views of the same cameras that are not.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from skimage.measure import marching_cubes

from benchmarks.guidance import WHITE
from mvshared.backend import load
from mvshared.camera import even_azimuths, orbit
from mvshared.errors import MvError
from mvshared.heads import DEFAULT_RADIUS, render, sample_identity
from mvshared.heads.shape import HeadShape
from mvshared.images import composite
from mvshared.mesh import Mesh, NormalRenderer, fit_mesh
from mvshared.metrics import alpha_mask, background_mask, iou
from mvshared.pipeline import Pipeline

VIEWS, ELEVATION_DEG, REFERENCE_AZIMUTH_DEG = 4, 10.0, 10.0
CELLS, HALF = 72, 1.02  # of the grid across a head, and half of its width


def head_mesh(identity: int) -> Mesh:
    """A head of the renderer as triangles, by marching cubes of its distance field."""
    shape = HeadShape(sample_identity(identity))
    axis = np.linspace(-HALF, HALF, CELLS, dtype=np.float32)
    x, y, z = (each.ravel() for each in np.meshgrid(axis, axis, axis, indexing="ij"))
    field = np.min([shape.distance_of(part, x, y, z) for part in range(len(shape.parts))], axis=0)
    vertices, faces, normals, _ = marching_cubes(np.pad(field.reshape(CELLS, CELLS, CELLS), 1, constant_values=1.0), 0)
    places = (vertices - 1) * 2 * HALF / (CELLS - 1) - HALF
    return Mesh(places.astype(float), faces.astype(np.int64), normals[faces].astype(float))


def ball_mesh() -> Mesh:
    """A ball of 5,120 triangles around the origin."""
    ball = trimesh.creation.icosphere(subdivisions=4)
    normals = np.asarray(ball.vertex_normals, np.float64)[ball.faces]
    return Mesh(np.asarray(ball.vertices, np.float64), np.asarray(ball.faces, np.int64), normals)


def measure(pipeline: Pipeline[Any], heads: Sequence[int], portrait: str) -> list[str]:
    """The table's lines. `portrait` is the reference of the ball; heads have their own front as theirs."""
    size_px, framing = pipeline.model.config.defaults.size_px, pipeline.model.config.framing
    fov_deg = pipeline.model.config.camera.fov_deg
    cameras = orbit(even_azimuths(VIEWS), ELEVATION_DEG, radius=DEFAULT_RADIUS)

    def row(name: str, mesh: Mesh, reference: Any) -> str:
        maps = NormalRenderer(mesh).render_all(cameras, size_px=size_px, fov_deg=fov_deg, space="camera")
        figures = [followed(pipeline, reference, cameras, maps, led=led) for led in (True, False)]
        return f"| {name} | {figures[0]:.2f} | {figures[1]:.2f} |"

    lines = ["| | with the maps | without |", "|---|---|---|"]
    for head in heads:
        front = orbit([REFERENCE_AZIMUTH_DEG], ELEVATION_DEG, radius=DEFAULT_RADIUS)
        reference, mesh = composite(render(head, front, size_px=size_px).rgba)[0], head_mesh(head)
        lines.append(row(f"head {head}, in its place", mesh, reference))
        fitted = fit_mesh(mesh, cameras, fov_deg=fov_deg, framing=framing)
        lines.append(row(f"head {head}, fitted", fitted, reference))
    ball = fit_mesh(ball_mesh(), cameras, fov_deg=fov_deg, framing=framing)
    return [*lines, row("ball, fitted", ball, portrait)]


def followed(
    pipeline: Pipeline[Any], reference: Any, cameras: NDArray[np.float32], maps: NDArray[np.uint8], *, led: bool
) -> float:
    """Mean silhouette IoU of the views from cameras (v, 4, 4) with maps (v, h, w, 4), which lead them or do not."""
    views = pipeline.generate(reference, cameras=cameras, normals=list(maps) if led else None, seed=0)
    return float(iou(background_mask(views.images, background=WHITE), alpha_mask(maps)).mean())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.normals", description=__doc__)
    parser.add_argument("--model", default="demo", help="an embedded model's name, or a checkpoint folder")
    parser.add_argument("--heads", type=heads_list, default=(3, 7, 11), metavar="NUMBERS", help="numbers of held-out heads")
    parser.add_argument("--portrait", default="examples/portrait.png", help="the reference of the ball")
    parser.add_argument("--backend", default="torch", help="auto, mlx or torch")
    parser.add_argument("--device", default="cpu", help="that of docs/normals.md is the cpu")
    arguments = parser.parse_args()
    pipeline = load(arguments.model, backend=arguments.backend, device=arguments.device, dtype="float32")
    print(*measure(pipeline, arguments.heads, arguments.portrait), sep="\n")


def heads_list(text: str) -> tuple[int, ...]:
    """Numbers with commas between them. Raises ValueError."""
    return tuple(int(each) for each in text.split(","))


if __name__ == "__main__":
    try:
        main()
    except MvError as error:
        sys.exit(" ".join(str(error).split()))
