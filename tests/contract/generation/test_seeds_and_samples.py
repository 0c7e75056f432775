"""Seeds, several completions of a prompt, and completions that are resumed."""

from __future__ import annotations

import numpy as np
import pytest

from ppod import GenerationClient, Sampling
from ppod.client import SeedPromise
from support.generation_requests import PROMPTS, SEEDS
from support.recomputed import tokens_of
from support.services import TEST_DEVICE
from support.tiny_model import MAX_TOKENS

from .backends import Served


def test_a_seed_decides_its_sample_whoever_shares_the_batch(client: GenerationClient) -> None:
    sampling = Sampling(max_tokens=20)
    together = client.generate(PROMPTS, sampling, seeds=SEEDS)
    mates = [[30] * 12, PROMPTS[2], [31]]
    [alone] = client.generate([PROMPTS[2]], sampling, seeds=[SEEDS[2]])
    among_others = client.generate(mates, sampling, seeds=[70, SEEDS[2], 71])[1]
    assert together[2].token_ids.tolist() == alone.token_ids.tolist() == among_others.token_ids.tolist()
    assert together[0].token_ids.tolist() != together[4].token_ids.tolist()


def test_every_bit_of_a_seed_counts(client: GenerationClient) -> None:
    """As where a caller makes seeds of a step and, below it, the number of a sample."""
    seeds = [5, 2**32 + 5, 2**40 + 5, 2**63 + 5]
    done = client.generate([PROMPTS[0]], Sampling(max_tokens=20, n=4), seeds=seeds)
    assert len({tuple(tokens) for tokens in tokens_of(done)}) == 4


def test_a_repeated_request_gives_the_same(served: Served, client: GenerationClient) -> None:
    first, second = (client.generate(PROMPTS, Sampling(max_tokens=20), seeds=SEEDS) for _ in range(2))
    assert tokens_of(first) == tokens_of(second)
    if served.backend.repeats_bits:
        assert [done.logprobs.tobytes() for done in first] == [done.logprobs.tobytes() for done in second]


def test_without_seeds_the_server_draws_and_reports_them(client: GenerationClient) -> None:
    sampling = Sampling(max_tokens=10, n=2)
    first = client.generate([[5], [5]], sampling)
    assert len({done.seed for done in first}) == 4
    again = client.generate([[5], [5]], sampling, seeds=[done.seed for done in first])
    assert tokens_of(first) == tokens_of(again)


def test_n_completions_of_each_prompt(client: GenerationClient) -> None:
    """Each is what a request for it alone gives: sharing the prompt's computation changes nothing."""
    prompts = [PROMPTS[0], PROMPTS[2]]
    seeds = [41, 42, 43, 44, 45, 46]
    done = client.generate(prompts, Sampling(max_tokens=16, n=3), seeds=seeds)
    assert [(each.index, each.sample) for each in done] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [each.seed for each in done] == seeds
    alone = client.generate([prompt for prompt in prompts for _ in range(3)], Sampling(max_tokens=16), seeds=seeds)
    assert tokens_of(done) == tokens_of(alone)
    for each, other in zip(done, alone, strict=True):
        np.testing.assert_allclose(each.logprobs, other.logprobs, atol=2e-5)
    assert len({tuple(tokens) for tokens in tokens_of(done)}) == 6


def test_samples_of_all_kinds_share_batches(client: GenerationClient) -> None:
    """More completions than a request usually has, of every length: those that join late get what early ones get."""
    prompts = [[3 + index] * (1 + 5 * index) for index in range(8)]
    sampling = Sampling(max_tokens=MAX_TOKENS, n=8)
    seeds = list(range(64))
    together = client.generate(prompts, sampling, seeds=seeds)
    for index in (0, 7, 30, 63):
        [alone] = client.generate([prompts[index // 8]], Sampling(max_tokens=MAX_TOKENS), seeds=[seeds[index]])
        assert together[index].token_ids.tolist() == alone.token_ids.tolist()
    assert len({len(tokens) for tokens in tokens_of(together)}) > 8


@pytest.mark.parametrize("cut", [1, 7, 19])
def test_a_resumed_completion_goes_on_as_promised(served: Served, client: GenerationClient, cut: int) -> None:
    sampling = Sampling(max_tokens=20, repetition_penalty=1.2, ignore_eos=True)
    whole = client.generate(PROMPTS, sampling, seeds=SEEDS)
    begun = [[*prompt, *done.token_ids.tolist()[:cut]] for prompt, done in zip(PROMPTS, whole, strict=True)]
    resumed = client.generate(begun, sampling, seeds=SEEDS, resumed_tokens=[cut] * len(begun))
    for done, after in zip(whole, resumed, strict=True):
        assert len(after.token_ids) == 20 - cut
        if served.backend.seed_promise is SeedPromise.EVERY_REPLICA:
            assert after.token_ids.tolist() == done.token_ids.tolist()[cut:]
            np.testing.assert_allclose(after.logprobs, done.logprobs[cut:], atol=2e-5)


def test_description(served: Served, client: GenerationClient) -> None:
    described = client.describe()
    assert described.state.model == "policy"
    assert served.backend.slow_start or described.state.weight_version == 0
    assert len(described.state.tokenizer_fingerprint) == 16
    assert described.eos_token_ids == (256,)
    assert described.seed_promise is served.backend.seed_promise
    limits = described.limits
    assert (limits.vocab_size, limits.max_sequence_tokens, limits.max_request_sequences) == (320, MAX_TOKENS, 64)
    assert (limits.dtype, limits.device.partition(":")[0]) == ("float32", TEST_DEVICE.partition(":")[0])
