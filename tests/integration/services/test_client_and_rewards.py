"""What the client makes of every kind of reward of a real service."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ppod import (
    AsyncRewardClient,
    ChatTurn,
    Delivery,
    Granularity,
    InvalidArgument,
    Pin,
    ReferenceClient,
    RewardClient,
    SplitPolicy,
)
from ppod.client import RewardKind
from support.processes import ServiceProcess, running_service
from support.tiny_model import VOCAB_SIZE

from .conftest import Zoo

SEQUENCES = [[1, 2, 3], [40, 50], [7] * 12, [9, 8, 7, 6]]


def test_a_sum_is_made_of_its_breakdown(zoo: Zoo) -> None:
    with RewardClient(zoo.service.target, pin=Pin(model="sum")) as client:
        scores = client.score(SEQUENCES)
    root = scores.breakdown
    assert root is not None
    assert root.kind is RewardKind.SUM
    assert root.adjustment is not None
    assert root.adjustment.clip_low == -50
    ensemble, length, first = root.members
    assert [each.name for each in root.members] == ["ensemble", "length", "first"]
    total = sum(np.float64(each.weight or 0) * each.scores.astype(np.float64) for each in root.members)
    np.testing.assert_allclose(scores.values, total, rtol=1e-6)
    assert ensemble.mean is not None
    assert ensemble.std is not None
    members = np.stack([each.scores for each in ensemble.members]).astype(np.float64)
    np.testing.assert_allclose(ensemble.mean, members.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ensemble.std, members.std(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ensemble.scores, ensemble.mean - 0.5 * ensemble.std, rtol=1e-5, atol=1e-6)
    assert (length.kind, length.state) == (RewardKind.FUNCTION, None)
    assert first.state is not None
    assert first.state.model == "first"


def test_texts_for_functions_alone_are_cut_to_the_services_limit_too(tmp_path: Path) -> None:
    """Such a service has no model and no tokenizer to tell limits of, but one of its requests."""
    rewards = [{"name": "length", "kind": "function", "function": "length", "parameters": {"maximum": 0}}]
    values = {"rewards": rewards, "limits": {"max_request_sequences": 16}}
    with running_service("ppod_services.reward", tmp_path, values) as service, RewardClient(service.target) as client:
        scores = client.score_texts(["x" * count for count in range(1, 41)])
    assert scores.values.tolist() == [-float(count) for count in range(1, 41)]


def test_an_empty_last_message_is_one_step(zoo: Zoo) -> None:
    chats = [[ChatTurn("user", "hi"), ChatTurn("assistant", text)] for text in ("", "one\ntwo")]
    with RewardClient(zoo.service.target, pin=Pin(model="decoder")) as client:
        scores = client.score_conversations(chats, process=Granularity.STEP)
    assert scores.process is not None
    assert [places.tolist() for places in scores.process.positions] == [[0], [4, 7]]
    assert [float(way[-1]) for way in scores.process.scores] == scores.values.tolist()


def test_parts_of_a_sum_join_into_the_same_scores(zoo: Zoo) -> None:
    """The limit of the service is 64 sequences: 150 are cut in three, and the parts are one breakdown in the end."""
    many = [[index % 200, 1 + index % 7] for index in range(150)]
    with RewardClient(zoo.service.target, pin=Pin(model="sum")) as client:
        whole = client.score(many)
        pieces = [client.score(many[start : start + 50]).values for start in (0, 50, 100)]
    np.testing.assert_allclose(whole.values, np.concatenate(pieces), rtol=1e-5, atol=1e-5)
    assert whole.breakdown is not None
    assert len(whole.breakdown.members[0].members[1].scores) == 150


def test_steps_are_scored_on_the_way(zoo: Zoo) -> None:
    text = "one\n\ntwo\n\nthree"
    with RewardClient(zoo.service.target, pin=Pin(model="process")) as client:
        process = client.score_texts([text, "x"], process=Granularity.STEP).process
    assert process is not None
    assert [len(each) for each in process.positions] == [3, 1]
    assert process.positions[0][-1] == len(text)


async def test_references_travel(zoo: Zoo) -> None:
    async with AsyncRewardClient(zoo.service.target, pin=Pin(model="answer")) as client:
        right, wrong = (await client.score_texts(["42", "41"], references=["42", "42"])).values
        assert right > wrong
        with pytest.raises(InvalidArgument) as caught:
            await client.score_texts(["42"])
        assert caught.value.field == "references"


def test_rewards_are_listed_with_their_kinds(zoo: Zoo) -> None:
    with RewardClient(zoo.service.target) as client:
        rewards = {each.name: each for each in client.list_rewards()}
    assert rewards["sum"].members == ("ensemble", "length", "first")
    assert rewards["sum"].weights == (2.0, 0.25, -1.0)
    assert rewards["process"].kind is RewardKind.PROCESS_MODEL
    assert rewards["answer"].needs_references
    assert rewards["first"].limits is not None


def test_entropies_and_top_tokens_of_a_real_reference(reference_service: ServiceProcess) -> None:
    sequences, prompts = [[5, 6, 7, 8], [1, 2, 3]], [1, 2]
    tiny = Delivery(split=SplitPolicy(min_part_tokens=4, max_part_tokens=4))
    with ReferenceClient(reference_service.target, delivery=tiny) as client:
        found = client.logprobs(sequences, prompts, entropy=True, top_k=5)
    assert found.entropies is not None
    assert found.top is not None
    for values, entropies, ids, logprobs in zip(
        found.values, found.entropies, found.top.token_ids, found.top.logprobs, strict=True
    ):
        assert ids.shape == logprobs.shape == (len(values), 5)
        assert ((entropies > 0) & (entropies < np.log(VOCAB_SIZE))).all()
        assert (np.exp(logprobs).sum(axis=1) < 1).all()
        assert (logprobs[:, 0] >= values).all(), "nothing is likelier than the likeliest"
