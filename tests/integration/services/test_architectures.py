"""Models of many architectures: each is served and read as it is, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ppod_models.loading import load_causal_lm
from ppod_models.packing import enable_packing, hidden_states, lay_out
from ppod_models.sources import ModelSourceError
from support.architectures import WINDOW, save_architecture
from support.generation_engine import StepSink, item, load_bench

LENGTHS = (3, 17, 1, 30, 9, 2)
LATER = (5, 21)
SERVED = (
    "cohere2",
    "ernie4_5",
    "exaone4",
    "falcon",
    "gemma3_text",
    "glm4_moe",
    "gpt2",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
)
EAGER = ("gemma2", "gpt_oss")
"""Served with `attention: eager` alone."""
REFUSED = {
    "deepseek_v3": "with keys and values in slots it gives other results",
    "gemma2": "it caps the logits of its attention",
    "jamba": "layers of linear_attention",
    "mamba": "does not support an attention implementation",
    "qwen3_next": "layers of linear_attention",
}


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    random = np.random.default_rng(0)
    return [random.integers(0, 255, length).tolist() for length in lengths]


@pytest.mark.parametrize("kind", [*SERVED, *EAGER])
def test_every_token_has_the_logprob_of_a_full_forward(kind: str, tmp_path: Path) -> None:
    """Prompts of many lengths, two of which join while the others decode, far beyond a window."""
    directory = save_architecture(tmp_path / "model", kind)
    bench = load_bench(directory, attention="eager" if kind in EAGER else "sdpa")
    items = [item(one, seed, 10 + 5 * seed) for seed, one in enumerate(prompts(LENGTHS))]
    later = [item(one, 50 + seed, 4 * WINDOW) for seed, one in enumerate(prompts(LATER))]
    sink = bench.run(items, StepSink(joining={4: later}))
    assert not sink.errors
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    for position, one in enumerate([*items, *later]):
        found = sink.samples[position]
        ids = torch.from_numpy(np.concatenate([one.prompt, found.tokens])).long()
        begin = len(one.prompt)
        with torch.inference_mode():
            logits = model(ids[None], use_cache=False).logits[0, begin - 1 : -1]
        expected = logits.float().log_softmax(-1).gather(1, ids[begin:, None])[:, 0]
        np.testing.assert_allclose(found.logprobs, expected.numpy(), atol=2e-4)


@pytest.mark.parametrize("kind", SERVED)
def test_sequences_that_share_a_row_are_read_as_if_they_were_alone(kind: str, tmp_path: Path) -> None:
    directory = save_architecture(tmp_path / "model", kind)
    packing, plain = (
        load_causal_lm(directory, device=torch.device("cpu"), dtype=torch.float32, attention=one)
        for one in ("sdpa", "eager")
    )
    packed = enable_packing(packing)
    sequences = [np.asarray(one) for one in prompts(LENGTHS)]
    layout = lay_out(sequences, packed=packed, device=packing.device)
    with torch.inference_mode():
        states = hidden_states(packing.base_model, layout)
        for start, one in zip(layout.starts.tolist(), sequences, strict=True):
            expected = plain.base_model(torch.from_numpy(one)[None], use_cache=False).last_hidden_state[0]
            scale = float(expected.abs().max())
            torch.testing.assert_close(states[start : start + len(one)], expected, atol=1e-4 * scale, rtol=0)


@pytest.mark.parametrize(("kind", "words"), REFUSED.items())
def test_what_cannot_be_served_is_refused(kind: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=words):
        load_bench(save_architecture(tmp_path / "model", kind))
