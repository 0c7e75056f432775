"""A trunk of 40,000 weights with a tokenizer of its own, built in a moment and the same each time."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HIDDEN = 32
LAYERS = 4
POSITIONS = 64

CORPUS = [
    "a warm and funny film",
    "a dull, lifeless mess",
    "Is this movie review positive or negative?",
    "review: it is",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def tiny_trunk(*, hidden: int = HIDDEN, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Initial weights of 0.02 would leave every layer's output close to its input, and norms of 1 all alike.
            parameter.copy_(
                torch.randn_like(parameter) * 0.3 if parameter.ndim == 2 else torch.rand_like(parameter) + 0.5
            )
    return model


def save_tiny_trunk(directory: Path) -> Path:
    tiny_trunk().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
