"""What a key of a configuration takes, by its dotted path."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin

from ppod_models.configuration import ConfigModel

Kinds = tuple[object, ...]
"""Types of which a value has one; none: there is no such key, or what it takes is not said."""


def kinds_at(model: type[ConfigModel], path: Sequence[str]) -> Kinds:
    """The types of a key; numbers in its path are places in lists."""
    kinds: Kinds = (model,)
    for key in path:
        kinds = tuple(inner for kind in kinds for inner in _inside(kind, key))
    return kinds


def choices(kinds: Kinds) -> set[object]:
    """The words that are values, where these are listed."""
    return {choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)}


def takes_truth(kinds: Kinds) -> bool:
    """Whether true is a value."""
    return bool in kinds or True in choices(kinds)


def takes_list(kinds: Kinds) -> bool:
    """Whether a list is a value."""
    return any(get_origin(kind) is tuple for kind in kinds)


def takes_texts(kinds: Kinds) -> bool:
    """Whether all values, but for none, are texts or paths."""
    return not {str, Path}.isdisjoint(kinds) and {str, Path, type(None)}.issuperset(kinds)


def items_of(kinds: Kinds) -> Kinds:
    """The types of what stands in the lists among them."""
    return tuple(one for kind in kinds if get_origin(kind) is tuple for one in alternatives(get_args(kind)[0]))


def alternatives(annotation: object) -> Iterator[object]:
    """The types of which a value of this annotation has one."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from alternatives(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for one in get_args(annotation):
            yield from alternatives(one)
    else:
        yield annotation


def _inside(kind: object, key: str) -> Iterator[object]:
    yield from items_of((kind,))
    if isinstance(kind, type) and issubclass(kind, ConfigModel) and key in kind.model_fields:
        yield from alternatives(kind.model_fields[key].annotation)
