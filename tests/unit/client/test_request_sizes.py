"""Requests for scores with long references: no part of one is larger than a message may be."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ppod.client.delivery import SplitPolicy
from ppod.client.identity import Pin
from ppod.client.reward_calls import ChatTurn, ScoreJob, ScoreOptions, conversation_job, text_job, token_job
from ppod.client.splitting import split_rows

REFERENCES = ["x" * 20_000, "", "y" * 30_000, "é" * 10_000]


def of_tokens(options: ScoreOptions) -> ScoreJob:
    return token_job([[1, 2, 3]] * 4, (), options, Pin())


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
