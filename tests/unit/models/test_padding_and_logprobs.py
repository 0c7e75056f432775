from __future__ import annotations

import math
import weakref

import numpy as np
import pytest
import torch

from ppod_models import logprobs
from ppod_models.logprobs import token_distributions, token_logprobs
from ppod_models.padding import pad_sequences, position_ids

CPU = torch.device("cpu")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_against_a_plain_loop(side) -> None:
    sequences = [np.array([5, 6, 7]), np.array([8]), np.array([9, 3])]
    batch = pad_sequences(sequences, side=side, device=CPU)
    for row, sequence in enumerate(sequences):
        empty = [0] * (3 - len(sequence))
        real = sequence.tolist()
        assert batch.input_ids[row].tolist() == (empty + real if side == "left" else real + empty)
        ones = [1] * len(real)
        assert batch.attention_mask[row].tolist() == (empty + ones if side == "left" else ones + empty)
        places = [
            p for p, m in zip(batch.position_ids[row].tolist(), batch.attention_mask[row].tolist(), strict=True) if m
        ]
        assert places == list(range(len(real)))
    assert batch.input_ids.dtype == torch.int64


def test_left_padding_counts_real_tokens_only() -> None:
    assert position_ids(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def head_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.nn.Linear:
    """An output layer with these weights."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def test_logprobs_and_entropy_by_hand() -> None:
    # softmax(log 1, log 3) = (1/4, 3/4); at temperature 1/2 the odds are squared: (1/10, 9/10).
    head = head_of(torch.tensor([[0.0], [math.log(3)]]))
    hidden, tokens = torch.ones(2, 1), torch.tensor([0, 1])
    found = token_logprobs(hidden, head, tokens, 1.0)
    assert found.logprobs.tolist() == pytest.approx([math.log(0.25), math.log(0.75)])
    assert found.entropy.tolist() == pytest.approx([-(0.25 * math.log(0.25) + 0.75 * math.log(0.75))] * 2)
    assert token_logprobs(hidden, head, tokens, 0.5).logprobs.tolist() == pytest.approx([math.log(0.1), math.log(0.9)])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("through_entropy", [False, True])
def test_chunks_equal_autograd_over_all_logits(
    monkeypatch: pytest.MonkeyPatch, bias: bool, through_entropy: bool
) -> None:
    """Values and gradients against log_softmax over the whole [N, V]."""
    monkeypatch.setattr(logprobs, "CHUNK_POSITIONS", 4)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 6, generator=generator)
    head = head_of(weight, torch.randn(9, generator=generator) if bias else None)
    hidden = torch.randn(11, 6, generator=generator).requires_grad_()
    tokens = torch.randint(0, 9, (11,), generator=generator)
    of_logprobs, of_entropy = torch.randn(2, 11, generator=generator)
    parameters = [hidden, *head.parameters()]

    found = token_logprobs(hidden, head, tokens, 0.8)
    loss = (found.logprobs * of_logprobs).sum() + through_entropy * (found.entropy * of_entropy).sum()
    gradients = torch.autograd.grad(loss, parameters)

    whole = torch.log_softmax(head(hidden) / 0.8, dim=-1)
    chosen = whole.gather(-1, tokens[:, None])[:, 0]
    entropy = -(whole.exp() * whole).sum(dim=-1)
    expected = (chosen * of_logprobs).sum() + through_entropy * (entropy * of_entropy).sum()
    torch.testing.assert_close(found.logprobs, chosen)
    torch.testing.assert_close(found.entropy, entropy)
    for one, other in zip(gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("positions", "made"), [(11, [3, 4, 4, 4, 3]), (8, [4, 4, 4]), (4, [4]), (2, [2])])
def test_only_a_chunk_of_logits_exists_at_a_time_and_the_last_is_not_made_again(
    monkeypatch: pytest.MonkeyPatch, positions: int, made: list[int]
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_POSITIONS", 4)
    widths: list[int] = []
    logits: list[weakref.ref[torch.Tensor]] = []
    original = logprobs._scaled_logits

    def watch(hidden: torch.Tensor, *rest: object) -> torch.Tensor:
        widths.append(len(hidden))
        found = original(hidden, *rest)
        logits.append(weakref.ref(found))
        return found

    monkeypatch.setattr(logprobs, "_scaled_logits", watch)
    head = head_of(torch.randn(9, 6))
    hidden = torch.randn(positions, 6, requires_grad=True)
    found = token_logprobs(hidden, head, torch.zeros(positions, dtype=torch.long), 1.0).logprobs.sum()
    assert [one() is None for one in logits] == [True] * (len(logits) - 1) + [False]
    (first,) = torch.autograd.grad(found, [hidden], retain_graph=True)
    assert widths == made
    assert all(one() is None for one in logits)
    (again,) = torch.autograd.grad(found, [hidden])
    torch.testing.assert_close(again, first)


def test_no_logits_are_kept_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    logits: list[weakref.ref[torch.Tensor]] = []
    original = logprobs._scaled_logits

    def watch(*arguments: object) -> torch.Tensor:
        found = original(*arguments)
        logits.append(weakref.ref(found))
        return found

    monkeypatch.setattr(logprobs, "_scaled_logits", watch)
    head = head_of(torch.randn(9, 6))
    with torch.no_grad():
        found = token_logprobs(torch.randn(3, 6), head, torch.zeros(3, dtype=torch.long), 1.0)
    assert found.logprobs.shape == (3,)
    assert [one() for one in logits] == [None]


@pytest.mark.parametrize("bias", [False, True])
def test_distributions_equal_log_softmax_over_all_logits(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_POSITIONS", 4)
    generator = torch.Generator().manual_seed(0)
    head = head_of(torch.randn(9, 6, generator=generator), torch.randn(9, generator=generator) if bias else None)
    hidden, tokens = torch.randn(11, 6, generator=generator), torch.randint(0, 9, (11,), generator=generator)
    found = token_distributions(hidden, head, tokens, 0.8, entropy=True, top_k=3)
    whole = torch.log_softmax(head(hidden) / 0.8, dim=-1)
    top = whole.topk(3, dim=-1)
    torch.testing.assert_close(found.logprobs, whole.gather(-1, tokens[:, None])[:, 0].detach())
    torch.testing.assert_close(found.entropies, -(whole.exp() * whole).sum(dim=-1).detach())
    assert torch.equal(found.top_ids, top.indices)
    torch.testing.assert_close(found.top_logprobs, top.values.detach())


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.01, 0.001])
def test_entropies_of_sharp_distributions_keep_their_digits(temperature: float) -> None:
    """Where one token is nearly sure, and logits are large, as at low temperatures."""
    generator = torch.Generator().manual_seed(0)
    head = head_of(torch.randn(5_000, 64, generator=generator))
    hidden, tokens = torch.randn(300, 64, generator=generator), torch.zeros(300, dtype=torch.long)
    with torch.no_grad():
        found = token_logprobs(hidden, head, tokens, temperature).entropy.double()
        whole = torch.log_softmax((hidden.double() @ head.weight.double().T) / temperature, dim=-1)
    assert found.min() >= 0
    torch.testing.assert_close(found, -(whole.exp() * whole).sum(dim=-1), rtol=0, atol=1e-3)


def test_distributions_give_the_trainer_s_logprobs_to_the_bit() -> None:
    """Two definitions that differ in the last bit would show as a KL that nobody caused."""
    head, hidden = head_of(torch.randn(50, 6)), torch.randn(300, 6)
    tokens = torch.randint(0, 50, (300,))
    trained = token_logprobs(hidden, head, tokens, 0.7)
    served = token_distributions(hidden, head, tokens, 0.7, entropy=False, top_k=0)
    assert torch.equal(trained.logprobs.detach(), served.logprobs)
    assert served.entropies is None
    assert served.top_ids.shape == served.top_logprobs.shape == (300, 0)


def test_no_positions_give_no_logprobs() -> None:
    found = token_logprobs(torch.zeros(0, 6), head_of(torch.randn(9, 6)), torch.zeros(0, dtype=torch.long), 1.0)
    assert found.logprobs.shape == found.entropy.shape == (0,)


def test_bfloat16_products_keep_float32_logprobs() -> None:
    head, hidden = head_of(torch.randn(9, 6)), torch.randn(5, 6)
    tokens = torch.zeros(5, dtype=torch.long)
    found = token_logprobs(hidden.bfloat16(), head, tokens, 1.0).logprobs
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, token_logprobs(hidden, head, tokens, 1.0).logprobs, atol=0.05, rtol=0.05)
