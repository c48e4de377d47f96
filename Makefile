# One command from a bare checkout: `make demo` or `make test`. Both build .venv when they need to.
# Other Python: make PYTHON=python3.12 demo      CPU on a GPU machine: make LOCK=requirements.lock demo

PYTHON := python3
LOCK := $(if $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes),requirements-cuda.lock,requirements.lock)
DEV_LOCK := requirements-dev.lock

# The environment is believed only if it holds a stamp named after what it was built from: the locks
# and the interpreter. Stamps are written last, so an interrupted or outdated set-up is done again.
KEY := $(shell $(PYTHON) -c 'import hashlib, sys; \
  parts = [open(name, "rb").read() for name in sys.argv[1:]] + [(sys.version + sys.base_prefix).encode()]; \
  print(hashlib.sha256(b"".join(parts)).hexdigest())' $(LOCK) $(DEV_LOCK))
READY := .venv/ready-$(KEY)
DEV_READY := .venv/ready-dev-$(KEY)
RUN := .venv/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check --only-binary :all: --require-hashes

UV := uv==0.13.8
COMPILE := uv pip compile --universal --fork-strategy fewest --python-version 3.11 --generate-hashes

# Nothing after the set-up may reach for the network; pyright would look for a newer pyright.
export HF_HUB_OFFLINE := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help setup demo test lint types lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(DEV_READY) ## create or refresh .venv (the demo and the tests do this by themselves)

demo: $(READY) ## trace, select, retrain and evaluate on a small embedded corpus, in minutes
	$(RUN) cli.py demo

test: lint types ## set up, lint, check types, run the tests
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(DEV_READY) ## ruff: rules and formatting
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: $(DEV_READY) ## pyright
	$(RUN) -m pyright

lock: ## rewrite the locks, keeping pins that still fit (make lock UPGRADE=1: take the newest)
	$(PYTHON) -m venv --clear .venv-lock
	.venv-lock/bin/python -m pip install --disable-pip-version-check --quiet $(UV)
	set -e; for name in requirements requirements-cuda requirements-dev; do \
	  .venv-lock/bin/$(COMPILE) $(if $(UPGRADE),--upgrade) --quiet $$name.in -o $$name.lock; \
	done
	rm -rf .venv-lock

clean: ## remove the environment and the caches
	rm -rf .venv .venv-lock .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	  "Taproot needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + \
	  ": name another, e.g. make PYTHON=python3.12")'
	@echo "Setting up .venv from $(LOCK) (once)"
	@rm -f .venv/ready-*
	$(PYTHON) -m venv --clear .venv
	$(INSTALL) -r $(LOCK)
	@touch $@

$(DEV_READY): $(READY)
	$(INSTALL) -r $(DEV_LOCK)
	@touch $@
