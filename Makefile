# make demo    train the demo on this machine and write its report (no GPU needed)
# make test    run the tests                    make slow    those that take four ranks or minutes
# make lint    ruff, mypy, import rules         make bench   benchmarks of the kernels
# make clean   remove what the above made, the virtual environment included
#
# PYTHON=python3.12 chooses the interpreter, TORCH=default the index's own torch where there is no GPU.

SHELL := /bin/bash
PYTHON ?=
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2
export PYTHON VENV TORCH

.PHONY: demo test slow lint bench clean venv

demo: venv
	$(BIN)/r4b demo $(ARGS)

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 TRITON_INTERPRET=1 \
		$(BIN)/python -m pytest -n $(JOBS) tests/kernels/interpreter $(ARGS)

slow: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu" $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/mypy
	PYTHONPATH=kernels:. $(BIN)/lint-imports

bench: venv
	$(BIN)/r4b bench $(ARGS)

# One environment for everything: `demo` installs the test tools too, so that no target undoes another's work.
venv:
	@bash scripts/setup_venv.sh test
	-@$(BIN)/python kernels/r4b_kernels/build.py --quiet

clean:
	rm -rf $(VENV) build kernels/build kernels/r4b_kernels/_objects *.egg-info kernels/*.egg-info .pytest_cache \
		.ruff_cache .mypy_cache .import_linter_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
