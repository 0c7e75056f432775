"""What becomes of a run whose pushes have to be done again, or fail: of its samples' age, its bases and its steps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from torch import nn

from ppod import DeadlineExceeded, FailedPrecondition, PpodError, ResourceExhausted, Unavailable
from ppod.client import LoraAdapter, ModelState, WeightPush, WeightStatus
from ppod_trainer.assembly import presample_for
from ppod_trainer.checkpoint import TrainerState
from ppod_trainer.config import WeightTransferConfig
from ppod_trainer.errors import StopRequestedError, WeightPushError
from ppod_trainer.evaluation import Evaluator
from ppod_trainer.metrics import StepTimer
from ppod_trainer.pipeline import RolloutPipeline
from ppod_trainer.policy_push import PolicyPush
from ppod_trainer.policy_versions import PolicyVersions
from ppod_trainer.presampling import PreEstimates
from ppod_trainer.prompts import Prompt, PromptSet
from ppod_trainer.rollouts import Rollout, ScoredRollout, keep_fresh
from ppod_trainer.training import TrainingRun
from ppod_trainer.weight_replicas import FixedReplicas
from ppod_trainer.weight_sync import WeightSync
from support.pushed_runs import Generation, Replica, TrainedError, run_of
from support.random_rollouts import random_rollouts
from support.versioned_rollouts import Services


def test_a_policy_that_is_pushed_again_makes_no_sample_older(tmp_path: Path) -> None:
    """One of two replicas has committed the version that the other one lost: it comes again, under another number."""
    generation = Generation()
    overlap: dict[str, object] = {"rollout": {"max_staleness": 1}, "ppo": {"importance_cap": 2.0}}
    run = run_of(tmp_path, generation, TrainerState(0, 0, 0, ""), overlap)
    run.push_policy(1)
    ages: list[int] = []
    for step in range(5):
        [taken] = run._pipeline.take(step).rollouts
        ages.append(taken.rollout.age(run._versions))
        assert keep_fresh([taken], run._versions, 1) == ([taken], 0)
        while len(cast(Services, run.parts.rollouts).asked) < min(step + 2, 5):
            time.sleep(0.001)
        generation.half = step == 1
        run._push_update(run.state.policy_version + 1)
    run.close()
    assert run.state.policy_version == 7, "five updates, and one of them twice"
    assert ages == [0, 1, 1, 1, 1]


class Adapted:
    """What a push of an adapter asks of `WeightSync`; remembers what serves."""

    def __init__(self) -> None:
        self.bases = {0}
        self.serves = "nothing"
        self.gone = False

    def base_versions(self) -> set[int]:
        return self.bases

    def push(self, model: object, dtype: torch.dtype, weight_version: int) -> None:
        del model, dtype
        if self.gone:
            raise WeightPushError("there is no replica to push to")
        self.bases, self.serves = {weight_version}, "base"
        time.sleep(0.05)

    def push_adapter(self, description: object, tensors: object, weight_version: int, base_version: int) -> None:
        del description, tensors
        assert self.bases == {base_version}
        time.sleep(0.02)
        self.serves = f"adapter {weight_version}"


class Watching(Services):
    """Remembers what served as rollouts were made."""

    def __init__(self, generation: Adapted) -> None:
        super().__init__()
        self._generation = generation
        self.served: list[str] = []

    def generate(self, step: int, number: int, policy_version: int | None, timer: StepTimer) -> list[Rollout]:
        self.served.append(self._generation.serves)
        return super().generate(step, number, policy_version, timer)


def test_nothing_is_sampled_from_an_adapters_base_while_both_are_pushed() -> None:
    generation, versions = Adapted(), PolicyVersions()
    leader = SimpleNamespace(
        adapter=SimpleNamespace(description=None),
        base_model=lambda _: nn.Linear(1, 1),
        adapter_weights=lambda: time.sleep(0.005) or {},
    )
    stop = SimpleNamespace(deferred=nullcontext)
    push = PolicyPush(cast(Any, leader), cast(Any, generation), cast(Any, stop), versions)
    services = Watching(generation)
    services.slow_s = 0.02
    pipeline = RolloutPipeline(services, ahead=2, steps=6, mixes=False)
    version = push.push(torch.float32, 1, pipeline.new_weights)
    for step in range(6):
        pipeline.take(step)
        if step == 2:
            generation.bases = {0, *generation.bases}
        version = push.push(torch.float32, version + 1, pipeline.new_weights)
    pipeline.close()
    assert version == 9
    assert not {"base", "nothing"} & set(services.served)
    # Where versions may mix, what the bases of versions 1 and 5 sampled is too old.
    assert (versions.ages(np.array([1, 2, 5, 6])) > 1000).tolist() == [True, False, True, False]


def test_a_version_that_was_to_be_a_base_is_none_of_the_policys() -> None:
    """The base failed to come, and the replica that lacked it left; another one may have it all the same."""
    generation, versions = Adapted(), PolicyVersions()
    leader = SimpleNamespace(
        adapter=SimpleNamespace(description=None),
        base_model=lambda _: nn.Linear(1, 1),
        adapter_weights=lambda: {},
    )
    push = PolicyPush(
        cast(Any, leader), cast(Any, generation), cast(Any, SimpleNamespace(deferred=nullcontext)), versions
    )

    def in_service(_: int) -> AbstractContextManager[None]:
        return nullcontext()

    assert push.push(torch.float32, 1, in_service) == 2
    generation.bases, generation.gone = {0}, True
    with pytest.raises(WeightPushError):
        push.push(torch.float32, 3, in_service)
    generation.bases, generation.gone = {1}, False
    assert push.push(torch.float32, 3, in_service) == 4
    assert (versions.ages(np.array([3, 4])) > 1000).tolist() == [True, False]
    assert push.push(torch.float32, 5, in_service) == 5


def adapted() -> SimpleNamespace:
    """Whoever has a policy that is an adapter on a base."""
    return SimpleNamespace(
        adapter=SimpleNamespace(description=LoraAdapter(1, 1.0, ("x",))),
        base_model=lambda _: nn.Linear(2, 2),
        adapter_weights=lambda: {"x": torch.zeros(2)},
    )


@pytest.mark.parametrize("later", [False, True])
def test_a_base_that_is_lost_after_it_was_looked_for_is_pushed_again(tmp_path: Path, later: bool) -> None:
    a, b = Replica("a"), Replica("b")
    sync = WeightSync(FixedReplicas(cast(Any, [a, b]), "stop"), WeightTransferConfig())
    run = run_of(tmp_path, sync, TrainerState(0, 0, 0, ""), {}, learner=adapted())
    run.push_policy(1)
    assert [(one.version, one.base) for one in (a, b)] == [(2, 1), (2, 1)]
    wait = run._pipeline.new_weights

    @contextmanager
    def restarts_meanwhile(version: int) -> Generator[None]:
        run._pipeline.new_weights = wait
        with wait(version):
            b.restart()
            yield

    if later:
        # Between the look at all bases and the adapter's own push.
        b.before_push = b.restart
    else:
        run._pipeline.new_weights = restarts_meanwhile
    run.push_policy(3)
    assert a.base == b.base > 2
    assert a.version == b.version == run.state.policy_version == a.base + 1


def test_a_replica_that_takes_no_base_is_passed_over_where_that_is_allowed(tmp_path: Path) -> None:
    """As one whose disk is full: it answers, and has another base than the others for ever."""
    a, b = Replica("a"), Replica("b")

    def refuse() -> None:
        raise ResourceExhausted("no room", 1.0)

    b.before_push = refuse
    sync = WeightSync(FixedReplicas(cast(Any, [a, b]), "skip"), WeightTransferConfig())
    leader = SimpleNamespace(
        adapter=SimpleNamespace(description=LoraAdapter(1, 1.0, ("x",))),
        base_model=lambda _: nn.Linear(2, 2),
        adapter_weights=lambda: {"x": torch.zeros(2)},
    )
    config: dict[str, object] = {"services": {"recovery_timeout_s": 0.1}}
    run = run_of(tmp_path, sync, TrainerState(0, 0, 0, ""), config, learner=leader)
    for version in (1, 3):
        run.push_policy(version)
        assert (a.version, a.base, b.version, b.base) == (version + 1, version, 0, 0)


class Blinking(Replica):
    """Its next commit is not heard of, whether it `takes` it or not; whether anything is heard afterwards: `away`."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.next_commit: Literal["takes", "loses"] | None = None
        self.away = self.goes = False

    def status(self, **_: object) -> WeightStatus:
        self._answer()
        return super().status()

    def push(self, push: WeightPush) -> object:
        self._answer()
        return super().push(push)

    def commit(self, weight_version: int, **_: object) -> float:
        self._answer()
        unheard, self.next_commit = self.next_commit, None
        if unheard != "loses":
            super().commit(weight_version)
        if unheard is not None:
            self.away = self.goes
        self._answer()
        if unheard is not None:
            raise Unavailable("the connection broke")
        return 0.0

    def _answer(self) -> None:
        if self.away:
            raise Unavailable("no answer")


def test_a_policy_never_has_the_version_of_a_base_that_some_replica_may_serve(tmp_path: Path) -> None:
    """The network breaks as a base is committed: one that has it, and one that needs it, are gone for a while."""
    replicas = a, b, c = [Blinking(name) for name in "abc"]
    sync = WeightSync(FixedReplicas(cast(Any, replicas), "skip"), WeightTransferConfig())
    run = run_of(tmp_path, sync, TrainerState(0, 0, 0, ""), {}, learner=adapted())
    run.push_policy(1)
    b.restart()
    a.next_commit, b.next_commit, c.next_commit = "takes", "loses", "loses"
    a.goes = b.goes = True
    run.push_policy(3)
    assert (a.version, a.base) == (3, 3), "the base, without an adapter"
    assert (c.version, c.base) == (4, 1)
    assert run.state.policy_version == 4
    assert (run._versions.ages(np.array([3, 4])) > 1000).tolist() == [True, False]


class AwayOnce:
    """A judge's client, whose first call ends with this error."""

    def __init__(self, error: PpodError) -> None:
        self._error = error
        self.calls = 0

    def score(self, sequences: list[object], **_: object) -> object:
        self.calls += 1
        if self.calls == 1:
            raise self._error
        return SimpleNamespace(values=np.zeros(len(sequences), np.float32), state=ModelState("judge", 0, ""))


@pytest.mark.parametrize("error", [Unavailable("the judge's pod is moved"), DeadlineExceeded("no answer within 120 s")])
def test_a_judge_that_is_away_for_a_moment_is_asked_again(tmp_path: Path, error: PpodError) -> None:
    def learn(*_: object) -> None:
        raise TrainedError

    judge = AwayOnce(error)
    run = run_of(
        tmp_path,
        SimpleNamespace(serving_versions=lambda: {0}),
        TrainerState(0, 0, 0, ""),
        {"rollout": {"batch_size": 1}, "ppo": {"minibatches": 1}, "services": {"judge_model": "judge"}},
        evaluator=Evaluator(cast(Any, None), cast(Any, judge), [], cast(Any, str)),
        learner=SimpleNamespace(learn=learn, adapter=None),
    )
    with pytest.raises(TrainedError):
        run._step()
    assert judge.calls == 2


def test_presampling_goes_on_where_a_replica_lost_its_weights(tmp_path: Path) -> None:
    """It came back with version 0: it is given the policy under a new version, and asked for the same samples."""
    generation = Generation()
    asked: list[tuple[list[int], int]] = []

    def collect(prompts: list[Prompt], seeds: list[int], version: int, _: StepTimer) -> list[ScoredRollout]:
        asked.append((seeds, version))
        if len(asked) == 2:
            generation.serves["b"] = 0
        if generation.serves != dict.fromkeys("ab", version):
            raise FailedPrecondition("weight_version", "0", str(version))
        found = random_rollouts(len(prompts))
        return [
            replace(one, score=float(prompt.index), rollout=replace(one.rollout, prompt=prompt, seed=seed))
            for one, prompt, seed in zip(found, prompts, seeds, strict=True)
        ]

    pvpo: dict[str, object] = {
        "rollout": {"batch_size": 2},
        "advantages": {"kind": "pvpo", "presamples": 2},
        "kl": {"placement": "loss", "estimator": "k3"},
    }
    prompts = PromptSet([Prompt(index, np.array([index], np.int32)) for index in range(3)], [])
    run = run_of(
        tmp_path,
        generation,
        TrainerState(0, 0, 0, ""),
        pvpo,
        collector=SimpleNamespace(collect=collect),
        prompts=prompts,
        estimates=PreEstimates(),
    )
    run.push_policy(1)
    presample_for(run)
    assert run.parts.estimates.values == {0: 0.0, 1: 1.0, 2: 2.0}
    assert [version for _, version in asked] == [1, 1, 2, 2]
    assert asked[1][0] == asked[2][0]


class KeptReference:
    """Notes under which versions a reference was kept; generation is gone, and with it the reference service."""

    def __init__(self) -> None:
        self.kept: list[int] = []

    def keep(self, model: object, version: int, needed: object) -> None:
        del model, needed
        self.kept.append(version)

    def serve(self, version: int) -> None:
        del version
        raise WeightPushError("the reference does not tell which weights it has") from Unavailable("gone")


def ended(tmp_path: Path, *, stopped: bool) -> tuple[TrainingRun, KeptReference, list[TrainerState]]:
    """A run with generation gone, at the end of a step whose reference is to be refreshed."""
    generation, reference, saved = Generation(), KeptReference(), list[TrainerState]()
    generation.gone = True
    services: dict[str, object] = {"reference_admin": "127.0.0.1:1", "recovery_timeout_s": 0.1}
    further = {"reference_refresh_steps": 1, "services": services}
    run = run_of(tmp_path, generation, TrainerState(3, 3, 2, ""), further)
    run._reference = cast(Any, reference)
    run.save = lambda: saved.append(run.state) or tmp_path
    if stopped:
        run.parts.stop.received = signal.SIGTERM
    run._push_update(4)
    return run, reference, saved


def test_a_stop_before_a_refresh_is_a_stop_and_keeps_the_reference_before(tmp_path: Path) -> None:
    run, reference, saved = ended(tmp_path, stopped=True)
    with pytest.raises(StopRequestedError):
        run._after_step()
    # Not in the place of version 3, which an earlier checkpoint may name.
    assert reference.kept == [4]
    assert [(state.policy_version, state.reference_version) for state in saved] == [(4, 4)]


def test_a_step_whose_push_fails_for_good_is_kept(tmp_path: Path) -> None:
    run, reference, saved = ended(tmp_path, stopped=False)
    with pytest.raises(WeightPushError, match="which weights it has"):
        run._after_step()
    assert reference.kept == [4]
    assert [(state.policy_version, state.reference_version) for state in saved] == [(4, 4)]


def test_the_new_version_is_told_before_anybody_may_generate_again() -> None:
    told: list[int] = []
    with_lock = RolloutPipeline(Services(), ahead=1, steps=2, mixes=False)

    class NotingLock:
        def __init__(self) -> None:
            self._lock = threading.Lock()

        def acquire(self, timeout: float = -1) -> bool:
            return self._lock.acquire(timeout=timeout)

        def release(self) -> None:
            told.append(with_lock.version)
            self._lock.release()

    with_lock._generating = cast(Any, NotingLock())
    with with_lock.new_weights(5):
        assert with_lock.version == 0
    assert told == [5]
    with_lock.close()
