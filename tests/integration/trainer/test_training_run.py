"""Whole runs with a tiny model: outputs, reproducibility, resumption, the reference's refresh, metrics."""

from __future__ import annotations

import json
import signal
import time
import urllib.request
from pathlib import Path
from typing import cast

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppod import WeightClient
from ppod_trainer.metrics import GAUGES
from support.processes import free_ports, running_service
from support.services import tiny_model_config
from support.tiny_model import build_model
from support.weight_tensors import weight_tensors

from .conftest import System, records_of, wait_for_step


def final_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "final_model" / "model.safetensors")


def assert_equal_weights(first: Path, second: Path) -> None:
    one, two = final_weights(first), final_weights(second)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_leaves_all_that_it_promises(system: System) -> None:
    config = system.config("whole", metrics={"port": None, "tensorboard": True})
    result = system.train(config)
    assert result.returncode == 0, result.stderr
    run_dir = Path(str(config["run_dir"]))
    for text in ("step 4/4", "mean score", "held-out judge", "distinct-2", "KL to the reference"):
        assert text in result.stdout
    assert result.stderr == ""
    records = records_of(run_dir)
    steps = [record for record in records if "score/mean" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert all(record["policy/first_ratio_error"] == 0 for record in steps)
    assert all(record["sampler/gap_max"] < 1e-3 for record in steps), "the sampler runs what the trainer has"
    assert steps[-1]["kl/reference"] > 0
    judged = [record["step"] for record in steps if "judge/mean" in record]
    assert judged == [1, 4]
    evaluations = [record for record in records if "heldout/score" in record]
    assert [record["step"] for record in evaluations] == [0, 4]
    assert evaluations[0]["heldout/kl"] == pytest.approx(0, abs=1e-3)
    model = AutoModelForCausalLM.from_pretrained(run_dir / "final_model")
    assert AutoTokenizer.from_pretrained(run_dir / "final_model").eos_token == "<|end|>"
    start = AutoModelForCausalLM.from_pretrained(system.model_dir)
    assert not torch.equal(model.model.embed_tokens.weight, start.model.embed_tokens.weight)
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert any((run_dir / "tensorboard").iterdir())
    assert "mean score" in (run_dir / "report.txt").read_text()
    samples = [json.loads(line) for line in (run_dir / "samples" / "step_000004.jsonl").read_text().splitlines()]
    assert len(samples) == 6
    assert {"prompt", "continuation", "score", "judge"} <= samples[0].keys()


def test_same_seed_same_run_and_another_seed_another(system: System) -> None:
    configs = [system.config("first"), system.config("second"), system.config("other", seed=1)]
    for config in configs:
        assert system.train(config).returncode == 0
    first, second, other = (Path(str(config["run_dir"])) for config in configs)
    assert records_of(first) == records_of(second)
    assert (first / "samples" / "step_000004.jsonl").read_text() == (
        second / "samples" / "step_000004.jsonl"
    ).read_text()
    assert_equal_weights(first, second)
    assert records_of(first) != records_of(other)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_resumes_to_the_same_end(system: System, number: int) -> None:
    steps = 40
    straight = system.config(
        f"straight-{number}",
        steps=steps,
        kl={"adaptive": {"target": 2.0, "horizon": 100}},
        rewards={"normalize": "whiten"},
    )
    assert system.train(straight).returncode == 0

    stopped = {**straight, "run_dir": str(system.directory / f"stopped-{number}")}
    run_dir = Path(str(stopped["run_dir"]))
    process = system.start(stopped)
    wait_for_step(process, run_dir, 3)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 128 + number, stderr
    assert "resume from" in stdout
    done = json.loads(next(run_dir.glob("checkpoints/*/trainer.json")).read_text())["step"]
    assert 3 <= done < steps
    assert not (run_dir / "final_model").exists()

    resumed = system.train({**stopped, "resume": True})
    assert resumed.returncode == 0, resumed.stderr
    assert_equal_weights(Path(str(straight["run_dir"])), run_dir)
    assert records_of(Path(str(straight["run_dir"]))) == records_of(run_dir)


def test_a_run_is_not_resumed_with_other_prompts(system: System, tmp_path: Path) -> None:
    """Others would be held out than those that were judged before, and what was solved would be said of others."""
    path = tmp_path / "prompts.txt"
    lines = [f"{index:02d} is it" for index in range(60)]
    path.write_text("\n".join(lines))
    prompts = {"path": str(path), "heldout": 6}
    config = system.config("other-prompts", steps=2, prompts=prompts)
    assert system.train(config).returncode == 0
    path.write_text("\n".join(lines[:30]))
    changed = system.train({**config, "resume": True})
    assert changed.returncode == 1
    assert "resume: the prompts of prompts.path are not those that this run had at step 2" in changed.stderr
    path.write_text("\n".join(lines) + "\n")
    assert system.train({**config, "resume": True}).returncode == 0


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, "holds step_000002 of an earlier run; set resume"),
        ({"seed": 1, "resume": True}, "resume with the configuration in the run directory"),
    ],
)
def test_a_run_that_does_not_fit_its_directory_changes_nothing_there(
    system: System, changes: dict[str, object], problem: str
) -> None:
    """Neither one that would begin over another's checkpoints, nor one that would resume it as another run."""
    config = system.config(f"taken-{len(changes)}", steps=2)
    assert system.train(config).returncode == 0
    run_dir = Path(str(config["run_dir"]))
    kept = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    result = system.train({**config, **changes})
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == kept
    assert result.returncode == 1
    assert problem in result.stderr


def test_a_reference_that_takes_no_weights_is_found_at_the_start(system: System) -> None:
    """Not at its first refresh, which may be hours away."""
    (nowhere,) = free_ports(1)
    config = system.config("no-refresh", reference_refresh_steps=3)
    config["services"] = {**cast("dict[str, object]", config["services"]), "reference_admin": f"127.0.0.1:{nowhere}"}
    result = system.train(config)
    assert result.returncode == 1
    assert f"127.0.0.1:{nowhere} does not tell which weights it has" in result.stderr
    assert result.stdout == "", "before anything is sampled"


def test_the_reference_is_refreshed(system: System) -> None:
    config = system.config("refreshed", steps=5, reference_refresh_steps=2)
    result = system.train(config)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the reference is now the policy") == 2
    kl = [record["kl/reference"] for record in records_of(Path(str(config["run_dir"]))) if "kl/reference" in record]
    assert abs(kl[1]) > 1e-3
    assert kl[0] == pytest.approx(0, abs=1e-4)
    assert kl[2] == pytest.approx(0, abs=1e-4), "right after the refresh policy and reference are equal"
    assert kl[4] == pytest.approx(0, abs=1e-4)


def test_every_replica_of_a_reference_is_refreshed_and_pinned(system: System, tmp_path: Path) -> None:
    """A replica that somebody gives other weights works no more; without any the run stops: KL would be to those."""
    values = {"model": tiny_model_config(system.model_dir)}
    with (
        running_service("ppod_services.reference", tmp_path, values) as first,
        running_service("ppod_services.reference", tmp_path, values) as second,
        WeightClient(first.admin_target) as one,
        WeightClient(second.admin_target) as two,
    ):
        services = {
            **cast("dict[str, object]", system.config("unused")["services"]),
            "reference": f"{first.target},{second.target}",
            "reference_admin": f"{first.admin_target},{second.admin_target}",
        }
        config = system.config("refreshed-replicas", steps=5, reference_refresh_steps=2, services=services)
        result = system.train(config)
        assert result.returncode == 0, result.stderr
        kl = [record["kl/reference"] for record in records_of(Path(str(config["run_dir"]))) if "kl/reference" in record]
        assert abs(kl[1]) > 1e-3
        assert [kl[step] for step in (0, 2, 4)] == pytest.approx([0, 0, 0], abs=1e-4)
        version = one.status().state.weight_version
        assert two.status().state.weight_version == version > 0
        # A run that begins there says what it has; then somebody gives one of them another version.
        config = system.config("disturbed", steps=2000, services=services)
        process = system.start(config)
        wait_for_step(process, Path(str(config["run_dir"])), 2)
        for replica, step in ((two, 6), (one, None)):
            replica.prepare(version + 1, weight_tensors(build_model(seed=9)))
            replica.commit(version + 1)
            if step is not None:
                # The other one still has the run's.
                wait_for_step(process, Path(str(config["run_dir"])), step)
        _, stderr = process.communicate(timeout=60)
        assert process.wait() not in (None, 0)
        assert f"the reference serves version {version}, which somebody pushed to it" in stderr
        assert f"weight_version: the server has {version + 1}, the request needs {version}; from ppod.v1.Ref" in stderr


@pytest.mark.parametrize("lost", ["stop", "skip"])
def test_a_refreshed_reference_whose_replica_dies_is_done_without_where_replicas_may_be_lost(
    system: System, tmp_path: Path, lost: str
) -> None:
    values = {"model": tiny_model_config(system.model_dir)}
    with running_service("ppod_services.reference", tmp_path, values) as mortal:
        services = {
            **cast("dict[str, str]", system.config("unused")["services"]),
            "reference": f"{system.reference.target},{mortal.target}",
            "reference_admin": f"{system.reference.admin_target},{mortal.admin_target}",
        }
        transfer = {"lost_replicas": lost}
        changes = {"reference_refresh_steps": 4, "services": services, "weight_transfer": transfer}
        config = system.config(f"reference-{lost}", steps=1000, **changes)
        run_dir = Path(str(config["run_dir"]))
        process = system.start(config)
        wait_for_step(process, run_dir, 5)
        mortal.signal(signal.SIGKILL)
        if lost == "skip":
            wait_for_step(process, run_dir, len((run_dir / "metrics.jsonl").read_text().splitlines()) + 9)
            process.terminate()
        _, stderr = process.communicate(timeout=60)
    assert (process.wait() == 1) == (lost == "stop")
    assert ("weight_transfer.lost_replicas: skip would go on without it" in stderr) == (lost == "stop")
    assert (f"failed on 1 of 2: {mortal.admin_target}" in stderr) == (lost == "skip")
    assert "Traceback" not in stderr


def test_prometheus_exports_every_gauge_while_the_run_goes_on(system: System) -> None:
    (port,) = free_ports(1)
    config = system.config("scraped", steps=200, metrics={"port": port, "tensorboard": False})
    run_dir = Path(str(config["run_dir"]))
    process = system.start(config)
    try:
        wait_for_step(process, run_dir, 2)
        time.sleep(0.1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as reply:
            text = reply.read().decode()
    finally:
        process.terminate()
        process.communicate(timeout=30)
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}
    for name, _ in GAUGES.values():
        assert name in values
    assert values["ppod_step"] >= 2
    assert values["ppod_samples_total"] == 8 * values["ppod_step"]
    assert values["ppod_policy_entropy_nats"] > 0
    assert values['ppod_step_phase_seconds{phase="update"}'] > 0
    assert values['ppod_step_phase_seconds{phase="push_prepare"}'] > 0
    assert values["ppod_push_bytes"] == sum(4 * one.numel() for one in build_model(seed=0).parameters())
    assert values["ppod_push_fallbacks"] == values["ppod_push_lost_replicas"] == 0
    assert values['ppod_client_rpc_seconds_count{method="/ppod.v1.RewardService/Score"}'] >= 2
