"""Features for a reward head: pooled hidden states of chosen layers of a frozen trunk.

Training and serving share this code, so a served score is the score that was evaluated.

Shape legend: B sequences, N tokens of all sequences with their padding, H hidden size, F features (reads x H).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ppod_models.chat_template import turn_end_token
from ppod_models.loading import max_sequence_tokens
from ppod_models.packing import Layout, enable_packing, hidden_states, lay_out, probe_tolerance
from ppod_models.prefix_features import divide, groups, lay_out_prefixes, prefix_means
from ppod_models.reward_cards import FeatureSpec, Pooling
from ppod_models.reward_heads import RewardHeadError

RMS_EPSILON = 1e-6
_PROBE_TOKENS = 6


class TrunkFeatures:
    """Reads features off a trunk; runs no layer above the highest one that is asked for.

    The trunk is shared, not copied; its weights are left as they were. `packs` tells whether sequences share a batch
    without padding, `reads_prefixes` whether `extract_prefixes` may be asked. Others may read off the same trunk at the
    same time, in threads of their own, as when a head is replaced: each sees its own forward pass alone.

    Raises:
        RewardHeadError: the trunk has no such layers, or is of an architecture whose layers cannot be found.
    """

    def __init__(self, trunk: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, spec: FeatureSpec) -> None:
        self.spec = spec
        self._prefix = encode_text(tokenizer, spec.prefix)
        self._suffix = encode_text(tokenizer, spec.suffix)
        self._ends = (tokenizer.eos_token_id, turn_end_token(tokenizer))
        self._device = trunk.device
        self.packs = enable_packing(trunk)
        self._body = lower_layers(cast(PreTrainedModel, trunk.base_model), max(read.layer for read in spec.reads))
        self.max_sequence_tokens = max_sequence_tokens(trunk) - len(self._prefix) - len(self._suffix)
        self.reads_prefixes = self._reads_prefixes()

    @torch.no_grad()
    def extract(self, sequences: Sequence[npt.NDArray[np.integer]]) -> torch.Tensor:
        """Features of a batch of token sequences, in one forward.

        Args:
            sequences: int arrays [length], 1 <= length <= `max_sequence_tokens`; no special tokens but end of
                sequence and end of turn, which are dropped from the end because they carry no text.

        Returns:
            float32 [B, F]: for each read in the spec's order, H values of root mean square 1.

        Raises:
            ValueError: a sequence is empty or too long.
        """
        contents = [self._content(sequence) for sequence in sequences]
        wrapped = [np.concatenate([self._prefix, content, self._suffix]) for content in contents]
        layout = lay_out(wrapped, packed=self.packs, device=self._device, masked=False)
        states = self._states(layout)
        starts = layout.starts + len(self._prefix)
        lengths = torch.tensor([len(content) for content in contents], device=self._device)
        parts = [unit_rms(self._pool(states[read.layer], read.pooling, starts, lengths)) for read in self.spec.reads]
        return torch.cat(parts, dim=-1)

    @property
    def suffix_tokens(self) -> int:
        """Tokens that each prefix of `extract_prefixes` costs."""
        return len(self._suffix)

    @torch.no_grad()
    def extract_prefixes(
        self, sequences: Sequence[npt.NDArray[np.integer]], lengths: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Features of prefixes of token sequences, as `extract` gives them of each; only where `reads_prefixes`.

        Args:
            sequences: as for `extract`.
            lengths: of the prefixes of each sequence, in tokens, from 1.

        Returns:
            float32 [prefixes, F], all of the first sequence first.

        Raises:
            ValueError: a sequence is empty or too long.
        """
        rows = [
            row
            for sequence, some in zip(sequences, lengths, strict=True)
            for row in divide(*self._prefixes(sequence, some), len(self._suffix))
        ]
        found: list[torch.Tensor] = []
        for group in groups(rows, len(self._prefix), len(self._suffix)):
            laid = lay_out_prefixes(group, self._prefix, self._suffix, self._device, self._body.dtype)
            states = self._states(laid.layout)
            parts: list[torch.Tensor] = []
            for read in self.spec.reads:
                hidden = states[read.layer]
                match read.pooling:
                    case "end":
                        pooled = states_at(hidden, laid.ends)
                    case "last":
                        pooled = states_at(hidden, laid.starts + laid.lengths - 1)
                    case "mean":
                        pooled = prefix_means(hidden, laid.starts, laid.lengths)
                parts.append(unit_rms(pooled))
            found.append(torch.cat(parts, dim=-1))
        return torch.cat(found)

    def _prefixes(
        self, sequence: npt.NDArray[np.integer], lengths: Sequence[int]
    ) -> tuple[npt.NDArray[np.int64], list[int]]:
        """The text, and how long its prefixes are without the end-of-sequence tokens that `extract` drops."""
        ends = [len(self._content(sequence[:length])) for length in lengths]
        return np.asarray(sequence[: max(ends)], dtype=np.int64), ends

    def _reads_prefixes(self) -> bool:
        """Whether the trunk makes of a row of prefixes what it makes of each alone; a sliding window would be lost."""
        config = self._body.config
        if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
            return False
        probe = np.arange(1, _PROBE_TOKENS + 1)
        lengths = [1, 3, _PROBE_TOKENS]
        try:
            together = self.extract_prefixes([probe], [lengths])
            alone = self.extract([probe[:length] for length in lengths])
        except (TypeError, ValueError, RuntimeError, AttributeError):
            # An architecture that takes no mask or positions of others.
            return False
        return bool(
            (together - alone).abs().max() <= probe_tolerance(self._body.dtype) * alone.abs().max().clamp(min=1)
        )

    def _pool(
        self, hidden: torch.Tensor, pooling: Pooling, starts: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        match pooling:
            case "end":
                return states_at(hidden, starts + lengths + len(self._suffix) - 1)
            case "last":
                return states_at(hidden, starts + lengths - 1)
            case "mean":
                return mean_states(hidden, starts, lengths)

    def _content(self, sequence: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        if not 1 <= len(sequence) <= self.max_sequence_tokens:
            raise ValueError(f"a sequence has {len(sequence)} tokens, expected 1 to {self.max_sequence_tokens}")
        end = len(sequence)
        # The first token stays, whatever it is: an empty text has no state to read.
        while end > 1 and int(sequence[end - 1]) in self._ends:
            end -= 1
        return np.asarray(sequence[:end], dtype=np.int64)

    def _states(self, layout: Layout) -> dict[int, torch.Tensor]:
        """Outputs of the layers that are read, by number, each [N, H] in the trunk's dtype."""
        found: dict[int, torch.Tensor] = {}
        layers = cast(nn.ModuleList, self._body.layers)
        with ExitStack() as hooks:
            for number in {read.layer for read in self.spec.reads}:
                hooks.enter_context(layers[number - 1].register_forward_hook(_keep(found, number)))
            hidden_states(self._body, layout)
        return found


def lower_layers(body: PreTrainedModel, count: int) -> PreTrainedModel:
    """A decoder that shares its weights with `body` but runs only its first `count` layers and no final norm.

    Raises:
        RewardHeadError: the decoder keeps its layers elsewhere than in `layers`, or has fewer.
    """
    layers = getattr(body, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not hasattr(body, "norm"):
        raise RewardHeadError(f"{type(body).__name__}: expected a decoder with `layers` and `norm`")
    if count > len(layers):
        raise RewardHeadError(f"the head reads layer {count}, the trunk has {len(layers)}")
    lower = copy.copy(body)
    # copy.copy shares the table of submodules; without a table of its own the change would reach the trunk.
    lower._modules = dict(body._modules)  # pyright: ignore[reportPrivateUsage]
    lower.layers = layers[:count]
    lower.norm = nn.Identity()
    lower.config = copy.deepcopy(body.config)
    lower.config.num_hidden_layers = count
    return lower


def encode_text(tokenizer: PreTrainedTokenizerFast, text: str) -> npt.NDArray[np.int64]:
    """Token ids of a text without added special tokens; int64 [length]."""
    return np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)


def states_at(hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One state of each sequence: float32 [B, H] for hidden [N, H] and positions [B]."""
    return hidden[positions].float()


def mean_states(hidden: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean over positions start to start + length - 1: float32 [B, H] for hidden [N, H], starts and lengths [B]."""
    spans = zip(starts.tolist(), lengths.tolist(), strict=True)
    return torch.stack([hidden[start : start + length].float().mean(dim=0) for start, length in spans])


def unit_rms(states: torch.Tensor) -> torch.Tensor:
    """Each row scaled to root mean square 1, as the trunk's own norms would: [B, H] -> [B, H]."""
    return states * torch.rsqrt(states.pow(2).mean(dim=-1, keepdim=True) + RMS_EPSILON)


def _keep(found: dict[int, torch.Tensor], index: int) -> Callable[[nn.Module, object, object], None]:
    """A hook that keeps a layer's output, of this thread's forward passes alone: layers are shared with their hooks."""
    mine = threading.get_ident()

    def hook(_module: nn.Module, _inputs: object, output: object) -> None:
        if threading.get_ident() != mine:
            return
        # Some decoder layers return a tuple whose first entry is the hidden state.
        found[index] = cast(torch.Tensor, output[0] if isinstance(output, tuple) else output).flatten(0, 1)

    return hook
