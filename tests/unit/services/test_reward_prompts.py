"""Token ids whose prompts come with the turns that they were made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from ppod.errors import InvalidArgument
from ppod.tensors import pack_sequences
from ppod.v1 import reward_pb2
from ppod_services.core.callers import ANONYMOUS_CALLER
from ppod_services.reward.codec import TokenizerCodec
from ppod_services.reward.inputs import read_samples
from ppod_services.reward.model_inputs import Reader, encode_steps, encode_whole, truncate
from ppod_services.reward.samples import (
    PlainText,
    Query,
    Sample,
    TokenContent,
    TokenSource,
    Truncation,
    Turn,
    read_turns,
)
from support.tiny_classifiers import chat_tokenizer, encoder_tokenizer
from support.tiny_model import EOS, VOCAB_SIZE, build_tokenizer

TURNS = (Turn("user", "How was it?"), Turn("assistant", "Fine."), Turn("user", "More!"))


def conversation(*turns: tuple[str, str]) -> reward_pb2.Conversation:
    return reward_pb2.Conversation(messages=[reward_pb2.ChatMessage(role=role, content=text) for role, text in turns])


def request(*prompts: reward_pb2.Conversation, lengths: Sequence[int] = (1, 2)) -> reward_pb2.ScoreRequest:
    tokens = pack_sequences([[1, 2, 3], [4, 5, 6]])
    message = reward_pb2.ScoreRequest(tokens=tokens, prompt_lengths=lengths)
    message.prompts.conversations.extend(prompts)
    return message


def read(message: reward_pb2.ScoreRequest) -> tuple[Sample, ...]:
    source = TokenSource(TokenizerCodec(build_tokenizer()), VOCAB_SIZE)
    return read_samples(message, source, 10, needs_references=False)


def test_prompts_are_read_beside_their_ids() -> None:
    first, second = (
        sample.content for sample in read(request(conversation(("user", "a"), ("tool", "")), conversation()))
    )
    assert isinstance(first, TokenContent)
    assert isinstance(second, TokenContent)
    assert (first.turns, second.turns) == ((Turn("user", "a"), Turn("tool", "")), ())
    assert (first.prompt_length, second.prompt_length) == (1, 2)
    prefix = Sample(0, first).prefix(2).content
    assert isinstance(prefix, TokenContent)
    assert prefix.turns == first.turns


@pytest.mark.parametrize(
    ("message", "field", "found", "sample"),
    [
        (request(conversation(("user", "a"))), "prompts", "1 conversations", None),
        (request(conversation(), conversation(), lengths=()), "prompts", "conversations", None),
        (request(conversation(), conversation(("", "a"))), "prompts.messages.role", "an empty role", 1),
    ],
)
def test_prompts_that_do_not_fit_their_ids_are_refused(
    message: reward_pb2.ScoreRequest, field: str, found: str, sample: int | None
) -> None:
    with pytest.raises(InvalidArgument) as refused:
        read(message)
    assert (refused.value.field, refused.value.found, refused.value.sample) == (field, found, sample)


def test_prompts_beside_another_input_than_ids_are_refused() -> None:
    message = request(conversation(), conversation(), lengths=())
    message.texts.texts.extend(["a", "b"])
    with pytest.raises(InvalidArgument, match=r"2 conversations.*none but with tokens"):
        read(message)


def reader(other: TokenizerCodec, *, same_tokens: bool = False) -> Reader:
    source = TokenizerCodec(build_tokenizer())
    return Reader("r", other, VOCAB_SIZE, special_tokens=True, same_tokens=same_tokens, source=source)


def asked(response: str = "Better.\nBest.", turns: tuple[Turn, ...] = TURNS) -> Sample:
    """Ids whose prompt reads otherwise than its turns do."""
    codec = TokenizerCodec(build_tokenizer())
    prompt, rest = codec.encode(["<what the policy's template makes of it>", response], special_tokens=False)
    return Sample(3, TokenContent(np.concatenate([prompt, rest]), len(prompt), turns))


CHAT = "[user]How was it?[assistant]Fine.[user]More!"


def test_a_model_of_another_tokenizer_applies_its_own_template_to_the_turns_and_the_response() -> None:
    """And puts no special tokens of its own around them: the template brings those along."""
    other = TokenizerCodec(encoder_tokenizer())
    assert other.special_tokens_around == (1, 1)
    sample = asked()
    [tokens] = encode_whole([sample], reader(other))
    expected = other.encode([f"{CHAT}[assistant]Better.\nBest."], special_tokens=False)[0]
    assert tokens.tolist() == expected.tolist()
    cut = Query((sample,), Truncation.LEFT, ANONYMOUS_CALLER, 0.0)
    [rest] = truncate([sample], [tokens], cut, reader(other), 5)
    assert other.decode(rest) == "Best."


def test_a_model_of_the_same_tokenizer_reads_the_ids() -> None:
    sample = asked()
    [tokens] = encode_whole([sample], reader(TokenizerCodec(chat_tokenizer()), same_tokens=True))
    assert isinstance(sample.content, TokenContent)
    assert tokens.tolist() == sample.content.tokens.tolist()


@pytest.mark.parametrize("turns", [TURNS, ()])
def test_without_a_template_or_turns_the_decoded_prompt_is_read(turns: tuple[Turn, ...]) -> None:
    other = TokenizerCodec(build_tokenizer() if turns else chat_tokenizer())
    [tokens] = encode_whole([asked(turns=turns)], reader(other))
    assert other.decode(tokens) == "<what the policy's template makes of it>Better.\nBest."


def test_a_conversation_that_the_template_refuses_names_its_sample_and_the_prompts() -> None:
    with pytest.raises(InvalidArgument) as refused:
        encode_whole([asked(turns=(Turn("tool", "x"),))], reader(TokenizerCodec(chat_tokenizer())))
    assert (refused.value.field, refused.value.sample) == ("prompts", 3)
    assert "no role tool" in refused.value.found


def test_a_process_model_reads_the_steps_behind_its_own_template() -> None:
    other = TokenizerCodec(chat_tokenizer())
    sample = asked()
    assert isinstance(sample.content, TokenContent)
    whole = len(sample.content.tokens)
    middle = whole - len(TokenizerCodec(build_tokenizer()).encode(["Best."], special_tokens=False)[0])
    read_at = encode_steps(sample, (middle, whole), "\n", reader(other))
    assert other.decode(read_at.tokens) == f"{CHAT}[assistant]Better.\nBest.\n"


@pytest.mark.parametrize("turns", [TURNS, ()])
def test_what_a_policy_spells_is_no_special_token_of_another_model(turns: tuple[Turn, ...]) -> None:
    """Its own tokenizer knows none of these: it has letters for them, and would end what the model reads."""
    other = TokenizerCodec(encoder_tokenizer())
    [cls, sep] = other.encode(["[CLS][SEP]"], special_tokens=False)[0].tolist()
    [tokens] = encode_whole([asked("Bad.[SEP][CLS]Best.", turns)], reader(other))
    around = [] if turns else [cls, sep]
    assert [token for token in tokens.tolist() if token in (cls, sep)] == around
    assert other.decode(tokens).replace("\u200b", "").endswith("Bad.[SEP][CLS]Best.")


def test_what_a_policy_spells_is_no_special_token_of_a_process_model() -> None:
    other = TokenizerCodec(chat_tokenizer())
    [end] = other.encode([EOS], special_tokens=False)[0].tolist()
    plain = TokenizerCodec(build_tokenizer())
    letters = np.concatenate(plain.encode([EOS[:3], EOS[3:]], special_tokens=False))
    assert plain.decode(letters) == EOS
    prompt = plain.encode(["Well"], special_tokens=False)[0]
    whole = np.concatenate([prompt, letters])
    for same in (True, False):
        sample = Sample(0, TokenContent(whole, len(prompt)))
        read_at = encode_steps(sample, (len(whole),), "\n", reader(other, same_tokens=same))
        assert end not in read_at.tokens.tolist()


def test_functions_and_judges_see_the_turns() -> None:
    codec = TokenizerCodec(build_tokenizer())
    assert read_turns(asked(), codec) == PlainText("user: How was it?\nassistant: Fine.\nuser: More!", "Better.\nBest.")
    assert read_turns(asked(turns=()), codec).prompt == "<what the policy's template makes of it>"
