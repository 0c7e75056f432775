"""Generation by vLLM over the wire, against independent recomputations with the same tiny model in float32."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from ppod import FinishReason, GenerationClient, InvalidArgument, Sampling
from ppod.client import Completion, SeedPromise
from ppod_models.loading import tokenizer_fingerprint
from support.processes import ServiceProcess
from support.tiny_model import VOCAB_SIZE, build_tokenizer
from support.vllm_services import MAX_TOKENS, build_vllm_model, chosen, next_logits

PROMPTS = [[5, 6, 7], [9], [11, 12, 13, 14, 15, 16, 17], [20, 21], [5, 6, 7]]
SEEDS = [1, 2, 3, 4, 2**64 - 1]
GAP = 2e-5
"""Largest difference of a logprob from that of a full forward in transformers, both in float32."""


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return build_vllm_model()


def generate(
    service: ServiceProcess, prompts: list[list[int]], sampling: Sampling, seeds: list[int]
) -> list[Completion]:
    with GenerationClient(service.target) as client:
        return client.generate(prompts, sampling, seeds=seeds)


def test_description_is_that_of_the_model(vllm_service: ServiceProcess) -> None:
    with GenerationClient(vllm_service.target) as client:
        described = client.describe()
    assert (described.state.model, described.state.weight_version) == ("policy", 0)
    assert described.state.tokenizer_fingerprint == tokenizer_fingerprint(build_tokenizer())
    assert described.eos_token_ids == (256,)
    limits = described.limits
    assert (limits.vocab_size, limits.max_sequence_tokens) == (VOCAB_SIZE, MAX_TOKENS)
    assert (limits.dtype, limits.device) == ("float32", "cpu")
    assert described.seed_promise is SeedPromise.UNINTERRUPTED


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_full_forward(
    vllm_service: ServiceProcess, model: LlamaForCausalLM, temperature: float
) -> None:
    sampling = Sampling(max_tokens=20, temperature=temperature, unscaled_logprobs=True)
    for prompt, done in zip(PROMPTS, generate(vllm_service, PROMPTS, sampling, SEEDS), strict=True):
        tokens = done.token_ids.tolist()
        logits = next_logits(model, prompt, tokens)
        expected = chosen(torch.log_softmax(logits / temperature, dim=-1), tokens)
        np.testing.assert_allclose(done.logprobs, expected.numpy(), atol=GAP)
        unscaled = chosen(torch.log_softmax(logits, dim=-1), tokens)
        np.testing.assert_allclose(done.unscaled_logprobs, unscaled.numpy(), atol=GAP)


def test_cuts_renormalise_in_the_order_of_the_contract(vllm_service: ServiceProcess, model: LlamaForCausalLM) -> None:
    """Temperature, then min-p, then top-k, then top-p of what is left."""
    sampling = Sampling(max_tokens=20, temperature=1.5, min_p=0.02, top_k=20, top_p=0.8, unscaled_logprobs=True)
    cut = 0
    for prompt, done in zip(PROMPTS, generate(vllm_service, PROMPTS, sampling, SEEDS), strict=True):
        tokens = done.token_ids.tolist()
        assert done.unscaled_logprobs is not None
        for logits, token, logprob, unscaled in zip(
            next_logits(model, prompt, tokens), tokens, done.logprobs, done.unscaled_logprobs, strict=True
        ):
            probabilities = torch.softmax(logits / 1.5, dim=-1)
            kept = probabilities * (probabilities >= 0.02 * probabilities.max())
            top, ids = kept.topk(20)
            top = top / top.sum()
            before = top.cumsum(0) - top
            cut += int((top * (before >= 0.8) > 0).sum())
            top = top * (before < 0.8)
            position = ids.tolist().index(token)
            assert top[position] > 0
            assert logprob == pytest.approx(math.log(top[position] / top.sum()), abs=GAP)
            assert unscaled == pytest.approx(float(torch.log_softmax(logits, dim=-1)[token]), abs=GAP)
    assert cut > 100


def test_bias_comes_before_the_penalty_of_what_is_there(vllm_service: ServiceProcess, model: LlamaForCausalLM) -> None:
    bias = {5: 3.0, 9: -2.0, 40: 2.5}
    sampling = Sampling(max_tokens=20, repetition_penalty=1.7, logit_bias=bias, temperature=0.8)
    for prompt, done in zip(PROMPTS, generate(vllm_service, PROMPTS, sampling, SEEDS), strict=True):
        tokens = done.token_ids.tolist()
        for step, logits in enumerate(next_logits(model, prompt, tokens)):
            shaped = logits.clone()
            for token, value in bias.items():
                shaped[token] += value
            for token in {*prompt, *tokens[:step]}:
                shaped[token] = shaped[token] / 1.7 if shaped[token] > 0 else shaped[token] * 1.7
            expected = torch.log_softmax(shaped / 0.8, dim=-1)[tokens[step]]
            assert done.logprobs[step] == pytest.approx(float(expected), abs=GAP)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_greedy_equals_transformers(vllm_service: ServiceProcess, model: LlamaForCausalLM, ignore_eos: bool) -> None:
    sampling = Sampling(max_tokens=30, temperature=0.0, ignore_eos=ignore_eos)
    for prompt, done in zip(PROMPTS, generate(vllm_service, PROMPTS, sampling, []), strict=True):
        expected = model.generate(  # pyright: ignore
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=30,
            eos_token_id=None if ignore_eos else 256,
            pad_token_id=257,
        )[0, len(prompt) :]
        tokens = done.token_ids.tolist()
        assert tokens == expected.tolist()
        logprobs = chosen(torch.log_softmax(next_logits(model, prompt, tokens), dim=-1), tokens)
        np.testing.assert_allclose(done.logprobs, logprobs.numpy(), atol=GAP)


def test_a_seed_decides_its_sample_whoever_shares_the_batch(vllm_service: ServiceProcess) -> None:
    sampling = Sampling(max_tokens=20)
    together = generate(vllm_service, PROMPTS, sampling, SEEDS)
    [alone] = generate(vllm_service, [PROMPTS[2]], sampling, [SEEDS[2]])
    among_others = generate(vllm_service, [[30] * 100, PROMPTS[2], [31]], sampling, [70, SEEDS[2], 71])[1]
    assert together[2].token_ids.tolist() == alone.token_ids.tolist() == among_others.token_ids.tolist()
    [again] = generate(vllm_service, [PROMPTS[4]], sampling, [2**64 - 1])
    assert again.token_ids.tolist() == together[4].token_ids.tolist()
    assert together[0].token_ids.tolist() != together[4].token_ids.tolist()


def test_draws_follow_the_model_s_distribution(vllm_service: ServiceProcess, model: LlamaForCausalLM) -> None:
    """Chi-squared over first tokens; without it a sampler that ignores its logits could report true logprobs."""
    drawn = generate(vllm_service, [[9]], Sampling(max_tokens=1, n=640), list(range(640)))
    tokens = [int(done.token_ids[0]) for done in drawn]
    probabilities = torch.softmax(model(torch.tensor([[9]])).logits[0, -1], dim=-1).detach().numpy()
    likely = np.argsort(-probabilities)[:8]
    expected = np.append(640 * probabilities[likely], 640 * (1 - probabilities[likely].sum()))
    counts = np.array([tokens.count(token) for token in likely.tolist()])
    observed = np.append(counts, 640 - counts.sum())
    # 8 degrees of freedom: 26.1 is exceeded once in a thousand; the seeds are fixed.
    assert ((observed - expected) ** 2 / expected).sum() < 26.1


def test_n_completions_are_those_of_their_seeds(vllm_service: ServiceProcess) -> None:
    prompts, seeds = [[7] * 80, [8]], [11, 12, 13, 14, 15, 16]
    several = generate(vllm_service, prompts, Sampling(max_tokens=12, n=3), seeds)
    assert [(done.index, done.sample) for done in several] == [(i, n) for i in range(2) for n in range(3)]
    singly = generate(vllm_service, [prompts[i // 3] for i in range(6)], Sampling(max_tokens=12), seeds)
    assert [done.token_ids.tolist() for done in several] == [done.token_ids.tolist() for done in singly]


def test_stop_tokens_end_a_completion_and_belong_to_it(vllm_service: ServiceProcess) -> None:
    free = generate(vllm_service, PROMPTS, Sampling(max_tokens=20, ignore_eos=True), SEEDS)
    assert all(done.finish_reason is FinishReason.LENGTH and len(done.token_ids) == 20 for done in free)
    stop = int(free[1].token_ids[7])
    wanted = Sampling(max_tokens=20, ignore_eos=True, stop_token_ids=(stop,))
    for before, after in zip(free, generate(vllm_service, PROMPTS, wanted, SEEDS), strict=True):
        tokens = before.token_ids.tolist()
        if stop in tokens:
            assert after.finish_reason is FinishReason.STOP
            assert after.token_ids.tolist() == tokens[: tokens.index(stop) + 1]
        else:
            assert after.token_ids.tolist() == tokens


ASCII = {token: -math.inf for token in range(VOCAB_SIZE) if not 33 <= token <= 93}
"""Forbids all tokens but some printable characters, so that each is a character of its own."""


def text_of(tokens: list[int]) -> str:
    return build_tokenizer().decode(tokens)


def test_a_stop_text_ends_with_the_token_that_completes_it(vllm_service: ServiceProcess) -> None:
    sampling = Sampling(max_tokens=30, logit_bias=ASCII)
    [free] = generate(vllm_service, [[40, 41]], sampling, [5])
    tokens = free.token_ids.tolist()
    stop = text_of(tokens[9:12])
    first = text_of(tokens).index(stop)
    [done] = generate(vllm_service, [[40, 41]], Sampling(30, logit_bias=ASCII, stop=("never there", stop)), [5])
    assert done.finish_reason is FinishReason.STOP_STRING
    assert done.token_ids.tolist() == tokens[: first + 3]
    np.testing.assert_array_equal(done.logprobs, free.logprobs[: first + 3])


def test_a_stop_text_may_begin_in_resumed_tokens(vllm_service: ServiceProcess) -> None:
    sampling = Sampling(max_tokens=30, temperature=0.0, logit_bias=ASCII)
    [free] = generate(vllm_service, [[40, 41]], sampling, [])
    tokens = free.token_ids.tolist()
    stop = text_of(tokens[4:8])
    first = text_of(tokens).index(stop)
    begun = first + 2
    with GenerationClient(vllm_service.target) as client:
        wanted = Sampling(max_tokens=20, temperature=0.0, logit_bias=ASCII, stop=(stop,))
        [done] = client.generate([[40, 41, *tokens[:begun]]], wanted, resumed_tokens=[begun])
    assert done.finish_reason is FinishReason.STOP_STRING
    assert done.token_ids.tolist() == tokens[begun : first + 4]
    assert sum(span.tokens for span in done.weight_spans) == len(done.token_ids) == len(done.logprobs)


def test_the_model_s_length_ends_a_completion(vllm_service: ServiceProcess) -> None:
    [done] = generate(vllm_service, [[3] * (MAX_TOKENS - 2)], Sampling(max_tokens=50, ignore_eos=True), [1])
    assert len(done.token_ids) == 2
    assert done.finish_reason is FinishReason.LENGTH


def test_short_completions_are_streamed_before_long_ones_end(vllm_service: ServiceProcess) -> None:
    sampling = Sampling(max_tokens=100, ignore_eos=True)
    with GenerationClient(vllm_service.target) as client:
        order = [done.index for done in client.stream([[5] * 20, [5] * (MAX_TOKENS - 1)], sampling, seeds=[1, 2])]
    assert order == [1, 0]


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_temperatures_that_vllm_would_change_are_refused(vllm_service: ServiceProcess, temperature: float) -> None:
    with pytest.raises(InvalidArgument, match="vLLM backend") as caught:
        generate(vllm_service, [[5]], Sampling(max_tokens=1, temperature=temperature), [])
    assert caught.value.field == "sampling.temperature"
