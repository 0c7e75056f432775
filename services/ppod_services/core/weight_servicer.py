"""WeightService on the admin port: turns messages into calls of `ServedWeights`."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc.aio

from ppod.client import directory_id
from ppod.errors import InvalidArgument, PpodError, ResourceExhausted
from ppod.v1 import weights_pb2, weights_pb2_grpc
from ppod_services.core.batch_run import Pause
from ppod_services.core.config import WeightsConfig
from ppod_services.core.described import Deferred, ModelInfo
from ppod_services.core.logs import LogValue, log_event
from ppod_services.core.weight_manifest import IncomingManifest, read_manifest
from ppod_services.core.weight_relay import RelayedTransfer, WeightRelay
from ppod_services.core.weight_store import FileMemory, Install
from ppod_services.core.weight_stream import WeightStream, read_part

if TYPE_CHECKING:
    # Importing torch would delay the binding of the ports by seconds.
    from ppod_services.core.relay_files import RelayFiles
    from ppod_services.core.weight_transfer import WeightTransfer
    from ppod_services.core.weights import ServedWeights

_LOGGER = logging.getLogger(__name__)
JobT = TypeVar("JobT")

WEIGHT_SERVICE = weights_pb2.DESCRIPTOR.services_by_name["WeightService"].full_name
_PAUSES = {
    weights_pb2.WEIGHT_PAUSE_UNSPECIFIED: Pause.WAIT,
    weights_pb2.WEIGHT_PAUSE_WAIT: Pause.WAIT,
    weights_pb2.WEIGHT_PAUSE_KEEP: Pause.KEEP,
    weights_pb2.WEIGHT_PAUSE_ABORT: Pause.ABORT,
}


class Exclusive(Protocol):
    """Runs a job in the model's thread between two batches, or between two decoding steps."""

    async def exclusive(self, job: Callable[[], JobT], pause: Pause = Pause.WAIT) -> JobT:
        """Run it and return its result."""
        ...


class WeightSource(Protocol):
    """Brings a version by another way than the stream."""

    def prepare(self, weights: ServedWeights, manifest: IncomingManifest, gone: threading.Event) -> int:
        """Prepare the version of a manifest, unless the caller is gone; blocks. Returns the bytes received."""
        ...


@dataclass(frozen=True, slots=True)
class WeightTarget:
    """The loaded model that new weights go to."""

    info: ModelInfo
    weights: ServedWeights


class WeightServicer(weights_pb2_grpc.WeightServiceServicer):
    """Replaces weights in two phases; see weights.proto.

    Register it by `add_to_server`: chunks come in as raw bytes, because parsing them would copy them twice.

    Raises:
        InvalidArgument: a token or certificate of the relay cannot be read, or its directory cannot be used.
    """

    def __init__(self, target: Deferred[WeightTarget], scheduler: Exclusive, config: WeightsConfig) -> None:
        self._target = target
        self._scheduler = scheduler
        self._config = config
        self._relay = WeightRelay(config)
        self._directory_id = _directory_id(config.relay_directory)
        self._files: WeightSource | None = None
        self._groups: WeightSource | None = None
        self._relay_files: RelayFiles | None = None
        self._relay_lock = threading.Lock()

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Register all methods."""
        handlers = {
            "PrepareWeights": grpc.stream_unary_rpc_method_handler(
                self.PrepareWeights, None, weights_pb2.PrepareWeightsResponse.SerializeToString
            ),
            "CommitWeights": grpc.unary_unary_rpc_method_handler(
                self.CommitWeights,
                weights_pb2.CommitWeightsRequest.FromString,
                weights_pb2.CommitWeightsResponse.SerializeToString,
            ),
            "GetWeights": grpc.unary_unary_rpc_method_handler(
                self.GetWeights,
                weights_pb2.GetWeightsRequest.FromString,
                weights_pb2.GetWeightsResponse.SerializeToString,
            ),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(WEIGHT_SERVICE, handlers),))

    async def PrepareWeights(  # pyright: ignore[reportIncompatibleMethodOverride] - the messages' bytes
        self,
        request_iterator: AsyncIterator[bytes],
        context: grpc.aio.ServicerContext[bytes, weights_pb2.PrepareWeightsResponse],
    ) -> weights_pb2.PrepareWeightsResponse:
        """Receive, verify, keep aside, and send on."""
        started = time.monotonic()
        weights = self._target.get().weights
        stream = WeightStream(request_iterator, self._config.idle_timeout_s)
        message = await stream.manifest()
        error: PpodError | None = None
        received = 0
        async with self._relay.open(message, context.time_remaining()) as relay:
            try:
                received = await self._prepare(weights, read_manifest(message), stream, relay)
            except PpodError as own:
                if not relay:
                    raise
                # The servers behind may have their weights all the same.
                error = own
                async for part in stream.messages():
                    await relay.forward(part)
            replicas = await relay.results(error)
        seconds = time.monotonic() - started
        fields: dict[str, LogValue] = {
            "version": message.weight_version,
            "bytes": received,
            "seconds": round(seconds, 3),
        }
        failed = [one for one in replicas if one.code]
        if replicas:
            fields |= {"replicas": len(replicas), "failed": ", ".join(f"{one.target}: {one.message}" for one in failed)}
        log_event(_LOGGER, "weights_prepared" if error is None else "weights_relayed_only", fields)
        return weights_pb2.PrepareWeightsResponse(
            weight_version=message.weight_version, received_bytes=received, receive_s=seconds, replicas=replicas
        )

    async def CommitWeights(
        self,
        request: weights_pb2.CommitWeightsRequest,
        context: grpc.aio.ServicerContext[weights_pb2.CommitWeightsRequest, weights_pb2.CommitWeightsResponse],
    ) -> weights_pb2.CommitWeightsResponse:
        """Swap between two batches, or between two decoding steps."""
        target = self._target.get()
        pause = _PAUSES.get(request.pause)
        if pause is None:
            raise InvalidArgument("pause", str(request.pause), "a value of WeightPause")
        paused_s = 0.0
        # Asked first: sequences under way are not to be held up or handed back for a commit that changes nothing.
        version, push_id = request.weight_version, request.push_id
        if target.weights.would_change(version, push_id):
            paused_s = await self._scheduler.exclusive(lambda: target.weights.commit(version, push_id), pause)
            log_event(_LOGGER, "weights_committed", {"version": version, "seconds": round(paused_s, 6)})
        # Not the version that was asked for: another commit may have followed.
        return weights_pb2.CommitWeightsResponse(model=target.info.state(target.weights.version), paused_s=paused_s)

    async def GetWeights(
        self,
        request: weights_pb2.GetWeightsRequest,
        context: grpc.aio.ServicerContext[weights_pb2.GetWeightsRequest, weights_pb2.GetWeightsResponse],
    ) -> weights_pb2.GetWeightsResponse:
        """Tell which versions serve and wait."""
        target = self._target.get()
        # At one moment: a commit in the model's thread must not bring its name to the version before it.
        status = target.weights.status
        return weights_pb2.GetWeightsResponse(
            model=target.info.state(status.version),
            prepared_version=status.prepared_version,
            base_version=status.base_version,
            held_uris=status.held_uris,
            collective_ranks=target.weights.collective_ranks,
            relay_directory_id=self._directory_id,
            push_id=status.push_id,
        )

    def close(self) -> None:
        """Leave no files behind."""
        if self._relay_files is not None:
            self._relay_files.close()

    async def _prepare(
        self, weights: ServedWeights, manifest: IncomingManifest, stream: WeightStream, relay: RelayedTransfer
    ) -> int:
        """Returns the bytes received."""
        source = self._source(manifest)
        if source is not None:
            return await _prepare_from(source, weights, manifest)
        if relay.wants_file:
            # A file takes all of its space at once, and stays.
            weights.check(manifest)
        memory = await self._shared_memory(manifest) if relay.wants_file else None
        # Not in a thread: a caller that went away in between would leave the transfer open for ever.
        transfer = weights.begin(manifest, memory)
        staged: Install | None = None
        try:
            await _receive(transfer, stream, relay)
            await relay.end()
            if memory is not None:
                relay.announce(memory.hold.uri, transfer.checksums)
            staged = await asyncio.to_thread(weights.stage, transfer)
        finally:
            # Also reached when the caller goes away: then nothing is kept.
            weights.end(transfer, staged)
        return transfer.received_bytes

    async def _shared_memory(self, manifest: IncomingManifest) -> FileMemory | None:
        """A file's memory to receive into, for those that share the directory; None where none can be made."""
        making = asyncio.ensure_future(asyncio.to_thread(self._make_memory, manifest))
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            making.add_done_callback(_release_memory)
            raise
        except (ResourceExhausted, OSError) as error:
            # Full, or gone. The sender reaches the others by itself.
            log_event(_LOGGER, "relay_directory_unusable", {"error": str(error)})
            return None

    def _make_memory(self, manifest: IncomingManifest) -> FileMemory:
        assert self._config.relay_directory is not None
        with self._relay_lock:
            if self._relay_files is None:
                from ppod_services.core.relay_files import RelayFiles  # noqa: PLC0415

                self._relay_files = RelayFiles(self._config.relay_directory)
        return self._relay_files.memory(manifest)

    def _source(self, manifest: IncomingManifest) -> WeightSource | None:
        """Where the bytes are or come from; None: from the stream. Its modules need torch."""
        config = self._config
        if manifest.uri:
            if self._files is None:
                from ppod_services.core.shared_weights import SharedFiles  # noqa: PLC0415

                self._files = SharedFiles(config.readable_directories, map_files=config.map_shared_files)
            return self._files
        if manifest.collective is not None:
            if self._groups is None:
                import torch  # noqa: PLC0415

                from ppod_services.core.collective_weights import CollectiveReceiver  # noqa: PLC0415

                device = torch.device(self._target.get().info.device)
                self._groups = CollectiveReceiver(config.collective_addresses, config.idle_timeout_s, device)
            return self._groups
        return None


def _directory_id(directory: Path | None) -> str:
    """Empty where there is none."""
    if directory is None:
        return ""
    try:
        return directory_id(directory)
    except OSError as error:
        raise InvalidArgument("relay_directory", f"{directory}: {error}", "one that can be written to") from error


def _release_memory(made: asyncio.Future[FileMemory]) -> None:
    """Of a caller that went away meanwhile."""
    if not made.cancelled() and made.exception() is None:
        made.result().hold.release()


async def _prepare_from(source: WeightSource, weights: ServedWeights, manifest: IncomingManifest) -> int:
    gone = threading.Event()
    try:
        return await asyncio.to_thread(source.prepare, weights, manifest, gone)
    finally:
        # The thread goes on when the caller goes away: it must not keep what nobody waits for.
        gone.set()


async def _receive(transfer: WeightTransfer, stream: WeightStream, relay: RelayedTransfer) -> None:
    """Take all messages, and send each on."""
    encoded = transfer.manifest.encoded
    async for message in stream.messages():
        # Before anything can fail here: whoever is behind needs every message.
        await relay.forward(message)
        part = read_part(message)
        if not isinstance(part, memoryview):
            transfer.verify(part)
        elif encoded:
            await _write_in_thread(transfer, part)
        else:
            # Some 0.3 ms for 2 MiB, in which other calls wait: handing it to a thread and back costs half of that.
            transfer.write(part)


async def _write_in_thread(transfer: WeightTransfer, part: memoryview) -> None:
    """Changes are applied as soon as a tensor's are whole, which takes as long as the whole tensor is large."""
    writing = asyncio.ensure_future(asyncio.to_thread(transfer.write, part))
    try:
        await asyncio.shield(writing)
    finally:
        if not writing.done():
            # It still writes into buffers that the next transfer may get.
            await asyncio.wait({writing})
