"""Token logprobs of responses. Knows no asyncio and no gRPC.

Shape legend: B sequences, T padded length, N response tokens of all sequences, H hidden size, K top tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ppod.errors import NonFiniteOutput, PpodError
from ppod_models.logprobs import TokenDistributions, token_distributions
from ppod_models.packing import hidden_states, lay_out
from ppod_services.core.adapters import Adapters
from ppod_services.core.described import check_version
from ppod_services.core.model import CausalModel
from ppod_services.core.scheduler import Sink
from ppod_services.core.weights import ServedWeights
from ppod_services.reference.requests import ReferenceItem, ReferenceResult


class ReferenceEngine:
    """Judges batches of sequences with a causal language model and the adapters on it."""

    def __init__(self, model: CausalModel, weights: ServedWeights, adapters: Adapters) -> None:
        self._model = model
        self._weights = weights
        self._adapters = adapters

    def run(self, items: Sequence[ReferenceItem], sink: Sink[ReferenceResult]) -> None:
        """Compute the logprobs of each response; all items share one temperature and one adapter."""
        admitted: list[int] = []
        for position, item in enumerate(items):
            try:
                check_version(item.weight_version, self._weights.version)
                admitted.append(position)
            except PpodError as error:
                sink.fail(position, error)
        if not admitted:
            return
        batch = [items[position] for position in admitted]
        with self._adapters.active(batch[0].adapter):
            distributions = self._distributions(batch)
        for position, result in zip(admitted, self._split(batch, distributions), strict=True):
            _settle(position, items[position], result, sink)

    @torch.inference_mode()
    def _distributions(self, items: Sequence[ReferenceItem]) -> TokenDistributions:
        """Of all response tokens of the batch in order. What no item asked for is not computed."""
        device = self._model.device
        layout = lay_out([item.tokens for item in items], packed=self._model.info.packs, device=device, masked=False)
        states = hidden_states(self._model.backbone, layout)
        lengths = [len(item.tokens) - item.prompt_length for item in items]
        starts = np.repeat(layout.starts.cpu().numpy(), lengths)
        # The hidden state before a token predicts it: positions are shifted by one.
        positions = np.concatenate([np.arange(item.prompt_length, len(item.tokens)) for item in items]) - 1
        hidden = states[torch.from_numpy(starts + positions).to(device)]
        responses = np.concatenate([item.tokens[item.prompt_length :] for item in items]).astype(np.int64)
        return token_distributions(
            hidden,
            self._model.head,
            torch.from_numpy(responses).to(device),
            items[0].temperature,
            entropy=any(item.entropy for item in items),
            top_k=max(item.top_k for item in items),
            transform=self._model.transform,
        )

    def _split(self, items: Sequence[ReferenceItem], distributions: TokenDistributions) -> list[ReferenceResult]:
        """Give each item its rows, and of these no more than it asked for."""
        logprobs = distributions.logprobs.cpu().numpy()
        entropies = None if distributions.entropies is None else distributions.entropies.cpu().numpy()
        top_ids = distributions.top_ids.cpu().numpy().astype(np.int32)
        top_logprobs = distributions.top_logprobs.cpu().numpy()
        results: list[ReferenceResult] = []
        start = 0
        for item in items:
            rows = slice(start, start + len(item.tokens) - item.prompt_length)
            start = rows.stop
            results.append(
                ReferenceResult(
                    logprobs=logprobs[rows],
                    weight_version=self._weights.version,
                    entropies=entropies[rows] if item.entropy and entropies is not None else None,
                    top_ids=top_ids[rows, : item.top_k],
                    top_logprobs=top_logprobs[rows, : item.top_k],
                )
            )
        return results


def _settle(position: int, item: ReferenceItem, result: ReferenceResult, sink: Sink[ReferenceResult]) -> None:
    """Emit a result, or fail its request when a value of it is not finite."""
    for output, values in (
        ("logprobs", result.logprobs),
        ("entropies", result.entropies),
        ("top_logprobs", result.top_logprobs.reshape(-1)),
    ):
        if values is not None and not (finite := np.isfinite(values)).all():
            sink.fail(position, NonFiniteOutput(output, item.sample, str(values[int(finite.argmin())])))
            return
    sink.emit(position, result)
