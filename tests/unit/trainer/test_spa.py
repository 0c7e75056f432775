"""Progress attribution: what is moved to which turn, what the estimator learns, and what a checkpoint keeps of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from ppod_trainer.algorithms import Experience, LearnedEstimator, build_estimator
from ppod_trainer.algorithms.spa import Spa, delayed_rewards, redistribute
from ppod_trainer.algorithms.turns import last_tokens, spread, sum_by_turn
from ppod_trainer.config import AdvantagesConfig, SpaConfig
from ppod_trainer.errors import TrainerError
from ppod_trainer.experience import view_policy
from ppod_trainer.policy import PolicyWithValue, build_response_batch
from ppod_trainer.ranks import Ranks
from ppod_trainer.rollouts import ScoredRollout

TURNS = torch.tensor([[0, 0, -1, 1, 2], [0, 1, 1, -1, -1], [0, 0, -1, -1, -1]])


def test_turns_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, 9.0, 4.0, 8.0], [1.0, 2.0, 3.0, 9.0, 9.0], [5.0, 6.0, 9.0, 9.0, 9.0]])
    assert sum_by_turn(values, TURNS).tolist() == [[3.0, 4.0, 8.0], [1.0, 5.0, 0.0], [11.0, 0.0, 0.0]]
    assert last_tokens(TURNS).tolist() == [[1, 3, 4], [0, 2, -1], [1, -1, -1]]
    on_tokens = spread(torch.tensor([[1.0, 2.0, 3.0]] * 3), TURNS)
    assert on_tokens.tolist() == [[1, 1, 0, 2, 3], [1, 2, 2, 0, 0], [1, 1, 0, 0, 0]]


def test_redistribution_by_hand() -> None:
    # Row 0 was paid 1 at the end. Its turns contributed 0.25, 0.5 and 0.125: the first two get theirs, the last is left
    # with 1 - 0.75. Row 1 was paid 2 at the end, and a penalty of 0.5 a token stays where it is: 0.75 goes to its first
    # turn, 2 - 0.75 stays. Row 2 has one turn: nothing moves.
    rewards = torch.tensor([[0, 0, 0, 0, 1.0], [-0.5, -0.5, 1.5, 0, 0], [0, 3.0, 0, 0, 0]])
    contributions = torch.tensor([[0.25, 0.5, 0.125], [0.75, 0.25, 9.0], [0.5, 9.0, 9.0]])
    result = redistribute(rewards, contributions, TURNS)
    expected = [[0, 0.25, 0, 0.5, 0.25], [0.25, -0.5, 0.75, 0, 0], [0, 3.0, 0, 0, 0]]
    torch.testing.assert_close(result, torch.tensor(expected))


def test_only_what_was_paid_at_the_end_is_delayed() -> None:
    paid = torch.tensor([[0, 0.5, 0, 0.25, 1.0], [0.125, 0, 2.0, 0, 0], [0, 3.0, 0, 0, 0]])
    assert delayed_rewards(paid, TURNS).tolist() == [1.0, 2.0, 3.0]


@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_redistribution_keeps_every_sum(lengths: list[list[int]], seed: int) -> None:
    width = max(map(sum, lengths)) + 1
    rows = [[turn for turn, tokens in enumerate(row) for _ in range(tokens)] for row in lengths]
    turns = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.where(turns >= 0, torch.randn(turns.shape, generator=generator), 0.0)
    contributions = torch.randn(len(turns), int(turns.max()) + 1, generator=generator)
    result = redistribute(rewards, contributions, turns)
    torch.testing.assert_close(result.sum(dim=1), rewards.sum(dim=1), atol=1e-5, rtol=1e-5)
    assert not result[turns < 0].any()
    moved = sum_by_turn(result - rewards, turns)
    for row, counts in enumerate(lengths):
        earlier = contributions[row, : len(counts) - 1]
        torch.testing.assert_close(moved[row, : len(counts) - 1], earlier, atol=1e-5, rtol=1e-5)


def episodes(count: int, seed: int) -> Experience:
    """Episodes of three turns of one token, paid 1 at the end if any turn found the key, which is feature 0."""
    generator = np.random.default_rng(seed)
    found = generator.random((count, 3)) < 0.3
    found[:, 1:] &= ~np.logical_or.accumulate(found, axis=1)[:, :-1]  # Once at most.
    states = torch.zeros(count, 3, 4)
    states[..., 0] = torch.from_numpy(found.astype(np.float32))
    states[..., 1:] = torch.from_numpy(generator.normal(size=(count, 3, 3)).astype(np.float32))
    paid = torch.zeros(count, 3)
    paid[:, 2] = torch.from_numpy(found.any(axis=1).astype(np.float32))
    mask = torch.ones(count, 3, dtype=torch.bool)
    number = torch.arange(3).expand(count, 3)
    return Experience(
        rewards=paid,
        paid=paid,
        outcomes=paid.sum(dim=1),
        values=torch.zeros(count, 3),
        next_values=torch.zeros(count),
        mask=mask,
        truncated=torch.zeros(count, dtype=torch.bool),
        groups=torch.arange(count),
        prompts=torch.arange(count),
        turns=number,
        contexts=number,
        observations=number,
        turn_states=states,
    )


def spa_of(seed: int = 0, **options: float) -> Spa:
    config = AdvantagesConfig(kind="spa", gamma=1.0, lam=0.0, spa=SpaConfig.model_validate(options))
    made = build_estimator(config, hidden_size=4, seed=seed)
    assert isinstance(made, Spa)
    assert isinstance(made, LearnedEstimator)
    assert made.critic
    return made


def test_it_begins_alike_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    first, drawn = spa_of().state(), torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn), "and what is drawn behind it does not change"
    assert spa_of().state() == first
    assert spa_of(seed=1).state() != first


def test_it_begins_as_ppo_does() -> None:
    """Nothing is attributed yet. With lambda 0 and values of 0 an advantage is the token's own reward."""
    experience = episodes(16, 0)
    torch.testing.assert_close(spa_of().estimate(experience).advantages, experience.rewards)


def test_the_turn_that_earned_the_reward_gets_it() -> None:
    spa = spa_of(learning_rate=0.01, updates=8)
    for seed in range(40):
        spa.estimate(episodes(64, seed))
    unseen = episodes(200, 999)
    rewards = spa.estimate(unseen).advantages
    assert unseen.turn_states is not None
    found = unseen.turn_states[..., 0] > 0
    early = found[:, :2]
    assert early.any()
    assert (rewards[:, :2][early] - 1).abs().max() < 0.2
    assert rewards[:, :2][~early].abs().max() < 0.2
    # What is left at the end: nothing, where the reward was earned before.
    assert rewards[:, 2][early.any(dim=1)].abs().max() < 0.4
    assert (rewards[:, 2][found[:, 2]] - 1).abs().max() < 0.4


def test_a_checkpoint_keeps_what_it_learned_and_how() -> None:
    straight, stopped = spa_of(), spa_of()
    for seed in range(3):
        straight.estimate(episodes(32, seed))
        stopped.estimate(episodes(32, seed))
    resumed = spa_of(seed=1)
    resumed.restore(json.loads(json.dumps(stopped.state())))
    for seed in range(3, 6):
        one, two = (spa.estimate(episodes(32, seed)).advantages for spa in (straight, resumed))
        assert torch.equal(one, two)
    assert straight.state() == resumed.state()


def test_the_policys_states_are_wanted() -> None:
    with pytest.raises(TrainerError, match="reads the policy's states"):
        spa_of().estimate(replace(episodes(2, 0), turn_states=None))


def test_states_are_those_of_each_sequence_alone(
    model: PreTrainedModel, make_rollouts: Callable[..., list[ScoredRollout]]
) -> None:
    rollouts = make_rollouts(5)
    batch = build_response_batch(rollouts, torch.device("cpu"))
    turns = torch.full(batch.responses.shape, -1)
    for row, one in enumerate(rollouts):
        length = len(one.rollout.response)
        # Where there is room: two turns, and a token of the environment's between them.
        numbers: Sequence[int] = [0] * length if length < 3 else [0, -1, *[1] * (length - 2)]
        turns[row, :length] = torch.tensor(numbers)
    micro = [torch.tensor([3, 0]), torch.tensor([1, 4, 2])]
    policy = PolicyWithValue(model, compute_dtype=torch.float32)
    states = view_policy(policy, batch, micro, Ranks(policy.device), turns).turn_states
    assert states is not None
    assert states.shape == (5, 2, int(model.config.hidden_size))
    for row, one in enumerate(rollouts):
        ids = torch.from_numpy(one.rollout.tokens.astype(np.int64)).unsqueeze(0)
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        prompt, length = len(one.rollout.prompt.token_ids), len(one.rollout.response)
        first = length - 1 if length < 3 else 0
        torch.testing.assert_close(states[row, 0], hidden[prompt + first], atol=1e-4, rtol=1e-4)
        if length < 3:
            assert not states[row, 1].any()
        else:
            torch.testing.assert_close(states[row, 1], hidden[-1], atol=1e-4, rtol=1e-4)
