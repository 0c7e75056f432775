"""A real Prometheus scrapes a real training run and its services; alerts fire when what they are for is provoked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from ppod import ClientSecurity, Delivery, Pin, PpodError, RewardClient
from ppod.client import NO_RETRY
from support.exported_metrics import exported
from support.processes import ServiceProcess, free_ports, running_service
from support.prometheus import Prometheus, Target, needs_prometheus, scraping
from support.services import tiny_model_config
from support.tiny_head import save_tiny_head
from support.tiny_model import NAN_TOKEN, save_nan_model

from .conftest import System, running_system, wait_for_step

TIMEOUT_S = 90.0
pytestmark = needs_prometheus


@dataclass(frozen=True)
class Watched:
    """What Prometheus sees: a run whose bounds are too narrow, a replica that it does not know, a shared service."""

    prometheus: Prometheus
    system: System
    shared: ServiceProcess

    def ask(self, token: str, tokens: int, reward: str = "") -> None:
        """One call that is not repeated; what becomes of it is for the metrics to say."""
        security = ClientSecurity(token=token)
        delivery = Delivery(retry=NO_RETRY)
        client = RewardClient(
            self.shared.target, timeout_s=5, security=security, delivery=delivery, pin=Pin(model=reward)
        )
        with client, suppress(PpodError):
            client.score([[NAN_TOKEN] * tokens])


def teams_file(path: Path) -> Path:
    """Teams whose tokens are their names; red may have 10 tokens a second."""
    red, blue = (
        {"name": name, "token_sha256": [hashlib.sha256(name.encode()).hexdigest()]} for name in ("red", "blue")
    )
    path.write_text(yaml.safe_dump({"teams": [{**red, "tokens_per_s": 10, "burst_s": 1}, blue]}))
    return path


def shared_values(model_dir: Path, head: Path, directory: Path) -> dict[str, object]:
    """A reward service for teams, one of whose models overflows."""
    broken = save_nan_model(model_dir, directory / "nan")
    broken_head = save_tiny_head(broken, directory / "broken", name="broken")
    rewards = [
        {"name": "sound", "model": tiny_model_config(model_dir), "head": str(head)},
        {"name": "broken", "model": tiny_model_config(broken), "head": str(broken_head)},
    ]
    return {"rewards": rewards, "tenancy": {"teams_file": str(teams_file(directory / "teams.yaml"))}}


@pytest.fixture(scope="module")
def watched(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    directory = tmp_path_factory.mktemp("watched")
    head = save_tiny_head(tiny_model_dir, directory / "reward", name="reward", seed=0)
    model = {"model": tiny_model_config(tiny_model_dir)}
    shared_config = shared_values(tiny_model_dir, head, directory)
    with ExitStack() as stack:
        system = stack.enter_context(running_system(tiny_model_dir, directory / "services", {"reward": str(head)}))
        forgotten = stack.enter_context(running_service("ppod_services.generation", directory, model))
        shared = stack.enter_context(running_service("ppod_services.reward", directory, shared_config))
        (port,) = free_ports(1)
        config = system.config(
            "watched",
            steps=100_000,
            # It waits for a service that goes away, and asks it anew all the while.
            services={**system.config("x")["services"], "judge_model": None, "recovery_timeout_s": 300},  # type: ignore[dict-item]
            metrics={"port": port, "tensorboard": False},
            watch={"steps": 1, "kl_per_token": 1e-9, "score_std": 1e9},
        )
        trainer = system.start(config)
        stack.callback(trainer.wait, 30)
        stack.callback(trainer.kill)
        wait_for_step(trainer, Path(str(config["run_dir"])), 1)
        targets = [
            Target("trainer", "trainer-0", port),
            Target("reward", "reward-0", system.reward.metrics_port),
            Target("reference", "reference-0", system.reference.metrics_port),
            Target("generation", "generation-0", system.generation.metrics_port),
            Target("generation", "generation-1", forgotten.metrics_port),
            Target("reward", "shared-0", shared.metrics_port, namespace="shared"),
        ]
        prometheus = stack.enter_context(scraping(directory / "prometheus", targets))
        yield Watched(prometheus, system, shared)


def test_real_processes_export_what_rules_and_dashboards_ask_for(watched: Watched) -> None:
    watched.prometheus.wait_for({"PpodOldWeights": {"pod": "generation-1"}}, lambda: None, TIMEOUT_S)
    told = set(watched.prometheus.get("metadata"))
    [last] = watched.prometheus.get("query?query=ppod_step_phase_seconds%7Bphase%3D%22step%22%7D")["result"]
    assert float(last["value"][1]) > 0
    # Queues that are empty, of known capacity.
    queues = watched.prometheus.get("query?query=instance:ppod_queue:saturation")["result"]
    assert {one["metric"]["pod"] for one in queues} == {
        "reward-0",
        "reference-0",
        "generation-0",
        "generation-1",
        "shared-0",
    }
    assert all(0 <= float(one["value"][1]) < 0.1 for one in queues)
    suffix = re.compile("_(bucket|sum|count|total)$")
    assert {suffix.sub("", name) for name in exported()} - {"up"} <= {suffix.sub("", name) for name in told}


def test_alerts_fire_when_they_are_provoked_and_others_stay_silent(watched: Watched) -> None:
    def trouble() -> None:
        watched.ask("nobody's", tokens=4)
        watched.ask("red", tokens=10)
        # Every token that is asked about is NaN to this model.
        watched.ask("blue", tokens=4, reward="broken")

    provoked = {
        # Scores that differ by less than 1e9 are all equal to this run.
        "PpodRunInTrouble": {"kind": "all_equal_rewards", "pod": "trainer-0"},
        # Any step leaves the reference by more than 1e-9 nats a token.
        "PpodKlOverBound": {"pod": "trainer-0"},
        # The trainer does not know this replica, so its weights stay as they were.
        "PpodOldWeights": {"pod": "generation-1"},
        "PpodUnknownCallers": {"namespace": "shared", "code": "UNAUTHENTICATED"},
        "PpodTeamOverQuota": {"namespace": "shared", "team": "red"},
        "PpodErrorRate": {"namespace": "shared", "component": "reward"},
    }
    watched.prometheus.wait_for(provoked, trouble, TIMEOUT_S)
    firing = watched.prometheus.firing()
    fired = {one["alertname"] for one in firing if one["namespace"] == "ppod"}
    silent = {"PpodErrorRate", "PpodQueueSaturated", "PpodReplicaNotReady", "PpodReplicaDown", "PpodTrainerStalled"}
    assert not fired & (silent | {"PpodRewardHacking", "PpodNoReplicaReady", "PpodSamplerGap", "PpodFirstRatioOff"})
    assert all(one["pod"] == "generation-1" for one in firing if one["alertname"] == "PpodOldWeights")


def test_a_service_that_is_gone_is_missed(watched: Watched) -> None:
    watched.system.reward.process.kill()
    wanted = {
        "PpodReplicaDown": {"pod": "reward-0"},
        "PpodNoReplicaReady": {"component": "reward"},
        "PpodTrainerCallsFail": {"code": "UNAVAILABLE"},
    }
    watched.prometheus.wait_for(wanted, lambda: None, TIMEOUT_S)
    down = {one["pod"] for one in watched.prometheus.firing() if one["alertname"] == "PpodReplicaDown"}
    assert down == {"reward-0"}, "the others answer"
