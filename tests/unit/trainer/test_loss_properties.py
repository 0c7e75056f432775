"""The loss of any minibatch, whatever lies between its tokens and however its rows are cut."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppod_trainer.config import KlConfig, PpoConfig
from ppod_trainer.controls import StepControls
from ppod_trainer.loss import LossFigures, LossRows, Objective, minibatch_loss
from ppod_trainer.masking import loss_weights
from ppod_trainer.policy import PolicyOutput

CONTROLS = StepControls(rate_factor=1.0, kl_coefficient=0.3, entropy_coefficient=0.02)
NAMES = ("old", "sampler", "ref", "old_values", "advantages", "returns")
LEARNED = ("new", "entropy", "values")
PPO = st.fixed_dictionaries(
    {
        "ratio": st.sampled_from(["token", "sequence", "sequence_token"]),
        "clip": st.sampled_from([0.01, 0.2, 0.9]),
        "clip_high": st.sampled_from([None, 0.05, 3.0]),
        "dual_clip": st.sampled_from([None, 1.01, 3.0]),
        "value_clip": st.sampled_from([None, 0.2]),
    },
    optional={"importance_cap": st.sampled_from([0.5, 2.0])},
)
AGGREGATIONS = st.sampled_from(["token_mean", "sequence_mean", "constant"])
KL = st.sampled_from(
    [
        KlConfig(),
        KlConfig(placement="loss", estimator="k2"),
        KlConfig(placement="loss", estimator="k3"),
        KlConfig(placement="loss", estimator="k1", importance_weighted=True),
        KlConfig(placement="loss", estimator="k3", importance_weighted=True),
    ]
)
Values = dict[str, torch.Tensor]


def drawn(generator: np.random.Generator, rows: int, width: int) -> Values:
    made = {name: torch.from_numpy(generator.normal(size=(rows, width))) for name in (*NAMES, *LEARNED)}
    return made | {name: made["old"] + 0.5 * made[name] for name in ("new", "sampler", "ref")}


def gradients(
    values: Values, mask: torch.Tensor, parts: Sequence[torch.Tensor], ppo: PpoConfig, kl: KlConfig
) -> tuple[Values, LossFigures]:
    """Of the loss by what is learned, added up over the parts of the rows."""
    weights = loss_weights(mask, ppo.aggregation, ppo.constant_tokens).double()
    learned = {name: values[name].clone().requires_grad_() for name in LEARNED}
    total = LossFigures()
    for part in parts:
        new, entropy, own = (learned[name][part] for name in LEARNED)
        rows = LossRows(weights[part], *(values[name][part] for name in NAMES), total=float(weights.sum()) or 1.0)
        loss, figures = minibatch_loss(PolicyOutput(new, entropy, own, own[:, 0]), rows, Objective(ppo, kl), CONTROLS)
        loss.backward()
        total.add(figures)
    return {name: one.grad for name, one in learned.items() if one.grad is not None}, total


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6)),
    options=PPO,
    aggregation=AGGREGATIONS,
    kl=KL,
    seed=st.integers(0, 10_000),
)
@settings(max_examples=80, deadline=None)
def test_holes_and_cuts_change_nothing(
    shape: tuple[int, int], options: dict[str, object], aggregation: str, kl: KlConfig, seed: int
) -> None:
    """Rows of several lengths, none among them, moved apart at random; in the gaps anything may stand."""
    constant = 7 if aggregation == "constant" else None
    ppo = PpoConfig.model_validate({**options, "aggregation": aggregation, "constant_tokens": constant})
    generator = np.random.default_rng(seed)
    rows, width = shape
    dense = drawn(generator, rows, width)
    mask = torch.arange(width)[None] < torch.from_numpy(generator.integers(0, width + 1, rows))[:, None]
    plain, figures = gradients(dense, mask, [torch.arange(rows)], ppo, kl)

    apart = drawn(generator, rows, 2 * width)
    places = torch.stack([torch.from_numpy(np.sort(generator.permutation(2 * width)[:width])) for _ in range(rows)])
    wide = torch.zeros(rows, 2 * width, dtype=torch.bool).scatter(1, places, mask)
    spread = {
        name: torch.where(wide, apart[name].scatter(1, places, values), 50 * apart[name])
        for name, values in dense.items()
    }
    cut = int(generator.integers(0, rows + 1))
    parts = [part for part in (torch.arange(cut), torch.arange(cut, rows)) if len(part)]
    moved, same = gradients(spread, wide, parts, ppo, kl)

    assert set(moved) == set(plain)
    for name, gradient in moved.items():
        torch.testing.assert_close(gradient.gather(1, places)[mask], plain[name][mask], atol=1e-9, rtol=1e-7)
        assert not gradient[~wide].any()
    for name in ("policy", "value", "kl", "entropy", "clipped", "dual_clipped", "approx_kl", "ratio_error"):
        assert getattr(same, name) == pytest.approx(getattr(figures, name), abs=1e-7)
