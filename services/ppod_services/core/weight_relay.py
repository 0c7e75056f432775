"""Sending weights on to further servers while they come in."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from ppod.channel import ChannelSpec, open_aio_channel
from ppod.client import ClientSecurity
from ppod.client.credentials import RenewedCredentials
from ppod.errors import (
    DeadlineExceeded,
    InvalidReply,
    PermissionDenied,
    PpodError,
    Unavailable,
    from_rpc_error,
    from_status,
    to_status,
)
from ppod.uploads import reply_to_stream
from ppod.v1 import weights_pb2
from ppod_services.core.config import WeightsConfig

_PREPARE = f"/{weights_pb2.DESCRIPTOR.services_by_name['WeightService'].full_name}/PrepareWeights"
_WAITING_CHUNKS = 4
"""Chunks that a hop may lag behind before the sender has to wait for it."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of one server; `error` None: prepared."""

    target: str
    error: PpodError | None


class WeightRelay:
    """Opens relays to the servers that the configuration allows.

    A hop gets every message as it comes in. One that shares the relay directory gets whole weights as a file, instead,
    once they are all there.

    Raises:
        InvalidArgument: the token or a certificate cannot be read.
    """

    def __init__(self, config: WeightsConfig) -> None:
        self._config = config
        self._channels: dict[str, grpc.aio.Channel] = {}
        tls = config.relay_tls
        self._security = (
            ClientSecurity.from_environment(
                ca_file=None if tls is None else tls.ca_file,
                certificate_file=None if tls is None else tls.certificate_file,
                key_file=None if tls is None else tls.key_file,
                server_name="" if tls is None else tls.server_name,
                plain_text_token=config.relay_plain_text_token,
                administrator=True,
            )
            if config.relay_targets
            else ClientSecurity()
        )
        # Else a wrong path would show at the first push.
        self._security.files()
        self._credentials = RenewedCredentials(self._security)

    @contextlib.asynccontextmanager
    async def open(
        self, manifest: weights_pb2.WeightManifest, timeout_s: float | None
    ) -> AsyncGenerator[RelayedTransfer]:
        """Begin to send to all hops of a manifest; whoever leaves early calls off what is under way."""
        by_file = self._config.relay_directory is not None and _whole_by_chunks(manifest)
        hops = [_Hop(hop, self._config.idle_timeout_s) for hop in manifest.relay]
        waiting = [hop for hop in hops if by_file and hop.message.shares_directory]
        deadline = None if timeout_s is None else time.monotonic() + timeout_s

        def start(hop: _Hop, message: weights_pb2.WeightManifest) -> None:
            left_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            hop.start(self._send(hop, message, left_s))

        transfer = RelayedTransfer(manifest, hops, waiting, start)
        try:
            yield transfer
        finally:
            await transfer.close()

    async def _send(self, hop: _Hop, manifest: weights_pb2.WeightManifest, timeout_s: float | None) -> list[_Outcome]:
        """Stream to one hop. Returns what became of it and of those behind it; raises what it ended with."""
        target = hop.message.target
        if not any(fnmatchcase(target, pattern) for pattern in self._config.relay_targets):
            raise PermissionDenied(f"{target} is none of this server's weights.relay_targets")
        self._security.check_target(target)
        onward = weights_pb2.WeightManifest()
        onward.CopyFrom(manifest)
        del onward.relay[:]
        onward.relay.extend(hop.message.hops)
        first = weights_pb2.PrepareWeightsRequest(manifest=onward).SerializeToString()
        if self._credentials.renewed(target):
            await self._close(target)
        stub = self._channel(target).stream_unary(_PREPARE, None, None)
        try:
            call = stub(hop.messages(first), timeout=timeout_s, metadata=self._security.metadata())
            data = await reply_to_stream(call)
        except grpc.RpcError as error:
            typed = from_rpc_error(error)
            if isinstance(typed, Unavailable):
                # The next one is opened anew.
                await self._close(target)
                typed = Unavailable(f"{target}: {typed.detail}")
            raise typed from error
        finally:
            hop.leave()
        return _read_reply(target, data)

    async def _close(self, target: str) -> None:
        channel = self._channels.pop(target, None)
        if channel is not None:
            await channel.close()

    def _channel(self, target: str) -> grpc.aio.Channel:
        """Channels stay open: opening one takes longer than sending a small model."""
        if target not in self._channels:
            spec = ChannelSpec(target, self._security.server_name)
            self._channels[target] = open_aio_channel(spec, self._credentials.for_channel(target))
        return self._channels[target]


class RelayedTransfer:
    """The hops of one transfer. A hop that fails is left behind; the others go on.

    Args:
        manifest: as it came.
        hops: all of them.
        waiting: those that get a file.
        start: begins to send to a hop, with the manifest that it gets.
    """

    def __init__(
        self,
        manifest: weights_pb2.WeightManifest,
        hops: Sequence[_Hop],
        waiting: Sequence[_Hop],
        start: Callable[[_Hop, weights_pb2.WeightManifest], None],
    ) -> None:
        self._manifest = manifest
        self._hops = hops
        self._waiting = waiting
        self._start = start
        self._streams = [hop for hop in hops if hop not in waiting]
        for hop in self._streams:
            start(hop, manifest)

    def __bool__(self) -> bool:
        return bool(self._hops)

    @property
    def wants_file(self) -> bool:
        """Whether a hop waits for `announce`."""
        return bool(self._waiting)

    async def forward(self, part: bytes) -> None:
        """Send one message on to every hop that still takes it."""
        if self._streams:
            await asyncio.gather(*(hop.put(part) for hop in self._streams))

    def announce(self, uri: str, checksums: Sequence[int]) -> None:
        """Tell the hops that wait for it of a file that holds all tensors, with these checksums."""
        manifest = weights_pb2.WeightManifest()
        manifest.CopyFrom(self._manifest)
        manifest.uri, manifest.checksums_follow = uri, False
        for tensor, checksum in zip(manifest.tensors, checksums, strict=True):
            tensor.xxh3 = checksum
        for hop in self._waiting:
            self._start(hop, manifest)
            hop.end()

    async def end(self) -> None:
        """Nothing follows: what this server does with the weights may take long, and no hop is to wait for it."""
        streams, self._streams = self._streams, []
        await asyncio.gather(*(hop.put(None) for hop in streams))

    async def results(self, own: PpodError | None) -> list[weights_pb2.ReplicaResult]:
        """End all streams, wait for their replies, and tell what became of every server; empty without any hop."""
        if not self._hops:
            return []
        await self.end()
        found = await asyncio.gather(*(hop.outcomes() for hop in self._hops))
        return [_result(outcome) for outcome in itertools.chain([_Outcome("", own)], *found)]

    async def close(self) -> None:
        """Call off what is still under way."""
        await asyncio.gather(*(hop.close() for hop in self._hops))


class _Hop:
    """One server that gets what this one gets."""

    def __init__(self, message: weights_pb2.RelayHop, idle_timeout_s: float) -> None:
        self.message = message
        self._idle_timeout_s = idle_timeout_s
        depth = _depth(message)
        # The others get nothing while one without room is waited for, and must not find the sender silent for so long
        # that they give up, too. One that may itself wait for those behind it is waited for a little longer.
        self._patience_s = idle_timeout_s * depth / (depth + 1)
        self._parts: asyncio.Queue[bytes | None] = asyncio.Queue(_WAITING_CHUNKS)
        self._task: asyncio.Task[list[_Outcome] | PpodError] | None = None

    def start(self, sending: Coroutine[None, None, list[_Outcome]]) -> None:
        """Begin to send."""
        self._task = asyncio.create_task(_settled(sending))

    async def put(self, part: bytes | None) -> None:
        """Hand over the next message, None for the end, as soon as there is room; a hop that has failed takes none."""
        task = self._task
        if task is None or task.done():
            return
        if self._parts.full():
            room = asyncio.ensure_future(self._parts.put(part))
            try:
                await asyncio.wait({room, task}, timeout=self._patience_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                # Also reached when the caller goes away: nobody makes room any more.
                if not room.done():
                    room.cancel()
                    task.cancel()
            return
        self._parts.put_nowait(part)

    def end(self) -> None:
        """Nothing follows the first message."""
        self._parts.put_nowait(None)

    def leave(self) -> None:
        """The call is over. gRPC's task that asks for messages would wait for the next one for ever."""
        while not self._parts.empty():
            self._parts.get_nowait()
        self._parts.put_nowait(None)

    async def messages(self, first: bytes) -> AsyncIterator[bytes]:
        """What is sent."""
        yield first
        while (part := await self._parts.get()) is not None:
            yield part

    async def outcomes(self) -> list[_Outcome]:
        """Wait for the end: what became of this server and of those behind it."""
        found = await self._end()
        if isinstance(found, list):
            return found
        target = self.message.target
        behind = [_Outcome(name, Unavailable(f"not reached: {target} failed")) for name in _behind(self.message)]
        return [_Outcome(target, found), *behind]

    async def _end(self) -> list[_Outcome] | PpodError:
        target, task = self.message.target, self._task
        if task is None:
            return Unavailable(f"not reached: no file was made for {target}")
        # Each server behind may itself wait so long for the next one, and still tell of it.
        answer_s = self._idle_timeout_s * _depth(self.message)
        if not task.done():
            await asyncio.wait({task}, timeout=answer_s)
        if task.done() and not task.cancelled():
            return task.result()
        waited = f"took nothing for {self._patience_s:g} s, or did not answer for {answer_s:g} s"
        return DeadlineExceeded(f"{target} {waited}")

    async def close(self) -> None:
        """Call off what is under way."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task


async def _settled(sending: Coroutine[None, None, list[_Outcome]]) -> list[_Outcome] | PpodError:
    """An error as a result: a hop that fails early is asked for it late."""
    try:
        return await sending
    except PpodError as error:
        return error


def _read_reply(target: str, data: bytes) -> list[_Outcome]:
    """What a hop says of itself and of those behind it."""
    try:
        reply = weights_pb2.PrepareWeightsResponse.FromString(data)
    except DecodeError as error:
        expected = weights_pb2.PrepareWeightsResponse.DESCRIPTOR.full_name
        raise InvalidReply("message", f"{len(data)} bytes that do not decode", expected) from error
    if not reply.replicas:
        return [_Outcome(target, None)]
    return [_Outcome(one.target or target, from_status(one.code, one.message, one.status)) for one in reply.replicas]


def _whole_by_chunks(manifest: weights_pb2.WeightManifest) -> bool:
    """Whether chunks bring whole tensors of the model."""
    dense = (weights_pb2.TENSOR_ENCODING_UNSPECIFIED, weights_pb2.TENSOR_ENCODING_DENSE)
    elsewhere = manifest.uri or manifest.HasField("adapter") or manifest.HasField("collective")
    return not elsewhere and all(spec.encoding in dense for spec in manifest.tensors)


def _depth(hop: weights_pb2.RelayHop) -> int:
    return 1 + max((_depth(inner) for inner in hop.hops), default=0)


def _behind(hop: weights_pb2.RelayHop) -> Iterator[str]:
    for inner in hop.hops:
        yield inner.target
        yield from _behind(inner)


def _result(outcome: _Outcome) -> weights_pb2.ReplicaResult:
    if outcome.error is None:
        return weights_pb2.ReplicaResult(target=outcome.target)
    status = to_status(outcome.error)
    return weights_pb2.ReplicaResult(
        target=outcome.target, code=status.code, message=status.message, status=status.SerializeToString()
    )
