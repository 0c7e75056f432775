"""Replacing a reward model while it serves."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import load_file, save_file

from ppod import FailedPrecondition, InvalidArgument, NotFound
from ppod.errors import PpodError, from_rpc_error
from ppod.v1 import reward_admin_pb2, reward_admin_pb2_grpc, reward_pb2, reward_pb2_grpc
from support.processes import ServiceProcess, metrics_of, running_service
from support.services import tiny_model_config
from support.tiny_classifiers import save_decoder
from support.tiny_head import save_tiny_head, scores_alone
from support.tiny_model import save_tiny_model

from .reward_calls import failure, floats, of_tokens, score

SEQUENCES = [[10, 20], [30, 40, 50], [7]]
NOISE = 1e-5


@dataclass(frozen=True)
class Shop:
    service: ServiceProcess
    model: Path
    heads: tuple[Path, Path, Path]
    directory: Path

    def expected(self, head: int) -> list[float]:
        return scores_alone(self.model, self.heads[head], SEQUENCES)


@pytest.fixture
def shop(tiny_model_dir: Path, tmp_path: Path) -> Iterator[Shop]:
    heads = tuple(save_tiny_head(tiny_model_dir, tmp_path / f"head-{seed}", seed=seed) for seed in range(3))
    model = tiny_model_config(tiny_model_dir)
    rewards = [
        {"name": "head", "model": model, "head": str(heads[0])},
        {"name": "other", "model": model, "head": str(heads[2])},
        {"name": "length", "kind": "function", "function": "length"},
        {"name": "both", "kind": "ensemble", "members": ["head", "other"]},
    ]
    # Small batches, so that every request spans several.
    values = {"rewards": rewards, "batching": {"max_batch_size": 2, "max_batch_tokens": 128}}
    with running_service("ppod_services.reward", tmp_path, values) as service:
        yield Shop(service, tiny_model_dir, heads, tmp_path)  # type: ignore[arg-type]


def replace(service: ServiceProcess, name: str, **fields: object) -> reward_admin_pb2.ReplaceModelResponse:
    with grpc.insecure_channel(service.admin_target) as channel:
        request = reward_admin_pb2.ReplaceModelRequest(name=name, **fields)  # type: ignore[arg-type]
        try:
            return reward_admin_pb2_grpc.RewardAdminServiceStub(channel).ReplaceModel(request, timeout=60)
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error


def pinned(version: int) -> reward_pb2.ScoreRequest:
    request = of_tokens(SEQUENCES)
    request.selector.weight_version = version
    return request


def test_a_head_is_replaced_under_load_without_a_failed_or_mixed_reply(shop: Shop) -> None:
    """Every reply has the scores of the one version that it names, and no caller sees a version go back."""
    expected = [shop.expected(head) for head in range(3)]
    assert abs(expected[0][0] - expected[1][0]) > 100 * NOISE
    stop = threading.Event()

    def call() -> list[int]:
        versions: list[int] = []
        with grpc.insecure_channel(shop.service.target) as channel:
            stub = reward_pb2_grpc.RewardServiceStub(channel)
            while not stop.is_set():
                reply = stub.Score(of_tokens(SEQUENCES), timeout=20)
                version = reply.model.weight_version
                assert floats(reply.scores) == pytest.approx(expected[version], abs=NOISE)
                assert reply.breakdown.model == reply.model
                versions.append(version)
        return versions

    with ThreadPoolExecutor(3) as pool:
        callers = [pool.submit(call) for _ in range(3)]
        replies = [replace(shop.service, "head", head=str(shop.heads[head])) for head in (1, 2)]
        after = score(shop.service, of_tokens(SEQUENCES))
        stop.set()
        seen = [caller.result() for caller in callers]
    assert [reply.model.weight_version for reply in replies] == [1, 2]
    assert all(reply.load_s > 0 for reply in replies)
    assert after.model.weight_version == 2
    for versions in seen:
        assert versions == sorted(versions)
        assert versions[0] == 0
    assert any(versions[-1] == 2 for versions in seen)
    assert "ppod_weight_version 2.0" in metrics_of(shop.service)


def test_pins_of_the_old_version_are_refused_from_then_on(shop: Shop) -> None:
    score(shop.service, pinned(0))
    replace(shop.service, "head", head=str(shop.heads[1]), weight_version=5)
    error = failure(shop.service, pinned(0))
    assert isinstance(error, FailedPrecondition)
    assert (error.found, error.expected) == ("5", "0")
    assert floats(score(shop.service, pinned(5)).scores) == pytest.approx(shop.expected(1), abs=NOISE)
    both = score(shop.service, of_tokens(SEQUENCES), "both")
    assert both.model.weight_version == 5
    assert [member.model.weight_version for member in both.breakdown.members] == [5, 0]
    assert floats(both.breakdown.members[0].scores) == pytest.approx(shop.expected(1), abs=NOISE)
    for version in (5, 4):
        with pytest.raises(FailedPrecondition, match="weight_version"):
            replace(shop.service, "head", head=str(shop.heads[0]), weight_version=version)


def test_another_trunk_comes_with_a_source(shop: Shop) -> None:
    trunk = save_tiny_model(shop.directory / "trunk", seed=9)
    head = save_tiny_head(trunk, shop.directory / "its-head", seed=4)
    replace(shop.service, "head", source=str(trunk), head=str(head))
    assert floats(score(shop.service, of_tokens(SEQUENCES)).scores) == pytest.approx(
        scores_alone(trunk, head, SEQUENCES), abs=NOISE
    )
    # The other head goes on with the old trunk, which they shared.
    assert floats(score(shop.service, of_tokens(SEQUENCES), "other").scores) == pytest.approx(
        shop.expected(2), abs=NOISE
    )


def test_what_fails_leaves_the_old_version_serving(shop: Shop) -> None:
    broken = shop.directory / "broken"
    shutil.copytree(shop.heads[1], broken)
    (broken / "head.safetensors").write_bytes(b"no safetensors")
    faults: list[tuple[dict[str, str], type[PpodError], str]] = [
        ({"name": "head", "head": str(broken)}, InvalidArgument, "^head: .*head.safetensors"),
        ({"name": "head", "source": "/nowhere"}, InvalidArgument, "^source: .*no such directory"),
        ({"name": "nobody"}, NotFound, "nobody"),
        ({"name": "length"}, NotFound, "length"),
        ({"name": "both"}, NotFound, "both"),
    ]
    for fields, kind, words in faults:
        with pytest.raises(kind, match=words):
            replace(shop.service, **fields)  # type: ignore[arg-type]
    # Nor is administration reached by the port that teams use.
    request = reward_admin_pb2.ReplaceModelRequest(name="head", head=str(shop.heads[1]))
    with grpc.insecure_channel(shop.service.target) as channel, pytest.raises(grpc.RpcError) as caught:
        reward_admin_pb2_grpc.RewardAdminServiceStub(channel).ReplaceModel(request, timeout=10)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    reply = score(shop.service, pinned(0))
    assert floats(reply.scores) == pytest.approx(shop.expected(0), abs=NOISE)


def test_files_that_changed_in_place_are_read_again(tmp_path: Path) -> None:
    directory = save_decoder(tmp_path / "decoder", seed=1)
    rewards = [{"name": "decoder", "kind": "sequence_classification", "model": tiny_model_config(directory)}]
    with running_service("ppod_services.reward", tmp_path, {"rewards": rewards}) as service:
        before = floats(score(service, of_tokens(SEQUENCES)).scores)
        other = save_decoder(tmp_path / "other", seed=2)
        # Renamed into place: the file that serves stays whole under its memory mapping.
        (other / "model.safetensors").replace(directory / "model.safetensors")
        replace(service, "decoder")
        after = score(service, of_tokens(SEQUENCES))
        assert after.model.weight_version == 1
        assert min(abs(a - b) for a, b in zip(before, floats(after.scores), strict=True)) > 100 * NOISE
        with pytest.raises(InvalidArgument, match="expected none"):
            replace(service, "decoder", head="x")


def test_a_model_that_gives_nan_neither_replaces_another_nor_starts(tmp_path: Path) -> None:
    """As a training run saves it that has diverged."""
    serving, diverged = save_decoder(tmp_path / "serving"), save_decoder(tmp_path / "diverged")
    weights = load_file(diverged / "model.safetensors")
    weights["score.weight"].fill_(torch.nan)
    save_file(weights, diverged / "model.safetensors", metadata={"format": "pt"})
    reward = {"name": "decoder", "kind": "sequence_classification"}
    rewards = [{**reward, "model": tiny_model_config(serving)}]
    with running_service("ppod_services.reward", tmp_path, {"rewards": rewards}) as service:
        before = floats(score(service, of_tokens(SEQUENCES)).scores)
        with pytest.raises(InvalidArgument, match=r"source: found the model cannot run: .* score of 'decoder' is nan"):
            replace(service, "decoder", source=str(diverged))
        after = score(service, of_tokens(SEQUENCES))
        assert floats(after.scores) == pytest.approx(before, abs=NOISE)
        assert after.model.weight_version == 0
    with (
        pytest.raises(AssertionError, match="score of 'decoder' is nan"),
        running_service(
            "ppod_services.reward", tmp_path, {"rewards": [{**reward, "model": tiny_model_config(diverged)}]}
        ),
    ):
        pass
