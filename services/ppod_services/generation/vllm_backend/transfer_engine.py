"""ppod's engine for vLLM's weight-transfer API: what it receives waits on the device until the update is finished.

vLLM's own engines write into the model that serves, so that an update that breaks leaves a mixture. This one returns
from `update_weights` at once and receives beside serving, as vLLM allows with `defers_processing`;
`finish_weight_update` loads what came. It lives in vLLM's workers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine  # pyright: ignore[reportMissingImports]

from ppod_services.generation.vllm_backend.receiver import GroupInfo, VersionInfo, WorkerReceiver
from ppod_services.generation.vllm_backend.reload import load_pushed
from ppod_services.generation.vllm_backend.worker_calls import failure_of


class StagedTransferEngine(WeightTransferEngine):  # pyright: ignore[reportUntypedBaseClass]
    """Receives by a group's broadcasts, like vLLM's for NCCL, but whole and verified before anything is changed.

    init_weight_transfer_engine takes a `GroupInfo`, update_weights one `VersionInfo` an update.
    """

    init_info_cls = GroupInfo
    update_info_cls = VersionInfo
    supports_draft_weight_update = False
    defers_processing = True

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        self.receiver = WorkerReceiver(device, self.parallel_config.rank)
        self.failure: str | None = None
        """What went wrong in the last `finish_weight_update`."""
        self.install: Callable[[int], bool] = lambda _: False
        """Lets a version serve that was received, and loaded beside what serves; whether it was."""

    def init_transfer_engine(self, init_info: GroupInfo) -> None:
        """Receive from this group from now on."""
        self.receiver.join(init_info)

    def start_weight_update(self) -> None:
        """Forget what an update before left."""
        self.receiver.drop()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Begin to receive; vLLM's own method would wait for the device."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: VersionInfo) -> None:
        """Begin to receive."""
        self.receiver.begin(update_info)

    def drain_pending(self) -> None:
        """Wait until all is received."""
        self.receiver.wait()

    def finish_weight_update(self) -> None:
        """Load what was received; `failure` tells where that is not whole, or the model does not take it."""
        # A step may still be under way on the device.
        self._synchronize()
        self.failure = failure_of(self._load)
        # The receiver's stream may get this memory next.
        self._synchronize()
        self.receiver.drop()

    def _load(self) -> None:
        if not self.install(self.receiver.weight_version):
            load_pushed(self.vllm_config, self.model, self.receiver.take())

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def shutdown(self) -> None:
        """Leave the group."""
        self.receiver.close()
