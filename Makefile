# One vocabulary for people and CI. `make verify` is what CI enforces. Every target sets up what it
# needs by itself: Python 3.11 or newer, make and git are enough.
.PHONY: help docs crds setup requirements proto lint format types tools kube-packages kube-tools kube-up \
    kube-down images test test-kube soak bench bench-experts bench-kv demo verify clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)

help:             ## Show this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/  /' | expand -t 16

setup: $(STAMP)   ## Make .venv with all extras and development tools
$(STAMP): requirements-dev.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $(STAMP)

COMPILE := $(BIN)/uv pip compile --quiet --universal --generate-hashes --no-header --no-annotate
IMAGES := $(COMPILE) --constraint requirements-dev.txt
requirements: setup ## Pin anew what pyproject.toml asks for; versions that still fit are kept
	$(COMPILE) --all-extras --group dev -o requirements-dev.txt pyproject.toml
	$(IMAGES) --extra scheduler --extra agent --extra operator -o requirements/raddle.txt \
	    pyproject.toml
	$(IMAGES) --extra agent -o requirements/agent.txt pyproject.toml
	$(IMAGES) --group wheel -o requirements/wheel.txt

proto: setup      ## Regenerate the stubs beside the .proto files
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --grpc_python_out=proto \
	    --mypy_out=quiet:proto --mypy_grpc_out=quiet:proto proto/raddle/v1/*.proto
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --mypy_out=quiet:proto \
	    proto/raddle/etcd/v1/*.proto proto/raddle/kubelet/v1/*.proto

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

# It prints a path, which only `tools` and `kube-tools` give on stdout: others print JSON there.
SERVERS := $(BIN)/python tools/build.py
tools: setup      ## Build the servers that tests need, into a cache outside the checkout
	$(SERVERS)

PACKAGES := containerd runc buildah debootstrap debian-archive-keyring \
    containernetworking-plugins iproute2 iptables conntrack prometheus shellcheck
kube-packages:    ## Install the Debian packages that a cluster and its tests need (as root)
	@dpkg-query --show $(PACKAGES) >/dev/null 2>&1 || { apt-get update && \
	    DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $(PACKAGES); }

kube-tools: setup ## Build Kubernetes, CoreDNS and helm into a cache (10 minutes once)
	$(SERVERS) kubernetes

kube-up: tools kube-tools ## Start a Kubernetes cluster on this machine, [NODES=3] [NAME=default]
	@$(BIN)/python -m tools.kubernetes.cluster up --nodes $(or $(NODES),3) --name $(or $(NAME),default)

kube-down: setup  ## End it, [NAME=default]
	@$(BIN)/python -m tools.kubernetes.cluster down --name $(or $(NAME),default)

images: tools     ## Build the images and write one archive and a list into out/images, [TAG=version]
	@$(BIN)/python -m tools.kubernetes.images out/images $(if $(TAG),--tag $(TAG))

# A cluster is shared by all tests that use it, so these run in one process.
test: tools       ## All tests; those that need a cluster are skipped, by name, where none can run
	$(BIN)/pytest -n 2 --dist loadfile --ignore tests/kube
	$(BIN)/pytest tests/kube

test-kube: tools kube-tools ## Tests on Kubernetes; where they cannot run, they fail
	RADDLE_KUBE=required $(BIN)/pytest tests/kube

soak: setup       ## Faults drawn from a seed against the demo's cluster, MINUTES=n [SEED=n]
	@$(SERVERS) >&2
	@$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),10) $(if $(SEED),--seed $(SEED))

bench: setup      ## Measure (up to 20 minutes); one JSON object on stdout
	@$(SERVERS) >&2
	@$(BIN)/python -m benchmarks

bench-experts: setup ## Measure expert placement and repair alone (1 minute); one JSON object
	@$(BIN)/python -m benchmarks.experts

bench-kv: setup   ## Measure the KV index and plans alone; one JSON object on stdout
	@$(BIN)/python -m benchmarks.kv

demo: setup       ## Place DeepSeek-R1, serve tokens, kill a rank and a node, compare every token
	$(BIN)/raddle demo

docs: setup       ## Regenerate docs/reference, and the chart's README and dashboard
	$(BIN)/python tools/docs/reference.py
	$(BIN)/python tools/docs/chart.py

crds: setup       ## Regenerate the custom resource definitions from the protos
	$(BIN)/python -m tools.kubernetes.crds

verify: proto     ## What CI enforces
	git diff --exit-code -- proto
	$(MAKE) lint types test
	$(BIN)/python tools/verify_wheel.py

clean:            ## Remove what can be made again
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
