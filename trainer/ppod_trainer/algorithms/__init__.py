"""How advantages come from a step's experience: one file an algorithm, each with its paper and its equation."""

from __future__ import annotations

from ppod_trainer.algorithms.base import AdvantageEstimator, Experience, LearnedEstimator
from ppod_trainer.algorithms.gae import Gae
from ppod_trainer.algorithms.gigpo import Gigpo
from ppod_trainer.algorithms.grpo import Grpo
from ppod_trainer.algorithms.pvpo import Pvpo
from ppod_trainer.algorithms.reinforce_pp import ReinforcePlusPlus
from ppod_trainer.algorithms.returns import MonteCarlo, OneStep
from ppod_trainer.algorithms.rloo import Rloo
from ppod_trainer.algorithms.sequence import SequenceAdvantage
from ppod_trainer.algorithms.spa import Spa
from ppod_trainer.config import AdvantagesConfig
from ppod_trainer.presampling import PreEstimates

__all__ = ["AdvantageEstimator", "Experience", "LearnedEstimator", "build_estimator"]


def build_estimator(
    config: AdvantagesConfig, hidden_size: int = 1, estimates: PreEstimates | None = None, seed: int = 0
) -> AdvantageEstimator:
    """The estimator that the configuration names.

    Args:
        config: names it.
        hidden_size: of the policy, for those that read its states.
        estimates: for pvpo; they are there once they are sampled.
        seed: for those that have parameters of their own.
    """
    match config.kind:
        case "gae":
            return Gae(config.gamma, config.lam, config.bootstrap_truncated, config.value_lam, config.lam_length_alpha)
        case "monte_carlo":
            return MonteCarlo(config.gamma, config.bootstrap_truncated)
        case "one_step":
            return OneStep(config.gamma, config.bootstrap_truncated)
        case "sequence":
            return SequenceAdvantage(config.bootstrap_truncated)
        case "grpo" | "dr_grpo":
            return Grpo(scaled=config.kind == "grpo")
        case "rloo":
            return Rloo()
        case "pvpo":
            return Pvpo(PreEstimates() if estimates is None else estimates)
        case "gigpo":
            return Gigpo(config.gigpo)
        case "spa":
            return Spa(config.spa, Gae(config.gamma, config.lam, config.bootstrap_truncated), hidden_size, seed)
        case "reinforce_pp" | "reinforce_pp_baseline":
            return ReinforcePlusPlus(config.gamma, baseline=config.kind == "reinforce_pp_baseline")
