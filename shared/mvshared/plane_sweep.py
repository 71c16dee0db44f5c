"""Depth of two views of an object from their pictures and cameras alone, by plane sweep between silhouettes.

The planes are perpendicular to the bisector of the two viewing directions, since what both cameras see faces it (Gallup et al.
2007, "Real-Time Plane-Sweeping Stereo with Multiple Sweeping Directions"). Windowed colour differences are joined to surfaces
by semi-global matching (Hirschmueller 2008, IEEE TPAMI 30(2)). A search finds something similar for any two pictures, so the
object is held to be solid: a view sees the front half of what all silhouettes leave along a pixel's ray (Laurentini 1994, IEEE
TPAMI 16(2)), which two flat copies of one picture, crossing in the middle, are not.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mvshared.errors import CameraError
from mvshared.projection import project, rays, sample

PLANES = 56
NEAREST_PLANE, FARTHEST_PLANE = 1.0, -0.2  # of the object's radius, toward the cameras from the centre
SWEEP_PX = 80  # longer side of the pictures that are searched
SPAN_STEPS = 40  # samples of a ray in the object's sphere
SILHOUETTES = 12  # that bound the object, evenly chosen from all
WINDOW = 2  # pixels on each side
COST_LIMIT = 0.25  # mean difference of colours in [0, 1]; more says no more
SMALL_STEP, LARGE_STEP = 0.02, 0.15  # costs of a step to the next plane and to any other, between two pixels

Floats = NDArray[np.float32]


class Scene(NamedTuple):
    """Pictures float32 (v, h, w, 3) in [0, 1], silhouettes bool (v, h, w), poses float64 (v, 4, 4), vertical field of view,
    and the sphere (3,) and radius that the object is in."""

    pictures: Floats
    masks: NDArray[np.bool_]
    poses: NDArray[np.float64]
    fov_deg: float
    centre: NDArray[np.float64]
    radius: float


def make_scene(pictures: Floats, masks: NDArray[np.bool_], poses: NDArray[np.float64], fov_deg: float) -> Scene:
    """The scene of views that look at one object: around the point that is nearest to all optical axes, as wide as the
    silhouettes. Raises CameraError if a camera does not look at that point."""
    positions, backward = poses[:, :3, 3], poses[:, :3, 2]
    across = np.eye(3) - backward[:, :, None] * backward[:, None, :]
    centre = np.linalg.lstsq(across.sum(axis=0), (across @ positions[:, :, None]).sum(axis=0)[:, 0], rcond=None)[0]
    directions = rays(masks.shape[1:], fov_deg)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    radius = 0.0
    for index, (pose, mask) in enumerate(zip(poses, masks, strict=True)):
        toward = (centre - pose[:3, 3]) @ pose[:3, :3]
        distance = float(np.linalg.norm(toward))
        if -toward[2] < distance * math.cos(math.radians(fov_deg / 2)) or distance < 1e-6:
            raise CameraError(
                "does not look at the point that the others look at",
                index=index,
                hint="depth can be estimated for cameras around one object only; give depth",
            )
        cosine = float((directions[mask] @ (toward / distance)).min())
        radius = max(radius, distance * math.sqrt(max(0.0, 1 - cosine**2)))
    return Scene(pictures, masks, poses, fov_deg, centre, radius)


def pair_depth(scene: Scene, first: int, second: int) -> tuple[Floats, Floats]:
    """Depth (h, w) of two views along their optical axes, inf where nothing is found or nothing is."""
    small = _reduced(scene)
    bisector = scene.poses[first, :3, 2] + scene.poses[second, :3, 2]
    bisector /= np.linalg.norm(bisector)
    spans = {view: _span(small, view) for view in (first, second)}
    result = []
    for view, other in ((first, second), (second, first)):
        offsets = _search(small, view, other, bisector, spans)
        result.append(_depth_of_offsets(scene, view, _enlarged(offsets, scene.masks[view]), bisector))
    return result[0], result[1]


def _reduced(scene: Scene) -> Scene:
    height, width = scene.masks.shape[1:]
    scale = SWEEP_PX / max(height, width)
    if scale >= 1:
        return scene
    size = max(2, round(width * scale)), max(2, round(height * scale))  # what can be sampled

    def shrink(picture: NDArray) -> NDArray[np.uint8]:
        return np.asarray(Image.fromarray(np.rint(picture * 255.0).astype(np.uint8)).resize(size, Image.Resampling.BOX))

    pictures = np.stack([shrink(picture) for picture in scene.pictures]).astype(np.float32) / 255
    return scene._replace(pictures=pictures, masks=np.stack([shrink(mask) for mask in scene.masks]) > 127)


def _span(scene: Scene, view: int) -> Floats:
    """Depth (h, w, 2) of the nearest point and of the middle of what all silhouettes leave along each ray, 0 for nothing."""
    mask, pose = scene.masks[view], scene.poses[view]
    directions = rays(mask.shape, scene.fov_deg)[mask] @ pose[:3, :3].T.astype(np.float32)
    distance = float(np.linalg.norm(pose[:3, 3] - scene.centre))
    steps = np.linspace(max(distance - scene.radius, 1e-3 * distance), distance + scene.radius, SPAN_STEPS, dtype=np.float32)
    points = pose[:3, 3].astype(np.float32) + steps[:, None, None] * directions
    inside = np.square(points - scene.centre.astype(np.float32)).sum(axis=-1) <= (1.01 * scene.radius) ** 2
    height, width = mask.shape
    views = len(scene.masks)
    for other in sorted({round(index) for index in np.linspace(0, views - 1, min(views, SILHOUETTES))} - {view}):
        x, y, z = project(points, scene.poses[other], (height, width), scene.fov_deg)
        seen = (z > 0) & (x > -0.5) & (y > -0.5) & (x < width - 0.5) & (y < height - 0.5)
        pixel = np.where(seen, np.rint(y) * width + np.rint(x), 0).astype(np.int64)
        inside &= ~seen | _grown(scene.masks[other]).ravel()[pixel]
    result = np.zeros((*mask.shape, 2), np.float32)
    nearest, farthest = steps[inside.argmax(axis=0)], steps[SPAN_STEPS - 1 - inside[::-1].argmax(axis=0)]
    result[mask] = np.where(inside.any(axis=0), np.stack([nearest, (nearest + farthest) / 2]), 0).T
    return result


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    padded = np.pad(mask, 1)
    return mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


def _search(scene: Scene, view: int, other: int, bisector: NDArray[np.float64], spans: dict[int, Floats]) -> Floats:
    """Offsets (h, w) along the bisector of the planes that fit best, NaN where none is possible."""
    mask, pose = scene.masks[view], scene.poses[view]
    planes = np.linspace(FARTHEST_PLANE, NEAREST_PLANE, PLANES, dtype=np.float32) * np.float32(scene.radius)
    directions = rays(mask.shape, scene.fov_deg)[mask] @ pose[:3, :3].T.astype(np.float32)
    along = directions @ bisector.astype(np.float32)
    depth = (planes[:, None] - np.float32((pose[:3, 3] - scene.centre) @ bisector)) / along
    slack = np.float32(2 * scene.radius / SPAN_STEPS)
    nearest, middle = spans[view][mask].T
    candidates = (depth > 0) & (depth >= nearest - slack) & (depth <= middle + slack)
    plane, pixel = np.nonzero(candidates)
    points = pose[:3, 3].astype(np.float32) + depth[candidates][:, None] * directions[pixel]
    x, y, z = project(points, scene.poses[other], mask.shape, scene.fov_deg)
    layers = np.concatenate([scene.pictures[other], scene.masks[other][..., None], spans[other]], axis=-1, dtype=np.float32)
    sampled, inside = sample(layers, x, y)
    covered, there = sampled[:, 3], z * sampled[:, 3]
    fits = inside & (covered > 0.5) & (there >= sampled[:, 4] - slack) & (there <= sampled[:, 5] + slack)
    plane, pixel = plane[fits], pixel[fits]
    difference = np.abs(sampled[fits, :3] - scene.pictures[view][mask][pixel]).mean(axis=-1)
    found = np.full(depth.shape, 2 * COST_LIMIT, np.float32)
    found[plane, pixel] = np.minimum(difference, COST_LIMIT)
    cost = np.zeros((PLANES, *mask.shape), np.float32)
    cost[:, mask] = found
    possible = np.zeros(cost.shape, np.bool_)
    possible[:, mask] = found < 2 * COST_LIMIT
    cost = _window_sums(cost) / np.maximum(_window_sums(mask.astype(np.float32)), 1) * mask
    total = np.where(possible, _semi_global(cost), np.float32(1e6))
    best = total.argmin(axis=0)
    offsets = planes[0] + (best + _vertex(total, best)) * (planes[1] - planes[0])
    return np.where(possible.any(axis=0), offsets, np.nan).astype(np.float32)


def _window_sums(values: Floats) -> Floats:
    """Sums over the windows around each pixel of (..., h, w)."""
    for axis in (-2, -1):
        padding = [(0, 0)] * values.ndim
        padding[axis] = (WINDOW, WINDOW)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, padding), 2 * WINDOW + 1, axis=axis)
        values = windows.sum(axis=-1)
    return values


def _semi_global(cost: Floats) -> Floats:
    """Costs (k, h, w) with those of the cheapest paths from the four sides added; equation 13 of Hirschmueller 2008."""
    total = np.zeros_like(cost)
    for axis in (1, 2):
        lines = np.ascontiguousarray(np.moveaxis(cost, axis, 0))
        sums = np.moveaxis(total, axis, 0)
        for order in (range(len(lines)), range(len(lines) - 1, -1, -1)):
            path = np.zeros_like(lines[0])
            for line in order:
                lowest = path.min(axis=0)
                step = np.minimum(path, lowest + LARGE_STEP)
                np.minimum(step[1:], path[:-1] + SMALL_STEP, out=step[1:])
                np.minimum(step[:-1], path[1:] + SMALL_STEP, out=step[:-1])
                path = lines[line] + step - lowest
                sums[line] += path
    return total


def _vertex(total: Floats, best: NDArray[np.int64]) -> Floats:
    """Where between the planes (h, w) in [-0.5, 0.5] the parabola through the best cost and its neighbours is lowest."""
    at = np.clip(best, 1, len(total) - 2)[None]
    below, middle, above = (np.take_along_axis(total, at + step, axis=0)[0] for step in (-1, 0, 1))
    curvature = below - 2 * middle + above
    usable = (at[0] == best) & (curvature > 1e-6) & (np.maximum(below, above) < 1e5)
    return np.where(usable, np.clip((below - above) / (2 * np.where(usable, curvature, 1)), -0.5, 0.5), 0).astype(np.float32)


def _enlarged(offsets: Floats, mask: NDArray[np.bool_]) -> Floats:
    """Offsets (h, w) at the size of a mask, interpolated between those that are numbers; NaN outside the mask."""
    if offsets.shape == mask.shape:
        return offsets
    known = np.isfinite(offsets)
    size = mask.shape[1], mask.shape[0]

    def enlarge(values: NDArray) -> Floats:
        return np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))

    weights = enlarge(known)
    return np.where(mask & (weights > 0.5), enlarge(np.where(known, offsets, 0)) / np.maximum(weights, 0.5), np.nan)


def _depth_of_offsets(scene: Scene, view: int, offsets: Floats, bisector: NDArray[np.float64]) -> Floats:
    pose = scene.poses[view]
    along = rays(offsets.shape, scene.fov_deg) @ (bisector @ pose[:3, :3]).astype(np.float32)
    depth = (offsets - np.float32((pose[:3, 3] - scene.centre) @ bisector)) / along
    return np.where(np.isfinite(depth), depth, np.inf).astype(np.float32)
