"""The critic: a linear value head, on the policy's trunk or on one of its own.

Shape legend: B sequences, L columns (prompt and response), H hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from ppod_models.loading import check_dense, hidden_size, load_causal_lm, load_with_info, reading
from ppod_trainer.errors import TrainerError


class ValueModel(nn.Module):
    """A trunk that reads what the policy reads, with a value head.

    Args:
        trunk: a decoder without output layer, in evaluation mode.
        head: weight [1, H], of the trunk's states after its last norm.
    """

    def __init__(self, trunk: PreTrainedModel, head: nn.Linear) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head


def zero_head(hidden_size: int, device: torch.device) -> nn.Linear:
    """A value head that says 0 everywhere, so that the first advantages are the rewards themselves, not noise."""
    head = nn.Linear(hidden_size, 1, device=device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def load_value_model(
    path: Path, *, device: torch.device, attention: str, vocab_size: int, dtype: torch.dtype = torch.float32
) -> ValueModel:
    """Load a critic of its own: from a sequence classifier with its score as the value, else with a head of zeros.

    A reward model is the usual start (Ouyang et al. 2022, appendix C.4): its score of a prefix is a first guess of the
    return from there.

    Args:
        path: directory of a sequence classifier with one label, or of a causal language model; safetensors.
        device: where it computes.
        attention: "sdpa" or "eager".
        vocab_size: the policy's, which must be the critic's.
        dtype: of the trunk; the head is float32.

    Raises:
        TrainerError: it has several labels, is no decoder, or reads other tokens than the policy.
        ModelSourceError: its files cannot be read; see also `check_attention` and `check_dense`.
    """
    with reading(path):
        names = cast("list[str]", AutoConfig.from_pretrained(path, trust_remote_code=False).architectures or [])
    if any(name.endswith("ForSequenceClassification") for name in names):
        model, _ = load_with_info(
            AutoModelForSequenceClassification, path, device=device, dtype=dtype, attention=attention
        )
        score = getattr(model, "score", None)
        if not isinstance(score, nn.Linear) or score.out_features != 1:
            raise TrainerError(
                f"critic.source {path}: {names[0]} has no score layer of one label; expected a decoder with one, as "
                "reward models are"
            )
        head = zero_head(score.in_features, device)
        with torch.no_grad():
            head.weight.copy_(score.weight)
            if (bias := cast("nn.Parameter | None", score.bias)) is not None:
                head.bias.copy_(bias)
    else:
        model = load_causal_lm(path, device=device, dtype=dtype, attention=attention, trunk_only=True)
        head = zero_head(hidden_size(model), device)
    check_dense(path, model.config)
    trunk = cast(PreTrainedModel, model.base_model)
    found = cast(nn.Embedding, trunk.get_input_embeddings()).num_embeddings
    if found != vocab_size:
        raise TrainerError(
            f"critic.source {path}: it reads {found} token ids, the policy {vocab_size}; they must share a tokenizer"
        )
    trunk.to(device)  # pyright: ignore[reportArgumentType]
    return ValueModel(trunk.eval(), head)
