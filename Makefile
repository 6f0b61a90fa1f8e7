# kvservice: everything a newcomer types. `make help` lists it; nothing here needs root.

PYTHON ?= python3
VENV ?= .venv
# Where the engine tests' vLLM lives, apart from what the project itself needs.
VLLM_VENV ?= .venv-vllm
# Extra arguments for installing torch, for example an index that carries the build of your choice.
TORCH_PIP_ARGS ?=
PYTEST_ARGS ?=
DEMO_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
# Its own command with its own pin: left to the resolver, torch arrives with gigabytes of CUDA packages.
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# One stamp per set of packages, remade when the pins or the extras change.
VENV_STAMP := $(VENV)/.made
DEMO_STAMP := $(VENV)/.installed-demo
DEV_STAMP := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help environment vllm-environment kubernetes-environment demo test test-engines check check-format check-lint check-types check-imports check-lengths check-protos gpu \
	bench protos format clean clean-environment

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(DEMO_STAMP) ## conversations that resume from the service; DEMO_ARGS="--model PATH" for a real model
	$(BIN)/kvservice demo $(DEMO_ARGS)

test: $(DEV_STAMP) ## unit and integration tests; PYTEST_ARGS="-k name" to choose
	$(BIN)/python -m pytest -m "not engines and not gpu" $(PYTEST_ARGS)

test-engines: $(DEV_STAMP) vllm-environment ## real engines end to end
	@VLLM_VENV=$(VLLM_VENV) $(BIN)/python -m pytest -m engines $(PYTEST_ARGS) || { status=$$?; \
	if [ $$status -eq 5 ]; then echo "make test-engines: no test carries the marker 'engines': nothing was tested" >&2; fi; \
	exit $$status; }

check: check-format check-lint check-types check-imports check-lengths check-protos ## every static check

check-format: $(DEV_STAMP)
	$(BIN)/ruff format --check

check-lint: $(DEV_STAMP)
	$(BIN)/ruff check

check-types: $(DEV_STAMP)
	$(BIN)/mypy

check-imports: $(DEV_STAMP)
	$(BIN)/lint-imports

check-lengths: $(DEV_STAMP)
	$(BIN)/python scripts/check_lengths.py

check-protos: $(DEV_STAMP)
	$(BIN)/python scripts/check_protos.py

bench: $(DEV_STAMP) ## the figures, also in build/bench.jsonl; BENCH_ARGS chooses
	@mkdir -p build
	$(BIN)/python -m benchmarks.run $(BENCH_ARGS)

gpu: ## on a machine with a GPU: its tests and figures
	bash scripts/gpu.sh

protos: $(DEV_STAMP) ## regenerate client/kvservice_proto from protos/
	PATH="$(abspath $(BIN)):$$PATH" bash scripts/generate_protos.sh

format: $(DEV_STAMP) ## rewrite the code in the house's format
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

clean: ## remove what was built and cached; the environment stays
	rm -rf build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

clean-environment: ## remove the environments
	rm -rf $(VENV) $(VLLM_VENV) $(VLLM_VENV).lock .venv-kubernetes

environment: $(DEV_STAMP) ## everything that test and check need

# Status 3 says that vLLM cannot be had here: its tests are then skipped with that reason, and fail in CI.
vllm-environment: ## a vLLM without a GPU, for the engine tests; VLLM_VENV chooses where
	@VLLM_VENV=$(VLLM_VENV) PYTHON=$(PYTHON) TORCH_PIP_ARGS="$(TORCH_PIP_ARGS)" scripts/install_vllm.sh || [ $$? -eq 3 ]

kubernetes-environment: ## kubectl and the schemas that the tests of k8s/ ask for; without it they are skipped
	@PYTHON=$(PYTHON) scripts/install_kubernetes_tools.sh

$(VENV_STAMP):
	@command -v $(PYTHON) >/dev/null || { \
	echo "make: no interpreter '$(PYTHON)': install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "make: '$(PYTHON)' is $$($(PYTHON) -V 2>&1), kvservice needs 3.11 or newer: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	echo "make: '$(PYTHON)' has no venv module: install it (Debian: python3-venv), or make PYTHON=/path/to/another" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The dev set contains the demo's: each installs what is missing, so the order does not matter.
$(DEMO_STAMP): $(VENV_STAMP) pyproject.toml constraints.txt
	@echo "environment: installing $(TORCH), the daemon and transformers into $(VENV) (minutes, the first time)"
	@$(PIP_INSTALL) $(TORCH_PIP_ARGS) $(TORCH)
	@$(PIP_INSTALL) -e '.[daemon,transformers]'
	@touch $@

$(DEV_STAMP): $(DEMO_STAMP)
	@echo "environment: installing the test and check tools into $(VENV)"
	@$(PIP_INSTALL) -e '.[daemon,transformers,dev]'
	@touch $@
