# SPDX-License-Identifier: Apache-2.0
# Every target works on a fresh machine with Python 3.11 to 3.14, make and a C++ compiler: `setup` makes .venv first.

PYTHON ?= python3
EXTRAS ?= dev
UV_VERSION := 0.13.9
OLDEST := deepspeed datasets webdataset torchdata dali
BIN := .venv/bin
DEMO := accelerate launch --config_file accelerate_configs/local_ddp.yaml recipes/resnet.py
STAMP := .venv/.installed-$(subst $() ,-,$(strip $(EXTRAS)))

.PHONY: setup demo smoke test test-quick golden test-oldest soak fuzz bench lint lock help

help:  ## these lines
	@sed -n 's/^\([a-z-]*\):.*##/make \1\t/p' Makefile

setup: $(STAMP)  ## make .venv and install what requirements.lock pins (EXTRAS="dev deepspeed" for more)

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 14) else f"error: Python {v[0]}.{v[1]} is too old or too new. Give one from 3.11 to 3.14: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { rm -rf .venv; echo "error: $(PYTHON) cannot make a virtual environment. Install its venv package (Debian: apt install python3-venv)." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --quiet --compile-bytecode -r pyproject.toml $(EXTRAS:%=--extra %) -c requirements.lock
	@touch $@

demo: setup  ## train recipes/resnet.py on the embedded digits: about a minute on two cores
	@echo "$(DEMO)"
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(DEMO)

smoke: setup  ## two real steps of every recipe on this machine's GPU, else its CPU (RECIPE=resnet for one)
	$(BIN)/python tools/smoke.py $(RECIPE)

test: setup lint  ## the whole suite; of its four processes one mostly waits for Slurm
	$(BIN)/python tests/extensions.py >/dev/null
	$(BIN)/python -m pytest --numprocesses 4 --dist loadfile --no-loadscope-reorder

test-quick: setup lint  ## units and one launch of each family, for the inner loop
	$(BIN)/python -m pytest --quick --numprocesses 3 --dist loadfile --no-loadscope-reorder

test-oldest: setup  ## two steps of every recipe with the oldest versions of pyproject.toml (PYTHON up to 3.13); once a release
	@test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	VIRTUAL_ENV=$(CURDIR)/.venv-oldest $(BIN)/uv pip install --quiet --compile-bytecode --resolution lowest-direct -r pyproject.toml $(OLDEST:%=--extra %)
	.venv-oldest/bin/python benchmarks/oldest.py

golden: setup  ## record tests/golden again, after a change that is meant to move the loss curves
	$(BIN)/python tests/extensions.py >/dev/null
	RECORD_GOLDEN=1 $(BIN)/python -m pytest -m golden --numprocesses 2 --dist loadfile

soak: setup  ## 500 kills of runs that resume (KILLS=50 for fewer); writes benchmarks/results/
	$(BIN)/python tests/soak.py $(KILLS)

fuzz: setup  ## 20,000 damaged JPEGs to the native decoder under AddressSanitizer (CASES=N, SEED=N); writes benchmarks/results/
	$(BIN)/python tests/fuzz.py $(or $(CASES),20000) $(or $(SEED),0)

bench: setup  ## the benchmarks; each prints a table and writes benchmarks/results/
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/communication.py
	$(BIN)/python benchmarks/loaders.py
	$(BIN)/python benchmarks/augmentation.py
	$(BIN)/python benchmarks/index.py
	$(BIN)/python benchmarks/checkpoint.py
	PATH="$(CURDIR)/$(BIN):$$PATH" accelerate launch --config_file accelerate_configs/local_ddp.yaml --num_processes 2 benchmarks/allreduce.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lock: setup  ## resolve pyproject.toml again into requirements.lock
	VIRTUAL_ENV=$(CURDIR)/.venv UV_PYTHON_DOWNLOADS=never $(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --all-extras --no-annotate --no-header --no-emit-index-url --upgrade --quiet -o requirements.lock
