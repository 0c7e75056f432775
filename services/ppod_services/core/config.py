"""Configuration that every service has. Free of torch: the launcher reads it too."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from ppod.channel import MAX_MESSAGE_BYTES, WEIGHT_CHUNK_BYTES
from ppod_models.configuration import ClientTlsConfig, ConfigModel, ModelConfig, TracingConfig


class ListenConfig(ConfigModel):
    """Where a service listens."""

    host: str = Field(default="127.0.0.1", min_length=1, description="address of every port; 0.0.0.0 in a container")
    port: int = Field(ge=1, le=65535, description="gRPC port of the service")
    admin_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="port of WeightService, or of the reward service's RewardAdminService; none: not served",
    )
    metrics_port: int | None = Field(default=None, ge=1, le=65535, description="port of /metrics; none: not served")
    health_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="port of health alone, always in plain text: for probes that speak no TLS, as a kubelet's; none: "
        "health is on the other gRPC ports only",
    )

    def address(self, port: int) -> str:
        """One of the ports as a gRPC address."""
        return f"[{self.host}]:{port}" if ":" in self.host else f"{self.host}:{port}"

    @field_validator("host")
    @classmethod
    def _without_brackets(cls, host: str) -> str:
        return host.removeprefix("[").removesuffix("]")

    @model_validator(mode="after")
    def _ports_differ(self) -> Self:
        ports = [one for one in (self.port, self.admin_port, self.metrics_port, self.health_port) if one is not None]
        if len(set(ports)) != len(ports):
            raise ValueError("port, admin_port, metrics_port and health_port must differ from each other")
        return self


class TlsConfig(ConfigModel):
    """Certificates of a port, as PEM files; they are read again when they change."""

    certificate_file: Path = Field(description="the server's certificate, with its chain")
    private_key_file: Path = Field(description="the key of the certificate, without a passphrase")
    client_ca_file: Path | None = Field(
        default=None, description="mutual TLS: authority that callers' certificates must come from; none: TLS only"
    )


class BatchingConfig(ConfigModel):
    """How waiting sequences of all callers become batches."""

    max_batch_tokens: int = Field(
        default=16_384,
        ge=1,
        le=2**24,
        description="most tokens of a batch, padding included, and so of a sequence; bounds memory",
    )
    max_batch_size: int = Field(default=64, ge=1, le=65_536, description="most sequences of a batch")
    shared_batch_tokens: int | None = Field(
        default=None,
        ge=1,
        le=2**24,
        description="most tokens of a batch while several teams use the service: a team that comes back waits for the "
        "batch that runs; none: a quarter of max_batch_tokens",
    )
    max_batch_s: float = Field(
        default=1.0,
        gt=0,
        le=3_600,
        description="longest batch by the measured speed, while several requests wait: bounds how long each waits for "
        "the one that runs, on slow devices above all",
    )
    batch_overhead_tokens: int = Field(
        default=64,
        ge=0,
        le=2**24,
        description="what starting a batch costs, in tokens of compute: padding is accepted up to it; large where a "
        "small batch leaves the device idle",
    )
    max_wait_ms: float = Field(
        default=2.0,
        ge=0,
        le=1_000,
        description="longest wait of an idle service for more sequences, where recent traffic makes them likely",
    )
    max_queue_tokens: int = Field(
        default=1_048_576, ge=1, le=2**32, description="most waiting tokens; beyond it callers are told to come back"
    )
    max_queue_sequences: int = Field(
        default=65_536, ge=1, le=2**24, description="most waiting sequences; beyond it callers are told to come back"
    )
    catch_up_tokens: int = Field(
        default=65_536,
        ge=0,
        le=2**32,
        description="most tokens of its unused share that a team may be served at once when it comes back",
    )

    @property
    def contended_batch_tokens(self) -> int:
        """`shared_batch_tokens`, resolved."""
        return self.shared_batch_tokens or max(1, self.max_batch_tokens // 4)

    @model_validator(mode="after")
    def _queue_holds_a_batch(self) -> Self:
        if self.max_queue_tokens < self.max_batch_tokens:
            raise ValueError(f"max_queue_tokens must be at least max_batch_tokens, {self.max_batch_tokens}")
        if self.shared_batch_tokens is not None and self.shared_batch_tokens > self.max_batch_tokens:
            raise ValueError(f"shared_batch_tokens must be at most max_batch_tokens, {self.max_batch_tokens}")
        return self


class TenancyConfig(ConfigModel):
    """Who may call."""

    teams_file: Path | None = Field(
        default=None,
        description="YAML file of teams and administrators with their tokens' hashes; none: anyone may call",
    )
    reload_s: float = Field(
        default=2.0, gt=0, le=3_600, description="how often the teams file is looked at for changes"
    )
    open_admin: bool = Field(
        default=False, description="leave the admin port open to anyone on the network, where there is no teams file"
    )


class LimitsConfig(ConfigModel):
    """What one caller may ask for."""

    max_request_sequences: int = Field(default=1_024, ge=1, le=1_000_000, description="most sequences of a request")
    max_message_bytes: int = Field(
        default=MAX_MESSAGE_BYTES,
        ge=2 * WEIGHT_CHUNK_BYTES,
        le=2**30,
        description="largest message, either way; ppod's own client cuts what it sends to 16 MiB, whatever stands here",
    )
    max_concurrent_calls: int = Field(
        default=4_096, ge=1, le=1_000_000, description="most calls under way; beyond it callers are told to come back"
    )
    default_deadline_s: float = Field(default=600.0, gt=0, le=86_400, description="deadline of a call that brings none")
    max_connection_age_s: float = Field(
        default=300.0,
        ge=1,
        le=86_400,
        description="age at which a connection is closed gracefully, so that clients find new replicas",
    )


class ServiceConfig(ConfigModel):
    """What every service is configured with."""

    listen: ListenConfig
    batching: BatchingConfig = BatchingConfig()
    limits: LimitsConfig = LimitsConfig()
    tenancy: TenancyConfig = TenancyConfig()
    tls: TlsConfig | None = Field(default=None, description="of the service's port; none: plain text")
    admin_tls: TlsConfig | None = Field(default=None, description="of the administration port; none: as `tls`")
    tracing: TracingConfig = TracingConfig()
    warm_up_tokens: int = Field(
        default=512, ge=0, le=2**24, description="tokens of the batches that are run before the service is ready"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least that is logged; debug: calls that succeed, too"
    )
    drain_grace_s: float = Field(default=30.0, ge=0, le=3_600, description="longest time to finish work after SIGTERM")

    @model_validator(mode="after")
    def _admin_is_closed_to_strangers(self) -> Self:
        tls = self.admin_tls or self.tls
        guarded = (
            self.tenancy.teams_file is not None
            or self.tenancy.open_admin
            or (tls is not None and tls.client_ca_file is not None)
            or _is_loopback(self.listen.host)
        )
        if self.listen.admin_port is not None and not guarded:
            raise ValueError(
                f"listen.admin_port would let anyone who reaches {self.listen.host} replace the weights: name "
                "administrators in tenancy.teams_file, demand client certificates by admin_tls.client_ca_file, listen "
                "on 127.0.0.1, or set tenancy.open_admin where the network itself keeps strangers out"
            )
        return self


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


class WeightsConfig(ConfigModel):
    """How new weights may come in, on the administration port."""

    idle_timeout_s: float = Field(
        default=30.0,
        gt=0,
        le=3_600,
        description="longest silence of a sender in the middle of a transfer, or of a server that it is relayed to",
    )
    shared_directories: tuple[Path, ...] = Field(
        default=(),
        description="directories below which weights may be read from files, as /dev/shm/ppod; none: nowhere",
    )
    map_shared_files: bool = Field(
        default=False,
        description="serve from the memory of a shared file itself where data types agree: no copy, but whoever "
        "shortens the file kills the service; for /dev/shm, not for network volumes",
    )
    collective_addresses: tuple[str, ...] = Field(
        default=(),
        description="stores of senders that weights may come from by a process group (NCCL, gloo), as patterns: "
        "`trainer-0.trainer:29600`; none: from nobody",
    )
    relay_targets: tuple[str, ...] = Field(
        default=(),
        description="administration ports that weights may be relayed to, as patterns: `policy-*.policy:50063`; none: "
        "to nobody",
    )
    relay_directory: Path | None = Field(
        default=None,
        description="a directory in memory that servers of one host share, as /dev/shm/ppod-relay: one of them "
        "receives into a file there what it relays to the others, which read it, or serve from it (map_shared_files); "
        "none: each gets all bytes by itself",
    )
    relay_tls: ClientTlsConfig | None = Field(default=None, description="TLS to them; none: plain text")
    relay_plain_text_token: bool = Field(
        default=False, description="send them the token of PPOD_ADMIN_TOKEN(_FILE) or PPOD_TOKEN(_FILE) without TLS"
    )

    @property
    def readable_directories(self) -> tuple[Path, ...]:
        """Directories below which weights may be read."""
        return self.shared_directories + (() if self.relay_directory is None else (self.relay_directory,))

    @field_validator("shared_directories")
    @classmethod
    def _directories_are_absolute(cls, directories: tuple[Path, ...]) -> tuple[Path, ...]:
        for directory in directories:
            _check_directory(directory)
        return directories

    @field_validator("relay_directory")
    @classmethod
    def _relay_directory_is_absolute(cls, directory: Path | None) -> Path | None:
        if directory is not None:
            _check_directory(directory)
        return directory


def _check_directory(directory: Path) -> None:
    if not directory.is_absolute() or ".." in directory.parts or directory == Path("/"):
        raise ValueError(f"{directory} must be an absolute path below /, without ..")


class AdapterConfig(ConfigModel):
    """A LoRA adapter on the service's model."""

    name: str = Field(min_length=1, description="what requests call the model with this adapter")
    source: str = Field(min_length=1, description="directory or hub id of an adapter that PEFT saved as safetensors")


class CausalServiceConfig(ServiceConfig):
    """What a service with one causal language model is configured with."""

    model: ModelConfig
    name: str = Field(min_length=1, description="what requests call the model")
    weights: WeightsConfig = WeightsConfig()
