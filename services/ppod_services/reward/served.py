"""A reward model in service, as everything but torch sees it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ppod_services.core.described import ModelInfo
from ppod_services.reward.kinds import ModelRewardConfig
from ppod_services.reward.requests import Scorer
from ppod_services.reward.samples import Codec, TokenSource
from ppod_services.reward.scored import ModelIdentity


@dataclass(frozen=True, slots=True, eq=False)
class ServedModel:
    """One version of a reward model.

    Attributes:
        config: where it came from.
        info: identity and bounds.
        weight_version: 0 for the first; every replacement is above it.
        scorer: the model.
        codec: its tokenizer.
        trunk: what it shares with other heads; None where it shares nothing.
    """

    config: ModelRewardConfig
    info: ModelInfo
    weight_version: int
    scorer: Scorer
    codec: Codec
    trunk: object | None = None

    @property
    def identity(self) -> ModelIdentity:
        """What a reply tells of it."""
        return ModelIdentity(self.info.name, self.weight_version, self.info.tokenizer_fingerprint)

    @property
    def source(self) -> TokenSource:
        """Its tokenizer, as the maker of token ids."""
        return TokenSource(self.codec, self.info.vocab_size)

    def as_version(self, weight_version: int) -> ServedModel:
        """The same model under a version."""
        return replace(self, weight_version=weight_version)
