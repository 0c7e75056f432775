"""The configurations for compose are those that run locally, and compose.yaml fits them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import yaml

from ppod_deploy.launcher import HEALTH_NAMES, LAST_REPLIES_S
from ppod_deploy.processes import CHILD_ENVIRONMENT
from ppod_models.configuration import load_config
from ppod_services.core.config import ServiceConfig
from ppod_services.core.server import _FLUSH_TIMEOUT_S  # pyright: ignore[reportPrivateUsage]
from ppod_services.generation.config import GenerationServiceConfig
from ppod_services.reference.config import ReferenceServiceConfig
from ppod_services.reward.config import RewardServiceConfig
from ppod_trainer.config import TrainerConfig
from support.processes import ROOT

DOCKER = ROOT / "docker"
CONFIGS = DOCKER / "configs"
SCHEMAS: dict[str, type[ServiceConfig]] = {
    "reward": RewardServiceConfig,
    "reference": ReferenceServiceConfig,
    "generation": GenerationServiceConfig,
    "generation-vllm": GenerationServiceConfig,
}
Values = dict[str, object]


def read(path: Path) -> Values:
    return cast(Values, yaml.safe_load(path.read_text()))


@pytest.fixture(scope="module")
def services() -> dict[str, Values]:
    return cast("dict[str, Values]", read(DOCKER / "compose.yaml")["services"])


def test_services_are_configured_as_the_default_run_but_for_where_they_listen() -> None:
    run = cast("dict[str, Values]", read(ROOT / "deploy/ppod_deploy/configs/smollm2-cpu.yaml")["services"])
    for name, local in run.items():
        here = read(CONFIGS / f"{name}.yaml")
        assert here.pop("tenancy", {"open_admin": True}) == {"open_admin": True}
        listen = cast(Values, here["listen"])
        assert listen.pop("host") == "0.0.0.0"
        assert here == local


def test_the_trainer_is_configured_as_the_default_run_but_for_addresses() -> None:
    here = read(CONFIGS / "trainer.yaml")
    local = cast(Values, read(ROOT / "deploy/ppod_deploy/configs/smollm2-cpu.yaml")["trainer"])
    assert {here.pop("run_dir"), here.pop("resume")} == {"/runs/ppo", "if_possible"}
    assert here.pop("metrics") == {"host": "0.0.0.0"}
    targets = cast(Values, here.pop("services"))
    models = cast(Values, local.pop("services"))
    assert {key: targets.pop(key) for key in models} == models
    assert here == local
    assert set(targets) == {"reward", "reference", "generation", "reference_admin", "generation_admin"}


def test_the_trainer_finds_each_port_where_its_service_listens() -> None:
    targets = load_config(TrainerConfig, CONFIGS / "trainer.yaml").services
    for name in ("reward", "reference", "generation"):
        listen = load_config(SCHEMAS[name], CONFIGS / f"{name}.yaml").listen
        assert getattr(targets, name) == f"{name}:{listen.port}"
        if listen.admin_port is not None:
            assert getattr(targets, f"{name}_admin") == f"{name}:{listen.admin_port}"


@pytest.mark.parametrize("name", SCHEMAS)
def test_each_configuration_is_right_and_reached_from_other_containers(name: str) -> None:
    assert load_config(SCHEMAS[name], CONFIGS / f"{name}.yaml").listen.host == "0.0.0.0"


@pytest.mark.parametrize("name", ["reward", "reference", "generation"])
def test_compose_asks_publishes_and_stops_as_configured(services: dict[str, Values], name: str) -> None:
    service, config = services[name], load_config(SCHEMAS[name], CONFIGS / f"{name}.yaml")
    listen = config.listen
    health = cast(Values, service["healthcheck"])
    expected = ["CMD", "python", "-m", "ppod.health", f"127.0.0.1:{listen.port}", HEALTH_NAMES[name]]
    assert health["test"] == expected
    # The admin port is not published, and the others on loopback only.
    published = [f"127.0.0.1:{port}:{port}" for port in (listen.port, listen.metrics_port)]
    assert service["ports"] == published
    assert service["command"] == [f"ppod_services.{name}", "--config", f"/etc/ppod/{name}.yaml"]
    last_replies_s = 0.2 + _FLUSH_TIMEOUT_S
    assert int(cast(str, service["stop_grace_period"]).removesuffix("s")) > config.drain_grace_s + last_replies_s
    assert last_replies_s < LAST_REPLIES_S


def test_images_built_as_the_page_says_are_those_that_compose_runs(services: dict[str, Values]) -> None:
    files = (services, cast("dict[str, Values]", read(DOCKER / "compose.vllm.yaml")["services"]))
    run = {cast(str, one["image"]).replace("${PPOD_TAG:-", "").rstrip("}") for file in files for one in file.values()}
    commands = re.findall(r"docker build .*-t (\S+)", (DOCKER / "README.md").read_text())
    assert commands
    assert set(commands) <= run


def test_compose_leaves_no_process_more_than_it_needs(services: dict[str, Values]) -> None:
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["networks"] == ["ppod"]
        assert not {"privileged", "cap_add", "user", "network_mode", "pid"} & service.keys()


def test_the_trainers_metrics_are_published_by_the_command_that_starts_it(services: dict[str, Values]) -> None:
    """By itself `compose run` publishes no port."""
    assert services["trainer"]["ports"] == ["127.0.0.1:9104:9104"]
    for page in ("README.md", "compose.yaml"):
        [command] = re.findall(r"compose \S+ \S+ run .* trainer\b", (DOCKER / page).read_text())
        assert " --service-ports " in command, page


def test_each_service_has_the_time_to_start_that_its_image_gives_it(services: dict[str, Values]) -> None:
    """compose's healthcheck takes the place of the image's."""
    vllm = cast("dict[str, Values]", read(DOCKER / "compose.vllm.yaml")["services"])["generation"]
    for service, image in ((services["generation"], "services"), (services["generation"] | vllm, "generation")):
        [given] = re.findall(r"--start-period=(\S+)", (DOCKER / f"{image}.Dockerfile").read_text())
        assert cast(Values, service["healthcheck"])["start_period"] == given


def test_what_triton_compiles_can_be_loaded(services: dict[str, Values]) -> None:
    """Its shared objects lie below HOME, and Docker mounts a tmpfs noexec where nothing else is said."""
    home = re.findall(r"\bHOME=(\S+)", (DOCKER / "generation.Dockerfile").read_text())
    [mount] = cast("list[str]", services["generation"]["tmpfs"])
    path, _, options = mount.partition(":")
    assert home == [path]
    assert "exec" in options.split(",")


@pytest.mark.parametrize("image", ["services", "trainer", "generation"])
def test_processes_of_an_image_start_as_those_of_the_launcher(image: str) -> None:
    text = (DOCKER / f"{image}.Dockerfile").read_text()
    assert dict(re.findall(r"^(?:ENV| )\s*([A-Za-z_]+)=(\S+)", text, re.MULTILINE)).items() >= CHILD_ENVIRONMENT.items()


def test_torch_compiles_no_kernels_at_a_call() -> None:
    """Triton and others would, on CUDA devices, and there is no compiler in the images but in that of vLLM."""
    question = "from torch._native.common_utils import check_native_jit_disabled as off; print(off())"
    own = {name: value for name, value in os.environ.items() if name != "TORCH_DISABLE_NATIVE_JIT"}
    for environment, off in ({**own, **CHILD_ENVIRONMENT}, "True"), (own, "False"):
        asked = subprocess.run([sys.executable, "-c", question], check=True, env=environment, stdout=subprocess.PIPE)
        assert asked.stdout.decode().strip() == off


def test_vllm_leaves_the_gpu_that_all_share_to_the_others() -> None:
    """By default it takes nine tenths of it, and does not start where the others have more than the rest."""
    gpus = cast("dict[str, Values]", read(DOCKER / "compose.gpu.yaml")["services"])
    assert list(gpus) == ["reward", "reference", "generation", "trainer"]
    assert load_config(GenerationServiceConfig, CONFIGS / "generation-vllm.yaml").vllm.kv_cache_gib == 1
    run = read(ROOT / "deploy/ppod_deploy/configs/smollm2-cuda.yaml")
    generation = cast("dict[str, Values]", run["services"])["generation"]
    assert GenerationServiceConfig.model_validate({**generation, "backend": "vllm"}).vllm.kv_cache_gib == 4


def test_the_trainer_waits_for_every_service(services: dict[str, Values]) -> None:
    trainer = services["trainer"]
    awaited = {name: {"condition": "service_healthy"} for name in ("reward", "reference", "generation")}
    assert trainer["depends_on"] == awaited
    assert trainer["profiles"] == ["train"]


@pytest.mark.parametrize(("image", "name"), [("services", "reward"), ("generation", "generation")])
def test_an_image_asks_the_health_of_what_it_runs_by_default(image: str, name: str) -> None:
    """Arguments of HEALTHCHECK, CMD and EXPOSE are text to Docker; nothing else would notice that they drift."""
    text = (DOCKER / f"{image}.Dockerfile").read_text()
    listen = load_config(SCHEMAS[name], CONFIGS / f"{name}.yaml").listen
    assert f'CMD ["python", "-m", "ppod.health", "127.0.0.1:{listen.port}", "{HEALTH_NAMES[name]}"]' in text
    assert f'CMD ["ppod_services.{name}", "--config", "/etc/ppod/{name}.yaml"]' in text
    exposed = next(line for line in text.splitlines() if line.startswith("EXPOSE")).split()[1:]
    assert {str(port) for port in (listen.port, listen.metrics_port)} <= set(exposed)
