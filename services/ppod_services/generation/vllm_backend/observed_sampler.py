"""Has vLLM's sampler tell the model's own logprobs beside those of the distribution that it drew from. Free of vLLM."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import nn


class HasSampler(Protocol):
    """A model runner of vLLM's."""

    sampler: object


def observe_sampler(runner: HasSampler) -> bool:
    """Put each sampled token's unscaled logprob where its likeliest alternative's would stand.

    Returns whether the runner's sampler lets itself be observed, or there is none.
    """
    sampler = runner.sampler
    if sampler is None:
        # Where the layers are in a pipeline, the second runner of its last part alone samples.
        return True
    if isinstance(sampler, nn.Module):
        observer = _SamplerObserver()
        sampler.register_forward_pre_hook(observer.before, with_kwargs=True)
        sampler.register_forward_hook(observer.after, with_kwargs=True)
        return True
    if hasattr(sampler, "get_logprobs_dims"):
        runner.sampler = _ObservedSampler(cast(_SecondSampler, sampler))
        return True
    return False


class _SamplerObserver:
    """Keeps the model's own logprobs while the sampler of vLLM's first model runner changes its logits in place."""

    def __init__(self) -> None:
        self._logprobs: torch.Tensor | None = None

    def before(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:  # noqa: ARG002
        logits, metadata = cast(torch.Tensor, kwargs["logits"]), kwargs["sampling_metadata"]
        wanted = (getattr(metadata, "max_num_logprobs", None) or 0) > 0
        self._logprobs = _own_logprobs(logits) if wanted else None

    def after(
        self,
        module: nn.Module,  # noqa: ARG002
        args: tuple[object, ...],  # noqa: ARG002
        kwargs: dict[str, object],  # noqa: ARG002
        output: _SamplerOutput,
    ) -> None:
        if self._logprobs is not None:
            _tell(output, self._logprobs)
        self._logprobs = None


class _Batch(Protocol):
    idx_mapping_np: object


class _SecondSampler(Protocol):
    """The sampler of vLLM's second model runner, which is the default on GPUs."""

    def get_logprobs_dims(self, idx_mapping_np: object) -> tuple[int, int] | None: ...

    def __call__(self, logits: torch.Tensor, input_batch: _Batch) -> _SamplerOutput: ...


class _ObservedSampler:
    """Stands in for such a sampler, which is no module and has no hooks."""

    def __init__(self, sampler: _SecondSampler) -> None:
        self._sampler = sampler

    def __getattr__(self, name: str) -> object:
        return getattr(self._sampler, name)

    def __call__(self, logits: torch.Tensor, input_batch: _Batch) -> _SamplerOutput:
        dims = self._sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        logprobs = _own_logprobs(logits) if dims is not None and dims[0] > 0 else None
        output = self._sampler(logits, input_batch)
        if logprobs is not None:
            _tell(output, logprobs)
        return output


class _LogprobsTensors(Protocol):
    logprobs: torch.Tensor


class _SamplerOutput(Protocol):
    sampled_token_ids: torch.Tensor
    logprobs_tensors: _LogprobsTensors


def _own_logprobs(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def _tell(output: _SamplerOutput, logprobs: torch.Tensor) -> None:
    """Put the sampled tokens' own logprobs [B, V] where those of the likeliest alternatives stand."""
    output.logprobs_tensors.logprobs[:, 1] = logprobs.gather(-1, output.sampled_token_ids.long()).squeeze(-1)
