"""What an image installs beside ppod itself: `requirements.py PYPROJECT EXTRA,EXTRA` prints one a line.

pip cannot install a project's requirements without the project. They have to come first, in a layer of their own that
changes to the source leave alone.
"""

import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


def requirements(project: Mapping[str, list[str]], extras: Sequence[str]) -> Iterator[str]:
    """Yield what the extras need, with those of the project's own extras that they name in their place."""
    for extra in extras:
        if extra not in project:
            raise SystemExit(f"pyproject.toml has no extra {extra!r}; it has {', '.join(sorted(project))}")
        for line in project[extra]:
            own = re.fullmatch(r"ppod\[(.+)\]", line)
            yield from requirements(project, own[1].split(",")) if own else [line]


def main(pyproject: str, extras: str) -> None:
    """Print the requirements of the package and of extras, which commas part, each once."""
    project = tomllib.loads(Path(pyproject).read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *requirements(project["optional-dependencies"], extras.split(","))]
    print("\n".join(dict.fromkeys(asked)))


if __name__ == "__main__":
    main(*sys.argv[1:])
