# One vocabulary for people and CI. `make verify` is what CI enforces. Every target sets up what it
# needs by itself: Python 3.11 or newer, make and git are enough.
.PHONY: help docs setup proto lint format types tools test soak bench bench-experts bench-kv demo verify clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)

help:             ## Show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/  /' | expand -t 12

setup: $(STAMP)   ## Make .venv with all extras and development tools
$(STAMP): requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $(STAMP)

proto: setup      ## Regenerate the stubs beside the .proto files
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --grpc_python_out=proto \
	    --mypy_out=quiet:proto --mypy_grpc_out=quiet:proto proto/raddle/v1/*.proto
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --mypy_out=quiet:proto \
	    proto/raddle/etcd/v1/*.proto

format: setup     ## Format code and protos
	$(BIN)/ruff check --fix && $(BIN)/ruff format && $(BIN)/buf format -w proto

lint: setup       ## Style, import contracts, proto rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-cache
	$(BIN)/buf lint
	$(BIN)/buf format --diff --exit-code proto
	@if git rev-parse --verify --quiet HEAD^ >/dev/null && git cat-file -e HEAD^:buf.yaml; then \
	    $(BIN)/buf breaking --against '.git#ref=HEAD^'; fi

types: setup      ## mypy on everything and pyright on the core, both strict
	$(BIN)/mypy
	$(BIN)/pyright

tools: setup      ## Build the servers that tests need, into a cache outside the checkout
	$(BIN)/python tools/build.py

test: tools       ## All tests
	$(BIN)/pytest -n 2 --dist loadfile

soak: tools       ## Faults drawn from a seed against the demo's cluster, MINUTES=n [SEED=n]
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

bench: tools      ## Measure (up to 20 minutes); one JSON object on stdout
	$(BIN)/python -m benchmarks

bench-experts: setup ## Measure expert placement and repair alone (1 minute); one JSON object
	@$(BIN)/python -m benchmarks.experts

bench-kv: setup   ## Measure the KV index and plans alone; one JSON object on stdout
	@$(BIN)/python -m benchmarks.kv

demo: setup       ## Place DeepSeek-R1, serve tokens, kill a rank and a node, compare every token
	$(BIN)/raddle demo

docs: setup       ## Regenerate docs/reference
	$(BIN)/python tools/docs/reference.py

verify: proto     ## What CI enforces
	git diff --exit-code -- proto
	$(MAKE) lint types test
	$(BIN)/python tools/verify_wheel.py

clean:            ## Remove what can be made again
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
