"""Seconds of a step where the next rollouts are made meanwhile, against steps that wait for theirs.

Run as `python -m benchmarks.overlap.compare` with tests/ on the path. Two settings:

1. simulated: the engine of generation sleeps for a fixed time a token (`simulated_generation`), as one on a device of
   its own would leave this machine's cores alone; a tiny model, so that all else is small beside rollout and update.
   The engine's speed is set so that a rollout takes about as long as an update. Bar: a step takes at most 1.15 times
   the longer of the two.
2. real: SmolLM2, or --model, everything on these cores or on one device. Rollout and update then share them; there is
   no bar.

Each is run with max_staleness 0 and 1, in turns. Writes result.json, result.md and result.png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.subject import SMOLLM2, Subject, add_arguments, subject_of
from support.processes import ServiceProcess, running_service, start_module, write_config
from support.tiny_head import save_tiny_head
from support.tiny_model import save_tiny_model

BAR = 1.15
WARM_UP_STEPS = 2
Values = Mapping[str, object]


@dataclass(frozen=True)
class Services:
    """Where they listen."""

    reward: ServiceProcess
    reference: ServiceProcess
    generation: ServiceProcess

    def targets(self) -> dict[str, object]:
        """The trainer's section."""
        return {
            "reward": self.reward.target,
            "reference": self.reference.target,
            "generation": self.generation.target,
            "reference_admin": self.reference.admin_target,
            "generation_admin": self.generation.admin_target,
        }


@dataclass(frozen=True)
class Measured:
    """Medians over the steps of one run, in seconds."""

    name: str
    staleness: int
    step: float
    rollout: float
    update: float
    steps: Sequence[float]

    @property
    def ratio(self) -> float:
        """The step over the longer of rollout and update."""
        return self.step / max(self.rollout, self.update)


@contextmanager
def services(
    directory: Path,
    model: Values,
    reward: Values,
    head: str,
    generation_module: str,
    further: Values | None = None,
) -> Iterator[Services]:
    """Start the three, reward and reference with a thread each, generation with what is `further`."""
    with ExitStack() as stack:

        def start(module: str, values: Values) -> ServiceProcess:
            return stack.enter_context(running_service(module, directory, values, fresh=True, start_timeout_s=600))

        rewards = [{"name": "reward", "model": {**reward, "threads": 1}, "head": head}]
        generation = {"model": model, "batching": {"max_batch_size": 128}, **(further or {})}
        if generation.get("backend") == "vllm":
            # It has one kind of device, by how it was built.
            generation["model"] = {**model, "device": "auto"}
        yield Services(
            reward=start("ppod_services.reward", {"rewards": rewards}),
            reference=start("ppod_services.reference", {"model": {**model, "threads": 1}}),
            generation=start(generation_module, generation),
        )


def train(name: str, config: Values, directory: Path, staleness: int) -> Measured:
    """Run the trainer, and read what its steps took."""
    run_dir = directory / f"{name}-{staleness}"
    changed = {**config, "run_dir": str(run_dir), "ppo": {**_section(config, "ppo"), "importance_cap": 2.0}}
    changed["rollout"] = {**_section(config, "rollout"), "max_staleness": staleness}
    path = write_config(directory / f"{run_dir.name}.yaml", changed)
    process = start_module("ppod_trainer", "--config", str(path), directory=directory, name=run_dir.name)
    stdout, stderr = process.communicate(timeout=3600)
    if process.returncode:
        raise SystemExit(f"{run_dir.name} ended with {process.returncode}\n{stdout}\n{stderr}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    # The last step has nothing to make meanwhile.
    records = [line for line in lines if "seconds/step" in line][WARM_UP_STEPS:-1]
    updates = [sum(one[f"seconds/{phase}"] for phase in ("old_logprobs", "update", "push")) for one in records]
    measured = Measured(
        name=name,
        staleness=staleness,
        step=statistics.median(one["seconds/step"] for one in records),
        rollout=statistics.median(one["seconds/rollout"] for one in records),
        update=statistics.median(updates),
        steps=[one["seconds/step"] for one in records],
    )
    print(
        f"{name}, max_staleness {staleness}: a step {measured.step:.2f} s, rollout {measured.rollout:.2f} s, "
        f"update and push {measured.update:.2f} s; step over the longer of these {measured.ratio:.3f}",
        flush=True,
    )
    return measured


def _section(config: Values, key: str) -> Values:
    section = config.get(key, {})
    assert isinstance(section, Mapping)
    return section


def measure_simulated(directory: Path, steps: int, rounds: int) -> list[Measured]:
    """The engine sleeps; its speed is set by a first run, in which it is too fast to matter."""
    model_dir = save_tiny_model(directory / "model")
    head = str(save_tiny_head(model_dir, directory / "head", name="reward", seed=0))
    (directory / "prompts.txt").write_text("\n".join(f"{index:03d} is it" for index in range(600)))
    model = {"source": str(model_dir), "dtype": "float32", "device": "cpu"}
    tokens = 24
    config = {
        "steps": steps + WARM_UP_STEPS + 1,
        "policy": {**model, "threads": 1},
        "prompts": {"path": str(directory / "prompts.txt"), "heldout": 4},
        "rollout": {"batch_size": 128, "max_tokens": tokens},
        "ppo": {"epochs": 3, "minibatches": 8},
        "metrics": {"port": None, "tensorboard": False},
    }
    measured: list[Measured] = []
    step_s = 0.0
    for _ in range(rounds + 1):
        os.environ["PPOD_SIMULATED_STEP_S"] = str(step_s)
        with services(directory, model, model, head, "benchmarks.overlap.simulated_generation") as up:
            running = {**config, "services": up.targets()}
            first = train("simulated", running, directory, 0)
            if not step_s:
                step_s = max(first.update - first.rollout, 0.1) / tokens
                print(f"the simulated engine takes {step_s * 1e3:.1f} ms a token from now on", flush=True)
                continue
            measured += [first, train("simulated", running, directory, 1)]
    return measured


def measure_real(directory: Path, subject: Subject, options: argparse.Namespace) -> list[Measured]:
    """The default run's task, on CPUs in float32."""
    model = subject.served("float32" if subject.device == "cpu" else "auto")
    config = {
        "steps": options.real_steps + WARM_UP_STEPS + 1,
        "policy": model,
        "prompts": {"first_tokens": 6, "heldout": 1},
        "rollout": {"batch_size": options.batch_size, "max_tokens": options.max_tokens},
        "ppo": {"epochs": 1},
        "optimizer": {"learning_rate": 1.35e-4},
        "metrics": {"port": None, "tensorboard": False},
    }
    reward = Subject(SMOLLM2, subject.device).served(str(model["dtype"]))
    further = json.loads(options.service)
    with services(directory, model, reward, "reviews-reward", "ppod_services.generation", further) as up:
        running = {**config, "services": up.targets()}
        return [train("real", running, directory, staleness) for staleness in (0, 1)]


def table(measured: Sequence[Measured]) -> str:
    """Markdown."""
    rows = [
        "| | max_staleness | step, s | rollout, s | update and push, s | step over the longer |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    rows += [
        f"| {one.name} | {one.staleness} | {one.step:.2f} | {one.rollout:.2f} | {one.update:.2f} | {one.ratio:.3f} |"
        for one in measured
    ]
    return "\n".join(rows) + "\n"


def plot(measured: Sequence[Measured], path: Path) -> None:
    """Seconds of each step."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for one in measured:
        axes.plot(one.steps, marker=".", label=f"{one.name}, max_staleness {one.staleness}")
    axes.set(xlabel="step", ylabel="seconds", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> int:
    """Measure, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each run (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=2, help="of the simulated setting (default: %(default)s); 0: leave it out"
    )
    parser.add_argument("--real-steps", type=int, default=4, help="of the real setting; 0: leave it out")
    parser.add_argument("--batch-size", type=int, default=32, help="of the real setting (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=16, help="of the real setting (default: %(default)s)")
    parser.add_argument(
        "--service", default="{}", metavar="JSON", help="more of the generation service's configuration, there"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/bench-overlap"))
    add_arguments(parser)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        measured = measure_simulated(directory, options.steps, options.rounds) if options.rounds else []
        if options.real_steps:
            subject = subject_of(options)
            measured += measure_real(directory, subject, options)
    shown = table(measured)
    (options.out / "result.md").write_text(shown)
    figures = [
        {"name": one.name, "staleness": one.staleness, "ratio": one.ratio, "steps": list(one.steps)} for one in measured
    ]
    (options.out / "result.json").write_text(json.dumps(figures, indent=2))
    plot(measured, options.out / "result.png")
    print(shown)
    if not options.rounds:
        return 0
    overlapped = [one.ratio for one in measured if one.name == "simulated" and one.staleness]
    ratio = statistics.median(overlapped)
    met = "ok" if ratio <= BAR else "MISSED"
    print(f"{met}: a step takes {ratio:.3f} times the longer of rollout and update (bar {BAR})")
    return 0 if ratio <= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
