"""Prompts: reading, cutting, splitting, and an order that (seed, step) decides alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from ppod import ChatTurn
from ppod_models.chat_template import ChatTemplateError
from ppod_trainer.assembly import _load_prompts
from ppod_trainer.config import PromptsConfig, TrainerConfig
from ppod_trainer.environments import Reply
from ppod_trainer.environments.calls import EnvironmentCalls
from ppod_trainer.environments.loading import LoadedEnvironment
from ppod_trainer.errors import PromptError
from ppod_trainer.prompts import (
    Prompt,
    PromptSet,
    check_lengths,
    check_readers,
    load_prompts,
    references_of,
    split_episodes,
)
from support.processes import ROOT

SUMS = ROOT / "trainer" / "ppod_trainer" / "data" / "sums.jsonl"


def encode(text: str) -> list[int]:
    return [ord(character) for character in text]


def render(messages: Sequence[Mapping[str, str]]) -> str:
    if messages[0]["role"] == "tool":
        raise ChatTemplateError("no tools")
    return "".join(f"<{one['role']}>{one['content']}" for one in messages) + "<assistant>"


def write(tmp_path: Path, name: str, content: str) -> Path:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return path


def test_equal_prompts_count_once_and_never_straddle_the_split(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "\n".join(["abcX", "abcY", "bcd", "cde", "def"]))
    prompts = load_prompts(PromptsConfig(path=path, first_tokens=3, heldout=2), encode, render)
    training = {tuple(prompt.token_ids) for prompt in prompts.training}
    heldout = {tuple(prompt.token_ids) for prompt in prompts.heldout}
    assert (len(training), len(heldout)) == (2, 2)
    assert training | heldout == {(97, 98, 99), (98, 99, 100), (99, 100, 101), (100, 101, 102)}


class Guessing:
    """Thinks of a number, of which its prompt says nothing."""

    def reset(self, seed: int) -> str:
        self.number = seed
        return "Guess."

    def step(self, action: str) -> Reply:
        return Reply("", float(action == str(self.number)), done=True)


def test_episodes_that_begin_alike_count_each() -> None:
    """The seed, not the prompt, tells one episode from another."""
    environments = EnvironmentCalls(LoadedEnvironment(Guessing, ()), threads=1)
    values = {"environment": {"name": "guessing", "episodes": 10}, "prompts": {"heldout": 3}}
    prompts = _load_prompts(TrainerConfig.model_validate(values), environments, encode, render)
    assert (len(prompts.training), len(prompts.heldout)) == (7, 3)
    assert sorted(prompt.index for prompt in [*prompts.training, *prompts.heldout]) == list(range(10))
    with pytest.raises(PromptError, match="heldout is 10, but there are only 10 different episodes"):
        split_episodes(["Guess."] * 10, encode, heldout=10)


def test_no_episode_is_trained_on_that_begins_as_one_that_is_held_out() -> None:
    texts = ["even", "odd", "prime"] * 4
    prompts = split_episodes(texts, encode, heldout=1)
    [held] = prompts.heldout
    assert sorted(prompt.index for prompt in prompts.training) == [
        index for index, text in enumerate(texts) if text != texts[held.index]
    ]


def test_each_epoch_uses_every_prompt_once(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "\n".join("abcdefg"))
    prompts = load_prompts(PromptsConfig(path=path, heldout=1), encode, render)
    drawn = [prompt.index for step in range(4) for prompt in prompts.for_step(step, 3, seed=5)]
    assert sorted(drawn[:6]) == sorted(drawn[6:]) == sorted(prompt.index for prompt in prompts.training)
    assert drawn[:6] != drawn[6:]
    assert [p.index for p in prompts.for_step(2, 3, seed=5)] == drawn[6:9]
    assert [p.index for p in prompts.for_step(2, 3, seed=6)] != drawn[6:9]


def test_a_step_shuffles_an_epoch_once_and_not_for_each_of_its_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With half a million prompts a step of 512 was otherwise waited for for seconds."""
    shuffled: list[object] = []
    default_rng = np.random.default_rng

    def counted(key: list[int]) -> np.random.Generator:
        shuffled.append(key)
        return default_rng(key)

    prompts = PromptSet([Prompt(index, np.array([index], np.int32)) for index in range(40)], [])
    monkeypatch.setattr(np.random, "default_rng", counted)
    assert len(prompts.for_step(1, 32, seed=11)) == 32
    assert shuffled == [[11, 0], [11, 1]]


def test_prompts_of_ones_own_are_whole_unless_they_are_to_be_cut(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "a long question\nanother long question")
    for values, most in (({"path": path}, 21), ({"path": path, "first_tokens": 4}, 4)):
        prompts = load_prompts(PromptsConfig.model_validate({"heldout": 1, **values}), encode, render)
        assert max(len(prompt.token_ids) for prompt in [*prompts.training, *prompts.heldout]) == most
    assert PromptsConfig().first_tokens == 6, "reviews are no prompts"
    assert PromptsConfig(first_tokens=None).first_tokens is None
    assert TrainerConfig().prompts.first_tokens == 6


def test_reviews_are_the_default() -> None:
    prompts = load_prompts(PromptsConfig(heldout=64), encode, render)
    assert len(prompts.heldout) == 64
    assert len(prompts.training) > 1000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "good\n\nbad", "prompt 1 .*no tokens"),
        ("p.tsv", "id\tnote\n1\tx", "a column `text`"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}', "line 2: found .*`prompt`"),
        ("p.jsonl", '{"prompt": "a"}\n{', "line 2: not JSON"),
        ("p.jsonl", '["a"]', "line 1: found .*`prompt`"),
        ("p.jsonl", '{"prompt": "a", "messages": []}', "line 1: found .*`messages`, each with `role` and `content`"),
        ("p.jsonl", '{"messages": []}', "line 1: found .*`messages`"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', "line 1: found .*`role` and `content`"),
        ("p.jsonl", '{"messages": [{"role": "", "content": "a"}]}', "line 1: found .*`role` and `content`"),
        ("p.jsonl", '{"messages": [{"role": "tool", "content": ""}]}', "line 1: messages: .* cannot be asked so: no t"),
        (
            "p.jsonl",
            '{"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}',
            "line 1: messages: the last is the assistant's; end with what the policy is to answer",
        ),
        (
            "p.jsonl",
            '{"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}',
            "line 1: tool_calls: only `rol",
        ),
        (
            "p.jsonl",
            '{"messages": [{"role": "user", "content": "a"}], "tools": [{}]}',
            "line 1: tools: only `role` and",
        ),
        ("p.jsonl", '{"prompt": "a", "reference": 3}', "line 1: reference: found 3, expected a string"),
        ("p.jsonl", '{"prompt": "a", "reference": "1"}\n{"prompt": "b"}', "line 2: `reference` belongs to all lines"),
        (
            "p.jsonl",
            '{"prompt": "a", "reference": "1"}\n{"prompt": "b", "reference": "1"}\n{"prompt": "a", "reference": "2"}',
            "prompts 0 and 2 are equal, and their references are '1' and '2'",
        ),
        ("p.tsv", "text\treference\na\t1\nb", "line 3: it ends before the column `reference`"),
        pytest.param("p.tsv", "text\na\n\n" + "b" * 131_073, "line 4: field larger than field limit", id="long"),
        pytest.param("p.jsonl", '{"prompt": "a", "n": ' + "1" * 4301 + "}", "line 1: not JSON: Exceeds", id="digits"),
        ("p.txt", "a\nb", "heldout is 64, but there are only 2"),
        ("p.jsonl", '{"prompt": "a\\ud83d"}', r"prompt 0 .*: '.ud83d' at character 1 is no Unicode character"),
        ("p.jsonl", '{"prompt": "a", "reference": "\\ud83d"}', r"prompt 0 .* at character 0 is no Unicode character"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        load_prompts(PromptsConfig(path=write(tmp_path, name, content)), encode, render)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"none\.txt: cannot be read"):
        load_prompts(PromptsConfig(path=tmp_path / "none.txt"), encode, render)


def test_a_prompt_that_leaves_no_room_is_told_before_a_step_comes_to_it(tmp_path: Path) -> None:
    lines = write(tmp_path, "p.txt", "abc\nabcdefgh\nab\nabcde")
    for heldout in (1, 3):
        prompts = load_prompts(PromptsConfig(path=lines, first_tokens=None, heldout=heldout), encode, render)
        check_lengths(prompts, 9)
        with pytest.raises(PromptError, match="prompt 1 has 8 tokens, and generation takes 8, a response included"):
            check_lengths(prompts, 8)


def test_a_response_that_a_service_could_not_read_is_told_before_a_step_comes_to_it(tmp_path: Path) -> None:
    lines = write(tmp_path, "p.txt", "abc\nabcdefgh\nab")
    prompts = load_prompts(PromptsConfig(path=lines, first_tokens=None, heldout=1), encode, render)
    check_readers(prompts, 100, 4, "reward", 12)
    # Generation ends the response before.
    check_readers(prompts, 11, 4, "reward", 11)
    expected = (
        "prompt 1 has 8 tokens, its response up to 4; the reward service takes 11 together; lower rollout.max_tokens"
    )
    with pytest.raises(PromptError, match=expected):
        check_readers(prompts, 12, 4, "reward", 11)


def test_jsonl_and_tsv_are_read(tmp_path: Path) -> None:
    jsonl = write(tmp_path, "p.jsonl", '{"prompt": "ab"}\n{"prompt": "cd"}\n')
    tsv = write(tmp_path, "p.tsv", 'id\ttext\n1\t"Quoted" text\n2\tcd\n')
    for path, first in ((jsonl, "ab"), (tsv, '"Quoted" text')):
        prompts = load_prompts(PromptsConfig(path=path, first_tokens=None, heldout=1), encode, render)
        texts = {"".join(map(chr, prompt.token_ids)) for prompt in prompts.training + prompts.heldout}
        assert texts == {first, "cd"}


def test_other_prompts_have_another_fingerprint(tmp_path: Path) -> None:
    lines = ["a\t1", "b\t2", "c\t3"]
    changed = [
        [*lines, "d\t4"],
        lines[:2],
        ["b\t2", "a\t1", "c\t3"],
        ["a\t1", "b\t2", "c\t4"],
        ["a\t1", "b\t2", "d\t3"],
    ]
    found: list[str] = []
    for number, one in enumerate([lines, lines, *changed]):
        path = write(tmp_path, f"{number}.tsv", "\n".join(["text\treference", *one]))
        found.append(load_prompts(PromptsConfig(path=path, heldout=1), encode, render).fingerprint)
    assert found[0] == found[1]
    assert len(set(found)) == 1 + len(changed)


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    """Form feeds and Unicode's separators of lines are part of a text; Windows' newlines are newlines."""
    text = "a\x0cb\u2028c\u2029d\x85e"
    files = {
        "p.txt": f"{text}\r\nfg\r\n",
        "p.tsv": f"id\ttext\n1\t{text}\n2\tfg\n",
        "p.jsonl": f'{{"prompt": "{text}"}}\n{{"prompt": "fg"}}'.replace("\x0c", "\\f"),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content.encode())
        prompts = load_prompts(PromptsConfig(path=path, first_tokens=None, heldout=1), encode, render)
        texts = {"".join(map(chr, prompt.token_ids)) for prompt in prompts.training + prompts.heldout}
        assert texts == {text, "fg"}, name


def test_the_mark_that_windows_puts_before_utf_8_is_no_text(tmp_path: Path) -> None:
    files = {"p.txt": "ab\ncd", "p.tsv": "text\nab\ncd", "p.jsonl": '{"prompt": "ab"}\n{"prompt": "cd"}'}
    for name, content in files.items():
        path = tmp_path / name
        path.write_text(content, encoding="utf-8-sig")
        prompts = load_prompts(PromptsConfig(path=path, first_tokens=None, heldout=1), encode, render)
        texts = {"".join(map(chr, prompt.token_ids)) for prompt in prompts.training + prompts.heldout}
        assert texts == {"ab", "cd"}, name


def test_a_curriculum_begins_with_the_shortest_and_takes_in_longer_ones() -> None:
    """Ten prompts of 1 to 10 tokens, four steps: the shortest 2, 4, 6 and 8 at most, then all."""
    lengths = (7, 2, 9, 1, 5, 10, 3, 8, 4, 6)
    training = [Prompt(index, np.zeros(length, dtype=np.int32)) for index, length in enumerate(lengths)]
    prompts = PromptSet(training, [], curriculum_steps=4)
    for step, longest in enumerate((2, 4, 6, 8)):
        drawn = [len(one.token_ids) for seed in range(40) for one in prompts.for_step(step, 2, seed)]
        assert max(drawn) == longest
        assert len(set(drawn)) == longest
    plain = PromptSet(training, [])
    assert prompts.for_step(4, 2, seed=1) == plain.for_step(4, 2, seed=1)
    assert prompts.for_step(1, 2, seed=1) == prompts.for_step(1, 2, seed=1)
    # A step needs as many as it draws, and takes none twice while there are others.
    assert sorted(len(one.token_ids) for one in prompts.for_step(0, 5, seed=0)) == [1, 2, 3, 4, 5]
    assert len(prompts.for_step(0, 23, seed=0)) == 23


def test_conversations_are_rendered_and_never_cut(tmp_path: Path) -> None:
    system, asked, said = ({"role": r, "content": c} for r, c in (("system", "S"), ("user", "U"), ("assistant", "A")))
    lines = [[asked], [system, asked, said, asked]]
    path = write(tmp_path, "p.jsonl", "\n".join(json.dumps({"messages": line, "tools": None}) for line in lines))
    prompts = load_prompts(PromptsConfig(path=path, heldout=1), encode, render)
    turns = {"".join(map(chr, prompt.token_ids)): prompt.turns for prompt in prompts.training + prompts.heldout}
    assert {text: [(turn.role, turn.content) for turn in found] for text, found in turns.items()} == {
        "<user>U<assistant>": [("user", "U")],
        "<system>S<user>U<assistant>A<user>U<assistant>": [
            ("system", "S"),
            ("user", "U"),
            ("assistant", "A"),
            ("user", "U"),
        ],
    }
    with pytest.raises(PromptError, match="first_tokens is 4, which would cut conversations off"):
        load_prompts(PromptsConfig(path=path, heldout=1, first_tokens=4), encode, render)


def test_the_sums_of_the_package_have_their_right_answers() -> None:
    prompts = load_prompts(PromptsConfig(path=SUMS, heldout=64), encode, render)
    asked: set[frozenset[int]] = set()
    for prompt in prompts.training + prompts.heldout:
        [turn] = prompt.turns
        one, other = map(int, re.findall(r"\d+", turn.content))
        assert turn == ChatTurn("user", f"What is {one} + {other}? Answer with the number alone.")
        assert prompt.reference == str(one + other)
        asked.add(frozenset((one, other)))
    assert len(asked) == 300, "a sum that is held out is not trained on the other way round"


def test_references_stay_with_their_prompts(tmp_path: Path) -> None:
    records = [{"prompt": f"{number}+1", "reference": str(number + 1)} for number in range(8)]
    rows = ["id\treference\ttext", *(f"x\t{one['reference']}\t{one['prompt']}" for one in records)]
    for name, lines in {"p.jsonl": [*map(json.dumps, [*records, records[3]])], "p.tsv": rows}.items():
        prompts = load_prompts(PromptsConfig(path=write(tmp_path, name, "\n".join(lines)), heldout=3), encode, render)
        found = {"".join(map(chr, one.token_ids)): one.reference for one in prompts.training + prompts.heldout}
        assert found == {record["prompt"]: record["reference"] for record in records}
        assert references_of(prompts.heldout) == tuple(one.reference for one in prompts.heldout)
    assert references_of([Prompt(0, np.zeros(1, np.int32))]) == references_of([]) == ()
