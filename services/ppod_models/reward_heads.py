"""Reward heads on disk: a card that says what a head reads and expects, and its weights beside it.

A head is small (one row of weights), so heads are committed: `heads/<name>/{card.json, head.safetensors}`.

Shape legend: F features, the concatenation of pooled hidden states of size H.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from pydantic import ValidationError
from safetensors.torch import load, save
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ppod_models.configuration import describe_faults
from ppod_models.loading import hidden_size, tokenizer_fingerprint
from ppod_models.reward_cards import HeadCard

HEADS_DIR = Path(__file__).parent / "heads"
CARD_FILE = "card.json"
WEIGHTS_FILE = "head.safetensors"


class RewardHeadError(Exception):
    """A reward head is missing, damaged, or made for another trunk or tokenizer."""


@dataclass(frozen=True, slots=True)
class RewardHead:
    """A linear head; the standardisation of its features is folded into weight and bias.

    Attributes:
        card: what it reads, what it expects, how it was made.
        weight: float32 [F].
        bias: float32 [].
    """

    card: HeadCard
    weight: torch.Tensor
    bias: torch.Tensor


def head_directory(head: str | Path) -> Path:
    """The directory of a head: a path that exists, or the name of a committed head.

    Raises:
        RewardHeadError: it is neither.
    """
    candidate = Path(head).expanduser()
    if candidate.is_dir():
        return candidate
    committed = HEADS_DIR / str(head)
    if candidate.name == str(head) and committed.is_dir():
        return committed
    names = ", ".join(sorted(path.name for path in HEADS_DIR.iterdir() if path.is_dir())) or "none"
    raise RewardHeadError(f"reward head {str(head)!r}: neither a directory nor a committed head (there are: {names})")


def read_head(head: str | Path) -> RewardHead:
    """Read card and weights of a head, given by name or directory.

    Raises:
        RewardHeadError: files are missing, damaged or do not fit each other.
    """
    directory = head_directory(head)
    try:
        card = HeadCard.model_validate_json((directory / CARD_FILE).read_bytes())
        tensors = load((directory / WEIGHTS_FILE).read_bytes())
    except OSError as error:
        raise RewardHeadError(f"reward head {directory}: {error.filename}: {error.strerror}") from error
    except ValidationError as error:
        faults = "; ".join(describe_faults(error))
        raise RewardHeadError(f"reward head {directory}: {CARD_FILE}: {faults}") from error
    except safetensors.SafetensorError as error:
        raise RewardHeadError(f"reward head {directory}: {WEIGHTS_FILE}: {error}") from error
    if set(tensors) != {"weight", "bias"}:
        raise RewardHeadError(f"reward head {directory}: expected tensors bias and weight, found {sorted(tensors)}")
    features = len(card.features.reads) * card.trunk.hidden_size
    if tensors["weight"].shape != (features,) or tensors["bias"].shape != ():
        raise RewardHeadError(
            f"reward head {directory}: the card asks for weight [{features}] and bias [], the file holds "
            f"{list(tensors['weight'].shape)} and {list(tensors['bias'].shape)}"
        )
    return RewardHead(card, tensors["weight"].float(), tensors["bias"].float())


def write_head(head: RewardHead, directory: Path) -> None:
    """Write a head; the same head always gives the same bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {"weight": head.weight.float().contiguous(), "bias": head.bias.float()}
    (directory / WEIGHTS_FILE).write_bytes(save(tensors))
    (directory / CARD_FILE).write_text(head.card.model_dump_json(indent=2) + "\n", encoding="utf-8")


def check_fit(card: HeadCard, trunk: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a trunk or tokenizer that the head was not made for: scores would be noise that looks like scores.

    Raises:
        RewardHeadError: hidden size, number of layers, tokenizer or weights differ from the card's.
    """
    found: list[tuple[str, object, object]] = [
        ("hidden size", card.trunk.hidden_size, hidden_size(trunk)),
        ("number of layers", card.trunk.num_layers, int(trunk.config.get_text_config(decoder=True).num_hidden_layers)),
        ("tokenizer fingerprint", card.trunk.tokenizer_fingerprint, tokenizer_fingerprint(tokenizer)),
        ("weights digest", card.trunk.weights_digest, weights_digest(trunk)),
    ]
    for what, expected, actual in found:
        if expected != actual:
            raise RewardHeadError(
                f"reward head {card.name!r} was made for {card.trunk.source} with {what} {expected}; "
                f"this trunk has {actual}"
            )


def weights_digest(trunk: PreTrainedModel) -> str:
    """First 16 hex digits of a SHA-256 over the trunk's one-dimensional weights (norms, biases), rounded to bfloat16.

    It tells apart models of one shape (base and instruct), costs milliseconds, and is the same whether the trunk was
    loaded in float32 or in bfloat16. float16 holds fewer exponents; there the digest may differ for weights below
    6e-5, which norms do not have.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(trunk.base_model.named_parameters()):
        if parameter.ndim == 1:
            digest.update(name.encode())
            digest.update(parameter.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
