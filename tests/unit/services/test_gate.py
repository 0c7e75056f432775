"""The bound on calls under way."""

from __future__ import annotations

import asyncio

import pytest

from ppod.errors import ResourceExhausted, Unavailable
from ppod_services.core.gate import CallGate


async def test_a_full_gate_tells_the_mean_time_of_a_call() -> None:
    gate = CallGate(max_calls=2)
    for _ in range(100):
        gate.enter()
        gate.leave(2.0)
    gate.enter()
    gate.enter()
    with pytest.raises(ResourceExhausted, match="2 calls") as caught:
        gate.enter()
    assert caught.value.retry_after_s == pytest.approx(2.0, rel=1e-3)
    gate.leave(2.0)
    gate.enter()
    assert gate.calls == 2


async def test_a_closed_gate_is_idle_once_the_last_call_has_left() -> None:
    gate = CallGate(max_calls=2)
    gate.enter()
    gate.close("the server is draining")
    with pytest.raises(Unavailable, match="draining"):
        gate.enter()
    idle = asyncio.create_task(gate.wait_idle())
    await asyncio.sleep(0)
    assert not idle.done()
    gate.leave(0.1)
    await asyncio.wait_for(idle, 1)
