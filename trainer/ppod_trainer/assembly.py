"""Putting a run together from its configuration, and taking it apart again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from ppod import GenerationClient
from ppod.tensors import TokenArray
from ppod_models import loading
from ppod_models.configuration import dump_config
from ppod_models.sources import resolve
from ppod_trainer.algorithms import build_estimator
from ppod_trainer.bad_samples import BadSamples
from ppod_trainer.checkpoint import TrainerState, load_checkpoint, restore_components
from ppod_trainer.collector import RolloutCollector
from ppod_trainer.config import EnvironmentConfig, KlConfig, TrainerConfig
from ppod_trainer.connections import check_services, connect
from ppod_trainer.environments.loading import LoadedEnvironment, load_environment
from ppod_trainer.episodes import EpisodeRules, EpisodeSampler, TextCodec
from ppod_trainer.evaluation import Evaluator
from ppod_trainer.experience import ExperienceRules
from ppod_trainer.kl import AdaptiveKl, FixedKl, KlController
from ppod_trainer.learner import Learner, build_learner
from ppod_trainer.metrics import MetricsLog
from ppod_trainer.policy import PolicyWithValue
from ppod_trainer.prompts import Encode, PromptSet, load_prompts, split_prompts
from ppod_trainer.sampling import ResponseSampler, Sampler, TurnSampler
from ppod_trainer.stopping import StopSignal
from ppod_trainer.training import Parts, TrainingRun
from ppod_trainer.watch import build_watcher

_FREE_SECTIONS = {
    "run_dir",
    "resume",
    "services",
    "weight_transfer",
    "metrics",
    "tracing",
    "checkpoint",
    "evaluation",
    "watch",
}


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

    codec = _codec(tokenizer)
    environment = _load_environment(config.environment)
    prompts = _load_prompts(config, environment, codec.encode)
    learner = _load_learner(config, source.path)
    state = TrainerState(0, 0, 0, configuration_fingerprint(config))
    if config.resume:
        state = load_checkpoint(config.run_dir / "checkpoints", learner, state.configuration)
    metrics = MetricsLog(config.run_dir, config.metrics, state.step)
    connections = None
    collector = None
    try:
        with stop.interruptible():
            connections = connect(config, loading.tokenizer_fingerprint(tokenizer), metrics.observe_rpc)
            served = check_services(connections, config.rollout, loading.vocab_size(learner.policy.model))
        bad_samples = BadSamples(config.rollout.on_bad_sample)
        sampler = _build_sampler(config, connections.generation, served.limits.max_sequence_tokens, environment, codec)
        collector = RolloutCollector(sampler, connections.reward, connections.reference, bad_samples)
        evaluator = Evaluator(collector, connections.judge, prompts.heldout, codec.decode)
        kl = build_kl_controller(config.kl)
        watcher = build_watcher(config.watch, critic=learner.rules.estimator.critic)
        parts = Parts(connections, collector, evaluator, learner, kl, prompts, tokenizer, metrics, stop, watcher)
        restore_components(parts.stateful, state)
        run = TrainingRun(config, parts, state)
        try:
            _synchronise(run)
            yield run
        finally:
            run.close()
    finally:
        metrics.close()
        if connections is not None:
            connections.close()
        if collector is not None:
            collector.close()


def _codec(tokenizer: PreTrainedTokenizerFast) -> TextCodec:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def decode(token_ids: TokenArray) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))

    return TextCodec(encode, decode)


def _load_environment(config: EnvironmentConfig | None) -> LoadedEnvironment | None:
    return None if config is None else load_environment(config.name, config.parameters)


def _load_prompts(config: TrainerConfig, environment: LoadedEnvironment | None, encode: Encode) -> PromptSet:
    """The prompts of a file, or the beginnings of an environment's episodes."""
    if config.environment is None or environment is None:
        prompts = load_prompts(config.prompts, encode)
    else:
        texts = [environment.make().reset(seed) for seed in range(config.environment.episodes)]
        prompts = split_prompts(texts, encode, config.prompts.heldout)
    return replace(prompts, curriculum_steps=config.prompts.curriculum_steps)


def _build_sampler(
    config: TrainerConfig,
    generation: GenerationClient,
    max_sequence_tokens: int,
    environment: LoadedEnvironment | None,
    codec: TextCodec,
) -> Sampler:
    bad_samples = BadSamples(config.rollout.on_bad_sample)
    if config.environment is None or environment is None:
        return ResponseSampler(TurnSampler(generation, config.rollout), bad_samples)
    turns = TurnSampler(generation, config.rollout, environment.stop)
    # A turn that has less room than it may ask for would be cut off for no fault of the policy's.
    rules = EpisodeRules(config.environment.max_turns, max_sequence_tokens - config.rollout.max_tokens + 1)
    return EpisodeSampler(turns, environment, codec, rules, bad_samples)


def _load_learner(config: TrainerConfig, path: Path) -> Learner:
    device = loading.pick_device(config.policy.device)
    model = loading.load_causal_lm(path, device=device, dtype=torch.float32, attention=config.policy.attention)
    policy = PolicyWithValue(
        model,
        compute_dtype=loading.pick_dtype(config.policy.dtype, device),
    )
    rules = ExperienceRules(
        config.rewards,
        config.kl,
        build_estimator(config.advantages),
        config.advantages.whiten,
        config.ppo.ratio_mask,
    )
    return build_learner(policy, config.ppo, rules, config.optimizer, config.seed)


def _synchronise(run: TrainingRun) -> None:
    """Make generation and reference serve exactly what this run has, whatever they served before."""
    serving = max(run.parts.connections.generation_weights.serving_versions())
    run.push_policy(max(serving + 1, run.state.policy_version))
    if run.state.reference_version:
        run.restore_reference()
