"""Servers that break the contract, each in one way: the client must name the field and return nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import pytest
from google.protobuf.message import Message

from ppod import (
    FailedPrecondition,
    FinishReason,
    GenerationClient,
    Granularity,
    InvalidReply,
    Pin,
    ReferenceClient,
    RewardAdminClient,
    RewardClient,
    Sampling,
)
from ppod.client import Replacement, WeightSpan
from ppod.tensors import pack_floats, pack_tokens
from ppod.v1 import generation_pb2, reference_pb2, reward_admin_pb2, reward_pb2
from support.scripted_services import Script, scripted_server

NAN, INFINITE = float("nan"), float("inf")


def set_field(path: str, value: bytes | int | float | list[int]) -> Callable[[Message], None]:
    """Overwrite a field, by a path such as breakdown.members[1].scores."""

    def change(reply: Message) -> None:
        *before, last = path.replace("]", "").replace("[", ".").split(".")
        target: Message = reply
        for name in before:
            target = target[int(name)] if name.isdigit() else getattr(target, name)  # pyright: ignore
        if isinstance(value, list):
            repeated = cast("list[int]", getattr(target, last))
            del repeated[:]
            repeated.extend(value)
        else:
            setattr(target, last, value)

    return change


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (set_field("scores", pack_floats([1.0, 2.0])), "scores"),
        (set_field("scores", b"\0" * 11), "scores"),
        (set_field("scores", b""), "scores"),
        (set_field("scores", pack_floats([1.0, NAN, 2.0])), "scores"),
        (set_field("scores", pack_floats([1.0, INFINITE, 2.0])), "scores"),
        (set_field("scores", pack_floats([1.0, 2.0, 3.0])), "breakdown.scores"),
        (set_field("truncated_tokens", [1, 2]), "truncated_tokens"),
        (set_field("timing.compute_s", NAN), "timing.compute_s"),
        (set_field("timing.queue_s", -1.0), "timing.queue_s"),
        (set_field("breakdown.kind", 0), "breakdown.kind"),
        (set_field("breakdown.kind", 77), "breakdown.kind"),
        (set_field("breakdown.members[0].scores", b"\0" * 8), "breakdown.members[0].scores"),
        (set_field("breakdown.members[0].std", b""), "breakdown.members[0].std"),
        (set_field("breakdown.members[0].mean", pack_floats([NAN] * 3)), "breakdown.members[0].mean"),
        (
            set_field("breakdown.members[0].members[1].scores", pack_floats([1, 2, INFINITE])),
            "breakdown.members[0].members[1].scores",
        ),
        (set_field("breakdown.members[1].raw_scores", b"\0" * 4), "breakdown.members[1].raw_scores"),
        (set_field("breakdown.members[1].truncated_tokens", [1]), "breakdown.members[1].truncated_tokens"),
        (set_field("breakdown.members[1].weight", NAN), "breakdown.members[1].weight"),
        (lambda reply: reply.breakdown.members[1].ClearField("weight"), "breakdown.members[1].weight"),
        (lambda reply: reply.breakdown.members[0].ClearField("members"), "breakdown.members[0].members"),
        (set_field("breakdown.members[1].adjustment.std", 0.0), "breakdown.members[1].adjustment.std"),
        (lambda reply: reply.ClearField("process"), "process"),
        (set_field("process.lengths", [2, 1]), "process.lengths"),
        (set_field("process.lengths", [2, 1, 2]), "process.lengths"),
        (set_field("process.positions", pack_tokens([2, 3, 1])), "process.positions"),
        (set_field("process.positions", pack_tokens([3, 2, 1, 2])), "process.positions"),
        (set_field("process.positions", pack_tokens([2, 4, 1, 2])), "process.positions"),
        (set_field("process.positions", pack_tokens([0, 1, 1, 2])), "process.positions"),
        (set_field("process.scores", pack_floats([1, 2, 3])), "process.scores"),
        (set_field("process.scores", pack_floats([1, 2, 3, NAN])), "process.scores"),
    ],
)
def test_scores(change: Callable[[reward_pb2.ScoreResponse], None], field: str) -> None:
    script = Script(change=lambda reply, _: change(cast("reward_pb2.ScoreResponse", reply)))
    with scripted_server(script) as server, RewardClient(server.target) as client:
        with pytest.raises(InvalidReply) as caught:
            client.score([[1, 2, 3], [10], [4, 5]], process=Granularity.TOKEN, prompt_lengths=[1, 0, 1])
        assert caught.value.field == field
    assert len(script.requests) == 1, "a wrong reply is told, not asked for again"


def test_process_scores_that_nobody_asked_for() -> None:
    def change(reply: Message, _: int) -> None:
        cast("reward_pb2.ScoreResponse", reply).process.SetInParent()

    with (
        scripted_server(Script(change)) as server,
        RewardClient(server.target) as client,
        pytest.raises(InvalidReply, match="process"),
    ):
        client.score([[1]])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (set_field("logprobs", pack_floats([-1.0, -1.0])), "logprobs"),
        (set_field("logprobs", pack_floats([-1.0, -INFINITE, -1.0])), "logprobs"),
        (set_field("entropies", b""), "entropies"),
        (set_field("entropies", pack_floats([1, NAN, 1])), "entropies"),
        (set_field("entropies", pack_floats([1, -1, 1])), "entropies"),
        (set_field("top_token_ids", pack_tokens([1] * 5)), "top_token_ids"),
        (set_field("top_token_ids", pack_tokens([1] * 5 + [-1])), "top_token_ids"),
        (set_field("top_logprobs", pack_floats([-1] * 5)), "top_logprobs"),
        (set_field("top_logprobs", pack_floats([-2, -1] * 3)), "top_logprobs"),
    ],
)
def test_logprobs(change: Callable[[Message], None], field: str) -> None:
    script = Script(change=lambda reply, _: change(reply))
    with scripted_server(script) as server, ReferenceClient(server.target) as client:
        with pytest.raises(InvalidReply) as caught:
            client.logprobs([[1, 2, 3], [4, 5]], [1, 1], entropy=True, top_k=2)
        assert caught.value.field == field


def test_entropies_and_top_tokens_that_nobody_asked_for() -> None:
    for field in ("entropies", "top_logprobs", "top_token_ids"):
        change = set_field(field, b"\0" * 12)
        script = Script(
            change=lambda reply, _, change=change: change(cast("reference_pb2.ComputeLogprobsResponse", reply))
        )
        with (
            scripted_server(script) as server,
            ReferenceClient(server.target) as client,
            pytest.raises(InvalidReply, match=field),
        ):
            client.logprobs([[1, 2, 3], [4, 5]], [1, 1])


def spans(*versions: tuple[int, int]) -> Callable[[Message], None]:
    """Say which version made how many tokens."""

    def change(reply: Message) -> None:
        made = [generation_pb2.WeightSpan(weight_version=version, tokens=tokens) for version, tokens in versions]
        cast("generation_pb2.GenerateResponse", reply).weight_spans.extend(made)

    return change


def filtered_with_tokens(reply: Message) -> None:
    """Send what is withheld."""
    completion = cast("generation_pb2.GenerateResponse", reply)
    completion.finish_reason = generation_pb2.FINISH_REASON_FILTERED
    completion.filter_reason = "rude"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (set_field("index", 2), "index"),
        (set_field("index", 1), "index"),
        (set_field("token_ids", b""), "token_ids"),
        (set_field("token_ids", b"\0" * 6), "token_ids"),
        (set_field("token_ids", b"\0" * 12), "token_ids"),
        (set_field("logprobs", pack_floats([-1])), "logprobs"),
        (set_field("finish_reason", 0), "finish_reason"),
        (set_field("finish_reason", 77), "finish_reason"),
        (set_field("finish_reason", generation_pb2.FINISH_REASON_STOP_STRING), "finish_reason"),
        (set_field("finish_reason", generation_pb2.FINISH_REASON_FILTERED), "filter_reason"),
        (set_field("filter_reason", "rude"), "filter_reason"),
        (filtered_with_tokens, "token_ids"),
        (set_field("seed", 99), "seed"),
        (set_field("sample", 1), "sample"),
        (set_field("unscaled_logprobs", pack_floats([-1, -1])), "unscaled_logprobs"),
        (spans((3, 1)), "weight_spans"),
        (spans((2, 1), (3, 2)), "weight_spans"),
        (spans((2, 2), (3, 0)), "weight_spans"),
        (spans((3, 1), (4, 1)), "weight_spans"),
    ],
)
def test_completions(change: Callable[[Message], None], field: str) -> None:
    script = Script(change=lambda reply, _: change(cast("generation_pb2.GenerateResponse", reply)))
    with scripted_server(script) as server, GenerationClient(server.target) as client:
        with pytest.raises(InvalidReply) as caught:
            client.generate([[1], [2, 2]], Sampling(max_tokens=2), seeds=[5, 6])
        assert caught.value.field == field


def test_unscaled_logprobs_that_are_missing() -> None:
    with (
        scripted_server() as server,
        GenerationClient(server.target) as client,
        pytest.raises(InvalidReply, match="unscaled_logprobs"),
    ):
        client.generate([[1]], Sampling(max_tokens=2, unscaled_logprobs=True))


def test_completions_without_tokens_only_where_there_may_be_none() -> None:
    """Handed back before its first token, and withheld: both have none, and say why."""

    def change(reply: Message, _: int) -> None:
        completion = cast("generation_pb2.GenerateResponse", reply)
        completion.token_ids = completion.logprobs = b""
        if completion.index:
            completion.finish_reason = generation_pb2.FINISH_REASON_ABORTED
        else:
            completion.finish_reason = generation_pb2.FINISH_REASON_FILTERED
            completion.filter_reason = "rude"

    with scripted_server(Script(change)) as server, GenerationClient(server.target) as client:
        withheld, aborted = client.generate([[1], [2]], Sampling(max_tokens=2), weight_version=3)
    assert (withheld.finish_reason, withheld.filter_reason) == (FinishReason.FILTERED, "rude")
    assert (aborted.finish_reason, aborted.filter_reason) == (FinishReason.ABORTED, "")
    for done in (withheld, aborted):
        assert (len(done.token_ids), len(done.logprobs), done.weight_spans) == (0, 0, ())


def test_spans_tell_who_made_the_tokens() -> None:
    script = Script(change=lambda reply, _: spans((2, 1), (3, 1))(reply))
    with scripted_server(script) as server, GenerationClient(server.target) as client:
        [done] = client.generate([[1]], Sampling(max_tokens=2))
        assert done.weight_spans == (WeightSpan(2, 1), WeightSpan(3, 1))
        with pytest.raises(FailedPrecondition, match="the server has 2, the request needs 3"):
            client.generate([[1]], Sampling(max_tokens=2), weight_version=3)
    with scripted_server() as server, GenerationClient(server.target) as client:
        assert client.generate([[1]], Sampling(max_tokens=2))[0].weight_spans == (WeightSpan(3, 2),)


@pytest.mark.parametrize(
    ("pin", "what"),
    [
        (Pin(model="other"), "model"),
        (Pin(weight_version=4), "weight_version"),
        (Pin(tokenizer_fingerprint="0" * 16), "tokenizer"),
    ],
)
def test_a_server_that_ignores_the_pin(pin: Pin, what: str) -> None:
    """The scripted server answers as itself whatever the selector says."""
    with scripted_server() as server:
        with RewardClient(server.target, pin=pin) as client:
            for call in (lambda: client.score([[1]]), lambda: client.score_texts(["a"]), client.describe):
                with pytest.raises(FailedPrecondition) as caught:
                    call()
                assert caught.value.what == what
        with ReferenceClient(server.target, pin=pin) as client, pytest.raises(FailedPrecondition):
            client.logprobs([[1, 2]], [1])
        with GenerationClient(server.target, pin=pin) as client, pytest.raises(FailedPrecondition):
            client.generate([[1]], Sampling(max_tokens=2))


def test_generation_by_another_version_than_asked_for() -> None:
    with scripted_server() as server, GenerationClient(server.target) as client:
        with pytest.raises(FailedPrecondition) as caught:
            client.generate([[1]], Sampling(max_tokens=2), weight_version=8)
        assert (caught.value.found, caught.value.expected) == ("3", "8")


def test_a_replacement_of_another_model() -> None:
    def change(reply: Message, _: int) -> None:
        cast("reward_admin_pb2.ReplaceModelResponse", reply).model.model = "two"

    with (
        scripted_server(Script(change)) as server,
        RewardAdminClient(server.target) as client,
        pytest.raises(InvalidReply, match="two"),
    ):
        client.replace_model(Replacement("one"))
