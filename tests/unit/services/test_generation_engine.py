"""Sequences that join, leave, share a prompt and outlive their weights, against each of them alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from ppod.errors import NonFiniteOutput
from ppod_services.generation.requests import Ending, GeneratedSample, GenerationItem, TokenFilter, VersionSpan
from support.generation_engine import Bench, StepSink, item, load_bench
from support.recomputed import next_logits
from support.tiny_model import NAN_TOKEN, build_longrope_model, build_model, save_longrope_model, save_tiny_model

MODEL = build_model()


@pytest.fixture(scope="module")
def bench(tiny_model_dir: Path) -> Bench:
    return load_bench(tiny_model_dir)


def tokens_of(sample: GeneratedSample) -> list[int]:
    return sample.tokens.tolist()


def check_logprobs(prompt: Sequence[int], sample: GeneratedSample, model: torch.nn.Module = MODEL) -> None:
    """Each logprob is the one that a full forward gives."""
    tokens = tokens_of(sample)
    expected = torch.log_softmax(next_logits(model, prompt, tokens), dim=-1)[range(len(tokens)), tokens]
    np.testing.assert_allclose(sample.logprobs, expected.numpy(), atol=2e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_crowd_gets_what_each_gets_alone(tiny_model_dir: Path, attention: str) -> None:
    """Prompts and completions of all lengths, joining at all times: buffers grow and rows move underneath."""
    bench = load_bench(tiny_model_dir, attention=attention)
    assert bench.model.model.config._attn_implementation == f"ppod_slots_{attention}"  # pyright: ignore
    rng = np.random.default_rng(0)
    items = [
        item(rng.integers(0, 250, size=length), seed, most)
        for seed, (length, most) in enumerate(
            zip(rng.integers(1, 70, size=24), rng.integers(1, 50, size=24), strict=True)
        )
    ]
    sink = bench.run(items[:6], StepSink(joining={1: items[6:9], 4: items[9:20], 30: items[20:24]}))
    assert not sink.errors
    assert sorted(sink.samples) == list(range(24))
    for position, wanted in enumerate(items):
        sample = sink.samples[position]
        assert (sample.ending, len(sample.tokens)) == (Ending.LENGTH, wanted.max_tokens)
        assert tokens_of(sample) == tokens_of(bench.alone(wanted))
        check_logprobs(wanted.prompt.tolist(), sample)


def test_a_model_whose_frequencies_change_with_the_length_takes_none_at_which_they_do(tmp_path: Path) -> None:
    """With LongRoPE one that is longer than 24 tokens would change all others in its batch, by nats."""
    bench = load_bench(save_longrope_model(tmp_path, 24))
    assert bench.model.info.max_sequence_tokens == 24
    items = [item(range(5), 1, 19), item([7], 2, 23), item(range(23), 3, 1)]
    sink = bench.run(items)
    for position, wanted in enumerate(items):
        check_logprobs(wanted.prompt.tolist(), sink.samples[position], build_longrope_model(24))


def test_short_ones_are_answered_first_and_make_room(bench: Bench) -> None:
    items = [item([7], 1, 9), item([8], 2, 3), item([9], 3, 6)]
    sink = bench.run(items, StepSink(joining={3: [item([10], 4, 2)]}))
    assert sink.order == [1, 3, 2, 0]
    assert sink.steps == 9


def test_one_who_has_gone_costs_no_further_step(bench: Bench) -> None:
    sink = StepSink(gone={0})
    bench.run([item([7], 1, 100), item([8], 2, 3)], sink)
    assert sink.order == [1]
    assert sink.steps == 3


class CountedPrompts:
    """Counts the prompt tokens that a decoder runs."""

    def __init__(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs: list[list[int]] = []
        prefill, extend = bench.decoder.prefill, bench.decoder.extend

        def counted_prefill(prompts: Sequence[np.ndarray]) -> object:
            self.runs.append([len(prompt) for prompt in prompts])
            return prefill(prompts)

        def counted_extend(before: object, prompt: np.ndarray, tokens: int) -> object:
            after = extend(before, prompt, tokens)  # pyright: ignore
            self.runs.append([after.done[0]])
            return after

        monkeypatch.setattr(bench.decoder, "prefill", counted_prefill, raising=True)
        monkeypatch.setattr(bench.decoder, "extend", counted_extend, raising=True)


@pytest.fixture
def counted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> CountedPrompts:
    return CountedPrompts(bench, monkeypatch)


def siblings(prompt: Sequence[int], seeds: Sequence[int], max_tokens: int = 12) -> list[GenerationItem]:
    """Completions of one prompt, which is the same array in all."""
    first = item(prompt, seeds[0], max_tokens)
    return [dataclasses.replace(first, seed=seed, sample=sample) for sample, seed in enumerate(seeds)]


def test_siblings_run_their_prompt_once(bench: Bench, counted: CountedPrompts) -> None:
    family = siblings([5, 6, 7, 8], [1, 2, 3, 4, 5])
    other = item([5, 6, 7, 8], 6, 12)
    sink = bench.run([*family[:3], other], StepSink(joining={2: family[3:4], 4: family[4:]}))
    assert counted.runs == [[4, 4]]
    for position, wanted in enumerate([*family[:3], other, *family[3:]]):
        assert tokens_of(sink.samples[position]) == tokens_of(bench.alone(wanted))
        check_logprobs([5, 6, 7, 8], sink.samples[position])
    assert len({tuple(tokens_of(sample)) for sample in sink.samples.values()}) == 6


def test_a_prompt_of_one_token_is_shared_too(bench: Bench, counted: CountedPrompts) -> None:
    family = siblings([9], [1, 2])
    sink = bench.run(family[:1], StepSink(joining={1: family[1:]}))
    assert counted.runs == [[1]]
    check_logprobs([9], sink.samples[1])


def test_prompts_of_old_weights_are_not_shared(bench: Bench, counted: CountedPrompts) -> None:
    family = siblings([5, 6, 7], [1, 2])

    def swap() -> bool:
        bench.weights.version += 1
        return False

    bench.run(family[:1], StepSink(joining={2: family[1:]}, pauses={2: swap}))
    assert counted.runs == [[3], [3]]


def test_long_prompts_do_not_hold_up_those_who_decode(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load_bench(tiny_model_dir, prefill_tokens=16)
    counted = CountedPrompts(bench, monkeypatch)
    early, long, short = item([7], 1, 30), item(range(1, 41), 2, 5), item([8, 9], 3, 5)
    sink = bench.run([early], StepSink(joining={1: [long, short]}))
    assert counted.runs == [[1], [2], [16], [32], [40]]
    for position, wanted in enumerate((early, long, short)):
        assert tokens_of(sink.samples[position]) == tokens_of(bench.alone(wanted))
        check_logprobs(wanted.prompt.tolist(), sink.samples[position])


def test_prompts_go_together_while_padding_is_cheap(bench: Bench, counted: CountedPrompts) -> None:
    sink = bench.run([item([3] * length, 1, 5) for length in (100, 2, 4, 3, 90)])
    assert counted.runs == [[2, 3, 4], [90, 100]]
    assert sink.steps == 5, "those who begin together are finished together"


def test_an_abort_hands_back_all_as_they_are(tiny_model_dir: Path) -> None:
    bench = load_bench(tiny_model_dir, prefill_tokens=8)
    items = [item([5, 6], 1, 20), item([7], 2, 2), item(range(1, 31), 3, 20)]
    sink = bench.run(items[:2], StepSink(joining={3: items[2:]}, pauses={5: lambda: True}))
    assert sink.steps == 5
    begun, finished, waiting = (sink.samples[position] for position in range(3))
    assert (begun.ending, finished.ending, waiting.ending) == (Ending.ABORTED, Ending.LENGTH, Ending.ABORTED)
    assert tokens_of(begun) == tokens_of(bench.alone(items[0]))[:5]
    assert begun.spans == (VersionSpan(0, 5),)
    assert (len(waiting.tokens), len(waiting.logprobs), waiting.spans, waiting.weight_version) == (0, 0, (), 0)
    assert tokens_of(bench.alone(items[0]))[5:] == tokens_of(
        bench.alone(item([5, 6, *tokens_of(begun)], 1, 15, resumed=5))
    )


def swapped(bench: Bench, model: torch.nn.Module) -> None:
    """Put other weights into the engine's model, in place, as a commit does."""
    with torch.no_grad():
        for name, parameter in bench.model.model.named_parameters():
            parameter.copy_(model.get_parameter(name))
    bench.weights.version += 1


@torch.no_grad()
def greedy_across_swap(prompt: list[int], before: int, total: int, models: Sequence[torch.nn.Module]) -> list[int]:
    """Greedy tokens where the weights change after `before` of them, and cached keys stay those of the old ones."""
    tokens: list[int] = []
    cache = None
    feed = list(prompt)
    for count in range(total):
        model = models[0] if count < before else models[1]
        output = model(torch.tensor([feed]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tokens.append(int(output.logits[0, -1].argmax()))
        feed = tokens[-1:]
    return tokens


def test_kept_sequences_go_on_with_new_weights_on_old_keys(tiny_model_dir: Path) -> None:
    bench = load_bench(tiny_model_dir)
    new = build_model(seed=5)
    greedy = TokenFilter(temperature=0.0)
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14]]
    items = [item(prompt, 0, 12, token_filter=greedy) for prompt in prompts[:2]]
    items += [item(prompts[2], 0, 4, token_filter=greedy)]

    def swap() -> bool:
        swapped(bench, new)
        return False

    sink = bench.run(items, StepSink(pauses={6: swap}))
    for position, prompt in enumerate(prompts[:2]):
        sample = sink.samples[position]
        assert tokens_of(sample) == greedy_across_swap(prompt, 6, 12, (MODEL, new))
        assert sample.spans == (VersionSpan(0, 6), VersionSpan(1, 6))
        assert sample.weight_version == 1
    assert sink.samples[2].spans == (VersionSpan(0, 4),)
    after = bench.run(items[:1]).samples[0]
    assert after.spans == (VersionSpan(1, 12),)
    assert tokens_of(after) == greedy_across_swap(prompts[0], 0, 12, (new, new))


def test_whoever_insists_on_the_old_version_is_handed_back(tiny_model_dir: Path) -> None:
    bench = load_bench(tiny_model_dir, prefill_tokens=8)
    pinned, free = item([5, 6], 1, 20, weight_version=0), item([5, 6], 1, 20)
    waiting = item(range(1, 31), 2, 20, weight_version=0)
    late = item([7], 3, 5, weight_version=0)

    def swap() -> bool:
        swapped(bench, build_model(seed=5))
        return False

    sink = bench.run([free, pinned], StepSink(joining={3: [waiting], 8: [late]}, pauses={5: swap}))
    assert sink.samples[0].ending is Ending.LENGTH
    assert sink.samples[0].spans == (VersionSpan(0, 5), VersionSpan(1, 15))
    back = sink.samples[1]
    assert (back.ending, back.spans, back.weight_version) == (Ending.ABORTED, (VersionSpan(0, 5),), 0)
    assert tokens_of(back) == tokens_of(sink.samples[0])[:5]
    for position in (2, 3):
        empty = sink.samples[position]
        assert (empty.ending, len(empty.tokens), empty.weight_version) == (Ending.ABORTED, 0, 0)


def test_a_prompt_that_was_half_run_is_run_again_by_new_weights(tiny_model_dir: Path) -> None:
    bench = load_bench(tiny_model_dir, prefill_tokens=8)
    new = build_model(seed=5)
    long = item(range(1, 31), 2, 5)

    def swap() -> bool:
        swapped(bench, new)
        return False

    sink = bench.run([item([7], 1, 30)], StepSink(joining={1: [long]}, pauses={3: swap}))
    check_logprobs(list(range(1, 31)), sink.samples[1], new)
    assert sink.samples[1].spans == (VersionSpan(1, 5),)


def test_nan_fails_its_own_row_and_poisons_no_slot(tmp_path: Path) -> None:
    """A row that takes the slot of one with NaN in its keys attends to its own keys alone."""
    bench = load_bench(save_tiny_model(tmp_path / "untied", tied=False))
    with torch.no_grad():
        bench.model.model.get_input_embeddings().weight[NAN_TOKEN] = torch.nan  # pyright: ignore
    model = build_model(tied=False)
    bad, good = item([1, 2, 3, NAN_TOKEN, 5, 6, 7, 8, 9], 1, 20), item([5], 2, 20)
    late = [item([6], 3, 20), item([7], 4, 20)]
    sink = bench.run([bad, good], StepSink(joining={1: late[:1], 2: late[1:]}))
    assert isinstance(sink.errors[0], NonFiniteOutput)
    for position, wanted in ((1, good), (2, late[0]), (3, late[1])):
        assert len(sink.samples[position].tokens) == 20
        check_logprobs(wanted.prompt.tolist(), sink.samples[position], model)


@pytest.mark.parametrize("joins", [1, 3])
def test_no_nan_stays_behind_the_end_of_a_shorter_row(tmp_path: Path, joins: int) -> None:
    """All rows read as far as the longest goes. The short one moves to the slot with NaN in it, or begins there."""
    bench = load_bench(save_tiny_model(tmp_path / "untied", tied=False))
    with torch.no_grad():
        bench.model.model.get_input_embeddings().weight[NAN_TOKEN] = torch.nan  # pyright: ignore
    long, short = item(list(range(10, 22)), 5, 20), item([5], 2, 20)
    # Its first token is the one whose key is NaN.
    bad = item([1, 2, 3], 1, 20, token_filter=TokenFilter(1.0, logit_bias=((NAN_TOKEN, 1e4),)))
    if joins == 1:
        sink = bench.run([bad, long], StepSink(joining={1: [short]}))
        places = 0, 1, 2
    else:
        sink = bench.run([long], StepSink(joining={1: [bad], 3: [short]}))
        places = 1, 0, 2
    assert list(sink.errors) == [places[0]]
    for place, wanted in zip(places[1:], (long, short), strict=True):
        assert len(sink.samples[place].tokens) == 20
        check_logprobs(wanted.prompt.tolist(), sink.samples[place], build_model(tied=False))
