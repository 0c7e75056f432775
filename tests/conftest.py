"""Fixtures of all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from support.services import generation_service, reference_service, reward_service, tiny_heads
from support.tiny_model import save_tiny_model

__all__ = ["generation_service", "reference_service", "reward_service", "tiny_heads"]

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a tiny random Llama with its tokenizer."""
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")
