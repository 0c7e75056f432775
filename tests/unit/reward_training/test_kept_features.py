"""Features that are kept on disk between runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ppod_trainer.reward_training.features import keep_features, load_features


@pytest.mark.parametrize("left", [0, 6, -4], ids=["nothing", "a part of the header", "all but a number"])
def test_features_whose_file_was_cut_are_made_anew(tmp_path: Path, left: int) -> None:
    features = torch.arange(6.0).reshape(2, 3)
    assert load_features(tmp_path, "key") is None
    keep_features(tmp_path, "key", features)
    kept = load_features(tmp_path, "key")
    assert kept is not None
    assert torch.equal(kept, features)
    file = tmp_path / "key.npy"
    file.write_bytes(file.read_bytes()[:left])
    assert load_features(tmp_path, "key") is None
    keep_features(tmp_path, "key", features)
    assert load_features(tmp_path, "key") is not None
