"""Trouble during a run: named, in seconds, and never trained on."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppod import WeightClient
from support.faulty_network import faulty_proxies
from support.processes import free_ports, running_service
from support.services import tiny_model_config
from support.tiny_head import save_tiny_head
from support.tiny_model import save_nan_model

from .conftest import System, records_of, running_system, wait_for_step


@pytest.fixture
def fragile(tiny_model_dir: Path, tmp_path: Path) -> Iterator[System]:
    """Services that a test may kill. Scores are NaN for texts that hold a certain token."""
    nan_dir = save_nan_model(tiny_model_dir, tmp_path / "nan")
    heads = {
        name: str(save_tiny_head(nan_dir, tmp_path / name, name=name, seed=seed))
        for seed, name in enumerate(("reward", "judge"))
    }
    with running_system(tiny_model_dir, tmp_path / "fragile", heads, reward_model_dir=nan_dir) as made:
        yield made


def without_judge(system: System) -> dict[str, object]:
    services = dict(system.config("x")["services"])  # type: ignore[call-overload]
    return {**services, "judge_model": None}


def test_nan_from_the_reward_model_stops_or_skips(fragile: System) -> None:
    """The tiny policy samples the token that the scores turn NaN for, sooner or later."""
    rollout = {"batch_size": 16, "max_tokens": 12}
    changes = {"steps": 12, "services": without_judge(fragile), "optimizer": {"learning_rate": 1e-6}}
    stopped = fragile.train(fragile.config("stop", rollout=rollout, **changes))
    assert stopped.returncode == 1
    assert "score of 'reward' is nan" in stopped.stderr
    assert "sample " in stopped.stderr

    config = fragile.config("skip", rollout={**rollout, "on_bad_sample": "skip"}, **changes)
    skipped = fragile.train(config)
    assert skipped.returncode == 0, skipped.stderr
    assert "dropped a sample: sample " in skipped.stderr
    records = [one for one in records_of(Path(str(config["run_dir"]))) if "score/mean" in one]
    assert sum(record["samples/dropped"] for record in records) > 0
    assert len(records) == 12


def test_a_prompt_too_long_is_named_before_the_first_step(fragile: System) -> None:
    (fragile.directory / "prompts.txt").write_text("\n".join(["x" * 200, *(f"{i:02d} is it" for i in range(9))]))
    prompts = {"path": str(fragile.directory / "prompts.txt"), "first_tokens": None, "heldout": 2}
    changes = {"steps": 2, "prompts": prompts, "services": without_judge(fragile)}
    refused = fragile.train(fragile.config("long", **changes))
    assert refused.returncode == 1
    assert "prompt 0 has 200 tokens, and generation takes 128, a response included" in refused.stderr
    assert "step" not in refused.stdout

    config = fragile.config(
        "long-skip", rollout={"batch_size": 10, "max_tokens": 7, "on_bad_sample": "skip"}, **changes
    )
    skipped = fragile.train(config)
    assert skipped.returncode == 0, skipped.stderr
    assert re.search(r"dropped a sample: .*200.*prompt 0", skipped.stderr)


def test_a_service_that_dies_is_named(fragile: System) -> None:
    # Its scores of some samples are NaN.
    rollout = {"batch_size": 8, "max_tokens": 7, "on_bad_sample": "skip"}
    config = fragile.config("dies", steps=1000, services=without_judge(fragile), rollout=rollout)
    process = fragile.start(config)
    wait_for_step(process, Path(str(config["run_dir"])), 2)
    fragile.reference.signal(signal.SIGKILL)
    start = time.monotonic()
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert time.monotonic() - start < 15
    assert "resume from" in stdout, "the last whole step is kept"
    assert f"ppod.v1.ReferenceService at {fragile.reference.target}" in stderr
    assert "Traceback" not in stderr


def test_a_refreshed_reference_that_is_started_again_gets_the_runs_reference(fragile: System, tmp_path: Path) -> None:
    """It comes back as the model that it was deployed with, and the run goes on with the one that it was given."""
    services = {**without_judge(fragile), "recovery_timeout_s": 30}
    rollout = {"batch_size": 8, "max_tokens": 7, "on_bad_sample": "skip"}
    config = fragile.config("returns", steps=59, reference_refresh_steps=30, services=services, rollout=rollout)
    process = fragile.start(config)
    run_dir = Path(str(config["run_dir"]))
    wait_for_step(process, run_dir, 31)
    gone = fragile.reference
    gone.signal(signal.SIGKILL)
    gone.wait()
    listen = {"port": gone.port, "admin_port": gone.admin_port, "metrics_port": gone.metrics_port}
    values = {"model": tiny_model_config(fragile.model_dir), "listen": listen}
    with running_service("ppod_services.reference", tmp_path, values), WeightClient(gone.admin_target) as weights:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
        assert "waiting up to 30 s for the services" in stderr
        assert weights.status().state.weight_version > 0
    steps = [one["step"] for one in records_of(run_dir) if "kl/reference" in one]
    assert steps == list(range(1, 60))


def test_a_service_that_hangs_for_longer_than_a_call_is_waited_for_and_changes_nothing(system: System) -> None:
    services = {**without_judge(system), "timeout_s": 1, "recovery_timeout_s": 30}
    straight, hung = (system.config(name, steps=60, services=services) for name in ("straight", "hung"))
    assert system.train(straight).returncode == 0
    process = system.start(hung)
    run_dir = Path(str(hung["run_dir"]))
    wait_for_step(process, run_dir, 2)
    system.reward.signal(signal.SIGSTOP)
    try:
        until = time.monotonic() + 30
        while "waiting up to 30 s for the services" not in (system.directory / "hung.stderr").read_text():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.02)
    finally:
        system.reward.signal(signal.SIGCONT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert f"from ppod.v1.RewardService at {system.reward.target}" in stderr
    assert records_of(run_dir) == records_of(Path(str(straight["run_dir"])))


def test_a_port_that_answers_late_is_waited_for_at_the_start(system: System) -> None:
    """Of several replicas all but one may still start when the run does, and nobody waits for administration ports."""
    with faulty_proxies(system.generation.admin_port, 1) as [late]:
        late.refuse()
        services = {**without_judge(system), "generation_admin": late.target, "ready_timeout_s": 30}
        process = system.start(system.config("late", services=services))
        said, until = system.directory / "late.stderr", time.monotonic() + 30
        while not said.is_file() or "waiting up to 30 s for the services" not in said.read_text():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.02)
        late.mend()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert f"{late.target} does not tell which weights it has" in stderr


def test_a_service_that_is_not_there_is_named(system: System) -> None:
    (port,) = free_ports(1)
    services = {**system.config("x")["services"], "reward": f"127.0.0.1:{port}", "ready_timeout_s": 1}  # type: ignore[dict-item]
    result = system.train(system.config("absent", services=services))
    assert result.returncode == 1
    assert f"ppod.v1.RewardService at 127.0.0.1:{port} was not ready within 1 s" in result.stderr


def test_another_tokenizer_is_refused(system: System, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(system.model_dir, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("<|pad|>", "<|fill|>"))
    policy = {"source": str(other), "device": "cpu", "dtype": "float32", "threads": 1}
    result = system.train(system.config("tokenizer", policy=policy))
    assert result.returncode == 1
    assert "tokenizer" in result.stderr


def test_a_metrics_port_in_use_is_named(system: System) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = system.train(system.config("port", metrics={"port": port}))
    assert result.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in result.stderr


def test_a_missing_model_and_a_missing_checkpoint_are_named(system: System) -> None:
    result = system.train(system.config("no-model", policy={"source": "./nowhere"}))
    assert (result.returncode, "model './nowhere': no such directory" in result.stderr) == (1, True)
    result = system.train(system.config("no-checkpoint", resume=True))
    assert (result.returncode, "holds no checkpoint" in result.stderr) == (1, True)


def test_configuration_faults_exit_2_all_at_once(system: System) -> None:
    result = system.train(system.config("faults", stepz=1, seed=-1))
    assert result.returncode == 2
    assert "stepz: unknown key" in result.stderr
    assert "seed:" in result.stderr
    assert not (system.directory / "faults").exists()
