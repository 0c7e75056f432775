"""A small language model of movie reviews with a reward head of its own, so that many seeds can be trained in minutes.

A Llama of three layers with a byte-pair vocabulary of 4,096, trained on the reviews that ppod ships to predict the next
token; then ppod's own reward training (`ppod_trainer.reward_training`) fits a head on it, from the same human ratings.
Made once and kept: the same seed gives the same model.

Shape legend: B sequences, T tokens.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS = "<|pad|>", "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 64
"""Tokens of a training sequence; prompts and responses of the benchmark have 30."""


def make_small_model(directory: Path, reviews: Path, epochs: int = 6) -> tuple[Path, Path]:
    """The model's directory and its head's; trained where they are not there yet."""
    model_dir, head_dir = directory / "model", directory / "head"
    if not (head_dir / "card.json").is_file():
        directory.mkdir(parents=True, exist_ok=True)
        texts = read_texts(reviews)
        tokenizer = train_tokenizer(texts)
        model = train_model(tokenizer, texts, epochs)
        model.save_pretrained(model_dir)
        tokenizer.save_pretrained(model_dir)
        train_head(model_dir, head_dir)
    return model_dir, head_dir


def read_texts(reviews: Path) -> list[str]:
    """The reviews."""
    with reviews.open(encoding="utf-8", newline="") as stream:
        return [row["text"] for row in csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-pair encoding; padding is token 0, as TRL's side expects."""
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[PAD, EOS], show_progress=False)
    backend = trained._tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=EOS, padding_side="left")


def train_model(tokenizer: PreTrainedTokenizerFast, texts: list[str], epochs: int) -> LlamaForCausalLM:
    """Next-token prediction over all reviews, each followed by the end of sequence, packed into rows of CONTEXT."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    stream = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eos_token_id)]
    rows = torch.tensor(stream[: len(stream) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    steps = epochs * (len(rows) // 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for step in range(steps):
        offset = step % (len(rows) // 32)
        if offset == 0:
            order = torch.randperm(len(rows))
        batch = rows[order[offset * 32 : (offset + 1) * 32]]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"small model: step {step + 1} of {steps}, loss {loss.item():.3f} nats a token", flush=True)
    return model.eval()


def train_head(model_dir: Path, head_dir: Path) -> None:
    """ppod's reward training on this model."""
    config = {
        "name": "small-reviews-reward",
        "model": {"source": str(model_dir), "device": "cpu", "dtype": "float32"},
        "data": {"split_seed": 1, "half": "a"},
        "features": {"reads": [{"layer": 2, "pooling": "mean"}, {"layer": 3, "pooling": "mean"}]},
        "output": str(head_dir),
    }
    path = head_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    subprocess.run([sys.executable, "-m", "ppod_trainer.reward_training", "--config", str(path)], check=True)
