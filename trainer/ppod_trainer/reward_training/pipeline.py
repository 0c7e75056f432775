"""From a configuration to a head with its card and report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ppod_models.loading import (
    hidden_size,
    load_causal_lm,
    load_tokenizer,
    pick_device,
    pick_dtype,
    tokenizer_fingerprint,
)
from ppod_models.reward_cards import HeadCard, HeldOutFigures, TrainingRecord, TrunkSpec
from ppod_models.reward_features import TrunkFeatures
from ppod_models.reward_heads import RewardHead, weights_digest, write_head
from ppod_models.sources import ResolvedModel, default_cache_dir, resolve
from ppod_trainer.reward_training.config import RewardTrainingConfig
from ppod_trainer.reward_training.data import (
    PACKAGED_RATINGS,
    Review,
    Splits,
    check_preferences,
    file_digest,
    read_reviews,
    split_reviews,
    split_validation,
)
from ppod_trainer.reward_training.evaluate import CLEAR_GAP, Evaluation, evaluate
from ppod_trainer.reward_training.features import (
    check_lengths,
    features_key,
    keep_features,
    load_features,
    review_features,
)
from ppod_trainer.reward_training.report import write_report
from ppod_trainer.reward_training.train import LinearHead, Trial, choose_penalty, fit_head

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Trunk:
    """A loaded trunk.

    Attributes:
        resolved: where it came from.
        model: in evaluation mode.
        tokenizer: the model's.
    """

    resolved: ResolvedModel
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def train_head(config: RewardTrainingConfig, command: str, say: Say, progress: Callable[[str, int, int], None]) -> None:
    """Train, evaluate and write one head.

    Args:
        config: what to do.
        command: recorded in the card.
        say: called with each line of news.
        progress: called with a stage, steps done and steps in all.

    Raises:
        ModelSourceError: the trunk is not there.
        ReviewDataError: the ratings are missing or broken. NothingToLearnError: all reviews read alike.
        RewardHeadError: the trunk has no such layer.
        OSError: the output cannot be written.
    """
    ratings_file = config.data.ratings or PACKAGED_RATINGS
    splits = split_reviews(
        read_reviews(ratings_file), seed=config.data.split_seed, held_out_share=config.data.held_out_share
    )
    half = splits.half_a if config.data.half == "a" else splits.half_b
    # What is wrong with them is told now, not once all is computed.
    _check_splits(config, ratings_file, half, splits.held_out)
    config.output.mkdir(parents=True, exist_ok=True)
    say(f"{len(half):,} reviews to train on (half {config.data.half}), {len(splits.held_out):,} held out")
    trunk = load_trunk(config)
    extractor = TrunkFeatures(trunk.model, trunk.tokenizer, config.features)
    check_lengths(ratings_file, trunk.tokenizer, (*half, *splits.held_out), extractor.max_sequence_tokens)
    features = _features(config, trunk, extractor, half, lambda done, of: progress("training features", done, of))
    chosen = _choose(config, half, features, say)
    fitted = fit_head(features, torch.tensor([r.mean_rating for r in half]), chosen, config.fit.max_iterations)
    evaluation = _evaluate(config, trunk, extractor, splits, fitted, progress)
    say(
        f"held out: {evaluation.every.accuracy:.4f} of {evaluation.every.pairs:,} pairs, "
        f"{evaluation.clear.accuracy:.4f} of {evaluation.clear.pairs:,} that differ by more than 1, "
        f"calibration error {evaluation.calibration.error:.4f}"
    )
    training = TrainingRecord(
        command=command,
        data_sha256=file_digest(ratings_file),
        split_seed=config.data.split_seed,
        half=config.data.half,
        loss="Bradley-Terry over all pairs with different mean ratings, each pair one preference, plus L2",
        l2=chosen.l2,
        reviews_fitted=len(half),
        dtype=str(trunk.model.dtype).removeprefix("torch."),
    )
    card = _card(config, trunk, training, fitted, evaluation)
    write_head(RewardHead(card, fitted.weight, fitted.bias), config.output)
    write_report(config.name, evaluation, config.output)
    say(f"wrote {config.output}")


def load_trunk(config: RewardTrainingConfig) -> Trunk:
    """Resolve and load the trunk and its tokenizer; sets this process's CPU threads when the configuration does."""
    if config.model.threads is not None:
        torch.set_num_threads(config.model.threads)
    resolved = resolve(config.model.source)
    device = pick_device(config.model.device)
    model = load_causal_lm(resolved.path, device=device, dtype=pick_dtype(config.model.dtype, device), trunk_only=True)
    return Trunk(resolved, model, load_tokenizer(resolved.path))


def ratings_of(reviews: Sequence[Review]) -> npt.NDArray[np.float64]:
    """Mean ratings, float64 [N]."""
    return np.array([review.mean_rating for review in reviews])


def _check_splits(config: RewardTrainingConfig, path: Path, half: Sequence[Review], held_out: Sequence[Review]) -> None:
    """Raise ReviewDataError unless each part has preferences: to learn from, to choose the penalty by, to report on."""
    parts = split_validation(half, seed=config.data.split_seed, share=config.data.validation_share)
    for name, indices in zip(("fitting", "validation"), parts, strict=True):
        check_preferences(path, f"{name} part of half {config.data.half}", [half[index] for index in indices])
    check_preferences(path, "held-out part", held_out, min_gap=CLEAR_GAP)


def _features(
    config: RewardTrainingConfig,
    trunk: Trunk,
    extractor: TrunkFeatures,
    reviews: Sequence[Review],
    progress: Callable[[int, int], None],
) -> torch.Tensor:
    settings = f"{trunk.model.device} {trunk.model.dtype} {torch.get_num_threads()} {config.fit.batch_reviews}"
    key = features_key(trunk.resolved.fingerprint, extractor, reviews, settings)
    directory = default_cache_dir() / "features"
    kept = load_features(directory, key)
    if kept is not None:
        progress(len(reviews), len(reviews))
        return kept
    features = review_features(extractor, trunk.tokenizer, reviews, config.fit.batch_reviews, progress)
    keep_features(directory, key, features)
    return features


def _choose(config: RewardTrainingConfig, half: Sequence[Review], features: torch.Tensor, say: Say) -> Trial:
    fitting, validation = split_validation(half, seed=config.data.split_seed, share=config.data.validation_share)
    ratings = torch.tensor([review.mean_rating for review in half])

    def part(indices: npt.NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.from_numpy(indices)
        return features[chosen], ratings[chosen]

    chosen = choose_penalty(
        part(fitting),
        part(validation),
        config.fit.l2,
        config.fit.max_iterations,
        lambda trial: say(f"l2 {trial.l2:g}: validation loss {trial.loss:.4f} at logit scale {trial.logit_scale:.2f}"),
    )
    say(f"chose l2 {chosen.l2:g} on {len(validation):,} validation reviews")
    return chosen


def _evaluate(
    config: RewardTrainingConfig,
    trunk: Trunk,
    extractor: TrunkFeatures,
    splits: Splits,
    fitted: LinearHead,
    progress: Callable[[str, int, int], None],
) -> Evaluation:
    features = _features(
        config, trunk, extractor, splits.held_out, lambda done, of: progress("held-out features", done, of)
    )
    scores = (features @ fitted.weight + fitted.bias).numpy()
    return evaluate(scores, ratings_of(splits.held_out), fitted.logit_per_score)


def _card(
    config: RewardTrainingConfig,
    trunk: Trunk,
    training: TrainingRecord,
    fitted: LinearHead,
    evaluation: Evaluation,
) -> HeadCard:
    return HeadCard(
        name=config.name,
        features=config.features,
        trunk=TrunkSpec(
            source=trunk.resolved.source,
            fingerprint=trunk.resolved.fingerprint,
            weights_digest=weights_digest(trunk.model),
            tokenizer_fingerprint=tokenizer_fingerprint(trunk.tokenizer),
            hidden_size=hidden_size(trunk.model),
            num_layers=int(trunk.model.config.get_text_config(decoder=True).num_hidden_layers),
        ),
        logit_per_score=round(fitted.logit_per_score, 6),
        training=training,
        held_out=HeldOutFigures(
            reviews=evaluation.reviews,
            pairs=evaluation.every.pairs,
            accuracy=round(evaluation.every.accuracy, 4),
            clear_pairs=evaluation.clear.pairs,
            clear_accuracy=round(evaluation.clear.accuracy, 4),
            calibration_error=round(evaluation.calibration.error, 4),
        ),
    )
