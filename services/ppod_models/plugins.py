"""Classes that packages add by entry points, each with a pydantic model of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import ClassVar, Generic, Literal, Protocol, TypeVar, cast

from pydantic import BaseModel, ValidationError

from ppod_models.configuration import describe_faults

_IMPORT_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError),
    *(OSError, RuntimeError, SyntaxError, TypeError, ValueError),
)
"""What a module of somebody else's may raise as it is imported: it need not even be Python."""


class Plugin(Protocol):
    """The class that an entry point names."""

    parameters_type: ClassVar[type[BaseModel]]
    """A pydantic model of the keys under `parameters`."""


PluginT = TypeVar("PluginT", bound=Plugin)


@dataclass(frozen=True, slots=True)
class PluginGroup(Generic[PluginT]):
    """The classes of one entry point group.

    Attributes:
        group: of the entry points.
        kind: what they are, for messages.
        members: what a class must have besides parameters_type, for messages.
        fits: whether a class has them.
    """

    group: str
    kind: str
    members: str
    fits: Callable[[type], bool]

    def find(self, name: str) -> PluginT:
        """The class that an entry point names; raise ValueError when there is none, or it is not of this kind."""
        found = {entry.value: entry for entry in entry_points(group=self.group, name=name)}
        if not found:
            names = sorted({entry.name for entry in entry_points(group=self.group)})
            raise ValueError(
                f"no {self.kind} {name!r}: installed packages declare {', '.join(names) or 'none'} "
                f"in the entry point group {self.group}"
            )
        if len(found) > 1:
            raise ValueError(f"{self.kind} {name!r} is declared by several packages: {', '.join(sorted(found))}")
        return self._load(next(iter(found.values())))

    def parse(self, name: str, parameters: Mapping[str, object]) -> tuple[PluginT, BaseModel]:
        """The class and its parameters; raise ValueError as `find` does, or with every fault of the parameters."""
        plugin = self.find(name)
        try:
            return plugin, plugin.parameters_type.model_validate(parameters, extra=_extra(plugin.parameters_type))
        except ValidationError as error:
            faults = "; ".join(f"parameters.{fault}" for fault in describe_faults(error))
            raise ValueError(f"{self.kind} {name!r}: {faults}") from error

    def _load(self, entry: EntryPoint) -> PluginT:
        try:
            loaded = cast(object, entry.load())
        except _IMPORT_ERRORS as error:
            found = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.kind} {entry.name!r}: {entry.value} cannot be loaded: {found}") from error
        parameters_type = getattr(loaded, "parameters_type", None)
        if not (
            isinstance(loaded, type)
            and isinstance(parameters_type, type)
            and issubclass(parameters_type, BaseModel)
            and self.fits(loaded)
        ):
            raise ValueError(
                f"{self.kind} {entry.name!r}: {entry.value} must be a class with parameters_type (a pydantic model), "
                f"{self.members}"
            )
        return cast(PluginT, loaded)


def _extra(parameters_type: type[BaseModel]) -> Literal["forbid"] | None:
    """Whether unknown keys are refused where the type does not say what becomes of them.

    By itself pydantic ignores them, and a parameter whose name is misspelt would have no effect.
    """
    return None if "extra" in parameters_type.model_config else "forbid"
