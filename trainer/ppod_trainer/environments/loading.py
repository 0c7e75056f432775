"""Finding environments by their entry points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from ppod_models.plugins import PluginGroup
from ppod_trainer.environments.base import Environment, EnvironmentType
from ppod_trainer.errors import EnvironmentLoadError

ENVIRONMENTS: PluginGroup[EnvironmentType] = PluginGroup(
    group="ppod.environments",
    kind="environment",
    members="stop (a tuple of texts), reset and step",
    fits=lambda found: (
        isinstance(getattr(found, "stop", None), tuple)
        and callable(getattr(found, "reset", None))
        and callable(getattr(found, "step", None))
    ),
)


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
    try:
        kind, values = ENVIRONMENTS.parse(name, parameters)
    except ValueError as error:
        raise EnvironmentLoadError(f"environment: {error}") from error
    return LoadedEnvironment(lambda: kind(values), kind.stop)
