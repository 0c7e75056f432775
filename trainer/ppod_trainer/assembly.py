"""Putting a run together from its configuration, and taking it apart again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from ppod.tensors import TokenArray
from ppod_models import loading
from ppod_models.configuration import dump_config
from ppod_models.sources import resolve
from ppod_trainer.checkpoint import TrainerState, load_checkpoint
from ppod_trainer.config import KlConfig, TrainerConfig
from ppod_trainer.connections import check_services, connect
from ppod_trainer.evaluation import Evaluator
from ppod_trainer.experience import ExperienceRules
from ppod_trainer.kl import AdaptiveKl, FixedKl, KlController
from ppod_trainer.learner import Learner, build_learner
from ppod_trainer.metrics import MetricsLog
from ppod_trainer.policy import PolicyWithValue
from ppod_trainer.prompts import load_prompts
from ppod_trainer.rollouts import RolloutCollector
from ppod_trainer.stopping import StopSignal
from ppod_trainer.training import DroppedSamples, Parts, TrainingRun

_FREE_SECTIONS = {"run_dir", "resume", "services", "weight_transfer", "metrics", "tracing", "checkpoint", "evaluation"}


def configuration_fingerprint(config: TrainerConfig) -> str:
    """Hash of all that decides the course of training; where things are kept and shown may differ on resume."""
    values = config.model_dump(mode="json", exclude=_FREE_SECTIONS)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def build_kl_controller(config: KlConfig) -> KlController:
    """The controller that the configuration names."""
    if config.adaptive is None:
        return FixedKl(config.coefficient)
    return AdaptiveKl(config.coefficient, config.adaptive.target, config.adaptive.horizon)


@contextmanager
def open_run(config: TrainerConfig, stop: StopSignal) -> Generator[TrainingRun]:
    """Load the policy, connect the services and yield the run at its first, or its resumed, step.

    Raises:
        TrainerError, PpodError, ModelSourceError: something needed is missing or does not fit.
    """
    if config.policy.threads is not None:
        torch.set_num_threads(config.policy.threads)
    torch.manual_seed(config.seed)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    source = resolve(config.policy.source)
    tokenizer = loading.load_tokenizer(source.path)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    prompts = load_prompts(config.prompts, encode)
    learner = _load_learner(config, source.path)
    state = TrainerState(0, 0, 0, config.kl.coefficient, configuration_fingerprint(config))
    if config.resume:
        state = load_checkpoint(config.run_dir / "checkpoints", learner, state.configuration)
    metrics = MetricsLog(config.run_dir, config.metrics, state.step)
    connections = None
    collector = None
    try:
        with stop.interruptible():
            connections = connect(
                config.services, loading.tokenizer_fingerprint(tokenizer), metrics.observe_rpc, config.weight_transfer
            )
            check_services(connections, config.rollout, loading.vocab_size(learner.policy.model))
        dropped = DroppedSamples()
        collector = RolloutCollector(
            connections.generation, connections.reward, connections.reference, config.rollout, dropped
        )

        def decode(token_ids: TokenArray) -> str:
            return str(tokenizer.decode(token_ids, skip_special_tokens=True))

        evaluator = Evaluator(collector, connections.judge, prompts.heldout, decode)
        kl = build_kl_controller(config.kl)
        kl.coefficient = state.kl_coefficient
        parts = Parts(connections, collector, dropped, evaluator, learner, kl, prompts, tokenizer, metrics, stop)
        run = TrainingRun(config, parts, state)
        _synchronise(run)
        yield run
    finally:
        metrics.close()
        if connections is not None:
            connections.close()
        if collector is not None:
            collector.close()


def _load_learner(config: TrainerConfig, path: Path) -> Learner:
    device = loading.pick_device(config.policy.device)
    model = loading.load_causal_lm(path, device=device, dtype=torch.float32, attention=config.policy.attention)
    policy = PolicyWithValue(
        model,
        temperature=config.rollout.temperature,
        compute_dtype=loading.pick_dtype(config.policy.dtype, device),
    )
    rules = ExperienceRules(config.rewards, config.kl, config.advantages)
    return build_learner(policy, config.ppo, rules, config.optimizer, config.seed)


def _synchronise(run: TrainingRun) -> None:
    """Make generation and reference serve exactly what this run has, whatever they served before."""
    serving = run.parts.connections.generation_weights.serving_version()
    run.push_policy(max(serving + 1, run.state.policy_version))
    if run.state.reference_version:
        run.set_reference(run.state.reference_version)
