"""What threads make before it is needed."""

import threading
import time

import pytest

from mvshared.training.ahead import ahead


def test_results_come_in_the_order_of_the_items_whichever_is_ready_first() -> None:
    def slow(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        return number * number

    assert list(ahead(slow, range(40), workers=4)) == [number * number for number in range(40)]
    assert list(ahead(slow, [], workers=4)) == []


def test_the_next_results_are_made_meanwhile_and_not_too_many_of_them() -> None:
    begun: list[int] = []
    results = ahead(lambda number: begun.append(number) or number, range(100), workers=2)
    assert next(results) == 0
    deadline = time.monotonic() + 10
    while len(begun) < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert sorted(begun) == [0, 1, 2, 3, 4]
    assert next(results) == 1


def test_what_the_function_raises_is_raised_where_its_result_was_due_and_ends_the_threads() -> None:
    def fails(number: int) -> int:
        if number == 3:
            raise ValueError("no 3")
        return number

    results = ahead(fails, range(10), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="no 3"):
        next(results)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_threads_end_when_the_results_are_no_longer_wanted() -> None:
    results = ahead(lambda number: number, range(1000), workers=3)
    next(results)
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
