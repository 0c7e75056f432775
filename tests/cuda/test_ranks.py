"""Ranks on a CUDA device learn what they learn on the CPU; two of them share one device by NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.learning_runs import Learned, assert_close_figures, assert_close_weights, learn

SHARED_DEVICE = [
    # NCCL takes two ranks of one host on one device for a mistake.
    {"LOCAL_RANK": "0", "NCCL_HOSTID": f"rank-{rank}", "NCCL_SOCKET_IFNAME": "lo"}
    for rank in range(2)
]


def policy(model_dir: Path, dtype: str = "float32") -> dict[str, object]:
    return {"source": str(model_dir), "device": "auto", "dtype": dtype, "threads": 1}


@pytest.fixture(scope="module")
def on_cpu(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    return learn(tmp_path_factory.mktemp("cpu"), tiny_model_dir, 1, "cpu")


def assert_same(found: Learned, expected: Learned) -> None:
    assert all(step["first_ratio_error"] == 0 for step in found[0])
    assert_close_figures(found[0], expected[0])
    assert_close_weights(found[1], expected[1])


def test_a_device_learns_what_the_cpu_learns(on_cpu: Learned, tiny_model_dir: Path, tmp_path: Path) -> None:
    assert_same(learn(tmp_path, tiny_model_dir, 1, "cuda", policy=policy(tiny_model_dir)), on_cpu)


def test_offloading_and_checkpointing_change_nothing(on_cpu: Learned, tiny_model_dir: Path, tmp_path: Path) -> None:
    memory = {"offload": True, "gradient_checkpointing": True}
    found = learn(tmp_path, tiny_model_dir, 1, "offloaded", policy=policy(tiny_model_dir), memory=memory)
    assert_same(found, on_cpu)


def test_two_ranks_learn_what_one_learns(on_cpu: Learned, tiny_model_dir: Path, tmp_path: Path) -> None:
    changed = {"policy": policy(tiny_model_dir), "environments": SHARED_DEVICE}
    assert_same(learn(tmp_path, tiny_model_dir, 2, "nccl", **changed), on_cpu)


def test_ranks_in_bfloat16_learn_nearly_the_same(on_cpu: Learned, tiny_model_dir: Path, tmp_path: Path) -> None:
    changed = {"policy": policy(tiny_model_dir, "bfloat16")}
    one = learn(tmp_path, tiny_model_dir, 1, "one", **changed)
    two = learn(tmp_path, tiny_model_dir, 2, "two", environments=SHARED_DEVICE, **changed)
    for name, expected in on_cpu[1].items():
        assert one[1][name].dtype == two[1][name].dtype == torch.float32
        # Three steps of 6 updates by at most the learning rate each; the dtype turns only the smallest gradients.
        assert (one[1][name] - expected).abs().mean() < 2e-3
        assert (two[1][name] - one[1][name]).abs().mean() < 2e-3
    assert all(step["first_ratio_error"] == 0 for step in [*one[0], *two[0]])
