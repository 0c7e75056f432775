"""A run that is killed, again and again, ends as one that never was: to the bit, whenever it happens."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.forked import ForkedProcess
from support.processes import write_config
from support.ranks import start_ranks

from .conftest import Config, System, records_of, wait_for_step

STEPS = 30
CHANGES: Config = {
    "steps": STEPS,
    "kl": {"adaptive": {"target": 2.0, "horizon": 100}},
    "rewards": {"normalize": "whiten"},
    "evaluation": {"interval": 5},
    "checkpoint": {"interval": 1, "keep": 2},
}


def end_of(run_dir: Path) -> tuple[list[dict[str, float]], str, dict[str, torch.Tensor]]:
    """Records but for timings, the last samples, and the final weights."""
    samples = (run_dir / "samples" / f"step_{STEPS:06d}.jsonl").read_text()
    return records_of(run_dir), samples, load_file(run_dir / "final_model" / "model.safetensors")


def assert_same_end(found: Path, expected: Path) -> None:
    (records, samples, weights), (same_records, same_samples, same_weights) = end_of(found), end_of(expected)
    assert records == same_records
    assert samples == same_samples
    assert weights.keys() == same_weights.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in same_weights.items())


def kill(processes: list[ForkedProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.wait(20)


def wait_until(condition: Callable[[], bool], processes: list[ForkedProcess]) -> None:
    until = time.monotonic() + 60
    while not condition() and processes[0].poll() is None:
        assert time.monotonic() < until
        time.sleep(0.0005)


def steps_done(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return sum('"score/mean"' in line for line in file.read_text().splitlines()) if file.is_file() else 0


def seconds_of_a_step(run_dir: Path) -> float:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return statistics.median(record["seconds/step"] for record in records if "seconds/step" in record)


def moments(
    run_dir: Path, generator: random.Random, kills: int, step_s: float
) -> Iterator[tuple[str, Callable[[], bool]]]:
    """When to kill next: before the first checkpoint, while one is written, and at any time within four steps."""
    yield "begun", (run_dir / "metrics.jsonl").is_file
    for number in range(kills):
        if number % 2 == 0:
            yield "writing", lambda: any((run_dir / "checkpoints").glob(".writing-*"))
        else:
            steps, delay_s = steps_done(run_dir), generator.random() * 3 * step_s
            yield (
                "any",
                lambda steps=steps, delay_s=delay_s: steps_done(run_dir) > steps and (time.sleep(delay_s) or True),
            )


@pytest.mark.parametrize(("ranks", "kills"), [(1, 6), (2, 2)])
def test_a_killed_run_resumes_to_the_same_end(system: System, ranks: int, kills: int) -> None:
    straight = system.config(f"never-killed-{ranks}", **CHANGES)
    killed = system.config(f"killed-{ranks}", resume="if_possible", **CHANGES)
    run_dir = Path(str(killed["run_dir"]))

    def start(config: Config) -> list[ForkedProcess]:
        if ranks == 1:
            return [system.start(config)]
        name = Path(str(config["run_dir"])).name
        path = write_config(system.directory / f"{name}.yaml", config)
        return start_ranks("ppod_trainer", "--config", str(path), ranks=ranks, directory=system.directory, name=name)

    for process in start(straight):
        assert process.wait(120) == 0, process.communicate()[1]
    halves = 0
    seed = random.randrange(2**32)
    step_s = seconds_of_a_step(Path(str(straight["run_dir"])))
    print(f"seed {seed}, {step_s:.3f} s a step")
    for name, due in moments(run_dir, random.Random(seed), kills, step_s):
        processes = start(killed)
        if name == "writing":
            # Not the first, of which the file system may know nothing yet.
            wait_for_step(processes[0], run_dir, steps_done(run_dir) + 1)
        wait_until(due, processes)
        kill(processes)
        halves += any((run_dir / "checkpoints").glob(".writing-*"))
    assert halves, "no checkpoint was cut in the middle"
    assert 0 < steps_done(run_dir) < STEPS
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "score/me')
    for process in start(killed):
        assert process.wait(120) == 0, process.communicate()[1]
    assert_same_end(run_dir, Path(str(straight["run_dir"])))
