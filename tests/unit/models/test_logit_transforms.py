"""Models that change their logits after the output layer, against transformers' own logits and autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from ppod_models import logprobs
from ppod_models.loading import load_causal_lm, max_sequence_tokens
from ppod_models.logit_transforms import UNCHANGED, LogitTransform, declared_transforms, find_logit_transform
from ppod_models.logprobs import token_distributions, token_logprobs
from ppod_models.reward_classifiers import load_sequence_classifier
from ppod_models.sources import ModelSourceError
from ppod_trainer.critic import load_value_model
from support.capped_models import BUILDS, gemma2
from support.tiny_model import VOCAB_SIZE, build_model

CPU = torch.device("cpu")
TEMPERATURE = 0.8
every_kind = pytest.mark.parametrize("kind", list(BUILDS))


def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits[0]


def states_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]


@every_kind
def test_what_a_model_does_is_found_and_matters(kind: str) -> None:
    build, transform = BUILDS[kind]
    model, ids = build(), torch.arange(11).unsqueeze(0)
    assert find_logit_transform("tiny", model) == transform
    with torch.no_grad():
        given = model.get_output_embeddings()(states_of(model, ids))
        torch.testing.assert_close(transform.apply(given), logits_of(model, ids))
        assert (given - logits_of(model, ids)).abs().max() > 1, "else this test would tell nothing"


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_narrow_types_hides_nothing(kind: str, dtype: torch.dtype) -> None:
    build, transform = BUILDS[kind]
    assert find_logit_transform("tiny", build().to(dtype)) == transform


@every_kind
@pytest.mark.parametrize("through_entropy", [False, True])
@pytest.mark.parametrize("chunk", [4, 256])
def test_logprobs_entropy_and_gradients_are_those_of_the_models_own_logits(
    monkeypatch: pytest.MonkeyPatch, kind: str, through_entropy: bool, chunk: int
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_POSITIONS", chunk)
    build, transform = BUILDS[kind]
    model = build()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 320, (1, 11), generator=generator)
    tokens = torch.randint(0, 320, (11,), generator=generator)
    of_logprobs, of_entropy = torch.randn(2, 11, generator=generator)
    parameters = list(model.parameters())

    found = token_logprobs(
        states_of(model, ids), model.get_output_embeddings(), tokens, TEMPERATURE, transform=transform
    )
    loss = (found.logprobs * of_logprobs).sum() + through_entropy * (found.entropy * of_entropy).sum()
    gradients = torch.autograd.grad(loss, parameters)

    whole = torch.log_softmax(logits_of(model, ids) / TEMPERATURE, dim=-1)
    chosen = whole.gather(-1, tokens[:, None])[:, 0]
    entropy = -(whole.exp() * whole).sum(dim=-1)
    expected = (chosen * of_logprobs).sum() + through_entropy * (entropy * of_entropy).sum()
    torch.testing.assert_close(found.logprobs, chosen, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropy, entropy, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        # Relative to the largest of each weight's: the small ones of a sum of large ones are rounded alike.
        torch.testing.assert_close(one, other, atol=1e-5 * max(1.0, float(other.abs().max())), rtol=1e-4)


@every_kind
def test_distributions_are_those_of_the_models_own_logits(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_POSITIONS", 4)
    build, transform = BUILDS[kind]
    model = build()
    ids, tokens = torch.arange(11).unsqueeze(0), torch.arange(100, 111)
    with torch.no_grad():
        whole = torch.log_softmax(logits_of(model, ids) / TEMPERATURE, dim=-1)
        states, head = states_of(model, ids), model.get_output_embeddings()
        found = token_distributions(states, head, tokens, TEMPERATURE, entropy=True, top_k=3, transform=transform)
        trained = token_logprobs(states, head, tokens, TEMPERATURE, transform=transform)
    torch.testing.assert_close(found.logprobs, whole.gather(-1, tokens[:, None])[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropies, -(whole.exp() * whole).sum(dim=-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.top_logprobs, whole.topk(3, dim=-1).values, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.top_ids, whole.topk(3, dim=-1).indices)
    assert torch.equal(found.logprobs, trained.logprobs), "to the bit, as the trainer's"


def test_a_scale_and_a_cap_by_hand() -> None:
    logits = torch.tensor([-1e9, 0.0, 6.0])
    assert LogitTransform(0.5).apply(logits).tolist() == [-5e8, 0.0, 3.0]
    capped = LogitTransform(0.5, 3.0).apply(logits)
    torch.testing.assert_close(capped, 3.0 * torch.tanh(torch.tensor([-1e9, 0.0, 1.0])))
    assert UNCHANGED.apply(logits) is logits


def test_models_that_change_nothing_declare_nothing() -> None:
    model = build_model()
    assert declared_transforms(model) == []
    assert find_logit_transform("tiny", model) == UNCHANGED


def with_logits(change: Callable[[torch.Tensor], torch.Tensor], **config: float) -> PreTrainedModel:
    """A Llama that does this to its logits, and says that in its configuration."""

    class Changed(LlamaForCausalLM):
        def forward(self, *arguments: object, **options: object) -> CausalLMOutputWithPast:
            output = super().forward(*arguments, **options)
            output.logits = change(output.logits)
            return output

    model = Changed(build_model().config)
    model.load_state_dict(build_model().state_dict())
    for key, value in config.items():
        setattr(model.config, key, value)
    return model.eval()


@pytest.mark.parametrize(
    ("change", "config"),
    [
        # A cap that is far above all logits changes next to nothing, until training makes them larger.
        pytest.param(lambda x: 3000 * torch.tanh(x / 3000), {"some_cap": 3000.0}, id="a cap by another name"),
        pytest.param(lambda x: x + 1, {}, id="a shift"),
        pytest.param(lambda x: x.clamp(max=300), {}, id="a bound that only large ones meet"),
        pytest.param(lambda x: 2 * x, {"logit_scale": 3.0}, id="another scale than it says"),
        pytest.param(lambda x: 30 * torch.tanh(x / 30), {"logit_scale": 1.0}, id="a cap, and it says a scale"),
    ],
)
def test_models_that_do_something_unknown_are_refused(
    change: Callable[[torch.Tensor], torch.Tensor], config: dict[str, float]
) -> None:
    with pytest.raises(ModelSourceError, match="final_logit_softcapping, logit_scale, logits_scaling"):
        find_logit_transform("tiny", with_logits(change, **config))


def test_a_key_is_read_as_the_model_means_it() -> None:
    """HyperCLOVA X multiplies by what Granite divides by; others have a key that they do not use."""
    assert find_logit_transform("tiny", with_logits(lambda x: 4 * x, logits_scaling=4.0)) == LogitTransform(4.0)
    assert find_logit_transform("tiny", with_logits(lambda x: x / 4, logits_scaling=4.0)) == LogitTransform(0.25)
    assert find_logit_transform("tiny", with_logits(lambda x: x, logit_scale=4.0)) == UNCHANGED


def classifier(directory: Path, attention: str) -> PreTrainedModel:
    return load_sequence_classifier(directory, device=CPU, dtype=torch.float32, attention=attention, remote_code=False)


def language_model(directory: Path, attention: str) -> PreTrainedModel:
    return load_causal_lm(directory, device=CPU, dtype=torch.float32, attention=attention)


def critic(directory: Path, attention: str) -> PreTrainedModel:
    return load_value_model(directory, device=CPU, attention=attention, vocab_size=VOCAB_SIZE).trunk


@pytest.mark.parametrize("load", [language_model, classifier, critic])
def test_attention_that_would_leave_a_cap_out_is_refused(
    tmp_path: Path, load: Callable[[Path, str], PreTrainedModel]
) -> None:
    """Scores and values of a reward model would be wrong as silently as logprobs."""
    model = gemma2()
    if load is not language_model:
        model = Gemma2ForSequenceClassification(Gemma2Config(**model.config.to_dict() | {"num_labels": 1}))
    model.save_pretrained(tmp_path)
    assert load(tmp_path, "eager").config._attn_implementation == "eager"  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(ModelSourceError, match=r"attn_logit_softcapping 50\.0.*set attention: eager"):
        load(tmp_path, "sdpa")


def test_models_that_are_built_otherwise_are_refused_by_their_type() -> None:
    model = build_model()
    cut = model.model.layers[1].self_attn.o_proj
    cut.weight.data = cut.weight.data[:, :-1]
    with pytest.raises(ModelSourceError, match="'m' of type llama cannot be run: RuntimeError: mat1 and mat2 shapes"):
        find_logit_transform("m", model)
    model.base_model_prefix = "without"
    # So its base model is itself, whose output has no hidden states, as Llama 4's text model has it.
    with pytest.raises(ModelSourceError, match="'m' of type llama cannot be run: "):
        find_logit_transform("m", model)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ModelSourceError, match="model of type bloom: its configuration has no max_position_embeddings"):
        max_sequence_tokens(bloom)
