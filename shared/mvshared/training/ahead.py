"""Results that threads make before they are needed: batches and pictures, while the device computes."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from mvshared.processors import usable_processors

T = TypeVar("T")
R = TypeVar("R")

MOST_WORKERS = 8  # more wait for each other at Python's lock


def ahead(function: Callable[[T], R], items: Iterable[T], *, workers: int | None = None) -> Generator[R, None, None]:
    """`function` of every item, in their order; threads make the next ones meanwhile, two each at most.

    `workers` is by default one less than there are processors to use, 1 to 8. What the function raises is raised where its
    result was due. The items that were begun are finished when the iteration is left.
    """
    count = workers or min(MOST_WORKERS, max(1, usable_processors() - 1))
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(count, thread_name_prefix="ahead") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
