"""Loads reward models. Imports torch; used in the models' thread, or in a thread of its own for a replacement."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ppod.errors import NonFiniteOutput
from ppod.tensors import FloatArray, TokenArray
from ppod_models.configuration import ModelConfig
from ppod_models.loading import load_tokenizer, max_sequence_tokens, pick_device, pick_dtype, vocab_size
from ppod_models.reward_classifiers import (
    ClassifierInput,
    RewardClassifierError,
    SequenceClassifier,
    TokenClassifier,
    load_sequence_classifier,
    load_token_classifier,
)
from ppod_models.reward_model import RewardHeadError, RewardModel
from ppod_models.sources import ModelSourceError, resolve, resolve_tokenizer
from ppod_services.core.described import ModelInfo
from ppod_services.core.model import load_pretrained, quieten_transformers, set_threads
from ppod_services.core.scheduler import Sink
from ppod_services.core.warm_up import warm_up
from ppod_services.reward.codec import TokenizerCodec
from ppod_services.reward.kinds import (
    HeadConfig,
    ModelRewardConfig,
    SequenceClassificationConfig,
    TokenClassificationConfig,
)
from ppod_services.reward.model_inputs import at_end
from ppod_services.reward.requests import ModelInput, RewardItem, Scorer
from ppod_services.reward.samples import TokenSource
from ppod_services.reward.served import ServedModel

ClassifierT = TypeVar("ClassifierT", SequenceClassifier, TokenClassifier)


class HeadScorer:
    """A trunk with a head, as a scorer."""

    def __init__(self, model: RewardModel) -> None:
        self._model = model
        self.scores_prefixes = model.scores_prefixes

    def end_of(self, tokens: TokenArray) -> int:
        """The last token; the head itself knows which states it reads."""
        return len(tokens) - 1

    def score(self, inputs: Sequence[ModelInput]) -> list[FloatArray]:
        """float32 [reads] for each input."""
        # Whoever asks for the end alone gets it as if nobody in the batch had asked for more.
        whole = [index for index, one in enumerate(inputs) if one.reads.tolist() == [len(one.tokens) - 1]]
        ways = [index for index in range(len(inputs)) if index not in set(whole)]
        found: dict[int, FloatArray] = {}
        if whole:
            found |= zip(
                whole, self._model.score([inputs[index].tokens for index in whole]).reshape(-1, 1), strict=True
            )
        if ways:
            lengths = [(inputs[index].reads + 1).tolist() for index in ways]
            scores = self._model.score_prefixes([inputs[index].tokens for index in ways], lengths)
            found |= zip(ways, scores, strict=True)
        return [found[index] for index in range(len(inputs))]

    def tokens_of(self, one: ModelInput) -> int:
        """A prefix costs the tokens that the head puts behind it."""
        return len(one.tokens) + (len(one.reads) - 1) * self._model.tokens_of_prefix


class SequenceScorer:
    """A sequence classifier as a scorer."""

    def __init__(self, model: SequenceClassifier) -> None:
        self._model = model
        self.scores_prefixes = model.scores_prefixes

    def end_of(self, tokens: TokenArray) -> int:
        """The last token that is no padding token."""
        return self._model.end_of(tokens)

    def score(self, inputs: Sequence[ModelInput]) -> list[FloatArray]:
        """float32 [reads] for each input."""
        return self._model.score([ClassifierInput(one.tokens, one.reads) for one in inputs])

    def tokens_of(self, one: ModelInput) -> int:
        """Reads cost nothing."""
        return len(one.tokens)


class ProcessScorer:
    """A process reward model as a scorer."""

    scores_prefixes = False

    def __init__(self, model: TokenClassifier) -> None:
        self._model = model

    def end_of(self, tokens: TokenArray) -> int:
        """The last token."""
        return len(tokens) - 1

    def score(self, inputs: Sequence[ModelInput]) -> list[FloatArray]:
        """float32 [reads] for each input."""
        return self._model.score([ClassifierInput(one.tokens, one.reads) for one in inputs])

    def tokens_of(self, one: ModelInput) -> int:
        """Reads cost nothing."""
        return len(one.tokens)


@dataclass(frozen=True, slots=True, eq=False)
class Trunk:
    """A loaded trunk, and what tells it from others: contents of its files, device, dtype, attention."""

    key: tuple[str, str, str, str]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast


def load_all(configs: Sequence[ModelRewardConfig], max_batch_tokens: int, warm_up_tokens: int = 0) -> list[ServedModel]:
    """Load all models, each trunk once, and warm them up.

    Raises:
        ModelSourceError: a model cannot be loaded, or a head is missing or does not fit its trunk.
    """
    models: list[ServedModel] = []
    for config in configs:
        models.append(load_model(config, max_batch_tokens, models))
    for model in models:
        warm_up_model(model, warm_up_tokens)
    return models


def load_model(config: ModelRewardConfig, max_batch_tokens: int, beside: Iterable[ServedModel]) -> ServedModel:
    """Load one model as version 0; a head takes the trunk of a model in `beside` that has the same one.

    Raises:
        ModelSourceError: as `load_all`.
    """
    match config:
        case HeadConfig():
            return _load_head(config, max_batch_tokens, beside)
        case SequenceClassificationConfig():
            model, codec = _load_classifier(config, load_sequence_classifier)
            sequences = _checked(config, lambda: SequenceClassifier(model))
            scorer: Scorer = SequenceScorer(sequences)
            packs = sequences.packs
        case TokenClassificationConfig():
            model, codec = _load_classifier(config, load_token_classifier)
            steps = _checked(config, lambda: TokenClassifier(model))
            scorer, packs = ProcessScorer(steps), steps.packs
    # Encoders that count positions from the padding token on have fewer than their configuration says.
    longest = min(max_sequence_tokens(model), codec.longest_tokens, max_batch_tokens)
    return ServedModel(config, _describe(config.name, model, codec, longest, packs=packs), 0, scorer, codec)


def load_tokenizer_source(source: str) -> TokenSource:
    """A tokenizer without its model; raises ModelSourceError."""
    quieten_transformers()
    path = resolve_tokenizer(source)
    try:
        codec = TokenizerCodec(load_tokenizer(path))
    except (OSError, ValueError) as error:
        raise ModelSourceError(f"tokenizer {source!r}: {error}") from error
    return TokenSource(codec, codec.token_id_bound, only_decoded=True)


def warm_up_model(model: ServedModel, tokens: int) -> None:
    """Run a lone sequence and a batch of `tokens` tokens.

    Raises:
        ModelSourceError: the model cannot run them, or gives no finite score.
    """
    scorer = model.scorer

    def run(items: Sequence[RewardItem], sink: Sink[FloatArray]) -> None:
        for position, read in enumerate(scorer.score([item.input for item in items])):
            if np.isfinite(read).all():
                sink.emit(position, read)
            else:
                sink.fail(position, NonFiniteOutput(f"score of {model.info.name!r}", position, str(read[0])))

    warm_up(run, model.info, tokens, lambda _, ids: RewardItem(scorer, at_end(ids, scorer.end_of(ids))))


def _load_head(config: HeadConfig, max_batch_tokens: int, beside: Iterable[ServedModel]) -> ServedModel:
    trunk = _shared_trunk(config.model, beside)
    try:
        model = RewardModel.load(trunk.model, trunk.tokenizer, config.head)
    except RewardHeadError as error:
        raise ModelSourceError(f"head of reward {config.name!r}: {error}") from error
    codec = TokenizerCodec(trunk.tokenizer)
    longest = min(model.max_sequence_tokens, max_batch_tokens)
    info = _describe(config.name, trunk.model, codec, longest, packs=model.packs)
    return ServedModel(config, info, 0, HeadScorer(model), codec, trunk)


def _shared_trunk(config: ModelConfig, beside: Iterable[ServedModel]) -> Trunk:
    # By its contents: a directory may hold other weights than when it was read last.
    key = (resolve(config.source).fingerprint, config.device, config.dtype, config.attention)
    for model in beside:
        if isinstance(model.trunk, Trunk) and model.trunk.key == key:
            return model.trunk
    return Trunk(key, *load_pretrained(config, trunk_only=True))


def _load_classifier(
    config: SequenceClassificationConfig | TokenClassificationConfig, load: Callable[..., PreTrainedModel]
) -> tuple[PreTrainedModel, TokenizerCodec]:
    quieten_transformers()
    set_threads(config.model.threads)
    source = config.model.source
    path = resolve(source).path
    device = pick_device(config.model.device)
    dtype = pick_dtype(config.model.dtype, device)
    remote_code = source in config.allow_remote_code
    try:
        codec = TokenizerCodec(load_tokenizer(path))
        model = load(path, device=device, dtype=dtype, attention=config.model.attention, remote_code=remote_code)
    except (OSError, ValueError, RuntimeError, SafetensorError, RewardClassifierError, ModelSourceError) as error:
        raise ModelSourceError(f"model {source!r} of reward {config.name!r}: {error}") from error
    return model, codec


def _checked(config: ModelRewardConfig, make: Callable[[], ClassifierT]) -> ClassifierT:
    who = f"model {config.model.source!r} of reward {config.name!r}"
    try:
        return make()
    except RewardClassifierError as error:
        raise ModelSourceError(f"{who}: {error}") from error
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        # Whatever an architecture that is built otherwise ends with as it is tried out.
        raise ModelSourceError(f"{who} cannot be run: {type(error).__name__}: {error}") from error


def _describe(name: str, model: PreTrainedModel, codec: TokenizerCodec, longest: int, *, packs: bool) -> ModelInfo:
    return ModelInfo(
        name=name,
        tokenizer_fingerprint=codec.fingerprint,
        vocab_size=vocab_size(model),
        max_sequence_tokens=longest,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        packs=packs,
    )
