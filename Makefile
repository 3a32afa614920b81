# Everything a checkout makes for itself lives in .venv/ (packages) and .local/ (data, secrets).

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo up unit check test chaos link-faults compose-test compat bench lint docs format check-locks

# python3.11, or python3 where that is at least 3.11
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
# CI cannot answer a question
SUDO := $(if $(CI),sudo -n,sudo)
PIP := .venv/bin/python -m pip --disable-pip-version-check --no-input

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/.packages .venv/.servers ## the environment, its locked packages, MongoDB and RabbitMQ

demo: setup ## the main job, then crashes under load, on real servers
	@.venv/bin/python -m sandbox demo

up: setup ## the same system without the demonstration, until Ctrl-C
	@.venv/bin/python -m sandbox up

unit: .venv/.packages ## the tests that need no server, in seconds
	.venv/bin/pytest -q tests/unit

check: lint unit ## lint, types and the unit tests: before every commit

test: setup ## every test, on real servers (DRIVER=pymongo: on PyMongo's asyncio API instead of motor)
	$(if $(DRIVER),MONGODB_DRIVER=$(DRIVER)) .venv/bin/pytest

CAMPAIGN := $(if $(SEED),--seed $(SEED)) --first $(or $(FIRST),1) --rounds $(or $(ROUNDS),200)

chaos: setup ## crash campaigns against the relay and the consumers (ROUNDS=200 SEED=n FIRST=1; WAITS=no: without the slow end)
	@.venv/bin/python -m tests.chaos.relay $(CAMPAIGN)
	@.venv/bin/python -m tests.chaos.delivery $(CAMPAIGN) $(if $(filter no,$(WAITS)),--no-waits)

link-faults: setup ## every link of every process spoiled in every way, as a table (10 minutes)
	@mkdir -p .local && rm -f .local/links.jsonl
	LINKS_RESULTS=$(CURDIR)/.local/links.jsonl .venv/bin/pytest -m 'link_faults or not link_faults' tests/system/test_link_faults.py tests/system/test_exhaustion.py
	@.venv/bin/python -m tests.support.link_table .local/links.jsonl

compose-test: .venv/.packages ## compose.yml on stand-in images: built, started, killed, upgraded (needs a Docker engine, and root)
	@.venv/bin/python -m tests.compose

compat: .venv/.packages ## relay, delivery and whole path over RabbitMQ and MongoDB versions (RABBITMQ=4.3 MONGODB=6.0.5 for one pair)
	@RABBITMQ=$(RABBITMQ) MONGODB=$(MONGODB) .venv/bin/python -m tests.compatibility

bench: setup ## the relay beside others, with its own ceilings (under 10 minutes; LONG=1 for more)
	.venv/bin/python -m benchmarks

lint: .venv/.packages ## style, types, imports between packages, links between pages
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports
	.venv/bin/python -m tools.links

docs: .venv/.packages ## the pages of docs/ as a site in .local/site
	.venv/bin/python -m mkdocs build --strict

format: .venv/.packages ## what ruff can put right by itself
	.venv/bin/ruff check --fix
	.venv/bin/ruff format

# Nothing is fetched: what pyproject.toml asks for must be what the locks have installed.
check-locks: .venv/.packages ## the locks carry hashes and satisfy pyproject.toml
	$(PIP) install --quiet --dry-run --no-index --require-hashes -r requirements.lock
	$(PIP) install --quiet --dry-run --no-index --require-hashes -r requirements-dev.lock
	$(PIP) install --quiet --dry-run --no-index --no-build-isolation --editable '.[dev]'

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install python3.11, or name one with PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { $(install_venv); }
	@echo "Making a virtual environment in .venv with $(PYTHON) ..."
	@$(PYTHON) -m venv .venv

# Debian splits Python's venv module off into a package of its own.
venv_package = $(notdir $(PYTHON))-venv
define install_venv
	if ! command -v apt-get >/dev/null; then \
		echo "$(PYTHON) cannot make virtual environments (no ensurepip): install its venv package."; exit 1; \
	elif [ "$$(id -u)" = 0 ]; then \
		echo "Python lacks its venv module. Installing with apt-get (as root): $(venv_package)."; as_root=; \
	elif command -v sudo >/dev/null; then \
		echo "Python lacks its venv module. Installing with apt-get (sudo may ask for your password): $(venv_package)."; as_root="$(SUDO)"; \
	else \
		echo "Python lacks its venv module: run 'apt-get install $(venv_package)' as root."; exit 1; \
	fi; \
	$$as_root apt-get update -q; \
	$$as_root apt-get install -q -y --no-install-recommends $(venv_package)
endef

.venv/.packages: requirements-dev.lock pyproject.toml | .venv/bin/python
	@echo "Installing the locked packages into .venv (about a minute the first time) ..."
	@$(PIP) install --require-hashes -r requirements-dev.lock
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.servers: .venv/.packages
	@.venv/bin/python -m sandbox servers
	@touch $@
