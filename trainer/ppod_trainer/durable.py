"""Files that are there whole or not at all, whenever the process is killed or the machine loses its power."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

_WRITING = ".writing-"
_REPLACED = ".replaced-"


def write_durably(path: Path, text: str) -> None:
    """Write a text file in UTF-8, in the place of the one that is there."""
    aside = path.with_name(f"{_WRITING}{path.name}")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    _sync(path.parent)


def aside_of(target: Path) -> Path:
    """Where a directory is written before it is put in its place."""
    return target.with_name(f"{_WRITING}{target.name}")


def new_aside(target: Path) -> Path:
    """Make the directory that is to be put in this place, empty."""
    aside = aside_of(target)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def put_in_place(target: Path) -> None:
    """Put what was written aside in the place of what is there; after a crash one of them is."""
    aside = aside_of(target)
    for path in (*aside.rglob("*"), aside):
        _sync(path)
    _restore(target)
    replaced = target.with_name(f"{_REPLACED}{target.name}")
    if target.is_dir():
        target.rename(replaced)
    aside.rename(target)
    _sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def written_aside(target: Path) -> Generator[Path]:
    """A new directory to write to, which is `target` once the block is done."""
    yield new_aside(target)
    put_in_place(target)


def tidy(directory: Path) -> None:
    """Finish what a process that was killed left half done here; no other may be writing."""
    for path in directory.glob(f"{_WRITING}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in directory.glob(f"{_REPLACED}*"):
        _restore(directory / path.name.removeprefix(_REPLACED))


def _restore(target: Path) -> None:
    replaced = target.with_name(f"{_REPLACED}{target.name}")
    if not replaced.is_dir():
        return
    if target.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
