"""The reward service over the wire, against the same heads without any service."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from ppod import InvalidArgument, NonFiniteOutput, Pin, RewardClient, Truncation
from support.processes import ServiceProcess
from support.tiny_head import scores_alone
from support.tiny_model import MAX_TOKENS, NAN_TOKEN, build_tokenizer

NOISE = 1e-5
"""Floating-point noise between a sequence alone and the same one in a batch, for scores around 1."""


def test_scores_keep_the_order_of_the_request(
    reward_service: ServiceProcess, tiny_model_dir: Path, tiny_heads: dict[str, Path]
) -> None:
    sequences = [[10], [1, 2, 3, 4], [7, 7]]
    expected = scores_alone(tiny_model_dir, tiny_heads["first"], sequences)
    assert min(abs(a - b) for a, b in pairwise(expected)) > 100 * NOISE
    with RewardClient(reward_service.target) as client:
        reply = client.score(sequences)
    assert reply.values.tolist() == pytest.approx(expected, abs=NOISE)
    assert reply.state.model == "first"
    assert reply.truncated_tokens == (0, 0, 0)
    assert reply.timing.tokens == 7


def test_a_lone_sequence_gets_the_bits_of_the_bare_model(
    reward_service: ServiceProcess, tiny_model_dir: Path, tiny_heads: dict[str, Path]
) -> None:
    with RewardClient(reward_service.target) as client:
        assert client.score([[5, 6, 7]]).values.tolist() == scores_alone(
            tiny_model_dir, tiny_heads["first"], [[5, 6, 7]]
        )


def test_a_second_model_answers_under_its_name(
    reward_service: ServiceProcess, tiny_model_dir: Path, tiny_heads: dict[str, Path]
) -> None:
    expected = scores_alone(tiny_model_dir, tiny_heads["second"], [[10], [1, 2]])
    with RewardClient(reward_service.target, pin=Pin(model="second")) as client:
        assert client.score([[10], [1, 2]]).values.tolist() == pytest.approx(expected, abs=NOISE)
        assert client.describe().state.model == "second"


def test_texts_are_tokenised_by_the_server(reward_service: ServiceProcess) -> None:
    texts = ["ab", "héllo"]
    ids = [build_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts]
    with RewardClient(reward_service.target) as client:
        np.testing.assert_array_equal(client.score_texts(texts).values, client.score(ids).values)


def test_truncation_is_explicit(
    reward_service: ServiceProcess, tiny_model_dir: Path, tiny_heads: dict[str, Path]
) -> None:
    long = [index % 200 + 1 for index in range(MAX_TOKENS + 3)]
    expected = scores_alone(tiny_model_dir, tiny_heads["first"], [long[3:], long[:-3]])
    with RewardClient(reward_service.target) as client:
        with pytest.raises(InvalidArgument) as caught:
            client.score([[1], long])
        assert (caught.value.field, caught.value.sample) == ("tokens.lengths", 1)
        left = client.score([[1], long], truncation=Truncation.LEFT)
        right = client.score([[1], long], truncation=Truncation.RIGHT)
    assert left.truncated_tokens == right.truncated_tokens == (0, 3)
    assert [left.values[1], right.values[1]] == pytest.approx(expected, abs=NOISE)


def test_a_score_that_is_not_finite_is_withheld(reward_service: ServiceProcess) -> None:
    with RewardClient(reward_service.target, pin=Pin(model="broken")) as client:
        with pytest.raises(NonFiniteOutput) as caught:
            client.score([[1], [2], [3, NAN_TOKEN]])
        assert (caught.value.output, caught.value.sample, caught.value.found) == ("score of 'broken'", 2, "nan")
        assert np.isfinite(client.score([[10]]).values).all()
