"""Replicas that sample with other weights than the run's, where versions may mix and so none is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ppod import FailedPrecondition
from ppod_trainer.checkpoint import TrainerState
from ppod_trainer.evaluation import Evaluator
from ppod_trainer.metrics import StepTimer
from ppod_trainer.rollouts import Rollout, ScoredRollout
from support.pushed_runs import Generation, TrainedError, run_of
from support.versioned_rollouts import Services


class OfReplica(Services):
    """Asks one replica, whatever it serves where no version is asked for."""

    def __init__(self, generation: Generation) -> None:
        super().__init__()
        self._generation = generation

    def generate(self, step: int, number: int, policy_version: int | None, timer: StepTimer) -> list[Rollout]:
        serves = self._generation.serves["b"]
        if policy_version not in (None, serves):
            raise FailedPrecondition("weight_version", str(serves), str(policy_version))
        return super().generate(step, number, serves, timer)


class Mixing:
    """A run whose rollouts come from whatever its replica `b` serves.

    Attributes:
        generation: the replicas.
        run: the run.
        learned: versions of the samples that came to an update, and how many updates old they were.
    """

    def __init__(self, directory: Path, state: TrainerState, max_staleness: int) -> None:
        self.generation = Generation()
        self.learned: list[tuple[int, int]] = []
        self.run = run_of(
            directory,
            self.generation,
            state,
            {
                "rollout": {"batch_size": 1, "max_staleness": max_staleness},
                "ppo": {"minibatches": 1, "importance_cap": 2.0},
                "weight_transfer": {"pause": "keep"},
            },
            rollouts=OfReplica(self.generation),
            learner=SimpleNamespace(learn=self._learn, adapter=None, whole_model=lambda *_: None),
            evaluator=Evaluator(cast(Any, None), None, [], cast(Any, str)),
        )

    def step(self) -> None:
        """Up to the update."""
        with pytest.raises(TrainedError):
            self.run._step()
        self.run.close()

    def _learn(self, found: Sequence[ScoredRollout], *_: object) -> None:
        for one in found:
            self.learned.append((int(one.rollout.versions[0]), one.rollout.age(self.run._versions)))
        raise TrainedError


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
def test_a_replica_without_the_runs_weights_is_given_them_where_versions_may_mix(
    tmp_path: Path, max_staleness: int
) -> None:
    """It was away at pushes that others took, and was started again: none of its samples can be trained on."""
    mixing = Mixing(tmp_path, TrainerState(0, 0, 0, ""), max_staleness)
    mixing.run.push_policy(1)
    for version in range(2, 5):
        mixing.run._push_update(version)
    mixing.generation.serves["b"] = 0
    mixing.step()
    assert mixing.learned == [(5, 0)]
    assert mixing.generation.serves == {"a": 5, "b": 5}


@pytest.mark.parametrize("served", [0, 899, 2000], ids=["deployed", "earlier", "of another run"])
def test_a_resumed_run_trains_on_no_sample_of_weights_that_it_did_not_push(tmp_path: Path, served: int) -> None:
    """It has made no update yet, so that by updates alone these would be as young as its own."""
    mixing = Mixing(tmp_path, TrainerState(5, 900, 0, ""), 1)
    mixing.run.push_policy(900)
    mixing.generation.serves["b"] = served
    mixing.step()
    version = max(900, served) + 1
    assert mixing.learned == [(version, 0)]
    assert mixing.generation.serves == {"a": version, "b": version}
