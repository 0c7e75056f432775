"""What ends a completion, and what it then holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from ppod import FinishReason, GenerationClient, InvalidArgument, Sampling
from support.generation_requests import PROMPTS, SEEDS
from support.tiny_model import MAX_TOKENS, PAD, build_tokenizer

TOKENIZER = build_tokenizer().backend_tokenizer


def text_of(tokens: Sequence[int]) -> str:
    return TOKENIZER.decode(list(tokens), skip_special_tokens=True)


def test_stop_tokens_end_a_completion_and_belong_to_it(client: GenerationClient) -> None:
    free = client.generate(PROMPTS, Sampling(max_tokens=20, ignore_eos=True), seeds=SEEDS)
    assert all(done.finish_reason is FinishReason.LENGTH and len(done.token_ids) == 20 for done in free)
    stop = int(free[1].token_ids[7])
    sampling = Sampling(max_tokens=20, ignore_eos=True, stop_token_ids=(stop,))
    stopped = client.generate(PROMPTS, sampling, seeds=SEEDS)
    for before, after in zip(free, stopped, strict=True):
        tokens = before.token_ids.tolist()
        if stop in tokens:
            assert after.finish_reason is FinishReason.STOP
            assert after.token_ids.tolist() == tokens[: tokens.index(stop) + 1]
        else:
            assert after.token_ids.tolist() == tokens
    assert stopped[1].finish_reason is FinishReason.STOP


def spelled(client: GenerationClient, text: str, sampling: Sampling, resumed: int = 0) -> tuple[str, FinishReason]:
    """Make the model write a text, byte by byte, by a bias that leaves one token; what it wrote until it stopped."""
    tokens: list[int] = TOKENIZER.encode(text).ids
    written = tokens[:resumed]
    reason = FinishReason.LENGTH
    for token in tokens[resumed:]:
        step = Sampling(len(written) + 1, logit_bias={token: 1e4}, stop=sampling.stop, ignore_eos=True)
        [done] = client.generate([[9, *written]], step, resumed_tokens=[len(written)])
        assert done.token_ids.tolist() == [token]
        written.append(token)
        reason = done.finish_reason
        if reason is not FinishReason.LENGTH:
            break
    return text_of(written), reason


def test_a_special_token_that_is_named_as_a_stop_text_ends_a_completion(client: GenerationClient) -> None:
    """It has no text, so that no text of a completion would ever hold it."""
    pad: int = TOKENIZER.token_to_id(PAD)
    sampling = Sampling(20, logit_bias={pad: 1e4}, stop=("zzz", PAD), ignore_eos=True)
    [done] = client.generate([[9]], sampling)
    assert (done.finish_reason, done.token_ids.tolist()) == (FinishReason.STOP, [pad])
    with pytest.raises(InvalidArgument, match=rf"sampling.stop: .* alone, which is token {pad}"):
        client.generate([[9]], replace(sampling, stop=(f"{PAD}a",)))


@pytest.mark.parametrize(
    ("text", "stop", "written"),
    [
        ("one\n\ntwo", ("\n\n",), "one\n\n"),
        ("ab abc", ("abc", "zzz"), "ab abc"),
        ("stop here", ("op", "stop"), "stop"),
        ("a naïve café", ("ï",), "a naï"),
        ("price: 5 €!", ("€!",), "price: 5 €!"),
        ("aXbX", ("X",), "aX"),
    ],
)
def test_stop_texts_span_tokens_and_split_characters(
    client: GenerationClient, text: str, stop: tuple[str, ...], written: str
) -> None:
    """Every byte is a token here, and each step resumes the one before: the text of all of them counts."""
    assert spelled(client, text, Sampling(1, stop=stop)) == (written, FinishReason.STOP_STRING)


def test_a_stop_text_ends_a_completion_with_the_token_that_completes_it(client: GenerationClient) -> None:
    free = client.generate(PROMPTS, Sampling(max_tokens=60, ignore_eos=True), seeds=SEEDS)
    stops: list[str] = []
    for done in free:
        tokens = done.token_ids.tolist()
        # Two neighbouring letters of the completion, in the middle.
        at = next(
            at for at in range(10, 59) if text_of(tokens[at : at + 2]).isascii() and max(tokens[at : at + 2]) < 256
        )
        stops.append(text_of(tokens[at : at + 2]))
    sampling = Sampling(max_tokens=60, ignore_eos=True, stop=tuple(stops))
    for before, after in zip(free, client.generate(PROMPTS, sampling, seeds=SEEDS), strict=True):
        tokens = before.token_ids.tolist()
        ends = [end for end in range(1, 61) if any(stop in text_of(tokens[:end]) for stop in stops)]
        assert after.token_ids.tolist() == tokens[: ends[0]]
        assert after.finish_reason is FinishReason.STOP_STRING


def test_the_prompt_s_text_does_not_count(client: GenerationClient) -> None:
    prompt: list[int] = TOKENIZER.encode("stop").ids
    letter = TOKENIZER.encode("p").ids[0]
    sampling = Sampling(4, logit_bias={letter: 1e4}, stop=("opp",), ignore_eos=True)
    [fresh] = client.generate([prompt], sampling)
    assert (fresh.finish_reason, len(fresh.token_ids)) == (FinishReason.LENGTH, 4)
    [resumed] = client.generate([prompt], sampling, resumed_tokens=[2])
    assert (resumed.finish_reason, len(resumed.token_ids)) == (FinishReason.STOP_STRING, 1)


def test_the_prompt_s_text_does_not_count_where_it_ends_inside_of_a_character(client: GenerationClient) -> None:
    """As where a prompt is cut after so many tokens: what the first token completes is no text of the completion."""
    prompt: list[int] = TOKENIZER.encode("Q: stop \N{CLAPPER BOARD}").ids[:-1]
    letter = TOKENIZER.encode("p").ids[0]
    sampling = Sampling(4, logit_bias={letter: 1e4}, stop=("Q:", "stop", "o"), ignore_eos=True)
    [done] = client.generate([prompt], sampling)
    assert (done.finish_reason, done.token_ids.tolist()) == (FinishReason.LENGTH, [letter] * 4)
    [stopped] = client.generate([prompt], replace(sampling, stop=("ppp",)))
    assert (stopped.finish_reason, len(stopped.token_ids)) == (FinishReason.STOP_STRING, 3)


def test_the_model_s_length_ends_a_completion(client: GenerationClient) -> None:
    [done] = client.generate([[3] * (MAX_TOKENS - 2)], Sampling(max_tokens=50, ignore_eos=True), seeds=[1])
    assert len(done.token_ids) == 2
    assert done.finish_reason is FinishReason.LENGTH


def test_short_completions_are_streamed_before_long_ones_end(client: GenerationClient) -> None:
    sampling = Sampling(max_tokens=100, ignore_eos=True)
    prompts = [[5] * 20, [5] * (MAX_TOKENS - 1)]
    order = [(done.index, done.timing.compute_s) for done in client.stream(prompts, sampling, seeds=[1, 2])]
    assert [index for index, _ in order] == [1, 0]
    assert order[0][1] < order[1][1]
