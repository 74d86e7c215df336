# make demo   train a teacher, distill a student, compare: on any machine with Python >= 3.12
# make test   the tests; make test-fast: those of a few minutes; make test-full: all of them
# make check  ruff and mypy
# make gpu    the acceptance run on a machine with GPUs; installs nothing: PYTHON, else .venv, else python3
# PYTHON=/path/to/python chooses the interpreter that the environment in .venv is made from.

VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS := 1

# The first of these that runs and is new enough; a version manager's shim may be on PATH and still not run.
FIND_PYTHON := for python in $(PYTHON) python3.12 python3.13 python3 $$HOME/.pyenv/versions/3.12*/bin/python; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo "$$python"; exit; }; done; \
	echo "Python >= 3.12 not found: install it, or say make PYTHON=/path/to/python" >&2; exit 1

.PHONY: demo test test-fast test-full check gpu clean-demo

demo: $(VENV)/.ready
	$(BIN)/python examples/demo.py

# Two files of tests at a time: most jobs have one or two ranks.
test: $(VENV)/.ready
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow"

test-fast: $(VENV)/.ready
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m fast

test-full: $(VENV)/.ready
	$(BIN)/python -m pytest

check: $(VENV)/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# Such a machine may have no network, and a torch of its own.
gpu:
	$(or $(PYTHON),$(if $(wildcard $(BIN)/python),$(BIN)/python,python3)) benchmarks/gpu.py $(GPU_FLAGS)

$(VENV)/.ready: setup.py pyproject.toml
	python=$$($(FIND_PYTHON)) && "$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
