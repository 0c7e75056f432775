"""Putting a run together from its configuration, and taking it apart again."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from ppod import GenerationClient
from ppod.tensors import TokenArray
from ppod_models import loading
from ppod_models.chat_template import render_chat
from ppod_models.configuration import dump_config
from ppod_models.sources import resolve
from ppod_trainer.algorithms import LearnedEstimator, build_estimator
from ppod_trainer.bad_samples import BadSamples
from ppod_trainer.checkpoint import TrainerState, goes_on, load_checkpoint, restore_components, with_prompts
from ppod_trainer.collector import RolloutCollector
from ppod_trainer.config import EnvironmentConfig, KlConfig, RolloutConfig, TrainerConfig, configuration_fingerprint
from ppod_trainer.connections import Connections, ServedModels, check_references, check_reward, check_services, connect
from ppod_trainer.durable import write_durably
from ppod_trainer.environments.calls import EnvironmentCalls
from ppod_trainer.environments.loading import load_environment
from ppod_trainer.episodes import EpisodeRules, EpisodeSampler, TextCodec
from ppod_trainer.errors import TrainerError
from ppod_trainer.evaluation import Evaluator
from ppod_trainer.experience import ExperienceRules
from ppod_trainer.kl import AdaptiveKl, FixedKl, KlController
from ppod_trainer.leader import Leader
from ppod_trainer.learner import build_learner
from ppod_trainer.metrics import MetricsLog
from ppod_trainer.patience import Patience
from ppod_trainer.policy_loading import load_policy
from ppod_trainer.presampling import PreEstimates, keep_estimates, planned_prompts, presample
from ppod_trainer.prompt_files import Render
from ppod_trainer.prompts import (
    Encode,
    PromptSet,
    check_lengths,
    check_readers,
    load_prompts,
    references_of,
    split_episodes,
)
from ppod_trainer.ranks import Ranks
from ppod_trainer.recovery import Recovery
from ppod_trainer.sampling import ResponseSampler, Sampler, TurnSampler
from ppod_trainer.stateful import Stateful
from ppod_trainer.step_rollouts import build_step_rollouts
from ppod_trainer.stopping import StopSignal
from ppod_trainer.training import Parts, TrainingRun
from ppod_trainer.turn_ends import read_stop_tokens, warn_of_endless_turns
from ppod_trainer.watch import build_watcher

log = logging.getLogger(__name__)


def build_kl_controller(config: KlConfig) -> KlController:
    """The controller that the configuration names."""
    if config.adaptive is None:
        return FixedKl(config.coefficient)
    return AdaptiveKl(config.coefficient, config.adaptive.target, config.adaptive.horizon)


@contextmanager
def open_run(config: TrainerConfig, stop: StopSignal, ranks: Ranks) -> Generator[TrainingRun]:
    """Rank 0: load the policy, connect the services and yield the run at its first, or its resumed, step.

    Raises:
        TrainerError, PpodError, ModelSourceError: something needed is missing or does not fit.
    """
    _make_run_dir(config.run_dir)
    tokenizer = loading.load_tokenizer(resolve(config.policy.source).path)
    codec = _codec(tokenizer)
    environments = _load_environment(config.environment)
    prompts = _load_prompts(config, environments, codec.encode, partial(render_chat, tokenizer, open_turn=True))
    estimates = PreEstimates()
    leader, state = load_leader(config, ranks, estimates)
    with ExitStack() as opened:
        # Last of all: the other ranks wait for it to end.
        opened.callback(leader.close)
        state = with_prompts(state, "" if environments else prompts.fingerprint)
        # Not before: a run that does not fit the directory leaves the configuration that does.
        write_durably(config.run_dir / "config.yaml", dump_config(config))
        since = state.step if state.components else None
        metrics = opened.enter_context(closing(MetricsLog(config.run_dir, config.metrics, since)))
        with stop.interruptible():
            fingerprint = loading.tokenizer_fingerprint(tokenizer)
            connections = opened.enter_context(closing(connect(config, fingerprint, metrics.observe_rpc)))
            served = _check_services(config, connections, prompts, tokenizer, leader, stop)
        _check_prompts(prompts, tokenizer, served, config.rollout)
        bad_samples = BadSamples(config.rollout.on_bad_sample, Patience(config.services.recovery_timeout_s, stop))
        turns = _build_turns(config, connections.generation, served, environments, prompts, tokenizer)
        sampler = _build_sampler(config, turns, served, environments, codec, bad_samples)
        collector = RolloutCollector(sampler, connections.reward, connections.reference, bad_samples)
        opened.callback(collector.close)
        parts = Parts(
            connections=connections,
            collector=collector,
            evaluator=Evaluator(collector, connections.judge, prompts.heldout, codec.decode, bad_samples),
            learner=leader,
            kl=build_kl_controller(config.kl),
            prompts=prompts,
            tokenizer=tokenizer,
            metrics=metrics,
            stop=stop,
            rollouts=build_step_rollouts(config, prompts, collector, estimates),
            estimates=estimates,
            watcher=build_watcher(config.watch, critic=leader.learner.rules.estimator.critic),
        )
        restore_components(parts.stateful, state)
        run = opened.enter_context(closing(TrainingRun(config, parts, state)))
        _begin(run)
        yield run


def _begin(run: TrainingRun) -> None:
    """Give services and ranks what they lack before the first step."""
    _synchronise(run)
    if run.config.advantages.kind == "pvpo" and not run.parts.estimates.values:
        presample_for(run)
    run.parts.learner.share()


def _make_run_dir(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrainerError(f"run_dir: {run_dir} cannot be made: {error.strerror}") from error


def _codec(tokenizer: PreTrainedTokenizerFast) -> TextCodec:
    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    def decode(token_ids: TokenArray) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))

    return TextCodec(encode, decode)


def _load_environment(config: EnvironmentConfig | None) -> EnvironmentCalls | None:
    if config is None:
        return None
    return EnvironmentCalls(load_environment(config.name, config.parameters), config.threads)


def _load_prompts(
    config: TrainerConfig, environments: EnvironmentCalls | None, encode: Encode, render: Render
) -> PromptSet:
    """The prompts of a file, or the beginnings of an environment's episodes."""
    if config.environment is None or environments is None:
        prompts = load_prompts(config.prompts, encode, render)
    else:
        prompts = split_episodes(environments.prompts(config.environment.episodes), encode, config.prompts.heldout)
    return replace(prompts, curriculum_steps=config.prompts.curriculum_steps)


def _check_services(
    config: TrainerConfig,
    connections: Connections,
    prompts: PromptSet,
    tokenizer: PreTrainedTokenizerFast,
    leader: Leader,
    stop: StopSignal,
) -> ServedModels:
    """All that is asked of the services before anything is sampled."""
    ids = loading.vocab_size(leader.learner.policy.model), loading.token_id_bound(tokenizer)

    def ask() -> ServedModels:
        served = check_services(connections, config.rollout, len(prompts.heldout), *ids)
        check_reward(connections, config.rewards)
        if not references_of(prompts.training):
            check_references(connections)
        return served

    # One that was ready may be away again, and of several replicas all but one may still start.
    return Recovery(connections, config.services.ready_timeout_s, stop).ask(ask)


def _check_prompts(
    prompts: PromptSet, tokenizer: PreTrainedTokenizerFast, served: ServedModels, rollout: RolloutConfig
) -> None:
    warn_of_endless_turns(prompts, tokenizer, served.generation.eos_token_ids, rollout)
    if rollout.on_bad_sample != "stop":
        return
    made_tokens = served.generation.limits.max_sequence_tokens
    check_lengths(prompts, made_tokens)
    check_readers(prompts, made_tokens, rollout.max_tokens, served.reader, served.read_tokens)


def _build_turns(
    config: TrainerConfig,
    generation: GenerationClient,
    served: ServedModels,
    environments: EnvironmentCalls | None,
    prompts: PromptSet,
    tokenizer: PreTrainedTokenizerFast,
) -> TurnSampler:
    stop = () if environments is None else environments.stop
    most = served.generation.limits.max_request_sequences or None
    read = read_stop_tokens(config.rewards.stop_token, prompts, tokenizer)
    return TurnSampler(generation, config.rollout, stop, most, read)


def _build_sampler(
    config: TrainerConfig,
    turns: TurnSampler,
    served: ServedModels,
    environments: EnvironmentCalls | None,
    codec: TextCodec,
    bad_samples: BadSamples,
) -> Sampler:
    if config.environment is None or environments is None:
        return ResponseSampler(turns, bad_samples)
    # A turn that has less room than it may ask for would be cut off for no fault of the policy's.
    max_context_tokens = served.sequence_tokens - config.rollout.max_tokens + 1
    independent = config.environment.turns == "independent"
    rules = EpisodeRules(config.environment.max_turns, max_context_tokens, independent)
    return EpisodeSampler(turns, environments, codec, rules, bad_samples)


def load_leader(
    config: TrainerConfig, ranks: Ranks, estimates: PreEstimates | None = None
) -> tuple[Leader, TrainerState]:
    """All ranks: load the policy, or this rank's part of it, and where the run is. Only rank 0 leads with it.

    What the state holds besides is for rank 0 to restore, and to share.

    Raises:
        CheckpointError: the run cannot be resumed, or would begin over an earlier one.
    """
    if config.policy.threads is not None:
        torch.set_num_threads(config.policy.threads)
    torch.manual_seed(config.seed)
    checkpoints = config.run_dir / "checkpoints"
    resumes = goes_on(checkpoints, config.resume, ranks)
    loaded = load_policy(config, ranks)
    estimates = estimates or PreEstimates()
    estimator = build_estimator(config.advantages, loaded.policy.hidden_size, estimates, config.seed)
    rules = ExperienceRules(
        config.rewards,
        config.kl,
        estimator,
        config.advantages.whiten,
        config.ppo.ratio_mask,
        config.advantages.gamma,
    )
    learner = build_learner(loaded.policy, config.ppo, rules, config.optimizer, config.seed, ranks)
    state = TrainerState(0, 0, 0, configuration_fingerprint(config))
    if resumes:
        state = load_checkpoint(checkpoints, learner, state.configuration)
    shared: dict[str, Stateful] = {"pre_estimates": estimates}
    if isinstance(estimator, LearnedEstimator):
        shared["estimator"] = estimator
    return Leader(learner, loaded.hollow, loaded.adapter, shared), state


def presample_for(run: TrainingRun) -> None:
    """Estimate what the initial policy, which is served now, gets for each prompt. Raises as `TrainingRun.collect`."""
    config, parts = run.config, run.parts
    asked = planned_prompts(config, parts.prompts)
    print(f"estimating {len(asked)} prompts by {config.advantages.presamples} samples each", flush=True)
    found = presample(asked, config, run.collect)
    parts.estimates.values.update(found.values)
    if missing := [prompt.index for prompt in asked if prompt.index not in found.values]:
        log.warning(
            "%d prompts are left out, as all samples of each were refused; the first is %d", len(missing), missing[0]
        )
    keep_estimates(config.run_dir / "pre_estimates.json", parts.estimates)


def _synchronise(run: TrainingRun) -> None:
    """Make generation and reference serve exactly what this run has, whatever they served before."""
    connections, stop = run.parts.connections, run.parts.stop
    with stop.interruptible():
        starting = Recovery(connections, run.config.services.ready_timeout_s, stop)
        serving = max(starting.ask(connections.generation_weights.serving_versions))
    run.push_policy(max(serving + 1, run.state.policy_version))
    if run.state.reference_version:
        run.serve_reference()
    elif run.config.policy.quantised:
        # The service has the model as it was before it was quantised.
        run.adopt_reference(run.parts.learner.base_model())
    elif found := connections.reference.pin.weight_version:
        log.warning(
            "the reference serves version %d, which somebody pushed to it, and KL is taken to that; start its service "
            "again for the model that it loads",
            found,
        )
