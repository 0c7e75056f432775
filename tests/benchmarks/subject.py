"""The model that a benchmark moves and runs, and where it computes."""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ppod_models.loading import load_causal_lm, pick_device
from ppod_models.sources import default_cache_dir, resolve

SMOLLM2 = "packaged:smollm2-135m-instruct"
RANDOM_1B = "random-1b"
"""1.16 billion random parameters in Llama's shape, with SmolLM2's tokenizer: for figures that no training changes."""


@dataclass(frozen=True)
class Subject:
    """A model's source, as a configuration has it, and a device ("cpu", "cuda:0")."""

    source: str
    device: str

    def served(self, dtype: str) -> dict[str, object]:
        """What a service's configuration says of it."""
        return {"source": self.source, "device": self.device, "dtype": dtype}

    def load(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model, as a trainer would hold it."""
        return load_causal_lm(resolve(self.source).path, device=torch.device(self.device), dtype=dtype)

    def machine(self) -> str:
        """The name of the device, where it is no CPU."""
        return torch.cuda.get_device_name() if self.device.startswith("cuda") else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--device`."""
    parser.add_argument("--model", default=SMOLLM2, help=f"a model's source, or {RANDOM_1B} (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda:0, or auto (default: %(default)s)")


def subject_of(options: argparse.Namespace) -> Subject:
    """What these two arguments say; a random model is made where it is not there yet."""
    source = make_random_1b() if options.model == RANDOM_1B else str(options.model)
    return Subject(source, str(pick_device(options.device)))


def make_random_1b() -> str:
    """The directory of the random model, in bfloat16; made once and kept in the cache."""
    directory = default_cache_dir() / "benchmarks" / RANDOM_1B
    if (directory / "config.json").is_file():
        return str(directory)
    tokenizer = resolve(SMOLLM2).path
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pick_device("auto"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    unfinished = directory.with_suffix(".unfinished")
    model.save_pretrained(unfinished)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, unfinished / name)
    unfinished.rename(directory)
    return str(directory)
