# make demo | test | test-all | cover | compat | bench | gpu | lint | sanitize: each sets up what it needs. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
SOURCES := pyproject.toml setup.py constraints.txt peers.txt $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo tritons test test-all cover compat bench gpu lint sanitize clean

help:
	@grep -E '^# make' Makefile

# torch first and pinned: another version would bring gigabytes of CUDA libraries
$(READY): $(SOURCES)
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt torch
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --disable-pip-version-check -q --no-deps -r peers.txt
	touch $@

demo: $(READY)
	$(BIN)/fused-warmup train --model gpt --out out/demo
	$(BIN)/fused-warmup train --model digits --out out/demo

# threads of one worker that wait must leave the core to the others
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal

# the oldest and the newest supported Triton beside the pinned one, which tests compile with
tritons: $(READY)
	$(BIN)/python tests/compat.py install

# every pair of the values of a test's parameters
test: tritons
	$(PYTEST)

# every row of their products; with PART=2/3 the second third of those that `make test` leaves out
test-all: tritons
	PRODUCTS=$(or $(PART),all) $(PYTEST)

# takes a third more time than the tests, and asserts nothing
cover: tritons
	$(PYTEST) --cov --cov-report=term:skip-covered

# the tests of the Triton kernels with every supported version of Triton
compat: $(READY)
	$(BIN)/python tests/compat.py

bench: $(READY)
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.sharpness
	$(BIN)/python -m benchmarks.growth

# on a machine with a GPU: builds in place with the python, torch, nvcc, pybind11 and ninja that are there, tests,
# and writes a page of results; fetches nothing, names in one line what is missing, and takes eight minutes at most
gpu:
	$(PYTHON) -m benchmarks.on_gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

sanitize: $(READY)
	$(BIN)/python tests/sanitize.py

clean:
	rm -rf build out $(READY)
