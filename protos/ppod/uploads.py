"""Calls that send a stream of requests, on an asyncio event loop."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc.aio

from ppod.errors import FAILED_WRITE

ResultT = TypeVar("ResultT")


async def reply_to_stream(call: grpc.aio.StreamUnaryCall[bytes, bytes]) -> bytes:
    """Wait for the reply to a call that was just begun; whoever ended the call tells why.

    Raises:
        AioRpcError: the call failed.
    """
    ends: list[grpc.aio.AioRpcError] = []
    # A failed write replaces the status of the peer, which made it fail, if that has come by then. So it is read at
    # once; where the write is first, gRPC has the peer's in its place by the time that the call is through.
    call.add_done_callback(lambda _: ends.append(_end(call)))
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        if ends and error.details() == FAILED_WRITE:
            raise ends[0] from error
        raise


def _end(call: grpc.aio.StreamUnaryCall[bytes, bytes]) -> grpc.aio.AioRpcError:
    """The status of a call that is done."""
    trailing = _known(call.trailing_metadata())
    return grpc.aio.AioRpcError(_known(call.code()), grpc.aio.Metadata(), trailing, _known(call.details()))


def _known(asked: Coroutine[Any, Any, ResultT]) -> ResultT:
    """The result of what need not wait for anything."""
    try:
        asked.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("the call is not done")
