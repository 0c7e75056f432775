from __future__ import annotations

import copy
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ppod_models import prefix_features
from ppod_models.reward_cards import FeatureSpec, Read
from ppod_models.reward_heads import RewardHead, RewardHeadError, read_head, weights_digest, write_head
from ppod_models.reward_model import RewardModel
from ppod_services.reward.loading import HeadScorer
from ppod_services.reward.model_inputs import at_end
from ppod_services.reward.requests import ModelInput
from support.tiny_head import tiny_card
from support.tiny_trunk import HIDDEN, LAYERS, POSITIONS, tiny_tokenizer, tiny_trunk

SPEC = FeatureSpec(
    prefix="review: ",
    suffix=" it is",
    reads=(
        Read(layer=3, pooling="end"),
        Read(layer=2, pooling="last"),
        Read(layer=1, pooling="mean"),
        Read(layer=3, pooling="mean"),
    ),
)


@pytest.fixture(scope="module")
def trunk() -> LlamaForCausalLM:
    return tiny_trunk()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def make_head(trunk: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, spec: FeatureSpec = SPEC) -> RewardHead:
    card = tiny_card("toy", spec, trunk, tokenizer)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(len(spec.reads) * HIDDEN, generator=generator)
    return RewardHead(card, weight, torch.tensor(0.25))


@pytest.fixture
def head_dir(trunk: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    write_head(make_head(trunk, tokenizer), tmp_path / "toy")
    return tmp_path / "toy"


@pytest.fixture
def model(trunk: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, head_dir: Path) -> RewardModel:
    return RewardModel.load(trunk, tokenizer, head_dir)


def some_sequences() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(2, 300, size=length) for length in (1, 7, 3, 20, 12)]


@torch.no_grad()
def reference_score(
    trunk: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, head: RewardHead, sequence: np.ndarray
) -> float:
    """One sequence, no padding, the whole trunk, and every number spelled out."""
    prefix = tokenizer.encode(head.card.features.prefix, add_special_tokens=False)
    suffix = tokenizer.encode(head.card.features.suffix, add_special_tokens=False)
    ids = [*prefix, *sequence.tolist(), *suffix]
    states = trunk.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    features: list[float] = []
    for read in head.card.features.reads:
        rows = states[read.layer][0].double()
        match read.pooling:
            case "end":
                state = rows[-1]
            case "last":
                state = rows[len(prefix) + len(sequence) - 1]
            case "mean":
                state = sum(rows[len(prefix) + step] for step in range(len(sequence))) / len(sequence)
        root_mean_square = (sum(float(value) ** 2 for value in state) / HIDDEN) ** 0.5
        features += [float(value) / root_mean_square for value in state]
    return sum(w * f for w, f in zip(head.weight.tolist(), features, strict=True)) + float(head.bias)


def test_scores_equal_the_one_by_one_reference(trunk, tokenizer, model) -> None:
    head = make_head(trunk, tokenizer)
    sequences = some_sequences()
    expected = [reference_score(trunk, tokenizer, head, sequence) for sequence in sequences]
    scores = model.score(sequences)
    assert scores.dtype == np.float32
    assert np.std(expected) > 1  # the check means something only where scores differ
    np.testing.assert_allclose(scores, expected, atol=2e-5, rtol=1e-5)


def test_score_depends_neither_on_padding_nor_on_batch_mates(model) -> None:
    sequences = some_sequences()
    together = model.score(sequences)
    alone = np.concatenate([model.score([sequence]) for sequence in sequences])
    reversed_order = model.score(sequences[::-1])[::-1]
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(together, reversed_order, atol=1e-5, rtol=1e-5)


def test_trailing_end_of_sequence_changes_nothing(model, tokenizer) -> None:
    sequence = some_sequences()[1]
    ended = np.append(sequence, [tokenizer.eos_token_id] * 2)
    np.testing.assert_allclose(model.score([ended]), model.score([sequence]), atol=1e-5)
    inside = np.insert(sequence, 3, tokenizer.eos_token_id)
    assert abs(model.score([inside])[0] - model.score([sequence])[0]) > 1e-3
    assert np.isfinite(model.score([np.array([tokenizer.eos_token_id])])).all()


def test_a_trailing_end_of_turn_changes_nothing(trunk, tokenizer, head_dir) -> None:
    """Where it is not the end of sequence, as Gemma's: runs of conversations send it."""
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}{{ pad_token }}\n"
    sequence = some_sequences()[1]
    ended = np.append(sequence, [chatting.pad_token_id, chatting.eos_token_id])
    plain, model = (RewardModel.load(trunk, one, head_dir) for one in (tokenizer, chatting))
    np.testing.assert_allclose(model.score([ended]), plain.score([sequence]), atol=1e-5)
    assert abs(plain.score([ended])[0] - plain.score([sequence])[0]) > 1e-3


def test_the_trunk_is_left_as_it_was(trunk, model) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    hooks = [len(layer._forward_hooks) for layer in trunk.model.layers]
    with torch.no_grad():
        before = trunk(ids).logits
        model.score(some_sequences())
        after = trunk(ids).logits
    assert torch.equal(before, after)
    assert len(trunk.model.layers) == LAYERS
    assert trunk.config.num_hidden_layers == LAYERS
    assert [len(layer._forward_hooks) for layer in trunk.model.layers] == hooks


def test_a_head_may_be_put_on_a_trunk_that_another_scores_with(trunk, tokenizer, model, head_dir) -> None:
    """As when a head is replaced: its loader runs the layers, with hooks of its own, while a batch is in them."""
    sequences = some_sequences()
    expected = model.score(sequences)
    through_the_layers, go_on = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        through_the_layers.set()
        assert go_on.wait(10)

    with model._features._body.norm.register_forward_hook(hold), ThreadPoolExecutor(1) as pool:
        pending = pool.submit(model.score, sequences)
        assert through_the_layers.wait(10)
        other = RewardModel.load(trunk, tokenizer, head_dir)
        others = other.score(sequences[:2])
        go_on.set()
        assert np.array_equal(pending.result(), expected)
    assert np.array_equal(others, other.score(sequences[:2]))


def test_layers_above_the_highest_read_do_not_run(trunk, model) -> None:
    ran: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(trunk.model.layers, start=1)
    ]
    model.score(some_sequences())
    for hook in hooks:
        hook.remove()
    assert ran == [1, 2, 3]


def test_limit_leaves_room_for_the_template(tokenizer, model) -> None:
    template = sum(len(tokenizer.encode(text, add_special_tokens=False)) for text in (SPEC.prefix, SPEC.suffix))
    assert template > 0
    assert model.max_sequence_tokens == POSITIONS - template
    assert model.score([np.full(model.max_sequence_tokens, 5)]).shape == (1,)
    with pytest.raises(ValueError, match=f"has {POSITIONS} tokens, expected 1 to {model.max_sequence_tokens}"):
        model.score([np.full(POSITIONS, 5)])
    with pytest.raises(ValueError, match="has 0 tokens"):
        model.score([np.zeros(0, dtype=np.int64)])


def test_no_sequences_have_no_scores(model) -> None:
    assert model.score([]).shape == (0,)


def test_name_and_tokenizer(model, tokenizer) -> None:
    assert model.name == "toy"
    assert model.tokenizer is tokenizer


def test_writing_a_head_twice_gives_the_same_bytes(head_dir, tmp_path) -> None:
    write_head(read_head(head_dir), tmp_path / "again")
    for name in ("card.json", "head.safetensors"):
        assert (head_dir / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_missing_head_names_the_committed_ones(trunk, tokenizer) -> None:
    with pytest.raises(
        RewardHeadError, match=r"'no-such-head': neither a directory nor a committed head .*reviews-reward"
    ):
        RewardModel.load(trunk, tokenizer, "no-such-head")


def test_head_name_cannot_leave_the_heads_directory(trunk, tokenizer) -> None:
    with pytest.raises(RewardHeadError, match="neither"):
        RewardModel.load(trunk, tokenizer, "../heads/reviews-nothing")


def test_head_for_another_hidden_size_is_refused(tokenizer, head_dir) -> None:
    with pytest.raises(RewardHeadError, match=r"hidden size 32; this trunk has 16"):
        RewardModel.load(tiny_trunk(hidden=16), tokenizer, head_dir)


def test_head_for_other_weights_of_the_same_shape_is_refused(tokenizer, head_dir) -> None:
    with pytest.raises(RewardHeadError, match="weights digest"):
        RewardModel.load(tiny_trunk(seed=1), tokenizer, head_dir)


def test_head_for_another_tokenizer_is_refused(trunk, head_dir) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["unheard-of"])
    with pytest.raises(RewardHeadError, match="tokenizer fingerprint"):
        RewardModel.load(trunk, other, head_dir)


def test_weights_digest_is_the_same_in_bfloat16(trunk) -> None:
    assert weights_digest(tiny_trunk().to(torch.bfloat16)) == weights_digest(trunk)


def test_head_with_a_weight_of_the_wrong_size_is_refused(trunk, tokenizer, tmp_path) -> None:
    head = make_head(trunk, tokenizer)
    write_head(RewardHead(head.card, head.weight[:-1], head.bias), tmp_path)
    with pytest.raises(RewardHeadError, match=r"weight \[128\] and bias \[\], the file holds \[127\] and \[\]"):
        read_head(tmp_path)


@pytest.mark.parametrize("name", ["card.json", "head.safetensors"])
def test_missing_file_is_named(head_dir, name) -> None:
    (head_dir / name).unlink()
    with pytest.raises(RewardHeadError, match=f"{name}: No such file"):
        read_head(head_dir)


def test_damaged_files_are_refused(head_dir) -> None:
    (head_dir / "head.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(RewardHeadError, match=r"head\.safetensors"):
        read_head(head_dir)
    card = json.loads((head_dir / "card.json").read_text())
    card["features"]["reads"] = []
    card["surprise"] = 1
    (head_dir / "card.json").write_text(json.dumps(card))
    with pytest.raises(RewardHeadError, match=r"features\.reads: .*surprise: unknown key"):
        read_head(head_dir)


def test_layer_beyond_the_trunk_is_refused(trunk, tokenizer, tmp_path) -> None:
    write_head(make_head(trunk, tokenizer, FeatureSpec(reads=(Read(layer=9, pooling="end"),))), tmp_path)
    with pytest.raises(RewardHeadError, match="reads layer 9, the trunk has 4"):
        RewardModel.load(trunk, tokenizer, tmp_path)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("suffix", [" it is", ""])
def test_prefixes_in_one_row_score_as_each_does_alone(
    tokenizer: PreTrainedTokenizerFast, suffix: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever rows the prefixes are divided into, and with end-of-sequence tokens, which carry no text."""
    trunk = tiny_trunk()
    trunk.set_attn_implementation(attention)
    model = RewardModel(trunk, tokenizer, make_head(trunk, tokenizer, SPEC.model_copy(update={"suffix": suffix})))
    assert model.scores_prefixes
    assert model.tokens_of_prefix == len(tokenizer.encode(suffix, add_special_tokens=False))
    eos = tokenizer.eos_token_id
    sequences = [*some_sequences(), np.array([5, 6, eos, eos]), np.array([eos, eos])]
    lengths = [list(range(1, len(sequence) + 1)) for sequence in sequences]
    lengths[3] = [2, 9, 20]
    expected = [
        model.score([sequence[:length] for length in some]) for sequence, some in zip(sequences, lengths, strict=True)
    ]
    for cells in (2**24, 500):
        monkeypatch.setattr(prefix_features, "_MASK_CELLS", cells)
        found = model.score_prefixes(sequences, lengths)
        assert [len(one) for one in found] == [len(some) for some in lengths]
        np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), atol=2e-5)


def test_rows_of_prefixes_stay_about_as_long_as_the_text() -> None:
    text = np.arange(1000)
    lengths = list(range(1, 1001))
    rows = list(prefix_features.divide(text, lengths, suffix_tokens=10))
    assert [length for row in rows for length in row.lengths] == lengths
    assert all(10 * len(row.lengths) <= 1000 and len(row.text) == max(row.lengths) for row in rows)
    assert len(rows) == 10
    # Without a suffix one row has them all.
    assert len(list(prefix_features.divide(text, lengths, suffix_tokens=0))) == 1


def test_a_trunk_that_looks_back_only_so_far_reads_no_prefixes(tokenizer: PreTrainedTokenizerFast) -> None:
    trunk = tiny_trunk()
    trunk.config.sliding_window = 8  # pyright: ignore[reportAttributeAccessIssue]
    assert not RewardModel(trunk, tokenizer, make_head(trunk, tokenizer)).scores_prefixes


def test_who_asks_for_the_end_alone_gets_the_same_bits_in_any_company(model: RewardModel) -> None:
    scorer = HeadScorer(model)
    ends = [at_end(sequence.astype(np.int32), len(sequence) - 1) for sequence in some_sequences()[:2]]
    way = ModelInput(some_sequences()[3].astype(np.int32), np.array([1, 8, 19], np.int32))
    first, middle, last = scorer.score([ends[0], way, ends[1]])
    assert [first.tolist(), last.tolist()] == [one.tolist() for one in scorer.score(ends)]
    np.testing.assert_allclose(middle, [model.score([way.tokens[:end]])[0] for end in (2, 9, 20)], atol=2e-5)
