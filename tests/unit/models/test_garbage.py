import gc
import weakref
from collections.abc import Generator

import pytest

from ppod_models.garbage import uncollected_start


class Cycle:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def unfrozen() -> Generator[None]:
    yield
    gc.unfreeze()


def test_nothing_is_collected_until_the_start_is_over() -> None:
    with uncollected_start() as started:
        assert not gc.isenabled()
        lost = weakref.ref(Cycle())
        assert lost() is not None
        started()
        assert gc.isenabled()
        assert lost() is None, "garbage of the start would stay for good"


def test_what_came_at_the_start_is_not_looked_at_again() -> None:
    with uncollected_start():
        kept = Cycle()
    assert not any(one is kept for one in gc.get_objects())
    later = Cycle()
    assert any(one is later for one in gc.get_objects())


def test_a_failed_start_ends_it_too() -> None:
    with pytest.raises(OSError, match="no model"), uncollected_start():
        raise OSError("no model")
    assert gc.isenabled()


def test_what_came_after_the_start_is_collected_as_ever() -> None:
    with uncollected_start() as started:
        started()
        frozen = gc.get_freeze_count()
        lost = weakref.ref(Cycle())
        gc.collect()
        assert lost() is None
    assert gc.get_freeze_count() <= frozen, "the start ends once"


def test_garbage_of_calls_is_not_kept_until_it_is_a_quarter_of_what_the_start_left() -> None:
    with uncollected_start():
        kept: list[list[object]] = [[] for _ in range(600_000)]
    full = gc.get_stats()[2]["collections"]
    # As much as makes ten collections of the middle generation, after which all are looked at.
    kept += [[] for _ in range(100_000)]
    assert gc.get_stats()[2]["collections"] > full
