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
    """

    sample: int
    tokens: TokenArray
    prompt_length: int
    temperature: float
    weight_version: int | None


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceResult:
    """Logprobs of one response: float32 [length - prompt_length], natural log, finite; and who computed them."""

    logprobs: FloatArray
    weight_version: int
