"""Overrides of the run file on the command line, and the list of all keys for --help.

An override is merged into the file's values before anything is validated. So one validation sees everything, faults of
the file and of the command line are reported together, and an override can mend the file.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Union, cast, get_args, get_origin

import yaml
from pydantic_core import PydanticUndefined

from ppod_deploy.key_types import (
    Kinds,
    alternatives,
    choices,
    items_of,
    kinds_at,
    takes_list,
    takes_texts,
    takes_truth,
)
from ppod_deploy.run_config import RunConfig
from ppod_models.configuration import ConfigError, ConfigModel, parse_yaml

PREFIXES = ("--services.", "--trainer.")
COMMAND_LINE = "command line"


@dataclass(frozen=True, slots=True)
class Override:
    """One value from the command line: `path` is its dotted path, split."""

    path: tuple[str, ...]
    value: object


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[Override]]:
    """Part a command line into what is no override, and the overrides.

    `--trainer.steps 5` and `--trainer.steps=5` are the same; several values make a list, and so does one where the key
    takes a list; none makes true where the key takes it. A value is YAML, with None for null where that is no choice of
    the key's; where the key takes texts alone, it is no number, date or truth.

    Raises:
        ConfigError: a value is missing, or not YAML.
    """
    rest: list[str] = []
    overrides: list[Override] = []
    queue = list(arguments)
    while queue:
        token = queue.pop(0)
        if not token.startswith(PREFIXES):
            rest.append(token)
            continue
        key, equals, text = token.removeprefix("--").partition("=")
        texts = [text] if equals else []
        while not equals and queue and not queue[0].startswith("--"):
            texts.append(queue.pop(0))
        path = tuple(key.replace("-", "_").split("."))
        kinds = kinds_at(RunConfig, path)
        if not texts and kinds and not takes_truth(kinds):
            raise ConfigError(COMMAND_LINE, [f"--{key}: a value is missing behind it"])
        one = kinds_at(RunConfig, (*path, "0")) if takes_list(kinds) else kinds
        parsed = [_parse(text, key, one) for text in texts]
        # A list that is written as one, or null, is the value itself.
        alone = len(parsed) == 1 and (isinstance(parsed[0], list | None) or not takes_list(kinds))
        overrides.append(Override(path, True if not parsed else parsed[0] if alone else parsed))
    return rest, overrides


def apply_overrides(values: object, overrides: Sequence[Override]) -> object:
    """The file's values with the overrides merged in; the input is left as it was.

    Raises:
        ConfigError: an override goes through a value that is no mapping.
    """
    merged: object = values if values is not None else {}
    for override in overrides:
        merged = _set(merged, override, 0)
    return merged


def _parse(text: str, key: str, kinds: Kinds) -> object:
    if text in choices(kinds):
        return text
    if text in {"None", "none"}:
        return None
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(COMMAND_LINE, [f"{key}: {text!r} is not a value: {error}"]) from error
    return text if takes_texts(kinds) and not isinstance(value, str | list | dict | None) else value


def _set(values: object, override: Override, depth: int) -> object:
    if depth == len(override.path):
        return override.value
    if values is None:
        values = {}
    key = override.path[depth]
    if isinstance(values, list):
        items = cast("list[object]", values)
        if not key.isdigit() or int(key) >= len(items):
            raise ConfigError(COMMAND_LINE, [f"{'.'.join(override.path)}: the list has items 0 to {len(items) - 1}"])
        return [_set(item, override, depth + 1) if i == int(key) else item for i, item in enumerate(items)]
    if not isinstance(values, Mapping):
        parent = ".".join(override.path[:depth])
        raise ConfigError(COMMAND_LINE, [f"{'.'.join(override.path)}: {parent} is {values!r}, which has no keys"])
    mapping = cast("Mapping[str, object]", values)
    return {**mapping, key: _set(mapping.get(key), override, depth + 1)}


def describe_keys(*models: type[ConfigModel], prefix: str = "", flags: bool = True, without: str = "") -> Iterator[str]:
    """Lines that list every key of a configuration with its type, default and meaning, section by section.

    N in a path is a place in a list, from 0.

    Args:
        models: the configuration; several: the kinds that a section may be of. What they share is listed once.
        prefix: dotted path before its keys.
        flags: keys are written as options of the command line, with dashes; otherwise as they stand in a file.
        without: of a section that may be left out, what is then.
    """
    below: dict[str, dict[type[ConfigModel], str]] = {}
    for model in models:
        leaves: list[str] = []
        for name, field in model.model_fields.items():
            path = f"{prefix}{name}".replace("_", "-") if flags else f"{prefix}{name}"
            kinds = tuple(alternatives(field.annotation))
            default: object = field.get_default(call_default_factory=True, validated_data={})
            meaning = f"{field.description}; " if field.description else ""
            left_out = f" ({meaning}default none)" if default is None else ""
            sections = _sections(kinds)
            for place, found in ((path, sections), (f"{path}.N", _sections(items_of(kinds)))):
                below.setdefault(place, {}).update(dict.fromkeys(found, left_out))
            if not sections:
                shown = "required" if default is PydanticUndefined else f"default {_short(default)}"
                option = f"--{path}" if flags else path
                leaves.append(f"  {option} {_type_name(field.annotation)}\n        {meaning}{shown}")
        if prefix and leaves:
            yield f"\n{prefix.rstrip('.')}: {(model.__doc__ or '').strip().splitlines()[0]}{without}"
        yield from leaves
    for place, found in below.items():
        if found:
            yield from describe_keys(*found, prefix=f"{place}.", flags=flags, without=next(iter(found.values())))


def _sections(kinds: Kinds) -> list[type[ConfigModel]]:
    """Those that have keys of their own."""
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, ConfigModel)]


def _type_name(annotation: object) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "{" + ",".join(str(choice) for choice in arguments) + "}"
    if origin in (Union, types.UnionType):
        return "|".join(_type_name(argument) for argument in arguments)
    if annotation is type(None):
        return "none"
    if annotation is Path:
        return "PATH"
    if isinstance(annotation, type) and origin is None:
        return annotation.__name__.upper()
    return "YAML"


def _short(value: object) -> str:
    if isinstance(value, str):
        return (value if value.isprintable() else repr(value)) or "empty"
    return "none" if value is None else str(value)
