"""The potentials of responses, asked of a real reward service, against the score of each prefix by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from ppod import RewardClient
from ppod.client import ChatTurn, Pin
from ppod_trainer.potentials import Shaping, score_rollouts
from ppod_trainer.prompts import Prompt
from ppod_trainer.rollouts import Rollout
from support.tiny_model import build_tokenizer

from .conftest import Zoo

PROMPTS = [[65, 66, 67], [70], [71, 72]]
RESPONSES = [[80, 81, 82, 83], [84, 85, 256], [256]]


@pytest.fixture
def client(zoo: Zoo) -> Iterator[RewardClient]:
    with RewardClient(zoo.service.target, pin=Pin(model="first")) as client:
        yield client


def rollouts() -> list[Rollout]:
    """One that was cut off, one that ended, and one that ended at once; the first has a word of the environment's."""
    made: list[Rollout] = []
    for index, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        count = len(response)
        acted = np.ones(count, np.bool_)
        acted[2:3] = index != 0
        made.append(
            Rollout(
                prompt=Prompt(index, np.asarray(prompt, np.int32)),
                response=np.asarray(response, np.int32),
                action_mask=acted,
                sampler_logprobs=np.zeros(count, np.float32),
                versions=np.ones(count, np.int64),
                turns=np.zeros(count, np.int64),
                rewards=np.zeros(count, np.float32),
                truncated=index == 0,
                hides_stop_token=index != 0,
                seed=index,
            )
        )
    return made


@pytest.mark.parametrize("level", ["none", "token"])
def test_a_model_of_another_tokenizer_reads_the_conversation_and_the_response(
    zoo: Zoo, level: Literal["none", "token"]
) -> None:
    """By token, too, where the prompt's last id is asked about as if it were of the response."""
    chat = (ChatTurn("user", "well?"),)
    made = [replace(one, prompt=replace(one.prompt, turns=chat)) for one in rollouts()]
    with RewardClient(zoo.service.target) as client:
        states = {one.name: one.state for one in client.list_rewards()}
        said = [build_tokenizer().decode(response, skip_special_tokens=True) for response in RESPONSES]
        conversations = [[*chat, ChatTurn("assistant", text)] for text in said]
        client.pin = Pin(model="encoder")
        expected = client.score_conversations(conversations).values
        assert states["first"] is not None
        client.pin = Pin(model="retokenised", tokenizer_fingerprint=states["first"].tokenizer_fingerprint)
        scores, _ = score_rollouts(client, made, Shaping(level))
    np.testing.assert_allclose(scores.values, expected, atol=1e-5)


def test_potentials_are_scores_of_all_that_stands_before(client: RewardClient) -> None:
    scores, potentials = score_rollouts(client, rollouts(), Shaping("token"))
    plain, none = score_rollouts(client, rollouts(), Shaping())
    np.testing.assert_allclose(scores.values, plain.values, atol=1e-6)
    assert none == [None] * 3
    for prompt, response, found in zip(PROMPTS, RESPONSES, potentials, strict=True):
        prefixes = [[*prompt, *response[:count]] for count in range(len(response))]
        assert found is not None
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, client.score(prefixes).values, atol=1e-5)


def test_a_stop_token_that_is_sent_along_is_read_by_classifiers_alone(zoo: Zoo) -> None:
    """A head drops it, for it carries no text; so do functions, judges and process models, which read text."""
    hidden = rollouts()
    whole = [replace(one, hides_stop_token=False) for one in hidden]
    for model in ("first", "length", "process", "decoder"):
        with RewardClient(zoo.service.target, pin=Pin(model=model)) as client:
            without, before = score_rollouts(client, hidden[:2], Shaping("token"))
            scores, potentials = score_rollouts(client, whole[:2], Shaping("token"))
            plain, _ = score_rollouts(client, whole[:2], Shaping())
        np.testing.assert_allclose(scores.values, plain.values, atol=1e-5)
        assert (abs(scores.values - without.values) > 1e-3).tolist() == [False, model == "decoder"]
        for found, expected in zip(potentials, before, strict=True):
            assert found is not None
            assert expected is not None
            np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("interval", [2, 3, 50])
def test_fewer_potentials_stand_until_the_next_one(client: RewardClient, interval: int) -> None:
    _, every = score_rollouts(client, rollouts(), Shaping("token"))
    _, fewer = score_rollouts(client, rollouts(), Shaping("token", interval))
    for rollout, one, other in zip(rollouts(), every, fewer, strict=True):
        assert one is not None
        assert other is not None
        last = np.arange(len(one)) // interval * interval
        # The end of what is visible has a score in any case.
        last[len(rollout.visible_tokens) - len(rollout.prompt.token_ids) :] = len(one) - 1
        np.testing.assert_allclose(other, one[last], atol=1e-5)


def test_by_steps_the_potential_changes_where_a_step_ends(client: RewardClient, zoo: Zoo) -> None:
    [one, *_] = rollouts()
    response = build_tokenizer().encode("one\ntwo\nx", add_special_tokens=False)
    count = len(response)
    stepped = Rollout(
        prompt=one.prompt,
        response=np.asarray(response, np.int32),
        action_mask=np.ones(count, np.bool_),
        sampler_logprobs=np.zeros(count, np.float32),
        versions=np.ones(count, np.int64),
        turns=np.zeros(count, np.int64),
        rewards=np.zeros(count, np.float32),
        truncated=True,
        hides_stop_token=False,
        seed=0,
    )
    _, [found] = score_rollouts(client, [stepped], Shaping("step"))
    assert found is not None
    first, second = client.score([[*PROMPTS[0], *response[:4]], [*PROMPTS[0], *response[:8]]]).values
    np.testing.assert_allclose(found, [0, 0, 0, 0, first, first, first, first, second], atol=1e-5)
    with RewardClient(zoo.service.target, pin=Pin(model="encoder")) as other:
        # A model that reads both ways has no prefixes of one forward; the service computes each by itself.
        _, ways = score_rollouts(other, [one], Shaping("token"))
        assert ways[0] is not None


def test_by_steps_a_response_that_ended_at_once_is_scored_like_its_prompt(client: RewardClient) -> None:
    """The policy may say nothing at all; the reward service takes no sequence without a response."""
    made = rollouts()
    scores, potentials = score_rollouts(client, made, Shaping("step"))
    plain, _ = score_rollouts(client, made, Shaping())
    np.testing.assert_allclose(scores.values, plain.values, atol=1e-5)
    assert made[2].visible_tokens.tolist() == PROMPTS[2]
    assert potentials[2] is not None
    assert potentials[2].tolist() == [0.0]


def test_rewards_that_read_responses_are_told_where_these_begin(zoo: Zoo) -> None:
    """A function, a judge and a process reward model would otherwise score the prompt's words, too."""
    made = rollouts()
    with RewardClient(zoo.service.target, pin=Pin(model="length")) as client:
        # At most three characters are right; the prompts have up to three themselves.
        assert score_rollouts(client, made, Shaping())[0].values.tolist() == [-1.0, 0.0, 0.0]
    with RewardClient(zoo.service.target, pin=Pin(model="process")) as client:
        tokenizer = build_tokenizer()
        texts = [tokenizer.decode(RESPONSES[0]), tokenizer.decode(RESPONSES[1][:-1])]
        expected = client.score_texts(texts, prompts=[tokenizer.decode(prompt) for prompt in PROMPTS[:2]]).values
        np.testing.assert_allclose(score_rollouts(client, made, Shaping())[0].values[:2], expected, atol=1e-6)


def test_by_token_too_a_response_is_scored_without_the_prompt(zoo: Zoo) -> None:
    """The call that tells the prompt's potential takes its last token for the response's first."""
    calls: list[str] = []

    def observe(method: str, _seconds: float, _code: str) -> None:
        calls.append(method)

    for model, asked in (("length", 2), ("process", 2), ("first", 1)):
        with RewardClient(zoo.service.target, pin=Pin(model=model), observer=observe) as client:
            plain, _ = score_rollouts(client, rollouts(), Shaping())
            calls.clear()
            scores, potentials = score_rollouts(client, rollouts(), Shaping("token"))
        np.testing.assert_allclose(scores.values, plain.values, atol=1e-5)
        assert len(calls) == asked
        assert all(found is not None and len(found) == len(RESPONSES[row]) for row, found in enumerate(potentials))
