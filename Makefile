# PYTHON  interpreter the environment is made with, 3.11 or later
# VENV    the environment; name an existing one to use it: packages already there are not downloaded again
# CONFIG  what `make pretrain` runs; ARGS is passed on to it, e.g. ARGS="--set mesh.channel=2"
# DATASET what `make data` fetches
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= jobs/configs/fashion_mnist.yaml
DATASET ?= fashion_mnist
ARGS ?=
# PYTEST_ARGS two processes, each a file at a time, slow files first
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
# Byte-compiled once, after installation and on all cores: each of a run's processes (driver, actors, Ray's workers)
# imports torch, and where PYTHONDONTWRITEBYTECODE is set each would compile it anew, for as long as an actor may take.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
COMPILE := $(BIN)/python -m compileall -q -j 0 -x '/tests?/' $(VENV)/lib >/dev/null || true
# what the jobs import beside the library itself, and the tests beside that
RUN_EXTRAS := [cluster,eval,images]
TEST_EXTRAS := [cluster,eval,images,s3,stream,test]
# Stamps are keyed on the content of pyproject.toml and on this checkout, not on times that git changes.
KEY := $(shell { pwd; cat pyproject.toml; } | cksum | cut -d' ' -f1)
RUN_STAMP := $(VENV)/.simmatch-run-$(KEY)
TEST_STAMP := $(VENV)/.simmatch-test-$(KEY)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help pretrain data test test-faults lint typecheck format lock ui clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

pretrain: data ## install, download, train (CONFIG=..., ARGS="--set key=value")
	$(BIN)/python -m jobs.pretrain --config $(CONFIG) $(ARGS)

data: $(RUN_STAMP) ## download the images unless present (DATASET=fashion_mnist)
	$(BIN)/python -m jobs.fetch $(DATASET)

test: lint typecheck ## lint, types and tests; then a quick benchmark, for information only
	$(BIN)/python -m pytest $(PYTEST_ARGS) -m 'not fault'
	@echo "for information, on a machine that may be busy; nothing here fails the tests:"
	-@$(BIN)/python -m jobs.benchmark dynamics --quick --data digits --channels 64 --parts solvers --run-dir build/benchmark >/dev/null

test-faults: $(TEST_STAMP) ## 2,000 fuzzed versions of each input, then all tests that lose a rank, a disk or a server (half an hour)
	SIMMATCH_FUZZ=2000 $(BIN)/python -m pytest $(PYTEST_ARGS) \
		tests/test_fuzz.py tests/test_security.py tests/test_e2e.py tests/cluster \
		tests/jobs/test_chaos.py tests/jobs/test_submit.py tests/jobs/test_sync.py tests/jobs/test_entry_point.py tests/jobs/test_run_results.py

lint: $(TEST_STAMP) ## ruff, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(TEST_STAMP) ## mypy
	$(BIN)/python -m mypy

format: $(TEST_STAMP) ## ruff, fixing what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(TEST_STAMP) ## write this environment's versions to infra/requirements.lock, once its tests have passed
	@mkdir -p build
	@{ $(BIN)/python -c 'import platform as p; print(f"# Tested together: Python {p.python_version()}, {p.system()} {p.machine()}. Written by `make lock`.")' && \
		$(BIN)/python -m pip freeze --exclude-editable; } | sed 's/+[a-z0-9.]*$$//' >build/requirements.lock
	@mv build/requirements.lock infra/requirements.lock

ui: $(RUN_STAMP) ## browse this machine's runs in MLflow (http://127.0.0.1:5000)
	@mkdir -p runs
	$(BIN)/mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///runs/mlflow.db

clean: ## remove caches and build outputs; keeps the environment, data/ and runs/
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find simmatch cluster jobs tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, in the same chain as the installation: an interrupted one leaves none.
# --no-build-isolation: with setuptools in place an existing environment needs no network.
define install
	@$(call require_python,$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)))
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "installing simmatch$(1) into $(VENV) (the first time takes minutes)"
	@find $(VENV) -maxdepth 1 -name '.simmatch-*' ! -name '*-$(KEY)' -delete
	@$(PIP) 'setuptools>=77' && $(PIP) --no-build-isolation -e '.$(1)' $(2) && { $(COMPILE); } && touch $@
endef

require_python = command -v $(1) >/dev/null || { echo "error: no interpreter '$(1)'; name one with PYTHON=..." >&2; exit 1; }; \
	$(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo "error: simmatch needs Python 3.11 or later, got $$($(1) --version 2>&1) from '$(1)'; name another with PYTHON=..." >&2; exit 1; }

$(RUN_STAMP):
	$(call install,$(RUN_EXTRAS))

# pynsm, the independent oracle of the tests, would pull in what it does not need here: --no-deps.
$(TEST_STAMP):
	$(call install,$(TEST_EXTRAS),&& $(PIP) --no-deps 'pynsm==1.0.1')
