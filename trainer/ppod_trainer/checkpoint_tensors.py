"""The tensors of a checkpoint: weights and optimizer state, each rank's share of them in a safetensors file of its own.

Names are `policy/PARAMETER` and `optimizer/PARAMETER/KEY`.
"""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch
import xxhash
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ppod_trainer.errors import CheckpointError
from ppod_trainer.learner import Learner
from ppod_trainer.ranks import Ranks

Files = dict[str, list[int | str]]
"""Of each file its bytes and xxh3-128 digest."""

_CHUNK_BYTES = 1 << 24


def write_tensors(directory: Path, learner: Learner) -> None:
    """Write and sync this rank's share. All ranks call it. Raises CheckpointError: a rank could not."""
    parameters = _trained(learner)
    tensors = {f"policy/{name}": parameter.detach() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        for key, value in learner.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{key}"] = value
    writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
    with _faults_of(f"checkpoint: {directory} cannot be written"):
        save(tensors, storage_writer=writer, no_dist=learner.ranks.mesh is None)


def read_tensors(directory: Path, learner: Learner) -> None:
    """Read what this rank holds, whichever ranks wrote it. All ranks call it.

    Raises:
        CheckpointError: the tensors are not those of this policy, or cannot be read.
    """
    reader = HuggingFaceStorageReader(str(directory))
    with _faults_of(f"resume: {directory} cannot be read"):
        found = reader.read_metadata().state_dict_metadata
    parameters = _trained(learner)
    tensors: dict[str, torch.Tensor] = {f"policy/{name}": one.detach() for name, one in parameters.items()}
    _check_same(tensors, {name: one for name, one in found.items() if name.startswith("policy/")})
    learner.optimizer.state.clear()
    for full_name, stored in found.items():
        if full_name.startswith("optimizer/") and isinstance(stored, TensorStorageMetadata):
            name, _, key = full_name.removeprefix("optimizer/").rpartition("/")
            parameter = parameters[name]
            tensors[full_name] = _like(parameter, stored)
            learner.optimizer.state[parameter][key] = tensors[full_name]
    with _faults_of(f"resume: {directory} cannot be read"):
        load(tensors, storage_reader=reader, no_dist=learner.ranks.mesh is None)


def describe_files(directory: Path, ranks: Ranks) -> Files:
    """Sizes and digests of all ranks' files; each rank reads its own."""
    mine = {path.name: [path.stat().st_size, _digest(path)] for path in directory.glob(_pattern(ranks.rank))}
    return {name: described for one in ranks.collect(mine) for name, described in one.items()}


def check_files(directory: Path, files: Files, ranks: Ranks) -> None:
    """Read every `size`th file and compare. Raises ValueError, or OSError: one is not what it was."""
    for number, (name, (size, digest)) in enumerate(sorted(files.items())):
        path = directory / name
        if path.stat().st_size != size:
            raise ValueError(f"{name} has {path.stat().st_size} bytes, {size} were written")
        if number % ranks.size == ranks.rank and _digest(path) != digest:
            raise ValueError(f"{name} is damaged: its digest is not the one of what was written")


def _trained(learner: Learner) -> dict[str, torch.nn.Parameter]:
    """What learning changes: what an adapter is on comes from the model's source again."""
    return {name: one for name, one in learner.policy.named_parameters() if one.requires_grad}


def _like(parameter: torch.Tensor, stored: TensorStorageMetadata) -> torch.Tensor:
    """Room for a part of the optimizer's state: divided as its parameter is, or one number."""
    dtype = stored.properties.dtype
    if stored.size == parameter.shape:
        return torch.empty_like(parameter.detach(), dtype=dtype)
    return torch.empty(stored.size, dtype=dtype, device=parameter.device)


def _check_same(tensors: dict[str, torch.Tensor], found: dict[str, object]) -> None:
    different = sorted(tensors.keys() ^ found.keys())
    for name, tensor in tensors.items():
        stored = found.get(name)
        if isinstance(stored, TensorStorageMetadata) and stored.size != tensor.shape:
            different.append(f"{name}: {list(stored.size)}, the policy's is {list(tensor.shape)}")
    if different:
        raise CheckpointError(f"resume: the checkpoint's tensors are not the policy's; first difference {different[0]}")


def _pattern(rank: int) -> str:
    """How torch.distributed.checkpoint names a rank's files."""
    return f"shard-{rank + 1:05d}-*.safetensors"


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _faults_of(what: str) -> Generator[None]:
    """Type the errors of torch.distributed.checkpoint."""
    with warnings.catch_warnings():
        # One process is what is meant where there is one.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            raise CheckpointError(f"{what}: {next(iter(error.failures.values()))[0]}") from error
        except OSError as error:
            raise CheckpointError(f"{what}: {error}") from error
