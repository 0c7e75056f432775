"""The reward service over the wire, with scores known by arithmetic: factor * (sum of ids) + length."""

from __future__ import annotations

import numpy as np
import pytest

from ppod import InvalidArgument, NonFiniteOutput, Pin, RewardClient, Truncation
from support.fake_reward_model import MAX_TOKENS, NAN_TOKEN
from support.processes import ServiceProcess
from support.tiny_model import build_tokenizer


def test_scores_keep_the_order_of_the_request(reward_service: ServiceProcess) -> None:
    with RewardClient(reward_service.target) as client:
        reply = client.score([[10], [1, 2, 3, 4], [7, 7]])
    assert reply.values.tolist() == [6.0, 9.0, 9.0]
    assert reply.state.model == "first"
    assert reply.truncated_tokens == (0, 0, 0)
    assert reply.timing.tokens == 7


def test_a_second_model_answers_under_its_name(reward_service: ServiceProcess) -> None:
    with RewardClient(reward_service.target, pin=Pin(model="second")) as client:
        assert client.score([[10], [1, 2]]).values.tolist() == [-9.0, -1.0]
        assert client.describe().state.model == "second"


def test_texts_are_tokenised_by_the_server(reward_service: ServiceProcess) -> None:
    texts = ["ab", "héllo"]
    ids = [build_tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts]
    with RewardClient(reward_service.target) as client:
        np.testing.assert_array_equal(client.score_texts(texts).values, client.score(ids).values)


def test_truncation_is_explicit(reward_service: ServiceProcess) -> None:
    long = list(range(1, MAX_TOKENS + 4))
    with RewardClient(reward_service.target) as client:
        with pytest.raises(InvalidArgument) as caught:
            client.score([[1], long])
        assert (caught.value.field, caught.value.sample) == ("tokens.lengths", 1)
        left = client.score([[1], long], truncation=Truncation.LEFT)
        right = client.score([[1], long], truncation=Truncation.RIGHT)
    assert left.truncated_tokens == right.truncated_tokens == (0, 3)
    assert left.values[1] == 0.5 * sum(long[3:]) + MAX_TOKENS
    assert right.values[1] == 0.5 * sum(long[:-3]) + MAX_TOKENS


def test_a_score_that_is_not_finite_is_withheld(reward_service: ServiceProcess) -> None:
    with RewardClient(reward_service.target) as client:
        with pytest.raises(NonFiniteOutput) as caught:
            client.score([[1], [2], [3, NAN_TOKEN]])
        assert (caught.value.output, caught.value.sample, caught.value.found) == ("score", 2, "nan")
        assert client.score([[10]]).values.tolist() == [6.0]
