"""The model as generation runs it: prompts, then one token of every sequence at a time. Decides nothing.

Shape legend: B rows, T tokens seen, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import get_layer_types_and_kwargs

from ppod.tensors import TokenArray
from ppod_models.padding import pad_sequences
from ppod_models.sources import ModelSourceError
from ppod_services.core.model import CausalModel
from ppod_services.generation.attention import use_grouped_attention
from ppod_services.generation.slots import SlotCache, Step

_KINDS = {"full_attention", "sliding_attention"}
_PROBES = tuple(100 + 37 * np.arange(length) + length for length in (5, 3, 7))
_PROBE_STEPS = 2
_EXACT, _ROUNDED = 1e-3, 0.05
"""How far a hidden state may be off, relative to its norm, in float32 and in 16 bits. With SmolLM2 rounding makes 1e-6
and 7e-3 of it, and a key that is missing a tenth and more."""


@dataclass(slots=True, eq=False)
class Prefill:
    """Prompts that were run, or the beginning of one.

    Attributes:
        states: their keys and values, padded on the right.
        done: tokens of each that were run.
        hidden: [B, H], of the last token of each that was run.
    """

    states: DynamicCache
    done: list[int]
    hidden: torch.Tensor


class SlotDecoder:
    """Runs a model over slots.

    Attributes:
        lengths: of the sequences in the first slots, as far as their keys are cached.
    """

    def __init__(self, model: CausalModel) -> None:
        self._model = model
        self._windows = _windows(model)
        self._cache = SlotCache()
        self.lengths: list[int] = []
        _settle_attention(self, model)

    def reset(self) -> None:
        """Forget all sequences."""
        self.lengths.clear()

    def prefill(self, prompts: Sequence[TokenArray]) -> Prefill:
        """Run prompts, padded to the longest."""
        batch = pad_sequences(prompts, side="right", device=self._model.device)
        # Without a configuration every layer keeps all its keys, those of sliding windows too: slots need them all.
        states = DynamicCache()
        lengths = [len(prompt) for prompt in prompts]
        # No mask: causal attention keeps padding on the right from every real token.
        hidden = self._forward(batch.input_ids, batch.position_ids, None, states)
        last = torch.tensor(lengths, device=hidden.device) - 1
        return Prefill(states, lengths, hidden[torch.arange(len(lengths), device=hidden.device), last])

    def extend(self, prefill: Prefill | None, prompt: TokenArray, tokens: int) -> Prefill:
        """Run the next tokens of one long prompt, after those of `prefill`."""
        done = prefill.done[0] if prefill is not None else 0
        states = prefill.states if prefill is not None else DynamicCache()
        part = prompt[done : done + tokens].astype(np.int64)
        input_ids = torch.from_numpy(part).to(self._model.device).unsqueeze(0)
        positions = torch.arange(done, done + len(part), device=self._model.device).unsqueeze(0)
        hidden = self._forward(input_ids, positions, None, states)
        return Prefill(states, [done + len(part)], hidden[:, -1])

    def seat(self, prefill: Prefill, copies: Sequence[int], most: int) -> None:
        """Give prompts the next slots, in their order.

        Args:
            prefill: the prompts.
            copies: how many slots each gets, one after the other.
            most: tokens that the longest sequence will have at the end.
        """
        first, width = len(self.lengths), max(prefill.done)
        self._cache.open(prefill.states, first + sum(copies), width)
        self._reserve(first + sum(copies), width, most)
        chosen = [row for row, count in enumerate(copies) for _ in range(count)]
        once = len(chosen) == len(copies)
        self._cache.put(prefill.states, None if once else torch.tensor(chosen, device=self._model.device), first)
        self.lengths += [prefill.done[row] for row in chosen]

    def share(self, source: int, length: int, most: int) -> None:
        """Give the next slot the first tokens of another; see `seat`."""
        self._reserve(len(self.lengths) + 1, length, most)
        self._cache.copy(source, len(self.lengths), length)
        self.lengths.append(length)

    def leave(self, slot: int, *, tainted: bool = False) -> None:
        """Free a slot; the last one takes its place. `tainted`: NaN may stand in it."""
        last = len(self.lengths) - 1
        if slot != last:
            if tainted:
                self._cache.clear(slot)
            self._cache.copy(last, slot, self.lengths[last])
            self.lengths[slot] = self.lengths[last]
        elif tainted:
            self._cache.clear(slot)
        self.lengths.pop()

    def step(self, tokens: Sequence[int], most: int) -> torch.Tensor:
        """Run the next token of each sequence; the hidden states, [B, H]. `most`: see `seat`."""
        width = max(self.lengths) + 1
        self._reserve(len(self.lengths), width, most)
        device = self._model.device
        positions = torch.tensor(self.lengths, device=device)
        self._cache.begin(Step(positions, width))
        input_ids = torch.tensor(tokens, device=device).unsqueeze(-1)
        hidden = self._forward(input_ids, positions.unsqueeze(-1), self._masks(positions, width), self._cache)
        self.lengths = [length + 1 for length in self.lengths]
        return hidden[:, -1]

    def _reserve(self, rows: int, width: int, most: int) -> None:
        self._cache.reserve(self.lengths, rows, width, most)

    def _forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        masks: torch.Tensor | dict[str, torch.Tensor] | None,
        cache: SlotCache | DynamicCache,
    ) -> torch.Tensor:
        output = self._model.backbone(
            input_ids=input_ids,
            attention_mask=masks,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return cast(torch.Tensor, output.last_hidden_state)

    def _masks(self, positions: torch.Tensor, width: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """What each row's token attends to, [B, 1, 1, T] to add to scores; by kind of layer where kinds differ."""
        masks = {kind: self._mask(positions, width, window) for kind, window in self._windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask(self, positions: torch.Tensor, width: int, window: int | None) -> torch.Tensor:
        at, own = torch.arange(width, device=positions.device), positions.unsqueeze(-1)
        hidden = at > own
        if window is not None:
            hidden |= at <= own - window
        dtype = self._model.model.dtype
        mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
        return mask.masked_fill_(hidden, torch.finfo(dtype).min)[:, None, None]


def _windows(model: CausalModel) -> dict[str, int | None]:
    """The kinds of layers, and how many tokens each attends to; None: all."""
    kinds, options = get_layer_types_and_kwargs(model.model.config.get_text_config(decoder=True))
    unknown = set(kinds) - _KINDS
    if unknown:
        raise ModelSourceError(
            f"model {model.info.name!r}: it has layers of {', '.join(sorted(unknown))}; the transformers backend of "
            f"generation knows {' and '.join(sorted(_KINDS))}"
        )
    return {kind: cast("int | None", each.get("sliding_window")) for kind, each in zip(kinds, options, strict=True)}


@torch.inference_mode()
def _settle_attention(decoder: SlotDecoder, model: CausalModel) -> None:
    """Take grouped attention where it gives what the model's own gives without any cache, else the model's own.

    Raises:
        ModelSourceError: not even that: the model keeps more of a sequence than keys and values at their positions.
    """
    expected = _whole_states(model)
    before = use_grouped_attention(model.model)
    if _agrees(decoder, model, expected):
        return
    model.model.set_attn_implementation(before)
    if not _agrees(decoder, model, expected):
        raise ModelSourceError(
            f"model {model.info.name!r}: with keys and values in slots it gives other results than without; serve it "
            "by another backend"
        )


def _whole_states(model: CausalModel) -> list[torch.Tensor]:
    """Hidden states of each probe's last tokens, [steps + 1, H], from one forward without a cache."""
    states: list[torch.Tensor] = []
    for probe in _PROBES:
        ids = torch.from_numpy(probe % model.info.vocab_size).to(model.device).unsqueeze(0)
        hidden = cast(torch.Tensor, model.backbone(input_ids=ids, use_cache=False).last_hidden_state)
        states.append(hidden[0, -_PROBE_STEPS - 1 :])
    return states


def _agrees(decoder: SlotDecoder, model: CausalModel, expected: Sequence[torch.Tensor]) -> bool:
    prompts = [(probe[:-_PROBE_STEPS] % model.info.vocab_size).astype(np.int32) for probe in _PROBES]
    try:
        prefill = decoder.prefill(prompts)
        decoder.seat(prefill, [1] * len(prompts), max(map(len, _PROBES)))
        steps = [
            [int(probe[-back]) % model.info.vocab_size for probe in _PROBES] for back in range(_PROBE_STEPS, 0, -1)
        ]
        found = [prefill.hidden, *(decoder.step(tokens, 0) for tokens in steps)]
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
        # An architecture that wants more of its attention or its cache than there is here.
        return False
    finally:
        decoder.reset()
    tolerance = _EXACT if model.model.dtype == torch.float32 else _ROUNDED
    for row, wanted in enumerate(expected):
        together = torch.stack([states[row] for states in found])
        off = (together.float() - wanted.float()).norm(dim=-1)
        # Not as a quotient: after a token whose embedding is 0, as that of padding often is, the state may be 0.
        if not bool((off <= tolerance * wanted.float().norm(dim=-1)).all()):
            return False
    return True
