"""Token logprobs of responses. Knows no asyncio and no gRPC.

Shape legend: B sequences, T padded length, N response tokens of all sequences, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ppod.errors import NonFiniteOutput, PpodError
from ppod.tensors import FloatArray, split_ragged
from ppod_models.logprobs import token_logprobs
from ppod_models.padding import pad_sequences
from ppod_services.core.described import check_version
from ppod_services.core.model import CausalModel
from ppod_services.core.scheduler import Sink
from ppod_services.core.weights import ServedWeights
from ppod_services.reference.requests import ReferenceItem, ReferenceResult


class ReferenceEngine:
    """Judges batches of sequences with a causal language model."""

    def __init__(self, model: CausalModel, weights: ServedWeights) -> None:
        self._model = model
        self._weights = weights

    def run(self, items: Sequence[ReferenceItem], sink: Sink[ReferenceResult]) -> None:
        """Compute the logprobs of each response; all items share one temperature."""
        admitted: list[int] = []
        for position, item in enumerate(items):
            try:
                check_version(item.weight_version, self._weights.version)
                admitted.append(position)
            except PpodError as error:
                sink.fail(position, error)
        if not admitted:
            return
        for position, logprobs in zip(
            admitted, self._logprobs([items[position] for position in admitted]), strict=True
        ):
            finite = np.isfinite(logprobs)
            if finite.all():
                sink.emit(position, ReferenceResult(logprobs, self._weights.version))
            else:
                found = str(logprobs[int(finite.argmin())])
                sink.fail(position, NonFiniteOutput("logprobs", items[position].sample, found))

    @torch.inference_mode()
    def _logprobs(self, items: Sequence[ReferenceItem]) -> list[FloatArray]:
        device = self._model.device
        batch = pad_sequences([item.tokens for item in items], side="right", device=device)
        # No mask: padding is on the right, where causal attention keeps it from every real token.
        output = self._model.backbone(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        lengths = [len(item.tokens) - item.prompt_length for item in items]
        rows = np.repeat(np.arange(len(items)), lengths)
        # The hidden state before a token predicts it: positions are shifted by one.
        positions = np.concatenate([np.arange(item.prompt_length, len(item.tokens)) for item in items]) - 1
        hidden = output.last_hidden_state[torch.from_numpy(rows).to(device), torch.from_numpy(positions).to(device)]
        responses = np.concatenate([item.tokens[item.prompt_length :] for item in items]).astype(np.int64)
        logprobs, _ = token_logprobs(
            hidden, self._model.head, torch.from_numpy(responses).to(device), items[0].temperature, entropy=False
        )
        return split_ragged(logprobs.cpu().numpy(), lengths)
