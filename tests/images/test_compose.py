"""compose.yaml as podman-compose runs it: the whole system in containers, with the real model."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ppod import RewardClient
from support.containers import CONTAINERS_CONF, START_TIMEOUT_S, must, podman
from support.processes import ROOT

PROJECT = f"ppod-test-{os.getpid()}"
SERVICES = ("reward", "reference", "generation")


@dataclass(frozen=True)
class Compose:
    """A project of podman-compose, with the shipped compose file."""

    configs: Path
    tag: str

    def run(self, *arguments: str, timeout_s: float = 600.0) -> str:
        done = subprocess.run(
            [os.environ["PODMAN_COMPOSE"], "-p", PROJECT, "-f", str(ROOT / "docker/compose.yaml"), *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={
                **os.environ,
                "CONTAINERS_CONF": str(CONTAINERS_CONF),
                "PPOD_CONFIGS": str(self.configs),
                "PPOD_TAG": self.tag,
            },
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def wait_healthy(self) -> None:
        """Without systemd podman runs no HEALTHCHECK by itself."""
        until = time.monotonic() + START_TIMEOUT_S
        for service in SERVICES:
            name = f"{PROJECT}_{service}_1"
            while podman("healthcheck", "run", name).code != 0:
                running = podman("container", "inspect", "--format", "{{.State.Running}}", name).stdout.strip()
                assert running == "true", f"{name}:\n{podman('logs', name)}"
                assert time.monotonic() < until, f"{name} is not healthy:\n{podman('logs', name)}"
                time.sleep(0.5)


@pytest.fixture
def compose(image: Callable[[str], str], tmp_path: Path) -> Iterator[Compose]:
    """The shipped configurations, but for a run of one short step."""
    configs = tmp_path / "configs"
    shutil.copytree(ROOT / "docker/configs", configs)
    trainer = yaml.safe_load((configs / "trainer.yaml").read_text())
    trainer |= {"steps": 1, "prompts": {"first_tokens": 6, "heldout": 8}}
    trainer["rollout"] = {"batch_size": 8, "max_tokens": 8}
    trainer["optimizer"] = {"learning_rate": 1e-5}
    (configs / "trainer.yaml").write_text(yaml.safe_dump(trainer))
    project = Compose(configs, image("services").rpartition(":")[2])
    try:
        yield project
    finally:
        project.run("--profile", "train", "down", "--volumes", "--timeout", "5")


@pytest.mark.timeout(900)
def test_the_whole_system_takes_a_step_of_ppo(compose: Compose) -> None:
    compose.run("up", "--detach", *SERVICES)
    compose.wait_healthy()
    with RewardClient("127.0.0.1:50051", timeout_s=60) as client:
        assert client.score_texts(["A joy from start to end."]).state.model == "reviews-reward"
    assert unreachable("127.0.0.1", 50062), "an admin port must not be published"

    said = compose.run("--profile", "train", "run", "--rm", "--no-deps", "--service-ports", "trainer")
    assert "step 1/1" in said

    runs = Path(must(podman("volume", "inspect", "--format", "{{.Mountpoint}}", f"{PROJECT}_runs")))
    records = [json.loads(line) for line in (runs / "ppo/metrics.jsonl").read_text().splitlines()]
    assert any("score/mean" in record for record in records)
    assert (runs / "ppo/final_model/model.safetensors").stat().st_uid == 10001
    compose.run("stop", "--timeout", "40")
    for service in SERVICES:
        state = must(podman("container", "inspect", "--format", "{{.State.ExitCode}}", f"{PROJECT}_{service}_1"))
        assert state == "0", service


def unreachable(host: str, port: int) -> bool:
    """Whether nothing listens there."""
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) != 0


@pytest.mark.skipif("PODMAN_COMPOSE" not in os.environ, reason="`make test-images` says where podman-compose is")
def test_the_other_compose_files_fit_on_the_first() -> None:
    files = [part for name in ("", ".vllm", ".gpu") for part in ("-f", str(ROOT / f"docker/compose{name}.yaml"))]
    command = [os.environ["PODMAN_COMPOSE"], "-p", PROJECT, *files, "--profile", "train", "config"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    services = yaml.safe_load(done.stdout)["services"]
    assert services["generation"]["image"].startswith("localhost/ppod-generation:")
    assert services["generation"]["command"][-1] == "/etc/ppod/generation-vllm.yaml"
    assert services["generation"]["read_only"] is True
    health = services["generation"]["healthcheck"]
    assert (health["start_period"], health["test"][-1]) == ("900s", "ppod.v1.GenerationService")
    for service in services.values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
    assert set(services) == {*SERVICES, "trainer"}
