"""The case of the head renderer: all views of one head, in one process."""

from itertools import count

from mvshared.benchmark.measure import peak_rss_bytes
from mvshared.benchmark.worker import Prepared
from mvshared.camera import even_azimuths, orbit
from mvshared.heads import DEFAULT_RADIUS, render


def renderer(*, views: int, size_px: int) -> Prepared:
    """`views` views around a head, another one for every call."""
    poses = orbit(even_azimuths(views), 10, radius=DEFAULT_RADIUS)
    identities = count()
    return Prepared(
        lambda: render(next(identities), poses, size_px=size_px),
        lambda: {"made": views, "threads": 1, "peak_memory_bytes": peak_rss_bytes()},
    )
