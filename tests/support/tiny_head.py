"""A reward head for the tiny model: random weights on the last token's state, with a card that fits."""

from __future__ import annotations

from pathlib import Path

import torch

from ppod_models.loading import load_causal_lm, load_tokenizer, tokenizer_fingerprint
from ppod_models.reward_cards import FeatureSpec, HeadCard, HeldOutFigures, Read, TrainingRecord, TrunkSpec
from ppod_models.reward_heads import RewardHead, weights_digest, write_head


def save_tiny_head(model_dir: Path, directory: Path, *, name: str = "tiny-head", seed: int = 0) -> Path:
    """Save a head for the model in `model_dir`; returns the head's directory."""
    trunk = load_causal_lm(model_dir, device=torch.device("cpu"), dtype=torch.float32)
    hidden, layers = int(trunk.config.hidden_size), int(trunk.config.num_hidden_layers)
    card = HeadCard(
        name=name,
        features=FeatureSpec(reads=(Read(layer=layers, pooling="last"),)),
        trunk=TrunkSpec(
            source=str(model_dir),
            fingerprint="not used",
            weights_digest=weights_digest(trunk),
            tokenizer_fingerprint=tokenizer_fingerprint(load_tokenizer(model_dir)),
            hidden_size=hidden,
            num_layers=layers,
        ),
        logit_per_score=1.0,
        training=TrainingRecord(
            command="none",
            data_sha256="",
            split_seed=0,
            half="a",
            loss="none",
            l2=0.0,
            reviews_fitted=0,
            dtype="float32",
        ),
        held_out=HeldOutFigures(
            reviews=0, pairs=0, accuracy=0.5, clear_pairs=0, clear_accuracy=0.5, calibration_error=0.0
        ),
    )
    weight = torch.randn(hidden, generator=torch.Generator().manual_seed(seed)) / hidden**0.5
    write_head(RewardHead(card, weight, torch.zeros(())), directory)
    return directory
