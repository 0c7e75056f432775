"""Whole runs in which what is configured about objective and rewards has to arrive at the right place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Config, System, records_of


def steps_of(config: Config) -> list[dict[str, float]]:
    return [record for record in records_of(Path(str(config["run_dir"]))) if "score/mean" in record]


@pytest.mark.parametrize("staleness", [0, 1], ids=["in step", "overlapped"])
def test_a_step_s_temperature_is_that_of_sampler_policy_and_reference(system: System, staleness: int) -> None:
    """With a learning rate of next to nothing all three are one model: they agree only at the same temperature."""
    config = system.config(
        f"temperature-{staleness}",
        steps=3,
        rollout={"batch_size": 8, "max_tokens": 8, "temperature": 1.2, "max_staleness": staleness},
        ppo={"importance_cap": 2.0},
        optimizer={"learning_rate": 1e-9},
        schedules={"temperature": {"end": 0.6}},
    )
    result = system.train(config)
    assert result.returncode == 0, result.stderr
    records = steps_of(config)
    assert [record["sampler/temperature"] for record in records] == pytest.approx([1.2, 0.9, 0.6])
    assert all(record["sampler/divergence_max"] < 1e-3 for record in records)
    assert all(abs(record["kl/reference"]) < 1e-3 for record in records)
    entropies = [record["policy/entropy"] for record in records]
    assert entropies[0] > entropies[1] > entropies[2]


def test_rejected_samples_are_counted_and_statistics_and_schedules_arrive(system: System) -> None:
    changes = {
        "steps": 4,
        "rewards": {"normalize": "whiten", "filters": {"max_repetition": 0.0, "repetition_ngram": 1}},
        "ppo": {"minibatches": 1},
        "schedules": {"entropy_coefficient": {"end": 0.3}, "kl_coefficient": {"end": 0.08}},
        "optimizer": {"learning_rate": 1e-3},
    }
    straight = system.config("filtered", **changes)
    result = system.train(straight)
    assert result.returncode == 0, result.stderr
    records = steps_of(straight)
    rejected = sum(record["samples/rejected_repetitive"] for record in records)
    assert rejected > 0
    assert "samples are not trained on" in result.stderr
    lines = [json.loads(line) for line in (system.directory / "filtered" / "metrics.jsonl").read_text().splitlines()]
    for record in (line for line in lines if "score/mean" in line):
        tokens = record["response/length"] * (8 - record["samples/rejected_repetitive"])
        assert record["tokens_per_second"] * record["seconds/step"] == pytest.approx(tokens), "those trained on"
    assert [record["entropy/coefficient"] for record in records] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [record["kl/coefficient"] for record in records] == pytest.approx([0.05, 0.06, 0.07, 0.08])
    for record in records:
        whitened = (record["score/mean"] - record["score/running_mean"]) / record["score/running_std"]
        paid = whitened - record["kl/coefficient"] * record["kl/reference"]
        assert record["return/mean"] == pytest.approx(paid, abs=1e-5), (
            "by the statistics of all scores, this step's too"
        )
    kept = json.loads(next((system.directory / "filtered").glob("checkpoints/*/trainer.json")).read_text())
    assert kept["components"]["scores"]["count"] == 4 * 8 - rejected
    assert kept["components"]["scores"]["mean"] == records[-1]["score/running_mean"]


def test_a_safety_reward_that_is_not_there_stops_before_anything_is_trained(system: System) -> None:
    filters = {"safety": {"reward": "harmless", "at_least": 0.0}}
    config = system.config("unsafe", rewards={"filters": filters})
    result = system.train(config)
    assert result.returncode == 1
    assert "'harmless', which is no part of the scores (their parts: reward)" in result.stderr
    assert not (system.directory / "unsafe" / "evaluation_before.json").exists(), "before anything is sampled"
    # The reward itself may be the bound: some of its scores are below 0, and are not trained on.
    filters = {"safety": {"reward": "reward", "at_least": 0.0}}
    config = system.config("safe", steps=2, rewards={"filters": filters}, ppo={"minibatches": 1})
    result = system.train(config)
    assert result.returncode == 0, result.stderr
    assert sum(record["samples/rejected_unsafe"] for record in steps_of(config)) > 0


def test_shaped_scores_arrive_at_the_advantages(system: System) -> None:
    """The first step samples the same either way; what is learnt from it differs, and resumes as it was."""
    found: dict[str, dict[str, float]] = {}
    for shaping in ("none", "token"):
        config = system.config(f"shaped-{shaping}", steps=2, rewards={"shaping": shaping})
        result = system.train(config)
        assert result.returncode == 0, result.stderr
        found[shaping] = steps_of(config)[0]
    for key in ("score/mean", "kl/reference", "response/length"):
        assert found["token"][key] == found["none"][key]
    # Less by the prompts' own scores.
    assert found["token"]["return/mean"] != pytest.approx(found["none"]["return/mean"], abs=1e-3)
    assert found["token"]["policy/grad_norm"] != pytest.approx(found["none"]["policy/grad_norm"], rel=1e-3)
    assert found["token"]["policy/first_ratio_error"] == 0
