"""The trainer's pushes: to all replicas, by every plane and encoding, and what it does about those that fail."""

from __future__ import annotations

import logging
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from ppod import Unavailable, WeightClient
from ppod_trainer.config import WeightTransferConfig
from ppod_trainer.errors import WeightPushError
from ppod_trainer.weight_replicas import FixedReplicas
from ppod_trainer.weight_sync import WeightSync
from support.processes import ServiceProcess, metrics_of, running_service
from support.saved_adapters import adapter_tensors
from support.services import tiny_model_config
from support.tiny_adapter import build_adapted_model
from support.tiny_head import save_tiny_head
from support.tiny_model import build_model
from support.weight_checks import assert_serves, assert_takes_next
from support.weight_tensors import weight_tensors

from .conftest import System, records_of, running_system, wait_for_step

FULL_BYTES = sum(parameter.numel() * 4 for parameter in build_model().parameters())


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    with TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@contextmanager
def generator(model_dir: Path, directory: Path, shared: Path) -> Iterator[ServiceProcess]:
    weights = {
        "shared_directories": [str(shared)],
        "map_shared_files": True,
        "relay_targets": ["127.0.0.1:*"],
        "collective_addresses": ["127.0.0.1:*"],
        "idle_timeout_s": 2,
    }
    values = {"model": tiny_model_config(model_dir), "weights": weights}
    with running_service("ppod_services.generation", directory, values) as service:
        yield service


@pytest.fixture(scope="module")
def replicas(
    tiny_model_dir: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[ServiceProcess]]:
    directory = tmp_path_factory.mktemp("replicas")
    with generator(tiny_model_dir, directory, shared) as first, generator(tiny_model_dir, directory, shared) as second:
        yield [first, second]


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in memory of one test's own."""
    with TemporaryDirectory(dir="/dev/shm") as directory:
        yield Path(directory)


@contextmanager
def hosted(model_dir: Path, directory: Path, relay_directory: Path) -> Iterator[ServiceProcess]:
    """A replica that maps what it is relayed by a file of this directory."""
    weights = {
        "map_shared_files": True,
        "relay_targets": ["127.0.0.1:*"],
        "relay_directory": str(relay_directory),
        "idle_timeout_s": 2,
    }
    values = {"model": tiny_model_config(model_dir), "weights": weights}
    with running_service("ppod_services.generation", directory, values) as service:
        yield service


@contextmanager
def syncing(replicas: Sequence[ServiceProcess], config: WeightTransferConfig) -> Iterator[WeightSync]:
    clients = [WeightClient(one.admin_target, timeout_s=20) for one in replicas]
    sync = WeightSync(FixedReplicas(clients, config.lost_replicas), config)
    try:
        yield sync
    finally:
        sync.close()


def nudged(model: torch.nn.Module, share: float = 0.02) -> torch.nn.Module:
    """The model with a share of the elements of each tensor turned."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.where(torch.rand(parameter.shape, generator=generator) < share, -1.0, 1.0))
    return model


def config_of(plane: str, encoding: str, relay: str, shared: Path) -> WeightTransferConfig:
    directory = shared if plane == "shared" else None
    return WeightTransferConfig(plane=plane, encoding=encoding, relay=relay, directory=directory)  # type: ignore[arg-type]


@pytest.mark.parametrize("relay", ["none", "chain", "tree"])
@pytest.mark.parametrize("plane", ["grpc", "shared"])
@pytest.mark.parametrize("encoding", ["full", "delta"])
def test_every_way_brings_the_same_weights(
    replicas: list[ServiceProcess], shared: Path, plane: str, encoding: str, relay: str
) -> None:
    model = build_model(seed=1)
    with syncing(replicas, config_of(plane, encoding, relay, shared)) as sync:
        version = max(sync.serving_versions())
        reports = [sync.push(model, torch.float32, version + 1)]
        reports += [sync.push(nudged(model), torch.float32, version + step) for step in (2, 3)]
    for replica in replicas:
        assert_serves(replica, version + 3, model)
    leaves = 1 if plane == "shared" or relay != "none" else 2
    assert reports[0].sent_bytes == FULL_BYTES * leaves
    if encoding == "full":
        assert reports[2].sent_bytes == FULL_BYTES * leaves
    else:
        assert reports[2].sent_bytes < FULL_BYTES * leaves / 10
    assert [(report.fallbacks, report.lost) for report in reports] == [(0, ())] * 3
    assert list(shared.iterdir()) == []


@pytest.mark.parametrize("encoding", ["full", "delta"])
def test_replicas_of_one_host_take_a_file_from_one_another(
    tiny_model_dir: Path, memory: Path, tmp_path: Path, encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And one that only seems to be there gets its weights from the trainer."""
    host, elsewhere = memory / "host", memory / "elsewhere"
    model = build_model(seed=1)
    config = config_of("grpc", encoding, "chain", memory)
    with (
        hosted(tiny_model_dir, tmp_path, host) as first,
        hosted(tiny_model_dir, tmp_path, host) as second,
        hosted(tiny_model_dir, tmp_path, elsewhere) as third,
    ):
        replicas = [first, third, second]
        with syncing(replicas, config) as sync:
            report = sync.push(model, torch.float32, 1)
            assert (report.sent_bytes, report.lost) == (FULL_BYTES, ())
            held = [held_uris(one) for one in replicas]
            # The third gets the first one's chunks: nobody else is in its directory.
            assert held[0] == held[2]
            assert held[0][0].startswith(host.as_uri())
            assert held[1] == ()
            sync.push(nudged(model), torch.float32, 2)
            for replica in replicas:
                assert_serves(replica, 2, model)
        # Now the third looks as if it shared the others' directory.
        id_file = "ppod-directory-id"
        third.signal()
        assert third.wait() == 0
        (elsewhere / id_file).write_text((host / id_file).read_text())
        with hosted(tiny_model_dir, tmp_path, elsewhere) as again:
            replicas = [first, again, second]
            whole = config_of("grpc", "full", "chain", memory)
            with syncing(replicas, whole) as sync, caplog.at_level(logging.WARNING):
                report = sync.push(nudged(model), torch.float32, 3)
            assert report.lost == ()
            assert report.sent_bytes == 2 * FULL_BYTES
            assert f"the relay did not reach {again.admin_target}" in caplog.text
            for replica in replicas:
                assert_serves(replica, 3, model)


def held_uris(replica: ServiceProcess) -> tuple[str, ...]:
    with WeightClient(replica.admin_target) as client:
        return client.status().held_uris


def test_who_has_another_base_gets_whole_weights(
    replicas: list[ServiceProcess], caplog: pytest.LogCaptureFixture
) -> None:
    model = build_model(seed=2)
    with syncing(replicas, WeightTransferConfig(encoding="delta")) as sync:
        version = max(sync.serving_versions()) + 1
        sync.push(model, torch.float32, version)
        # Somebody else gives the second one other weights.
        with WeightClient(replicas[1].admin_target) as other:
            other.prepare(version + 1, weight_tensors(build_model(seed=3)))
            other.commit(version + 1)
        with caplog.at_level(logging.WARNING):
            report = sync.push(nudged(model), torch.float32, version + 2)
        assert (report.fallbacks, sync.fallbacks) == (1, 1)
        assert f"{replicas[1].admin_target} gets whole weights: base_version" in caplog.text
        assert report.sent_bytes > FULL_BYTES
        for replica in replicas:
            assert_serves(replica, version + 2, model)
        assert sync.push(nudged(model), torch.float32, version + 3).fallbacks == 0
    for replica in replicas:
        assert_serves(replica, version + 3, model)


def test_an_adapter_goes_on_top_of_what_was_pushed(replicas: list[ServiceProcess]) -> None:
    with syncing(replicas, WeightTransferConfig()) as sync:
        version = max(sync.serving_versions()) + 1
        sync.push(build_model(seed=0), torch.float32, version)
        report = sync.push_adapter(*adapter_tensors(build_adapted_model(seed=4), "default"), version + 1)
    assert report.sent_bytes < 2 * FULL_BYTES / 10
    for replica in replicas:
        assert_serves(replica, version + 1, build_adapted_model(seed=4))


@pytest.mark.parametrize("relay", ["none", "chain"])
def test_a_dead_replica_stops_the_push_or_is_left_behind(
    tiny_model_dir: Path,
    replicas: list[ServiceProcess],
    shared: Path,
    tmp_path: Path,
    relay: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = build_model(seed=6)
    strict = WeightTransferConfig(relay=relay)  # type: ignore[arg-type]
    with generator(tiny_model_dir, tmp_path, shared) as dead:
        everyone = [dead, *replicas]
        with syncing(everyone, strict) as sync:
            version = max(sync.serving_versions()) + 1
            sync.push(model, torch.float32, version)
            dead.signal(signal.SIGKILL)
            refused = rf"prepare of weight version .* 1 of 3: {dead.admin_target}: "
            with pytest.raises(WeightPushError, match=refused) as failed:
                sync.push(build_model(seed=7), torch.float32, version + 1)
        assert [type(cause) for cause in failed.value.causes] == [Unavailable]
        assert failed.value.__notes__ == ["weight_transfer.lost_replicas: skip would go on without it"]
        for replica in replicas:
            with WeightClient(replica.admin_target) as client:
                assert client.status().state.weight_version == version
        with (
            syncing(everyone, strict.model_copy(update={"lost_replicas": "skip"})) as lenient,
            caplog.at_level(logging.WARNING),
        ):
            report = lenient.push(build_model(seed=7), torch.float32, version + 2)
        assert report.lost == (dead.admin_target,)
        assert f"failed on 1 of 3: {dead.admin_target}" in caplog.text
    for replica in replicas:
        assert_serves(replica, version + 2, build_model(seed=7))


@pytest.fixture(scope="module")
def system(tiny_model_dir: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    directory = tmp_path_factory.mktemp("system")
    heads = {"reward": str(save_tiny_head(tiny_model_dir, directory / "reward", name="reward", seed=0))}
    weights = {"shared_directories": [str(shared)], "map_shared_files": True, "idle_timeout_s": 1}
    with running_system(tiny_model_dir, directory, heads, weights=weights) as made:
        yield made


def run_config(system: System, name: str, **changes: object) -> dict[str, object]:
    services = {**system.config("x")["services"], "judge_model": None}  # type: ignore[dict-item]
    return {**system.config(name), "services": services, **changes}


def test_a_run_is_the_same_by_any_plane_and_encoding(system: System, shared: Path) -> None:
    records: list[object] = []
    for name, transfer in (
        ("plain", {}),
        ("files", {"plane": "shared", "directory": str(shared), "encoding": "delta"}),
    ):
        config = run_config(system, name, weight_transfer=transfer)
        result = system.train(config)
        assert result.returncode == 0, result.stderr
        assert "gets whole weights" not in result.stderr
        records.append(records_of(Path(str(config["run_dir"]))))
    assert records[0] == records[1]
    assert list(shared.iterdir()) == []


def test_a_trainer_that_was_killed_leaves_a_whole_version_and_its_files_are_cleaned_up(
    system: System, shared: Path
) -> None:
    transfer = {"plane": "shared", "directory": str(shared)}
    config = run_config(system, "killed", steps=1000, weight_transfer=transfer)
    process = system.start(config)
    wait_for_step(process, Path(str(config["run_dir"])), 2)
    process.kill()
    process.wait(10)
    assert len(list(shared.iterdir())) == 1
    with WeightClient(system.generation.admin_target) as weights:
        version = weights.status().state.weight_version
    assert version >= 2
    result = system.train(run_config(system, "next", steps=2, weight_transfer=transfer))
    assert result.returncode == 0, result.stderr
    assert list(shared.iterdir()) == []
    assert_takes_next(system.generation, version + 100, seed=8)


def with_second(system: System, second: ServiceProcess) -> dict[str, str]:
    """The services of a run that has another replica of generation."""
    services = dict(run_config(system, "x")["services"])  # type: ignore[call-overload]
    services["generation"] = f"{system.generation.target},{second.target}"
    services["generation_admin"] = f"{system.generation.admin_target},{second.admin_target}"
    return services


def completed(service: ServiceProcess) -> int:
    """Completions that it has been asked for."""
    [count] = re.findall(r"^ppod_batch_sequences_sum (\S+)$", metrics_of(service), re.MULTILINE)
    return int(float(count))


def test_listed_replicas_share_each_step_and_change_nothing(
    system: System, tiny_model_dir: Path, shared: Path, tmp_path: Path
) -> None:
    alone = run_config(system, "one-replica", steps=3)
    assert system.train(alone).returncode == 0
    with generator(tiny_model_dir, tmp_path, shared) as second:
        before = completed(system.generation), completed(second)
        both = run_config(system, "two-replicas", steps=3, services=with_second(system, second))
        result = system.train(both)
        assert result.returncode == 0, result.stderr
        after = completed(system.generation), completed(second)
    # Three steps of eight prompts, and six held-out ones twice.
    assert [now - then for now, then in zip(after, before, strict=True)] == [18, 18]
    found = [
        [
            (one["score/mean"], one["response/length"])
            for one in records_of(Path(str(run["run_dir"])))
            if "score/mean" in one
        ]
        for run in (alone, both)
    ]
    assert len(found[0]) == 3
    assert found[1] == [pytest.approx(one, abs=1e-4) for one in found[0]]


def test_a_run_goes_on_without_a_replica_that_dies(
    system: System, tiny_model_dir: Path, shared: Path, tmp_path: Path
) -> None:
    with generator(tiny_model_dir, tmp_path, shared) as second:
        config = run_config(
            system,
            "survives",
            steps=1000,
            services=with_second(system, second),
            weight_transfer={"lost_replicas": "skip"},
        )
        process = system.start(config)
        wait_for_step(process, Path(str(config["run_dir"])), 2)
        second.signal(signal.SIGKILL)
        steps = len((Path(str(config["run_dir"])) / "metrics.jsonl").read_text().splitlines())
        wait_for_step(process, Path(str(config["run_dir"])), steps + 3)
        process.terminate()
        _, stderr = process.communicate(timeout=30)
    assert f"failed on 1 of 2: {second.admin_target}" in stderr
    assert "Traceback" not in stderr
