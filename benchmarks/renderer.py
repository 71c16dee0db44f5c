"""The case of the head renderer: all views of one head, in one process."""

import time
from itertools import count

from mvshared.benchmark.measure import peak_rss_bytes
from mvshared.benchmark.worker import Prepared
from mvshared.camera import even_azimuths, orbit
from mvshared.heads import DEFAULT_RADIUS, render


def renderer(*, views: int, size_px: int) -> Prepared:
    """`views` views around a head, another one for every call; loading is a first small picture, with what is compiled for it
    or read from numba's cache."""
    poses = orbit(even_azimuths(views), 10, radius=DEFAULT_RADIUS)
    start = time.perf_counter()
    render(0, poses[:1], size_px=8)
    load_seconds = time.perf_counter() - start
    identities = count()
    return Prepared(
        lambda: render(next(identities), poses, size_px=size_px),
        lambda: {"made": views, "threads": 1, "peak_memory_bytes": peak_rss_bytes(), "load_seconds": load_seconds},
    )
