"""Real gRPC servers whose answers are arithmetic, and that break the contract where a test asks them to."""

# ruff: noqa: N802 - a servicer's methods carry the names of the contract

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import grpc
import numpy as np
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ppod.channel import server_options
from ppod.errors import STATUS_DETAILS_KEY, InvalidArgument, PpodError, to_status
from ppod.tensors import pack_floats, pack_tokens, unpack_sequences
from ppod.v1 import (
    common_pb2,
    generation_pb2,
    generation_pb2_grpc,
    reference_pb2,
    reference_pb2_grpc,
    reward_admin_pb2,
    reward_admin_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
)

STATE = common_pb2.ModelState(model="arithmetic", weight_version=3, tokenizer_fingerprint="f" * 16)
LIMITS = common_pb2.ModelLimits(
    vocab_size=1000, max_sequence_tokens=64, max_request_sequences=8, dtype="float32", device="cpu"
)
TIMING = common_pb2.Timing(queue_s=0.25, compute_s=0.5, tokens=7)


@dataclass
class Script:
    """What a server does: `change` may alter a reply, block or raise before it is sent, given the call's number.

    With `broken_end` the first stream ends with that error behind its last reply.
    """

    change: Callable[[Message, int], None] | None = None
    broken_end: PpodError | None = None
    state: common_pb2.ModelState = field(default_factory=lambda: STATE)
    requests: list[Message] = field(default_factory=list[Message])
    metadata: list[dict[str, str | bytes]] = field(default_factory=list[dict[str, str | bytes]])
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, request: Message, reply: Message, context: grpc.ServicerContext) -> None:
        """Record the request, and spoil the reply or end the call as the test says."""
        with self.lock:
            self.requests.append(request)
            self.metadata.append(dict(context.invocation_metadata()))
            number = len(self.requests)
        if self.change is None:
            return
        try:
            self.change(reply, number)
        except PpodError as error:
            abort(context, error)

    def of(self, kind: type[Message]) -> list[Message]:
        return [request for request in self.requests if isinstance(request, kind)]


def abort(context: grpc.ServicerContext, error: PpodError) -> NoReturn:
    status = to_status(error)
    context.set_trailing_metadata(((STATUS_DETAILS_KEY, status.SerializeToString()),))
    context.abort(error.code, status.message)
    raise AssertionError("abort returned")


def token_score(tokens: list[int]) -> float:
    return sum(tokens) * 0.5 + len(tokens)


class ScriptedReward(reward_pb2_grpc.RewardServiceServicer):
    """scores = 2 * length + members' mean; a sum of a function and an ensemble of two models."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def Score(self, request: reward_pb2.ScoreRequest, context: grpc.ServicerContext) -> reward_pb2.ScoreResponse:
        match request.WhichOneof("input"):
            case "tokens":
                sequences = [tokens.tolist() for tokens in unpack_sequences(request.tokens, "tokens")]
            case "texts":
                prompts = request.texts.prompts or [""] * len(request.texts.texts)
                sequences = [list((p + t).encode()) for p, t in zip(prompts, request.texts.texts, strict=True)]
            case _:
                turns = [each.messages for each in request.conversations.conversations]
                sequences = [list("".join(m.role + m.content for m in each).encode()) for each in turns]
        if len(sequences) > LIMITS.max_request_sequences:
            field_name = request.WhichOneof("input") or ""
            abort(context, InvalidArgument(field_name, f"{len(sequences)} sequences", "1 to 8 sequences"))
        reply = self._reply(sequences)
        if request.process:
            prompts_of = list(request.prompt_lengths) or [0] * len(sequences)
            places = [
                list(range(p + 1, len(s) + 1)) if request.process == reward_pb2.PROCESS_GRANULARITY_TOKEN else [len(s)]
                for s, p in zip(sequences, prompts_of, strict=True)
            ]
            flat = [place for each in places for place in each]
            reply.process.lengths.extend(len(each) for each in places)
            reply.process.positions = pack_tokens(flat)
            reply.process.scores = pack_floats(np.asarray(flat, dtype=np.float32) / 10)
        self.script.answer(request, reply, context)
        return reply

    def _reply(self, sequences: list[list[int]]) -> reward_pb2.ScoreResponse:
        first = np.asarray([token_score(tokens) for tokens in sequences], dtype=np.float32)
        second = first + 2
        lengths = np.asarray([len(tokens) for tokens in sequences], dtype=np.float32)
        kinds = {name.removeprefix("REWARD_KIND_"): value for name, value in reward_pb2.RewardKind.items()}

        def leaf(name: str, kind: str, scores: np.ndarray) -> reward_pb2.RewardComponent:
            component = reward_pb2.RewardComponent(name=name, kind=kinds[kind], scores=pack_floats(scores))
            if kind == "MODEL":
                component.model.CopyFrom(self.script.state)
            return component

        ensemble = leaf("pair", "ENSEMBLE", first)
        ensemble.weight, ensemble.pessimism = 1.0, 1.0
        ensemble.mean, ensemble.std = pack_floats(first + 1), pack_floats(np.ones_like(first))
        ensemble.members.extend([leaf("one", "MODEL", first), leaf("two", "MODEL", second)])
        length = leaf("length", "FUNCTION", lengths)
        length.weight = 2.0
        length.raw_scores = pack_floats(lengths * 3 + 1)
        length.adjustment.mean, length.adjustment.std, length.adjustment.clip_high = 1.0, 3.0, 99.0
        root = leaf("whole", "SUM", first + 2 * lengths)
        root.members.extend([ensemble, length])
        return reward_pb2.ScoreResponse(model=self.script.state, timing=TIMING, scores=root.scores, breakdown=root)

    def GetRewardModel(
        self, request: reward_pb2.GetRewardModelRequest, context: grpc.ServicerContext
    ) -> reward_pb2.GetRewardModelResponse:
        reply = reward_pb2.GetRewardModelResponse(model=self.script.state, limits=LIMITS)
        self.script.answer(request, reply, context)
        return reply

    def ListRewards(
        self, request: reward_pb2.ListRewardsRequest, context: grpc.ServicerContext
    ) -> reward_pb2.ListRewardsResponse:
        reply = reward_pb2.ListRewardsResponse(
            rewards=[
                reward_pb2.RewardDescription(
                    name="whole", kind=reward_pb2.REWARD_KIND_SUM, members=["pair", "length"], weights=[1.0, 2.0]
                ),
                reward_pb2.RewardDescription(
                    name="one",
                    kind=reward_pb2.REWARD_KIND_MODEL,
                    model=self.script.state,
                    limits=LIMITS,
                    takes_tokens=True,
                ),
                reward_pb2.RewardDescription(name="pair", kind=reward_pb2.REWARD_KIND_ENSEMBLE, members=["one", "two"]),
                reward_pb2.RewardDescription(
                    name="two", kind=reward_pb2.REWARD_KIND_PROCESS_MODEL, model=self.script.state
                ),
                reward_pb2.RewardDescription(name="length", kind=reward_pb2.REWARD_KIND_FUNCTION),
                reward_pb2.RewardDescription(name="exact", kind=reward_pb2.REWARD_KIND_FUNCTION, needs_references=True),
            ]
        )
        self.script.answer(request, reply, context)
        return reply


class ScriptedReference(reference_pb2_grpc.ReferenceServiceServicer):
    """The logprob of a token is -id/100, its entropy id/10, and its top tokens are 0, 1, ... with -0.1, -0.2, ..."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def ComputeLogprobs(
        self, request: reference_pb2.ComputeLogprobsRequest, context: grpc.ServicerContext
    ) -> reference_pb2.ComputeLogprobsResponse:
        sequences = unpack_sequences(request.tokens, "tokens")
        pairs = zip(sequences, request.prompt_lengths, strict=True)
        flat = np.concatenate([tokens[prompt:] for tokens, prompt in pairs]).astype(np.float32)
        reply = reference_pb2.ComputeLogprobsResponse(
            model=self.script.state, timing=TIMING, logprobs=pack_floats(-flat / 100)
        )
        if request.entropy:
            reply.entropies = pack_floats(flat / 10)
        if request.top_k:
            reply.top_token_ids = pack_tokens(list(range(request.top_k)) * len(flat))
            reply.top_logprobs = pack_floats(-np.arange(1, request.top_k + 1, dtype=np.float32) / 10) * len(flat)
        self.script.answer(request, reply, context)
        return reply

    def GetReferenceModel(
        self, request: reference_pb2.GetReferenceModelRequest, context: grpc.ServicerContext
    ) -> reference_pb2.GetReferenceModelResponse:
        reply = reference_pb2.GetReferenceModelResponse(model=self.script.state, limits=LIMITS)
        self.script.answer(request, reply, context)
        return reply


class ScriptedGeneration(generation_pb2_grpc.GenerationServiceServicer):
    """Completes a prompt with [its seed % 100, its length], the last completion first."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def Generate(
        self, request: generation_pb2.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[generation_pb2.GenerateResponse]:
        if not request.prompts.lengths:
            abort(context, InvalidArgument("prompts", "0 sequences", "1 or more, as a real service asks for"))
        n = request.sampling.n or 1
        seeds = list(request.seeds) or [7] * n * len(request.prompts.lengths)
        for place in reversed(range(len(seeds))):
            index, sample = divmod(place, n)
            reply = generation_pb2.GenerateResponse(
                index=index,
                sample=sample,
                token_ids=pack_tokens([seeds[place] % 100, request.prompts.lengths[index]]),
                logprobs=pack_floats([-1.0, -2.0]),
                finish_reason=generation_pb2.FINISH_REASON_LENGTH,
                model=self.script.state,
                timing=TIMING,
                seed=seeds[place],
            )
            self.script.answer(request, reply, context)
            yield reply
        if self.script.broken_end is not None:
            error, self.script.broken_end = self.script.broken_end, None
            abort(context, error)

    def GetGenerationModel(
        self, request: generation_pb2.GetGenerationModelRequest, context: grpc.ServicerContext
    ) -> generation_pb2.GetGenerationModelResponse:
        reply = generation_pb2.GetGenerationModelResponse(model=self.script.state, limits=LIMITS, eos_token_ids=[2])
        self.script.answer(request, reply, context)
        return reply


class ScriptedAdmin(reward_admin_pb2_grpc.RewardAdminServiceServicer):
    """Pretends to load what it is asked for."""

    def __init__(self, script: Script) -> None:
        self.script = script

    def ReplaceModel(
        self, request: reward_admin_pb2.ReplaceModelRequest, context: grpc.ServicerContext
    ) -> reward_admin_pb2.ReplaceModelResponse:
        state = common_pb2.ModelState(
            model=request.name, weight_version=request.weight_version or 4, tokenizer_fingerprint="f" * 16
        )
        reply = reward_admin_pb2.ReplaceModelResponse(model=state, load_s=1.5)
        self.script.answer(request, reply, context)
        return reply


@dataclass
class ScriptedServer:
    """A server that runs: where it is, what it does, and its health."""

    port: int
    script: Script
    health: health.HealthServicer
    server: grpc.Server

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def serving(self, up: bool) -> None:
        """Report this health for all services."""
        status = health_pb2.HealthCheckResponse.SERVING if up else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("ppod.v1.RewardService", "ppod.v1.ReferenceService", "ppod.v1.GenerationService"):
            self.health.set(name, status)

    def stop(self) -> None:
        """Break all connections and leave the port."""
        self.server.stop(0).wait()


@contextmanager
def scripted_server(
    script: Script | None = None,
    *,
    port: int = 0,
    host: str = "127.0.0.1",
    credentials: grpc.ServerCredentials | None = None,
) -> Iterator[ScriptedServer]:
    """Serve all services on a port of this machine."""
    script = script or Script()
    server = grpc.server(ThreadPoolExecutor(max_workers=32), options=server_options())
    reward_pb2_grpc.add_RewardServiceServicer_to_server(ScriptedReward(script), server)
    reference_pb2_grpc.add_ReferenceServiceServicer_to_server(ScriptedReference(script), server)
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(ScriptedGeneration(script), server)
    reward_admin_pb2_grpc.add_RewardAdminServiceServicer_to_server(ScriptedAdmin(script), server)
    reporter = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(reporter, server)
    where = f"{host}:{port}"
    bound = server.add_insecure_port(where) if credentials is None else server.add_secure_port(where, credentials)
    server.start()
    running = ScriptedServer(bound, script, reporter, server)
    running.serving(True)
    try:
        yield running
    finally:
        running.stop()
