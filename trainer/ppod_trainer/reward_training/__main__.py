"""`python -m ppod_trainer.reward_training --config FILE`: train a reward head and report on it.

Exit codes: 0 done; 1 the model or the data is missing or broken (one line says what); 2 the configuration is wrong
(every fault is listed); 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ppod_models.configuration import ConfigError, add_config_option, load_config
from ppod_trainer.reward_training.config import RewardTrainingConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m ppod_trainer.reward_training", description="Train a reward head on pairs of rated reviews."
    )
    add_config_option(parser)
    files: list[Path] = parser.parse_args(arguments).config
    try:
        config = load_config(RewardTrainingConfig, *files)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    command = " ".join(["python -m ppod_trainer.reward_training", *(f"--config {file}" for file in files)])
    try:
        return _train(config, command)
    except KeyboardInterrupt:
        print("SIGINT: stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def _train(config: RewardTrainingConfig, command: str) -> int:
    # Imported only now: torch takes seconds to load, and a faulty configuration should be reported at once.
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: PLC0415
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415

    from ppod_models.reward_heads import RewardHeadError  # noqa: PLC0415
    from ppod_models.sources import ModelSourceError  # noqa: PLC0415
    from ppod_trainer.reward_training.data import ReviewDataError  # noqa: PLC0415
    from ppod_trainer.reward_training.pipeline import train_head  # noqa: PLC0415
    from ppod_trainer.reward_training.train import NothingToLearnError  # noqa: PLC0415

    disable_progress_bar()  # two progress displays on one terminal garble each other
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console()) as display:
        tasks = {stage: display.add_task(stage, start=False) for stage in ("training features", "held-out features")}

        def progress(stage: str, done: int, of: int) -> None:
            display.start_task(tasks[stage])
            display.update(tasks[stage], completed=done, total=of)

        try:
            train_head(config, command, lambda line: display.console.print(line, soft_wrap=True), progress)
        except (ModelSourceError, NothingToLearnError, ReviewDataError, RewardHeadError) as error:
            failure = str(error)
        except OSError as error:
            failure = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        else:
            return 0
    print(f"error: {failure}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
