"""Connections that are closed for their age, so that clients find new replicas."""

from __future__ import annotations

from pathlib import Path

from ppod import RewardClient
from ppod.client import NO_RETRY, Delivery
from support.processes import running_service


def test_a_call_outlives_its_connections_age_for_as_long_as_its_own_deadline(tmp_path: Path) -> None:
    """Cut short it would be begun again, on a connection that is as old when it is as far: it would never end."""
    values = {
        "rewards": [{"name": "scripted", "kind": "function", "function": "test_scripted", "timeout_s": 20}],
        "limits": {"max_connection_age_s": 1, "default_deadline_s": 1},
    }
    with (
        running_service("ppod_services.reward", tmp_path, values) as service,
        RewardClient(service.target, timeout_s=30, delivery=Delivery(retry=NO_RETRY)) as client,
    ):
        # More than the age, with its jitter of a tenth, and the default deadline together.
        assert client.score_texts(["sleep 3.5"]).values.tolist() == [0.0]
        assert client.score_texts(["2"]).values.tolist() == [2.0]
