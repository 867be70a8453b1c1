# Thin: every target is one command that can also be typed. CI calls `check` and `test` through scripts/test.
PYTHON ?= .venv/bin/python
PYTEST_ARGS ?=
BENCH_ARGS ?=

.PHONY: check fmt lint types layers test unit netns interop bench native clean

check: lint types layers

fmt:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

lint:
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

types:
	$(PYTHON) -m mypy

layers:
	PYTHONPATH=. $(PYTHON) -c 'import sys; from importlinter.cli import lint_imports_command as c; sys.argv[1:] = ["--no-cache"]; c()'

test:
	$(PYTHON) -m pytest $(PYTEST_ARGS)

unit:
	$(PYTHON) -m pytest tests $(PYTEST_ARGS)

netns:
	$(PYTHON) -m pytest netns-tests $(PYTEST_ARGS)

interop:
	$(PYTHON) -m pytest -m interop tests netns-tests $(PYTEST_ARGS)

bench:
	$(PYTHON) -m benchmarks $(BENCH_ARGS)

native:
	$(PYTHON) gostnet/dataplane/native/build.py

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
