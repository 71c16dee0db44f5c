"""OBJ files in the form that trimesh reads rightly: a statement a line, and no polygons but convex ones."""

import codecs
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvshared.errors import BackendError

TURNED_BACK = 1e-6  # of a corner against the polygon's own turn, in its squared area: less is rounding


def plain_obj(content: bytes) -> bytes:
    """An OBJ file with a statement a line, single spaces, and concave polygons cut into triangles.

    trimesh takes tabs, indents, remarks after a statement and a byte order mark amiss, and loses faces by them; polygons it
    cuts from their first corner, which fills their notches. Names, which alone are not ASCII, come as UTF-8: trimesh needs
    another package to tell other encodings. Raises BackendError if a polygon has to be cut and mapbox_earcut is not installed.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = content.decode("utf-16", "replace").encode()
    if b"\\" in content:
        # A name and a remark end with their line, even if that is with a path of Windows or with a letter of GBK or Shift JIS.
        content = re.sub(rb"(?m)^([^#\n]*#.*\\|[ \t]*(?:[go]|usemtl|mtllib)[ \t].*\\)(?=[ \t]*\r?$)", rb"\1.", content)
    joined = re.sub(rb"\\\r?\n", b" ", content.removeprefix(codecs.BOM_UTF8))
    lines = [b" ".join(line.partition(b"#")[0].split()) for line in joined.splitlines()]
    plain = b"\n".join(_cut(_counted_from_the_start(lines)))
    return plain if plain.isascii() else plain.decode("latin-1").encode()


def _counted_from_the_start(lines: list[bytes]) -> list[bytes]:
    """The lines, with negative numbers of corners, which count back from where the face stands, as those of the whole file:
    trimesh counts back from its end. What is malformed stays, for trimesh to refuse."""
    if not any(line.startswith(b"f ") and b"-" in line for line in lines):
        return lines
    counts = {b"v": 0, b"vt": 0, b"vn": 0}
    for number, line in enumerate(lines):
        kind, _, rest = line.partition(b" ")
        if kind in counts:
            counts[kind] += 1
        elif kind == b"f" and b"-" in rest:
            try:
                corners = [_number(corner, list(counts.values())) for corner in rest.split()]
            except ValueError:
                continue
            lines[number] = b" ".join([kind, *corners])
    return lines


def _number(corner: bytes, counts: list[int]) -> bytes:
    """A corner, `v`, `v/vt`, `v/vt/vn` or `v//vn`, of a face that has so many of each above it. Raises ValueError."""
    parts = corner.split(b"/")
    for index, part in enumerate(parts):
        if part.startswith(b"-"):
            parts[index] = b"%d" % (counts[index] + 1 + int(part)) if index < len(counts) else part
            if int(parts[index]) < 1:
                raise ValueError
    return b"/".join(parts)


def _cut(lines: list[bytes]) -> list[bytes]:
    """The lines, with triangles for every polygon that is not convex. What is malformed stays, for trimesh to refuse."""
    polygons: dict[int, list[tuple[int, list[bytes]]]] = {}
    for number, line in enumerate(lines):
        if line.startswith(b"f ") and line.count(b" ") > 3:
            corners = line.split()[1:]
            polygons.setdefault(len(corners), []).append((number, corners))
    if not polygons:
        return lines
    try:
        points = np.array([line.split()[1:4] for line in lines if line.startswith(b"v ")]).astype(np.float64)
        for same in polygons.values():
            places = np.array([[corner.partition(b"/")[0] for corner in corners] for _, corners in same]).astype(np.int64) - 1
            if (places < 0).any():  # numpy would count from the end
                return lines
            rings = points[places] - points[places[:, :1]]  # far from the origin products of coordinates lose small faces
            normals = np.cross(rings, np.roll(rings, -1, axis=1)).sum(axis=1)
            for index in np.flatnonzero(_is_concave(rings, normals)):
                number, corners = same[index]
                cut = _triangles(rings[index], normals[index])
                lines[number] = b"\n".join(b"f " + b" ".join(corners[each] for each in three) for three in cut) or lines[number]
    except (ValueError, IndexError):
        pass
    return lines


def _is_concave(rings: NDArray[np.float64], normals: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which polygons (n, m, 3) turn back at a corner, seen along their normals (n, 3), twice the area long."""
    edges = np.roll(rings, -1, axis=1) - rings
    turns = np.einsum("nmk,nk->nm", np.cross(np.roll(edges, 1, axis=1), edges), normals)
    return (turns < -TURNED_BACK * np.square(normals).sum(axis=1, keepdims=True)).any(axis=1)


def _triangles(ring: NDArray[np.float64], normal: NDArray[np.float64]) -> list[list[int]]:
    """The corners (t, 3) of triangles that a polygon (m, 3) is made of, turned as it is; none if it crosses itself."""
    flat = np.delete(ring, int(np.abs(normal).argmax()), axis=1)
    cut = _earcut().triangulate_float64(np.ascontiguousarray(flat), np.array([len(ring)], np.uint32)).reshape(-1, 3).astype(int)
    if len(cut) != len(ring) - 2:
        return []
    first, second, third = ring[cut].swapaxes(0, 1)
    turned = (np.cross(second - first, third - first) @ normal) < 0
    return np.where(turned[:, None], cut[:, ::-1], cut).tolist()


def _earcut() -> Any:
    try:
        import mapbox_earcut
    except ImportError as cause:
        hint = "pip install 'mvmlx[mesh]'"
        raise BackendError(
            "mapbox_earcut is not installed, and a face is a concave polygon", backend="mesh", hint=hint
        ) from cause
    return mapbox_earcut
