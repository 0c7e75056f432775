from __future__ import annotations

from math import exp, log, log1p

import numpy as np
import pytest
import torch

from ppod_trainer.reward_training import train
from ppod_trainer.reward_training.train import (
    NothingToLearnError,
    Trial,
    best_logit_scale,
    bradley_terry,
    choose_penalty,
    fit_head,
    fit_weight,
    standardise,
)


def test_loss_of_two_reviews_by_hand() -> None:
    # s = (1, 0), the first preferred: -log sigmoid(1) = log(1 + e^-1) = 0.313262; the gradient is -+sigmoid(-1).
    loss = bradley_terry(torch.tensor([1.0, 0.0]), torch.tensor([3.0, -2.0]))
    assert loss.value == pytest.approx(0.3132617, abs=1e-6)
    assert loss.gradient.tolist() == pytest.approx([-0.2689414, 0.2689414], abs=1e-6)
    # The same scores with the preference turned round: log(1 + e) = 1.313262.
    assert bradley_terry(torch.tensor([1.0, 0.0]), torch.tensor([-2.0, 3.0])).value == pytest.approx(
        1.3132617, abs=1e-6
    )


def test_loss_of_three_reviews_by_hand() -> None:
    # Ratings 1 = 1 < 2: two pairs, (2 over 0) with margin 2 and (2 over 1) with margin -1; 0 and 1 make none.
    loss = bradley_terry(torch.tensor([0.0, 3.0, 2.0]), torch.tensor([1.0, 1.0, 2.0]))
    assert loss.value == pytest.approx((log(1 + exp(-2)) + log(1 + exp(1))) / 2, abs=1e-6)
    lower, upper = 1 / (1 + exp(2)), 1 / (1 + exp(-1))
    assert loss.gradient.tolist() == pytest.approx([lower / 2, upper / 2, -(lower + upper) / 2], abs=1e-6)


def test_loss_in_chunks_equals_a_plain_loop_and_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "CHUNK_ROWS", 7)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(30, generator=generator, requires_grad=True)
    ratings = torch.randint(-4, 5, (30,), generator=generator).float()
    terms = [
        torch.nn.functional.softplus(scores[b] - scores[a])
        for a in range(30)
        for b in range(30)
        if ratings[a] > ratings[b]
    ]
    expected = torch.stack(terms).mean()
    expected.backward()
    loss = bradley_terry(scores.detach(), ratings)
    assert loss.value == pytest.approx(float(expected.detach()), abs=1e-6)
    torch.testing.assert_close(loss.gradient, scores.grad, atol=1e-6, rtol=1e-5)


def test_equal_ratings_teach_nothing() -> None:
    with pytest.raises(ValueError, match="no preference"):
        bradley_terry(torch.zeros(3), torch.ones(3))


def test_fit_reaches_the_point_where_loss_and_penalty_balance() -> None:
    # One feature, values +1 and -1: margin 2w, so the optimum solves 2 sigmoid(-2w) = l2 * w.
    weight = fit_weight(torch.tensor([[1.0], [-1.0]]), torch.tensor([1.0, 0.0]), 0.5, 50)
    w = float(weight[0])
    assert 2 / (1 + exp(2 * w)) == pytest.approx(0.5 * w, abs=1e-4)
    assert w > 0


def planted(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 12, generator=generator) * torch.linspace(0.1, 5, 12) + 3
    return features, (features[:, 3] - 0.5 * features[:, 8] / 4).round(decimals=2)


def test_head_recovers_a_planted_preference_and_has_unit_scale() -> None:
    features, ratings = planted(200, 0)
    chosen = choose_penalty((features, ratings), planted(100, 1), (0.001, 10.0), 50, lambda _trial: None)
    assert chosen.l2 == 0.001
    head = fit_head(features, ratings, chosen, 50)
    scores = features @ head.weight + head.bias
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-4)
    fresh, truth = planted(100, 2)
    assert np.corrcoef((fresh @ head.weight + head.bias).numpy(), truth.numpy())[0, 1] > 0.99


def test_texts_that_nothing_tells_apart_make_no_head() -> None:
    """A head that gives all of them one score has no unit."""
    with pytest.raises(NothingToLearnError, match="no feature tells the reviews apart"):
        fit_head(torch.full((6, 4), 0.5), torch.arange(6.0), Trial(0.1, 0.5, 1.0), 20)


def test_same_input_gives_the_same_bytes() -> None:
    features, ratings = planted(200, 0)
    first, second = (fit_weight(features, ratings, 0.1, 20) for _ in range(2))
    assert first.numpy().tobytes() == second.numpy().tobytes()


def test_few_iterations_regularise() -> None:
    """Beyond those that L-BFGS takes by itself, too, which are 20."""
    features, ratings = planted(200, 0)
    lengths = [float(fit_weight(features, ratings, 0.0, iterations).norm()) for iterations in (1, 5, 20, 80)]
    assert lengths == sorted(set(lengths))


def test_a_constant_feature_stays_finite() -> None:
    moments = standardise(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    assert moments.mean.tolist() == [2.0, 5.0]
    assert moments.std.tolist() == [1.0, 1.0]


def test_logit_scale_undoes_a_scale_of_the_scores() -> None:
    generator = torch.Generator().manual_seed(4)
    truth = torch.randn(80, generator=generator)
    scores = truth + torch.randn(80, generator=generator)
    scale, loss = best_logit_scale(scores, truth)
    assert loss < min(bradley_terry(scores * factor, truth).value for factor in (0.9 * scale, 1.1 * scale))
    for factor in (2.0, 1 / 64, 1 / 1024):
        found, same_loss = best_logit_scale(factor * scores, truth)
        assert found == pytest.approx(scale / factor)
        assert same_loss == pytest.approx(loss, abs=1e-6)


def test_a_strong_penalty_is_calibrated_too() -> None:
    """It leaves scores of 1/100 of those without, and the best factor makes good for it."""
    features, ratings = planted(200, 0)
    noisy = ratings + 2 * torch.randn(200, generator=torch.Generator().manual_seed(1))
    moments = standardise(features)
    scores = moments.apply(features) @ fit_weight(moments.apply(features), noisy, 100.0, 50)
    scale, loss = best_logit_scale(scores, noisy)
    assert scale > 100
    assert loss < min(bradley_terry(scores * factor, noisy).value for factor in (0.9 * scale, 1.1 * scale, 8.0))


def test_scores_that_order_all_pairs_have_a_finite_scale() -> None:
    scale, loss = best_logit_scale(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([1.0, 2.0, 3.0]))
    # Margins of 1/2 twice and 1 once, times 8.
    assert (scale, loss) == (8.0, pytest.approx((2 * log1p(exp(-4)) + log1p(exp(-8))) / 3))
