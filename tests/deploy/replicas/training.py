"""A real trainer whose services are all pods, and what its records tell."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from support.forked import ForkedProcess
from support.pods import Cluster, Deployment, RunningPod
from support.processes import start_module, write_config
from support.services import tiny_model_config

from .conftest import deploy_reward, seconds_until, served_calls

Record = dict[str, float]


@dataclass
class Trained:
    """A run under way and its services."""

    reward: Deployment
    reference: Deployment
    generation: Deployment
    process: ForkedProcess
    run_dir: Path
    stderr_file: Path

    def records(self) -> list[Record]:
        """One for each step so far; evaluations are left out."""
        path = self.run_dir / "metrics.jsonl"
        # What follows the last line's end is still being written.
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        return [record for record in map(json.loads, lines) if "score/mean" in record]

    def steps(self, count: int, timeout_s: float = 60.0) -> None:
        """Wait for so many more steps."""
        target = len(self.records()) + count
        until = time.monotonic() + timeout_s
        while len(self.records()) < target:
            assert self.process.poll() is None, self.stderr
            assert time.monotonic() < until, f"{len(self.records())} of {target} steps\n{self.stderr}"
            time.sleep(0.02)

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text()

    def stop(self) -> list[Record]:
        """Let the run end at a checkpoint; its records, which must be whole."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(60) == 128 + signal.SIGTERM, self.stderr
        records = self.records()
        assert [record["step"] for record in records] == list(range(1, len(records) + 1))
        return records

    def worked(self, pod: RunningPod) -> float:
        """Generations that a pod has finished."""
        return served_calls(self.generation, pod, "Generate")


def assert_nothing_lost(records: list[Record], *, ahead: int = 0) -> None:
    """Every sample of every step is there, and was sampled by the very weights that the step began with.

    With rollouts that are begun `ahead` steps before they are those of that many steps before, at most.
    """
    for record in records:
        step = record["step"]
        assert record["samples/dropped"] == 0, step
        assert record["samples/stale"] == 0, step
        assert record["sampler/staleness_max"] <= ahead, step
        # Other weights, such as those that a pod starts with, differ by nats.
        if not ahead:
            assert record["sampler/divergence_max"] < 1e-3, step


@contextmanager
def training(
    cluster: Cluster,
    model_dir: Path,
    head: Path,
    *,
    generation: int = 1,
    reward: int = 1,
    policy: Mapping[str, object] | None = None,
    **changes: object,
) -> Iterator[Trained]:
    """Start services and a run that does not end by itself; yields after its third step."""
    model = tiny_model_config(model_dir)
    rewards = deploy_reward(cluster, model_dir, head, reward)
    reference = cluster.deploy("ppod-reference", "ppod_services.reference", {"model": model}, 1)
    weights = {
        "relay_targets": ["*:*"],
        "collective_addresses": ["*:*"],
        "shared_directories": ["/dev/shm"],
        "map_shared_files": True,
    }
    generator = cluster.deploy(
        "ppod-generation", "ppod_services.generation", {"model": model, "weights": weights}, generation
    )
    (cluster.directory / "prompts.txt").write_text("\n".join(f"{index:02d} is it" for index in range(60)))
    run_dir = cluster.directory / "run"
    config = {
        "run_dir": str(run_dir),
        "steps": 100_000,
        "policy": {**model, **(policy or {})},
        "services": {
            "reward": "k8s:///ppod-reward:grpc",
            "reference": "k8s:///ppod-reference:grpc",
            "generation": "k8s:///ppod-generation:grpc",
            "generation_admin": "k8s:///ppod-generation:admin",
            "reference_admin": "k8s:///ppod-reference:admin",
            "timeout_s": 60,
        },
        "prompts": {"path": str(cluster.directory / "prompts.txt"), "heldout": 6},
        "rollout": {"batch_size": 8, "max_tokens": 8},
        "optimizer": {"learning_rate": 0.003},
        "metrics": {"port": None, "tensorboard": False},
        **changes,
    }
    path = write_config(cluster.directory / "trainer.yaml", config)
    process = start_module("ppod_trainer", "--config", str(path), directory=cluster.directory, name="trainer")
    run = Trained(rewards, reference, generator, process, run_dir, cluster.directory / "trainer.stderr")
    try:
        run.steps(3)
        yield run
    finally:
        process.kill()
        process.wait(30)


def seconds_until_working(run: Trained, pod: RunningPod, timeout_s: float) -> float:
    """From now until a pod has generated for the run."""
    return seconds_until(lambda: run.worked(pod) > 0, timeout_s)
