"""Functions, ensembles and sums behind the service; what a failing member does."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from ppod import DeadlineExceeded, InvalidArgument, NonFiniteOutput, NotFound, PpodError, RewardFailed
from ppod.errors import FailedPrecondition
from ppod.v1 import reward_pb2, reward_pb2_grpc

from .conftest import Zoo
from .reward_calls import STEP, TOKEN, failure, floats, of_chats, of_texts, of_tokens, score, way_of, with_process

TEXTS = ["good", "so long", "a"]


def test_functions_score_texts_tokens_and_conversations(zoo: Zoo) -> None:
    assert floats(score(zoo.service, of_texts(TEXTS), "length").scores) == [-1.0, -4.0, 0.0]
    ids = [list(text.encode()) for text in ("abcdef", "abc")]
    # Byte-level ids are not bytes: both texts are what the service's tokenizer makes of them.
    assert len(floats(score(zoo.service, of_tokens(ids, [2, 2]), "length").scores)) == 2
    chat = [("user", "a long question"), ("assistant", "abcd")]
    assert floats(score(zoo.service, of_chats(chat), "length").scores) == [-1.0]
    prompt = score(zoo.service, of_chats([*chat, ("assistant", "prompt ")]), "scripted")
    assert floats(prompt.scores) == [len("user: a long question\nassistant: abcd")]


def test_the_prompt_is_not_scored_with_token_ids(zoo: Zoo) -> None:
    ids = [64 + index for index in range(10)]
    assert floats(score(zoo.service, of_tokens([ids, ids], [4, 9]), "length").scores) == [-3.0, 0.0]


def test_a_function_that_compares_needs_references(zoo: Zoo) -> None:
    reply = score(zoo.service, of_texts(["4", " 4 ", "5"], references=["4", "4", "4"]), "answer")
    assert floats(reply.scores) == [1.0, 1.0, 0.0]
    missing = failure(zoo.service, of_texts(["4"]), "answer")
    assert isinstance(missing, InvalidArgument)
    assert missing.field == "references"
    few = failure(zoo.service, of_texts(["4", "5"], references=["4"]), "answer")
    assert isinstance(few, InvalidArgument)
    assert few.field == "references"


def test_an_ensemble_and_a_sum_by_hand(zoo: Zoo) -> None:
    request = of_tokens([[10, 11], [72, 101, 108, 108, 111], [7]])
    parts = {name: np.asarray(floats(score(zoo.service, request, name).scores)) for name in ("first", "second")}
    parts["decoder"] = np.asarray(floats(score(zoo.service, request, "decoder").scores))
    stacked = np.stack(list(parts.values()))
    mean, std = stacked.mean(axis=0), stacked.std(axis=0)
    reply = score(zoo.service, request, "sum")
    ensemble, length, first = reply.breakdown.members
    assert (reply.breakdown.kind, ensemble.kind, length.kind, first.kind) == (
        reward_pb2.REWARD_KIND_SUM,
        reward_pb2.REWARD_KIND_ENSEMBLE,
        reward_pb2.REWARD_KIND_FUNCTION,
        reward_pb2.REWARD_KIND_MODEL,
    )
    assert [part.weight for part in reply.breakdown.members] == [2.0, 0.25, -1.0]
    assert floats(ensemble.mean) == pytest.approx(mean.tolist(), abs=2e-5)
    assert floats(ensemble.std) == pytest.approx(std.tolist(), abs=2e-5)
    assert ensemble.pessimism == 0.5
    assert floats(ensemble.scores) == pytest.approx((mean - 0.5 * std).tolist(), abs=2e-5)
    assert [member.name for member in ensemble.members] == ["first", "second", "decoder"]
    assert not any(member.HasField("weight") for member in ensemble.members)
    by_hand = (
        2.0 * np.asarray(floats(ensemble.scores)) + 0.25 * np.asarray(floats(length.scores)) - floats(first.scores)
    )
    assert floats(reply.scores) == pytest.approx(by_hand.tolist(), abs=1e-6)
    assert floats(reply.breakdown.raw_scores) == floats(reply.scores)
    assert (reply.model.model, reply.model.weight_version) == ("sum", 0)
    assert reply.model.tokenizer_fingerprint == first.model.tokenizer_fingerprint
    assert first.scores == ensemble.members[0].scores
    # "first" is a member twice, and was computed once: eight tokens for each of three models.
    assert reply.timing.tokens == 3 * 8


def test_the_way_of_a_function_is_the_score_of_each_prefix(zoo: Zoo) -> None:
    [way] = way_of(score(zoo.service, with_process(of_texts(["ab\ncdef\n"]), STEP), "length"))
    assert way == [(3, 0.0), (8, -5.0)]
    refused = failure(zoo.service, with_process(of_texts(["ab"]), TOKEN), "length")
    assert isinstance(refused, InvalidArgument)
    assert refused.field == "process"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("raise it", "RuntimeError: cannot score it"),
        ("text", "returned '3', expected a number"),
        ("exit", "exit code 7"),
        ("sleep 30", "no score after 2 s"),
    ],
)
def test_a_function_that_gives_no_score_fails_its_request_and_is_replaced(zoo: Zoo, text: str, words: str) -> None:
    error = failure(zoo.service, of_texts(["1", "2", text, "3"]), "scripted")
    assert isinstance(error, RewardFailed)
    assert (error.reward, error.sample) == ("scripted", 2)
    assert words in error.found
    assert floats(score(zoo.service, of_texts(["1.5", "print me"]), "scripted").scores) == [1.5, 1.0]


def test_nan_from_a_function_is_withheld(zoo: Zoo) -> None:
    error = failure(zoo.service, of_texts(["1", "nan"]), "scripted")
    assert isinstance(error, NonFiniteOutput)
    assert (error.output, error.sample, error.found) == ("score of 'scripted'", 1, "nan")
    assert "or at the function" in str(error)


def test_a_regular_expression_that_backtracks_for_ever_is_stopped_and_holds_up_nobody_else(zoo: Zoo) -> None:
    evil = "a" * 64 + "!"
    waits: list[float] = []
    with ThreadPoolExecutor(1) as pool:
        start = time.monotonic()
        hanging = pool.submit(failure, zoo.service, of_texts(["aa", evil]), "backtracking")
        while not hanging.done():
            begun = time.monotonic()
            score(zoo.service, of_tokens([[1, 2, 3]]), "first")
            waits.append(time.monotonic() - begun)
        error = hanging.result()
    assert isinstance(error, RewardFailed)
    assert (error.reward, error.sample) == ("backtracking", 1)
    assert 1.0 <= time.monotonic() - start < 8.0
    assert len(waits) > 10
    assert sorted(waits)[len(waits) // 2] < 0.2
    assert floats(score(zoo.service, of_texts(["aaa", "b"]), "backtracking").scores) == [1.0, 0.0]


def test_a_failing_member_fails_the_request(zoo: Zoo) -> None:
    assert floats(score(zoo.service, of_texts(["5"]), "fragile").breakdown.members[1].scores) == [5.0]
    error = failure(zoo.service, of_texts(["5", "raise me"]), "fragile")
    assert isinstance(error, RewardFailed)
    assert (error.reward, error.sample) == ("scripted", 1)


def test_one_deadline_holds_for_all_members(zoo: Zoo) -> None:
    start = time.monotonic()
    error = failure(zoo.service, of_texts(["sleep 1.5"]), "fragile", timeout_s=0.5)
    assert isinstance(error, DeadlineExceeded)
    assert time.monotonic() - start < 1.2


def test_callers_that_go_away_leave_nothing_behind(zoo: Zoo) -> None:
    with grpc.insecure_channel(zoo.service.target) as channel:
        request = of_texts(["sleep 1"] * 4)
        request.selector.model = "fragile"
        call = reward_pb2_grpc.RewardServiceStub(channel).Score.future(request, timeout=30)
        threading.Timer(0.3, call.cancel).start()
        with pytest.raises(grpc.FutureCancelledError):
            call.result()
    start = time.monotonic()
    assert floats(score(zoo.service, of_texts(["2"]), "scripted").scores) == [2.0]
    # The two processes finish what they have begun, the rest was dropped.
    assert time.monotonic() - start < 5.0


def test_the_service_lists_and_describes_its_rewards(zoo: Zoo) -> None:
    with grpc.insecure_channel(zoo.service.target) as channel:
        stub = reward_pb2_grpc.RewardServiceStub(channel)
        listed = stub.ListRewards(reward_pb2.ListRewardsRequest(), timeout=10).rewards
        one = stub.GetRewardModel(reward_pb2.GetRewardModelRequest(selector={"model": "sum"}), timeout=10)
    by_name = {reward.name: reward for reward in listed}
    assert listed[0].name == "first"
    assert by_name["process"].kind == reward_pb2.REWARD_KIND_PROCESS_MODEL
    assert (list(by_name["sum"].members), list(by_name["sum"].weights)) == (
        ["ensemble", "length", "first"],
        [2, 0.25, -1],
    )
    assert by_name["ensemble"].pessimism == 0.5
    assert by_name["scaled"].adjustment.std == 2.0
    assert by_name["answer"].needs_references
    assert by_name["length"].takes_tokens
    assert not by_name["length"].HasField("model")
    assert by_name["encoder"].limits.max_sequence_tokens == 96
    assert one.description == by_name["sum"]
    assert (one.model.model, one.limits.vocab_size, one.limits.max_sequence_tokens) == ("sum", 320, 128)
    assert one.model.tokenizer_fingerprint == by_name["first"].model.tokenizer_fingerprint


def pinned(request: reward_pb2.ScoreRequest, fingerprint: str) -> reward_pb2.ScoreRequest:
    request.selector.tokenizer_fingerprint = fingerprint
    return request


def test_a_tokenizer_that_nothing_here_knows_is_refused(zoo: Zoo) -> None:
    name_it = "name its source under the service's tokenizers"
    ways = {"first": f"{name_it} and ask for a sum of one term, this reward", "sum": name_it, "length": name_it}
    for name, way in ways.items():
        error = failure(zoo.service, pinned(of_tokens([[1]]), "0" * 16), name)
        assert isinstance(error, FailedPrecondition)
        assert error.what == "tokenizer"
        assert error.expected == f"{'0' * 16}; to have {name} score its ids, {way}"
    encoder = score(zoo.service, of_texts(["x"]), "encoder").model.tokenizer_fingerprint
    # The encoder's ids of "abcd", with its special tokens.
    ids = [0, 68, 69, 70, 71, 1]
    reply = score(zoo.service, pinned(of_tokens([ids]), encoder), "length")
    assert (floats(reply.scores), reply.model.tokenizer_fingerprint) == ([-1.0], encoder)


@pytest.mark.parametrize(
    ("request_", "field", "sample"),
    [
        (reward_pb2.ScoreRequest(), "input", None),
        (of_tokens([[1, 2], [3]], [1]), "prompt_lengths", None),
        (of_tokens([[1, 2], [3]], [1, 1]), "prompt_lengths", 1),
        (of_texts(["a"], ["p", "q"]), "texts.prompts", None),
        (of_texts(["a", ""], ["p", "q"]), "texts.texts", 1),
        (reward_pb2.ScoreRequest(texts={"texts": ["a"]}, prompt_lengths=[1]), "prompt_lengths", None),
        (of_chats([("user", "a")], []), "conversations", 1),
        (of_chats([("", "a")]), "conversations.messages.role", 0),
        (reward_pb2.ScoreRequest(texts={"texts": ["a"]}, truncation=9), "truncation", None),  # type: ignore[arg-type]
        (reward_pb2.ScoreRequest(texts={"texts": ["a"]}, process=9), "process", None),  # type: ignore[arg-type]
        (reward_pb2.ScoreRequest(texts={"texts": ["a"]}, priority=9), "priority", None),  # type: ignore[arg-type]
    ],
)
def test_a_request_that_makes_no_sense_names_its_field(
    zoo: Zoo, request_: reward_pb2.ScoreRequest, field: str, sample: int | None
) -> None:
    error = failure(zoo.service, request_)
    assert isinstance(error, InvalidArgument)
    assert (error.field, error.sample) == (field, sample)


def test_an_unknown_reward_is_not_found(zoo: Zoo) -> None:
    error: PpodError = failure(zoo.service, of_texts(["a"]), "nobody")
    assert isinstance(error, NotFound)
