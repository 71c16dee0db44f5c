"""How well views of one object agree with each other: each view is warped into its neighbours and compared there.

`psnr_db` and `ssim` compare a view with what its neighbours show at the same points of the surface, over the pixels whose point
both see; `visible_share` is the share of the object's pixels that could be compared with some neighbour. `exchanged_*` is the
same computation with the two pictures of every pair exchanged, and `gain_db` the difference: identical pictures gain exactly 0,
whatever they show, and so does an object that looks the same from everywhere.

With given depth the figures are those of the pictures alone. Estimated depth (`mvshared.plane_sweep`) is looked for where the
pictures agree, so wrong pictures score too high, and the gain says more than the PSNR. It is weak for plain surfaces and for
views that are 90 degrees apart, and weakest for two views alone, whose copies could be a flat picture that stands between them.
docs/evaluation.md has measured numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from mvshared.camera import validate_poses
from mvshared.errors import CameraError, OptionError
from mvshared.framing import foreground_mask
from mvshared.metrics import SSIM_WINDOW, Pictures, ssim
from mvshared.plane_sweep import Scene, make_scene, pair_depth
from mvshared.projection import corners, project, sample, unproject

FARTHEST = 1e12  # of a camera: squares of more leave float32 soon
# Between neighbours: nearer cameras show the same in any case, farther ones no common surface of a convex object to speak of.
MIN_ANGLE_DEG, MAX_ANGLE_DEG = 5.0, 100.0
# A view's two nearest neighbours, and up to four if they are hardly farther than the nearest.
NEIGHBOURS, MOST_NEIGHBOURS, HARDLY_FARTHER = 2, 4, 1.5
# Two depths are one surface if they differ by less than this share of the depth, and by less than the slope of two pixels.
DEPTH_TOLERANCE, SLOPE_PX = 0.01, 2.0

Floats = NDArray[np.float32]
Masks = NDArray[np.bool_]


class Figures(NamedTuple):
    """What a comparison found; `psnr_db` and `ssim` are None where no pixel could be compared, or too few for a window."""

    psnr_db: float | None
    ssim: float | None
    visible_share: float


class Warp(NamedTuple):
    """A neighbour's picture uint8 (h, w, 3) as `view` would see it, white where `visible` bool (h, w) is false."""

    view: int
    neighbour: int
    picture: NDArray[np.uint8]
    visible: Masks
    squared_error: float
    ssim: float | None


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """Figures over all pairs of neighbours, and of each view from all its neighbours; see the top of this file.

    `views` has one entry per picture; `exchanged` is over all pairs; `warps` one entry per view and neighbour.
    """

    depth: Literal["given", "estimated"]
    figures: Figures
    exchanged: Figures
    views: tuple[Figures, ...]
    warps: tuple[Warp, ...]

    @property
    def gain_db(self) -> float | None:
        """PSNR over that of the exchanged pictures; None where either is missing."""
        own, other = self.figures.psnr_db, self.exchanged.psnr_db
        if own is None or other is None:
            return None
        return 0.0 if own == other else own - other


def consistency(
    pictures: Pictures,
    poses: ArrayLike,
    *,
    fov_deg: float,
    depth: NDArray[np.floating] | None = None,
    masks: Masks | None = None,
) -> Consistency:
    """Compare pictures (v, h, w, 3), uint8 or floats in [0, 1], of one object from poses (v, 4, 4), v at least 2.

    `fov_deg` is the vertical field of view; `depth` (v, h, w) is along the optical axis, infinite where nothing is. Without, it
    is estimated inside of `masks` bool (v, h, w), which default to what a plain background leaves, or else to everything.

    Raises OptionError for arrays that do not fit and for an empty mask; CameraError for cameras that are no poses, of which no
    two are 5 to 100 degrees apart, or, without depth, that do not look at one point.
    """
    given: Any = np.asarray(pictures)
    x = _checked_pictures(given)
    shape = x.shape[:3]
    cameras = validate_poses(poses).astype(np.float64)
    if len(cameras) != len(x):
        raise CameraError(f"there must be one camera per picture ({len(x)}), got {len(cameras)}")
    if isinstance(fov_deg, bool | str) or not 1 <= fov_deg <= 150:
        raise OptionError("fov_deg", expected="1 to 150 degrees", got=fov_deg)
    if (far := np.abs(cameras[:, :3, 3]).max(axis=1)).max() > FARTHEST:
        raise CameraError(f"it is {far.max():.3g} from the origin, at most {FARTHEST:g} is allowed", index=int(far.argmax()))
    pairs = neighbour_pairs(cameras)
    if depth is None:
        silhouettes = _checked_masks(foreground(given) if masks is None else np.asarray(masks), shape)
        scene = make_scene(x, silhouettes, cameras, fov_deg)
        depths = None
    else:
        depths = _checked_depth(np.asarray(depth), shape)
        silhouettes = _checked_masks(np.isfinite(depths), shape)
        scene = Scene(x, silhouettes, cameras, fov_deg, np.zeros(3), 0.0)
    warps, exchanged = [], []
    for first, second in tqdm(pairs, desc="comparing", unit="pair", leave=False, disable=None if depths is None else True):
        warps += _compare(scene, depths, first, second)
        exchanged += _compare(_exchanged(scene, first, second), depths, first, second)
    return Consistency(
        depth="estimated" if depths is None else "given",
        figures=_figures(warps, silhouettes),
        exchanged=_figures(exchanged, silhouettes),
        views=tuple(_figures([w for w in warps if w.view == view], silhouettes, view=view) for view in range(len(x))),
        warps=tuple(warps),
    )


def neighbour_pairs(poses: NDArray[np.floating]) -> list[tuple[int, int]]:
    """Pairs of views to compare, by the angles between their optical axes: each view with its two nearest, and with up to two
    more that are hardly farther than the nearest. Raises CameraError if there are none."""
    backward = np.asarray(poses, np.float64)[:, :3, 2]
    angles = np.degrees(np.arccos(np.clip(backward @ backward.T, -1, 1)))
    allowed = (angles >= MIN_ANGLE_DEG) & (angles <= MAX_ANGLE_DEG)
    pairs = set()
    for view, row in enumerate(angles):
        nearest = [int(other) for other in np.argsort(row, kind="stable") if allowed[view, other]][:MOST_NEIGHBOURS]
        for rank, other in enumerate(nearest):
            if rank < NEIGHBOURS or row[other] <= HARDLY_FARTHER * row[nearest[0]]:
                pairs.add((min(view, other), max(view, other)))
    if not pairs:
        raise CameraError(
            f"no two of the {len(backward)} views are {MIN_ANGLE_DEG:g} to {MAX_ANGLE_DEG:g} degrees apart",
            hint="two views must show a common surface from different sides",
        )
    return sorted(pairs)


def foreground(pictures: Pictures) -> Masks:
    """Silhouettes bool (v, h, w): what a plain background leaves, or everything in a picture without one."""
    rgb = np.rint(_unit(pictures) * 255).astype(np.uint8)
    rgba = np.concatenate([rgb, np.full((*rgb.shape[:3], 1), 255, np.uint8)], axis=-1)
    found = [foreground_mask(picture) for picture in rgba]
    return np.stack([np.ones(rgb.shape[1:3], np.bool_) if mask is None else mask >= 0.5 for mask in found])


def _exchanged(scene: Scene, first: int, second: int) -> Scene:
    order = list(range(len(scene.pictures)))
    order[first], order[second] = second, first
    return scene._replace(pictures=scene.pictures[order], masks=scene.masks[order])


def _compare(scene: Scene, depths: Floats | None, first: int, second: int) -> list[Warp]:
    """Both warps of a pair."""
    pair = pair_depth(scene, first, second) if depths is None else (depths[first], depths[second])
    return [_warp(scene, first, second, *pair), _warp(scene, second, first, *pair[::-1])]


def _warp(scene: Scene, view: int, neighbour: int, depth: Floats, neighbour_depth: Floats) -> Warp:
    """Warp backward: a pixel's point is projected into the neighbour, whose four pixels there must have that point's depth.

    Outlines are left out in both, since their pixels mix with the background.
    """
    height, width = depth.shape
    whole = _inner(np.isfinite(depth))
    points = unproject(np.where(whole, depth, 1), scene.poses[view], scene.fov_deg)
    x, y, z = project(points, scene.poses[neighbour], depth.shape, scene.fov_deg)
    colors, inside = sample(scene.pictures[neighbour], x, y)
    first = corners(x, y, depth.shape)[0]
    there = np.where(_inner(np.isfinite(neighbour_depth)), neighbour_depth, np.inf).ravel()
    slope = SLOPE_PX * 2 * math.tan(math.radians(scene.fov_deg) / 2) / height
    tolerance = (DEPTH_TOLERANCE + slope) * np.maximum(z, 0)
    visible = whole & inside & (z > 0)
    for step in (0, 1, width, width + 1):
        visible &= np.abs(there[first + step] - z) <= tolerance
    own = scene.pictures[view]
    error = float(np.square(colors - own)[visible].astype(np.float64).mean()) if visible.any() else 0.0
    warped = np.where(visible[..., None], np.clip(colors, 0, 1), 1).astype(np.float32)
    similar = None
    margin = SSIM_WINDOW // 2
    if visible[margin:-margin, margin:-margin].any():
        similar = float(ssim(warped[None], own[None], mask=visible[None])[0])
    return Warp(view, neighbour, np.rint(warped * 255).astype(np.uint8), visible, error, similar)


def _inner(mask: Masks) -> Masks:
    """Pixels whose neighbours to all sides are inside too; beyond the picture's border everything is inside."""
    padded = np.pad(mask, 1, constant_values=True)
    across = padded[:, :-2] & padded[:, 1:-1] & padded[:, 2:]
    return across[:-2] & across[1:-1] & across[2:]


def _figures(warps: Sequence[Warp], silhouettes: Masks, *, view: int | None = None) -> Figures:
    """Means over the pixels of warps; the share is that of the silhouettes' pixels which some warp covers."""
    counts = np.array([warp.visible.sum() for warp in warps], np.float64)
    covered = np.zeros_like(silhouettes)
    for warp in warps:
        covered[warp.view] |= warp.visible
    share = float(covered.sum() / silhouettes[slice(None) if view is None else view].sum())
    if not counts.sum():
        return Figures(None, None, 0.0)
    error = float(np.average([warp.squared_error for warp in warps], weights=counts))
    known = np.array([warp.ssim is not None for warp in warps])
    similar = np.array([warp.ssim or 0.0 for warp in warps])
    mean_ssim = float(np.average(similar[known], weights=counts[known])) if known.any() else None
    return Figures(math.inf if error == 0 else -10 * math.log10(error), mean_ssim, share)


def _unit(pictures: Pictures) -> Floats:
    return pictures.astype(np.float32) / np.float32(255 if pictures.dtype == np.uint8 else 1)


def _checked_pictures(pictures: Pictures) -> Floats:
    if pictures.ndim != 4 or pictures.shape[-1] != 3 or len(pictures) < 2 or min(pictures.shape[1:3]) < 3:
        raise OptionError("pictures", expected="(v, h, w, 3) with at least 2 views of at least 3 pixels", got=pictures.shape)
    if pictures.dtype != np.uint8 and not np.issubdtype(pictures.dtype, np.floating):
        raise OptionError("pictures", expected="uint8 or floats", got=pictures.dtype.name)
    result = _unit(pictures)
    if not (result.min() >= 0 and result.max() <= 1):
        raise OptionError("pictures", expected="floats from 0 to 1", got=(float(result.min()), float(result.max())))
    return result


def _checked_masks(masks: Masks, shape: tuple[int, ...]) -> Masks:
    if masks.dtype != np.bool_ or masks.shape != shape:
        raise OptionError("masks", expected=f"bool of shape {shape}", got=(masks.dtype.name, masks.shape))
    empty = np.flatnonzero(~masks.any(axis=(1, 2)))
    if len(empty):
        raise OptionError("masks", expected="true somewhere in every view", got=f"nothing in view {empty[0]}")
    return masks


def _checked_depth(depth: NDArray[np.floating], shape: tuple[int, ...]) -> Floats:
    if not np.issubdtype(depth.dtype, np.floating) or depth.shape != shape:
        raise OptionError("depth", expected=f"floats of shape {shape}", got=(depth.dtype.name, depth.shape))
    with np.errstate(over="ignore"):
        result = depth.astype(np.float32)
    if len(nothing := np.flatnonzero(np.isinf(result).all(axis=(1, 2)))):
        raise OptionError("depth", expected="finite somewhere in every view", got=f"nothing in view {nothing[0]}")
    if not (result > 0).all():
        raise OptionError("depth", expected="positive everywhere, infinite where nothing is", got=float(depth.min()))
    return result
