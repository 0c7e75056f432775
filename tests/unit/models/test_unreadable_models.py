"""Directories of models with a file that is missing, cut off, or of another form: one line that says where and what."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoConfig

from ppod_models.loading import check_dense, load_causal_lm, load_tokenizer, quantisation_of
from ppod_models.sources import ModelSourceError, resolve
from ppod_trainer.config import TrainerConfig
from ppod_trainer.critic import load_value_model
from ppod_trainer.parted_weights import stored_dtype
from ppod_trainer.policy_loading import load_policy
from ppod_trainer.quantisation import load_quantised
from ppod_trainer.ranks import Ranks
from support.optional import needs_bitsandbytes
from support.tiny_model import build_model, build_tokenizer

TARGETS = dict.fromkeys(("reward", "reference", "generation", "generation_admin", "reference_admin"), "127.0.0.1:1")


@pytest.fixture
def broken(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model_dir, tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b'{"version": "1.0", "trun'),
        ("tokenizer.json", b"\xff\xfe\x00"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b'{"version": "1.0", "model": {"type": "Unknown"}}'),
        ("tokenizer_config.json", b"[]"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_told(broken: Path, name: str, content: bytes) -> None:
    (broken / name).write_bytes(content)
    with pytest.raises(ModelSourceError, match=f"^{broken}: its files cannot be read as a model's: "):
        load_tokenizer(broken)


def test_a_model_without_its_tokenizer_is_told(broken: Path) -> None:
    """As of a fine-tuned model that was saved by itself. transformers asks for other libraries."""
    for file in broken.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelSourceError) as caught:
        load_tokenizer(broken)
    assert str(caught.value) == f"{broken} holds no tokenizer.json; expected it beside the weights"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b'{"model_type'),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "llama", "num_attention_heads": 0}'),
        ("config.json", b'{"model_type": "llama", "vocab_size": -5, "pad_token_id": 3}'),
        ("model.safetensors", b""),
        ("model.safetensors", None),
    ],
)
def test_weights_or_a_configuration_that_cannot_be_read_are_told(
    broken: Path, name: str, content: bytes | None
) -> None:
    """As after a download, or a copy, that broke off."""
    file = broken / name
    file.write_bytes(file.read_bytes()[:1000] if content is None else content)
    cpu = torch.device("cpu")
    told = f"^{broken}: its files cannot be read as a model's: "
    with pytest.raises(ModelSourceError, match=told):
        load_causal_lm(broken, device=cpu, dtype=torch.float32)
    with pytest.raises(ModelSourceError, match=told):
        load_value_model(broken, device=cpu, attention="sdpa", vocab_size=258, dtype=torch.float32)
    if name == "model.safetensors":
        with pytest.raises(ModelSourceError, match=f"^{file}: "):
            stored_dtype(broken)


def test_a_file_that_a_link_leads_nowhere_for_is_told(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a hub's cache that was cleaned up. Files that this user may not read end in the same error."""
    monkeypatch.setenv("PPOD_CACHE_DIR", str(broken / "cache"))
    weights = broken / "model.safetensors"
    weights.unlink()
    weights.symlink_to(broken / "none")
    with pytest.raises(ModelSourceError) as caught:
        resolve(str(broken))
    assert str(caught.value) == f"model {str(broken)!r}: {weights} cannot be read: No such file or directory"


@pytest.mark.parametrize("kept", ["", "[]", "{}"])
def test_a_fingerprint_that_was_cut_off_is_made_anew(broken: Path, monkeypatch: pytest.MonkeyPatch, kept: str) -> None:
    """As after a crash of the machine, which may leave a file empty that was renamed just before."""
    monkeypatch.setenv("PPOD_CACHE_DIR", str(broken / "cache"))
    first = resolve(str(broken)).fingerprint
    [memo] = (broken / "cache" / "fingerprints").iterdir()
    good = memo.read_text()
    memo.write_text(kept)
    assert resolve(str(broken)).fingerprint == first
    assert memo.read_text() == good


@pytest.mark.parametrize("fault", [SafetensorError("No space left on device"), OSError(28, "No space left on device")])
def test_a_disk_that_is_full_when_the_packaged_model_is_converted_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def full(*_: object, **__: object) -> NoReturn:
        raise fault

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: build_tokenizer())
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: build_model())
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(ModelSourceError, match=r"cache of models cannot be written: .*No space left .*PPOD_CACHE_DIR"):
        resolve("packaged:smollm2-135m-instruct", tmp_path)
    assert [path.name for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def test_a_quantised_model_whose_package_is_missing_is_told(broken: Path) -> None:
    declare(broken, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    with pytest.raises(ModelSourceError, match=f"^{broken}: what it takes to read it is not installed: .*optimum"):
        load_causal_lm(broken, device=torch.device("cpu"), dtype=torch.float32)


@needs_bitsandbytes
@pytest.mark.parametrize("part", [{}, {"lora": {"rank": 4}}, {"lora": {"rank": 4, "quantization": "nf4"}}])
def test_a_quantised_model_is_no_policy(tmp_path: Path, part: dict[str, object]) -> None:
    """It would train what is not quantised of it, such as its norms, and its pushes would be of other shapes."""
    build_model(tied=False).save_pretrained(dense := tmp_path / "dense")
    path, cpu = tmp_path / "quantised", torch.device("cpu")
    load_quantised(dense, device=cpu, dtype=torch.float32, attention="sdpa").save_pretrained(path)
    policy = {"source": str(path), "device": "cpu", "dtype": "float32", **part}
    config = TrainerConfig.model_validate({"run_dir": str(tmp_path), "services": TARGETS, "policy": policy})
    with pytest.raises(
        ModelSourceError, match=f"^{path}: its weights are quantised \\(bitsandbytes\\), which cannot be"
    ):
        load_policy(config, Ranks(cpu))
    with pytest.raises(ModelSourceError, match="its weights are quantised"):
        load_value_model(path, device=cpu, attention="sdpa", vocab_size=320, dtype=torch.float32)


def test_a_quantised_model_that_is_dense_once_loaded_is_trained(broken: Path) -> None:
    """As gpt-oss is where there is no kernel for its four bits."""
    declare(broken, {"quant_method": "mxfp4"})
    model = load_causal_lm(broken, device=torch.device("cpu"), dtype=torch.float32)
    check_dense(broken, model.config)
    assert quantisation_of(AutoConfig.from_pretrained(broken)) == "mxfp4"


def declare(path: Path, quantisation: dict[str, object]) -> None:
    """Have a checkpoint's configuration tell that it is quantised."""
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
