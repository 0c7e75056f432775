"""Whole runs of the algorithms that compare the samples of a prompt, with real services."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import environment, write_config

from .conftest import Config, System, records_of

GROUPS = {"batch_size": 8, "samples_per_prompt": 4, "max_tokens": 8}
IN_LOSS = {"placement": "loss", "estimator": "k3"}
RECIPES: dict[str, Config] = {
    "grpo": {"kl": IN_LOSS, "rollout": GROUPS},
    "dr_grpo": {"kl": IN_LOSS, "rollout": GROUPS},
    "rloo": {"rollout": GROUPS},
    "reinforce_pp": {"rollout": {**GROUPS, "samples_per_prompt": 1}},
    "pvpo": {"kl": IN_LOSS, "rollout": {**GROUPS, "samples_per_prompt": 2}},
    "gigpo": {"kl": IN_LOSS, "rollout": GROUPS},
    "reinforce_pp_baseline": {"kl": {**IN_LOSS, "estimator": "k2"}, "rollout": GROUPS},
}


def steps_of(config: Config) -> list[dict[str, float]]:
    return [record for record in records_of(Path(str(config["run_dir"]))) if "score/mean" in record]


@pytest.mark.parametrize("kind", RECIPES)
def test_each_algorithm_moves_the_policy_without_a_critic(system: System, kind: str) -> None:
    config = system.config(kind, steps=4, advantages={"kind": kind}, **RECIPES[kind])
    result = system.train(config)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    records = steps_of(config)
    assert all(record["policy/first_ratio_error"] == 0 for record in records)
    assert all(record["loss/value"] == 0 for record in records)
    assert all(record["policy/grad_norm"] > 0 for record in records)
    assert all(record["samples/dropped"] == 0 for record in records)
    assert all(record.get("groups/uniform") == (None if kind == "reinforce_pp" else 0) for record in records)
    assert abs(records[-1]["kl/reference"]) > 1e-3


def test_groups_go_with_overlapped_steps_and_evaluation_has_none(system: System) -> None:
    config = system.config(
        "ahead-groups",
        steps=5,
        advantages={"kind": "grpo"},
        kl=IN_LOSS,
        rollout={**GROUPS, "max_staleness": 1},
        ppo={"importance_cap": 2.0},
    )
    result = system.train(config)
    assert result.returncode == 0, result.stderr
    assert [record["sampler/staleness_max"] for record in steps_of(config)] == [0, 1, 1, 1, 1]
    samples = (Path(str(config["run_dir"])) / "samples" / "step_000005.jsonl").read_text().splitlines()
    assert len({json.loads(line)["prompt"] for line in samples}) == len(samples) == 6


def test_values_are_estimated_once_by_the_initial_policy_and_survive_a_stop(system: System) -> None:
    config = system.config("estimated", steps=3, advantages={"kind": "pvpo", "presamples": 2}, **RECIPES["pvpo"])
    run_dir = Path(str(config["run_dir"]))
    result = system.train(config)
    assert result.returncode == 0, result.stderr
    estimates = json.loads((run_dir / "pre_estimates.json").read_text())
    assert len(estimates) == 12, "four prompts in each of three steps, and no more"
    # The same seeds with the same weights: another run estimates the same, to the bit.
    again = system.train({**config, "run_dir": str(system.directory / "estimated-again")})
    assert again.returncode == 0, again.stderr
    assert json.loads((system.directory / "estimated-again" / "pre_estimates.json").read_text()) == estimates
    # A run that goes on has what it was, whatever the policy is by now.
    (run_dir / "pre_estimates.json").unlink()
    resumed = system.train({**config, "resume": True})
    assert resumed.returncode == 0, resumed.stderr
    assert "estimating" not in resumed.stdout
    [state] = [json.loads(path.read_text()) for path in run_dir.glob("checkpoints/*/trainer.json")]
    assert state["components"]["pre_estimates"]["values"] == estimates


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_run_that_is_read_by_nobody_while_values_are_estimated_ends_in_one_line(
    system: System, unbuffered: str
) -> None:
    """What was not read may be in Python's buffer, which the end of the process writes once more."""
    config = system.config(f"unread{unbuffered}", steps=1, advantages={"kind": "pvpo"}, **RECIPES["pvpo"])
    path = write_config(system.directory / "unread.yaml", config)
    variables = {**environment(), "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "ppod_trainer", "--config", str(path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=variables, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert said == "ppod train: nobody reads stdout any more, as behind `| head`; let a file take it\n"
    assert process.returncode == 1
