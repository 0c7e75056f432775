"""A real run goes on while the pods of its services come and go: no sample is lost, none comes from wrong weights."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from support.pods import Cluster
from support.processes import free_ports

from .conftest import seconds_until, served_calls
from .training import Trained, assert_nothing_lost, seconds_until_working, training

WITHIN_S = 5.0


def scale_up_and_down(run: Trained) -> float:
    """Two pods more, one less by draining, one less by SIGKILL, one more. Seconds until the first two worked."""
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
    return added_s


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_transfer": {"encoding": "delta", "relay": "chain"}},
        {"policy": {"lora": {"rank": 4}}},
    ],
    ids=["plain", "delta-chain", "adapter"],
)
def test_generation_scales_up_and_down_while_it_trains(
    cluster: Cluster, tiny_model_dir: Path, tiny_heads: dict[str, Path], changes: dict[str, dict[str, object]]
) -> None:
    with training(cluster, tiny_model_dir, tiny_heads["first"], **changes) as run:
        added_s = scale_up_and_down(run)
        records = run.stop()
    print(f"two added pods generated {added_s:.2f} s after they were ready; {len(records)} steps")
    assert_nothing_lost(records)


def test_shared_files_follow_too(cluster: Cluster, tiny_model_dir: Path, tiny_heads: dict[str, Path]) -> None:
    """A pod that drains may still serve from the file's memory: that is not written to before it is gone."""
    with TemporaryDirectory(dir="/dev/shm") as directory:
        transfer = {"plane": "shared", "directory": directory}
        with training(cluster, tiny_model_dir, tiny_heads["first"], weight_transfer=transfer) as run:
            scale_up_and_down(run)
            records = run.stop()
        assert list(Path(directory).iterdir()) == []
    assert_nothing_lost(records)


def test_groups_follow_too(cluster: Cluster, tiny_model_dir: Path, tiny_heads: dict[str, Path]) -> None:
    """Each change of the pods makes another group."""
    [port] = free_ports(1)
    transfer = {"plane": "collective", "collective": {"port": port, "timeout_s": 4}}
    with training(cluster, tiny_model_dir, tiny_heads["first"], weight_transfer=transfer) as run:
        scale_up_and_down(run)
        records = run.stop()
    assert_nothing_lost(records)


def test_rollouts_that_are_made_ahead_follow_too(
    cluster: Cluster, tiny_model_dir: Path, tiny_heads: dict[str, Path]
) -> None:
    rollout = {"batch_size": 8, "max_tokens": 8, "max_staleness": 1}
    changes = {"rollout": rollout, "ppo": {"importance_cap": 2.0}}
    with training(cluster, tiny_model_dir, tiny_heads["first"], **changes) as run:
        scale_up_and_down(run)
        records = run.stop()
    assert_nothing_lost(records, ahead=1)


def test_a_container_that_is_started_again_gets_its_weights_back(
    cluster: Cluster, tiny_model_dir: Path, tiny_heads: dict[str, Path]
) -> None:
    """Its endpoint never changes: it is back before the control plane noticed that it was away."""
    with training(cluster, tiny_model_dir, tiny_heads["first"], generation=2) as run:
        pod, _ = run.generation.pods.values()
        seconds_until_working(run, pod, 20)
        run.generation.kill(pod)
        run.generation.restart(pod)
        seconds_until(lambda: '"event": "ready"' in pod.stderr, 60)
        back_s = seconds_until_working(run, pod, WITHIN_S)
        run.steps(5)
        records = run.stop()
    print(f"it generated {back_s:.2f} s after it was ready again")
    assert_nothing_lost(records)


def test_the_only_pod_of_generation_may_be_replaced(
    cluster: Cluster, tiny_model_dir: Path, tiny_heads: dict[str, Path]
) -> None:
    """For a while there is none: the run waits, and the next pod begins with the run's weights."""
    with training(cluster, tiny_model_dir, tiny_heads["first"]) as run:
        [only] = run.generation.pods.values()
        assert run.generation.drain(only) == 0
        following = run.generation.up()
        seconds_until_working(run, following, WITHIN_S)
        run.steps(3)
        records = run.stop()
    assert_nothing_lost(records)


@pytest.mark.parametrize("changes", [{}, {"reference_refresh_steps": 2}], ids=["plain", "refreshed"])
def test_reward_and_reference_scale_while_it_trains(
    cluster: Cluster, tiny_model_dir: Path, tiny_heads: dict[str, Path], changes: dict[str, object]
) -> None:
    """A pod of a reference that is refreshed works with the run's reference alone."""
    with training(cluster, tiny_model_dir, tiny_heads["first"], **changes) as run:
        for deployment, method in ((run.reward, "Score"), (run.reference, "ComputeLogprobs")):
            [first] = deployment.pods.values()
            second = deployment.up()
            seconds_until(lambda d=deployment, p=second, m=method: served_calls(d, p, m) > 0, WITHIN_S)
            assert deployment.drain(first) == 0
            run.steps(3)
        records = run.stop()
    assert_nothing_lost(records)
    for record in records if changes else ():
        if record["step"] % 2 == 1:
            # The policy has not moved since the reference became it. What a pod starts with is far away by then.
            assert record["kl/reference"] == pytest.approx(0, abs=1e-4), record["step"]
