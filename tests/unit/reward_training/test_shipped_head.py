from __future__ import annotations

import numpy as np
import torch

from ppod_models.loading import load_causal_lm, load_tokenizer, pick_dtype
from ppod_models.reward_model import RewardModel
from ppod_models.sources import resolve
from ppod_trainer.reward_training.compare import score_reviews, spread
from ppod_trainer.reward_training.data import PACKAGED_RATINGS, read_reviews, split_reviews
from ppod_trainer.reward_training.evaluate import evaluate


def test_reward_head_orders_held_out_reviews_as_people_do() -> None:
    path = resolve("packaged:smollm2-135m-instruct").path
    cpu = torch.device("cpu")
    trunk = load_causal_lm(path, device=cpu, dtype=pick_dtype("auto", cpu))
    model = RewardModel.load(trunk, load_tokenizer(path), "reviews-reward")
    held_out = split_reviews(read_reviews(PACKAGED_RATINGS), seed=1, held_out_share=1 / 9).held_out
    reviews = spread(held_out, 200)
    scores = score_reviews(model, reviews)
    evaluation = evaluate(scores, np.array([r.mean_rating for r in reviews]), model.card.logit_per_score)
    assert evaluation.clear.accuracy >= 0.88
    assert evaluation.every.accuracy >= 0.78
    assert evaluation.calibration.error < 0.05
    # Roughly centred with unit spread, as the card promises.
    assert abs(float(scores.mean())) < 0.25
    assert 0.75 < float(scores.std()) < 1.25
