"""Heads that are compared were trained on none of the reviews that they are compared on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ppod_models.reward_cards import FeatureSpec, HeadCard, Read
from ppod_models.reward_features import encode_text
from ppod_models.reward_heads import RewardHead, write_head
from ppod_models.reward_model import RewardModel
from ppod_trainer.reward_training import compare
from ppod_trainer.reward_training.data import PACKAGED_RATINGS, Review, file_digest
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


@pytest.mark.parametrize("words", [["--threads", "0"], ["--reviews", "1"], ["--reviews", "-3"], ["--reviews", "x"]])
def test_numbers_that_nothing_can_be_compared_with_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        compare.main(words)
    assert ended.value.code == 2
    assert f"argument {words[0]}: found '{words[1]}', expected " in capsys.readouterr().err


def test_a_trunk_that_is_not_there_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--source", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err == f"error: model '{tmp_path / 'nowhere'}': no such directory\n"


def test_scores_are_in_the_order_of_the_reviews_whichever_share_a_batch(tmp_path: Path) -> None:
    head = save_head(tmp_path / "head", data="another file", split_seed=1, held_out=1067)
    model = RewardModel.load(build_model(), build_tokenizer(), str(head))
    texts = (
        "a much longer one",
        "short",
        "of middling size",
        "tiny",
        "one that is the longest of all",
        "x",
        "yz",
    )
    reviews = [Review(str(number), 0.0, 0.0, text) for number, text in enumerate(texts)]
    alone = [float(model.score([encode_text(model.tokenizer, text)])[0]) for text in texts]
    assert compare.score_reviews(model, reviews, batch_reviews=3).tolist() == pytest.approx(alone, abs=1e-4)
    assert len(set(alone)) == len(texts)
