"""Directories of models with a file that is missing, cut off, or of another form: one line that says where and what."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ppod_models.loading import load_causal_lm, load_tokenizer
from ppod_models.sources import ModelSourceError
from ppod_trainer.critic import load_value_model
from ppod_trainer.parted_weights import stored_dtype


@pytest.fixture
def broken(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b'{"version": "1.0", "trun'),
        ("tokenizer.json", b"\xff\xfe\x00"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Unknown"}}'),
        ("tokenizer_config.json", b"[]"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_told(broken: Path, name: str, content: bytes) -> None:
    (broken / name).write_bytes(content)
    with pytest.raises(ModelSourceError, match=f"^{broken}: its files cannot be read as a model's: "):
        load_tokenizer(broken)


def test_a_model_without_its_tokenizer_is_told(broken: Path) -> None:
    """As of a fine-tuned model that was saved by itself. transformers asks for other libraries."""
    for file in broken.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelSourceError) as caught:
        load_tokenizer(broken)
    assert str(caught.value) == f"{broken} holds no tokenizer.json; expected it beside the weights"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b'{"model_type'),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "llama", "num_attention_heads": 0}'),
        ("config.json", b'{"model_type": "llama", "vocab_size": -5, "pad_token_id": 3}'),
        ("model.safetensors", b""),
        ("model.safetensors", None),
    ],
)
def test_weights_or_a_configuration_that_cannot_be_read_are_told(
    broken: Path, name: str, content: bytes | None
) -> None:
    """As after a download, or a copy, that broke off."""
    file = broken / name
    file.write_bytes(file.read_bytes()[:1000] if content is None else content)
    cpu = torch.device("cpu")
    told = f"^{broken}: its files cannot be read as a model's: "
    with pytest.raises(ModelSourceError, match=told):
        load_causal_lm(broken, device=cpu, dtype=torch.float32)
    with pytest.raises(ModelSourceError, match=told):
        load_value_model(broken, device=cpu, attention="sdpa", vocab_size=258, dtype=torch.float32)
    if name == "model.safetensors":
        with pytest.raises(ModelSourceError, match=f"^{file}: "):
            stored_dtype(broken)
