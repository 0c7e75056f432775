"""The bare forward pass that servers are measured against, and that the peers without one of their own run.

Imported by ppod's environment and by the peers'; needs torch and transformers only.

Shape legend: B sequences, T padded length.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Forward:
    """Scores batches with a sequence-classification checkpoint in `dtype`, "float32" or "bfloat16"."""

    def __init__(self, directory: str, threads: int, dtype: str) -> None:
        torch.set_num_threads(threads)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype).eval()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, without padding or special tokens."""
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    @torch.inference_mode()
    def scores(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """One score for each sequence, in one forward with padding on the right."""
        width = max(len(sequence) for sequence in sequences)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[*sequence, *[pad] * (width - len(sequence))] for sequence in sequences])
        mask = torch.tensor([[1] * len(sequence) + [0] * (width - len(sequence)) for sequence in sequences])
        return self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()


def server_parser(description: str | None) -> argparse.ArgumentParser:
    """The command line of a server around the forward pass."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    return parser
