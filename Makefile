# Boreal's entry points. Each does the set-up it needs: a fresh machine wants only Python 3.11, its
# venv module and make.
PYTHON ?= python3
SEEDS  ?= 1,2,3,4,5,6,7,8,9,10
MINUTES ?= 30
VENV   := .venv
# Tests that take the machine for themselves, and one that lists what it met.
ALONE  := tests/storage_node/redo/test_oracle.py tests/cluster tests/bench
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# A cluster is many short-lived Pythons: each would compile all of Boreal again.
unexport PYTHONDONTWRITEBYTECODE

# What runs in containers; docker compose is a plugin or, on older systems, a program of its own.
IMAGE  ?= boreal:dev
WHEELS := deploy/wheels
SECRETS ?= deploy/secrets
CONTAINERS := control endpoints sn-1 sn-2 sn-3 sn-4 sn-5 sn-6 db-1 db-2 db-3
COMPOSE  = $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo docker-compose) \
           --file deploy/docker-compose.yml --project-name $${COMPOSE_PROJECT_NAME:-boreal}

.PHONY: setup up down test long chaos oracle check format bench soak failover lag readers proto clean
.PHONY: image wheels secrets compose-up compose-down containers

setup: $(STAMP)

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@command -v cc >/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check --editable '.[compiler]'
	@touch $@

up: setup          ## start a cluster (ARGS="--port N --data-dir DIR")
	@$(BIN)/boreal up $(ARGS)

down: setup        ## stop it
	@$(BIN)/boreal down $(ARGS)

test: setup        ## every test, or some (ARGS="tests/quorum -k name")
ifdef ARGS
	@$(BIN)/python -m pytest $(ARGS)
else
	@$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile $(addprefix --ignore=,$(ALONE))
	@$(BIN)/python -m pytest $(ALONE)
endif

long: setup        ## the tests that take too long for every run
	@$(BIN)/python -m pytest -m long

containers: setup  ## the test of the containers: builds, runs, breaks and removes a cluster of them
	@$(BIN)/python -m pytest -m containers $(ARGS)

check: setup       ## format, lint, types, imports, stubs
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/python proto/generate.py --check

format: setup      ## let ruff put the code into shape
	@$(BIN)/ruff format --quiet .
	@$(BIN)/ruff check --quiet --fix .

chaos: setup       ## many seeds of random failures (SEEDS=1,2,3)
	@BOREAL_CHAOS_SEEDS=$(SEEDS) $(BIN)/python -m pytest tests/cluster/test_chaos.py -q -s

oracle: setup      ## redo against PostgreSQL, many seeds of random SQL (SEEDS=1,2,3)
	@BOREAL_REDO_SEEDS=$(SEEDS) $(BIN)/python -m pytest tests/storage_node/redo/test_oracle.py -q

image:             ## the image of every process (IMAGE=boreal:dev)
	docker build --tag $(IMAGE) --file deploy/Dockerfile .

wheels: setup      ## what the image needs of PyPI, for builds without one (Linux, Python 3.11)
	@$(BIN)/python -c 'import sys; sys.version_info[:2] == (3, 11) or sys.exit("Python 3.11 is needed: it is the image'"'"'s")'
	@rm -f $(WHEELS)/*.whl
	@$(BIN)/pip wheel --quiet --disable-pip-version-check --wheel-dir $(WHEELS) '.[container,compiler]' 'setuptools>=77'
	@rm -f $(WHEELS)/boreal-*.whl

# Readable by all within a directory that is closed: containers have an account of their own.
secrets: setup     ## what the containers must not share with others, made once
	@test -d $(SECRETS) || mkdir -m 0700 $(SECRETS)
	@test -e $(SECRETS)/master-password || $(BIN)/python -c 'import secrets; print(secrets.token_urlsafe(18))' > $(SECRETS)/master-password
	@chmod 0444 $(SECRETS)/master-password
	@$(BIN)/boreal certificates $(SECRETS)/tls $(addprefix --name=,$(CONTAINERS) boreal)
	@chmod -R a+rX $(SECRETS)/tls/*/

compose-up: image secrets  ## a cluster in containers (COMPOSE_PROFILES=observe: with Prometheus and Grafana)
	$(COMPOSE) up --detach
	@$(BIN)/boreal --tls-dir $(SECRETS)/tls/boreal --control 127.0.0.1:$${BOREAL_CONTROL_PORT:-7000} wait --readers 2
	@echo "postgresql://boreal:$$(cat $(SECRETS)/master-password)@127.0.0.1:$${BOREAL_WRITER_PORT:-54320}/postgres"

compose-down:      ## stop it and remove the containers; what is stored stays (ARGS=--volumes: or not)
	COMPOSE_PROFILES=observe $(COMPOSE) down $(ARGS)

bench: setup       ## side by side with stock PostgreSQL (ARGS="--seconds 10")
	@$(BIN)/python -m bench $(ARGS)

soak: setup        ## steady load for long: size, memory, errors (MINUTES=30)
	@$(BIN)/python -m bench.soak --minutes $(MINUTES) $(ARGS)

failover: setup    ## writers killed, frozen and moved under load; ledgers checked (ARGS="--planned 0")
	@$(BIN)/python -m bench.failover $(ARGS)

lag: setup         ## how far readers are behind a steady load (ARGS="--rate 500 --readers 3")
	@$(BIN)/python -m bench.lag $(ARGS)

readers: setup     ## how soon a new reader answers (ARGS="--mb 500 --readers 3")
	@$(BIN)/python -m bench.readers $(ARGS)

proto: setup       ## regenerate boreal/rpc from proto/
	@$(BIN)/python proto/generate.py

clean: down
	rm -rf $(VENV)
