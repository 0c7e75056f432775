"""What a run is refused for before anything starts, though each section by itself is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest

from deploy.conftest import Section
from ppod_deploy import launcher
from ppod_deploy.commands import Run, Up
from ppod_deploy.defaults import CONFIGS
from ppod_deploy.overrides import apply_overrides, split_arguments
from ppod_deploy.run_checks import run_faults, run_notes
from ppod_deploy.run_command import resolve_run
from ppod_deploy.run_config import parse_run, read_run_values
from ppod_models.configuration import ConfigError
from support.processes import ROOT

SERVER = "{certificate_file: a, private_key_file: b}"
MUTUAL = "{certificate_file: a, private_key_file: b, client_ca_file: c}"
HEALTH = [f"--services.{name}.listen.health_port={port}" for port, name in enumerate(("reward", "reference"), 7001)]


def faults(values: dict[str, Section], *arguments: str) -> list[str]:
    _, overrides = split_arguments(arguments)
    return run_faults(parse_run(apply_overrides(values, overrides), "test"))


def test_a_run_is_refused_and_services_alone_are_not(run_file: Path) -> None:
    _, overrides = split_arguments(["--trainer.prompts.path=gone.txt", "--services.generation.listen.admin_port=none"])
    with pytest.raises(ConfigError) as raised:
        resolve_run(Run(config=(run_file,)), overrides)
    assert [problem.split(":")[0] for problem in raised.value.problems] == [
        "trainer.prompts.path",
        "services.generation.listen.admin_port",
    ]
    assert resolve_run(Up(config=(run_file,)), overrides).services.generation.listen.admin_port is None


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_run_file_of_the_package_is_free_of_faults(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert resolve_run(Run(config=(file,)), []).trainer is not None


def test_prompts_are_looked_for_where_they_are_read(run_values: dict[str, Section]) -> None:
    gone = "--trainer.prompts.path=gone.txt"
    assert faults(run_values) == []
    assert faults(run_values, gone) == ["trainer.prompts.path: gone.txt is no file, seen from the working directory"]


def test_functions_alone_need_a_tokenizer_to_read_token_ids(run_values: dict[str, Section]) -> None:
    function = "--services.reward.rewards=[{name: length, kind: function, function: length}]"
    source = run_values["trainer"]["policy"]["source"]
    expected = f"services.reward.tokenizers: none, and no reward has a model; name {source} there"
    assert faults(run_values, function) == [expected]
    assert faults(run_values, function, f"--services.reward.tokenizers=[{source}]") == []
    assert faults(run_values, function, "--trainer.rewards.model=false", "--trainer.environment.name=calculator") == []


def test_a_safety_reward_is_a_part_of_the_reward_that_is_asked(run_values: dict[str, Section]) -> None:
    rewards = [
        *cast("list[Section]", cast(Section, run_values["services"]["reward"])["rewards"]),
        {"name": "harmless", "kind": "function", "function": "length"},
        {"name": "inner", "kind": "sum", "terms": [{"reward": "harmless"}]},
        {"name": "outer", "kind": "sum", "terms": [{"reward": "tiny"}, {"reward": "inner", "weight": 0}]},
    ]
    asked = [f"--services.reward.rewards={json.dumps(rewards)}", "--trainer.rewards.filters.safety.at_least=0"]
    outer = "--trainer.services.reward_model=outer"
    for arguments, reward, parts in (
        ([], "harmless", "tiny"),
        ([outer], "other", "outer, tiny, inner, harmless"),
        ([outer], "harmless", None),
        ([outer], "outer", None),
        ([], "tiny", None),
    ):
        found = faults(run_values, *asked, *arguments, f"--trainer.rewards.filters.safety.reward={reward}")
        words = (
            f"trainer.rewards.filters.safety.reward: {reward} is no part of the reward that is asked, whose parts are"
        )
        assert found == ([] if parts is None else [f"{words} {parts}"])


def test_generation_takes_the_samples_of_a_step_and_of_an_evaluation(run_values: dict[str, Section]) -> None:
    """They have 4 each; the other services are asked in parts."""
    limit = "limits.max_request_sequences"
    others = [f"--services.{name}.{limit}=1" for name in ("reward", "reference")]
    assert faults(run_values, *others, f"--services.generation.{limit}=4") == []
    assert faults(run_values, f"--services.generation.{limit}=3") == [
        f"trainer.{key}: 4 samples are asked of generation in one request, and services.generation.{limit} is 3"
        for key in ("rollout.batch_size", "prompts.heldout")
    ]


def test_vllm_samples_at_every_temperature_of_the_run(run_values: dict[str, Section]) -> None:
    vllm = "--services.generation.backend=vllm"
    for start, end, found in (
        (0.01, 2.0, []),
        (2.1, 0.005, ["rollout.temperature: 2.1", "schedules.temperature.end: 0.005"]),
    ):
        asked = [f"--trainer.rollout.temperature={start}", f"--trainer.schedules.temperature.end={end}"]
        assert faults(run_values, *asked) == []
        assert faults(run_values, vllm, *asked) == [
            f"trainer.{one}, and with services.generation.backend vllm it is from 0.01 to 2" for one in found
        ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--trainer.services.tls={ca_file: x}", f"--services.reward.tls={SERVER}", HEALTH[0]],
            [
                f"services.{name}.tls: none, but trainer.services.tls is set, and is for all services"
                for name in ("reference", "generation")
            ],
        ),
        (
            [f"--services.reward.tls={SERVER}", f"--services.generation.admin_tls={SERVER}", HEALTH[0]],
            [
                "trainer.services.tls: none, but services.reward.tls is set",
                "trainer.services.tls: none, but services.generation.admin_tls is set",
            ],
        ),
        # Nobody gives the reference any weights.
        ([f"--services.reference.admin_tls={SERVER}"], []),
    ],
)
def test_trainer_and_services_agree_about_tls(
    run_values: dict[str, Section], arguments: list[str], expected: list[str]
) -> None:
    assert faults(run_values, *arguments) == expected


def test_a_service_that_asks_for_a_certificate_is_given_one(run_values: dict[str, Section]) -> None:
    names = ("reward", "reference", "generation")
    tls = [f"--services.{name}.tls={SERVER if name == 'reward' else MUTUAL}" for name in names]
    health = [*HEALTH, "--services.generation.listen.health_port=7003"]
    assert faults(run_values, *tls, *health, "--trainer.services.tls={ca_file: x}") == [
        f"trainer.services.tls.certificate_file: none, but services.{name}.tls asks for one" for name in names[1:]
    ]
    whole = "--trainer.services.tls={ca_file: x, certificate_file: y, key_file: z}"
    assert faults(run_values, *tls, *health, whole) == []


def test_weights_can_be_given_to_those_that_need_them(run_values: dict[str, Section]) -> None:
    closed = [f"--services.{name}.listen.admin_port=none" for name in ("reference", "generation")]
    problems = [
        f"services.{name}.listen.admin_port: none, but the trainer gives {name} its weights there"
        for name in ("generation", "reference")
    ]
    assert faults(run_values, *closed) == problems[:1]
    assert faults(run_values, *closed, "--trainer.reference-refresh-steps=1") == problems


def test_generation_allows_the_way_that_weights_take(run_values: dict[str, Section]) -> None:
    shared = "--trainer.weight-transfer={plane: shared, directory: /dev/shm/ppod/a}"
    allowed = "--services.generation.weights.shared-directories"
    words = "trainer.weight_transfer.directory: /dev/shm/ppod/a is in none of"
    for directories, refused in (("[]", True), ("/dev/shm/ppo", True), ("/dev/shm/ppod", False)):
        found = faults(run_values, shared, allowed, directories)
        assert [problem.startswith(words) for problem in found] == [True] * refused
    collective = "--trainer.weight-transfer={plane: collective, collective: {port: 29777}}"
    [problem] = faults(run_values, collective)
    assert problem.startswith("trainer.weight_transfer.collective: 127.0.0.1:29777 is none of")
    assert faults(run_values, collective, "--services.generation.weights.collective-addresses=127.0.0.1:*") == []


def test_a_policy_that_is_not_its_reference_is_told(
    run_values: dict[str, Section], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where `--trainer.policy.source` alone names another model. It may be meant, so the run starts."""

    def taken(*_: object, **__: object) -> list[str]:
        return ["all ports"]

    monkeypatch.setattr(launcher, "busy_ports", taken)
    for arguments, noted in ((list[str](), False), (["--trainer.policy.source", "/models/tuned"], True)):
        config = parse_run(apply_overrides(run_values, split_arguments(arguments)[1]), "test")
        with pytest.raises(launcher.LaunchError, match="ports are taken"):
            launcher.Launcher(config).run()
        found = "trainer.policy.source /models/tuned: the KL penalty holds the policy to another model"
        assert (found in capsys.readouterr().err) == noted


def test_a_run_that_waits_for_less_than_vllm_takes_is_told(run_values: dict[str, Section]) -> None:
    def notes(*arguments: str) -> list[str]:
        _, overrides = split_arguments(arguments)
        return run_notes(parse_run(apply_overrides(run_values, overrides), "test"))

    vllm = "--services.generation.backend=vllm"
    assert notes(vllm, "--trainer.services.ready_timeout_s=120") == [
        "trainer.services.ready_timeout_s is 120, services.generation.vllm.start_timeout_s 600: the run gives up "
        "before vLLM's start does"
    ]
    assert notes(vllm, "--trainer.services.ready_timeout_s=600") == []
    assert notes("--trainer.services.ready_timeout_s=120") == []


def test_the_run_file_for_cuda_waits_until_vllm_has_started() -> None:
    values = read_run_values(CONFIGS / "smollm2-cuda.yaml")
    _, overrides = split_arguments(["--services.generation.backend=vllm"])
    run = parse_run(apply_overrides(values, overrides), "test")
    assert run.trainer.services.ready_timeout_s == 900
    assert run_notes(run) == []


def test_a_reference_that_no_penalty_holds_to_is_not_told(run_values: dict[str, Section]) -> None:
    """Where it is only measured, and where it is given the policy's base."""

    def notes(*arguments: str) -> int:
        _, overrides = split_arguments(["--trainer.policy.source", "/models/tuned", *arguments])
        return len(run_notes(parse_run(apply_overrides(run_values, overrides), "test")))

    assert notes("--trainer.kl.coefficient", "0") == 0
    assert notes("--trainer.kl.coefficient", "0", "--trainer.schedules={kl_coefficient: {end: 0.1}}") == 1
    assert notes("--trainer.policy.lora={quantization: nf4}") == 0
    assert notes("--trainer.policy.lora={}") == 1
