"""A real run goes on while the pods of its services come and go: no sample is lost, none comes from wrong weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.pods import Cluster

from .training import assert_nothing_lost, seconds_until_working, training

WITHIN_S = 5.0


@pytest.mark.parametrize("transfer", [{}, {"encoding": "delta", "relay": "chain"}], ids=["plain", "delta-chain"])
def test_generation_scales_up_and_down_while_it_trains(
    cluster: Cluster, tiny_model_dir: Path, tiny_heads: dict[str, Path], transfer: dict[str, str]
) -> None:
    with training(cluster, tiny_model_dir, tiny_heads["first"], weight_transfer=transfer) as run:
        [first] = run.generation.pods.values()
        second, third = run.generation.start(), run.generation.start()
        run.generation.wait_ready(second)
        run.generation.wait_ready(third)
        added_s = max(seconds_until_working(run, pod, WITHIN_S) for pod in (second, third))
        run.steps(3)
        assert run.generation.drain(first) == 0
        run.steps(3)
        # Killed while it works, and noticed by the control plane only later.
        run.generation.kill(second)
        run.steps(2)
        run.generation.endpoints.not_ready(second.name)
        run.generation.endpoints.gone(second.name)
        run.steps(3)
        fourth = run.generation.up()
        seconds_until_working(run, fourth, WITHIN_S)
        records = run.stop()
    print(f"two added pods generated {added_s:.2f} s after they were ready; {len(records)} steps")
    assert_nothing_lost(records)
