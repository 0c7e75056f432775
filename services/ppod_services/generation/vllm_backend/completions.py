"""Between ppod's terms and vLLM's: what is asked of a completion, and what came of it. Imports no vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from tokenizers import Tokenizer

from ppod.errors import Internal, InvalidArgument, NonFiniteOutput
from ppod.tensors import FloatArray
from ppod_services.generation.requests import Ending, GeneratedSample, GenerationItem, VersionSpan
from ppod_services.generation.stop_texts import INCOMPLETE, StopTexts
from ppod_services.generation.vllm_backend.outputs import CompletionOutput, Ended
from ppod_services.generation.vllm_backend.settings import LEAST_TEMPERATURE, MOST_TEMPERATURE

_MOST_BIASES = 1_024
"""A worker of vLLM's refuses more, which would end the engine."""
_RANDOM_SEED = 2**64 - 1
_ENDINGS = {"stop": Ending.STOP, "length": Ending.LENGTH, "abort": Ending.ABORTED}


def sampling_values(item: GenerationItem, *, both_logprobs: bool, finds_stops: bool = True) -> Mapping[str, object]:
    """The arguments of vLLM's SamplingParams for an item.

    Args:
        item: the completion.
        both_logprobs: whether the engine tells unscaled logprobs besides those of the sampled distribution.
        finds_stops: whether the engine looks for stop texts; else `OutsideStops` does.

    Raises:
        InvalidArgument: vLLM does not sample so, or would silently sample otherwise.
    """
    token_filter = item.token_filter
    # The least one travels as the float32 just below it.
    least = LEAST_TEMPERATURE - 1e-6
    if not token_filter.greedy and not least <= token_filter.temperature <= MOST_TEMPERATURE:
        raise InvalidArgument(
            "sampling.temperature",
            f"{token_filter.temperature:g}",
            f"0 or {LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}, as the vLLM backend takes it",
        )
    if len(token_filter.logit_bias) > _MOST_BIASES:
        found, expected = f"{len(token_filter.logit_bias)} tokens", f"at most {_MOST_BIASES} with the vLLM backend"
        raise InvalidArgument("sampling.logit_bias", found, expected)
    if item.unscaled and not both_logprobs and _shaped(item):
        raise InvalidArgument(
            "sampling.unscaled_logprobs",
            "asked for, with a distribution that is not the model's own",
            "temperature 0 or 1 without cuts, penalty and bias: this vLLM tells no other distribution's logprobs",
        )
    stops = item.stop_strings if finds_stops else ()
    return {
        "temperature": 0.0 if token_filter.greedy else max(token_filter.temperature, LEAST_TEMPERATURE),
        "top_p": token_filter.top_p,
        "top_k": token_filter.top_k,
        "min_p": token_filter.min_p,
        "repetition_penalty": token_filter.repetition_penalty,
        "logit_bias": dict(token_filter.logit_bias) or None,
        "seed": engine_seed(item.seed),
        "max_tokens": item.max_tokens,
        "stop_token_ids": sorted(item.stop_ids),
        # The model's own end-of-sequence ids are among `stop_ids` where they end the completion.
        "ignore_eos": True,
        "stop": list(stops),
        "detokenize": bool(stops),
        "skip_special_tokens": True,
        "logprobs": int(item.unscaled and both_logprobs),
        "flat_logprobs": True,
    }


def engine_seed(seed: int) -> int:
    """What vLLM is given for a seed of a request.

    All 64 bits decide it, and its low 32 bits, too: a generator of a CPU takes only those. By the finaliser of
    splitmix64 (Steele et al. 2014), which gives each seed another number.
    """
    mixed = (seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
    return signed_seed(mixed ^ (mixed >> 31))


def signed_seed(seed: int) -> int:
    """A uint64 seed as the int64 that vLLM takes. -1 would ask it for a random one, so one other seed stands for it."""
    if seed == _RANDOM_SEED:
        return -(2**63)
    return seed - 2**64 if seed >= 2**63 else seed


class OutsideStops:
    """Finds stop texts of a completion, as its tokens come, where vLLM would look for them in another text.

    Args:
        item: the completion, with stop texts.
        tokenizer: of the model.

    Attributes:
        tokens: how many tokens complete a stop text; None until one is complete.
    """

    def __init__(self, item: GenerationItem, tokenizer: Tokenizer) -> None:
        prompt: list[int] = item.prompt.tolist()
        begin = len(prompt) - item.resumed
        self._stops = StopTexts(tokenizer, item.stop_strings, prompt[:begin], prompt[begin:])
        self._seen = 0
        self.tokens: int | None = None

    @staticmethod
    def needed(item: GenerationItem, tokenizer: Tokenizer) -> OutsideStops | None:
        """None where vLLM finds them.

        It does not see that a stop text began in tokens that were sampled before. And where the prompt ends inside of a
        character, it takes all of the prompt for text of the completion.
        """
        if not item.stop_strings:
            return None
        if item.resumed or str(tokenizer.decode(item.prompt.tolist(), skip_special_tokens=True)).endswith(INCOMPLETE):
            return OutsideStops(item, tokenizer)
        return None

    def look(self, tokens: Sequence[int]) -> bool:
        """Take all tokens so far; whether a stop text is complete."""
        while self.tokens is None and self._seen < len(tokens):
            self._seen += 1
            if self._stops.completes(tokens[self._seen - 1]):
                self.tokens = self._seen
        return self.tokens is not None


def read_sample(item: GenerationItem, ended: Ended, *, both_logprobs: bool, serving: int) -> GeneratedSample:
    """What came of an item.

    Args:
        item: the completion.
        ended: its end.
        both_logprobs: as for `sampling_values`.
        serving: the version that would have made the first token, where there is none.

    Raises:
        NonFiniteOutput: the model's logits are not finite. Internal: the output contradicts itself.
    """
    output = ended.output
    rows = 2 if item.unscaled and both_logprobs else 1
    flat = np.asarray(output.logprobs.logprobs if output.logprobs is not None else (), dtype=np.float32)
    if flat.size != rows * len(output.token_ids):
        found = f"{len(output.token_ids)} tokens and {flat.size} logprobs"
        raise Internal(f"vLLM gave {found}, expected {rows * len(output.token_ids)} logprobs")
    table: FloatArray = flat.reshape(-1, rows)[: ended.tokens]
    bad = ~np.isfinite(table).all(axis=1)
    if bad.any():
        raise NonFiniteOutput("logits", item.prompt_index, str(table[int(bad.argmax())].tolist()))
    tokens = np.asarray(output.token_ids, dtype=np.int32)[: ended.tokens]
    spans = _spans(output, len(tokens))
    return GeneratedSample(
        tokens=tokens,
        logprobs=np.ascontiguousarray(table[:, 0]),
        # Asked for alone, it is the same number where nothing shapes the distribution.
        unscaled_logprobs=np.ascontiguousarray(table[:, -1]) if item.unscaled else None,
        ending=_ending(item, ended),
        weight_version=spans[-1].weight_version if spans else serving,
        spans=spans,
    )


def unbegun_sample(item: GenerationItem, weight_version: int) -> GeneratedSample:
    """What is handed back of an item that insists on a version which went out of service before it began."""
    nothing = np.empty(0, dtype=np.float32)
    return GeneratedSample(
        tokens=np.empty(0, dtype=np.int32),
        logprobs=nothing,
        unscaled_logprobs=nothing if item.unscaled else None,
        ending=Ending.ABORTED,
        weight_version=weight_version,
        spans=(),
    )


def _shaped(item: GenerationItem) -> bool:
    """Whether tokens are drawn from another distribution than the model's own."""
    token_filter = item.token_filter
    tempered = not token_filter.greedy and token_filter.temperature != 1.0
    penalised = token_filter.repetition_penalty != 1.0 or bool(token_filter.logit_bias)
    return tempered or penalised or token_filter.cuts


def _ending(item: GenerationItem, ended: Ended) -> Ending:
    output = ended.output
    if ended.tokens is not None:
        return Ending.STOP if output.token_ids[ended.tokens - 1] in item.stop_ids else Ending.STOP_STRING
    if output.finish_reason == "stop" and isinstance(output.stop_reason, str):
        return Ending.STOP_STRING
    ending = _ENDINGS.get(output.finish_reason or "")
    if ending is None:
        raise Internal(f"vLLM ended a completion with {output.finish_reason!r}, expected one of {', '.join(_ENDINGS)}")
    return ending


def _spans(output: CompletionOutput, count: int) -> tuple[VersionSpan, ...]:
    """Which version made which of the first `count` tokens, by the labels that the engine put on its steps."""
    cut = [(int(span.version), min(span.end, count) - span.start) for span in output.weight_versions or ()]
    found = tuple(VersionSpan(version, tokens) for version, tokens in cut if tokens > 0)
    told = sum(span.tokens for span in found)
    if told != count:
        raise Internal(f"vLLM told the weight versions of {told} tokens, expected {count}")
    return found
