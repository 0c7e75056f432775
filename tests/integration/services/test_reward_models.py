"""Reward models of transformers behind the service, against transformers itself, one sequence at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from ppod import InvalidArgument, Pin, RewardClient, Truncation
from ppod.v1 import reward_pb2
from support.processes import running_service
from support.services import tiny_model_config
from support.tiny_classifiers import add_unknown_tokens, save_decoder
from support.tiny_head import scores_alone
from support.tiny_model import build_tokenizer

from .conftest import Zoo
from .reward_calls import STEP, TOKEN, failure, floats, of_chats, of_texts, of_tokens, score, way_of, with_process

NOISE = 2e-5
EOS, PAD = 256, 257


@torch.no_grad()
def alone(directory: Path, ids: list[int]) -> float:
    """What transformers gives one sequence without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32)
    return float(model(input_ids=torch.tensor([ids])).logits[0, 0])


def ids_of(text: str) -> list[int]:
    return build_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_a_decoder_is_read_where_transformers_reads_it(zoo: Zoo) -> None:
    """At the last token that is no padding token: not at the end of the padded row, nor at padding that was sent."""
    sequences = [[5, 6, 7, 8, 9], [40], [10, 20, EOS], [10, 20, EOS, PAD, PAD]]
    expected = [alone(zoo.decoder, ids) for ids in sequences]
    assert abs(expected[2] - alone(zoo.decoder, [10, 20])) > 100 * NOISE
    reply = score(zoo.service, of_tokens(sequences), "decoder")
    assert floats(reply.scores) == pytest.approx(expected, abs=NOISE)
    assert expected[2] == pytest.approx(expected[3], abs=NOISE)


def test_an_encoder_gets_its_special_tokens_and_nothing_is_cut(zoo: Zoo) -> None:
    texts = ["a short one", "one that is longer than the eight tokens at which its tokenizer would cut"]
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(zoo.encoder)
    whole = [tokenizer(text, truncation=False)["input_ids"] for text in texts]
    assert (whole[0][0], whole[0][-1], len(whole[1])) == (0, 1, len(texts[1]) + 2)
    reply = score(zoo.service, of_texts(texts), "encoder")
    assert floats(reply.scores) == pytest.approx([alone(zoo.encoder, ids) for ids in whole], abs=NOISE)
    too_long = failure(zoo.service, of_texts(["x" * 200]), "encoder")
    assert isinstance(too_long, InvalidArgument)
    assert "202 tokens" in too_long.found


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_is_cut_between_the_special_tokens_as_transformers_cuts_it(zoo: Zoo, side: str) -> None:
    text = "the quick brown fox jumps over the lazy dog " * 4
    tokenizer = AutoTokenizer.from_pretrained(zoo.encoder, truncation_side=side)
    ids = tokenizer(text, truncation=True, max_length=96)["input_ids"]
    assert (len(ids), ids[0], ids[-1]) == (96, 0, 1)
    with RewardClient(zoo.service.target, pin=Pin(model="encoder")) as client:
        scores = client.score_texts([text], truncation=Truncation[side.upper()])
    assert scores.values == pytest.approx([alone(zoo.encoder, ids)], abs=NOISE)
    assert scores.truncated_tokens == (len(text) + 2 - 96,)


def test_a_text_with_a_token_that_its_model_lacks_is_refused_and_harms_nobody(tmp_path: Path) -> None:
    """Tokenizers with a padding token that was added later make ids that the model has no embedding for."""
    decoder = save_decoder(tmp_path / "decoder")
    unknown = add_unknown_tokens(decoder)
    rewards = [{"name": "decoder", "kind": "sequence_classification", "model": tiny_model_config(decoder)}]
    with running_service("ppod_services.reward", tmp_path, {"rewards": rewards}) as service:
        for request, field in (
            (of_texts(["fine", f"a {unknown}"]), "texts"),
            (of_chats([("user", "fine")], [("user", unknown)]), "conversations"),
        ):
            refused = failure(service, request)
            assert isinstance(refused, InvalidArgument)
            assert (refused.field, refused.sample) == (field, 1)
            assert "the model of 'decoder' has no others" in refused.expected
        assert floats(score(service, of_texts(["fine"])).scores)


def test_token_ids_reach_a_member_with_another_tokenizer_as_text(zoo: Zoo) -> None:
    texts = ["hello", "wörld ✓"]
    by_text = score(zoo.service, of_texts(texts), "encoder")
    by_tokens = score(zoo.service, of_tokens([ids_of(text) for text in texts]), "retokenised")
    assert floats(by_tokens.scores) == pytest.approx(floats(by_text.scores), abs=NOISE)
    first, encoder = by_tokens.breakdown.members
    assert first.model.tokenizer_fingerprint == by_tokens.model.tokenizer_fingerprint
    assert encoder.model.tokenizer_fingerprint != by_tokens.model.tokenizer_fingerprint


def test_token_ids_with_their_turns_reach_a_member_with_another_tokenizer_as_a_conversation(zoo: Zoo) -> None:
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "more")]
    request = of_tokens([ids_of("<otherwise>wörld ✓"), ids_of("plain answer")], [len("<otherwise>"), len("plain ")])
    request.prompts.conversations.extend([*of_chats(turns).conversations.conversations, reward_pb2.Conversation()])
    by_tokens = score(zoo.service, request, "retokenised")
    first, encoder = by_tokens.breakdown.members
    by_chat = score(zoo.service, of_chats([*turns, ("assistant", "wörld ✓")]), "encoder")
    by_text = score(zoo.service, of_texts(["plain answer"]), "encoder")
    expected = floats(by_chat.scores) + floats(by_text.scores)
    assert floats(encoder.scores) == pytest.approx(expected, abs=NOISE)
    whole = score(zoo.service, of_texts(["<otherwise>wörld ✓", "plain answer"]), "first")
    assert floats(first.scores) == pytest.approx(floats(whole.scores), abs=NOISE)


def test_prompt_and_response_are_read_as_one(zoo: Zoo) -> None:
    apart = score(zoo.service, of_texts(["yes", "no"], ["is it? ", "was it? "]), "first")
    joined = score(zoo.service, of_texts(["is it? yes", "was it? no"]), "first")
    assert apart.scores == joined.scores


def test_conversations_get_the_template_of_each_model(zoo: Zoo) -> None:
    chat = [("user", "hi"), ("assistant", "hello")]
    reply = score(zoo.service, of_chats(chat, chat[:1]), "decoder")
    expected = [alone(zoo.decoder, ids_of("[user]hi[assistant]hello")), alone(zoo.decoder, ids_of("[user]hi"))]
    assert floats(reply.scores) == pytest.approx(expected, abs=NOISE)
    refused = failure(zoo.service, of_chats(chat, [("tool", "x")]), "decoder")
    assert isinstance(refused, InvalidArgument)
    assert (refused.field, refused.sample) == ("conversations", 1)
    assert "no role tool" in refused.found
    without = failure(zoo.service, of_chats(chat), "first")
    assert isinstance(without, InvalidArgument)
    assert "no chat template" in without.found
    # A process reward model reads what stands before the last turn by itself: here nothing.
    lone = failure(zoo.service, of_chats(chat, chat[1:]), "process")
    assert isinstance(lone, InvalidArgument)
    assert (lone.field, lone.sample) == ("conversations", 1)
    assert "empty conversation" in lone.found


@torch.no_grad()
def good_steps(directory: Path, prompt: str, steps: list[str], separator: str) -> list[float]:
    """Probabilities of good steps, one forward for each: a prefix of the sequence as TRL's PRMTrainer tokenises it."""
    model = AutoModelForTokenClassification.from_pretrained(directory, dtype=torch.float32)
    ids = ids_of(prompt)
    found: list[float] = []
    for step in steps:
        ids = [*ids, *ids_of(step), *ids_of(separator)]
        found.append(float(model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[1]))
    return found


def test_a_process_model_scores_steps_as_trl_trains_them(zoo: Zoo) -> None:
    steps = [["two and two", "is four", "done"], ["nothing"]]
    expected = [good_steps(zoo.process, "sum? ", one, "\n\n") for one in steps]
    texts = ["two and two\n\nis four\n\ndone", "nothing\n\n"]
    by_text = score(zoo.service, with_process(of_texts(texts, ["sum? "] * 2), STEP), "process")
    assert floats(by_text.scores) == pytest.approx([min(one) for one in expected], abs=NOISE)
    assert [[p for p, _ in one] for one in way_of(by_text)] == [[13, 22, 26], [9]]
    for one, wanted in zip(way_of(by_text), expected, strict=True):
        assert [value for _, value in one] == pytest.approx(wanted, abs=NOISE)
    tokens = of_tokens([ids_of("sum? " + text) for text in texts], [5, 5])
    by_tokens = score(zoo.service, with_process(tokens, STEP), "process")
    assert floats(by_tokens.scores) == pytest.approx(floats(by_text.scores), abs=NOISE)
    assert [[p for p, _ in one] for one in way_of(by_tokens)] == [[18, 27, 31], [14]]
    chat = score(zoo.service, of_chats([("user", "sum? "), ("assistant", texts[0])]), "process")
    rendered = good_steps(zoo.process, "[user]sum? [assistant]", steps[0], "\n\n")
    assert floats(chat.scores) == pytest.approx([min(rendered)], abs=NOISE)


def test_the_way_of_a_head_is_the_score_of_each_prefix(zoo: Zoo) -> None:
    ids = ids_of("ask: one\ntwo\nthree")
    ends = [9, 13, 18]
    expected = scores_alone(zoo.trunk, zoo.heads["first"], [ids[:end] for end in ends])
    reply = score(zoo.service, with_process(of_tokens([ids, ids[:7]], [5, 5]), STEP), "first")
    [way, short] = way_of(reply)
    assert [position for position, _ in way] == ends
    assert [value for _, value in way] == pytest.approx(expected, abs=NOISE)
    assert [position for position, _ in short] == [7]
    assert floats(reply.scores) == [way[-1][1], short[-1][1]]
    by_text = score(zoo.service, with_process(of_texts(["one\ntwo\nthree"], ["ask: "]), STEP), "first")
    assert [position for position, _ in way_of(by_text)[0]] == [4, 8, 13]
    assert [value for _, value in way_of(by_text)[0]] == pytest.approx(expected, abs=NOISE)


def test_every_token_of_a_decoder_in_one_forward_equals_its_prefixes(zoo: Zoo) -> None:
    ids = [11, 22, 33, 44, 55]
    reply = score(zoo.service, with_process(of_tokens([ids, [9, 8]], [2, 1]), TOKEN), "decoder")
    [way, short] = way_of(reply)
    assert [position for position, _ in way] == [3, 4, 5]
    assert [position for position, _ in short] == [2]
    assert [value for _, value in way] == pytest.approx([alone(zoo.decoder, ids[:end]) for end in (3, 4, 5)], abs=NOISE)
    # Prefixes apart would have cost 3 + 4 + 5 + 2 tokens.
    assert reply.timing.tokens == 7
    head = score(zoo.service, with_process(of_tokens([ids], [2]), TOKEN), "first")
    # So does a head, which here has no suffix to put behind each.
    assert head.timing.tokens == 5


def test_an_interval_counts_tokens(zoo: Zoo) -> None:
    request = with_process(of_tokens([[11, 22, 33, 44, 55, 66]], [2]), TOKEN)
    every = dict(way_of(score(zoo.service, request, "first"))[0])
    request.process_interval = 2
    [way] = way_of(score(zoo.service, request, "first"))
    assert [end for end, _ in way] == [3, 5, 6]
    assert [value for _, value in way] == pytest.approx([every[end] for end in (3, 5, 6)], abs=NOISE)
    request.process = STEP
    refused = failure(zoo.service, request, "first")
    assert isinstance(refused, InvalidArgument)
    assert "process_interval" in str(refused)
    with RewardClient(zoo.service.target) as client, pytest.raises(InvalidArgument, match="process: found 0"):
        client.score([[1, 2]], process=0)


def test_a_sum_asks_its_members_at_its_own_steps(zoo: Zoo) -> None:
    request = with_process(of_texts(["one\ntwo"]), STEP)
    reply = score(zoo.service, request, "stepwise")
    first = [value for _, value in way_of(score(zoo.service, request, "first"))[0]]
    # The sum's steps end at "\n"; the process model's own end at "\n\n", so it saw one step for its score.
    process = good_steps(zoo.process, "", ["one\n", "two"], "\n\n")
    expected = [a + 3 * b for a, b in zip(first, process, strict=True)]
    assert [value for _, value in way_of(reply)[0]] == pytest.approx(expected, abs=5 * NOISE)
    whole = good_steps(zoo.process, "", ["one\ntwo"], "\n\n")
    assert floats(reply.breakdown.members[1].scores) == pytest.approx(whole, abs=NOISE)


def test_tokens_that_a_process_model_does_not_know_are_the_fault_of_the_request(zoo: Zoo) -> None:
    """A caller who left the named sample out and asked again would leave out one after the other."""
    refused = failure(zoo.service, with_process(of_tokens([[1, 2], [3, 4]], [1, 1]), TOKEN), "stepwise")
    assert isinstance(refused, InvalidArgument)
    assert (refused.field, refused.sample) == ("process", None)
    assert "of the tokenizer of 'process', or granularity STEP" in str(refused)


def test_normalised_and_clipped_scores_come_with_what_they_were(zoo: Zoo) -> None:
    request = of_tokens([[10], [1, 2, 3], [7, 7]])
    raw = np.asarray(floats(score(zoo.service, request, "first").scores))
    reply = score(zoo.service, request, "scaled")
    assert floats(reply.breakdown.raw_scores) == raw.tolist()
    expected = np.clip((raw - 0.25) / 2.0, -0.1, 0.1).astype(np.float32)
    assert floats(reply.scores) == expected.tolist()
    adjustment = reply.breakdown.adjustment
    assert (adjustment.mean, adjustment.std, adjustment.clip_low, adjustment.clip_high) == (0.25, 2.0, -0.1, 0.1)
    plain = score(zoo.service, request, "first").breakdown
    assert not plain.HasField("adjustment")
    assert plain.raw_scores == b""


def test_texts_up_to_each_step_that_no_memory_holds_are_refused_at_once(zoo: Zoo) -> None:
    """One megabyte of 16,000 steps is eight gigabytes of beginnings."""
    text = "x" * 63 + "\n"
    refused = failure(zoo.service, with_process(of_texts([text * 16_000]), STEP), "decoder")
    assert isinstance(refused, InvalidArgument)
    assert (refused.field, refused.found) == ("process", "8192512000 characters in the texts up to each step")


def test_a_request_id_that_nobody_could_keep_is_refused(zoo: Zoo) -> None:
    request = of_texts(["fine"])
    for length, taken in ((256, True), (257, False)):
        request.request_id = "x" * length
        if taken:
            assert floats(score(zoo.service, request, "decoder").scores)
        else:
            refused = failure(zoo.service, request, "decoder")
            assert isinstance(refused, InvalidArgument)
            assert str(refused) == "request_id: found 257 characters, expected at most 256"
