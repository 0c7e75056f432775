"""The trainer's configuration: every fault at once, and what is refused because it would be wrong."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from ppod_models.configuration import ConfigError, dump_config, parse_config
from ppod_trainer.__main__ import main
from ppod_trainer.config import TrainerConfig


def problems(values: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(TrainerConfig, values, "test")
    return caught.value.problems


def test_all_faults_are_named_at_once() -> None:
    found = problems({"stepz": 3, "seed": -1, "ppo": {"clip": 0, "epocs": 2}, "rollout": {"temperature": "warm"}})
    assert len(found) == 5
    for path in ("stepz: unknown key", "ppo.epocs: unknown key", "seed:", "ppo.clip:", "rollout.temperature:"):
        assert any(line.startswith(path) for line in found)


def test_all_disagreements_of_sections_are_named_at_once() -> None:
    """As of who takes the default run and asks for GRPO."""
    found = problems(
        {"advantages": {"kind": "grpo"}, "rewards": {"shaping": "token"}, "optimizer": {"warmup_steps": 99}}
    )
    parts = (
        "set it to 2 or more",
        "set kl.placement to loss",
        "rewards.shaping is token",
        "optimizer.warmup_steps is 99",
    )
    assert len(found) == len(parts)
    for part, line in zip(parts, found, strict=True):
        assert part in line


def test_a_prompt_file_that_nothing_reads_is_refused_before_services_are_waited_for() -> None:
    found = problems({"prompts": {"path": "mine.csv"}})
    assert found == ["prompts.path: unknown kind '.csv', expected .tsv, .jsonl, .txt, found 'mine.csv'"]
    assert [line.split(":")[0] for line in problems({"prompts": {"path": 5}})] == ["prompts.path"]


def test_an_environment_has_episodes_besides_those_that_are_held_out() -> None:
    [problem] = problems({"environment": {"name": "calculator", "episodes": 64}})
    assert "environment.episodes is 64, and prompts.heldout, 64, leaves none" in problem
    parse_config(TrainerConfig, {"environment": {"name": "calculator", "episodes": 65}}, "test")


def test_top_p_is_refused_in_training() -> None:
    assert "smaller support" in problems({"rollout": {"top_p": 0.9}})[0]
    assert "smaller support" in problems({"rollout": {"top_k": 50}})[0]


def test_k1_in_the_loss_is_refused() -> None:
    assert "gradient of mean zero" in problems({"kl": {"placement": "loss"}})[0]
    assert parse_config(TrainerConfig, {"kl": {"placement": "loss", "estimator": "k2"}}, "test").kl.estimator == "k2"


def test_k1_in_the_loss_is_right_once_it_is_weighted() -> None:
    weighted = {"kl": {"placement": "loss", "importance_weighted": True}}
    assert parse_config(TrainerConfig, weighted, "test").kl.estimator == "k1"
    assert "placement is 'reward'" in problems({"kl": {"importance_weighted": True}})[0]


def test_parts_of_the_objective_go_together() -> None:
    assert "give the latter for constant" in problems({"ppo": {"aggregation": "constant"}})[0]
    assert "else leave it out" in problems({"ppo": {"constant_tokens": 8}})[0]
    assert "needs importance_cap" in problems({"ppo": {"importance_level": "sequence"}})[0]
    assert problems({"ppo": {"dual_clip": 1.0}})[0].startswith("ppo.dual_clip")
    assert problems({"ppo": {"ratio_mask": {"low": 1.5}}})[0].startswith("ppo.ratio_mask.low")


def test_nan_is_no_number() -> None:
    assert problems({"optimizer": {"learning_rate": float("nan")}})[0].startswith("optimizer.learning_rate")


def test_more_minibatches_than_samples_are_refused() -> None:
    assert "ppo.minibatches is 9" in problems({"ppo": {"minibatches": 9}, "rollout": {"batch_size": 8}})[0]


def test_a_penalty_cannot_become_a_bonus() -> None:
    """The controller's factor is 1 - 0.2 * batch_size / horizon at least."""
    adaptive: dict[str, object] = {"kl": {"adaptive": {"horizon": 100}}, "rollout": {"batch_size": 500}}
    assert "kl.adaptive.horizon is 100; expected more than 100" in problems(adaptive)[0]
    adaptive["kl"] = {"adaptive": {"horizon": 101}}
    parse_config(TrainerConfig, adaptive, "test")


def test_estimates_from_before_training_go_with_scores_on_one_scale() -> None:
    values: dict[str, object] = {"advantages": {"kind": "pvpo"}, "kl": {"placement": "loss", "estimator": "k3"}}
    parse_config(TrainerConfig, values, "test")
    for normalize in ("scale", "whiten"):
        [problem] = problems({**values, "rewards": {"normalize": normalize}})
        assert f"whose scale rewards.normalize {normalize} moves; set it to none" in problem


def test_a_penalty_that_stays_nothing_is_refused() -> None:
    """A controller multiplies its coefficient; and outcomes hold no KL, whatever its coefficient rises to."""
    adaptive = {"kl": {"coefficient": 0, "adaptive": {"target": 6}}}
    assert "multiplies the coefficient, and coefficient is 0" in problems(adaptive)[0]
    rising = {
        "kl": {"coefficient": 0},
        "schedules": {"kl_coefficient": {"end": 0.05}},
        "advantages": {"kind": "grpo"},
        "rollout": {"samples_per_prompt": 8},
    }
    assert "kl.placement to loss" in problems(rising)[0]
    rising["kl"] = {"coefficient": 0, "placement": "loss", "estimator": "k3"}
    parse_config(TrainerConfig, rising, "test")


def test_replicas_are_refused_where_weights_are_pushed() -> None:
    several = {"services": {"reward": "a:1,b:1", "reference": "dns:///reference:1"}}
    assert parse_config(TrainerConfig, several, "test").services.reward == "a:1,b:1"
    assert "lists 2 and generation_admin 1 addresses" in problems({"services": {"generation": "a:1,b:1"}})[0]
    assert "list every host:port" in problems({"services": {"generation_admin": "dns:///a:1"}})[0]
    both = {"services": {"generation": "a:1,b:1", "generation_admin": "a:2, b:2"}}
    assert parse_config(TrainerConfig, both, "test").services.generation_admin == "a:2, b:2"


@pytest.mark.parametrize(
    "pushes",
    [{"reference_refresh_steps": 5}, {"policy": {"source": "x", "lora": {"quantization": "nf4"}}}],
    ids=["refreshed", "quantised"],
)
def test_a_reference_that_is_given_weights_names_every_replica(pushes: dict[str, object]) -> None:
    def services(reference: str, admin: str) -> dict[str, object]:
        return {"services": {"reference": reference, "reference_admin": admin}}

    for reference, admin, words in (
        ("a:1,b:1", "a:2", "reference lists 2 and reference_admin 1 addresses"),
        ("dns:///a:1", "a:2", "reference is 'dns:///a:1': weights are pushed to each server"),
        ("a:1", "dns:///a:2", "reference_admin is 'dns:///a:2': weights are pushed to each server"),
        ("k8s:///ref:grpc", "ref:50062", "name two ports of one Service"),
    ):
        named = services(reference, admin)
        assert words in problems({**named, **pushes})[0]
        # Nobody gives it any.
        assert not parse_config(TrainerConfig, named, "test").pushes_reference
    for reference, admin in (("a:1, b:1", "a:2,b:2"), ("k8s:///ref:grpc", "k8s:///ref:admin")):
        assert parse_config(TrainerConfig, {**services(reference, admin), **pushes}, "test").pushes_reference


def test_services_of_kubernetes_are_followed_and_weights_reach_their_pods() -> None:
    followed = {"generation": "k8s:///g.team:grpc", "generation_admin": "k8s:///g.team:admin"}
    services = {"reward": "k8s:///r:50051", "reference": "k8s:///ref:grpc", **followed}
    config = parse_config(TrainerConfig, {"services": services}, "test")
    assert config.services.generation == "k8s:///g.team:grpc"
    for wrong in (
        {"generation": "k8s:///g:grpc"},
        {"generation_admin": "k8s:///g:admin"},
        {"generation": "k8s:///g:grpc", "generation_admin": "k8s:///other:admin"},
        {"generation": "k8s:///g:grpc", "generation_admin": "k8s:///g:grpc"},
    ):
        assert "two ports of one Service" in problems({"services": wrong})[0]
    assert "reward is 'k8s://r:1': expected k8s:///SERVICE" in problems({"services": {"reward": "k8s://r:1"}})[0]


@pytest.mark.parametrize("target", ["a:65536", "a:1,b:99999", "a", "a:0", "a:1,", "", "dns:///a", "dns:///a:70000"])
def test_a_target_has_a_port_that_there_can_be(target: str) -> None:
    """gRPC would connect to another one."""
    found = problems({"services": {"reward": target, "reference": target}})
    words = "expected host:port, or several with commas between, ports to 65535"
    assert found == [f"services: {key} is {target!r}: {words}" for key in ("reward", "reference")]


@pytest.mark.parametrize("target", ["[::1]:65535", "dns:///a:1", "unix:///run/reward", "ipv4:10.0.0.1:1,10.0.0.2:1"])
def test_targets_of_every_kind_are_taken(target: str) -> None:
    assert parse_config(TrainerConfig, {"services": {"reward": target}}, "test").services.reward == target


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rewards": {"model": False, "clip": 1.0}}, "which model false leaves out"),
        (
            {"rewards": {"model": False}, "services": {"reward_model": "x"}},
            "services.reward_model needs the reward service",
        ),
        ({"advantages": {"kind": "reinforce_pp"}, "critic": {"detach": True}}, "reads no values: remove"),
    ],
)
def test_what_would_be_read_by_nobody_is_refused(values: dict[str, object], words: str) -> None:
    [problem] = problems({**values, "environment": {"name": "calculator"}})
    assert words in problem


def test_a_time_is_no_longer_than_what_waits_can_count() -> None:
    """A deadline of 10^10 s has passed, as gRPC counts."""
    times = ("services.timeout_s", "services.ready_timeout_s", "services.recovery_timeout_s", "ranks.timeout_s")
    for path in (*times, "weight_transfer.collective.timeout_s"):
        value: object = 1e10
        for key in reversed(path.split(".")):
            value = {key: value}
        assert problems(value) == [f"{path}: Input should be less than or equal to 1000000000, found 10000000000.0"]


def test_a_choice_that_is_none_is_one_fault_of_its_key() -> None:
    assert problems({"resume": "maybe"}) == ["resume: Input should be False, True or 'if_possible', found 'maybe'"]
    for choice in (False, True, "if_possible"):
        assert parse_config(TrainerConfig, {"resume": choice}, "test").resume is choice


def test_a_shared_directory_goes_with_its_plane() -> None:
    assert "give one for shared" in problems({"weight_transfer": {"plane": "shared"}})[0]
    assert "give one for shared" in problems({"weight_transfer": {"directory": "/dev/shm/x"}})[0]
    assert "must be absolute" in problems({"weight_transfer": {"plane": "shared", "directory": "x"}})[0]


def test_tls_comes_whole() -> None:
    assert "go together" in problems({"services": {"tls": {"ca_file": "ca", "key_file": "key"}}})[0]
    assert problems({"services": {"tls": {}}})[0].startswith("services.tls.ca_file")


def test_resolved_configuration_reads_back_equal() -> None:
    config = parse_config(TrainerConfig, {"steps": 7, "kl": {"adaptive": {"target": 3.0}}}, "test")
    import yaml  # noqa: PLC0415

    assert parse_config(TrainerConfig, yaml.safe_load(dump_config(config)), "test") == config


def test_the_schema_needs_no_torch() -> None:
    code = "import sys, ppod_trainer.config; sys.exit('torch' in sys.modules or 'grpc' in sys.modules)"
    paths = {"PYTHONPATH": "protos:services:trainer"}
    assert subprocess.run([sys.executable, "-c", code], env=paths, check=False).returncode == 0


def test_the_command_lays_files_over_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, over = tmp_path / "trainer.yaml", tmp_path / "over.yaml"
    base.write_text("steps: 3\nrollout: {batch_size: 8}\n")
    over.write_text("rollout: {max_tokens: 4}\n")
    arguments = ["--config", str(base), "--config", str(over), "--check"]
    assert main(arguments) == 0
    over.write_text("rollout: {max_tokens: 0}\n")
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"{base}, {over}: 1 problem\n  rollout.max_tokens: ")


def test_a_run_directory_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ppod_trainer.stopping.StopSignal.install", lambda _: None)
    taken = tmp_path / "taken"
    taken.touch()
    file = tmp_path / "trainer.yaml"
    file.write_text(f"run_dir: {taken}\n")
    assert main(["--config", str(file)]) == 1
    assert capsys.readouterr().err == f"ppod train: run_dir: {taken} cannot be made: File exists\n"

    def lead(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("ppod_trainer.__main__._lead", lead)
    assert main(["--config", str(file)]) == 1
    words = f"ppod train: run_dir: {taken} cannot be written: [Errno {errno.ENOSPC}] No space left on device\n"
    assert capsys.readouterr().err == words


def test_ctrl_c_while_libraries_are_loaded_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("ppod_trainer.__main__._lead", interrupt)
    file = tmp_path / "trainer.yaml"
    file.write_text(f"run_dir: {tmp_path}\n")
    assert main(["--config", str(file)]) == 130
    assert capsys.readouterr().out == "SIGINT: stopped before the first step\n"
