"""What a client is apart from how it waits: settings, replicas, and its calls as programs that a driver runs.

A program is a generator: it yields steps (an exchange, a pause, a name to look up), a driver performs each one,
blocking or awaiting, and throws the step's PpodError back in. So no call is written twice.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health_pb2

from ppod.channel import call_timeout_s
from ppod.client.credentials import RenewedCredentials
from ppod.client.delivery import NO_RETRY, Delivery
from ppod.client.exchange import Exchange, Shared
from ppod.client.identity import ModelDescription, ModelState, Pin
from ppod.client.jobs import Answerer, Job
from ppod.client.latencies import HedgeBudget, Latencies
from ppod.client.replica_sources import KubernetesReplicas, ReplicaSource
from ppod.client.replicas import Replicas, parse_target
from ppod.client.replies import typed_error
from ppod.client.security import ClientSecurity
from ppod.client.splitting import RowSizes, split_rows
from ppod.client.tracing import Metadata, trace_metadata
from ppod.errors import DeadlineExceeded, InvalidArgument, InvalidReply, PpodError, Unavailable

RpcObserver = Callable[[str, float, str], None]
"""Called after each attempt with its full method name, its seconds and its status code's name."""

DEFAULT_TIMEOUT_S = 120.0
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
_PROBE_TIMEOUT_S = 1.0
_NO_REPLICA_S = 5.0
"""A call waits this long for a replica of a Service that has none: between two pods there may be a gap."""
_ONE_ROW = RowSizes((1,), (0,))

ResultT = TypeVar("ResultT")
MessageT = TypeVar("MessageT", bound=Message)


@dataclass(slots=True)
class Pause:
    """Wait so many seconds."""

    seconds: float


@dataclass(slots=True)
class Lookup:
    """Look a name up; the driver fills in `addresses`, and leaves them empty when the name has none."""

    host: str
    port: int
    addresses: tuple[str, ...] = ()


@dataclass(slots=True)
class Follow:
    """Close the channels of replicas that left, and wait until there is a replica."""

    source: ReplicaSource
    timeout_s: float


Step = Exchange | Pause | Lookup | Follow
Program = Generator[Step, None, ResultT]


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What every client takes; see `ServiceClient`."""

    timeout_s: float = DEFAULT_TIMEOUT_S
    pin: Pin = field(default_factory=Pin)
    observer: RpcObserver | None = None
    security: ClientSecurity = field(default_factory=ClientSecurity)
    delivery: Delivery = field(default_factory=Delivery)
    rng: random.Random | None = None
    replicas: ReplicaSource | None = None


class SplittableJob(Job, Protocol):
    """A job whose rows may be cut anew after a refusal."""

    @property
    def input_field(self) -> str:
        """Field of the request that holds the rows, as an error about their number names it."""
        ...

    def forget(self) -> None:
        """Drop the replies kept so far."""
        ...


class SingleJob:
    """A request that is not about sequences; `reply` is there once it was delivered."""

    sizes = _ONE_ROW
    repeatable = True

    def __init__(self, method: str, request: Message) -> None:
        self.method = method
        self._payload = request.SerializeToString()
        self.reply = b""

    def encode(self, rows: range, part: int | None) -> bytes:
        """The request."""
        del rows, part
        return self._payload

    def accept(self, rows: range, data: bytes) -> Answerer:
        """Keep the reply."""
        del rows
        self.reply = data
        return Answerer(ModelState("", 0, ""), (0,))


class ClientCore:
    """State and programs of one client, for whichever driver runs them."""

    def __init__(self, service_name: str, target: str, settings: ClientSettings) -> None:
        self.service_name = service_name
        self.target = target
        self.settings = settings
        self.pin = settings.pin
        self.credentials = RenewedCredentials(settings.security)
        self.endpoints = parse_target(target)
        kubernetes = self.endpoints.kubernetes
        name = self.endpoints.host or ("" if kubernetes is None else kubernetes.service)
        for address in self.endpoints.addresses or (name,):
            settings.security.check_target(address)
        hedge = settings.delivery.hedge
        self.shared = Shared(
            Replicas(self.endpoints.addresses),
            settings.delivery,
            Latencies(),
            None if hedge is None else HedgeBudget(hedge.max_extra_fraction),
            settings.rng or random.Random(),
        )
        self._max_sequences: int | None = None
        self._max_tokens: int | None = None
        self._source = settings.replicas
        if self._source is None and kubernetes is not None:
            self._source = KubernetesReplicas(kubernetes)
        if self._source is not None:
            self._source.attach(self.shared.replicas)

    def close(self) -> None:
        """Follow no replicas any more."""
        if self._source is not None:
            self._source.detach(self.shared.replicas)

    @property
    def server_name(self) -> str:
        """Name that servers' certificates must carry, where it is not the host of their address."""
        followed = "" if self._source is None else self._source.server_name
        return self.settings.security.server_name or followed or self.endpoints.host or ""

    def deadline(self, timeout_s: float | None) -> float:
        """When a call that starts now must have ended, on time.monotonic(); see `timeout_s`."""
        return time.monotonic() + self.timeout_s(timeout_s)

    def timeout_s(self, timeout_s: float | None) -> float:
        """Seconds that a call may take: as it asks for itself, or the client's; infinite ones as many as gRPC takes.

        Raises:
            InvalidArgument: they are no number.
        """
        return call_timeout_s(self.settings.timeout_s if timeout_s is None else timeout_s)

    def metadata(self) -> Metadata:
        """What a call carries: the team's token and the active trace."""
        return self.settings.security.metadata() + trace_metadata()

    def learn(self, description: ModelDescription) -> ModelDescription:
        """Remember the limits that requests are cut to."""
        self._max_sequences = description.limits.max_request_sequences or None
        return description

    def lookup(self, deadline: float) -> Program[None]:
        """Find the replicas of a name, where it is time to.

        Raises:
            Unavailable: the Service has no ready pod. By way of the exchange that follows, where the name has never had
            an address. PermissionDenied, Unauthenticated, InvalidArgument: the Service's pods cannot be listed.
        """
        if self._source is not None:
            if self.shared.replicas.due_pruning() or not len(self.shared.replicas):
                left = max(0.0, deadline - time.monotonic())
                yield Follow(self._source, min(left, _NO_REPLICA_S))
            return
        host, port = self.endpoints.host, self.endpoints.port
        if host is None or port is None or not self.shared.replicas.due_lookup(time.monotonic()):
            return
        step = Lookup(host, port)
        yield step
        if step.addresses:
            self.shared.replicas.replace(step.addresses)

    def ask(self, job: Job, timeout_s: float | None) -> Program[None]:
        """Deliver a job in one part."""
        deadline = self.deadline(timeout_s)
        yield from self.lookup(deadline)
        yield Exchange(job, [range(len(job.sizes.tokens))], self.shared, deadline)

    def deliver(
        self, job: SplittableJob, describe: Callable[[float], Program[ModelDescription]], timeout_s: float | None
    ) -> Program[None]:
        """Deliver a job in as many parts as it takes; `describe` is given the seconds that are left.

        The server's limits are found out only once a request was refused for them: a caller that stays within them pays
        for no further RPC.
        """
        deadline = self.deadline(timeout_s)
        yield from self.lookup(deadline)
        parts = self._split(job)
        while True:
            try:
                yield Exchange(job, parts, self.shared, deadline)
                return
            except InvalidArgument as error:
                divisible = [part for part in parts if len(part) > 1]
                if error.sample is not None or not divisible:
                    raise
                refusal = error
            if refusal.field == job.input_field:
                yield from describe(max(0.0, deadline - time.monotonic()))
            elif _is_too_much(refusal):
                self._max_tokens = max(map(job.sizes.total_tokens, divisible)) // 2
            smaller = self._split(job)
            if len(smaller) == len(parts):
                raise refusal
            job.forget()
            parts = smaller

    def wait_ready(self, timeout_s: float, service: str | None) -> Program[None]:
        """Wait until a replica reports SERVING.

        Raises:
            DeadlineExceeded: none did within `timeout_s` seconds; the message carries the last state.
            InvalidArgument: the certificates cannot be used, which no wait mends.
        """
        self.credentials.check()
        name = self.service_name if service is None else service
        job = SingleJob(HEALTH_CHECK, health_pb2.HealthCheckRequest(service=name))
        unhurried = Shared(self.shared.replicas, Delivery(retry=NO_RETRY), self.shared.latencies, None, self.shared.rng)
        deadline = time.monotonic() + timeout_s
        last = "no answer"
        while (left := deadline - time.monotonic()) > 0:
            try:
                yield from self.lookup(time.monotonic() + min(left, 2.0))
                yield Exchange(job, [range(1)], unhurried, time.monotonic() + min(left, 2.0))
                status = parse(health_pb2.HealthCheckResponse, job.reply).status
                if status == health_pb2.HealthCheckResponse.SERVING:
                    return
                last = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
            except PpodError as error:
                last = str(error)
            yield Pause(min(0.1, max(0.0, deadline - time.monotonic())))
        raise DeadlineExceeded(f"{name} at {self.target} was not ready within {timeout_s:g} s; last state: {last}")

    def probe_payload(self) -> tuple[bytes, float]:
        """The health request for a replica that is down, and its deadline in seconds."""
        return health_pb2.HealthCheckRequest(service=self.service_name).SerializeToString(), _PROBE_TIMEOUT_S

    def probed(self, address: str, reply: bytes | PpodError) -> None:
        """A probe ended."""
        if isinstance(reply, bytes):
            try:
                status = parse(health_pb2.HealthCheckResponse, reply).status
            except InvalidReply:
                status = health_pb2.HealthCheckResponse.UNKNOWN
            if status == health_pb2.HealthCheckResponse.SERVING:
                self.shared.replicas.mark_up(address, by_health=True)
                return
        self.shared.replicas.mark_down(address, time.monotonic())

    def failed(self, error: grpc.RpcError, address: str, leave: Callable[[str], None]) -> PpodError:
        """The typed error of a call. A replica out of reach gets a new channel where certificates were renewed."""
        typed = typed_error(error, self.service_name, address)
        if isinstance(typed, Unavailable):
            self.renew(address, leave)
        return typed

    def renew(self, address: str, leave: Callable[[str], None]) -> None:
        """Leave a replica's channel for a new one, where certificates were renewed since it was opened."""
        if self.credentials.renewed(address):
            leave(address)

    def observe(self, method: str, seconds: float, code: str) -> None:
        """Tell the observer of an attempt."""
        if self.settings.observer is not None:
            self.settings.observer(method, seconds, code)

    def _split(self, job: Job) -> list[range]:
        replicas = len(self.shared.replicas)
        return split_rows(job.sizes, replicas, self._max_sequences, self.settings.delivery.split, self._max_tokens)


def _is_too_much(refusal: InvalidArgument) -> bool:
    """Whether less of it at a time may be taken: of tokens, or of positions to score at, than a queue or a quota has.

    How many those are no description tells, and some depend on who asks.
    """
    return refusal.field in ("request", "process") and refusal.expected.startswith("at most")


def parse(kind: type[MessageT], data: bytes) -> MessageT:
    """Decode a reply; raise InvalidReply where it is no such message."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidReply("message", f"{len(data)} bytes that do not decode", kind.DESCRIPTOR.full_name) from error
