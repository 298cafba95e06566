# The two verbs are `make run` and `make test`; each sets up what it needs.
# Settings come from the environment: `PORT=8001 make run`. `make help` lists the verbs.

SHELL := /bin/sh
.DEFAULT_GOAL := help
PYTHON ?= $(shell command -v python3 || command -v python)
VENV_PYTHON := .venv/bin/python
INSTALL := $(PYTHON) -I llmsite/install.py
UV := .venv/bin/uv pip compile --universal --generate-hashes --python-version 3.11 --quiet \
      --no-emit-index-url --no-emit-find-links --custom-compile-command "make lock"
# What `check --deploy` looks at: an installation as it would face the world.
DEPLOYED := env HOST=0.0.0.0 STATE_DIR=.state/check ALLOWED_HOSTS=llm.example.org SECURE_COOKIES=true HSTS_SECONDS=3600 \
      DEBUG=false DATABASE_URL= REDIS_URL= \
      SECRET_KEY=only-for-the-deployment-check-0123456789-abcdefghijklmnop \
      KEY_PEPPER=1:only-for-the-deployment-check-0123456789-abcdefghijklm

.PHONY: help run install dev test check bench bench-engine lock up down clean

help: ## List the verbs.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

run: install ## Serve a real model with demo tenants on http://127.0.0.1:8000 (PORT, HOST).
	@exec $(VENV_PYTHON) manage.py up --demo

install: ## Make .venv with what serving needs, and the demo model.
	@$(INSTALL) worker demo

dev: ## Make .venv with what checks and tests need, too.
	@$(INSTALL) dev demo

test: dev ## Run the whole suite; needs neither Redis nor PostgreSQL. ARGS="tests/accounts -n 0" narrows it.
	@$(VENV_PYTHON) -m pytest $(ARGS)

check: dev ## Style, types, import rules, migrations, settings, supply chain.
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy
	@.venv/bin/lint-imports --no-logo
	@mkdir -p .state/check
	@$(DEPLOYED) $(VENV_PYTHON) manage.py makemigrations --check --dry-run
	@$(DEPLOYED) $(VENV_PYTHON) manage.py check --deploy --fail-level WARNING
	@$(INSTALL) --verify

bench: dev ## Measure the path around the model, and the LiteLLM proxy beside it.
	@$(VENV_PYTHON) manage.py bench $(ARGS)

bench-engine: dev ## Measure the engine beside llama.cpp's own server. ARGS="--quick" sees that all works.
	@$(VENV_PYTHON) manage.py bench_engine $(ARGS)

lock: dev ## Resolve requirements/*.in into hash-locked files.
	@$(UV) requirements/base.in -o requirements/base.txt
	@$(UV) requirements/worker.in -o requirements/worker.txt
	@$(UV) requirements/dev.in -o requirements/dev.txt
	@$(UV) requirements/build.in -o requirements/build.txt
	@$(UV) --no-deps requirements/demo.in -o requirements/demo.txt
	@$(UV) requirements/bench.in -o requirements/bench.txt
	@$(UV) requirements/bench-engine.in -o requirements/bench-engine.txt
	@$(UV) requirements/train.in -o requirements/train.txt

up: ## Start the containers of docker/compose.yaml.
	@docker compose -f docker/compose.yaml up --build --detach --wait

down: ## Stop the containers; their volumes stay.
	@docker compose -f docker/compose.yaml down

clean: ## Remove .venv and caches; the state folder stays.
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build
