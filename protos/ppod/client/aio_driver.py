"""Runs a client's programs on an asyncio event loop; the counterpart of `sync_driver`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from typing import TypeVar

import grpc
import grpc.aio

from ppod.channel import ChannelSpec, open_aio_channel
from ppod.client.core import HEALTH_CHECK, ClientCore, Follow, Lookup, Pause, Program, Step
from ppod.client.exchange import Action, Exchange, Send
from ppod.client.lookups import resolve
from ppod.client.streaming import StreamDelivery
from ppod.client.tracing import Metadata
from ppod.errors import Cancelled, PpodError
from ppod.uploads import reply_to_stream

ResultT = TypeVar("ResultT")
ItemT = TypeVar("ItemT")


class AioDriver:
    """Channels to all replicas, and the loop that performs steps. Belongs to the event loop of its first call."""

    def __init__(self, core: ClientCore) -> None:
        self._core = core
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._probes: set[asyncio.Task[None]] = set()
        self._closed = False

    async def close(self) -> None:
        """Close all channels; calls under way end with Cancelled."""
        self._closed = True
        await asyncio.to_thread(self._core.close)
        for probe in self._probes:
            probe.cancel()
        channels = list(self._channels.values())
        self._channels.clear()
        await asyncio.gather(*self._probes, *(channel.close() for channel in channels), return_exceptions=True)

    async def run(self, program: Program[ResultT]) -> ResultT:
        """Run a program to its end."""
        try:
            step = next(program)
            while True:
                try:
                    await self._perform(step)
                except PpodError as error:
                    step = program.throw(error)
                else:
                    step = next(program)
        except StopIteration as end:
            return end.value
        finally:
            program.close()

    async def stream(self, delivery: StreamDelivery[ItemT]) -> AsyncGenerator[ItemT]:
        """Yield the checked replies of a stream, through as many streams as it takes."""
        await self.run(self._core.lookup(delivery.deadline))
        method = delivery.job.method
        while True:
            opening = delivery.open(time.monotonic())
            start, code = time.monotonic(), "OK"
            channel = self._channel(opening.address)
            stub = channel.unary_stream(method, None, None)
            call = stub(opening.payload, timeout=opening.timeout_s, metadata=self._core.metadata())
            try:
                async for data in call:
                    yield delivery.accept(data)
                delivery.job.finish()
                return
            except grpc.RpcError as error:
                typed = self._core.failed(error, opening.address, self._leave)
                code = typed.code.name
                wait_s = delivery.failed(typed, time.monotonic())
                if wait_s is None:
                    return
            finally:
                delivery.closed()
                call.cancel()
                self._core.observe(method, time.monotonic() - start, code)
            await asyncio.sleep(wait_s)

    async def upload(self, method: str, messages: Iterator[bytes], timeout_s: float | None) -> bytes:
        """Send a stream of requests to the only replica, and return the reply."""
        [address] = self._core.shared.replicas.addresses
        # Before it, as nobody repeats it.
        self._core.renew(address, self._leave)
        timeout_s = self._core.timeout_s(timeout_s)
        start, code = time.monotonic(), "OK"
        try:
            channel = self._channel(address)
            stub = channel.stream_unary(method, None, None)
            call = stub(_threaded(messages), timeout=timeout_s, metadata=self._core.metadata())
            return await reply_to_stream(call)
        except grpc.RpcError as error:
            typed = self._core.failed(error, address, self._leave)
            code = typed.code.name
            raise typed from error
        finally:
            self._core.observe(method, time.monotonic() - start, code)

    async def attempt(self, send: Send, metadata: Metadata) -> bytes | PpodError:
        """One RPC; its error is a result, so that several attempts can be waited for together."""
        start, code = time.monotonic(), "CANCELLED"
        try:
            channel = self._channel(send.address)
            stub = channel.unary_unary(send.method, None, None)
            data = await stub(send.payload, timeout=send.timeout_s, metadata=metadata)
            code = "OK"
            return data
        except grpc.RpcError as error:
            typed = self._core.failed(error, send.address, self._leave)
            code = typed.code.name
            return typed
        except grpc.aio.UsageError:  # what gRPC raises for a channel that another task has closed
            return Cancelled("the client is closed")
        except asyncio.CancelledError:
            # gRPC raises it, too, for a call whose channel was closed: then nobody has cancelled this task.
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                return Cancelled("the client is closed")
            raise
        finally:
            if code != "CANCELLED":
                self._core.observe(send.method, time.monotonic() - start, code)

    def _leave(self, address: str) -> None:
        """Have the next call open a new channel."""
        # Not closed: each call that is under way in it holds it.
        self._channels.pop(address, None)

    def _channel(self, address: str) -> grpc.aio.Channel:
        if self._closed:
            raise Cancelled("the client is closed")
        channel = self._channels.get(address)
        if channel is None:
            core = self._core
            channel = open_aio_channel(ChannelSpec(address, core.server_name), core.credentials.for_channel(address))
            self._channels[address] = channel
        return channel

    async def _perform(self, step: Step) -> None:
        match step:
            case Exchange():
                for address in self._core.shared.replicas.due_probes(time.monotonic()):
                    probe = asyncio.create_task(self._probe(address))
                    self._probes.add(probe)
                    probe.add_done_callback(self._probes.discard)
                await self._deliver(step)
            case Pause():
                await asyncio.sleep(step.seconds)
            case Lookup():
                await self._prune()
                step.addresses = await asyncio.to_thread(resolve, step.host, step.port)

            case Follow():
                await self._prune()
                if not len(self._core.shared.replicas):
                    await asyncio.to_thread(step.source.wait_for_one, step.timeout_s)

    async def _prune(self) -> None:
        """Close the channels of replicas that are gone."""
        used = self._core.shared.replicas.in_use()
        gone = [self._channels.pop(address) for address in list(self._channels) if address not in used]
        for channel in gone:
            await channel.close()

    async def _probe(self, address: str) -> None:
        payload, timeout_s = self._core.probe_payload()
        reply = await self.attempt(Send(0, address, HEALTH_CHECK, payload, timeout_s), ())
        self._core.probed(address, reply)

    async def _deliver(self, exchange: Exchange) -> None:
        metadata = self._core.metadata()
        tasks: dict[asyncio.Task[bytes | PpodError], Send] = {}
        try:
            actions = exchange.start(time.monotonic())
            while not exchange.done:
                if len(actions) == 1 and isinstance(actions[0], Send) and not tasks and exchange.wake_at is None:
                    reply = await self.attempt(actions[0], metadata)
                    actions = _tell(exchange, actions[0].attempt, reply)
                    continue
                self._begin(actions, tasks, metadata)
                actions = await _next(exchange, tasks)
        finally:
            exchange.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if exchange.error is not None:
            raise exchange.error

    def _begin(
        self, actions: list[Action], tasks: dict[asyncio.Task[bytes | PpodError], Send], metadata: Metadata
    ) -> None:
        for action in actions:
            if isinstance(action, Send):
                tasks[asyncio.create_task(self.attempt(action, metadata))] = action
            else:
                for task, send in tasks.items():
                    if send.attempt == action.attempt:
                        task.cancel()


async def _next(exchange: Exchange, tasks: dict[asyncio.Task[bytes | PpodError], Send]) -> list[Action]:
    """Wait for the next event and return what follows from it."""
    wait_s = None if exchange.wake_at is None else max(0.0, exchange.wake_at - time.monotonic())
    if not tasks:
        await asyncio.sleep(wait_s or 0.0)
        return exchange.woke(time.monotonic())
    ended, _ = await asyncio.wait(tasks, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
    actions: list[Action] = []
    for task in ended:
        send = tasks.pop(task)
        if not task.cancelled():
            actions += _tell(exchange, send.attempt, task.result())
    return actions if ended else exchange.woke(time.monotonic())


def _tell(exchange: Exchange, attempt: int, reply: bytes | PpodError) -> list[Action]:
    now = time.monotonic()
    if isinstance(reply, PpodError):
        return exchange.failed(attempt, reply, now)
    return exchange.arrived(attempt, reply, now)


async def _threaded(messages: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Make each message in a thread, while the one before it is sent: copies would hold up the event loop."""
    coming = asyncio.ensure_future(asyncio.to_thread(next, messages, None))
    while (message := await coming) is not None:
        coming = asyncio.ensure_future(asyncio.to_thread(next, messages, None))
        yield message
