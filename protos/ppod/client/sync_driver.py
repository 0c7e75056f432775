"""Runs a client's programs on the calling thread. A lone call is one blocking RPC, without any further thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Protocol, TypeAlias, TypeVar

import grpc

from ppod.channel import ChannelSpec, open_channel
from ppod.client.core import HEALTH_CHECK, ClientCore, Follow, Lookup, Pause, Program, Step
from ppod.client.exchange import Action, Exchange, Send
from ppod.client.lookups import resolve
from ppod.client.streaming import StreamDelivery
from ppod.client.tracing import Metadata
from ppod.errors import Cancelled, PpodError

UnaryMethod: TypeAlias = "grpc.UnaryUnaryMultiCallable[bytes, bytes]"
ResultT = TypeVar("ResultT")
ItemT = TypeVar("ItemT")


class _Future(Protocol):
    """What is used of the future of a call."""

    def result(self) -> bytes: ...
    def cancel(self) -> bool: ...


class SyncDriver:
    """Channels to all replicas, and the loop that performs steps. Thread-safe."""

    def __init__(self, core: ClientCore) -> None:
        self._core = core
        self._lock = threading.RLock()
        self._channels: dict[str, grpc.Channel] = {}
        self._methods: dict[tuple[str, str], UnaryMethod] = {}
        self._closed = False

    def close(self) -> None:
        """Close all channels; calls under way end with Cancelled."""
        self._core.close()
        with self._lock:
            self._closed = True
            channels = list(self._channels.values())
            self._channels.clear()
            self._methods.clear()
        for channel in channels:
            channel.close()

    def run(self, program: Program[ResultT]) -> ResultT:
        """Run a program to its end."""
        try:
            step = next(program)
            while True:
                try:
                    self._perform(step)
                except PpodError as error:
                    step = program.throw(error)
                else:
                    step = next(program)
        except StopIteration as end:
            return end.value
        finally:
            program.close()

    def stream(self, delivery: StreamDelivery[ItemT]) -> Generator[ItemT]:
        """Yield the checked replies of a stream, through as many streams as it takes."""
        self.run(self._core.lookup(delivery.deadline))
        method = delivery.job.method
        while True:
            opening = delivery.open(time.monotonic())
            start, code = time.monotonic(), "OK"
            call: Iterator[bytes] | None = None
            try:
                stub = self._channel(opening.address).unary_stream(method, None, None)
                with _open_channel():
                    call = stub(opening.payload, timeout=opening.timeout_s, metadata=self._core.metadata())
                for data in call:
                    yield delivery.accept(data)
                delivery.job.finish()
                return
            except grpc.RpcError as error:
                typed = self.typed_error(error, opening.address)
                code = typed.code.name
                wait_s = delivery.failed(typed, time.monotonic())
                if wait_s is None:
                    return
            finally:
                delivery.closed()
                if isinstance(call, grpc.RpcContext):
                    call.cancel()
                self._core.observe(method, time.monotonic() - start, code)
            time.sleep(wait_s)

    def upload(self, method: str, messages: Iterator[bytes], timeout_s: float | None) -> bytes:
        """Send a stream of requests to the only replica, and return the reply."""
        [address] = self._core.shared.replicas.addresses
        # Before it, as nobody repeats it.
        self._core.renew(address, self._leave)
        timeout_s = self._core.timeout_s(timeout_s)
        start, code = time.monotonic(), "OK"
        try:
            stub = self._channel(address).stream_unary(method, None, None)
            with _open_channel():
                return stub(_made_ahead(messages), timeout=timeout_s, metadata=self._core.metadata())
        except grpc.RpcError as error:
            typed = self.typed_error(error, address)
            code = typed.code.name
            raise typed from error
        finally:
            self._core.observe(method, time.monotonic() - start, code)

    def unary(self, address: str, method: str) -> UnaryMethod:
        """A method of a replica, bytes in and bytes out."""
        with self._lock:
            found = self._methods.get((address, method))
            if found is None:
                found = self._channel(address).unary_unary(method, None, None)
                self._methods[address, method] = found
            return found

    def typed_error(self, error: grpc.RpcError, address: str) -> PpodError:
        """The typed error of a call; see `ClientCore.failed`."""
        return self._core.failed(error, address, self._leave)

    def _leave(self, address: str) -> None:
        """Have the next call open a new channel."""
        with self._lock:
            # Not closed: other calls may be under way in it. It goes with the last of them.
            self._channels.pop(address, None)
            self._methods = {key: value for key, value in self._methods.items() if key[0] != address}

    def _channel(self, address: str) -> grpc.Channel:
        with self._lock:
            if self._closed:
                raise Cancelled("the client is closed")
            channel = self._channels.get(address)
            if channel is None:
                core = self._core
                channel = open_channel(ChannelSpec(address, core.server_name), core.credentials.for_channel(address))
                self._channels[address] = channel
            return channel

    def _perform(self, step: Step) -> None:
        match step:
            case Exchange():
                self._probe()
                _Delivery(step, self, self._core).run()
            case Pause():
                time.sleep(step.seconds)
            case Lookup():
                self._prune()
                step.addresses = resolve(step.host, step.port)
            case Follow():
                self._prune()
                if not len(self._core.shared.replicas):
                    step.source.wait_for_one(step.timeout_s)

    def _probe(self) -> None:
        for address in self._core.shared.replicas.due_probes(time.monotonic()):
            payload, timeout_s = self._core.probe_payload()
            with _open_channel():
                future = self.unary(address, HEALTH_CHECK).future(payload, timeout=timeout_s)

            def tell(done: _Future, address: str = address) -> None:
                try:
                    self._core.probed(address, done.result())
                except grpc.RpcError as error:
                    self._core.probed(address, self.typed_error(error, address))
                except grpc.FutureCancelledError:
                    self._core.probed(address, Cancelled("the client is closed"))

            future.add_done_callback(tell)

    def _prune(self) -> None:
        """Close the channels of replicas that are gone."""
        with self._lock:
            # Asked within the lock: a replica that came back meanwhile keeps the channel that a call has just taken.
            used = self._core.shared.replicas.in_use()
            gone = [address for address in self._channels if address not in used]
            channels = [self._channels.pop(address) for address in gone]
            self._methods = {key: value for key, value in self._methods.items() if key[0] not in gone}
        for channel in channels:
            channel.close()


class _Delivery:
    """One exchange on the calling thread."""

    def __init__(self, exchange: Exchange, driver: SyncDriver, core: ClientCore) -> None:
        self._exchange = exchange
        self._driver = driver
        self._core = core
        self._metadata: Metadata = core.metadata()
        self._futures: dict[int, tuple[Send, _Future, float]] = {}
        self._ended: SimpleQueue[int] = SimpleQueue()

    def run(self) -> None:
        exchange = self._exchange
        try:
            actions = exchange.start(time.monotonic())
            while not exchange.done:
                actions = self._perform(actions)
        finally:
            exchange.cancel()
            for _, future, _ in self._futures.values():
                future.cancel()
        if exchange.error is not None:
            raise exchange.error

    def _perform(self, actions: list[Action]) -> list[Action]:
        """Do what was decided, then wait for the next event and return what follows from it."""
        exchange = self._exchange
        if len(actions) == 1 and isinstance(actions[0], Send) and not self._futures and exchange.wake_at is None:
            return self._call(actions[0])
        for action in actions:
            if isinstance(action, Send):
                self._begin(action)
            elif action.attempt in self._futures:
                self._futures.pop(action.attempt)[1].cancel()
        wait_s = None if exchange.wake_at is None else max(0.0, exchange.wake_at - time.monotonic())
        try:
            attempt = self._ended.get(timeout=wait_s)
        except Empty:
            return exchange.woke(time.monotonic())
        if attempt not in self._futures:
            return []
        send, future, start = self._futures.pop(attempt)
        try:
            data = future.result()
        except grpc.RpcError as error:
            return self._failed(send, start, error)
        except grpc.FutureCancelledError:
            return exchange.failed(attempt, Cancelled("the client is closed"), time.monotonic())
        return self._arrived(send, start, data)

    def _call(self, send: Send) -> list[Action]:
        stub = self._driver.unary(send.address, send.method)
        start = time.monotonic()
        try:
            with _open_channel():
                data = stub(send.payload, timeout=send.timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            return self._failed(send, start, error)
        return self._arrived(send, start, data)

    def _begin(self, send: Send) -> None:
        stub = self._driver.unary(send.address, send.method)
        start = time.monotonic()
        with _open_channel():
            future = stub.future(send.payload, timeout=send.timeout_s, metadata=self._metadata)
        self._futures[send.attempt] = (send, future, start)
        future.add_done_callback(lambda _: self._ended.put(send.attempt))

    def _arrived(self, send: Send, start: float, data: bytes) -> list[Action]:
        now = time.monotonic()
        self._core.observe(send.method, now - start, "OK")
        return self._exchange.arrived(send.attempt, data, now)

    def _failed(self, send: Send, start: float, error: grpc.RpcError) -> list[Action]:
        now = time.monotonic()
        typed = self._driver.typed_error(error, send.address)
        self._core.observe(send.method, now - start, typed.code.name)
        return self._exchange.failed(send.attempt, typed, now)


@contextmanager
def _open_channel() -> Generator[None]:
    """Within the block a call is begun; raises Cancelled where another thread has closed its channel."""
    try:
        yield
    except ValueError as error:  # what gRPC raises then
        raise Cancelled("the client is closed") from error


def _made_ahead(messages: Iterator[bytes]) -> Iterator[bytes]:
    """Make each message while the one before it is sent: gRPC asks for the next only then."""
    yield from islice(messages, 1)
    if (second := next(messages, None)) is None:
        # As of a push by a file: no thread for that.
        return
    yield second
    with ThreadPoolExecutor(1, thread_name_prefix="upload") as pool:
        coming = pool.submit(next, messages, None)
        while (message := coming.result()) is not None:
            coming = pool.submit(next, messages, None)
            yield message
