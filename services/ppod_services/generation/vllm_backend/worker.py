"""What ppod adds to vLLM's workers; vLLM mixes the class into its own, in each worker process."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterator, Sequence
from typing import Protocol, cast

import torch
from torch import nn

from ppod_services.generation.vllm_backend.segments import read_tensor
from ppod_services.generation.vllm_backend.watch import end_with_service

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

TensorAt = tuple[str, str, tuple[int, ...], int]
"""Name, data type, shape and offset of a tensor in a segment."""


class _ModelRunner(Protocol):
    sampler: object

    def get_model(self) -> nn.Module: ...


class _Loads(Protocol):
    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str] | None: ...


class PpodWorker:
    """Methods that the service calls in all workers together."""

    model_runner: _ModelRunner

    def ppod_tell_both_logprobs(self) -> bool:
        """Have the sampler put each token's unscaled logprob where its likeliest alternative's would stand.

        vLLM tells one kind of logprobs for the whole engine. Returns whether this sampler lets itself be observed.
        """
        sampler = self.model_runner.sampler
        if not isinstance(sampler, nn.Module):
            return False
        observer = _SamplerObserver()
        sampler.register_forward_pre_hook(observer.before, with_kwargs=True)
        sampler.register_forward_hook(observer.after, with_kwargs=True)
        return True

    def ppod_load_weights(self, path: str, tensors: Sequence[TensorAt]) -> int:
        """Load all weights from a segment, in the layout and precision of this worker; returns their number.

        Raises:
            ValueError: vLLM did not take a tensor, or some of its own parameters got none.
        """
        with open(path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ | mmap.PROT_WRITE, flags=mmap.MAP_PRIVATE)
        loaded = _LoadedWeights(memory, tensors)
        _reload(self, loaded)
        if loaded.count != len(tensors):
            raise ValueError(f"vLLM took {loaded.count} of {len(tensors)} tensors")
        return loaded.count

    def ppod_load_checkpoint(self) -> None:
        """Load the weights again that the engine started with."""
        from vllm.model_executor.model_loader import get_model_loader  # pyright: ignore  # noqa: PLC0415

        config = self.vllm_config  # pyright: ignore
        loader = get_model_loader(config.load_config)
        _reload(self, loader.get_all_weights(config.model_config, self.model_runner.get_model()))


class _LoadedWeights:
    """The tensors of a segment, counted as they are taken."""

    def __init__(self, memory: mmap.mmap, tensors: Sequence[TensorAt]) -> None:
        self.count = 0
        self._memory = memory
        self._tensors = tensors

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, dtype, shape, offset in self._tensors:
            self.count += 1
            yield name, read_tensor(self._memory, offset, shape, _DTYPES[dtype])


class _SamplerObserver:
    """Keeps the model's own logprobs while the sampler changes its logits in place."""

    def __init__(self) -> None:
        self._logprobs: torch.Tensor | None = None

    def before(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:  # noqa: ARG002
        logits, metadata = cast(torch.Tensor, kwargs["logits"]), kwargs["sampling_metadata"]
        wanted = (getattr(metadata, "max_num_logprobs", None) or 0) > 0
        self._logprobs = torch.log_softmax(logits, dim=-1, dtype=torch.float32) if wanted else None

    def after(
        self,
        module: nn.Module,  # noqa: ARG002
        args: tuple[object, ...],  # noqa: ARG002
        kwargs: dict[str, object],  # noqa: ARG002
        output: object,
    ) -> None:
        if self._logprobs is None:
            return
        tokens = cast(torch.Tensor, getattr(output, "sampled_token_ids")).long()  # noqa: B009
        told = cast(torch.Tensor, getattr(getattr(output, "logprobs_tensors"), "logprobs"))  # noqa: B009
        told[:, 1] = self._logprobs.gather(-1, tokens).squeeze(-1)
        self._logprobs = None


def _reload(worker: object, weights: object) -> None:
    """Put weights in checkpoint form through vLLM's loader, which splits, merges and packs them as at its start."""
    from vllm.config import set_current_vllm_config  # pyright: ignore  # noqa: PLC0415
    from vllm.model_executor.model_loader.reload import (  # pyright: ignore  # noqa: PLC0415
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    config = getattr(worker, "vllm_config")  # noqa: B009
    model = cast(_ModelRunner, getattr(worker, "model_runner")).get_model()  # noqa: B009
    # One that is tied to another goes by the first name.
    expected = {name for name, _ in model.named_parameters()}
    # It warns of each tensor that travels in another type than the model computes in.
    logging.getLogger("vllm.model_executor.models.utils").setLevel(logging.ERROR)
    with torch.no_grad(), set_current_vllm_config(config):
        initialize_layerwise_reload(model)
        try:
            loaded = cast(_Loads, model).load_weights(iter(cast("Sequence[tuple[str, torch.Tensor]]", weights)))
        finally:
            # Also after a failure: the next load must not find what this one left half done.
            finalize_layerwise_reload(model, config.model_config)
        _repack_tied_head(model)
    missing = sorted(expected - loaded) if loaded is not None else []
    if missing:
        raise ValueError(f"{len(missing)} parameters of vLLM's model got no weights, the first {missing[0]}")


def _repack_tied_head(model: nn.Module) -> None:
    """A CPU computes with a packed copy of a weight, and a head that shares the embedding's weight has its own copy.

    vLLM's reload makes the embedding's copy anew and leaves the head's as it was, which would go on with old weights.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore  # noqa: PLC0415
        ParallelLMHead,
    )
    from vllm.platforms import current_platform  # pyright: ignore  # noqa: PLC0415

    if not current_platform.is_cpu():
        return
    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            getattr(module, "quant_method").process_weights_after_loading(module)  # noqa: B009


# vLLM imports this module in its workers, before they load anything, and nobody else does.
end_with_service()
