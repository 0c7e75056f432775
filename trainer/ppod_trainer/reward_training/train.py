"""The Bradley-Terry fit of a linear head.

Bradley and Terry (1952): P(a preferred over b) = sigmoid(s_a - s_b). The loss is the mean of -log P over all pairs that
people rated differently, as for the reward models of Stiennon et al. (2020) and Ouyang et al. (2022). Each such pair
counts as one preference with one weight, however small the difference; labels softened by the raters' spread and
weights by the difference ordered validation pairs no better.

Shape legend: N reviews, F features, P pairs with different ratings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

CHUNK_ROWS = 512
"""Rows of the N x N matrix of differences that exist at a time: 8 MB at N = 4,000."""

SCALE_GRID = 2.0 ** torch.arange(-3, 12.01, 0.05, dtype=torch.float64)
"""Candidates for the factor that calibrates the logits: 1/8 to 4096 in steps of 3.5 %. A strong penalty leaves scores
that are small, and their factor large."""

BOUNDLESS_SCALE = 8.0
"""The factor of scores that order all pairs as people do: the larger it is, the better it fits them."""


class NothingToLearnError(Exception):
    """The reviews tell of no preference that a head could learn."""


@dataclass(frozen=True, slots=True)
class PairLoss:
    """The loss of scores, and its slope.

    Attributes:
        value: mean over pairs of -log sigmoid(s_preferred - s_rejected), in nats.
        gradient: float32 [N], derivative with respect to each score.
    """

    value: float
    gradient: torch.Tensor


@dataclass(frozen=True, slots=True)
class Standardisation:
    """Mean and standard deviation of each feature over the fitted reviews; both float32 [F]."""

    mean: torch.Tensor
    std: torch.Tensor

    def apply(self, features: torch.Tensor) -> torch.Tensor:
        """Standardised features, [N, F] -> [N, F]."""
        return (features - self.mean) / self.std


@dataclass(frozen=True, slots=True)
class Trial:
    """One penalty on the validation part.

    Attributes:
        l2: the penalty.
        loss: Bradley-Terry loss on validation pairs, in nats, at the best logit scale.
        logit_scale: factor on score differences that gives that loss.
    """

    l2: float
    loss: float
    logit_scale: float


@dataclass(frozen=True, slots=True)
class LinearHead:
    """score = features @ weight + bias, with mean 0 and standard deviation 1 over the fitted reviews.

    Attributes:
        weight: float32 [F], for features as the trunk gives them.
        bias: float32 [].
        logit_per_score: P(a over b) = sigmoid(logit_per_score * (score_a - score_b)).
    """

    weight: torch.Tensor
    bias: torch.Tensor
    logit_per_score: float


def bradley_terry(scores: torch.Tensor, ratings: torch.Tensor) -> PairLoss:
    """Loss over all pairs whose ratings differ, with its gradient written out: d/ds_i = -sum of P(the other wins).

    Args:
        scores: float32 [N].
        ratings: float [N]; the higher rating is the preferred one, equal ratings make no pair.

    Raises:
        ValueError: all ratings are equal.
    """
    total = 0.0
    pairs = 0
    gradient = torch.zeros(len(scores), dtype=torch.float64)
    for start in range(0, len(scores), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        margins = scores[rows, None] - scores[None, :]
        preferred = ratings[rows, None] > ratings[None, :]
        losses = torch.nn.functional.softplus(-margins).masked_fill_(~preferred, 0.0)
        surprise = torch.sigmoid(-margins).masked_fill_(~preferred, 0.0)
        total += float(losses.sum(dtype=torch.float64))
        pairs += int(preferred.sum())
        gradient[rows] -= surprise.sum(dim=1, dtype=torch.float64)
        gradient += surprise.sum(dim=0, dtype=torch.float64)
    if pairs == 0:
        raise ValueError("all ratings are equal: there is no preference to learn from")
    return PairLoss(total / pairs, (gradient / pairs).float())


def standardise(features: torch.Tensor) -> Standardisation:
    """Moments of features [N, F] over N; a feature that never varies keeps 1 as its deviation."""
    std, mean = torch.std_mean(features.double(), dim=0, correction=0)
    return Standardisation(mean.float(), torch.where(std > 1e-8, std, 1.0).float())


def fit_weight(features: torch.Tensor, ratings: torch.Tensor, l2: float, max_iterations: int) -> torch.Tensor:
    """Minimise Bradley-Terry loss + l2/2 |w|^2 by L-BFGS from zero; deterministic.

    Args:
        features: float32 [N, F], standardised.
        ratings: float [N].
        l2: penalty, >= 0.
        max_iterations: of L-BFGS.

    Returns:
        float32 [F].
    """
    weight = torch.zeros(features.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight], max_iter=max_iterations, history_size=20, tolerance_grad=1e-7, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        with torch.no_grad():
            loss = bradley_terry(features @ weight, ratings)
            weight.grad = features.T @ loss.gradient + l2 * weight
            return loss.value + l2 / 2 * float(weight @ weight)

    optimiser.step(closure)
    return weight.detach()


def best_logit_scale(scores: torch.Tensor, ratings: torch.Tensor) -> tuple[float, float]:
    """The factor on scores [N] that minimises the Bradley-Terry loss on pairs not fitted on, and that loss.

    Where no factor is large enough, it is `BOUNDLESS_SCALE`.
    """
    losses = [bradley_terry(scores * float(scale), ratings).value for scale in SCALE_GRID]
    best = min(range(len(losses)), key=losses.__getitem__)
    if losses[best] == losses[-1]:
        return BOUNDLESS_SCALE, bradley_terry(scores * BOUNDLESS_SCALE, ratings).value
    return float(SCALE_GRID[best]), losses[best]


def choose_penalty(
    fitting: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor],
    penalties: Sequence[float],
    max_iterations: int,
    report: Callable[[Trial], None],
) -> Trial:
    """Fit once for each penalty and take the one with the lowest loss on validation pairs.

    Args:
        fitting: features [N, F] and ratings [N] to fit on.
        validation: features and ratings of other reviews.
        penalties: to try.
        max_iterations: of each fit.
        report: called with each trial.
    """
    moments = standardise(fitting[0])
    trials: list[Trial] = []
    for l2 in penalties:
        weight = fit_weight(moments.apply(fitting[0]), fitting[1], l2, max_iterations)
        scale, loss = best_logit_scale(moments.apply(validation[0]) @ weight, validation[1])
        trials.append(Trial(l2, loss, scale))
        report(trials[-1])
    return min(trials, key=lambda trial: trial.loss)


def fit_head(features: torch.Tensor, ratings: torch.Tensor, chosen: Trial, max_iterations: int) -> LinearHead:
    """Fit on all reviews of the half, fold the standardisation of features and scores into weight and bias.

    Args:
        features: float32 [N, F] as the trunk gives them.
        ratings: float [N].
        chosen: penalty and logit scale that validation picked.
        max_iterations: of L-BFGS.

    Raises:
        NothingToLearnError: all reviews get one score, as where their texts are equal.
    """
    moments = standardise(features)
    weight = fit_weight(moments.apply(features), ratings, chosen.l2, max_iterations)
    folded = weight.double() / moments.std.double()
    raw = features.double() @ folded
    spread = raw.std(correction=0)
    if not spread > 0:
        raise NothingToLearnError(
            "no feature tells the reviews apart: look whether their texts differ, and what the trunk is"
        )
    return LinearHead(
        weight=(folded / spread).float(),
        bias=(-raw.mean() / spread).float(),
        logit_per_score=chosen.logit_scale * float(spread),
    )
