"""The one table between exceptions and gRPC statuses.

A server raises a `PpodError`; its interceptor sends `to_status`. A client receives an `RpcError` and raises what
`from_rpc_error` makes of it, which is the same class with the same fields. Other languages read the standard
google.rpc details: BadRequest, RetryInfo, PreconditionFailure and ErrorInfo.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

ERROR_DOMAIN = "ppod.v1"
STATUS_DETAILS_KEY = "grpc-status-details-bin"
FAILED_WRITE = "Internal error from Core"
"""What grpc.aio says of a call that ended while a message was being written, in place of the server's own status."""

_MAX_VALUE_BYTES = 320
_MAX_MESSAGE_BYTES = 640
"""A status travels as HTTP/2 headers, three times over and encoded, and gRPC drops the call beyond 8 KiB of them."""


class PpodError(Exception):
    """Root of every error that ppod raises on purpose."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    @property
    def message(self) -> str:
        """What happened, in one line."""
        return str(self)


@dataclass(eq=False)
class InvalidArgument(PpodError):
    """The caller sent something that no retry can mend.

    Attributes:
        field: dotted path of the field in the request.
        found: the offending value, as text.
        expected: what the field must hold.
        sample: position of the offending sequence in the request; None where the fault is not one sequence's.
    """

    field: str
    found: str
    expected: str
    sample: int | None = None
    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INVALID_ARGUMENT

    def __str__(self) -> str:
        where = self.field if self.sample is None else f"{self.field}, sample {self.sample}"
        return f"{where}: found {self.found}, expected {self.expected}"


@dataclass(eq=False)
class NotFound(PpodError):
    """Something was asked for by a name that nothing here has."""

    what: str
    found: str
    expected: str
    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.NOT_FOUND

    def __str__(self) -> str:
        return f"no {self.what} {self.found!r}: {self.expected}"


@dataclass(eq=False)
class FailedPrecondition(PpodError):
    """The server is not in the state that the request insists on: another version, tokenizer or phase."""

    what: str
    found: str
    expected: str
    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.FAILED_PRECONDITION

    def __str__(self) -> str:
        return f"{self.what}: the server has {self.found}, the request needs {self.expected}"


@dataclass(eq=False)
class ResourceExhausted(PpodError):
    """A queue or a quota is full; the same request may be sent again after `retry_after_s` seconds.

    Zero: no wait would help, as with a message that is too large for gRPC.
    """

    what: str
    retry_after_s: float
    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __str__(self) -> str:
        return f"{self.what}; try again in {self.retry_after_s:.3f} s" if self.retry_after_s else self.what


@dataclass(eq=False)
class NonFiniteOutput(PpodError):
    """A model or a reward function gave NaN or infinity for a sample. It is withheld: it would poison training."""

    output: str
    sample: int
    found: str
    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __str__(self) -> str:
        return (
            f"sample {self.sample}: {self.output} is {self.found}, expected a finite number; "
            "look at the model's weights and input, or at the function that computed it"
        )


@dataclass(eq=False)
class RewardFailed(PpodError):
    """A reward that is no model of the server gave no score: a function raised, a judge's verdict cannot be read.

    Attributes:
        reward: name of the reward.
        found: what happened instead.
        expected: what it should have given, and what to do.
        sample: position of the sequence in the request; None where it is not one sequence's.
    """

    reward: str
    found: str
    expected: str
    sample: int | None = None
    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __str__(self) -> str:
        where = f"reward {self.reward!r}" if self.sample is None else f"reward {self.reward!r}, sample {self.sample}"
        return f"{where}: found {self.found}, expected {self.expected}"


@dataclass(eq=False)
class FilterFailed(PpodError):
    """An output filter gave no verdict on a completion, so the completion is not sent.

    Attributes:
        filter: its name.
        found: what happened instead.
        expected: what it should have given.
        sample: position of the prompt in the request.
    """

    filter: str
    found: str
    expected: str
    sample: int
    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __str__(self) -> str:
        return f"output filter {self.filter!r}, sample {self.sample}: found {self.found}, expected {self.expected}"


@dataclass(eq=False)
class InvalidReply(PpodError):
    """A reply breaks the contract: wrong shape, a value that is not finite, a missing sample."""

    field: str
    found: str
    expected: str
    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL

    def __str__(self) -> str:
        return f"reply field {self.field}: found {self.found}, expected {self.expected}"


@dataclass(eq=False)
class _PlainError(PpodError):
    """An error that its status code and one line describe."""

    detail: str

    def __str__(self) -> str:
        return self.detail


class Unavailable(_PlainError):
    """The server is starting, draining or gone."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNAVAILABLE


class Unauthenticated(_PlainError):
    """The call brought no token, or one that nobody has."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(_PlainError):
    """The caller is known, and this is not theirs to do."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.PERMISSION_DENIED


class DeadlineExceeded(_PlainError):
    """The time that the caller gave ran out; the server drops the work."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(_PlainError):
    """The caller went away; the server drops the work."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.CANCELLED


class Internal(_PlainError):
    """A bug of ours, or a status that nothing else here stands for."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL


_PLAIN = {kind.__name__: kind for kind in (Unavailable, Unauthenticated, PermissionDenied, DeadlineExceeded, Cancelled)}


def to_status(error: PpodError) -> status_pb2.Status:
    """Describe an error as a google.rpc.Status whose details carry every field of the exception, cut where too long."""
    info = error_details_pb2.ErrorInfo(reason=type(error).__name__, domain=ERROR_DOMAIN)
    for name, value in vars(error).items():
        if value is not None:
            info.metadata[name] = _clipped(str(value), _MAX_VALUE_BYTES)
    message = _clipped(error.message, _MAX_MESSAGE_BYTES)
    details: list[any_pb2.Any] = [_pack(info)]
    if isinstance(error, InvalidArgument):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_clipped(error.field, _MAX_VALUE_BYTES), description=message
        )
        details.append(_pack(error_details_pb2.BadRequest(field_violations=[violation])))
    elif isinstance(error, FailedPrecondition):
        failure = error_details_pb2.PreconditionFailure.Violation(
            type=type(error).__name__, subject=_clipped(error.what, _MAX_VALUE_BYTES), description=message
        )
        details.append(_pack(error_details_pb2.PreconditionFailure(violations=[failure])))
    elif isinstance(error, ResourceExhausted):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=error.code.value[0], message=message, details=details)


def _clipped(text: str, max_bytes: int) -> str:
    data = text.encode(errors="replace")
    if len(data) <= max_bytes:
        return text
    return f"{data[: max_bytes - 3].decode(errors='ignore')}…"


def from_rpc_error(error: grpc.RpcError) -> PpodError:
    """Rebuild the exception that a server raised, or the nearest one when another layer made the status."""
    if not isinstance(error, grpc.Call | grpc.aio.AioRpcError):
        return Internal(str(error))
    status = _read_status(error.trailing_metadata() or ())  # pyright: ignore
    rebuilt = None if status is None else _rebuild(status)
    if rebuilt is not None:
        return rebuilt
    code = error.code()
    detail = error.details() or code.name
    if code == grpc.StatusCode.CANCELLED and detail == code.name:
        # Whoever cancels a call leaves other words. A server that stops says no more than that, of calls that it has
        # taken from the wire and not begun, or cut short.
        return Unavailable("the server stopped before it answered")
    if code == grpc.StatusCode.INTERNAL and detail.startswith(FAILED_WRITE):
        return Unavailable("the server ended the call while it was being sent to")
    return _nearest(code, detail, status)


def from_status(code: int, message: str, data: bytes) -> PpodError | None:
    """Rebuild an exception that a message carries: a google.rpc.Code, a text, and a google.rpc.Status or nothing.

    Returns:
        The exception; None for code zero, which is no error.
    """
    if not code:
        return None
    status = _read_status([(STATUS_DETAILS_KEY, data)]) if data else None
    rebuilt = None if status is None else _rebuild(status)
    if rebuilt is not None:
        return rebuilt
    known = {one.value[0]: one for one in grpc.StatusCode}
    return _nearest(known.get(code, grpc.StatusCode.UNKNOWN), message, status)


def _nearest(code: grpc.StatusCode, detail: str, status: status_pb2.Status | None) -> PpodError:
    """The exception that a status alone allows."""
    for plain in (Unavailable, Unauthenticated, PermissionDenied, DeadlineExceeded, Cancelled):
        if plain.code == code:
            return plain(detail)
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        # gRPC itself answers so when a message is too large; no wait mends that, so the wait is zero.
        return ResourceExhausted(detail, 0.0 if status is None else _retry_delay_s(status))
    if code == grpc.StatusCode.INVALID_ARGUMENT:
        return InvalidArgument("request", detail, "a request that the server accepts")
    return Internal(f"{code.name}: {detail}")


def _read_status(metadata: Iterable[tuple[str, str | bytes]]) -> status_pb2.Status | None:
    for key, value in metadata:
        if key == STATUS_DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _retry_delay_s(status: status_pb2.Status) -> float:
    """The wait that a proxy or a server of another make asks for; zero where it asks for none."""
    for detail in status.details:
        info = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            return max(0.0, info.retry_delay.ToNanoseconds() / 1e9)
    return 0.0


def _pack(message: error_details_pb2.ErrorInfo | object) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)  # pyright: ignore[reportArgumentType]
    return packed


def _rebuild(status: status_pb2.Status) -> PpodError | None:
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if not detail.Unpack(info) or info.domain != ERROR_DOMAIN:
            continue
        try:
            return _rebuild_from(info, status.message)
        except (KeyError, ValueError):
            # A newer server may name its fields otherwise; the status alone must do.
            return None
    return None


def _rebuild_from(info: error_details_pb2.ErrorInfo, message: str) -> PpodError:
    values = dict(info.metadata)
    match info.reason:
        case "InvalidArgument":
            sample = int(values["sample"]) if "sample" in values else None
            return InvalidArgument(values["field"], values["found"], values["expected"], sample)
        case "NotFound":
            return NotFound(values["what"], values["found"], values["expected"])
        case "FailedPrecondition":
            return FailedPrecondition(values["what"], values["found"], values["expected"])
        case "ResourceExhausted":
            return ResourceExhausted(values["what"], float(values["retry_after_s"]))
        case "NonFiniteOutput":
            return NonFiniteOutput(values["output"], int(values["sample"]), values["found"])
        case "RewardFailed":
            sample = int(values["sample"]) if "sample" in values else None
            return RewardFailed(values["reward"], values["found"], values["expected"], sample)
        case "FilterFailed":
            return FilterFailed(values["filter"], values["found"], values["expected"], int(values["sample"]))
        case reason if reason in _PLAIN:
            return _PLAIN[reason](values["detail"])
        case _:
            return Internal(message)
