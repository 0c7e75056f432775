"""What GenerationService is asked for and what it answers, and how an answer is checked; free of I/O."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from ppod.client.identity import ModelState, Pin, Priority, Timing, check_state, read_timing
from ppod.client.texts import check_texts
from ppod.errors import FailedPrecondition, InvalidArgument, InvalidReply
from ppod.tensors import FloatArray, TokenArray, unpack_reply_floats, unpack_reply_tokens
from ppod.v1 import generation_pb2


class FinishReason(Enum):
    """Why a completion ended.

    ABORTED: new weights came, and it was handed back unfinished, perhaps without any token. FILTERED: the server
    withholds it, and it has no tokens.
    """

    STOP = generation_pb2.FINISH_REASON_STOP
    LENGTH = generation_pb2.FINISH_REASON_LENGTH
    STOP_STRING = generation_pb2.FINISH_REASON_STOP_STRING
    ABORTED = generation_pb2.FINISH_REASON_ABORTED
    FILTERED = generation_pb2.FINISH_REASON_FILTERED


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are drawn: logit bias, repetition penalty, temperature, min_p, top_k and top_p, in this order.

    Attributes:
        max_tokens: most tokens of a completion.
        temperature: divides the logits; 0 is greedy.
        top_p: keeps the smallest set of tokens whose probability reaches it; 1 keeps all.
        top_k: keeps the likeliest tokens; 0 keeps all.
        stop_token_ids: end a completion, besides the model's own end-of-sequence ids.
        ignore_eos: the model's own ids do not end it.
        min_p: keeps tokens at least this likely, relative to the likeliest; 0 keeps all.
        repetition_penalty: divides positive logits of tokens that are there already, and multiplies negative ones; 1 is
            none.
        logit_bias: added to the logits, by token id; minus infinity forbids a token.
        stop: texts that end a completion; a special token's name alone stands for the token.
        n: completions of each prompt.
        unscaled_logprobs: whether to ask for logprobs under the model's untouched distribution too.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float], hash=False)
    stop: tuple[str, ...] = ()
    n: int = 1
    unscaled_logprobs: bool = False

    def to_proto(self) -> generation_pb2.SamplingParams:
        """As the message that travels. Raises InvalidArgument: it does not hold a number, or a stop text."""
        for name in ("max_tokens", "top_k", "n"):
            check_unsigned(f"sampling.{name}", [getattr(self, name)], bits=32)
        check_unsigned("sampling.stop_token_ids", self.stop_token_ids, bits=32)
        check_unsigned("sampling.logit_bias", self.logit_bias, bits=32)
        check_texts("sampling.stop", self.stop)
        return generation_pb2.SamplingParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            stop=self.stop,
            n=self.n,
            unscaled_logprobs=self.unscaled_logprobs,
        )


@dataclass(frozen=True, slots=True)
class WeightSpan:
    """Tokens in a row that one version of the weights made."""

    weight_version: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished completion.

    Attributes:
        index: position of its prompt in the request.
        token_ids: int32 [length], the stop token included.
        logprobs: float32 [length], natural log, under the distribution that each token was drawn from.
        finish_reason: why it ended.
        seed: the seed that was used.
        state: model and weight version that sampled it; the version of the last token, where several did.
        timing: where the server's time went.
        sample: which of the prompt's completions it is.
        unscaled_logprobs: float32 [length], natural log, under the model's untouched distribution; None where not
            asked for.
        weight_spans: the versions of all tokens, in their order; empty where there are no tokens.
        filter_reason: why the server withholds it; empty otherwise.
    """

    index: int
    token_ids: TokenArray
    logprobs: FloatArray
    finish_reason: FinishReason
    seed: int
    state: ModelState
    timing: Timing
    sample: int = 0
    unscaled_logprobs: FloatArray | None = None
    weight_spans: tuple[WeightSpan, ...] = ()
    filter_reason: str = ""


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """What is asked besides prompts and sampling; see `GenerationClient.stream`."""

    seeds: Sequence[int] = ()
    weight_version: int | None = None
    priority: Priority = Priority.NORMAL
    request_id: str = ""
    resumed_tokens: Sequence[int] = ()


def check_unsigned(field_name: str, numbers: Iterable[int], *, bits: int) -> None:
    """Raise InvalidArgument that names the first number which so many bits do not hold."""
    for number in numbers:
        if not 0 <= number < 2**bits:
            raise InvalidArgument(field_name, str(number), f"0 to {2**bits - 1}")


class CompletionChecks:
    """Turns replies into completions, and holds them against what was asked for.

    Args:
        sampling: as asked for.
        weight_version: the version that must sample; None takes the pin's.
        pin: what the client insists on.
    """

    def __init__(self, sampling: Sampling, weight_version: int | None, pin: Pin) -> None:
        self._sampling = sampling
        wanted = pin.weight_version if weight_version is None else weight_version
        self._pin = Pin(pin.model, wanted, pin.tokenizer_fingerprint)

    def read(self, reply: generation_pb2.GenerateResponse, index: int, sample: int) -> Completion:
        """The completion; raise InvalidReply that names the field, or FailedPrecondition for another model."""
        reason = self._reason(reply)
        tokens = self._tokens(reply, reason)
        state = check_state(reply.model, self._pin)
        return Completion(
            index=index,
            token_ids=tokens,
            logprobs=unpack_reply_floats(reply.logprobs, len(tokens), "logprobs"),
            finish_reason=reason,
            seed=reply.seed,
            state=state,
            timing=read_timing(reply.timing),
            sample=sample,
            unscaled_logprobs=self._unscaled(reply, len(tokens)),
            weight_spans=self._spans(reply, len(tokens), state),
            filter_reason=reply.filter_reason,
        )

    def _reason(self, reply: generation_pb2.GenerateResponse) -> FinishReason:
        try:
            reason = FinishReason(reply.finish_reason)
        except ValueError:
            expected = ", ".join(each.name for each in FinishReason)
            raise InvalidReply("finish_reason", str(reply.finish_reason), f"one of {expected}") from None
        if reason is FinishReason.STOP_STRING and not self._sampling.stop:
            raise InvalidReply("finish_reason", "STOP_STRING", "another one: no stop text was asked for")
        if (reason is FinishReason.FILTERED) != bool(reply.filter_reason):
            expected = "a reason with FILTERED, and none otherwise"
            raise InvalidReply("filter_reason", f"{reply.filter_reason!r} with {reason.name}", expected)
        return reason

    def _tokens(self, reply: generation_pb2.GenerateResponse, reason: FinishReason) -> TokenArray:
        if reason is FinishReason.FILTERED and reply.token_ids:
            raise InvalidReply("token_ids", f"{len(reply.token_ids)} bytes", "none of what is withheld")
        if not reply.token_ids and reason in (FinishReason.FILTERED, FinishReason.ABORTED):
            return np.zeros(0, dtype=np.int32)
        tokens = unpack_reply_tokens(reply.token_ids, "token_ids")
        most = self._sampling.max_tokens
        if len(tokens) > most:
            raise InvalidReply("token_ids", f"{len(tokens)} tokens", f"at most {most}, as asked for")
        return tokens

    def _unscaled(self, reply: generation_pb2.GenerateResponse, count: int) -> FloatArray | None:
        if self._sampling.unscaled_logprobs:
            return unpack_reply_floats(reply.unscaled_logprobs, count, "unscaled_logprobs")
        if reply.unscaled_logprobs:
            found = f"{len(reply.unscaled_logprobs)} bytes"
            raise InvalidReply("unscaled_logprobs", found, "none: they were not asked for")
        return None

    def _spans(self, reply: generation_pb2.GenerateResponse, count: int, state: ModelState) -> tuple[WeightSpan, ...]:
        """The reply's, or the one that it leaves out."""
        spans = tuple(WeightSpan(span.weight_version, span.tokens) for span in reply.weight_spans)
        if not spans:
            return (WeightSpan(state.weight_version, count),) if count else ()
        total = sum(span.tokens for span in spans)
        if total != count or any(span.tokens == 0 for span in spans):
            found = f"spans of {', '.join(str(span.tokens) for span in spans)} tokens"
            raise InvalidReply("weight_spans", found, f"spans of at least one token, {count} together")
        if spans[-1].weight_version != state.weight_version:
            found = f"version {spans[-1].weight_version} at the end"
            raise InvalidReply("weight_spans", found, f"{state.weight_version}, as in model")
        wanted = self._pin.weight_version
        for span in spans:
            if wanted is not None and span.weight_version != wanted:
                raise FailedPrecondition("weight_version", str(span.weight_version), str(wanted))
        return spans
