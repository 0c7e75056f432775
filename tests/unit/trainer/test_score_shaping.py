"""From scores to what is paid: the order, each penalty by hand, and the running statistics behind normalisation."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppod_trainer.config import LengthPenaltyConfig, OverlongConfig, RewardsConfig
from ppod_trainer.score_shaping import ScoreScale, length_penalty, overlong_penalty, score_scale, shape_scores
from ppod_trainer.score_statistics import ScoreStatistics

Scores = st.lists(st.floats(-100, 100), min_size=1, max_size=8)


def test_penalties_are_taken_off_after_clipping_and_clipping_comes_after_normalisation() -> None:
    config = RewardsConfig(
        clip=3.0,
        missing_eos_penalty=0.5,
        length_penalty=LengthPenaltyConfig(budget_tokens=4, per_token=0.1),
        overlong=OverlongConfig(max_tokens=10, cache_tokens=4, penalty=2.0),
    )
    scores, truncated = torch.tensor([13.0, -9.0, 3.0, 1.0]), torch.tensor([False, True, True, False])
    lengths = torch.tensor([4, 6, 8, 12])
    # Normalised: 6, -5, 1, 0. Clipped: 3, -3, 1, 0.
    # End: 0, 0.5, 0.5, 0. Budget: 0, 0.2, 0.4, 0.8. Overlong: 0, 0, 1, 2.
    shaped = shape_scores(scores, truncated, lengths, config, ScoreScale(shift=1.0, scale=2.0))
    torch.testing.assert_close(shaped, torch.tensor([3.0, -3.7, -0.9, -2.8]))


def test_nothing_is_changed_by_default() -> None:
    scores = torch.tensor([5.0, -7.0])
    shaped = shape_scores(scores, torch.tensor([True, False]), torch.tensor([9, 1]), RewardsConfig(), ScoreScale())
    torch.testing.assert_close(shaped, scores)


def test_length_penalty_is_linear_over_the_budget() -> None:
    torch.testing.assert_close(length_penalty(torch.tensor([3, 5, 9]), 5, 0.25), torch.tensor([0.0, 0.0, 1.0]))


def test_overlong_penalty_is_equation_13() -> None:
    def equation(length: int, longest: int, cache: int) -> float:
        if length <= longest - cache:
            return 0.0
        return ((longest - cache) - length) / cache if length <= longest else -1.0

    lengths = list(range(30))
    expected = torch.tensor([-equation(length, 20, 8) for length in lengths])
    torch.testing.assert_close(overlong_penalty(torch.tensor(lengths), 20, 8), expected)


@given(steps=st.lists(Scores, min_size=1, max_size=5))
def test_running_statistics_are_those_of_all_scores_together(steps: list[list[float]]) -> None:
    statistics = ScoreStatistics()
    for scores in steps:
        statistics.update(scores)
    together = np.concatenate(steps)
    assert statistics.count == len(together)
    assert statistics.mean == pytest.approx(together.mean(), abs=1e-9)
    std = together.std(ddof=1) if len(together) > 1 else 0.0
    assert statistics.std == pytest.approx(std if std >= 1e-6 else 1.0, rel=1e-6, abs=1e-9)


def test_scores_far_from_zero_lose_no_digits() -> None:
    statistics = ScoreStatistics()
    for scores in ([1e9, 1e9 + 1], [1e9 + 2, 1e9 + 3]):
        statistics.update(scores)
    assert statistics.std == pytest.approx(np.std([0, 1, 2, 3], ddof=1), rel=1e-6)


def test_statistics_survive_a_checkpoint_exactly() -> None:
    statistics, resumed = ScoreStatistics(), ScoreStatistics()
    statistics.update([0.1, 0.7, -3.3])
    resumed.restore(json.loads(json.dumps(statistics.state())))
    for one in (statistics, resumed):
        one.update([0.123, 9.0])
    assert statistics == resumed
    with pytest.raises(KeyError):
        resumed.restore({"count": 3})


@given(scores=Scores, shift=st.floats(-50, 50))
def test_whitening_does_not_see_a_shift_and_scaling_keeps_the_mean(scores: list[float], shift: float) -> None:
    def shaped(values: list[float], normalize: str) -> torch.Tensor:
        config = RewardsConfig.model_validate({"normalize": normalize})
        statistics = ScoreStatistics()
        statistics.update(values)
        given_scores = torch.tensor(values, dtype=torch.float64)
        none = torch.zeros(len(values))
        return shape_scores(given_scores, none.bool(), none.long(), config, score_scale(config, statistics))

    spread = float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
    if spread < 1e-3:
        return
    moved = [score + shift for score in scores]
    torch.testing.assert_close(shaped(scores, "whiten"), shaped(moved, "whiten"), rtol=1e-6, atol=1e-6)
    whitened, scaled = shaped(scores, "whiten"), shaped(scores, "scale")
    assert float(whitened.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(whitened.std()) == pytest.approx(1.0, abs=1e-6)
    assert float(scaled.mean()) == pytest.approx(np.mean(scores) / spread, abs=1e-6)
    assert float(scaled.std()) == pytest.approx(1.0, abs=1e-6)
