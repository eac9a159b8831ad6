# Two commands do everything: `make serve` and `make test`. PYTHON makes the environment; PY runs in it.
PYTHON ?= python3
VENV := .venv
PY ?= $(VENV)/bin/python
ARGS ?=
INSTALLED := $(VENV)/.installed
# An environment named with PY is used as it is; our own is made first.
READY := $(if $(filter $(VENV)/%,$(PY)),$(INSTALLED))

.PHONY: help setup serve test test-quick coverage check audit format gpu test-deploy test-clients test-monitoring bench \
	bench-kernels compile dashboard clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

setup: $(INSTALLED) ## create .venv with everything in it, .venv/bin/ottava among it

# torch is named beside the packages that need it: asked for alone, its pin finds the right build for this machine.
$(INSTALLED): pyproject.toml constraints.txt $(wildcard kernels/cpu/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt "$$(grep ^torch== constraints.txt)" --editable '.[dev]'
	touch $@

serve: $(READY) ## prepare the demo model and serve it, W8A8 beside its baseline
	$(if $(filter $(VENV)/%,$(PY)),$(VENV)/bin/ottava,$(PY) -m service) serve $(ARGS)

# Test files are shared out among processes, so that what a file compiles and loads is made once.
JOBS ?= 2
GPU_JOBS ?= 12
QUICK_TESTS := $(addprefix tests/service/,engine comparison settings telemetry text) tests/test_docs.py
GPU_TESTS := tests/kernels tests/quant tests/service/engine

test: $(READY) ## run the tests that need no GPU
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-quick: $(READY) ## the tests of the engine and of what needs no model, for the edit loop
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(QUICK_TESTS) $(ARGS)

coverage: $(READY) ## run the tests, and show which lines they reach
	$(PY) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --cov=kernels --cov=quant --cov=service --cov-report=term $(ARGS)

# The programs beside PY, or those in PATH where PY is a bare name.
BIN := $(if $(findstring /,$(PY)),$(dir $(PY)))

check: $(READY) ## format, lint, types, layers, Dockerfile
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(BIN)hadolint docker/Dockerfile
	$(PY) -c 'from importlinter.cli import lint_imports_command; lint_imports_command()' --no-cache

audit: $(READY) ## look up known vulnerabilities of constraints.txt by pip-audit, or ARGS='--advisories FOLDER'
	$(PY) -m tests.support.audit $(ARGS)

format: $(READY) ## rewrite to the project's format
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

gpu: $(READY) ## run the tests that need a CUDA GPU
	$(PY) -m pytest -m gpu -n $(GPU_JOBS) $(GPU_TESTS) $(ARGS)

# A GPU build of torch may bring an older Triton than the CPU build does, which compiles less.
TRITON ?= 3.6.0
compile: $(READY) ## compile every kernel for every architecture by TRITON=3.6.0, or ARGS=REGEX alone
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/triton triton==$(TRITON)
	TRITON_INTERPRET=0 PYTHONPATH=$(VENV)/triton:. $(PY) tests/support/compile_all.py $(ARGS) > $(VENV)/compiled.json

test-deploy: $(READY) ## build the image, bring up docker/compose.yaml and stop it under load; needs a Docker engine
	$(PY) -m pytest -m deploy -rs tests/deploy $(ARGS)

# Their packages want other versions than ottava's, of openai for one. Those of npm are left out where it is not.
CLIENTS := .venv-clients/.installed $(if $(shell command -v npm),tests/clients/node_modules/.installed)
tests/clients/node_modules/.installed: tests/clients/package.json
	npm install --prefix tests/clients --no-audit --no-fund --no-package-lock --silent
	touch $@
.venv-clients/.installed: tests/clients/requirements.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

test-clients: $(READY) $(CLIENTS) ## run other people's clients against the routes: SDKs of Python and, with npm, Codex, Claude Code, Vercel's SDK
	$(PY) -m pytest -m clients tests/clients $(ARGS)

bench: $(READY) ## measure decode and prefill of both variants on this machine
	$(PY) -m benchmarks.serving $(ARGS)

bench-kernels: $(READY) ## measure every kernel beside torch's on a CUDA GPU
	$(PY) -m benchmarks.kernels $(ARGS)

dashboard: $(READY) ## write Grafana's dashboard from docker/grafana/dashboard.py
	$(PY) docker/grafana/dashboard.py

test-monitoring: $(READY) ## run promtool, and a real Prometheus beside a real server; needs Debian's package prometheus
	$(PY) -m pytest -m 'deploy or not deploy' tests/deploy/test_prometheus.py tests/deploy/test_monitoring_live.py $(ARGS)

clean: ## remove the environment and every cache in the tree
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
