"""A client scores without a pause while replicas of a real reward service come and go."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest

from ppod import AsyncRewardClient, RewardClient
from support.pods import Cluster

from .conftest import deploy_reward, seconds_until, served_calls
from .scoring import scoring

TARGET = "k8s:///ppod-reward:grpc"
WITHIN_S = 5.0


def test_replicas_come_and_go_and_no_call_fails(
    cluster: Cluster, tiny_model_dir: Path, tiny_heads: dict[str, Path]
) -> None:
    reward = deploy_reward(cluster, tiny_model_dir, tiny_heads["first"], 1)
    [first] = reward.pods.values()
    with scoring(TARGET) as load:
        seconds_until(lambda: load.calls > 10, 20)
        second = reward.up()
        added_s = seconds_until(lambda: served_calls(reward, second, "Score") > 0, WITHIN_S)
        assert reward.drain(first) == 0
        reward.endpoints.ready(first.name, first.host)  # a slice that is late: nobody is there any more
        reward.endpoints.gone(first.name)
        drained_at = load.calls
        seconds_until(lambda: load.calls > drained_at + 20, 20)
        third, fourth = reward.up(), reward.up()
        seconds_until(lambda: min(served_calls(reward, pod, "Score") for pod in (third, fourth)) > 0, WITHIN_S)
        reward.kill(third)
        killed_at = load.calls
        seconds_until(lambda: load.calls > killed_at + 50, 20)
        reward.endpoints.not_ready(third.name)
        reward.endpoints.gone(third.name)
        assert reward.drain(fourth) == 0
        before = load.calls
        seconds_until(lambda: load.calls > before + 20, 20)
    print(f"an added replica had work {added_s:.2f} s after it was ready; the slowest call took {load.longest_s:.2f} s")
    assert load.errors == []
    assert max(load.values) - min(load.values) < 1e-5
    assert load.longest_s < WITHIN_S


def test_who_leaves_gets_nothing_new_but_finishes_what_it_has(
    cluster: Cluster, tiny_model_dir: Path, tiny_heads: dict[str, Path]
) -> None:
    """The pod is told to stop later than the clients are: until then it would take new work."""
    reward = deploy_reward(cluster, tiny_model_dir, tiny_heads["first"], 2)
    leaving, staying = reward.pods.values()
    with scoring(TARGET) as load:
        seconds_until(lambda: served_calls(reward, leaving, "Score") > 5, 20)
        reward.endpoints.terminating(leaving.name)
        time.sleep(0.5)
        left_with = served_calls(reward, leaving, "Score")
        before = load.calls
        seconds_until(lambda: load.calls > before + 40, 20)
        assert served_calls(reward, leaving, "Score") == left_with
        assert served_calls(reward, staying, "Score") > 0
    assert load.errors == []


async def test_the_asyncio_face_follows_too(
    cluster: Cluster, tiny_model_dir: Path, tiny_heads: dict[str, Path]
) -> None:
    reward = deploy_reward(cluster, tiny_model_dir, tiny_heads["first"], 1)
    [first] = reward.pods.values()
    stop = asyncio.Event()
    async with AsyncRewardClient(TARGET, timeout_s=30) as client:

        async def score() -> int:
            calls = 0
            while not stop.is_set():
                await client.score_texts(["A joy."])
                calls += 1
            return calls

        running = [asyncio.create_task(score()) for _ in range(4)]
        second = await asyncio.to_thread(reward.up)
        await asyncio.to_thread(seconds_until, lambda: served_calls(reward, second, "Score") > 0, WITHIN_S)
        assert await asyncio.to_thread(reward.drain, first) == 0
        await asyncio.sleep(0.5)
        stop.set()
        assert min(await asyncio.gather(*running)) > 0


def test_a_service_without_pods_is_waited_for(
    cluster: Cluster, tiny_model_dir: Path, tiny_heads: dict[str, Path]
) -> None:
    """Between the last pod and the next one a call waits; it does not fail."""
    reward = deploy_reward(cluster, tiny_model_dir, tiny_heads["first"], 1)
    [only] = reward.pods.values()
    with RewardClient(TARGET, timeout_s=30) as client:
        expected = client.score_texts(["A joy."]).values[0]
        coming = reward.start()
        assert reward.drain(only) == 0
        seconds_until(lambda: '"event": "ready"' in coming.stderr, 60)
        threading.Timer(1.0, reward.wait_ready, [coming]).start()
        begun = time.monotonic()
        assert client.score_texts(["A joy."]).values[0] == pytest.approx(expected, abs=1e-5)
        assert 0.5 < time.monotonic() - begun < WITHIN_S
