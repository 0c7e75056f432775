"""Runs of policies that change their logits after the output layer: sampler, reference and trainer say the same."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.capped_models import BUILDS, save_with_tokenizer, with_images
from support.copying_runs import CopyingSystem
from support.processes import running_service
from support.services import tiny_model_config

from .conftest import records_of


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite"])
def test_sampler_reference_and_trainer_agree(kind: str, tmp_path: Path) -> None:
    model_dir = save_with_tokenizer(BUILDS[kind][0](), tmp_path / "model")
    # Gemma 2 caps its attention, too.
    check_agreement(kind, model_dir, tmp_path, "eager" if kind == "gemma2" else "sdpa")


def test_the_text_of_a_model_that_takes_images_is_trained(tmp_path: Path) -> None:
    check_agreement("images", save_with_tokenizer(with_images(), tmp_path / "model"), tmp_path, "sdpa")


def check_agreement(kind: str, model_dir: Path, tmp_path: Path, attention: str) -> None:
    model = {**tiny_model_config(model_dir), "attention": attention}
    with ExitStack() as stack:
        reference, generation = (
            stack.enter_context(running_service(f"ppod_services.{name}", tmp_path, {"model": model}))
            for name in ("reference", "generation")
        )
        system = CopyingSystem(reference, generation, model_dir, tmp_path)
        config = system.config(
            kind,
            steps=2,
            policy=model,
            environment={"name": "calculator", "parameters": {"examples": 0, "call_reward": 1.0}, "max_turns": 2},
            prompts={"heldout": 20},
            rollout={"batch_size": 16, "max_tokens": 24, "temperature": 0.8},
            # No reward is to be had by chance: the KL moves the policy.
            kl={"coefficient": 0.1, "placement": "loss", "estimator": "k3"},
            ppo={"epochs": 2, "minibatches": 4, "entropy_coefficient": 0.1},
        )
        system.train(config)
    run_dir = Path(str(config["run_dir"]))
    first, second = (one for one in records_of(run_dir) if "score/mean" in one)
    for record in (first, second):
        assert record["sampler/gap_max"] < 1e-3, "the sampler's logprobs are the trainer's"
        assert record["policy/first_ratio_error"] == 0
        assert record["policy/entropy"] > 0.1
    before = json.loads((run_dir / "evaluation_before.json").read_text())
    assert before["kl"] == pytest.approx(0, abs=1e-3), "the reference's logprobs are the sampler's"
    assert second["kl/reference"] != pytest.approx(0, abs=1e-3), "the policy moved"
