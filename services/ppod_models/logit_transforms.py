"""What a model does to its logits after its output layer, such as capping them.

Wherever ppod computes logprobs it calls the output layer itself, so what a model does to the logits afterwards has to
be known. It is read from the model's configuration, and believed only where a probe shows that it is all that is done.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ppod_models.sources import ModelSourceError

_PROBE_TOKENS = 4
_MAGNIFICATIONS = (1.0, 64.0)
"""What the probe multiplies logits by, so that a cap shows where they are small. Powers of 2 round nothing."""
_EXACT, _ROUNDED = 1e-3, 2e-2
"""How far logits may be off, relative and absolute. A model in 16 bits rounds after each operation, ppod does not."""


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """Logits are cap * tanh(scale * x / cap), or without a cap scale * x, of what the output layer gives, x.

    Attributes:
        scale: Cohere's `logit_scale`; one over Granite's `logits_scaling`.
        cap: Gemma 2's `final_logit_softcapping`.
    """

    scale: float = 1.0
    cap: float | None = None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """The model's logits, of the output layer's."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


UNCHANGED = LogitTransform()
"""What most models do: nothing."""


def declared_transforms(model: PreTrainedModel) -> list[LogitTransform]:
    """What the model's configuration says, as far as ppod knows it; several where it may be read in several ways."""
    config = model.config.get_text_config(decoder=True)

    def value(key: str) -> float | None:
        found = getattr(config, key, None)
        return float(found) if isinstance(found, int | float) and found > 0 else None

    if (cap := value("final_logit_softcapping")) is not None:
        return [LogitTransform(cap=cap)]
    if (scale := value("logit_scale")) is not None:
        return [LogitTransform(scale)]
    if (scaling := value("logits_scaling")) is not None:
        # Granite divides by it, HyperCLOVA X multiplies.
        return [LogitTransform(1.0 / scaling), LogitTransform(scaling)]
    return []


@torch.inference_mode()
def find_logit_transform(source: str, model: PreTrainedModel) -> LogitTransform:
    """What the model does to its logits, found out by a forward pass of a few tokens; the weights must all be there.

    Raises:
        ModelSourceError: it does something that ppod does not know: all logprobs would be silently wrong. Or it cannot
        be run as a language model with an output layer on a base model.
    """
    head = cast(nn.Module, model.get_output_embeddings())
    probe = torch.arange(_PROBE_TOKENS, device=model.device).unsqueeze(0)
    try:
        given = cast(torch.Tensor, head(model.base_model(input_ids=probe, use_cache=False).last_hidden_state)).float()
        made = [_magnified(model, head, probe, factor) for factor in _MAGNIFICATIONS]
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        # Whatever an architecture that is built otherwise, or a configuration that contradicts itself, ends with.
        raise ModelSourceError(
            f"model {source!r} of type {model.config.model_type} cannot be run: {type(error).__name__}: {error}"
        ) from error
    for transform in (*declared_transforms(model), UNCHANGED):
        off = _EXACT if transform == UNCHANGED or model.dtype == torch.float32 else _ROUNDED
        if all(torch.allclose(logits, transform.apply(given * factor), rtol=off, atol=off) for factor, logits in made):
            return transform
    raise ModelSourceError(
        f"model {source!r}: what it does to its logits after its output layer is neither nothing nor what ppod knows: "
        "final_logit_softcapping, logit_scale, logits_scaling"
    )


def _magnified(
    model: PreTrainedModel, head: nn.Module, probe: torch.Tensor, factor: float
) -> tuple[float, torch.Tensor]:
    """The factor, or 1 where the output layer is not called, and the model's logits of that many times its output."""
    called: list[float] = []

    def magnify(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        called.append(factor)
        return output * factor

    hook = head.register_forward_hook(cast("Callable[..., torch.Tensor]", magnify))
    try:
        logits = cast(torch.Tensor, model(input_ids=probe, use_cache=False).logits).float()
    finally:
        hook.remove()
    return (called or [1.0])[0], logits
