"""Links of a fixed speed: proxies before servers, in a process of their own."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection

_BLOCK_BYTES = 64 * 1024
_BURST_S = 0.01


class Uplink:
    """Lets so many bytes a second through, whoever sends them."""

    def __init__(self, bytes_per_s: float) -> None:
        self._rate = bytes_per_s
        self._free_at = 0.0

    async def take(self, count: int) -> None:
        """Wait until these bytes have left."""
        now = time.monotonic()
        self._free_at = max(self._free_at, now) + count / self._rate
        if self._free_at - now > _BURST_S:
            await asyncio.sleep(self._free_at - now - _BURST_S / 2)


@contextmanager
def slow_links(ports: Sequence[int], bytes_per_s: float, *, one_uplink: bool) -> Iterator[list[str]]:
    """Targets that lead to these ports of this host at that speed.

    With `one_uplink` all of them share it, as the receivers of one sender do; else each has its own, as those that are
    sent to by one another do.
    """
    mine, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(list(ports), bytes_per_s, one_uplink, theirs), daemon=True
    )
    process.start()
    try:
        yield [f"127.0.0.1:{port}" for port in mine.recv()]
    finally:
        process.terminate()
        process.join()


def _serve(ports: list[int], bytes_per_s: float, one_uplink: bool, told: Connection) -> None:
    asyncio.run(_proxies(ports, bytes_per_s, one_uplink, told))


async def _proxies(ports: list[int], bytes_per_s: float, one_uplink: bool, told: Connection) -> None:
    shared = Uplink(bytes_per_s)
    servers: list[asyncio.Server] = []
    for port in ports:
        uplink = shared if one_uplink else Uplink(bytes_per_s)

        async def connect(
            reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int = port, uplink: Uplink = uplink
        ) -> None:
            back, forth = await asyncio.open_connection("127.0.0.1", port, limit=4 * _BLOCK_BYTES)
            await asyncio.gather(_pump(reader, forth, uplink), _pump(back, writer, None))

        servers.append(await asyncio.start_server(connect, "127.0.0.1", 0, limit=4 * _BLOCK_BYTES))
    told.send([server.sockets[0].getsockname()[1] for server in servers])
    await asyncio.gather(*(server.serve_forever() for server in servers))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, uplink: Uplink | None) -> None:
    try:
        while block := await reader.read(_BLOCK_BYTES):
            if uplink is not None:
                await uplink.take(len(block))
            writer.write(block)
            await writer.drain()
    except ConnectionError:
        pass
    writer.close()
