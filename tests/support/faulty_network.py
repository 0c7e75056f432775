"""A TCP proxy that does to connections what networks do: it cuts them anywhere, loses bytes, or takes none at all."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Coroutine, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

Way = Literal["up", "down"]
"""Towards the server, or back."""

_CLOSE_BY_RESET = struct.pack("ii", 1, 0)
_READ_BYTES = 65_536
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Faults:
    """What is wrong now; of connections that there are, and of those that come.

    Attributes:
        lost: bytes that go this way vanish, and the connection stays.
        cut_after: the connection that carries this many bytes this way, from now on, is reset behind them.
    """

    lost: Way | None = None
    cut_after: tuple[Way, int] | None = None


class FaultyProxy:
    """Listens on a port of its own, and passes on to a port of this machine. Its work is done in a thread."""

    def __init__(self, port: int) -> None:
        self.faults = Faults()
        self.cuts = 0
        self._behind = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty network")
        self._thread.start()
        self._pairs: dict[asyncio.Task[None], tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = {}
        self._server: asyncio.Server | None = None
        self.port = 0
        self.mend()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def mend(self) -> None:
        """No faults any more. Connections that lost bytes are of no use, and are cut."""
        if self.faults.lost is not None:
            self.cut()
        self.faults = Faults()
        self._run(self._listen())

    def refuse(self) -> None:
        """Cut all connections, and take no new ones until it is mended."""
        self._run(self._stop_listening())
        self.cut()

    def cut(self) -> None:
        """Reset all connections."""
        self._run(self._reset_all())

    def close(self) -> None:
        self.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(10)

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._take, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _reset_all(self) -> None:
        tasks = list(self._pairs)
        for task in tasks:
            self._reset(task)
        # They end by what they find.
        await asyncio.gather(*tasks, return_exceptions=True)

    def _reset(self, task: asyncio.Task[None]) -> None:
        self.cuts += 1
        for writer in self._pairs.pop(task):
            end: socket.socket = writer.get_extra_info("socket")
            if end.fileno() >= 0:  # else it is closed already
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _CLOSE_BY_RESET)
            writer.transport.abort()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        there, back = await asyncio.open_connection("127.0.0.1", self._behind)
        self._pairs[task] = writer, back
        up = asyncio.create_task(self._pass("up", (reader, back), task))
        try:
            await self._pass("down", (there, writer), task)
            await up
        finally:
            self._pairs.pop(task, None)
            for one in (writer, back):
                one.transport.abort()

    async def _pass(self, way: Way, stream: Stream, task: asyncio.Task[None]) -> None:
        """Until either end goes: then the other one is let go, too."""
        reader, writer = stream
        try:
            while data := await reader.read(_READ_BYTES):
                if self.faults.lost == way:
                    continue
                passed = self._passed(way, len(data))
                writer.write(data[:passed])
                await writer.drain()
                if passed < len(data) or self.faults.cut_after == (way, 0):
                    self.faults.cut_after = None
                    if task in self._pairs:
                        self._reset(task)
                    return
        except OSError:
            pass
        finally:
            writer.close()

    def _passed(self, way: Way, count: int) -> int:
        """How many of so many bytes go through before a cut."""
        if self.faults.cut_after is None or self.faults.cut_after[0] != way:
            return count
        left = self.faults.cut_after[1]
        self.faults.cut_after = way, max(left - count, 0)
        return min(left, count)


@contextmanager
def faulty_proxies(port: int, count: int) -> Generator[list[FaultyProxy]]:
    """As many ways to one server, each with faults of its own."""
    proxies = [FaultyProxy(port) for _ in range(count)]
    try:
        yield proxies
    finally:
        for proxy in proxies:
            proxy.close()
