"""Views per second of the head renderer, in one process and in many: python -m benchmarks.renderer [--size 128] [--views 8]."""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from benchmarks.measure import machine, measure, print_table
from mvshared.camera import orbit
from mvshared.heads import DEFAULT_RADIUS, render


def render_head(number: int, *, views: int, size_px: int) -> None:
    azimuths = [index * 360 / views for index in range(views)]
    render(number, orbit(azimuths, 10, radius=DEFAULT_RADIUS), size_px=size_px)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, nargs="+", default=[64, 128, 256], help="width of the pictures in pixels")
    parser.add_argument("--views", type=int, default=8, help="views per identity")
    parser.add_argument("--identities", type=int, default=8, help="identities per repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()

    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    print(f"{arguments.identities} identities of {arguments.views} views per repeat, {arguments.repeats} repeats\n")
    numbers = range(arguments.identities)
    rows = []
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        for size_px in arguments.size:
            one = partial(render_head, views=arguments.views, size_px=size_px)
            cases = [(1, lambda one=one: [one(number) for number in numbers])]
            if arguments.processes > 1:
                cases.append((arguments.processes, lambda one=one: list(pool.map(one, numbers))))
            for processes, run in cases:
                timing = measure(run, repeats=arguments.repeats)
                rows.append(
                    {
                        "size (px)": size_px,
                        "processes": processes,
                        "views/s": arguments.identities * arguments.views / timing.median,
                        "median (s)": timing.median,
                        "spread": timing.spread,
                    }
                )
    print_table(rows)


if __name__ == "__main__":
    main()
