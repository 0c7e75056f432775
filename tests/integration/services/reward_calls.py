"""Calls of the reward service by the raw contract, and a service with every kind of reward."""

from __future__ import annotations

from collections.abc import Sequence

import grpc
import numpy as np

from ppod.errors import PpodError, from_rpc_error
from ppod.tensors import pack_sequences
from ppod.v1 import common_pb2, reward_pb2, reward_pb2_grpc
from support.processes import ServiceProcess

STEP = reward_pb2.PROCESS_GRANULARITY_STEP
TOKEN = reward_pb2.PROCESS_GRANULARITY_TOKEN


def score(
    service: ServiceProcess, request: reward_pb2.ScoreRequest, model: str = "", timeout_s: float = 30.0
) -> reward_pb2.ScoreResponse:
    """Score; raises the typed error."""
    request.selector.model = model or request.selector.model
    with grpc.insecure_channel(service.target) as channel:
        try:
            return reward_pb2_grpc.RewardServiceStub(channel).Score(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error


def failure(
    service: ServiceProcess, request: reward_pb2.ScoreRequest, model: str = "", timeout_s: float = 30.0
) -> PpodError:
    """The typed error of a request that must fail."""
    try:
        reply = score(service, request, model, timeout_s)
    except PpodError as error:
        return error
    raise AssertionError(f"no error, but {reply}")


def of_tokens(sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int] = ()) -> reward_pb2.ScoreRequest:
    return reward_pb2.ScoreRequest(tokens=pack_sequences(sequences), prompt_lengths=prompt_lengths)


def of_texts(
    texts: Sequence[str], prompts: Sequence[str] = (), references: Sequence[str] = ()
) -> reward_pb2.ScoreRequest:
    return reward_pb2.ScoreRequest(texts=common_pb2.TextSequences(texts=texts, prompts=prompts), references=references)


def of_chats(*chats: Sequence[tuple[str, str]]) -> reward_pb2.ScoreRequest:
    conversations = [
        reward_pb2.Conversation(messages=[reward_pb2.ChatMessage(role=role, content=text) for role, text in chat])
        for chat in chats
    ]
    return reward_pb2.ScoreRequest(conversations=reward_pb2.Conversations(conversations=conversations))


def with_process(
    request: reward_pb2.ScoreRequest, granularity: reward_pb2.ProcessGranularity
) -> reward_pb2.ScoreRequest:
    request.process = granularity
    return request


def floats(data: bytes) -> list[float]:
    return np.frombuffer(data, dtype="<f4").tolist()


def way_of(reply: reward_pb2.ScoreResponse) -> list[list[tuple[int, float]]]:
    """Positions and scores along the way of each sequence."""
    positions = np.frombuffer(reply.process.positions, dtype="<i4").tolist()
    pairs = list(zip(positions, floats(reply.process.scores), strict=True))
    ends = np.cumsum(reply.process.lengths).tolist()
    return [pairs[end - length : end] for end, length in zip(ends, reply.process.lengths, strict=True)]


JUDGE_RUBRIC = {
    "criteria": "Politeness.",
    "scale": {"low": 0, "high": 5},
    "principles": ["Do no harm.", "Do not flatter."],
}


def judge(name: str, server: dict[str, object], **changes: object) -> dict[str, object]:
    return {"name": name, "kind": "judge", "rubric": JUDGE_RUBRIC, "server": server, **changes}
