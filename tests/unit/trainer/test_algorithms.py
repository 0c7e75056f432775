"""Group-relative and leave-one-out advantages, and REINFORCE++, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppod_trainer.algorithms import Experience, build_estimator
from ppod_trainer.algorithms.anchors import read_anchors
from ppod_trainer.algorithms.groups import group_statistics
from ppod_trainer.config import AdvantagesConfig
from ppod_trainer.errors import TrainerError
from ppod_trainer.masking import whiten
from ppod_trainer.presampling import PreEstimates
from ppod_trainer.prompts import Prompt
from ppod_trainer.rollouts import Rollout


def experience_of(
    outcomes: Sequence[float],
    groups: Sequence[int],
    lengths: Sequence[int] | None = None,
    *,
    penalty: float = 0.0,
) -> Experience:
    """Outcomes on last tokens, less a penalty on every token; lengths of 2 if none are given."""
    lengths = lengths or [2] * len(outcomes)
    mask = torch.arange(max(lengths) + 1)[None] < torch.tensor(lengths)[:, None]
    rewards = torch.where(mask, -penalty, 0.0)
    rewards[torch.arange(len(outcomes)), torch.tensor(lengths) - 1] += torch.tensor(outcomes)
    return Experience(
        rewards=rewards,
        paid=torch.where(mask, rewards + penalty, 0.0),
        outcomes=torch.tensor(outcomes),
        values=torch.zeros_like(rewards),
        next_values=torch.zeros(len(outcomes)),
        mask=mask,
        truncated=torch.zeros(len(outcomes), dtype=torch.bool),
        groups=torch.tensor(groups),
        prompts=torch.tensor(groups),
        turns=torch.where(mask, 0, -1),
        contexts=torch.where(mask, torch.tensor(groups)[:, None], -1),
        observations=torch.where(mask, torch.tensor(groups)[:, None], -1),
    )


def estimate(kind: str, experience: Experience) -> torch.Tensor:
    estimator = build_estimator(AdvantagesConfig.model_validate({"kind": kind}))
    assert not estimator.critic
    result = estimator.estimate(experience)
    assert not result.returns.any()
    assert result.advantages.dtype == torch.float32
    assert not result.advantages[~experience.mask].any()
    return result.advantages


def test_grpo_by_hand() -> None:
    # Group 0 holds 1, 0, 0, 1: mean 1/2, squares 4 * 1/4 = 1, over 3: std sqrt(1/3), A = +-0.5 * sqrt(3) = +-0.8660.
    # Group 1 holds 2, 5: mean 3.5, squares 2 * 2.25 = 4.5, over 1: std 2.1213, A = -+1.5 / 2.1213 = -+0.7071.
    result = estimate("grpo", experience_of([1, 2, 0, 0, 5, 1], [0, 1, 0, 0, 1, 0]))
    expected = [math.sqrt(3) / 2, -1 / math.sqrt(2), -math.sqrt(3) / 2, -math.sqrt(3) / 2, 1 / math.sqrt(2)]
    torch.testing.assert_close(result[:5, 0], torch.tensor(expected), atol=3e-6, rtol=0)
    torch.testing.assert_close(result[:, 0], result[:, 1])


def test_dr_grpo_by_hand() -> None:
    # The same groups, not divided: 1 - 1/2, 2 - 3.5, 0 - 1/2, 0 - 1/2, 5 - 3.5, 1 - 1/2.
    result = estimate("dr_grpo", experience_of([1, 2, 0, 0, 5, 1], [0, 1, 0, 0, 1, 0]))
    torch.testing.assert_close(result[:, 0], torch.tensor([0.5, -1.5, -0.5, -0.5, 1.5, 0.5]))


def test_rloo_by_hand() -> None:
    # Returns with a penalty of 0.25 a token: 3 - 0.5 = 2.5, 1 - 0.25 = 0.75, 0.5 - 0.75 = -0.25.
    # A_0 = 2.5 - (0.75 - 0.25) / 2 = 2.25; A_1 = 0.75 - (2.5 - 0.25) / 2 = -0.375; A_2 = -0.25 - 3.25 / 2 = -1.875.
    result = estimate("rloo", experience_of([3, 1, 0.5], [4, 4, 4], [2, 1, 3], penalty=0.25))
    expected = [[2.25, 2.25, 0, 0], [-0.375, 0, 0, 0], [-1.875, -1.875, -1.875, 0]]
    torch.testing.assert_close(result, torch.tensor(expected))


def test_reinforce_pp_by_hand() -> None:
    # Penalty 0.5 a token, then sums from the token to the end: 2 - 1.5, 2 - 1, 2 - 0.5; and -1 - 0.5.
    one = experience_of([2, -1], [0, 1], [3, 1], penalty=0.5)
    result = estimate("reinforce_pp", one)
    torch.testing.assert_close(result, torch.tensor([[0.5, 1.0, 1.5, 0.0], [-1.5, 0.0, 0.0, 0.0]]))
    # Normalised over the four tokens: mean 1.5 / 4 = 0.375, squares 0.125^2 + 0.625^2 + 1.125^2 + 1.875^2 = 5.1875,
    # over 3: std 1.31498.
    assert AdvantagesConfig(kind="reinforce_pp").whiten
    whitened = whiten(result, one.mask)
    expected = torch.tensor([0.125, 0.625, 1.125]) / 1.31498
    torch.testing.assert_close(whitened[0, :3], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(whitened[1, 0], torch.tensor(-1.875 / 1.31498), atol=1e-5, rtol=0)


def test_reinforce_pp_with_baseline_by_hand() -> None:
    # Group means 1.5 and 4 come off the sums from the token to the end (penalty 0.5 a token).
    result = estimate("reinforce_pp_baseline", experience_of([2, 1, 4], [0, 0, 1], [2, 1, 2], penalty=0.5))
    torch.testing.assert_close(result, torch.tensor([[-0.5, 0.0, 0.0], [-1.0, 0.0, 0.0], [-1.0, -0.5, 0.0]]))


def test_reinforce_pp_discounts() -> None:
    # gamma 1/2: 4 / 4, 4 / 2, 4.
    result = build_estimator(AdvantagesConfig(kind="reinforce_pp", gamma=0.5)).estimate(experience_of([4], [0], [3]))
    torch.testing.assert_close(result.advantages, torch.tensor([[1.0, 2.0, 4.0, 0.0]]))


def test_reinforce_pp_discounts_the_baseline_with_the_outcome() -> None:
    # gamma 1/2. Group 0: outcomes 4 and 2 less 3 are 1 and -1; group 1 says nothing, however long its samples are.
    estimator = build_estimator(AdvantagesConfig(kind="reinforce_pp_baseline", gamma=0.5))
    result = estimator.estimate(experience_of([4, 2, 1, 1], [0, 0, 1, 1], [3, 2, 1, 3]))
    expected = [[0.25, 0.5, 1, 0], [-0.5, -1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(result.advantages, torch.tensor(expected))


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline"])
def test_groups_that_say_nothing_have_advantage_0(kind: str) -> None:
    """Equal outcomes, in numbers that no mean hits exactly, and a sample that is alone: 0, and never NaN."""
    result = estimate(kind, experience_of([0.1] * 3 + [1 / 3] * 7 + [5.0], [0] * 3 + [1] * 7 + [2]))
    assert result.abs().max() == 0


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo", "reinforce_pp_baseline", "gigpo"])
@pytest.mark.parametrize("paid", [(0.7, 0.6, 0.1), (10.3, 3.6, 6.7), (100.3, 0.1, 100.2), (1000.3, 2.9, 997.4)])
def test_groups_that_were_paid_the_same_in_parts_have_advantage_0(kind: str, paid: tuple[float, float, float]) -> None:
    """In float32 0.6 + 0.1 is not 0.7, and what GRPO would divide that difference by is as small."""
    whole, *parts = np.array(paid, dtype=np.float32)
    assert whole != sum(parts)
    result = estimate(kind, experience_of([float(whole), float(sum(parts)), float(whole), 1.0, 2.0], [0, 0, 0, 1, 1]))
    assert result[:3].abs().max() == 0
    assert result[3:].abs().max() > 0.4


GROUPS = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@given(groups=GROUPS, seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_statistics_equal_a_plain_loop(groups: list[int], seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=len(groups))
    result = group_statistics(torch.tensor(values), torch.tensor(groups))
    for row, group in enumerate(groups):
        own = values[np.array(groups) == group]
        assert result.size[row] == len(own)
        assert float(result.mean[row]) == pytest.approx(own.mean(), abs=1e-12)
        assert float(result.std[row]) == pytest.approx(own.std(ddof=1) if len(own) > 1 else 0.0, abs=1e-12)
        assert bool(result.uniform[row]) == (len(own) == 1)


@given(groups=GROUPS, shift=st.floats(-10, 10), scale=st.floats(0.1, 10), seed=st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_invariants_of_group_advantages(groups: list[int], shift: float, scale: float, seed: int) -> None:
    """They sum to 0 in a group, no shift of the outcomes moves them, and GRPO's no scale does."""
    outcomes = np.random.default_rng(seed).normal(size=len(groups)).tolist()
    plain = {kind: estimate(kind, experience_of(outcomes, groups))[:, 0] for kind in ("grpo", "dr_grpo", "rloo")}
    moved = experience_of([scale * value + shift for value in outcomes], groups)
    for group in set(groups):
        rows = torch.tensor(groups) == group
        for advantages in plain.values():
            assert float(advantages[rows].sum()) == pytest.approx(0, abs=1e-5)
        # Leaving a sample out of the mean makes its distance from it larger by size / (size - 1).
        size = int(rows.sum())
        ratio = size / (size - 1) if size > 1 else 0.0
        torch.testing.assert_close(plain["rloo"][rows], plain["dr_grpo"][rows] * ratio, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(estimate("grpo", moved)[:, 0], plain["grpo"], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(estimate("dr_grpo", moved)[:, 0], plain["dr_grpo"] * scale, atol=1e-4, rtol=1e-4)


@given(groups=GROUPS, seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_order_of_the_samples_does_not_matter(groups: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    outcomes, order = generator.normal(size=len(groups)), generator.permutation(len(groups))
    for kind in ("grpo", "rloo", "reinforce_pp_baseline"):
        straight = estimate(kind, experience_of(outcomes.tolist(), groups))
        shuffled = estimate(kind, experience_of(outcomes[order].tolist(), [groups[place] for place in order]))
        torch.testing.assert_close(shuffled, straight[torch.from_numpy(order)])


def test_whitening_is_the_papers() -> None:
    """Dividing group-relative advantages by the batch's deviation would be another algorithm."""
    whitened = {
        kind: AdvantagesConfig.model_validate({"kind": kind}).whiten for kind in ("gae", "sequence", "grpo", "rloo")
    }
    assert whitened == {"gae": True, "sequence": True, "grpo": False, "rloo": False}
    assert not AdvantagesConfig.model_validate({"kind": "gae", "whiten": False}).whiten


def conversation_of(
    turns: Sequence[Sequence[int]],
    paid: Sequence[Sequence[float]],
    *,
    groups: Sequence[int],
    contexts: Sequence[Sequence[int]],
    observations: Sequence[Sequence[int]],
) -> Experience:
    """Episodes of several turns, token by token; -1 is what the environment said."""
    numbers = torch.tensor(turns)
    rewards = torch.tensor(paid)
    return Experience(
        rewards=rewards - torch.where(numbers >= 0, 7.0, 0.0),  # A penalty that nothing here may read.
        paid=rewards,
        outcomes=rewards.sum(dim=1),
        values=torch.zeros_like(rewards),
        next_values=torch.zeros(len(rewards)),
        mask=numbers >= 0,
        truncated=torch.zeros(len(rewards), dtype=torch.bool),
        groups=torch.tensor(groups),
        prompts=torch.tensor(groups),
        turns=numbers,
        contexts=torch.tensor(contexts),
        observations=torch.tensor(observations),
    )


TURNS = [[0, 0, -1, 1], [0, -1, 1, 1], [0, -1, -1, -1]]
PAID = [[0.0, 0.0, 0.0, 1.0], [0.5, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]]
CONTEXTS = [[5, 5, -1, 6], [5, -1, 7, 7], [5, -1, -1, -1]]
OBSERVATIONS = [[4, 4, -1, 8], [4, -1, 8, 8], [4, -1, -1, -1]]


def gigpo(**options: object) -> torch.Tensor:
    experience = conversation_of(TURNS, PAID, groups=[0, 0, 1], contexts=CONTEXTS, observations=OBSERVATIONS)
    config = AdvantagesConfig.model_validate({"kind": "gigpo", "gigpo": {"weight": 2, "gamma": 0.9, **options}})
    result = build_estimator(config).estimate(experience)
    assert not result.advantages[~experience.mask].any()
    return result.advantages


def test_gigpo_by_hand() -> None:
    # Group 0 was paid 1 and 0.5: A^E = +-0.25. Its first turns are of one state, with returns 0.9 and 0.5:
    # mean 0.7, A^S = +-0.2. Its second turns have states of their own: A^S = 0. The lone episode of group 1 began in
    # the same state, but belongs to another group: 0 and 0.
    result = gigpo(scaled=False)
    first, second = [0.65, 0.65, 0.0, 0.25], [-0.65, 0.0, -0.25, -0.25]
    torch.testing.assert_close(result, torch.tensor([first, second, [0.0, 0.0, 0.0, 0.0]]))


def test_gigpo_by_observations() -> None:
    # Now the second turns, which read the same, are of one state too: returns 1 and 0, A^S = +-0.5.
    result = gigpo(scaled=False, anchor="observation")
    assert result[0].tolist() == pytest.approx([0.65, 0.65, 0.0, 1.25])
    assert result[1].tolist() == pytest.approx([-0.65, 0.0, -1.25, -1.25])


def test_gigpo_by_deviations() -> None:
    # Pairs: every deviation from the mean is 1 / sqrt(2) of the unbiased standard deviation.
    half = 1 / math.sqrt(2)
    assert gigpo()[0].tolist() == pytest.approx([3 * half, 3 * half, 0.0, half], abs=2e-5)
    assert gigpo()[1].tolist() == pytest.approx([-3 * half, 0.0, -half, -half], abs=2e-5)
    assert not gigpo()[2].any()


def test_gigpo_without_its_turns_is_grpo() -> None:
    experience = conversation_of(TURNS, PAID, groups=[0, 0, 1], contexts=CONTEXTS, observations=OBSERVATIONS)
    torch.testing.assert_close(gigpo(weight=0.0), estimate("grpo", experience))


def test_pvpo_by_hand() -> None:
    # Prompt 4 was worth 0.25 to the initial policy, prompt 6 was worth 2: 1 - 0.25, 0.25 - 0.25, 1.5 - 2.
    estimator = build_estimator(AdvantagesConfig(kind="pvpo"), estimates=PreEstimates({4: 0.25, 6: 2.0}))
    result = estimator.estimate(experience_of([1, 0.25, 1.5], [4, 4, 6], [1, 2, 2]))
    torch.testing.assert_close(result.advantages, torch.tensor([[0.75, 0.0, 0.0], [0.0, 0.0, 0.0], [-0.5, -0.5, 0.0]]))
    assert not estimator.critic
    with pytest.raises(TrainerError, match="prompt 5 has no pre-estimated value"):
        estimator.estimate(experience_of([1], [5]))


def test_pre_estimates_survive_a_checkpoint() -> None:
    kept = PreEstimates({4: 1 / 3, 6: 2.0})
    restored = PreEstimates({1: 1.0})
    restored.restore(json.loads(json.dumps(kept.state())))
    assert restored == kept


def test_anchors_number_what_the_policy_read() -> None:
    """Two episodes whose first turns differ, and whose environment then says the same; a third is as the first."""

    def episode(said: Sequence[int]) -> Rollout:
        response = np.array([*said, 9, 9, 3], dtype=np.int32)
        turns = np.array([0] * len(said) + [-1, -1, 1])
        return Rollout(
            prompt=Prompt(0, np.array([1, 2], dtype=np.int32)),
            response=response,
            action_mask=turns >= 0,
            sampler_logprobs=np.zeros(len(turns), dtype=np.float32),
            versions=np.ones(len(turns), dtype=np.int64),
            turns=turns,
            rewards=np.zeros(len(turns), dtype=np.float32),
            truncated=False,
            hides_stop_token=False,
            seed=0,
        )

    found = read_anchors([episode([7]), episode([8, 8]), episode([7])])
    one, two, same = found.contexts
    assert one.tolist() == same.tolist()
    assert [one[0], two[0], two[1]] == [one[0]] * 3
    assert len({one[0], one[3], two[4]}) == 3
    assert one[1] == one[2] == two[2] == -1
    first, other, _ = found.observations
    assert first[3] == other[4], "both read 9, 9"
    assert first[0] == other[0] != first[3]
