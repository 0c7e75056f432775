"""Where steps end, what a judge's reply says, and what composed scores are: pure parts of the rewards."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import replace
from typing import cast

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ppod import DeadlineExceeded, InvalidArgument, NonFiniteOutput
from ppod.tensors import FloatArray
from ppod_models.decoding import decode_parts
from ppod_services.core.callers import ANONYMOUS_CALLER
from ppod_services.core.scheduler import Scheduler
from ppod_services.reward.codec import TokenizerCodec
from ppod_services.reward.composites import score_ensemble, score_sum
from ppod_services.reward.judge import question, read_verdict
from ppod_services.reward.kinds import EnsembleConfig, FunctionConfig, RubricConfig, SumConfig, TermConfig
from ppod_services.reward.model_inputs import Reader, encode_steps, encode_whole
from ppod_services.reward.requests import RewardItem
from ppod_services.reward.runtime import Runtime
from ppod_services.reward.samples import (
    Granularity,
    PlainText,
    Query,
    Sample,
    TextContent,
    TokenContent,
    Truncation,
    read_text,
)
from ppod_services.reward.scored import Adjustment, Kind, Scored, Work, total_work
from ppod_services.reward.steps import StepRule, find_steps, step_ends
from ppod_services.reward.text_rewards import TextReward
from support.tiny_model import VOCAB_SIZE, build_tokenizer


@pytest.mark.parametrize(
    ("text", "separator", "ends"),
    [
        ("one\ntwo", "\n", (4, 7)),
        ("one\ntwo\n", "\n", (4, 8)),
        ("one", "\n", (3,)),
        ("", "\n", (0,)),
        ("\n\n", "\n", (2,)),
        ("a\n\n\nb\n", "\n", (2, 6)),
        ("\na\n", "\n", (3,)),
        ("a<s>b<s> ", "<s>", (4, 9)),
        ("a\n\nb", "\n\n", (3, 4)),
    ],
)
def test_step_ends_by_hand(text: str, separator: str, ends: tuple[int, ...]) -> None:
    assert step_ends(text, separator) == ends


def test_steps_of_tokens_hold_the_text_of_the_steps() -> None:
    """Each position is the first token at which the text of the steps so far is there, in any script."""
    codec = TokenizerCodec(build_tokenizer())
    prompt, response = "ünï: ", "größer\n✓ ok\n\nend\n"
    [head] = codec.encode([prompt], special_tokens=False)
    [tail] = codec.encode([response], special_tokens=False)
    # The tiny tokenizer's end of sequence, which adds no text.
    tokens = np.concatenate([head, tail, [256]]).astype(np.int32)
    sample = Sample(0, TokenContent(tokens, len(head)))
    steps = find_steps((sample,), StepRule(Granularity.STEP, "\n"), codec, 10)
    texts = [read_text(sample.prefix(position), codec).response for position in steps.positions[0]]
    assert texts == ["größer\n", "größer\n✓ ok\n", response]
    assert steps.positions[0][-1] == len(tokens)
    before = [read_text(sample.prefix(position - 1), codec).response for position in steps.positions[0][:-1]]
    assert before == ["größer", "größer\n✓ ok"]
    with pytest.raises(InvalidArgument, match="3 positions"):
        find_steps((sample,), StepRule(Granularity.STEP, "\n"), codec, 2)


def spaced_codec() -> TokenizerCodec:
    """Words that begin with their space, which the decoder drops before the first one, as those of Llama 2 and T5."""
    words = ["▁The", "▁film", "▁was", "▁great.", "▁Really", "<unk>"]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=5))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return TokenizerCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))


def test_prompt_and_response_of_token_ids_are_together_the_text_of_the_whole() -> None:
    codec = spaced_codec()
    tokens = np.asarray([0, 1, 2, 3], dtype=np.int32)
    assert codec.decode(tokens[3:]) == "great."
    assert read_text(Sample(0, TokenContent(tokens, 3)), codec) == PlainText("The film was", " great.")
    other = TokenizerCodec(build_tokenizer())
    reader = Reader("r", other, VOCAB_SIZE, special_tokens=False, same_tokens=False, source=codec)
    [read] = encode_whole([Sample(0, TokenContent(tokens, 3))], reader)
    assert other.decode(read) == "The film was great."


def test_a_character_in_two_parts_spoils_no_other_part() -> None:
    codec = TokenizerCodec(build_tokenizer())
    [tokens] = codec.encode(["aß b"], special_tokens=False)
    assert decode_parts(codec.decode, tokens, (2, 3, 5)) == ["a\ufffd", "\ufffd", " b"]


def test_a_step_of_token_ids_ends_behind_its_last_character_not_within_it() -> None:
    """The bytes of half a character count as a character each, in decoders that fall back to bytes."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    codec = TokenizerCodec(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    [tokens] = codec.encode(["😀😀\nend"], special_tokens=False)
    assert [codec.decode(tokens[:end]) for end in (3, 4, 9)] == ["\ufffd" * 3, "😀", "😀😀\n"]
    steps = find_steps((Sample(0, TokenContent(tokens, 0)),), StepRule(Granularity.STEP, "\n"), codec, 10)
    assert steps.positions == ((9, 12),)


def test_steps_of_token_ids_keep_the_spaces_before_them() -> None:
    codec = spaced_codec()
    tokens = np.asarray([0, 1, 2, 3, 4, 3], dtype=np.int32)
    other = TokenizerCodec(build_tokenizer())
    reader = Reader("r", other, VOCAB_SIZE, special_tokens=False, same_tokens=False, source=codec)
    read = encode_steps(Sample(0, TokenContent(tokens, 3)), (4, 6), "|", reader)
    assert other.decode(read.tokens) == "The film was great.| Really great.|"


def test_ids_that_one_of_several_models_lacks_name_their_sample() -> None:
    """A sum's ids are those of its first model; another one with the same tokenizer may have fewer embeddings."""
    samples = [
        Sample(index, TokenContent(np.asarray([token], dtype=np.int32), 0)) for index, token in enumerate((5, 310))
    ]
    codec = TokenizerCodec(build_tokenizer())
    with pytest.raises(InvalidArgument, match="sample 1: found token id 310, expected ids from 0 to 299"):
        encode_whole(samples, Reader("r", codec, 300, special_tokens=False, same_tokens=True, source=codec))
    assert encode_whole(samples, Reader("r", codec, 311, special_tokens=False, same_tokens=True, source=codec))


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("Score: 3", 3.0),
        ("Because.\n  Score: 2.5  \n", 2.5),
        ("Score: -1", None),
        ("Score: 11", None),
        ("score: 3", None),
        ("Score: 3/10", None),
        ("Score: three", None),
        ("I'd say Score: 3", None),
        ("Score: 3\nScore: 3", None),
        ("Score: nan", None),
        ("", None),
    ],
)
def test_only_one_line_with_a_score_on_the_scale_is_a_verdict(reply: str, verdict: float | None) -> None:
    found, fault = read_verdict(reply, 0, 10)
    assert found == verdict
    assert bool(fault) is (verdict is None)


def test_the_marks_of_a_question_are_the_same_each_time_and_follow_the_text() -> None:
    rubric = RubricConfig(criteria="c")
    one = question(rubric, PlainText("p", "r"), None)
    assert one == question(rubric, PlainText("p", "r"), None)
    mark = one[0].content.split("begin response ")[1][:16]
    assert mark not in question(rubric, PlainText("p", "r."), None)[0].content


def scored(name: str, values: list[float], adjustment: Adjustment | None = None) -> Scored:
    return Scored(name, Kind.MODEL, np.asarray(values, dtype=np.float32), None, adjustment)


def query(count: int) -> Query:
    samples = tuple(Sample(10 + index, TextContent("", "x")) for index in range(count))
    return Query(samples, Truncation.NONE, ANONYMOUS_CALLER, time.monotonic() + 10)


def test_an_ensemble_by_hand() -> None:
    config = EnsembleConfig(name="e", kind="ensemble", members=("a", "b"), pessimism=2.0)
    result = score_ensemble(config, [scored("a", [1.0, 4.0]), scored("b", [3.0, 4.0])], query(2))
    assert result.mean is not None
    assert result.std is not None
    assert (result.mean.tolist(), result.std.tolist(), result.scores.tolist()) == ([2, 4], [1, 0], [0, 4])


def test_what_a_composed_reward_lost_is_the_most_that_a_member_lost() -> None:
    config = EnsembleConfig(name="e", kind="ensemble", members=("a", "b", "c"))
    members = [
        replace(scored(name, [1.0, 1.0, 1.0]), truncated=lost)
        for name, lost in (("a", (0, 0, 2)), ("b", ()), ("c", (4, 0, 1)))
    ]
    assert score_ensemble(config, members, query(3)).truncated == (4, 0, 2)
    assert score_ensemble(config, [scored("a", [1.0]), scored("b", [1.0])], query(1)).truncated == ()


def test_the_work_of_members_side_by_side_is_counted_once() -> None:
    """Two models shared batch 7; the function ran meanwhile, and waited for no batch."""
    first = replace(scored("a", [1.0]), work=Work(0.5, {7: 2.0, 8: 1.0}, 10))
    second = replace(scored("b", [1.0]), work=Work(0.25, {7: 3.0}, 4))
    function = replace(scored("f", [1.0]), work=Work(elsewhere_s=1.5))
    inner = replace(scored("e", [1.0]), members=(first, second))
    whole = replace(scored("s", [1.0]), members=(inner, first, function))
    assert total_work(whole) == Work(0.25, {7: 3.0, 8: 1.0}, 14, 1.5)


def test_a_sum_that_overflows_names_its_sample() -> None:
    config = SumConfig(
        name="s", kind="sum", terms=(TermConfig(reward="a", weight=1e30), TermConfig(reward="b", weight=1.0))
    )
    fine = score_sum(config, [scored("a", [1e-30, 0]), scored("b", [2, 3])], query(2))
    assert fine.scores.tolist() == [3.0, 3.0]
    with pytest.raises(NonFiniteOutput) as caught:
        score_sum(config, [scored("a", [0, 1e30]), scored("b", [2, 3])], query(2))
    assert (caught.value.output, caught.value.sample) == ("score of 's'", 11)


def test_a_blank_response_that_a_process_model_has_no_token_of_is_the_callers_fault() -> None:
    """As of a tokenizer that takes white space, and so the separator, for nothing."""
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    codec = TokenizerCodec(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"))
    reader = Reader("steps", codec, 3, False, True, codec)
    one = encode_steps(Sample(0, TextContent("", "a\n\nb a")), (3, 6), "\n\n", reader)
    assert (one.tokens.tolist(), one.reads.tolist()) == ([1, 2, 1], [0, 2])
    with pytest.raises(InvalidArgument) as caught:
        encode_steps(Sample(4, TextContent("", "\n\n")), (2,), "\n\n", reader)
    assert vars(caught.value) == vars(
        InvalidArgument("texts.texts", "a text without a single token", "at least one token", 4)
    )


async def test_what_comes_too_late_is_not_begun() -> None:
    """Not even as a coroutine that nobody awaits, of which Python would warn."""
    begun: list[int] = []

    class Scorer:
        async def score(self, samples: Sequence[Sample], texts: Sequence[PlainText], query: Query, /) -> list[float]:
            del samples, query
            begun.append(len(texts))
            return [0.0] * len(texts)

    config = FunctionConfig(name="length", kind="function", function="length")
    reward = TextReward(
        config, Kind.FUNCTION, Scorer(), Runtime(cast(Scheduler[RewardItem, FloatArray], None), cast(Executor, None))
    )
    query = Query((Sample(0, TextContent("", "a")),), Truncation.NONE, ANONYMOUS_CALLER, time.monotonic() - 1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(DeadlineExceeded):
            await reward.score(query)
        gc.collect()
    assert (begun, told) == ([], [])
