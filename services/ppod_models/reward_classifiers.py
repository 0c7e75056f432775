"""Reward models that transformers loads whole: sequence classifiers and process reward models.

Shape legend: B sequences, T padded length, N tokens of all sequences with their padding, K labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

from ppod_models.loading import AutoModel, check_whole, load_with_info
from ppod_models.packing import enable_packing, hidden_states, lay_out, probe_tolerance
from ppod_models.padding import PaddedBatch, pad_sequences

Tokens = npt.NDArray[np.integer]
_PROBE = (1, 2, 3, 4, 5, 6)


class RewardClassifierError(Exception):
    """A model is no reward model of the kind asked for."""


@dataclass(frozen=True, slots=True)
class ClassifierInput:
    """One sequence and where to read it.

    Attributes:
        tokens: int [length].
        reads: int [reads], positions counted from 0, each of which gives one value.
    """

    tokens: Tokens
    reads: Tokens


class _Decoder:
    """A decoder that keeps its classifying layer apart, so that every position may be read in one forward."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.packs = enable_packing(model)

    def read(self, inputs: Sequence[ClassifierInput]) -> list[torch.Tensor]:
        """Run all inputs in one forward; float32 [reads, K] for each."""
        layout = lay_out([one.tokens for one in inputs], packed=self.packs, device=self._model.device)
        states = hidden_states(cast(PreTrainedModel, self._model.base_model), layout)
        head = cast(nn.Module, self._model.score)
        reads = [torch.from_numpy(np.asarray(one.reads, dtype=np.int64)).to(states.device) for one in inputs]
        positions = torch.cat([start + read for start, read in zip(layout.starts, reads, strict=True)])
        return list(head(states[positions]).float().split([len(read) for read in reads]))


class SequenceClassifier:
    """A reward model with one label: the value of a position is the score of the sequence up to it.

    Models that see ahead (encoders such as DeBERTa) score whole sequences only; `scores_prefixes` tells. `packs` tells
    whether sequences share a batch without padding. Not thread-safe: one call at a time.

    Raises:
        RewardClassifierError: the model has another number of labels than one, or padding changes its scores.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        _check_labels(model, 1)
        self._model = model
        self._pad = pad_token_id(model)
        self._decoder = _Decoder(model) if isinstance(model, GenericForSequenceClassification) else None
        if self._decoder is not None and not self._reads_the_end(self._decoder):
            self._decoder = None
        self.packs = self._decoder is not None and self._decoder.packs
        self.scores_prefixes = self._decoder is not None and _is_causal(self._decoder, probe_tolerance(model.dtype))
        if self._decoder is None:
            _check_padding(self.score, probe_tolerance(model.dtype))

    @torch.inference_mode()
    def _reads_the_end(self, decoder: _Decoder) -> bool:
        """Whether the model's score is that of the last token: some decoders pool all tokens, or take the first."""
        probe = np.asarray(_PROBE)
        [read] = decoder.read([ClassifierInput(probe, np.asarray([self.end_of(probe)]))])
        own = self._model(input_ids=torch.from_numpy(probe)[None].to(self._model.device)).logits.float()
        off = probe_tolerance(self._model.dtype) * float(own.abs().max().clamp(min=1.0))
        return bool(((read - own).abs() <= off).all())

    def end_of(self, tokens: Tokens) -> int:
        """Where the whole sequence is read: at its last token that is no padding token, as transformers does it."""
        real = np.flatnonzero(np.asarray(tokens) != self._pad)
        return int(real[-1]) if len(real) and self._pad is not None else len(tokens) - 1

    @torch.inference_mode()
    def score(self, inputs: Sequence[ClassifierInput]) -> list[npt.NDArray[np.float32]]:
        """One forward for the batch; float32 [reads] for each input.

        Other reads than `end_of` need `scores_prefixes`.
        """
        if self._decoder is not None:
            return [scores.squeeze(-1).cpu().numpy() for scores in self._decoder.read(inputs)]
        batch = _pad(self._model, [one.tokens for one in inputs])
        logits = self._model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return list(logits.float().cpu().numpy().reshape(-1, 1))


class TokenClassifier:
    """A process reward model with two labels: the value of a position is the probability of label 1, a good step.

    As TRL's PRMTrainer trains and saves it. Not thread-safe: one call at a time.

    Raises:
        RewardClassifierError: the model has another number of labels than two, or padding changes its scores.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        _check_labels(model, 2)
        self._model = model
        self._decoder = _Decoder(model) if isinstance(model, GenericForTokenClassification) else None
        self.packs = self._decoder is not None and self._decoder.packs
        if self._decoder is None:
            _check_padding(self.score, probe_tolerance(model.dtype))

    @torch.inference_mode()
    def score(self, inputs: Sequence[ClassifierInput]) -> list[npt.NDArray[np.float32]]:
        """One forward for the batch; float32 [reads] for each input, from 0 to 1."""
        if self._decoder is not None:
            return [logits.softmax(dim=-1)[:, 1].cpu().numpy() for logits in self._decoder.read(inputs)]
        batch = _pad(self._model, [one.tokens for one in inputs])
        logits = self._model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        probabilities = logits.float().softmax(dim=-1)[..., 1]
        return [_take(probabilities, row, one.reads) for row, one in enumerate(inputs)]


def _load(
    auto: AutoModel, path: Path, *, device: torch.device, dtype: torch.dtype, attention: str, remote_code: bool
) -> PreTrainedModel:
    model, info = load_with_info(auto, path, device=device, dtype=dtype, attention=attention, remote_code=remote_code)
    check_whole(path, info)
    return model


load_sequence_classifier = partial(_load, AutoModelForSequenceClassification)
"""Load a sequence classifier from safetensors, in evaluation mode.

Raises ModelSourceError: see `check_attention` and `check_whole`.
"""
load_token_classifier = partial(_load, AutoModelForTokenClassification)
"""The same of a token classifier."""


def pad_token_id(model: PreTrainedModel) -> int | None:
    """The padding token of the model's configuration, or None."""
    return cast("int | None", model.config.get_text_config().pad_token_id)


def _check_labels(model: PreTrainedModel, labels: int) -> None:
    found = cast(int, model.config.num_labels)
    if found != labels:
        raise RewardClassifierError(f"its number of labels is {found}, expected {labels}")


def _pad(model: PreTrainedModel, sequences: Sequence[Tokens]) -> PaddedBatch:
    batch = pad_sequences(sequences, side="right", device=model.device)
    pad = pad_token_id(model)
    if pad is not None:
        # Some encoders count positions by the tokens that are no padding tokens.
        batch.input_ids.masked_fill_(batch.attention_mask == 0, pad)
    return batch


def _every_position(tokens: Sequence[int]) -> ClassifierInput:
    return ClassifierInput(np.asarray(tokens), np.arange(len(tokens)))


def _take(values: torch.Tensor, row: int, reads: Tokens) -> npt.NDArray[np.float32]:
    return values[row, torch.from_numpy(np.asarray(reads, dtype=np.int64)).to(values.device)].cpu().numpy()


def _check_padding(
    score: Callable[[Sequence[ClassifierInput]], list[npt.NDArray[np.float32]]], tolerance: float
) -> None:
    """Raise RewardClassifierError where a sequence's score depends on how long the others of its batch are.

    Some encoders mix positions regardless of the mask, as FNet, or in convolutions, as ConvBERT.
    """
    short, long = (ClassifierInput(np.asarray(one), np.asarray([len(one) - 1])) for one in (_PROBE[:3], _PROBE))
    try:
        [alone], [beside, _] = score([short]), score([short, long])
    except (ValueError, RuntimeError):
        # Some want tokens that the probe has not, such as an end of sequence: they are told at their warm-up.
        return
    scale = max(1.0, float(np.abs(alone).max()))
    if not np.allclose(beside, alone, rtol=0, atol=tolerance * scale, equal_nan=True):
        found = f"{float(alone[0]):.4f} for a sequence alone, {float(beside[0]):.4f} beside a longer one"
        raise RewardClassifierError(f"its scores depend on padding: {found}")


@torch.inference_mode()
def _is_causal(decoder: _Decoder, tolerance: float) -> bool:
    """Whether the score at a position is that of the prefix alone: some decoders are used with attention both ways."""
    whole, prefix = (decoder.read([_every_position(_PROBE[:end])])[0] for end in (len(_PROBE), 3))
    scale = float(whole.abs().max().clamp(min=1.0))
    return bool(((whole[:3] - prefix).abs() <= tolerance * scale).all())
