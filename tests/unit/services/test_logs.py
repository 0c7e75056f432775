"""What a service logs."""

from __future__ import annotations

import json
import logging

import pytest
from grpc._cython import cygrpc

from ppod_services.core.logs import JsonFormatter, tell_of_gone_callers


def logged(error: BaseException) -> dict[str, object]:
    """What gRPC's server would have the service log of an error that comes out of a call."""
    record = logging.LogRecord(
        "grpc._cython.cygrpc",
        logging.ERROR,
        __file__,
        1,
        "%s raised by servicer method [/ppod.v1.GenerationService/Generate]",
        (type(error).__name__,),
        (type(error), error, None),
    )
    assert tell_of_gone_callers(record)
    return json.loads(JsonFormatter("generation").format(record))


def test_a_caller_that_goes_as_its_reply_is_sent_is_no_error() -> None:
    line = logged(cygrpc.ExecuteBatchError('Failed "execute_batch"'))
    assert line["level"] == "info"
    assert line["message"] == "ExecuteBatchError raised by servicer method [/ppod.v1.GenerationService/Generate]"
    assert "traceback" not in line


@pytest.mark.parametrize("error", [cygrpc.InternalError("broken"), ValueError("broken")])
def test_what_else_grpc_tells_stays_an_error(error: Exception) -> None:
    line = logged(error)
    assert line["level"] == "error"
    assert "broken" in str(line["traceback"])
