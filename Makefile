# Two commands on a fresh machine: `make demo` and `make test`. Each sets up what it needs, once.
PYTHON ?= python3
PYTEST_ARGS ?=
DEMO_ARGS ?=
# Of `make fieldtrial`: two checkpoints of the demo.
ARMS ?= runs/demo/run@1000 runs/demo/run
# `make test EXTRAS=test` goes without PyTorch, and without the tests that compare with it.
EXTRAS ?= test,parity

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# Compiled programs are kept between runs. XLA:CPU asks for its buffers again at every step: huge pages make that cheap.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help demo test setup lint format types examples figures lerobot fieldtrial gpu-check faults fuzz bench slow constraints clean gl chromium
.DEFAULT_GOAL := help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo gl  ## demonstrations, training, evaluation, one report.html
	$(BIN)/insula demo $(DEMO_ARGS)

# Nothing of it runs for long: compiled quickly rather than well.
test: export XLA_FLAGS ?= --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false
test: lint types gl chromium  ## ruff, mypy, unit tests, examples, and the quick demo
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)
	rm -rf runs/quick  # a demo that is finished is left as it is
	$(BIN)/insula demo --quick
	$(MAKE) examples

setup: $(VENV)/.test gl chromium  ## the virtual environment, with the tools of the tests

lint: $(VENV)/.test  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test  ## let ruff repair and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.test  ## mypy over the package
	$(BIN)/mypy

examples: $(VENV)/.test gl  ## run every script of examples/
	@test -e runs/quick/run || $(BIN)/insula demo --quick
	printf '%s\n' examples/*.py | xargs -n 1 -P 2 $(BIN)/python

figures: $(VENV)/.test  ## comments, blank lines, docstrings and more, counted; exit code 1 where a limit is missed
	$(BIN)/python scripts/figures.py

slow: $(VENV)/.test gl  ## the slow tests
	$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

lerobot:  ## LeRobot's own PI05 and robots run what is ours; PYTHON is a 3.12 that has lerobot, transformers and torch
	$(PYTHON) -m pip install -q -e . -e plugins/lerobot_policy_insula pytest pytest-timeout beartype
	$(PYTHON) -m pytest -q -p no:cacheprovider tests/test_lerobot_policy.py tests/test_lerobot_client.py

fieldtrial: $(VENV)/.demo gl  ## a blinded study of two checkpoints by fieldtrial: make fieldtrial ARMS="RUN@STEP RUN"
	$(PYTHON) -m venv .cache/fieldtrial
	.cache/fieldtrial/bin/python -m pip --disable-pip-version-check install -q "fieldtrial[openpi]==0.3.0"
	$(BIN)/python scripts/fieldtrial_study.py $(ARMS) --fieldtrial .cache/fieldtrial/bin/fieldtrial --folder runs/fieldtrial

gpu-check: $(VENV)/.test  ## on a machine with an accelerator: parity, certificate, speed, memory, to gpu.json
	$(BIN)/python benchmarks/gpu_check.py --out gpu.json

faults: $(VENV)/.test gl  ## kill -9, damaged checkpoints and failing disks against training
	$(BIN)/python benchmarks/train_faults.py

fuzz: $(VENV)/.test  ## a million mutated frames against what reads them
	$(BIN)/python scripts/fuzz_frames.py --frames 1000000

bench: $(VENV)/.test gl  ## time and memory of a train step, and how fast data is read
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/data.py

constraints:  ## resolve again, with the newest versions pyproject.toml allows
	scripts/setup.sh constraints "$(PYTHON)"

clean:  ## forget the virtual environment and every cache; runs/ stays
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

gl:
	@scripts/setup.sh gl "$(PYTHON)"

chromium:
	@scripts/setup.sh chromium

# Stamps: installed once, and again when a dependency changes.
$(VENV)/.demo: pyproject.toml constraints.txt
	@scripts/setup.sh python "$(PYTHON)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -e . -c constraints.txt
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) install -q -e ".[$(EXTRAS)]" -c constraints.txt
	$(if $(findstring parity,$(EXTRAS)),$(PIP) install -q --no-deps lerobot-dataset openpi-client inspect-robots -c constraints.txt)
	@touch $@
