"""What a run would only find out with its services up, or minutes later: asked before anything starts.

Not of `ppod up`, which has no trainer, nor of a run file on its own, which may have been written for another machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from pydantic import JsonValue

from ppod_deploy.run_config import RunConfig
from ppod_services.core.config import CausalServiceConfig
from ppod_services.reward.config import RewardConfig
from ppod_trainer.config import differences

_BESIDE_SCORES = {
    "model": {"device", "dtype", "attention", "threads"},
    **dict.fromkeys(("timeout_s", "workers", "max_waiting", "concurrency", "attempts", "server"), True),
}


def run_faults(config: RunConfig) -> list[str]:
    """One line for each, beginning with the dotted path of its key."""
    return [
        *_missing_prompts(config),
        *_unread_tokens(config),
        *_unscored_parts(config),
        *_large_requests(config),
        *_extreme_temperatures(config),
        *_unreachable(config),
        *_refused_weights(config),
    ]


def run_notes(config: RunConfig) -> list[str]:
    """What may be meant, and more often is a key that was left as it was."""
    return [*_impatient(config), *_other_reference(config)]


def _impatient(config: RunConfig) -> Iterator[str]:
    """vLLM may take minutes to start."""
    generation, ready_s = config.services.generation, config.trainer.services.ready_timeout_s
    if generation.backend == "vllm" and ready_s < generation.vllm.start_timeout_s:
        yield (
            f"trainer.services.ready_timeout_s is {ready_s:g}, services.generation.vllm.start_timeout_s "
            f"{generation.vllm.start_timeout_s:g}: the run gives up before vLLM's start does"
        )


def _other_reference(config: RunConfig) -> list[str]:
    trainer = config.trainer
    reference, policy = config.services.reference.model.source, trainer.policy.source
    penalised = trainer.kl.coefficient or trainer.schedules.kl_coefficient is not None
    # The reference is given a quantised policy's base before the first step.
    if reference == policy or not penalised or trainer.policy.quantised:
        return []
    return [
        f"services.reference.model.source is {reference}, trainer.policy.source {policy}: the KL penalty holds the "
        "policy to another model than it begins as"
    ]


def changed_services(config: RunConfig, earlier: RunConfig) -> list[str]:
    """What decides the course of training and stands in the sections of services: `PATH is VALUE, was VALUE`.

    That is which model the reference is and what scores come from; not where they run, nor a reward that was not there.
    """
    source, former = config.services.reference.model.source, earlier.services.reference.model.source
    found = list(differences("services.reference.model.source", source, former))
    reward, before = config.services.reward, earlier.services.reward
    if reward is None or before is None:
        return found
    if not config.trainer.services.reward_model:
        found += differences("services.reward.rewards.0.name", reward.rewards[0].name, before.rewards[0].name)
    known = {one.name: _of_score(one) for one in before.rewards}
    for index, one in enumerate(reward.rewards):
        found += differences(f"services.reward.rewards.{index}", _of_score(one), known.get(one.name, _of_score(one)))
    return found


def _of_score(reward: RewardConfig) -> JsonValue:
    """All of a reward that its scores depend on."""
    return reward.model_dump(mode="json", exclude=_BESIDE_SCORES)


def _missing_prompts(config: RunConfig) -> Iterator[str]:
    path = config.trainer.prompts.path
    if config.trainer.environment is None and path is not None and not path.is_file():
        yield f"trainer.prompts.path: {path} is no file, seen from the working directory"


def _unread_tokens(config: RunConfig) -> Iterator[str]:
    """A reward service without any tokenizer, where token ids are sent to it."""
    reward = config.services.reward
    if reward is not None and config.trainer.rewards.model and not reward.takes_tokens:
        yield f"services.reward.tokenizers: none, and no reward has a model; name {config.trainer.policy.source} there"


def _unscored_parts(config: RunConfig) -> Iterator[str]:
    """A safety reward that is no part of the reward that is asked."""
    reward, safety = config.services.reward, config.trainer.rewards.filters.safety
    if reward is None or safety is None:
        return
    parts = reward.parts_of(config.trainer.services.reward_model or reward.rewards[0].name)
    if safety.reward not in parts:
        yield (
            f"trainer.rewards.filters.safety.reward: {safety.reward} is no part of the reward that is asked, whose "
            f"parts are {', '.join(parts)}"
        )


def _large_requests(config: RunConfig) -> Iterator[str]:
    """Samples of which generation takes fewer in a request, in which all of a step are."""
    trainer, most = config.trainer, config.services.generation.limits.max_request_sequences
    for key, count in (
        ("rollout.batch_size", trainer.rollout.batch_size),
        ("prompts.heldout", trainer.prompts.heldout),
    ):
        if count > most:
            yield (
                f"trainer.{key}: {count} samples are asked of generation in one request, and "
                f"services.generation.limits.max_request_sequences is {most}"
            )


def _extreme_temperatures(config: RunConfig) -> Iterator[str]:
    """Those that generation does not sample at, maybe hours later."""
    generation = config.services.generation
    if generation.temperatures is None:
        return
    least, most = generation.temperatures
    schedule = config.trainer.schedules.temperature
    asked = {"rollout.temperature": config.trainer.rollout.temperature}
    if schedule is not None:
        asked["schedules.temperature.end"] = schedule.end
    for key, value in asked.items():
        if not least <= value <= most:
            yield (
                f"trainer.{key}: {value:g}, and with services.generation.backend {generation.backend} it is from "
                f"{least:g} to {most:g}"
            )


def _unreachable(config: RunConfig) -> Iterator[str]:
    """Ports on which the trainer would speak TLS to plain text, or plain text to TLS."""
    client = config.trainer.services.tls
    for name, service in config.services.items():
        if name == "reward" and not config.trainer.rewards.model:
            continue
        ports = {"tls": service.tls}
        if name in _given_weights(config) and service.admin_tls is not None:
            ports["admin_tls"] = service.admin_tls
        for key, server in ports.items():
            if server is None and client is not None:
                yield f"services.{name}.{key}: none, but trainer.services.tls is set, and is for all services"
            elif server is not None and client is None:
                yield f"trainer.services.tls: none, but services.{name}.{key} is set"
            elif server is not None and client is not None and server.client_ca_file and not client.certificate_file:
                yield f"trainer.services.tls.certificate_file: none, but services.{name}.{key} asks for one"


def _given_weights(config: RunConfig) -> dict[str, CausalServiceConfig]:
    """The services that the trainer pushes weights to."""
    services = config.services
    found: dict[str, CausalServiceConfig] = {"generation": services.generation}
    return {**found, "reference": services.reference} if config.trainer.pushes_reference else found


def _refused_weights(config: RunConfig) -> Iterator[str]:
    for name, service in _given_weights(config).items():
        if service.listen.admin_port is None:
            yield f"services.{name}.listen.admin_port: none, but the trainer gives {name} its weights there"
    transfer, weights = config.trainer.weight_transfer, config.services.generation.weights
    allowed, directory = "services.generation.weights", transfer.directory
    if directory is not None and not any(directory.is_relative_to(one) for one in weights.readable_directories):
        yield f"trainer.weight_transfer.directory: {directory} is in none of {allowed}.shared_directories"
    address = f"{transfer.collective.host}:{transfer.collective.port}"
    if transfer.plane == "collective" and not any(fnmatchcase(address, one) for one in weights.collective_addresses):
        yield f"trainer.weight_transfer.collective: {address} is none of {allowed}.collective_addresses"
