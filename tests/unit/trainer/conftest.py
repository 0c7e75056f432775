"""A tiny policy and rollouts with mixed lengths, for tests that need no service."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from ppod_models.loading import load_causal_lm
from ppod_trainer.policy import PolicyWithValue
from ppod_trainer.rollouts import ScoredRollout
from support.random_rollouts import random_rollouts

CPU = torch.device("cpu")
TEMPERATURE = 0.7


@pytest.fixture
def model(tiny_model_dir: Path) -> PreTrainedModel:
    return load_causal_lm(tiny_model_dir, device=CPU, dtype=torch.float32)


@pytest.fixture
def policy(model: PreTrainedModel) -> PolicyWithValue:
    made = PolicyWithValue(model, compute_dtype=torch.float32)
    torch.manual_seed(1)
    torch.nn.init.normal_(made.value_head.weight, std=0.1)
    return made


@pytest.fixture
def make_rollouts() -> Callable[..., list[ScoredRollout]]:
    return random_rollouts
