"""Links that go down under load: what was under way is done elsewhere, and who comes back is brought up to date."""

from __future__ import annotations

import time
from pathlib import Path

from support.pods import Cluster

from .conftest import deploy_reward, needs_namespaces, seconds_until, served_calls
from .scoring import scoring
from .training import assert_nothing_lost, seconds_until_working, training

NOTICED_S = 45.0
"""A connection that brings nothing any more is given up after 30 s until a ping, and 10 s without an answer."""


@needs_namespaces
def test_scores_come_from_elsewhere_when_a_link_goes_down(
    networked_cluster: Cluster, tiny_model_dir: Path, tiny_heads: dict[str, Path]
) -> None:
    reward = deploy_reward(networked_cluster, tiny_model_dir, tiny_heads["first"], 2)
    cut, other = reward.pods.values()
    with scoring("k8s:///ppod-reward:grpc", timeout_s=90) as load:
        seconds_until(lambda: min(served_calls(reward, pod, "Score") for pod in (cut, other)) > 5, 20)
        reward.network.cut(cut.host)
        reward.endpoints.not_ready(cut.name)
        before = load.calls
        seconds_until(lambda: load.calls > before + 200, NOTICED_S + 20)
        time.sleep(NOTICED_S)  # until what hung at the cut replica was done elsewhere
        reward.network.mend(cut.host)
        done = served_calls(reward, cut, "Score")
        reward.endpoints.ready(cut.name, cut.host)
        back_s = seconds_until(lambda: served_calls(reward, cut, "Score") > done, 5)
    print(f"{load.calls} calls, the slowest {load.longest_s:.1f} s; back at work {back_s:.2f} s after it was ready")
    assert load.errors == []
    assert load.longest_s < NOTICED_S


@needs_namespaces
def test_a_run_goes_on_when_a_link_goes_down(
    networked_cluster: Cluster, tiny_model_dir: Path, tiny_heads: dict[str, Path]
) -> None:
    with training(networked_cluster, tiny_model_dir, tiny_heads["first"], generation=2, reward=2) as run:
        cut, _ = run.generation.pods.values()
        seconds_until(lambda: run.worked(cut) > 0, 20)
        run.generation.network.cut(cut.host)
        begun = time.monotonic()
        run.steps(3, timeout_s=2 * NOTICED_S)
        stalled_s = time.monotonic() - begun
        run.generation.endpoints.not_ready(cut.name)
        run.steps(5)
        reward_pod = next(iter(run.reward.pods.values()))
        run.reward.network.cut(reward_pod.host)
        run.steps(3, timeout_s=2 * NOTICED_S)
        run.generation.network.mend(cut.host)
        worked = run.worked(cut)
        run.generation.endpoints.ready(cut.name, cut.host)
        back_s = seconds_until(lambda: run.worked(cut) > worked, 5)
        run.steps(3)
        records = run.stop()
    print(f"three steps took {stalled_s:.1f} s over the cut; back at work {back_s:.2f} s after it was ready")
    assert_nothing_lost(records)


def test_the_api_server_may_be_away_while_nothing_changes(
    cluster: Cluster, tiny_model_dir: Path, tiny_heads: dict[str, Path]
) -> None:
    with training(cluster, tiny_model_dir, tiny_heads["first"]) as run:
        run.generation.endpoints.unavailable(True)
        run.steps(10)
        second = run.generation.start()
        run.steps(5)
        run.generation.endpoints.unavailable(False)
        run.generation.wait_ready(second)
        seconds_until_working(run, second, 5 + 5)  # the watch asks again after 5 s at the latest
        records = run.stop()
    assert_nothing_lost(records)
