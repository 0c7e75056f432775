"""What happens around every call: who calls, refusal while draining or full, typed errors, metrics, logs.

The only place where any exception becomes a status: below it errors propagate.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import NoReturn, Self, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from ppod.errors import (
    STATUS_DETAILS_KEY,
    Internal,
    InvalidArgument,
    PpodError,
    ResourceExhausted,
    Unauthenticated,
    to_status,
)
from ppod_services.core.admission import Refusal
from ppod_services.core.callers import Team, current_request_id, current_team
from ppod_services.core.gate import CallGate
from ppod_services.core.logs import LogValue, log_event
from ppod_services.core.metrics import ServiceMetrics
from ppod_services.core.tenancy import Metadata

__all__ = ["CallInterceptor"]

_LOGGER = logging.getLogger(__name__)
_GUARDED = ("/ppod.v1.", "/grpc.channelz.v1.")
_REFUSALS_LOGGED_PER_S = 10
_LONGEST_REQUEST_ID = 256

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")

Context = grpc.aio.ServicerContext[Message, Message]
Incoming = bytes | AsyncIterator[Message]
"""A request as it arrives: the bytes of a message, which nobody has parsed yet, or a stream of messages."""

Identify = Callable[[Metadata], Team]
Parse = Callable[[bytes], Message]
UnaryBehaviour = Callable[[Message | AsyncIterator[Message], Context], Awaitable[Message]]
StreamBehaviour = Callable[[Message, Context], AsyncIterator[Message]]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the calls of ppod's own services and of channelz; health and reflection pass untouched.

    A call is refused before its message is parsed: under a flood that is most of what a refusal would cost.

    Args:
        gate: bounds the calls under way.
        metrics: counts them.
        identify: finds the team by the call's metadata, or raises Unauthenticated or PermissionDenied.
    """

    def __init__(self, gate: CallGate, metrics: ServiceMetrics, identify: Identify) -> None:
        self._gate = gate
        self._metrics = metrics
        self._identify = identify
        self._refusals = _LogBudget(_REFUSALS_LOGGED_PER_S)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[RequestT, ReplyT] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[RequestT, ReplyT] | None:
        """Give gRPC the handler with our wrapping around it."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_GUARDED):
            return handler
        metadata = cast(Metadata, handler_call_details.invocation_metadata)
        reply_codec = handler.response_serializer
        if handler.response_streaming:
            stream = self._around_stream(method, metadata, handler)
            return grpc.unary_stream_rpc_method_handler(stream, None, reply_codec)  # pyright: ignore
        if handler.request_streaming:
            unary = self._around_unary(method, metadata, handler)
            return grpc.stream_unary_rpc_method_handler(  # pyright: ignore
                unary, handler.request_deserializer, reply_codec
            )
        unary = self._around_unary(method, metadata, handler)
        return grpc.unary_unary_rpc_method_handler(unary, None, reply_codec)  # pyright: ignore

    def _around_unary(
        self, method: str, metadata: Metadata, handler: grpc.RpcMethodHandler[RequestT, ReplyT]
    ) -> Callable[[Incoming, Context], Awaitable[Message]]:
        behaviour = cast(UnaryBehaviour, handler.stream_unary if handler.request_streaming else handler.unary_unary)
        parse = cast(Parse, handler.request_deserializer)

        async def call(incoming: Incoming, context: Context) -> Message:
            async with _Call(method, context, self._gate, self._metrics, self._refusals) as call:
                call.begin(self._identify(metadata))
                request = call.parsed(incoming, parse) if isinstance(incoming, bytes) else incoming
                return await behaviour(request, context)

        return call

    def _around_stream(
        self, method: str, metadata: Metadata, handler: grpc.RpcMethodHandler[RequestT, ReplyT]
    ) -> Callable[[bytes, Context], AsyncIterator[Message]]:
        behaviour = cast(StreamBehaviour, handler.unary_stream)
        parse = cast(Parse, handler.request_deserializer)

        async def call(incoming: bytes, context: Context) -> AsyncIterator[Message]:
            async with _Call(method, context, self._gate, self._metrics, self._refusals) as call:
                call.begin(self._identify(metadata))
                async for reply in behaviour(call.parsed(incoming, parse), context):
                    yield reply

        return call


class _LogBudget:
    """Bounds the lines about refused calls: a flood of calls must not become a flood of logs."""

    def __init__(self, lines_per_s: int) -> None:
        self._lines_per_s = lines_per_s
        self._second = 0
        self._lines = 0
        self._suppressed = 0

    def take(self, now_s: float) -> int | None:
        """None: no line now. Else the number of lines left out since the last one."""
        if int(now_s) != self._second:
            self._second = int(now_s)
            self._lines = 0
        if self._lines >= self._lines_per_s:
            self._suppressed += 1
            return None
        self._lines += 1
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed


class _Call:
    """One call: enters the gate, turns whatever is raised within into a status, counts and logs."""

    def __init__(
        self, method: str, context: Context, gate: CallGate, metrics: ServiceMetrics, refusals: _LogBudget
    ) -> None:
        self._method = method
        self._context = context
        self._gate = gate
        self._metrics = metrics
        self._refusals = refusals
        # Now: of a call whose connection broke it would be asked with a null pointer, which ends the process.
        self._peer = context.peer()
        self._start_s = time.monotonic()
        self._entered = False
        self._team = ""
        self._request_id = ""
        self._code = grpc.StatusCode.OK
        self._detail = ""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, asyncio.CancelledError | GeneratorExit):
                self._note_cancelled()
            elif isinstance(error, Exception):
                await self._abort(error)
        finally:
            self._finish()

    def begin(self, team: Team) -> None:
        """The caller is known: enter the gate, and let the task know the team."""
        self._team = team.name
        try:
            self._gate.enter()
        except ResourceExhausted:
            self._metrics.refused(self._team, Refusal.CALLS)
            raise
        self._entered = True
        current_team.set(team)

    def parsed(self, incoming: bytes, parse: Parse) -> Message:
        """The message; raise InvalidArgument for bytes that are none, or for a request id that nobody could keep."""
        try:
            request = parse(incoming)
        except DecodeError as error:
            expected = "a message of the method's request type"
            raise InvalidArgument("request", f"{len(incoming)} bytes that cannot be decoded", expected) from error
        request_id = str(getattr(request, "request_id", ""))
        if len(request_id) > _LONGEST_REQUEST_ID:
            # It is logged, and kept for those who are told to come again.
            raise InvalidArgument("request_id", f"{len(request_id)} characters", f"at most {_LONGEST_REQUEST_ID}")
        self._request_id = request_id
        current_request_id.set(request_id)
        return request

    def _note_cancelled(self) -> None:
        """The caller went away, or its deadline passed."""
        left = cast("float | None", self._context.time_remaining())
        expired = left is not None and left <= 0
        self._code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED

    async def _abort(self, error: Exception) -> NoReturn:
        """End the call with the error's status; log with a traceback what nobody raised on purpose."""
        typed = error if isinstance(error, PpodError) else Internal("the server failed; its log has the cause")
        self._code = typed.code
        self._detail = typed.message
        if typed is not error or typed.code is grpc.StatusCode.INTERNAL:
            log_event(_LOGGER, "call_broke", self._fields(), level=logging.ERROR, error=error)
        status = to_status(typed)
        await self._context.abort(
            typed.code, status.message, trailing_metadata=((STATUS_DETAILS_KEY, status.SerializeToString()),)
        )
        raise AssertionError("abort returned")

    def _finish(self) -> None:
        seconds = time.monotonic() - self._start_s
        if self._entered:
            self._gate.leave(seconds)
        self._metrics.rpc(self._method, self._team, self._code.name, seconds)
        level = logging.DEBUG if self._code is grpc.StatusCode.OK else logging.INFO
        if not _LOGGER.isEnabledFor(level):
            return
        suppressed: dict[str, LogValue] = {}
        if self._code in (ResourceExhausted.code, Unauthenticated.code):
            count = self._refusals.take(time.monotonic())
            if count is None:
                return
            suppressed["suppressed"] = count
        log_event(_LOGGER, "call", {**self._fields(), "seconds": round(seconds, 6), **suppressed}, level=level)

    def _fields(self) -> dict[str, LogValue]:
        self._request_id = self._request_id or uuid.uuid4().hex
        return {
            "method": self._method,
            "team": self._team,
            "code": self._code.name,
            "request_id": self._request_id,
            "detail": self._detail,
            # Who calls without a token that is known has no team: this is all that leads to them.
            "peer": self._peer,
        }
