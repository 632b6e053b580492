# Two commands for a newcomer: `make demo` and `make test`. PYTHON and PIP_FLAGS are honoured:
#   make demo PYTHON=python3.12 PIP_FLAGS="--index-url https://…"
PYTHON ?= python3
PIP_FLAGS ?=
BIN := .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)
INPUTS := pyproject.toml constraints.txt

FLOORS := .venv-floors/bin/python
# A worker per core: one more was slower.
JOBS ?= $(shell $(PYTHON) -c "import os; print(min(4, os.cpu_count() or 1))")

.PHONY: demo test test-faults test-slow test-records test-portable test-two-threads test-floors format lint types layers bench clean

demo: .venv/.app
	$(BIN)/whichkl demo --out out

test: .venv/.dev
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal --ignore=tests/faults

# Kills, signals, full disks, too little memory, files that were changed, threads at once: what may go wrong around a call.
test-faults: .venv/.dev
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal tests/faults

test-slow: .venv/.dev
	$(BIN)/python -m pytest -q -m slow

# Scripts of single faults, where a folder of them is next to this checkout, and what every solver found before.
test-records: .venv/.dev
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal -m slow tests/faults/test_scripts.py tests/golden.py

# The instructions of a processor of 2008, with one thread and with two: tolerances must hold wherever rounding is another one.
# Threads that wait for each other sleep: with more threads than cores, those that spin keep the others from working.
PASSIVE := OMP_WAIT_POLICY=passive
OLD := ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2
test-portable: .venv/.dev
	for threads in 1 2; do $(OLD) $(PASSIVE) WHICHKL_TEST_THREADS=$$threads \
	  $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal || exit 1; done

TWO := tests/laws.py tests/faults/test_process_state.py tests/test_cluster.py tests/test_fitting.py tests/test_mixtures.py tests/test_streams.py
test-two-threads: .venv/.dev
	$(PASSIVE) WHICHKL_TEST_THREADS=2 $(BIN)/python -m pytest -q -n auto --maxprocesses 2 --dist worksteal $(TWO)

# With the lowest versions that pyproject.toml allows, in an environment of their own.
test-floors: .venv-floors/.made
	$(FLOORS) -m pytest -q -n $(JOBS) --dist worksteal -W default::DeprecationWarning $$($(FLOORS) tests/floors.py --tests)

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.dev
	$(BIN)/mypy

layers: .venv/.dev
	$(BIN)/lint-imports

bench: .venv/.bench
	for f in benchmarks/*.py; do $(BIN)/python $$f || exit 1; done

clean:
	rm -rf .venv .venv-floors out

.venv/.made: $(INPUTS)
	$(PYTHON) -m venv --clear .venv
	@touch $@

.venv/.app: .venv/.made $(INPUTS)
	@echo "installing whichkl (the first time takes a few minutes) ..."
	$(INSTALL) -e '.[app]'
	@# pip compiles what it copies, but not an editable package: where Python doesn't keep byte code, each start would compile it.
	@$(BIN)/python -m compileall -q src
	@touch $@

.venv/.dev: .venv/.app
	@echo "installing what the tests need ..."
	$(INSTALL) -e '.[dev,lm]' 'peft>=0.21'
	@touch $@

.venv/.bench: .venv/.dev
	@echo "installing the peers of the benchmarks ..."
	$(INSTALL) -e '.[bench]'
	@touch $@

.venv-floors/.made: $(INPUTS) tests/floors.py
	$(PYTHON) -m venv --clear .venv-floors
	$(FLOORS) tests/floors.py > .venv-floors/floors.txt
	@echo "installing the lowest versions (this takes a few minutes) ..."
	$(FLOORS) -m pip install --quiet --disable-pip-version-check -c constraints.txt -c .venv-floors/floors.txt $(PIP_FLAGS) -e '.[dev]'
	@touch $@
