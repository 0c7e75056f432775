"""New weights for running services: swapped whole, or not at all."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch

from ppod import (
    Completion,
    FailedPrecondition,
    GenerationClient,
    InvalidArgument,
    NonFiniteOutput,
    PpodError,
    ReferenceClient,
    ResourceExhausted,
    WeightClient,
)
from ppod.client import WeightPush, WeightTensor, weight_calls
from ppod.v1 import weights_pb2, weights_pb2_grpc
from support.processes import ServiceProcess, metrics_of, running_service
from support.services import tiny_model_config
from support.tiny_model import build_model
from support.weight_checks import GREEDY, PROMPTS, greedy_tokens
from support.weight_tensors import weight_tensor, weight_tensors


@pytest.fixture
def weights(service: ServiceProcess) -> Iterator[WeightClient]:
    with WeightClient(service.admin_target) as client:
        yield client


@pytest.fixture(scope="module")
def service(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    values = {"model": tiny_model_config(tiny_model_dir)}
    with running_service("ppod_services.generation", tmp_path_factory.mktemp("weights"), values) as up:
        yield up


def complete(service: ServiceProcess) -> list[Completion]:
    with GenerationClient(service.target) as client:
        return client.generate(PROMPTS, GREEDY)


def serving_version(weights: WeightClient) -> int:
    return weights.status().state.weight_version


def next_version(weights: WeightClient) -> int:
    return serving_version(weights) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_commit_changes_outputs_and_version(
    service: ServiceProcess, weights: WeightClient, dtype: torch.dtype
) -> None:
    version = next_version(weights)
    before = complete(service)
    model = build_model(seed=100 + version)
    tensors = weight_tensors(model, dtype)
    assert weights.prepare(version, tensors) == sum(len(tensor.data) for tensor in tensors)
    assert weights.status().prepared_version == version
    assert [done.token_ids.tolist() for done in complete(service)] == [done.token_ids.tolist() for done in before]
    assert weights.commit(version) >= 0
    assert weights.status().prepared_version is None
    after = complete(service)
    assert {done.state.weight_version for done in after} == {version}
    served = model if dtype is torch.float32 else model.to(dtype).float()
    assert [done.token_ids.tolist() for done in after] == greedy_tokens(served)
    assert f"ppod_weight_version {version}.0" in metrics_of(service)
    # A repeated commit of the serving version succeeds; the samples stay.
    weights.commit(version)
    assert serving_version(weights) == version


def corrupt(tensors: list[WeightTensor], name: str) -> list[weights_pb2.PrepareWeightsRequest]:
    """The messages of a good transfer, its chunks as one, with one byte of one tensor turned over."""
    manifest, *chunks, checksums = map(
        weights_pb2.PrepareWeightsRequest.FromString, weight_calls.messages(WeightPush(10_000, tensors))
    )
    data = bytearray(b"".join(part.chunk for part in chunks))
    start = sum(len(tensor.data) for tensor in tensors[: [tensor.name for tensor in tensors].index(name)])
    data[start] ^= 1
    return [manifest, weights_pb2.PrepareWeightsRequest(chunk=bytes(data)), checksums]


def refused(
    service: ServiceProcess, weights: WeightClient, error: type[PpodError], tensors: list[WeightTensor], version: int
) -> PpodError:
    """Prepare must raise; and the old weights must serve as if nothing had been."""
    tokens = [done.token_ids.tolist() for done in complete(service)]
    serving = serving_version(weights)
    with pytest.raises(error) as caught:
        weights.prepare(version, tensors)
    assert weights.status().prepared_version is None
    assert serving_version(weights) == serving
    assert [done.token_ids.tolist() for done in complete(service)] == tokens
    return caught.value


def test_manifests_that_do_not_fit(service: ServiceProcess, weights: WeightClient) -> None:
    tensors = weight_tensors(build_model(seed=7))
    version = next_version(weights)
    first = tensors[0]
    cases: list[tuple[list[WeightTensor], str]] = [
        (tensors[:-1], "1 missing"),
        ([*tensors, first], "twice"),
        ([dataclasses.replace(first, name="model.nothing"), *tensors[1:]], "model.nothing"),
        ([dataclasses.replace(first, shape=(64, 320)), *tensors[1:]], r"\[64, 320\]"),
    ]
    for manifest, words in cases:
        error = refused(service, weights, InvalidArgument, manifest, version)
        assert words.replace("\\", "") in str(error)


def test_an_old_version_is_refused(service: ServiceProcess, weights: WeightClient) -> None:
    error = refused(service, weights, FailedPrecondition, weight_tensors(build_model(seed=7)), serving_version(weights))
    assert isinstance(error, FailedPrecondition)
    assert error.what == "weight_version"


def test_an_unprepared_version_cannot_be_committed(weights: WeightClient) -> None:
    with pytest.raises(FailedPrecondition, match="none prepared"):
        weights.commit(next_version(weights))


def raw_prepare(service: ServiceProcess, parts: list[weights_pb2.PrepareWeightsRequest]) -> grpc.RpcError:
    with grpc.insecure_channel(service.admin_target) as channel, pytest.raises(grpc.RpcError) as caught:
        weights_pb2_grpc.WeightServiceStub(channel).PrepareWeights(iter(parts))
    return caught.value


def test_damaged_and_incomplete_streams_leave_nothing(service: ServiceProcess, weights: WeightClient) -> None:
    tokens = [done.token_ids.tolist() for done in complete(service)]
    tensors = weight_tensors(build_model(seed=8))
    flipped = corrupt(tensors, "model.layers.1.mlp.up_proj.weight")
    manifest, _, checksums = corrupt(tensors, tensors[0].name)
    whole = weights_pb2.PrepareWeightsRequest(chunk=b"".join(bytes(tensor.data) for tensor in tensors))
    chunk = weights_pb2.PrepareWeightsRequest
    fewer = chunk(checksums=weights_pb2.WeightChecksums(xxh3=checksums.checksums.xxh3[:-1]))
    count = len(tensors)
    first = weights_pb2.PrepareWeightsRequest()
    first.CopyFrom(manifest)
    first.manifest.checksums_follow = False
    cases = [
        (flipped, "model.layers.1.mlp.up_proj.weight.xxh3"),
        ([first, whole], f"{tensors[0].name}.xxh3"),
        ([manifest, chunk(chunk=whole.chunk[:-1])], "end of the chunks"),
        ([manifest, chunk(chunk=whole.chunk[:-1]), checksums], "end of the chunks"),
        ([manifest, whole], f"checksums: found end of stream, expected {count}"),
        ([manifest, whole, fewer], f"checksums: found {count - 1}, expected {count}"),
        ([manifest, whole, checksums, checksums], f"checksums: found {count}, expected 0"),
        ([manifest, whole, checksums, chunk(chunk=b"x")], "1 bytes more"),
        ([manifest, whole, chunk(chunk=b"x")], "1 bytes more"),
        ([manifest, manifest], "a chunk or checksums in every later message"),
        ([whole], "the manifest in the first message"),
        ([], "empty stream"),
        ([weights_pb2.PrepareWeightsRequest()], "nothing"),
    ]
    for parts, words in cases:
        error = raw_prepare(service, parts)
        assert isinstance(error, grpc.Call)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in (error.details() or "")
        assert weights.status().prepared_version is None
    assert [done.token_ids.tolist() for done in complete(service)] == tokens


def test_a_broken_stream_leaves_nothing_and_blocks_nobody(service: ServiceProcess, weights: WeightClient) -> None:
    tensors = weight_tensors(build_model(seed=9))
    manifest, whole, _ = corrupt(tensors, tensors[0].name)
    hold = threading.Event()
    begun = threading.Event()

    def parts() -> Iterator[weights_pb2.PrepareWeightsRequest]:
        yield manifest
        yield weights_pb2.PrepareWeightsRequest(chunk=whole.chunk[:1000])
        begun.set()
        hold.wait(20)

    with grpc.insecure_channel(service.admin_target) as channel:
        call = weights_pb2_grpc.WeightServiceStub(channel).PrepareWeights.future(parts())
        assert begun.wait(10)
        version = next_version(weights)
        # While one transfer is under way a second one would need its buffers twice.
        deadline = threading.Event()
        for _ in range(50):
            try:
                weights.prepare(version, tensors)
            except ResourceExhausted:
                break
            deadline.wait(0.05)
        else:
            pytest.fail("two transfers at once were let in")
        call.cancel()
    hold.set()
    for _ in range(100):
        try:
            weights.prepare(version, tensors)
            break
        except ResourceExhausted:
            deadline.wait(0.05)
    assert weights.status().prepared_version == version
    weights.commit(version)
    assert serving_version(weights) == version


def test_a_commit_during_generation_never_mixes_versions(service: ServiceProcess, weights: WeightClient) -> None:
    """Each completion must be the greedy one of exactly the version that it is tagged with."""
    expected = {serving_version(weights): [done.token_ids.tolist() for done in complete(service)]}
    stop = threading.Event()
    seen: list[Completion] = []

    def keep_asking() -> None:
        while not stop.is_set():
            seen.extend(complete(service))

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        for seed in (21, 22, 23):
            version = next_version(weights)
            model = build_model(seed=seed)
            expected[version] = greedy_tokens(model)
            weights.prepare(version, weight_tensors(model))
            weights.commit(version)
    finally:
        stop.set()
        asking.join()
    assert len({done.state.weight_version for done in seen}) > 1
    for done in seen:
        assert done.token_ids.tolist() == expected[done.state.weight_version][done.index]


def test_a_pinned_version_is_held_after_a_commit(service: ServiceProcess, weights: WeightClient) -> None:
    version = next_version(weights)
    weights.prepare(version, weight_tensors(build_model(seed=31)))
    weights.commit(version)
    with GenerationClient(service.target) as client:
        assert client.generate(PROMPTS, GREEDY, weight_version=version)[0].state.weight_version == version
        with pytest.raises(FailedPrecondition):
            client.generate(PROMPTS, GREEDY, weight_version=version - 1)


def test_weights_that_give_nan_fail_the_sample_by_name(service: ServiceProcess, weights: WeightClient) -> None:
    model = build_model(seed=32)
    tensors = weight_tensors(model)
    embedding = model.get_parameter("model.embed_tokens.weight").detach().clone()
    embedding[9] = torch.nan
    tensors[0] = weight_tensor(tensors[0].name, embedding)
    version = next_version(weights)
    weights.prepare(version, tensors)
    weights.commit(version)
    with GenerationClient(service.target) as client, pytest.raises(NonFiniteOutput) as caught:
        client.generate(PROMPTS, GREEDY)
    assert caught.value.output == "logits"
    weights.prepare(version + 1, weight_tensors(build_model()))
    weights.commit(version + 1)
    assert [done.token_ids.tolist() for done in complete(service)] == greedy_tokens(build_model())


def test_the_reference_is_refreshed_by_version(reference_service: ServiceProcess) -> None:
    """Restores the first weights, because other tests share the service; the version stays."""
    tokens, prompt_length = [5, 6, 7, 8], 1

    def naive(model: torch.nn.Module) -> np.ndarray:
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), dim=-1)
        return np.array([float(logprobs[at - 1, tokens[at]]) for at in range(prompt_length, len(tokens))])

    with WeightClient(reference_service.admin_target) as weights, ReferenceClient(reference_service.target) as client:
        for version, seed in ((1, 40), (2, 0)):
            model = build_model(seed=seed)
            weights.prepare(version, weight_tensors(model))
            weights.commit(version)
            reply = client.logprobs([tokens], [prompt_length])
            assert reply.state.weight_version == version
            np.testing.assert_allclose(reply.values[0], naive(model), atol=1e-5)
