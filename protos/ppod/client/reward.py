"""Client of RewardService."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy.typing as npt

from ppod.client.base import (
    ModelDescription,
    ModelState,
    ServiceClient,
    Timing,
    new_request_id,
    read_limits,
    read_timing,
)
from ppod.errors import InvalidReply
from ppod.tensors import FloatArray, pack_sequences, unpack_reply_floats
from ppod.v1 import common_pb2, reward_pb2, reward_pb2_grpc


class Truncation(Enum):
    """What the server does with a sequence longer than its model takes."""

    NONE = reward_pb2.TRUNCATION_SIDE_NONE
    LEFT = reward_pb2.TRUNCATION_SIDE_LEFT
    RIGHT = reward_pb2.TRUNCATION_SIDE_RIGHT


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one request.

    Attributes:
        values: float32 [sequences], finite.
        truncated_tokens: tokens dropped from each sequence; all zero unless truncation was asked for.
        state: which model answered.
        timing: where the server's time went.
    """

    values: FloatArray
    truncated_tokens: tuple[int, ...]
    state: ModelState
    timing: Timing


class RewardClient(ServiceClient):
    """Scores token sequences or texts.

    >>> with RewardClient("localhost:50051") as reward:  # doctest: +SKIP
    ...     reward.score_texts(["A joy from start to end."]).values
    """

    service_name = "ppod.v1.RewardService"

    def score(
        self,
        sequences: Sequence[npt.ArrayLike],
        *,
        truncation: Truncation = Truncation.NONE,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Scores:
        """Score token sequences, each of shape [length]: prompt and response, without padding.

        Raises:
            PpodError: any class of `ppod.errors`; InvalidArgument names the sample at fault.
        """
        request = reward_pb2.ScoreRequest(tokens=pack_sequences(sequences), truncation=truncation.value)
        return self._score(request, len(sequences), request_id, timeout_s)

    def score_texts(
        self,
        texts: Sequence[str],
        *,
        truncation: Truncation = Truncation.NONE,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Scores:
        """Score texts, which the server tokenises itself. Raises as `score` does."""
        request = reward_pb2.ScoreRequest(texts=common_pb2.TextSequences(texts=texts), truncation=truncation.value)
        return self._score(request, len(texts), request_id, timeout_s)

    def describe(self, *, timeout_s: float | None = None) -> ModelDescription:
        """Ask which model is served and what it takes."""
        stub = reward_pb2_grpc.RewardServiceStub(self._channel)
        request = reward_pb2.GetRewardModelRequest(selector=self.pin.to_proto())
        with self._rpc("GetRewardModel"):
            reply = stub.GetRewardModel(request, timeout=timeout_s or self.timeout_s)
        return ModelDescription(self._check_state(reply.model), read_limits(reply.limits))

    def _score(self, request: reward_pb2.ScoreRequest, count: int, request_id: str, timeout_s: float | None) -> Scores:
        request.request_id = request_id or new_request_id()
        request.selector.CopyFrom(self.pin.to_proto())
        stub = reward_pb2_grpc.RewardServiceStub(self._channel)
        with self._rpc("Score"):
            reply = stub.Score(request, timeout=timeout_s or self.timeout_s)
        values = unpack_reply_floats(reply.scores, count, "scores")
        truncated = tuple(reply.truncated_tokens) or (0,) * count
        if len(truncated) != count:
            raise InvalidReply("truncated_tokens", f"{len(truncated)} values", f"{count} or none")
        return Scores(values, truncated, self._check_state(reply.model), read_timing(reply.timing))
