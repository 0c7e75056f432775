"""The run file: one YAML with a section for each service and one for the trainer, checked as a whole."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self, cast

from pydantic import ValidationError, model_validator

from ppod_models.configuration import ConfigError, ConfigModel, ConfigT, describe_faults, named, read_layers
from ppod_services.core.config import ListenConfig, ServiceConfig
from ppod_services.generation.config import GenerationServiceConfig
from ppod_services.reference.config import ReferenceServiceConfig
from ppod_services.reward.config import RewardServiceConfig
from ppod_trainer.config import MetricsConfig, ServicesConfig, TrainerConfig

Values = Mapping[str, object]

SERVICE_NAMES = ("reward", "reference", "generation")
WILDCARD_HOSTS = {"0.0.0.0", "::"}


class ServicesSection(ConfigModel):
    """The services; without rewards from a model there is no reward service."""

    reward: RewardServiceConfig | None = None
    reference: ReferenceServiceConfig
    generation: GenerationServiceConfig

    def items(self) -> list[tuple[str, ServiceConfig]]:
        """Names and configurations of those that there are, in the order of SERVICE_NAMES."""
        others: list[tuple[str, ServiceConfig]] = [("reference", self.reference), ("generation", self.generation)]
        return others if self.reward is None else [("reward", self.reward), *others]


class RunConfig(ConfigModel):
    """Everything that one local run starts."""

    services: ServicesSection
    trainer: TrainerConfig

    @model_validator(mode="after")
    def _scores_come_from_somewhere(self) -> Self:
        if self.trainer.rewards.model and self.services.reward is None:
            raise ValueError(
                "services.reward is missing, but trainer.rewards.model is true: add it, or set that to false"
            )
        return self


def parse_run(values: object, origin: str) -> RunConfig:
    """Validate a run file's values, with the trainer's targets filled in where they are not given.

    Raises:
        ConfigError: every fault of every section, and every disagreement between sections, at once.
    """
    filled = _fill_targets(values)
    problems: list[str] = []
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(filled if filled is not None else {})
    except ValidationError as error:
        problems = describe_faults(error)
    # Each part is validated alone, so that a fault elsewhere hides no disagreement between the parts that are right.
    listens = _listens(filled)
    targets = _valid(ServicesConfig, filled, "trainer", "services")
    problems += _silent_in_plain_text(filled, listens)
    problems += _port_clashes(listens, _valid(MetricsConfig, filled, "trainer", "metrics"))
    if targets is not None:
        problems += _target_mismatches(listens, targets)
        problems += _unknown_rewards(_section(filled, "services", "reward", "rewards"), targets)
    if problems or config is None:
        raise ConfigError(origin, problems)
    return config


def busy_ports(config: RunConfig, *, trains: bool) -> list[str]:
    """One line for each port of the services, and of a trainer, that another process of this machine holds already.

    Asked before anything starts: a health check would otherwise be answered by the process that holds the port.
    """
    asked = [
        (f"services.{name}.listen.{key}", service.listen.host, port)
        for name, service in config.services.items()
        for key, port in _ports(service.listen)
    ]
    metrics = config.trainer.metrics
    if trains and metrics.port is not None:
        asked.append(("trainer.metrics.port", metrics.host, metrics.port))
    problems: list[str] = []
    for path, host, port in asked:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            # As gRPC binds: a port whose last connection is winding down is free, one that is listened on is not.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                problems.append(f"{path}: {host}:{port}: {error.strerror}")
    return problems


def target_of(listen: ListenConfig, port: int) -> str:
    """The address at which a process on this machine reaches a service."""
    return f"127.0.0.1:{port}" if listen.host in WILDCARD_HOSTS else listen.address(port)


def _ports(listen: ListenConfig) -> Iterator[tuple[str, int]]:
    for key, port in (
        ("port", listen.port),
        ("admin_port", listen.admin_port),
        ("metrics_port", listen.metrics_port),
        ("health_port", listen.health_port),
    ):
        if port is not None:
            yield key, port


def _section(values: object, *path: str) -> object:
    for key in path:
        if not isinstance(values, Mapping):
            return None
        values = cast(Values, values).get(key)
    return values


def _valid(model: type[ConfigT], values: object, *path: str) -> ConfigT | None:
    """A part of the run file, if it is right; its faults are named when the whole file is validated."""
    try:
        return model.model_validate(_section(values, *path) or {})
    except ValidationError:
        return None


def _listens(values: object) -> dict[str, ListenConfig]:
    """The listen sections that are right, by service."""
    there = [name for name in SERVICE_NAMES if _section(values, "services", name) is not None]
    found = {name: _valid(ListenConfig, values, "services", name, "listen") for name in there}
    return {name: listen for name, listen in found.items() if listen is not None}


def _targets(listens: Mapping[str, ListenConfig]) -> dict[str, str]:
    """The trainer's targets that the listen sections imply, by key of trainer.services."""
    targets: dict[str, str] = {}
    for name, listen in listens.items():
        targets[name] = target_of(listen, listen.port)
        if name != "reward" and listen.admin_port is not None:
            targets[f"{name}_admin"] = target_of(listen, listen.admin_port)
    return targets


def _fill_targets(values: object) -> object:
    """Give the trainer the services' addresses, unless the file says them: an address is then written once only."""
    trainer = _section(values, "trainer")
    if not isinstance(values, Mapping) or not (trainer is None or isinstance(trainer, Mapping)):
        return values
    given = _section(trainer, "services")
    if not (given is None or isinstance(given, Mapping)):
        return values
    targets = {**_targets(_listens(values)), **cast(Values, given or {})}
    return {**cast(Values, values), "trainer": {**cast(Values, trainer or {}), "services": targets}}


def _port_clashes(listens: Mapping[str, ListenConfig], metrics: MetricsConfig | None) -> list[str]:
    used = [
        (name, f"services.{name}.listen.{key}", port)
        for name, listen in listens.items()
        for key, port in _ports(listen)
    ]
    if metrics is not None and metrics.port is not None:
        used.append(("trainer", "trainer.metrics.port", metrics.port))
    owners: dict[int, tuple[str, str]] = {}
    problems: list[str] = []
    for process, path, port in used:
        owner, owner_path = owners.setdefault(port, (process, path))
        # Two ports of one service that clash are named by its own section.
        if owner != process:
            problems.append(f"{path}: {port} is also {owner_path}; every port must be another")
    return problems


def _silent_in_plain_text(values: object, listens: Mapping[str, ListenConfig]) -> list[str]:
    """One line for each service that the launcher, which asks for health in plain text, would never find ready."""
    return [
        f"services.{name}.listen.health_port: none, but services.{name}.tls is set: the launcher asks for health in "
        "plain text; give it a free port"
        for name, listen in listens.items()
        if listen.health_port is None and _section(values, "services", name, "tls") is not None
    ]


def _target_mismatches(listens: Mapping[str, ListenConfig], targets: ServicesConfig) -> list[str]:
    expected = _targets(listens)
    given = {
        "reward": targets.reward,
        "reference": targets.reference,
        "generation": targets.generation,
        "reference_admin": targets.reference_admin,
        "generation_admin": targets.generation_admin,
    }
    return [
        f"trainer.services.{key}: {target}, but that service listens on {expected[key]}"
        for key, target in given.items()
        if key in expected and _canonical(target) != _canonical(expected[key])
    ]


def _unknown_rewards(rewards: object, targets: ServicesConfig) -> list[str]:
    if not isinstance(rewards, list | tuple):
        return []
    entries = cast("list[object]", rewards)
    served = [str(name) for entry in entries if (name := _section(entry, "name")) is not None]
    asked = (("reward_model", targets.reward_model), ("judge_model", targets.judge_model))
    return [
        f"trainer.services.{key}: {name!r}, but services.reward.rewards holds {', '.join(served) or 'none'}"
        for key, name in asked
        if name and name not in served
    ]


def _canonical(target: str) -> str:
    return target.removeprefix("dns:///").replace("localhost:", "127.0.0.1:")


def without_implied_targets(values: object) -> object:
    """The values of a resolved run without the trainer's targets that its listen sections imply.

    They are filled in again when the values are validated, and so follow overrides of where the services listen.
    """
    targets = _section(values, "trainer", "services")
    if not isinstance(targets, Mapping):
        return values
    implied = _targets(_listens(values))
    kept = {key: value for key, value in cast(Values, targets).items() if implied.get(key) != value}
    trainer = cast(Values, _section(values, "trainer"))
    return {**cast(Values, values), "trainer": {**trainer, "services": kept}}


def read_run_values(path: Path, *over: Path) -> object:
    """Plain values of a run file, and of those that are laid over it.

    Raises:
        ConfigError: one cannot be read, or they are not a mapping.
    """
    values = read_layers(path, *over)
    if values is not None and not isinstance(values, Mapping):
        raise ConfigError(named(path, *over), ["(top level): must be a mapping with the keys services and trainer"])
    return values
