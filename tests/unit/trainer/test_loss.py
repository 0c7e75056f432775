"""The whole objective against a loop over tokens that is written as its equation is."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ppod_trainer import algorithms
from ppod_trainer.config import KlConfig, PpoConfig
from ppod_trainer.controls import StepControls
from ppod_trainer.loss import LossRows, Objective, minibatch_loss
from ppod_trainer.masking import loss_weights
from ppod_trainer.policy import PolicyOutput

LENGTHS = [5, 3, 1]
SHAPE = (3, 6)
Rows = dict[str, np.ndarray]


def random_rows(seed: int) -> Rows:
    generator = np.random.default_rng(seed)
    names = ("new", "old", "sampler", "ref", "values", "old_values", "entropy", "advantages", "returns")
    rows = {name: generator.normal(size=SHAPE) for name in names}
    rows["new"] = rows["old"] + generator.normal(0, 0.5, SHAPE)
    rows["sampler"] = rows["old"] + generator.normal(0, 0.3, SHAPE)
    return rows


def weight_of(row: int, ppo: PpoConfig) -> float:
    match ppo.aggregation:
        case "token_mean":
            return 1 / sum(LENGTHS)
        case "sequence_mean":
            return 1 / (len(LENGTHS) * LENGTHS[row])
        case "constant":
            assert ppo.constant_tokens is not None
            return 1 / (len(LENGTHS) * ppo.constant_tokens)


def clipped_term(ratio: float, advantage: float, ppo: PpoConfig) -> float:
    high = ppo.clip if ppo.clip_high is None else ppo.clip_high
    term = min(ratio * advantage, min(max(ratio, 1 - ppo.clip), 1 + high) * advantage)
    return max(term, ppo.dual_clip * advantage) if ppo.dual_clip is not None and advantage < 0 else term


def value_term(rows: Rows, row: int, t: int, clip: float | None) -> float:
    value, old, target = (float(rows[name][row, t]) for name in ("values", "old_values", "returns"))
    near = value if clip is None else min(max(value, old - clip), old + clip)
    return max((value - target) ** 2, (near - target) ** 2) / 2


def kl_term(rows: Rows, row: int, t: int, kl: KlConfig) -> float:
    d = float(rows["new"][row, t] - rows["ref"][row, t])
    estimate = {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) - 1 + d}[kl.estimator]
    return estimate * (math.exp(rows["new"][row, t] - rows["old"][row, t]) if kl.importance_weighted else 1)


def plain_loss(rows: Rows, ppo: PpoConfig, kl: KlConfig, controls: StepControls) -> float:
    total = 0.0
    for row, length in enumerate(LENGTHS):
        moved = rows["new"][row, :length] - rows["old"][row, :length]
        rho = np.exp(rows["old"][row, :length] - rows["sampler"][row, :length])
        for t in range(length):
            ratio = math.exp(moved[t] if ppo.ratio == "token" else moved.mean())
            importance = 1.0
            if ppo.importance_cap is not None:
                importance = min(
                    float(rho.prod() if ppo.importance_level == "sequence" else rho[t]), ppo.importance_cap
                )
            loss = -importance * clipped_term(ratio, float(rows["advantages"][row, t]), ppo)
            loss += ppo.value_coefficient * value_term(rows, row, t, ppo.value_clip)
            loss -= controls.entropy_coefficient * rows["entropy"][row, t]
            if kl.placement == "loss":
                loss += controls.kl_coefficient * kl_term(rows, row, t, kl)
            total += weight_of(row, ppo) * loss
    return total


def rows_of(rows: Rows, mask: torch.Tensor, ppo: PpoConfig) -> LossRows:
    weights = loss_weights(mask, ppo.aggregation, ppo.constant_tokens).double()
    return LossRows(
        weights=weights,
        old_logprobs=tensor(rows["old"]),
        sampler_logprobs=tensor(rows["sampler"]),
        ref_logprobs=tensor(rows["ref"]),
        old_values=tensor(rows["old_values"]),
        advantages=tensor(rows["advantages"]),
        returns=tensor(rows["returns"]),
        total=float(weights.sum()),
    )


def tensor(values: np.ndarray) -> torch.Tensor:
    # What lies behind the end must not count, not even as NaN.
    behind = np.arange(SHAPE[1])[None] >= np.array(LENGTHS)[:, None]
    return torch.tensor(np.where(behind, np.nan, values))


@pytest.mark.parametrize(
    ("ppo", "kl"),
    [
        ({}, {}),
        ({"clip": 0.1, "clip_high": 0.6, "dual_clip": 1.8, "aggregation": "sequence_mean"}, {}),
        ({"ratio": "sequence", "clip": 0.05, "aggregation": "sequence_mean"}, {}),
        ({"ratio": "sequence_token", "clip": 0.05, "value_clip": None}, {}),
        ({"importance_cap": 1.1}, {"placement": "loss", "estimator": "k3"}),
        (
            {"importance_cap": 1.1, "importance_level": "sequence", "aggregation": "constant", "constant_tokens": 9},
            {"placement": "loss", "estimator": "k1", "importance_weighted": True},
        ),
        ({}, {"placement": "loss", "estimator": "k2"}),
    ],
)
def test_the_loss_is_its_equation(ppo: dict[str, object], kl: dict[str, object]) -> None:
    made, penalty = PpoConfig.model_validate(ppo), KlConfig.model_validate(kl)
    controls = StepControls(rate_factor=1.0, kl_coefficient=0.3, entropy_coefficient=0.02)
    mask = torch.arange(SHAPE[1])[None] < torch.tensor(LENGTHS)[:, None]
    for seed in range(5):
        rows = random_rows(seed)
        output = PolicyOutput(tensor(rows["new"]), tensor(rows["entropy"]), tensor(rows["values"]), torch.zeros(3))
        loss, _ = minibatch_loss(output, rows_of(rows, mask, made), Objective(made, penalty), controls)
        assert float(loss) == pytest.approx(plain_loss(rows, made, penalty, controls), rel=1e-6)


def test_shares_and_means_do_not_depend_on_the_constant() -> None:
    """With Dr. GRPO's constant the weights add up to another number than 1; entropy, KL and shares are token means."""
    mask = torch.arange(SHAPE[1])[None] < torch.tensor(LENGTHS)[:, None]
    seen = np.zeros(5)
    for seed in range(8):
        rows = random_rows(seed)
        output = PolicyOutput(tensor(rows["new"]), tensor(rows["entropy"]), tensor(rows["values"]), torch.zeros(3))
        found: list[list[float]] = []
        for changes in ({}, {"aggregation": "constant", "constant_tokens": 50}):
            ppo = PpoConfig.model_validate({"clip": 0.1, "dual_clip": 1.1, **changes})
            objective, controls = Objective(ppo, KlConfig()), StepControls(1.0, 0.0, 0.0)
            _, one = minibatch_loss(output, rows_of(rows, mask, ppo), objective, controls)
            found.append([one.entropy, one.approx_kl, one.clipped, one.dual_clipped, one.ratio_error])
        assert found[1] == pytest.approx(found[0], rel=1e-6)
        seen += np.abs(found[0])
    assert seen.min() > 0, "there is something to compare"


def test_the_recipe_of_rloo_takes_steps_of_reinforce_on_whole_responses() -> None:
    """Its gradient is that of mean A * log pi(response), up to a factor: a response's tokens count, however many."""
    table = Path(algorithms.__file__).with_name("README.md").read_text(encoding="utf-8")
    (keys,) = re.findall(r"^\| RLOO \|.*`ppo: (\{.*\})` \|$", table, re.MULTILINE)
    ppo = PpoConfig.model_validate(yaml.safe_load(keys.replace("<rollout.max_tokens>", "24")))
    mask = torch.arange(SHAPE[1])[None] < torch.tensor(LENGTHS)[:, None]
    old = torch.full(SHAPE, -2.0)
    advantages = torch.where(mask, torch.tensor([[2.0], [-1.0], [0.5]]), 0.0)
    zeros = torch.zeros(SHAPE)
    rows = LossRows(loss_weights(mask, ppo.aggregation, ppo.constant_tokens), old, old, old, zeros, advantages, zeros)
    logprobs = old.clone().requires_grad_()
    output = PolicyOutput(logprobs, zeros, zeros, torch.zeros(SHAPE[0]))
    minibatch_loss(output, rows, Objective(ppo, KlConfig(), critic=False), StepControls(1.0, 0.0, 0.0))[0].backward()
    assert logprobs.grad is not None
    factor = logprobs.grad[0, 0] / -advantages[0, 0]
    torch.testing.assert_close(logprobs.grad, -advantages * factor)
