"""Adapters that the reference serves: a file that PEFT would take in part, or into the base, is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from ppod_models.sources import ModelSourceError
from ppod_services.core.adapters import Adapters
from ppod_services.core.config import AdapterConfig
from support.tiny_adapter import build_adapted_model, save_tiny_adapter
from support.tiny_model import build_model

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


def rewrite(directory: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]) -> None:
    """Change names and values of an adapter's tensors."""
    weights = directory / "adapter_model.safetensors"
    save_file(dict(change(name, value) for name, value in load_file(weights).items()), weights)


def configure(directory: Path, **changes: object) -> None:
    """Change keys of an adapter's configuration."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def of_a_wrapped_model(directory: Path) -> None:
    save_tiny_adapter(directory)
    rewrite(directory, lambda name, value: (name.replace("model.layers", "model.language_model.layers"), value))


def for_fewer_layers(directory: Path) -> None:
    save_tiny_adapter(directory, target_modules=("q_proj", "down_proj"))
    configure(directory, target_modules=["down_proj"])


def by_a_pattern(directory: Path) -> None:
    save_tiny_adapter(directory, target_modules=("q_proj", "lm_head"))
    configure(directory, target_modules=".*(q_proj|lm_head)")


def with_its_embeddings(directory: Path) -> None:
    build_adapted_model().save_pretrained(str(directory), save_embedding_layers=True)
    rewrite(directory, lambda name, value: (name, value if "lora_" in name else value + 1.0))


def of_a_prompt(directory: Path) -> None:
    get_peft_model(build_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(
        str(directory)
    )


def in_ruins(directory: Path) -> None:
    save_tiny_adapter(directory)
    (directory / "adapter_model.safetensors").write_bytes(b"no tensors")


@pytest.mark.parametrize(
    ("save", "told"),
    [
        (of_a_wrapped_model, f"is of another model: its file lacks {Q_PROJ}.lora_A.weight"),
        (for_fewer_layers, f"is of another model: its file has for no layer {Q_PROJ}.lora_A.weight"),
        (by_a_pattern, "changes the output layer lm_head, which ppod does not serve"),
        (with_its_embeddings, "changes base_model.model.lm_head.weight of the base itself"),
        (of_a_prompt, "changes prompts"),
        (in_ruins, "Error while deserializing header"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_that_would_not_be_what_it_says_is_refused(
    tmp_path: Path, save: Callable[[Path], None], told: str
) -> None:
    save(tmp_path)
    with pytest.raises(ModelSourceError) as caught:
        Adapters(build_model(tied=save is not by_a_pattern), [AdapterConfig(name="policy", source=str(tmp_path))])
    assert told in str(caught.value)


def test_embeddings_that_are_the_bases_own_may_be_in_the_file(tmp_path: Path) -> None:
    adapted = build_adapted_model()
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=True)
    base = build_model()
    adapters = Adapters(base, [AdapterConfig(name="policy", source=str(tmp_path))])
    tokens = torch.arange(9)[None]
    with torch.inference_mode(), adapters.active("policy"):
        torch.testing.assert_close(base(input_ids=tokens).logits, adapted(input_ids=tokens).logits, rtol=0, atol=0)
