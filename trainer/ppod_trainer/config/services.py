"""Where the services are, and how weights reach generation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self, cast

from pydantic import Field, model_validator

from ppod_models.configuration import ClientTlsConfig, ConfigModel, SectionFaults

Target = str

LONGEST_S = 1e9
"""Bound of times: gRPC takes a deadline of 10^10 s for one that has passed, and gloo one of 10^13 s for none."""

_KUBERNETES = re.compile(r"k8s:///[a-z0-9][-a-z0-9]*(\.[a-z0-9][-a-z0-9]*)?:[a-z0-9][-a-z0-9]*")
_PORT = re.compile(r".*:(\d{1,5})")
_BY_LISTEN = "of a run file: where that service listens, so leave it out"
_OTHER_SCHEMES = ("ipv4:", "ipv6:", "unix:", "unix-abstract:", "vsock:", "xds:")
"""Of targets that are gRPC's own to read."""


def is_kubernetes(target: Target) -> bool:
    """Whether a target names the pods behind a Service."""
    return target.startswith("k8s:")


def listed(targets: Target) -> list[str]:
    """The servers of a list."""
    return [one.strip() for one in targets.split(",")]


def _has_port(target: Target) -> bool:
    """Whether there can be such a port: of a larger number gRPC takes the last 16 bits, and 443 where there is none."""
    found = _PORT.fullmatch(target)
    return found is not None and 1 <= int(found[1]) <= 65_535


class ServicesConfig(ConfigModel):
    """Where the services listen, as gRPC targets `host:port`.

    Replicas share each step's work: `a:1,b:2`; `k8s:///SERVICE[.NAMESPACE]:PORT`, every ready pod behind a Service, as
    they come and go; or for reward and reference `dns:///host:port`, every address of a headless service. Every replica
    of generation needs its address in generation_admin: a list for a list, the same Service for a Service; and so does
    every replica of a reference that is given weights in reference_admin. The team's token comes from PPOD_TOKEN, and
    that of administration ports, where it is another one, from PPOD_ADMIN_TOKEN; or from the files that PPOD_TOKEN_FILE
    and PPOD_ADMIN_TOKEN_FILE name.
    """

    reward: Target = Field(default="127.0.0.1:50051", description=f"rewards and the held-out judge; {_BY_LISTEN}")
    reference: Target = Field(default="127.0.0.1:50052", description=f"the reference's logprobs; {_BY_LISTEN}")
    generation: Target = Field(default="127.0.0.1:50053", description=f"the policy's samples; {_BY_LISTEN}")
    reference_admin: Target = Field(
        default="127.0.0.1:50062",
        description="ports on which the replicas of the reference take weights, where it is refreshed or the policy's "
        "base is quantised",
    )
    generation_admin: Target = Field(
        default="127.0.0.1:50063", description="ports on which the replicas of generation take weights"
    )
    reward_model: str = Field(default="", description="name of the reward model; empty: the service's first")
    judge_model: str | None = Field(default=None, description="name of the held-out judge; none: no judge")
    timeout_s: float = Field(default=120.0, gt=0, le=LONGEST_S, description="deadline of each call")
    ready_timeout_s: float = Field(
        default=120.0,
        gt=0,
        le=LONGEST_S,
        description="how long to wait for the services at the start, and for every replica that is given weights",
    )
    recovery_timeout_s: float = Field(
        default=300.0,
        ge=0,
        le=LONGEST_S,
        description="how long to wait for a service that went away in the run, or refuses for now, as for a quota; 0: "
        "stop at once",
    )
    tls: ClientTlsConfig | None = Field(default=None, description="none: plain text")
    plain_text_token: bool = Field(
        default=False, description="send the token without TLS to other machines, as inside a mesh that encrypts itself"
    )

    @model_validator(mode="after")
    def _services_are_named(self) -> Self:
        faults: list[str] = []
        for key in ("reward", "reference", "reference_admin", "generation", "generation_admin"):
            target: Target = getattr(self, key)
            if is_kubernetes(target):
                if not _KUBERNETES.fullmatch(target):
                    faults.append(
                        f"{key} is {target!r}: expected k8s:///SERVICE[.NAMESPACE]:PORT, PORT a number or a name"
                    )
            elif not (target.startswith(_OTHER_SCHEMES) or all(_has_port(one) for one in listed(target))):
                faults.append(
                    f"{key} is {target!r}: expected host:port, or several with commas between, ports to 65535"
                )
        if faults:
            raise SectionFaults(*faults)
        return self

    @model_validator(mode="after")
    def _weights_reach_generation(self) -> Self:
        self.check_weights_reach("generation")
        return self

    def check_weights_reach(self, service: Literal["generation", "reference"]) -> None:
        """Raise ValueError unless each replica of this service can be given weights."""
        key = f"{service}_admin"
        target, admin = (cast(Target, getattr(self, name)) for name in (service, key))
        for name, one in ((service, target), (key, admin)):
            if one.startswith("dns:"):
                raise ValueError(f"{name} is {one!r}: weights are pushed to each server, so list every host:port")
        if is_kubernetes(target) or is_kubernetes(admin):
            name, _, port = target.rpartition(":")
            admin_name, _, admin_port = admin.rpartition(":")
            if name != admin_name or port == admin_port:
                raise ValueError(
                    f"{service} is {target!r}, {key} {admin!r}: weights go to the pods that serve, so name two ports "
                    "of one Service"
                )
            return
        replicas, admins = len(listed(target)), len(listed(admin))
        if replicas != admins:
            raise ValueError(f"{service} lists {replicas} and {key} {admins} addresses: every replica must get weights")


class CollectiveConfig(ConfigModel):
    """The process group of the trainer and all replicas of generation."""

    backend: Literal["auto", "nccl", "gloo"] = Field(
        default="auto", description="auto: NCCL with a CUDA device, else gloo"
    )
    host: str = Field(
        default="127.0.0.1",
        description="where the replicas reach this trainer; they allow it by weights.collective_addresses",
    )
    port: int = Field(default=29600, ge=1, le=65535, description="on which the parties meet")
    bucket_mib: int = Field(default=16, ge=1, le=1024, description="what is broadcast at once")
    timeout_s: float = Field(
        default=30.0, gt=0, le=LONGEST_S, description="longest wait for a replica to join, or to take a bucket"
    )


class WeightTransferConfig(ConfigModel):
    """How new weights reach generation; services/ppod_services/README.md tells which to take when."""

    plane: Literal["grpc", "shared", "collective"] = Field(
        default="grpc",
        description="grpc: a stream of chunks, works everywhere; shared: files that both sides see; collective: "
        "broadcast to all replicas at once, by NCCL between GPU nodes",
    )
    collective: CollectiveConfig = CollectiveConfig()
    directory: Path | None = Field(
        default=None,
        description="shared: where files are written, at the same path for the services, which allow it by "
        "weights.shared_directories; /dev/shm/... on one host, else a volume",
    )
    encoding: Literal["full", "delta"] = Field(
        default="full", description="delta: only elements that changed since the last version, exactly"
    )
    relay: Literal["none", "chain", "tree"] = Field(
        default="none",
        description="how several replicas get them: each from the trainer, or from each other, which they allow by "
        "weights.relay_targets",
    )
    relay_fanout: int = Field(default=2, ge=2, le=64, description="tree: servers that one server sends to")
    pause: Literal["wait", "keep", "abort"] = Field(
        default="wait", description="what a commit does about running sequences; see WeightPause in weights.proto"
    )
    lost_replicas: Literal["stop", "skip"] = Field(
        default="stop",
        description="what a listed replica that did not get its weights, while others did, does to the run; of "
        "generation, and of a reference that is refreshed",
    )

    @model_validator(mode="after")
    def _directory_is_used(self) -> Self:
        if (self.plane == "shared") != (self.directory is not None):
            raise ValueError(
                f"plane is {self.plane!r}, directory {str(self.directory)!r}: give one for shared, else none"
            )
        others = (self.encoding, self.relay, self.lost_replicas)
        if self.plane == "collective" and others != ("full", "none", "stop"):
            raise ValueError(
                f"plane is 'collective' with encoding, relay, lost_replicas {', '.join(others)}: it broadcasts "
                "whole weights to all replicas or to none; leave these at full, none, stop"
            )
        if self.directory is not None and not self.directory.is_absolute():
            raise ValueError(f"directory is {str(self.directory)!r}: it must be absolute, the services open it too")
        return self
