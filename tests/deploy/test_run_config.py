"""The run file, its overrides and the command's words, without starting anything."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import pytest
import tyro

from deploy.conftest import Section
from ppod_deploy.cli import execute
from ppod_deploy.clients import read_lines
from ppod_deploy.commands import Run, Up
from ppod_deploy.defaults import (
    CPU_CONFIG,
    CUDA_CONFIG,
    FLOAT32_CPU_CONFIG,
    cpu_is_fast,
    with_run_dir,
)
from ppod_deploy.launcher import RUN_FILE
from ppod_deploy.overrides import Override, apply_overrides, describe_keys
from ppod_deploy.processes import Child, ChildCommand, describe_exit, shell_exit_code, stop_all
from ppod_deploy.run_command import resolve_run
from ppod_deploy.run_config import RunConfig, parse_run, read_run_values
from ppod_models.configuration import ConfigError, dump_config
from support.processes import ROOT, environment


def test_the_trainer_finds_the_services_where_they_listen(run_values: dict[str, Section]) -> None:
    config = parse_run(run_values, "test")
    listens = [service.listen for _, service in config.services.items()]
    targets = config.trainer.services
    assert [targets.reward, targets.reference, targets.generation] == [f"127.0.0.1:{one.port}" for one in listens]
    assert targets.reference_admin == f"127.0.0.1:{listens[1].admin_port}"
    assert targets.generation_admin == f"127.0.0.1:{listens[2].admin_port}"


def test_disagreements_between_sections_are_faults(run_values: dict[str, Section]) -> None:
    overrides = [
        Override(("services", "reward", "listen"), {"port": 7001, "metrics_port": 7002, "host": "0.0.0.0"}),
        Override(("services", "generation", "listen"), {"port": 7002, "admin_port": 7003, "health_port": 7001}),
        Override(("trainer", "metrics", "port"), 7003),
        Override(("trainer", "services"), {"reward": "localhost:7001", "judge_model": "nobody"}),
    ]
    with pytest.raises(ConfigError) as raised:
        parse_run(apply_overrides(run_values, overrides), "test")
    assert raised.value.problems == [
        "services.generation.listen.port: 7002 is also services.reward.listen.metrics_port; every port must be another",
        "services.generation.listen.health_port: 7001 is also services.reward.listen.port; every port must be another",
        "trainer.metrics.port: 7003 is also services.generation.listen.admin_port; every port must be another",
        "trainer.services.judge_model: 'nobody', but services.reward.rewards holds tiny",
    ]


def test_a_service_with_tls_needs_a_port_that_tells_health_in_plain_text(run_values: dict[str, Section]) -> None:
    tls = {"certificate_file": "tls.crt", "private_key_file": "tls.key"}
    values = apply_overrides(run_values, [Override(("services", "reference", "tls"), tls)])
    with pytest.raises(ConfigError) as raised:
        parse_run(values, "test")
    [problem] = raised.value.problems
    assert problem.startswith("services.reference.listen.health_port: none, but services.reference.tls is set")
    health = Override(("services", "reference", "listen", "health_port"), 7009)
    assert parse_run(apply_overrides(values, [health]), "test").services.reference.listen.health_port == 7009


@pytest.mark.parametrize("path", [CPU_CONFIG, CUDA_CONFIG, FLOAT32_CPU_CONFIG])
def test_packaged_run_files_are_valid(path: Path) -> None:
    config = parse_run(with_run_dir(read_run_values(path), path.stem), str(path))
    assert config.trainer.run_dir.parts[:1] == ("runs",)
    assert config.trainer.run_dir.name.startswith(f"{path.stem}-2")
    # Of the reviews six tokens are kept, and prompts of one's own, laid over, whole.
    own = apply_overrides(read_run_values(path), [Override(("trainer", "prompts", "path"), "mine.txt")])
    assert (config.trainer.prompts.first_tokens, parse_run(own, str(path)).trainer.prompts.first_tokens) == (6, None)


def test_a_resumed_run_finds_services_that_listen_elsewhere_now(run_values: dict[str, Section], tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).write_text(dump_config(parse_run(run_values, "test")))
    overrides = [
        Override(("services", "reference", "listen", "port"), 7001),
        Override(("services", "generation", "listen", "admin_port"), 7002),
    ]
    before = parse_run(run_values, "test").trainer.services
    targets = resolve_run(Run(resume=tmp_path), overrides).trainer.services
    assert (targets.reference, targets.generation_admin) == ("127.0.0.1:7001", "127.0.0.1:7002")
    assert (targets.reward, targets.generation) == (before.reward, before.generation)


def test_only_what_a_run_left_keeps_another_from_its_directory(run_file: Path, tmp_path: Path) -> None:
    """Not the run file of one that failed to start, nor that of `ppod up`: there is nothing to go on from."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / RUN_FILE).write_text(run_file.read_text())
    (run_dir / "metrics.jsonl").write_text("")
    assert resolve_run(Run(config=(run_file,)), []).trainer.run_dir == run_dir

    (run_dir / "metrics.jsonl").write_text('{"step": 0}\n')
    # Of one that was killed while it wrote its first checkpoint, with which no other run can go on.
    (run_dir / "checkpoints" / ".writing-step_000001").mkdir(parents=True)
    with pytest.raises(ConfigError) as raised:
        resolve_run(Run(config=(run_file,)), [])
    [problem] = raised.value.problems
    assert problem == (
        f"trainer.run_dir: {run_dir} holds the records of an earlier run, which left no checkpoint; remove it, or name "
        "another"
    )
    for name in (".replaced-step_000001", "step_000001"):
        (run_dir / "checkpoints" / name).mkdir()
        with pytest.raises(ConfigError, match="holds an earlier run; --resume"):
            resolve_run(Run(config=(run_file,)), [])
        (run_dir / "checkpoints" / name).rmdir()


def test_run_files_are_laid_over_each_other(run_file: Path, tmp_path: Path) -> None:
    over, more = tmp_path / "over.yaml", tmp_path / "more.yaml"
    over.write_text("trainer: {steps: 7, kl: {coefficient: 0.5}}")
    more.write_text("trainer: {steps: 8}\nservices: {reward: {log_level: error}}")
    files = ["--config", str(run_file), "--config", str(over), "--config", str(more)]
    for command in (tyro.cli(Run, args=files), tyro.cli(Up, args=files)):
        found = resolve_run(command, [Override(("trainer", "seed"), 5)])
        assert (found.trainer.steps, found.trainer.seed, found.trainer.kl.coefficient) == (8, 5, 0.5)
        assert found.services.reward is not None
        assert (found.services.reward.log_level, found.services.reward.rewards[0].name) == ("error", "tiny")
    over.write_text("trainer: {steps: 0}")
    with pytest.raises(ConfigError, match=f"{run_file}, {over}: 1 problem\n  trainer.steps: .* found 0"):
        resolve_run(Run(config=(run_file, over)), [])


@pytest.mark.parametrize("words", [["serve", "reward"], ["train", "ppo"], ["train", "reward"], ["k8s", "train"]])
def test_help_says_that_a_file_must_be_given(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        execute([*words, "--help"])
    assert "(required, repeatable)" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_file_that_is_no_mapping_and_a_resume_of_nothing_are_faults(tmp_path: Path) -> None:
    file = tmp_path / "list.yaml"
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match="must be a mapping"):
        resolve_run(Run(config=(file,)), [])
    with pytest.raises(ConfigError, match="no run was started there"):
        resolve_run(Run(resume=tmp_path), [])


def test_a_run_is_resumed_in_no_other_directory_than_its_own(run_values: dict[str, Section], tmp_path: Path) -> None:
    (tmp_path / RUN_FILE).write_text(dump_config(parse_run(run_values, "test")))
    elsewhere = [Override(("trainer", "run_dir"), "elsewhere"), Override(("trainer", "resume"), False)]
    with pytest.raises(ConfigError) as caught:
        resolve_run(Run(resume=tmp_path), elsewhere)
    assert caught.value.problems == [
        f"trainer.run_dir: elsewhere, but --resume is {tmp_path}; give one of them",
        f"trainer.resume: False, but --resume is {tmp_path}; give one of them",
    ]
    same = Override(("trainer", "run_dir"), str(tmp_path))
    assert resolve_run(Run(resume=tmp_path), [same]).trainer.run_dir == tmp_path


def test_a_run_in_ones_home_is_resumed(
    run_values: dict[str, Section], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As behind `--resume=`, where no shell reads the tilde."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / RUN_FILE).write_text(dump_config(parse_run(run_values, "test")))
    same = Override(("trainer", "run_dir"), str(tmp_path / "one"))
    assert resolve_run(Run(resume=Path("~/one")), [same]).trainer.run_dir == tmp_path / "one"


def test_a_run_is_resumed_with_its_own_course_alone(run_values: dict[str, Section], tmp_path: Path) -> None:
    """Before its run file is overwritten, from which it could be resumed."""
    values = apply_overrides(run_values, [Override(("trainer", "run_dir"), str(tmp_path))])
    (tmp_path / RUN_FILE).write_text(dump_config(parse_run(values, "test")))
    coefficient = Override(("trainer", "kl", "coefficient"), 0.25)
    optimizer = Override(("trainer", "optimizer", "value_learning_rate"), 0.5)
    free = Override(("trainer", "checkpoint", "interval"), 7)
    assert resolve_run(Run(resume=tmp_path), [coefficient]).trainer.kl.coefficient == 0.25, "nothing is trained yet"
    (tmp_path / "checkpoints").mkdir()
    assert resolve_run(Run(resume=tmp_path), [free]).trainer.checkpoint.interval == 7
    with pytest.raises(ConfigError) as caught:
        resolve_run(Run(resume=tmp_path), [coefficient, optimizer, free])
    changes = ("trainer.kl.coefficient is 0.25, was 0.05", "trainer.optimizer.value_learning_rate is 0.5, was None")
    assert len(caught.value.problems) == 2
    for change, problem in zip(changes, caught.value.problems, strict=True):
        assert problem.startswith(f"{change} in {tmp_path}, and decides the course of training")


def test_a_run_is_resumed_with_what_it_was_paid_by_and_held_to(run_values: dict[str, Section], tmp_path: Path) -> None:
    rewards = cast("list[Section]", run_values["services"]["reward"]["rewards"])  # pyright: ignore
    rewards.append({"name": "short", "kind": "function", "function": "length", "parameters": {"minimum": 3}})
    values = apply_overrides(run_values, [Override(("trainer", "run_dir"), str(tmp_path))])
    (tmp_path / RUN_FILE).write_text(dump_config(parse_run(values, "test")))
    (tmp_path / "checkpoints").mkdir()
    reward, source = ("services", "reward", "rewards"), str(rewards[0]["model"]["source"])  # pyright: ignore
    where = [Override((*reward, "0", "model", "threads"), 2), Override((*reward, "1", "workers"), 3)]
    assert resolve_run(Run(resume=tmp_path), where).services.reward is not None
    for path, value, earlier in (
        (("trainer", "services", "reward_model"), "short", ""),
        (("services", "reference", "model", "source"), "another", source),
        ((*reward, "0", "model", "source"), "another", source),
        ((*reward, "1", "parameters", "minimum"), 4, 3),
    ):
        with pytest.raises(ConfigError) as caught:
            resolve_run(Run(resume=tmp_path), [Override(path, value), *where])
        [problem] = caught.value.problems
        assert problem.startswith(f"{'.'.join(path)} is {value!r}, was {earlier!r} in {tmp_path}, and decides")


def test_help_lists_every_key_that_an_override_reaches() -> None:
    text = "\n".join(describe_keys(RunConfig))
    for key in ("--services.reward.rewards", "--trainer.ppo.clip FLOAT", "--trainer.kl.adaptive.target FLOAT"):
        assert key in text
    assert "PydanticUndefined" not in text
    # The defaults of a section's keys are none of a run that leaves it out.
    assert "section 2.2. (default none)\n  --trainer.kl.adaptive.target FLOAT" in text
    assert "(none: prompts are answered in one turn; default none)\n  --trainer.environment.name STR" in text


def test_help_is_quick_and_needs_no_torch() -> None:
    probe = (
        "import sys; sys.argv = ['ppod', 'run', '--help']\n"
        "from ppod_deploy.cli import execute\n"
        "try: execute(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, env=environment(), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    # 0.5 s on an idle machine; tests may share it.
    assert time.monotonic() - start < 5.0


def make_child(tmp_path: Path, code: str) -> Child:
    """A child that runs `code`; PYTHONPATH must hold tmp_path."""
    module = f"ppod_stand_in_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text(code)
    return Child(ChildCommand("stand-in", module, tmp_path / "c.yaml", tmp_path / "log.jsonl", signal.SIGKILL))


def test_a_child_that_ignores_sigterm_is_killed_after_its_grace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    deaf = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf')\ntime.sleep(60)\n"
    child = make_child(tmp_path, deaf)
    while "deaf" not in child.last_words():
        time.sleep(0.02)
    start = time.monotonic()
    assert stop_all([child], 0.5, lambda: False) == ["stand-in"]
    assert 0.5 <= time.monotonic() - start < 3.0
    assert child.exit_code() == -9
    assert stop_all([child], 0.5, lambda: False) == []


def test_last_words_are_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    record = json.dumps(
        {"ts": "t", "level": "error", "service": "s", "event": "no model", "path": "/x", "traceback": "a\nb"}
    )
    child = make_child(tmp_path, f"print('plain')\nprint({record!r})\nraise SystemExit(3)\n")
    while child.exit_code() is None:
        time.sleep(0.02)
    assert child.exit_code() == 3
    assert child.last_words() == ["plain", "error: no model path=/x (b)"]


def test_exit_codes_in_words_and_for_the_shell() -> None:
    assert [describe_exit(code) for code in (3, -15)] == ["exit code 3", "killed by SIGTERM"]
    assert [shell_exit_code(code) for code in (0, 3, -15)] == [0, 3, 143]


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["train", "ppo"], ["  steps INT", "  kl.adaptive.target FLOAT", "  ppo.entropy_coefficient FLOAT"]),
        (["train", "reward"], ["  data.half {a,b}", "  output PATH"]),
        (["serve", "generation"], ["  batching.max_batch_tokens INT", "  model.source STR"]),
    ],
)
def test_help_of_a_command_that_takes_a_file_lists_its_keys(
    words: list[str], keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        execute([*words, "--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert set(keys) <= set(lines)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512_bf16 amx_bf16 amx_tile\n\nprocessor\t: 1\nflags\t\t: fpu\n", True),
        ("flags\t\t: fpu amx_tile amx_int8\n", True),
        ("flags\t\t: fpu avx2 fma\n", False),
        ("flags\t\t: fpu avx2 avx512_bf16\n", True),
        ("Features\t: fp asimd bf16\n", False),
    ],
)
def test_speed_is_read_off_the_flags_of_the_cpu(tmp_path: Path, cpuinfo: str, expected: bool) -> None:
    file = tmp_path / "cpuinfo"
    assert not cpu_is_fast(file)
    file.write_text(cpuinfo)
    assert cpu_is_fast(file) is expected


@pytest.mark.parametrize("command", ["score", "generate"])
def test_texts_in_another_encoding_are_refused_in_words(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python reads them strictly or with stand-ins for the bytes, by the locale; arguments always with stand-ins."""
    for errors, code, words in (("strict", 2, "stdin: not UTF-8"), ("surrogateescape", 1, "sample 0: found")):
        stdin = io.TextIOWrapper(io.BytesIO("café\n".encode("latin-1")), encoding="utf-8", errors=errors)
        monkeypatch.setattr("sys.stdin", stdin)
        assert execute([command, "--target", "127.0.0.1:1", "--timeout-s", "5"]) == code
        assert words in capsys.readouterr().err


def test_lines_of_stdin_end_as_on_any_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\r\n\r\n b \nc"), encoding="utf-8", newline="\n"))
    assert read_lines([]) == ["a", " b ", "c"]


def test_prompts_are_tokenised_by_a_tokenizer_without_its_models_weights(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "hi", "--target", "127.0.0.1:1", "--timeout-s", "5", "--tokenizer", str(tmp_path)]
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_model_dir / name, tmp_path)
    assert execute(command) == 1
    assert f"{tmp_path} holds no tokenizer.json" in capsys.readouterr().err
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).unlink()
    shutil.copy(tiny_model_dir / "tokenizer.json", tmp_path)
    assert execute(command) == 1
    assert "GenerationService at 127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "module"),
    [
        (["serve", "reward"], "ppod_services.reward"),
        (["train", "ppo"], "ppod_trainer"),
        (["train", "reward"], "ppod_trainer.reward_training"),
    ],
)
def test_files_that_are_laid_over_each_other_are_all_handed_on(
    words: list[str], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("os.execv", lambda _, command: started.append(command[2:]))
    execute([*words, "--config", "base.yaml", "--config", "over.yaml"])
    assert started == [[module, "--config", "base.yaml", "--config", "over.yaml"]]
