"""Measures what the settings say, table by table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from mvshared.benchmark.against import AGREE, with_ratios
from mvshared.benchmark.compare import DIFFERENT, ENDED, Case, compare
from mvshared.benchmark.growth import axes, measure_growth
from mvshared.benchmark.measure import machine
from mvshared.benchmark.results import Results, Row, Table
from mvshared.benchmark.settings import GROWTH, NAMES, Needs, Place, Settings, memory_limit, places, resolved, too_large
from mvshared.benchmark.suite import TITLES, Suite, grouped, refuse, start_case
from mvshared.errors import BackendError, NumericsError

PEAK_REPEATS = 10  # at least, since the best one counts
LEAST_SECONDS = 1.0  # of calls per case, however short one is
EFFICIENCY = 0.3  # share of the peak that the networks are expected to reach, for a guess of how long it takes
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
# For what is compared and not timed: products of float32 as such on every GPU, and on Metal no convolutions by Winograd's
# method. MLX has a variable for that from 0.32.4 on; in all versions it leaves the method where it has no memory for it.
EXACT = {"MLX_ENABLE_TF32": "0", "MLX_CONV_WINOGRAD": "0", "MLX_CONV_WINOGRAD_WORKING_SET": "1"}
Say = Callable[[str], None]
Peaks = Mapping[tuple[str, str], tuple[float, float]]  # flops a second, wall clock and CPU time, by backend and dtype


def measure(settings: Settings, say: Say, *, on_table: Callable[[Results], None] = lambda so_far: None) -> Results:
    """The results; `say` gets a line before all that takes time, `on_table` the results so far after every table. Raises
    OptionError, CheckpointError and BackendError."""
    given = settings
    settings, found = resolved(settings)
    where, notes = places(settings)
    for note in notes:
        say(note)
    growing = GROWTH in settings.names
    if growing:
        settings = replace(settings, views=given.views, sizes_px=given.sizes_px and settings.sizes_px, steps=given.steps)
        if not given.dtypes:
            where = list({place.backend: place for place in where}.values())  # the dtype of the device, which comes last
    suites = [Suite(settings=settings, found=found, place=place, needs=Needs(found, place)) for place in where]
    environment: dict[str, str] = {}
    if settings.threads is not None:
        environment |= dict.fromkeys(THREADS, str(settings.threads))
    tables: dict[str, Table] = {}
    results = Results(machine=machine(), settings=_described(settings), tables=tables)

    def add(name: str, table: Table) -> None:
        tables[name] = table
        on_table(results)

    if "start" in settings.names:
        say("start ...")
        add("start", Table(title=TITLES["start"], rows=compare([start_case()], repeats=settings.repeats)))
    timing = _Timing(settings, environment, say)
    if growing:
        for suite in suites:
            for axis in axes(suite):
                say(f"growth with {axis}, {found.name}, {suite.place.backend} in {suite.place.dtype} ...")
                limit = memory_limit(suite.place)
                name = f"growth {axis} {found.name} {suite.place.backend} {suite.place.dtype}"
                add(name, measure_growth(suite, axis, limit_bytes=limit, environment=environment))
    elif suites and (settings.against or set(settings.names) - {"start"}):
        _networks(suites, settings, timing, add)
    return results


def check_measured(results: Results) -> None:
    """Raise NumericsError if something of `--against` computed something else: its ratio would mean nothing; and BackendError
    if the process of a case ended early. What was left out for a reason is no error."""
    for table in results.tables.values():
        for row in table.rows:
            side = ", ".join(filter(None, (row.backend, row.variant))) + f" in {row.dtype}" * bool(row.dtype)
            if row.failure.startswith(DIFFERENT):
                raise NumericsError(f"{row.failure} ({side})", where=row.what)
            if row.failure.startswith(ENDED):
                raise BackendError(f"{', '.join(filter(None, (row.what, side)))}: {row.failure}", backend=row.backend)


def _networks(suites: Sequence[Suite], settings: Settings, timing: "_Timing", add: Callable[[str, Table], None]) -> None:
    """Add the tables of the names, and that of `--against`, with the peak of every place before them."""
    peaks, rows = dict[tuple[str, str], tuple[float, float]](), list[Row]()
    for suite in suites:
        found = timing.rows(suite.matmul(), place=suite.place, least_repeats=PEAK_REPEATS)
        peaks[suite.place.backend, suite.place.dtype] = _peak(found)
        rows += found
    timing.guess(suites, peaks)
    add("matmul", Table(title=TITLES["matmul"], rows=[_beside(row, peaks) for row in rows]))
    for name in (name for name in NAMES if name in settings.names and name != "start"):
        rows = [row for group in grouped(suites, name) for row in timing.rows(group, place=suites[0].place)]
        add(name, Table(title=TITLES[name], rows=[_beside(row, peaks) for row in rows]))
    if settings.against is not None:
        rows = [row for suite in suites for row in timing.against(suite)]
        add("against", Table(title=TITLES["against"], rows=[_beside(row, peaks) for row in rows]))


class _Timing:
    """How groups of cases are timed."""

    def __init__(self, settings: Settings, environment: Mapping[str, str], say: Say) -> None:
        self.settings, self.environment, self.say = settings, environment, say
        self._compared: dict[tuple[str, str], list[Row]] = {}  # by backend and device, what differs in float32

    def rows(self, group: Sequence[Case], *, place: Place, together: bool = False, least_repeats: int = 1) -> list[Row]:
        """The rows of cases that take turns, as far as they fit into memory at once; those that are `together` are refused
        otherwise, and compared with each other."""
        limit, repeats = memory_limit(place), max(least_repeats, self.settings.repeats)
        reason = too_large(sum(case.needed_bytes for case in group), limit)
        if not reason:
            return with_ratios(self._timed(group, repeats, together=True)) if together else self._timed(group, repeats)
        if together:
            return self._timed([refuse(case, f"{reason}; all sides have to be in memory") for case in group], repeats)
        return [row for case in group for row in self._timed([refuse(case, too_large(case.needed_bytes, limit))], repeats)]

    def against(self, suite: Suite) -> list[Row]:
        """The rows of a place beside diffusers. Rounding in half precision could hide a part of the work that one side leaves
        out: there the sides are compared in float32 before, at a small size, and nothing is timed if they differ."""
        faults = [] if suite.place.dtype == "float32" else self._differing(suite.small_in_float32())
        return faults or [row for group in suite.against() for row in self.rows(group, place=suite.place, together=True)]

    def _differing(self, suite: Suite) -> list[Row]:
        """The rows of sides that compute something else, or fail; compared once for all dtypes of a place."""
        place = (suite.place.backend, suite.place.device)
        if place not in self._compared:
            self._compared[place] = []
            for group in suite.against():
                reason = too_large(sum(case.needed_bytes for case in group), memory_limit(suite.place))
                self.say(f"{group[0].what} float32, to compare the results {f'is left out: {reason}' if reason else '...'}")
                if not reason:
                    rows = compare(group, repeats=0, agree=AGREE["float32"], environment={**self.environment, **EXACT})
                    self._compared[place] += [row for row in rows if row.failure]
        return self._compared[place]

    def _timed(self, group: Sequence[Case], repeats: int, *, together: bool = False) -> list[Row]:
        dtype = group[0].arguments.get("dtype", "")
        self.say(f"{group[0].what} {dtype} ...")
        return compare(
            group,
            repeats=repeats,
            least_seconds=LEAST_SECONDS,
            agree=AGREE[dtype] if together else None,
            environment=self.environment,
        )

    def guess(self, suites: Sequence[Suite], peaks: Peaks) -> None:
        """Say how long it is going to take, if that is minutes."""
        seconds = 0.0
        for suite in suites:
            peak = peaks[suite.place.backend, suite.place.dtype][0]
            groups = suite.against() if self.settings.against else []
            cases = [case for name in self.settings.names if name != "start" for case in suite.cases(name)]
            flops = sum(case.row.get("flops", 0) for case in [*cases, *(case for group in groups for case in group)])
            seconds += flops / (EFFICIENCY * peak) * (1 + self.settings.repeats) if peak else 0.0
        if seconds > 60:
            self.say(f"this is going to take about {seconds / 60:.0f} minutes, and loading")


def _peak(rows: Sequence[Row]) -> tuple[float, float]:
    timed = [row for row in rows if row.seconds and row.flops]
    return (
        max((row.flops / min(row.seconds) for row in timed if row.flops), default=0.0),
        max((row.flops / min(row.cpu_seconds) for row in timed if row.flops and min(row.cpu_seconds)), default=0.0),
    )


def _beside(row: Row, peaks: Peaks) -> Row:
    """The row with the peak of its place; diffusers runs where PyTorch does."""
    peak = peaks.get(("torch" if row.backend == "diffusers" else row.backend, row.dtype))
    if peak is None or not all(peak):
        return row
    return replace(row, peak_flops=peak[0], peak_cpu_flops=peak[1])


def _described(settings: Settings) -> dict[str, str | int]:
    described: dict[str, str | int] = {"model": settings.model, "repeats": settings.repeats}
    if settings.threads is not None:
        described["threads"] = settings.threads
    return described
