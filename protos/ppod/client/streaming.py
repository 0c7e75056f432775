"""A server stream on its way through retries, without any I/O: the counterpart of `exchange` for generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from ppod.client.exchange import Shared
from ppod.errors import DeadlineExceeded, FailedPrecondition, PpodError, ResourceExhausted, Unavailable

ItemT = TypeVar("ItemT")
ItemT_co = TypeVar("ItemT_co", covariant=True)


class StreamJob(Protocol[ItemT_co]):
    """A request with a stream of replies."""

    @property
    def method(self) -> str:
        """Full name of the RPC."""
        ...

    @property
    def tokens(self) -> int:
        """What the request weighs."""
        ...

    @property
    def resumable(self) -> bool:
        """Whether what is missing may be asked for again."""
        ...

    @property
    def complete(self) -> bool:
        """Whether nothing is missing any more."""
        ...

    def encode(self) -> bytes:
        """The request for what is missing."""
        ...

    def accept(self, data: bytes) -> ItemT_co:
        """Check a reply; raise InvalidReply or FailedPrecondition."""
        ...

    def locate(self, error: PpodError) -> None:
        """Let an error that names a sample of what was asked for last name it by its position in the whole request."""
        ...

    def finish(self) -> None:
        """The stream ended; raise InvalidReply when something is missing."""
        ...


@dataclass(frozen=True, slots=True)
class Opening:
    """A stream to open."""

    address: str
    payload: bytes
    timeout_s: float


class StreamDelivery(Generic[ItemT]):
    """Opens one stream after the other until one ends well. A driver alternates `open` with `closed` or `failed`."""

    def __init__(self, job: StreamJob[ItemT], shared: Shared, deadline: float) -> None:
        self.job = job
        self._shared = shared
        self._deadline = deadline
        self._failures = 0
        self._tried: set[str] = set()
        self._address: str | None = None
        self._opened_at = 0.0
        self._answered = False

    @property
    def deadline(self) -> float:
        """When all must have ended, on time.monotonic()."""
        return self._deadline

    def open(self, now: float) -> Opening:
        """The stream to open now; raise DeadlineExceeded or Unavailable."""
        if now >= self._deadline:
            raise DeadlineExceeded("the deadline passed before the request could be sent")
        self._address = self._shared.replicas.pick(self._tried, (), self.job.tokens)
        if self._address is None:
            raise Unavailable("no replica is left that could answer this request")
        self._opened_at, self._answered = now, False
        return Opening(self._address, self.job.encode(), self._deadline - now)

    def accept(self, data: bytes) -> ItemT:
        """See `StreamJob`."""
        if self._address is not None and not self._answered:
            self._answered = True
            self._shared.replicas.mark_up(self._address)
        return self.job.accept(data)

    def closed(self) -> None:
        """The stream ended, or nobody reads on; may be called twice."""
        if self._address is not None:
            self._shared.replicas.release(self._address, self.job.tokens)
            self._address = None

    def failed(self, error: PpodError, now: float) -> float | None:
        """The stream broke: seconds to wait before the next `open`; raises the error where there is to be none.

        None: all had arrived, and only the stream's end is lost.
        """
        address = self._address or ""
        self.closed()
        self.job.locate(error)
        refused = isinstance(error, ResourceExhausted) and error.retry_after_s > 0
        # Another replica may have the weights that are asked for: this one was started again, or is late.
        other_weights = isinstance(error, FailedPrecondition) and error.what == "weight_version"
        if isinstance(error, Unavailable):
            self._shared.replicas.mark_down(address, now)
        if isinstance(error, DeadlineExceeded) and not self._answered:
            self._shared.replicas.mark_late(address, now, now - self._opened_at)
        if self.job.complete:
            return None
        if not isinstance(error, Unavailable) and not refused and not other_weights:
            raise error
        self._tried.add(address)
        if not self.job.resumable:
            raise error
        if self._shared.replicas.has_other(self._tried):
            return 0.0
        if other_weights:
            raise error
        self._tried.clear()
        self._failures += 1
        retry = self._shared.delivery.retry
        wait_s = retry.backoff_s(self._failures, self._shared.rng)
        if isinstance(error, ResourceExhausted):
            wait_s += error.retry_after_s
        if self._failures >= retry.max_attempts or now + wait_s >= self._deadline:
            raise error
        return wait_s
