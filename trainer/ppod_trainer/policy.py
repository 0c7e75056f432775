"""The policy with its critic, and the batches that they read.

Shape legend: B sequences, P prompt tokens (left-padded), T response tokens (right-padded), H hidden size. Action tokens
are the response tokens that the policy sampled; between them an environment may have written others.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ppod_models.loading import hidden_size
from ppod_models.logit_transforms import UNCHANGED, LogitTransform
from ppod_models.logprobs import token_logprobs
from ppod_models.padding import position_ids
from ppod_trainer.critic import ValueModel, zero_head
from ppod_trainer.rollouts import ScoredRollout, common_temperature


@dataclass(frozen=True, slots=True)
class ResponseBatch:
    """Prompts and responses as one padded batch.

    Attributes:
        input_ids: int64 [B, P + T]; prompts end, and responses start, at column P. Padding is 0, hidden by the mask.
        attention_mask: int64 [B, P + T].
        position_ids: int64 [B, P + T], cumsum(mask) - 1.
        responses: int64 [B, T].
        response_mask: bool [B, T]; true on response tokens, the stop token included.
        action_mask: bool [B, T]; true on action tokens, each of which is a response token.
        temperature: that the responses were sampled at; the policy divides its logits by it.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    responses: torch.Tensor
    response_mask: torch.Tensor
    action_mask: torch.Tensor
    temperature: float

    @property
    def prompt_width(self) -> int:
        """P."""
        return self.input_ids.shape[1] - self.responses.shape[1]

    def rows(self, index: torch.Tensor) -> ResponseBatch:
        """The rows at these positions, without the columns that are padding in all of them."""
        mask = self.attention_mask[index]
        width = self.prompt_width
        first = width - int(mask[:, :width].sum(dim=1).max())
        longest = int(self.response_mask[index].sum(dim=1).max())
        columns = slice(first, width + longest)
        return ResponseBatch(
            input_ids=self.input_ids[index, columns],
            attention_mask=mask[:, columns],
            position_ids=self.position_ids[index, columns],
            responses=self.responses[index, :longest],
            response_mask=self.response_mask[index, :longest],
            action_mask=self.action_mask[index, :longest],
            temperature=self.temperature,
        )


def build_response_batch(rollouts: Sequence[ScoredRollout], device: torch.device) -> ResponseBatch:
    """Pad rollouts, all of one temperature: prompts on the left, responses on the right."""
    prompts = max(len(scored.rollout.prompt.token_ids) for scored in rollouts)
    responses = max(len(scored.rollout.response) for scored in rollouts)
    ids = np.zeros((len(rollouts), prompts + responses), dtype=np.int64)
    mask = np.zeros_like(ids)
    actions = np.zeros((len(rollouts), responses), dtype=np.bool_)
    for row, scored in enumerate(rollouts):
        tokens = scored.rollout.tokens
        start = prompts - len(scored.rollout.prompt.token_ids)
        ids[row, start : start + len(tokens)] = tokens
        mask[row, start : start + len(tokens)] = 1
        actions[row, : len(scored.rollout.response)] = scored.rollout.action_mask
    attention_mask = torch.from_numpy(mask).to(device)
    input_ids = torch.from_numpy(ids).to(device)
    return ResponseBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids(attention_mask),
        responses=input_ids[:, prompts:],
        response_mask=attention_mask[:, prompts:].bool(),
        action_mask=torch.from_numpy(actions).to(device),
        temperature=common_temperature([scored.rollout for scored in rollouts]),
    )


@dataclass(frozen=True, slots=True)
class PolicyOutput:
    """What the policy says of the action tokens of a response batch; all other positions hold 0.

    Attributes:
        logprobs: float32 [B, T], natural log, at the batch's temperature.
        entropy: float32 [B, T], nats.
        values: float32 [B, T]; position t is the value of the state before token t.
        next_values: float32 [B]; the value of the state after the last token, without gradient.
        states: float32 [B, T, H], the language model's last hidden state at each response token, that token read,
            without gradient; None unless they were asked for.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor
    next_values: torch.Tensor
    states: torch.Tensor | None = None


class PolicyWithValue(nn.Module):
    """A causal language model and its critic: a linear value head on its last hidden state, or a model of its own.

    Parameters are float32 (small updates would vanish in bfloat16); the forward pass runs in `compute_dtype`.

    Args:
        model: the language model, in float32 and evaluation mode.
        compute_dtype: dtype of the forward pass's matrix products.
        value_model: a critic of its own; None: a head of zeros on the model's trunk.
        detach_values: without a value model, keep the gradient of the values from the trunk.
        transform: what the model does to its logits after the output layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        compute_dtype: torch.dtype,
        value_model: ValueModel | None = None,
        detach_values: bool = False,
        transform: LogitTransform = UNCHANGED,
    ) -> None:
        super().__init__()
        self.model = model
        self.value_trunk = None if value_model is None else value_model.trunk
        # A model without weights gets them when it is divided.
        device = torch.device("cpu") if model.device.type == "meta" else model.device
        head = zero_head(self.hidden_size, device) if value_model is None else value_model.head
        self.value_head = head
        self._compute_dtype = compute_dtype
        self._detach_values = detach_values
        self._transform = transform

    @property
    def hidden_size(self) -> int:
        """H of the language model."""
        return hidden_size(self.model)

    @property
    def device(self) -> torch.device:
        """Where batches must be."""
        return self.value_head.weight.device

    def policy_parameters(self) -> list[nn.Parameter]:
        """What the policy learns; a shared trunk belongs to it."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def critic_parameters(self) -> list[nn.Parameter]:
        """What the critic learns alone."""
        trunk = [] if self.value_trunk is None else list(self.value_trunk.parameters())
        return [*trunk, *self.value_head.parameters()]

    def forward(self, batch: ResponseBatch, *, values_only: bool = False, with_states: bool = False) -> PolicyOutput:
        """Logprobs, entropy and values of the action tokens; the vocabulary is touched at those alone.

        With `values_only` the gradient of the values reaches the critic's own parameters and no others.
        """
        width = batch.prompt_width
        with torch.set_grad_enabled(torch.is_grad_enabled() and not values_only):
            with self._autocast(batch.input_ids.device):
                states = _states(cast(PreTrainedModel, self.model.base_model), batch)
            # The state before response token t is at column P - 1 + t: logits and values are shifted by one.
            before = states[:, width - 1 : -1][batch.action_mask]
            tokens = batch.responses[batch.action_mask]
            head = cast(nn.Module, self.model.get_output_embeddings())
            logprobs, entropy = token_logprobs(
                before.to(self._compute_dtype), head, tokens, batch.temperature, transform=self._transform
            )
            read = states[:, width:].detach().float() if with_states else None
        if self.value_trunk is not None:
            with self._autocast(batch.input_ids.device):
                states = _states(self.value_trunk, batch)
        elif self._detach_values:
            states = states.detach()
        values = self.value_head(states[:, width - 1 : -1][batch.action_mask].float()).squeeze(-1)
        return PolicyOutput(
            logprobs=_scatter(logprobs, batch.action_mask),
            entropy=_scatter(entropy, batch.action_mask),
            values=_scatter(values, batch.action_mask),
            next_values=self._next_values(states, batch),
            states=read,
        )

    @torch.no_grad()
    def _next_values(self, hidden: torch.Tensor, batch: ResponseBatch) -> torch.Tensor:
        last = batch.prompt_width - 1 + batch.response_mask.sum(dim=1)
        after = hidden[torch.arange(len(last), device=last.device), last]
        return self.value_head(after.float()).squeeze(-1)

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self._compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, self._compute_dtype)


def _states(trunk: PreTrainedModel, batch: ResponseBatch) -> torch.Tensor:
    """The trunk's last hidden states [B, P + T, H]."""
    return trunk(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state


def _scatter(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Put flat values back at the true positions of mask [B, T]; zero elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
