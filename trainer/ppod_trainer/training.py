"""The training run: the loop that the whole package serves, once per step, on one screen.

prompts -> generation -> rollouts -> reward || reference -> scored rollouts
        -> learner (old logprobs, values, advantages, clipped update) -> new weights, version + 1 -> generation
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from opentelemetry import trace
from transformers import PreTrainedTokenizerFast

from ppod import PpodError
from ppod_models.loading import DTYPES, load_causal_lm
from ppod_trainer.checkpoint import TrainerState, save_checkpoint
from ppod_trainer.config import TrainerConfig
from ppod_trainer.connections import Connections
from ppod_trainer.errors import TrainerError
from ppod_trainer.evaluation import Evaluation, Evaluator, write_samples
from ppod_trainer.experience import PpoBatch
from ppod_trainer.kl import KlController
from ppod_trainer.learner import Learner, UpdateStats, learning_rate_at
from ppod_trainer.metrics import MetricsLog, StepTimer, finite_record
from ppod_trainer.prompts import PromptSet
from ppod_trainer.report import format_evaluation, format_step
from ppod_trainer.rollouts import RolloutCollector, ScoredRollout, sample_seed
from ppod_trainer.stopping import StopSignal
from ppod_trainer.weight_sync import push_weights


@dataclass(slots=True)
class DroppedSamples:
    """Counts samples that were dropped for a typed error."""

    count: int = 0

    def __call__(self, error: PpodError) -> None:
        """Count one."""
        del error
        self.count += 1


@dataclass(frozen=True, slots=True)
class Parts:
    """What a run is put together from."""

    connections: Connections
    collector: RolloutCollector
    dropped: DroppedSamples
    evaluator: Evaluator
    learner: Learner
    kl: KlController
    prompts: PromptSet
    tokenizer: PreTrainedTokenizerFast
    metrics: MetricsLog
    stop: StopSignal


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
        self._judged: float | None = None

    def train(self) -> None:
        """Do all steps that are left. Raises StopRequestedError on a signal, with `state` at the last whole step."""
        start, begun = time.perf_counter(), self.state.step
        while self.state.step < self.config.steps:
            record = self._step()
            done = self.state.step - begun
            eta_s = (time.perf_counter() - start) / done * (self.config.steps - self.state.step)
            print(format_step(self.state.step, self.config.steps, record, eta_s), flush=True)
            self._after_step()

    def evaluate(self) -> Evaluation:
        """Evaluate the present weights on the held-out prompts and record it."""
        with self.parts.stop.interruptible():
            evaluation = self.parts.evaluator.evaluate(self.state.step, self.state.policy_version)
        write_samples(self.config.run_dir / "samples" / f"step_{self.state.step:06d}.jsonl", evaluation)
        self.parts.metrics.write(self.state.step, evaluation.record())
        print(format_evaluation(evaluation), flush=True)
        return evaluation

    def save(self) -> Path:
        """Write a checkpoint of the last whole step."""
        state = replace(self.state, kl_coefficient=self.parts.kl.coefficient)
        return save_checkpoint(
            self.config.run_dir / "checkpoints", self.parts.learner, state, self.config.checkpoint.keep
        )

    def save_final_model(self) -> Path:
        """Write the policy as a directory that `AutoModelForCausalLM.from_pretrained` loads."""
        target = self.config.run_dir / "final_model"
        self.parts.learner.policy.model.save_pretrained(target)
        self.parts.tokenizer.save_pretrained(target)
        return target

    def push_policy(self, weight_version: int) -> None:
        """Put the policy's weights into generation under a new version."""
        generation = self.parts.connections.generation_weights
        generation.push(self.parts.learner.policy.model, self._wire_dtype(), weight_version)
        self.state = replace(self.state, policy_version=weight_version)

    def _step(self) -> dict[str, float]:
        step, config, parts = self.state.step, self.config, self.parts
        timer = StepTimer()
        parts.dropped.count = 0
        with timer.phase("step"):
            trace.get_current_span().set_attribute("ppo.step", step + 1)
            prompts = parts.prompts.for_step(step, config.rollout.batch_size, config.seed)
            seeds = [sample_seed(config.seed, "rollout", step, index) for index in range(len(prompts))]
            with parts.stop.interruptible():
                rollouts = parts.collector.collect(prompts, seeds, self.state.policy_version, timer)
                self._judge(rollouts, timer)
            if len(rollouts) < config.ppo.minibatches:
                raise TrainerError(
                    f"step {step + 1}: {len(rollouts)} of {len(prompts)} samples are left after errors, fewer than "
                    f"ppo.minibatches, {config.ppo.minibatches}; look at the warnings above"
                )
            rate = learning_rate_at(step, config.steps, config.optimizer)
            coefficient = parts.kl.coefficient
            self.whole = False
            batch, stats = parts.learner.learn(rollouts, step, rate, coefficient, timer)
            parts.kl.update(batch.mean_kl, len(rollouts))
            with timer.phase("push"):
                self.push_policy(self.state.policy_version + 1)
        self.state = replace(self.state, step=step + 1)
        self.whole = True
        record = finite_record(self._record(rollouts, batch, stats, timer, (rate, coefficient)))
        tokens = int(batch.responses.response_mask.sum())
        parts.metrics.write(step + 1, record, samples=len(rollouts), tokens=tokens)
        return record

    def _judge(self, rollouts: Sequence[ScoredRollout], timer: StepTimer) -> None:
        """Ask the held-out judge about the step's samples, every `judge_interval` steps. It never enters the reward."""
        self._judged = None
        if self.state.step % self.config.evaluation.judge_interval and self.state.step + 1 < self.config.steps:
            return
        with timer.phase("judge"):
            scores = self.parts.evaluator.judge(rollouts)
        self._judged = None if scores is None else float(scores.mean())

    def _after_step(self) -> None:
        config, step = self.config, self.state.step
        refresh = config.reference_refresh_steps
        # Not after the last step: the final evaluation's KL would be to the policy itself.
        refreshed = refresh is not None and step % refresh == 0 and step < config.steps
        if refreshed:
            self._refresh_reference()
        interval = config.checkpoint.interval
        if refreshed or (interval is not None and step % interval == 0 and step < config.steps):
            self.save()
        if config.evaluation.interval is not None and step % config.evaluation.interval == 0 and step < config.steps:
            self.evaluate()
        self.parts.stop.check()

    def _refresh_reference(self) -> None:
        """Make the present policy the reference, here on disk (a resumed run needs it) and in the service."""
        model = self.parts.learner.policy.model
        version = self.state.policy_version
        directory = self.config.run_dir / "reference"
        model.save_pretrained(directory / f"version_{version:06d}")
        self.set_reference(version)
        # The newest checkpoint, made before this refresh, still needs the one before.
        for old in sorted(directory.iterdir())[:-2]:
            shutil.rmtree(old)
        print(f"the reference is now the policy of step {self.state.step} (version {version})", flush=True)

    def set_reference(self, version: int) -> None:
        """Push the saved reference of a version and pin it."""
        path = self.config.run_dir / "reference" / f"version_{version:06d}"
        model = load_causal_lm(path, device=torch.device("cpu"), dtype=torch.float32)
        client, weights = self.parts.connections.reference, self.parts.connections.reference_weights
        dtype = DTYPES[client.describe().limits.dtype]
        serving = weights.status().state.weight_version
        # A reference that outlived an earlier run may be further on; versions only ever grow.
        pushed = max(version, serving + 1)
        push_weights(weights, model, dtype, pushed)
        client.pin = replace(client.pin, weight_version=pushed)
        self.state = replace(self.state, reference_version=version)

    def _wire_dtype(self) -> torch.dtype:
        return DTYPES[self.parts.connections.generation.describe().limits.dtype]

    def _record(
        self,
        rollouts: Sequence[ScoredRollout],
        batch: PpoBatch,
        stats: UpdateStats,
        timer: StepTimer,
        controls: tuple[float, float],
    ) -> dict[str, float]:
        """The step's metrics. `controls` are the factor on the learning rate and the KL coefficient that were used."""
        rate, coefficient = controls
        scores = np.array([scored.score for scored in rollouts])
        lengths = [len(scored.rollout.response) for scored in rollouts]
        figures = asdict(stats)
        record = {
            "score/mean": float(scores.mean()),
            "score/std": float(scores.std()),
            "return/mean": batch.mean_return,
            "kl/reference": batch.mean_kl,
            "kl/coefficient": coefficient,
            "policy/entropy": figures["entropy"],
            "policy/clip_fraction": figures["clip_fraction"],
            "policy/approx_kl": figures["approx_kl"],
            "policy/first_ratio_error": figures["first_ratio_error"],
            "policy/grad_norm": figures["grad_norm"],
            "policy/optimizer_steps": float(figures["optimizer_steps"]),
            "policy/stopped_early": float(figures["stopped_early"]),
            "policy/version": float(self.state.policy_version),
            "reference/version": float(self.state.reference_version),
            "loss/policy": figures["policy_loss"],
            "loss/value": figures["value_loss"],
            "loss/kl": figures["kl_loss"],
            "value/explained_variance": figures["explained_variance"],
            "response/length": float(np.mean(lengths)),
            "response/truncated": float(np.mean([scored.rollout.truncated for scored in rollouts])),
            "sampler/gap_mean": figures["sampler_gap"],
            "sampler/gap_max": figures["sampler_gap_max"],
            "learning_rate": self.config.optimizer.learning_rate * rate,
            "samples/dropped": float(self.parts.dropped.count),
            "tokens_per_second": sum(lengths) / timer.seconds["step"],
        }
        if self._judged is not None:
            record["judge/mean"] = self._judged
        return record | {f"seconds/{phase}": value for phase, value in timer.seconds.items()}
