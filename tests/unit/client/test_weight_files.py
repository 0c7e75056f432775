"""Images of weights and the files that a sender shares; trees of relays."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load_file

from ppod import ResourceExhausted
from ppod.client import (
    RelayHop,
    SharedDirectory,
    TensorDtype,
    TensorLayout,
    WeightPush,
    WireImage,
    relay_tree,
    with_checksums,
)
from ppod.client.weight_calls import messages
from ppod.v1 import weights_pb2
from ppod.weight_changes import Bytes, TensorEncoding
from support.processes import environment

LAYOUT = (
    TensorLayout("a", TensorDtype.FLOAT32, (3, 5)),
    TensorLayout("empty", TensorDtype.FLOAT32, (0, 4)),
    TensorLayout("b", TensorDtype.FLOAT32, (300_000,)),
)
VALUES = [np.arange(15, dtype=np.float32), np.empty(0, np.float32), np.arange(300_000, dtype=np.float32)]


BLOCK = 400_000


def write_values(index: int, memory: Bytes) -> Iterator[Bytes]:
    """In three blocks at most, the last one shorter."""
    data = VALUES[index].tobytes()
    for begin in range(0, len(data), BLOCK):
        block = memory[begin : begin + BLOCK]
        block[:] = np.frombuffer(data[begin : begin + BLOCK], np.uint8)
        yield block


def test_an_image_is_filled_block_by_block_with_its_checksums() -> None:
    image = WireImage(LAYOUT)
    image.fill(write_values)
    for tensor, value in zip(image.tensors(), VALUES, strict=True):
        assert bytes(tensor.data) == value.tobytes()
        assert tensor.xxh3 == xxhash.xxh3_64_intdigest(value.tobytes())
    copied = WireImage(LAYOUT)
    copied.copy_from(image)
    assert [bytes(tensor.data) for tensor in copied.tensors()] == [value.tobytes() for value in VALUES]


def test_tensors_of_an_image_are_pushed_while_the_next_are_written() -> None:
    image, first_was_read = WireImage(LAYOUT), threading.Event()

    def write(index: int, memory: Bytes) -> Iterator[Bytes]:
        if index:
            assert first_was_read.wait(20)
        yield from write_values(index, memory)

    with image.filling(write) as tensors:
        push = WeightPush(1, tensors)
        stream = messages(push)
        manifest = weights_pb2.PrepareWeightsRequest.FromString(next(stream)).manifest
        assert manifest.checksums_follow
        assert tensors[0].arriving is not None
        assert tensors[0].arriving() == xxhash.xxh3_64_intdigest(VALUES[0].tobytes())
        first_was_read.set()
        *chunks, last = [weights_pb2.PrepareWeightsRequest.FromString(one) for one in stream]
    assert b"".join(one.chunk for one in chunks) == b"".join(value.tobytes() for value in VALUES)
    assert list(last.checksums.xxh3) == [xxhash.xxh3_64_intdigest(value.tobytes()) for value in VALUES]
    again = with_checksums(tensors)
    assert [one.xxh3 for one in again] == list(last.checksums.xxh3)
    assert not any(one.arriving for one in again)


def test_what_cannot_be_written_fails_the_push_and_the_context() -> None:
    def write(index: int, memory: Bytes) -> Iterator[Bytes]:
        if index == 1:
            raise OSError("gone")
        yield from write_values(index, memory)

    with pytest.raises(OSError, match="gone"), WireImage(LAYOUT).filling(write) as tensors:  # noqa: PT012
        with pytest.raises(OSError, match="gone"):
            list(messages(WeightPush(1, tensors)))
        assert bytes(tensors[0].data) == VALUES[0].tobytes()


def test_changes_of_an_image_carry_the_checksum_of_the_whole() -> None:
    base, new = WireImage(LAYOUT), WireImage(LAYOUT)
    base.fill(write_values)

    def write_changed(index: int, memory: Bytes) -> Iterator[Bytes]:
        for number, block in enumerate(write_values(index, memory)):
            if index == 2 and number == 0:
                np.frombuffer(block, np.float32)[1000] = -1.0
            yield block

    new.fill(write_changed)
    unchanged, empty, changed = new.changes(base)
    assert (len(unchanged.data), len(empty.data)) == (0, 0)
    assert changed.encoding is TensorEncoding.GAPS
    # Its length, three fillers of 255, the rest of the gap, and one float32.
    assert len(changed.data) == 4 + 4 + 4
    assert changed.xxh3 == new.tensors()[2].xxh3


def test_a_segment_is_a_safetensors_file_and_is_not_reused_while_it_is_held(tmp_path: Path) -> None:
    with SharedDirectory(tmp_path) as directory:
        first = directory.segment(LAYOUT, ())
        first.image.fill(write_values)
        directory.publish(first)
        loaded = load_file(first.path)
        assert {name: value.shape for name, value in loaded.items()} == {"a": (3, 5), "empty": (0, 4), "b": (300_000,)}
        np.testing.assert_array_equal(loaded["b"], VALUES[2])
        assert directory.segment(LAYOUT, ()) is first
        second = directory.segment(LAYOUT, {first.uri})
        assert second.path != first.path
        assert directory.segment(LAYOUT, {second.uri}) is first
        assert first.uri.startswith("file:///")
    assert list(tmp_path.iterdir()) == []


def test_a_segment_whose_file_was_removed_is_not_written_to_again(tmp_path: Path) -> None:
    with SharedDirectory(tmp_path) as directory:
        first = directory.segment(LAYOUT, ())
        first.path.unlink()
        second = directory.segment(LAYOUT, ())
        second.image.fill(write_values)
        directory.publish(second)
        np.testing.assert_array_equal(load_file(second.path)["b"], VALUES[2])


def test_files_of_another_layout_are_removed_once_nobody_holds_them(tmp_path: Path) -> None:
    """As of a run in another data type: they take as much memory as a model."""
    narrow = (TensorLayout("a", TensorDtype.BFLOAT16, (3, 5)),)
    with SharedDirectory(tmp_path) as directory:
        free, told = directory.segment(LAYOUT, ()), directory.segment(narrow, ())
        assert not free.path.exists()
        with told.path.open() as opened:
            fcntl.flock(opened, fcntl.LOCK_SH)
            wide = directory.segment(LAYOUT, ())
            assert told.path.exists()
        directory.segment(narrow, {told.uri, wide.uri})
        assert told.path.exists()
        assert wide.path.exists()
        assert directory.segment(LAYOUT, ()) is wide
        assert told.path.exists(), "no file had to be made"


def test_encoded_tensors_are_bytes_in_their_file(tmp_path: Path) -> None:
    base, new = WireImage(LAYOUT), WireImage(LAYOUT)
    base.fill(write_values)

    def write_ones(_: int, memory: Bytes) -> Iterator[Bytes]:
        np.frombuffer(memory, np.float32).fill(1.0)
        yield memory

    new.fill(write_ones)
    tensors = new.changes(base)
    with SharedDirectory(tmp_path) as directory:
        path = directory.write(tensors)
        loaded = load_file(path)
        assert [loaded[tensor.name].tobytes() for tensor in tensors] == [bytes(tensor.data) for tensor in tensors]
        directory.remove(path)
        assert not path.exists()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_directory_is_an_error_and_no_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def full(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with SharedDirectory(tmp_path) as directory, pytest.raises(ResourceExhausted, match="no room for 1204"):
        directory.segment(LAYOUT, ())
    assert list(tmp_path.iterdir()) == []


def test_what_a_sender_left_that_was_killed_while_it_began_is_removed(tmp_path: Path) -> None:
    for name in (".ppod-weights-1", ".ppod-weights-2"):
        (tmp_path / name).mkdir()
    (tmp_path / ".ppod-weights-2" / "lock").touch()
    with SharedDirectory(tmp_path):
        assert not list(tmp_path.glob(".*"))


def test_senders_that_begin_at_once_take_nothing_from_each_other(tmp_path: Path) -> None:
    """A folder that one is making looks like what a dead one left."""

    def begin_and_end(_: int) -> None:
        for _ in range(100):
            with SharedDirectory(tmp_path) as mine:
                mine.remove(mine.write([]))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(begin_and_end, range(4)))
    assert not list(tmp_path.iterdir())


def test_files_of_a_killed_sender_are_removed_those_of_a_living_one_are_not(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from ppod.client import SharedDirectory\n"
        "directory = SharedDirectory(pathlib.Path(sys.argv[1]))\n"
        "print('up', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=environment(), stdout=subprocess.PIPE, text=True
    ) as sender:
        assert sender.stdout is not None
        assert sender.stdout.readline() == "up\n"
        with SharedDirectory(tmp_path) as beside:
            assert beside.stale == 0
            assert len(list(tmp_path.iterdir())) == 2
        sender.send_signal(signal.SIGKILL)
        sender.wait(10)
    with SharedDirectory(tmp_path) as after:
        assert after.stale == 1
        assert len(list(tmp_path.iterdir())) == 1


def test_on_file_systems_without_locks_files_are_shared_and_none_is_taken_for_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with SharedDirectory(tmp_path) as first:
        segment = first.segment(LAYOUT, ())
        with SharedDirectory(tmp_path) as second:
            assert second.stale == 0
            assert segment.path.is_file()
        assert first.segment(LAYOUT, ()) is segment
        assert first.segment(LAYOUT, {segment.uri}) is not segment
    assert list(tmp_path.iterdir()) == []


def test_relay_trees_by_hand() -> None:
    chain = RelayHop("a", (RelayHop("b", (RelayHop("c"),)),))
    assert relay_tree([["a"], ["b"], ["c"]], 1) == chain
    behind_b = (RelayHop("d"), RelayHop("e"))
    five = [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert relay_tree(five, 2) == RelayHop("a", (RelayHop("b", behind_b), RelayHop("c")))
    assert relay_tree([["a"]], 3) == RelayHop("a")
    b, d = (RelayHop(target, shares_directory=True) for target in "bd")
    assert relay_tree([["a", "b"], ["c", "d"]], 1) == RelayHop("a", (RelayHop("c", (d,)), b))


@pytest.mark.skipif(
    os.cpu_count() == 1,
    reason="a thread for each core: with one core there is one writer, and this runs wherever there are more",
)
def test_several_tensors_are_filled_at_once() -> None:
    """Each of two writers waits for the other: one after the other they would wait for ever."""
    both = threading.Barrier(2, timeout=20)
    layout = [TensorLayout(name, TensorDtype.BFLOAT16, (4,)) for name in "ab"]

    def write(_: int, memory: Bytes) -> Iterator[Bytes]:
        both.wait()
        yield memory

    WireImage(layout).fill(write)
    assert not both.broken
