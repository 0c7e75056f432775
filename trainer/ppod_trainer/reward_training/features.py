"""Features of reviews, through the code that serves them, kept on disk between runs.

Shape legend: N reviews, F features.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerFast

from ppod_models.reward_features import TrunkFeatures, encode_text
from ppod_trainer.reward_training.data import Review, ReviewDataError

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with reviews done and reviews in all."""


def check_lengths(path: Path, tokenizer: PreTrainedTokenizerFast, reviews: Sequence[Review], longest: int) -> None:
    """Raise ReviewDataError for a review that has more tokens than the trunk takes."""
    for review in reviews:
        tokens = len(encode_text(tokenizer, review.text))
        if not 1 <= tokens <= longest:
            problem = (
                f"review {review.id!r} has {tokens} tokens, and the trunk takes 1 to {longest}; cut it, or leave it out"
            )
            raise ReviewDataError(path, 0, "text", problem)


def review_features(
    extractor: TrunkFeatures,
    tokenizer: PreTrainedTokenizerFast,
    reviews: Sequence[Review],
    batch_reviews: int,
    progress: Progress,
) -> torch.Tensor:
    """Features of each review, float32 [N, F]; reviews of similar length share a forward, so that little is padding."""
    tokens = [encode_text(tokenizer, review.text) for review in reviews]
    order = sorted(range(len(tokens)), key=lambda index: (len(tokens[index]), index))
    parts: list[torch.Tensor] = []
    for start in range(0, len(order), batch_reviews):
        batch = order[start : start + batch_reviews]
        parts.append(extractor.extract([tokens[index] for index in batch]).cpu())
        progress(min(start + batch_reviews, len(order)), len(order))
    features = torch.cat(parts)
    restored = torch.empty_like(features)
    restored[torch.tensor(order)] = features
    return restored


def features_key(model: str, extractor: TrunkFeatures, reviews: Sequence[Review], settings: str) -> str:
    """A name for the features: a digest of everything that decides them.

    Args:
        model: fingerprint of the trunk's files.
        extractor: whose feature spec counts.
        reviews: whose texts count, in their order.
        settings: device, dtype, threads and batch size; each changes the last bits.
    """
    digest = hashlib.sha256()
    for part in (model, extractor.spec.model_dump_json(), settings, torch.__version__, *(r.text for r in reviews)):
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:24]


def load_features(directory: Path, key: str) -> torch.Tensor | None:
    """Features that an earlier run kept, or None: also where their file was cut, as when the machine lost its power."""
    file = directory / f"{key}.npy"
    if not file.is_file():
        return None
    try:
        kept: npt.NDArray[np.float32] = np.load(file, allow_pickle=False)
    except (EOFError, ValueError) as error:
        log.warning("%s cannot be read, and is made anew: %s", file, error)
        return None
    return torch.from_numpy(kept)


def keep_features(directory: Path, key: str, features: torch.Tensor) -> None:
    """Keep features for later runs; a reader never sees half a file."""
    directory.mkdir(parents=True, exist_ok=True)
    aside = directory / f".{key}.{os.getpid()}.npy"
    np.save(aside, features.numpy())
    aside.rename(directory / f"{key}.npy")
