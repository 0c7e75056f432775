"""JSON logs on stderr, one object a line, with the fixed keys ts, level, service and event."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime

LogValue = str | int | float | bool | None

_FIELDS = "ppod_fields"


class JsonFormatter(logging.Formatter):
    """Formats a record as one JSON object.

    ppod's own records carry the event as their message and their fields beside it; a record of another library becomes
    the event "log" with its text under "message".
    """

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        fields: Mapping[str, LogValue] | None = getattr(record, _FIELDS, None)
        line: dict[str, LogValue] = {
            "ts": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "event": record.getMessage() if fields is not None else "log",
        }
        if fields is None:
            line["logger"] = record.name
            line["message"] = record.getMessage()
        else:
            line.update(fields)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure_logging(service: str, level: str) -> None:
    """Send every record, and every Python warning, to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("ppod_services").setLevel(level.upper())
    logging.getLogger("grpc._cython.cygrpc").addFilter(tell_of_gone_callers)
    logging.captureWarnings(True)


def tell_of_gone_callers(record: logging.LogRecord) -> bool:
    """A filter for gRPC's logger: a reply that reached nobody is no error of the server.

    gRPC itself says nothing of one whose caller had gone, but for those that go in the moment in which it is sent: an
    error with a traceback. The message stays, because it tells the method.
    """
    kind = record.exc_info[0] if record.exc_info else None
    if kind is not None and kind.__name__ == "ExecuteBatchError":
        record.levelno, record.levelname, record.exc_info = logging.INFO, "INFO", None
    return True


def log_event(
    logger: logging.Logger,
    event: str,
    fields: Mapping[str, LogValue],
    *,
    level: int = logging.INFO,
    error: BaseException | None = None,
) -> None:
    """Log an event with its fields; `error` adds its traceback."""
    logger.log(level, event, extra={_FIELDS: fields}, exc_info=error)
