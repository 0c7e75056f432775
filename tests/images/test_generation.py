"""The image of generation, on vLLM's CPU build: hardened, it answers real calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import pytest

from ppod import GenerationClient, Sampling
from ppod_deploy.processes import CHILD_ENVIRONMENT
from support.containers import inspect_image, must, running, shell
from support.models_here import token_ids
from support.processes import ROOT

START_TIMEOUT_S = 600.0


def test_it_has_vllm_and_no_pip(image: Callable[[str], str]) -> None:
    name = image("generation")
    config = cast("dict[str, object]", inspect_image(name)["Config"])
    assert config["User"] == "10001:10001"
    variables = dict(line.split("=", 1) for line in cast("list[str]", config["Env"]))
    assert CHILD_ENVIRONMENT.items() <= variables.items()
    found = must(shell(name, "ls /opt/ppod/lib/python3*/site-packages; command -v pip gcc git; true")).split()
    assert {"vllm", "ppod_services"} <= set(found)
    assert not {"pip", "/opt/ppod/bin/pip", "/usr/bin/gcc", "/usr/bin/git"} & set(found)


@pytest.mark.timeout(900)
def test_a_container_generates_with_vllm(image: Callable[[str], str], network: str, models_volume: str) -> None:
    with running(
        image("generation"),
        "ppod-test-generation",
        network=network,
        volumes={"/etc/ppod:ro": str(ROOT / "docker/configs"), "/models": models_volume},
        command=["ppod_services.generation", "--config", "/etc/ppod/generation-vllm.yaml"],
        options=["--shm-size=1g"],
    ) as container:
        container.wait_healthy(START_TIMEOUT_S)
        with GenerationClient(f"{container.address}:50053", timeout_s=120) as client:
            prompts = [token_ids("The capital of France is")] * 2
            completions = client.generate(prompts, Sampling(8, temperature=0.0), seeds=[1, 2])
        assert container.stop() == 0
    paris = token_ids(" Paris")
    for completion in completions:
        assert completion.token_ids[: len(paris)].tolist() == paris
        assert np.all(completion.logprobs <= 0)
