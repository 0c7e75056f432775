"""Relays in one process: what a slow leader, and a hop that hangs, do to the other hops."""

from __future__ import annotations

import asyncio
import shutil
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import pytest
import torch
from torch import nn

from ppod import Unavailable
from ppod.client import LoraAdapter, RelayHop, SharedDirectory, WeightPush, weight_calls
from ppod.errors import InvalidArgument, from_rpc_error
from ppod.v1 import weights_pb2
from ppod.weight_changes import TensorEncoding
from ppod_models.configuration import ClientTlsConfig
from ppod_services.core.batch_run import Pause
from ppod_services.core.config import WeightsConfig
from ppod_services.core.described import Deferred, ModelInfo
from ppod_services.core.lora import adapter_names
from ppod_services.core.model_weights import ModelWeights
from ppod_services.core.weight_relay import WeightRelay
from ppod_services.core.weight_servicer import WeightServicer, WeightTarget
from ppod_services.core.weight_store import Install, ReceivedWeights
from ppod_services.core.weights import ServedWeights
from support.tiny_model import build_model
from support.weight_tensors import weight_tensor, weight_tensors

JobT = TypeVar("JobT")
PREPARE = "/ppod.v1.WeightService/PrepareWeights"
IDLE_S = 1.0
PARTS = 16
"""Chunks of a push, more than wait for a hop."""


class Scheduler:
    """Runs jobs at once."""

    async def exclusive(self, job: Callable[[], JobT], pause: Pause = Pause.WAIT) -> JobT:
        del pause
        return job()


class SlowWeights(ModelWeights):
    """As on a device, or with an adapter to merge, staging may take long."""

    stage_s = 0.0

    def stage(self, received: ReceivedWeights) -> Install:
        time.sleep(self.stage_s)
        return super().stage(received)


@asynccontextmanager
async def served(stage_s: float = 0.0, directory: Path | None = None, idle_s: float = IDLE_S) -> AsyncGenerator[str]:
    store = SlowWeights(build_model())
    store.stage_s = stage_s
    target: Deferred[WeightTarget] = Deferred()
    info = ModelInfo("policy", "", 1, 1, "float32", "cpu")
    target.set(WeightTarget(info, ServedWeights(store, lambda _: None)))
    server = grpc.aio.server()
    config = WeightsConfig(idle_timeout_s=idle_s, relay_targets=("127.0.0.1:*",), relay_directory=directory)
    servicer = WeightServicer(target, Scheduler(), config)
    servicer.add_to_server(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
        servicer.close()


def messages(hops: tuple[RelayHop, ...], push: WeightPush | None = None) -> Iterator[bytes]:
    """A push in `PARTS` chunks."""
    push = push or WeightPush(1, weight_tensors(build_model(seed=3)))
    first, *rest = weight_calls.messages(replace(push, relay=hops))
    yield first
    parts = [weights_pb2.PrepareWeightsRequest.FromString(one) for one in rest]
    data = b"".join(part.chunk for part in parts)
    size = max(-(-len(data) // PARTS), 1)
    for begin in range(0, len(data), size):
        yield weights_pb2.PrepareWeightsRequest(chunk=data[begin : begin + size]).SerializeToString()
    yield from (part.SerializeToString() for part in parts if part.HasField("checksums"))


def prepare_of(channel: grpc.aio.Channel) -> grpc.aio.StreamUnaryMultiCallable[bytes, Any]:
    return channel.stream_unary(PREPARE, None, weights_pb2.PrepareWeightsResponse.FromString)


async def relayed(leader: str, *targets: str | RelayHop, push: WeightPush | None = None) -> dict[str, int]:
    """Push to a leader with these hops; codes by target."""
    hops = tuple(RelayHop(one) if isinstance(one, str) else one for one in targets)
    async with grpc.aio.insecure_channel(leader) as channel:
        reply = await prepare_of(channel)(messages(hops, push), timeout=20)
    return {one.target or "leader": one.code for one in reply.replicas}


def test_a_leader_that_stages_for_long_keeps_no_hop_waiting() -> None:
    async def run() -> None:
        async with served(2 * IDLE_S) as leader, served() as hop:
            assert await relayed(leader, hop) == {"leader": 0, hop: 0}

    asyncio.run(run())


def test_a_hop_that_hangs_takes_no_other_with_it() -> None:
    """Whose own timer begins when the leader waits for the one that hangs."""

    async def run() -> None:
        with socket.socket() as hung:
            hung.bind(("127.0.0.1", 0))
            hung.listen()
            name = f"127.0.0.1:{hung.getsockname()[1]}"
            async with served() as leader, served() as first, served() as last:
                found = await relayed(leader, first, name, last)
                assert {one: code for one, code in found.items() if one != name} == {"leader": 0, first: 0, last: 0}
                assert found[name] == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]

    asyncio.run(run())


def test_a_hop_that_breaks_while_it_is_waited_for_holds_up_nobody() -> None:
    async def hang_up(listening: socket.socket) -> None:
        connection, _ = await asyncio.get_running_loop().sock_accept(listening)
        # By then there is no room left for what it does not take.
        await asyncio.sleep(0.3)
        listening.close()
        connection.close()

    async def run() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        listening.setblocking(False)
        name = f"127.0.0.1:{listening.getsockname()[1]}"
        async with served(idle_s=60) as leader, served(idle_s=60) as hop, asyncio.timeout(15):
            breaking = asyncio.create_task(hang_up(listening))
            found = await relayed(leader, name, hop)
            assert found == {"leader": 0, name: grpc.StatusCode.UNAVAILABLE.value[0], hop: 0}
            await breaking

    asyncio.run(run())


def test_a_sender_that_goes_away_ends_what_is_relayed() -> None:
    async def run() -> None:
        begun, ended = asyncio.Event(), asyncio.Event()

        async def receive(parts: AsyncIterator[bytes], _: object) -> bytes:
            try:
                async for _ in parts:
                    begun.set()
            finally:
                ended.set()
            return b""

        async def cut_short(hop: str) -> AsyncIterator[bytes]:
            for message, _ in zip(messages((RelayHop(hop),)), range(PARTS // 2), strict=False):
                yield message
            await asyncio.sleep(60)

        server = grpc.aio.server()
        service, method = PREPARE.strip("/").split("/")
        handler = grpc.stream_unary_rpc_method_handler(receive)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        hop = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        async with served(idle_s=60) as leader, grpc.aio.insecure_channel(leader) as channel, asyncio.timeout(10):
            call = prepare_of(channel)(cut_short(hop))
            await begun.wait()
            assert not ended.is_set()
            call.cancel()
            await ended.wait()
        await server.stop(0)

    asyncio.run(run())


def test_a_sender_that_goes_away_leaves_no_chunk_waiting() -> None:
    def waiting() -> bool:
        return any(task.get_coro().__qualname__ == "Queue.put" for task in asyncio.all_tasks())

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as hung:
            hop = RelayHop(f"127.0.0.1:{hung.getsockname()[1]}")
            async with served(idle_s=60) as leader, grpc.aio.insecure_channel(leader) as channel, asyncio.timeout(10):
                call = prepare_of(channel)(messages((hop,)))
                while not waiting():
                    await asyncio.sleep(0.01)
                call.cancel()
                until = time.monotonic() + 5
                while waiting() and time.monotonic() < until:
                    await asyncio.sleep(0.01)
                assert not waiting()

    asyncio.run(run())


def test_a_hop_that_refuses_leaves_no_task_that_waits_for_messages() -> None:
    """asyncio would complain of it, as of an error, whenever its memory is looked through."""

    async def run() -> None:
        refused = asyncio.Event()

        async def refuse(parts: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            await anext(aiter(parts))
            refused.set()
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another version")

        async def slowly(hop: str) -> AsyncIterator[bytes]:
            first, *rest = messages((RelayHop(hop),))
            yield first
            await refused.wait()
            # So that the hop's answer is there before there is anything more for it.
            await asyncio.sleep(0.2)
            for message in rest:
                yield message

        server = grpc.aio.server()
        service, method = PREPARE.strip("/").split("/")
        handler = grpc.stream_unary_rpc_method_handler(refuse)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        hop = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        async with served() as leader, grpc.aio.insecure_channel(leader) as channel, asyncio.timeout(10):
            reply = await prepare_of(channel)(slowly(hop))
        assert [bool(one.code) for one in reply.replicas] == [False, True]
        left = [task.get_coro().__qualname__ for task in asyncio.all_tasks()]
        assert not [name for name in left if name.endswith("_consume_request_iterator")]
        await server.stop(0)

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["adapter", "changes", "file"])
def test_what_is_no_whole_version_in_chunks_is_passed_on_as_it_comes(kind: str, tmp_path: Path) -> None:
    model = build_model()
    if kind == "adapter":
        layer = next(name for name, one in model.named_modules() if isinstance(one, nn.Linear))
        rows, columns = model.get_submodule(layer).weight.shape
        names = adapter_names(layer)
        tensors = [
            weight_tensor(name, torch.ones(shape)) for name, shape in zip(names, ((1, columns), (rows, 1)), strict=True)
        ]
        push = WeightPush(1, tensors, base_version=0, adapter=LoraAdapter(1, 1.0, (layer,)))
    elif kind == "changes":
        first, *others = weight_calls.with_checksums(weight_tensors(model))
        same = [replace(one, data=memoryview(b""), encoding=TensorEncoding.BITMAP) for one in others]
        push = WeightPush(1, [first, *same], base_version=0)
    else:
        tensors = weight_tensors(model)
        push = WeightPush(1, tensors, uri=SharedDirectory(tmp_path).write(tensors).as_uri())

    async def run() -> None:
        async with served(directory=tmp_path) as leader, served(directory=tmp_path) as hop:
            found = await relayed(leader, RelayHop(hop, shares_directory=True), push=push)
            assert found == {"leader": 0, hop: 0}
            assert len(list(tmp_path.rglob("*.safetensors"))) == (kind == "file")

    asyncio.run(run())


def test_a_relay_directory_that_went_away_is_one_without_room(tmp_path: Path) -> None:
    """The leader has its weights, and the sender, which is told, gives the other one its own."""
    shared = tmp_path / "shared"

    async def run() -> None:
        async with served(directory=shared) as leader, served(directory=shared) as hop:
            shutil.rmtree(shared)
            shared.write_text("in its place")
            found = await relayed(leader, RelayHop(hop, shares_directory=True))
            assert found == {"leader": 0, hop: grpc.StatusCode.UNAVAILABLE.value[0]}

    asyncio.run(run())


def test_no_file_is_made_for_weights_that_do_not_fit(tmp_path: Path) -> None:
    tensors = weight_tensors(build_model(seed=3))
    data = memoryview(bytes(2**20))
    large = [*tensors[:-1], replace(tensors[-1], shape=(2**18,), data=data)]

    async def run() -> None:
        async with served(directory=tmp_path) as leader, served(directory=tmp_path) as hop:
            found = await relayed(leader, RelayHop(hop, shares_directory=True), push=WeightPush(1, large))
            invalid, away = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNAVAILABLE
            assert found == {"leader": invalid.value[0], hop: away.value[0]}
            assert list(tmp_path.rglob("*.safetensors")) == []

    asyncio.run(run())


@pytest.mark.parametrize(
    ("details", "kind"), [("Internal error from Core", "Unavailable"), ("a bug of the server's", "Internal")]
)
def test_what_stands_for_a_status_that_was_lost_is_no_bug_of_the_servers(details: str, kind: str) -> None:
    """grpc.aio puts its own words in the place of a server's status that comes while the call is written to."""
    metadata = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, metadata, metadata, details=details)
    typed = from_rpc_error(error)
    assert type(typed).__name__ == kind
    assert isinstance(typed, Unavailable) == (kind == "Unavailable")


def test_certificates_of_a_relay_are_read_at_the_start(tmp_path: Path) -> None:
    tls = ClientTlsConfig(ca_file=tmp_path / "none")
    with pytest.raises(InvalidArgument, match=rf"security\.ca_file: found {tmp_path}/none: No such file"):
        WeightRelay(WeightsConfig(relay_targets=("127.0.0.1:*",), relay_tls=tls))
    # Where nobody is relayed to, nothing is read.
    WeightRelay(WeightsConfig(relay_tls=tls))
