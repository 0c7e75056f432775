"""Real containers by podman, hardened as a cluster's "restricted" policy demands."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CONTAINERS_CONF = Path(__file__).resolve().parents[1] / "images" / "containers.conf"
START_TIMEOUT_S = 240.0
HARDENED = ("--read-only", "--read-only-tmpfs=false", "--cap-drop=all", "--security-opt=no-new-privileges")


@dataclass(frozen=True)
class Finished:
    """What a command in a container, or of podman, ended with."""

    code: int
    stdout: str
    stderr: str


def podman(*arguments: str, timeout_s: float = 300.0) -> Finished:
    """Run podman to its end."""
    done = subprocess.run(
        ["podman", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env={**os.environ, "CONTAINERS_CONF": str(CONTAINERS_CONF)},
    )
    # podman says so of every image with a HEALTHCHECK where no systemd could run it.
    lines = [line for line in done.stderr.splitlines() if "systemd" not in line]
    return Finished(done.returncode, done.stdout, "\n".join(lines))


def must(done: Finished) -> str:
    """The output of a command that has to succeed."""
    assert done.code == 0, f"exit code {done.code}\n{done.stderr}\n{done.stdout}"
    return done.stdout.strip()


def run_to_exit(image: str, *arguments: str, options: Sequence[str] = (), timeout_s: float = 300.0) -> Finished:
    """Run a hardened container that ends by itself."""
    command = ("run", "--rm", *HARDENED, "--tmpfs=/tmp", "--network=none", *options, image, *arguments)
    return podman(*command, timeout_s=timeout_s)


def shell(image: str, script: str) -> Finished:
    """Run a shell in a hardened container."""
    return run_to_exit(image, "-c", script, options=["--entrypoint=/bin/sh"])


def inspect_image(image: str) -> dict[str, object]:
    """The configuration of an image, as podman tells it."""
    return json.loads(must(podman("image", "inspect", image)))[0]


@dataclass(frozen=True)
class Container:
    """A container that runs.

    Attributes:
        name: for podman.
        address: in its network.
    """

    name: str
    address: str

    def exec(self, *command: str) -> Finished:
        return podman("exec", self.name, *command)

    def healthy(self) -> bool:
        """Whether the image's own HEALTHCHECK succeeds now."""
        return podman("healthcheck", "run", self.name).code == 0

    def wait_healthy(self, timeout_s: float = START_TIMEOUT_S) -> None:
        until = time.monotonic() + timeout_s
        while not self.healthy():
            if self.state("Running") != "true" or time.monotonic() > until:
                raise AssertionError(f"{self.name} is not healthy; its log:\n{self.log()}")
            time.sleep(0.5)

    def state(self, key: str) -> str:
        return must(podman("container", "inspect", "--format", f"{{{{.State.{key}}}}}", self.name))

    def stop(self, grace_s: int = 40) -> int:
        """Send the image's STOPSIGNAL; returns the exit code, 137 where it had to be killed."""
        must(podman("stop", "--time", str(grace_s), self.name))
        return int(self.state("ExitCode"))

    def log(self) -> str:
        done = podman("logs", self.name)
        return done.stdout + done.stderr


@contextmanager
def running(
    image: str,
    name: str,
    *,
    network: str,
    volumes: Mapping[str, str],
    command: Sequence[str] = (),
    options: Sequence[str] = (),
) -> Iterator[Container]:
    """Start a hardened container and remove it afterwards; `volumes`: where by what."""
    mounts = [f"--volume={source}:{target}" for target, source in volumes.items()]
    podman("rm", "--force", "--time", "0", name)
    start = ("run", "--detach", "--name", name, *HARDENED, "--tmpfs=/tmp", f"--network={network}", *mounts, *options)
    try:
        must(podman(*start, image, *command))
        address = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        yield Container(name, must(podman("container", "inspect", "--format", address, name)))
    finally:
        podman("rm", "--force", "--time", "0", name)
