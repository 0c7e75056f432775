"""What passes between the generation servicer and an engine. Free of torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from ppod.tensors import FloatArray, TokenArray


class Ending(enum.Enum):
    """Why a completion ended: a stop token, its length, a stop text, new weights that handed it back unfinished."""

    STOP = "stop"
    LENGTH = "length"
    STOP_STRING = "stop_string"
    ABORTED = "aborted"


class SeedPromise(enum.Enum):
    """What an engine promises of seeds; see generation.proto."""

    EVERY_REPLICA = "every_replica"
    UNINTERRUPTED = "uninterrupted"


@dataclass(frozen=True, slots=True)
class TokenFilter:
    """How one row's tokens are drawn, in this order: bias, penalty, temperature, min-p, top-k, top-p.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 keep all tokens; a penalty of 1 is none.
    """

    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0.0

    @property
    def cuts(self) -> bool:
        """Whether some tokens are left out of the draw."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1.0 or self.min_p > 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class GenerationItem:
    """One completion to sample.

    Attributes:
        prompt_index: position of its prompt in the request, for errors.
        sample: which of the prompt's completions it is; they share `prompt`, the same array.
        prompt: int32 [length].
        seed: decides every draw.
        max_tokens: most tokens of the completion; prompt and completion fit the model.
        token_filter: how its tokens are drawn.
        stop_ids: tokens that end the completion.
        stop_strings: texts that end the completion.
        resumed: how many of the prompt's last tokens were drawn before with this seed, as this completion's beginning.
        unscaled: whether logprobs under the untouched distribution are asked for.
        weight_version: the version that must sample; None takes any.
    """

    prompt_index: int
    sample: int
    prompt: TokenArray
    seed: int
    max_tokens: int
    token_filter: TokenFilter
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...] = ()
    resumed: int = 0
    unscaled: bool = False
    weight_version: int | None = None


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens in a row that one version of the weights made."""

    weight_version: int
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class GeneratedSample:
    """One completion.

    Attributes:
        tokens: int32 [length], a stop token included.
        logprobs: float32 [length], natural log, under the distribution that each token was drawn from.
        unscaled_logprobs: float32 [length], natural log, under the untouched distribution; None where not asked for.
        ending: why it ended.
        weight_version: version that made the last token; where there is none, the version that would have.
        spans: versions of all tokens, in their order.
    """

    tokens: TokenArray
    logprobs: FloatArray
    unscaled_logprobs: FloatArray | None
    ending: Ending
    weight_version: int
    spans: tuple[VersionSpan, ...]


def tokens_taken(item: GenerationItem, sample: GeneratedSample) -> int:
    """Tokens that a completion took: those of its prompt and its own, however much room there was."""
    return len(item.prompt) + len(sample.tokens)
