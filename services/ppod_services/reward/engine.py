"""Scores of sequences by named reward models. Knows no asyncio and no gRPC."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ppod.errors import NonFiniteOutput
from ppod.tensors import TokenArray
from ppod_models.loading import tokenizer_fingerprint, vocab_size
from ppod_models.reward_model import RewardHeadError, RewardModel
from ppod_models.sources import ModelSourceError
from ppod_services.core.described import ModelInfo
from ppod_services.core.model import load_pretrained
from ppod_services.core.scheduler import Sink
from ppod_services.reward.config import RewardModelConfig
from ppod_services.reward.requests import RewardItem, RewardTarget, TextEncoder


class Scorer(Protocol):
    """What the engine needs of a reward model."""

    def score(self, sequences: Sequence[npt.NDArray[np.integer]]) -> npt.NDArray[np.float32]:
        """float32 [sequences]; pads by itself."""
        ...


class RewardEngine:
    """Scores batches; all items of a batch name one model."""

    def __init__(self, scorers: Mapping[str, Scorer]) -> None:
        self._scorers = scorers

    def run(self, items: Sequence[RewardItem], sink: Sink[float]) -> None:
        """Score each item. A score that is not finite fails its own request; none is ever made up."""
        scores = self._scorers[items[0].model].score([item.tokens for item in items])
        for position, (item, score) in enumerate(zip(items, scores.tolist(), strict=True)):
            if np.isfinite(score):
                sink.emit(position, score)
            else:
                sink.fail(position, NonFiniteOutput("score", item.sample, str(score)))


def load_reward_models(
    configs: Sequence[RewardModelConfig], max_batch_tokens: int
) -> tuple[RewardEngine, list[RewardTarget]]:
    """Load all models, each trunk once.

    Raises:
        ModelSourceError: a trunk cannot be loaded, or a head is missing or does not fit its trunk.
    """
    trunks: dict[tuple[str, str, str, str], tuple[PreTrainedModel, PreTrainedTokenizerFast]] = {}
    scorers: dict[str, Scorer] = {}
    targets: list[RewardTarget] = []
    for config in configs:
        key = (config.model.source, config.model.device, config.model.dtype, config.model.attention)
        if key not in trunks:
            trunks[key] = load_pretrained(config.model)
        trunk, tokenizer = trunks[key]
        try:
            model = RewardModel.load(trunk, tokenizer, config.head)
        except RewardHeadError as error:
            raise ModelSourceError(f"head of reward model {config.name!r}: {error}") from error
        scorers[config.name] = model
        targets.append(_describe(config.name, trunk, model, max_batch_tokens))
    return RewardEngine(scorers), targets


def _describe(name: str, trunk: PreTrainedModel, model: RewardModel, max_batch_tokens: int) -> RewardTarget:
    info = ModelInfo(
        name=name,
        tokenizer_fingerprint=tokenizer_fingerprint(model.tokenizer),
        vocab_size=vocab_size(trunk),
        max_sequence_tokens=min(model.max_sequence_tokens, max_batch_tokens),
        dtype=str(trunk.dtype).removeprefix("torch."),
        device=str(trunk.device),
    )
    return RewardTarget(info, _text_encoder(model.tokenizer))


def _text_encoder(tokenizer: PreTrainedTokenizerFast) -> TextEncoder:
    """Encode with the Rust tokenizer itself: the Python wrapper changes its settings, which two threads must not."""
    backend = tokenizer.backend_tokenizer

    def encode(texts: list[str]) -> list[TokenArray]:
        encodings = backend.encode_batch(texts, add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    return encode
