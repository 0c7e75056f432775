"""What every client shares: one channel, deadlines, typed errors, readiness."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ppod.channel import insecure_channel
from ppod.errors import DeadlineExceeded, FailedPrecondition, Unavailable, from_rpc_error
from ppod.v1 import common_pb2

RpcObserver = Callable[[str, float, str], None]
"""Called after each RPC with its full method name, its seconds and its status code's name."""

DEFAULT_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class ModelState:
    """Which model, weights and tokenizer produced a reply."""

    model: str
    weight_version: int
    tokenizer_fingerprint: str


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a served model takes. Lengths are in tokens."""

    vocab_size: int
    max_sequence_tokens: int
    max_request_sequences: int
    dtype: str
    device: str


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """Identity and limits of a served model; `eos_token_ids` is empty where it has no meaning."""

    state: ModelState
    limits: ModelLimits
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Timing:
    """Where the server's time for one request went."""

    queue_s: float
    compute_s: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Pin:
    """What a client insists on in every request; None and empty mean anything."""

    model: str = ""
    weight_version: int | None = None
    tokenizer_fingerprint: str = ""

    def to_proto(self) -> common_pb2.ModelSelector:
        """As the message that travels."""
        return common_pb2.ModelSelector(
            model=self.model, weight_version=self.weight_version, tokenizer_fingerprint=self.tokenizer_fingerprint
        )


class ServiceClient:
    """A channel to one service. Thread-safe; close it, or use it as a context manager.

    Args:
        target: `host:port` or any gRPC target.
        timeout_s: deadline of each call in seconds, where a call gives none itself.
        pin: what every request insists on.
        observer: called after each RPC, for metrics.
    """

    service_name = ""

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        pin: Pin | None = None,
        observer: RpcObserver | None = None,
    ) -> None:
        self.target = target
        self.timeout_s = timeout_s
        self.pin = pin or Pin()
        self._observer = observer
        self._channel = insecure_channel(target)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel; calls under way end with Cancelled."""
        self._channel.close()

    def wait_ready(self, timeout_s: float, service: str | None = None) -> None:
        """Wait until the health service reports SERVING for this service.

        Raises:
            DeadlineExceeded: it did not within `timeout_s` seconds; the message carries the last state.
        """
        name = self.service_name if service is None else service
        stub = health_pb2_grpc.HealthStub(self._channel)
        deadline = time.monotonic() + timeout_s
        last = "no answer"
        while (left := deadline - time.monotonic()) > 0:
            try:
                reply = stub.Check(  # pyright: ignore
                    health_pb2.HealthCheckRequest(service=name), timeout=min(left, 2.0)
                )
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
                last = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
            except grpc.RpcError as error:
                last = str(from_rpc_error(error))
            time.sleep(min(0.1, max(0.0, deadline - time.monotonic())))
        raise DeadlineExceeded(f"{name} at {self.target} was not ready within {timeout_s:g} s; last state: {last}")

    def _check_state(self, message: common_pb2.ModelState) -> ModelState:
        """Turn a reply's identity into a ModelState, and hold it against the pin."""
        state = ModelState(message.model, message.weight_version, message.tokenizer_fingerprint)
        pin = self.pin
        for what, found, wanted in (
            ("model", state.model, pin.model or state.model),
            ("tokenizer", state.tokenizer_fingerprint, pin.tokenizer_fingerprint or state.tokenizer_fingerprint),
        ):
            if found != wanted:
                raise FailedPrecondition(what, found, wanted)
        return state

    @contextmanager
    def _rpc(self, method: str) -> Generator[None]:
        """Time one RPC, report it to the observer and turn its RpcError into a typed one."""
        start = time.monotonic()
        code = "OK"
        try:
            yield
        except grpc.RpcError as error:
            typed = from_rpc_error(error)
            code = typed.code.name
            if isinstance(typed, Unavailable):
                typed = Unavailable(f"{self.service_name} at {self.target}: {typed.detail}")
            raise typed from error
        finally:
            if self._observer is not None:
                self._observer(f"/{self.service_name}/{method}", time.monotonic() - start, code)


def new_request_id() -> str:
    """A request id that no other request has."""
    return uuid.uuid4().hex


def read_timing(message: common_pb2.Timing) -> Timing:
    """The timing of a reply."""
    return Timing(message.queue_s, message.compute_s, message.tokens)


def read_limits(message: common_pb2.ModelLimits) -> ModelLimits:
    """The limits of a described model."""
    return ModelLimits(
        message.vocab_size,
        message.max_sequence_tokens,
        message.max_request_sequences,
        message.dtype,
        message.device,
    )
