"""Dynamic sampling: groups that say nothing are dropped, and further prompts are sampled until the batch is full.

Yu et al. 2025, "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", section 3.2, equation 11: a group
enters the batch only if its outcomes differ. Where they are all equal, its advantages are 0 (see `algorithms.grpo`):
the better, or the more hopeless, the policy is, the fewer samples of a batch would have a gradient.

Each round samples as many prompts as a step has; groups are taken in their order until the batch is full, what is left
over is dropped. The prompts and seeds of a round follow from (seed, step, round). `max_rounds` bounds what a step may
cost; where its rounds did not give enough, the batch is filled up with groups that were dropped, the first ones first:
their advantages are 0, so the step is as it would be without dynamic sampling, and a run whose prompts are all solved
goes on.

What is compared is the outcome with its score clipped as training clips it: where all of a group are beyond the clip
they are paid the same, whatever the reward model told. Penalties for length are left out, as in the paper.

All of DAPO, by its sections, is:

    3.1 clip-higher              ppo.clip 0.2 and ppo.clip_high 0.28
    3.2 dynamic sampling         rollout.dynamic_sampling
    3.3 token-level loss         ppo.aggregation token_mean
    3.4 overlong reward shaping  rewards, its penalty near the longest response
    2.3 no KL, rule-based reward kl.coefficient 0, rewards.model false with an environment
    and GRPO's advantages        advantages.kind grpo, rollout.samples_per_prompt 16
"""

from __future__ import annotations

from collections.abc import Sequence

from ppod_trainer.rollouts import ScoredRollout
from ppod_trainer.rounding import alike
from ppod_trainer.selection.rounds import Selected

Group = list[ScoredRollout]


class DynamicSampling:
    """Groups whose outcomes differ.

    Args:
        groups: wanted in a step.
        max_rounds: most rounds that look for them.
        clip: bounds scores to [-clip, clip]; None: nothing does, or nobody knows before the update.
    """

    def __init__(self, groups: int, max_rounds: int, clip: float | None = None) -> None:
        self._groups = groups
        self._max_rounds = max_rounds
        self._clip = clip

    @property
    def max_rounds(self) -> int:
        """As given."""
        return self._max_rounds

    def select(self, rounds: Sequence[Sequence[ScoredRollout]]) -> Selected:
        """See `Selection`."""
        groups = [group for samples in rounds for group in split_groups(samples)]
        varied = [group for group in groups if not is_uniform(group, self._clip)]
        uniform = [group for group in groups if is_uniform(group, self._clip)]
        filled = uniform[: max(self._groups - len(varied), 0)]
        chosen = [*varied[: self._groups], *filled]
        figures = {
            "selection/rounds": float(len(rounds)),
            "selection/uniform_groups": float(len(uniform)),
            "selection/filled_groups": float(len(filled)),
        }
        return Selected([one for group in chosen for one in group], len(varied) >= self._groups, figures)


def split_groups(samples: Sequence[ScoredRollout]) -> list[Group]:
    """The groups of a round, in the order of their first samples."""
    groups: dict[int, Group] = {}
    for one in samples:
        groups.setdefault(one.rollout.group, []).append(one)
    return list(groups.values())


def is_uniform(group: Group, clip: float | None = None) -> bool:
    """Whether all were paid the same, as what is left of a group may be: one sample."""
    return alike([_paid(one, clip) for one in group])


def _paid(one: ScoredRollout, clip: float | None) -> float:
    score = one.score if clip is None else min(max(one.score, -clip), clip)
    return score + float(one.rollout.rewards.sum())
