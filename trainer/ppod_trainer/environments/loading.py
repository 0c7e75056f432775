"""Finding environments by their entry points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import cast

from pydantic import JsonValue, ValidationError

from ppod_models.configuration import describe_faults
from ppod_trainer.environments.base import Environment, EnvironmentType
from ppod_trainer.errors import EnvironmentLoadError

GROUP = "ppod.environments"


@dataclass(frozen=True, slots=True)
class LoadedEnvironment:
    """Makes environments of one kind, with their parameters; `stop` as for `EnvironmentType`."""

    make: Callable[[], Environment]
    stop: tuple[str, ...]


def load_environment(name: str, parameters: Mapping[str, JsonValue]) -> LoadedEnvironment:
    """Load the environment of this name.

    Raises:
        EnvironmentLoadError: there is no such entry point, it cannot be imported, or its parameters are wrong.
    """
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        raise EnvironmentLoadError(
            f"environment.name {name!r}: expected one of {', '.join(sorted(found))}; "
            f"packages add more by entry points of the group {GROUP}"
        )
    try:
        kind = cast(EnvironmentType, found[name].load())
    except (ImportError, AttributeError) as error:
        raise EnvironmentLoadError(
            f"environment.name {name!r}: {found[name].value} cannot be loaded: {error}"
        ) from error
    try:
        values = kind.parameters_type.model_validate(parameters)
    except ValidationError as error:
        faults = "; ".join(f"environment.parameters.{fault}" for fault in describe_faults(error))
        raise EnvironmentLoadError(faults) from error
    return LoadedEnvironment(lambda: kind(values), kind.stop)
