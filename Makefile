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
# docs/reliability.md says what each counts; a variable that is set already wins.
LONG_FORMS = STREAM_CUTS=$${STREAM_CUTS:-200} IDEMPOTENCY_ROUNDS=$${IDEMPOTENCY_ROUNDS:-500} RESUME_CUTS=$${RESUME_CUTS:-200} RESUME_KILLS=$${RESUME_KILLS:-20} \
      LLMSITE_BATCH_LINES=$${LLMSITE_BATCH_LINES:-500} LLMSITE_NEIGHBOUR_PROMPTS=$${LLMSITE_NEIGHBOUR_PROMPTS:-40} \
      FORCED_ANSWERS=$${FORCED_ANSWERS:-100} CYCLES=$${CYCLES:-40} LLMSITE_FUZZ_GRAMMARS=$${LLMSITE_FUZZ_GRAMMARS:-2000} \
      LLMSITE_FUZZ_FILES=$${LLMSITE_FUZZ_FILES:-3000} LLMSITE_FUZZ_QUESTIONS=$${LLMSITE_FUZZ_QUESTIONS:-50} \
      LLMSITE_FUZZ_COMPANIES=$${LLMSITE_FUZZ_COMPANIES:-5000} \
      FAIR_REQUESTS=$${FAIR_REQUESTS:-60} CHAOS_SECONDS=$${CHAOS_SECONDS:-300} CHAOS_CLIENTS=$${CHAOS_CLIENTS:-200} \
      SOAK_SECONDS=$${SOAK_SECONDS:-3600} SLOW_CLIENTS=$${SLOW_CLIENTS:-300} LIST_KEYS=$${LIST_KEYS:-100000}
LONG_TESTS = tests/inference/api/test_idempotency.py tests/inference/api/test_resuming.py tests/real/test_resume_real.py \
      tests/real/test_batches_real.py tests/real/test_neighbours_real.py tests/real/test_forced_real.py tests/real/test_cycles_real.py \
      tests/inference/test_gguf.py tests/structured/test_with_llama_cpp.py tests/real/test_hostile_grammars_real.py \
      tests/inference/api/test_fuzzed_document.py tests/real/test_parking_real.py tests/real/test_chaos_real.py tests/llmsite/test_lists.py \
      tests/test_integrate_generate.py tests/services/test_chaos_on_postgresql.py tests/real/test_slow_clients_real.py \
      tests/engine/test_any_company.py

.PHONY: help run install dev test chaos check bench bench-engine bench-lists bench-batches screenshots lock up down clean

help: ## List the verbs.
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

run: install ## Serve a real model with demo tenants on http://127.0.0.1:8000 (PORT, HOST).
	@exec $(VENV_PYTHON) manage.py up --demo

install: ## Make .venv with what serving needs, and the demo model.
	@$(INSTALL) worker demo

dev: ## Make .venv with what checks and tests need, too.
	@$(INSTALL) dev demo

test: dev ## Run the whole suite; needs neither Redis nor PostgreSQL. ARGS="tests/accounts -n 0" narrows it.
	@$(VENV_PYTHON) -m tests $(ARGS)

chaos: dev ## The long versions of tests that race, cut, kill and fuzz: an hour or two. ARGS="-k idempotency" picks some.
	@env $(LONG_FORMS) $(VENV_PYTHON) -m pytest -n 0 -vv --durations 0 --timeout 7200 $(ARGS) $(LONG_TESTS)

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

bench-lists: dev ## Time every list at 100,000 keys. ARGS="--postgresql URL" measures PostgreSQL, too.
	@$(VENV_PYTHON) manage.py bench_lists $(ARGS)

bench-batches: dev ## Measure what a batch costs those who wait beside it.
	@$(VENV_PYTHON) -m inference.bench.beside_batches $(ARGS)

screenshots: dev ## Make the pictures of docs/screenshots again; needs chromium and chromedriver.
	@$(VENV_PYTHON) -m tests.browser.screenshots

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
