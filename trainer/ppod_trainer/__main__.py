"""`python -m ppod_trainer --config FILE`: one PPO run against services that are already up.

Started by torchrun it is one of several ranks, which divide the policy among them.

Exit codes: 0 done; 1 something failed, named in one line; 2 the configuration is wrong; 3 the run showed what
`watch.stop` names, and would go on into it if it were started again; 128 + signal after a clean stop.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, NoReturn, TextIO

from ppod import PpodError
from ppod_models.configuration import ConfigError, add_config_option, load_config
from ppod_models.ending import UNREAD_FAULTS, exit_now
from ppod_models.garbage import uncollected_start
from ppod_models.sources import ModelSourceError
from ppod_models.tracing import configure_tracing, flush_tracing
from ppod_trainer.config import TrainerConfig
from ppod_trainer.errors import OutputError, StopRequestedError, TrainerError, TroubleError, with_notes

if TYPE_CHECKING:
    from ppod_trainer.ranks import Ranks
    from ppod_trainer.training import TrainingRun

_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
"""A full disk, and its like: met wherever a record, a sample or a model is written."""
_LESS_MEMORY = (
    "[less is needed with a smaller ppo.micro_batch_tokens, memory.gradient_checkpointing, memory.offload, more ranks, "
    "or nobody else on the device]"
)
_FLUSH_TIMEOUT_S = 2.0
"""Longest wait, at the end, for a collector to take the last spans."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ppod_trainer", description=__doc__)
    add_config_option(parser)
    parser.add_argument("--check", action="store_true", help="check the configuration and exit")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        config = load_config(TrainerConfig, *options.config)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        return 0 if options.check else run(config)
    except KeyboardInterrupt:
        # While libraries are loaded, which takes seconds: nobody listens for signals yet.
        _tell("SIGINT: stopped before the first step", sys.stdout)
        return 128 + signal.SIGINT


def run(config: TrainerConfig) -> int:
    """Train with a checked configuration; returns the exit code."""
    with uncollected_start() as started:
        return _run(config, started)


def _run(config: TrainerConfig, started: Callable[[], None]) -> int:
    # Heavy imports wait until the configuration is known to be right.
    from ppod_trainer.ranks import open_ranks  # noqa: PLC0415

    ranks = None
    try:
        timeout_s, offload = config.ranks.timeout_s, config.memory.offload
        with open_ranks(config.policy.device, timeout_s, mesh_of_one=offload) as ranks:
            role = _lead if ranks.rank == 0 else _follow
            return role(config, ranks, started)
    except (TrainerError, PpodError, ModelSourceError) as error:
        _complain(ranks, with_notes(error))
        return 3 if isinstance(error, TroubleError) else 1
    except OSError as error:
        if error.errno not in _DISK_FAULTS:
            raise
        _complain(ranks, f"run_dir: {config.run_dir} cannot be written: {error}")
        return 1
    except RuntimeError as error:
        if _is_out_of_memory(error):
            _complain(ranks, f"{' '.join(str(error).split())} {_LESS_MEMORY}")
            return 1
        # What collectives raise when another rank is gone, and our own bugs: those need their traceback.
        if ranks is None or ranks.size == 1:
            raise
        traceback.print_exc()
        _complain(ranks, f"{str(error).splitlines()[0]}; all ranks end; the first that failed says why")
        return 1


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had no room for a tensor."""
    from torch import OutOfMemoryError  # noqa: PLC0415 - the configuration was right, so torch is there

    return isinstance(error, OutOfMemoryError)


def _complain(ranks: Ranks | None, message: str) -> None:
    place = "" if ranks is None or ranks.size == 1 else f"rank {ranks.rank} of {ranks.size}: "
    _tell(f"ppod train: {place}{message}", sys.stderr)


def _tell(line: str, stream: TextIO) -> None:
    """To stderr where nobody reads stdout, and to nobody where nobody reads that."""
    try:
        print(line, file=stream, flush=True)
    except OSError:
        # Python would complain once more when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if stream is not sys.stderr:
            _tell(line, sys.stderr)


@contextmanager
def _output_is_read() -> Generator[None]:
    """Name the pipe that breaks most: that of `ppod run | head`. Others, as to a tool, are an environment's own."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNREAD_FAULTS:
            raise
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not poll.poll(0):
            raise
        raise OutputError("nobody reads stdout any more, as behind `| head`; let a file take it") from error


def _lead(config: TrainerConfig, ranks: Ranks, started: Callable[[], None]) -> int:
    from ppod_trainer.assembly import open_run  # noqa: PLC0415
    from ppod_trainer.stopping import StopSignal  # noqa: PLC0415

    configure_tracing(config.tracing.endpoint, "ppod.trainer", config.tracing.sample_ratio)
    stop = StopSignal()
    stop.install()
    try:
        # What is sampled before the first step is told, too.
        with _output_is_read(), open_run(config, stop, ranks) as training_run, ExitStack() as failed:
            started()
            # Whatever it is: an environment's own errors are as good as ours.
            failed.push(partial(_save_failed, training_run))
            try:
                with _output_is_read():
                    _train(training_run)
            except StopRequestedError as error:
                failed.pop_all()
                _save(training_run, f"{error}: stopped")
                return 128 + (stop.received or 0)
    except StopRequestedError as error:
        print(f"{error}: stopped before the first step", flush=True)
        return 128 + (stop.received or 0)
    return 0


def _follow(config: TrainerConfig, ranks: Ranks, started: Callable[[], None]) -> int:
    from ppod_trainer.assembly import load_leader  # noqa: PLC0415
    from ppod_trainer.follower import follow  # noqa: PLC0415
    from ppod_trainer.stopping import NotedSignal  # noqa: PLC0415

    # A signal is rank 0's to obey: it finishes the step, and needs the others for its checkpoint. It is told of one
    # that came here alone, as to a pod whose node is drained.
    noted = NotedSignal()
    noted.install()
    leader, _ = load_leader(config, ranks)
    started()
    follow(leader, noted)
    return 0


def _save_failed(training_run: TrainingRun, kind: type[BaseException] | None, *_: object) -> None:
    """Keep the last whole step of a run that an error ends; the error goes on."""
    if kind is not None and training_run.whole and not training_run.parts.learner.broken:
        # A full disk may have half of a record.
        _save(training_run, f"{kind.__name__}: failed", drawn=not issubclass(kind, OSError))


def _save(training_run: TrainingRun, what: str, *, drawn: bool = True) -> None:
    """Keep the last whole step of a run that ends early, and draw how it got there."""
    path = training_run.save()
    _tell(f"{what} after step {training_run.state.step}; resume from {path}", sys.stdout)
    if drawn and training_run.state.step:
        _draw(training_run.config)


def _draw(config: TrainerConfig) -> None:
    """The curves of all steps that are recorded."""
    from ppod_trainer.metrics import read_records  # noqa: PLC0415
    from ppod_trainer.report import plot_curves  # noqa: PLC0415

    records = read_records(config.run_dir / "metrics.jsonl")
    plot_curves(config.run_dir / "curves.png", records, f"{config.policy.source}, seed {config.seed}")


def _train(training_run: TrainingRun) -> None:
    from rich.console import Console  # noqa: PLC0415

    from ppod_trainer.durable import write_durably  # noqa: PLC0415
    from ppod_trainer.evaluation import load_evaluation  # noqa: PLC0415
    from ppod_trainer.metrics import read_records  # noqa: PLC0415
    from ppod_trainer.report import print_report, print_troubles  # noqa: PLC0415

    config = training_run.config
    kept = config.run_dir / "evaluation_before.json"
    if training_run.state.components and kept.is_file():
        before = load_evaluation(kept)
    else:
        before = training_run.evaluate()
        write_durably(kept, json.dumps(asdict(before)))
    training_run.train()
    after = training_run.evaluate()
    write_durably(config.run_dir / "evaluation_after.json", json.dumps(asdict(after)))
    training_run.save()
    final = training_run.save_final_model()
    _draw(config)
    with (config.run_dir / "report.txt").open("w", encoding="utf-8") as file:
        # The file first: where nobody reads stdout, rich ends the process.
        for console in (Console(file=file, width=120), Console()):
            print_report(console, before, after, config.evaluation.shown_samples)
            print_troubles(console, read_records(config.run_dir / "metrics.jsonl"))
    print(f"run directory {config.run_dir}; final model {final}", flush=True)


def end(code: int) -> NoReturn:
    """End the process with an exit code; the last spans are sent, and no thread is waited for."""
    flush_tracing(_FLUSH_TIMEOUT_S)
    exit_now(code)


if __name__ == "__main__":
    end(main())
