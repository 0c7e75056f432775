"""The parts of a reward: what each model, function or ensemble below it gave to each sequence."""

from __future__ import annotations

from ppod.client import RewardComponent, Scores


def component_scores(scores: Scores) -> list[dict[str, float]]:
    """For each sequence the scores of all rewards that its score is made of, by name; empty where none are told."""
    count = len(scores.values)
    if scores.breakdown is None:
        return [{} for _ in range(count)]
    found: dict[str, list[float]] = {}
    _collect(scores.breakdown, found)
    return [{name: values[row] for name, values in found.items()} for row in range(count)]


def _collect(component: RewardComponent, found: dict[str, list[float]]) -> None:
    found[component.name] = component.scores.tolist()
    for member in component.members:
        _collect(member, found)
