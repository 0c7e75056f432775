"""The training run: the loop that the whole package serves, once per step, on one screen.

prompts -> generation -> rollouts -> reward || reference -> scored rollouts
        -> learner (old logprobs, values, advantages, clipped update) -> new weights, version + 1 -> generation
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from opentelemetry import trace
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ppod import DeadlineExceeded, FailedPrecondition, Unavailable
from ppod_trainer.checkpoint import TrainerState, kept_references
from ppod_trainer.collector import RolloutCollector
from ppod_trainer.config import TrainerConfig
from ppod_trainer.connections import Connections
from ppod_trainer.controls import StepControls, learning_rate_at
from ppod_trainer.durable import written_aside
from ppod_trainer.errors import TrainerError, WeightPushError
from ppod_trainer.evaluation import Evaluation, Evaluator, write_samples
from ppod_trainer.kl import KlController
from ppod_trainer.leader import Leader
from ppod_trainer.metrics import MetricsLog, StepTimer, finite_record
from ppod_trainer.off_policy import measure_off_policy
from ppod_trainer.pipeline import Collected, RolloutPipeline
from ppod_trainer.policy_push import PolicyPush
from ppod_trainer.policy_versions import PolicyVersions
from ppod_trainer.policy_weights import wire_dtype
from ppod_trainer.presampling import PreEstimates
from ppod_trainer.prompts import Prompt, PromptSet
from ppod_trainer.recovery import Recovery
from ppod_trainer.reference_policy import ReferencePolicy, save_policy
from ppod_trainer.report import format_evaluation, format_step
from ppod_trainer.rollouts import ScoredRollout, keep_fresh
from ppod_trainer.sample_filters import keep_trainable
from ppod_trainer.schedules import entropy_coefficient_at, kl_coefficient_at, refreshes_after
from ppod_trainer.score_shaping import score_scale
from ppod_trainer.score_statistics import ScoreStatistics
from ppod_trainer.stateful import Stateful
from ppod_trainer.step_figures import rollout_figures, update_figures
from ppod_trainer.step_rollouts import StepRollouts
from ppod_trainer.stopping import StopSignal
from ppod_trainer.watch import Watcher

log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

_RECOVERIES = 3
"""How often something is asked of the services again before its error stops the run."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a run is put together from."""

    connections: Connections
    collector: RolloutCollector
    evaluator: Evaluator
    learner: Leader
    kl: KlController
    prompts: PromptSet
    tokenizer: PreTrainedTokenizerFast
    metrics: MetricsLog
    stop: StopSignal
    rollouts: StepRollouts
    estimates: PreEstimates
    watcher: Watcher
    scores: ScoreStatistics = field(default_factory=ScoreStatistics)

    @property
    def stateful(self) -> dict[str, Stateful]:
        """What a checkpoint keeps of them, besides the learner."""
        return {
            "kl": self.kl,
            "scores": self.scores,
            "watcher": self.watcher,
            "prompts": self.rollouts.schedule,
            **self.learner.shared,
        }


class TrainingRun:
    """One PPO run, from its state to its last step.

    Args:
        config: the resolved configuration.
        parts: clients, learner and outputs.
        state: where the run is; a new one is at step 0.

    Attributes:
        whole: the policy is that of `state.step`; false from the first change of a step to its end. Only a whole run
            may be saved.
    """

    def __init__(self, config: TrainerConfig, parts: Parts, state: TrainerState) -> None:
        self.config = config
        self.parts = parts
        self.state = state
        self.whole = True
        self._judged: list[float] = []
        self._unpushed: WeightPushError | Unavailable | None = None
        self._versions = PolicyVersions()
        rollout = config.rollout
        self._pipeline = RolloutPipeline(
            parts.rollouts,
            ahead=rollout.max_staleness,
            steps=config.steps,
            mixes=config.weight_transfer.pause != "wait" and rollout.max_staleness > 0,
            stopping=lambda: parts.stop.received is not None,
            fault=self._too_old,
        )
        self._reference = ReferencePolicy(config.run_dir / "reference", parts.connections)
        self._to_generation = PolicyPush(
            parts.learner, parts.connections.generation_weights, parts.stop, self._versions
        )
        self._recovery = Recovery(parts.connections, config.services.recovery_timeout_s, parts.stop)
        # A run that failed behind its last step is saved all the same, maybe without what is to follow on that step.
        self._unrefreshed = refreshes_after(state.step, config) and state.reference_version != state.policy_version

    def close(self) -> None:
        """Begin no more rollouts."""
        self._pipeline.close()

    def train(self) -> None:
        """Do all steps that are left.

        Raises:
            StopRequestedError: a signal came in; `state` is at the last whole step.
            TroubleError: the last step showed what `watch.stop` names.
            WeightPushError, Unavailable: generation did not get the weights of the last step, which is whole.
        """
        start, begun = time.perf_counter(), self.state.step
        if self._unrefreshed:
            self._after_step()
        elif begun and self._evaluates() and begun not in self.parts.metrics.evaluated:
            # The process ended between this checkpoint and its evaluation.
            self.evaluate()
        while self.state.step < self.config.steps:
            record = self._step()
            done = self.state.step - begun
            eta_s = (time.perf_counter() - start) / done * (self.config.steps - self.state.step)
            print(format_step(self.state.step, self.config.steps, record, eta_s), flush=True)
            self._after_step()
            self.parts.watcher.check(self.state.step)

    def evaluate(self) -> Evaluation:
        """Evaluate the present weights on the held-out prompts and record it."""
        with self.parts.stop.interruptible():
            evaluation = self._insist(lambda: self.parts.evaluator.evaluate(self.state.step, self.state.policy_version))
        write_samples(self.config.run_dir / "samples" / f"step_{self.state.step:06d}.jsonl", evaluation)
        if self.state.step not in self.parts.metrics.evaluated:
            self.parts.metrics.write(self.state.step, evaluation.record())
        print(format_evaluation(evaluation), flush=True)
        return evaluation

    def collect(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[ScoredRollout]:
        """A scored response of the present weights to each prompt, by its seed. Services that go away are waited for.

        Raises:
            StopRequestedError: a signal came in.
            PpodError: a service failed; or it named a bad sample and the configuration says to stop.
        """
        with self.parts.stop.interruptible():
            return self._insist(
                lambda: self.parts.collector.collect(prompts, seeds, self.state.policy_version, StepTimer())
            )

    def save(self) -> Path:
        """Write a checkpoint of the last whole step."""
        components = {name: one.state() for name, one in self.parts.stateful.items()}
        state = replace(self.state, components=components)
        # A checkpoint says that the records of its steps are there.
        self.parts.metrics.sync()
        return self.parts.learner.save(self._checkpoints, state, self.config.checkpoint.keep)

    def save_final_model(self) -> Path:
        """Write the policy as a directory that `AutoModelForCausalLM.from_pretrained` loads, and its adapter if any."""
        target, leader = self.config.run_dir / "final_model", self.parts.learner
        with written_aside(target) as directory:
            save_policy(leader.whole_model(), directory)
            self.parts.tokenizer.save_pretrained(directory)
        if leader.adapter is not None:
            with written_aside(self.config.run_dir / "final_adapter") as directory:
                leader.adapter.save(directory, leader.adapter_weights(), self.config.policy.source)
        return target

    def push_policy(self, weight_version: int) -> None:
        """Put the policy's weights into generation under a new version; a later one if it has to be done again.

        A run that was told to stop does without, so that its step is kept: resumed, it begins with a push.

        Raises:
            WeightPushError, Unavailable: a replica did not get them, and did not come back in time.
        """
        try:
            try:
                self._push(weight_version)
            except (WeightPushError, Unavailable) as error:
                self._recovery.come_back(error, lambda: self._push_again(weight_version))
        except (WeightPushError, Unavailable) as error:
            # The policy's version all the same: what is kept under it must not take the place of the one before.
            self.state = replace(self.state, policy_version=weight_version)
            if self.parts.stop.received is None:
                raise
            log.warning("stopping without a push of version %d: %s", weight_version, error)

    def _push_update(self, weight_version: int) -> None:
        """As `push_policy`; where it fails, the step is finished first, so that a checkpoint keeps it."""
        self._versions.updated(weight_version)
        try:
            self.push_policy(weight_version)
        except (WeightPushError, Unavailable) as error:
            self._unpushed = error

    def _push_again(self, weight_version: int) -> None:
        """After a push that failed: some replicas may have its version, others lack the policy's weights."""
        versions = self.parts.connections.generation_weights.serving_versions()
        self._push(max(weight_version, *(version + 1 for version in versions)))
        if self._reference.lost():
            self.restore_reference()

    def _push(self, weight_version: int) -> None:
        dtype = wire_dtype(self.parts.connections.generation, "generation")
        version = self._to_generation.push(dtype, weight_version, self._pipeline.new_weights)
        self.state = replace(self.state, policy_version=version)

    def _restore(self) -> None:
        """Give services that came back without this run's weights what they lack."""
        generation = self.parts.connections.generation_weights
        versions = generation.serving_versions()
        if versions != {self.state.policy_version}:
            self._push(max(*versions, self.state.policy_version) + 1)
        if self._reference.lost():
            self.restore_reference()

    def _insist(self, attempt: Callable[[], ResultT]) -> ResultT:
        """Do what only asks the services; where one went away or hung for a while, do it again."""
        for _ in range(_RECOVERIES):
            try:
                return attempt()
            except (Unavailable, DeadlineExceeded, FailedPrecondition) as error:
                self._recovery.come_back(error, self._restore)
        return attempt()

    def _step(self) -> dict[str, float]:
        step, config, parts = self.state.step, self.config, self.parts
        timer = StepTimer()
        with timer.phase("step"):
            trace.get_current_span().set_attribute("ppo.step", step + 1)
            with parts.stop.interruptible():
                with timer.phase("rollout_wait"):
                    collected = self._insist(lambda: self._pipeline.take(step))
                rollouts, stale = keep_fresh(collected.rollouts, self._versions, config.rollout.max_staleness)
                rollouts, rejected = keep_trainable(rollouts, config.rewards.filters, step + 1)
                self._judge(rollouts, timer)
            if len(rollouts) < config.ppo.minibatches:
                raise TrainerError(
                    f"step {step + 1}: {len(rollouts)} of {config.rollout.batch_size} samples are left ({stale} were "
                    f"too old, {sum(rejected.values())} rejected by rewards.filters, the others were refused), fewer "
                    f"than ppo.minibatches, {config.ppo.minibatches}; look at the warnings above"
                )
            self.whole = False
            parts.scores.update([one.score for one in rollouts])
            controls = self._controls()
            batch, stats = parts.learner.learn(rollouts, step, controls, timer)
            parts.stop.hear(parts.learner.signalled)
            if not controls.critic_only:
                # A policy that stands still says nothing about a coefficient, which would wind down meanwhile.
                parts.kl.update(batch.mean_kl, len(rollouts))
            keeps = config.weight_transfer.pause == "keep"
            off_policy = measure_off_policy(batch, rollouts, self._versions, keeps=keeps)
            with timer.phase("push"):
                self._push_update(self.state.policy_version + 1)
        self.state = replace(self.state, step=step + 1)
        parts.rollouts.schedule.settle(step + 1)
        self.whole = True
        tokens = int(batch.responses.action_mask.sum())
        record = finite_record(
            rollout_figures(rollouts)
            | off_policy
            | update_figures(batch, stats)
            | self._run_figures(collected, stale, tokens, timer, controls)
            | {f"samples/rejected_{reason}": float(count) for reason, count in rejected.items()}
        )
        record |= parts.watcher.observe(step + 1, record)
        parts.metrics.write(step + 1, record, samples=len(rollouts), tokens=tokens)
        return record

    def _too_old(self, collected: Collected) -> FailedPrecondition | None:
        """Too few samples are left: where versions may mix, a replica that lacks the run's weights samples, too."""
        most = self.config.rollout.max_staleness
        fresh, stale = keep_fresh(collected.rollouts, self._versions, most)
        if not stale or len(fresh) >= self.config.ppo.minibatches:
            return None
        found = f"{stale} of {len(collected.rollouts)} samples by weights more than {most} updates old"
        return FailedPrecondition("weight_version", found, f"{self.state.policy_version} on all replicas")

    def _controls(self) -> StepControls:
        config, step = self.config, self.state.step
        return StepControls(
            rate_factor=learning_rate_at(step, config.steps, config.optimizer),
            kl_coefficient=kl_coefficient_at(step, config, self.parts.kl.coefficient),
            entropy_coefficient=entropy_coefficient_at(step, config),
            score=score_scale(config.rewards, self.parts.scores),
            critic_only=step < config.critic.warm_up_steps,
        )

    def _run_figures(
        self, collected: Collected, stale: int, tokens: int, timer: StepTimer, controls: StepControls
    ) -> dict[str, float]:
        """What the run itself did."""
        figures = {
            "kl/coefficient": controls.kl_coefficient,
            "kl/bound_per_token": self.config.watch.kl_per_token,
            "entropy/coefficient": controls.entropy_coefficient,
            "score/running_mean": self.parts.scores.mean,
            "score/running_std": self.parts.scores.std,
            "policy/version": float(self.state.policy_version),
            "reference/version": float(self.state.reference_version),
            "critic/warm_up": float(controls.critic_only),
            "learning_rate": self.config.optimizer.learning_rate * controls.rate_factor,
            "samples/dropped": float(self.config.rollout.batch_size - len(collected.rollouts)),
            "samples/stale": float(stale),
            "tokens_per_second": tokens / timer.seconds["step"],
        }
        if self._judged:
            judged = np.array(self._judged, dtype=np.float32)
            figures |= {"judge/mean": float(judged.mean()), "judge/std": float(judged.std())}
        seconds = collected.seconds | timer.seconds
        figures |= collected.figures
        if (push := self._to_generation.last) is not None:
            figures |= push.figures()
        return figures | {f"seconds/{phase}": value for phase, value in seconds.items()}

    def _judge(self, rollouts: Sequence[ScoredRollout], timer: StepTimer) -> None:
        """Ask the held-out judge about the step's samples, every `judge_interval` steps. It never enters the reward."""
        self._judged = []
        if self.state.step % self.config.evaluation.judge_interval and self.state.step + 1 < self.config.steps:
            return
        with timer.phase("judge"):
            self._judged = list(self._insist(lambda: self.parts.evaluator.judge(rollouts)).values())

    def _after_step(self) -> None:
        config, step = self.config, self.state.step
        refreshed = refreshes_after(step, config)
        if refreshed:
            self._keep_reference(self.parts.learner.whole_model())
        interval = config.checkpoint.interval
        if refreshed or (interval is not None and step % interval == 0 and step < config.steps):
            self.save()
        if self._unpushed is not None:
            raise self._unpushed
        if refreshed:
            self.parts.stop.check()
            # Not before the checkpoint, which would otherwise resume with a reference that it does not know.
            self.serve_reference()
            print(f"the reference is now the policy of step {step} (version {self.state.policy_version})", flush=True)
        if self._evaluates() and step < config.steps:
            self.evaluate()
        self.parts.stop.check()

    def _evaluates(self) -> bool:
        interval = self.config.evaluation.interval
        return interval is not None and self.state.step % interval == 0

    def restore_reference(self) -> None:
        """Give the reference service the reference of the present state."""
        with self._pipeline.new_reference():
            self._reference.serve(self.state.reference_version)

    def serve_reference(self) -> None:
        """As `restore_reference`; a service that went away is waited for."""
        try:
            self.restore_reference()
        except (WeightPushError, Unavailable) as error:
            self._recovery.come_back(error, self.restore_reference)

    def adopt_reference(self, model: PreTrainedModel) -> None:
        """Make a model the reference, under the policy's version."""
        self._keep_reference(model)
        self.serve_reference()

    def _keep_reference(self, model: PreTrainedModel) -> None:
        version = self.state.policy_version
        self._reference.keep(model, version, kept_references(self._checkpoints))
        self.state = replace(self.state, reference_version=version)

    @property
    def _checkpoints(self) -> Path:
        return self.config.run_dir / "checkpoints"
