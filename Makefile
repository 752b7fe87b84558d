# `make` lists the targets. GNU make 3.81 (the one of macOS) is enough.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install serve test check lint format soak soak-traffic fairness constraints clean

VENV := .venv
BIN := $(VENV)/bin
CONFIG ?= config/development.toml
OS := $(shell uname -s)

# The variant of mlx: Metal comes with the base package; on Linux exactly one of the extras, never both.
ifeq ($(OS),Linux)
VARIANT := $(shell if nvidia-smi >/dev/null 2>&1; then echo cuda; else echo cpu; fi)
else
VARIANT := metal
endif
EXTRA := $(filter cpu cuda,$(VARIANT))
comma := ,
TOOLS :=
EXTRAS = $(if $(TOOLS),dev$(if $(EXTRA),$(comma)))$(EXTRA)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_ROOT_USER_ACTION := ignore
PIP = $(BIN)/python -m pip --quiet --quiet
# On all cores, which pip does not; what some package brings for other versions of Python need not compile.
COMPILE = $(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null || true

# mlx's CPU backend multiplies matrices through BLAS, and the wheel's own is slow: preload OpenBLAS where it is.
ifeq ($(VARIANT),cpu)
OPENBLAS = $(shell PATH="$$PATH:/sbin:/usr/sbin"; \
	{ ldconfig -p 2>/dev/null | sed -n 's/.*libopenblas\.so\.0 .*=> //p'; \
	  ls /usr/lib/*/openblas-pthread/libopenblas.so.0 2>/dev/null; } | head -n 1)
# A KV cache that grows or is joined is copied into new memory: keep freed memory mapped, because mapping and
# zeroing it again made single steps twice as long.
define OPENBLAS_ENV
export MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=67108864; \
preload='$(OPENBLAS)'; \
if [ -n "$$preload" ]; then export LD_PRELOAD="$$preload$${LD_PRELOAD:+:$$LD_PRELOAD}"; \
else echo 'OpenBLAS not found, so this will be slow: apt-get install libopenblas0-pthread' >&2; fi;
endef
endif

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

# One environment, made once. The stamps remember what it was made from: with both present no pip runs, so that
# a second start needs neither time nor network. Changing the variant makes it anew.
RUNTIME := $(VENV)/.runtime-$(VARIANT)
DEVELOP := $(VENV)/.develop-$(VARIANT)

$(RUNTIME): pyproject.toml constraints.txt
	@set -e; \
	for python in $${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo 'Python 3.11 or newer is needed; name one with PYTHON=...' >&2; exit 1; fi; \
	if [ ! -x $(BIN)/python ] || [ -z "$$(ls $(VENV)/.runtime-$(VARIANT) 2>/dev/null)" ]; then \
	  $$found -m venv --clear $(VENV); fi; \
	rm -f $(VENV)/.runtime-* $(VENV)/.develop-*; \
	echo "Installing mlxd ($(VARIANT)) into $(VENV) with $$($(BIN)/python --version)" >&2; \
	$(PIP) install --no-compile --constraint constraints.txt --editable '.$(if $(EXTRAS),[$(EXTRAS)])'; \
	$(COMPILE); \
	echo '$(TOOLS)' > $@

# Who wants the tools and has nothing yet gets everything at once: a second pip resolves it all again.
$(DEVELOP): TOOLS := dev
$(DEVELOP): $(RUNTIME)
	@set -e; if ! grep -q dev $(RUNTIME); then \
	  echo "Installing the development tools" >&2; \
	  $(PIP) install --no-compile --constraint constraints.txt --editable '.$(if $(EXTRAS),[$(EXTRAS)])'; \
	  $(COMPILE); \
	fi
	@touch $@

install: $(DEVELOP) ## Make .venv with everything for development

serve: $(RUNTIME) ## Start the service in the foreground (PORT=, HOST=, CONFIG=)
	@$(OPENBLAS_ENV) exec $(BIN)/mlxd --config $(CONFIG) serve $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT))

# As root with apt-get at hand the Debian packages are brought; elsewhere what needs them skips and says so.
debian-packages:
	@missing=; \
	if [ "$(VARIANT)" = cpu ] && [ -z '$(OPENBLAS)' ]; then missing="$$missing libopenblas0-pthread"; fi; \
	if ! ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then missing="$$missing postgresql"; fi; \
	if ! command -v redis-server >/dev/null; then missing="$$missing redis-server"; fi; \
	if ! command -v promtool >/dev/null; then missing="$$missing prometheus"; fi; \
	if ! command -v plistutil >/dev/null; then missing="$$missing libplist-utils"; fi; \
	if ! command -v shellcheck >/dev/null; then missing="$$missing shellcheck"; fi; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi
.PHONY: debian-packages

# First, three at a time, because it waits for a quarter of its time, and each with one BLAS thread (threads of two would
# spin for each other): what is measured for coverage; then, two at a time and not measured, which would make them and
# the processes that they start twice as slow, what runs whole services or many steps (what is longest first); last,
# alone, what takes both cores or the time.
test: $(DEVELOP) debian-packages ## Run every test, with coverage, as CI does (with ARGS= one run of pytest, which gets them)
	@$(BIN)/coverage erase
	@$(OPENBLAS_ENV) \
	pytest="$(BIN)/python -m pytest"; \
	if [ -n '$(ARGS)' ]; then exec $$pytest --cov=service -m 'not soak' $(ARGS); fi; \
	failed=; \
	beside="$$pytest --dist loadfile --durations=15 -m"; \
	OPENBLAS_NUM_THREADS=1 $$beside 'not soak and not alone' -n 3 --cov=service tests/launchd tests/unit || failed=1; \
	OPENBLAS_NUM_THREADS=1 $$beside 'not soak and not alone' -n 2 tests/load tests --ignore tests/launchd --ignore tests/unit || failed=1; \
	$$pytest --durations=25 -m 'alone and not soak' tests || failed=1; \
	[ -z "$$failed" ]

soak: $(DEVELOP) debian-packages ## Run the long variants, with full counts
	@$(OPENBLAS_ENV) exec $(BIN)/python -m pytest --full-counts --timeout 7200 $(ARGS)

soak-traffic: $(DEVELOP) ## Mixed traffic for half an hour: does anything grow? Draws docs/soak.svg (DURATION= seconds, OUT=)
	@$(OPENBLAS_ENV) exec $(BIN)/python -m tests.load.soak --seconds $(or $(DURATION),1800) --out $(or $(OUT),docs)

fairness: $(DEVELOP) ## Measure a flood beside a polite client and draw docs/fairness.svg; takes minutes
	@$(OPENBLAS_ENV) exec $(BIN)/python -m tests.load.fairness

check: $(DEVELOP) ## Lint, format check, types and the architecture tests; under a minute
	@failed=; \
	$(MAKE) --no-print-directory lint || failed=1; \
	$(BIN)/python -m pytest --quiet tests/test_architecture.py tests/test_architecture_detectors.py || failed=1; \
	[ -z "$$failed" ]

lint: $(DEVELOP)
	@failed=; \
	$(BIN)/ruff check --quiet . || failed=1; \
	$(BIN)/ruff format --check --quiet . || { echo 'not formatted: make format' >&2; failed=1; }; \
	$(BIN)/mypy --no-error-summary || failed=1; \
	[ -z "$$failed" ]

format: $(DEVELOP) ## Format, and mend what the linter can mend
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format .

# Resolved for both Linux variants from nothing (no constraints, nothing installed): the newest that the ranges allow.
constraints: ## Pin the newest versions that pyproject.toml allows
	@set -e; work=$$(mktemp -d); trap 'rm -rf "$$work"' EXIT; \
	python3 -m venv "$$work/venv"; \
	for extra in cpu cuda; do \
	  "$$work/venv/bin/python" -m pip --quiet --quiet install --dry-run --ignore-installed \
	    --report "$$work/$$extra.json" ".[dev,$$extra]"; \
	done; \
	python3 .ci/constraints.py "$$work/cpu.json" "$$work/cuda.json" > "$$work/constraints.txt"; \
	cat "$$work/constraints.txt" > constraints.txt; wc -l constraints.txt

clean: ## Remove the environment, caches and measurements (never .state: it holds the model)
	rm -rf $(VENV) build dist .coverage .coverage.* .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find service tests -name __pycache__ -type d -prune -exec rm -rf {} +
