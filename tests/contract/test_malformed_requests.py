"""A short run of the fuzzer: 2,000 malformed requests; tests/benchmarks/fuzz has the long one."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from benchmarks.fuzz.attacks import attack
from benchmarks.fuzz.malformed import Fuzzer, start_services


def test_attacks_are_repeatable() -> None:
    assert [attack(3, number) for number in range(100)] == [attack(3, number) for number in range(100)]


def test_malformed_requests_get_typed_errors_and_disturb_nobody(tmp_path: Path) -> None:
    with ExitStack() as stack:
        reward, reference = start_services(stack, tmp_path)
        report = Fuzzer(reward, reference, seed=1).run(2_000, warm_up=500)
    assert report.violations == [], "\n".join(report.violations[:10])
    assert report.good_requests > 100
    found = {code for _, code in report.codes}
    assert {"INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "UNIMPLEMENTED"} <= found, report.table()
