"""The `ppod` command."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import tyro

from ppod_deploy.commands import COMMANDS, AnyCommand, Command, Generate, K8s, Run, Score, Serve, Train, TrainPpo, Up
from ppod_deploy.k8s.commands import AnyK8s

# Nothing else is imported here: `ppod --help` answers in a blink, and each command pays for what it uses.

EXIT_FAILED = 1
EXIT_CONFIG = 2
_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}

_DESCRIPTION = """PPO in pods: reinforcement learning from human feedback as gRPC services.

`ppod run` trains on this machine; `ppod COMMAND --help` says more about each command.
"""


def main() -> NoReturn:
    """Run the command line and exit."""
    try:
        sys.exit(execute(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        # `ppod run --help | head`: nobody reads on.
        _print_no_more()
        sys.exit(EXIT_FAILED)
    except OSError as error:
        if error.errno not in _DISK_FAULTS:
            raise
        _print_no_more()
        place = f"{error.filename}: " if error.filename else ""
        sys.exit(_fail(EXIT_FAILED, f"cannot write: {place}{error.strerror}"))


def _print_no_more() -> None:
    """What is still to be printed has nowhere to go: Python would complain once more when it flushes at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def execute(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code."""
    if list(arguments) == ["--version"]:
        print(f"ppod {importlib.metadata.version('ppod')}")
        return 0
    if arguments and arguments[0] in {"run", "up"}:
        # Their overrides are not tyro's to parse.
        return _launch(arguments)
    match _parse_or_explain(arguments):
        case Serve(service, config):
            return _become(f"ppod_services.{service}", config)
        case Train(job):
            return _become("ppod_trainer" if isinstance(job, TrainPpo) else "ppod_trainer.reward_training", job.config)
        case Score() | Generate() as query:
            return _ask(query)
        case Run() | Up():
            return _launch(arguments)
        case K8s(action):
            return _on_cluster(action)


def _parse(arguments: Sequence[str]) -> AnyCommand:
    if arguments and arguments[0] in COMMANDS:
        # Straight to the command, so that its --help is its own text and not the overview's one line.
        return tyro.cli(COMMANDS[arguments[0]], prog=f"ppod {arguments[0]}", args=list(arguments[1:]))
    # The union is a value to tyro, not a type that a checker can follow.
    return tyro.cli(Command, prog="ppod", description=_DESCRIPTION, args=list(arguments))  # pyright: ignore


def _parse_or_explain(arguments: Sequence[str]) -> AnyCommand:
    """Parse; after the help of a command that takes a file, list the file's keys."""
    try:
        return _parse(arguments)
    except SystemExit as error:
        if error.code == 0:
            from ppod_deploy.file_keys import print_file_keys  # noqa: PLC0415

            print_file_keys(arguments)
        raise


def _launch(arguments: Sequence[str]) -> int:
    from ppod_deploy.launcher import Interrupted, LaunchError  # noqa: PLC0415
    from ppod_deploy.overrides import split_arguments  # noqa: PLC0415
    from ppod_deploy.run_command import launch, print_keys  # noqa: PLC0415
    from ppod_models.configuration import ConfigError  # noqa: PLC0415

    try:
        rest, overrides = split_arguments(arguments)
        try:
            command = _parse(rest)
        except SystemExit as error:
            if error.code == 0:  # --help was asked for
                print_keys()
            raise
        assert isinstance(command, Run | Up)
        return launch(command, overrides)
    except ConfigError as error:
        return _fail(EXIT_CONFIG, f"{error}")
    except LaunchError as error:
        return _fail(EXIT_FAILED, f"{error}")
    except Interrupted as interrupt:
        return 128 + interrupt.signal


def _on_cluster(command: AnyK8s) -> int:
    from ppod_deploy.k8s.execute import execute_k8s  # noqa: PLC0415
    from ppod_deploy.k8s.objects import K8sError  # noqa: PLC0415
    from ppod_models.configuration import ConfigError  # noqa: PLC0415

    try:
        return execute_k8s(command)
    except ConfigError as error:
        return _fail(EXIT_CONFIG, str(error))
    except K8sError as error:
        return _fail(EXIT_FAILED, str(error))


def _ask(query: Score | Generate) -> int:
    from ppod.client import ClientSecurity, Sampling  # noqa: PLC0415
    from ppod.errors import PpodError  # noqa: PLC0415
    from ppod_deploy import clients  # noqa: PLC0415
    from ppod_models.sources import ModelSourceError  # noqa: PLC0415

    try:
        texts = clients.read_lines(query.texts if isinstance(query, Score) else query.prompts)
    except UnicodeDecodeError as error:
        return _fail(EXIT_CONFIG, f"stdin: not UTF-8: {error}")
    if not texts:
        return _fail(EXIT_CONFIG, "nothing to do: give a text, or lines on stdin")
    tls = query.tls
    try:
        security = ClientSecurity.from_environment(
            ca_file=tls.ca_file,
            certificate_file=tls.certificate_file,
            key_file=tls.key_file,
            server_name=tls.server_name,
            plain_text_token=tls.plain_text_token,
        )
        if isinstance(query, Score):
            clients.score(clients.ScoreQuery(query.target, texts, query.model, query.json, query.timeout_s, security))
        else:
            sampling = Sampling(
                query.max_tokens,
                temperature=query.temperature,
                top_p=query.top_p,
                min_p=query.min_p,
                repetition_penalty=query.repetition_penalty,
                stop=query.stop,
                n=query.n,
            )
            clients.generate(
                clients.GenerateQuery(
                    query.target, texts, query.tokenizer, sampling, query.seed, query.json, query.timeout_s, security
                )
            )
    except (PpodError, ModelSourceError) as error:
        return _fail(EXIT_FAILED, str(error))
    return 0


def _become(module: str, configs: Sequence[Path]) -> NoReturn:
    """Replace this process, so that signals and the exit code are the module's own."""
    options = [word for config in configs for word in ("--config", str(config))]
    os.execv(sys.executable, [sys.executable, "-m", module, *options])


def _fail(code: int, message: str) -> int:
    print(f"ppod: {message}", file=sys.stderr)
    return code
