"""The teams file: who may call, how much of the service is theirs, and who administers it. Free of gRPC."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self, TypeVar

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from ppod_models.configuration import ConfigModel, load_config
from ppod_services.core.callers import ANONYMOUS, Team

ADMINISTRATOR = Team("administrator")
"""Whoever calls an administrative service with a token for it."""

EntryT = TypeVar("EntryT")
_RESERVED = (ANONYMOUS.name, ADMINISTRATOR.name)


def _filled(values: tuple[EntryT, ...]) -> tuple[EntryT, ...]:
    """Not `min_length`: pydantic counts valid entries, and would call a tuple with one bad entry empty."""
    if not values:
        raise ValueError("at least one is needed")
    return values


TokenHash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
TokenHashes = Annotated[tuple[TokenHash, ...], AfterValidator(_filled)]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?$")]

_HASHES = "SHA-256 of each valid token, in lower-case hexadecimal; several while a token is being replaced"


class TeamEntry(ConfigModel):
    """One team; the attributes are those of `callers.Team`."""

    name: Name = Field(description="lower-case letters, digits, dots, dashes; a label of metrics")
    token_sha256: TokenHashes = Field(description=_HASHES)
    weight: float = Field(default=1.0, gt=0, le=1e6, description="share of the compute, relative to other teams'")
    tokens_per_s: float | None = Field(default=None, gt=0, le=1e12, description="quota of tokens; none: no quota")
    burst_s: float = Field(default=10.0, gt=0, le=86_400, description="seconds of quota that may be spent at once")
    max_tokens_in_flight: int | None = Field(default=None, ge=1, description="most tokens waiting and running")


class AdministratorEntry(ConfigModel):
    """Somebody who may call WeightService and RewardAdminService, and nothing else."""

    name: Name = Field(description="for the reader of the file")
    token_sha256: TokenHashes = Field(description=_HASHES)


class TeamsFile(ConfigModel):
    """All teams and administrators of a service."""

    teams: Annotated[tuple[TeamEntry, ...], AfterValidator(_filled)]
    administrators: tuple[AdministratorEntry, ...] = ()

    @model_validator(mode="after")
    def _names_and_tokens_are_unique(self) -> Self:
        holders = (*self.teams, *self.administrators)
        names = [holder.name for holder in holders]
        hashes = [digest for holder in holders for digest in holder.token_sha256]
        faults = [f"{name} is there twice" for name in _doubles(names)]
        faults += [f"{name} is a name that ppod uses itself" for name in names if name in _RESERVED]
        faults += [f"token {digest[:8]}... is there twice; each token is one holder's" for digest in _doubles(hashes)]
        if faults:
            raise ValueError("teams and administrators: " + "; ".join(faults))
        return self


@dataclass(frozen=True, slots=True)
class Roster:
    """What a teams file comes to: the holder of each token, by the token's hash."""

    holders: tuple[tuple[bytes, Team], ...]

    def holder(self, token: str) -> Team | None:
        """Whose token this is; ADMINISTRATOR for an administrator's. The time taken does not depend on the token."""
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found: Team | None = None
        for known, holder in self.holders:
            if hmac.compare_digest(known, digest):
                found = holder
        return found


def load_roster(path: Path) -> Roster:
    """Read a teams file; raise ConfigError that lists every fault at once."""
    return Roster(tuple(_holders(load_config(TeamsFile, path))))


def _holders(file: TeamsFile) -> Iterator[tuple[bytes, Team]]:
    weights = sum(entry.weight for entry in file.teams)
    for entry in file.teams:
        team = Team(
            name=entry.name,
            weight=entry.weight,
            tokens_per_s=entry.tokens_per_s,
            burst_s=entry.burst_s,
            max_tokens_in_flight=entry.max_tokens_in_flight,
            part=entry.weight / weights,
        )
        yield from ((bytes.fromhex(digest), team) for digest in entry.token_sha256)
    for administrator in file.administrators:
        yield from ((bytes.fromhex(digest), ADMINISTRATOR) for digest in administrator.token_sha256)


def _doubles(values: list[str]) -> list[str]:
    return sorted({value for value in values if values.count(value) > 1})
