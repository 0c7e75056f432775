"""A system of three real services with the tiny model, and trainers as processes."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.forked import ForkedProcess
from support.processes import ServiceProcess, running_service, start_module, write_config
from support.services import tiny_model_config
from support.tiny_head import save_tiny_head

Config = dict[str, object]


@dataclass(frozen=True)
class System:
    """Three running services, and a directory for runs."""

    reward: ServiceProcess
    reference: ServiceProcess
    generation: ServiceProcess
    model_dir: Path
    directory: Path

    def config(self, name: str, **changes: object) -> Config:
        """A short run; `changes` replace whole top-level keys."""
        return {
            "run_dir": str(self.directory / name),
            "steps": 4,
            "policy": tiny_model_config(self.model_dir),
            "services": {
                "reward": self.reward.target,
                "reference": self.reference.target,
                "generation": self.generation.target,
                "reference_admin": self.reference.admin_target,
                "generation_admin": self.generation.admin_target,
                "judge_model": "judge",
                "ready_timeout_s": 5,
                "timeout_s": 10,
                "recovery_timeout_s": 0,
            },
            "prompts": {"path": str(self.directory / "prompts.txt"), "heldout": 6},
            "rollout": {"batch_size": 8, "max_tokens": 8},
            "optimizer": {"learning_rate": 0.003},
            "metrics": {"port": None, "tensorboard": False},
            **changes,
        }

    def start(self, config: Mapping[str, object]) -> ForkedProcess:
        """Start a trainer."""
        name = Path(str(config["run_dir"])).name
        path = write_config(self.directory / f"{name}.yaml", config)
        return start_module("ppod_trainer", "--config", str(path), directory=self.directory, name=name)

    def train(self, config: Mapping[str, object]) -> subprocess.CompletedProcess[str]:
        """Run a trainer to its end."""
        process = self.start(config)
        stdout, stderr = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.wait(), stdout, stderr)


def records_of(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what depends on time or on what the services served before."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    varying = ("seconds/", "tokens_per_second", "policy/version", "reference/version")
    return [{key: value for key, value in one.items() if not key.startswith(varying)} for one in records]


def wait_for_step(process: ForkedProcess, run_dir: Path, step: int) -> None:
    """Wait until metrics.jsonl holds a step."""
    until = time.monotonic() + 60
    path = run_dir / "metrics.jsonl"
    while time.monotonic() < until:
        if path.is_file() and f'{{"step": {step}, ' in path.read_text():
            return
        if process.poll() is not None:
            break
        time.sleep(0.02)
    stdout, stderr = process.communicate(timeout=10)
    raise AssertionError(f"step {step} never came; exit code {process.returncode}\n{stdout}\n{stderr}")


@contextmanager
def running_system(
    model_dir: Path,
    directory: Path,
    heads: Mapping[str, str],
    *,
    reward_model_dir: Path | None = None,
    tracing_endpoint: str | None = None,
    weights: Mapping[str, object] | None = None,
) -> Iterator[System]:
    """Start three services, the rewards on a model of their own where one is given; prompts are two-digit words."""
    directory.mkdir(exist_ok=True)
    (directory / "prompts.txt").write_text("\n".join(f"{index:02d} is it" for index in range(60)))
    model = tiny_model_config(model_dir)
    trunk = tiny_model_config(reward_model_dir or model_dir)
    rewards = [{"name": name, "model": trunk, "head": head} for name, head in heads.items()]
    common = {"tracing": {"endpoint": tracing_endpoint}}
    with ExitStack() as stack:
        start: Callable[..., ServiceProcess] = lambda *args, **kw: stack.enter_context(running_service(*args, **kw))  # noqa: E731
        yield System(
            reward=start("ppod_services.reward", directory, {"rewards": rewards, **common}),
            reference=start("ppod_services.reference", directory, {"model": model, **common}),
            generation=start(
                "ppod_services.generation", directory, {"model": model, "weights": weights or {}, **common}
            ),
            model_dir=model_dir,
            directory=directory,
        )


@pytest.fixture(scope="module")
def system(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    directory = tmp_path_factory.mktemp("system")
    heads = {
        name: str(save_tiny_head(tiny_model_dir, directory / name, name=name, seed=seed))
        for seed, name in enumerate(("reward", "judge"))
    }
    with running_system(tiny_model_dir, directory, heads) as made:
        yield made
