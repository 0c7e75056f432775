"""Who calls: reads tokens from metadata, keeps the teams file current, and makes tokens.

`python -m ppod_services.core.tenancy new-token NAME` prints a new token and what to put into the teams file.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import yaml

from ppod.errors import PermissionDenied, Unauthenticated
from ppod_models.configuration import ConfigError, parse_config
from ppod_services.core.callers import ANONYMOUS, Team
from ppod_services.core.config import TenancyConfig
from ppod_services.core.logs import log_event
from ppod_services.core.teams_file import ADMINISTRATOR, Roster, TeamsFile, load_roster

_LOGGER = logging.getLogger(__name__)

_SCHEME = "bearer "
_TOKEN_BYTES = 32

Metadata = Iterable[tuple[str, str | bytes]]
Stamp = tuple[int, int, int]
OnQuotas = Callable[[Mapping[str, float]], None]


class Tenancy:
    """Identifies callers by the teams file, or takes everybody where there is none.

    Args:
        config: which file, and how often to look at it.
        on_quotas: told the quotas by team, tokens a second, of each file that is taken over.

    Raises:
        ConfigError: the file cannot be read or has faults.

    Attributes:
        refused: the file is away or has faults now, and what it held before is in use.
    """

    def __init__(self, config: TenancyConfig, on_quotas: OnQuotas | None = None) -> None:
        self._path = config.teams_file
        self._reload_s = config.reload_s
        self._stamp: Stamp | None = None
        self._roster: Roster | None = None
        self.refused = False
        if self._path is not None:
            self._stamp = _stamp(self._path)
            self._roster = load_roster(self._path)
        self._on_quotas = on_quotas
        self._tell_quotas()

    def team(self, metadata: Metadata) -> Team:
        """The team that calls a data service.

        Raises:
            Unauthenticated: no token, or an unknown one. PermissionDenied: an administrator's token.
        """
        if self._roster is None:
            return ANONYMOUS
        holder = _holder(self._roster, metadata)
        if holder is ADMINISTRATOR:
            raise PermissionDenied("the token is an administrator's; this service takes a team's")
        return holder

    def administrator(self, metadata: Metadata) -> Team:
        """The administrator that calls an administrative service.

        Raises:
            Unauthenticated: no token, or an unknown one. PermissionDenied: a team's token.
        """
        if self._roster is None:
            return ANONYMOUS
        holder = _holder(self._roster, metadata)
        if holder is not ADMINISTRATOR:
            raise PermissionDenied(f"the token is team {holder.name}'s; this service takes an administrator's")
        return holder

    async def watch(self) -> None:
        """Take over changes of the file until cancelled. A broken or missing one is logged, and the old one goes on."""
        if self._path is None:
            return
        while True:
            await asyncio.sleep(self._reload_s)
            # In a thread: the file may be on a network.
            await asyncio.to_thread(self._reload, self._path)

    def _reload(self, path: Path) -> None:
        stamp = _stamp(path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._roster = load_roster(path)
        except ConfigError as error:
            self.refused = True
            log_event(_LOGGER, "teams_file_refused", {"problems": str(error)}, level=logging.ERROR)
        else:
            self.refused = False
            self._tell_quotas()
            log_event(_LOGGER, "teams_file_loaded", {"file": str(path), "tokens": len(self._roster.holders)})

    def _tell_quotas(self) -> None:
        if self._roster is not None and self._on_quotas is not None:
            teams = [team for _, team in self._roster.holders]
            self._on_quotas({team.name: team.tokens_per_s for team in teams if team.tokens_per_s is not None})


def _holder(roster: Roster, metadata: Metadata) -> Team:
    for key, value in metadata:
        if key == "authorization" and isinstance(value, str) and value[: len(_SCHEME)].lower() == _SCHEME:
            holder = roster.holder(value[len(_SCHEME) :].strip())
            if holder is None:
                raise Unauthenticated("the token is unknown here; it may have been replaced")
            return holder
    raise Unauthenticated(
        "the call carries no token: send metadata `authorization: Bearer TOKEN`, which ppod's trainer and commands "
        "take from PPOD_TOKEN or from the file that PPOD_TOKEN_FILE names"
    )


def _stamp(path: Path) -> Stamp | None:
    """What changes with the file: also when Kubernetes swaps the symlink above it, or an editor replaces it."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size


def main(arguments: Sequence[str] | None = None) -> None:
    """Make a token."""
    parser = argparse.ArgumentParser(
        prog="python -m ppod_services.core.tenancy", description="Makes tokens for a service's teams file."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    new_token = commands.add_parser("new-token", help="print a new token, and the lines for the teams file")
    new_token.add_argument("name", metavar="NAME", help="name of the team or administrator")
    name: str = parser.parse_args(arguments).name
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    entry = {"name": name, "token_sha256": [hashlib.sha256(token.encode()).hexdigest()]}
    try:
        parse_config(TeamsFile, {"teams": [entry]}, "NAME")
    except ConfigError as error:
        parser.error("; ".join(error.problems))
    sys.stdout.write(
        f"# The token, shown this once; {name} sends it as metadata `authorization: Bearer TOKEN`:\n"
        f"# {token}\n"
        f"{yaml.safe_dump([entry], sort_keys=False)}"
    )


if __name__ == "__main__":
    main()
