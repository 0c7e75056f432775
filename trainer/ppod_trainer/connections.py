"""The trainer's clients, and the checks that the services fit the policy."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace

from ppod import ClientSecurity, GenerationClient, Pin, PpodError, ReferenceClient, RewardClient, WeightClient
from ppod.client import ModelDescription, ModelLimits, ReplicaSource, RewardKind, RpcObserver, parse_kubernetes_target
from ppod_trainer.config import (
    RewardsConfig,
    RolloutConfig,
    ServicesConfig,
    TrainerConfig,
    WeightTransferConfig,
    is_kubernetes,
    listed,
)
from ppod_trainer.errors import ServiceMismatchError
from ppod_trainer.followed_replicas import FollowedReplicas
from ppod_trainer.sample_filters import no_part
from ppod_trainer.weight_replicas import FixedReplicas
from ppod_trainer.weight_sync import WeightSync

_CLOSE_S = 5.0
"""Longest wait for channels to close at the end of a run."""


@dataclass(frozen=True, slots=True)
class Connections:
    """One client for each service.

    `reward` and `judge` are None where they are not asked, `reference_weights` where the reference stays as it is.
    """

    generation: GenerationClient
    reward: RewardClient | None
    judge: RewardClient | None
    reference: ReferenceClient
    generation_weights: WeightSync
    reference_weights: WeightSync | None

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until each service is ready; raises DeadlineExceeded that names the first that is not in time."""
        for client in (self.generation, self.reward, self.reference):
            if client is not None:
                client.wait_ready(timeout_s)

    def close(self) -> None:
        """Close all channels; calls under way are cancelled.

        A signal may break off a call while gRPC begins it. Its channel then waits for a thread that was never started:
        no channel is waited for longer than `_CLOSE_S`.
        """
        clients = (self.generation, self.reference, self.generation_weights)
        others = (self.reward, self.judge, self.reference_weights)
        given = [*clients, *(client for client in others if client is not None)]
        closing = [threading.Thread(target=client.close, daemon=True) for client in given]
        for thread in closing:
            thread.start()
        until = time.monotonic() + _CLOSE_S
        for thread in closing:
            thread.join(max(until - time.monotonic(), 0.0))


@dataclass(frozen=True, slots=True)
class ServedModels:
    """What the services serve.

    Attributes:
        generation: generation's description.
        reader: which of the others, that read prompt and response together, takes the shortest sequences.
        read_tokens: how many tokens that one takes.
    """

    generation: ModelDescription
    reader: str
    read_tokens: int

    @property
    def sequence_tokens(self) -> int:
        """Longest sequence that all of them take."""
        return min(self.generation.limits.max_sequence_tokens, self.read_tokens)


def connect(trainer: TrainerConfig, tokenizer_fingerprint: str, observer: RpcObserver) -> Connections:
    """Open channels to all services, with the policy's tokenizer pinned, and wait until each is ready.

    Raises:
        DeadlineExceeded: a service was not ready within `ready_timeout_s`.
        InvalidArgument: the token or a certificate cannot be read, or the token would travel in plain text.
    """
    pin = Pin(tokenizer_fingerprint=tokenizer_fingerprint)
    config = trainer.services
    timeout_s, security = config.timeout_s, client_security(config)
    administrator = client_security(config, administrator=True)

    def reward(model: str) -> RewardClient:
        named = Pin(model=model, tokenizer_fingerprint=tokenizer_fingerprint)
        return RewardClient(config.reward, timeout_s=timeout_s, pin=named, observer=observer, security=security)

    def weights(target: str, server_name: str = "") -> WeightClient:
        named = replace(administrator, server_name=administrator.server_name or server_name)
        return WeightClient(target, timeout_s=timeout_s, observer=observer, security=named)

    def pushed_to(target: str, admin: str, transfer: WeightTransferConfig) -> tuple[WeightSync, ReplicaSource | None]:
        """Weights for all replicas of a service; where pods come and go also who tells which of them have theirs."""
        if is_kubernetes(target):
            followed = FollowedReplicas(parse_kubernetes_target(target), parse_kubernetes_target(admin).port, weights)
            return WeightSync(followed, transfer), followed
        replicas = FixedReplicas([weights(one) for one in listed(admin)], transfer.lost_replicas)
        return WeightSync(replicas, transfer), None

    generation_weights, generating = pushed_to(config.generation, config.generation_admin, trainer.weight_transfer)
    reference_weights, referring = None, None
    if trainer.pushes_reference:
        # Now and then, to services that may see other directories than generation does.
        transfer = WeightTransferConfig(lost_replicas=trainer.weight_transfer.lost_replicas)
        reference_weights, referring = pushed_to(config.reference, config.reference_admin, transfer)
    connections = Connections(
        generation=GenerationClient(
            config.generation, timeout_s=timeout_s, pin=pin, observer=observer, security=security, replicas=generating
        ),
        reward=reward(config.reward_model) if trainer.rewards.model else None,
        judge=None if config.judge_model is None else reward(config.judge_model),
        reference=ReferenceClient(
            config.reference, timeout_s=timeout_s, pin=pin, observer=observer, security=security, replicas=referring
        ),
        generation_weights=generation_weights,
        reference_weights=reference_weights,
    )
    return _ready(connections, config.ready_timeout_s)


def _ready(connections: Connections, timeout_s: float) -> Connections:
    """Them, once all services are; closed where they are not in time."""
    try:
        connections.wait_ready(timeout_s)
    except PpodError:
        connections.close()
        raise
    return connections


def client_security(config: ServicesConfig, *, administrator: bool = False) -> ClientSecurity:
    """TLS from the configuration, and the token from the environment: secrets never stand in files of ours."""
    tls = config.tls
    return ClientSecurity.from_environment(
        ca_file=None if tls is None else tls.ca_file,
        certificate_file=None if tls is None else tls.certificate_file,
        key_file=None if tls is None else tls.key_file,
        server_name="" if tls is None else tls.server_name,
        plain_text_token=config.plain_text_token,
        administrator=administrator,
    )


def check_services(
    connections: Connections, rollout: RolloutConfig, heldout: int, vocab_size: int, token_id_bound: int
) -> ServedModels:
    """Ask every service what it serves, and whether it fits.

    The reference's weights are pinned as they are: a run that somebody gives another one would not notice.

    Args:
        connections: to all of them.
        rollout: what generation will be asked for.
        heldout: number of held-out prompts.
        vocab_size: ids that the policy has embeddings for.
        token_id_bound: ids that its tokenizer makes are below this.

    Raises:
        ServiceMismatchError: one takes other token ids, or shorter requests, than the run will send.
        FailedPrecondition: one has another tokenizer.
        WeightPushError: the reference is to be refreshed, and does not tell which weights it has.
    """
    generation = connections.generation.describe()
    reference = connections.reference.describe()
    connections.reference.pin = replace(connections.reference.pin, weight_version=reference.state.weight_version)
    described = {"generation": generation, "reference": reference}
    if connections.reward is not None:
        described["reward"] = connections.reward.describe()
    if connections.reference_weights is not None:
        # Else a wrong address or token would show at the first refresh, maybe hours later.
        connections.reference_weights.serving_versions()
    if connections.judge is not None:
        described["judge"] = connections.judge.describe()
    _check_requests(generation.limits, connections.generation.replica_count, rollout.batch_size, heldout)
    if (highest := max(rollout.stop_token_ids, default=0)) >= generation.limits.vocab_size:
        bound = generation.limits.vocab_size
        raise ServiceMismatchError(f"rollout.stop_token_ids: generation has no token {highest}; ids are below {bound}")
    for name, description in described.items():
        limits = description.limits
        _check_ids(name, limits, vocab_size, token_id_bound)
        if limits.max_sequence_tokens <= rollout.max_tokens:
            raise ServiceMismatchError(
                f"{name} takes {limits.max_sequence_tokens} tokens a sequence; rollout.max_tokens is "
                f"{rollout.max_tokens} and leaves no room for a prompt"
            )
    read = {name: each.limits.max_sequence_tokens for name, each in described.items() if name != "generation"}
    reader = min(read, key=lambda name: read[name])
    return ServedModels(generation, reader, read[reader])


def check_references(connections: Connections) -> None:
    """Raise ServiceMismatchError where a reward compares with references; for prompts that have none."""
    for key, client in (("reward_model", connections.reward), ("judge_model", connections.judge)):
        if client is None:
            continue
        first, *others = client.list_rewards()
        asked = next((one for one in (first, *others) if one.name == client.pin.model), first)
        if asked.needs_references:
            raise ServiceMismatchError(
                f"services.{key}: {asked.name} compares responses with references, and the prompts have none; give "
                "each line of prompts.path a `reference`, or let an environment pay for what is right"
            )


def check_reward(connections: Connections, rewards: RewardsConfig) -> None:
    """Ask what the reward is made of, and whether it tells what `rewards` reads.

    Raises:
        ServiceMismatchError: the safety filter reads what is no part of it, or a part of it has no score of each token.
    """
    client = connections.reward
    if client is None or (rewards.filters.safety is None and rewards.shaping != "token"):
        return
    described = {one.name: one for one in client.list_rewards()}
    names = [client.pin.model or next(iter(described))]
    for name in names:
        names += [one for one in described[name].members if one not in names]
    safety = rewards.filters.safety
    if safety is not None and safety.reward not in names:
        raise ServiceMismatchError(no_part(safety.reward, names))
    for one in (described[name] for name in names) if rewards.shaping == "token" else ():
        other = one.state is not None and one.state.tokenizer_fingerprint != client.pin.tokenizer_fingerprint
        if one.kind is RewardKind.PROCESS_MODEL and other:
            raise ServiceMismatchError(
                f"rewards.shaping is token, and {one.name} is a process reward model with another tokenizer than the "
                "policy's, which scores steps alone; set rewards.shaping to step, or to none"
            )


def _check_requests(limits: ModelLimits, replicas: int, batch_size: int, heldout: int) -> None:
    """The other clients split what is too much for one request; a stream of completions is one, from each replica."""
    most = limits.max_request_sequences
    for key, what, count in (
        ("rollout.batch_size", "samples of a step", batch_size),
        ("prompts.heldout", "held-out prompts", heldout),
    ):
        asked = -(-count // max(replicas, 1))
        if asked > most:
            raise ServiceMismatchError(
                f"generation takes {most} sequences a request, and is asked for {asked} of the {count} {what}; lower "
                f"{key} or raise the service's limits.max_request_sequences"
            )


def _check_ids(name: str, limits: ModelLimits, vocab_size: int, token_id_bound: int) -> None:
    # Models with the same tokenizer pad their embeddings to different sizes. Generation gets the policy's.
    needed = min(vocab_size, token_id_bound)
    fits = limits.vocab_size == vocab_size if name == "generation" else limits.vocab_size >= needed
    if not fits:
        raise ServiceMismatchError(
            f"{name} takes token ids below {limits.vocab_size}, the policy has {vocab_size} and its tokenizer makes "
            f"ids below {token_id_bound}; serve a model with the policy's tokenizer"
        )
