"""Packed forwards: sequences end to end see only themselves, and models that cannot be packed are told."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
)

from ppod_models.packing import Run, enable_packing, hidden_states, lay_out
from support.tiny_model import VOCAB_SIZE, build_model

CPU = torch.device("cpu")


def tokens(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, VOCAB_SIZE, length) for length in lengths]


@torch.inference_mode()
def states_of(model: PreTrainedModel, sequences: list[np.ndarray], *, packed: bool) -> list[torch.Tensor]:
    layout = lay_out(sequences, packed=packed, device=CPU)
    states = hidden_states(model.model, layout)
    return [states[start : start + len(one)] for start, one in zip(layout.starts.tolist(), sequences, strict=True)]


def test_a_packed_layout_puts_equal_lengths_side_by_side() -> None:
    layout = lay_out([np.array([7, 8, 9]), np.array([1]), np.array([4, 5, 6])], packed=True, device=CPU)
    assert layout.input_ids.tolist() == [[1, 7, 8, 9, 4, 5, 6]]
    assert layout.position_ids.tolist() == [[0, 0, 1, 2, 0, 1, 2]]
    assert layout.starts.tolist() == [1, 0, 4]
    assert layout.runs == (Run(start=0, count=1, length=1), Run(start=1, count=2, length=3))
    assert layout.attention_mask is None


def test_a_padded_layout_pads_on_the_right() -> None:
    layout = lay_out([np.array([7, 8, 9]), np.array([1])], packed=False, device=CPU)
    assert layout.input_ids.tolist() == [[7, 8, 9], [1, 0, 0]]
    assert layout.starts.tolist() == [0, 3]
    assert layout.attention_mask is not None
    assert layout.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_packed_states_are_those_of_each_sequence_alone(lengths: list[int]) -> None:
    plain, packing = build_model(), build_model()
    assert enable_packing(packing)
    sequences = tokens(*lengths)
    for packed, sequence in zip(states_of(packing, sequences, packed=True), sequences, strict=True):
        [alone] = states_of(plain, [sequence], packed=False)
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_a_model_that_packs_takes_padded_batches_as_before() -> None:
    plain, packing = build_model(), build_model()
    assert enable_packing(packing)
    assert enable_packing(packing)  # a second user of a shared trunk asks again
    sequences = tokens(9, 2, 5)
    pairs = zip(states_of(plain, sequences, packed=False), states_of(packing, sequences, packed=False), strict=True)
    for expected, found in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def _config(kind: type, **fields: object) -> object:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return kind(vocab_size=VOCAB_SIZE, num_key_value_heads=2, **sizes, **fields)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: MistralForCausalLM(_config(MistralConfig, sliding_window=4)), id="sliding window"),
        # Longer than what is probed, and told of by the mask alone.
        pytest.param(lambda: PhimoeForCausalLM(_config(PhimoeConfig, sliding_window=64)), id="window in the mask"),
        pytest.param(lambda: Gemma2ForCausalLM(_config(Gemma2Config, head_dim=8)), id="capped attention"),
        pytest.param(lambda: build_model().to(torch.float32).apply(_use_eager), id="eager attention"),
    ],
)
def test_models_that_cannot_be_packed_stay_as_they_were(model: Callable[[], PreTrainedModel]) -> None:
    built = model().eval()
    before = built.config._attn_implementation
    assert not enable_packing(built)
    assert built.config._attn_implementation == before
    for states, sequence in zip(states_of(built, tokens(6, 3), packed=False), tokens(6, 3), strict=True):
        [alone] = states_of(built, [sequence], packed=False)
        torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-4)


def _use_eager(module: torch.nn.Module) -> None:
    if isinstance(module, PreTrainedModel):
        module.set_attn_implementation("eager")


def test_the_probe_finds_attention_that_sees_across_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    # An architecture that swallows the runs and attends over the whole row must not be taken for one that packs.
    model = build_model()
    forward = model.model.forward

    def across(packed_runs: object = None, **options: object) -> object:
        assert packed_runs is None or options.pop("position_ids") is not None
        return forward(**options)

    monkeypatch.setattr(model.model, "forward", across)
    assert not enable_packing(model)
