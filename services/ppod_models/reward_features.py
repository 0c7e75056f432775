"""Features for a reward head: pooled hidden states of chosen layers of a frozen trunk.

Training and serving share this code, so a served score is the score that was evaluated.

Shape legend: B sequences, N tokens of all sequences with their padding, H hidden size, F features (reads x H).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ppod_models.loading import max_sequence_tokens
from ppod_models.packing import Layout, enable_packing, hidden_states, lay_out
from ppod_models.reward_cards import FeatureSpec, Pooling
from ppod_models.reward_heads import RewardHeadError

RMS_EPSILON = 1e-6


class TrunkFeatures:
    """Reads features off a trunk; runs no layer above the highest one that is asked for.

    The trunk is shared, not copied; its weights are left as they were. `packs` tells whether sequences share a batch
    without padding. One forward at a time: calls are not thread-safe.

    Raises:
        RewardHeadError: the trunk has no such layers, or is of an architecture whose layers cannot be found.
    """

    def __init__(self, trunk: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, spec: FeatureSpec) -> None:
        self.spec = spec
        self._prefix = encode_text(tokenizer, spec.prefix)
        self._suffix = encode_text(tokenizer, spec.suffix)
        self._eos = tokenizer.eos_token_id
        self._device = trunk.device
        self.packs = enable_packing(trunk)
        self._body = lower_layers(cast(PreTrainedModel, trunk.base_model), max(read.layer for read in spec.reads))
        self.max_sequence_tokens = max_sequence_tokens(trunk) - len(self._prefix) - len(self._suffix)

    @torch.no_grad()
    def extract(self, sequences: Sequence[npt.NDArray[np.integer]]) -> torch.Tensor:
        """Features of a batch of token sequences, in one forward.

        Args:
            sequences: int arrays [length], 1 <= length <= `max_sequence_tokens`; no special tokens but end of
                sequence, which is dropped from the end because it carries no text.

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
        while end > 1 and sequence[end - 1] == self._eos:
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
    def hook(_module: nn.Module, _inputs: object, output: object) -> None:
        # Some decoder layers return a tuple whose first entry is the hidden state.
        found[index] = cast(torch.Tensor, output[0] if isinstance(output, tuple) else output).flatten(0, 1)

    return hook
