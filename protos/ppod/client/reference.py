"""Client of ReferenceService."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from ppod.tensors import FloatArray, pack_sequences, split_ragged, unpack_reply_floats
from ppod.v1 import reference_pb2, reference_pb2_grpc


@dataclass(frozen=True, slots=True)
class ReferenceLogprobs:
    """Logprobs of one request.

    Attributes:
        values: for each sequence float32 [length - prompt_length], natural log, finite.
        state: which model answered.
        timing: where the server's time went.
    """

    values: list[FloatArray]
    state: ModelState
    timing: Timing


class ReferenceClient(ServiceClient):
    """Asks a reference policy for the logprobs of given response tokens."""

    service_name = "ppod.v1.ReferenceService"

    def logprobs(
        self,
        sequences: Sequence[npt.ArrayLike],
        prompt_lengths: Sequence[int],
        *,
        temperature: float = 1.0,
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> ReferenceLogprobs:
        """Compute the logprob of each response token.

        Args:
            sequences: token ids of prompt and response, each of shape [length], without padding.
            prompt_lengths: prompt tokens of each sequence, at least 1.
            temperature: divides the logits before the softmax.

        Raises:
            PpodError: any class of `ppod.errors`; InvalidArgument names the sample at fault.
        """
        tokens = pack_sequences(sequences)
        request = reference_pb2.ComputeLogprobsRequest(
            request_id=request_id or new_request_id(),
            selector=self.pin.to_proto(),
            tokens=tokens,
            prompt_lengths=prompt_lengths,
            temperature=temperature,
        )
        stub = reference_pb2_grpc.ReferenceServiceStub(self._channel)
        with self._rpc("ComputeLogprobs"):
            reply = stub.ComputeLogprobs(request, timeout=timeout_s or self.timeout_s)
        counts = [length - prompt for length, prompt in zip(tokens.lengths, prompt_lengths, strict=True)]
        flat = unpack_reply_floats(reply.logprobs, sum(counts), "logprobs")
        return ReferenceLogprobs(split_ragged(flat, counts), self._check_state(reply.model), read_timing(reply.timing))

    def describe(self, *, timeout_s: float | None = None) -> ModelDescription:
        """Ask which model is served and what it takes."""
        stub = reference_pb2_grpc.ReferenceServiceStub(self._channel)
        with self._rpc("GetReferenceModel"):
            reply = stub.GetReferenceModel(
                reference_pb2.GetReferenceModelRequest(), timeout=timeout_s or self.timeout_s
            )
        return ModelDescription(self._check_state(reply.model), read_limits(reply.limits))
