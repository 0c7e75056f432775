"""Runs whose rollouts are made ahead, with an environment, and whose generation service goes away and returns."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.processes import running_service
from support.services import tiny_model_config
from support.tiny_head import save_tiny_head
from support.tiny_model import save_tiny_model

from .conftest import Config, System, records_of, running_system, wait_for_step

OVERLAPPED = {"rollout": {"batch_size": 8, "max_tokens": 8, "max_staleness": 1}, "ppo": {"importance_cap": 2.0}}


def steps_of(config: Config) -> list[dict[str, float]]:
    return [record for record in records_of(Path(str(config["run_dir"]))) if "score/mean" in record]


def test_rollouts_one_step_ahead_are_one_version_old_and_reproducible(system: System) -> None:
    configs = [system.config(name, steps=6, **OVERLAPPED) for name in ("ahead", "again")]
    for config in configs:
        result = system.train(config)
        assert result.returncode == 0, result.stderr
    first, second = (steps_of(config) for config in configs)
    assert first == second
    assert [record["sampler/staleness_max"] for record in first] == [0, 1, 1, 1, 1, 1]
    assert [record["sampler/staleness_mean"] for record in first] == [0, 1, 1, 1, 1, 1]
    assert all(record["samples/stale"] == 0 for record in first)
    # Of weights that moved on there is a divergence to tell, but no gap between two computations of the same.
    assert first[0]["sampler/gap_max"] < 1e-3
    assert all("sampler/gap_max" not in record for record in first[1:])
    assert all(record["sampler/divergence_max"] > 1e-3 for record in first[1:])
    assert all(record["policy/first_ratio_error"] == 0 for record in first)


@pytest.mark.parametrize("pause", ["keep", "abort"])
def test_new_weights_may_come_amid_sequences(system: System, pause: str) -> None:
    """Every token is tagged with the version that made it, so the trainer knows which it must correct."""
    config = system.config(
        pause,
        steps=10,
        rollout={"batch_size": 8, "max_tokens": 100, "max_staleness": 1},
        ppo={"importance_cap": 2.0, "epochs": 1},
        weight_transfer={"pause": pause},
    )
    result = system.train(config)
    assert result.returncode == 0, result.stderr
    records = steps_of(config)
    assert len(records) == 10
    assert all(record["sampler/staleness_max"] <= 1 for record in records)
    mixed = [record for record in records if 0 < record["sampler/staleness_mean"] < 1]
    assert mixed, "no commit came while sequences ran"
    # What was aborted goes on with keys and values of the new weights: tokens that carry their version agree with them.
    # What was kept goes on with those of the old ones, and is no part of the gap.
    assert all(record["sampler/gap_max"] < 1e-3 for record in records if "sampler/gap_max" in record)
    if pause == "abort":
        assert all("sampler/gap_max" in record for record in mixed)


def test_an_environment_pays_without_a_reward_service(system: System) -> None:
    services = {key: value for key, value in system.config("x")["services"].items() if key != "reward"}  # type: ignore[attr-defined]
    config = system.config(
        "environment",
        steps=2,
        services={**services, "judge_model": None},
        environment={"name": "calculator", "parameters": {"examples": 0}, "episodes": 40, "max_turns": 3},
        rewards={"model": False},
    )
    result = system.train(config)
    assert result.returncode == 0, result.stderr
    records = steps_of(config)
    assert [record["response/length"] > 0 for record in records] == [True, True]
    assert all(record["sampler/gap_max"] < 1e-3 for record in records)
    samples = (Path(str(config["run_dir"])) / "samples" / "step_000002.jsonl").read_text().splitlines()
    assert all("Question: What is" in json.loads(line)["prompt"] for line in samples)


def test_contradictions_are_named_before_anything_starts(system: System) -> None:
    stale = system.train(system.config("stale", rollout={"max_staleness": 1}))
    assert stale.returncode == 2
    assert "ppo.importance_cap" in stale.stderr
    unpaid = system.train(system.config("unpaid", rewards={"model": False}))
    assert unpaid.returncode == 2
    assert "nothing would pay a reward" in unpaid.stderr


@pytest.fixture
def fragile(tiny_model_dir: Path, tmp_path: Path) -> Iterator[System]:
    """Services that a test may kill."""
    head = str(save_tiny_head(tiny_model_dir, tmp_path / "reward", name="reward", seed=0))
    with running_system(tiny_model_dir, tmp_path / "fragile", {"reward": head}) as made:
        yield made


@contextmanager
def started_again(fragile: System, directory: Path) -> Iterator[None]:
    """The generation service where it was, with the weights that it was deployed with."""
    gone = fragile.generation
    listen = {"port": gone.port, "admin_port": gone.admin_port, "metrics_port": gone.metrics_port}
    values = {"model": tiny_model_config(fragile.model_dir), "listen": listen}
    with running_service("ppod_services.generation", directory, values):
        yield


@pytest.mark.parametrize("changes", [{}, OVERLAPPED], ids=["in step", "overlapped"])
def test_a_generation_service_that_comes_back_gets_its_weights(
    fragile: System, changes: Config, tmp_path: Path
) -> None:
    """It comes back with the weights that it was deployed with; the run goes on, and trains on no sample of those."""
    services = {**fragile.config("x")["services"], "judge_model": None, "recovery_timeout_s": 30}  # type: ignore[dict-item]
    config = fragile.config("recovers", steps=20, services=services, **changes)
    process = fragile.start(config)
    run_dir = Path(str(config["run_dir"]))
    wait_for_step(process, run_dir, 3)
    gone = fragile.generation
    gone.signal(signal.SIGKILL)
    gone.wait()
    with started_again(fragile, tmp_path):
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    records = steps_of(config)
    assert [record["step"] for record in records] == list(range(1, 21))
    assert all(record.get("sampler/gap_max", 0) < 1e-3 for record in records), "no sample of other weights"
    bound = 1 if changes else 0
    assert max(record["sampler/staleness_max"] for record in records) <= bound


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_a_replica_that_takes_no_weights_ends_no_run_where_versions_may_mix(
    system: System, max_staleness: int, tmp_path: Path
) -> None:
    """It has another model than the run, and samples whatever it is asked for, as no version is."""
    other = {"model": tiny_model_config(save_tiny_model(tmp_path / "untied", tied=False))}
    with running_service("ppod_services.generation", tmp_path, other) as second:
        services = {
            **system.config("x")["services"],  # type: ignore[dict-item]
            "generation": f"{second.target},{system.generation.target}",
            "generation_admin": f"{second.admin_target},{system.generation.admin_target}",
            "recovery_timeout_s": 30,
        }
        config = system.config(
            f"lost-{max_staleness}",
            steps=6,
            services=services,
            rollout={"batch_size": 8, "max_tokens": 8, "max_staleness": max_staleness},
            ppo={"importance_cap": 2.0},
            # Not "keep": what goes on with older keys and values differs from the policy, too.
            weight_transfer={"pause": "abort", "lost_replicas": "skip"},
        )
        result = system.train(config)
    assert result.returncode == 0, result.stderr
    records = steps_of(config)
    assert [record["step"] for record in records] == list(range(1, 7))
    # Its half of a step's samples is dropped, and counted, where no version is asked for.
    assert all(record["samples/stale"] in ((0, 4) if max_staleness else (0,)) for record in records)
    assert all(record.get("sampler/gap_max", 0) < 1e-3 for record in records), "no sample of other weights"


def test_who_is_told_to_stop_waits_for_no_service(fragile: System, tmp_path: Path) -> None:
    """The update is done and only its push is missing: the step is kept, and a resumed run begins by pushing it."""
    services = {**fragile.config("x")["services"], "judge_model": None, "recovery_timeout_s": 300}  # type: ignore[dict-item]
    # Updates of a second or two, so that it is in one when generation goes.
    config = fragile.config("stops", steps=4, services=services, ppo={"epochs": 100}, resume="if_possible")
    process = fragile.start(config)
    run_dir = Path(str(config["run_dir"]))
    wait_for_step(process, run_dir, 1)
    time.sleep(0.5)
    fragile.generation.signal(signal.SIGKILL)
    time.sleep(5)
    assert process.poll() is None, "it waits for generation"
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert "stopping without a push of version" in stderr
    done = len(steps_of(config))
    assert done >= 2
    assert f"stopped after step {done}; resume from" in stdout
    with started_again(fragile, tmp_path):
        result = fragile.train(config)
    assert result.returncode == 0, result.stderr
    records = steps_of(config)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert all(record["sampler/gap_max"] < 1e-3 for record in records), "no sample of other weights"
