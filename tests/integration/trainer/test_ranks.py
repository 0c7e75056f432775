"""Several ranks, as real processes: they learn what one learns, and end together."""

from __future__ import annotations

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support.forked import ForkedProcess
from support.learning_runs import Learned, assert_close_figures, assert_close_weights, learn
from support.optional import needs_bitsandbytes
from support.processes import ROOT, environment, free_ports, write_config
from support.ranks import start_ranks, wait_for_ranks
from support.services import tiny_model_config
from support.tiny_classifiers import save_decoder

from .conftest import Config, System, records_of, wait_for_step


@pytest.fixture(scope="module")
def of_one(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    """What one rank learns."""
    return learn(tmp_path_factory.mktemp("one"), tiny_model_dir, 1, "one")


def test_neither_micro_batches_nor_checkpointing_change_what_ranks_learn(tiny_model_dir: Path, tmp_path: Path) -> None:
    ppo = {"aggregation": "sequence_mean", "entropy_coefficient": 0.01, "minibatches": 2}
    expected, weights = learn(tmp_path, tiny_model_dir, 1, "one", ppo)
    limited = {**ppo, "micro_batch_tokens": 20}
    figures, found = learn(tmp_path, tiny_model_dir, 2, "two", limited, memory={"gradient_checkpointing": True})
    assert all(step["first_ratio_error"] == 0 for step in figures)
    assert_close_figures(figures, expected)
    assert_close_weights(found, weights)


def test_offloading_changes_nothing(of_one: Learned, tiny_model_dir: Path, tmp_path: Path) -> None:
    """On CPUs it moves nothing, but goes through all that it does on a device."""
    figures, found = learn(tmp_path, tiny_model_dir, 1, "offloaded", memory={"offload": True})
    assert all(step["first_ratio_error"] == 0 for step in figures)
    assert_close_figures(figures, of_one[0])
    assert_close_weights(found, of_one[1])


@needs_bitsandbytes
def test_a_quantised_base_may_be_with_offload_and_on_other_ranks(tiny_model_dir: Path, tmp_path: Path) -> None:
    lora = {"rank": 4, "quantization": "nf4"}
    policy = {**tiny_model_config(tiny_model_dir), "lora": lora}
    expected, weights = learn(tmp_path, tiny_model_dir, 1, "one", policy=policy)
    offload = {"offload": True, "gradient_checkpointing": True}
    start, _ = learn(tmp_path, tiny_model_dir, 2, "run", policy=policy, memory=offload, until=2)
    figures, found = learn(tmp_path, tiny_model_dir, 4, "run", policy=policy, resume=True)
    assert all(step["first_ratio_error"] == 0 for step in start + figures)
    assert_close_figures(start + figures, expected)
    assert_close_weights(found, weights)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2), (3, 1)])
def test_ranks_learn_what_one_learns_and_others_go_on(
    of_one: Learned, tiny_model_dir: Path, tmp_path: Path, before: int, after: int
) -> None:
    start, _ = learn(tmp_path, tiny_model_dir, before, "run", until=2)
    figures, weights = learn(tmp_path, tiny_model_dir, after, "run", resume=True)
    assert (len(start), len(figures)) == (2, 1)
    assert all(step["first_ratio_error"] == 0 for step in start + figures)
    assert_close_figures(start + figures, of_one[0])
    assert_close_weights(weights, of_one[1])


@pytest.mark.parametrize("trained", ["adapter", pytest.param("quantised", marks=needs_bitsandbytes), "critic"])
def test_ranks_learn_what_one_learns_of_an_adapter_and_of_a_critic(
    tiny_model_dir: Path, tmp_path: Path, trained: str
) -> None:
    quantization = "nf4" if trained == "quantised" else "none"
    lora = None if trained == "critic" else {"rank": 4, "quantization": quantization}
    source = str(save_decoder(tmp_path / "critic", seed=3))
    critic = {"kind": "model", "source": source} if trained == "critic" else {}
    changed = partial(learn, policy={**tiny_model_config(tiny_model_dir), "lora": lora}, critic=critic)
    (expected, weights), (figures, found) = (
        changed(tmp_path, tiny_model_dir, ranks, f"of-{ranks}") for ranks in (1, 3)
    )
    assert all(step["first_ratio_error"] == 0 for step in figures)
    assert_close_figures(figures, expected)
    assert_close_weights(found, weights)


RECIPES: dict[str, Config] = {
    "pvpo": {"advantages": {"kind": "pvpo"}, "kl": {"placement": "loss", "estimator": "k3"}},
    "spa": {"advantages": {"kind": "spa", "spa": {"learning_rate": 0.01}}},
}
"""Advantages that are made with what a run sampled or learned before."""


@pytest.mark.parametrize("kind", RECIPES)
def test_ranks_make_advantages_with_the_same(tiny_model_dir: Path, tmp_path: Path, kind: str) -> None:
    advantages, kl = RECIPES[kind]["advantages"], RECIPES[kind].get("kl", {})

    def learn_with(ranks: int, name: str, *, until: int = 3, resume: bool = False) -> Learned:
        changed = partial(learn, resume=resume, advantages=advantages, kl=kl)
        return changed(tmp_path, tiny_model_dir, ranks, name, until=until)

    expected, weights = learn_with(1, "one")
    straight, found = learn_with(2, "two")
    assert_close_figures(straight, expected)
    assert_close_weights(found, weights)
    start, _ = learn_with(4, "run", until=2)
    figures, found = learn_with(2, "run", resume=True)
    assert all(step["first_ratio_error"] == 0 for step in straight + start + figures)
    assert_close_figures(start + figures, expected)
    assert_close_weights(found, weights)


def start(system: System, config: Config, ranks: int = 2) -> list[ForkedProcess]:
    name = Path(str(config["run_dir"])).name
    path = write_config(system.directory / f"{name}.yaml", config)
    return start_ranks("ppod_trainer", "--config", str(path), ranks=ranks, directory=system.directory, name=name)


def train(system: System, config: Config, ranks: int = 2) -> list[tuple[int, str, str]]:
    """Run a trainer of several ranks to its end; exit code, stdout and stderr of each."""
    return wait_for_ranks(start(system, config, ranks), 120)


def torchrun(system: System, config: Config) -> subprocess.CompletedProcess[str]:
    path = write_config(system.directory / "torchrun.yaml", config)
    (port,) = free_ports(1)
    command = ["--nproc-per-node", "2", "--master-port", str(port), "-m", "ppod_trainer", "--config", str(path)]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command],
        env={**environment(), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def assert_two_ranks_are_one(system: System, name: str, changes: Config) -> str:
    """Rollouts, pushes, evaluation and the final model; all but rounding as with one rank. What the two ranks said."""
    values: Config = {"optimizer": {"learning_rate": 1e-4}, **changes}
    one, two = (system.config(f"{name}-{ranks}", **values) for ranks in ("one-rank", "two-ranks"))
    assert system.train(one).returncode == 0
    done = torchrun(system, two)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 4/4") == 1, "rank 0 alone speaks"
    expected, found = (records_of(Path(str(config["run_dir"]))) for config in (one, two))
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert_close_weights(
        *(load_file(Path(str(config["run_dir"])) / "final_model" / "model.safetensors") for config in (two, one))
    )
    return done.stderr


@pytest.mark.parametrize("kind", ["gae", "pvpo"])
def test_a_run_of_two_ranks_is_a_run_of_one(system: System, kind: str) -> None:
    assert assert_two_ranks_are_one(system, kind, RECIPES.get(kind, {})) == ""


def test_all_ranks_end_when_one_is_killed(system: System) -> None:
    for victim in (0, 1):
        config = system.config(f"killed-{victim}", steps=200)
        processes = start(system, config)
        wait_for_step(processes[0], Path(str(config["run_dir"])), 2)
        processes[victim].kill()
        processes[victim].wait(10)
        other = processes[1 - victim]
        other.wait(20)
        _, stderr = other.communicate()
        assert other.returncode == 1
        assert f"ppod train: rank {1 - victim} of 2: " in stderr
        assert "all ranks end" in stderr


@pytest.mark.parametrize("signalled", [(0, 1), (1,)], ids=["all", "one that follows"])
def test_a_signal_to_ranks_ends_the_run_after_a_checkpoint(system: System, signalled: tuple[int, ...]) -> None:
    """To all, as from a terminal or for a run that is deleted; or to one, as to a pod whose node is drained."""
    config = system.config(f"stopped-ranks-{len(signalled)}", steps=200)
    run_dir = Path(str(config["run_dir"]))
    processes = start(system, config)
    wait_for_step(processes[0], run_dir, 2)
    for rank in signalled:
        processes[rank].terminate()
    (code, stdout, stderr), (other, _, _) = wait_for_ranks(processes, 30)
    assert (code, other) == (128 + signal.SIGTERM, 0), stderr
    assert "resume from" in stdout
    assert list((run_dir / "checkpoints").iterdir()) != []


def test_a_fault_of_the_run_is_told_by_rank_0_and_ends_all(system: System) -> None:
    config = system.config("missing", prompts={"path": "/no/such/file.txt"})
    (code, _, stderr), (other, _, _) = train(system, config)
    assert (code, other) == (1, 1)
    assert "/no/such/file.txt" in stderr
    assert "Traceback" not in stderr


def test_ranks_refresh_the_reference(system: System) -> None:
    """From here on the service keeps another reference."""
    config = system.config("refreshed-ranks", steps=3, reference_refresh_steps=1)
    for code, _, stderr in train(system, config):
        assert code == 0, stderr
    kl = [record["kl/reference"] for record in records_of(Path(str(config["run_dir"]))) if "kl/reference" in record]
    assert kl == pytest.approx([0, 0, 0], abs=1e-4)


@needs_bitsandbytes
def test_a_run_of_two_ranks_on_a_quantised_base_is_a_run_of_one(system: System) -> None:
    """The reference becomes what the base stands for."""
    lora = {"rank": 4, "quantization": "nf4"}
    assert_two_ranks_are_one(system, "qlora", {"policy": {**tiny_model_config(system.model_dir), "lora": lora}})
