"""Relays in one process: what a slow leader, and a hop that hangs, do to the other hops."""

from __future__ import annotations

import asyncio
import shutil
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio
import pytest

from ppod import Unavailable
from ppod.client import RelayHop, WeightPush, WeightTensor, weight_calls
from ppod.errors import from_rpc_error
from ppod.v1 import weights_pb2
from ppod_services.core.batch_run import Pause
from ppod_services.core.config import WeightsConfig
from ppod_services.core.described import Deferred, ModelInfo
from ppod_services.core.model_weights import ModelWeights
from ppod_services.core.weight_servicer import WeightServicer, WeightTarget
from ppod_services.core.weight_store import Install, ReceivedWeights
from ppod_services.core.weights import ServedWeights
from support.tiny_model import build_model
from support.weight_tensors import weight_tensors

JobT = TypeVar("JobT")
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
async def served(stage_s: float = 0.0, directory: Path | None = None) -> AsyncGenerator[str]:
    store = SlowWeights(build_model())
    store.stage_s = stage_s
    target: Deferred[WeightTarget] = Deferred()
    info = ModelInfo("policy", "", 1, 1, "float32", "cpu")
    target.set(WeightTarget(info, ServedWeights(store, lambda _: None)))
    server = grpc.aio.server()
    config = WeightsConfig(idle_timeout_s=IDLE_S, relay_targets=("127.0.0.1:*",), relay_directory=directory)
    servicer = WeightServicer(target, Scheduler(), config)
    servicer.add_to_server(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
        servicer.close()


def messages(hops: tuple[RelayHop, ...], tensors: Sequence[WeightTensor] | None = None) -> Iterator[bytes]:
    """A push in `PARTS` chunks."""
    push = WeightPush(1, tensors or weight_tensors(build_model(seed=3)), relay=hops)
    first, *rest = weight_calls.messages(push)
    yield first
    parts = [weights_pb2.PrepareWeightsRequest.FromString(one) for one in rest]
    data = b"".join(part.chunk for part in parts)
    size = -(-len(data) // PARTS)
    for begin in range(0, len(data), size):
        yield weights_pb2.PrepareWeightsRequest(chunk=data[begin : begin + size]).SerializeToString()
    yield from (part.SerializeToString() for part in parts if part.HasField("checksums"))


async def relayed(
    leader: str, *targets: str | RelayHop, tensors: Sequence[WeightTensor] | None = None
) -> dict[str, int]:
    """Push to a leader with these hops; codes by target."""
    hops = tuple(RelayHop(one) if isinstance(one, str) else one for one in targets)
    async with grpc.aio.insecure_channel(leader) as channel:
        stub = channel.stream_unary(
            "/ppod.v1.WeightService/PrepareWeights", None, weights_pb2.PrepareWeightsResponse.FromString
        )
        reply = await stub(messages(hops, tensors), timeout=20)
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
            found = await relayed(leader, RelayHop(hop, shares_directory=True), tensors=large)
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
