"""Continuous batching: sequences join and leave while others decode. Knows no asyncio and no gRPC.

Each round runs one token of every sequence and the prompts of some newcomers, and draws a token for each of both.
`batch` and `arrivals` decide who takes part, `decoder` computes, `rows` records.

Shape legend: B rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer

from ppod_services.core.model import CausalModel
from ppod_services.core.weights import ServedWeights
from ppod_services.generation.batch import Batch, GenerationSink
from ppod_services.generation.decoder import SlotDecoder
from ppod_services.generation.requests import GenerationItem
from ppod_services.generation.rows import NewToken, Row
from ppod_services.generation.sampling import draw


class GenerationEngine:
    """Samples from a causal language model.

    Args:
        model: what to sample from.
        weights: tells which version serves.
        tokenizer: the model's.
        prefill_tokens: most prompt tokens that are run between two tokens of the sequences that decode.
    """

    def __init__(
        self, model: CausalModel, weights: ServedWeights, tokenizer: Tokenizer, prefill_tokens: int = 1024
    ) -> None:
        self._model = model
        self._weights = weights
        self._tokenizer = tokenizer
        self._prefill_tokens = prefill_tokens
        self._decoder = SlotDecoder(model)

    @torch.inference_mode()
    def run(self, items: Sequence[GenerationItem], sink: GenerationSink) -> None:
        """Complete each prompt, and those that join; emit each completion as soon as it is finished."""
        self._decoder.reset()
        batch = Batch(self._decoder, self._weights, sink, self._prefill_tokens)
        positions = itertools.count()
        joining = items
        while True:
            for item in joining:
                batch.join(self._open(next(positions), item))
            if not batch.active:
                return
            self._draw(batch, batch.forward())
            batch.settle()
            if sink.between_steps():
                batch.hand_back()
                return
            batch.follow_weights()
            joining = sink.more()

    def _open(self, position: int, item: GenerationItem) -> Row:
        return Row.open(position, item, self._tokenizer, self._model.device, self._weights.version)

    def _draw(self, batch: Batch, hidden: torch.Tensor) -> None:
        """Draw the next token of each row. The head sees the last position only."""
        rows = batch.rows
        if not rows:
            return
        logits = self._model.transform.apply(self._model.head(hidden).float())
        asked = [index for index, row in enumerate(rows) if row.item.unscaled]
        untouched = logits[asked] if asked else logits[:0]
        for index, row in enumerate(rows):
            if row.shape is not None:
                row.shape.apply(logits[index])
        uniforms = torch.tensor([row.draws.next() for row in rows], dtype=torch.float64, device=logits.device)
        drawn = draw(logits, [row.item.token_filter for row in rows], uniforms)
        chosen = torch.log_softmax(untouched, dim=-1).gather(1, drawn.tokens[asked].unsqueeze(-1)).squeeze(-1)
        unscaled = dict(zip(asked, chosen.tolist(), strict=True))
        version = self._weights.version
        for index, (token, logprob) in enumerate(zip(drawn.tokens.tolist(), drawn.logprobs.tolist(), strict=True)):
            rows[index].add(NewToken(token, logprob, unscaled.get(index, float("nan"))), version)
