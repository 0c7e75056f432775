"""What happens around every call: refusal while draining, typed errors, metrics, logs.

The only place with `except Exception`: below it errors propagate.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NoReturn, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import Message

from ppod.errors import STATUS_DETAILS_KEY, Internal, PpodError, Unavailable, to_status
from ppod_services.core.logs import LogValue, log_event
from ppod_services.core.metrics import ServiceMetrics

_LOGGER = logging.getLogger(__name__)
_OURS = "/ppod.v1."

RequestT = TypeVar("RequestT")
ReplyT = TypeVar("ReplyT")

Context = grpc.aio.ServicerContext[Message, Message]
UnaryBehaviour = Callable[[Message | AsyncIterator[Message], Context], Awaitable[Message]]
StreamBehaviour = Callable[[Message, Context], AsyncIterator[Message]]


class CallGate:
    """Counts calls under way, and refuses new ones once closed."""

    def __init__(self) -> None:
        self._calls = 0
        self._refusal: str | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def calls(self) -> int:
        """Calls under way."""
        return self._calls

    def close(self, refusal: str) -> None:
        """Refuse calls from now on, with this message."""
        self._refusal = refusal

    async def wait_idle(self) -> None:
        """Return when no call is under way."""
        await self._idle.wait()

    def enter(self) -> None:
        """Count a call; raise Unavailable when closed. Every enter that returns needs its `leave`."""
        if self._refusal is not None:
            raise Unavailable(self._refusal)
        self._calls += 1
        self._idle.clear()

    def leave(self) -> None:
        """The call ended."""
        self._calls -= 1
        if not self._calls:
            self._idle.set()


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the calls of ppod's own services; health and reflection pass untouched."""

    def __init__(self, gate: CallGate, metrics: ServiceMetrics) -> None:
        self._gate = gate
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[RequestT, ReplyT] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[RequestT, ReplyT] | None:
        """Give gRPC the handler with our wrapping around it."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_OURS):
            return handler
        codecs = (handler.request_deserializer, handler.response_serializer)
        if handler.response_streaming:
            stream = self._around_stream(method, cast(StreamBehaviour, handler.unary_stream))
            return grpc.unary_stream_rpc_method_handler(stream, *codecs)  # pyright: ignore
        if handler.request_streaming:
            wrapped = self._around_unary(method, cast(UnaryBehaviour, handler.stream_unary))
            return grpc.stream_unary_rpc_method_handler(wrapped, *codecs)  # pyright: ignore
        wrapped = self._around_unary(method, cast(UnaryBehaviour, handler.unary_unary))
        return grpc.unary_unary_rpc_method_handler(wrapped, *codecs)  # pyright: ignore

    def _around_unary(self, method: str, behaviour: UnaryBehaviour) -> UnaryBehaviour:
        async def call(request: Message | AsyncIterator[Message], context: Context) -> Message:
            record = _CallRecord(method, request, self._metrics)
            try:
                self._gate.enter()
                try:
                    return await behaviour(request, context)
                finally:
                    self._gate.leave()
            except asyncio.CancelledError:
                record.cancelled(context)
                raise
            except Exception as error:  # noqa: BLE001 - the one place where an exception becomes a status
                await record.abort(context, error)
            finally:
                record.finish()

        return call

    def _around_stream(self, method: str, behaviour: StreamBehaviour) -> StreamBehaviour:
        async def call(request: Message, context: Context) -> AsyncIterator[Message]:
            record = _CallRecord(method, request, self._metrics)
            try:
                self._gate.enter()
                try:
                    async for reply in behaviour(request, context):
                        yield reply
                finally:
                    self._gate.leave()
            except (asyncio.CancelledError, GeneratorExit):
                record.cancelled(context)
                raise
            except Exception as error:  # noqa: BLE001 - the one place where an exception becomes a status
                await record.abort(context, error)
            finally:
                record.finish()

        return call


class _CallRecord:
    """One call, for metrics and logs."""

    def __init__(self, method: str, request: object, metrics: ServiceMetrics) -> None:
        self._method = method
        self._metrics = metrics
        self._start = time.monotonic()
        self._code = grpc.StatusCode.OK
        self._request_id = str(getattr(request, "request_id", "")) or uuid.uuid4().hex
        self._detail = ""

    def cancelled(self, context: Context) -> None:
        """The caller went away, or its deadline passed."""
        left = cast("float | None", context.time_remaining())
        expired = left is not None and left <= 0
        self._code = grpc.StatusCode.DEADLINE_EXCEEDED if expired else grpc.StatusCode.CANCELLED

    async def abort(self, context: Context, error: Exception) -> NoReturn:
        """End the call with the error's status; log with a traceback what nobody raised on purpose."""
        typed = error if isinstance(error, PpodError) else Internal("the server failed; its log has the cause")
        self._code = typed.code
        self._detail = typed.message
        if typed is not error or error.__cause__ is not None:
            log_event(_LOGGER, "call_broke", self._fields(), level=logging.ERROR, error=error)
        status = to_status(typed)
        await context.abort(
            typed.code, status.message, trailing_metadata=((STATUS_DETAILS_KEY, status.SerializeToString()),)
        )
        raise AssertionError("abort returned")

    def finish(self) -> None:
        """Count and log the call."""
        seconds = time.monotonic() - self._start
        self._metrics.rpc(self._method, self._code.name, seconds)
        level = logging.DEBUG if self._code is grpc.StatusCode.OK else logging.INFO
        log_event(_LOGGER, "call", {**self._fields(), "seconds": round(seconds, 6)}, level=level)

    def _fields(self) -> dict[str, LogValue]:
        return {
            "method": self._method,
            "code": self._code.name,
            "request_id": self._request_id,
            "detail": self._detail,
        }
