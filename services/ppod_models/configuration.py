"""Configuration: frozen pydantic models read from YAML, with every fault reported at once under its dotted path."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar, cast, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from yaml.constructor import ConstructorError


class ConfigModel(BaseModel):
    """Base of every configuration section: frozen; unknown keys and wrong types are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """YAML reads yes, on and off as truth, which pydantic would take for 1 and 0."""
        kind = None if info.field_name is None else cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and any(one in (int, float) for one in (kind, *get_args(kind))):
            raise ValueError("expected a number")
        return value

    @field_validator("*")
    @classmethod
    def _tilde_is_the_home(cls, value: object) -> object:
        """No shell has read what stands in a file, or behind the `=` of an option."""
        if isinstance(value, tuple):
            return tuple(_at_home(one) for one in cast("tuple[object, ...]", value))
        return _at_home(value)


def _at_home(value: object) -> object:
    if not isinstance(value, Path):
        return value
    try:
        return value.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{error}; write the whole path") from error


_SECTIONS = (Mapping, BaseModel, list, tuple)

ConfigT = TypeVar("ConfigT", bound=ConfigModel)


class ConfigError(Exception):
    """A configuration cannot be used.

    Attributes:
        origin: file, or other source, of the configuration.
        problems: one line for each fault, each beginning with the dotted path of the key.
    """

    def __init__(self, origin: str, problems: list[str]) -> None:
        super().__init__(origin, problems)
        self.origin = origin
        self.problems = problems

    def __str__(self) -> str:
        count = len(self.problems)
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        return f"{self.origin}: {count} problem{'s' if count != 1 else ''}\n{lines}"


class SectionFaults(ValueError):
    """Several faults of one section, each in words: a validator that raises ValueError could name one only."""

    def __init__(self, *faults: str) -> None:
        super().__init__(*faults)
        self.faults = faults

    def __str__(self) -> str:
        return "; ".join(self.faults)


class ModelConfig(ConfigModel):
    """Which model to load, and how."""

    source: str = Field(description="packaged:NAME, a directory, or a hub id org/name[@revision]")
    device: str = Field(
        default="auto", description="auto, cpu, cuda:0, ...; auto takes a CUDA device where there is one"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: bfloat16 where the device is faster in it, else float32"
    )
    attention: Literal["sdpa", "eager"] = Field(
        default="sdpa",
        description="eager is faster on CPUs up to some hundred tokens; its memory grows with the square of the length",
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads of this process; none: all cores")


class ClientTlsConfig(ConfigModel):
    """TLS of a client, as PEM files."""

    ca_file: Path = Field(description="authority that the servers' certificates come from")
    certificate_file: Path | None = Field(
        default=None, description="mutual TLS: the client's own certificate; none: TLS only"
    )
    key_file: Path | None = Field(default=None, description="the key of the certificate")
    server_name: str = Field(default="", description="name in the servers' certificates; empty: the target's host")

    @model_validator(mode="after")
    def _whole_pair(self) -> Self:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("certificate_file and key_file go together: give both or none")
        return self


def check_url(url: str) -> str:
    """Return it. Raises ValueError: it leads nowhere."""
    expected = "http://HOST:PORT/PATH or https://, the port from 1 to 65535"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"expected {expected}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not url.isprintable() or " " in url:
        raise ValueError(f"expected {expected}")
    return url


class TracingConfig(ConfigModel):
    """Where OpenTelemetry spans go. A call's span joins the trace that its metadata names."""

    endpoint: Annotated[str, AfterValidator(check_url)] | None = Field(
        default=None,
        description="OTLP over gRPC, such as http://collector:4317, or https:// where it speaks TLS; none: no tracing",
    )
    sample_ratio: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="share of the traces begun here that are kept; others follow their caller",
    )


class _YamlReader(yaml.SafeLoader):
    """Refuses a key that is there twice: PyYAML would keep the last, and what stands below the first has no effect."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:  # pyright: ignore - its stub is wrong
        node = super().compose_mapping_node(anchor)  # pyright: ignore
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise ConstructorError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return node


def parse_yaml(text: str) -> object:
    """Plain values of a YAML text; raise YAMLError, ValueError or RecursionError where it is none."""
    return _YamlReader(text).get_single_data()


def read_yaml(path: Path) -> object:
    """Read a YAML file; raise ConfigError when it cannot be read or parsed."""
    try:
        return parse_yaml(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), [f"cannot be read: {error.strerror}"]) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Not all are YAMLErrors: bytes that are no UTF-8, a date that is none, brackets nested by the thousand.
        raise ConfigError(str(path), [f"not YAML: {error}"]) from error


def parse_config(model: type[ConfigT], values: object, origin: str) -> ConfigT:
    """Validate plain values; raise ConfigError that lists every fault at once."""
    try:
        return model.model_validate(values if values is not None else {})
    except ValidationError as error:
        raise ConfigError(origin, describe_faults(error)) from error


def read_layers(path: Path, *over: Path) -> object:
    """Read a YAML file and lay others over it; raise ConfigError when one cannot be read or parsed.

    Args:
        path: the file.
        over: files whose values replace those before them; sections are merged key by key, lists are replaced.
    """
    values = read_yaml(path)
    for one in over:
        above = read_yaml(one)
        values = values if above is None else _laid_over(values, above)
    return values


def named(*paths: Path) -> str:
    """Files that are laid over each other, as the origin of what they come to."""
    return ", ".join(str(path) for path in paths)


def load_config(model: type[ConfigT], path: Path, *over: Path) -> ConfigT:
    """Read files as `read_layers` does, and validate the whole; raise ConfigError that lists every fault at once."""
    return parse_config(model, read_layers(path, *over), named(path, *over))


def add_config_option(parser: ArgumentParser) -> None:
    """The option whose files `load_config` is given."""
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        action="append",
        metavar="FILE",
        help="YAML configuration; given again: a file whose values are laid over those before it",
    )


def dump_config(config: ConfigModel) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal model."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _laid_over(below: object, above: object) -> object:
    if not isinstance(below, dict) or not isinstance(above, dict):
        # That a section became something else is for the validation to say.
        return above
    lower, upper = cast("dict[object, object]", below), cast("dict[object, object]", above)
    return lower | {key: _laid_over(lower.get(key), value) for key, value in upper.items()}


def describe_faults(error: ValidationError) -> list[str]:
    """One line for each fault: dotted path, what is wrong, what was found."""
    lines: list[str] = []
    for fault in error.errors(include_url=False):
        if fault["type"] == "too_short" and len(fault["input"]) >= fault.get("ctx", {})["min_length"]:
            # pydantic counts the items that are right; the others are named already.
            continue
        if fault["type"] == "default_factory_not_called":
            # A default that follows from another key, which has a fault of its own.
            continue
        # Which kind of several a section is, stands in its own key `kind`; in the path it would be no key of the file.
        path = ".".join(str(part) for part in fault["loc"] if not str(part).startswith("kind=")) or "(top level)"
        if fault["type"] == "extra_forbidden":
            lines.append(f"{path}: unknown key")
        elif fault["type"] == "missing":
            lines.append(f"{path}: required, but missing")
        elif isinstance(several := fault.get("ctx", {}).get("error"), SectionFaults):
            lines += [f"{path}: {one}" for one in several.faults]
        else:
            message = fault["msg"].removeprefix("Value error, ")
            # A check over a whole section names the values it compared; the section itself would bury them.
            found = "" if isinstance(fault["input"], _SECTIONS) else f", found {fault['input']!r}"
            lines.append(f"{path}: {message}{found}")
    return lines
