"""What of a configuration decides the course of training, and so has to stay when a run is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

from pydantic import JsonValue

from ppod_trainer.config.services import ServicesConfig
from ppod_trainer.config.trainer import TrainerConfig

_FREE_SECTIONS = (
    *("run_dir", "resume", "weight_transfer", "metrics", "tracing", "checkpoint", "evaluation", "ranks"),
    *("memory", "watch"),
)
_DECISIVE_SERVICES = {"reward_model"}
"""What pays is a part of the course; where it listens is not."""


def configuration_fingerprint(config: TrainerConfig) -> str:
    """Hash of all that decides the course of training; where things are kept and shown may differ on resume."""
    return hashlib.sha256(json.dumps(_course(config), sort_keys=True).encode()).hexdigest()[:16]


def changes_of_course(config: TrainerConfig, earlier: TrainerConfig) -> list[str]:
    """What makes the fingerprints of two configurations differ: `PATH is VALUE, was VALUE`, with dotted paths."""
    return list(differences("", _course(config), _course(earlier)))


def _course(config: TrainerConfig) -> dict[str, JsonValue]:
    services = ServicesConfig.model_fields.keys() - _DECISIVE_SERVICES
    free = {**dict.fromkeys(_FREE_SECTIONS, True), "environment": {"threads"}, "services": services}
    return config.model_dump(mode="json", exclude=free)


def differences(path: str, value: JsonValue, earlier: JsonValue) -> Iterator[str]:
    """Where two values below a dotted path differ: `PATH is VALUE, was VALUE`."""
    if isinstance(value, dict) and isinstance(earlier, dict):
        for key in sorted(value.keys() | earlier.keys()):
            yield from differences(f"{path}.{key}" if path else key, value.get(key), earlier.get(key))
    elif value != earlier:
        yield f"{path} is {value!r}, was {earlier!r}"
