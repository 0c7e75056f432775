"""Calls whose channel another thread closes as they begin, as of a pod that left."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest

from ppod import Cancelled, GenerationClient, Sampling, WeightClient
from ppod.client import WeightPush
from ppod.client.sync_driver import SyncDriver


@pytest.fixture(autouse=True)
def closing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each channel is closed as soon as a call has taken it."""
    take = SyncDriver._channel  # pyright: ignore[reportPrivateUsage]

    def close(driver: SyncDriver, address: str) -> grpc.Channel:
        channel = take(driver, address)
        driver.close()
        return channel

    monkeypatch.setattr(SyncDriver, "_channel", close)


@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda client: client.push(WeightPush(1, [])), id="push"),
        pytest.param(lambda client: client.commit(1), id="commit"),
        pytest.param(lambda client: client.status(), id="status"),
    ],
)
def test_calls_about_weights_are_cancelled(ask: Callable[[WeightClient], object]) -> None:
    with WeightClient("127.0.0.1:1", timeout_s=2) as client, pytest.raises(Cancelled, match="the client is closed"):
        ask(client)


def test_streams_are_cancelled() -> None:
    with GenerationClient("127.0.0.1:1", timeout_s=2) as client, pytest.raises(Cancelled, match="the client is closed"):
        client.generate([[1]], Sampling(2))
