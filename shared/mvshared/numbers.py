"""Numbers that a caller gives: checked, and as Python's own, which no array library takes for something else."""

import math

import numpy as np

from mvshared.errors import OptionError

MAX_SEED = 2**63 - 1


def whole(name: str, value: object, low: int, high: float = math.inf) -> int:
    """The value, which may be numpy's, as an int. Raises OptionError for what is none, or out of bounds."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        bounds = f"from {low} to {high}" if high < math.inf else f"of at least {low}"
        raise OptionError(name, expected=f"a whole number {bounds}", got=value)
    return int(value)


def number(name: str, value: object, low: float, high: float, *, or_zero: bool = False) -> float:
    """The value, which may be numpy's, as a float. Raises OptionError for what is none, or out of bounds, where 0 may be
    allowed all the same."""
    expected = f"{'0, or ' * or_zero}a number from {low:g} to {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise OptionError(name, expected=expected, got=value)
    given = value.item() if isinstance(value, np.generic) else value  # a bound may be beyond float16
    if not (low <= given <= high or (or_zero and given == 0)):
        raise OptionError(name, expected=expected, got=value)
    return float(given)
