"""Loading of reward models: one trunk for many heads, and models that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppod_models.chat_template import ChatTemplateError
from ppod_models.configuration import ModelConfig
from ppod_models.sources import ModelSourceError
from ppod_services.reward.codec import TokenizerCodec
from ppod_services.reward.kinds import HeadConfig
from ppod_services.reward.loading import load_all
from ppod_services.reward.samples import Turn
from support.tiny_classifiers import chat_tokenizer


def head_config(directory: Path, head: Path, name: str = "model", dtype: str = "float32") -> HeadConfig:
    model = ModelConfig(source=str(directory), device="cpu", dtype=dtype)  # pyright: ignore
    return HeadConfig(name=name, model=model, head=str(head))


def test_heads_of_one_source_share_their_trunk(tiny_model_dir: Path, tiny_heads: dict[str, Path]) -> None:
    first, second = tiny_heads.values()
    configs = [
        head_config(tiny_model_dir, first, "a"),
        head_config(tiny_model_dir, second, "b"),
        head_config(tiny_model_dir, second, "c", "bfloat16"),
    ]
    models = load_all(configs, max_batch_tokens=10)
    assert models[0].trunk is models[1].trunk
    assert models[0].trunk is not models[2].trunk
    assert [model.info.dtype for model in models] == ["float32", "float32", "bfloat16"]
    # A sequence that fits no batch could never be scored.
    assert models[0].info.max_sequence_tokens == 10


def test_a_missing_head_names_its_reward(tiny_model_dir: Path, tiny_heads: dict[str, Path], tmp_path: Path) -> None:
    configs = [
        head_config(tiny_model_dir, tiny_heads["first"], "a"),
        head_config(tiny_model_dir, tmp_path / "missing", "b"),
    ]
    with pytest.raises(ModelSourceError, match=r"head of reward 'b'.*neither a directory nor a committed head"):
        load_all(configs, 100)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0].content + 1 }}", 'can only concatenate str (not "int") to str'),
        ("{{ 1 // (messages | length - 1) }}", "division"),
        ("{{ messages[0].content.split('')[0] }}", "empty separator"),
    ],
)
def test_a_template_that_breaks_on_a_conversation_refuses_it(template: str, words: str) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ChatTemplateError) as caught:
        TokenizerCodec(tokenizer).render([Turn("user", "hello")], open_turn=True)
    assert str(caught.value).startswith("its chat template refuses the conversation: ")
    assert words in str(caught.value)
