"""Finds reward functions by entry point and checks their parameters."""

from __future__ import annotations

from collections.abc import Mapping

from ppod_models.plugins import PluginGroup
from ppod_services.reward.functions import RewardFunction, RewardFunctionType

FUNCTIONS: PluginGroup[RewardFunctionType] = PluginGroup(
    group="ppod.rewards",
    kind="reward function",
    members="needs_references (a bool) and score",
    fits=lambda found: (
        isinstance(getattr(found, "needs_references", None), bool) and callable(getattr(found, "score", None))
    ),
)


def make_function(name: str, parameters: Mapping[str, object]) -> RewardFunction:
    """The function, ready to score; raises ValueError as `PluginGroup.parse` does."""
    function_type, parsed = FUNCTIONS.parse(name, parameters)
    return function_type(parsed)
