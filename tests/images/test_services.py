"""The services' containers, hardened, answer real calls."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ppod import ReferenceClient, RewardClient
from support.containers import Container, must, run_to_exit, running
from support.models_here import logprobs_here, token_ids
from support.processes import ROOT

# Containers may start while other jobs have the cores.
pytestmark = pytest.mark.timeout(600)

CONFIGS = ROOT / "docker" / "configs"
LIKED, DISLIKED = "A joy from start to end.", "Two hours I will never get back."


@pytest.fixture(scope="module")
def reward(image: Callable[[str], str], network: str, models_volume: str) -> Iterator[Container]:
    volumes = {"/etc/ppod:ro": str(CONFIGS), "/models": models_volume}
    with running(image("services"), "ppod-test-reward", network=network, volumes=volumes) as container:
        container.wait_healthy()
        yield container


def test_a_container_scores_texts(reward: Container) -> None:
    with RewardClient(f"{reward.address}:50051", timeout_s=60) as client:
        scores = client.score_texts([LIKED, DISLIKED])
    assert scores.state.model == "reviews-reward"
    assert scores.values[0] > scores.values[1] + 1


def test_the_health_command_tells_model_and_process_apart(reward: Container) -> None:
    ask = ("python", "-m", "ppod.health")
    assert must(reward.exec(*ask, "127.0.0.1:50051")) == "127.0.0.1:50051: the process: SERVING"
    refused = reward.exec(*ask, "127.0.0.1:50051", "ppod.v1.ReferenceService")
    assert refused.code == 1
    assert "NOT_FOUND" in refused.stdout
    nobody = reward.exec(*ask, "127.0.0.1:50052", "ppod.v1.ReferenceService")
    assert nobody.code == 1
    assert "UNAVAILABLE" in nobody.stdout


def test_the_process_runs_with_nothing_to_escalate(reward: Container) -> None:
    status = must(reward.exec("grep", "-E", "^(Uid|Gid|CapEff|CapBnd|NoNewPrivs|Seccomp):", "/proc/1/status"))
    facts = {name: value.split() for name, value in (line.split(":", 1) for line in status.splitlines())}
    assert set(facts["Uid"]) == set(facts["Gid"]) == {"10001"}
    assert facts["CapEff"] == facts["CapBnd"] == ["0000000000000000"]
    assert facts["NoNewPrivs"] == ["1"]
    refused = reward.exec("touch", "/opt/ppod/there")
    assert "Read-only file system" in refused.stderr


def test_its_log_is_json_alone(reward: Container) -> None:
    lines = reward.log().splitlines()
    assert lines
    assert all(json.loads(line)["service"] == "reward" for line in lines)


def test_sigterm_ends_what_was_asked_before_and_then_the_container(reward: Container) -> None:
    """Last of those that share the container."""
    texts = [f"{number} reasons to see it. " + LIKED * 20 for number in range(24)]
    answers: list[np.ndarray] = []

    def ask() -> None:
        with RewardClient(f"{reward.address}:50051", timeout_s=120) as client:
            answers.append(client.score_texts(texts).values)

    calling = threading.Thread(target=ask)
    calling.start()
    until_taken(reward)
    assert reward.stop() == 0
    calling.join(60)
    assert [len(values) for values in answers] == [len(texts)]
    events = {line["event"]: line for line in map(json.loads, reward.log().splitlines())}
    assert events["draining"]["calls"] >= 1
    assert events["stopped"]["drained"] is True


def until_taken(container: Container) -> None:
    """Wait until the service has work of a caller in its queue or on the model."""
    script = (
        "import time, urllib.request as u\n"
        "while not any(line.startswith('ppod_team_accepted_tokens_total') and float(line.split()[-1]) > 2000\n"
        "              for line in u.urlopen('http://127.0.0.1:9101/metrics').read().decode().splitlines()):\n"
        "    time.sleep(0.05)\n"
    )
    must(container.exec("python", "-c", script))


def test_the_reference_by_another_command(image: Callable[[str], str], network: str, models_volume: str) -> None:
    ids = token_ids("The capital of France is Paris.")
    probe = "--health-cmd=python -m ppod.health 127.0.0.1:50052 ppod.v1.ReferenceService"
    with running(
        image("services"),
        "ppod-test-reference",
        network=network,
        volumes={"/etc/ppod:ro": str(CONFIGS), "/models": models_volume},
        command=["ppod_services.reference", "--config", "/etc/ppod/reference.yaml"],
        options=[probe],
    ) as container:
        container.wait_healthy()
        with ReferenceClient(f"{container.address}:50052", timeout_s=60) as client:
            told = client.logprobs([ids], [1])
        assert container.stop() == 0
    np.testing.assert_allclose(told.values[0], logprobs_here(ids), atol=0.1)


def test_a_wrong_configuration_is_told(image: Callable[[str], str], network: str, tmp_path: Path) -> None:
    (tmp_path / "reward.yaml").write_text("listen: {port: 50051}\n")
    tmp_path.chmod(0o755)
    volumes = {"/etc/ppod:ro": str(tmp_path)}
    with running(image("services"), "ppod-test-wrong", network=network, volumes=volumes) as container:
        while container.state("Running") == "true":
            time.sleep(0.2)
        assert container.state("ExitCode") == "2"
        assert "rewards" in container.log()


def test_a_model_cache_that_cannot_be_written_is_told(image: Callable[[str], str]) -> None:
    """Without a volume at /models, whose directory is read-only."""
    refused = run_to_exit(image("services"), options=[f"--volume={CONFIGS}:/etc/ppod:ro"])
    assert refused.code == 1
    assert "/models/cache: Read-only file system; point PPOD_CACHE_DIR" in refused.stderr
    assert "Traceback" not in refused.stderr
