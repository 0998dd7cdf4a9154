# Everything runs in .venv, which the targets make by themselves. Settings:
PYTHON ?= python3
# Which build of torch: anything that pip understands, such as an index. Used when .venv is made.
TORCH_PIP_ARGS ?=
DEMO_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

BIN := .venv/bin
# -qq: errors only.
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.DELETE_ON_ERROR:
.PHONY: help demo test lint format bench wheel-test clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: .venv/.runtime ## attack and harden a small network on handwritten digits, and show a report
	@$(BIN)/saddlepoint demo $(DEMO_ARGS)

test: .venv/.dev ## run the tests (PYTEST_ARGS="-k pgd" to choose)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

lint: .venv/.dev ## style, types, layering, and the checklist in docs/coverage.md
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python scripts/check_coverage.py

format: .venv/.dev ## put the code into its form
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: .venv/.bench ## measure the overhead beside peer libraries
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/overhead.py $(BENCH_ARGS)

wheel-test: .venv/.dev ## build the wheel and try it away from the source tree
	@$(BIN)/python scripts/test_wheel.py

clean: ## remove .venv, caches and build products
	@rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find src tests scripts benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# The stamps stand for what is installed; pip itself skips what is there already. torch comes first, so that
# TORCH_PIP_ARGS holds for nothing else. A .venv that was interrupted in the making is made anew.
.venv/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'error: $(PYTHON) is missing or older than Python 3.11; name another with make PYTHON=...' >&2; exit 1; }
	@test -e $@ && echo 'pyproject.toml or constraints.txt has changed: updating .venv' || \
		echo 'first time: creating .venv and installing; takes a minute or two (longer where torch brings CUDA)'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(PIP) $(TORCH_PIP_ARGS) torch
	@$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.runtime
	@echo 'installing the tools for development'
	@$(PIP) -e '.[dev]'
	@touch $@

# The two with --no-deps would bring torchvision, see pyproject.toml.
.venv/.bench: .venv/.runtime
	@echo 'installing the peer libraries'
	@$(PIP) -e '.[bench]'
	@$(PIP) --no-deps torchattacks adv-lib
	@touch $@
