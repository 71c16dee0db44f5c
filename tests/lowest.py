"""Prints the oldest versions that pyproject.toml admits, as pip's constraints for `make test-lowest`."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

TOOLS = "dev"
CHOSEN_BY_MAKE = "torch"


def lowest(requirement: Requirement) -> str:
    """The constraint to the version after `>=`, where the requirement's marker holds."""
    [version] = [each.version for each in requirement.specifier if each.operator == ">="]
    return f"{requirement.name}=={version}" + (f"; {requirement.marker}" if requirement.marker else "")


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    extras = [lines for extra, lines in project["optional-dependencies"].items() if extra != TOOLS]
    requirements = [Requirement(line) for lines in (project["dependencies"], *extras) for line in lines]
    print(*sorted({lowest(each) for each in requirements if each.name != CHOSEN_BY_MAKE}), sep="\n")
