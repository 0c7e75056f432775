"""A tiny random Llama with a tokenizer of its own, saved as a model directory that every service loads."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

EOS = "<|end|>"
PAD = "<|pad|>"
VOCAB_SIZE = 320
MAX_TOKENS = 128
NAN_TOKEN = 259


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: ids 0 to 255 are bytes, then the special tokens; any text has ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


_TINY = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    # Heads of 32: smaller ones are too small for vLLM's attention on CPUs.
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "pad_token_id": 257,
}


def build_model(
    *,
    seed: int = 0,
    tied: bool = True,
    eos_token_id: int | None = 256,
    max_tokens: int = MAX_TOKENS,
) -> LlamaForCausalLM:
    """A two-layer Llama with random weights large enough that its distributions are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **_TINY, max_position_embeddings=max_tokens, tie_word_embeddings=tied, eos_token_id=eos_token_id
    )
    return LlamaForCausalLM(config).eval()


def build_longrope_model(pretrained_tokens: int) -> Phi3ForCausalLM:
    """A two-layer Phi-3 whose positions turn by other frequencies in batches with longer sequences than these."""
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 16, "long_factor": [4.0] * 16}
    config = Phi3Config(
        **_TINY,
        max_position_embeddings=MAX_TOKENS,
        original_max_position_embeddings=pretrained_tokens,
        rope_parameters={**rope, "original_max_position_embeddings": pretrained_tokens},
        eos_token_id=256,
    )
    return Phi3ForCausalLM(config).eval()


def save_longrope_model(directory: Path, pretrained_tokens: int) -> Path:
    """Save such a model and a tokenizer; returns the directory."""
    build_longrope_model(pretrained_tokens).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def save_tiny_model(directory: Path, *, seed: int = 0, tied: bool = True, max_tokens: int = MAX_TOKENS) -> Path:
    """Save model and tokenizer as safetensors; returns the directory."""
    build_model(seed=seed, tied=tied, max_tokens=max_tokens).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def save_nan_model(model_dir: Path, directory: Path) -> Path:
    """Save a model like the one in `model_dir`, but with NaN in the embedding of NAN_TOKEN."""
    model = LlamaForCausalLM.from_pretrained(model_dir)
    with torch.no_grad():
        model.get_input_embeddings().weight[NAN_TOKEN] = torch.nan
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory
