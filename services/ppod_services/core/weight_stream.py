"""The messages of one PrepareWeights call, as bytes: a chunk is read where it lies, without parsing its message."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from google.protobuf.message import DecodeError

from ppod.errors import DeadlineExceeded, InvalidArgument
from ppod.v1 import weights_pb2

_CHUNK_TAG = bytes([weights_pb2.PrepareWeightsRequest.CHUNK_FIELD_NUMBER << 3 | 2])


class WeightStream:
    """Reads the manifest, then the rest.

    Args:
        messages: PrepareWeightsRequest messages as bytes.
        idle_timeout_s: longest wait for the next one.
    """

    def __init__(self, messages: AsyncIterator[bytes], idle_timeout_s: float) -> None:
        self._messages = aiter(messages)
        self._idle_timeout_s = idle_timeout_s
        self._received = 0
        self._silent = False

    async def manifest(self) -> weights_pb2.WeightManifest:
        """The first message; raise InvalidArgument when it is no manifest."""
        async for data in self.messages():
            part = _parse(data)
            if part.WhichOneof("part") == "manifest":
                return part.manifest
            raise InvalidArgument("part", part.WhichOneof("part") or "nothing", "the manifest in the first message")
        raise InvalidArgument("part", "an empty stream", "the manifest in the first message")

    async def messages(self) -> AsyncIterator[bytes]:
        """Further messages to the end of the stream; raise DeadlineExceeded when the sender falls silent."""
        while True:
            try:
                async with asyncio.timeout(0.0 if self._silent else self._idle_timeout_s):
                    data = await anext(self._messages)
            except TimeoutError as error:
                self._silent = True
                raise DeadlineExceeded(
                    f"the sender was silent for {self._idle_timeout_s:g} s after {self._received} messages; nothing of "
                    "this transfer is kept"
                ) from error
            except StopAsyncIteration:
                return
            self._received += 1
            yield data


def read_part(message: bytes) -> memoryview | Sequence[int]:
    """The chunk, or the checksums, that a message holds; raise InvalidArgument when it holds something else."""
    if message[:1] == _CHUNK_TAG:
        length = position = 0
        for position, byte in enumerate(message[1:6], start=2):
            length |= (byte & 0x7F) << 7 * (position - 2)
            if not byte & 0x80:
                break
        else:
            position = 0
        if position and position + length == len(message):
            return memoryview(message)[position:]
    # Another order of fields, or an unknown one: rare, but valid.
    part = _parse(message)
    match part.WhichOneof("part"):
        case "chunk":
            return memoryview(part.chunk)
        case "checksums":
            return part.checksums.xxh3
        case other:
            raise InvalidArgument("part", other or "nothing", "a chunk or checksums in every later message")


def _parse(data: bytes) -> weights_pb2.PrepareWeightsRequest:
    try:
        return weights_pb2.PrepareWeightsRequest.FromString(data)
    except DecodeError as error:
        expected = "a message of the method's request type"
        raise InvalidArgument("request", f"{len(data)} bytes that cannot be decoded", expected) from error
