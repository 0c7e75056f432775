"""The launcher with the real services and the real trainer, through the `ppod` command."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml
from tokenizers import Tokenizer

from deploy.conftest import (
    Section,
    StartPpod,
    children_of_run,
    eventually_no_children,
    metrics_lines,
    newest_checkpoint,
    processes_naming,
    wait_for_steps,
)
from support.authority import Authority
from support.processes import ROOT, environment, free_ports

CHILDREN = {"reward", "reference", "generation", "trainer"}


def test_every_fault_is_named_at_once_and_nothing_starts(start_ppod: StartPpod, run_file: Path, run_dir: Path) -> None:
    values = yaml.safe_load(run_file.read_text())
    values["services"]["reward"]["batching"] = {"max_batch_tokens": 0}
    values["services"]["generation"]["modle"] = {}
    values["trainer"]["services"] = {"reference": "127.0.0.1:9"}
    values["surplus"] = 1
    run_file.write_text(yaml.safe_dump(values))

    ppod = start_ppod("run", "--config", str(run_file), "--trainer.ppo.epochs", "none", "--trainer.steps=0")

    assert ppod.wait() == 2
    for path in (
        "services.reward.batching.max_batch_tokens: ",
        "services.generation.modle: unknown key",
        "trainer.ppo.epochs: ",
        "trainer.steps: ",
        "trainer.services.reference: 127.0.0.1:9, but that service listens on ",
        "surplus: unknown key",
    ):
        assert f"\n  {path}" in ppod.stderr
    assert "6 problems" in ppod.stderr
    assert not run_dir.exists()


def test_a_taken_port_is_named_before_anything_starts(start_ppod: StartPpod, run_file: Path, run_dir: Path) -> None:
    port = yaml.safe_load(run_file.read_text())["services"]["reference"]["listen"]["admin_port"]
    with socket.socket() as holder, socket.socket() as other:
        holder.bind(("127.0.0.1", port))
        holder.listen()
        other.bind(("127.0.0.1", 0))
        other.listen()
        metrics_port = other.getsockname()[1]
        ppod = start_ppod("run", "--config", str(run_file), "--trainer.metrics.port", str(metrics_port))
        assert ppod.wait() == 1
    assert f"services.reference.listen.admin_port: 127.0.0.1:{port}: Address already in use" in ppod.stderr
    assert f"trainer.metrics.port: 127.0.0.1:{metrics_port}: Address already in use" in ppod.stderr
    assert not (run_dir / "logs").exists()


def test_a_run_directory_that_cannot_be_written_is_named(start_ppod: StartPpod, run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    (tmp_path / "run" / "config").mkdir(parents=True)
    (tmp_path / "run" / "config" / "reward.yaml").mkdir()
    for run_dir, words in ((tmp_path / "taken", "File exists"), (tmp_path / "run", "reward.yaml: Is a directory")):
        ppod = start_ppod("run", "--config", str(run_file), f"--trainer.run-dir={run_dir}")
        assert ppod.wait() == 1
        [error] = ppod.stderr.splitlines()
        assert error.startswith(f"ppod: trainer.run_dir: {run_dir} cannot be written: {run_dir}")
        assert error.endswith(words)


def test_a_service_that_cannot_start_is_named_and_the_others_end(
    start_ppod: StartPpod, run_file: Path, run_dir: Path
) -> None:
    ppod = start_ppod("run", "--config", str(run_file), "--services.generation.model.source", "/no/such/model")
    assert ppod.wait() == 1
    assert "service generation ended: exit code 1" in ppod.stderr
    assert "/no/such/model" in ppod.stderr.split("generation.jsonl:")[1]
    assert "ready after" not in ppod.stderr.split("service generation ended")[1]
    assert not children_of_run(run_dir)
    assert not (run_dir / "metrics.jsonl").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_the_services_start_stops_them(
    start_ppod: StartPpod, run_file: Path, run_dir: Path, number: signal.Signals, code: int
) -> None:
    ppod = start_ppod("run", "--config", str(run_file))
    ppod.wait_until(lambda: set(children_of_run(run_dir)) == CHILDREN, "services and trainer")
    ppod.signal(number)
    assert ppod.wait() == code
    assert not children_of_run(run_dir)
    assert "Traceback" not in ppod.stderr


def test_ctrl_c_saves_a_checkpoint_and_resume_goes_on_from_it(
    start_ppod: StartPpod, run_file: Path, run_dir: Path
) -> None:
    steps = 60
    ppod = start_ppod("run", "--config", str(run_file), "--trainer.steps", str(steps))
    wait_for_steps(ppod, run_dir, 2)
    assert set(children_of_run(run_dir)) == CHILDREN
    ppod.signal(signal.SIGINT)
    assert ppod.wait() == 130
    assert not children_of_run(run_dir)
    assert newest_checkpoint(run_dir) is not None
    assert metrics_lines(run_dir) < steps

    again = start_ppod("run", "--config", str(run_file))
    assert again.wait() == 2
    assert f"trainer.run_dir: {run_dir} holds an earlier run; --resume {run_dir} goes on" in again.stderr

    resumed = start_ppod("run", "--resume", str(run_dir))
    assert resumed.wait(120) == 0, resumed.stderr
    recorded = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert sorted({record["step"] for record in recorded if "seconds/step" in record})[-1] in {steps - 1, steps}
    assert not children_of_run(run_dir)


def ranks_of_run(run_dir: Path) -> list[int]:
    """Process ids of the trainer's ranks, rank 0 first."""
    config = f"{run_dir}/config/trainer.yaml"
    return sorted(pid for pid, command in processes_naming(run_dir).items() if config in command)


def test_a_trainer_of_two_ranks_stops_and_resumes_with_one(
    start_ppod: StartPpod, run_file: Path, run_dir: Path
) -> None:
    ppod = start_ppod("run", "--config", str(run_file), "--trainer.steps", "6", "--trainer.ranks.local", "2")
    wait_for_steps(ppod, run_dir, 2)
    assert len(ranks_of_run(run_dir)) == 2
    ppod.signal(signal.SIGTERM)
    assert ppod.wait() == 143, ppod.stderr
    assert "killed" not in ppod.stderr
    assert not children_of_run(run_dir)
    assert newest_checkpoint(run_dir) is not None

    resumed = start_ppod("run", "--resume", str(run_dir), "--trainer.ranks.local", "1")
    assert resumed.wait(120) == 0, resumed.stderr
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4, 5, 6, 6]


@pytest.mark.parametrize("seen_late", [False, True])
def test_a_rank_that_is_killed_is_named_and_all_end(
    start_ppod: StartPpod, run_file: Path, run_dir: Path, seen_late: bool
) -> None:
    ppod = start_ppod("run", "--config", str(run_file), "--trainer.ranks.local", "2")
    wait_for_steps(ppod, run_dir, 2)
    if seen_late:
        # Rank 0 notices at once that the other is gone, and may end before the launcher looks.
        ppod.signal(signal.SIGSTOP)
    os.kill(ranks_of_run(run_dir)[1], signal.SIGKILL)
    if seen_late:
        ppod.wait_until(lambda: not ranks_of_run(run_dir), "end of rank 0")
        ppod.signal(signal.SIGCONT)
    assert ppod.wait() == 1
    assert "trainer's rank 1 ended: killed by SIGKILL" in ppod.stderr
    assert not children_of_run(run_dir)


def test_a_killed_launcher_leaves_no_orphan(start_ppod: StartPpod, run_file: Path, run_dir: Path) -> None:
    ppod = start_ppod("run", "--config", str(run_file))
    wait_for_steps(ppod, run_dir)
    assert set(children_of_run(run_dir)) == CHILDREN
    ppod.signal(signal.SIGKILL)
    assert ppod.wait() == -signal.SIGKILL
    assert eventually_no_children(run_dir, 20.0), children_of_run(run_dir)


def test_a_launcher_killed_while_the_services_start_leaves_no_orphan(
    start_ppod: StartPpod, run_file: Path, run_dir: Path
) -> None:
    ppod = start_ppod("run", "--config", str(run_file))
    ppod.wait_until(lambda: bool(children_of_run(run_dir)), "first service")
    ppod.signal(signal.SIGKILL)
    ppod.wait()
    assert eventually_no_children(run_dir, 5.0), children_of_run(run_dir)


def test_a_service_killed_in_mid_run_is_named_and_the_trainer_stops(
    start_ppod: StartPpod, run_file: Path, run_dir: Path
) -> None:
    ppod = start_ppod("run", "--config", str(run_file))
    wait_for_steps(ppod, run_dir)
    os.kill(children_of_run(run_dir)["reference"], signal.SIGKILL)
    killed_at = time.monotonic()
    ppod.wait_until(lambda: "service reference ended" in ppod.stderr, "word of the death", 5.0)
    assert time.monotonic() - killed_at < 1.0
    assert ppod.wait() == 1
    assert "service reference ended: killed by SIGKILL" in ppod.stderr
    assert not children_of_run(run_dir)


def test_a_run_directory_in_use_is_refused(start_ppod: StartPpod, run_file: Path, run_dir: Path) -> None:
    first = start_ppod("up", "--config", str(run_file))
    first.wait_until(lambda: bool(children_of_run(run_dir)), "first service")
    second = start_ppod("up", "--config", str(run_file))
    assert second.wait() == 1
    assert f"{run_dir}: another run is using this directory" in second.stderr
    first.signal(signal.SIGINT)
    assert first.wait() == 130


def test_services_with_tls_are_found_ready(
    start_ppod: StartPpod, run_file: Path, run_values: dict[str, Section], tmp_path: Path
) -> None:
    authority = Authority(trustme.CA(), tmp_path)
    values: dict[str, Any] = {**run_values}
    values["trainer"]["services"] = {"ready_timeout_s": 40, "tls": {"ca_file": authority.root_file()}}
    for service, port in zip(values["services"].values(), free_ports(3), strict=True):
        service["listen"]["health_port"] = port
        service["tls"] = authority.issue("server")
    run_file.write_text(yaml.safe_dump(values))
    up = start_ppod("up", "--config", str(run_file))
    up.wait_until(lambda: "Ctrl-C stops them" in up.stderr, "three ready services")
    up.signal(signal.SIGINT)
    assert up.wait() == 130


def is_free(run_dir: Path) -> bool:
    with (run_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_trainer_that_outlives_its_launcher_keeps_the_run_directory(
    start_ppod: StartPpod, run_file: Path, run_dir: Path
) -> None:
    ppod = start_ppod("run", "--config", str(run_file))
    wait_for_steps(ppod, run_dir, 2)
    trainer = children_of_run(run_dir)["trainer"]
    # As in an update of minutes.
    os.kill(trainer, signal.SIGSTOP)
    try:
        ppod.signal(signal.SIGKILL)
        ppod.wait()
        resumed = start_ppod("run", "--resume", str(run_dir))
        assert resumed.wait() == 1
        assert f"{run_dir}: another run is using this directory" in resumed.stderr
    finally:
        os.kill(trainer, signal.SIGCONT)
    until = time.monotonic() + 20.0
    while not is_free(run_dir):
        assert time.monotonic() < until, children_of_run(run_dir)
        time.sleep(0.05)


def test_up_serves_score_and_generate(
    start_ppod: StartPpod, run_file: Path, run_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    services = yaml.safe_load(run_file.read_text())["services"]
    up = start_ppod("up", "--config", str(run_file))
    up.wait_until(lambda: "Ctrl-C stops them" in up.stderr, "three ready services")

    def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ppod_deploy", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=environment(), input="a\nab\n", capture_output=True, text=True, check=False
        )

    score = ask("score", "--json", "--target", f"127.0.0.1:{services['reward']['listen']['port']}")
    lines = [yaml.safe_load(line) for line in score.stdout.splitlines()]
    assert [line["text"] for line in lines] == ["a", "ab"]
    assert lines[0]["score"] != lines[1]["score"]

    target = f"127.0.0.1:{services['generation']['listen']['port']}"
    options = ("--tokenizer", str(tiny_model_dir), "--max-tokens", "5", "--seed", "3", "--n", "2", "--json", "hi")
    first, second = (ask("generate", "--target", target, *options) for _ in range(2))
    assert first.stdout == second.stdout
    completions = [yaml.safe_load(line) for line in first.stdout.splitlines()]
    assert [(one["prompt"], one["seed"]) for one in completions] == [("hi", 3), ("hi", 4)]
    assert all(1 <= len(one["logprobs"]) <= 5 for one in completions)
    assert first.stderr == ""
    other = tmp_path / "tokenizer"
    other.mkdir()
    vocabulary = Tokenizer.from_file(str(tiny_model_dir / "tokenizer.json"))
    vocabulary.add_tokens(["one more"])
    vocabulary.save(str(other / "tokenizer.json"))
    taken_for = ask("generate", "--target", target, "--tokenizer", str(other), *options[2:])
    assert taken_for.returncode == 0
    assert f"the tokenizer of {other} is not the service's" in taken_for.stderr

    unknown = ask("score", "--target", f"127.0.0.1:{services['reward']['listen']['port']}", "--model", "nobody", "x")
    assert unknown.returncode == 1
    assert unknown.stderr.count("\n") == 1
    assert "nobody" in unknown.stderr
    assert "Traceback" not in unknown.stderr

    up.signal(signal.SIGINT)
    assert up.wait() == 130
    assert not children_of_run(run_dir)
