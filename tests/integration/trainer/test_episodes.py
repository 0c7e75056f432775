"""Runs of several turns against real services, with tools that take their time."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from support.copying import LETTERS, SIGN
from support.copying_runs import CopyingSystem, copying_system
from support.processes import running_service
from support.services import tiny_model_config
from support.waiting import met_file

from .conftest import Config, records_of, wait_for_step

MOST_TURNS = 4
STEPS = 3


@pytest.fixture(scope="module")
def copying(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CopyingSystem]:
    with copying_system(tmp_path_factory.mktemp("episodes")) as made:
        yield made


def config_of(copying: CopyingSystem, name: str, turns: str, steps: int = STEPS, max_staleness: int = 0) -> Config:
    files = {f"{kind}_file": str(copying.directory / f"{name}.{kind}") for kind in ("stuck", "broken")}
    parameters = {"most_turns": MOST_TURNS, **files}
    environment = {"name": "test_waiting", "parameters": parameters, "episodes": 100, "max_turns": MOST_TURNS}
    return copying.config(
        name,
        steps=steps,
        environment={**environment, "turns": turns},
        prompts={"heldout": 20},
        rollout={"batch_size": 32, "max_tokens": 4, "max_staleness": max_staleness},
        ppo={"importance_cap": 2.0} if max_staleness else {},
    )


def steps_of(config: Config) -> list[dict[str, float]]:
    return [record for record in records_of(Path(str(config["run_dir"]))) if "score/mean" in record]


def samples_of(config: Config) -> list[dict[str, object]]:
    path = Path(str(config["run_dir"])) / "samples" / f"step_{STEPS:06d}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def check(config: Config) -> list[str]:
    """Every episode was played, over as many turns as it has; the held-out prompts in their order."""
    records = steps_of(config)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(record["samples/dropped"] == 0 for record in records)
    assert all(record["sampler/gap_max"] < 1e-3 for record in records)
    assert all(record["sampler/staleness_max"] == 0 for record in records)
    assert all(record["policy/first_ratio_error"] == 0 for record in records)
    samples = samples_of(config)
    turns = [sum(letter in LETTERS for letter in str(sample["continuation"])) for sample in samples]
    assert len(turns) == 20
    assert max(turns) == MOST_TURNS
    assert min(turns) < MOST_TURNS
    assert any(f"{SIGN}{letter}" in str(sample["continuation"]) for sample in samples for letter in LETTERS)
    return [str(sample["prompt"]) for sample in samples]


def test_turns_together_give_the_same_run_again_and_independent_ones_the_same_episodes(copying: CopyingSystem) -> None:
    together, again, independent = (
        config_of(copying, name, turns)
        for name, turns in (("together", "together"), ("again", "together"), ("independent", "independent"))
    )
    for config in (together, again, independent):
        copying.train(config)
    first, second = (Path(str(config["run_dir"])) for config in (together, again))
    assert records_of(first) == records_of(second)
    assert samples_of(together) == samples_of(again)
    weights = Path("final_model") / "model.safetensors"
    assert (first / weights).read_bytes() == (second / weights).read_bytes()
    assert check(together) == check(independent)


@pytest.mark.parametrize(("turns", "max_staleness"), [("together", 0), ("independent", 0), ("together", 1)])
def test_a_run_that_is_told_to_stop_waits_for_no_tool(copying: CopyingSystem, turns: str, max_staleness: int) -> None:
    config = config_of(copying, f"stuck-{turns}-{max_staleness}", turns, 1000, max_staleness)
    run_dir = Path(str(config["run_dir"]))
    process = copying.start(config)
    wait_for_step(process, run_dir, 2)
    stuck_file = copying.directory / f"{run_dir.name}.stuck"
    stuck_file.touch()
    until = time.monotonic() + 30
    while not met_file(stuck_file).exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    try:
        stdout, stderr = process.communicate(timeout=20)
    finally:
        stuck_file.unlink()
    assert process.returncode == 128 + signal.SIGTERM, stderr
    # A step whose rollouts were made before is finished first.
    assert f"stopped after step {len(steps_of(config))}; resume from" in stdout


def test_a_tool_that_breaks_ends_the_run_and_loses_no_step(copying: CopyingSystem) -> None:
    config = config_of(copying, "broken", "together", 1000)
    run_dir = Path(str(config["run_dir"]))
    process = copying.start(config)
    wait_for_step(process, run_dir, 2)
    (copying.directory / "broken.broken").touch()
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "ConnectionError: the tool's server is away" in stderr
    assert f"ConnectionError: failed after step {len(steps_of(config))}; resume from" in stdout
    assert (run_dir / "checkpoints" / f"step_{len(steps_of(config)):06d}").is_dir()


def test_episodes_end_where_the_reference_reads_no_further(copying: CopyingSystem, tmp_path: Path) -> None:
    """Generation takes longer sequences: an episode that used its room would be refused, and the run with it."""
    values = {"model": tiny_model_config(copying.model_dir), "batching": {"max_batch_tokens": 12}}
    with running_service("ppod_services.reference", tmp_path, values) as reference:
        services = {"reference": reference.target, "reference_admin": reference.admin_target}
        config = {**config_of(copying, "room", "together")}
        config["services"] = {**cast("dict[str, object]", config["services"]), **services}
        copying.train(config)
        assert [record["step"] for record in steps_of(config)] == [1, 2, 3]
        too_long = {**config, "run_dir": str(tmp_path / "long"), "rollout": {"batch_size": 32, "max_tokens": 9}}
        process = copying.start(too_long)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "has 4 tokens, its response up to 9; the reference service takes 12 together" in stderr
