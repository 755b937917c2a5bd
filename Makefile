# make up | status | down | clean | test ; INVENTORY=… for other hosts than this one, ARGS=… for ansible-playbook.
SHELL := /bin/bash
INVENTORY ?= inventory/local.yml
ARGS ?=
# Ansible needs a UTF-8 locale, which a bare machine has not chosen yet.
export LC_ALL := C.UTF-8
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Ansible starts a Python for every task: what that imports is compiled once, not each time.
unexport PYTHONDONTWRITEBYTECODE
PLAYBOOK = ansible-playbook --inventory $(INVENTORY) $(ARGS)
PYTEST = pytest --durations=5

.PHONY: up status down clean images test lint unit molecule test-bare requirements
.DELETE_ON_ERROR:

up: .venv/.run
	$(PLAYBOOK) playbooks/site.yml playbooks/status.yml

status down clean images: .venv/.run
	$(PLAYBOOK) playbooks/$@.yml

test: lint unit molecule test-bare

lint: .venv/.test
	yamllint --strict .
	ansible-lint --offline
	ruff check
	ruff format --check
	mypy apps/door/door apps/publisher/publisher apps/subscriber/subscriber
	mypy roles/rabbitmq/filter_plugins/rabbitmq.py

unit: .venv/.test
	$(PYTEST) apps tests --ignore tests/bare

molecule: .venv/.test
	molecule test --all --no-command-borders

test-bare: .venv/.test
	$(PYTEST) tests/bare

bench: .venv/.test
	python3 bench/collector.py

# --no-compile: Python compiles what it uses, a tenth of it.
.venv/.run: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install --disable-pip-version-check --no-compile --require-hashes --requirement requirements.txt
	touch $@

.venv/.test: requirements-dev.txt .venv/.run
	.venv/bin/pip install --disable-pip-version-check --no-compile --require-hashes --requirement requirements-dev.txt
	touch $@

# After a change of a pyproject.toml. UPGRADE=--upgrade takes the newest versions.
COMPILE = uv pip compile --quiet $(UPGRADE) --universal --generate-hashes --python-version 3.11 \
	--no-emit-find-links --no-annotate --custom-compile-command "make requirements"
requirements: .venv/.test
	$(COMPILE) apps/collector/pyproject.toml --output-file apps/collector/requirements.txt
	$(COMPILE) apps/publisher/pyproject.toml --output-file apps/publisher/requirements.txt
	$(COMPILE) apps/subscriber/pyproject.toml --output-file apps/subscriber/requirements.txt
	$(COMPILE) pyproject.toml --output-file requirements.txt
	$(COMPILE) --extra dev pyproject.toml apps/*/pyproject.toml --constraint requirements.txt --output-file requirements-dev.txt
