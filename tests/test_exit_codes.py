"""docs/exit-codes.md lists the error classes, their codes and their fields as they are."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from mvshared import errors
from mvshared.errors import MvError

ROW = re.compile(r"^\| (\d+) \| `(\w+)` \| ([^|]+) \| ([^|]*) \|$", re.MULTILINE)
PAGE = Path(__file__).resolve().parent.parent / "docs" / "exit-codes.md"


def error_classes(base: type[MvError] = MvError) -> list[type[MvError]]:
    found = [base]
    for derived in base.__subclasses__():
        found += error_classes(derived)
    return [error for error in found if error.__module__ == errors.__name__]


def assigned_fields(error: type[MvError]) -> set[str]:
    """The names that the class itself assigns to `self`."""
    nodes = ast.walk(ast.parse(inspect.getsource(error)))
    return {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


def test_the_page_lists_exactly_the_classes_and_their_codes() -> None:
    listed = [(int(code), name) for code, name, _, _ in ROW.findall(PAGE.read_text())]
    assert sorted(listed) == sorted((error.exit_code, error.__name__) for error in error_classes())


@pytest.mark.parametrize("error", error_classes(), ids=lambda error: error.__name__)
def test_the_page_lists_the_fields_of_each_class(error: type[MvError]) -> None:
    [fields] = [fields for _, name, _, fields in ROW.findall(PAGE.read_text()) if name == error.__name__]
    shown = set(re.findall(r"`(\w+)`", fields)) - {"exit_code"}
    assert shown == assigned_fields(error)


def test_no_two_kinds_of_error_share_a_code() -> None:
    kinds = [error for error in error_classes() if "exit_code" in vars(error)]
    assert len({error.exit_code for error in kinds}) == len(kinds)
    assert 0 not in {error.exit_code for error in kinds}
