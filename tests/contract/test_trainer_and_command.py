"""The trainer's connections and `ppod score` over TLS, with a token and with replicas."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme
from google.protobuf.message import Message
from tokenizers import Tokenizer

from ppod import InvalidArgument, Pin
from ppod.tensors import pack_floats, pack_tokens
from ppod.v1 import generation_pb2, reward_pb2
from ppod_deploy.cli import execute
from ppod_models.configuration import parse_config
from ppod_trainer.config import RewardsConfig, RolloutConfig, TrainerConfig
from ppod_trainer.connections import check_references, check_reward, check_services, connect
from ppod_trainer.errors import ServiceMismatchError
from support.joined_words import joined_words
from support.scripted_services import LIMITS, Script, scripted_server

FINGERPRINT = "f" * 16


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Path:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return tmp_path / "ca.pem"


@pytest.fixture
def credentials(authority: trustme.CA) -> grpc.ServerCredentials:
    issued = authority.issue_cert("127.0.0.1")
    return grpc.ssl_server_credentials([(issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())])


def trainer_of(one: str, two: str, **others: object) -> TrainerConfig:
    values = {
        "reward": f"{one},{two}",
        "reference": f"{one},{two}",
        "generation": one,
        "generation_admin": one,
        "reference_admin": one,
        **others,
    }
    return parse_config(TrainerConfig, {"services": values}, "test")


def test_the_trainer_uses_replicas_tls_and_the_token(
    ca_file: Path, credentials: grpc.ServerCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PPOD_TOKEN", "team-one")
    seen: list[str] = []
    with scripted_server(credentials=credentials) as one, scripted_server(credentials=credentials) as two:
        config = trainer_of(one.target, two.target, tls={"ca_file": str(ca_file)})
        connections = connect(config, FINGERPRINT, lambda method, _, code: seen.append(f"{method} {code}"))
        try:
            # More sequences than a request may hold: the client cuts them, so the trainer need not be refused.
            rollout = RolloutConfig(batch_size=LIMITS.max_request_sequences, max_tokens=8)
            assert connections.reward is not None
            assert connections.reward.pin == Pin(tokenizer_fingerprint=FINGERPRINT)
            most = LIMITS.max_request_sequences
            assert check_services(connections, rollout, most, LIMITS.vocab_size, 2).generation.eos_token_ids == (2,)
            too_many = RolloutConfig(batch_size=LIMITS.max_request_sequences + 1, max_tokens=8)
            with pytest.raises(
                ServiceMismatchError,
                match="generation takes 8 sequences a request, and is asked for 9 of the 9 samples",
            ):
                check_services(connections, too_many, 1, LIMITS.vocab_size, 2)
            with pytest.raises(
                ServiceMismatchError, match=r"asked for 9 of the 9 held-out prompts; lower prompts\.heldout"
            ):
                check_services(connections, rollout, most + 1, LIMITS.vocab_size, 2)
            unknown = RolloutConfig(batch_size=2, max_tokens=8, stop_token_ids=(2, LIMITS.vocab_size))
            with pytest.raises(
                ServiceMismatchError, match=rf"rollout\.stop_token_ids: .* no token {LIMITS.vocab_size};"
            ):
                check_services(connections, unknown, 1, LIMITS.vocab_size, 2)
            # As long as there are replicas to share them.
            connections.generation._core.shared.replicas.replace([one.target, two.target])  # pyright: ignore
            shared = RolloutConfig(batch_size=2 * most, max_tokens=8)
            check_services(connections, shared, 2 * most, LIMITS.vocab_size, 2)
            scores = connections.reward.score([[1, index] for index in range(3 * LIMITS.max_request_sequences)])
        finally:
            connections.close()
    assert len(scores.values) == 24
    for server in (one, two):
        assert server.script.requests
        assert {each["authorization"] for each in server.script.metadata} == {"Bearer team-one"}
    assert "/ppod.v1.RewardService/Score OK" in seen


@pytest.mark.parametrize(
    ("reads", "vocab_size", "token_id_bound", "found"),
    [
        (1000, 1000, 990, None),
        (990, 1000, 990, None),
        (1024, 1000, 990, None),
        (989, 1000, 990, "reward takes token ids below 989, the policy has 1000 and its tokenizer makes ids below 990"),
        (1000, 1000, 1001, None),
        (1000, 1024, 990, "generation takes token ids below 1000, the policy has 1024"),
    ],
)
def test_a_reward_reads_all_ids_of_the_policys_tokenizer(
    reads: int, vocab_size: int, token_id_bound: int, found: str | None
) -> None:
    """Models with one tokenizer have embeddings of different sizes; those of generation are the policy's own."""

    def describe(reply: Message, _: int) -> None:
        if isinstance(reply, reward_pb2.GetRewardModelResponse):
            reply.limits.vocab_size = reads

    with scripted_server(Script(change=describe)) as server:
        alone = trainer_of(server.target, "", reward=server.target, reference=server.target)
        connections = connect(alone, FINGERPRINT, lambda *_: None)
        try:
            rollout = RolloutConfig(batch_size=2, max_tokens=8)
            outcome = pytest.raises(ServiceMismatchError, match=found) if found else nullcontext()
            with outcome:
                check_services(connections, rollout, 1, vocab_size, token_id_bound)
        finally:
            connections.close()


@pytest.mark.parametrize("key", ["reward_model", "judge_model"])
def test_a_reward_that_compares_with_answers_is_refused_where_the_prompts_have_none(key: str) -> None:
    with scripted_server() as server:
        targets = dict.fromkeys(("reward", "reference"), server.target)
        for name, refused in (("exact", True), ("one", False), ("whole", False)):
            connections = connect(trainer_of(server.target, "", **targets, **{key: name}), FINGERPRINT, lambda *_: None)
            try:
                expected = f"services.{key}: exact compares responses with references, and the prompts have none"
                with pytest.raises(ServiceMismatchError, match=expected) if refused else nullcontext():
                    check_references(connections)
            finally:
                connections.close()


@pytest.mark.parametrize(
    ("name", "fingerprint", "rewards", "found"),
    [
        ("whole", FINGERPRINT, {"filters": {"safety": {"reward": "one", "at_least": 0}}}, None),
        ("one", FINGERPRINT, {"filters": {"safety": {"reward": "one", "at_least": 0}}}, None),
        (
            "",
            FINGERPRINT,
            {"filters": {"safety": {"reward": "exact", "at_least": 0}}},
            r"'exact', which is no part of the scores \(their parts: length, one, pair, two, whole\)",
        ),
        ("whole", FINGERPRINT, {"shaping": "token"}, None),
        ("whole", "e" * 16, {"shaping": "token"}, "rewards.shaping is token, and two is a process reward model with"),
        ("whole", "e" * 16, {"shaping": "step"}, None),
        ("one", "e" * 16, {"shaping": "token"}, None),
    ],
)
def test_a_reward_that_does_not_tell_what_the_run_reads_is_refused_at_its_start(
    name: str, fingerprint: str, rewards: dict[str, object], found: str | None
) -> None:
    with scripted_server() as server:
        targets = dict.fromkeys(("reward", "reference"), server.target)
        config = trainer_of(server.target, "", **targets, reward_model=name)
        connections = connect(config, fingerprint, lambda *_: None)
        try:
            with pytest.raises(ServiceMismatchError, match=found) if found else nullcontext():
                check_reward(connections, RewardsConfig.model_validate(rewards))
        finally:
            connections.close()


def test_a_token_is_not_sent_in_plain_text_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPOD_TOKEN", "team-one")
    with pytest.raises(InvalidArgument, match="without TLS"):
        connect(trainer_of("reward:1", "reference:1"), FINGERPRINT, lambda *_: None)


def test_score_takes_tls_and_the_token(
    ca_file: Path,
    credentials: grpc.ServerCredentials,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PPOD_TOKEN", "team-one")
    script = Script()
    with scripted_server(script, credentials=credentials) as server:
        assert execute(["score", "--target", server.target, "--json", "--tls.ca-file", str(ca_file), "ab"]) == 0
        assert execute(["score", "--target", server.target, "--timeout-s", "2", "ab"]) == 1
    captured = capsys.readouterr()
    record = json.loads(captured.out.splitlines()[0])
    assert record["score"] == (97 + 98) * 0.5 + 2 + 2 * 2
    assert [each["authorization"] for each in script.metadata] == ["Bearer team-one"]
    assert execute(["score", "--target", "elsewhere:1", "ab"]) == 1
    assert "without TLS" in capsys.readouterr().err


@pytest.mark.parametrize("text", [r"so \[x = 1\] holds", r"a \[/b] c", ":heart: [red]", "ends with \\", "long " * 40])
def test_texts_are_shown_as_they_are(text: str, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a model writes between brackets or colons is no style or picture, and lines are not broken."""
    tokenizer = Tokenizer.from_file(str(tiny_model_dir / "tokenizer.json"))

    def say(reply: Message, number: int) -> None:
        del number
        if isinstance(reply, generation_pb2.GenerateResponse):
            ids = tokenizer.encode(text).ids
            reply.token_ids = pack_tokens(np.asarray(ids, dtype=np.int32))
            reply.logprobs = pack_floats(np.zeros(len(ids), dtype=np.float32))

    with scripted_server(Script(change=say)) as server:
        options = ("--target", server.target, "--tokenizer", str(tiny_model_dir), "--max-tokens", "300")
        assert execute(["generate", *options, text]) == 0
        assert capsys.readouterr().out == f"{text}{text}\n"
        assert execute(["score", "--target", server.target, text.strip()]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in text.split())


def test_a_completion_is_shown_with_the_space_before_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Decoded by itself it would lack that, and run into the prompt."""
    joined_words("The", "film", "was", "great").save(str(tmp_path / "tokenizer.json"))

    def say(reply: Message, number: int) -> None:
        del number
        if isinstance(reply, generation_pb2.GenerateResponse):
            reply.token_ids = pack_tokens(np.array([4], dtype=np.int32))
            reply.logprobs = pack_floats(np.zeros(1, dtype=np.float32))

    with scripted_server(Script(change=say)) as server:
        options = ("--target", server.target, "--tokenizer", str(tmp_path))
        assert execute(["generate", *options, "The film was"]) == 0
        assert execute(["generate", *options, "--json", "The film was"]) == 0
    shown, record = capsys.readouterr().out.splitlines()
    assert shown == "The film was great"
    assert json.loads(record)["completion"] == " great"
