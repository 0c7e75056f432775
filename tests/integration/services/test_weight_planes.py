"""Weights by shared files, as changes, as adapters, and relayed, through real services."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from ppod import FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, PpodError, Unavailable, WeightClient
from ppod.client import (
    RelayHop,
    Segment,
    SharedDirectory,
    WeightPush,
    WireImage,
    relay_tree,
)
from ppod_trainer.policy_weights import PolicyTensors
from support.processes import ServiceProcess, free_ports, running_service
from support.saved_adapters import adapter_tensors
from support.services import tiny_model_config
from support.tiny_adapter import build_adapted_model
from support.tiny_model import build_model
from support.weight_checks import assert_serves, greedy_tokens
from support.weight_tensors import weight_tensors


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A directory in the memory of this machine."""
    with TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@pytest.fixture(scope="module", params=["copied", "mapped"])
def service(
    request: pytest.FixtureRequest, shared: Path, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    weights = {"shared_directories": [str(shared)], "map_shared_files": request.param == "mapped"}
    values = {"model": tiny_model_config(tiny_model_dir), "weights": weights}
    with running_service("ppod_services.generation", tmp_path_factory.mktemp("planes"), values) as up:
        yield up


@pytest.fixture
def weights(service: ServiceProcess) -> Iterator[WeightClient]:
    with WeightClient(service.admin_target, timeout_s=20) as client:
        yield client


def next_version(weights: WeightClient) -> int:
    return weights.status().state.weight_version + 1


def written(directory: SharedDirectory, weights: WeightClient, seed: int) -> Segment:
    policy = PolicyTensors(build_model(seed=seed), torch.float32)
    segment = directory.segment(policy.layout, weights.status().held_uris)
    segment.image.fill(policy.write)
    directory.publish(segment)
    return segment


def push_of(segment: Segment, version: int) -> WeightPush:
    return WeightPush(version, segment.image.tensors(), uri=segment.uri)


def test_a_shared_file_is_served_and_never_overwritten_while_it_is(
    service: ServiceProcess, weights: WeightClient, shared: Path
) -> None:
    with SharedDirectory(shared) as directory:
        paths: list[Path] = []
        for seed in (41, 42, 43, 44):
            version = next_version(weights)
            segment = written(directory, weights, seed)
            paths.append(segment.path)
            sent = push_of(segment, version)
            assert weights.push(sent).received_bytes == sent.wire_bytes
            held = weights.status().held_uris
            weights.commit(version)
            assert_serves(service, version, build_model(seed=seed))
            mapped = segment.uri in held
        assert weights.status().held_uris == ((segment.uri,) if mapped else ())
        # One file does where it is copied; where it is mapped, two in turns.
        assert len(set(paths)) == (2 if mapped else 1)
        assert paths[0] == paths[2]
    # The files are gone, the memory is not.
    assert_serves(service, version, build_model(seed=44))


def refused(weights: WeightClient, push: WeightPush, error: type[PpodError], words: str) -> None:
    before = weights.status()
    with pytest.raises(error, match=words):
        weights.push(push)
    assert weights.status() == before


def test_files_out_of_bounds_are_not_opened(
    service: ServiceProcess, weights: WeightClient, shared: Path, tmp_path: Path
) -> None:
    version = next_version(weights)
    with SharedDirectory(shared) as directory, SharedDirectory(tmp_path) as outside:
        good, secret = written(directory, weights, 1), written(outside, weights, 1)
        push = push_of(good, version)

        def at(path: Path | str) -> WeightPush:
            uri = path.as_uri() if isinstance(path, Path) else path
            return dataclasses.replace(push, uri=uri)

        (shared / "link.safetensors").symlink_to(secret.path)
        (shared / "folder").symlink_to(tmp_path)
        os.mkfifo(shared / "pipe")
        inside = secret.path.relative_to(tmp_path)
        cases: list[tuple[WeightPush, type[PpodError], str]] = [
            (at(secret.path), PermissionDenied, "outside of the shared directories"),
            (at(f"file://{shared}/../{tmp_path.name}/x"), PermissionDenied, "outside of the shared directories"),
            (at(f"file://{shared}/%2e%2e/x"), PermissionDenied, "outside of the shared directories"),
            (at(shared / "link.safetensors"), PermissionDenied, "links are not followed"),
            (at(shared / "folder" / inside), PermissionDenied, "links are not followed"),
            (at(shared / "pipe"), PermissionDenied, "no regular file"),
            (at(good.path.parent), PermissionDenied, "no regular file"),
            (at(shared), PermissionDenied, "outside of the shared directories"),
            (at(shared / "nothing"), NotFound, "it must be there"),
            (at("http://127.0.0.1/x"), InvalidArgument, "file:// and an absolute path"),
            (at("file://elsewhere/x"), InvalidArgument, "file:// and an absolute path"),
        ]
        for bad, error, words in cases:
            refused(weights, bad, error, words)
        for name in ("pipe", "folder", "link.safetensors"):
            (shared / name).unlink()
        weights.push(push)
        weights.commit(version)
    assert_serves(service, version, build_model(seed=1))


def test_damaged_files_are_refused(service: ServiceProcess, weights: WeightClient, shared: Path) -> None:
    first = next_version(weights)
    with SharedDirectory(shared) as directory:
        weights.push(push_of(written(directory, weights, 50), first))
        weights.commit(first)
        segment = written(directory, weights, 51)
        push, data = push_of(segment, first + 1), segment.path.read_bytes()
        name = push.tensors[3].name
        last = data[:-1] + bytes([data[-1] ^ 1])
        cases = [
            (last, rf"tensors.{push.tensors[-1].name}.xxh3"),
            (data[:-1], "bytes, as its header says"),
            (data + b"x", "bytes, as its header says"),
            (data[:5], "a file of 5 bytes"),
            (b"", "a file of 0 bytes"),
            (b"\xff" * 8 + data[8:], "with a header of"),
            (data[:8] + b"x" + data[9:], "a header that cannot be read"),
            (data.replace(b'"F32"', b'"F16"', 1), "F16"),
            (data.replace(name.encode(), name.encode()[::-1], 1), "the tensors of the manifest|in its order"),
        ]
        for content, words in cases:
            copy = segment.path.with_name("damaged.safetensors")
            copy.write_bytes(content)
            refused(weights, dataclasses.replace(push, uri=copy.as_uri()), InvalidArgument, words)
        assert_serves(service, first, build_model(seed=50))
        weights.push(push)
        weights.commit(first + 1)
    assert_serves(service, first + 1, build_model(seed=51))


def nudged(seed: int, share: float) -> torch.nn.Module:
    """The model of a seed, with a share of the elements of each tensor turned."""
    model = build_model(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.where(torch.rand(parameter.shape, generator=generator) < share, -1.0, 1.0))
    return model


def image_of(model: torch.nn.Module) -> WireImage:
    policy = PolicyTensors(model, torch.float32)
    image = WireImage(policy.layout)
    image.fill(policy.write)
    return image


@pytest.mark.parametrize("by_file", [False, True])
def test_changes_arrive_exactly_or_not_at_all(
    service: ServiceProcess, weights: WeightClient, shared: Path, by_file: bool
) -> None:
    version = next_version(weights)
    base, new = image_of(build_model(seed=60)), image_of(nudged(60, 0.05))
    weights.prepare(version, base.tensors())
    weights.commit(version)
    changes = new.changes(base)
    with SharedDirectory(shared) as directory:
        uri = directory.write(changes).as_uri() if by_file else ""
        push = WeightPush(version + 1, changes, base_version=version, uri=uri)
        assert push.wire_bytes < new.nbytes / 8
        refused(weights, dataclasses.replace(push, base_version=version - 1), FailedPrecondition, "base_version")
        refused(weights, dataclasses.replace(push, base_version=None), InvalidArgument, "manifest.base_version")
        weights.push(push)
        weights.commit(version + 1)
        assert_serves(service, version + 1, nudged(60, 0.05))
        # The same once more is against a version that is gone.
        refused(weights, dataclasses.replace(push, weight_version=version + 2), FailedPrecondition, "base_version")


def test_an_adapter_alone_serves_what_peft_makes_of_it(service: ServiceProcess, weights: WeightClient) -> None:
    version = next_version(weights)
    weights.prepare(version, weight_tensors(build_model(seed=0)))
    weights.commit(version)
    for step, seed in enumerate((1, 2, 1), start=1):
        adapted = build_adapted_model(seed=seed)
        adapter, tensors = adapter_tensors(adapted, "default")
        weights.push(WeightPush(version + step, tensors, base_version=version, adapter=adapter))
        weights.commit(version + step)
        assert_serves(service, version + step, adapted)
        assert weights.status().base_version == version
    assert greedy_tokens(build_adapted_model(seed=1)) != greedy_tokens(build_model(seed=0))
    weights.prepare(version + 4, weight_tensors(build_model(seed=0)))
    weights.commit(version + 4)
    assert_serves(service, version + 4, build_model(seed=0))


@pytest.fixture(scope="module")
def replicas(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServiceProcess]]:
    """Three servers that may relay to each other."""
    directory = tmp_path_factory.mktemp("relay")
    values = {
        "model": tiny_model_config(tiny_model_dir),
        "weights": {"relay_targets": ["127.0.0.1:*"], "idle_timeout_s": 2},
    }
    with (
        running_service("ppod_services.generation", directory, values) as first,
        running_service("ppod_services.generation", directory, values) as second,
        running_service("ppod_services.generation", directory, values) as third,
    ):
        yield [first, second, third]


@pytest.mark.parametrize("fanout", [1, 2])
def test_a_relay_brings_the_same_to_all(replicas: list[ServiceProcess], fanout: int) -> None:
    targets = [one.admin_target for one in replicas]
    tree = relay_tree([[target] for target in targets], fanout)
    with WeightClient(targets[0], timeout_s=20) as root:
        version = next_version(root)
        push = WeightPush(version, weight_tensors(build_model(seed=70 + fanout)), relay=tree.hops)
        outcomes = root.push(push).replicas
    assert [(one.target, one.error) for one in outcomes] == [(target, None) for target in targets]
    for replica in replicas:
        with WeightClient(replica.admin_target) as client:
            client.commit(version)
        assert_serves(replica, version, build_model(seed=70 + fanout))


def test_what_fails_in_a_relay_is_named_and_stops_nobody_else(replicas: list[ServiceProcess]) -> None:
    (nobody,) = free_ports(1)
    first, second, third = (one.admin_target for one in replicas)
    dead = f"127.0.0.1:{nobody}"
    with WeightClient(first, timeout_s=20) as root, WeightClient(second) as ahead:
        version = next_version(root)
        model = build_model(seed=80)
        # The second is ahead of the others already, and refuses.
        ahead.prepare(version + 1, weight_tensors(model))
        ahead.commit(version + 1)
        hops = (
            RelayHop(second, (RelayHop(third),)),
            RelayHop(dead, (RelayHop("127.0.0.1:9"),)),
            RelayHop("elsewhere.example:50063"),
        )
        outcomes = root.push(WeightPush(version, weight_tensors(model), relay=hops)).replicas
    found = {one.target: one.error for one in outcomes}
    assert list(found) == [first, second, third, dead, "127.0.0.1:9", "elsewhere.example:50063"]
    assert (found[first], found[third]) == (None, None)
    refusal = found[second]
    assert isinstance(refusal, FailedPrecondition)
    assert (refusal.what, refusal.found) == ("weight_version", str(version + 1))
    assert isinstance(found[dead], Unavailable)
    assert f"not reached: {dead} failed" in str(found["127.0.0.1:9"])
    assert isinstance(found["elsewhere.example:50063"], PermissionDenied)
    for replica in (replicas[0], replicas[2]):
        with WeightClient(replica.admin_target) as client:
            client.commit(version)
        assert_serves(replica, version, model)
    assert_serves(replicas[1], version + 1, model)
