"""New weights while sequences run: what becomes of them, what their tokens are tagged with, and how they go on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch

from ppod import Completion, FailedPrecondition, FinishReason, GenerationClient, Sampling, WeightClient
from ppod.client import SeedPromise, WeightPause
from ppod_trainer.collective_plane import CollectivePlane
from ppod_trainer.config import CollectiveConfig
from ppod_trainer.policy_weights import PolicyTensors
from ppod_trainer.weight_planes import Outgoing
from support.generation_requests import PROMPTS
from support.processes import free_ports
from support.recomputed import chosen_logprobs, distributions, tokens_of
from support.sampling_reference import Rules
from support.tiny_model import MAX_TOKENS, build_model
from support.weight_tensors import weight_tensors

from .backends import Served

SIGNAL = [3] * (MAX_TOKENS - 2)
"""A prompt that leaves room for two tokens: when its completion is here, the others have just begun."""
LONG = [[5 + index, 6, 7] for index in range(12)]
GREEDY = Sampling(max_tokens=110, temperature=0.0, ignore_eos=True)
MODELS = {seed: build_model(seed=seed) for seed in (0, 5, 6)}


@pytest.fixture
def client(changing: Served) -> Iterator[GenerationClient]:
    with GenerationClient(changing.service.target) as client:
        yield client


def prepare(weights: WeightClient, seed: int) -> int:
    """Send the weights of that model; their version, which waits for its commit."""
    version = weights.status().state.weight_version + 1
    weights.prepare(version, weight_tensors(MODELS[seed]))
    return version


def serve(weights: WeightClient, seed: int) -> int:
    """Put the weights of that model into service."""
    version = prepare(weights, seed)
    weights.commit(version)
    return version


def commit_amid(
    client: GenerationClient,
    weights: WeightClient,
    version: int,
    pause: WeightPause,
    *,
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] = (),
    weight_version: int | None = None,
) -> list[Completion]:
    """Commit while completions of `LONG` run; those completions."""
    all_seeds = [0, *seeds] if seeds else []
    stream = client.stream([SIGNAL, *LONG], sampling, seeds=all_seeds, weight_version=weight_version)
    assert next(stream).index == 0
    weights.commit(version, pause=pause)
    return sorted(stream, key=lambda done: done.index)


@functools.cache
def greedy_tokens(seed: int, prompts: tuple[tuple[int, ...], ...], count: int) -> list[list[int]]:
    """By transformers, of the model of that seed; prompts of equal length."""
    ids = torch.tensor(prompts)
    made = MODELS[seed].generate(  # pyright: ignore
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=257,
    )
    return made[:, ids.shape[1] :].tolist()


def long_greedy(seed: int) -> list[list[int]]:
    """Greedy completions of `LONG`."""
    return greedy_tokens(seed, tuple(tuple(prompt) for prompt in LONG), 110)


def serve_by_group(weights: WeightClient, seed: int) -> int:
    """Put the weights of that model into service by a broadcast."""
    version = weights.status().state.weight_version + 1
    config = CollectiveConfig(port=free_ports(1)[0], bucket_mib=1)
    plane = CollectivePlane(config, lambda: {weights.target: weights.status().collective_ranks})
    try:
        with plane.whole(Outgoing(version, PolicyTensors(MODELS[seed], torch.float32), None)) as push:
            weights.push(push)
    finally:
        plane.close()
    weights.commit(version)
    return version


@pytest.mark.parametrize("put", [serve, serve_by_group])
def test_new_weights_change_outputs_and_tags_and_leave_no_cached_prompt(
    client: GenerationClient, weights: WeightClient, put: Callable[[WeightClient, int], int]
) -> None:
    """The same prompts before and after: a prefix cache that outlived the commit would show in the logprobs."""
    sampling = Sampling(max_tokens=20, temperature=0.0, ignore_eos=True)
    for seed in (5, 6):
        version = put(weights, seed)
        for prompt, done in zip(PROMPTS, client.generate(PROMPTS, sampling), strict=True):
            tokens = done.token_ids.tolist()
            assert [tokens] == greedy_tokens(seed, (tuple(prompt),), 20)
            rows = distributions(MODELS[seed], prompt, tokens, Rules())
            np.testing.assert_allclose(done.logprobs, chosen_logprobs(rows, tokens), atol=2e-5)
            assert [(span.weight_version, span.tokens) for span in done.weight_spans] == [(version, 20)]
            assert done.state.weight_version == version


def test_a_commit_may_wait_for_what_runs(client: GenerationClient, weights: WeightClient) -> None:
    old = serve(weights, 0)
    completions = commit_amid(client, weights, prepare(weights, 5), WeightPause.WAIT)
    for expected, done in zip(long_greedy(0), completions, strict=True):
        assert done.token_ids.tolist() == expected
        assert [(span.weight_version, span.tokens) for span in done.weight_spans] == [(old, 110)]
    assert client.generate([[5]], GREEDY)[0].state.weight_version == old + 1


def test_a_commit_may_keep_what_runs(client: GenerationClient, weights: WeightClient) -> None:
    old = serve(weights, 0)
    completions = commit_amid(client, weights, prepare(weights, 5), WeightPause.KEEP)
    for expected, done in zip(long_greedy(0), completions, strict=True):
        assert done.finish_reason is FinishReason.LENGTH
        first, second = done.weight_spans
        assert (first.weight_version, second.weight_version) == (old, old + 1)
        assert first.tokens + second.tokens == 110
        assert done.state.weight_version == old + 1
        before, after = np.split(done.token_ids, [first.tokens])
        assert before.tolist() == expected[: first.tokens]
        assert after.tolist() != expected[first.tokens :]


def test_a_commit_may_hand_back_what_runs(changing: Served, client: GenerationClient, weights: WeightClient) -> None:
    """The new version has the same weights, so that what is resumed can be compared with what never was interrupted."""
    serve(weights, 0)
    sampling = Sampling(max_tokens=110, ignore_eos=True)
    # None of their numbers comes within 4e-6 of where two tokens meet: rounding could take the other one there.
    seeds = list(range(300, 300 + len(LONG)))
    whole = client.generate(LONG, sampling, seeds=seeds)
    old = weights.status().state.weight_version
    completions = commit_amid(client, weights, prepare(weights, 0), WeightPause.ABORT, sampling=sampling, seeds=seeds)
    assert {done.finish_reason for done in completions} == {FinishReason.ABORTED}
    begun = [done.token_ids.tolist() for done in completions]
    for tokens, expected in zip(begun, tokens_of(whole), strict=True):
        assert 0 < len(tokens) < 110
        assert tokens == expected[: len(tokens)]
    for prompt, tokens, seed, expected in zip(LONG, begun, seeds, tokens_of(whole), strict=True):
        [done] = client.generate([[*prompt, *tokens]], sampling, seeds=[seed], resumed_tokens=[len(tokens)])
        assert done.state.weight_version == old + 1
        assert len(tokens) + len(done.token_ids) == 110
        if changing.backend.seed_promise is SeedPromise.EVERY_REPLICA:
            assert tokens + done.token_ids.tolist() == expected


def test_whoever_insists_on_a_version_gets_none_of_another(client: GenerationClient, weights: WeightClient) -> None:
    old = serve(weights, 0)
    completions = commit_amid(client, weights, prepare(weights, 5), WeightPause.KEEP, weight_version=old)
    for expected, done in zip(long_greedy(0), completions, strict=True):
        assert (done.finish_reason, done.state.weight_version) == (FinishReason.ABORTED, old)
        tokens = done.token_ids.tolist()
        assert tokens == expected[: len(tokens)]
        assert [(span.weight_version, span.tokens) for span in done.weight_spans] == [(old, len(tokens))]
    with pytest.raises(FailedPrecondition):
        client.generate([[5]], GREEDY, weight_version=old)
