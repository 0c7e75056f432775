"""New weights for a running vLLM engine: swapped whole between two of its steps, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from ppod import FinishReason, GenerationClient, InvalidArgument, Sampling, WeightClient
from ppod.client import Completion, WeightPause
from support.processes import ServiceProcess, metrics_of
from support.vllm_services import BLOCK_SIZE, MAX_TOKENS, build_vllm_model, chosen, next_logits
from support.weight_tensors import weight_tensors

GAP = 2e-5
LONG = [60, 61, 62]
"""Its completion is as long as the model allows, so that weights come in the middle of it."""
LONG_TOKENS = MAX_TOKENS - 3


@dataclass
class Pushed:
    """The service, and what was pushed to it; version 0 is what it started with."""

    service: ServiceProcess
    weights: WeightClient
    models: dict[int, LlamaForCausalLM] = field(default_factory=dict[int, LlamaForCausalLM])

    def prepare(self, dtype: torch.dtype = torch.float32) -> int:
        """Send the weights of another random model; returns their version."""
        version = self.weights.status().state.weight_version + 1
        model = build_vllm_model(seed=500 + version)
        self.weights.prepare(version, weight_tensors(model, dtype))
        self.models[version] = model.to(dtype).float()
        return version


@pytest.fixture(scope="module")
def pushed(vllm_service: ServiceProcess) -> Iterator[Pushed]:
    with WeightClient(vllm_service.admin_target) as weights:
        serving = weights.status().state.weight_version
        yield Pushed(vllm_service, weights, {serving: build_vllm_model()})


def complete(pushed: Pushed, prompt: list[int], tokens: int) -> Completion:
    with GenerationClient(pushed.service.target) as client:
        return client.generate([prompt], Sampling(max_tokens=tokens, ignore_eos=True), seeds=[3])[0]


def check_logprobs(pushed: Pushed, prompt: list[int], done: Completion) -> None:
    """Every token's logprob is that of a full forward with the weights of its version."""
    tokens = done.token_ids.tolist()
    begin = 0
    for span in done.weight_spans:
        expected = chosen(
            torch.log_softmax(next_logits(pushed.models[span.weight_version], prompt, tokens), -1), tokens
        )
        end = begin + span.tokens
        np.testing.assert_allclose(done.logprobs[begin:end], expected[begin:end].numpy(), atol=GAP)
        begin = end
    assert begin == len(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_commit_changes_outputs_and_version_and_drops_cached_prefixes(pushed: Pushed, dtype: torch.dtype) -> None:
    prompt = list(range(40, 40 + 3 * BLOCK_SIZE + 5))
    before = [complete(pushed, prompt, 12) for _ in range(2)]
    assert before[0].token_ids.tolist() == before[1].token_ids.tolist()
    version = pushed.prepare(dtype)
    assert complete(pushed, prompt, 12).token_ids.tolist() == before[0].token_ids.tolist()
    assert pushed.weights.commit(version) > 0
    after = complete(pushed, prompt, 12)
    assert after.state.weight_version == version
    assert [span.weight_version for span in after.weight_spans] == [version]
    assert after.token_ids.tolist() != before[0].token_ids.tolist()
    # With blocks of the old weights in its cache the new model's logprobs would be others.
    check_logprobs(pushed, prompt, after)
    assert f"ppod_weight_version {version}.0" in metrics_of(pushed.service)


def commit_while_running(
    pushed: Pushed, pause: WeightPause, *, pinned: bool = False
) -> tuple[list[Completion], int, list[str]]:
    """Commit new weights in the middle of a long completion.

    Returns:
        A short completion that ended before, and the long one; the new version; what ended first, completion or commit.
    """
    serving = pushed.weights.status().state.weight_version
    version = pushed.prepare()
    order: list[str] = []

    def commit() -> None:
        pushed.weights.commit(version, pause=pause)
        order.append("commit")

    # The short one ends early because its prompt leaves no more room.
    prompts = [[70] * (MAX_TOKENS - 20), LONG]
    with GenerationClient(pushed.service.target) as client, ThreadPoolExecutor(1) as thread:
        stream = client.stream(
            prompts,
            Sampling(max_tokens=MAX_TOKENS, ignore_eos=True),
            seeds=[1, 2],
            weight_version=serving if pinned else None,
        )
        short = next(stream)
        committed = thread.submit(commit)
        long = next(stream)
        order.append("completion")
        committed.result()
    assert (short.index, long.index) == (0, 1)
    return [short, long], version, order


def test_wait_lets_completions_end_under_the_old_weights(pushed: Pushed) -> None:
    [_, long], version, order = commit_while_running(pushed, WeightPause.WAIT)
    assert order == ["completion", "commit"]
    assert long.finish_reason is FinishReason.LENGTH
    assert [(span.weight_version, span.tokens) for span in long.weight_spans] == [(version - 1, LONG_TOKENS)]
    check_logprobs(pushed, LONG, long)


def test_keep_goes_on_with_the_new_weights_and_tags_each_token(pushed: Pushed) -> None:
    [_, long], version, order = commit_while_running(pushed, WeightPause.KEEP)
    assert order == ["commit", "completion"]
    assert long.finish_reason is FinishReason.LENGTH
    assert [span.weight_version for span in long.weight_spans] == [version - 1, version]
    assert sum(span.tokens for span in long.weight_spans) == LONG_TOKENS
    assert long.weight_spans[0].tokens >= 19
    assert long.state.weight_version == version
    check_logprobs(pushed, LONG, long)


def test_keep_hands_back_who_insists_on_the_old_weights(pushed: Pushed) -> None:
    [_, long], version, _ = commit_while_running(pushed, WeightPause.KEEP, pinned=True)
    assert long.finish_reason is FinishReason.ABORTED
    assert [span.weight_version for span in long.weight_spans] == [version - 1]
    check_logprobs(pushed, LONG, long)


def test_abort_hands_back_what_there_is_and_it_can_be_resumed(pushed: Pushed) -> None:
    [_, long], version, _ = commit_while_running(pushed, WeightPause.ABORT)
    assert long.finish_reason is FinishReason.ABORTED
    tokens = long.token_ids.tolist()
    assert 19 <= len(tokens) < LONG_TOKENS
    assert [span.weight_version for span in long.weight_spans] == [version - 1]
    check_logprobs(pushed, LONG, long)
    with GenerationClient(pushed.service.target) as client:
        [rest] = client.generate(
            [[*LONG, *tokens]], Sampling(MAX_TOKENS, ignore_eos=True), seeds=[2], resumed_tokens=[len(tokens)]
        )
    assert len(rest.token_ids) == LONG_TOKENS - len(tokens)
    assert [span.weight_version for span in rest.weight_spans] == [version]
    check_logprobs(pushed, [*LONG, *tokens], rest)


def test_what_does_not_fit_leaves_the_old_weights_serving(pushed: Pushed) -> None:
    before = complete(pushed, LONG, 12)
    tensors = weight_tensors(build_vllm_model(seed=7))
    with pytest.raises(InvalidArgument, match="1 missing"):
        pushed.weights.prepare(before.state.weight_version + 1, tensors[:-1])
    after = complete(pushed, LONG, 12)
    assert after.state == before.state
    assert after.token_ids.tolist() == before.token_ids.tolist()
