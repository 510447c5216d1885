# Everything runs in .venv, which `install` makes from the lock files and renews when they change.

PYTHON_IN_VENV := .venv/bin/python
INSTALLED := .venv/.installed
LOCKS := deploy/requirements-dev.txt deploy/requirements-nodeps.txt
# Processes that run the tests.
JOBS ?= 2
PYTEST := $(PYTHON_IN_VENV) -m pytest
GATEWAY_TESTS := tests/gateway tests/end_to_end tests/deploy/test_compile_gateway.py
MYPY_PATHS := gateway deploy/embedded $(wildcard */core)

.DEFAULT_GOAL := help
.PHONY: help install compile demo test test-compiled lint format bench bench-gateway bench-metering bench-ingestion bench-ledger soak lock clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## Install everything into .venv (PYTHON=/path/to/python to choose the interpreter)

$(INSTALLED): $(LOCKS) deploy/install.sh .python-version
	@PYTHON="$(PYTHON)" sh deploy/install.sh
	@touch $@

compile: $(INSTALLED)  ## Compile the gateway: less processor time for each call (takes two minutes)
	@$(PYTHON_IN_VENV) -m deploy.compile_gateway

demo: $(INSTALLED)  ## Run the whole system on embedded servers with real traffic, until Ctrl-C (ONCE=1: end by itself)
	$(PYTHON_IN_VENV) manage.py demo $(if $(ONCE),--once)

test: lint compile  ## Run all checks and all tests, those of the gateway compiled as well (JOBS=2 processes)
	$(PYTEST) -n $(JOBS) -m "not serial"
	$(PYTEST) -m serial
	@$(MAKE) --no-print-directory test-compiled

test-compiled: export TOLLBOOK_GATEWAY_COMPILED_DIR = $(CURDIR)/.venv/compiled
test-compiled: compile  ## Run the tests of the gateway on the compiled one
	$(PYTEST) -n $(JOBS) -m "not serial and not sources" $(GATEWAY_TESTS)
	$(PYTEST) -m "serial and not sources" $(GATEWAY_TESTS)

lint: $(INSTALLED)  ## Check format, style, types and import arrows
	$(PYTHON_IN_VENV) -m ruff check .
	$(PYTHON_IN_VENV) -m ruff format --check .
	$(PYTHON_IN_VENV) -m mypy $(MYPY_PATHS)
	.venv/bin/lint-imports

format: $(INSTALLED)  ## Format the code and fix what can be fixed
	$(PYTHON_IN_VENV) -m ruff format .
	$(PYTHON_IN_VENV) -m ruff check --fix .

bench: bench-gateway bench-metering  ## Run both benchmarks

bench-gateway: compile  ## Measure CPU per call against nginx, and count that no event is lost
	$(PYTHON_IN_VENV) -m deploy.bench.gateway

bench-metering: $(INSTALLED)  ## Measure events per second from stream to rollup
	$(PYTHON_IN_VENV) -m deploy.bench.metering

bench-ingestion: $(INSTALLED)  ## Measure usage events per second by API, on one web process
	$(PYTHON_IN_VENV) -m deploy.bench.ingestion

bench-ledger: $(INSTALLED)  ## Measure posting, verifying and exporting journal entries
	$(PYTHON_IN_VENV) -m deploy.bench.ledger

soak: $(INSTALLED)  ## Record a million events exactly once while everything is killed
	$(PYTHON_IN_VENV) -m deploy.bench.metering_soak

lock: $(INSTALLED)  ## Rewrite the lock files from pyproject.toml (UPGRADE=1: newest versions)
	@sh deploy/lock.sh "$$(command -v uv || echo .venv/uv/bin/uv)" $(if $(UPGRADE),--upgrade)

clean:  ## Remove .venv, caches and the embedded data of .tollbook (its databases and secrets too)
	@sh deploy/clean.sh
