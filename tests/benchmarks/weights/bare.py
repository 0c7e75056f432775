"""A byte stream over gRPC with nothing around it: what a push of the same chunks is held against.

usage: python -m benchmarks.weights.bare PORT   (the server; it drops what it receives)

Identity serialisers, asyncio on both sides, our channel options, and uvloop in the server as in ours.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import contextmanager

import grpc
import grpc.aio
import uvloop

from ppod.channel import ChannelSpec, open_aio_channel, open_channel, server_options
from support.processes import environment, free_ports

_METHOD = "/bare.Stream/Send"


async def _serve(port: int) -> None:
    async def send(messages: AsyncIterator[bytes], context: object) -> bytes:
        del context
        received = 0
        async for message in messages:
            received += len(message)
        return str(received).encode()

    server = grpc.aio.server(options=server_options())
    handler = grpc.stream_unary_rpc_method_handler(send, None, None)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare.Stream", {"Send": handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


@contextmanager
def bare_server() -> Generator[str]:
    """Run the server in a process of its own; yields its target."""
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "benchmarks.weights.bare", str(port)]
    process = subprocess.Popen(command, env=environment())
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            grpc.channel_ready_future(channel).result(30)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(10)


class BareClient:
    """Streams chunks by grpc.aio; its loop and channel live on."""

    def __init__(self, target: str) -> None:
        self._runner = asyncio.Runner()
        self._target = target
        self._channel = self._runner.run(self._open())

    async def _open(self) -> grpc.aio.Channel:
        return open_aio_channel(ChannelSpec(self._target), None)

    def close(self) -> None:
        self._runner.run(self._channel.close())
        self._runner.close()

    def send(self, chunks: Sequence[bytes]) -> float:
        """Seconds until the server has all of them."""

        async def stream() -> None:
            async def messages() -> AsyncIterator[bytes]:
                for chunk in chunks:
                    yield chunk

            reply = await self._channel.stream_unary(_METHOD, None, None)(messages())
            assert int(reply) == sum(map(len, chunks))

        start = time.perf_counter()
        self._runner.run(stream())
        return time.perf_counter() - start


class BlockingBareClient:
    """The same by gRPC's blocking client, which the trainer's is."""

    def __init__(self, target: str) -> None:
        self._channel = open_channel(ChannelSpec(target), None)

    def close(self) -> None:
        self._channel.close()

    def send(self, chunks: Sequence[bytes]) -> float:
        """Seconds until the server has all of them."""
        start = time.perf_counter()
        reply = self._channel.stream_unary(_METHOD, None, None)(iter(chunks))
        assert int(reply) == sum(map(len, chunks))
        return time.perf_counter() - start


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
