"""Checkpoints: whole or absent, exact, and refused when they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from ppod_trainer.algorithms import build_estimator
from ppod_trainer.assembly import load_leader
from ppod_trainer.checkpoint import (
    TrainerState,
    goes_on,
    kept_references,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    with_prompts,
)
from ppod_trainer.config import AdvantagesConfig, KlConfig, OptimizerConfig, PpoConfig, RewardsConfig, TrainerConfig
from ppod_trainer.controls import StepControls
from ppod_trainer.errors import CheckpointError
from ppod_trainer.experience import ExperienceRules
from ppod_trainer.learner import Learner, build_learner
from ppod_trainer.metrics import StepTimer
from ppod_trainer.policy import PolicyWithValue
from ppod_trainer.ranks import Ranks
from ppod_trainer.rollouts import ScoredRollout

Make = Callable[..., list[ScoredRollout]]
RESUME: tuple[bool | Literal["if_possible"], ...] = (False, "if_possible", True)
RULES = ExperienceRules(RewardsConfig(), KlConfig(), build_estimator(AdvantagesConfig()), whiten=True)


def learner_of(policy: PolicyWithValue) -> Learner:
    return build_learner(policy, PpoConfig(), RULES, OptimizerConfig(learning_rate=1e-3), seed=0)


def state_at(step: int) -> TrainerState:
    return TrainerState(step, step + 1, 0, "fingerprint", {"kl": {"coefficient": 0.05}})


def test_resumed_learning_equals_learning_without_a_break(
    policy: PolicyWithValue, make_rollouts: Make, tmp_path: Path
) -> None:
    learner = learner_of(policy)
    learner.learn(make_rollouts(seed=1), 0, StepControls(1.0, 0.05, 0.0), StepTimer())
    save_checkpoint(tmp_path, learner, state_at(1), keep=1)
    learner.learn(make_rollouts(seed=2), 1, StepControls(0.5, 0.05, 0.0), StepTimer())
    straight = [parameter.detach().clone() for parameter in policy.parameters()]

    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_()
    resumed = learner_of(policy)
    assert load_checkpoint(tmp_path, resumed, "fingerprint") == state_at(1)
    resumed.learn(make_rollouts(seed=2), 1, StepControls(0.5, 0.05, 0.0), StepTimer())
    assert all(torch.equal(a, b) for a, b in zip(straight, policy.parameters(), strict=True))


def test_only_the_newest_are_kept_and_half_written_ones_do_not_count(policy: PolicyWithValue, tmp_path: Path) -> None:
    learner = learner_of(policy)
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, learner, state_at(step), keep=2)
    (tmp_path / "step_000011").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_000002", "step_000010"]


def test_the_newest_is_that_of_the_greatest_step_also_where_names_get_longer(
    policy: PolicyWithValue, tmp_path: Path
) -> None:
    learner = learner_of(policy)
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, learner, state_at(step), keep=2)
    assert load_checkpoint(tmp_path, learner, "fingerprint") == state_at(1_000_000)
    (tmp_path / "step_1000000").rename(tmp_path / "step_1000000.mine")
    assert load_checkpoint(tmp_path, learner, "fingerprint") == state_at(999_999), "a copy of the user's is none"
    save_checkpoint(tmp_path, learner, state_at(1_000_001), keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_1000001"]


def test_what_does_not_fit_is_refused(policy: PolicyWithValue, tmp_path: Path) -> None:
    learner = learner_of(policy)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_checkpoint(tmp_path, learner, "fingerprint")
    path = save_checkpoint(tmp_path, learner, state_at(3), keep=1)
    with pytest.raises(CheckpointError, match="another configuration"):
        load_checkpoint(tmp_path, learner, "other")
    (path / "trainer.json").write_text("{")
    with pytest.raises(CheckpointError, match="step_000003 cannot be read"):
        load_checkpoint(tmp_path, learner, "fingerprint")


def test_a_run_goes_on_with_the_prompts_that_it_had() -> None:
    """A checkpoint that knows of none is of an older version, or of a run whose environment makes them."""
    begun = with_prompts(state_at(0), "these")
    assert begun == replace(state_at(0), prompts="these")
    assert with_prompts(begun, "these") == begun
    assert with_prompts(state_at(3), "") == state_at(3)
    with pytest.raises(
        CheckpointError, match=r"prompts\.path are not those that this run had at step 0 \(these, now o"
    ):
        with_prompts(begun, "others")


@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    policy: PolicyWithValue, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    learner = learner_of(policy)
    save_checkpoint(tmp_path, learner, state_at(3), keep=2)
    kept = [parameter.detach().clone() for parameter in policy.parameters()]
    with torch.no_grad():
        policy.value_head.bias.add_(1)
    newest = save_checkpoint(tmp_path, learner, state_at(4), keep=2)
    (file,) = newest.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    match damage:
        case "cut":
            file.write_bytes(content[:-1])
        case "changed":
            file.write_bytes(content)
        case _:
            file.unlink()
    assert load_checkpoint(tmp_path, learner, "fingerprint") == state_at(3)
    assert all(torch.equal(a, b) for a, b in zip(kept, policy.parameters(), strict=True))
    (warning,) = (one for one in caplog.records if one.levelname == "WARNING")
    assert "step_000004 cannot be read" in warning.getMessage()
    assert "going on from" in warning.getMessage()


@pytest.mark.parametrize("keep", [1, 2])
def test_damaged_ones_take_no_place_of_whole_ones(policy: PolicyWithValue, tmp_path: Path, keep: int) -> None:
    """A run that went on from the one before saves, for it was stopped, before it comes to the damaged one's step."""
    learner = learner_of(policy)
    for step in (3, 5):
        save_checkpoint(tmp_path, learner, state_at(step), keep=2)
    next((tmp_path / "step_000005").glob("*.safetensors")).write_bytes(b"")
    assert load_checkpoint(tmp_path, learner, "fingerprint") == state_at(3)
    save_checkpoint(tmp_path, learner, state_at(4), keep=keep)
    whole = [path.name for path in list_checkpoints(tmp_path) if path.name != "step_000005"]
    assert whole == ["step_000003", "step_000004"][-keep:]
    assert load_checkpoint(tmp_path, learner, "fingerprint") == state_at(4)
    save_checkpoint(tmp_path, learner, state_at(5), keep=keep)
    assert load_checkpoint(tmp_path, learner, "fingerprint") == state_at(5)


def test_what_a_killed_process_left_is_tidied(policy: PolicyWithValue, tmp_path: Path) -> None:
    """Killed while it wrote, and while it put one checkpoint in the place of another."""
    learner = learner_of(policy)
    path = save_checkpoint(tmp_path, learner, state_at(3), keep=1)
    (tmp_path / ".writing-step_000004").mkdir()
    path.rename(tmp_path / ".replaced-step_000003")
    assert load_checkpoint(tmp_path, learner, "fingerprint") == state_at(3)
    assert [one.name for one in tmp_path.iterdir()] == ["step_000003"]
    # Killed before the one that was replaced could be deleted.
    (tmp_path / ".replaced-step_000003").mkdir()
    assert load_checkpoint(tmp_path, learner, "fingerprint") == state_at(3)
    assert [one.name for one in tmp_path.iterdir()] == ["step_000003"]


def test_a_job_killed_amid_replacing_its_only_checkpoint_goes_on_from_it(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = {"source": str(tiny_model_dir), "device": "cpu", "dtype": "float32"}
    config = TrainerConfig.model_validate({"run_dir": tmp_path, "resume": "if_possible", "policy": source})
    leader, begun = load_leader(config, Ranks(torch.device("cpu")))
    assert begun.step == 0
    done = replace(state_at(3), configuration=begun.configuration)
    path = save_checkpoint(tmp_path / "checkpoints", leader.learner, done, keep=1)
    path.rename(path.with_name(".replaced-step_000003"))
    assert load_leader(config, Ranks(torch.device("cpu")))[1] == done


def test_a_run_goes_on_only_where_it_is_told_to(policy: PolicyWithValue, tmp_path: Path) -> None:
    ranks = Ranks(policy.device)
    assert not any(goes_on(tmp_path / "none", resume, ranks) for resume in RESUME[:2])
    assert goes_on(tmp_path / "none", resume=True, ranks=ranks)
    save_checkpoint(tmp_path, learner_of(policy), state_at(3), keep=1)
    assert all(goes_on(tmp_path, resume, ranks) for resume in RESUME[1:])
    with pytest.raises(CheckpointError, match="holds step_000003 of an earlier run"):
        goes_on(tmp_path, resume=False, ranks=ranks)


def test_references_that_checkpoints_need_are_known(policy: PolicyWithValue, tmp_path: Path) -> None:
    learner = learner_of(policy)
    assert kept_references(tmp_path) == set()
    for step, reference in ((1, 0), (2, 3), (3, 5)):
        save_checkpoint(tmp_path, learner, replace(state_at(step), reference_version=reference), keep=2)
    assert kept_references(tmp_path) == {3, 5}


def test_a_checkpoint_takes_the_place_of_one_of_the_same_step(policy: PolicyWithValue, tmp_path: Path) -> None:
    learner = learner_of(policy)
    save_checkpoint(tmp_path, learner, state_at(3), keep=1)
    later = replace(state_at(3), policy_version=17)
    save_checkpoint(tmp_path, learner, later, keep=1)
    assert load_checkpoint(tmp_path, learner, "fingerprint") == later
    assert [one.name for one in tmp_path.iterdir()] == ["step_000003"]


def test_what_holds_another_policy_is_refused(policy: PolicyWithValue, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, learner_of(policy), state_at(3), keep=1)
    policy.value_head = torch.nn.Linear(policy.value_head.in_features, 2)
    with pytest.raises(CheckpointError, match=r"value_head.weight: \[1, 64\], the policy's is \[2, 64\]"):
        load_checkpoint(tmp_path, learner_of(policy), "fingerprint")
