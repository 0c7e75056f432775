"""A reward model: a linear head on the frozen states of a language model, trained on pairwise preferences.

The score's difference is the logit of a preference, as in Bradley and Terry (1952) and, for language models, Stiennon
et al. (2020) and Ouyang et al. (2022). Scores have mean 0 and standard deviation 1 over the reviews that a head was
fitted on; an affine change of scale orders nothing differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ppod_models.reward_cards import HeadCard
from ppod_models.reward_features import TrunkFeatures
from ppod_models.reward_heads import RewardHead, RewardHeadError, check_fit, read_head

__all__ = ["RewardHeadError", "RewardModel"]


class RewardModel:
    """Scores token sequences. Not thread-safe: one call at a time.

    Attributes:
        tokenizer: of the trunk; token ids in `score` are its ids.
        card: what the head reads, how it was trained, what it does on held-out reviews.
    """

    def __init__(self, trunk: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, head: RewardHead) -> None:
        self.tokenizer = tokenizer
        self.card: HeadCard = head.card
        self._features = TrunkFeatures(trunk, tokenizer, head.card.features)
        self._weight = head.weight.to(trunk.device)
        self._bias = head.bias.to(trunk.device)

    @classmethod
    def load(cls, trunk: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, head: str | Path) -> RewardModel:
        """Put a head on a trunk.

        Args:
            trunk: a causal language model in any float dtype; it is shared, not copied or changed.
            tokenizer: the trunk's.
            head: name of a committed head, or a head's directory.

        Raises:
            RewardHeadError: there is no such head, it is damaged, or it was made for another trunk or tokenizer.
        """
        loaded = read_head(head)
        check_fit(loaded.card, trunk, tokenizer)
        return cls(trunk, tokenizer, loaded)

    @property
    def name(self) -> str:
        """Name of the head, for logs and replies."""
        return self.card.name

    @property
    def packs(self) -> bool:
        """Whether sequences share a batch without padding."""
        return self._features.packs

    @property
    def scores_prefixes(self) -> bool:
        """Whether `score_prefixes` may be asked."""
        return self._features.reads_prefixes

    @property
    def tokens_of_prefix(self) -> int:
        """Tokens that a further prefix of `score_prefixes` costs."""
        return self._features.suffix_tokens

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence that `score` takes: the trunk's positions less the template's tokens."""
        return self._features.max_sequence_tokens

    @torch.no_grad()
    def score(self, sequences: Sequence[npt.NDArray[np.integer]]) -> npt.NDArray[np.float32]:
        """Score a batch in one forward; a higher score means a text that people rate higher.

        Args:
            sequences: int arrays [length] of prompt and response together, 1 <= length <= `max_sequence_tokens`.
                Trailing end-of-sequence tokens are dropped; other special tokens should not occur.

        Returns:
            float32 [len(sequences)].

        Raises:
            ValueError: a sequence is empty or too long.
        """
        if not sequences:
            return np.zeros(0, dtype=np.float32)
        # float32 throughout: in bfloat16 the sum over hundreds of features would cost two digits of the score.
        scores = self._features.extract(sequences) @ self._weight + self._bias
        return scores.cpu().numpy()

    @torch.no_grad()
    def score_prefixes(
        self, sequences: Sequence[npt.NDArray[np.integer]], lengths: Sequence[Sequence[int]]
    ) -> list[npt.NDArray[np.float32]]:
        """Score prefixes of sequences, each as `score` would by itself, in about one forward.

        Args:
            sequences: as for `score`.
            lengths: of each sequence's prefixes, in tokens, from 1; one at least.

        Returns:
            float32 [prefixes] for each sequence.

        Raises:
            ValueError: a sequence is empty or too long.
        """
        scores = (self._features.extract_prefixes(sequences, lengths) @ self._weight + self._bias).cpu().numpy()
        return np.split(scores, np.cumsum([len(some) for some in lengths])[:-1])
