"""Every typed error that a request can cause, from real services, as the client raises it."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from ppod import (
    AsyncReferenceClient,
    FailedPrecondition,
    GenerationClient,
    InvalidArgument,
    NotFound,
    Pin,
    ReferenceClient,
    RewardClient,
    Sampling,
)
from ppod.errors import STATUS_DETAILS_KEY
from ppod.tensors import pack_sequences
from ppod.v1 import (
    common_pb2,
    generation_pb2,
    generation_pb2_grpc,
    reference_pb2,
    reference_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
)
from support.processes import ServiceProcess
from support.tiny_model import MAX_TOKENS

OK = Sampling(max_tokens=4)


@pytest.mark.parametrize(
    ("prompts", "sampling", "seeds", "field", "sample"),
    [
        ([], OK, [], "prompts", None),
        ([[1]] * 17, OK, [], "prompts", None),
        ([[1], [2, 320]], OK, [], "prompts.token_ids", 1),
        ([[1], [2], [3] * MAX_TOKENS], OK, [], "prompts.lengths", 2),
        ([[1]], Sampling(max_tokens=0), [], "sampling.max_tokens", None),
        ([[1]], Sampling(max_tokens=4, temperature=-0.1), [], "sampling.temperature", None),
        ([[1]], Sampling(max_tokens=4, temperature=float("nan")), [], "sampling.temperature", None),
        ([[1]], Sampling(max_tokens=4, temperature=float("inf")), [], "sampling.temperature", None),
        ([[1]], Sampling(max_tokens=4, top_p=0.0), [], "sampling.top_p", None),
        ([[1]], Sampling(max_tokens=4, top_p=1.1), [], "sampling.top_p", None),
        ([[1]], Sampling(max_tokens=4, top_p=float("nan")), [], "sampling.top_p", None),
        ([[1]], Sampling(max_tokens=4, stop_token_ids=(320,)), [], "sampling.stop_token_ids", None),
        ([[1], [2]], OK, [7], "seeds", None),
        ([[1], [2]], Sampling(4, n=2), [7, 8], "seeds", None),
        ([[1], [2]], Sampling(4, n=9), [], "sampling.n", None),
        ([[1]], Sampling(4, min_p=-0.1), [], "sampling.min_p", None),
        ([[1]], Sampling(4, min_p=1.1), [], "sampling.min_p", None),
        ([[1]], Sampling(4, min_p=float("nan")), [], "sampling.min_p", None),
        ([[1]], Sampling(4, repetition_penalty=0.0), [], "sampling.repetition_penalty", None),
        ([[1]], Sampling(4, repetition_penalty=-1.0), [], "sampling.repetition_penalty", None),
        ([[1]], Sampling(4, repetition_penalty=float("inf")), [], "sampling.repetition_penalty", None),
        ([[1]], Sampling(4, logit_bias={320: 1.0}), [], "sampling.logit_bias", None),
        ([[1]], Sampling(4, logit_bias={3: float("nan")}), [], "sampling.logit_bias", None),
        ([[1]], Sampling(4, logit_bias={3: float("inf")}), [], "sampling.logit_bias", None),
        ([[1]], Sampling(4, logit_bias=dict.fromkeys(range(320), -float("inf"))), [], "sampling.logit_bias", None),
        ([[1]], Sampling(4, stop=("a", "")), [], "sampling.stop", None),
        ([[1]], Sampling(4, stop=("a",) * 17), [], "sampling.stop", None),
    ],
)
def test_generation_names_the_field_and_the_sample(
    generation_service: ServiceProcess,
    prompts: list[list[int]],
    sampling: Sampling,
    seeds: list[int],
    field: str,
    sample: int | None,
) -> None:
    with GenerationClient(generation_service.target) as client, pytest.raises(InvalidArgument) as caught:
        client.generate(prompts, sampling, seeds=seeds)
    assert (caught.value.field, caught.value.sample) == (field, sample)


@pytest.mark.parametrize(
    ("sampling", "resumed_tokens", "sample"),
    [(OK, [1], None), (OK, [0, 3], 1), (Sampling(4, n=2), [1, 0], None)],
)
def test_what_cannot_be_resumed(
    generation_service: ServiceProcess, sampling: Sampling, resumed_tokens: list[int], sample: int | None
) -> None:
    with GenerationClient(generation_service.target) as client, pytest.raises(InvalidArgument) as caught:
        client.generate([[1], [2, 2]], sampling, resumed_tokens=resumed_tokens)
    assert (caught.value.field, caught.value.sample) == ("resumed_tokens", sample)


@pytest.mark.parametrize(
    ("sequences", "prompt_lengths", "temperature", "field", "sample"),
    [
        ([[1, 2], [1, 2, 3]], [1, 3], 1.0, "prompt_lengths", 1),
        ([[1, 2], [1, 2, 3]], [0, 1], 1.0, "prompt_lengths", 0),
        ([[1, 2], [1, 999]], [1, 1], 1.0, "tokens.token_ids", 1),
        ([[1] * (MAX_TOKENS + 1)], [1], 1.0, "tokens.lengths", 0),
        ([[1, 2]], [1], 0.0, "temperature", None),
        ([[1, 2]], [1], float("nan"), "temperature", None),
    ],
)
def test_reference_names_the_field_and_the_sample(
    reference_service: ServiceProcess,
    sequences: list[list[int]],
    prompt_lengths: list[int],
    temperature: float,
    field: str,
    sample: int | None,
) -> None:
    with ReferenceClient(reference_service.target) as client, pytest.raises(InvalidArgument) as caught:
        client.logprobs(sequences, prompt_lengths, temperature=temperature)
    assert (caught.value.field, caught.value.sample) == (field, sample)


def test_reward_names_the_field_and_the_sample(reward_service: ServiceProcess) -> None:
    with RewardClient(reward_service.target) as client:
        with pytest.raises(InvalidArgument) as caught:
            client.score([[1], [320]])
        assert (caught.value.field, caught.value.sample) == ("tokens.token_ids", 1)
        with pytest.raises(InvalidArgument) as caught:
            client.score_texts(["a", ""])
        assert (caught.value.field, caught.value.sample) == ("texts.texts", 1)


Call = Callable[[ServiceProcess, Pin], object]


def _generate(service: ServiceProcess, pin: Pin) -> object:
    with GenerationClient(service.target, pin=pin) as client:
        return client.generate([[1]], OK)


def _judge(service: ServiceProcess, pin: Pin) -> object:
    with ReferenceClient(service.target, pin=pin) as client:
        return client.logprobs([[1, 2]], [1])


def _score(service: ServiceProcess, pin: Pin) -> object:
    with RewardClient(service.target, pin=pin) as client:
        return client.score([[1, 2]])


@pytest.mark.parametrize(
    ("fixture", "client", "call"),
    [
        ("generation_service", GenerationClient, _generate),
        ("reference_service", ReferenceClient, _judge),
        ("reward_service", RewardClient, _score),
    ],
)
def test_pins_are_held(
    request: pytest.FixtureRequest,
    fixture: str,
    client: type[GenerationClient | ReferenceClient | RewardClient],
    call: Call,
) -> None:
    service: ServiceProcess = request.getfixturevalue(fixture)
    with client(service.target) as asking:
        serving = asking.describe().state.weight_version
    call(service, Pin(weight_version=serving))
    with pytest.raises(NotFound, match="nobody"):
        call(service, Pin(model="nobody"))
    with pytest.raises(FailedPrecondition) as caught:
        call(service, Pin(weight_version=serving + 3))
    found = (caught.value.what, caught.value.found, caught.value.expected)
    assert found == ("weight_version", str(serving), str(serving + 3))
    with pytest.raises(FailedPrecondition) as caught:
        call(service, Pin(tokenizer_fingerprint="0" * 16))
    assert caught.value.what == "tokenizer"


def raw_error(call: Callable[[grpc.Channel], object], target: str) -> grpc.RpcError:
    with grpc.insecure_channel(target) as channel, pytest.raises(grpc.RpcError) as caught:
        call(channel)
    return caught.value


def test_malformed_messages_are_the_callers_fault(
    generation_service: ServiceProcess, reference_service: ServiceProcess, reward_service: ServiceProcess
) -> None:
    """What the Python client would never send, another client may."""
    ragged = common_pb2.TokenSequences(token_ids=b"\0" * 8, lengths=[1, 2])
    hollow = common_pb2.TokenSequences(token_ids=b"\0" * 4, lengths=[1, 0])
    sampling = OK.to_proto()
    generation = generation_pb2_grpc.GenerationServiceStub
    reference = reference_pb2_grpc.ReferenceServiceStub
    reward = reward_pb2_grpc.RewardServiceStub
    requests: list[tuple[ServiceProcess, Callable[[grpc.Channel], object]]] = [
        (
            generation_service,
            lambda c: list(generation(c).Generate(generation_pb2.GenerateRequest(prompts=ragged, sampling=sampling))),
        ),
        (
            generation_service,
            lambda c: list(generation(c).Generate(generation_pb2.GenerateRequest(prompts=hollow, sampling=sampling))),
        ),
        (
            generation_service,
            lambda c: list(generation(c).Generate(generation_pb2.GenerateRequest(prompts=pack_sequences([[1]])))),
        ),
        (
            reference_service,
            lambda c: reference(c).ComputeLogprobs(
                reference_pb2.ComputeLogprobsRequest(tokens=pack_sequences([[1, 2]]))
            ),
        ),
        (reward_service, lambda c: reward(c).Score(reward_pb2.ScoreRequest())),
    ]
    for service, call in requests:
        error = raw_error(call, service.target)
        assert isinstance(error, grpc.Call)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_other_languages_read_the_standard_details(generation_service: ServiceProcess) -> None:
    request = generation_pb2.GenerateRequest(prompts=pack_sequences([[1], [400]]), sampling=OK.to_proto())
    error = raw_error(
        lambda channel: list(generation_pb2_grpc.GenerationServiceStub(channel).Generate(request)),
        generation_service.target,
    )
    assert isinstance(error, grpc.Call)
    [data] = [value for key, value in error.trailing_metadata() or () if key == STATUS_DETAILS_KEY]
    assert isinstance(data, bytes)
    status = status_pb2.Status.FromString(data)
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    [violation] = bad.field_violations
    assert violation.field == "prompts.token_ids"
    assert "sample 1: found id 400 at position 0, expected ids from 0 to 319" in violation.description


def test_a_long_value_is_cut_not_dropped_with_the_whole_status(reference_service: ServiceProcess) -> None:
    """An error travels as HTTP/2 headers: one that repeats a long value would lose the call its code."""
    for name in ("x" * 50_000, "😀" * 20_000):
        with (
            ReferenceClient(reference_service.target, pin=Pin(model=name)) as client,
            pytest.raises(NotFound) as caught,
        ):
            client.logprobs([[1, 2]], [1])
        assert caught.value.found[:50] == name[:50]
        assert caught.value.found.endswith("…")


async def test_the_port_of_another_service_is_named(generation_service: ServiceProcess) -> None:
    message = f"target: found {generation_service.target}, which does not take this call, expected a port of "
    with RewardClient(generation_service.target) as client, pytest.raises(InvalidArgument) as caught:
        client.score([[1]])
    assert str(caught.value) == f"{message}ppod.v1.RewardService"
    async with AsyncReferenceClient(generation_service.target) as asynchronous:
        with pytest.raises(InvalidArgument) as caught:
            await asynchronous.logprobs([[1, 2]], [1])
    assert str(caught.value) == f"{message}ppod.v1.ReferenceService"


def test_a_temperature_that_no_float_can_divide_by_is_the_callers_fault(reference_service: ServiceProcess) -> None:
    with ReferenceClient(reference_service.target) as client:
        assert client.logprobs([[1, 2]], [1], temperature=1e-6).values[0][0] <= 0
        with pytest.raises(InvalidArgument, match="at least 1e-06"):
            client.logprobs([[1, 2]], [1], temperature=1e-38)
