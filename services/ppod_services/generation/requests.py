"""What passes between the generation servicer and its engine. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from ppod.tensors import FloatArray, TokenArray


@dataclass(frozen=True, slots=True)
class TokenFilter:
    """How one row's tokens are drawn. `temperature` 0 is greedy, `top_k` 0 and `top_p` 1 keep all tokens."""

    temperature: float
    top_p: float
    top_k: int

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0.0

    @property
    def cuts(self) -> bool:
        """Whether some tokens are left out of the draw."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class GenerationItem:
    """One prompt to complete.

    Attributes:
        sample: position in the request, for errors.
        prompt: int32 [length].
        seed: decides every draw.
        max_tokens: most tokens of the completion; prompt and completion fit the model.
        token_filter: how its tokens are drawn.
        stop_ids: tokens that end the completion.
        weight_version: the version that must sample; None takes any.
    """

    sample: int
    prompt: TokenArray
    seed: int
    max_tokens: int
    token_filter: TokenFilter
    stop_ids: frozenset[int]
    weight_version: int | None


@dataclass(frozen=True, slots=True, eq=False)
class GeneratedSample:
    """One finished completion.

    Attributes:
        tokens: int32 [length], the stop token included.
        logprobs: float32 [length], natural log, under the distribution that each token was drawn from.
        stopped: True when a stop token ended it, False when its length did.
        weight_version: version of the weights that made all of it.
    """

    tokens: TokenArray
    logprobs: FloatArray
    stopped: bool
    weight_version: int
