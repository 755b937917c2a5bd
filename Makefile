# make up | status | logs | find ID=… | down | clean | backup | ca | restore FILE=… | test ; INVENTORY=… for other hosts than this one, ARGS=… for ansible-playbook.
SHELL := /bin/bash
INVENTORY ?= inventory/local.yml
ARGS ?=
# Ansible itself passes by the configuration of a folder that others may write to.
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg
# Ansible needs a UTF-8 locale, which a bare machine has not chosen yet.
export LC_ALL := C.UTF-8
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Ansible starts a Python for every task: what that imports is compiled once, not each time.
unexport PYTHONDONTWRITEBYTECODE
MAKEFLAGS += --no-print-directory
PLAYBOOK = ansible-playbook --inventory $(INVENTORY) $(ARGS)
PYTEST = pytest --durations=5

# Which log files `make logs` follows, of which stack; `make chaos` and `make abuse` break that one.
S ?= $(shell sed --quiet 's/^  \([a-z]*\):$$/\1/p' roles/stack/vars/main.yml) alerts other
STACK ?= broker

.PHONY: up status logs find down clean images backup ca restore test lint unit unit-python unit-engine default-bare next-unit molecule molecule-default molecule-next molecule-cluster test-host test-bare bench chaos abuse requirements
.DELETE_ON_ERROR:

up: .venv/.run
	$(PLAYBOOK) playbooks/site.yml playbooks/status.yml

status down clean images backup ca: .venv/.run
	$(PLAYBOOK) playbooks/$@.yml

# FILE: an archive of `make backup`.
restore: .venv/.run
	$(PLAYBOOK) --extra-vars='{"backup_file": "$(FILE)"}' playbooks/restore.yml playbooks/status.yml

# On the Docker host itself. Tomorrow's files, too: tail waits for what is not there yet. Of several hosts the last lines.
logs: $(if $(filter inventory/local.yml,$(INVENTORY)),,.venv/.run)
	@if [ $(INVENTORY) != inventory/local.yml ] && (($$(ansible brokers --inventory $(INVENTORY) --list-hosts | wc --lines) > 2)); then \
		exec $(PLAYBOOK) --extra-vars='{"services": "$(S)"}' playbooks/logs.yml; \
	fi; \
	folder=$$(docker inspect --format '{{range .Mounts}}{{if eq .Destination "/fluentd/log"}}{{.Source}}{{end}}{{end}}' $(STACK)-fluentd) && \
	cd "$$folder" && exec tail --quiet --lines=20 --follow=name --retry \
		$(foreach day,today tomorrow,$(foreach service,$(S),$$(date --utc --date=$(day) +$(service).%Y%m%d.log))) 2>/dev/null

# The text as it was written: neither make nor a shell looks for anything in it.
override ID := $(value ID)
find: export FIND := $(ID)
find: .venv/.run
	@$(if $(ID),,$(error Name the text: make find ID=order-7))
	$(PLAYBOOK) playbooks/logs.yml

# Two lanes, as many of these tests wait. The output of the second comes last. A failure does not keep the next ones from running. Without the
# cluster: beside another lane, on two cores, a broker's start takes longer than its tests allow for.
test: .venv/.test
	$(MAKE) test-host; first=$$?; \
	$(MAKE) --keep-going --jobs=2 --old-file=test-host default-bare next-unit; second=$$?; \
	cat .venv/next-unit.log; exit $$((first | second))

default-bare:
	$(MAKE) --keep-going --jobs=1 --old-file=test-host molecule-default test-bare

next-unit:
	$(MAKE) --keep-going --jobs=1 --old-file=test-host molecule-next lint unit-python unit-engine > .venv/$@.log 2>&1

test-host: .venv/.run
	ansible-playbook --extra-vars=@molecule/shared/test_stack.yml tests/host.yml

lint: .venv/.test
	yamllint --strict .
	ansible-lint --offline
	ruff check
	ruff format --check
	mypy apps/collector/collector apps/common/common apps/door/door apps/exporter/exporter apps/publisher/publisher apps/subscriber/subscriber bench
	mypy plugins
	mypy roles/backup/files/archive.py

unit: unit-python unit-engine

unit-python: .venv/.test
	$(PYTEST) apps tests --ignore tests/bare $(addprefix --ignore ,$(BY_ENGINE))

# By the engine, and by promtool, amtool and HAProxy of the images.
BY_ENGINE = tests/test_alerts.py tests/test_front.py tests/test_image_source.py
unit-engine: .venv/.test test-host
	$(PYTEST) $(BY_ENGINE)

SCENARIO ?= default next cluster
molecule:
	$(MAKE) --keep-going --jobs=1 $(addprefix molecule-,$(SCENARIO))

# A frame around the output would come after pytest's own last line.
molecule-default molecule-next molecule-cluster: export MOLECULE_COMMAND_BORDERS = false
molecule-default molecule-next molecule-cluster: .venv/.test
	molecule test --scenario-name $(@:molecule-%=%)

test-bare: .venv/.test test-host
	$(PYTEST) tests/bare

bench: .venv/.test
	ansible-playbook --extra-vars=@molecule/shared/test_stack.yml --tags=all,bench tests/host.yml
	python3 bench/collector.py
	python3 bench/doors.py
	python3 -m bench.queues
	python3 -m bench.front
	python3 -m bench.others

# On the Docker host itself, with the ports of `make up`; takes every message of the queue.
chaos:
	python3 tests/chaos.py --stack $(STACK) --messages 100000 --clients 16 --rounds 5
	python3 tests/chaos.py --stack $(STACK) --hangups 1000

# Likewise. For a part of it: ARGS="--cases A2,A9 --short".
abuse:
	python3 tests/abuse.py --stack $(STACK) $(ARGS)

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
	$(COMPILE) apps/exporter/pyproject.toml --output-file apps/exporter/requirements.txt
	$(COMPILE) --extra events apps/{common,door,publisher}/pyproject.toml --output-file apps/publisher/requirements.txt
	$(COMPILE) --extra events apps/{common,door,subscriber}/pyproject.toml --output-file apps/subscriber/requirements.txt
	$(COMPILE) pyproject.toml --output-file requirements.txt
	$(COMPILE) --extra dev --extra events pyproject.toml apps/*/pyproject.toml --constraint requirements.txt --output-file requirements-dev.txt
