"""Streams of requests that their peer ends early."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import grpc
import grpc.aio

from ppod.uploads import reply_to_stream

CALLS = 300


async def refuse(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    """Ends the call after its first message."""
    await anext(requests)
    await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not this one", (("reason", "mine"),))


async def many() -> AsyncIterator[bytes]:
    """Still on their way when the call ends: in one of ten a write fails when the status has come."""
    for _ in range(200):
        yield bytes(1_000_000)


async def refusals() -> Counter[tuple[grpc.StatusCode, str | None, bool]]:
    server = grpc.aio.server()
    handlers = {"Send": grpc.stream_unary_rpc_method_handler(refuse)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Uploads", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    found: Counter[tuple[grpc.StatusCode, str | None, bool]] = Counter()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for _ in range(CALLS):
            try:
                await reply_to_stream(channel.stream_unary("/test.Uploads/Send", None, None)(many()))
            except grpc.aio.AioRpcError as error:
                found[error.code(), error.details(), ("reason", "mine") in tuple(error.trailing_metadata())] += 1
    await server.stop(None)
    return found


def test_the_status_of_the_peer_is_kept() -> None:
    assert asyncio.run(refusals()) == {(grpc.StatusCode.FAILED_PRECONDITION, "not this one", True): CALLS}
