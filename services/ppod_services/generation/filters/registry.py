"""Finds output filters by entry point and checks their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from pydantic import BaseModel, ValidationError

from ppod_models.configuration import describe_faults
from ppod_services.generation.filters import OutputFilter, OutputFilterType

GROUP = "ppod.output_filters"


def find_filter(name: str) -> OutputFilterType:
    """The class that an entry point names; raise ValueError when there is none, or it is no output filter."""
    found = {entry.value: entry for entry in entry_points(group=GROUP, name=name)}
    if not found:
        names = sorted({entry.name for entry in entry_points(group=GROUP)})
        raise ValueError(
            f"no output filter {name!r}: installed packages declare {', '.join(names) or 'none'} "
            f"in the entry point group {GROUP}"
        )
    if len(found) > 1:
        raise ValueError(f"output filter {name!r} is declared by several packages: {', '.join(sorted(found))}")
    return _load(next(iter(found.values())))


def check_parameters(name: str, parameters: Mapping[str, object]) -> None:
    """Raise ValueError that lists every fault of a filter's parameters."""
    _parse(name, find_filter(name), parameters)


def make_filter(name: str, parameters: Mapping[str, object]) -> OutputFilter:
    """The filter, ready to judge; raises ValueError as `check_parameters` does, or where it cannot be made."""
    filter_type = find_filter(name)
    parsed = _parse(name, filter_type, parameters)
    try:
        return filter_type(parsed)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"output filter {name!r} cannot be made: {error}") from error


def _parse(name: str, filter_type: OutputFilterType, parameters: Mapping[str, object]) -> BaseModel:
    try:
        return filter_type.parameters_type.model_validate(parameters)
    except ValidationError as error:
        faults = "; ".join(f"parameters.{fault}" for fault in describe_faults(error))
        raise ValueError(f"output filter {name!r}: {faults}") from error


def _load(entry: EntryPoint) -> OutputFilterType:
    try:
        loaded = cast(object, entry.load())
    except (ImportError, AttributeError) as error:
        raise ValueError(f"output filter {entry.name!r}: {entry.value} cannot be loaded: {error}") from error
    parameters_type = getattr(loaded, "parameters_type", None)
    if not (
        isinstance(loaded, type)
        and isinstance(parameters_type, type)
        and issubclass(parameters_type, BaseModel)
        and callable(getattr(loaded, "reason", None))
    ):
        raise ValueError(
            f"output filter {entry.name!r}: {entry.value} must be a class with parameters_type (a pydantic model) and "
            "reason"
        )
    return cast(OutputFilterType, loaded)
