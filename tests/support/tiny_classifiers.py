"""Tiny reward models as transformers saves them: a decoder, an encoder with a tokenizer of its own, a process model."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForTokenClassification,
)

from support.tiny_model import MAX_TOKENS, VOCAB_SIZE, build_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('no role ' ~ message.role) }}{% endif %}"
    "[{{ message['role'] }}]{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def save_decoder(directory: Path, *, seed: int = 0, labels: int = 1) -> Path:
    """A Llama with a score for the last token, the tiny model's tokenizer and a chat template."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.3,
        pad_token_id=257,
        eos_token_id=256,
        bos_token_id=None,
        num_labels=labels,
    )
    return _save(LlamaForSequenceClassification(config), chat_tokenizer(), directory)


def save_encoder(directory: Path, *, seed: int = 0) -> Path:
    """A BERT with one label, whose tokenizer has other ids and puts [CLS] and [SEP] around a text."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=96,
        initializer_range=0.3,
        pad_token_id=2,
        num_labels=1,
    )
    return _save(BertForSequenceClassification(config), encoder_tokenizer(), directory)


def save_process_model(directory: Path, *, seed: int = 0) -> Path:
    """A Qwen2 with two labels for each token, as TRL's PRMTrainer saves it."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.3,
        pad_token_id=257,
        num_labels=2,
    )
    return _save(Qwen2ForTokenClassification(config), chat_tokenizer(), directory)


def add_unknown_tokens(model_dir: Path) -> str:
    """Let a model's tokenizer know tokens that the model has no embeddings for; returns the text of one."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_tokens([f"<extra {number}>" for number in range(VOCAB_SIZE)])
    tokenizer.save_pretrained(model_dir)
    return f"<extra {VOCAB_SIZE - 1}>"


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny model's tokenizer, with a chat template that knows user and assistant."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """One of other ids, which puts [CLS] and [SEP] around a text, and has the same chat template."""
    specials = {"[CLS]": 0, "[SEP]": 1, "[PAD]": 2}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {**specials, **{character: index + 3 for index, character in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    # As many files on the hub do; a service that kept to it would cut texts without a word.
    tokenizer.enable_truncation(8)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", model_max_length=96
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            # New biases are zero and new norms are one: all models of a kind would be alike in them.
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
