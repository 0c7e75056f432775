"""Loading of the causal language models that reference and generation serve.

Shape legend: B sequences, T padded length, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ppod_models.configuration import ModelConfig
from ppod_models.loading import (
    eos_token_ids,
    load_causal_lm,
    load_tokenizer,
    max_sequence_tokens,
    pick_device,
    pick_dtype,
    special_tokens,
    tokenizer_fingerprint,
    vocab_size,
)
from ppod_models.logit_transforms import UNCHANGED, LogitTransform, find_logit_transform
from ppod_models.packing import enable_packing
from ppod_models.sources import ModelSourceError, resolve
from ppod_services.core.described import ModelInfo


@dataclass(frozen=True, slots=True)
class CausalModel:
    """A loaded model, split where the vocabulary-sized part begins.

    Attributes:
        info: identity and bounds.
        model: the whole model, whose parameters new weights are copied into.
        backbone: everything below the head; its output has `last_hidden_state` [B, T, H].
        head: hidden states [..., H] to logits [..., V].
        device: where it runs.
        tokenizer: turns its tokens into text.
        transform: what becomes of the head's logits.
    """

    info: ModelInfo
    model: PreTrainedModel
    backbone: PreTrainedModel
    head: nn.Module
    device: torch.device
    tokenizer: Tokenizer
    transform: LogitTransform = UNCHANGED


def quieten_transformers() -> None:
    """Keep progress bars off stderr, and send transformers' warnings through the JSON log."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()


def set_threads(threads: int | None) -> None:
    """Bound the CPU threads of the calling thread's operations; None leaves torch's choice, all cores."""
    if threads is not None:
        torch.set_num_threads(threads)


def load_pretrained(
    config: ModelConfig, *, trunk_only: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load model and tokenizer in evaluation mode; `trunk_only` as of `load_causal_lm`.

    Raises:
        ModelSourceError: there is no such model, it cannot be read, or its device cannot be had.
    """
    quieten_transformers()
    set_threads(config.threads)
    path = resolve(config.source).path
    try:
        tokenizer = load_tokenizer(path)
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        model = load_causal_lm(path, device=device, dtype=dtype, attention=config.attention, trunk_only=trunk_only)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelSourceError(f"model {config.source!r} on device {config.device!r}: {error}") from error
    return model, tokenizer


def load_causal_model(config: ModelConfig, name: str, max_batch_tokens: int, *, pack: bool = False) -> CausalModel:
    """Load a model to serve under `name`; sequences longer than `max_batch_tokens` would never fit a batch.

    With `pack` the model takes packed sequences where it can, which `info.packs` then tells.

    Raises:
        ModelSourceError: as `load_pretrained`, or as `find_logit_transform`.
    """
    model, tokenizer = load_pretrained(config)
    backbone = cast(PreTrainedModel, model.base_model)
    head = cast(nn.Module, model.get_output_embeddings())
    transform = find_logit_transform(config.source, model)
    return CausalModel(
        info=ModelInfo(
            name=name,
            tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
            vocab_size=vocab_size(model),
            max_sequence_tokens=min(max_sequence_tokens(model), max_batch_tokens),
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            eos_token_ids=eos_token_ids(model, tokenizer),
            packs=pack and enable_packing(model),
            special_tokens=special_tokens(tokenizer.backend_tokenizer),
        ),
        model=model,
        backbone=backbone,
        head=head,
        device=model.device,
        tokenizer=tokenizer.backend_tokenizer,
        transform=transform,
    )
