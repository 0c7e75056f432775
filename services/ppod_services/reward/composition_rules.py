"""Which compositions of rewards make sense. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ppod_services.reward.kinds import EnsembleConfig, RewardConfig, SumConfig


def members_of(reward: RewardConfig) -> tuple[str, ...]:
    """Names of the rewards that a composed reward reads; empty for every other kind."""
    match reward:
        case EnsembleConfig():
            return reward.members
        case SumConfig():
            return tuple(term.reward for term in reward.terms)
        case _:
            return ()


def composition_faults(rewards: Sequence[RewardConfig]) -> list[str]:
    """One line for each double name, unknown member, double member and cycle."""
    names = [reward.name for reward in rewards]
    members = {reward.name: members_of(reward) for reward in rewards}
    faults = [f"{name!r} is there twice, each name may be there once" for name in _doubles(names)]
    for name, parts in members.items():
        unknown = [part for part in dict.fromkeys(parts) if part not in members]
        faults += [f"{name!r} has the member {part!r}, which is no reward here" for part in unknown]
        faults += [f"{name!r} has the member {part!r} twice" for part in _doubles(parts)]
    cycles: dict[frozenset[str], list[str]] = {}
    for name in members:
        if cycle := _cycle(name, members):
            cycles.setdefault(frozenset(cycle), cycle)
    faults += [f"{' -> '.join(repr(part) for part in cycle)} is a cycle" for cycle in cycles.values()]
    return faults


def _doubles(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _cycle(start: str, members: dict[str, tuple[str, ...]]) -> list[str]:
    """The way from a reward back to itself; empty when there is none."""
    paths = [[start]]
    seen: set[str] = set()
    while paths:
        path = paths.pop()
        for part in members.get(path[-1], ()):
            if part == start:
                return [*path, start]
            if part not in seen:
                seen.add(part)
                paths.append([*path, part])
    return []
