"""What the policy makes of a conversation at the end of each of its turns, for estimators that learn from it.

Shape legend: B sequences, P prompt tokens, T response tokens, K turns, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ppod_trainer.algorithms.turns import last_tokens
from ppod_trainer.policy import ResponseBatch


@torch.no_grad()
def read_turn_states(
    model: PreTrainedModel, batch: ResponseBatch, turns: torch.Tensor, micro_batches: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The last hidden state at each turn's last token, that token read: float32 [B, K, H]; 0 for turns not there.

    One more forward pass: the one for logprobs is not asked for states, so that it need not keep any.

    Args:
        model: the policy's, or what wraps it.
        batch: of the whole step.
        turns: int64 [B, T], as in `Experience`.
        micro_batches: int64 row positions, all rows once.
    """
    last = last_tokens(turns)
    states = torch.zeros(0)
    for index in micro_batches:
        rows = batch.rows(index)
        hidden = model(
            input_ids=rows.input_ids,
            attention_mask=rows.attention_mask,
            position_ids=rows.position_ids,
            use_cache=False,
            output_hidden_states=True,
            logits_to_keep=1,
        ).hidden_states[-1][:, rows.prompt_width :]
        if not states.numel():
            states = torch.zeros(*last.shape, hidden.shape[-1], device=hidden.device)
        own = last[index]
        at = own.clamp(min=0).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        states[index] = torch.where(own.unsqueeze(-1) >= 0, hidden.float().gather(1, at), 0.0)
    return states
