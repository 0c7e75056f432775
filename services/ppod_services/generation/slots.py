"""Keys and values of the sequences that decode, in buffers that are written in place.

Each sequence has a slot, left-aligned: the key of its token at position p stands at p. Sequences of any lengths thus
share a step, a newcomer needs no padding, and nothing is copied for a step: transformers' own cache would concatenate
all keys anew for each token. Those who decode occupy the first slots without gaps, so that a step reads a view.

Shape legend: S slots, W width in tokens, B rows that decode, T tokens seen, A key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

_BLOCK = 64
"""Widths are multiples of this, in tokens."""
_ROWS = 8
"""Numbers of slots are multiples of this: one newcomer after the other would move all buffers each time."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Where a step writes and how far it reads.

    Attributes:
        positions: int64 [B], of the tokens that the step feeds.
        width: T, one more than the largest position.
    """

    positions: torch.Tensor
    width: int


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, [S, A, W, D] each."""

    def __init__(self, slots: int, width: int, like: torch.Tensor) -> None:
        super().__init__()
        shape = (slots, like.shape[1], width, like.shape[3])
        # Zeros: attention gives what it masks a weight of zero, and zero times what stood in fresh memory may be NaN.
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)
        self.is_initialized = True
        self._step: Step | None = None
        self._index: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """S and W."""
        return self._keys.shape[0], self._keys.shape[2]

    @property
    def _keys(self) -> torch.Tensor:
        return cast(torch.Tensor, self.keys)

    @property
    def _values(self) -> torch.Tensor:
        return cast(torch.Tensor, self.values)

    def begin(self, step: Step, index: torch.Tensor | None) -> torch.Tensor:
        """Make ready for a step. Returns where its keys go, for the layers of the same number of heads."""
        slots, heads, width, _ = self._keys.shape
        rows = len(step.positions)
        if index is None or len(index) != rows * heads:
            starts = torch.arange(rows * heads, device=self._keys.device) * width
            index = starts + step.positions.repeat_interleave(heads)
        assert rows <= slots
        assert step.width <= width
        self._step, self._index = step, index
        return index

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: object,  # noqa: ARG002 - transformers' signature
        **kwargs: object,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the states of a step's tokens, [B, A, 1, D]; all that its rows attend to, [B, A, T, D]: views."""
        step, index = self._step, self._index
        assert step is not None
        assert index is not None
        rows = len(step.positions)
        for buffer, states in ((self._keys, key_states), (self._values, value_states)):
            buffer.view(-1, buffer.shape[3]).index_copy_(0, index, states.reshape(-1, buffer.shape[3]))
        return self._keys[:rows, :, : step.width], self._values[:rows, :, : step.width]

    def put(self, first: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write states [N, A, width, D] to the slots from `first` on."""
        span = slice(first, first + keys.shape[0])
        self._keys[span, :, : keys.shape[2]] = keys
        self._values[span, :, : values.shape[2]] = values

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first tokens of one slot to another."""
        for buffer in (self._keys, self._values):
            buffer[target, :, :length] = buffer[source, :, :length]

    def clear(self, slot: int) -> None:
        """Zero a slot."""
        for buffer in (self._keys, self._values):
            buffer[slot].zero_()

    def resized(self, slots: int, width: int, used: Sequence[int]) -> SlotLayer:
        """A layer of another shape with the used part of the first slots."""
        layer = SlotLayer(slots, width, self._keys)
        longest = max(used, default=0)
        for new, old in ((layer._keys, self._keys), (layer._values, self._values)):
            new[: len(used), :, :longest] = old[: len(used), :, :longest]
        return layer

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the buffers exist."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a step reads, and where they begin; steps bring masks of their own."""
        return (self._step.width if self._step is not None else query_length), 0

    def get_seq_length(self) -> int:
        """Tokens that stand before those of the step, in its longest row."""
        return self._step.width - 1 if self._step is not None else 0

    def get_max_length(self) -> int:
        """No maximum: the buffers grow."""
        return -1


class SlotCache(Cache):
    """The slots of all layers. The caller knows who sits where, and how long each sequence is."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def reserve(self, used: Sequence[int], rows: int, width: int, most: int) -> None:
        """Make room, once `open` has made the buffers.

        Args:
            used: lengths of the sequences in the first slots; all else is lost where the buffers move.
            rows: slots that are needed.
            width: tokens that are needed in the longest.
            most: tokens that the longest will have at the end: beyond it nothing grows ahead of need.
        """
        if not self._layers:
            return
        slots, had = self._layers[0].shape
        if rows <= slots and width <= had:
            return
        if width > had:
            # By half at least: a copy of everything for each block would cost more than the steps.
            width = max(width, min(most, had + had // 2))
        # Not the larger of old and new on both sides: many short sequences, then few long ones, would leave a
        # rectangle that neither of them needs.
        shape = _rounded(rows, _ROWS), _rounded(max(width, *used, 1), _BLOCK)
        # None at all where memory runs out amid it: layers of two shapes would fail all batches that follow.
        layers, self.layers = self._layers, []
        for number, layer in enumerate(layers):
            # One after the other, so that old and new buffers of all layers never exist at once.
            layers[number] = layer.resized(*shape, used)
        self.layers = layers

    def open(self, states: DynamicCache, rows: int, width: int) -> None:
        """Make the buffers for a model whose states these are; nothing where they exist."""
        if not self._layers:
            shape = _rounded(rows, _ROWS), _rounded(width + 1, _BLOCK)
            self.layers = [SlotLayer(*shape, keys) for keys, _ in _states(states)]

    def put(self, states: DynamicCache, rows: torch.Tensor | None, first: int) -> None:
        """Write rows of a prefill to the slots from `first` on, padding included: no step reads it.

        Args:
            states: of the prefill.
            rows: int64 [N], which row each slot gets; None: each row once, in their order.
            first: slot of the first one.
        """
        for layer, (keys, values) in zip(self._layers, _states(states), strict=True):
            layer.put(first, *((keys, values) if rows is None else (keys[rows], values[rows])))

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first tokens of one slot to another."""
        for layer in self._layers:
            layer.copy(source, target, length)

    def clear(self, slot: int) -> None:
        """Zero a slot, so that no NaN in it reaches the sequence that comes next."""
        for layer in self._layers:
            layer.clear(slot)

    def begin(self, step: Step) -> None:
        """Make ready for a step."""
        index: torch.Tensor | None = None
        for layer in self._layers:
            index = layer.begin(step, index)

    @property
    def _layers(self) -> list[SlotLayer]:
        return self.layers


def _states(cache: DynamicCache) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each layer."""
    return ((layer.keys, layer.values) for layer in cache.layers)  # pyright: ignore


def _rounded(count: int, block: int) -> int:
    return -(-count // block) * block
