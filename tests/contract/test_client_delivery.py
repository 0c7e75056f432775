"""Retries, hedges, replicas, deadlines and cancellation over real gRPC, by both faces."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Protocol

import pytest
from google.protobuf.message import Message

from ppod import (
    AsyncGenerationClient,
    AsyncRewardClient,
    Cancelled,
    DeadlineExceeded,
    Delivery,
    FailedPrecondition,
    GenerationClient,
    HedgePolicy,
    InvalidArgument,
    ResourceExhausted,
    RetryPolicy,
    RewardClient,
    Sampling,
    Scores,
    SplitPolicy,
    Unavailable,
)
from ppod.channel import MAX_MESSAGE_BYTES
from ppod.client import NO_RETRY
from ppod.errors import FilterFailed, NonFiniteOutput, PpodError
from ppod.tensors import unpack_sequences
from ppod.v1 import common_pb2, generation_pb2
from support.processes import free_ports
from support.scripted_services import STATE, Script, scripted_server, token_score


class ScoreOnce(Protocol):
    """Scores sequences with a fresh client of either face."""

    def __call__(
        self, target: str, sequences: list[list[int]], *, delivery: Delivery | None = None, timeout_s: float = 10.0
    ) -> Scores: ...


def score_blocking(
    target: str, sequences: list[list[int]], *, delivery: Delivery | None = None, timeout_s: float = 10.0
) -> Scores:
    with RewardClient(target, delivery=delivery, timeout_s=timeout_s) as client:
        return client.score(sequences)


def score_awaited(
    target: str, sequences: list[list[int]], *, delivery: Delivery | None = None, timeout_s: float = 10.0
) -> Scores:
    async def call() -> Scores:
        async with AsyncRewardClient(target, delivery=delivery, timeout_s=timeout_s) as client:
            return await client.score(sequences)

    return asyncio.run(call())


both_faces = pytest.mark.parametrize("score", [score_blocking, score_awaited])


def value(sequence: list[int]) -> float:
    return token_score(sequence) + 2 * len(sequence)


def raising(errors: dict[int, Exception]) -> Callable[[Message, int], None]:
    def change(_: Message, number: int) -> None:
        if number in errors:
            raise errors[number]

    return change


@both_faces
def test_repeats_carry_the_same_request_id(score: ScoreOnce) -> None:
    script = Script(raising({1: Unavailable("starting"), 2: ResourceExhausted("full", 0.2)}))
    with scripted_server(script) as server:
        start = time.monotonic()
        assert score(server.target, [[1, 2]]).values[0] == value([1, 2])
        assert time.monotonic() - start >= 0.2
    ids = [request.request_id for request in script.requests]  # pyright: ignore
    assert len(ids) == 3
    assert len(set(ids)) == 1


@both_faces
def test_what_the_caller_did_wrong_is_not_repeated(score: ScoreOnce) -> None:
    script = Script(raising({1: InvalidArgument("tokens", "x", "y", 0)}))
    with scripted_server(script) as server, pytest.raises(InvalidArgument):
        score(server.target, [[1]])
    assert len(script.requests) == 1


@both_faces
def test_a_wait_that_the_deadline_forbids_is_refused_at_once(score: ScoreOnce) -> None:
    with scripted_server(Script(raising({1: ResourceExhausted("full", 5.0)}))) as server:
        start = time.monotonic()
        with pytest.raises(ResourceExhausted) as caught:
            score(server.target, [[1]], timeout_s=2.0)
        assert time.monotonic() - start < 1.5
    assert caught.value.retry_after_s == 5.0


@both_faces
def test_a_message_too_large_for_grpc_is_not_repeated(score: ScoreOnce) -> None:
    observed: list[str] = []
    with (
        scripted_server() as server,
        RewardClient(server.target, observer=lambda *call: observed.append(call[2])) as client,
        pytest.raises(ResourceExhausted, match=r"larger than max \([^;]*$"),
    ):
        client.score([[1] * (MAX_MESSAGE_BYTES // 4 + 1)])
    assert observed == ["RESOURCE_EXHAUSTED"]
    with scripted_server() as server, pytest.raises(ResourceExhausted):
        score(server.target, [[1] * (MAX_MESSAGE_BYTES // 4 + 1)])


@both_faces
def test_the_deadline_holds_and_nothing_stays_behind(score: ScoreOnce) -> None:
    release = threading.Event()
    with scripted_server(Script(lambda *_: release.wait(5) and None)) as server:
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            score(server.target, [[1]], timeout_s=0.3)
        assert 0.25 < time.monotonic() - start < 1.5
        release.set()


@both_faces
def test_a_dead_replica_is_skipped(score: ScoreOnce) -> None:
    [nobody] = free_ports(1)
    with scripted_server() as server:
        start = time.monotonic()
        for target in (f"127.0.0.1:{nobody},{server.target}", f"{server.target},127.0.0.1:{nobody}"):
            sequences = [[index] for index in range(30)]
            small = Delivery(retry=NO_RETRY, split=SplitPolicy(min_part_tokens=5, max_part_tokens=5))
            scores = score(target, sequences, delivery=small)
            assert scores.values.tolist() == [value(sequence) for sequence in sequences]
        assert time.monotonic() - start < 3


@both_faces
def test_all_replicas_share_a_request_and_rows_keep_their_order(score: ScoreOnce) -> None:
    scripts = [Script(lambda *_: time.sleep(0.02)) for _ in range(3)]
    with ExitStack() as stack:
        servers = [stack.enter_context(scripted_server(script)) for script in scripts]
        sequences = [[index, 7] for index in range(60)]
        small = Delivery(split=SplitPolicy(min_part_tokens=8, max_part_tokens=8))
        scores = score(",".join(server.target for server in servers), sequences, delivery=small)
    assert scores.values.tolist() == [value(sequence) for sequence in sequences]
    assert scores.breakdown is not None
    assert scores.breakdown.members[1].scores.tolist() == [2.0] * 60
    assert min(len(script.requests) for script in scripts) >= 3


@both_faces
def test_a_hedge_overtakes_a_slow_replica(score: ScoreOnce) -> None:
    slow = Script(lambda *_: time.sleep(2.0))
    hedge = Delivery(hedge=HedgePolicy(delay_s=0.1, max_extra_fraction=1.0))
    with scripted_server(slow) as stuck, scripted_server() as quick:
        start = time.monotonic()
        assert score(f"{stuck.target},{quick.target}", [[3]], delivery=hedge).values[0] == value([3])
        assert time.monotonic() - start < 1.5
        assert len(slow.requests) == 1, "the slow replica was asked first"


@both_faces
def test_replicas_of_different_versions_never_mix(score: ScoreOnce) -> None:
    newer = common_pb2.ModelState(model=STATE.model, weight_version=4, tokenizer_fingerprint="f" * 16)
    other = common_pb2.ModelState(model="another", weight_version=3, tokenizer_fingerprint="f" * 16)
    small = Delivery(split=SplitPolicy(min_part_tokens=4, max_part_tokens=4))
    sequences = [[index, 7] for index in range(12)]
    with scripted_server() as old, scripted_server(Script(state=newer)) as new:
        scores = score(f"{old.target},{new.target}", sequences, delivery=small)
        assert scores.state.weight_version == 4
        assert scores.breakdown is not None
        assert scores.breakdown.versions == (4, 4)
        assert scores.values.tolist() == [value(sequence) for sequence in sequences]
        assert old.script.requests, "it did answer, and was overruled"
    with scripted_server() as one, scripted_server(Script(state=other)) as two:
        with pytest.raises(FailedPrecondition) as caught:
            score(f"{one.target},{two.target}", sequences, delivery=small)
        assert caught.value.what == "model"


def test_a_replica_that_returns_is_found_by_its_health() -> None:
    [port] = free_ports(1)
    with scripted_server() as steady, RewardClient(f"127.0.0.1:{port},{steady.target}") as client:
        client.score([[1]])
        client.score([[1]])
        with scripted_server(port=port) as back:
            until = time.monotonic() + 20
            while not back.script.requests and time.monotonic() < until:
                client.score([[1]])
                time.sleep(0.05)
            assert back.script.requests


def test_a_draining_replica_gets_no_more_until_it_serves_again() -> None:
    script = Script(raising({1: Unavailable("draining")}))
    with scripted_server(script) as draining, scripted_server() as steady:
        draining.serving(False)
        with RewardClient(f"{draining.target},{steady.target}") as client:
            until = time.monotonic() + 1.5
            while time.monotonic() < until:
                client.score([[1]])
                time.sleep(0.01)
            assert len(script.requests) == 1
            draining.serving(True)
            until = time.monotonic() + 20
            while len(script.requests) == 1 and time.monotonic() < until:
                client.score([[1]])
                time.sleep(0.01)
            assert len(script.requests) > 1


def test_every_address_of_a_name_is_a_replica() -> None:
    with scripted_server() as server:
        port = server.target.rpartition(":")[2]
        with RewardClient(f"dns:///localhost:{port}") as client:
            assert client.score([[1]]).values[0] == value([1])
        with RewardClient("dns:///no-such-host.invalid:1", timeout_s=1) as client, pytest.raises(Unavailable):
            client.score([[1]])


def test_closing_ends_calls_under_way() -> None:
    release, arrived = threading.Event(), threading.Event()

    def block(*_: object) -> None:
        arrived.set()
        release.wait(10)

    with scripted_server(Script(block)) as server:
        client = RewardClient(server.target)
        errors: list[BaseException] = []

        def call() -> None:
            try:
                client.score([[1]])
            except Cancelled as error:
                errors.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        assert arrived.wait(5)
        client.close()
        thread.join(5)
        release.set()
        assert [type(error) for error in errors] == [Cancelled]
        with pytest.raises(Cancelled):
            client.score([[1]])


async def test_a_cancelled_task_cancels_its_call() -> None:
    ended = threading.Event()
    arrived = threading.Event()

    def block(*_: object) -> None:
        arrived.set()
        ended.wait(5)

    with scripted_server(Script(block)) as server:
        async with AsyncRewardClient(server.target) as client:
            task = asyncio.create_task(client.score([[1]]))
            await asyncio.to_thread(arrived.wait, 5)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            ended.set()
            assert client._core.shared.replicas.outstanding() == {server.target: 0}  # pyright: ignore
            assert (await client.score([[1]])).values[0] == value([1])


def break_after(count: int) -> Callable[[Message, int], None]:
    """End the first stream after so many completions."""
    return raising({count + 1: Unavailable("gone")})


async def _generate_awaited(target: str, seeds: list[int], delivery: Delivery) -> list[list[int]]:
    async with AsyncGenerationClient(target, delivery=delivery) as client:
        completions = await client.generate([[1], [2, 2], [3, 3, 3]], Sampling(max_tokens=2), seeds=seeds)
        return [each.token_ids.tolist() for each in completions]


def _generate_blocking(target: str, seeds: list[int], delivery: Delivery) -> list[list[int]]:
    with GenerationClient(target, delivery=delivery) as client:
        completions = client.generate([[1], [2, 2], [3, 3, 3]], Sampling(max_tokens=2), seeds=seeds)
        return [each.token_ids.tolist() for each in completions]


@pytest.mark.parametrize(
    "generate", [_generate_blocking, lambda *arguments: asyncio.run(_generate_awaited(*arguments))]
)
def test_a_broken_stream_with_seeds_is_resumed(
    generate: Callable[[str, list[int], Delivery], list[list[int]] | Awaitable[list[list[int]]]],
) -> None:
    patient = Delivery(retry=RetryPolicy(initial_backoff_s=0.01))
    script = Script(break_after(1))
    with scripted_server(script) as server:
        assert generate(server.target, [11, 22, 33], patient) == [[11, 1], [22, 2], [33, 3]]
    last = script.requests[-1]
    assert isinstance(last, generation_pb2.GenerateRequest)
    assert list(last.seeds) == [11, 22], "the third was there already"
    with scripted_server(Script(break_after(1))) as server, pytest.raises(Unavailable):
        generate(server.target, [], patient)
    with scripted_server(Script(break_after(0))) as server:
        assert generate(server.target, [], patient) == [[7, 1], [7, 2], [7, 3]]


@pytest.mark.parametrize("seeds", [[11, 22, 33], []], ids=["seeds", "no seeds"])
@pytest.mark.parametrize(
    "generate", [_generate_blocking, lambda *arguments: asyncio.run(_generate_awaited(*arguments))]
)
def test_a_stream_that_breaks_behind_its_last_completion_lacks_nothing(
    generate: Callable[[str, list[int], Delivery], list[list[int]]], seeds: list[int]
) -> None:
    script = Script(broken_end=Unavailable("gone"))
    with scripted_server(script) as server:
        found = generate(server.target, seeds, Delivery())
    assert found == [[seed, length] for seed, length in zip(seeds or [7, 7, 7], [1, 2, 3], strict=True)]
    assert len(script.of(generation_pb2.GenerateRequest)) == 3, "a reply for each prompt, and no second request"


def test_of_several_completions_only_those_that_are_missing_are_asked_for_again() -> None:
    """The first stream breaks after two of the third prompt and one of the second: no whole number of n is left."""
    patient = Delivery(retry=RetryPolicy(initial_backoff_s=0.01))
    script = Script(break_after(3))
    seeds = [11, 12, 21, 22, 31, 32]
    sampling = Sampling(max_tokens=2, n=2)
    with scripted_server(script) as server, GenerationClient(server.target, delivery=patient) as client:
        done = client.generate([[1], [2, 2], [3, 3, 3]], sampling, seeds=seeds)
    assert [(each.index, each.sample, each.seed) for each in done] == [
        (0, 0, 11), (0, 1, 12), (1, 0, 21), (1, 1, 22), (2, 0, 31), (2, 1, 32)
    ]  # fmt: skip
    assert [each.token_ids.tolist() for each in done] == [[11, 1], [12, 1], [21, 2], [22, 2], [31, 3], [32, 3]]
    last = script.requests[-1]
    assert isinstance(last, generation_pb2.GenerateRequest)
    assert (last.sampling.n, list(last.seeds)) == (1, [11, 12, 21])
    assert [each.tolist() for each in unpack_sequences(last.prompts, "prompts")] == [[1], [1], [2, 2]]


@pytest.mark.parametrize("error", [NonFiniteOutput("logits", 2, "nan"), FilterFailed("f", "raised", "no", 2)])
def test_an_error_of_what_is_asked_for_again_names_the_prompt_of_the_whole_request(error: PpodError) -> None:
    """Its sample 2 is the one that is missing of the second prompt, behind the two of the first."""
    patient = Delivery(retry=RetryPolicy(initial_backoff_s=0.01))
    script = Script(raising({4: Unavailable("gone"), 5: error}))
    with (
        scripted_server(script) as server,
        GenerationClient(server.target, delivery=patient) as client,
        pytest.raises(type(error)) as caught,
    ):
        client.generate([[1], [2], [3]], Sampling(max_tokens=2, n=2), seeds=[11, 12, 21, 22, 31, 32])
    assert getattr(caught.value, "sample", None) == 1
    assert list(script.of(generation_pb2.GenerateRequest)[-1].seeds) == [11, 12, 21]


def test_resumed_tokens_travel_with_their_prompts_when_asked_for_again() -> None:
    patient = Delivery(retry=RetryPolicy(initial_backoff_s=0.01))
    script = Script(break_after(1))
    with scripted_server(script) as server, GenerationClient(server.target, delivery=patient) as client:
        client.generate([[1], [2, 2], [3, 3, 3]], Sampling(max_tokens=2), seeds=[11, 22, 33], resumed_tokens=[1, 0, 3])
    requests = [request for request in script.requests if isinstance(request, generation_pb2.GenerateRequest)]
    assert [list(requests[0].resumed_tokens), list(requests[-1].resumed_tokens)] == [[1, 0, 3], [1, 0]]


def test_threads_share_a_client() -> None:
    with scripted_server() as one, scripted_server() as two:
        small = Delivery(split=SplitPolicy(min_part_tokens=2, max_part_tokens=4))
        with RewardClient(f"{one.target},{two.target}", delivery=small) as client:
            wrong: list[object] = []

            def work(base: int) -> None:
                for index in range(20):
                    sequences = [[base + index], [base, index, 1], [base]] * 3
                    found = client.score(sequences).values.tolist()
                    if found != [value(sequence) for sequence in sequences]:
                        wrong.append(found)

            threads = [threading.Thread(target=work, args=(100 * index,)) for index in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert wrong == []
            outstanding = client._core.shared.replicas.outstanding()  # pyright: ignore
            assert set(outstanding.values()) == {0}
