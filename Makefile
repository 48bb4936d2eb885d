# Targets to run and test this project on a machine with git, make and Python 3.11 or later with venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Pass pip's folder of wheels (a CPU build of torch, for example) to uv. Most machines have none.
FIND_LINKS := $(firstword $(PIP_FIND_LINKS) $(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))
# torch is locked by hash like every other package: the CPU build if the folder has it for this platform, else the
# build of the package index.
PLATFORM := $(shell $(PYTHON) -c 'import platform, sys; print("cp%d%d-%s" % (*sys.version_info[:2], platform.machine()))')
CPU_WHEEL := $(if $(filter cp311-x86_64,$(PLATFORM)),$(firstword $(wildcard $(FIND_LINKS)/torch-2.13.0+cpu-cp311-*_x86_64.whl)))
TORCH_LOCK := requirements/torch$(if $(CPU_WHEEL),-cpu).txt
# Another build of torch for `make images`, and the package index that has it; not checked by hash.
TORCH ?=
TORCH_INDEX ?=
PACKAGES := api store sdk data agent trainer operator cli
OUT ?= runs/quickstart
TESTS ?= -m "not slow"
CORES := $(shell getconf _NPROCESSORS_ONLN)
FAULT ?= kill:worker=1,step=130

.PHONY: help install quickstart tools check test test-parallel lint format generate lock clean \
  bench-recovery bench-overhead bench-operator bench-exact bench-throughput bench-buckets bench-checkpoint

help: ## List the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

install: $(VENV)/.installed ## Install the environment into .venv: hash-locked packages, torch, this workspace

$(VENV)/.installed: requirements/uv.txt requirements/dev.txt $(TORCH_LOCK) $(PACKAGES:%=%/pyproject.toml)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=python3.11 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --require-hashes -r requirements/dev.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --require-hashes --no-deps -r $(TORCH_LOCK) $(if $(FIND_LINKS),--find-links "$(FIND_LINKS)")
	$(BIN)/uv pip install --quiet --no-deps --no-build-isolation $(PACKAGES:%=-e %)
	touch $@

# Without compiled bytecode every process of a run would compile torch's and our modules again.
compile: install
	@$(BIN)/python -m compileall -q $(PACKAGES:%=%/src)

.PHONY: compile

quickstart: compile ## Train a small GPT on real text with three workers and kill one of them during the run
	$(BIN)/python -m tools.corpus examples/data
	rm -rf "$(OUT)"
	$(BIN)/pretrain run examples/quickstart.yaml --out "$(OUT)" --fault $(FAULT) $(if $(STEPS),--set training.steps=$(STEPS))

tools: ## Fetch the external programs of the tests by digest into a cache; TOOLS_MIRROR is another address
	@$(PYTHON) tools/fetch_tools.py

check: compile ## Check style, types, import rules and the unit tests of changed packages in under a minute
	@$(BIN)/python tools/check_changed.py

test: compile ## Run the unit, trainer, local-process and API-server tests; skip those whose tools are missing
	@$(PYTHON) tools/fetch_tools.py --for-tests
	$(BIN)/pytest tests/unit $(TESTS) --numprocesses $(CORES) --maxprocesses 8; unit=$$?; \
	  $(BIN)/pytest tests/trainer tests/local tests/compat tests/integration $(TESTS) && exit $$unit

test-parallel: compile ## Compare every parallelism and combination at several sizes with one process
	$(BIN)/pytest tests/parallel --timeout 900

lint: install ## Check style, types, import rules, and drift of generated files
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/python -m tools.crd --check
	$(BIN)/python -m tools.docs --check
	$(BIN)/python -m dashboards --check

format: install ## Fix the style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

generate: install ## Write the generated files: CRD, dashboards, reference pages, diagrams
	$(BIN)/python -m tools.crd
	$(BIN)/python -m tools.docs
	$(BIN)/python -m dashboards

docs: install ## Build the documentation site into dist/site; fail on a broken link or anchor
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --clean

.PHONY: docs

bench-recovery: compile ## Measure the time from a kill to the next step beside plain torchrun
	$(BIN)/python benchmarks/recovery/run.py

bench-overhead: compile ## Measure the step time under the agent beside plain torchrun
	$(BIN)/python benchmarks/overhead/run.py

bench-operator: compile ## Measure the operator with many jobs against a real API server
	$(BIN)/python benchmarks/operator/run.py

bench-exact: compile ## Measure exact sums beside plain sums
	$(BIN)/python benchmarks/exact/run.py

bench-throughput: compile ## Measure the trainer's step beside a plain PyTorch loop
	$(BIN)/python benchmarks/throughput/run.py

bench-buckets: compile ## Measure reductions during backward beside one at the end and DDP
	$(BIN)/python benchmarks/buckets/run.py

bench-checkpoint: compile ## Measure save and restore beside disk, S3 service, torch.save and dcp.async_save
	$(BIN)/python benchmarks/checkpoint/run.py

lock: install ## Update the locked requirements
	for name in uv dev runtime build operator trainer torch; do $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	  --no-annotate --no-emit-index-url --no-emit-find-links requirements/$$name.in -o requirements/$$name.txt || exit 1; done
	test -z "$(CPU_WHEEL)" || printf 'torch==2.13.0+cpu \\\n    --hash=sha256:%s\n' \
	  $$(sha256sum "$(CPU_WHEEL)" | cut -c -64) > requirements/torch-cpu.txt

IMAGES ?= operator trainer
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' operator/pyproject.toml)

# Base image of the release images, by digest. `make images PYTHON_IMAGE="$$(make base-image)"` builds on it.
BASE_IMAGE := $(shell sed -n 's/^FROM //p' requirements/base-image.Dockerfile)

version: ## Print the version of the packages
	@echo "$(VERSION)"

base-image: ## Print the base image of releases, by digest
	@echo "$(BASE_IMAGE)"

images: ## Build the images (PYTHON_IMAGE: base; TORCH, TORCH_INDEX: build of torch; IMAGES: which)
	mkdir -p dist/wheels
	test ! -d "$(FIND_LINKS)" || cp -pu "$(FIND_LINKS)"/torch-*.whl dist/wheels/
	for target in $(IMAGES); do docker build --quiet --target $$target --tag pretrain-$$target:$(VERSION) \
	  --build-arg VERSION=$(VERSION) --build-arg REVISION=$$(git rev-parse HEAD 2>/dev/null || echo unknown) \
	  $(if $(PYTHON_IMAGE),--build-arg PYTHON_IMAGE="$(PYTHON_IMAGE)") \
	  --build-arg TORCH="$(TORCH)" --build-arg TORCH_INDEX="$(TORCH_INDEX)" . || exit 1; done

sbom: install ## Write the bills of materials of both images and the chart into dist/sbom (CycloneDX)
	$(BIN)/python -m tools.sbom dist/sbom --torch $(TORCH_LOCK) --base-image "$(or $(PYTHON_IMAGE),$(BASE_IMAGE))"

audit: install ## Look up known vulnerabilities of all locked packages; skipped with a line where the service is absent
	@$(BIN)/python -m tools.audit $(if $(REQUIRED),--required) $(if $(OSV_URL),--osv-url "$(OSV_URL)") \
	  requirements/uv.txt requirements/dev.txt requirements/torch.txt

kind-up: install ## Create a kind cluster and an S3 service; print how to reach them
	@examples/kind/up

kind-load: ## Copy the images onto the nodes of that cluster
	examples/kind/load pretrain-operator:$(VERSION) pretrain-trainer:$(VERSION)

kind-demo: install ## Install the operator on a kind cluster, train, inject faults, print status and Events
	settings=$$(examples/kind/up) && eval "$$settings" && $(MAKE) --no-print-directory images && examples/kind/demo $(VERSION)

kind-test: compile ## Run the end-to-end suite on a kind cluster; MARK=core: the part that every change must pass
	settings=$$(examples/kind/up) && eval "$$settings" && $(MAKE) --no-print-directory images && \
	  $(BIN)/pytest tests/e2e $(if $(MARK),-m $(MARK)) --timeout 900

.PHONY: version base-image images sbom audit kind-up kind-load kind-demo kind-test

clean: ## Remove the environment, runs and caches
	rm -rf $(VENV) runs dist examples/data .pytest_cache .ruff_cache .hypothesis
