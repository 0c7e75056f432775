"""How well scores order held-out pairs, and how far their probabilities can be believed.

Shape legend: N reviews, P pairs, K bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ppod_trainer.reward_training.data import preference_pairs

CLEAR_GAP = 1.0
"""Pairs whose mean ratings differ by more than this are clear: hardly any rater would turn them round."""

BINS = 10


@dataclass(frozen=True, slots=True)
class Ordering:
    """Share of pairs ordered as people do.

    Attributes:
        pairs: number of pairs.
        accuracy: share with the higher score on the preferred side; equal scores count half.
    """

    pairs: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Predicted probabilities against outcomes, over all pairs with different ratings, each entered both ways round.

    Attributes:
        predicted: float64 [K], mean predicted P(a over b) in each bin; NaN in an empty bin.
        observed: float64 [K], share of a preferred over b; NaN in an empty bin.
        counts: int64 [K], entries in each bin: twice the number of pairs in all.
        error: expected calibration error, the mean of |predicted - observed| weighted by counts.
    """

    predicted: npt.NDArray[np.float64]
    observed: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]
    error: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Everything that is measured on held-out reviews.

    Attributes:
        reviews: number of reviews.
        every: over all pairs with different ratings.
        clear: over pairs whose mean ratings differ by more than `CLEAR_GAP`.
        calibration: of sigmoid(logit_per_score * score difference).
        margins: float32 [P], score of the preferred less score of the rejected, all pairs.
        clear_margins: the same, clear pairs.
        correlation: Pearson's r of scores and mean ratings.
    """

    reviews: int
    every: Ordering
    clear: Ordering
    calibration: Calibration
    margins: npt.NDArray[np.float32]
    clear_margins: npt.NDArray[np.float32]
    correlation: float


def evaluate(scores: npt.NDArray[np.float32], ratings: npt.NDArray[np.float64], logit_per_score: float) -> Evaluation:
    """Measure scores [N] against mean ratings [N] over all pairs."""
    margins = pair_margins(scores, ratings, min_gap=0.0)
    clear_margins = pair_margins(scores, ratings, min_gap=CLEAR_GAP)
    return Evaluation(
        reviews=len(scores),
        every=ordering(margins),
        clear=ordering(clear_margins),
        calibration=calibrate(scores, ratings, logit_per_score),
        margins=margins,
        clear_margins=clear_margins,
        correlation=float(np.corrcoef(scores, ratings)[0, 1]),
    )


def pair_margins(
    scores: npt.NDArray[np.float32], ratings: npt.NDArray[np.float64], *, min_gap: float
) -> npt.NDArray[np.float32]:
    """Score of the preferred less score of the rejected, for all pairs whose ratings differ by more than `min_gap`."""
    pairs = preference_pairs(ratings, min_gap=min_gap)
    return scores[pairs.preferred] - scores[pairs.rejected]


def ordering(margins: npt.NDArray[np.float32]) -> Ordering:
    """Accuracy of margins [P]; a margin of zero counts half, as a coin would.

    Raises:
        ValueError: there are no pairs.
    """
    if len(margins) == 0:
        raise ValueError("no two reviews have ratings that differ enough to make a pair")
    return Ordering(len(margins), float((margins > 0).mean() + 0.5 * (margins == 0).mean()))


def calibrate(scores: npt.NDArray[np.float32], ratings: npt.NDArray[np.float64], logit_per_score: float) -> Calibration:
    """Compare predicted and observed preferences in `BINS` equal bins of the predicted probability.

    Each pair enters both ways round. A file may list the positive reviews first, and taken in that order alone the
    pairs would show the file's order as miscalibration.
    """
    margins = pair_margins(scores, ratings, min_gap=0.0).astype(np.float64)
    logits = logit_per_score * np.concatenate([margins, -margins])
    # tanh, because exp overflows where a logit is far below zero.
    probabilities = 0.5 * (1 + np.tanh(logits / 2))
    outcomes = np.repeat([1.0, 0.0], len(margins))
    bins = np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    filled = np.where(counts > 0, counts, np.nan)
    predicted = np.bincount(bins, weights=probabilities, minlength=BINS) / filled
    observed = np.bincount(bins, weights=outcomes, minlength=BINS) / filled
    error = float(np.nansum(np.abs(predicted - observed) * counts) / counts.sum())
    return Calibration(predicted, observed, counts.astype(np.int64), error)
