"""Finds reward functions by entry point and checks their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from pydantic import BaseModel, ValidationError

from ppod_models.configuration import describe_faults
from ppod_services.reward.functions import RewardFunction, RewardFunctionType

GROUP = "ppod.rewards"


def find_function(name: str) -> RewardFunctionType:
    """The class that an entry point names; raise ValueError when there is none, or it is no reward function."""
    found = {entry.value: entry for entry in entry_points(group=GROUP, name=name)}
    if not found:
        names = sorted({entry.name for entry in entry_points(group=GROUP)})
        raise ValueError(
            f"no reward function {name!r}: installed packages declare {', '.join(names) or 'none'} "
            f"in the entry point group {GROUP}"
        )
    if len(found) > 1:
        raise ValueError(f"reward function {name!r} is declared by several packages: {', '.join(sorted(found))}")
    return _load(next(iter(found.values())))


def check_parameters(name: str, parameters: Mapping[str, object]) -> None:
    """Raise ValueError that lists every fault of a function's parameters."""
    _parse(name, find_function(name), parameters)


def make_function(name: str, parameters: Mapping[str, object]) -> RewardFunction:
    """The function, ready to score; raises ValueError as `check_parameters` does."""
    function_type = find_function(name)
    return function_type(_parse(name, function_type, parameters))


def _parse(name: str, function_type: RewardFunctionType, parameters: Mapping[str, object]) -> BaseModel:
    try:
        return function_type.parameters_type.model_validate(parameters)
    except ValidationError as error:
        faults = "; ".join(f"parameters.{fault}" for fault in describe_faults(error))
        raise ValueError(f"function {name!r}: {faults}") from error


def _load(entry: EntryPoint) -> RewardFunctionType:
    try:
        loaded = cast(object, entry.load())
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward function {entry.name!r}: {entry.value} cannot be loaded: {error}") from error
    parameters_type = getattr(loaded, "parameters_type", None)
    if not (
        isinstance(loaded, type)
        and isinstance(parameters_type, type)
        and issubclass(parameters_type, BaseModel)
        and isinstance(getattr(loaded, "needs_references", None), bool)
        and callable(getattr(loaded, "score", None))
    ):
        raise ValueError(
            f"reward function {entry.name!r}: {entry.value} must be a class with parameters_type (a pydantic model), "
            "needs_references (a bool) and score"
        )
    return cast(RewardFunctionType, loaded)
