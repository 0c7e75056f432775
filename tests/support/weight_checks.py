"""What a generation service serves, held against the model that it should."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from ppod import GenerationClient, ResourceExhausted, Sampling, WeightClient
from ppod.client import WeightPush
from support.processes import ServiceProcess
from support.tiny_model import build_model
from support.weight_tensors import weight_tensors

PROMPTS = [[5, 6, 7], [9]]
GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)


def greedy_tokens(model: nn.Module) -> list[list[int]]:
    """Greedy completions by full forwards without cache."""
    found: list[list[int]] = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        found.append(ids[len(prompt) :])
    return found


def assert_serves(service: ServiceProcess, version: int, model: nn.Module, prepared: int | None = None) -> None:
    """It generates what this model would, tags it with the version, and has nothing else prepared, or this version."""
    with GenerationClient(service.target) as client:
        completions = client.generate(PROMPTS, GREEDY)
    assert {done.state.weight_version for done in completions} == {version}
    assert [done.token_ids.tolist() for done in completions] == greedy_tokens(model)
    with WeightClient(service.admin_target) as weights:
        status = weights.status()
    assert (status.state.weight_version, status.prepared_version) == (version, prepared)


def assert_takes_next(service: ServiceProcess, version: int, seed: int) -> None:
    """A good push works: what failed before it left nothing in its way."""
    model = build_model(seed=seed)
    with WeightClient(service.admin_target, timeout_s=20) as weights:
        push = WeightPush(version, weight_tensors(model))
        retry_busy(lambda: weights.push(push))
        weights.commit(version)
    assert_serves(service, version, model)


def retry_busy(call: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Call again while another transfer is under way, as after its sender died a moment ago."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            call()
            return
        except ResourceExhausted:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
