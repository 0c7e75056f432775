"""Finds output filters by entry point and checks their parameters."""

from __future__ import annotations

from collections.abc import Mapping

from ppod_models.plugins import PluginGroup
from ppod_services.generation.filters import OutputFilter, OutputFilterType

FILTERS: PluginGroup[OutputFilterType] = PluginGroup(
    group="ppod.output_filters",
    kind="output filter",
    members="and reason",
    fits=lambda found: callable(getattr(found, "reason", None)),
)


def make_filter(name: str, parameters: Mapping[str, object]) -> OutputFilter:
    """The filter, ready to judge; raises ValueError as `PluginGroup.parse` does, or where it cannot be made."""
    filter_type, parsed = FILTERS.parse(name, parameters)
    try:
        return filter_type(parsed)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"output filter {name!r} cannot be made: {error}") from error
