"""What `import ppod` gives: every client, with all that its calls are made of."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import get_args, get_type_hints

import pytest

import ppod
import ppod.client
from ppod.errors import PpodError
from support.processes import ROOT

CLIENTS = [getattr(ppod, name) for name in ppod.__all__ if re.fullmatch(r"[A-Z]\w+Client", name)]


def _classes(annotation: object, seen: set[str]) -> set[str]:
    """The client's own that an annotation names, with what their fields are made of, besides those seen before."""
    for inner in get_args(annotation):
        _classes(inner, seen)
    if isinstance(annotation, type) and annotation.__module__.startswith("ppod.client."):
        own = annotation.__name__
        if own not in seen:
            seen.add(own)
            for hint in get_type_hints(annotation).values() if dataclasses.is_dataclass(annotation) else ():
                _classes(hint, seen)
    return seen


@pytest.mark.parametrize("client", CLIENTS)
def test_what_a_call_takes_is_imported_from_where_its_client_is(client: type) -> None:
    for name, method in inspect.getmembers(client, inspect.isfunction):
        if not name.startswith("_"):
            hints = get_type_hints(method)
            hints.pop("return", None)
            taken = {one for hint in hints.values() for one in _classes(hint, set())}
            assert taken <= set(ppod.__all__), f"{client.__name__}.{name}"


def test_names_on_the_client_s_page_are_imported_from_ppod() -> None:
    code = re.findall(r"```.*?```|`[^`]+`", (ROOT / "protos" / "README.md").read_text(), re.DOTALL)
    named = set(re.findall(r"\w+", " ".join(code))) & set(ppod.client.__all__)
    assert {"NO_RETRY", "RetryPolicy", "RewardAdminClient"} <= named <= set(ppod.__all__)


def test_every_error_is_told_on_the_client_s_page() -> None:
    table = (ROOT / "protos" / "README.md").read_text().split("| error | status |")[1].split("\n\n")[0]
    rows = [row.strip("|").split("|")[:2] for row in table.splitlines()[2:]]
    told = {name: status for names, status in rows for name in re.findall(r"`(\w+)`", names)}
    kinds = {name: kind for name, kind in vars(ppod).items() if isinstance(kind, type) and issubclass(kind, PpodError)}
    assert told.keys() == kinds.keys() - {"PpodError"}
    for name, status in told.items():
        assert name == "InvalidReply" or kinds[name].code.name in status, name
