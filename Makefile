# Every target works on a fresh machine: the environment is built at the first call, then reused.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-slow lint format bench bench-env clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       the main job on data that ships with a library: Fed-SB on rotated digits"
	@echo "make test       all tests but the slow ones"
	@echo "make test-slow  the slow tests"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff format"
	@echo "make bench-env  environments for the peers that the benchmarks compare with"
	@echo "make bench      the benchmarks: under half an hour; without bench-env, no peers"
	@echo "make clean      remove caches and build products; .venv and runs stay"

# torch comes first and pinned: an unpinned torch pulls several GB of GPU packages.
$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/pip ]; then \
	  for python in $(PYTHON) python3.11 python3; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	      echo "creating $(VENV) with $$($$python --version)"; \
	      $$python -m venv $(VENV) && break || exit 1; \
	    fi; \
	  done; \
	fi
	@if [ ! -x $(BIN)/pip ]; then \
	  echo "fedsys needs Python 3.11 or later; none was found. If you have one, name it:"; \
	  echo "  make PYTHON=/path/to/python3.11"; \
	  exit 1; \
	fi
	@echo "installing into $(VENV); the first time takes minutes"
	@$(PIP) torch==2.13.0
	@$(PIP) -e ".[text,image,ray,report,dev]"
	@touch $@

demo: $(STAMP)
	@$(BIN)/fedsys run

# A process a core, each with one thread: threads of several processes only wait for each other.
test: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-slow: $(STAMP)
	@$(BIN)/python -m pytest -m slow --timeout 1800

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(STAMP)
	@$(BIN)/python -m benchmarks

# A peer has an environment of its own, with the same torch; pfl's bounds contradict constraints.txt.
bench-env: .bench/pfl/.installed .bench/flower/.installed

.bench/%/.installed: benchmarks/peers/%.txt $(STAMP)
	@echo "installing into .bench/$*; it takes minutes"
	@$(BIN)/python -m venv .bench/$*
	@.bench/$*/bin/python -m pip install -qq --disable-pip-version-check torch==2.13.0
	@.bench/$*/bin/python -m pip install -qq --disable-pip-version-check -r $<
	@touch $@

clean:
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
