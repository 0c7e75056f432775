"""`python -m ppod_trainer.reward_training.compare`: heads, their agreement and the VADER lexicon on one held-out set.

Scores come from `RewardModel.score`, the code that serves, so this also checks that what is served is what was trained.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ppod_models.loading import load_causal_lm, load_tokenizer, pick_dtype
from ppod_models.reward_cards import HeadCard
from ppod_models.reward_features import encode_text
from ppod_models.reward_heads import RewardHeadError
from ppod_models.reward_model import RewardModel
from ppod_models.sources import ModelSourceError, resolve
from ppod_trainer.reward_training.config import DataConfig
from ppod_trainer.reward_training.data import PACKAGED_RATINGS, Review, file_digest, read_reviews, split_reviews
from ppod_trainer.reward_training.evaluate import Evaluation, evaluate

CPU = torch.device("cpu")
TIMED_SEQUENCES = 32
TIMED_TOKENS = 30


@dataclass(frozen=True, slots=True)
class Options:
    """What to compare, and how."""

    heads: tuple[str, ...]
    source: str
    dtype: str
    threads: int
    reviews: int | None
    lexicon: bool


def main(arguments: Sequence[str] | None = None) -> int:
    """Print figures of each head, their agreement, the seconds of a batch and, when asked, the lexicon's figures.

    Returns the exit code: 1 where the trunk is not there or a head cannot be compared, which one line tells.
    """
    try:
        _compare(_parse(arguments))
    except (ModelSourceError, RewardHeadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _compare(options: Options) -> None:
    torch.set_num_threads(options.threads)
    data = DataConfig(half="a")
    splits = split_reviews(read_reviews(PACKAGED_RATINGS), seed=data.split_seed, held_out_share=data.held_out_share)
    reviews = spread(splits.held_out, options.reviews)
    ratings = np.array([review.mean_rating for review in reviews])
    resolved = resolve(options.source)
    trunk = load_causal_lm(resolved.path, device=CPU, dtype=pick_dtype(options.dtype, CPU), trunk_only=True)
    tokenizer = load_tokenizer(resolved.path)
    columns: list[npt.NDArray[np.float32]] = []
    print(f"{options.source} in {options.dtype}, {options.threads} threads, {len(reviews):,} held-out reviews")
    for head in options.heads:
        model = RewardModel.load(trunk, tokenizer, head)
        check_unseen(model.card, data.split_seed, len(splits.held_out))
        columns.append(score_reviews(model, reviews))
        evaluation = evaluate(columns[-1], ratings, model.card.logit_per_score)
        _show(head, evaluation)
        print(f"  expected calibration error {evaluation.calibration.error:.4f}")
        print(f"  {TIMED_SEQUENCES} x {TIMED_TOKENS} tokens: {seconds_of_a_batch(model):.2f} s (best of 5)")
    if len(columns) > 1:
        print("correlation of the heads' scores:\n" + str(np.corrcoef(columns).round(3)))
    if options.lexicon:
        _show("VADER lexicon", evaluate(lexicon_scores(reviews), ratings, 1.0))


def check_unseen(card: HeadCard, split_seed: int, held_out: int) -> None:
    """Refuse a head that the shipped reviews trained by another split: it would be asked about what it was taught.

    Args:
        card: the head's.
        split_seed: of the split whose held-out reviews are asked about.
        held_out: how many these are.

    Raises:
        RewardHeadError: it was trained on some of them.
    """
    seed, count = card.training.split_seed, card.held_out.reviews
    if card.training.data_sha256 != file_digest(PACKAGED_RATINGS):
        return
    # By one seed a larger share holds out what a smaller one does, and more.
    if seed != split_seed or count < held_out:
        raise RewardHeadError(
            f"reward head {card.name!r} was trained on reviews that are held out here: data.split_seed {seed} and "
            f"{count:,} reviews held out, expected {split_seed} and {held_out:,} or more; train it by that split"
        )


def spread(reviews: Sequence[Review], count: int | None) -> Sequence[Review]:
    """`count` reviews at even distances: the file lists the positive ones first, so its head would be one-sided."""
    if count is None or count >= len(reviews):
        return reviews
    return [reviews[index * len(reviews) // count] for index in range(count)]


def score_reviews(model: RewardModel, reviews: Sequence[Review], batch_reviews: int = 32) -> npt.NDArray[np.float32]:
    """Scores of reviews in their order, float32 [N]; reviews of similar length share a batch."""
    tokens = [encode_text(model.tokenizer, review.text) for review in reviews]
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    scores = np.empty(len(tokens), dtype=np.float32)
    for start in range(0, len(order), batch_reviews):
        batch = order[start : start + batch_reviews]
        scores[batch] = model.score([tokens[index] for index in batch])
    return scores


def seconds_of_a_batch(model: RewardModel) -> float:
    """Wall-clock seconds to score 32 sequences of 30 tokens, the best of five runs after one to warm up."""
    random = np.random.default_rng(0)
    batch = list(random.integers(1000, 40000, size=(TIMED_SEQUENCES, TIMED_TOKENS)))
    model.score(batch)
    times: list[float] = []
    for _ in range(5):
        start = time.perf_counter()
        model.score(batch)
        times.append(time.perf_counter() - start)
    return min(times)


def lexicon_scores(reviews: Sequence[Review]) -> npt.NDArray[np.float32]:
    """VADER's compound score of each review (Hutto and Gilbert, 2014); needs the package vaderSentiment."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer  # noqa: PLC0415 - a reference, not a requirement

    analyser = SentimentIntensityAnalyzer()
    return np.array([analyser.polarity_scores(review.text)["compound"] for review in reviews], dtype=np.float32)


def _at_least(lowest: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {lowest} or more")
        return int(text)

    return parse


def _show(name: str, evaluation: Evaluation) -> None:
    print(
        f"{name}: {evaluation.every.accuracy:.4f} of {evaluation.every.pairs:,} pairs, {evaluation.clear.accuracy:.4f} "
        f"of {evaluation.clear.pairs:,} that differ by more than 1, correlation with mean ratings "
        f"{evaluation.correlation:.3f}"
    )


def _parse(arguments: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m ppod_trainer.reward_training.compare", description="Compare reward heads on held-out reviews."
    )
    parser.add_argument("--heads", nargs="+", default=["reviews-reward", "reviews-judge"], metavar="HEAD")
    parser.add_argument("--source", default="packaged:smollm2-135m-instruct", help="the trunk (default: %(default)s)")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--threads", type=_at_least(1), default=2)
    parser.add_argument(
        "--reviews", type=_at_least(2), default=None, metavar="N", help="only N of the held-out reviews"
    )
    parser.add_argument("--lexicon", action="store_true", help="measure VADER too (pip install vaderSentiment)")
    found = parser.parse_args(arguments)
    return Options(tuple(found.heads), found.source, found.dtype, found.threads, found.reviews, found.lexicon)


if __name__ == "__main__":
    sys.exit(main())
