"""KL estimators and controllers, by enumeration and by hand."""

from __future__ import annotations

import math

import pytest
import torch

from ppod_trainer.kl import AdaptiveKl, FixedKl, KlEstimator, estimate_kl, kl_token_loss

LOGITS = torch.tensor([0.3, -1.2, 0.9, 0.1], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([-0.4, 0.2, 0.5, 1.0], dtype=torch.float64), dim=0)


def exact_kl(logits: torch.Tensor) -> torch.Tensor:
    logprobs = torch.log_softmax(logits, dim=0)
    return (logprobs.exp() * (logprobs - REFERENCE)).sum()


def expected(estimator: KlEstimator) -> float:
    """Expectation of the estimator over all outcomes, each weighted with its probability."""
    logprobs = torch.log_softmax(LOGITS, dim=0)
    return float((logprobs.exp() * estimate_kl(logprobs, REFERENCE, estimator)).sum())


def expected_gradient(estimator: KlEstimator) -> torch.Tensor:
    """What a loss term on samples gives on average: sum over x of p(x) * gradient of the estimate at x."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = torch.log_softmax(logits, dim=0)
    estimates = estimate_kl(logprobs, REFERENCE, estimator)
    (gradient,) = torch.autograd.grad((logprobs.detach().exp() * estimates).sum(), logits)
    return gradient


def test_values_by_hand() -> None:
    policy, reference = torch.tensor([-1.0]), torch.tensor([-1.5])
    assert float(estimate_kl(policy, reference, "k1")) == pytest.approx(0.5)
    assert float(estimate_kl(policy, reference, "k2")) == pytest.approx(0.125)
    assert float(estimate_kl(policy, reference, "k3")) == pytest.approx(math.exp(-0.5) - 1 + 0.5)


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    kl = float(exact_kl(LOGITS))
    assert expected("k1") == pytest.approx(kl, abs=1e-12)
    assert expected("k3") == pytest.approx(kl, abs=1e-12)
    assert abs(expected("k2") - kl) > 1e-3


def test_only_k2_has_the_gradient_of_kl_in_the_loss() -> None:
    logits = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(exact_kl(logits), logits)
    torch.testing.assert_close(expected_gradient("k2"), gradient)
    torch.testing.assert_close(expected_gradient("k1"), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    assert (expected_gradient("k3") - gradient).abs().max() > 0.05


def test_the_gradient_of_k3_in_the_loss_is_that_of_the_other_direction() -> None:
    logits = LOGITS.clone().requires_grad_()
    reverse = (REFERENCE.exp() * (REFERENCE - torch.log_softmax(logits, dim=0))).sum()
    (gradient,) = torch.autograd.grad(reverse, logits)
    torch.testing.assert_close(expected_gradient("k3"), gradient)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_weighted_with_the_ratio_the_gradient_is_that_of_kl_whoever_sampled(estimator: KlEstimator) -> None:
    old = torch.log_softmax(torch.tensor([1.0, 0.4, -0.9, 0.2], dtype=torch.float64), dim=0)
    logits = LOGITS.clone().requires_grad_()
    (expected_of_kl,) = torch.autograd.grad(exact_kl(logits), logits)

    def gradient(importance_weighted: bool) -> torch.Tensor:
        logprobs = torch.log_softmax(logits, dim=0)
        losses = kl_token_loss(logprobs, old, REFERENCE, estimator, importance_weighted=importance_weighted)
        return torch.autograd.grad((old.exp() * losses).sum(), logits)[0]

    torch.testing.assert_close(gradient(True), expected_of_kl)
    assert (gradient(False) - expected_of_kl).abs().max() > 0.05


def test_k3_of_a_token_that_the_reference_finds_far_likelier_stays_finite() -> None:
    logprobs = torch.tensor([-120.0], requires_grad=True)
    estimate = estimate_kl(logprobs, torch.tensor([-1.0]), "k3")
    estimate.backward()
    assert logprobs.grad is not None
    assert math.isfinite(float(estimate.detach()))
    assert math.isfinite(float(logprobs.grad))
    assert float(logprobs.grad) < -1e8


def test_adaptive_controller_by_hand() -> None:
    controller = AdaptiveKl(coefficient=0.1, target=6.0, horizon=1000)
    controller.update(kl=6.6, samples=100)  # error 0.1
    assert controller.coefficient == pytest.approx(0.1 * (1 + 0.1 * 0.1))
    controller.coefficient = 0.1
    controller.update(kl=600.0, samples=100)  # clipped to 0.2
    assert controller.coefficient == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    controller.coefficient = 0.1
    controller.update(kl=0.0, samples=100)  # clipped to -0.2
    assert controller.coefficient == pytest.approx(0.1 * (1 - 0.2 * 0.1))


def test_adaptive_controller_locks_at_its_target() -> None:
    """A plant whose KL falls as the coefficient rises: kl = 1 / coefficient."""
    controller = AdaptiveKl(coefficient=0.02, target=6.0, horizon=500)
    for _ in range(500):
        controller.update(kl=1 / controller.coefficient, samples=64)
    assert 1 / controller.coefficient == pytest.approx(6.0, rel=1e-3)


def test_fixed_controller_stays() -> None:
    controller = FixedKl(0.05)
    controller.update(kl=100.0, samples=1000)
    assert controller.coefficient == 0.05
