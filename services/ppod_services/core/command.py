"""The command line that every service shares: `python -m ppod_services.NAME --config FILE [--config FILE]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Generic, NoReturn, TypeVar

from ppod_models.configuration import ConfigError, add_config_option, dump_config, load_config
from ppod_models.ending import exit_now
from ppod_services.core.config import ServiceConfig
from ppod_services.core.logs import configure_logging
from ppod_services.core.server import Host, HostedService, StartError, serve

ConfigT = TypeVar("ConfigT", bound=ServiceConfig)

EXIT_START = 1
EXIT_CONFIG = 2

_EPILOG = """\
exit codes: 0 drained after SIGTERM or SIGINT; 1 a port is in use, the model cannot be loaded, or the drain was cut
short; 2 the configuration is wrong. A second signal ends the process at once; the same one within a
second is taken for an echo of the first.
"""


class ServiceCommand(Generic[ConfigT]):
    """Reads the configuration, starts the server, turns start errors into exit codes and one clear line.

    Args:
        name: the service's name in `python -m ppod_services.NAME`.
        description: one sentence for --help.
        config_type: its configuration.
        build: makes the hosted service; must not load the model yet.
    """

    def __init__(
        self,
        name: str,
        description: str,
        config_type: type[ConfigT],
        build: Callable[[ConfigT, Host], HostedService],
    ) -> None:
        self._name = name
        self._description = description
        self._config_type = config_type
        self._build = build

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Run the command and exit."""
        options = self._parser().parse_args(arguments)
        try:
            config = load_config(self._config_type, *options.config)
        except ConfigError as error:
            self._fail(EXIT_CONFIG, str(error))
        if options.check:
            sys.stdout.write(dump_config(config))
            return
        configure_logging(self._name, config.log_level)
        try:
            exit_now(serve(config, lambda host: self._build(config, host)))
        except StartError as error:
            self._fail(EXIT_START, str(error))
        except ConfigError as error:
            # The teams file.
            self._fail(EXIT_CONFIG, str(error))

    def _parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            prog=f"python -m ppod_services.{self._name}", description=self._description, epilog=_EPILOG
        )
        add_config_option(parser)
        parser.add_argument(
            "--check", action="store_true", help="validate the configuration, print it with all defaults, and exit"
        )
        return parser

    def _fail(self, code: int, message: str) -> NoReturn:
        sys.stderr.write(f"ppod {self._name}: {message}\n")
        exit_now(code)
