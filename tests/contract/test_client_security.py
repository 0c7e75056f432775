"""TLS, mutual TLS, tokens and traces, as a server receives them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import trustme
from opentelemetry.sdk.trace import TracerProvider

from ppod import (
    AsyncRewardClient,
    ClientSecurity,
    Delivery,
    InvalidArgument,
    RewardClient,
    Unauthenticated,
    Unavailable,
)
from ppod.client import NO_RETRY
from support.scripted_services import Script, ScriptedServer, scripted_server

ONCE = Delivery(retry=NO_RETRY)


@dataclass(frozen=True)
class Certificates:
    """PEM files of an authority, and of a client that it knows."""

    ca: Path
    client: Path
    client_key: Path
    authority: trustme.CA

    def server(self, *, mutual: bool, name: str = "127.0.0.1") -> grpc.ServerCredentials:
        issued = self.authority.issue_cert(name)
        pair = (issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())
        return grpc.ssl_server_credentials([pair], self.ca.read_bytes() if mutual else None, mutual)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    directory = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    issued = authority.issue_cert("team@ppod.test")
    paths = [directory / name for name in ("ca.pem", "client.pem", "client.key")]
    authority.cert_pem.write_to_path(paths[0])
    issued.cert_chain_pems[0].write_to_path(paths[1])
    issued.private_key_pem.write_to_path(paths[2])
    return Certificates(*paths, authority)


@pytest.fixture
def plain() -> Iterator[ScriptedServer]:
    with scripted_server() as server:
        yield server


async def test_tls_and_its_faults(certificates: Certificates, plain: ScriptedServer) -> None:
    trusted = ClientSecurity(ca_file=certificates.ca, token="abc")
    with scripted_server(credentials=certificates.server(mutual=False)) as server:
        with RewardClient(server.target, security=trusted) as client:
            client.wait_ready(10)
            assert client.score([[1]]).values.tolist() == [3.5]
        async with AsyncRewardClient(server.target, security=trusted) as client:
            assert (await client.score([[1]])).values.tolist() == [3.5]
        assert {each["authorization"] for each in server.script.metadata} == {"Bearer abc"}
        with RewardClient(server.target, delivery=ONCE, timeout_s=5) as client, pytest.raises(Unavailable):
            client.score([[1]])
    with RewardClient(plain.target, security=trusted, delivery=ONCE, timeout_s=5) as client, pytest.raises(Unavailable):
        client.score([[1]])
    assert plain.script.metadata == [], "no token was sent in plain text"


def test_the_server_must_be_the_one_that_was_meant(certificates: Certificates, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    credentials = certificates.server(mutual=False, name="reward.ppod.test")
    with scripted_server(credentials=credentials) as server:
        for security in (ClientSecurity(ca_file=certificates.ca), ClientSecurity(ca_file=other)):
            with (
                RewardClient(server.target, security=security, delivery=ONCE, timeout_s=5) as client,
                pytest.raises(Unavailable),
            ):
                client.score([[1]])
        named = ClientSecurity(ca_file=certificates.ca, server_name="reward.ppod.test")
        with RewardClient(server.target, security=named) as client:
            client.score([[1]])


def test_mutual_tls(certificates: Certificates) -> None:
    known = ClientSecurity(
        ca_file=certificates.ca, certificate_file=certificates.client, key_file=certificates.client_key
    )
    with scripted_server(credentials=certificates.server(mutual=True)) as server:
        with RewardClient(server.target, security=known) as client:
            client.score([[1]])
        unknown = ClientSecurity(ca_file=certificates.ca)
        with (
            RewardClient(server.target, security=unknown, delivery=ONCE, timeout_s=5) as client,
            pytest.raises(Unavailable),
        ):
            client.score([[1]])


def test_a_token_goes_in_plain_text_to_this_machine_only(plain: ScriptedServer) -> None:
    token = ClientSecurity(token="abc")
    for target in (plain.target, "localhost:1", "[::1]:1", "unix:/tmp/x", "dns:///localhost:1"):
        RewardClient(target, security=token).close()
    for target in ("10.0.0.1:1", "reward:50051", f"{plain.target},reward:50051", "dns:///reward:1"):
        with pytest.raises(InvalidArgument, match="without TLS"):
            RewardClient(target, security=token)
        RewardClient(target, security=ClientSecurity(token="abc", plain_text_token=True)).close()


def test_every_attempt_carries_the_token(plain: ScriptedServer) -> None:
    def refuse_once(_: object, number: int) -> None:
        if number == 1:
            raise Unavailable("starting")

    script = Script(refuse_once)
    with scripted_server(script) as server, RewardClient(server.target, security=ClientSecurity(token="abc")) as client:
        client.score([[1]])
        client.describe()
    assert [each["authorization"] for each in script.metadata] == ["Bearer abc"] * 3
    with RewardClient(plain.target) as client:
        client.score([[1]])
    assert "authorization" not in plain.script.metadata[0]


def test_a_refused_token_is_told_and_not_repeated() -> None:
    def refuse(*_: object) -> None:
        raise Unauthenticated("no team has this token")

    script = Script(refuse)
    with (
        scripted_server(script) as server,
        RewardClient(server.target, security=ClientSecurity(token="abc")) as client,
        pytest.raises(Unauthenticated, match="no team has this token"),
    ):
        client.score([[1]])
    assert len(script.requests) == 1


def test_the_token_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("from-file\n")
    assert ClientSecurity.from_environment().token == ""
    monkeypatch.setenv("PPOD_TOKEN", "direct")
    assert ClientSecurity.from_environment().token == "direct"
    monkeypatch.setenv("PPOD_TOKEN_FILE", str(path))
    with pytest.raises(InvalidArgument, match="one of the two"):
        ClientSecurity.from_environment()
    monkeypatch.delenv("PPOD_TOKEN")
    assert ClientSecurity.from_environment().token == "from-file"
    path.write_text("\n")
    with pytest.raises(InvalidArgument, match="empty"):
        ClientSecurity.from_environment()
    monkeypatch.setenv("PPOD_TOKEN_FILE", str(tmp_path / "none"))
    with pytest.raises(InvalidArgument, match="No such file"):
        ClientSecurity.from_environment()


def test_an_administrators_token_is_one_of_its_own_or_the_teams(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def tokens() -> tuple[str, str]:
        return (
            ClientSecurity.from_environment().token,
            ClientSecurity.from_environment(administrator=True).token,
        )

    monkeypatch.setenv("PPOD_TOKEN", "team")
    assert tokens() == ("team", "team")
    monkeypatch.setenv("PPOD_ADMIN_TOKEN", "operations")
    assert tokens() == ("team", "operations")
    path = tmp_path / "token"
    path.write_text("from-file\n")
    monkeypatch.setenv("PPOD_ADMIN_TOKEN_FILE", str(path))
    with pytest.raises(InvalidArgument, match="PPOD_ADMIN_TOKEN and PPOD_ADMIN_TOKEN_FILE"):
        ClientSecurity.from_environment(administrator=True)
    monkeypatch.delenv("PPOD_ADMIN_TOKEN")
    monkeypatch.delenv("PPOD_TOKEN")
    assert tokens() == ("", "from-file")


def test_mistakes_are_told_and_tokens_never_shown(certificates: Certificates, tmp_path: Path) -> None:
    assert "abc" not in repr(ClientSecurity(token="abc"))
    with pytest.raises(InvalidArgument, match="both or none"):
        ClientSecurity(ca_file=certificates.ca, certificate_file=certificates.client)
    with pytest.raises(InvalidArgument, match="needs TLS"):
        ClientSecurity(certificate_file=certificates.client, key_file=certificates.client_key)
    with pytest.raises(InvalidArgument, match="printable ASCII"):
        ClientSecurity(token="line\nbreak")
    with (
        RewardClient("127.0.0.1:1", security=ClientSecurity(ca_file=tmp_path / "none")) as client,
        pytest.raises(InvalidArgument, match="ca_file"),
    ):
        client.score([[1]])


def test_the_active_trace_travels(plain: ScriptedServer) -> None:
    tracer = TracerProvider().get_tracer("test")
    with RewardClient(plain.target) as client:
        with tracer.start_as_current_span("step") as span:
            client.score([[1]])
        client.score([[1]])
    first, second = plain.script.metadata
    context = span.get_span_context()
    assert str(first["traceparent"]).startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-")
    assert "traceparent" not in second
