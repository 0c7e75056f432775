"""Loading of causal language models and tokenizers onto a device."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ppod_models.sources import ModelSourceError

# Loading bars would break the JSON lines of services and the step lines of the trainer.
transformers.utils.logging.disable_progress_bar()

_READ_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)
"""What libraries end with where a file has no such form: they believe what they read."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


_BFLOAT16_CAPABILITY = (8, 0)
"""Of CUDA devices that compute in bfloat16: T4 and V100 do not."""


def pick_device(device: str) -> torch.device:
    """The device that a configuration names; "auto" is the first CUDA device, or else the CPU.

    Raises:
        ModelSourceError: there is no such device here.
    """
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        # That torch knows the name does not mean that its build and this machine have one.
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        expected = "auto, cpu, or one that torch has here, such as cuda:0"
        raise ModelSourceError(f"device: found {device!r}, expected {expected}: {reason}") from error
    return found


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype that a configuration names; "auto" is bfloat16 where the device is faster in it, else float32.

    A CPU without instructions for bfloat16 emulates it, tens of times slower than float32. Instructions in
    AVX-512 alone are no gain on Intel's processors (11.3 s for an update that takes 7.4 s in float32); on AMD's they do
    four times as much.
    """
    if dtype != "auto":
        return DTYPES[dtype]
    faster = _cpu_is_faster_in_bfloat16() if device.type == "cpu" else not _is_old_gpu(device)
    return torch.bfloat16 if faster else torch.float32


def _is_old_gpu(device: torch.device) -> bool:
    """Whether a CUDA device emulates bfloat16, as those before Ampere do."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) < _BFLOAT16_CAPABILITY


def _cpu_is_faster_in_bfloat16() -> bool:
    # By what the CPU is, not by a measurement: a run that is resumed must go on in the same data type.
    found = torch.cpu.get_capabilities()
    amd = str(found.get("cpu_name", "")).startswith("AMD")
    return bool(found.get("amx_tile")) or (amd and bool(found.get("avx512_bf16")))


@contextmanager
def reading(path: Path) -> Generator[None]:
    """Within the block a model's files are read.

    Raises:
        ModelSourceError: one cannot be read, or is not what its name says, as after a download that broke off; or a
            package is missing.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        # No fault of the files.
        raise
    except ImportError as error:
        # As of formats of few bits, each of which has a package of its own.
        raise ModelSourceError(f"{path}: what it takes to read it is not installed: {error}") from error
    except _READ_ERRORS as error:
        reason = " ".join(str(error).split())
        what = reason if isinstance(error, OSError) else f"{type(error).__name__}: {reason}"
        raise ModelSourceError(f"{path}: its files cannot be read as a model's: {what}") from error


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a model directory.

    Raises:
        ModelSourceError: there is none, it cannot be read, or is one of those that transformers runs in Python.
    """
    with reading(path):
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except ValueError as error:
            if (path / "tokenizer.json").is_file():
                raise
            # What transformers says then is how it would have been made of other files.
            raise ModelSourceError(f"{path} holds no tokenizer.json; expected it beside the weights") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        found = type(cast(object, tokenizer)).__name__
        raise ModelSourceError(f"{path}: its tokenizer is a {found}; expected one with a tokenizer.json")
    return tokenizer


def load_causal_lm(
    path: Path, *, device: torch.device, dtype: torch.dtype, attention: str = "sdpa", trunk_only: bool = False
) -> PreTrainedModel:
    """Load a causal language model from safetensors, in evaluation mode: dropout off, as PPO's ratios require.

    `attention` is "sdpa" or "eager". With `trunk_only` the output layer may lack weights, and must not be used.

    Raises:
        ModelSourceError: it cannot be read; see also `check_attention` and `check_whole`.
    """
    model, info = load_with_info(AutoModelForCausalLM, path, device=device, dtype=dtype, attention=attention)
    check_whole(path, info, of=f"{model.base_model_prefix}." if trunk_only else "")
    return model


AutoModel = type[AutoModelForCausalLM | AutoModelForSequenceClassification | AutoModelForTokenClassification]


def load_with_info(
    auto: AutoModel,
    path: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: str,
    remote_code: bool = False,
) -> tuple[PreTrainedModel, Mapping[str, object]]:
    """Load a model as `load_causal_lm` does, and tell what `check_whole` asks for.

    With `remote_code` the model's own Python code may run. Raises what `reading` and `check_attention` raise.
    """
    with reading(path):
        loaded = auto.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=remote_code,
            output_loading_info=True,
        )
    model, info = cast("tuple[PreTrainedModel, dict[str, object]]", loaded)
    check_attention(model)
    model.to(device)  # pyright: ignore[reportArgumentType]
    return model.eval(), info


def check_whole(path: Path, info: Mapping[str, object], of: str = "") -> None:
    """Refuse what transformers would fill with random numbers: logprobs or scores would be noise that looks like them.

    Raises:
        ModelSourceError: weights whose names begin with `of` are missing by the loading info of `from_pretrained`.
    """
    missing = sorted(name for name in cast("set[str]", info["missing_keys"]) if name.startswith(of))
    if missing:
        lacks = ", ".join(missing[:3])
        raise ModelSourceError(f"{path}: its weights lack {lacks}: it was saved as another kind of model")


def check_attention(model: PreTrainedModel) -> None:
    """Refuse a model whose attention caps its logits, with an attention that silently does not.

    Raises:
        ModelSourceError: it was loaded with "sdpa".
    """
    config = model.config.get_text_config(decoder=True)
    cap = getattr(config, "attn_logit_softcapping", None)
    if cap is not None and config._attn_implementation == "sdpa":  # pyright: ignore[reportPrivateUsage]
        raise ModelSourceError(
            f"model of type {config.model_type}: it caps the logits of its attention (attn_logit_softcapping {cap}), "
            "which attention: sdpa does not do; set attention: eager wherever it is served or trained"
        )


def quantisation_of(config: PreTrainedConfig) -> str | None:
    """How a checkpoint is quantised, such as "gptq"; None: it is not, or no longer, as it is loaded."""
    declared = getattr(config, "quantization_config", None)
    if declared is None:
        return None
    method = declared.get("quant_method") if isinstance(declared, dict) else getattr(declared, "quant_method", None)
    return str(getattr(method, "value", method))


def check_dense(path: Path, config: PreTrainedConfig) -> None:
    """Refuse a model that is to be trained, whose weights of few bits no gradient could change.

    Raises:
        ModelSourceError: it is quantised.
    """
    if (method := quantisation_of(config)) is not None:
        raise ModelSourceError(
            f"{path}: its weights are quantised ({method}), which cannot be trained; give the checkpoint that they "
            "were made from (QLoRA quantises it itself: policy.lora.quantization)"
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """First 16 hex digits of the SHA-256 of the tokenizer's canonical JSON: equal ids mean equal text.

    Without padding and truncation: they are settings of whoever used it last, which `save_pretrained` saves along.
    """
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None or backend.padding is not None:
        backend = Tokenizer.from_str(backend.to_str())
        backend.no_truncation()
        backend.no_padding()
    return hashlib.sha256(backend.to_str().encode()).hexdigest()[:16]


def token_id_bound(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the highest token id that a tokenizer makes.

    Often less than its models' `vocab_size`, whose embeddings are padded: Qwen2.5 makes ids below 151,665, and has
    151,936 rows in its small models, 152,064 in its large ones. More than the number of its tokens where some ids are
    left out.
    """
    return 1 + max(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True).values())


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids of the tokens that decoding leaves out as special ones, by what stands for them in prompts."""
    added = tokenizer.get_added_tokens_decoder()
    return {one.content: token for token, one in added.items() if one.special and one.content}


def vocab_size(model: PreTrainedModel) -> int:
    """Number of token ids that the model's embedding takes."""
    return int(cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[0])


def hidden_size(model: PreTrainedModel) -> int:
    """Width of the language model's hidden states."""
    return int(model.config.get_text_config(decoder=True).hidden_size)


def max_sequence_tokens(model: PreTrainedModel) -> int:
    """Longest sequence that the model's positions cover; see `longest_sequence`."""
    return longest_sequence(model.config)


def longest_sequence(config: PreTrainedConfig) -> int:
    """Longest sequence that a model's positions cover, each by itself, in tokens.

    LongRoPE (Ding et al. 2024) turns all sequences of a batch by other frequencies once one of them is longer than the
    model was pretrained on, and not the keys that are cached by then. So such a model is one of that length.

    Raises:
        ModelSourceError: it has no such bound, as models of another kind than ppod serves.
    """
    text = config.get_text_config(decoder=True)
    bound = getattr(text, "max_position_embeddings", None)
    if not isinstance(bound, int):
        raise ModelSourceError(
            f"model of type {config.model_type}: its configuration has no max_position_embeddings, found {bound!r}"
        )
    longest = bound
    parameters = cast("dict[str, object]", getattr(text, "rope_parameters", None) or {})
    # Of all layers, or by kinds of layers.
    for rope in (parameters, *(each for each in parameters.values() if isinstance(each, dict))):
        if rope.get("rope_type") == "longrope":
            longest = min(longest, int(cast("int", rope["original_max_position_embeddings"])))
    return longest


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """End-of-sequence ids of the generation config and the tokenizer, sorted, without doubles."""
    declared = cast("int | list[int] | None", model.generation_config.eos_token_id)
    ids: set[int | None] = set(declared) if isinstance(declared, list) else {declared}
    ids.add(cast("int | None", tokenizer.eos_token_id))
    return tuple(sorted(token for token in ids if token is not None))
