from __future__ import annotations

import json

import numpy as np
import pytest

from ppod_trainer.reward_training.evaluate import calibrate, evaluate, ordering, pair_margins
from ppod_trainer.reward_training.report import write_report


def test_accuracy_by_hand() -> None:
    ratings = np.array([3.0, 1.5, 1.0, -2.0])
    scores = np.array([1.0, 2.0, 2.0, -1.0], dtype=np.float32)
    evaluation = evaluate(scores, ratings, 1.0)
    # Right: 0>3, 1>3, 2>3. Wrong: 0>1, 0>2. Equal scores: 1>2, half. 3.5 of 6.
    assert evaluation.every.pairs == 6
    assert evaluation.every.accuracy == pytest.approx(3.5 / 6)
    # 1.5 against 1.0 is not clear: 3 of 5.
    assert evaluation.clear.pairs == 5
    assert evaluation.clear.accuracy == pytest.approx(3 / 5)
    assert sorted(evaluation.margins.tolist()) == [-1.0, -1.0, 0.0, 2.0, 3.0, 3.0]


def test_no_pairs_is_an_error() -> None:
    with pytest.raises(ValueError, match="no two reviews"):
        ordering(pair_margins(np.zeros(2, dtype=np.float32), np.ones(2), min_gap=0.0))


def test_calibration_by_hand() -> None:
    # One pair, margin log 3: predicted 3/4 (and 1/4 the other way round), observed 1 (and 0).
    calibration = calibrate(np.array([np.log(3.0), 0.0], dtype=np.float32), np.array([1.0, 0.0]), 1.0)
    assert calibration.counts.tolist() == [0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    assert calibration.predicted[7] == pytest.approx(0.75)
    assert calibration.observed[7] == 1.0
    assert calibration.predicted[2] == pytest.approx(0.25)
    assert calibration.observed[2] == 0.0
    assert calibration.error == pytest.approx(0.25)
    assert np.isnan(calibration.predicted[0])


def test_calibration_of_several_pairs_in_a_bin() -> None:
    # Two pairs with margin log 3 as above, and one with margin 0: predicted 1/2 either way, observed once.
    calibration = calibrate(np.array([np.log(3.0), 0.0, 0.0], dtype=np.float32), np.array([2.0, 1.0, 0.0]), 1.0)
    assert calibration.counts.tolist() == [0, 0, 2, 0, 0, 2, 0, 2, 0, 0]
    assert calibration.predicted[[2, 5, 7]].tolist() == pytest.approx([0.25, 0.5, 0.75])
    assert calibration.observed[[2, 5, 7]].tolist() == [0.0, 0.5, 1.0]
    assert calibration.error == pytest.approx(4 / 6 * 0.25)


def test_calibration_does_not_depend_on_the_order_of_the_file() -> None:
    random = np.random.default_rng(0)
    ratings = random.normal(size=60)
    scores = (ratings + random.normal(size=60)).astype(np.float32)
    order = np.argsort(-ratings)
    assert calibrate(scores, ratings, 1.0).error == pytest.approx(calibrate(scores[order], ratings[order], 1.0).error)


def test_extreme_logits_do_not_overflow() -> None:
    calibration = calibrate(np.array([1e4, 0.0], dtype=np.float32), np.array([0.0, 1.0]), 10.0)
    assert calibration.error == pytest.approx(1.0)


def test_report_is_written_and_repeats_byte_for_byte(tmp_path) -> None:
    random = np.random.default_rng(0)
    ratings = random.uniform(-4, 4, size=50)
    evaluation = evaluate((ratings + random.normal(size=50)).astype(np.float32), ratings, 0.8)
    for name in ("one", "two"):
        write_report("toy", evaluation, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["figures.json", "margins.png", "reliability.png", "report.md"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    figures = json.loads((tmp_path / "one" / "figures.json").read_text())
    assert figures["all_pairs"] == {"pairs": 1225, "accuracy": round(evaluation.every.accuracy, 4)}
    assert sum(entry["entries"] for entry in figures["calibration_bins"]) == 2 * 1225
    assert f"{evaluation.every.accuracy:.1%}" in (tmp_path / "one" / "report.md").read_text()
