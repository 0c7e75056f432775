"""The decode loop: left-padded prefill, then one token a step with a KV cache. Knows no asyncio and no gRPC.

Shape legend: B rows still decoding, T tokens so far with left padding, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DynamicCache

from ppod.errors import NonFiniteOutput, PpodError
from ppod.tensors import FloatArray, TokenArray
from ppod_models.padding import pad_sequences
from ppod_services.core.described import check_version
from ppod_services.core.model import CausalModel
from ppod_services.core.scheduler import Sink
from ppod_services.core.weights import ServedWeights
from ppod_services.generation.requests import Ending, GeneratedSample, GenerationItem, VersionSpan
from ppod_services.generation.sampling import draw


@dataclass(slots=True, eq=False)
class _Row:
    """One sequence that still decodes."""

    position: int
    item: GenerationItem
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])

    def uniform(self) -> float:
        """The row's next number in [0, 1). Its seed alone decides it, whoever shares the batch."""
        return float(torch.rand((), generator=self.generator, dtype=torch.float64))

    @property
    def stopped(self) -> bool:
        """Whether the last token ended the completion."""
        return self.tokens[-1] in self.item.stop_ids

    @property
    def finished(self) -> bool:
        """Whether no token may follow."""
        return self.stopped or len(self.tokens) == self.item.max_tokens


@dataclass(slots=True)
class _DecodeState:
    """What the model must see to give the next token of each row."""

    cache: DynamicCache
    attention_mask: torch.Tensor  # int64 [B, T]
    positions: torch.Tensor  # int64 [B], of the token that comes next

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, so that finished ones cost nothing more."""
        index = torch.tensor(rows, device=self.positions.device)
        self.cache.batch_select_indices(index)
        self.attention_mask = self.attention_mask[index]
        self.positions = self.positions[index]


class GenerationEngine:
    """Samples batches of prompts from a causal language model."""

    def __init__(self, model: CausalModel, weights: ServedWeights) -> None:
        self._model = model
        self._weights = weights

    @torch.inference_mode()
    def run(self, items: Sequence[GenerationItem], sink: Sink[GeneratedSample]) -> None:
        """Complete each prompt, and emit each completion as soon as it is finished."""
        rows = [self._open(position, item) for position, item in enumerate(items) if self._admit(position, item, sink)]
        if not rows:
            return
        hidden, state = self._prefill([row.item.prompt for row in rows])
        while True:
            self._append(rows, hidden)
            kept = [index for index, row in enumerate(rows) if not self._settle(row, sink)]
            if not kept:
                return
            if len(kept) < len(rows):
                rows = [rows[index] for index in kept]
                state.keep(kept)
            hidden = self._step([row.tokens[-1] for row in rows], state)

    def _admit(self, position: int, item: GenerationItem, sink: Sink[GeneratedSample]) -> bool:
        """Refuse an item whose version went out of service while it waited."""
        try:
            check_version(item.weight_version, self._weights.version)
        except PpodError as error:
            sink.fail(position, error)
            return False
        return True

    def _open(self, position: int, item: GenerationItem) -> _Row:
        return _Row(position, item, torch.Generator().manual_seed(item.seed))

    def _prefill(self, prompts: Sequence[TokenArray]) -> tuple[torch.Tensor, _DecodeState]:
        """Run all prompts. Returns the last hidden state of each, [B, H], and the state to go on from."""
        batch = pad_sequences(prompts, side="left", device=self._model.device)
        cache = DynamicCache(config=self._model.model.config)
        output = self._model.backbone(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        state = _DecodeState(cache, batch.attention_mask, batch.position_ids[:, -1] + 1)
        return output.last_hidden_state[:, -1], state

    def _step(self, tokens: Sequence[int], state: _DecodeState) -> torch.Tensor:
        """Run one new token of each row; hidden states [B, H]."""
        input_ids = torch.tensor(tokens, device=self._model.device).unsqueeze(-1)
        ones = state.attention_mask.new_ones(len(tokens), 1)
        state.attention_mask = torch.cat([state.attention_mask, ones], dim=-1)
        output = self._model.backbone(
            input_ids=input_ids,
            attention_mask=state.attention_mask,
            position_ids=state.positions.unsqueeze(-1),
            past_key_values=state.cache,
            use_cache=True,
        )
        state.positions = state.positions + 1
        return output.last_hidden_state[:, -1]

    def _append(self, rows: Sequence[_Row], hidden: torch.Tensor) -> None:
        """Draw the next token of each row. The head sees the last position only."""
        logits = self._model.head(hidden).float()
        uniforms = torch.tensor([row.uniform() for row in rows], dtype=torch.float64, device=logits.device)
        drawn = draw(logits, [row.item.token_filter for row in rows], uniforms)
        for row, token, logprob in zip(rows, drawn.tokens.tolist(), drawn.logprobs.tolist(), strict=True):
            row.tokens.append(token)
            row.logprobs.append(logprob)

    def _settle(self, row: _Row, sink: Sink[GeneratedSample]) -> bool:
        """Emit or fail a row that is done; True when it leaves the batch."""
        if not np.isfinite(row.logprobs[-1]):
            sink.fail(row.position, NonFiniteOutput("logits", row.item.prompt_index, str(row.logprobs[-1])))
            return True
        if row.finished:
            sink.emit(row.position, self._sample(row))
            return True
        return sink.abandoned(row.position)

    def _sample(self, row: _Row) -> GeneratedSample:
        logprobs: FloatArray = np.asarray(row.logprobs, dtype=np.float32)
        return GeneratedSample(
            tokens=np.asarray(row.tokens, dtype=np.int32),
            logprobs=logprobs,
            unscaled_logprobs=None,
            ending=Ending.STOP if row.stopped else Ending.LENGTH,
            weight_version=self._weights.version,
            spans=(VersionSpan(self._weights.version, len(row.tokens)),),
        )
