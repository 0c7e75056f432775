"""Teams on a real service: tokens, ports, quotas, a file that changes, metrics."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ppod.errors import (
    InvalidArgument,
    PermissionDenied,
    PpodError,
    ResourceExhausted,
    Unauthenticated,
    from_rpc_error,
)
from ppod.tensors import pack_sequences
from ppod.v1 import reference_pb2, reference_pb2_grpc, weights_pb2, weights_pb2_grpc
from support.processes import ServiceProcess, metrics_of, running_service
from support.services import tiny_model_config

ReplyT = TypeVar("ReplyT")


@dataclass(frozen=True)
class Shared:
    """A reference service with a teams file."""

    service: ServiceProcess
    teams_file: Path

    def write(self, *teams: dict[str, object]) -> None:
        write_teams(self.teams_file, *teams)

    def judge(self, token: str | None, tokens: int = 4) -> reference_pb2.ComputeLogprobsResponse:
        """Ask for the logprobs of one sequence with a team's token."""
        request = reference_pb2.ComputeLogprobsRequest(tokens=pack_sequences([[5] * tokens]), prompt_lengths=[1])
        with grpc.insecure_channel(self.service.target) as channel:
            stub = reference_pb2_grpc.ReferenceServiceStub(channel)
            return typed(lambda: stub.ComputeLogprobs(request, metadata=bearer(token), timeout=30))

    def weights(self, token: str | None) -> weights_pb2.GetWeightsResponse:
        """Ask the administration port."""
        with grpc.insecure_channel(self.service.admin_target) as channel:
            stub = weights_pb2_grpc.WeightServiceStub(channel)
            return typed(lambda: stub.GetWeights(weights_pb2.GetWeightsRequest(), metadata=bearer(token), timeout=30))


def typed(call: Callable[[], ReplyT]) -> ReplyT:
    try:
        return call()
    except grpc.RpcError as error:
        raise from_rpc_error(error) from error


def bearer(token: str | None) -> Sequence[tuple[str, str]]:
    return () if token is None else (("authorization", f"Bearer {token}"),)


def team(name: str, **values: object) -> dict[str, object]:
    """A team whose token is its name, written backwards."""
    return {"name": name, "token_sha256": [hashlib.sha256(name[::-1].encode()).hexdigest()], **values}


def write_teams(path: Path, *teams: dict[str, object]) -> None:
    path.write_text(yaml.safe_dump({"teams": list(teams), "administrators": [team("ops")]}))


@pytest.fixture(scope="module")
def shared(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    directory = tmp_path_factory.mktemp("shared")
    teams_file = directory / "teams.yaml"
    write_teams(teams_file, team("red"), team("blue", tokens_per_s=20.0, burst_s=2.0))
    values = {
        "model": tiny_model_config(tiny_model_dir),
        "tenancy": {"teams_file": str(teams_file), "reload_s": 0.1},
    }
    with running_service("ppod_services.reference", directory, values) as service:
        yield Shared(service, teams_file)


@pytest.mark.parametrize(
    ("token", "data", "administration"),
    [
        (None, Unauthenticated, Unauthenticated),
        ("derx", Unauthenticated, Unauthenticated),
        ("nobody", Unauthenticated, Unauthenticated),
        ("der", None, PermissionDenied),
        ("spo", PermissionDenied, None),
    ],
)
def test_each_port_takes_its_own_kind_of_token(
    shared: Shared, token: str | None, data: type[PpodError] | None, administration: type[PpodError] | None
) -> None:
    for ask, error in ((shared.judge, data), (shared.weights, administration)):
        if error is None:
            assert ask(token).model.model == "reference"
        else:
            with pytest.raises(error):
                ask(token)


def test_health_and_reflection_are_open(shared: Shared) -> None:
    for target in (shared.service.target, shared.service.admin_target):
        with grpc.insecure_channel(target) as channel:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=""))
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            [reply] = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
            assert reply.list_services_response.service


def test_a_quota_tells_the_time_after_which_it_takes_the_request(shared: Shared) -> None:
    """40 tokens at once, 20 a second after that."""
    shared.judge("eulb", 36)
    start = time.monotonic()
    with pytest.raises(ResourceExhausted, match="team blue has spent its quota of 20 tokens a second") as caught:
        shared.judge("eulb", 24)
    # At least 4 tokens were left; 20 more take a second.
    assert 0 < caught.value.retry_after_s <= 1.0
    shared.judge("der", 100)
    time.sleep(max(0.0, caught.value.retry_after_s - (time.monotonic() - start)) + 0.05)
    shared.judge("eulb", 24)
    with pytest.raises(InvalidArgument, match="at most 40"):
        shared.judge("eulb", 41)


def test_metrics_name_teams_of_the_file_and_nobody_else(shared: Shared) -> None:
    shared.judge("der", 7)
    with pytest.raises(Unauthenticated):
        shared.judge("stranger")
    time.sleep(0.3)
    text = metrics_of(shared.service)
    lines = [line for line in text.splitlines() if 'team="' in line]
    assert {line.split('team="')[1].split('"')[0] for line in lines} <= {"red", "blue", "administrator", ""}
    for start in (
        'ppod_team_rpc_total{code="OK",team="red"}',
        'ppod_team_rpc_total{code="UNAUTHENTICATED",team=""}',
        'ppod_team_accepted_tokens_total{team="red"}',
        'ppod_team_served_tokens_total{team="red"}',
        'ppod_team_queue_tokens{team="red"} 0.0',
        'ppod_team_queue_seconds_count{team="red"}',
        "ppod_batch_fill_ratio_count",
    ):
        assert any(line.startswith(start) for line in text.splitlines()), start


def test_the_log_says_where_callers_without_a_team_are(shared: Shared) -> None:
    with pytest.raises(Unauthenticated):
        shared.judge("intruder")
    shared.service.wait_for_event("call", 10)
    refused = [line for line in shared.service.log() if line.get("code") == "UNAUTHENTICATED"]
    assert refused
    assert {line["team"] for line in refused} == {""}
    assert all(re.fullmatch(r"ipv[46]:.*127\.0\.0\.1.*:\d+", str(line["peer"])) for line in refused), refused


def test_a_changed_file_takes_effect_and_a_broken_one_does_not(shared: Shared) -> None:
    shared.write(team("red"), team("green"))
    shared.service.wait_for_event("teams_file_loaded", 10)
    shared.judge("neerg")
    with pytest.raises(Unauthenticated):
        shared.judge("eulb")
    shared.teams_file.write_text("teams: [")
    shared.service.wait_for_event("teams_file_refused", 10)
    shared.judge("neerg")
    shared.judge("der")
    told = f'ppod_file_refused{{file="{shared.teams_file}"}}'
    assert f"{told} 1.0\n" in metrics_of(shared.service)
    shared.write(team("red"), team("green"))
    until = time.monotonic() + 10
    while f"{told} 0.0\n" not in metrics_of(shared.service):
        assert time.monotonic() < until
        time.sleep(0.05)
