"""From `ppod run` and `ppod up` to the launcher: finds the run file, merges the overrides, validates the whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ppod_deploy.commands import Run, Up
from ppod_deploy.defaults import default_config, with_run_dir
from ppod_deploy.launcher import RUN_FILE, Launcher
from ppod_deploy.overrides import COMMAND_LINE, Override, apply_overrides, describe_keys
from ppod_deploy.run_checks import changed_services, run_faults
from ppod_deploy.run_config import RunConfig, parse_run, read_run_values, without_implied_targets
from ppod_models.configuration import ConfigError, named
from ppod_trainer.config import changes_of_course


def launch(command: Run | Up, overrides: Sequence[Override]) -> int:
    """Run, and return the exit code.

    Raises:
        ConfigError: nothing was started. LaunchError, Interrupted: everything is stopped again.
    """
    config = resolve_run(command, overrides)
    launcher = Launcher(config)
    if isinstance(command, Run):
        return launcher.run()
    launcher.up()
    return 0


def resolve_run(command: Run | Up, overrides: Sequence[Override]) -> RunConfig:
    """The validated run that a command line asks for.

    Raises:
        ConfigError: the file, an override or their sum is wrong, or the run directory holds another run, which is not
            resumed, or would be with a configuration that is not its own.
    """
    resume = command.resume.expanduser() if isinstance(command, Run) and command.resume else None
    if resume is not None and not (resume / RUN_FILE).is_file():
        raise ConfigError(COMMAND_LINE, [f"--resume: {resume} holds no {RUN_FILE}, so no run was started there"])
    paths = command.config or (resume / RUN_FILE if resume is not None else default_config(),)
    values = read_run_values(*paths)
    if not command.config and resume is not None:
        values = without_implied_targets(values)
    values = apply_overrides(values, overrides)
    if resume is not None:
        resuming = [Override(("trainer", "run_dir"), str(resume)), Override(("trainer", "resume"), True)]
        implied = {one.path: one.value for one in resuming}
        if others := [one for one in overrides if implied.get(one.path, one.value) != one.value]:
            faults = [
                f"{'.'.join(one.path)}: {one.value}, but --resume is {resume}; give one of them" for one in others
            ]
            raise ConfigError(COMMAND_LINE, faults)
        values = apply_overrides(values, resuming)
    origin = f"{named(*paths)} with the command line's overrides" if overrides else named(*paths)
    config = parse_run(with_run_dir(values, paths[-1].stem), origin)
    run_dir = config.trainer.run_dir
    if isinstance(command, Run):
        if config.trainer.resume:
            _check_course(config, run_dir, origin)
        elif (found := _earlier_run(run_dir)) is not None:
            raise ConfigError(origin, [f"trainer.run_dir: {run_dir} holds {found}"])
        if faults := run_faults(config):
            raise ConfigError(origin, faults)
    return config


def print_keys() -> None:
    """Print every key of a run file, for --help."""
    print("keys of the run file, each an override; N is a place in a list, from 0:")
    print("\n".join(describe_keys(RunConfig)))


def _earlier_run(run_dir: Path) -> str | None:
    """What a new run would destroy, and what to do; None: nothing, as where a run did not get to its first record."""
    checkpoints = run_dir / "checkpoints"
    # One that was being put in the place of another counts, and none that was not written to its end.
    if any(checkpoints.glob("step_*")) or any(checkpoints.glob(".replaced-step_*")):
        return f"an earlier run; --resume {run_dir} goes on, or name another"
    records = run_dir / "metrics.jsonl"
    if records.is_file() and records.stat().st_size:
        return "the records of an earlier run, which left no checkpoint; remove it, or name another"
    return None


def _check_course(config: RunConfig, run_dir: Path, origin: str) -> None:
    """Before anything starts, and puts its own run file in the place of the one that the run can go on with."""
    run_file = run_dir / RUN_FILE
    if not run_file.is_file() or not (run_dir / "checkpoints").is_dir():
        return
    earlier = parse_run(read_run_values(run_file), str(run_file))
    changes = [f"trainer.{change}" for change in changes_of_course(config.trainer, earlier.trainer)]
    if changes := [*changes, *changed_services(config, earlier)]:
        advice = f"in {run_dir}, and decides the course of training; leave it, or begin a run in another run_dir"
        raise ConfigError(origin, [f"{change} {advice}" for change in changes])
