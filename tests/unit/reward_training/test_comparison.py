"""Heads that are compared were trained on none of the reviews that they are compared on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ppod_models.reward_cards import FeatureSpec, HeadCard, Read
from ppod_models.reward_heads import RewardHead, write_head
from ppod_trainer.reward_training import compare
from ppod_trainer.reward_training.data import PACKAGED_RATINGS, file_digest
from support.tiny_head import tiny_card
from support.tiny_model import build_model, build_tokenizer, save_tiny_model


def save_head(directory: Path, *, data: str, split_seed: int, held_out: int) -> Path:
    features = FeatureSpec(reads=(Read(layer=2, pooling="last"),))
    card = tiny_card("toy", features, build_model(), build_tokenizer())
    training = card.training.model_copy(update={"data_sha256": data, "split_seed": split_seed})
    made: HeadCard = card.model_copy(
        update={"training": training, "held_out": card.held_out.model_copy(update={"reviews": held_out})}
    )
    write_head(RewardHead(made, torch.ones(64), torch.zeros(())), directory)
    return directory


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, None),
        ({"split_seed": 2}, "data.split_seed 2 and 1,067 reviews held out, expected 1 and 1,067 or more"),
        ({"held_out": 500}, "data.split_seed 1 and 500 reviews held out, expected 1 and 1,067 or more"),
        ({"held_out": 2000}, None),
        ({"data": "another file", "split_seed": 2}, None),
    ],
)
def test_a_head_trained_on_held_out_reviews_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, object],
    problem: str | None,
) -> None:
    model = save_tiny_model(tmp_path / "model", max_tokens=512)
    made: dict[str, object] = {"data": file_digest(PACKAGED_RATINGS), "split_seed": 1, "held_out": 1067, **changes}
    head = save_head(tmp_path / "head", **made)  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(compare, "seconds_of_a_batch", lambda _: 0.0)
    code = compare.main(["--heads", str(head), "--source", str(model), "--dtype", "float32", "--reviews", "20"])
    output = capsys.readouterr()
    assert code == (0 if problem is None else 1)
    assert ("of 190 pairs" in output.out) == (problem is None)
    assert problem is None or problem in output.err
