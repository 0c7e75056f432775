"""Those who decode and those who are to: who joins, who leaves. Computes nothing itself.

Shape legend: B rows, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ppod.errors import NonFiniteOutput
from ppod_services.core.scheduler import JoinableSink
from ppod_services.core.weights import ServedWeights
from ppod_services.generation.arrivals import Arrival, Arrivals
from ppod_services.generation.decoder import Prefill, SlotDecoder
from ppod_services.generation.requests import Ending, GeneratedSample, GenerationItem
from ppod_services.generation.rows import Row

GenerationSink = JoinableSink[GenerationItem, GeneratedSample]


class Batch:
    """Those who decode, in the order of their slots, and those who are to."""

    def __init__(self, decoder: SlotDecoder, weights: ServedWeights, sink: GenerationSink, prefill_tokens: int) -> None:
        self.rows: list[Row] = []
        self._arrivals = Arrivals()
        self._decoder = decoder
        self._weights = weights
        self._version = weights.version
        self._sink = sink
        self._prefill_tokens = prefill_tokens

    @property
    def active(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self.rows or len(self._arrivals))

    def join(self, row: Row) -> None:
        """Take in a completion; hand back one whose version went out of service while it waited."""
        if row.item.weight_version not in (None, self._weights.version):
            self._abort(row)
            return
        source = self._sibling(row)
        if source is None:
            self._arrivals.add(row)
            return
        # All but the last token: the next step runs that, and gives what the row's first token is drawn from.
        self._decoder.share(source, len(row.item.prompt) - 1, self._most([row]))
        self.rows.append(row)

    def forward(self) -> torch.Tensor:
        """Run the next token of each row and the prompts of some newcomers, who become rows; hidden states [B, H]."""
        states: list[torch.Tensor] = []
        if self.rows:
            states.append(self._decoder.step([row.last_token for row in self.rows], self._most([])))
            if len(self._arrivals):
                states += self._prefill(self._prefill_tokens)
        else:
            # Nobody waits for a token: all begin together, and end no later than each must.
            while len(self._arrivals):
                states += self._prefill(None)
        return torch.cat(states) if len(states) > 1 else states[0]

    def settle(self) -> None:
        """Emit or fail the rows that are done, and free their slots."""
        gone = [slot for slot, row in enumerate(self.rows) if self._finish(row)]
        # From the end, so that the last slot, which takes the place of one that is freed, is never one of them.
        for slot in reversed(gone):
            self._remove(slot)
        for row in [row for row in self._arrivals.rows if self._sink.abandoned(row.position)]:
            self._arrivals.drop(row)

    def hand_back(self) -> None:
        """Emit all rows as they are."""
        for row in (*self.rows, *self._arrivals.rows):
            self._abort(row)

    def follow_weights(self) -> None:
        """Where the weights were changed in between, hand back those who wanted the ones before."""
        if self._weights.version == self._version:
            return
        for slot in reversed(range(len(self.rows))):
            if self.rows[slot].item.weight_version is not None:
                self._abort(self.rows[slot])
                self._remove(slot)
        for row in [row for row in self._arrivals.rows if row.item.weight_version is not None]:
            self._abort(row)
            self._arrivals.drop(row)
        self._arrivals.restart()
        self._version = self._weights.version

    def _prefill(self, most: int | None) -> list[torch.Tensor]:
        """Run prompts of at most so many tokens; [B, H] of the completions that may draw their first token, if any."""
        group = self._arrivals.next_group(most)
        if group:
            prefill = self._decoder.prefill([arrival.prompt for arrival in group])
            return [self._seat(group, prefill)]
        arrival = self._arrivals.long_one
        arrival.begun = self._decoder.extend(arrival.begun, arrival.prompt, most or len(arrival.prompt))
        if arrival.begun.done[0] < len(arrival.prompt):
            return []
        self._arrivals.take(arrival)
        return [self._seat([arrival], arrival.begun)]

    def _seat(self, group: Sequence[Arrival], prefill: Prefill) -> torch.Tensor:
        """Give the completions of these prompts their slots; the hidden state of each, [B, H]."""
        newcomers = [row for arrival in group for row in arrival.rows]
        copies = [len(arrival.rows) for arrival in group]
        self._decoder.seat(prefill, copies, self._most(newcomers))
        for row in newcomers:
            row.prompt_version = self._weights.version
        self.rows += newcomers
        repeats = torch.tensor(copies, device=prefill.hidden.device)
        return prefill.hidden.repeat_interleave(repeats, dim=0)

    def _sibling(self, row: Row) -> int | None:
        """The slot of a row with the same prompt, computed by the same weights."""
        for slot, other in enumerate(self.rows):
            if other.item.prompt is row.item.prompt and other.prompt_version == self._weights.version:
                return slot
        return None

    def _most(self, newcomers: Sequence[Row]) -> int:
        """Tokens that the longest sequence will have at the end."""
        return max(row.final_length for row in (*self.rows, *newcomers))

    def _finish(self, row: Row) -> bool:
        """Emit or fail a row that is done; True when it leaves."""
        if not row.finite:
            self._sink.fail(row.position, NonFiniteOutput("logits", row.item.prompt_index, row.last_logprob))
            return True
        if row.ending is not None:
            self._sink.emit(row.position, row.sample(row.ending, self._version))
            return True
        return self._sink.abandoned(row.position)

    def _abort(self, row: Row) -> None:
        pinned = row.item.weight_version
        self._sink.emit(row.position, row.sample(Ending.ABORTED, self._version if pinned is None else pinned))

    def _remove(self, slot: int) -> None:
        self._decoder.leave(slot, tainted=not self.rows[slot].finite)
        self.rows[slot] = self.rows[-1]
        self.rows.pop()
