"""The weights of a torch module, replaced as one. Knows neither versions nor gRPC."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ppod_models.loading import DTYPES
from ppod_services.core.arena import Arena
from ppod_services.core.lora import adapter_shapes, merge_layer
from ppod_services.core.side_stream import SideStream
from ppod_services.core.weight_manifest import IncomingTensor, LoraAdapter
from ppod_services.core.weight_store import Install, ReceivedWeights


class ModelWeights:
    """A `WeightStore` for a model in this process.

    Names are those of `model.named_parameters()`: a tied parameter has one name, that of its first owner.

    New tensors take the parameters' places, without a copy while nobody can decode, and the tensors that they replace
    are written to next time: memory that was never touched costs a page fault every 4 KiB. So another device than the
    CPU holds two versions; where it has no room for a tensor of the second one, that tensor is copied into its
    parameter while nobody can decode.

    An adapter is merged into copies of the layers that it changes. The base's own tensors stay as they came, so that
    the next adapter, or changes against the base, find no trace of the one before.
    """

    group_receiver = None

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters())
        self._shapes = {name: tuple(parameter.shape) for name, parameter in self._parameters.items()}
        self._device = next(iter(self._parameters.values())).device
        self._linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} & {
            name.removesuffix(".weight") for name in self._parameters if name.endswith(".weight")
        }
        self._covered: dict[str, torch.Tensor] = {}  # the base's tensors, where merged ones serve
        # The next adapter may be staged while one is installed: both look for the base.
        self._covering = threading.Lock()
        self._spare: dict[str, torch.Tensor] = {}
        self._side = SideStream(self._device)
        self._arena: Arena | None = None  # what is received into on its way to a device
        # Whose memory is a file's: a sender's, or at first the checkpoint's. Written to there, every 4 KiB would cost a
        # page fault and a copy: the second push of SmolLM2 took 3 s.
        self._borrowed = set(self._parameters) if self.borrows else set[str]()

    @property
    def borrows(self) -> bool:
        """See `WeightStore`."""
        return self._device.type == "cpu"

    def shapes(self, adapter: LoraAdapter | None) -> Mapping[str, tuple[int, ...]]:
        """See `WeightStore`."""
        if adapter is None:
            return self._shapes
        return adapter_shapes(adapter, self._shapes, self._linear)

    def allocate(self, tensors: Sequence[IncomingTensor]) -> Sequence[torch.Tensor]:
        """See `WeightStore`."""
        if self._arena is not None and (found := self._arena.tensors(tensors)) is not None:
            return found
        if self._device.type != "cpu":
            return [torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype]) for tensor in tensors]
        return [self._buffer(tensor.name, tensor.shape, DTYPES[tensor.dtype]) for tensor in tensors]

    def image(self, name: str, dtype: str) -> torch.Tensor | None:
        """See `WeightStore`: what a wider type holds is narrowed to the bits that came."""
        base = self._base(name)
        wire = DTYPES[dtype]
        return base.to(wire).cpu() if base.dtype in (wire, torch.float32) else None

    @torch.no_grad()
    def stage(self, received: ReceivedWeights) -> Install:
        """See `WeightStore`."""
        if received.adapter is not None:
            return self._stage_adapter(received.adapter, received.tensors)
        ready = {name: self._place(name, tensor) for name, tensor in received.tensors.items()}
        kept = {name for name, tensor in received.tensors.items() if ready[name] is tensor}
        with self._side.working():
            for name, tensor in received.tensors.items():
                if name not in kept:
                    # In two steps where the data type changes: torch would convert on the CPU. The end waits for both.
                    dtype = ready[name].dtype
                    moved = tensor if tensor.dtype == dtype else tensor.to(self._device, non_blocking=True)
                    ready[name].copy_(moved, non_blocking=True)
        if self._device.type == "cuda":
            self._make_room(received.tensors, kept=bool(kept))
        borrowed = kept if received.borrowed else set[str]()

        @torch.no_grad()
        def install() -> None:
            with self._covering:
                self._uncover()
                for name, tensor in ready.items():
                    self._replace(self._parameters[name], name, tensor)
                self._borrowed = borrowed

        return install

    def _stage_adapter(self, adapter: LoraAdapter, tensors: Mapping[str, torch.Tensor]) -> Install:
        merged: dict[str, torch.Tensor] = {}
        for layer in adapter.target_modules:
            name = f"{layer}.weight"
            merged[name] = merge_layer(self._base(name), adapter, tensors, layer)

        @torch.no_grad()
        def install() -> None:
            with self._covering:
                self._uncover()
                for name, tensor in merged.items():
                    self._covered[name] = self._parameters[name].data
                    self._parameters[name].data = tensor

        return install

    def _base(self, name: str) -> torch.Tensor:
        """The base's tensor, whether or not a merged one serves in its place."""
        with self._covering:
            return self._covered[name] if name in self._covered else self._parameters[name].data

    def _uncover(self) -> None:
        """Put the base's own tensors back."""
        for name, tensor in self._covered.items():
            self._parameters[name].data = tensor
        self._covered.clear()

    def _place(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Where the tensor is to wait: as its parameter will hold it, or as it is where there is no room for that."""
        dtype = self._parameters[name].dtype
        if (tensor.device, tensor.dtype) == (self._device, dtype):
            return tensor
        try:
            return self._buffer(name, tuple(tensor.shape), dtype)
        except torch.OutOfMemoryError:
            return tensor

    def _make_room(self, tensors: Mapping[str, torch.Tensor], *, kept: bool) -> None:
        """Have page-locked memory for the next version, which takes seconds the first time; not what is kept."""
        needed = Arena.size_of(tensors.values())
        if kept:
            self._arena = None
        elif self._arena is None or self._arena.nbytes < needed:
            self._arena = None
            self._arena = Arena(needed, self._device)

    def _replace(self, parameter: nn.Parameter, name: str, tensor: torch.Tensor) -> None:
        if tensor.device != self._device:
            parameter.copy_(tensor)
            return
        if name not in self._borrowed and parameter.data.is_contiguous():
            self._spare[name] = parameter.data
        parameter.data = tensor

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        spare = self._spare.get(name)
        if spare is not None and spare.dtype == dtype:
            return self._spare.pop(name)
        return torch.empty(shape, dtype=dtype, device=self._device)
