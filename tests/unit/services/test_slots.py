"""Keys and values in slots, on architectures that differ in what their layers attend to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from ppod_models.sources import ModelSourceError
from ppod_services.core.described import ModelInfo
from ppod_services.core.model import CausalModel
from ppod_services.generation.decoder import SlotDecoder
from ppod_services.generation.slots import SlotLayer
from support.generation_engine import item, load_bench
from support.tiny_model import build_model, build_tokenizer

SMALL = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
SLOTS = "ppod_slots_sdpa"


def causal(model: PreTrainedModel) -> CausalModel:
    """As `load_causal_model` makes it."""
    info = ModelInfo("tiny", "f" * 16, 320, 128, "float32", "cpu")
    backbone = cast(PreTrainedModel, model.base_model)
    head = cast(torch.nn.Module, model.get_output_embeddings())
    return CausalModel(info, model, backbone, head, model.device, build_tokenizer().backend_tokenizer)


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SMALL, head_dim=8, sliding_window=3))


def gemma3() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"] * 2
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=3, layer_types=kinds))


def qwen2() -> PreTrainedModel:
    kinds = ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    options = {"use_sliding_window": True, "sliding_window": 4, "layer_types": kinds}
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, **options))


def gpt_oss() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention"] * 2
    options = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 3}
    return GptOssForCausalLM(GptOssConfig(**SMALL, **options, layer_types=kinds, attn_implementation="eager"))


@pytest.mark.parametrize(
    ("build", "attention"),
    [
        pytest.param(build_model, SLOTS, id="llama"),
        pytest.param(mistral, SLOTS, id="a window in all layers"),
        pytest.param(gemma3, SLOTS, id="windows in turns"),
        pytest.param(qwen2, SLOTS, id="windows in the upper layers"),
        pytest.param(gpt_oss, "eager", id="attention sinks, which need the model's own attention"),
    ],
)
def test_slots_give_what_whole_forwards_give(build: object, attention: str) -> None:
    torch.manual_seed(3)
    model = cast("LlamaForCausalLM", build()).eval()  # pyright: ignore
    decoder = SlotDecoder(causal(model))
    assert model.config._attn_implementation == attention  # pyright: ignore
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 320, size=length).astype(np.int32) for length in (9, 21, 14)]
    begins = [3, 15, 8]
    with torch.inference_mode():
        prefill = decoder.prefill([sequence[:begin] for sequence, begin in zip(sequences, begins, strict=True)])
        decoder.seat(prefill, [1, 1, 1], 21)
        found = [prefill.hidden]
        found += [
            decoder.step([sequence[begin + step] for sequence, begin in zip(sequences, begins, strict=True)], 21)
            for step in range(6)
        ]
        for row, (sequence, begin) in enumerate(zip(sequences, begins, strict=True)):
            ids = torch.from_numpy(sequence.astype(np.int64)).unsqueeze(0)
            whole = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, begin - 1 : begin + 6]
            together = torch.stack([states[row] for states in found])
            np.testing.assert_allclose(together.numpy(), whole.numpy(), atol=5e-5)


def test_buffers_grow_and_rows_move_without_a_trace() -> None:
    model = build_model()
    decoder = SlotDecoder(causal(model))
    sequences = [list(range(1 + row, 120)) for row in range(20)]
    with torch.inference_mode():
        prompts = [np.asarray(sequence[: 1 + row], dtype=np.int32) for row, sequence in enumerate(sequences)]
        decoder.seat(decoder.prefill(prompts), [1] * 20, 120)
        rows = list(range(20))
        for _ in range(80):
            tokens = [sequences[row][decoder.lengths[slot]] for slot, row in enumerate(rows)]
            hidden = decoder.step(tokens, 120)
            if len(rows) > 3:
                decoder.leave(1)
                rows[1] = rows[-1]
                rows.pop()
                hidden = hidden[:1]
        assert len(rows) == 3
        for slot, row in enumerate(rows):
            ids = torch.tensor([sequences[row][: decoder.lengths[slot]]])
            whole = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
            np.testing.assert_allclose(hidden[slot].numpy(), whole.numpy(), atol=5e-5)


def test_memory_that_runs_out_as_buffers_grow_fails_no_later_batch(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first layer has its new buffers by then, and the second one has not."""
    bench = load_bench(tiny_model_dir)
    small, large = item([7, 8], 1, 4), item(range(100), 2, 4)
    expected = bench.alone(small).tokens.tolist(), load_bench(tiny_model_dir).alone(large).tokens.tolist()
    resized, grown = SlotLayer.resized, list[SlotLayer]()

    def grow(layer: SlotLayer, slots: int, width: int, used: Sequence[int]) -> SlotLayer:
        grown.append(layer)
        if len(grown) == 2:
            raise torch.OutOfMemoryError("no room")
        return resized(layer, slots, width, used)

    monkeypatch.setattr(SlotLayer, "resized", grow)
    with pytest.raises(torch.OutOfMemoryError):
        bench.alone(large)
    assert (bench.alone(small).tokens.tolist(), bench.alone(large).tokens.tolist()) == expected


def test_a_model_that_keeps_other_state_is_refused_by_name() -> None:
    options = {**SMALL, "layer_types": ["conv", "full_attention", "conv", "full_attention"]}
    del options["initializer_range"]
    model = Lfm2ForCausalLM(Lfm2Config(**options)).eval()
    with pytest.raises(ModelSourceError, match="conv"):
        SlotDecoder(causal(model))
