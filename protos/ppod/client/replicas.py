"""The replicas of one service as a client sees them: who is up, and how many tokens each one holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ppod.client.kubernetes_target import SCHEME, KubernetesTarget, parse_kubernetes_target
from ppod.errors import InvalidArgument

_FIRST_PROBE_S = 0.5
_LAST_PROBE_S = 10.0
_MOST_DOUBLINGS = 4
_PORT_DIGITS = 5
_OTHER_SCHEMES = ("dns:", "ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:", "xds:")
"""Of targets that are gRPC's own to read."""
RESOLVE_INTERVAL_S = 10.0
"""A name is looked up again this often, and whenever a replica fails: pods come and go."""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a service is.

    Attributes:
        addresses: gRPC targets, one channel each; empty for a name that is still to be looked up.
        host, port: of `dns:///host:port`, whose every address is a replica; None for all other targets.
        kubernetes: of `k8s:///SERVICE[.NAMESPACE]:PORT`, whose every ready pod is a replica; None for all others.
    """

    addresses: tuple[str, ...]
    host: str | None = None
    port: int | None = None
    kubernetes: KubernetesTarget | None = None


def parse_target(target: str) -> Endpoints:
    """Read `host:port`, `a:1,b:2`, `dns:///host:port`, `k8s:///SERVICE[.NAMESPACE]:PORT` or any other gRPC target.

    Raises:
        InvalidArgument: it is empty, names a replica twice, or has no port, where it needs one, from 1 to 65535.
    """
    if target.startswith(SCHEME):
        return Endpoints((), kubernetes=parse_kubernetes_target(target))
    if target.startswith("dns:///"):
        host, colon, port = target.removeprefix("dns:///").rpartition(":")
        if not colon or not host or not _is_port(port):
            raise InvalidArgument("target", target, "dns:///host:port, the port from 1 to 65535")
        return Endpoints((), host.strip("[]"), int(port))
    # ipv4: and ipv6: targets hold lists of their own, which gRPC balances.
    listed = [target] if target.startswith(("ipv4:", "ipv6:")) else [part.strip() for part in target.split(",")]
    if not all(listed):
        raise InvalidArgument("target", repr(target), "host:port, or several with commas between")
    if len(set(listed)) != len(listed):
        raise InvalidArgument("target", target, "each replica once")
    for one in listed:
        # gRPC itself would take 443 where there is none, and of a larger number its last 16 bits.
        if not one.startswith(_OTHER_SCHEMES) and not _is_port(one.rpartition(":")[2]):
            raise InvalidArgument("target", one, "host:port, the port from 1 to 65535")
    return Endpoints(tuple(listed))


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _PORT_DIGITS and 1 <= int(text) <= 65_535


@dataclass(slots=True)
class _Replica:
    outstanding_tokens: int = 0
    given_tokens: int = 0
    down: bool = False
    failures: int = 0
    late: int = 0
    probe_at: float = 0.0
    probing: bool = False
    last_pick: int = 0


class Replicas:
    """Shared by all calls of a client, on whatever thread they run.

    Attributes:
        on_down: told of a replica that does not answer, or drains; for whoever knows more of it than its health.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self.on_down: Callable[[str], None] | None = None
        self._lock = threading.Lock()
        self._by_address = {address: _Replica() for address in addresses}
        self._leaving: dict[str, _Replica] = {}
        self._picks = 0
        self._resolve_at = 0.0
        self._left = False

    @property
    def addresses(self) -> tuple[str, ...]:
        """All replicas, those that are down included."""
        with self._lock:
            return tuple(self._by_address)

    def __len__(self) -> int:
        return len(self._by_address)

    def pick(self, avoided: Collection[str], full: Collection[str], tokens: int) -> str | None:
        """Take the replica with the fewest tokens under way and book `tokens` on it; None: wait for one.

        Args:
            avoided: not these: they failed this request, or answer with other weights.
            full: not these now: they hold enough of this request.
        """
        with self._lock:
            wanted = {a: r for a, r in self._by_address.items() if a not in avoided}
            # With every wanted replica down the request itself finds out whether one is back.
            alive = {a: r for a, r in wanted.items() if not r.down} or wanted
            free = [a for a in alive if a not in full]
            if not free:
                return None
            self._picks += 1
            # Among equals the one that was given least, so that lone calls spread over all. Turns alone would not do:
            # of a caller that asks one small thing and one large thing by turns, one of two would get all large ones.
            chosen = min(free, key=lambda a: (alive[a].outstanding_tokens, alive[a].given_tokens, alive[a].last_pick))
            alive[chosen].last_pick = self._picks
            alive[chosen].outstanding_tokens += tokens
            alive[chosen].given_tokens += tokens
            return chosen

    def pick_idle(self, avoided: Collection[str], tokens: int) -> str | None:
        """Take a replica that is up and holds nothing, and book `tokens` on it; None where there is none."""
        with self._lock:
            for address, replica in self._by_address.items():
                if address not in avoided and not replica.down and replica.outstanding_tokens == 0:
                    replica.outstanding_tokens += tokens
                    replica.given_tokens += tokens
                    return address
        return None

    def has_other(self, avoided: Collection[str]) -> bool:
        """Whether a replica that is up is left."""
        with self._lock:
            return any(a not in avoided and not r.down for a, r in self._by_address.items())

    def release(self, address: str, tokens: int) -> None:
        """An attempt ended, however it did."""
        with self._lock:
            if (replica := self._by_address.get(address) or self._leaving.get(address)) is not None:
                replica.outstanding_tokens -= tokens
                self._left = self._left or (address in self._leaving and replica.outstanding_tokens <= 0)

    def mark_up(self, address: str, *, by_health: bool = False) -> None:
        """A replica answered; `by_health`: said that it serves, as one may whose model hangs."""
        with self._lock:
            if (replica := self._by_address.get(address)) is not None:
                if replica.down:
                    replica.given_tokens = max(replica.given_tokens, self._least_given())
                replica.down = replica.probing = False
                replica.failures = 0
                replica.late = replica.late if by_health else 0

    def mark_down(self, address: str, now: float) -> None:
        """A replica does not answer, or drains: ask its health again later, and later each time."""
        with self._lock:
            if (replica := self._by_address.get(address)) is not None:
                replica.down, replica.probing = True, False
                replica.probe_at = now + min(_LAST_PROBE_S, _FIRST_PROBE_S * 2.0 ** min(replica.failures, 10))
                replica.failures += 1
            self._resolve_at = min(self._resolve_at, now)
        if self.on_down is not None:
            self.on_down(address)

    def mark_late(self, address: str, now: float, waited_s: float) -> None:
        """A replica did not answer within a call's deadline: leave it alone for as long, and longer each time.

        Else one that hangs, and so has less to do than all others, would be waited for by every other call.
        """
        with self._lock:
            replica = self._by_address.get(address)
            # Calls that waited side by side say the same once.
            if replica is not None and not (replica.down and now < replica.probe_at):
                replica.down, replica.probing = True, False
                replica.probe_at = now + waited_s * 2.0 ** min(replica.late, _MOST_DOUBLINGS)
                replica.late += 1

    def due_probes(self, now: float) -> list[str]:
        """Replicas that are down and whose health is to be asked now; each is told once until it is marked."""
        with self._lock:
            due = [a for a, r in self._by_address.items() if r.down and not r.probing and r.probe_at <= now]
            if len(self._by_address) == 1:
                return []
            for address in due:
                self._by_address[address].probing = True
            return due

    def due_lookup(self, now: float) -> bool:
        """Whether a name is to be looked up again; true once in each interval."""
        with self._lock:
            if self._by_address and now < self._resolve_at:
                return False
            self._resolve_at = now + RESOLVE_INTERVAL_S
            return True

    def replace(self, addresses: Sequence[str]) -> None:
        """A name was looked up: these are the replicas now. What is known of those that stay is kept."""
        with self._lock:
            known = {**self._leaving, **self._by_address}
            least = self._least_given()
            self._by_address = {a: known.get(a) or _Replica(given_tokens=least) for a in addresses}
            # A pod that drains leaves the name at once, but still finishes what it holds.
            self._leaving = {a: r for a, r in known.items() if a not in self._by_address and r.outstanding_tokens > 0}
            self._left = self._left or any(address not in self._by_address for address in known)

    def due_pruning(self) -> bool:
        """Whether a replica may have left for good, whose channel is to be closed; true once after each change."""
        with self._lock:
            due, self._left = self._left, False
            return due

    def _least_given(self) -> int:
        """What a newcomer counts as having been given, so that it does not get all that comes until it caught up."""
        return min((one.given_tokens for one in self._by_address.values() if not one.down), default=0)

    def in_use(self) -> set[str]:
        """Replicas whose channels are needed: all, and those that left and still hold work."""
        with self._lock:
            return {*self._by_address, *(a for a, r in self._leaving.items() if r.outstanding_tokens > 0)}

    def outstanding(self) -> dict[str, int]:
        """Tokens under way at each replica."""
        with self._lock:
            return {address: replica.outstanding_tokens for address, replica in self._by_address.items()}
