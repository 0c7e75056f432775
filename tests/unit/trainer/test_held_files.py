"""Files that replicas may serve from are known without asking, and never forgotten too early."""

from __future__ import annotations

from ppod import FailedPrecondition, PermissionDenied, Unavailable
from ppod.client import ModelState, WeightStatus
from ppod_trainer.held_files import HeldFiles


def test_two_files_are_held_in_turns() -> None:
    held = HeldFiles()
    assert held.uris() == set()
    held.pushed("one", {"a": None})
    assert held.uris() == {"one"}
    held.committed("a")
    held.pushed("two", {"a": None})
    assert held.uris() == {"one", "two"}
    held.committed("a")
    assert held.uris() == {"two"}


def test_a_commit_that_failed_frees_nothing_until_the_replica_tells() -> None:
    held = HeldFiles()
    held.pushed("one", {"a": None})
    held.committed("a")
    held.pushed("two", {"a": None})
    held.pushed("three", {"a": FailedPrecondition("weight_version", "2", "less than 1")})
    assert held.uris() == {"one", "two"}
    held.told("a", WeightStatus(ModelState("policy", 2, ""), None, 2, ("two",)))
    assert held.uris() == {"two"}


def test_what_a_silent_replica_may_have_taken_is_kept_and_does_not_grow() -> None:
    held = HeldFiles()
    held.pushed("one", {"a": None, "b": None})
    held.committed("a")
    held.committed("b")
    for number in range(5):
        held.pushed(f"file {number}", {"a": None, "b": Unavailable("gone")})
        held.committed("a")
    assert held.uris() == {"one", "file 0", "file 4"}


def test_an_adapter_leaves_the_base_in_its_file() -> None:
    held = HeldFiles()
    held.pushed("one", {"a": None})
    held.committed("a")
    # It came in chunks, without a file.
    held.committed("a")
    assert held.uris() == {"one"}


def test_pushes_that_fail_elsewhere_take_no_file_each() -> None:
    held = HeldFiles()
    held.pushed("one", {"a": None})
    held.committed("a")
    for number in range(5):
        # What it prepared before makes way for what it prepares now, and is never committed.
        held.pushed(f"file {number}", {"a": None, "b": PermissionDenied("outside")})
    assert held.uris() == {"one", "file 4"}
    held.committed("a")
    assert held.uris() == {"file 4"}


def test_what_may_have_been_committed_is_held_until_a_later_commit() -> None:
    held = HeldFiles()
    held.pushed("one", {"a": None})
    held.committed("a")
    held.pushed("two", {"a": None})
    held.may_have_committed("a")
    held.pushed("three", {"a": None})
    held.pushed("four", {"a": None})
    assert held.uris() == {"one", "two", "four"}
    held.committed("a")
    assert held.uris() == {"four"}


def test_an_adapter_tells_nothing_of_a_base_whose_commit_nobody_heard_of() -> None:
    held = HeldFiles()
    held.pushed("one", {"a": None})
    held.committed("a")
    held.pushed("two", {"a": None})
    held.may_have_committed("a")
    held.committed("a")
    assert held.uris() == {"one", "two"}
