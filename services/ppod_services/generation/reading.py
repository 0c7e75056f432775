"""Turns a request into what engines take, or says what is wrong with it."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

from ppod.errors import InvalidArgument
from ppod.tensors import TokenArray
from ppod.v1 import generation_pb2
from ppod_services.core.described import (
    ModelInfo,
    check_model,
    check_tokenizer,
    pinned_version,
    read_sequences,
)
from ppod_services.generation.requests import GenerationItem, TokenFilter

_MOST_STOP_STRINGS = 16


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What all completions of a request share."""

    token_filter: TokenFilter
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...]
    weight_version: int | None


@dataclass(frozen=True, slots=True)
class _Stops:
    """What stop texts ask for: special tokens that were named, and texts to look for."""

    ids: frozenset[int]
    texts: tuple[str, ...]


def read_items(
    request: generation_pb2.GenerateRequest, info: ModelInfo, serving_version: int, max_sequences: int
) -> list[GenerationItem]:
    """The completions that a request asks for: n of its first prompt, then n of the second and so on.

    Raises:
        InvalidArgument: it names the field, what was found and what was expected. NotFound, FailedPrecondition:
        another model, version or tokenizer is wanted.
    """
    check_model(request.selector, [info.name])
    check_tokenizer(info, request.selector)
    version = pinned_version(request.selector, serving_version)
    prompts = read_sequences(request.prompts, "prompts", info, max_sequences)
    for sample, prompt in enumerate(prompts):
        if len(prompt) >= info.max_sequence_tokens:
            expected = f"at most {info.max_sequence_tokens - 1} tokens, to leave room for one"
            raise InvalidArgument("prompts.lengths", f"{len(prompt)} tokens", expected, sample)
    token_filter, stops = _read_filter(request, info), _read_stops(request, info)
    wanted = _Wanted(token_filter, _read_stop_ids(request.sampling, info) | stops.ids, stops.texts, version)
    count = _read_n(request, max_sequences)
    resumed = _read_resumed(request, prompts, count)
    seeds = _read_seeds(request, count)
    return [
        GenerationItem(
            prompt_index=index,
            sample=sample,
            prompt=prompt,
            seed=seeds[index * count + sample],
            max_tokens=min(request.sampling.max_tokens - resumed[index], info.max_sequence_tokens - len(prompt)),
            token_filter=wanted.token_filter,
            stop_ids=wanted.stop_ids,
            stop_strings=wanted.stop_strings,
            resumed=resumed[index],
            unscaled=request.sampling.unscaled_logprobs,
            weight_version=wanted.weight_version,
        )
        for index, prompt in enumerate(prompts)
        for sample in range(count)
    ]


def _read_filter(request: generation_pb2.GenerateRequest, info: ModelInfo) -> TokenFilter:
    if not request.HasField("sampling"):
        raise InvalidArgument("sampling", "nothing", "sampling parameters")
    sampling = request.sampling
    if sampling.max_tokens == 0:
        raise InvalidArgument("sampling.max_tokens", "0", "at least 1")
    temperature = sampling.temperature if sampling.HasField("temperature") else 1.0
    if not math.isfinite(temperature) or temperature < 0:
        raise InvalidArgument("sampling.temperature", str(temperature), "a finite number, 0 for greedy or more")
    top_p = sampling.top_p if sampling.HasField("top_p") else 1.0
    if not 0 < top_p <= 1:
        raise InvalidArgument("sampling.top_p", str(top_p), "more than 0 and at most 1")
    min_p = sampling.min_p if sampling.HasField("min_p") else 0.0
    if not 0 <= min_p <= 1:
        raise InvalidArgument("sampling.min_p", str(min_p), "at least 0 and at most 1")
    penalty = sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0
    if not math.isfinite(penalty) or penalty <= 0:
        raise InvalidArgument("sampling.repetition_penalty", str(penalty), "a finite number, more than 0; 1 is none")
    return TokenFilter(
        temperature=temperature,
        top_p=top_p,
        top_k=sampling.top_k,
        min_p=min_p,
        repetition_penalty=penalty,
        logit_bias=_read_bias(sampling, info),
    )


def _read_bias(sampling: generation_pb2.SamplingParams, info: ModelInfo) -> tuple[tuple[int, float], ...]:
    bias = sorted(sampling.logit_bias.items())
    for token, value in bias:
        if token >= info.vocab_size:
            raise InvalidArgument("sampling.logit_bias", f"id {token}", f"ids from 0 to {info.vocab_size - 1}")
        if math.isnan(value) or value == math.inf:
            expected = "a finite number, or minus infinity to forbid the token"
            raise InvalidArgument("sampling.logit_bias", f"{value} for id {token}", expected)
    if sum(1 for _, value in bias if value == -math.inf) == info.vocab_size:
        raise InvalidArgument("sampling.logit_bias", "minus infinity for every id", "at least one token to draw")
    return tuple(bias)


def _read_stop_ids(sampling: generation_pb2.SamplingParams, info: ModelInfo) -> frozenset[int]:
    for token in sampling.stop_token_ids:
        if token >= info.vocab_size:
            raise InvalidArgument("sampling.stop_token_ids", str(token), f"ids from 0 to {info.vocab_size - 1}")
    own = () if sampling.ignore_eos else info.eos_token_ids
    return frozenset([*sampling.stop_token_ids, *own])


def _read_stops(request: generation_pb2.GenerateRequest, info: ModelInfo) -> _Stops:
    stops = tuple(request.sampling.stop)
    if len(stops) > _MOST_STOP_STRINGS:
        raise InvalidArgument("sampling.stop", f"{len(stops)} texts", f"at most {_MOST_STOP_STRINGS}")
    if "" in stops:
        raise InvalidArgument("sampling.stop", "an empty text", "texts of at least one character")
    # A special token has no text: a stop text that names one would never be complete, and nobody would know.
    special = info.special_tokens
    texts = tuple(text for text in stops if text not in special)
    for text in texts:
        if (token := next((token for token in special if token in text), None)) is not None:
            expected = f"texts without special tokens, or {token} alone, which is token {special[token]}"
            raise InvalidArgument("sampling.stop", repr(text), expected)
    return _Stops(frozenset(special[text] for text in stops if text in special), texts)


def _read_n(request: generation_pb2.GenerateRequest, max_sequences: int) -> int:
    count = request.sampling.n or 1
    prompts = len(request.prompts.lengths)
    if count > 1 and count * prompts > max_sequences:
        expected = f"at most {max_sequences} completions in a request"
        raise InvalidArgument("sampling.n", f"{count} completions of {prompts} prompts", expected)
    return count


def _read_resumed(request: generation_pb2.GenerateRequest, prompts: list[TokenArray], count: int) -> list[int]:
    resumed = list(request.resumed_tokens) or [0] * len(prompts)
    if len(resumed) != len(prompts):
        expected = f"{len(prompts)}, one for each prompt, or none"
        raise InvalidArgument("resumed_tokens", f"{len(resumed)} numbers", expected)
    if count > 1 and any(resumed):
        raise InvalidArgument("resumed_tokens", f"with sampling.n {count}", "none, or sampling.n 1")
    for sample, (tokens, prompt) in enumerate(zip(resumed, prompts, strict=True)):
        if tokens > len(prompt):
            raise InvalidArgument("resumed_tokens", str(tokens), f"at most the prompt's {len(prompt)} tokens", sample)
        if tokens >= request.sampling.max_tokens:
            expected = f"less than sampling.max_tokens, {request.sampling.max_tokens}"
            raise InvalidArgument("resumed_tokens", str(tokens), expected, sample)
    return resumed


def _read_seeds(request: generation_pb2.GenerateRequest, count: int) -> list[int]:
    completions = count * len(request.prompts.lengths)
    if not request.seeds:
        return [secrets.randbits(64) for _ in range(completions)]
    if len(request.seeds) != completions:
        expected = f"{completions}, one for each completion, or none"
        raise InvalidArgument("seeds", f"{len(request.seeds)} seeds", expected)
    return list(request.seeds)
