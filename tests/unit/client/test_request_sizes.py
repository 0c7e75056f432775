"""Requests for scores with long references: no part of one is larger than a message may be."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ppod.client.delivery import SplitPolicy
from ppod.client.identity import Pin
from ppod.client.reward_calls import ChatTurn, ScoreJob, ScoreOptions, conversation_job, text_job, token_job
from ppod.client.splitting import split_rows
from ppod.errors import InvalidArgument
from ppod.v1 import reward_pb2

REFERENCES = ["x" * 20_000, "", "y" * 30_000, "é" * 10_000]


def of_tokens(options: ScoreOptions) -> ScoreJob:
    return token_job([[1, 2, 3]] * 4, (), (), options, Pin())


def of_texts(options: ScoreOptions) -> ScoreJob:
    return text_job(["fine"] * 4, (), options, Pin())


def of_conversations(options: ScoreOptions) -> ScoreJob:
    return conversation_job([[ChatTurn("user", "hi")]] * 4, options, Pin())


@pytest.mark.parametrize("make", [of_tokens, of_texts, of_conversations])
def test_references_count_towards_a_parts_bytes_but_are_no_tokens(make: Callable[[ScoreOptions], ScoreJob]) -> None:
    job, plain = make(ScoreOptions(references=REFERENCES)), make(ScoreOptions())
    assert job.sizes.tokens == plain.sizes.tokens
    parts = split_rows(job.sizes, 1, None, SplitPolicy(max_part_bytes=40_000))
    assert parts == [range(0, 2), range(2, 3), range(3, 4)]
    assert max(len(job.encode(rows, part)) for part, rows in enumerate(parts)) < 40_000
    assert split_rows(plain.sizes, 1, None, SplitPolicy(max_part_bytes=40_000)) == [range(4)]


def test_each_part_of_a_request_brings_the_prompts_of_its_sequences_and_has_room_for_them() -> None:
    prompts = [[ChatTurn("user", "x" * 20_000)], [], [ChatTurn("system", "y" * 30_000), ChatTurn("user", "z")], []]
    job = token_job([[1, 2, 3]] * 4, [1] * 4, prompts, ScoreOptions(), Pin())
    parts = split_rows(job.sizes, 1, None, SplitPolicy(max_part_bytes=40_000))
    assert parts == [range(2), range(2, 4)]
    requests = [reward_pb2.ScoreRequest.FromString(job.encode(rows, part)) for part, rows in enumerate(parts)]
    sent = [one.messages for request in requests for one in request.prompts.conversations]
    assert [[ChatTurn(turn.role, turn.content) for turn in one] for one in sent] == prompts
    without = token_job([[1, 2, 3]] * 2, [1] * 2, [[], []], ScoreOptions(), Pin())
    assert not reward_pb2.ScoreRequest.FromString(without.encode(range(2), 0)).HasField("prompts")


@pytest.mark.parametrize(
    ("prompts", "field"), [([[]], "prompts"), ([[ChatTurn("user", "fine")], [ChatTurn("user", "\ud83d")]], "prompts")]
)
def test_prompts_that_cannot_be_sent_are_refused_before(prompts: list[list[ChatTurn]], field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        token_job([[1, 2, 3]] * 2, [1] * 2, prompts, ScoreOptions(), Pin())
    assert refused.value.field == field
