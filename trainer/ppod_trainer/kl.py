"""KL divergence to the reference: Schulman's estimators and the coefficient's controllers.

Source of k1, k2, k3: J. Schulman, "Approximating KL Divergence" (2020). With x sampled from the policy and
d = log policy(x) - log reference(x):

    k1 = d                    unbiased, high variance, may be negative
    k2 = d^2 / 2              biased, never negative
    k3 = exp(-d) - 1 + d      unbiased, never negative

In the reward an estimate is a number, and the policy gradient sees to the rest. In the loss it is differentiated, and
what counts is the expectation of its gradient over x sampled from the policy, s = grad log policy(x):

    k1: E[s] = 0                                          nothing at all
    k2: E[d s] = grad KL(policy, reference)
    k3: E[(1 - reference(x) / policy(x)) s] = grad KL(reference, policy), the other direction

From the second minibatch on, x was sampled by the old policy, not by this one, and even these are off. Weighted with
r = policy(x) / old(x), with gradient for k1 and k3, without for k2, all three have the gradient of
KL(policy, reference), however far the policies are apart: for k1 and k3, E_old[r k] is that KL itself (DeepSeek-AI
2025, V3.2, 3.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch

from ppod_trainer.ratios import bounded_exp, bounded_expm1
from ppod_trainer.stateful import JsonState

KlEstimator = Literal["k1", "k2", "k3"]

_ERROR_BOUND = 0.2
"""Bound of the controller's proportional error, so that one wild batch moves the coefficient by a fifth at most."""


def estimate_kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: KlEstimator) -> torch.Tensor:
    """Estimate KL(policy, reference) for each token, in nats; same shape as the inputs."""
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    return bounded_expm1(-difference) + difference


def kl_token_loss(
    new_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor,
    estimator: KlEstimator,
    *,
    importance_weighted: bool,
) -> torch.Tensor:
    """The estimate to be minimised, weighted with policy / old or not (see above); same shape as the inputs."""
    estimate = estimate_kl(new_logprobs, ref_logprobs, estimator)
    if not importance_weighted:
        return estimate
    log_ratios = new_logprobs - old_logprobs
    return estimate * bounded_exp(log_ratios.detach() if estimator == "k2" else log_ratios)


@dataclass(slots=True)
class FixedKl:
    """A coefficient that stays."""

    coefficient: float

    def update(self, kl: float, samples: int) -> None:
        """Do nothing: the coefficient is fixed."""

    def state(self) -> JsonState:
        """Nothing changes."""
        return {}

    def restore(self, state: JsonState) -> None:
        """Nothing changes."""


@dataclass(slots=True)
class AdaptiveKl:
    """Proportional controller of Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", 2.2.

    Attributes:
        coefficient: the present coefficient.
        target: KL to steer to, nats a response.
        horizon: samples over which the coefficient adapts.
    """

    coefficient: float
    target: float
    horizon: int

    def update(self, kl: float, samples: int) -> None:
        """Multiply the coefficient by 1 + clip(kl / target - 1, +-0.2) * samples / horizon."""
        error = min(max(kl / self.target - 1.0, -_ERROR_BOUND), _ERROR_BOUND)
        self.coefficient *= 1.0 + error * samples / self.horizon

    def state(self) -> JsonState:
        """The present coefficient."""
        return {"coefficient": self.coefficient}

    def restore(self, state: JsonState) -> None:
        """Take the coefficient of a checkpoint."""
        self.coefficient = float(cast(float, state["coefficient"]))


KlController = FixedKl | AdaptiveKl
