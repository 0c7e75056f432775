from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import HTTPError
from tokenizers import Tokenizer, models
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from ppod_models.configuration import (
    ConfigError,
    ConfigModel,
    ModelConfig,
    TracingConfig,
    dump_config,
    load_config,
    parse_config,
    read_yaml,
)
from ppod_models.loading import (
    load_causal_lm,
    load_tokenizer,
    pick_device,
    pick_dtype,
    token_id_bound,
    tokenizer_fingerprint,
)
from ppod_models.sources import ModelSourceError, name_elsewhere, resolve, write_once
from support.tiny_model import build_model, build_tokenizer
from support.tiny_trunk import save_tiny_trunk


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPOD_CACHE_DIR", str(tmp_path / "cache"))


def test_unknown_packaged_model_names_the_known_ones(tmp_path) -> None:
    with pytest.raises(ModelSourceError, match="'packaged:gpt-9': unknown; packaged models are smollm2-135m-instruct"):
        resolve("packaged:gpt-9", tmp_path)


@pytest.mark.parametrize("source", ["/no/such/model", "./no/such/model", "~/no-such-model-here"])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(source) -> None:
    with pytest.raises(ModelSourceError, match="no such directory"):
        resolve(source)


def test_a_packaged_model_is_the_directory_that_it_was_unpacked_to_elsewhere(
    tmp_path: Path,
) -> None:
    kept = tmp_path / "cache" / "models" / "smollm2-135m-instruct"
    kept.mkdir(parents=True)
    build_model().save_pretrained(kept)
    assert name_elsewhere("packaged:smollm2-135m-instruct") == (str(kept), None)


@pytest.mark.parametrize(("error", "reason"), [(HTTPError(""), "HTTPError"), (HTTPError("peer\nclosed"), "peer")])
def test_a_download_that_breaks_off_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def break_off(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", break_off)
    with pytest.raises(ModelSourceError) as caught:
        resolve("org/name")
    told = "not a directory, not in the hub's cache, and the hub gave none"
    assert str(caught.value) == f"model 'org/name': {told}: {reason}"


def test_directories_that_hold_no_model(tmp_path) -> None:
    with pytest.raises(ModelSourceError, match=r"holds no config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelSourceError, match="pickled weights are not loaded"):
        resolve(str(tmp_path))


def test_fingerprint_follows_the_weights(tmp_path) -> None:
    path = save_tiny_trunk(tmp_path / "tiny")
    first = resolve(str(path))
    assert (first.name, first.path) == ("tiny", path)
    assert resolve(str(path)).fingerprint == first.fingerprint
    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert resolve(str(path)).fingerprint != first.fingerprint


def test_pods_that_share_a_cache_keep_a_fingerprint_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is process 1 of its own container, so a process's id tells no two of them apart."""
    model = str(save_tiny_trunk(tmp_path / "tiny"))
    both_have_written, rename = threading.Barrier(2, timeout=20), Path.rename

    def rename_together(path: Path, target: Path) -> Path:
        both_have_written.wait()
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_together)
    with ThreadPoolExecutor(2) as pods:
        found = [each.fingerprint for each in pods.map(resolve, [model, model])]
    assert found[0] == found[1]
    [memo] = (tmp_path / "cache" / "fingerprints").iterdir()
    assert json.loads(memo.read_text())["fingerprint"] == found[0]


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A file in place of the directory, which root cannot write to either.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PPOD_CACHE_DIR", str(tmp_path / "file" / "cache"))
    for source in ("packaged:smollm2-135m-instruct", str(save_tiny_trunk(tmp_path / "model"))):
        with pytest.raises(ModelSourceError, match=r"file/cache.*: Not a directory; point PPOD_CACHE_DIR or XDG"):
            resolve(source)


def test_a_directory_appears_whole_or_not_at_all(tmp_path) -> None:
    target = tmp_path / "model"

    def fail(aside) -> None:
        (aside / "file").write_text("half")
        raise ValueError("disk full")

    with pytest.raises(ValueError, match="disk full"):
        write_once(target, fail)
    assert list(tmp_path.iterdir()) == []
    write_once(target, lambda aside: (aside / "file").write_text("whole") and None)
    assert (target / "file").read_text() == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_processes_that_start_together_convert_once(tmp_path) -> None:
    """Four processes ask for the packaged model at once; all get it, and one conversion was done."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom ppod_models import sources\n"
        "def convert(directory, name, aside):\n"
        "    import time\n"
        "    with open(sys.argv[2], 'a') as log: log.write('converted\\n')\n"
        "    time.sleep(0.5)\n"
        "    (aside / 'config.json').write_text('{}'); (aside / 'model.safetensors').write_bytes(b'x')\n"
        "sources._convert_gguf = convert\n"
        "sources.resolve('packaged:smollm2-135m-instruct', Path(sys.argv[1]))\n"
    )
    log = tmp_path / "log"
    command = [sys.executable, "-c", code, str(tmp_path / "cache"), str(log)]
    environment = {**os.environ, "PYTHONPATH": "protos:services", "PPOD_CACHE_DIR": str(tmp_path / "memo")}
    processes = [subprocess.Popen(command, env=environment) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0, 0, 0, 0]
    assert log.read_text() == "converted\n"


class Outer(ConfigModel):
    model: ModelConfig
    steps: int


def test_all_faults_are_reported_at_once_with_dotted_paths() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(Outer, {"model": {"dtype": "int4", "threads": 0, "colour": 1}}, "here")
    assert {problem.split(":")[0] for problem in caught.value.problems} == {
        "model.source", "model.dtype", "model.threads", "model.colour", "steps",
    }  # fmt: skip
    assert "model.colour: unknown key" in caught.value.problems
    assert "steps: required, but missing" in caught.value.problems
    assert str(caught.value).startswith("here: 5 problems\n  ")


def test_yaml_round_trip_and_unreadable_files(tmp_path) -> None:
    config = Outer(model=ModelConfig(source="packaged:x"), steps=3)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(Outer, file) == config
    file.write_text("a: [1")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(Outer, file)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(Outer, tmp_path / "absent.yaml")


def test_a_collector_is_named_with_its_scheme() -> None:
    """Without one it would be spoken to by TLS, and its spans be lost, of which nobody is told."""
    for wrong in ("collector:4317", "http://collector:70000", "http://:4317", "ftp://collector:4317"):
        with pytest.raises(ConfigError, match=rf"endpoint: expected http://HOST:PORT/PATH or .*, found '{wrong}'"):
            parse_config(TracingConfig, {"endpoint": wrong}, "test")
    for endpoint in ("http://collector:4317", "https://collector:4317", None):
        assert parse_config(TracingConfig, {"endpoint": endpoint}, "test").endpoint == endpoint


def test_truth_is_no_number() -> None:
    """`threads: yes` would be one thread, and `off` for what is switched off by none another number."""
    for value in (True, False):
        with pytest.raises(ConfigError) as caught:
            parse_config(ModelConfig, {"source": "x", "threads": value}, "test")
        assert caught.value.problems == [f"threads: expected a number, found {value}"]
    assert parse_config(ModelConfig, {"source": "x", "threads": 1}, "test").threads == 1


class Places(ConfigModel):
    one: Path
    other: Path | None = None
    several: tuple[Path, ...] = ()


def test_a_tilde_is_the_home_and_no_directory_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "places.yaml").write_text("{one: ~/a b, other: '~', several: [~/c, /d, e/~/f]}")
    found = load_config(Places, Path("~/places.yaml"))
    assert (found.one, found.other) == (tmp_path / "a b", tmp_path)
    assert found.several == (tmp_path / "c", Path("/d"), Path("e/~/f"))
    with pytest.raises(ConfigError, match=r"one: .*home.*; write the whole path"):
        parse_config(Places, {"one": "~nobody-here/x"}, "test")


def test_a_key_that_is_there_twice_is_refused(tmp_path) -> None:
    """What stood below the first would have no effect, and nobody would be told."""
    file = tmp_path / "c.yaml"
    file.write_text("name: a\nmodel: {source: x}\nmodel: {device: cpu}\n")
    with pytest.raises(ConfigError, match="the key 'model' is there twice") as caught:
        read_yaml(file)
    assert "line 3, column 1" in str(caught.value)
    # What a merge brings along may be said otherwise; a number and its digits are two keys.
    file.write_text("a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 4}\nd: {1: 5, '1': 6}\n")
    assert read_yaml(file) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 3, "y": 4}, "d": {1: 5, "1": 6}}


def test_files_are_laid_over_each_other_key_by_key(tmp_path) -> None:
    first, second, third = (tmp_path / f"{number}.yaml" for number in (1, 2, 3))
    first.write_text("steps: 1\nmodel: {source: a, threads: 4, dtype: float32}")
    second.write_text("model: {threads: null, attention: eager}")
    third.write_text("# nothing\n")
    expected = Outer(model=ModelConfig(source="a", threads=None, dtype="float32", attention="eager"), steps=1)
    assert load_config(Outer, first, second, third) == expected
    third.write_text("model: {colour: 1}\nsteps: x")
    with pytest.raises(ConfigError, match=r"1\.yaml, .*2\.yaml, .*3\.yaml: 2 problems") as caught:
        load_config(Outer, first, second, third)
    assert "model.colour: unknown key" in caught.value.problems


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cuda:x", ""])
def test_a_device_that_is_not_there_is_told_in_one_line(device: str) -> None:
    with pytest.raises(ModelSourceError) as raised:
        pick_device(device)
    assert str(raised.value).startswith(f"device: found {device!r}, expected auto, cpu, or one that torch has here")
    assert "\n" not in str(raised.value)


def test_auto_is_bfloat16_only_where_the_device_is_faster_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated bfloat16 is tens of times slower than float32: an older CPU would take an hour for minutes of work."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda:0")
    for name, amx, avx512, expected in (
        ("Intel(R) Xeon(R) Processor", True, True, torch.bfloat16),
        ("Intel(R) Xeon(R) Processor", False, True, torch.float32),
        ("AMD EPYC 9355", False, True, torch.bfloat16),
        ("AMD EPYC 7R13", False, False, torch.float32),
    ):
        found = {"cpu_name": name, "amx_tile": amx, "avx512_bf16": avx512}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert pick_dtype("auto", cpu) == expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"})
    assert pick_dtype("auto", cpu) == torch.float32
    assert pick_dtype("auto", cuda) == torch.bfloat16
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((7, 0), torch.float32), ((7, 5), torch.float32), ((8, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        assert pick_dtype("auto", cuda) == expected
        assert pick_dtype("bfloat16", cuda) == torch.bfloat16


def test_a_tokenizers_fingerprint_is_the_same_however_it_was_used_before_it_was_saved(tmp_path: Path) -> None:
    """Calls leave padding and truncation behind, and trainers save the tokenizer with them; its ids stay the same."""
    tokenizer = build_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "bbb"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer.backend_tokenizer.padding is not None
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) == before
    tokenizer.add_tokens(["<another>"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_ids_are_bounded_by_the_highest_and_not_by_their_number() -> None:
    tokenizer = build_tokenizer()
    assert token_id_bound(tokenizer) == 258
    vocab = {"a": 0, "b": 7}
    holes = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="a")))
    assert token_id_bound(holes) == 8
    holes.add_tokens(["<end>"])
    assert token_id_bound(holes) == 1 + max(holes.get_vocab().values())


def test_logprobs_of_an_output_layer_that_no_file_holds_are_not_made(tmp_path: Path) -> None:
    """As of a reward model, or of a trunk saved by itself: transformers draws the layer at random, each time anew."""
    model = build_model(tied=False)
    model.base_model.save_pretrained(tmp_path)
    cpu = torch.device("cpu")
    with pytest.raises(ModelSourceError) as caught:
        load_causal_lm(tmp_path, device=cpu, dtype=torch.float32)
    expected = f"{tmp_path}: its weights lack lm_head.weight: it was saved as another kind of model"
    assert str(caught.value) == expected
    # What reads states alone takes it all the same.
    trunk = load_causal_lm(tmp_path, device=cpu, dtype=torch.float32, trunk_only=True).base_model
    tokens = torch.arange(5)[None]
    with torch.inference_mode():
        found, states = trunk(tokens).last_hidden_state, model.base_model(tokens).last_hidden_state
    torch.testing.assert_close(found, states, rtol=0, atol=0)


def test_a_tokenizer_without_a_fingerprint_is_told(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelSourceError) as caught:
        load_tokenizer(tmp_path)
    expected = f"{tmp_path}: its tokenizer is a ByT5Tokenizer; expected one with a tokenizer.json"
    assert str(caught.value) == expected
