"""The packaged model on this machine, to hold answers of containers against."""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer

from ppod_models.loading import load_causal_lm, pick_dtype
from ppod_models.sources import resolve, resolve_tokenizer

SOURCE = "packaged:smollm2-135m-instruct"


def token_ids(text: str) -> list[int]:
    """Ids of a text, without special tokens."""
    return Tokenizer.from_file(str(resolve_tokenizer(SOURCE) / "tokenizer.json")).encode(text).ids


def logprobs_here(ids: list[int]) -> np.ndarray:
    """Logprob of each token after the first, in the dtype that a container picks on the same processor."""
    cpu = torch.device("cpu")
    model = load_causal_lm(resolve(SOURCE).path, device=cpu, dtype=pick_dtype("auto", cpu), attention="eager")
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return logprobs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy()
