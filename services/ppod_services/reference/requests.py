"""What passes between the reference servicer and its engine. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from ppod.tensors import FloatArray, TokenArray


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceItem:
    """One sequence whose response is to be judged.

    Attributes:
        sample: position in the request, for errors.
        tokens: int32 [length], prompt and response.
        prompt_length: 1 to length - 1.
        temperature: divides the logits, > 0; equal within a batch.
        weight_version: the version that must answer; None takes any.
        adapter: name of the adapter on the base model, None for the base alone; equal within a batch.
        entropy: whether entropies are wanted.
        top_k: how many of the most probable tokens are wanted at each position.
    """

    sample: int
    tokens: TokenArray
    prompt_length: int
    temperature: float
    weight_version: int | None
    adapter: str | None = None
    entropy: bool = False
    top_k: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceResult:
    """What the model says of one response of R tokens; all floats finite.

    Attributes:
        logprobs: float32 [R], natural log.
        weight_version: version of the weights that computed it.
        entropies: float32 [R], nats; None unless asked for.
        top_ids: int32 [R, top_k], the most probable first.
        top_logprobs: float32 [R, top_k], natural log.
    """

    logprobs: FloatArray
    weight_version: int
    entropies: FloatArray | None
    top_ids: TokenArray
    top_logprobs: FloatArray
