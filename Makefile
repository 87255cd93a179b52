# The face of the project for people: `make up` and `make test` need Python 3.11+ and make, nothing else.

.DEFAULT_GOAL := help
.PHONY: help up test check ci gates lint types imports proto proto-check buf-lint format lock bench unit chaos broken-builds clean

# Compiled modules are kept, whatever the caller does elsewhere: a stack is seven processes, and each would compile all
# that it imports anew.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
RUNTIME := .venv/.installed-runtime
DEV := .venv/.installed-dev
CODE := $(wildcard controlplane dataplane clients/python tests tools benchmarks)
# How many test processes: one a core, `make test WORKERS=0` for none.
WORKERS ?= auto
# A module is one process's, for what its tests share is started once then; the order is that of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# More arguments for `postroad up`, pytest or the benchmarks: make test ARGS="-k spool".
ARGS ?=
# Which campaigns `make chaos` runs: 1-20, or 3,7.
SEEDS ?= 1-20

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(RUNTIME): requirements/runtime.txt requirements/bootstrap.txt pyproject.toml tools/setup.sh
	@tools/setup.sh runtime

$(DEV): requirements/dev.txt requirements/bootstrap.txt pyproject.toml tools/setup.sh
	@tools/setup.sh dev

up: $(RUNTIME) ## start everything on this machine
	@exec $(BIN)/postroad up $(ARGS)

test: $(DEV) ## all tests but the nightly ones
	@$(PYTEST) $(ARGS)

unit: $(DEV) ## the quick tests
	@$(PYTEST) $(wildcard tests/unit tests/property tests/smtp tests/contract) $(ARGS)

gates: lint types imports buf-lint proto-check ## what needs no test to be seen

check: gates unit ## what must hold before each commit

ci: gates test ## what must hold before each merge

lint: $(DEV) ## ruff, codespell
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell

types: $(DEV) ## mypy, strict
	@$(BIN)/mypy $(CODE)

imports: $(DEV) ## who may import whom
	@$(BIN)/lint-imports --no-cache

buf-lint: $(DEV) ## lint and format of the protos
	@$(BIN)/python tools/proto.py lint

proto: $(DEV) ## generate Python from proto/
	@$(BIN)/python tools/proto.py generate

proto-check: $(DEV) ## is the generated code what proto/ says?
	@$(BIN)/python tools/proto.py check

format: $(DEV) ## put code and protos into form
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .
	@$(BIN)/python tools/proto.py format

lock: $(DEV) ## resolve the locked requirements anew
	@tools/lock.sh $(ARGS)

chaos: $(DEV) ## campaigns of faults, one line a seed: make chaos SEEDS=1-20
	@$(BIN)/python -m tests.chaos.campaign --quiet --seeds $(SEEDS) $(ARGS)

broken-builds: $(DEV) ## builds that break a promise each, which the chaos tests' judge must catch
	@$(BIN)/python -m tests.chaos.broken $(ARGS)

bench: $(DEV) ## the benchmarks, as benchmarks/README.md says
	@$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove what was built; .postroad, your local data, stays
	@rm -rf .venv .build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.*
