"""Generation's replicas where Kubernetes lists them: they come and go while the run goes on.

A new pod serves the weights that it was started with, and no sample may come from those. So the run's client of
generation is told of a pod only when it serves the current version: until then it is given that in the background.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from ppod import Cancelled, DeadlineExceeded, FailedPrecondition, PpodError, Unavailable, WeightClient
from ppod.client import (
    Endpoint,
    KubernetesTarget,
    Replicas,
    WeightStatus,
    close_service_watch,
    open_service_watch,
)
from ppod_trainer.errors import WeightPushError
from ppod_trainer.push_turns import PushTurns
from ppod_trainer.weight_replicas import ServedWeights

log = logging.getLogger(__name__)

OpenClient = Callable[[str, str], WeightClient]
"""Makes a client of an administration port, whose certificate carries this name."""

_POLL_S = 2.0
"""A container that was started again may be ready before anybody noticed that it was away: versions are asked for."""
_STATUS_TIMEOUT_S = 5.0
_FIRST_RETRY_S = 0.5
_LAST_RETRY_S = 10.0
_THREADS = 16


@dataclass(slots=True, eq=False)
class _Member:
    """A pod; `ours`: it was given weights by this run; `admitted`: it serves the run's version."""

    endpoint: Endpoint
    address: str
    client: WeightClient
    ready: bool = True
    ours: bool = False
    admitted: bool = False
    busy: bool = False
    failures: int = 0
    retry_at: float = 0.0


def _tell_failure(looked_after: Future[None]) -> None:
    """Nobody else reads what the pool's jobs end with; the replica is looked at again."""
    if not looked_after.cancelled() and (error := looked_after.exception()) is not None:
        log.error("a replica was not given its weights", exc_info=error)


class FollowedReplicas:
    """`WeightReplicas` of a Service, and the `ReplicaSource` of the run's client of generation.

    Args:
        target: the port on which the Service's pods generate.
        admin_port: where they take weights.
        open_client: makes clients of that; closed by `close`.

    Raises:
        InvalidArgument: the package `kubernetes` is not installed, or there is no cluster to ask.
    """

    change = True

    def __init__(self, target: KubernetesTarget, admin_port: int | str, open_client: OpenClient) -> None:
        self._watch = open_service_watch(target.service, target.namespace)
        self._ports = target.port, admin_port
        self._open = open_client
        self._turns = PushTurns()
        self._state = threading.Condition()
        self._members: dict[str, _Member] = {}
        self._left: list[_Member] = []
        self._served: ServedWeights | None = None
        self._taken: Mapping[str, WeightClient] = {}
        self._admits: Replicas | None = None
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="newcomers")
        self._thread = threading.Thread(target=self._run, name="newcomers", daemon=True)
        self._thread.start()
        self._watch.listen(self._told)

    # What the client of generation asks.

    @property
    def server_name(self) -> str:
        """See `ReplicaSource`."""
        return f"{self._watch.service}.{self._watch.namespace}.svc"

    def attach(self, replicas: Replicas) -> None:
        """See `ReplicaSource`; for one client."""
        with self._state:
            self._admits = replicas
            replicas.on_down = self._suspect
            self._publish()

    def detach(self, replicas: Replicas) -> None:
        """See `ReplicaSource`."""
        with self._state:
            if self._admits is replicas:
                self._admits = None

    def wait_for_one(self, timeout_s: float) -> None:
        """See `ReplicaSource`; raises Unavailable that tells why there is none."""
        until = time.monotonic() + timeout_s
        self._watch.wait_for(lambda endpoints: any(one.ready for one in endpoints), timeout_s)
        with self._state:
            if self._state.wait_for(
                lambda: any(self._may_work(one) for one in self._members.values()), max(until - time.monotonic(), 0.0)
            ):
                return
            ready = sum(one.ready for one in self._members.values())
        found = f"{ready} ready pods of Service {self._watch.service}"
        raise Unavailable(f"none of {found} serves the run's weights yet, or has ports {self._ports}")

    # What pushes ask.

    @contextmanager
    def taking(self) -> Generator[Mapping[str, WeightClient]]:
        """See `WeightReplicas`: those that work; where there are none, as before the first push, all that are ready.

        Raises:
            WeightPushError: there is none.
        """
        with self._turns.push():
            with self._state:
                ready = {target: one for target, one in self._members.items() if one.ready}
            working = {target: one for target, one in ready.items() if one.admitted}
            found = {target: one.client for target, one in (working or ready).items()}
            if not found:
                error = Unavailable(f"Service {self._watch.service} has no ready pod")
                raise WeightPushError(f"there is no replica to push to: {error}") from error
            self._taken = found
            yield found

    def listed(self) -> Collection[str]:
        """See `WeightReplicas`."""
        with self._state:
            return list(self._members)

    def excuses(self, target: str, error: PpodError) -> bool:
        """See `WeightReplicas`: one that left, or is away; it gets no work before it has its weights."""
        del target
        return isinstance(error, Unavailable | DeadlineExceeded | Cancelled | FailedPrecondition)

    def serve(self, served: ServedWeights, lost: Collection[str]) -> None:
        """See `WeightReplicas`."""
        with self._state:
            self._served = served
            for target, one in self._members.items():
                # By its client: a pod that came meanwhile may have the address of one that left.
                took = target not in lost and self._taken.get(target) is one.client
                one.ours = one.ours or took
                one.admitted = one.ready and took
            self._publish()
            lacking = any(one.ready and not one.admitted for one in self._members.values())
        if lacking:
            self._wake.set()

    def close(self) -> None:
        """See `WeightReplicas`."""
        self._closing.set()
        self._wake.set()
        self._watch.unlisten(self._told)
        close_service_watch(self._watch)
        with self._state:
            members = [*self._members.values(), *self._left]
        for one in members:
            one.client.close()
        self._thread.join(_STATUS_TIMEOUT_S)
        self._pool.shutdown(wait=False, cancel_futures=True)

    # What is done about pods that come and go.

    def _told(self, endpoints: Sequence[Endpoint]) -> None:
        """On the watching thread: whoever is not ready gets nothing new from now on."""
        found: dict[str, tuple[Endpoint, str]] = {}
        for one in endpoints:
            address, admin = (one.address(port) for port in self._ports)
            if address is not None and admin is not None:
                found[admin] = one, address
        with self._state:
            for target, member in list(self._members.items()):
                if target not in found or found[target][0].pod != member.endpoint.pod:
                    member.ready = member.admitted = False
                    self._left.append(self._members.pop(target))
            for target, (endpoint, address) in found.items():
                member = self._members.get(target)
                if member is None:
                    if endpoint.ready:
                        self._members[target] = _Member(endpoint, address, self._open(target, self.server_name))
                    continue
                if endpoint.ready and not member.ready:
                    member.failures, member.retry_at = 0, 0.0
                member.ready = endpoint.ready
                member.admitted = member.admitted and endpoint.ready
            self._publish()
        self._wake.set()

    def _suspect(self, address: str) -> None:
        """The client of generation found it away: it may come back with other weights before Kubernetes tells."""
        with self._state:
            if self._served is None:
                return
            for member in self._members.values():
                if member.address == address and member.admitted:
                    member.admitted = False
                    self._publish()
        self._wake.set()

    def _may_work(self, member: _Member) -> bool:
        # Before the first push nothing is sampled; the services are only asked what they are.
        return member.ready and (member.admitted or self._served is None)

    def _publish(self) -> None:
        if self._admits is not None:
            self._admits.replace([one.address for one in self._members.values() if self._may_work(one)])
        self._state.notify_all()

    def _run(self) -> None:
        while not self._closing.is_set():
            with self._state:
                left, self._left = self._left, []
                now, due = time.monotonic(), list[_Member]()
                for one in self._members.values() if self._served is not None else ():
                    if one.ready and not one.busy and one.retry_at <= now:
                        one.busy = True
                        due.append(one)
                waits = [one.retry_at - now for one in self._members.values() if one.ready and one.retry_at > now]
            for one in left:
                one.client.close()
            for one in due:
                self._pool.submit(self._look_after, one).add_done_callback(_tell_failure)
            self._wake.wait(min([_POLL_S, *waits]))
            self._wake.clear()

    def _look_after(self, member: _Member) -> None:
        """Each by itself: one that does not answer keeps no other from its weights."""
        try:
            if not self._fits(member):
                # A push waits meanwhile, and so finds it with the version that it replaces.
                with self._turns.newcomer():
                    self._bring_up(member)
        finally:
            member.busy = False

    def _fits(self, member: _Member) -> bool:
        """Whether nothing is to be done about it; one that is too busy to tell is left as it is."""
        try:
            status = member.client.status(timeout_s=_STATUS_TIMEOUT_S)
        except DeadlineExceeded:
            return member.admitted
        except PpodError as error:
            self._failed(member, error)
            return True
        served = self._served
        return member.admitted and served is not None and status.state.weight_version == served.weight_version

    def _bring_up(self, member: _Member) -> None:
        """Give it what the run serves, and then work. No push is under way."""
        started, served = time.monotonic(), self._served
        assert served is not None
        try:
            status = member.client.status(timeout_s=_STATUS_TIMEOUT_S)
            found = status.state.weight_version
            if found != served.weight_version:
                self._withdraw(member)
                _give(member, status, served)
                member.ours = True
            elif not member.ours:
                # The same number, but not the same weights: the run's next version will be above it.
                raise FailedPrecondition("weight_version", f"{found} of another run", f"{found} of this run")
        except PpodError as error:
            self._failed(member, error)
            return
        if not member.admitted:
            seconds = time.monotonic() - started
            log.info(
                "%s came with version %d: serves %d after %.2f s", member.address, found, served.weight_version, seconds
            )
            self._admit(member)

    def _admit(self, member: _Member) -> None:
        with self._state:
            member.admitted = member.ready
            member.failures, member.retry_at = 0, 0.0
            self._publish()

    def _withdraw(self, member: _Member) -> None:
        """No work for now. How often it failed stays: it may be about to fail again."""
        with self._state:
            member.admitted = False
            self._publish()

    def _failed(self, member: _Member, error: PpodError) -> None:
        with self._state:
            if member.failures == 0 and member.ready and not self._closing.is_set():
                log.warning("%s gets no work until it serves the run's weights: %s", member.address, error)
            member.admitted = False
            wait_s = min(_LAST_RETRY_S, _FIRST_RETRY_S * 2.0 ** min(member.failures, 10))
            member.failures, member.retry_at = member.failures + 1, time.monotonic() + wait_s
            self._publish()


def _give(member: _Member, status: WeightStatus, served: ServedWeights) -> None:
    """Put weights into service on one replica; raises the PpodError that kept it from that."""
    client = member.client
    # A base of the same number may be another run's.
    if served.adapter is None or not member.ours or status.base_version != served.base.weight_version:
        client.push(served.base)
        client.commit(served.base.weight_version, push_id=served.base.push_id)
    if served.adapter is not None:
        client.push(served.adapter)
        client.commit(served.adapter.weight_version, push_id=served.adapter.push_id)
