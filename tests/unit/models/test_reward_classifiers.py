"""Classifiers that make their scores of other tokens than they should be read at, as some of transformers' do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    FNetConfig,
    FNetForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from ppod_models.reward_classifiers import ClassifierInput, RewardClassifierError, SequenceClassifier

SEQUENCES = [np.arange(5, 12), np.arange(20, 24)]


class Averaging(LlamaForSequenceClassification):
    """Its score is the mean over the tokens."""

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: object
    ) -> SequenceClassifierOutputWithPast:
        states = self.model(input_ids, attention_mask=attention_mask, **options).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weights = mask[..., None].to(states.dtype)
        return SequenceClassifierOutputWithPast(logits=(self.score(states) * weights).sum(1) / weights.sum(1))


@pytest.mark.parametrize("kind", [LlamaForSequenceClassification, Averaging])
def test_the_score_is_the_models_own(kind: type[LlamaForSequenceClassification]) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.5}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 1, "pad_token_id": 0}
    model = kind(LlamaConfig(**sizes, **layers)).eval()
    classifier = SequenceClassifier(model)
    found = classifier.score([ClassifierInput(one, np.asarray([classifier.end_of(one)])) for one in SEQUENCES])
    with torch.inference_mode():
        own = [model(input_ids=torch.from_numpy(one)[None]).logits.item() for one in SEQUENCES]
    assert [one.item() for one in found] == pytest.approx(own, abs=1e-5)
    assert classifier.scores_prefixes == (kind is LlamaForSequenceClassification)


def test_a_model_that_padding_gets_into_is_refused() -> None:
    """FNet mixes all positions of a row, and knows no mask: a score would tell of who shares the batch."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    options = {"num_labels": 1, "pad_token_id": 0, "initializer_range": 0.5}
    mixing = FNetForSequenceClassification(FNetConfig(**sizes, **options)).eval()
    with pytest.raises(RewardClassifierError, match=r"its scores depend on padding: -?\d\.\d+ for a sequence alone"):
        SequenceClassifier(mixing)
    masking = BertForSequenceClassification(BertConfig(**sizes, **options, num_attention_heads=2)).eval()
    assert not SequenceClassifier(masking).scores_prefixes
