"""Every call of both faces of every client, over real gRPC, against numbers known by arithmetic."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator, Sequence

import numpy as np
import pytest

from ppod import (
    AsyncGenerationClient,
    AsyncReferenceClient,
    AsyncRewardAdminClient,
    AsyncRewardClient,
    ChatTurn,
    DeadlineExceeded,
    Delivery,
    GenerationClient,
    Granularity,
    InvalidArgument,
    Pin,
    Priority,
    ReferenceClient,
    RewardAdminClient,
    RewardClient,
    Sampling,
    Scores,
    SplitPolicy,
    Truncation,
    Unavailable,
)
from ppod.channel import ChannelSpec
from ppod.client import ReferenceLogprobs, Replacement, RewardKind
from ppod.v1 import common_pb2, generation_pb2, reference_pb2, reward_pb2
from support.processes import free_ports
from support.scripted_services import Script, ScriptedServer, scripted_server, token_score

SEQUENCES = [[1, 2, 3], [10], [4, 5]]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as running:
        yield running


@pytest.fixture
async def async_reward(server: ScriptedServer) -> AsyncIterator[AsyncRewardClient]:
    async with AsyncRewardClient(server.target) as client:
        yield client


def check_scores(scores: Scores, sequences: Sequence[Sequence[int]]) -> None:
    firsts = [token_score(list(tokens)) for tokens in sequences]
    assert scores.values.tolist() == [first + 2 * len(s) for first, s in zip(firsts, sequences, strict=True)]
    assert scores.truncated_tokens == (0,) * len(sequences)
    assert (scores.state.model, scores.state.weight_version) == ("arithmetic", 3)
    root = scores.breakdown
    assert root is not None
    assert (root.name, root.kind, root.weight, root.state) == ("whole", RewardKind.SUM, None, None)
    pair, length = root.members
    assert (pair.kind, pair.weight, pair.pessimism) == (RewardKind.ENSEMBLE, 1.0, 1.0)
    assert pair.mean is not None
    assert pair.std is not None
    assert pair.mean.tolist() == [first + 1 for first in firsts]
    assert pair.std.tolist() == [1.0] * len(sequences)
    assert [member.scores.tolist() for member in pair.members] == [firsts, [first + 2 for first in firsts]]
    assert pair.members[1].state == scores.state
    assert length.raw_scores is not None
    assert length.raw_scores.tolist() == [3 * len(tokens) + 1 for tokens in sequences]
    assert length.adjustment is not None
    assert (length.adjustment.mean, length.adjustment.std) == (1.0, 3.0)
    assert (length.adjustment.clip_low, length.adjustment.clip_high) == (None, 99.0)


def check_everything_travels(request: reward_pb2.ScoreRequest) -> None:
    assert request.request_id == "mine"
    assert request.priority == common_pb2.PRIORITY_HIGH
    assert list(request.references) == ["x", "y", "z"]
    assert request.truncation == reward_pb2.TRUNCATION_SIDE_LEFT
    assert request.selector.model == "arithmetic"


def test_scores_of_tokens(server: ScriptedServer) -> None:
    with RewardClient(server.target, pin=Pin(model="arithmetic")) as client:
        scores = client.score(
            SEQUENCES,
            prompt_lengths=[1, 0, 1],
            references=["x", "y", "z"],
            process=Granularity.TOKEN,
            truncation=Truncation.LEFT,
            priority=Priority.HIGH,
            request_id="mine",
        )
    check_scores(scores, SEQUENCES)
    assert scores.process is not None
    assert [each.tolist() for each in scores.process.positions] == [[2, 3], [1], [2]]
    found = [each.tolist() for each in scores.process.scores]
    assert found == [pytest.approx([0.2, 0.3]), pytest.approx([0.1]), pytest.approx([0.2])]
    [request] = server.script.requests
    assert isinstance(request, reward_pb2.ScoreRequest)
    check_everything_travels(request)
    assert list(request.prompt_lengths) == [1, 0, 1]


async def test_scores_of_tokens_with_asyncio(server: ScriptedServer, async_reward: AsyncRewardClient) -> None:
    async_reward.pin = Pin(model="arithmetic")
    scores = await async_reward.score(
        SEQUENCES,
        prompt_lengths=[1, 0, 1],
        references=["x", "y", "z"],
        process=Granularity.TOKEN,
        truncation=Truncation.LEFT,
        priority=Priority.HIGH,
        request_id="mine",
    )
    check_scores(scores, SEQUENCES)
    [request] = server.script.requests
    assert isinstance(request, reward_pb2.ScoreRequest)
    check_everything_travels(request)


TEXTS, PROMPTS = ["ab", "ä", "c"], ["p", "qq", ""]
CHATS = [[ChatTurn("user", "hi"), ChatTurn("assistant", "yo")], [ChatTurn("user", "")]]


async def test_texts_and_conversations(server: ScriptedServer, async_reward: AsyncRewardClient) -> None:
    joined = [list((prompt + text).encode()) for prompt, text in zip(PROMPTS, TEXTS, strict=True)]
    spoken = [list("".join(turn.role + turn.content for turn in chat).encode()) for chat in CHATS]
    with RewardClient(server.target) as client:
        check_scores(client.score_texts(TEXTS, prompts=PROMPTS), joined)
        check_scores(client.score_conversations(CHATS), spoken)
        steps = client.score_texts(TEXTS, process=Granularity.STEP).process
    check_scores(await async_reward.score_texts(TEXTS, prompts=PROMPTS), joined)
    check_scores(await async_reward.score_conversations(CHATS), spoken)
    assert steps is not None
    assert [each.tolist() for each in steps.positions] == [[2], [2], [1]]


async def test_rewards_are_listed(server: ScriptedServer, async_reward: AsyncRewardClient) -> None:
    with RewardClient(server.target) as client:
        rewards = client.list_rewards()
    assert await async_reward.list_rewards() == rewards
    whole, one, pair, two, length, exact = rewards
    assert [each.name for each in (pair, two, length)] == ["pair", "two", "length"]
    assert (whole.kind, whole.members, whole.weights) == (RewardKind.SUM, ("pair", "length"), (1.0, 2.0))
    assert (whole.limits, whole.state) == (None, None)
    assert one.limits is not None
    assert (one.limits.max_sequence_tokens, one.takes_tokens) == (64, True)
    assert exact.needs_references


def check_logprobs(found: ReferenceLogprobs) -> None:
    assert [each.tolist() for each in found.values] == [pytest.approx([-0.02, -0.03]), pytest.approx([-0.05])]
    assert found.entropies is not None
    assert [each.tolist() for each in found.entropies] == [pytest.approx([0.2, 0.3]), pytest.approx([0.5])]
    assert found.top is not None
    assert [each.tolist() for each in found.top.token_ids] == [[[0, 1, 2]] * 2, [[0, 1, 2]]]
    np.testing.assert_allclose(np.concatenate(found.top.logprobs), [[-0.1, -0.2, -0.3]] * 3, rtol=1e-6)


async def test_reference_logprobs_entropies_and_top_tokens(server: ScriptedServer) -> None:
    sequences, prompts = [[1, 2, 3], [4, 5]], [1, 1]
    with ReferenceClient(server.target) as client:
        check_logprobs(client.logprobs(sequences, prompts, entropy=True, top_k=3, priority=Priority.LOW))
        plain = client.logprobs(sequences, prompts, temperature=0.5)
    async with AsyncReferenceClient(server.target) as client:
        check_logprobs(await client.logprobs(sequences, prompts, entropy=True, top_k=3))
        assert (await client.describe()).limits.max_request_sequences == 8
    assert (plain.entropies, plain.top) == (None, None)
    first, second, *_ = server.script.of(reference_pb2.ComputeLogprobsRequest)
    assert isinstance(first, reference_pb2.ComputeLogprobsRequest)
    assert isinstance(second, reference_pb2.ComputeLogprobsRequest)
    assert (first.priority, second.temperature) == (common_pb2.PRIORITY_LOW, 0.5)


async def test_generation_streams_and_sorts(server: ScriptedServer) -> None:
    prompts, seeds = [[1], [2, 2], [3, 3, 3]], [11, 22, 33]
    sampling = Sampling(max_tokens=4)
    with GenerationClient(server.target) as client:
        assert [each.index for each in client.stream(prompts, sampling, seeds=seeds)] == [2, 1, 0]
        done = client.generate(prompts, sampling, seeds=seeds)
    async with AsyncGenerationClient(server.target) as client:
        assert [each.index async for each in client.stream(prompts, sampling, seeds=seeds)] == [2, 1, 0]
        again = await client.generate(prompts, sampling, seeds=seeds)
    for completions in (done, again):
        assert [each.token_ids.tolist() for each in completions] == [[11, 1], [22, 2], [33, 3]]
    assert {type(request) for request in server.script.requests} == {generation_pb2.GenerateRequest}


@pytest.mark.parametrize(
    ("sampling", "options", "message"),
    [
        (Sampling(max_tokens=-1), {}, "sampling.max_tokens: found -1, expected 0 to 4294967295"),
        (Sampling(2, stop_token_ids=(3, 2**32)), {}, "sampling.stop_token_ids: found 4294967296, expected"),
        (Sampling(2, logit_bias={-7: 1.0}), {}, "sampling.logit_bias: found -7, expected"),
        (Sampling(2), {"seeds": [1, 2**64]}, "seeds: found 18446744073709551616, expected 0 to 18446744073709551615"),
        (Sampling(2), {"resumed_tokens": [0, -1]}, "resumed_tokens: found -1, expected"),
    ],
)
def test_numbers_that_the_contract_does_not_hold_are_typed_errors(
    server: ScriptedServer, sampling: Sampling, options: dict[str, list[int]], message: str
) -> None:
    with GenerationClient(server.target) as client, pytest.raises(InvalidArgument) as caught:
        client.generate(
            [[1], [2]], sampling, seeds=options.get("seeds", ()), resumed_tokens=options.get("resumed_tokens", ())
        )
    assert str(caught.value).startswith(message)
    assert not server.script.of(generation_pb2.GenerateRequest)


async def test_models_are_replaced(server: ScriptedServer) -> None:
    with RewardAdminClient(server.target) as client:
        replaced = client.replace_model(Replacement("one", source="new", weight_version=9))
    assert (replaced.state.weight_version, replaced.load_s) == (9, 1.5)
    async with AsyncRewardAdminClient(server.target) as client:
        assert (await client.replace_model(Replacement("one"))).state.weight_version == 4


def test_a_replacement_that_may_have_happened_is_not_repeated() -> None:
    def break_off(*_: object) -> None:
        raise Unavailable("the connection broke")

    script = Script(break_off)
    with (
        scripted_server(script) as server,
        RewardAdminClient(server.target) as client,
        pytest.raises(Unavailable),
    ):
        client.replace_model(Replacement("one"))
    assert len(script.requests) == 1


async def test_many_awaited_calls_share_a_client(async_reward: AsyncRewardClient) -> None:
    results = await asyncio.gather(*(async_reward.score([[index]]) for index in range(200)))
    assert [scores.values[0] for scores in results] == [index * 0.5 + 1 + 2 for index in range(200)]


def test_a_lone_request_is_one_rpc(server: ScriptedServer) -> None:
    with RewardClient(server.target) as client:
        client.score(SEQUENCES)
    assert len(server.script.requests) == 1


async def test_a_request_beyond_the_limit_is_split(server: ScriptedServer, async_reward: AsyncRewardClient) -> None:
    """The server takes 8 sequences: refused once, asked for its limits, then 8, 8 and 4; from then on at once."""
    sequences = [[index, 1] for index in range(20)]
    with RewardClient(server.target) as client:
        check_scores(client.score(sequences), sequences)
        counts = [len(each.tokens.lengths) for each in server.script.of(reward_pb2.ScoreRequest)]  # pyright: ignore
        assert sorted(counts) == [4, 8, 8]
        check_scores(client.score_texts([chr(97 + index) for index in range(20)]), [[97 + i] for i in range(20)])
        client.score_conversations(CHATS * 10)
    ids = [request.request_id for request in server.script.of(reward_pb2.ScoreRequest)]  # pyright: ignore
    assert len(set(ids)) == len(ids)
    check_scores(await async_reward.score(sequences), sequences)


async def test_parts_of_reference_and_process_are_joined(server: ScriptedServer) -> None:
    tiny = Delivery(split=SplitPolicy(min_part_tokens=3, max_part_tokens=3))
    with scripted_server(Script()) as other:
        both = f"{server.target},{other.target}"
        sequences = [[1, 2, 3], [4, 5], [7, 8, 9], [6, 6, 6]]
        with ReferenceClient(both, delivery=tiny) as client:
            found = client.logprobs(sequences, [1, 1, 2, 1], entropy=True, top_k=2)
        assert [each.tolist() for each in found.values] == [
            pytest.approx(values) for values in ([-0.02, -0.03], [-0.05], [-0.09], [-0.06, -0.06])
        ]
        assert found.entropies is not None
        assert [len(each) for each in found.entropies] == [2, 1, 1, 2]
        assert found.top is not None
        assert [each.shape for each in found.top.token_ids] == [(2, 2), (1, 2), (1, 2), (2, 2)]
        assert found.timing.tokens == 7 * 4, "four parts"
        async with AsyncRewardClient(both, delivery=tiny) as client:
            scores = await client.score(sequences, process=Granularity.TOKEN, prompt_lengths=[1, 0, 0, 2])
        check_scores(scores, sequences)
        assert scores.process is not None
        assert [each.tolist() for each in scores.process.positions] == [[2, 3], [1, 2], [1, 2, 3], [3]]
        assert server.script.requests
        assert other.script.requests


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("A joy.", {}, "texts: found one text, 'A joy.', expected a sequence of texts"),
        (["a", "caf\udce9"], {}, r"texts, sample 1: found '\udce9' at character 3, expected Unicode text"),
        (["a"], {"prompts": "b"}, "texts.prompts: found one text"),
        (["a"], {"references": ["\udce9"]}, "references, sample 0: found"),
    ],
)
def test_texts_that_are_none_are_typed_errors(
    server: ScriptedServer, texts: Sequence[str], options: dict[str, Sequence[str]], message: str
) -> None:
    with RewardClient(server.target) as client, pytest.raises(InvalidArgument) as caught:
        client.score_texts(texts, prompts=options.get("prompts", ()), references=options.get("references", ()))
    assert str(caught.value).startswith(message)
    assert not server.script.of(reward_pb2.ScoreRequest)


def test_a_conversation_and_stop_texts_are_checked_too(server: ScriptedServer) -> None:
    turns = [ChatTurn("user", "Hi"), ChatTurn("assistant", "\udce9")]
    with RewardClient(server.target) as client, pytest.raises(InvalidArgument, match="conversations, sample 1: found"):
        client.score_conversations([[ChatTurn("user", "Hi")], turns])
    stop: tuple[str, ...] = "END"  # pyright: ignore[reportAssignmentType]
    with GenerationClient(server.target) as client, pytest.raises(InvalidArgument, match="stop: found one text, 'END'"):
        client.generate([[1]], Sampling(2, stop=stop))


async def test_a_call_that_has_no_time_left_is_not_sent(
    server: ScriptedServer, async_reward: AsyncRewardClient
) -> None:
    """Zero seconds, as of a caller's own deadline that has passed, are not the client's default."""
    with RewardClient(server.target) as client, pytest.raises(DeadlineExceeded):
        client.score(SEQUENCES, timeout_s=0.0)
    with pytest.raises(DeadlineExceeded):
        await async_reward.score(SEQUENCES, timeout_s=0.0)
    assert server.script.requests == []


def test_a_pod_is_not_asked_through_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there for hubs, and knows no way to addresses inside a cluster."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Sends nothing: it only asks which address of this machine leads out.
        probe.connect(("10.255.255.255", 9))
        host = probe.getsockname()[0]
    [port] = free_ports(1)
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "")
    with scripted_server(host=host) as server, RewardClient(f"{host}:{server.port}", timeout_s=10) as client:
        assert client.score([[1]]).values.tolist() == [3.5]


@pytest.mark.parametrize(
    ("target", "direct"),
    [
        ("10.1.2.3:50051", True),
        ("[fd00::1]:50051", True),
        ("ipv4:100.64.0.9:50051", True),
        ("127.0.0.1:50051", True),
        ("8.8.8.8:50051", False),
        ("reward.example:50051", False),
    ],
)
def test_addresses_that_the_internet_does_not_lead_to_have_no_proxy(target: str, direct: bool) -> None:
    assert (("grpc.enable_http_proxy", 0) in ChannelSpec(target).options()) is direct
