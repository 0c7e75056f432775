"""A real reward service on the very files that its pod gets with tokens and TLS, probed and called as the pod is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest
import trustme
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ppod import ClientSecurity, RewardAdminClient, RewardClient, Unauthenticated
from ppod.client import Replacement
from ppod.errors import PermissionDenied, Unavailable
from ppod_models.configuration import load_config
from ppod_trainer.config import TrainerConfig
from ppod_trainer.connections import client_security
from support.manifests import Object, Workload, combined, mounted_files, of_kind, workload
from support.processes import ServiceProcess, free_ports, start_module
from support.services import tiny_model_config

NAME = "ppod-reward.ppod.svc"
"""What a client that follows the Service expects the certificate to say."""
TOKEN = "token-of-the-trainer's-team"


def lay_out(root: Path, objects: Sequence[Object], one: Workload, secrets: dict[str, bytes]) -> list[Path]:
    """Write the files that a pod finds under /etc/ppod below a directory; returns those that `--config` names."""
    for path, text in mounted_files(objects, one).items():
        target = root / path.removeprefix("/etc/ppod/")
        target.parent.mkdir(parents=True, exist_ok=True)
        key = target.relative_to(root).as_posix()
        content = secrets[key] if text.startswith("secret ") else text.replace("/etc/ppod", str(root)).encode()
        target.write_bytes(content)
    return [root / path.removeprefix("/etc/ppod/") for path in one.arguments("--config")]


def certificate(authority: trustme.CA, *names: str) -> dict[str, bytes]:
    """What the Secret of a Certificate holds."""
    issued = authority.issue_cert(*names)
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
    return {
        "tls/tls.crt": chain,
        "tls/tls.key": issued.private_key_pem.bytes(),
        "tls/ca.crt": authority.cert_pem.bytes(),
    }


@dataclass(frozen=True)
class Deployed:
    """The running service, its manifest, and what the trainer would call it with."""

    service: ServiceProcess
    manifest: Workload
    security: ClientSecurity


@pytest.fixture(scope="module")
def deployed(
    tiny_model_dir: Path, tiny_heads: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployed]:
    directory = tmp_path_factory.mktemp("deployed")
    objects = combined(directory / "kustomize", "base", ("tls", "teams"))
    authority = trustme.CA()
    manifest, trainer = workload(objects, "reward"), workload(objects, "trainer")
    names = of_kind(objects, "Certificate")["ppod-reward"]["spec"]["dnsNames"]
    teams = {"teams": [{"name": "trainers", "token_sha256": [hashlib.sha256(TOKEN.encode()).hexdigest()]}]}
    secrets = {**certificate(authority, *names), "teams/teams.yaml": yaml.safe_dump(teams).encode()}
    files = lay_out(directory / "reward", objects, manifest, secrets)

    port, admin_port, metrics_port, health_port = free_ports(4)
    listen = {"host": "127.0.0.1", "port": port, "admin_port": admin_port, "metrics_port": metrics_port}
    rewards = [
        {"name": name, "model": tiny_model_config(tiny_model_dir), "head": str(head)}
        for name, head in tiny_heads.items()
    ]
    local = directory / "local.yaml"
    local.write_text(yaml.safe_dump({"listen": {**listen, "health_port": health_port}, "rewards": rewards}))
    arguments = [argument for path in (*files, local) for argument in ("--config", str(path))]
    process = start_module("ppod_services.reward", *arguments, directory=directory, name="reward")
    service = ServiceProcess(port, admin_port, metrics_port, process, directory / "reward.stderr", health_port)
    try:
        service.wait_for_event("ready")
        client = {**certificate(authority, "ppod-trainer.ppod.svc"), "token/token": TOKEN.encode() + b"\n"}
        run = load_config(TrainerConfig, *lay_out(directory / "trainer", objects, trainer, client))
        with pytest.MonkeyPatch.context() as patch:
            token_file = trainer.environment["PPOD_TOKEN_FILE"]["value"]
            patch.setenv("PPOD_TOKEN_FILE", token_file.replace("/etc/ppod", str(directory / "trainer")))
            security = replace(client_security(run.services), server_name=NAME)
        yield Deployed(service, manifest, security)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)


def test_a_kubelet_s_probes_pass(deployed: Deployed) -> None:
    ports = {value: name for name, value in deployed.manifest.ports.items()}
    local = {"health": deployed.service.health_port, "grpc": deployed.service.port}
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = deployed.manifest.container[kind]["grpc"]
        with grpc.insecure_channel(f"127.0.0.1:{local[ports[probe['port']]]}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            reply = check(health_pb2.HealthCheckRequest(service=probe["service"]), timeout=5)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_the_trainer_gets_scores_and_strangers_get_none(deployed: Deployed) -> None:
    target = deployed.service.target
    with RewardClient(target, security=deployed.security) as client:
        assert len(client.score([[1, 2, 3]]).values) == 1
    with (
        RewardClient(target, security=replace(deployed.security, token="guessed")) as stranger,
        pytest.raises(Unauthenticated),
    ):
        stranger.score([[1, 2, 3]])
    with (
        RewardClient(target, security=replace(deployed.security, server_name="ppod-reference.ppod.svc")) as other,
        pytest.raises(Unavailable),
    ):
        other.score([[1, 2, 3]], timeout_s=1)


def test_administration_asks_for_a_certificate_and_an_administrator_s_token(deployed: Deployed) -> None:
    def replacing(security: ClientSecurity) -> None:
        with RewardAdminClient(deployed.service.admin_target, security=security) as client:
            client.replace_model(Replacement("first", source="/nowhere"), timeout_s=2)

    with pytest.raises(PermissionDenied):
        replacing(deployed.security)
    with pytest.raises(Unavailable):
        replacing(replace(deployed.security, certificate_file=None, key_file=None))


def test_it_drains_as_its_pod_would(deployed: Deployed) -> None:
    deployed.service.signal()
    assert deployed.service.wait(30) == 0
