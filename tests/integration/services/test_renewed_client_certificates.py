"""Callers whose own certificates are renewed while they run: a trainer, and a service that relays weights."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

from ppod import ClientSecurity, GenerationClient, WeightClient
from ppod.client import RelayHop, WeightPush
from support.authority import Authority
from support.processes import running_service
from support.services import tiny_model_config
from support.tiny_model import build_model
from support.weight_checks import GREEDY, PROMPTS
from support.weight_tensors import weight_tensors

LIFETIME_S = 5.0
AGE_S = 1.0


@dataclass
class Caller:
    """Files of a caller."""

    authority: Authority
    name: str

    def renew(self, lifetime_s: float) -> None:
        issued = self.authority.ca.issue_cert(self.name, not_after=datetime.now(UTC) + timedelta(seconds=lifetime_s))
        issued.private_key_pem.write_to_path(self._path("key"))
        issued.cert_chain_pems[0].write_to_path(self._path("crt"))

    def tls(self) -> dict[str, str]:
        files = {"certificate_file": str(self._path("crt")), "key_file": str(self._path("key"))}
        return {"ca_file": self.authority.root_file(), **files}

    def _path(self, suffix: str) -> Path:
        return self.authority.directory / f"{self.name}.{suffix}"


def test_calls_pushes_and_relays_go_on_after_the_first_certificates_expired(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Services close connections for their age, as every few minutes; new ones need a certificate that is good."""
    authority = Authority(trustme.CA(), tmp_path)
    trainer, relay = Caller(authority, "trainer"), Caller(authority, "relay")
    port = {**authority.issue("server"), "client_ca_file": authority.root_file()}
    relay.renew(600)
    values = {
        "model": tiny_model_config(tiny_model_dir),
        "tls": port,
        "admin_tls": port,
        "limits": {"max_connection_age_s": AGE_S},
        "weights": {"relay_targets": ["127.0.0.1:*"], "relay_tls": relay.tls()},
    }
    with (
        running_service("ppod_services.generation", tmp_path, values) as first,
        running_service("ppod_services.generation", tmp_path, values) as second,
    ):
        expires = time.monotonic() + LIFETIME_S
        for caller in (trainer, relay):
            caller.renew(LIFETIME_S)
        security = ClientSecurity(*(Path(path) for path in trainer.tls().values()))
        tensors = weight_tensors(build_model(seed=7))
        with (
            GenerationClient(first.target, security=security) as generation,
            WeightClient(first.admin_target, security=security) as weights,
            WeightClient(second.admin_target, security=security) as behind,
        ):

            def push(version: int) -> None:
                prepared = weights.push(WeightPush(version, tensors, relay=(RelayHop(second.admin_target),)))
                assert [one.error for one in prepared.replicas] == [None, None]
                for client in (weights, behind):
                    client.commit(version)
                assert generation.generate(PROMPTS, GREEDY)[0].state.weight_version == version

            push(1)
            for caller in (trainer, relay):
                caller.renew(600)
            while time.monotonic() < expires + 2 * AGE_S:
                generation.generate(PROMPTS[:1], GREEDY)
                time.sleep(0.2)
            push(2)
