"""What an engine must offer for new weights to reach it. Free of torch: a servicer may import it before the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ppod_services.core.weight_manifest import IncomingManifest, IncomingTensor, LoraAdapter

if TYPE_CHECKING:
    import torch

    from ppod.weight_changes import Bytes

Install = Callable[[], None]
"""Puts staged weights into service. Called once at most, while no decoding step runs; when it raises, what served
before must serve on."""


class Hold(Protocol):
    """Keeps a shared file from being written to."""

    @property
    def uri(self) -> str:
        """The file."""
        ...

    def release(self) -> None:
        """The file may be written to."""
        ...


@dataclass(frozen=True, slots=True)
class Buffer:
    """A contiguous CPU tensor that is received into, and its bytes.

    Those of a file are made once. Each operation of torch lets go of the interpreter: for hundreds of tensors, where
    several threads want it, that would take as long as their checksums.
    """

    tensor: torch.Tensor
    data: Bytes


@dataclass(frozen=True, slots=True)
class FileMemory:
    """Tensors in a shared file's own memory, and what keeps others from writing to it."""

    buffers: Sequence[Buffer]
    hold: Hold


@dataclass(frozen=True, slots=True)
class ReceivedWeights:
    """One version, whole: every tensor has the bytes that its manifest's checksum was made of.

    Attributes:
        weight_version: what these weights will be.
        tensors: contiguous CPU tensors in the data types that travelled, by the names of `WeightStore.shapes`.
        adapter: with it the tensors are that adapter's alone, and the base's stay as they are.
        borrowed: the memory is a shared file's: it may serve for as long as this version does where the store
            `borrows`, else until it is installed; it is never written to.
    """

    weight_version: int
    tensors: Mapping[str, torch.Tensor]
    adapter: LoraAdapter | None = None
    borrowed: bool = False


class GroupReceiver(Protocol):
    """Processes of an engine that are ranks of a group themselves, so that the bytes reach their devices directly."""

    @property
    def ranks(self) -> int:
        """How many they are."""
        ...

    def receive(self, manifest: IncomingManifest, timeout_s: float) -> None:
        """Have them receive and verify the version that `manifest.collective` brings, and wait until they have it.

        It goes into the buffers of the last `allocate`, too. The `stage` that follows is this version's.

        Args:
            manifest: what comes; no adapter.
            timeout_s: longest silence of the sender.

        Raises:
            GroupError: the group broke. InvalidArgument: a checksum differs. FailedPrecondition: it does not fit.
        """
        ...


class WeightStore(Protocol):
    """The weights of one engine. `ServedWeights` puts versions, checks and transfers around it."""

    @property
    def group_receiver(self) -> GroupReceiver | None:
        """Who receives a group's broadcasts in this process's place; None: this process does."""
        ...

    @property
    def borrows(self) -> bool:
        """Whether it can serve from a file's memory. Else files are read into the buffers of `allocate`."""
        ...

    def shapes(self, adapter: LoraAdapter | None) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of all tensors that a transfer must bring, no more and no less.

        Args:
            adapter: the adapter whose tensors come; None: all weights of the model.

        Raises:
            InvalidArgument: this engine takes no such adapter. FailedPrecondition: it takes no weights.
        """
        ...

    def allocate(self, tensors: Sequence[IncomingTensor]) -> Sequence[torch.Tensor]:
        """Contiguous CPU buffers of these shapes and data types, to receive into; what they hold does not matter.

        Must be quick: it runs in the event loop. Buffers of a transfer that fails are dropped.
        """
        ...

    def image(self, name: str, dtype: str) -> torch.Tensor | None:
        """The serving base's tensor as it once arrived in `dtype`, exact to the bit; None where that is not kept.

        Changes against a base version are applied to a copy of it. Without it such transfers are refused.
        """
        ...

    def stage(self, received: ReceivedWeights) -> Install:
        """Do all that can be done while the old weights serve (conversion, merging); may be slow; in a thread."""
        ...
