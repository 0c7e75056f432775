"""What ppod adds to vLLM's workers; vLLM mixes the class into its own, in each worker process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ppod_services.generation.vllm_backend.observed_sampler import HasSampler, observe_sampler
from ppod_services.generation.vllm_backend.reload import form_of, load_pushed, reload_weights
from ppod_services.generation.vllm_backend.room import largest_layer_bytes
from ppod_services.generation.vllm_backend.segments import unname_shared_memory
from ppod_services.generation.vllm_backend.settings import TRANSFER_ENGINE
from ppod_services.generation.vllm_backend.staging import (
    Copies,
    Stage,
    TensorAt,
    read_segment,
)
from ppod_services.generation.vllm_backend.standby import standby_of
from ppod_services.generation.vllm_backend.watch import end_with_service
from ppod_services.generation.vllm_backend.worker_calls import failure_of

if TYPE_CHECKING:
    from ppod_services.generation.vllm_backend.receiver import Outcome
    from ppod_services.generation.vllm_backend.transfer_engine import StagedTransferEngine


class _ModelRunner(HasSampler, Protocol):
    def get_model(self) -> nn.Module: ...


class PpodWorker:
    """Methods that the service calls in all workers together; see `worker_calls`."""

    device: torch.device
    model_runner: _ModelRunner
    vllm_config: Any
    stage: Stage | None = None
    loads_beside = False
    """Whether what waits is loaded already."""
    weight_transfer_engine: StagedTransferEngine

    def ppod_tell_both_logprobs(self) -> bool:
        """Have the sampler put each token's unscaled logprob where its likeliest alternative's would stand.

        vLLM tells one kind of logprobs for the whole engine. Returns whether this sampler lets itself be observed.
        """
        return observe_sampler(self.model_runner)

    def ppod_unname_shared_memory(self) -> None:
        """Have what the workers share go when they do, whatever way that is."""
        unname_shared_memory()

    def ppod_stage_weights(self, path: str, tensors: Sequence[TensorAt], weight_version: int) -> None:
        """Begin to bring a segment's weights to this worker's device, beside serving."""
        self._stage(tensors).begin(path, tensors, weight_version)

    def ppod_stage_received(self, tensors: Sequence[TensorAt], weight_version: int) -> None:
        """Begin to bring what the transfer engine has received to where it waits, if that is another form of it."""
        stage, engine = self._stage(tensors), self.weight_transfer_engine
        if self.loads_beside:
            engine.install = stage.install
            stage.begin_with(engine.receiver.take, tensors, weight_version)
        else:
            # What waits there is of another push, which was given up, and may have the same number.
            stage.drop()

    def ppod_staged(self) -> bool:
        """Whether that has ended."""
        return self.stage is None or self.stage.done

    def ppod_keep_staged(self, weight_version: int) -> None:
        """Forget what the transfer engine has received, if it is loaded beside what serves."""
        if self.stage is not None and self.stage.holds(weight_version):
            self.weight_transfer_engine.receiver.drop()

    def ppod_load_weights(self, path: str, tensors: Sequence[TensorAt], weight_version: int) -> str | None:
        """Load all weights, staged or from their segment, in the layout and precision of this worker."""
        return failure_of(lambda: self._load(path, tensors, weight_version))

    def _load(self, path: str, tensors: Sequence[TensorAt], weight_version: int) -> None:
        # A step may still be under way on the device.
        self._synchronize()
        if self.stage is None or not self.stage.install(weight_version):
            if self.stage is not None:
                self.stage.drop()
            load_pushed(self.vllm_config, self.model_runner.get_model(), read_segment(path, tensors))
        # The next version is brought to where this one was read.
        self._synchronize()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _stage(self, tensors: Sequence[TensorAt]) -> Stage:
        if self.stage is None:
            config, model = self.vllm_config, self.model_runner.get_model()
            standby = standby_of(model, self.device, form_of(config), tensors)
            self.loads_beside = standby is not None
            waiting = standby or Copies(self.device, lambda weights: load_pushed(config, model, weights))
            self.stage = Stage(self.device, waiting, self._spared_bytes())
        return self.stage

    def ppod_load_checkpoint(self) -> str | None:
        """Load the weights again that the engine started with."""
        return failure_of(self._load_checkpoint)

    def _load_checkpoint(self) -> None:
        from vllm.model_executor.model_loader import get_model_loader  # pyright: ignore  # noqa: PLC0415

        if self.stage is not None:
            self.stage.drop()
        config, model = self.vllm_config, self.model_runner.get_model()
        loader = get_model_loader(config.load_config)
        # Layers that cannot be loaded again have what they started with no more, once a version was loaded beside.
        first = not (self.loads_beside and self.stage is not None and self.stage.installed)
        reload_weights(config, model, loader.get_all_weights(config.model_config, model), first=first)

    def ppod_received(self) -> Outcome | None:
        """What became of the version that the transfer engine receives; see `WorkerReceiver.outcome`."""
        return self.weight_transfer_engine.receiver.outcome()

    def ppod_finished(self) -> str | None:
        """What went wrong as vLLM's finish_weight_update loaded what was received."""
        return self.weight_transfer_engine.failure

    def ppod_drop_received(self) -> None:
        """Give up an update: vLLM has no way to end one that is not finished."""
        receiver = self.weight_transfer_engine.receiver
        receiver.drop()
        receiver.spared_bytes = self._spared_bytes()
        self._weight_update_active = False

    def _spared_bytes(self) -> int:
        """What the engine takes of its device for moments: a step's activations, or a layer that is loaded."""
        # Where kv_cache_gib says what the KV cache takes, vLLM does not measure these, and tells so by not having them.
        activations: int = getattr(self, "peak_activation_memory", 0)
        return max(activations, largest_layer_bytes(self.model_runner.get_model()))


def _offer_transfer_engine() -> None:
    from vllm.distributed.weight_transfer.factory import (  # pyright: ignore  # noqa: PLC0415
        WeightTransferEngineFactory,
    )

    module = "ppod_services.generation.vllm_backend.transfer_engine"
    WeightTransferEngineFactory.register_engine(TRANSFER_ENGINE, module, "StagedTransferEngine")


# vLLM imports this module in its workers, before they load anything, and nobody else does.
end_with_service()
_offer_transfer_engine()
