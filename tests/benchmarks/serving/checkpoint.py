"""The reward model that every server of the benchmark serves: SmolLM2 with a linear score on its last token.

usage: python checkpoint.py DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForSequenceClassification

from ppod_models.sources import resolve, write_once

SOURCE = "packaged:smollm2-135m-instruct"


def make_checkpoint(directory: Path) -> Path:
    """Save model and tokenizer once, as any sequence-classification reward model on a hub is; returns the directory."""
    if not (directory / "config.json").is_file():
        write_once(directory, _write)
    return directory


def _write(directory: Path) -> None:
    source = resolve(SOURCE).path
    trunk = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config = trunk.config
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(trunk.model.state_dict())
    # Which numbers it scores does not matter here, only that every server computes the same ones.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(1, config.hidden_size, generator=generator) / config.hidden_size**0.5)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    make_checkpoint(Path(sys.argv[1]))
