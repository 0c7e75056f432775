"""What quotas do to rewards that are made of several models."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml

from ppod import NO_RETRY, ClientSecurity, Delivery, InvalidArgument, Pin, ResourceExhausted, RewardClient
from ppod.client import RpcObserver
from support.processes import ServiceProcess, metrics_of, running_service
from support.services import tiny_model_config
from support.tiny_classifiers import save_decoder

SEQUENCES = [[5] * 100] * 4
TOKENS = 2 * 400
"""What the ensemble's two models compute for them."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    directory = tmp_path_factory.mktemp("quotas")
    teams = [
        {"name": "steady", "tokens_per_s": 800.0, "burst_s": 1.25},
        {"name": "narrow", "max_tokens_in_flight": TOKENS - 1},
        {"name": "narrower", "max_tokens_in_flight": TOKENS // 4 - 1},
    ]
    for team in teams:
        team["token_sha256"] = [hashlib.sha256(str(team["name"]).encode()).hexdigest()]
    teams_file = directory / "teams.yaml"
    teams_file.write_text(yaml.safe_dump({"teams": teams}))
    rewards: list[dict[str, object]] = [
        {"name": name, "kind": "sequence_classification", "model": tiny_model_config(save_decoder(directory / name))}
        for name in ("first", "second")
    ]
    rewards.append({"name": "both", "kind": "ensemble", "members": ["first", "second"]})
    values = {"rewards": rewards, "tenancy": {"teams_file": str(teams_file)}}
    with running_service("ppod_services.reward", directory, values) as running:
        yield running


def client_of(service: ServiceProcess, team: str, observer: RpcObserver | None = None) -> RewardClient:
    security = ClientSecurity(token=team)
    return RewardClient(service.target, security=security, pin=Pin(model="both"), timeout_s=20, observer=observer)


def test_a_team_at_its_quota_gets_and_pays_for_whole_requests(service: ServiceProcess) -> None:
    """A request that is refused spends nothing; told when to come back, it is there for all members."""
    with client_of(service, "steady") as client:
        for _ in range(3):
            assert len(client.score(SEQUENCES).values) == 4
    assert f'ppod_team_accepted_tokens_total{{team="steady"}} {3.0 * TOKENS}' in metrics_of(service)


def test_what_all_members_together_exceed_is_told_at_once(service: ServiceProcess) -> None:
    """Then it is asked in parts, unless it is one sequence."""
    codes: list[str] = []
    with client_of(service, "narrow", lambda _, __, code: codes.append(code)) as client:
        found = client.score(SEQUENCES).values
        # Parts that come at the same time wait for each other.
        assert (codes[0], set(codes[1:]) - {"RESOURCE_EXHAUSTED"}) == ("INVALID_ARGUMENT", {"OK"})
    with (
        client_of(service, "narrower") as client,
        pytest.raises(InvalidArgument, match=r"200 tokens.*at most 199"),
    ):
        client.score(SEQUENCES)
    with client_of(service, "steady") as client:
        np.testing.assert_allclose(found, client.score(SEQUENCES).values, atol=1e-5)


def test_refusals_of_a_function_that_is_asked_too_much_are_counted(tmp_path: Path) -> None:
    """They are refusals for load as those of the models' queue, which alerts and dashboards would else not show."""
    slow = {"name": "slow", "kind": "function", "function": "test_scripted", "max_waiting": 4}
    with (
        running_service("ppod_services.reward", tmp_path, {"rewards": [slow]}) as service,
        RewardClient(service.target, timeout_s=20) as first,
        RewardClient(service.target, timeout_s=20, delivery=Delivery(retry=NO_RETRY)) as second,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(first.score_texts, ["sleep 1"] * 3)
        until = time.monotonic() + 10
        refused: ResourceExhausted | None = None
        while refused is None and time.monotonic() < until:
            try:
                second.score_texts(["1", "2"])
            except ResourceExhausted as error:
                refused = error
            else:
                # The three may not be there yet; asked without a pause, these two could keep them out.
                time.sleep(0.1)
        assert refused is not None, "four texts are the most"
        assert len(waiting.result().values) == 3
        # The first one may have been refused, too, and have come again.
        counted = re.search(r'ppod_team_refused_total{reason="backlog",team="anonymous"} (\S+)', metrics_of(service))
        assert counted is not None
        assert float(counted[1]) >= 1
