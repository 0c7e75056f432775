"""Reward heads for tiny trunks: random weights, with a card that fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ppod_models.loading import load_causal_lm, load_tokenizer, tokenizer_fingerprint
from ppod_models.reward_cards import FeatureSpec, HeadCard, HeldOutFigures, Read, TrainingRecord, TrunkSpec
from ppod_models.reward_heads import RewardHead, weights_digest, write_head
from ppod_models.reward_model import RewardModel


def tiny_card(name: str, features: FeatureSpec, trunk: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> HeadCard:
    """A card that fits a trunk; what tells of its training is made up."""
    return HeadCard(
        name=name,
        features=features,
        trunk=TrunkSpec(
            source="tiny",
            fingerprint="0" * 16,
            weights_digest=weights_digest(trunk),
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            hidden_size=int(trunk.config.hidden_size),
            num_layers=int(trunk.config.num_hidden_layers),
        ),
        logit_per_score=1.5,
        training=TrainingRecord(
            command="none",
            data_sha256="0",
            split_seed=1,
            half="a",
            loss="none",
            l2=0.1,
            reviews_fitted=1,
            dtype="float32",
        ),
        held_out=HeldOutFigures(reviews=2, pairs=1, accuracy=1, clear_pairs=1, clear_accuracy=1, calibration_error=0.1),
    )


def save_tiny_head(model_dir: Path, directory: Path, *, name: str = "tiny-head", seed: int = 0) -> Path:
    """Save a head on the last token's state for the model in `model_dir`; returns the head's directory."""
    trunk, tokenizer = _load(model_dir)
    features = FeatureSpec(reads=(Read(layer=int(trunk.config.num_hidden_layers), pooling="last"),))
    hidden = int(trunk.config.hidden_size)
    weight = torch.randn(hidden, generator=torch.Generator().manual_seed(seed)) / hidden**0.5
    write_head(RewardHead(tiny_card(name, features, trunk, tokenizer), weight, torch.zeros(())), directory)
    return directory


def scores_alone(model_dir: Path, head_dir: Path, sequences: Sequence[npt.ArrayLike]) -> list[float]:
    """What a head gives each sequence by itself, without any service."""
    model = RewardModel.load(*_load(model_dir), head_dir)
    return [float(model.score([np.asarray(sequence)])[0]) for sequence in sequences]


def _load(model_dir: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    trunk = load_causal_lm(model_dir, device=torch.device("cpu"), dtype=torch.float32)
    return trunk, load_tokenizer(model_dir)
