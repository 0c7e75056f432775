"""What WeightServicer asks of the scheduler, and how it reads messages, without a server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar, cast

import grpc.aio
import pytest
import xxhash
from torch import nn

from ppod import DeadlineExceeded, FailedPrecondition, InvalidArgument
from ppod.v1 import common_pb2, weights_pb2
from ppod_services.core.batch_run import Pause
from ppod_services.core.config import WeightsConfig
from ppod_services.core.described import Deferred, ModelInfo
from ppod_services.core.model_weights import ModelWeights
from ppod_services.core.weight_manifest import IncomingManifest, IncomingTensor, read_manifest
from ppod_services.core.weight_servicer import Exclusive, WeightServicer, WeightTarget
from ppod_services.core.weight_store import Install, ReceivedWeights
from ppod_services.core.weight_stream import WeightStream, read_part
from ppod_services.core.weights import ServedWeights

JobT = TypeVar("JobT")
Context = grpc.aio.ServicerContext[weights_pb2.CommitWeightsRequest, weights_pb2.CommitWeightsResponse]


class RecordingScheduler:
    """Runs jobs at once, and remembers how each was asked for."""

    def __init__(self) -> None:
        self.pauses: list[Pause] = []

    async def exclusive(self, job: Callable[[], JobT], pause: Pause = Pause.WAIT) -> JobT:
        self.pauses.append(pause)
        return job()


def servicer(scheduler: Exclusive) -> tuple[WeightServicer, ServedWeights]:
    """One for a model of one number."""
    target: Deferred[WeightTarget] = Deferred()
    info = ModelInfo("policy", "", 1, 1, "float32", "cpu")
    weights = ServedWeights(ModelWeights(nn.Linear(1, 1, bias=False)), lambda _: None)
    target.set(WeightTarget(info, weights))
    return WeightServicer(target, scheduler, WeightsConfig()), weights


def prepare(weights: ServedWeights, version: int) -> None:
    data = bytes(4)
    tensor = IncomingTensor("weight", "float32", (1, 1), xxhash.xxh3_64_intdigest(data))
    transfer = weights.begin(IncomingManifest(version, (tensor,)))
    transfer.write(data)
    weights.end(transfer, weights.stage(transfer))


async def commit(service: WeightServicer, version: int, pause: int = 0) -> weights_pb2.CommitWeightsResponse:
    request = weights_pb2.CommitWeightsRequest(weight_version=version, pause=pause)  # pyright: ignore
    return await service.CommitWeights(request, cast(Context, None))


async def test_a_commit_says_what_becomes_of_running_sequences() -> None:
    scheduler = RecordingScheduler()
    service, weights = servicer(scheduler)
    for pause in range(4):
        prepare(weights, pause + 1)
        assert (await commit(service, pause + 1, pause)).model.weight_version == pause + 1
    assert scheduler.pauses == [Pause.WAIT, Pause.WAIT, Pause.KEEP, Pause.ABORT]
    with pytest.raises(InvalidArgument, match="pause: found 9"):
        await commit(service, 4, 9)


async def test_a_commit_that_changes_nothing_disturbs_nobody() -> None:
    scheduler = RecordingScheduler()
    service, weights = servicer(scheduler)
    prepare(weights, 2)
    reply = await commit(service, 0, weights_pb2.WEIGHT_PAUSE_ABORT)
    assert (reply.model.weight_version, reply.paused_s) == (0, 0.0)
    with pytest.raises(FailedPrecondition, match="0 serving, 2 prepared, the request needs 1"):
        await commit(service, 1, weights_pb2.WEIGHT_PAUSE_ABORT)
    assert scheduler.pauses == []
    assert weights.status.prepared_version == 2


async def test_a_status_is_of_one_moment_also_while_a_commit_runs() -> None:
    class Committing(ModelInfo):
        def state(self, weight_version: int) -> common_pb2.ModelState:
            weights.commit(1)
            return super().state(weight_version)

    weights = ServedWeights(ModelWeights(nn.Linear(1, 1, bias=False)), lambda _: None)
    prepare(weights, 1)
    target: Deferred[WeightTarget] = Deferred()
    target.set(WeightTarget(Committing("policy", "", 1, 1, "float32", "cpu"), weights))
    service = WeightServicer(target, RecordingScheduler(), WeightsConfig())
    for version, waiting in ((0, 1), (1, 0)):
        reply = await service.GetWeights(weights_pb2.GetWeightsRequest(), cast(Any, None))
        assert (reply.model.weight_version, reply.base_version, reply.prepared_version) == (version, version, waiting)


async def test_a_commit_that_is_repeated_while_it_runs_ends_as_it_does() -> None:
    class RepeatingStore(ModelWeights):
        def stage(self, received: ReceivedWeights) -> Install:
            install = super().stage(received)

            def repeat_and_install() -> None:
                asked.append(weights.would_change(1))
                install()

            return repeat_and_install

    asked: list[bool] = []
    weights = ServedWeights(RepeatingStore(nn.Linear(1, 1, bias=False)), lambda _: None)
    prepare(weights, 1)
    weights.commit(1)
    assert asked == [True]
    assert not weights.would_change(1)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 2_097_152])
def test_a_chunk_is_read_where_it_lies(size: int) -> None:
    message = weights_pb2.PrepareWeightsRequest(chunk=b"x" * size).SerializeToString()
    chunk = read_part(message)
    assert isinstance(chunk, memoryview)
    assert bytes(chunk) == b"x" * size
    # A field that a newer client may add, behind the chunk.
    later = read_part(message + b"\x78\x01")
    assert isinstance(later, memoryview)
    assert bytes(later) == b"x" * size


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (b"\x12\xff", "cannot be decoded"),
        (b"\x12\x05ab", "cannot be decoded"),
        (b"\x12", "cannot be decoded"),
        (b"\x12\x80", "cannot be decoded"),
        (b"\x12\x80\x80\x80\x80\x80\x80", "cannot be decoded"),
        (b"", "a chunk or checksums in every later message"),
        (
            weights_pb2.PrepareWeightsRequest(manifest=weights_pb2.WeightManifest()).SerializeToString(),
            "a chunk or checksums in",
        ),
    ],
)
def test_what_is_no_chunk_is_refused(message: bytes, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        read_part(message)


@pytest.mark.parametrize("where", ["uri", "collective"])
def test_checksums_that_would_follow_no_chunks_are_asked_for(where: str) -> None:
    spec = weights_pb2.TensorSpec(name="a", dtype=weights_pb2.TENSOR_DTYPE_FLOAT32, shape=[1], xxh3=0)
    manifest = weights_pb2.WeightManifest(weight_version=1, tensors=[spec])
    if where == "uri":
        manifest.uri = "file:///weights.safetensors"
    else:
        group = manifest.collective
        group.name, group.address, group.backend = "group", "trainer:1", "gloo"
        group.rank, group.world_size, group.bucket_bytes = 1, 2, 2**20
    assert read_manifest(manifest).tensors[0].xxh3 == 0
    manifest.checksums_follow = True
    with pytest.raises(InvalidArgument, match=r"manifest\.checksums_follow: found true"):
        read_manifest(manifest)


def test_a_silent_stream_ends() -> None:
    async def silent() -> AsyncIterator[bytes]:
        yield weights_pb2.PrepareWeightsRequest(manifest=weights_pb2.WeightManifest()).SerializeToString()
        await asyncio.sleep(60)

    async def read() -> None:
        stream = WeightStream(silent(), 0.05)
        await stream.manifest()
        async for _ in stream.messages():
            pass

    with pytest.raises(DeadlineExceeded, match=r"silent for 0.05 s after 1 messages"):
        asyncio.run(read())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tensors": [{"name": "a"}]}, "a.dtype: found 0, expected float32"),
        ({"tensors": [{"name": "a", "dtype": 1, "encoding": 7}]}, "a.encoding: found 7"),
        ({"tensors": [{"name": "a", "dtype": 1, "encoding": 2}]}, "manifest.base_version: found none"),
        ({"adapter": {"rank": 0, "alpha": 1.0, "target_modules": ["a"]}, "base_version": 1}, "adapter.rank"),
        ({"adapter": {"rank": 1, "alpha": 1.0}, "base_version": 1}, "adapter.target_modules"),
        ({"adapter": {"rank": 1, "alpha": float("nan"), "target_modules": ["a"]}, "base_version": 1}, "adapter.alpha"),
        ({"adapter": {"rank": 1, "alpha": 1.0, "target_modules": ["a"]}}, "manifest.base_version: found none"),
        (
            {
                "adapter": {"rank": 1, "alpha": 1.0, "target_modules": ["a"]},
                "base_version": 1,
                "tensors": [{"name": "a", "dtype": 1, "encoding": 3}],
            },
            "changes of an adapter's tensors",
        ),
    ],
)
def test_manifests_that_contradict_themselves(change: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        read_manifest(weights_pb2.WeightManifest(**change))  # pyright: ignore[reportArgumentType]


GROUP = {"name": "g", "address": "a:1", "backend": "gloo", "rank": 1, "world_size": 2, "bucket_bytes": 2**16}


@pytest.mark.parametrize(
    ("group", "beside", "words"),
    [
        ({}, {"uri": "file:///w"}, "manifest.collective: found a group beside a file or a relay"),
        ({}, {"relay": [{"target": "b:1"}]}, "manifest.collective: found a group beside a file or a relay"),
        (
            {},
            {"tensors": [{"name": "a", "dtype": 1, "encoding": 3}], "base_version": 1},
            "manifest.collective: found changes of tensors",
        ),
        ({"bucket_bytes": 2**16 - 1}, {}, "collective.bucket_bytes: found 65535"),
        ({"bucket_bytes": 2**30 + 1}, {}, "collective.bucket_bytes: found 1073741825"),
        ({"address": "1"}, {}, "collective.address: found '1'"),
        ({"address": "a:b"}, {}, "collective.address: found 'a:b'"),
        ({"address": "a:0"}, {}, "collective.address: found 'a:0'"),
        ({"address": "a:65536"}, {}, "collective.address: found 'a:65536'"),
        ({"name": ""}, {}, "collective.name: found none"),
    ],
)
def test_groups_that_cannot_be(group: dict[str, object], beside: dict[str, object], words: str) -> None:
    assert read_manifest(weights_pb2.WeightManifest(collective=GROUP)).collective is not None  # pyright: ignore
    with pytest.raises(InvalidArgument, match=words):
        read_manifest(weights_pb2.WeightManifest(collective={**GROUP, **group}, **beside))  # pyright: ignore


def test_the_scaling_of_an_adapter() -> None:
    def scaling(**changes: object) -> float:
        values = {"rank": 4, "alpha": 8.0, "target_modules": ["a"], **changes}
        manifest = read_manifest(weights_pb2.WeightManifest(adapter=values, base_version=1))  # pyright: ignore
        assert manifest.adapter is not None
        return manifest.adapter.scaling

    assert scaling() == 2.0
    assert scaling(rank_stabilized=True) == 4.0
