"""Servers that share a directory: one of them receives weights, the others take them from its files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import pytest

from ppod import InvalidArgument, NotFound, PermissionDenied, PpodError, Unavailable, WeightClient
from ppod.client import RelayHop, WeightPush, WeightTensor, relay_tree
from support.processes import ServiceProcess, running_service
from support.services import tiny_model_config
from support.tiny_model import build_model
from support.weight_checks import assert_serves
from support.weight_tensors import weight_tensors


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    with TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


class Host:
    """Servers, by name: `a`, `b` map the files of one directory, `c` copies them, `d` has a directory of its own, `e`
    none."""

    def __init__(self, stack: ExitStack, memory: Path, model: Path, directory: Path) -> None:
        self.shared = memory / "shared"
        places = {"a": self.shared, "b": self.shared, "c": self.shared, "d": memory / "other", "e": None}
        self.services: dict[str, ServiceProcess] = {}
        for name, place in places.items():
            values = {
                "model": tiny_model_config(model),
                "weights": {
                    "relay_targets": ["127.0.0.1:*"],
                    "relay_directory": None if place is None else str(place),
                    "map_shared_files": name != "c",
                    "idle_timeout_s": 5,
                },
            }
            self.services[name] = stack.enter_context(running_service("ppod_services.generation", directory, values))
        self.names = {service.admin_target: name for name, service in self.services.items()}
        self.clients = {
            name: stack.enter_context(WeightClient(service.admin_target, timeout_s=20))
            for name, service in self.services.items()
        }

    def groups(self, *groups: str) -> list[list[str]]:
        return [[self.services[name].admin_target for name in group] for group in groups]

    def next_version(self) -> int:
        return 1 + max(client.status().state.weight_version for client in self.clients.values())

    def push(self, tree: RelayHop, version: int, tensors: list[WeightTensor]) -> dict[str, PpodError | None]:
        root = self.clients[self.names[tree.target]]
        outcomes = root.push(WeightPush(version, tensors, relay=tree.hops)).replicas
        return {self.names[one.target]: one.error for one in outcomes}

    def held(self, name: str) -> list[Path]:
        return [Path(urlsplit(uri).path) for uri in self.clients[name].status().held_uris]


@pytest.fixture(scope="module")
def host(memory: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with ExitStack() as stack:
        yield Host(stack, memory, tiny_model_dir, tmp_path_factory.mktemp("relay-files"))


def test_servers_tell_which_of_them_share_a_directory(host: Host) -> None:
    found = {name: client.status().relay_directory_id for name, client in host.clients.items()}
    assert len(found["a"]) >= 16
    assert found["a"] == found["b"] == found["c"]
    assert found["d"] not in ("", found["a"])
    assert found["e"] == ""


def test_one_receives_and_the_others_take_its_files(host: Host) -> None:
    """`c` and `b` from `a`'s file; `d` and `e`, which see none of it, by chunks."""
    tree = relay_tree(host.groups("abc", "d", "e"), 1)
    files: list[Path] = []
    for seed in (11, 12, 13, 14):
        version = host.next_version()
        assert host.push(tree, version, weight_tensors(build_model(seed=seed))) == dict.fromkeys("adebc")
        for name, service in host.services.items():
            # What waits has taken the place of nothing: the old version serves on, in a file of its own.
            if files:
                assert_serves(service, version - 1, build_model(seed=seed - 1), prepared=version)
            host.clients[name].commit(version)
            assert_serves(service, version, build_model(seed=seed))
        (held,) = host.held("a")
        assert held.is_relative_to(host.shared)
        assert host.held("b") == [held]
        assert host.held("c") == host.held("d") == host.held("e") == []
        files.append(held)
    assert len(set(files)) == 2
    assert files[0] == files[2] != files[1] == files[3]


def test_a_file_is_kept_for_the_one_that_lags_behind(host: Host) -> None:
    """`b` does not commit what `a` commits: it serves an old file, which no further push may overwrite."""
    tree = relay_tree(host.groups("ab"), 1)
    version = host.next_version()
    host.push(tree, version, weight_tensors(build_model(seed=21)))
    for name in "ab":
        host.clients[name].commit(version)
    (old,) = host.held("b")
    for seed in (22, 23, 24):
        newer = host.next_version()
        assert host.push(tree, newer, weight_tensors(build_model(seed=seed))) == dict.fromkeys("ab")
        host.clients["a"].commit(newer)
        assert_serves(host.services["b"], version, build_model(seed=21), prepared=newer)
        assert_serves(host.services["a"], newer, build_model(seed=seed))
        # What serves, and what waits.
        assert old in host.held("b")
        assert old not in host.held("a")
    host.clients["b"].commit(newer)
    assert_serves(host.services["b"], newer, build_model(seed=24))


def test_whoever_sees_no_such_file_says_so(host: Host) -> None:
    """A sender that has it wrong learns of it, and those who do see it have their weights."""
    version = host.next_version()
    hops = tuple(RelayHop(host.services[name].admin_target, shares_directory=True) for name in "bde")
    found = host.push(RelayHop(host.services["a"].admin_target, hops), version, weight_tensors(build_model(seed=31)))
    assert (found["a"], found["b"]) == (None, None)
    assert isinstance(found["d"], PermissionDenied | NotFound)
    assert isinstance(found["e"], PermissionDenied)


def test_a_server_without_a_directory_passes_chunks_on(host: Host) -> None:
    version = host.next_version()
    tree = RelayHop(
        host.services["e"].admin_target, (RelayHop(host.services["d"].admin_target, shares_directory=True),)
    )
    assert host.push(tree, version, weight_tensors(build_model(seed=32))) == {"e": None, "d": None}
    assert host.held("d") == []


def test_a_damaged_push_makes_no_file(host: Host) -> None:
    """What does not fit its checksum is never announced."""
    version = host.next_version()
    before = {name: host.clients[name].status() for name in "abc"}
    tensors = weight_tensors(build_model(seed=41))
    wrong = [*tensors[:-1], replace(tensors[-1], xxh3=1)]
    found = host.push(relay_tree(host.groups("abc"), 1), version, wrong)
    assert isinstance(found["a"], InvalidArgument)
    for name in "bc":
        error = found[name]
        assert isinstance(error, Unavailable)
        assert re.search("no file was made", str(error))
    assert {name: host.clients[name].status() for name in "abc"} == before
    # And the memory that it was received into is free again.
    assert host.push(relay_tree(host.groups("abc"), 1), version, tensors) == dict.fromkeys("abc")


def test_a_dead_relay_takes_nobody_with_it(memory: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """It is killed while another serves from its file; that one serves on, and relays in its place."""
    with ExitStack() as stack:
        host = Host(stack, memory / "killed", tiny_model_dir, tmp_path)
        version = host.next_version()
        host.push(relay_tree(host.groups("abc"), 1), version, weight_tensors(build_model(seed=51)))
        for name in "abc":
            host.clients[name].commit(version)
        (held,) = host.held("b")
        host.services["a"].process.kill()
        host.services["a"].process.wait(10)
        found = host.push(relay_tree(host.groups("bc"), 1), version + 1, weight_tensors(build_model(seed=52)))
        assert found == dict.fromkeys("bc")
        # What the dead one left is removed by the one that relays next. Its memory lives for as long as it serves.
        assert not held.exists()
        assert_serves(host.services["b"], version, build_model(seed=51), prepared=version + 1)
        for name in "bc":
            host.clients[name].commit(version + 1)
            assert_serves(host.services[name], version + 1, build_model(seed=52))
        for name in "bcde":
            host.services[name].signal()
        for name in "bcde":
            assert host.services[name].wait() == 0
        assert [path.name for path in host.shared.iterdir()] == ["ppod-directory-id"]
